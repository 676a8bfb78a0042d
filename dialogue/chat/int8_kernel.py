"""One token through a decoder's block, and several through a product: loops that numba compiles for the processor.

Weights are int8 with a scale a row, everything else is float32. Reading the weights bounds the time of a token, so
its loop does little but read: that is some three times as fast as the int8 kernels that torch brings, which want int8
activations or serve larger batches. numba keeps what it compiled, so that only the first chat on a machine waits for
it (some seconds, behind the first prompt).
"""

import math
import os
import warnings
from typing import Any, NamedTuple

import numpy as np
import torch

# As many threads as torch has, which counts cores; numba alone would start one for every hyperthread.
os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))
import numba

# numba warns that `token` does not run in parallel by itself, where it loads what it had compiled before.
warnings.filterwarnings("ignore", category=numba.NumbaPerformanceWarning)

# Sums in any order, which vector instructions need. NaN and infinity stay what they are: broken weights are noticed.
compiled: dict[str, Any] = {"fastmath": {"reassoc", "contract", "nsz"}, "nogil": True}
compiled["cache"] = os.access(os.path.dirname(__file__), os.W_OK)  # beside this file, as Python's own bytecode
# Threads for `prange` alone; numba would also start them for every sum of two small arrays.
no = ("comprehension", "reduction", "inplace_binop", "setitem", "numpy", "stencil", "fusion")
threaded: dict[str, Any] = {**compiled, "parallel": {"prange": True, **dict.fromkeys(no, False)}}
COLUMNS = 1024  # of four tokens: 16 KB, so that they stay in the innermost cache


class Matrix(NamedTuple):
    """A weight (rows, columns) int8, rows an even number, and float32 (rows,), (columns,) and (rows,) that go with it:
    the product is weight @ (x * column) * scale + bias."""

    weight: np.ndarray
    scale: np.ndarray
    column: np.ndarray
    bias: np.ndarray


class Norm(NamedTuple):
    """LayerNorm's weight and bias (width,) and its epsilon; RMSNorm has no use for the bias."""

    weight: np.ndarray
    bias: np.ndarray
    eps: float


class Block(NamedTuple):
    """One layer of GPT-2, or where `gated`, of Llama."""

    norm_1: Norm
    qkv: Matrix
    out: Matrix
    norm_2: Norm
    up: Matrix
    down: Matrix


class Attention(NamedTuple):
    """How a layer attends."""

    heads: int  # of the keys and values
    group: int  # queries that share a key
    size: int  # of a head
    scale: float  # of query times key


@numba.njit(**compiled)
def token(x, block, cache, place, rotation, attention, gated, threads):
    """Add to x (width,) what one block makes of it; fills cache[:, :, place] (2, heads, context, size)."""
    qkv = product(_norm(x, block.norm_1, gated), block.qkv, threads)
    if gated:
        _rotate(qkv, rotation[0][place], rotation[1][place], attention)
    x += product(_attend(qkv, cache, place, attention, threads), block.out, threads)
    hidden = product(_norm(x, block.norm_2, gated), block.up, threads)
    x += product(_activate(hidden, gated, threads), block.down, threads)


