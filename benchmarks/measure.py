"""Seconds and peak memory of a computation, and the machine in generic terms."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

Value = TypeVar("Value")


@dataclass(frozen=True)
class Measured:
    """One run of a computation.

    Attributes:
        seconds: on the chosen clock.
        peak_bytes: highest memory during the run, less what was held before it.
        value: what the computation returned.
    """

    seconds: float
    peak_bytes: int
    value: float


# With one thread, processor time is what wall time would be without other jobs.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(compute: Callable[[], float], device: torch.device, clock: str = "wall") -> Measured:
    """Runs a computation once, after what is unused was given back to the system.

    On the CPU the peak is the kernel's own high-water mark of the process (Linux), so that no
    allocation is missed between two samples; on CUDA it is the allocator's.
    """
    gc.collect()
    before = _start_cuda(device) if device.type == "cuda" else _start_cpu()
    started = CLOCKS[clock]()
    value = compute()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = CLOCKS[clock]() - started
    after = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else _status("VmHWM")
    return Measured(seconds, after - before, value)


def apart(work: Callable[..., Value], *arguments: Any) -> Value:
    """What a function returns in a process of its own, for peaks of memory.

    There the C library gives memory back when it is freed, so that what is resident is in use: by
    default it keeps much of it, and memory that others had and gave back would be used unseen.
    """
    context = multiprocessing.get_context("spawn")
    with context.Pool(1, _start_apart, (torch.get_num_threads(),)) as pool:
        return pool.apply(work, arguments)


def _start_apart(threads: int) -> None:
    torch.set_num_threads(threads)
    # -3: M_MMAP_THRESHOLD of mallopt(3).
    ctypes.CDLL("libc.so.6").mallopt(-3, 65536)


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory and library versions."""
    found: dict[str, Any] = {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def load_average() -> float:
    """Mean number of busy processes of the last minute: 0 on a quiet machine."""
    return os.getloadavg()[0]


def _start_cuda(device: torch.device) -> int:
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats(device)
    torch.cuda.synchronize(device)
    return torch.cuda.memory_allocated(device)


def _start_cpu() -> int:
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    # 5: set the high-water mark back to what is resident now, see proc_pid_clear_refs(5).
    Path("/proc/self/clear_refs").write_text("5")
    return _status("VmHWM")


def _status(field: str) -> int:
    value = _field(Path("/proc/self/status"), field)
    return int(value.split()[0]) * 1024


def _field(path: Path, name: str) -> str:
    for line in path.read_text("utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
