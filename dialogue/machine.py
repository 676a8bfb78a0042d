"""The machine: its device, the dtype that suits it, memory in bytes, versions, and times in words."""

import ctypes
import gc
import os
import platform
import sys
import time
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")


def pick_device() -> torch.device:
    """CUDA where there is one, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(device: torch.device, name: str | None = None) -> torch.dtype:
    """The dtype of that name, else the fastest dtype in which weights can be kept and trained against on `device`.

    On a CPU it is measured, since bfloat16 is several times faster than float32 where the processor
    multiplies it (AMX, AVX512-BF16) and several times slower where it is emulated; no library call
    tells which. Takes some 50 ms.
    """
    if name:
        return getattr(torch, name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "mps":
        return torch.float32
    return torch.bfloat16 if _matmul_seconds(torch.bfloat16) < _matmul_seconds(torch.float32) else torch.float32


def _matmul_seconds(dtype: torch.dtype) -> float:
    """Best of four (256, 768) x (768, 3072) products: the shape of a GPT-2 projection."""
    activations, weight = torch.ones(256, 768, dtype=dtype), torch.ones(3072, 768, dtype=dtype)
    seconds = []
    for _ in range(4):
        start = time.perf_counter()
        torch.nn.functional.linear(activations, weight)
        seconds.append(time.perf_counter() - start)
    return min(seconds)


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that this process may still take on `device`; `processes` share the computer's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // processes


def used_memory(device: torch.device) -> int:
    """Bytes that this process has in the computer's memory, or allocated on a CUDA device."""
    return torch.cuda.memory_allocated(device) if device.type == "cuda" else psutil.Process().memory_info().rss


def reset_peak(device: torch.device) -> None:
    """Let the peak be counted from here on; loading a model has one of its own. On a CPU, Linux alone can do that."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
    elif sys.platform == "linux":
        with suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # source: proc(5)


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated on a CUDA device, else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kibibytes elsewhere (getrusage(2))


def release_memory() -> None:
    """Hand memory back after the caller dropped its last reference to a model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if sys.platform == "linux" and (trim := getattr(ctypes.CDLL(None), "malloc_trim", None)):  # musl has none
        trim(0)


def duration(seconds: float) -> str:
    """95 -> '1 min 35 s'; 900 -> '15 min'; 5400 -> '1.5 h'; 200000 -> '2.3 days'."""
    if seconds < 60:
        return f"{seconds:.0f} s"
    if seconds < 600:
        return f"{int(seconds) // 60} min {int(seconds) % 60} s"
    if seconds < 5400:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 86400 else f"{seconds / 86400:.1f} days"


def versions() -> dict[str, str]:
    """Python and the packages that decide a result."""
    return {"python": platform.python_version(), **{name: version(name) for name in PACKAGES}}


def hardware(device: torch.device) -> str:
    """The machine in words: the GPU's name, or the processor and its threads."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()} CPU, {torch.get_num_threads()} threads"


def gather(value: Any) -> list[Any]:
    """Each process's `value`, the first one's first, the same list in all of them. What was measured differs between
    processes, and they must take the same steps."""
    if not torch.distributed.is_initialized():
        return [value]
    values: list[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a device or the computer had too little memory."""
    return isinstance(error, (torch.OutOfMemoryError, MemoryError))
