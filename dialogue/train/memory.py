"""How much memory a run will need, by arithmetic, before anything is loaded; and what that decides.

Sizes are bytes unless they say otherwise. What a block keeps for its backward pass was counted with
`torch.autograd.graph.saved_tensors_hooks`, and tests/test_memory.py counts it again. Activation memory as such:
Korthikanti et al. 2022, "Reducing activation recomputation in large transformer models", section 4.
"""

from typing import NamedTuple

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dialogue import machine, models
from dialogue.chat.batch import CACHE_BYTES, cache_bytes
from dialogue.data.packing import mean_dialogue_length
from dialogue.measure.fitting import CONTEXTS, SWEEP
from dialogue.measure.loss import CHUNK
from dialogue.models import CONV1D_FAMILIES, without_weights
from dialogue.train.lora import count_trained
from dialogue.train.options import Run
from dialogue.train.rows import Rows

ADAM = 16  # a trained parameter: float32 value, gradient and two moments (Kingma & Ba 2015)
# What comes and goes in a step grows by so much over a whole run on a CPU: dialogues of many lengths leave holes in the
# heap. Fitted to the starter (136 steps) and GPT-2 124M (80): docs/measured.md.
GROWTH = 1.2
HEADROOM = 0.9  # of the free memory: allocators lose some to gaps between blocks


class Fit(NamedTuple):
    """What this machine allows: how the frozen base is held, and how many rows go through it at once."""

    dtype: torch.dtype  # of weights in 16 bits, and of activations
    in_8bit: bool  # the base's matrices
    checkpointing: bool  # of activations: only each block's input is kept
    rows: int  # of a micro-batch


class Load(NamedTuple):
    """What a run's memory depends on, beside its `Fit`."""

    config: PretrainedConfig
    trained: int  # parameters that are trained
    dropout: bool  # whether LoRA drops out
    length: int  # tokens a row
    span: int  # tokens of the dialogue that a token is in, in the mean
    on_cpu: bool


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


def kept_by_a_block(load: Load) -> float:
    """Numbers (of `Fit.dtype`) that a block keeps for its backward pass, a token.

    GPT-2 (h hidden units, inner layer of 4h): inputs of both norms and of c_attn and attn.c_proj 4h, query, key and
    value 3h, both sides of the GELU 8h. Llama: inputs of both norms 2h; q, k, v as attention takes them 3h, two
    projections' inputs 2h; three of the gated layer's width. Where LoRA drops out, a mask and a masked copy of
    each of its inputs take the place of the input. The same in 8 bits (`_Int8Product` in dialogue/train/speedups.py).
    """
    config = load.config
    hidden = config.hidden_size
    inner = getattr(config, "n_inner", None) or getattr(config, "intermediate_size", None) or 4 * hidden
    if config.model_type in CONV1D_FAMILIES:
        kept, dropped = 7 * hidden + 2 * inner, 2 * hidden + inner
    else:
        kept, dropped = 7 * hidden + 3 * inner, 6 * hidden
    # Attention's probabilities: kept on a CPU (dialogue/train/speedups.py); fused kernels elsewhere recompute them.
    return kept + load.dropout * dropped + load.on_cpu * config.num_attention_heads * load.span


