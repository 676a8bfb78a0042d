"""A decoder's forward pass for one sequence, in as few tensor operations as it takes: GPT-2 and Llama.

transformers' own forward spends more time between its operations than in them where one token is read at a
time. Here a layer is four products with weights, an attention and what little stands between. How a product
is computed is given from outside (`dialogue/chat/kernels.py`), so that the same code serves every precision.
What differs between the families stands in `FAMILIES`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel

from dialogue.chat.kernels import KERNELS, Product

MakeProduct = Callable[[Tensor, Tensor | None], Product]  # weight (out, in), bias (out,) or None
CHUNK = 256  # tokens that are read at once: the attention's mask grows with their square


class Norm(NamedTuple):
    """LayerNorm, or without a bias RMSNorm."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    def __call__(self, x: Tensor) -> Tensor:
        if self.bias is None:
            return torch.rms_norm(x, self.weight.shape, self.weight, self.eps)
        return torch.layer_norm(x, self.weight.shape, self.weight, self.bias, self.eps)


class Layer(NamedTuple):
    """One block. The three projections of its attention are one product, and so are the MLP's gate and up."""

    norm_1: Norm
    qkv: Product
    out: Product
    norm_2: Norm
    up: Product
    activate: Product
    down: Product


class Weights(NamedTuple):
    """A model, ready to run."""

    embedding: Tensor  # (V, width)
    positions: Tensor | None  # (context, width): learned, added to the embedding
    rotation: tuple[Tensor, Tensor] | None  # cos and sin, (context, head size): rotary
    layers: list[Layer]
    norm: Norm
    head: Product
    heads: int  # of the keys and values
    group: int  # queries that share a key
    size: int  # of a head
    scale: float  # of query times key


def gpt2(model: Any, product: MakeProduct) -> Weights:
    """GPT-2: learned positions, LayerNorm, weights as (in, out)."""
    body, config = model.transformer, model.config

    def conv1d(module: Any) -> Product:
        return product(module.weight.T, module.bias)

    def norm(module: Any) -> Norm:
        return Norm(module.weight.float(), module.bias.float(), module.eps)

    def layer(block: Any) -> Layer:
        return Layer(
            norm(block.ln_1), conv1d(block.attn.c_attn), conv1d(block.attn.c_proj),
            norm(block.ln_2), conv1d(block.mlp.c_fc), _gelu, conv1d(block.mlp.c_proj),
        )  # fmt: skip

    size = config.n_embd // config.n_head
    return Weights(
        body.wte.weight.detach(), body.wpe.weight.detach(), None, [layer(block) for block in body.h], norm(body.ln_f),
        product(model.lm_head.weight, None), config.n_head, 1, size, size**-0.5,
    )  # fmt: skip


