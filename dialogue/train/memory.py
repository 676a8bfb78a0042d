"""How much memory a run will need, by arithmetic, before anything is loaded; and what that decides.

Sizes are bytes unless they say otherwise. What a block keeps for its backward pass was counted with
`torch.autograd.graph.saved_tensors_hooks`, and tests/test_memory.py counts it again. Activation memory as such:
Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models", section 4.
"""

from typing import Any, NamedTuple

import torch
from transformers import PretrainedConfig, TrainingArguments

from dialogue.models import CONV1D_FAMILIES, without_weights
from dialogue.train.loss import CHUNK

ADAM = 16  # a trained parameter: float32 value, gradient and two moments (Kingma & Ba 2015)
HEADROOM = 0.9  # of the free memory: allocators lose some to gaps between blocks


class Needs(NamedTuple):
    """What decides a run's memory, beside the model itself."""

    rows: int  # of a micro-batch
    length: int  # tokens a row
    span: int = 150  # tokens of a dialogue; DailyDialog's mean is 145
    dtype: torch.dtype = torch.bfloat16
    in_8bit: bool = False
    checkpointing: bool = False  # of activations: only each block's input is kept
    device: str = "cpu"


class Weights(NamedTuple):
    """Parameters of a base model, tied ones once."""

    inside: int  # in the blocks' matrices, which int8 applies to
    outside: int  # embeddings, norms, biases


def count_weights(config: PretrainedConfig) -> Weights:
    """Parameters of the model that `config` describes, without memory for them."""
    model = without_weights(config)
    ends = {id(end.weight) for end in (model.get_input_embeddings(), model.get_output_embeddings())}
    matrices = [p for name, p in model.named_parameters() if p.dim() == 2 and id(p) not in ends and "wpe" not in name]
    inside = sum(p.numel() for p in matrices)
    return Weights(inside, model.num_parameters() - inside)


def kept_by_a_block(config: PretrainedConfig, needs: Needs, dropout: bool) -> float:
    """Numbers (of `needs.dtype`) that a block keeps for its backward pass, a token.

    GPT-2 (h hidden units, inner layer of 4h): inputs of both norms and of c_attn and attn.c_proj 4h, query, key and
    value 3h, both sides of the GELU 8h. Llama: its norms compute in float32, 4h; q, k, v as attention takes them 3h,
    two projections' inputs 2h; three of the gated layer's width. Where LoRA drops out, a mask and a masked copy of
    each of its inputs take the place of the input. bitsandbytes' int8 product keeps the input itself besides.
    """
    hidden = config.hidden_size
    inner = getattr(config, "n_inner", None) or getattr(config, "intermediate_size", None) or 4 * hidden
    if config.model_type in CONV1D_FAMILIES:
        kept, lora_inputs, dropped = 7 * hidden + 2 * inner, 2 * hidden + inner, 2 * hidden + inner
    else:
        kept, lora_inputs, dropped = 9 * hidden + 3 * inner, 2 * hidden, 6 * hidden
    kept += dropout * dropped + needs.in_8bit * (hidden + dropout * lora_inputs)
    # Attention's probabilities: kept on a CPU (dialogue/train/speedups.py); fused kernels elsewhere recompute them.
    return kept + (config.num_attention_heads * needs.span if needs.device == "cpu" else 0)


def estimate(
    config: PretrainedConfig, weights: Weights, trained: int, dropout: float, needs: Needs, process: int = 0
) -> int:
    """Bytes at the peak of training; `process` is what the program takes before it loads the model (0 on CUDA,
    where only the device counts), `trained` the number of LoRA weights and token rows' elements, `dropout` LoRA's."""
    size = needs.dtype.itemsize
    base = (weights.inside + weights.outside) * size
    if needs.in_8bit:
        base = weights.inside + weights.outside * size
    tokens = needs.rows * needs.length
    hidden = config.hidden_size
    block = kept_by_a_block(config, needs, bool(dropout))
    if needs.checkpointing:
        kept = tokens * size * (config.num_hidden_layers * hidden + block)
    else:
        kept = tokens * size * config.num_hidden_layers * block
    # The loss: hidden states at labels and their gradient; a chunk of logits and of log-probabilities in float32.
    loss = tokens * hidden * 3 * size + CHUNK * config.vocab_size * (4 + 4)
    # In a block's backward pass: the gradients of the inner layer's two sides, and one of them being summed.
    backward = tokens * size * 3 * 4 * hidden
    peak = process + base + ADAM * trained + kept + max(loss, backward)
    if needs.device == "cpu":
        # Fitted to measured peaks of GPT-2 124M and 355M, 512 to 4096 tokens: oneDNN's reordered copies of the head
        # for its two products, and gaps in the heap, as large as three blocks' activations. Where blocks are computed
        # again, each of them leaves gaps of its own between the inputs that are kept.
        gaps = max(3, config.num_hidden_layers / 4) if needs.checkpointing else 3
        peak += 2 * config.vocab_size * hidden * size + gaps * tokens * size * block
    return int(peak)


def count_trained(config: PretrainedConfig, rank: int) -> int:
    """LoRA weights on every projection of a block that it may go to, and three token rows."""
    hidden, layers = config.hidden_size, config.num_hidden_layers
    # GPT-2: c_attn (h, 3h), attn.c_proj (h, h), mlp.c_proj (4h, h); else q, k, v, o
    widths = 11 * hidden if config.model_type in CONV1D_FAMILIES else 8 * hidden
    return layers * rank * widths + 3 * hidden


def decided(
    load_in_8bit: str, flags: dict[str, Any], arguments: TrainingArguments, device: torch.device, parameters: int
) -> dict[str, bool]:
    """The fields of `Needs` that are not to be chosen: a flag or an edited value says so, or the device.

    On a GPU, a model of a billion parameters is taken in 8 bits also where more would fit: little memory is what
    `quant_config` is for.
    """
    fixed = {}
    if load_in_8bit != "auto" or device.type == "mps":  # bitsandbytes has no kernels for MPS
        fixed["in_8bit"] = load_in_8bit == "yes"
    elif device.type == "cuda" and parameters >= 1_000_000_000:
        fixed["in_8bit"] = True
    if arguments.activation_checkpointing or {"activation_checkpointing", "gradient_checkpointing"} & set(flags):
        fixed["checkpointing"] = bool(arguments.activation_checkpointing)
    return fixed


def choose(
    config: PretrainedConfig, rank: int, dropout: float, needs: Needs, available: int, fixed: dict[str, bool]
) -> tuple[Needs, int]:
    """The fastest way that fits into `available` bytes, and the bytes it needs; the leanest where none fits.

    In this order a micro-batch of fewer rows (the effective batch stays), then activation checkpointing (a third
    more time), then int8 weights, are the price. `fixed` holds fields of `Needs` that a person has decided.
    """
    weights, trained = count_weights(config), count_trained(config, rank)
    rows = [part for part in range(needs.rows, 0, -1) if needs.rows % part == 0]
    found = []
    for in_8bit in [fixed["in_8bit"]] if "in_8bit" in fixed else [False, True]:
        for checkpointing in [fixed["checkpointing"]] if "checkpointing" in fixed else [False, True]:
            for micro_batch in rows:
                candidate = needs._replace(rows=micro_batch, in_8bit=in_8bit, checkpointing=checkpointing)
                found.append((candidate, estimate(config, weights, trained, dropout, candidate)))
    return next((way for way in found if way[1] < HEADROOM * available), min(found, key=lambda way: way[1]))
