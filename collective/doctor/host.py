"""The machine of a process, as the kernel's files tell: memory, shared memory, control groups, network cards.

A file that the kernel does not have means that there is no such limit or device.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

__all__ = ["core_quota", "huge_pages", "memory", "rdma_devices", "shm"]

_GROUPS, _MEMBERSHIP = Path("/sys/fs/cgroup"), Path("/proc/self/cgroup")
_NO_LIMIT = 1 << 60  # version 1 has a number of pages that no machine has for none


def memory() -> dict[str, int]:
    """Bytes: total, available, swap and swap_used; limit and used of the narrowest control group, 0 for none."""
    lines = (line.split() for line in Path("/proc/meminfo").read_text().splitlines())
    kib = {words[0].rstrip(":"): int(words[1]) for words in lines}
    limit, used = _group_memory()
    return {
        "total": kib["MemTotal"] << 10,
        "available": kib["MemAvailable"] << 10,
        "swap": kib["SwapTotal"] << 10,
        "swap_used": kib["SwapTotal"] - kib["SwapFree"] << 10,
        "limit": limit,
        "used": used,
    }


def _group_memory() -> tuple[int, int]:
    found = []
    for group in _groups("memory"):
        for limit_name, used_name in (
            ("memory.max", "memory.current"),
            ("memory.limit_in_bytes", "memory.usage_in_bytes"),
        ):
            limit, used = _number(group / limit_name), _number(group / used_name)
            if limit is not None and used is not None and limit < _NO_LIMIT:
                found.append((limit, used))
    return min(found, default=(0, 0))


def core_quota() -> float:
    """How many cores' time a control group grants; 0: as many as there are."""
    found = []
    for group in _groups("cpu"):
        words = _words(group / "cpu.max") or [
            *_words(group / "cpu.cfs_quota_us"),
            *_words(group / "cpu.cfs_period_us"),
        ]
        if len(words) == 2 and words[0].isdigit() and int(words[1]) > 0:  # "max" and -1 are no limit
            found.append(int(words[0]) / int(words[1]))
    return min(found, default=0.0)


def _groups(controller: str) -> Iterator[Path]:
    """The directories of this process's control group and of those around it, of both versions."""
    for line in _MEMBERSHIP.read_text().splitlines() if _MEMBERSHIP.exists() else []:
        _, controllers, name = line.split(":", 2)
        if controllers and controller not in controllers.split(","):
            continue
        root = _GROUPS / controller if controllers else _GROUPS
        inner = Path(name.lstrip("/"))
        for group in [inner, *inner.parents]:  # in a container the inner ones may not be there
            if (root / group).is_dir():
                yield root / group


def _words(path: Path) -> list[str]:
    return path.read_text().split() if path.is_file() else []


def _number(path: Path) -> int | None:
    words = _words(path)
    return int(words[0]) if words and words[0].isdigit() else None


def shm() -> dict[str, int]:
    """Bytes of /dev/shm: size and free; both 0 if there is none."""
    if not Path("/dev/shm").is_dir():
        return {"size": 0, "free": 0}
    found = os.statvfs("/dev/shm")
    return {"size": found.f_blocks * found.f_frsize, "free": found.f_bavail * found.f_frsize}


def huge_pages() -> str:
    """The kernel's setting of transparent huge pages: always, madvise or never; "" without them."""
    words = _words(Path("/sys/kernel/mm/transparent_hugepage/enabled"))
    return next((word.strip("[]") for word in words if word.startswith("[")), "")


def rdma_devices() -> list[str]:
    """Cards with InfiniBand's verbs, which need locked memory."""
    directory = Path("/sys/class/infiniband")
    return sorted(path.name for path in directory.iterdir()) if directory.is_dir() else []