def estimate(load: Load, fit: Fit, weights: Weights) -> int:
    """Bytes at the peak of training, without what the process had taken before it loaded the model."""
    config, size = load.config, fit.dtype.itemsize
    base = weights.outside * size + weights.inside * (1 if fit.in_8bit else size)
    tokens, hidden = fit.rows * load.length, config.hidden_size
    block = kept_by_a_block(load)
    if fit.checkpointing:
        kept = tokens * size * (config.num_hidden_layers * hidden + block)
    else:
        kept = tokens * size * config.num_hidden_layers * block
    # The loss: hidden states at labels and their gradient; a chunk of logits and of log-probabilities in float32.
    loss = tokens * hidden * 3 * size + CHUNK * config.vocab_size * (4 + 4)
    # In a block's backward pass: the gradients of the inner layer's two sides, and one of them being summed.
    backward = tokens * size * 3 * 4 * hidden
    peak = base + ADAM * load.trained + kept + max(loss, backward)
    if load.on_cpu:
        # Fitted to measured peaks of GPT-2 124M and 355M, 512 to 4096 tokens: oneDNN's reordered copies of the head
        # for its two products, and gaps in the heap, as large as three blocks' activations. Where blocks are computed
        # again, each of them leaves gaps of its own between the inputs that are kept.
        gaps = max(3, config.num_hidden_layers / 4) if fit.checkpointing else 3
        peak += 2 * config.vocab_size * hidden * size + gaps * tokens * size * block
        if not fit.in_8bit:  # there `machine.keep_freed_memory` keeps nothing
            peak += GROWTH * (peak - base - ADAM * load.trained)
    return int(peak)


def estimate_certificate(load: Load, fit: Fit, weights: Weights) -> int:
    """Bytes at the peak of what follows the training, without what the process had taken before: the merged model, two
    copies of its head; then what compares them in float32, on a CPU the chat's engine in int8, or the sampler's replies
    of some 100 tokens with their prompts (on a CPU old and new keys and values stand side by side)."""
    size, vocabulary = fit.dtype.itemsize, load.config.vocab_size
    head = vocabulary * load.config.hidden_size
    comparing = 2 * 4 * head + 4 * CHUNK * vocabulary * 4
    engine = load.on_cpu * (weights.inside + 5 * head)  # its embedding is float32
    cache = 100 * cache_bytes(load.config, fit.dtype)
    replies = min(CONTEXTS * (len(SWEEP) + 1), CACHE_BYTES // cache)
    drawing = replies * ((1 + load.on_cpu) * cache + vocabulary * (size + 8))
    return sum(weights) * size + 2 * head * size + max(comparing, engine, drawing)


def load_of(run: Run, rows: Rows, tokenizer: PreTrainedTokenizerBase, device: torch.device) -> Load:
    """What the memory of `run` depends on."""
    config = models.load_config(run.base_model)
    return Load(
        config, count_trained(config, run.lora, tokenizer), bool(run.lora.lora_dropout), rows.length,
        mean_dialogue_length(rows.train), device.type == "cpu",
    )  # fmt: skip


def choose(load: Load, run: Run, device: torch.device) -> Fit:
    """The fastest way to train that fits into the free memory; the leanest where none does.

    In this order fewer rows at once (the effective batch stays), then activation checkpointing (a third more time),
    then int8 weights, are the price, unless a flag or an edited value decides. On a GPU a model of a billion
    parameters is taken in 16 bits only where a whole step fits at once: little memory is what `quant_config` is for.
    """
    machine.stay_on(device)
    dtype = machine.gather(machine.pick_dtype(device))[0]
    free = min(machine.gather(machine.free_memory(device, run.arguments.world_size)))
    weights = count_weights(load.config)
    in_8bit = {"yes": [True], "no": [False]}.get(run.load_in_8bit, [False, True])
    if run.load_in_8bit == "auto" and device.type == "mps":
        in_8bit = [False]  # bitsandbytes has no kernels for MPS
    rows = run.arguments.per_device_train_batch_size
    ways = [
        Fit(dtype, int8, kept, part)
        for int8 in in_8bit
        for kept in ([False, True] if run.checkpointing is None else [run.checkpointing])
        for part in range(rows, 0, -1)
        if rows % part == 0
    ]
    if run.load_in_8bit == "auto" and device.type == "cuda" and sum(weights) >= 1_000_000_000:
        ways = [
            way for way in ways if way.in_8bit or (way.rows == rows and way.checkpointing == bool(run.checkpointing))
        ]
    needed = {way: estimate(load, way, weights) for way in ways}
    return next((way for way in ways if needed[way] < HEADROOM * free), min(ways, key=needed.__getitem__))
