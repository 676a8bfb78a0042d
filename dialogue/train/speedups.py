"""The same computation in less time and memory: what a training step spends beside its large products.

Each piece replaces code of transformers or PEFT by an equal formula, found by profiling a step of GPT-2 124M on a
CPU. In float32 the results are the same but for the order of sums (tests/test_fast.py).
"""

import functools
from collections.abc import Callable
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from bitsandbytes.nn import Linear8bitLt
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "a_dialogue_at_a_time"


def apply(model: PeftModel, keep_dropout: bool = False) -> PeftModel:
    """`model`, changed in place: faster forward passes of GPT-2's GELU, Llama's norm, LoRA layers and trained token
    rows; on a CPU attention within each dialogue alone; and, unless `keep_dropout`, no dropout in the frozen base.

    Dropout regularises weights that are trained; these are frozen, and LoRA has its own dropout.
    """
    base: Any = model.get_base_model()
    on_cpu = base.device.type == "cpu"
    for layer in list(model.modules()):
        if isinstance(layer, TrainableTokensLayer) and type(layer.base_layer) in (nn.Embedding, nn.Linear):
            _replace_forward(layer, _rows_forward)  # other kinds may scale
        elif isinstance(layer, LoraLayer):
            _replace_forward(layer, _lora_forward)
            for name, dropout in layer.lora_dropout.items():
                if on_cpu and isinstance(dropout, nn.Dropout):
                    layer.lora_dropout[name] = CheapDropout(dropout.p)
        elif isinstance(layer, Linear8bitLt):
            _replace_forward(layer, lambda layer, x: _Int8Product.apply(x, layer))
    for path, module in list(base.named_modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "variance_epsilon"):
                _replace_forward(child, _rms_norm_forward)
        if not keep_dropout and isinstance(module, nn.Dropout) and "lora_dropout" not in path:
            module.p = 0.0
        if not keep_dropout and isinstance(getattr(module, "attention_dropout", None), float):
            setattr(module, "attention_dropout", 0.0)  # noqa: B010 (for the type checker, a module's)
    if on_cpu and base.config._attn_implementation == "sdpa":
        base.set_attn_implementation(ATTENTION)
    return model


def _replace_forward(layer: Any, forward: Callable[..., Tensor]) -> None:
    layer.forward = MethodType(forward, layer)


def _lora_forward(layer: Any, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
    """(B, T, in) -> (B, T, out): x W + (x A) B * scaling, in training with A and B cast to x's dtype. PEFT casts x to
    theirs, float32: more to compute, and a copy of x to keep.

    In evaluation A and B stay as they will be saved, so that its figures hold for these: after few steps all entries of
    B have about one size, and bfloat16 rounds all of them the same way.
    """
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    plain = not (layer.disable_adapters or layer.merged or layer.lora_variant or args or keywords)
    if not plain or len(adapters) != 1 or layer.lora_bias[adapters[0]]:
        return type(layer).forward(layer, x, *args, **keywords)
    [adapter] = adapters
    result, down, up = layer.base_layer(x), layer.lora_A[adapter].weight, layer.lora_B[adapter].weight
    if not layer.training:
        return result.add_(linear(linear(x.to(down.dtype), down).mul_(layer.scaling[adapter]), up))
    narrow = linear(layer.lora_dropout[adapter](x), down.to(x.dtype)).flatten(0, -2)
    flat = result.flatten(0, -2)
    up = up.T.to(flat.dtype)
    return torch.addmm(flat, narrow.to(flat.dtype), up, alpha=layer.scaling[adapter]).view_as(result)


def _rows_forward(layer: Any, x: Tensor) -> Tensor:
    """An embedding (B, T) -> (B, T, H), or a head (B, T, H) -> (B, T, V), some of whose rows are trained. PEFT copies
    the whole matrix to put three rows into it, and its backward pass makes another."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return type(layer).forward(layer, x)
    [adapter] = layer.active_adapters
    frozen, ids = layer.base_layer(x), torch.tensor(layer.token_indices[adapter], device=x.device)
    trained = layer.trainable_tokens_delta[adapter].to(frozen.dtype)
    if x.is_floating_point():
        return frozen.index_copy(-1, ids, linear(x, trained))
    hits = x.unsqueeze(-1) == ids  # (B, T, R)
    return frozen.masked_fill(hits.any(-1, keepdim=True), 0) + hits.to(trained.dtype) @ trained


def _rms_norm_forward(layer: Any, x: Tensor) -> Tensor:
    """(B, T, H) -> (B, T, H), as Llama's and its descendants' norms."""
    if layer.weight.requires_grad:
        return type(layer).forward(layer, x)
    return _RMSNorm.apply(x, layer.weight, layer.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    """x w / sqrt(mean x^2 + eps) (Zhang and Sennrich 2019) for a frozen w; autograd would keep and pass through float32
    copies of x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        """(B, T, H), (H,), eps -> (B, T, H)"""
        squares = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.float32).square_()
        scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
        ctx.save_for_backward(x, weight, scale)
        return torch.mul(x, scale, out=torch.empty_like(x)).mul_(weight)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        [gradient], (x, weight, scale) = gradients, ctx.saved_tensors
        gradient = gradient * weight
        along = (gradient * x).sum(-1, keepdim=True, dtype=torch.float32) * scale**3 / -x.shape[-1]
        return torch.mul(gradient, scale, out=torch.empty_like(x)).addcmul_(x, along.to(x.dtype)), None, None


