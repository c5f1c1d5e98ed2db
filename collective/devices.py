"""What is found out about a device before its first array is handed to the engine: its kernels, and whether MPI can
send its memory."""

from __future__ import annotations

import importlib.util
import threading
from pathlib import Path

from . import _core, cuda_aware, kernels, runtime
from .errors import InternalError

__all__ = ["prepare"]

_preparing = threading.Lock()


def _nccl_files() -> list[str]:
    """The libraries in the wheels nvidia-nccl-cu12 and -cu13, which torch for CUDA installs."""
    if importlib.util.find_spec("nvidia") is None:
        return []
    spec = importlib.util.find_spec("nvidia.nccl")
    places = spec.submodule_search_locations if spec is not None else None
    files = (Path(place) / "lib" / "libnccl.so.2" for place in places or ())
    return [str(file) for file in files if file.exists()]


def prepare(ordinal: int) -> None:
    """Find it out, once after init(); ordinal: the device's number among CUDA_VISIBLE_DEVICES; -1: the host."""
    if ordinal < 0:
        return
    state = runtime.current()
    if ordinal in state.prepared_devices:
        return
    with _preparing:
        if ordinal in state.prepared_devices:
            return
        try:
            _core.load_kernels(ordinal, kernels.image(_core.compute_capability(ordinal)))
        except (kernels.KernelsUnavailableError, InternalError) as error:
            _core.do_without_kernels(ordinal, str(error))
        if state.config.nccl:
            _core.load_nccl(_nccl_files())
        # One rank tries for all ranks of its node.
        if not state.engine.shares_memory() and runtime.local_rank() == 0:
            answer = cuda_aware.find_out(several_nodes=runtime.cross_size() > 1)
            _core.set_messages(ordinal, "" if answer.aware else f"CUDA-aware: {answer.how}")
        state.prepared_devices.add(ordinal)
