"""Products with int8 weights on a CPU, and a whole block of a decoder around them, in loops that numba compiles.

The problem. One new token reads every weight of the model once and does a single multiplication with it, so the bytes
of the weights bound its speed, not the arithmetic: float32 weights are four times as many bytes as int8 ones.

What was tried, on two cores of an AMD EPYC with AVX-512:
- The int8 kernels that torch brings (FBGEMM) want int8 activations too. Two rows of 7 bits for each activation gave
  the quality of int8 weights alone; the loop below, which does little but read, is some three times as fast.
- CTranslate2's int8: this file makes 2.9 times as many tokens a second for GPT-2 124M and 2.0 times for GPT-2-XL.
- float16 and bfloat16 weights are twice the bytes. A timing at each start chose among all kernels, so that chance could
  decide which weights a conversation with a seed had; they are gone.
- Several rows at once are bound by arithmetic. A tile of 2 weight rows and 4 tokens did 43 G multiplications a second
  on one core, 2 and 8 did 50, 4 and 4 did 55, which is also what torch's float32 product reaches there. Activations of
  16 bits, for the processor's integer instructions, did 36: numba's compiler spends the gain on moving bytes about.

The trade. A weight is rounded to 8 bits with a scale for its row and one for its column; activations, sums, norms and
attention stay in float32. On the starter's replies that costs 0.46 % perplexity (95 %: 0.24 to 0.67). Whoever wants
the weights exactly as they are stored takes float32 and waits longer.

What stands between the products is compiled as well: beside products as fast as these, torch's own operations would
take a third of a token's time. Several sequences that continue the same text share its keys and values and read each
weight once for all of them. Their own keys and values stand behind the shared ones, interleaved: token number `step`
of sequence number `slot` of `count` is at `start + step * count + slot`. One sequence alone is the case `count` = 1.

numba keeps what it compiled in the user's cache; the first chat waits for it, some seconds, behind the first prompt.
"""

import math
import os
import warnings
from contextlib import suppress
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dialogue.wheels import cache_folder

# As many threads as torch has, which counts cores; numba alone would start one for every hyperthread.
os.environ.setdefault("NUMBA_NUM_THREADS", str(torch.get_num_threads()))
os.environ.setdefault("NUMBA_CACHE_DIR", str(cache_folder() / "compiled"))
import numba

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
COLUMNS = 1024  # of four tokens: 16 KB, so that they stay in the innermost cache


class Matrix(NamedTuple):
    """A weight (rows, columns) int8, rows a multiple of four, and float32 (rows,), (columns,) and (rows,) that go with
    it: the product is weight @ (x * column) * scale + bias, of which the first `size` numbers count."""

    weight: np.ndarray
    scale: np.ndarray
    column: np.ndarray
    bias: np.ndarray
    size: int

    def __call__(self, x: Tensor) -> Tensor:
        """(n, columns) float32 -> (n, size)."""
        n = len(x)
        padded = x if n == 1 else functional.pad(x, (0, 0, 0, -n % 4))
        return torch.from_numpy(products(padded.numpy(), self, torch.get_num_threads()))[:n, : self.size]


def quantise(weight: Tensor, bias: Tensor | None) -> Matrix:
    """(out, in) and (out,), of any float dtype, as int8.

    A row's largest weight sets its steps. So large columns are made smaller, and what they meet larger, by the root of
    their size: that took 40 % off the KL divergence from the float32 model (SmolLM2-135M). The work is done in blocks
    of rows that stay in the processor's cache, which is twice as fast.
    """
    rows, blocks = len(weight), weight.split(256)
    squares = torch.stack([block.float().square().sum(0) for block in blocks]).sum(0)
    column = (squares / rows).sqrt_().clamp_(min=1e-12).sqrt_()
    padded = rows + -rows % 4
    rounded = torch.empty(padded, weight.shape[1], dtype=torch.int8)
    scale, shift = torch.zeros(2, padded)
    rounded[rows:] = 0
    for block, to, step in zip(blocks, rounded[:rows].split(256), scale[:rows].split(256), strict=True):
        w = block.float() / column
        step.copy_(w.abs().amax(1).div_(127).clamp_(min=1e-12))
        to.copy_(w.div_(step[:, None]).round_())
    if bias is not None:
        shift[:rows] = bias
    return Matrix(rounded.numpy(), scale.numpy(), column.numpy(), shift.numpy(), rows)


