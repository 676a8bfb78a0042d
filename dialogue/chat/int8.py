"""Products with int8 weights on a CPU, and a whole block of a decoder around them, in loops that numba compiles.

The problem. One new token reads every weight once for a single multiplication, so the bytes of the weights bound its
speed, not the arithmetic: float32 weights are four times as many bytes as int8 ones.

What was tried. torch's int8 kernels (FBGEMM) want activations of 8 bits, and had a third of the speed of loops that
multiply in float32, at the same quality. Those are bound by arithmetic as soon as they read several tokens. Activations
of 16 bits do twice as much an instruction; numba's compiler spends that on moving bytes about, so the innermost loop is
written in LLVM's vectors (`_tile`), and asks for the rows that come next: else a quarter of the time is waiting.

The trade. A weight is rounded to 8 bits with a scale for its row and one for its column, an activation to 16 bits with
a scale for its token; norms and attention stay in float32. A token has the same bits alone and beside others. What it
costs is measured at the end of each training; float32 has the weights exactly as they are stored, and is slower.

What stands between the products is compiled too: torch's own operations would take a third of a token's time. Several
sequences that continue the same text share its keys and values. Their own stand behind these, interleaved: token number
`step` of sequence number `slot` of `count` is at `start + step * count + slot`; one sequence alone has a `count` of 1.
"""

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from llvmlite import ir
from torch import Tensor
from torch.nn import functional

from dialogue.chat.compiling import cgutils, compiled, numba, threaded

LANES = 32  # columns that are multiplied at once: 512 bits of int16


class Matrix(NamedTuple):
    """A weight (rows, columns) int8, rows a multiple of 4 and columns of `LANES`, and float32 (rows,), (columns,) and
    (rows,) that go with it: the product is weight @ (x * column) * scale + bias, of which the first `size` count."""

    weight: np.ndarray
    scale: np.ndarray
    column: np.ndarray
    bias: np.ndarray
    size: int

    def __call__(self, x: Tensor) -> Tensor:
        """(n, columns) float32 -> (n, size)."""
        padded = x if len(x) == 1 else functional.pad(x, (0, 0, 0, -len(x) % 4))
        return torch.from_numpy(products(padded.numpy(), self, torch.get_num_threads()))[: len(x), : self.size]


@numba.njit(**compiled)
def block(x, layer, cache, at, rotation, attention, gated, threads):
    """Add to x (n, width) what a layer makes of it, GPT-2's or, where `gated`, Llama's; n is 1 or a multiple of four.

    layer: (norm, qkv, out, norm, up, down), the norms with a weight, a bias that RMSNorm has no use for, and an eps.
    cache: (2, heads, context, size), filled at the rows' places, which `at` = (start, step, count, slots) tells.
    attention: (heads of the keys, queries that share a key, size of a head, scale of query times key).
    """
    (norm_1, to_qkv, out, norm_2, up, down), (start, step, _, slots) = layer, at
    qkv = products(norm(x, norm_1, gated), to_qkv, threads)
    if gated:
        for row in range(len(slots)):
            _rotate(qkv[row], rotation[0][start + step], rotation[1][start + step], attention)
    x += products(_attend(qkv, cache, at, attention, threads), out, threads)
    hidden = products(norm(x, norm_2, gated), up, threads)
    x += products(_activate(hidden, gated, threads), down, threads)


