"""Checks of devices: what the driver finds, who uses which, and what MPI and CuPy can do with them."""

from __future__ import annotations

from .findings import Finding, ok, ranks_text, warn
from .job import Job

__all__ = ["gpus"]

_AWARE = "Use an MPI that can send device memory: docs/gpu.md tells which, and how it is set up."


def gpus(job: Job) -> list[Finding]:
    if not any(facts["devices"] for facts in job.ranks):
        return [ok(f"no device: {job.ranks[0]['no_devices']}")]
    without = [rank for rank, facts in enumerate(job.ranks) if not facts["devices"]]
    findings = []
    if without:
        text = f"no device on {ranks_text(without)}, though others have one: {job.ranks[without[0]]['no_devices']}"
        findings.append(warn(text, "Look at CUDA_VISIBLE_DEVICES, the driver and the batch system's request of GPUs."))
    findings += [*_sharing(job), *_software(job)]
    if answer := job.measured.cuda_aware:
        text = f"CUDA-aware MPI: {answer}"
        # On one node devices share memory without MPI.
        is_needed = len(job.nodes) > 1 and not answer.startswith("yes")
        findings.append(
            warn(f"{text}; between nodes, arrays go by way of the hosts", _AWARE) if is_needed else ok(text)
        )
    return findings


def _sharing(job: Job) -> list[Finding]:
    """Devices by rank: each takes that of its number on the node, as scripts do."""
    users: dict[tuple[int, str], list[int]] = {}
    for first, members in job.nodes.items():
        for local, rank in enumerate(members):
            if devices := job.ranks[rank]["devices"]:
                users.setdefault((first, devices[local % len(devices)]), []).append(rank)
    shown = next(facts for facts in job.ranks if facts["devices"])
    names = ", ".join(f"{number} {name}" for number, name in enumerate(shown["device_names"]))
    visible = {facts["visible_devices"] for facts in job.ranks}
    seen = "" if visible == {"all"} else f" (CUDA_VISIBLE_DEVICES: {'; '.join(sorted(visible))})"
    shared = [ranks for ranks in users.values() if len(ranks) > 1]
    if not shared:
        return [ok(f"{shown['host']} has {names}{seen}; each rank has its own")]
    text = "; ".join(f"{ranks_text(ranks)} share one" for ranks in shared)
    remedy = "Start as many ranks per host as it has devices, and let each see its own by hvd.local_rank()."
    return [warn(f"{shown['host']} has {names}{seen}; {text}", remedy)]


def _software(job: Job) -> list[Finding]:
    """CuPy, and NVRTC, which compiles the kernels."""
    reasons = {facts["kernels"]: rank for rank, facts in reversed(list(enumerate(job.ranks))) if facts["devices"]}
    findings = [
        warn(f"rank {rank}: no kernels, so arrays go by way of the host: {why}", "pip install 'collective[cuda13]'.")
        for why, rank in reasons.items()
        if why
    ]
    cupy = job.ranks[0]["cupy"]
    return findings or [ok(f"kernels are compiled by NVRTC; CuPy {cupy}")]
