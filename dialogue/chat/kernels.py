"""Products of activations with a weight that is kept in few bytes, on a CPU.

One token reads every weight once, so the bytes of the weights bound its speed. Each function takes a weight
(out, in) and a bias (out,) or None, and gives a function (n, in) float32 -> (n, out) float32.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from torch.nn import functional

if TYPE_CHECKING:
    from dialogue.chat.int8_kernel import Matrix

Product = Callable[[Tensor], Tensor]  # (n, in) -> (n, out)


def float32(weight: Tensor, bias: Tensor | None) -> Product:
    """Everything in float32."""
    w, b = weight.float().contiguous(), None if bias is None else bias.float()
    return lambda x: functional.linear(x, w, b)


def bfloat16(weight: Tensor, bias: Tensor | None) -> Product:
    """Weight and activations in bfloat16, the sums in float32."""
    w, b = weight.bfloat16().contiguous(), None if bias is None else bias.bfloat16()
    return lambda x: functional.linear(x.bfloat16(), w, b).float()


def float16(weight: Tensor, bias: Tensor | None) -> Product:
    """The weight in float16, which is what a merged model's folder holds, and the rest in float32."""
    packed = torch.ops.quantized.linear_prepack_fp16(weight.float().contiguous(), _float(bias))
    return lambda x: torch.ops.quantized.linear_dynamic_fp16(x, packed)


@dataclass(frozen=True)
class Int8:
    """A product in int8; `matrix` is what the loops of `dialogue/chat/int8_kernel.py` take."""

    matrix: "Matrix"
    rows: int  # without the padding of the matrix

    def __call__(self, x: Tensor) -> Tensor:
        from dialogue.chat import int8_kernel

        n, threads = len(x), torch.get_num_threads()
        if n == 1:
            y = int8_kernel.product(x[0].numpy(), self.matrix, threads)[None]
        else:
            y = int8_kernel.products(functional.pad(x, (0, 0, 0, -n % 4)).numpy(), self.matrix, threads)
        return torch.from_numpy(y)[:n, : self.rows]


def int8(weight: Tensor, bias: Tensor | None) -> Product:
    """The weight in int8, one scale a row; the rest in float32."""
    from dialogue.chat.int8_kernel import Matrix  # numba, which no other precision needs

    rounded, scale, column = _quantise(weight)
    shift = torch.zeros(len(weight)) if bias is None else bias.float()
    odd = len(weight) % 2
    scale, shift = functional.pad(scale, (0, odd)), functional.pad(shift, (0, odd))
    return Int8(Matrix(rounded.numpy(), scale.numpy(), column.numpy(), shift.numpy()), len(weight))


def _quantise(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, in) -> int8 (out, in), with a row of zeros below where out is odd; scales (out,) of rows, (in,) of columns.

    weight = int8 * row scale * column scale. A row's largest weight sets its steps. So large columns are made
    smaller, and what they meet larger, by the root of their size: that took 40 % off the KL divergence from the
    float32 model (SmolLM2-135M). In blocks of rows that stay in the processor's cache, which is twice as fast.
    """
    rows, blocks = len(weight), weight.split(256)
    squares = torch.stack([block.float().square().sum(0) for block in blocks]).sum(0)
    column = (squares / rows).sqrt_().clamp_(min=1e-12).sqrt_()
    rounded, scale = torch.empty(rows + rows % 2, weight.shape[1], dtype=torch.int8), torch.empty(rows)
    rounded[rows:] = 0
    for block, to, step in zip(blocks, rounded[:rows].split(256), scale.split(256), strict=True):
        w = block.float() / column
        step.copy_(w.abs().amax(1).div_(127).clamp_(min=1e-12))
        to.copy_(w.div_(step[:, None]).round_())
    return rounded, scale, column


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


KERNELS = {"float32": float32, "bfloat16": bfloat16, "float16": float16, "int8": int8}


def available() -> list[str]:
    """The precisions that this processor has kernels for; FBGEMM's for float16 needs an x86 one with AVX2."""
    has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    return [name for name in KERNELS if has_fbgemm or name != "float16"]


def fastest() -> str:
    """The precision that reads one token fastest on this machine; measured, in some 0.3 s.

    int8 unless another is clearly faster: in the decoder it gains more than in a product alone, and chance must not
    decide which weights a conversation with a seed has.
    """
    weight, x = torch.ones(16_384, 1024), torch.ones(1, 1024)
    handicap = {"int8": 0.7}
    return min(available(), key=lambda name: handicap.get(name, 1) * _seconds(KERNELS[name](weight, None), x))


@torch.inference_mode()
def _seconds(product: Product, x: Tensor) -> float:
    """Best of eight."""
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        product(x)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
