"""The families of models that the decoder knows, GPT-2 and Llama: their tensors as weights that are ready to run.

How a product with a weight is computed is given from outside. What differs between the families stands in `FAMILIES`.
"""

from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional

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


class Parts(NamedTuple):
    """A model that is not ready to run yet."""

    config: Any  # has the fields of its config.json
    tensors: Mapping[str, Tensor]  # by the names that they have in a file; without a head the embedding is it
    parameters: int
    frequencies: Tensor | None = None  # of the rotation, (size / 2,)
    scaling: float = 1.0  # its cos and sin are multiplied with this


def parts_of(model: Any) -> Parts:
    """Those of a model of transformers."""
    parts = Parts(model.config, model.state_dict(), model.num_parameters())
    rotary = getattr(model.base_model, "rotary_emb", None)
    return parts._replace(frequencies=rotary.inv_freq, scaling=rotary.attention_scaling) if rotary else parts


def gpt2(parts: Parts, product: MakeProduct) -> Weights:
    """GPT-2: learned positions, LayerNorm, weights as (in, out)."""
    config, at = parts.config, parts.tensors

    def conv1d(name: str) -> Product:
        return product(at[f"{name}.weight"].T, at[f"{name}.bias"])

    def norm(name: str) -> Norm:
        return Norm(at[f"{name}.weight"].float(), at[f"{name}.bias"].float(), config.layer_norm_epsilon)

    def layer(block: str) -> Layer:
        return Layer(
            norm(f"{block}.ln_1"), conv1d(f"{block}.attn.c_attn"), conv1d(f"{block}.attn.c_proj"),
            norm(f"{block}.ln_2"), conv1d(f"{block}.mlp.c_fc"), _gelu, conv1d(f"{block}.mlp.c_proj"),
        )  # fmt: skip

    size, embedding = config.n_embd // config.n_head, at["transformer.wte.weight"]
    check_shape(embedding, config.vocab_size, config.n_embd)
    layers = [layer(f"transformer.h.{number}") for number in range(config.n_layer)]
    return Weights(
        embedding, at["transformer.wpe.weight"], None, layers, norm("transformer.ln_f"),
        product(at.get("lm_head.weight", embedding), None), config.n_head, 1, size, size**-0.5,
    )  # fmt: skip


def llama(parts: Parts, product: MakeProduct) -> Weights:
    """Llama: rotary positions, RMSNorm, a gated MLP, keys shared by groups of queries."""
    config, at = parts.config, parts.tensors

    def joined(*names: str) -> Product:
        biased = any(f"{name}.bias" in at for name in names)
        bias = torch.cat([at[f"{name}.bias"] for name in names]) if biased else None
        return product(torch.cat([at[f"{name}.weight"] for name in names]), bias)

    def norm(name: str) -> Norm:
        return Norm(at[f"{name}.weight"].float(), None, config.rms_norm_eps)

    def layer(block: str) -> Layer:
        attention, mlp = f"{block}.self_attn", f"{block}.mlp"
        return Layer(
            norm(f"{block}.input_layernorm"), joined(*(f"{attention}.{name}_proj" for name in "qkv")),
            joined(f"{attention}.o_proj"), norm(f"{block}.post_attention_layernorm"),
            joined(f"{mlp}.gate_proj", f"{mlp}.up_proj"), _gated_silu, joined(f"{mlp}.down_proj"),
        )  # fmt: skip

    assert parts.frequencies is not None
    places = torch.arange(config.max_position_embeddings, device=parts.frequencies.device)
    angles = torch.outer(places.float(), parts.frequencies.float()).repeat(1, 2)
    cos, sin = angles.cos() * parts.scaling, angles.sin() * parts.scaling
    heads, size = config.num_key_value_heads, cos.shape[-1]
    # Half of the rotation is a difference: x * cos + rotated x * sin, where rotated is (-second, first).
    sin[:, : size // 2] *= -1
    embedding, layers = at["model.embed_tokens.weight"], range(config.num_hidden_layers)
    check_shape(embedding, config.vocab_size, config.hidden_size)
    check_shape(at["model.layers.0.self_attn.q_proj.weight"], config.num_attention_heads * size, config.hidden_size)
    return Weights(
        embedding, None, (cos, sin), [layer(f"model.layers.{number}") for number in layers], norm("model.norm"),
        product(at.get("lm_head.weight", embedding), None), heads, config.num_attention_heads // heads, size,
        size**-0.5,
    )  # fmt: skip


def check_shape(weight: Tensor, *shape: int) -> None:
    """Raises ValueError for a weight of another shape than the config says: int8's loops check no bounds."""
    if weight.shape != shape:
        raise ValueError(f"a weight has the shape {tuple(weight.shape)}, config.json says {shape}")


def _gelu(x: Tensor) -> Tensor:
    return functional.gelu(x, approximate="tanh")


def _gated_silu(x: Tensor) -> Tensor:
    """(n, 2 width) -> (n, width)."""
    gate, up = x.chunk(2, dim=-1)
    return functional.silu(gate).mul_(up)


# Family -> how its tensors become weights, and what its config must say for that to be all there is to it.
FAMILIES: dict[str, tuple[Callable[[Parts, MakeProduct], Weights], dict[str, tuple]]] = {
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


def supported(config: Any) -> bool:
    """Whether `Decoder` computes what transformers computes for the model of this config."""
    if config.model_type not in FAMILIES:
        return False
    rotary = getattr(config, "rope_parameters", None) or {}
    needed = FAMILIES[config.model_type][1]
    return rotary.get("rope_type", "default") in STATIC_ROTATIONS and all(
        getattr(config, name) in values for name, values in needed.items()
    )


def weights_of(parts: Parts, product: MakeProduct) -> Weights:
    """A model of a supported family, each of its products made by `product`."""
    return FAMILIES[parts.config.model_type][0](parts, product)
