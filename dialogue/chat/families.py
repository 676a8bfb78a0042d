"""The families of models that the decoder knows, GPT-2 and Llama: their modules as weights that are ready to run.

How a product with a weight is computed is given from outside. What differs between the families stands in `FAMILIES`.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PretrainedConfig

Product = Callable[[Tensor], Tensor]  # (n, in) -> (n, out)
MakeProduct = Callable[[Tensor, Tensor | None], Product]  # weight (out, in), bias (out,) or None


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
