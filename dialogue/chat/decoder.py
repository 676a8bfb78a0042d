"""A decoder's forward pass in as few tensor operations as it takes: GPT-2 and Llama.

The problem: transformers' own forward spends more time between its operations than in them where one token is read at
a time. Here a layer is four products with weights, an attention and what little stands between. How a product is
computed is given from outside, so that the same code serves float32, int8 (`dialogue/chat/int8.py`, which compiles the
rest of a layer too) and a GPU's 16 bits.

Keys and values stay in one cache. A token has a place in it and a position in its text. The two are the same for one
sequence, and differ where several continue one text: the text is stored once, and behind it the sequences' own tokens
stand interleaved, each with the position that it would have alone. A mask says which places a token sees.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dialogue.chat.families import Norm, Parts, Product, Weights, parts_of, weights_of

CHUNK = 256  # tokens that are read at once: the attention's mask grows with their square


def float32(weight: Tensor, bias: Tensor | None) -> Product:
    """Everything in float32."""
    w, b = weight.float().contiguous(), None if bias is None else bias.float()
    return lambda x: functional.linear(x, w, b)


class Decoder:
    """An engine on a CPU, with weights in "float32" or "int8"."""

    compiled: Any = None  # a step of few tokens in int8
    recorded: Any = None  # what knows the cache by its address: a CUDA graph

    def __init__(self, model: Any, precision: str, context: int) -> None:
        """`model` is one of transformers, or `Parts`."""
        parts = model if isinstance(model, Parts) else parts_of(model)
        self.precision, self.length, self.parameters = precision, 0, parts.parameters
        product: Any = float32
        if precision == "int8":
            from dialogue.chat.quantising import Quantiser  # imports numba, which nothing else needs

            product = Quantiser()
        with torch.inference_mode():
            self.weights = w = weights_of(parts, product)
        # Memory that was never written costs nothing: the system hands it out at the first touch.
        self.cache = torch.empty(len(w.layers), 2, w.heads, context, w.size)
        if precision == "int8":
            self.compiled = _compile(w)

    def step(self, ids: list[int]) -> Tensor:
        """Read one or more new tokens; logits (V,) float32 after the last of them."""
        return self.read(ids)[-1]

    def read(self, ids: list[int], logits: int = 1) -> Tensor:
        """Read new tokens; logits (`logits`, V) float32 after the last of them.

        An interrupt leaves keys and values behind that no length counts, and that are written over.
        """
        parts = []
        for start in range(0, len(ids), CHUNK):
            piece = ids[start : start + CHUNK]
            wanted = start + len(piece) - (len(ids) - logits)
            parts.append(self._forward(piece, self.length + start, min(max(wanted, 1), len(piece))))
        self.length += len(ids)
        return torch.cat(parts)[-logits:]

    def truncate(self, length: int) -> None:
        """Forget what follows the first `length` tokens."""
        self.length = min(self.length, length)

    def reset(self) -> None:
        """Forget everything."""
        self.length = 0

    @torch.inference_mode()
    def branch(self, ids: list[int], slots: list[int], step: int, count: int) -> Tensor:
        """Token number `step` of some of `count` sequences that continue what the cache holds; logits (len(ids), V).

        ids[i] is that of sequence slots[i]. Nothing of it counts as held until `keep`.
        """
        first = self.length + step * count
        self._reserve(first + count, first)
        if self.compiled:
            return self.compiled(ids, self.cache, (self.length, step, count, slots))
        self.cache[:, :, :, first : first + count] = 0  # a mask does not hide NaN
        behind = torch.arange(first + count) - self.length
        mask = (behind < 0) | (behind % count == torch.tensor(slots)[:, None])
        return self.aside(ids, [self.length + step] * len(ids), [first + slot for slot in slots], mask)

    @torch.inference_mode()
    def aside(self, ids: list[int], positions: list[int], places: list[int], mask: Tensor) -> Tensor:
        """Logits (n, V) float32 after each of `ids`, which are read behind what the cache holds and do not count as
        held; mask (n, width) is true at the places that a token sees."""
        self._reserve(mask.shape[1], self.length)
        device = self.cache.device
        mask = mask.to(device).repeat_interleave(self.weights.group, dim=0)
        at = [torch.tensor(each, device=device) for each in (ids, places, positions)]
        return self.layers(at[0], at[1], mask.shape[1], mask, len(ids), at[2]).float()

    @torch.inference_mode()
    def keep(self, slot: int, steps: int, count: int) -> None:
        """The first `steps` tokens of sequence `slot` of `count` follow what the cache holds from now on."""
        places = self.length + slot + count * torch.arange(steps, device=self.cache.device)
        self.cache[:, :, :, self.length : self.length + steps] = self.cache[:, :, :, places]
        self.length += steps

    def _reserve(self, places: int, held: int) -> None:
        """Let the cache have so many places at least; the first `held` of them stay."""
        before = self.cache
        if places > before.shape[3]:
            self.cache = before.new_empty(*before.shape[:3], 2 * places, before.shape[4])
            self.cache[:, :, :, :held] = before[:, :, :, :held]
            self.recorded = None

    @torch.inference_mode()
    def _forward(self, ids: list[int], start: int, logits: int) -> Tensor:
        n, device = len(ids), self.cache.device
        if n == 1 and self.compiled:
            return self.compiled(ids, self.cache, (start, 0, 1, [0]))
        end = start + n
        mask = None
        if n > 1:  # each token sees what is before it and itself
            mask = torch.ones(n, end, dtype=torch.bool, device=device).tril_(start)
            mask = mask.repeat_interleave(self.weights.group, dim=0)
        places = torch.arange(start, end, device=device)
        return self.layers(torch.tensor(ids, device=device), places, end, mask, logits).float()

    def layers(
        self, ids: Tensor, places: Tensor, width: int, mask: Tensor | None, logits: int = 1,
        positions: Tensor | None = None,
    ) -> Tensor:  # fmt: skip
        """Token ids (n,) at `places` (n,) -> logits (`logits`, V) after the last of them.

        Attention goes over the first `width` places of the cache; `mask` (n * group, width) is true where it may.
        `positions` (n,) are the places unless they are given. Nothing here waits for a device.
        """
        w, positions = self.weights, places if positions is None else positions
        x = w.embedding[ids].to(self.cache.dtype)
        rotation = None
        if w.positions is not None:
            x += w.positions[positions]
        elif w.rotation:
            rotation = (w.rotation[0][positions, None], w.rotation[1][positions, None])
        for layer, cache in zip(w.layers, self.cache, strict=True):
            attended = self._attention(layer.qkv(layer.norm_1(x)), cache, places, width, rotation, mask)
            x += layer.out(attended)
            x += layer.down(layer.activate(layer.up(layer.norm_2(x))))
        return w.head(w.norm(x[-logits:]))

    def _attention(
        self, qkv: Tensor, cache: Tensor, places: Tensor, width: int, rotation: tuple[Tensor, Tensor] | None,
        mask: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """(n, (heads * group + 2 heads) * size) -> (n, heads * group * size); fills cache[:, :, places]."""
        w, n = self.weights, len(places)
        queries = w.heads * w.group
        qkv = qkv.view(n, queries + 2 * w.heads, w.size)
        turned = queries + w.heads
        if rotation:
            cos, sin = rotation
            qk = qkv[:, :turned]
            qkv[:, :turned] = qk * cos + qk.roll(w.size // 2, -1) * sin
        # The group's queries stand below each other, as if each token had `group` positions.
        q = qkv[:, :queries].view(n, w.heads, w.group, w.size).transpose(0, 1).reshape(w.heads, n * w.group, w.size)
        cache.index_copy_(2, places, qkv[:, queries:].view(n, 2, w.heads, w.size).permute(1, 2, 0, 3))
        keys, values = cache[:, None, :, :width]
        out = functional.scaled_dot_product_attention(q[None], keys, values, attn_mask=mask, scale=w.scale)
        # Not `view`: kernels of a GPU return (1, n * group, heads, size), transposed.
        return out[0].reshape(w.heads, n, w.group * w.size).transpose(0, 1).reshape(n, queries * w.size)


def _compile(w: Weights) -> Callable[[list[int], Tensor, tuple[int, int, int, list[int]]], Tensor]:
    """(n token ids, the cache, (start, step, count, n slots) as in `int8.block`) -> logits (n, V)."""
    from dialogue.chat import int8

    def norm(norm: Norm) -> Norm:
        weight: Any = norm.weight.detach()
        bias: Any = torch.zeros_like(weight) if norm.bias is None else norm.bias.detach()
        return Norm(weight.numpy(), bias.numpy(), norm.eps)

    layers = [(norm(each.norm_1), each.qkv, each.out, norm(each.norm_2), each.up, each.down) for each in w.layers]
    last = norm(w.norm)
    attention, gated = (w.heads, w.group, w.size, w.scale), w.rotation is not None
    rotation = tuple(part.numpy() for part in w.rotation or torch.empty(2, 0, w.size))

    def run(ids: list[int], cache: Tensor, at: tuple[int, int, int, list[int]]) -> Tensor:
        n, (start, step, count, slots) = len(ids), at
        x = w.embedding[ids if n == 1 else ids + ids[:1] * (-n % 4)].float()
        if w.positions is not None:
            x += w.positions[start + step]
        where, threads = (start, step, count, np.array(slots)), torch.get_num_threads()
        for layer, past in zip(layers, cache.numpy(), strict=True):
            int8.block(x.numpy(), layer, past, where, rotation, attention, gated, threads)
        return w.head(torch.from_numpy(int8.norm(x[:n].numpy(), last, gated)))

    return run
