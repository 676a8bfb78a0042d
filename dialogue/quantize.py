"""Linear layers for decoding: one matrix, packed once, applied as a plain function.

Each `*_linear(weight, bias)` takes a float32 weight (N, K) and a bias (N,) or None and returns a function
(M, K) -> (M, N). A reply reads every weight once a token, so one byte a weight instead of four is the gain;
the activations are tiny and need not lose anything.

Measured on two AVX512-VNNI cores, M=1, matrices larger than the cache, 10^9 weights a second (torch 2.13):

    fbgemm int8, M=1 / M=2            13-15 / 12-14   <- `int8_linear` uses M=2
    _int_mm (oneDNN), M=1 / M=2       14-19 / 9
    _weight_int8pack_mm, bfloat16     9-13            and 6 times slower than fbgemm for 64 tokens
    _weight_int4pack_mm_for_cpu       24-30           as two nibbles of an int8: 11-15, slow for prompts
    bfloat16, float32                 6-7, 3
    _dyn_quant_matmul_4bit, qnnpack   under 2

Activations in 8 bits are no option: with int8 weights, SmolLM2-135M's perplexity on dialogue text rises by
1.3 % (asymmetric, a scale a token), 2.4 % (symmetric) and 68 % (one scale for a prompt), against 0.2 % for
int8 weights alone: a few huge activations leave the rest with hardly any bits.
"""

import time
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

Linear = Callable[[Tensor], Tensor]
LEVELS = 63  # activations are digits from -63 to 63, see `int8_linear`
DIGIT = 2 * LEVELS


def quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    """float32 (N, K) -> int8 (N, K) within +-127 and float32 scales (N,): one symmetric scale an output."""
    scales = weight.abs().amax(1).div_(127).clamp_(min=1e-12)
    return (weight / scales[:, None]).round_().to(torch.int8), scales


def float_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """The matrix as it is, in its own dtype: (M, K) -> (M, N)."""
    return lambda x: F.linear(x, weight, bias)


def int8_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """int8 weights, activations in two digits: (M, K) float32 -> (M, N) float32. Needs fbgemm (x86).

    fbgemm multiplies 8-bit numbers with 8-bit numbers. A row x is therefore given as two rows of digits,
    x ~ max|x| / 63 * (high + low / 126), which is exact to max|x| / 15876, and the matrix, read once,
    multiplies both. Digits stop at 63 since without VNNI the products are summed in pairs in 16 bits:
    2 * (63 + 64) * 127 = 32258 fits.
    """
    quantized, scales = quantize_rows(weight)
    torch.backends.quantized.engine = "fbgemm"
    tensor = torch._make_per_channel_quantized_tensor(
        quantized, scales.double(), torch.zeros(len(scales), dtype=torch.long), 0
    )
    packed = torch.ops.quantized.linear_prepack(tensor, None)
    multiply = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32
    offset = torch.zeros(()) if bias is None else bias
    digits = torch.tensor([LEVELS, LEVELS * DIGIT], dtype=torch.float32)[:, None, None]

    def apply(x: Tensor) -> Tensor:
        largest = torch.linalg.vector_norm(x, torch.inf, -1, keepdim=True).clamp_(min=1e-30)  # (M, 1)
        rows = x * (digits / largest)  # (2, M, K): x in steps of the high digit, and in steps of the low one
        rows[1].sub_(rows[0].round(), alpha=DIGIT)
        # The kernel rounds its input to whole steps of size 1 around 64, so both digits go in exactly.
        high, low = multiply(rows.flatten(0, 1), 1.0, LEVELS + 1, packed).view(2, len(x), -1)
        return torch.addcmul(offset, high.add_(low, alpha=1 / DIGIT), largest, value=1 / LEVELS)

    return apply


def int8_bfloat16_linear(weight: Tensor, bias: Tensor | None) -> Linear:
    """int8 weights, bfloat16 activations: (M, K) float32 -> (M, N) float32. For CPUs without fbgemm."""
    quantized, scales = quantize_rows(weight)
    scales = scales.bfloat16()
    offset = torch.zeros(()) if bias is None else bias
    return lambda x: torch._weight_int8pack_mm(x.bfloat16(), quantized, scales) + offset


INT8_KERNELS = {"fbgemm": int8_linear, "bfloat16": int8_bfloat16_linear}


def seconds(run: Callable[[], object], repeats: int = 5) -> float:
    """The fastest of `repeats` calls, after one that warms up."""
    run()
    times = []
    for _ in range(repeats):
        start = time.perf_counter()
        run()
        times.append(time.perf_counter() - start)
    return min(times)


@torch.inference_mode()
def measure(width: int) -> dict[str, float]:
    """Seconds that one row takes through 16 million weights, by "precision" or "int8 kernel", on this CPU.

    Takes about a third of a second. A kernel that this CPU or this torch lacks is left out.
    """
    weight = torch.full((2**24 // width, width), 0.01)
    x = torch.ones(1, width)
    result = {"float32": seconds(lambda: F.linear(x, weight))}
    half, x_half = weight.bfloat16(), x.bfloat16()
    result["bfloat16"] = seconds(lambda: F.linear(x_half, half))
    for name, make in INT8_KERNELS.items():
        try:
            linear = make(weight, None)
            result[f"int8 {name}"] = seconds(lambda linear=linear: linear(x))
        except (RuntimeError, AttributeError, NotImplementedError):
            continue
    return result
