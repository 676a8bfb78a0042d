"""How numba compiles the loops of `dialogue/chat/int8.py`, and where it keeps what it compiled.

The user's cache has it, for each processor; the first chat waits for it, some seconds, behind the first prompt. What
`int8.py` calls stands in that one file: numba looks at no other's date before it takes what it kept.
"""

import os
import warnings
from contextlib import suppress
from typing import Any

import torch

from dialogue.wheels import cache_folder

# As many threads as torch has, which counts cores; numba alone would start one for every hyperthread.
os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))
os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_folder() / "compiled"))
import numba
from numba.core import cgutils as cgutils

# numba warns that `block` does not run in parallel by itself, where it loads what it had compiled before.
warnings.filterwarnings("ignore", category=numba.NumbaPerformanceWarning)

# Sums in any order, which vector instructions need. NaN and infinity stay what they are: broken weights are noticed.
compiled: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "nogil": True}
with suppress(OSError):  # a home that cannot be written: it compiles each time
    os.makedirs(os.environ["NUMBA_CACHE_DIR"], exist_ok=True)
    compiled["cache"] = os.access(os.environ["NUMBA_CACHE_DIR"], os.W_OK)
# Threads for `prange` alone; numba would also start them for every sum of two small arrays.
no = ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion")
threaded: dict[str, Any] = {**compiled, "parallel": {"prange": True, **dict.fromkeys(no, False)}}