def llama(model: Any, product: MakeProduct) -> Weights:
    """Llama: rotary positions, RMSNorm, a gated MLP, keys shared by groups of queries."""
    body, config = model.model, model.config

    def joined(*modules: Any) -> Product:
        bias = None if modules[0].bias is None else torch.cat([module.bias for module in modules])
        return product(torch.cat([module.weight for module in modules]), bias)

    def norm(module: Any) -> Norm:
        return Norm(module.weight.float(), None, module.variance_epsilon)

    def layer(block: Any) -> Layer:
        attention, mlp = block.self_attn, block.mlp
        return Layer(
            norm(block.input_layernorm), joined(attention.q_proj, attention.k_proj, attention.v_proj),
            joined(attention.o_proj), norm(block.post_attention_layernorm), joined(mlp.gate_proj, mlp.up_proj),
            _gated_silu, joined(mlp.down_proj),
        )  # fmt: skip

    positions = torch.arange(config.max_position_embeddings, device=model.device)[None]
    cos, sin = body.rotary_emb(torch.zeros(1, device=model.device), positions)
    heads, size = config.num_key_value_heads, cos.shape[-1]
    # Half of the rotation is a difference: x * cos + rotated x * sin, where rotated is (-second, first).
    sin[..., : size // 2] *= -1
    return Weights(
        body.embed_tokens.weight.detach(), None, (cos[0], sin[0]), [layer(block) for block in body.layers],
        norm(body.norm), product(model.lm_head.weight, None), heads, config.num_attention_heads // heads, size,
        size**-0.5,
    )  # fmt: skip


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _gated_silu(x: Tensor) -> Tensor:
    """(n, 2 width) -> (n, width)."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


# Family -> how its modules become weights, and what its config must say for that to be all there is to it.
FAMILIES: dict[str, tuple[Callable[[Any, MakeProduct], Weights], dict[str, tuple]]] = {
    "gpt2": (
        gpt2,
        {
            "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
            "scale_attn_weights": (True,),
            "scale_attn_by_inverse_layer_idx": (False,),
            "add_cross_attention": (False,),
        },
    ),
    "llama": (llama, {"hidden_act": ("silu",)}),
}
STATIC_ROTATIONS = ("default", "linear", "llama3")  # the same at every length


def supported(config: PretrainedConfig) -> bool:
    """Whether `Decoder` computes what transformers computes for this model."""
    if config.model_type not in FAMILIES:
        return False
    rotary = getattr(config, "rope_parameters", None) or {}
    needed = FAMILIES[config.model_type][1]
    return rotary.get("rope_type", "default") in STATIC_ROTATIONS and all(
        getattr(config, name) in values for name, values in needed.items()
    )


class Decoder:
    """An `Engine` (`dialogue/chat/engine.py`) on a CPU: keys and values stay in a cache whose memory is taken once."""

    def __init__(self, model: PreTrainedModel, precision: str, context: int) -> None:
        self.precision, self.length = precision, 0
        with torch.inference_mode():
            self.weights = w = FAMILIES[model.config.model_type][0](model, KERNELS[precision])
        # Memory that was never written costs nothing: the system hands it out at the first touch.
        self.cache = torch.empty(len(w.layers), 2, w.heads, context, w.size)
        self.token = _compiled(w, self.cache) if precision == "int8" else None

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
    def _forward(self, ids: list[int], start: int, logits: int) -> Tensor:
        n, device = len(ids), self.cache.device
        if n == 1 and self.token:
            return self.token(ids[0], start)
        end = start + n
        mask = None
        if n > 1:  # each token sees what is before it and itself
            mask = torch.ones(n, end, dtype=torch.bool, device=device).tril_(start)
            mask = mask.repeat_interleave(self.weights.group, dim=0)
        places = torch.arange(start, end, device=device)
        return self.layers(torch.tensor(ids, device=device), places, end, mask, logits).float()

    def layers(self, ids: Tensor, places: Tensor, width: int, mask: Tensor | None, logits: int = 1) -> Tensor:
        """Token ids (n,) at `places` (n,) -> logits (`logits`, V) after the last of them.

        Attention goes over the first `width` places of the cache; `mask` (n * group, width) is true where it may.
        Nothing here waits for a device.
        """
        w = self.weights
        x = w.embedding[ids].to(self.cache.dtype)
        rotation = None
        if w.positions is not None:
            x += w.positions[places]
        elif w.rotation:
            rotation = (w.rotation[0][places, None], w.rotation[1][places, None])
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


def _compiled(w: Weights, cache: Tensor) -> Callable[[int, int], Tensor]:
    """One token of int8 weights in compiled loops: (token, its place) -> logits (1, V).

    Beside products as fast as these, what stands between torch's operations would take a third of the time.
    """
    from dialogue.chat import int8_kernel

    def norm(norm: Norm) -> int8_kernel.Norm:
        bias = torch.zeros_like(norm.weight) if norm.bias is None else norm.bias
        return int8_kernel.Norm(norm.weight.detach().numpy(), bias.detach().numpy(), norm.eps)

    def block(layer: Any) -> int8_kernel.Block:
        return int8_kernel.Block(
            norm(layer.norm_1), layer.qkv.matrix, layer.out.matrix,
            norm(layer.norm_2), layer.up.matrix, layer.down.matrix,
        )  # fmt: skip

    blocks = [block(layer) for layer in w.layers]
    attention = int8_kernel.Attention(w.heads, w.group, w.size, w.scale)
    gated = w.rotation is not None
    turns = tuple(part.numpy() for part in w.rotation or torch.empty(2, 0, w.size))
    caches = list(cache.numpy())

    def token(number: int, place: int) -> Tensor:
        x = w.embedding[number].to(torch.float32, copy=True)
        if w.positions is not None:
            x += w.positions[place]
        state, threads = x.numpy(), torch.get_num_threads()
        for block, past in zip(blocks, caches, strict=True):
            int8_kernel.token(state, block, past, place, turns, attention, gated, threads)
        return w.head(w.norm(x[None]))

    return token
