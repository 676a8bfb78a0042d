"""Llama's norm in bfloat16 on a CPU, in one pass forward and one backward.

x w / sqrt(mean x^2 + eps) (Zhang and Sennrich 2019, "Root Mean Square Layer Normalization"). transformers' own goes
through float32 copies in a dozen operations, each of which reads and writes main memory: of a step of the starter with
seven rows it took a quarter. Here everything between bfloat16 and bfloat16 is float32 in registers. One thread: numba's
threads and torch's would wait for each other.
"""

import math
from typing import Any

import numba
import numpy as np
import torch
from torch import Tensor

from dialogue.chat.compiling import compiled


def forward(layer: Any, x: Tensor) -> Tensor:
    """(B, T, H) -> (B, T, H): `layer`'s own forward pass, by the loops below where they apply."""
    weight = layer.weight
    if x.device.type != "cpu" or {x.dtype, weight.dtype} != {torch.bfloat16} or weight.requires_grad:
        return type(layer).forward(layer, x)
    return _RMSNorm.apply(x.contiguous(), weight, np.float32(layer.variance_epsilon))


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: np.float32) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.eps, y = eps, torch.empty_like(x)
        _normalise(_bits(x), _bits(weight)[0], eps, _bits(y))
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        x, weight = ctx.saved_tensors
        found = torch.empty_like(x)
        _differentiate(_bits(gradients[0].contiguous()), _bits(x), _bits(weight)[0], ctx.eps, _bits(found))
        return found, None, None


def _bits(x: Tensor) -> np.ndarray:
    """(..., H) bfloat16 -> (N, H) uint16, the same memory: numpy has no bfloat16."""
    return x.detach().view(torch.uint16).view(-1, x.shape[-1]).numpy()


@numba.njit(inline="always")
def _wide(bits: Any) -> Any:
    """The float32 whose upper half these 16 bits are."""
    return np.uint32(np.uint32(bits) << np.uint32(16)).view(np.float32)


@numba.njit(inline="always")
def _narrow(value: Any) -> Any:
    """The 16 bits of the nearest bfloat16, of two the even one."""
    bits = np.float32(value).view(np.uint32)
    return np.uint16((bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16))


@numba.njit(**compiled)
def _normalise(x: np.ndarray, weight: np.ndarray, eps: np.float32, y: np.ndarray) -> None:
    count, width = x.shape
    for n in range(count):
        squares = np.float32(0)
        for i in range(width):
            squares += _wide(x[n, i]) * _wide(x[n, i])
        scale = np.float32(1 / math.sqrt(squares / width + eps))
        for i in range(width):
            y[n, i] = _narrow(_wide(x[n, i]) * scale * _wide(weight[i]))


@numba.njit(**compiled)
def _differentiate(up: np.ndarray, x: np.ndarray, weight: np.ndarray, eps: np.float32, found: np.ndarray) -> None:
    """up (N, H), the gradient of y -> that of x: s (up w) - x s^3 mean(up w x), where s = 1 / sqrt(mean x^2 + eps)."""
    count, width = x.shape
    for n in range(count):
        squares, along = np.float32(0), np.float32(0)
        for i in range(width):
            value = _wide(x[n, i])
            squares += value * value
            along += value * _wide(weight[i]) * _wide(up[n, i])
        scale = np.float32(1 / math.sqrt(squares / width + eps))
        slope = np.float32(along * scale * scale * scale / width)
        for i in range(width):
            found[n, i] = _narrow(_wide(up[n, i]) * _wide(weight[i]) * scale - _wide(x[n, i]) * slope)
