"""The machine: its device, the dtype that suits it, memory in bytes, versions, and times in words."""

import ctypes
import errno
import gc
import os
import platform
import subprocess
import sys
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any

import psutil
import torch
from safetensors import SafetensorError

from dialogue import given_gpus

PACKAGES = ("torch", "transformers", "peft", "bitsandbytes", "datasets", "accelerate")


def pick_device() -> torch.device:
    """CUDA where there is one, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def pick_dtype(device: torch.device) -> torch.dtype:
    """The fastest dtype in which weights can be kept and trained against on `device`. On a CPU that multiplies bfloat16
    itself it is several times faster than float32, and several times slower where it is emulated. Not measured: a busy
    machine would choose otherwise."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    known = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return torch.bfloat16 if known.get("amx_bf16") or known.get("avx512_bf16") else torch.float32


def gpu_notes(training: bool = False) -> list[str]:
    """What a person should know of GPUs that stay unused here, a line each."""
    ready = torch.cuda.is_available()
    if not torch.version.cuda or given_gpus in ("", "-1") or (ready and (not training or "LOCAL_RANK" in os.environ)):
        return []
    count = len(given_gpus.split(",")) if ready and given_gpus else _count_gpus()
    if ready and count > 1:
        command = f"torchrun --nproc_per_node {count} Fine_tuningmodel.py"
        return [f"the first of {count} GPUs is used; `{command}` uses all"]
    old = f"a GPU is here, and its driver is too old for this torch (CUDA {torch.version.cuda}): the CPU computes"
    remedy = "update the driver, or `pip install torch --index-url https://download.pytorch.org/whl/cu126`"
    return [f"{old}; {remedy}"] if count and not ready else []


def _count_gpus() -> int:
    """NVIDIA's GPUs as their driver counts them; 0 where there is no driver."""
    try:
        listed = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True, timeout=30, check=True).stdout
    except (OSError, subprocess.SubprocessError):
        return 0
    return sum(line.startswith("GPU ") for line in listed.splitlines())


def free_memory(device: torch.device, processes: int = 1) -> int:
    """Bytes that this process may still take on `device`; `processes` share the computer's memory."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available // processes


def stay_on(device: torch.device) -> None:
    """Let a GPU that is full be out of memory on Windows too: from 536.40 on, NVIDIA's driver there goes on in the
    computer's memory, many times slower ("CUDA - Sysmem Fallback Policy" in its control panel)."""
    if sys.platform == "win32" and device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        torch.cuda.set_per_process_memory_fraction((free + torch.cuda.memory_reserved(device)) / total, device)


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


def keep_freed_memory(keep: bool) -> None:
    """Let the process keep what it frees, on Linux, or hand back blocks of 4 MB and more. By itself glibc hands back
    those of 32 MB and more, and the next tensor pays for zeroed pages again (six times its cost for a block of logits).

    Nothing is kept while weights are loaded: the float32 values of a file would stay beside those made of them
    (GPT-2-XL: 11.5 GB at the peak). Nor with 8-bit weights on a CPU: what is kept of the activations would stand in the
    holes that each product's 16-bit copy of its weight leaves (GPT-2 774M: 4.4 GB, not 3.4).
    """
    if mallopt := _of_glibc("mallopt"):
        mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD (source: mallopt(3))
        mallopt(-3, 2**30 if keep else 2**22)  # M_MMAP_THRESHOLD


def release_memory() -> None:
    """Hand memory back after the caller dropped its last reference to a model."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    if trim := _of_glibc("malloc_trim"):
        trim(0)


def _of_glibc(name: str) -> Any:
    """A function of the C library; None where it is no glibc."""
    return getattr(ctypes.CDLL(None), name, None) if sys.platform == "linux" else None


def is_out_of_memory(error: BaseException) -> bool:
    """Whether it says that memory did not suffice: a GPU's, or the computer's, in any of the ways that libraries do."""
    # CUDA (also as torch.AcceleratorError) and MPS; cuBLAS; bitsandbytes; torch on a CPU and safetensors
    signs = ("out of memory", "CUBLAS_STATUS_ALLOC_FAILED", "cublasLt ran into an error", "t allocate memory")
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)) or getattr(error, "errno", None) == errno.ENOMEM:
        return True
    return isinstance(error, (RuntimeError, SafetensorError)) and any(sign in str(error) for sign in signs)


def out_of_memory_in_words(error: BaseException) -> str:
    """One line: where, how much is free, and what to do."""
    on_cpu = isinstance(error, MemoryError) or "llocate memory" in str(error)
    device = torch.device("cpu") if on_cpu else pick_device()
    where = f"out of memory on the {device.type.upper()}"
    with suppress(RuntimeError):  # without a context the GPU does not say
        where += f", {free_memory(device) / 1e9:,.2f} GB are free"
    elsewhere = "" if device.type == "cpu" else ", or the CPU (with CUDA_VISIBLE_DEVICES=-1 in the environment)"
    return f"{where}; close other programs, or take a smaller --preset, --max_length or model{elsewhere}"


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