class _Int8Product(torch.autograd.Function):
    """(B, T, in) -> (B, T, out) by bitsandbytes' own 8-bit layer, which keeps its input for a gradient of the weight
    that nobody asks for, and where activation checkpointing cannot drop it (bitsandbytes#2034)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Linear8bitLt) -> Tensor:
        ctx.state = layer.state
        return type(layer).forward(layer, x)  # gradients are off in here, so that nothing is kept

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        [gradient], state = gradients, ctx.state
        return gradient @ state.CB.to(gradient.dtype).mul_(state.SCB[:, None] * (1 / 127)), None


class CheapDropout(nn.Module):
    """Dropout from 16 random bits an element, exact to 2**-16: a step of GPT-2 124M on one core takes 0.96 s with it,
    1.03 s with `nn.Dropout`, and 0.87 s without dropout."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0.0:
            return x
        draws = torch.empty(-(-x.numel() // 4), dtype=torch.int64).random_(-(2**63), 2**63 - 1)
        kept = draws.view(torch.int16)[: x.numel()].view(x.shape) >= round(self.p * 2**16) - 2**15
        return x * kept.to(x.dtype).div_(1 - self.p)


def _attend_within_dialogues(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, dropout: float = 0.0,
    scaling: float | None = None, **keywords: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Causal attention within each dialogue: no work for pairs of tokens that never see each other. query (B, heads, T,
    d), key and value (B, shared heads, T, d), boolean mask (B, 1, T, T) -> (B, T, heads, d). Dialogues of about one
    length go through one product, the heads that share a key one below the other: nothing is repeated. On a CPU
    products in bfloat16 are several times faster than torch's fused kernel. Where the mask is not made of causal
    blocks, that kernel is used."""
    batch, heads, width, size = query.shape
    layout = _layout(attention_mask, batch, width) if key.shape[2] == width and not dropout else None
    if layout is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
        )
    scale, shared = size**-0.5 if scaling is None else scaling, key.shape[1]
    places, tokens, groups = layout
    parts = zip(
        *(
            _Moved.apply(states.transpose(1, 2).flatten(0, 1), places, len(tokens)).split([n * t for n, t in groups])
            for states in (query, key, value)
        ),
        strict=True,
    )
    replies = []
    for (number, length), part in zip(groups, parts, strict=True):
        q, k, v = (  # (dialogues x shared heads, heads that share x length, d)
            states.view(number, length, shared, -1, size).permute(0, 2, 3, 1, 4).reshape(number * shared, -1, size)
            for states in part
        )
        future = torch.full((length, length), float("-inf"), dtype=q.dtype).triu(1).repeat(heads // shared, 1)
        seen = torch.baddbmm(future, q, k.transpose(1, 2), alpha=scale).softmax(-1) @ v
        replies.append(seen.view(number, heads, length, size).transpose(1, 2).flatten(0, 1))
    kept = _Moved.apply(torch.cat(replies), tokens, batch * width + 1)
    return kept[:-1].view(batch, width, heads, size), None


class _Moved(torch.autograd.Function):
    """Rows (N, heads, d) put into their `places` (N,) among `size` new ones, else zeros. Autograd's own keep the rows
    (index_copy), or sum gradients one after the other (index_select)."""

    @staticmethod
    def forward(ctx: Any, rows: Tensor, places: Tensor, size: int) -> Tensor:
        ctx.places = places
        return rows.new_zeros(size, *rows.shape[1:]).index_copy_(0, places, rows)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return gradients[0].index_select(0, ctx.places), None, None


@functools.lru_cache(maxsize=1)  # all layers ask for the same mask
def _layout(mask: Tensor | None, batch: int, width: int) -> tuple[Tensor, Tensor, list[tuple[int, int]]] | None:
    """(place of each token, token of each place, how many dialogues of which length): the tokens (B x T) when dialogues
    of about one length lie side by side, each filled up to the longest of its group, and that to a multiple of 16: the
    fewer shapes, the less their products have to be prepared. A place that is filled up has the token B x T, which is
    none; it comes after its dialogue, so no token of that sees it. None for other masks."""
    lengths = _dialogue_lengths(mask, batch, width)
    if lengths is None:
        return None
    groups: list[tuple[int, int]] = []
    begins, end = [0] * len(lengths), 0
    for dialogue in sorted(range(len(lengths)), key=lengths.__getitem__, reverse=True):
        length = -(-lengths[dialogue] // 16) * 16
        number, longest = groups.pop() if groups and length >= 0.7 * groups[-1][1] else (0, length)
        groups.append((number + 1, longest))
        begins[dialogue], end = end, end + longest
    places = torch.cat([torch.arange(begin, begin + length) for begin, length in zip(begins, lengths, strict=True)])
    tokens = torch.full((end,), batch * width).index_copy(0, places, torch.arange(batch * width))
    return places, tokens, groups


def _dialogue_lengths(mask: Tensor | None, batch: int, width: int) -> list[int] | None:
    """Lengths of the dialogues of all rows, one after another: one begins where a token does not see the one before.
    None where the mask is made of anything but causal blocks."""
    if mask is None:
        return [width] * batch
    if mask.dtype != torch.bool or mask.shape[-2:] != (width, width) or width == 1:
        return None
    sees_previous = mask[:, 0].diagonal(-1, 1, 2).expand(batch, -1).tolist()
    lengths = []
    for row, sees in enumerate(sees_previous):
        starts = [0, *(t for t, seen in enumerate(sees, start=1) if not seen), width]
        for start, stop in pairwise(starts):
            if not mask[row % len(mask), 0, stop - 1, start]:
                return None  # a sliding window
            lengths.append(stop - start)
    return lengths


AttentionInterface.register(ATTENTION, _attend_within_dialogues)
AttentionMaskInterface.register(ATTENTION, sdpa_mask)
