"""The same computation in less time and memory: what a training step spends beside its large products.

Each piece replaces code of transformers or PEFT by an equal formula, found by profiling a step of GPT-2 124M on a
CPU. In float32 the results are the same but for the order of sums (tests/test_fast.py).
"""

import ctypes
import sys
from collections.abc import Callable
from itertools import pairwise
from types import MethodType
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.trainable_tokens import TrainableTokensLayer
from torch import Tensor, nn
from torch.nn.functional import linear
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.activations import GELUTanh, NewGELUActivation
from transformers.integrations.sdpa_attention import repeat_kv, sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

ATTENTION = "a_dialogue_at_a_time"


def keep_freed_memory(keep: bool = True) -> None:
    """Let the process keep what it frees, on Linux: glibc hands blocks of 32 MB and more back at once, and the next
    tensor of that size pays for zeroed pages again (six times its cost for a block of logits).

    Not with 8-bit weights on a CPU: each product makes a 16-bit copy of its weight for a moment, and what is kept of
    the activations would stand in the holes that these leave (GPT-2 774M: 4.4 GB at the peak, where 3.4 were needed).

    M_TRIM_THRESHOLD is parameter -1 and M_MMAP_THRESHOLD -3 (source: mallopt(3)).
    """
    if sys.platform == "linux":
        mallopt = getattr(ctypes.CDLL(None), "mallopt", None)  # musl has none
        if mallopt:
            mallopt(-1, 2**31 - 1)
            mallopt(-3, 2**30 if keep else 2**22)


def trim_base(base: PreTrainedModel, keep_dropout: bool = False) -> None:
    """Change a frozen base model in place, before LoRA is attached: one kernel for GPT-2's GELU, which else keeps
    five tensors for its backward pass; on a CPU, attention within each dialogue alone; and no dropout of its own.

    Dropout regularises weights that are trained; these are frozen, and LoRA has its own dropout.
    """
    for module in list(base.modules()):
        for name, child in module.named_children():
            if isinstance(child, NewGELUActivation):
                setattr(module, name, GELUTanh())
        if not keep_dropout:
            if isinstance(module, nn.Dropout):
                module.p = 0.0
            if isinstance(getattr(module, "attention_dropout", None), float):
                setattr(module, "attention_dropout", 0.0)  # noqa: B010 (for the type checker, a module's)
    if base.device.type == "cpu" and base.config._attn_implementation == "sdpa":
        base.set_attn_implementation(ATTENTION)


def speed_up(model: PeftModel) -> None:
    """Give LoRA layers and trained token rows their faster forward pass, in place."""
    for layer in model.modules():
        if isinstance(layer, TrainableTokensLayer) and isinstance(layer.base_layer, nn.Embedding):
            _replace_forward(layer, _embedding_forward)
        elif isinstance(layer, LoraLayer):
            _replace_forward(layer, _lora_forward)
            if model.device.type == "cpu":
                for name, dropout in layer.lora_dropout.items():
                    if isinstance(dropout, nn.Dropout):
                        layer.lora_dropout[name] = CheapDropout(dropout.p)


def _replace_forward(layer: Any, forward: Callable[..., Tensor]) -> None:
    layer.forward = MethodType(forward, layer)


def _lora_forward(layer: Any, x: Tensor, *args: Any, **keywords: Any) -> Tensor:
    """x W + (x A) B * scaling, with A and B cast to x's dtype. PEFT casts x to theirs, float32: more to compute,
    and a copy of x to keep."""
    adapters = [name for name in layer.active_adapters if name in layer.lora_A]
    if layer.disable_adapters or layer.merged or len(adapters) != 1 or layer.lora_variant or args or keywords:
        return type(layer).forward(layer, x, *args, **keywords)
    [adapter] = adapters
    result = layer.base_layer(x)
    down = layer.lora_A[adapter].weight.to(x.dtype)
    up = layer.lora_B[adapter].weight.to(x.dtype)
    narrow = linear(layer.lora_dropout[adapter](x), down).flatten(0, -2)
    flat = result.flatten(0, -2)
    return torch.addmm(flat, narrow.to(flat.dtype), up.T.to(flat.dtype), alpha=layer.scaling[adapter]).view_as(result)


def _embedding_forward(layer: Any, ids: Tensor) -> Tensor:
    """Rows of the frozen embedding, or trained ones. PEFT copies the whole matrix to put three rows into it, and
    its backward pass makes another."""
    if layer.disable_adapters or layer.merged or len(layer.active_adapters) != 1:
        return type(layer).forward(layer, ids)
    [adapter] = layer.active_adapters
    frozen = layer.base_layer(ids)
    trained = layer.trainable_tokens_delta[adapter].to(frozen.dtype)
    hits = ids.unsqueeze(-1) == torch.tensor(layer.token_indices[adapter], device=ids.device)  # (B, T, R)
    scale = layer._get_embed_scale()
    if scale is not None:
        trained = trained * scale.to(trained.dtype)
    return frozen.masked_fill(hits.any(-1, keepdim=True), 0) + hits.to(trained.dtype) @ trained


class CheapDropout(nn.Module):
    """Dropout from 16 random bits an element, cheaper on a CPU than `nn.Dropout`'s; p is exact to 2**-16."""

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
    """Causal attention, one dialogue after another: no work for pairs of tokens that never see each other.

    query (B, heads, T, d), boolean mask (B, 1, T, T) -> (B, T, heads, d). On a CPU the products in bfloat16 are
    several times faster than torch's fused kernel. Where the mask is not made of causal blocks, that kernel is used.
    """
    lengths = _dialogue_lengths(query, key, attention_mask)
    if lengths is None or dropout:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **keywords
        )
    groups = query.shape[1] // key.shape[1]
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    parts = [_split(states, lengths) for states in (query, repeat_kv(key, groups), repeat_kv(value, groups))]
    future = torch.full((max(lengths), max(lengths)), float("-inf"), dtype=query.dtype).triu(1)
    replies = []
    for length, q, k, v in zip(lengths, *parts, strict=True):
        scores = torch.baddbmm(future[:length, :length], q, k.transpose(1, 2), alpha=scale)
        replies.append((scores.softmax(-1) @ v).transpose(0, 1))
    batch, heads, width, size = query.shape
    return torch.cat(replies).view(batch, width, heads, size), None


def _split(states: Tensor, lengths: list[int]) -> list[Tensor]:
    """(B, heads, T, d) -> a (heads, length, d) for each dialogue."""
    return [part.transpose(0, 1) for part in states.transpose(1, 2).flatten(0, 1).split(lengths)]


def _dialogue_lengths(query: Tensor, key: Tensor, mask: Tensor | None) -> list[int] | None:
    """Lengths of the dialogues of all rows, one after another: one begins where a token does not see the one before.
    None where the mask is made of anything but causal blocks."""
    batch, _, width, _ = query.shape
    if key.shape[2] != width:
        return None  # a cache
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
