"""Seconds and peak memory of a computation, and a description of the machine."""

from __future__ import annotations

import ctypes
import gc
import multiprocessing
import os
import platform
import statistics
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch

if TYPE_CHECKING:
    from collections.abc import Callable

Value = TypeVar("Value")

GIB = 2**30
# With one thread, processor time is what wall time would be on an idle machine.
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


@dataclass(frozen=True)
class Measured:
    """Seconds of a computation, its peak memory less what was held before, and its result."""

    seconds: float
    peak_bytes: int
    value: float


def measure(
    compute: Callable[[], float], device: torch.device, clock: str = "wall", *, trim: bool = True
) -> Measured:
    """Runs a computation once.

    On the CPU the peak is the kernel's high-water mark of the process (Linux), which no
    allocation can slip past; on CUDA it is the allocator's.

    Args:
        compute: returns the value to keep.
        device: that it runs on.
        clock: a key of CLOCKS.
        trim: whether unused memory is returned to the system before. A peak needs it. Seconds then
            count the first touch of all that is allocated, which a job of many steps pays once.
    """
    gc.collect()
    before = reset_peak(device) if trim else 0
    started = CLOCKS[clock]()
    value = compute()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    seconds = CLOCKS[clock]() - started
    return Measured(seconds, peak_bytes(device) - before, value)


def measure_steps(
    step: Callable[[], float], device: torch.device, clock: str, repeats: int
) -> dict[str, float]:
    """After a warm-up, peak and value of a run, and the median seconds of some runs after it."""
    step()
    first = measure(step, device, clock)
    runs = [measure(step, device, clock, trim=False) for _ in range(repeats)]
    return {
        "seconds": statistics.median(run.seconds for run in runs),
        "peak_mib": first.peak_bytes / 2**20,
        "value": first.value,
    }


def apart(work: Callable[..., Value], *arguments: Any) -> Value:
    """What a function returns in a process of its own, where peaks of memory are exact.

    Its C library returns freed memory to the system at once. By default it keeps much of it, and
    a computation that reuses such memory would seem to need none.
    """
    context = multiprocessing.get_context("spawn")
    threads = (torch.get_num_threads(),)
    with ProcessPoolExecutor(1, context, _start_apart, threads) as pool:
        return pool.submit(work, *arguments).result()


def _start_apart(threads: int) -> None:
    torch.set_num_threads(threads)
    # -3: M_MMAP_THRESHOLD of mallopt(3).
    ctypes.CDLL("libc.so.6").mallopt(-3, 65536)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations a second of a product of large square matrices, the best of ten.

    A GPU's data sheet states a rate that its power limit does not let it keep; a share is of this.
    """
    size = 8192 if device.type == "cuda" else 512
    left, right = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))

    def multiply() -> float:
        for _ in range(10):
            torch.mm(left, right)
        return 0.0

    seconds = min(measure(multiply, device).seconds for _ in range(11))
    return 10 * 2 * size**3 / seconds


def machine(device: torch.device) -> dict[str, Any]:
    """Processor, memory and library versions."""
    found: dict[str, Any] = {
        "cpu": _field(Path("/proc/cpuinfo"), "model name") or platform.processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / GIB),
        "threads": torch.get_num_threads(),
        # Running processes in the last minute: 0 on an idle machine.
        "load": os.getloadavg()[0],
        "torch": torch.__version__,
    }
    if device.type == "cuda":
        found["gpu"] = torch.cuda.get_device_name(device)
    return found


def reset_peak(device: torch.device) -> int:
    """Sets the peak back to what is held now, which it returns in bytes."""
    if device.type == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats(device)
        torch.cuda.synchronize(device)
    else:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
        # 5 resets the high-water mark of resident memory, see proc_pid_clear_refs(5).
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes(device)


def peak_bytes(device: torch.device) -> int:
    """The most memory that was held since the last measurement began."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return int(_field(Path("/proc/self/status"), "VmHWM").split()[0]) * 1024


def _field(path: Path, name: str) -> str:
    for line in path.read_text("utf-8").splitlines():
        key, _, value = line.partition(":")
        if key.strip() == name:
            return value.strip()
    return ""