def _tile(tokens: int) -> Any:
    """A function (weight, row, x, token, y) that writes y[token : token + tokens, row : row + 4], of y (n, rows)
    float32: four rows of weight (rows, columns) int8 times `tokens` rows of x (n, columns) int16.

    `LANES` columns at a time: neighbouring products are added in int32, which is one instruction a row and token where
    the processor has AVX-512 VNNI (vpdpwssd), and two with AVX2. numba has no vectors; LLVM beneath it has."""

    @numba.extending.intrinsic
    def write(_: Any, weight: Any, row: Any, x: Any, token: Any, y: Any) -> Any:
        signature = numba.types.void(weight, row, x, token, y)

        def build(context: Any, builder: Any, __: Any, given: Any) -> Any:
            weight, x, y = (context.make_array(signature.args[n])(context, builder, given[n]) for n in (0, 2, 4))
            (rows, columns), row, token = cgutils.unpack_tuple(builder, weight.shape), given[1], given[3]
            size, lane = columns.type, ir.IntType(32)
            sum_, floats = (ir.VectorType(kind, LANES // 2) for kind in (lane, ir.FloatType()))

            def at(array: Any, width: Any, row: Any, n: int, column: Any, lanes: int) -> Any:
                place = builder.add(builder.mul(width, builder.add(row, size(n))), column)
                address, kind = builder.gep(array.data, [place]), array.data.type.pointee
                return builder.bitcast(address, ir.VectorType(kind, lanes).as_pointer()) if lanes else address

            def load(array: Any, row: Any, n: int, column: Any) -> Any:
                vector = builder.load(at(array, columns, row, n, column, LANES), align=1)
                return builder.sext(vector, ir.VectorType(lane, LANES))

            def pick(one: Any, two: Any, lanes: range) -> Any:
                return builder.shuffle_vector(one, two, ir.Constant(ir.VectorType(lane, len(lanes)), list(lanes)))

            def add_pairs(add: Any, one: Any, two: Any) -> Any:
                count = one.type.count * (1 if one is two else 2)
                return add(pick(one, two, range(0, count, 2)), pick(one, two, range(1, count, 2)))

            fetch = ir.FunctionType(ir.VoidType(), [weight.data.type, lane, lane, lane])  # address, read, keep, data
            fetch = cgutils.get_or_insert_function(builder.module, fetch, "llvm.prefetch.p0")
            sums = [[cgutils.alloca_once_value(builder, sum_(None)) for _ in range(4)] for _ in range(tokens)]
            with cgutils.for_range_slice(builder, size(0), columns, size(LANES)) as (column, _):
                of_tokens = [load(x, token, n, column) for n in range(tokens)]
                for n in range(4):
                    ahead = at(weight, columns, row, n + 4, column, 0)  # the rows that are next
                    builder.call(fetch, [ahead, lane(0), lane(3), lane(1)])
                    of_row = load(weight, row, n, column)
                    for of_token, places in zip(of_tokens, sums, strict=True):
                        product = builder.mul(of_row, of_token)
                        pairs = add_pairs(builder.add, product, product)
                        builder.store(builder.add(builder.load(places[n]), pairs), places[n])
            vectors = [builder.sitofp(builder.load(place), floats) for place in itertools.chain(*sums)]
            while len(vectors) > 1:  # always the same neighbours first: the same bits with one token and with four
                vectors = [add_pairs(builder.fadd, *two) for two in zip(vectors[::2], vectors[1::2], strict=True)]
            while vectors[0].type.count > 4 * tokens:
                vectors = [add_pairs(builder.fadd, vectors[0], vectors[0])]
            for n in range(tokens):
                four = pick(vectors[0], vectors[0], range(4 * n, 4 * n + 4))
                builder.store(four, at(y, rows, token, n, row, 4), align=4)
            return context.get_dummy_value()

        return signature, build

    return write


_tile_of_1, _tile_of_4 = _tile(1), _tile(4)


@numba.njit(**compiled)
def products(x, matrix, threads):
    """(n, columns) -> (n, rows); n is 1 or a multiple of four."""
    return _tiles(_round(x, matrix.column), matrix, threads)


@numba.njit(**threaded | {"fastmath": False})
def _tiles(rounded, matrix, threads):
    """What `_round` returns -> (n, rows). Four rows meet one token or four at a time: their sums stay in registers, and
    each number that was read serves four. Fast maths gave other bits once it was loaded from the cache."""
    (x, step), rows, n = rounded, len(matrix.weight), len(rounded[0])
    y = np.empty((n, rows), np.float32)
    for part in numba.prange(threads):
        first, last = rows // 4 * part // threads * 4, rows // 4 * (part + 1) // threads * 4
        for row in range(first, last, 4):
            for token in range(0, n, 4):
                if n == 1:
                    _tile_of_1(matrix.weight, row, x, token, y)
                else:
                    _tile_of_4(matrix.weight, row, x, token, y)
        for token in range(n):
            for row in range(first, last):
                y[token, row] = y[token, row] * (matrix.scale[row] * step[token]) + matrix.bias[row]
    return y


@numba.njit(**compiled)
def _round(x, column):
    """x (n, columns) * column, as int16 (n, len(column)), and the steps (n,) float32 that they count."""
    limit = np.float32(min(32767, (2**31 - 1) // (127 * (len(column) * 2 // LANES))))  # no sum in int32 can overflow
    rounded, step = np.zeros((len(x), len(column)), np.int16), np.empty(len(x), np.float32)
    for row in range(len(x)):
        largest, broken = np.float32(1e-30), np.float32(0)
        for i in range(x.shape[1]):
            value = abs(x[row, i] * column[i])
            largest, broken = max(largest, value), broken + value * np.float32(0)
        step[row] = largest / limit + broken  # NaN, where one of them is no number
        for i in range(x.shape[1]):
            rounded[row, i] = np.int16(np.rint(x[row, i] * column[i] * (limit / largest)))
    return rounded, step


@numba.njit(**compiled)
def norm(x, weights, rms):
    """(n, width) -> (n, width)."""
    y = np.empty_like(x)
    for row in range(len(x)):
        of = x[row]
        mean, squares = np.float32(0) if rms else of.sum() / np.float32(len(of)), np.float32(0)
        for i in range(len(of)):
            squares += (of[i] - mean) * (of[i] - mean)
        scale = np.float32(1 / math.sqrt(squares / len(of) + weights.eps))
        for i in range(len(of)):  # compiles in a fifth of the time that whole arrays take
            y[row, i] = (of[i] - mean) * scale * weights.weight[i] + (np.float32(0) if rms else weights.bias[i])
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