@numba.njit(**threaded)
def product(x, matrix, threads):
    """(columns,) -> (rows,)."""
    rows, columns = matrix.weight.shape
    x, y = x * matrix.column, np.empty(rows, np.float32)
    for part in numba.prange(threads):
        for row in range(rows * part // threads, rows * (part + 1) // threads):
            weight, total = matrix.weight[row], np.float32(0)
            for column in range(columns):
                total += np.float32(weight[column]) * x[column]
            y[row] = total * matrix.scale[row] + matrix.bias[row]
    return y


@numba.njit(**compiled)
def _norm(x, norm, rms):
    """(width,) -> (width,)."""
    mean = np.float32(0) if rms else x.sum() / np.float32(len(x))
    squares = np.float32(0)
    for i in range(len(x)):
        squares += (x[i] - mean) * (x[i] - mean)
    scale = np.float32(1 / math.sqrt(squares / len(x) + norm.eps))
    y = (x - mean) * scale * norm.weight
    return y if rms else y + norm.bias


@numba.njit(**compiled)
def _rotate(qkv, cos, sin, attention):
    """Turn the queries and keys in qkv, in place; the first half of `sin` (size,) has its sign changed already."""
    size = attention.size
    half = size // 2
    for head in range(attention.heads * (attention.group + 1)):
        part = qkv[head * size : (head + 1) * size]
        for i in range(half):
            first, second = part[i], part[i + half]
            part[i] = first * cos[i] + second * sin[i]
            part[i + half] = second * cos[i + half] + first * sin[i + half]


@numba.njit(**threaded)
def _attend(qkv, cache, place, attention, threads):
    """((heads * group + 2 heads) * size,) -> (heads * group * size,)."""
    heads, group, size, scale = attention
    queries = heads * group
    for head in range(heads):
        key, value = cache[0, head, place], cache[1, head, place]
        for i in range(size):
            key[i] = qkv[(queries + head) * size + i]
            value[i] = qkv[(queries + heads + head) * size + i]
    y = np.empty(queries * size, np.float32)
    for part in numba.prange(threads):
        weights = np.empty(place + 1, np.float32)
        for query in range(queries * part // threads, queries * (part + 1) // threads):
            q, out = qkv[query * size : (query + 1) * size], y[query * size : (query + 1) * size]
            keys, values = cache[0, query // group], cache[1, query // group]
            highest = np.float32(-np.inf)
            for past in range(place + 1):
                key, dot = keys[past], np.float32(0)
                for i in range(size):
                    dot += q[i] * key[i]
                weights[past] = dot * np.float32(scale)
                highest = max(highest, weights[past])
            total = np.float32(0)
            out[:] = 0
            for past in range(place + 1):
                weight, value = math.exp(weights[past] - highest), values[past]
                total += weight
                for i in range(size):
                    out[i] += weight * value[i]
            for i in range(size):
                out[i] /= total
    return y


@numba.njit(**threaded)
def _activate(x, gated, threads):
    """SiLU of the first half times the second, (2 width,) -> (width,); or GELU by its tanh form, (width,) -> (width,).

    0.5 (1 + tanh z) is 1 / (1 + exp(-2 z)).
    """
    width = len(x) // 2 if gated else len(x)
    y = np.empty(width, np.float32)
    for part in numba.prange(threads):
        for i in range(width * part // threads, width * (part + 1) // threads):
            value = x[i]
            if gated:
                z, factor = value, x[width + i]
            else:
                cube = value * value * value
                z, factor = np.float32(1.5957691216) * (value + np.float32(0.044715) * cube), np.float32(1)
            y[i] = value / (np.float32(1) + math.exp(-z)) * factor
    return y


@numba.njit(**threaded)
def products(x, matrix, threads):
    """(n, columns) -> (n, rows), where n is a multiple of four.

    Two rows and four tokens at a time: eight sums stay in registers, and each number that was read serves several.
    """
    weight, (rows, columns) = matrix.weight, matrix.weight.shape
    x, y = x * matrix.column, np.empty((len(x), rows), np.float32)
    for part in numba.prange(threads):
        for row in range(rows // 2 * part // threads * 2, rows // 2 * (part + 1) // threads * 2, 2):
            for token in range(0, len(x), 4):
                sums = np.zeros((2, 4), np.float32)
                for start in range(0, columns, COLUMNS):
                    stop = min(start + COLUMNS, columns)
                    _tile(
                        weight[row][start:stop], weight[row + 1][start:stop], x[token][start:stop],
                        x[token + 1][start:stop], x[token + 2][start:stop], x[token + 3][start:stop], sums,
                    )  # fmt: skip
                for t in range(4):
                    y[token + t, row] = sums[0, t] * matrix.scale[row] + matrix.bias[row]
                    y[token + t, row + 1] = sums[1, t] * matrix.scale[row + 1] + matrix.bias[row + 1]
    return y


@numba.njit(**compiled)
def _tile(w, v, x0, x1, x2, x3, sums):
    """Two rows (columns,) int8, four tokens (columns,) -> their products added to sums (2, 4)."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    for column in range(len(w)):
        first, second = np.float32(w[column]), np.float32(v[column])
        a0 += first * x0[column]
        a1 += first * x1[column]
        a2 += first * x2[column]
        a3 += first * x3[column]
        b0 += second * x0[column]
        b1 += second * x1[column]
        b2 += second * x2[column]
        b3 += second * x3[column]
    for t, total in enumerate((a0, a1, a2, a3)):
        sums[0, t] += total
    for t, total in enumerate((b0, b1, b2, b3)):
        sums[1, t] += total