@numba.njit(**compiled)
def block(x, layer, cache, at, rotation, attention, gated, threads):
    """Add to x (n, width) what a layer makes of it, GPT-2's or, where `gated`, Llama's; n is 1 or a multiple of four.

    layer: (norm, qkv, out, norm, up, down), the norms with a weight, a bias that RMSNorm has no use for, and an eps.
    cache: (2, heads, context, size), filled at the rows' places, which `at` = (start, step, count, slots) tells.
    attention: (heads of the keys, queries that share a key, size of a head, scale of query times key).
    """
    (norm_1, to_qkv, out, norm_2, up, down), (start, step, _, slots) = layer, at
    qkv = products(_norm(x, norm_1, gated), to_qkv, threads)
    if gated:
        for row in range(len(slots)):
            _rotate(qkv[row], rotation[0][start + step], rotation[1][start + step], attention)
    x += products(_attend(qkv, cache, at, attention, threads), out, threads)
    hidden = products(_norm(x, norm_2, gated), up, threads)
    x += products(_activate(hidden, gated, threads), down, threads)


@numba.njit(**compiled)
def products(x, matrix, threads):
    """(n, columns) -> (n, rows); n is 1 or a multiple of four."""
    if len(x) == 1:
        return _product(x[0], matrix, threads).reshape(1, -1)
    return _tiles(x, matrix, threads)


@numba.njit(**threaded)
def _product(x, matrix, threads):
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
    """(n, width) -> (n, width)."""
    y = np.empty_like(x)
    for row in range(len(x)):
        of = x[row]
        mean, squares = np.float32(0) if rms else of.sum() / np.float32(len(of)), np.float32(0)
        for i in range(len(of)):
            squares += (of[i] - mean) * (of[i] - mean)
        scale = np.float32(1 / math.sqrt(squares / len(of) + norm.eps))
        for i in range(len(of)):  # compiles in a fifth of the time that whole arrays take
            y[row, i] = (of[i] - mean) * scale * norm.weight[i] + (np.float32(0) if rms else norm.bias[i])
    return y


@numba.njit(**compiled)
def _rotate(qkv, cos, sin, attention):
    """Turn the queries and keys in qkv, in place; the first half of `sin` (size,) has its sign changed already."""
    heads, group, size, _ = attention
    half = size // 2
    for head in range(heads * (group + 1)):
        part = qkv[head * size : (head + 1) * size]
        for i in range(half):
            first, second = part[i], part[i + half]
            part[i] = first * cos[i] + second * sin[i]
            part[i + half] = second * cos[i + half] + first * sin[i + half]


