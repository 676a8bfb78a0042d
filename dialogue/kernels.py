"""Products of activations with a weight that is kept in few bytes, on a CPU, with kernels that torch brings.

One token reads every weight once, so the bytes of the weights bound its speed. Each function takes a weight
(out, in) and a bias (out,) or None, and gives a function (n, in) float32 -> (n, out) float32.
"""

import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

Product = Callable[[Tensor], Tensor]  # (n, in) -> (n, out)
HALF = 63  # 7 bits: without VNNI, a pair of 8-bit products is summed in 16 bits and saturates


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


def int8(weight: Tensor, bias: Tensor | None) -> Product:
    """The weight in int8, one scale a row; activations in 14 bits.

    An int8 kernel wants int8 activations, and those alone would cost most of the quality: a few of them are
    a hundred times larger than the rest. So x is read as two rows, rounded to steps of max|x| / `HALF`, and
    what the rounding left, magnified. Memory is what bounds the kernel, and the second row costs no memory.
    Example with steps of 1 and a magnification of 100: 3.14 -> 3 and 14, and w * 3.14 = w * 3 + w * 14 / 100.
    Each token has a scale of its own, so that it does not matter in which company it is read.
    """
    rounded, scale, column = _quantise(weight)
    with warnings.catch_warnings():  # it says that quantized tensors are old: the kernels are not
        warnings.simplefilter("ignore")
        zeros = torch.zeros(len(scale), dtype=torch.long)
        tensor = torch._make_per_channel_quantized_tensor(rounded, scale.double(), zeros, 0)
    packed = torch.ops.quantized.linear_prepack(tensor, None)
    kernel = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    b = _float(bias)

    def product(x: Tensor) -> Tensor:
        n, x = len(x), x * column
        step = x.abs().amax(1, keepdim=True).add_(1e-30).mul_(1 / HALF)
        steps = x / step
        whole = steps.round()
        halves = torch.cat((whole, steps.sub_(whole).mul_(2 * HALF)))
        y = kernel(halves, 1.0, HALF + 1, packed)
        y = torch.add(y[:n], y[n:], alpha=0.5 / HALF).mul_(step)
        return y if b is None else y.add_(b)

    return product


def _quantise(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(out, in) -> int8 (out, in), scales of the rows (out,), scales of the columns (in,).

    weight = int8 * row scale * column scale. A row's largest weight sets its steps. So large columns are made
    smaller, and what they meet larger, by the root of their size: that took 40 % off the KL divergence from the
    float32 model (SmolLM2-135M). In blocks of rows that stay in the processor's cache, which is twice as fast.
    """
    blocks = weight.split(256)
    squares = torch.stack([block.float().square().sum(0) for block in blocks]).sum(0)
    column = (squares / len(weight)).sqrt_().clamp_(min=1e-12).sqrt_()
    rounded, scale = torch.empty(weight.shape, dtype=torch.int8), torch.empty(len(weight))
    for block, to, step in zip(blocks, rounded.split(256), scale.split(256), strict=True):
        w = block.float() / column
        step.copy_(w.abs().amax(1).div_(127).clamp_(min=1e-12))
        to.copy_(w.div_(step[:, None]).round_())
    return rounded, scale, column


def _float(bias: Tensor | None) -> Tensor | None:
    return None if bias is None else bias.float()


KERNELS = {"float32": float32, "bfloat16": bfloat16, "float16": float16, "int8": int8}


def available() -> list[str]:
    """The precisions that this processor has kernels for; FBGEMM's need an x86 one with AVX2."""
    has_fbgemm = "fbgemm" in torch.backends.quantized.supported_engines
    return [name for name in KERNELS if has_fbgemm or name not in ("float16", "int8")]


def fastest() -> str:
    """The precision that reads one token fastest on this machine; measured, in some 0.2 s."""
    weight, x = torch.ones(8192, 1024), torch.ones(1, 1024)
    return min(available(), key=lambda name: _seconds(KERNELS[name](weight, None), x))


@torch.inference_mode()
def _seconds(product: Product, x: Tensor) -> float:
    """Best of eight."""
    seconds = []
    for _ in range(8):
        start = time.perf_counter()
        product(x)
        seconds.append(time.perf_counter() - start)
    return min(seconds)
