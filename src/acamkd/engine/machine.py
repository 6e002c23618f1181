"""What a processor is, as far as times depend on it."""

from __future__ import annotations

import os
import platform
from pathlib import Path

INT8_FLAGS = ("amx_int8", "avx512_vnni", "avx_vnni", "i8mm", "asimddp")
"""Instructions that multiply and add 8-bit integers at once, best first; x86's VNNI and their like on ARM."""


def processor() -> str:
    """Model name of the processor."""
    return _cpuinfo("model name") or platform.processor() or platform.machine()


def cores() -> int:
    """Number of cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def int8_instructions() -> str | None:
    """The processor's instruction for products of 8-bit integers; None if it has none, or the system does not tell."""
    flags = (_cpuinfo("flags") or _cpuinfo("Features")).split()
    return next((flag for flag in INT8_FLAGS if flag in flags), None)


def load() -> float | None:
    """Mean number of processes that wanted to run in the last minute; None on Windows."""
    return round(os.getloadavg()[0], 1) if hasattr(os, "getloadavg") else None


def _cpuinfo(name: str) -> str:
    """First value of this name in /proc/cpuinfo; empty where there is none."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    return next((line.partition(": ")[2] for line in lines if line.startswith(name)), "")