@numba.njit(**threaded)
def _attend(qkv, cache, at, attention, threads):
    """(n, (heads * group + 2 heads) * size) -> (n, heads * group * size); rows that are no sequence's stay 0."""
    (start, step, count, slots), (heads, group, size, scale) = at, attention
    queries, rows, last = heads * group, len(slots), start + step
    for row in range(rows):
        for head in range(heads):
            place = last if count == 1 else start + step * count + slots[row]
            key, value = cache[0, head, place], cache[1, head, place]
            for i in range(size):
                key[i] = qkv[row, (queries + head) * size + i]
                value[i] = qkv[row, (queries + heads + head) * size + i]
    y = np.zeros((len(qkv), queries * size), np.float32)
    for part in numba.prange(threads):
        weights = np.empty(last + 1, np.float32)
        # The rows of a head after each other: what they share of its keys and values stays near.
        for unit in range(queries * rows * part // threads, queries * rows * (part + 1) // threads):
            query, row = unit // rows, unit % rows
            q, out = qkv[row, query * size : (query + 1) * size], y[row, query * size : (query + 1) * size]
            keys, values = cache[0, query // group], cache[1, query // group]
            highest = np.float32(-np.inf)
            for past in range(last + 1):
                place = past if past < start else start + (past - start) * count + slots[row]
                key, dot = keys[place], np.float32(0)
                for i in range(size):
                    dot += q[i] * key[i]
                weights[past] = dot * np.float32(scale)
                highest = max(highest, weights[past])
            total = np.float32(0)
            for past in range(last + 1):
                place = past if past < start else start + (past - start) * count + slots[row]
                weight, value = math.exp(weights[past] - highest), values[place]
                total += weight
                for i in range(size):
                    out[i] += weight * value[i]
            for i in range(size):
                out[i] /= total
    return y


@numba.njit(**threaded)
def _activate(x, gated, threads):
    """SiLU of the first half times the second, (n, 2 width) -> (n, width); or GELU by its tanh form, (n, width) ->
    (n, width). 0.5 (1 + tanh z) is 1 / (1 + exp(-2 z))."""
    width = x.shape[1] // 2 if gated else x.shape[1]
    y = np.empty((len(x), width), np.float32)
    for part in numba.prange(threads):
        for row in range(len(x)):
            for i in range(width * part // threads, width * (part + 1) // threads):
                value = x[row, i]
                if gated:
                    z, factor = value, x[row, width + i]
                else:
                    cube = value * value * value
                    z, factor = np.float32(1.5957691216) * (value + np.float32(0.044715) * cube), np.float32(1)
                y[row, i] = value / (np.float32(1) + math.exp(-z)) * factor
    return y


@numba.njit(**threaded)
def _tiles(x, matrix, threads):
    """(n, columns) -> (n, rows). Four rows and four tokens at a time: their sums stay in registers, and each number
    that was read serves four."""
    weight, (rows, columns) = matrix.weight, matrix.weight.shape
    x, y = x * matrix.column, np.empty((len(x), rows), np.float32)
    for part in numba.prange(threads):
        sums = np.empty((4, 4), np.float32)
        for row in range(rows // 4 * part // threads * 4, rows // 4 * (part + 1) // threads * 4, 4):
            for token in range(0, len(x), 4):
                sums[:] = 0
                for start in range(0, columns, COLUMNS):
                    stop = min(start + COLUMNS, columns)
                    _tile(  # of views that are known to be contiguous, which a slice of rows is not
                        weight[row][start:stop], weight[row + 1][start:stop], weight[row + 2][start:stop],
                        weight[row + 3][start:stop], x[token][start:stop], x[token + 1][start:stop],
                        x[token + 2][start:stop], x[token + 3][start:stop], sums,
                    )  # fmt: skip
                for r in range(4):
                    for t in range(4):
                        y[token + t, row + r] = sums[r, t] * matrix.scale[row + r] + matrix.bias[row + r]
    return y


@numba.njit(**compiled)
def _tile(w0, w1, w2, w3, x0, x1, x2, x3, sums):
    """Four rows (columns,) int8, four tokens (columns,) -> their products added to sums (4, 4)."""
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
    c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
    for i in range(len(w0)):
        a, b, c, d = np.float32(w0[i]), np.float32(w1[i]), np.float32(w2[i]), np.float32(w3[i])
        a0 += a * x0[i]
        a1 += a * x1[i]
        a2 += a * x2[i]
        a3 += a * x3[i]
        b0 += b * x0[i]
        b1 += b * x1[i]
        b2 += b * x2[i]
        b3 += b * x3[i]
        c0 += c * x0[i]
        c1 += c * x1[i]
        c2 += c * x2[i]
        c3 += c * x3[i]
        d0 += d * x0[i]
        d1 += d * x1[i]
        d2 += d * x2[i]
        d3 += d * x3[i]
    tile = ((a0, a1, a2, a3), (b0, b1, b2, b3), (c0, c1, c2, c3), (d0, d1, d2, d3))
    for r, row in enumerate(tile):
        for t, total in enumerate(row):
            sums[r, t] += total
