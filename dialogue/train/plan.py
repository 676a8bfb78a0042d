"""The rehearsal before a run, and what it says about the run's memory and time."""

import math
import sys
import time
from typing import NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments

from dialogue import machine
from dialogue.data.packing import IGNORED, Row, collate, count_tokens
from dialogue.errors import UserError
from dialogue.measure.likelihood import HeldOut
from dialogue.prompt import find_roles
from dialogue.train.loss import chunked_head
from dialogue.train.pace import halve


class Rehearsal(NamedTuple):
    """What one real micro-batch, forward and backward, measured."""

    seconds: float  # one micro-batch
    tokens: int  # in that micro-batch, padding left out
    peak_bytes: int  # CUDA: allocated; elsewhere: resident set of the process


def rehearse_what_fits(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], arguments: TrainingArguments
) -> tuple[Rehearsal, TrainingArguments]:
    """Rehearse; where the device's memory is too small, with half the micro-batch and twice the accumulation."""
    while True:
        try:
            return rehearse(model, tokenizer, rows, arguments), arguments
        except torch.OutOfMemoryError:
            arguments = halve(arguments)
        model.zero_grad(set_to_none=True)
        machine.release_memory()


def rehearse(
    model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: list[Row], arguments: TrainingArguments
) -> Rehearsal:
    """Run real micro-batches forward and backward, without a step, and check that something is learned.

    Raises UserError where no label is left, where the <END> of a learned reply carries none, or where
    no gradient reaches the LoRA weights or one of the three token rows. Gradients and random states are
    as before.
    """
    end = find_roles(tokenizer).end
    for row in rows:
        if all(label == IGNORED for label in row["labels"]):
            raise UserError("a training row has no label: every dialogue needs a reply for the bot to learn")
        learned = [token for token, label in zip(row["input_ids"], row["labels"], strict=True) if label != IGNORED]
        if end not in learned:
            raise UserError("a reply's <END> carries no label: the bot would never learn to stop")

    device = model.device
    longest = sorted(rows, key=lambda row: len(row["labels"]), reverse=True)[: arguments.per_device_train_batch_size]
    batch = {name: values.to(device) for name, values in collate(longest, tokenizer.pad_token_id).items()}
    random_state = torch.get_rng_state()
    if arguments.activation_checkpointing:
        model.activation_checkpointing_enable(arguments.activation_checkpointing_kwargs)
    # A few tokens are enough to compare losses, and the plain one's logits would be the peak of memory.
    beginning = {name: values[:, :64].to(device) for name, values in collate([longest[-1]], 0).items()}
    check_loss(model, beginning)
    model.train()
    machine.reset_peak(device)
    seconds = []
    with chunked_head(model):
        for _ in range(2):  # the first pays for memory and kernels that later ones find ready
            start = time.perf_counter()
            model(**batch).loss.backward()
            if device.type == "cuda":
                torch.cuda.synchronize(device)
            seconds.append(time.perf_counter() - start)
    check_gradients(model)
    model.zero_grad(set_to_none=True)
    torch.set_rng_state(random_state)
    return Rehearsal(min(seconds), count_tokens(longest), machine.peak_memory(device))


@torch.no_grad()
def check_loss(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    """Raises UserError where the model's head does more than multiply (a bias, a scale, a cap on the logits):
    the loss in chunks would then be another loss."""
    model.eval()
    plain = model(**batch, use_cache=False).loss.item()
    with chunked_head(model):
        chunked = model(**batch, use_cache=False).loss.item()
    model.train()
    if not math.isfinite(plain):
        raise UserError("the base model's loss is not finite: its weights are broken; download it again")
    if not math.isclose(plain, chunked, rel_tol=0.01):
        raise UserError(f"this base model's head is not a plain matrix (loss {plain:.4f}, in chunks {chunked:.4f})")


def check_gradients(model: PeftModel) -> None:
    """Raises UserError unless a finite, non-zero gradient reaches LoRA and each of the three token rows."""
    parameters = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    trained = {name: p.grad for name, p in parameters}
    broken = [name for name, gradient in trained.items() if gradient is not None and not gradient.isfinite().all()]
    if broken:
        raise UserError(f"the gradient of {broken[0]} is not finite: the base model's weights are broken, or its dtype")
    if not any("lora_" in name and gradient is not None and gradient.any() for name, gradient in trained.items()):
        raise UserError("no gradient reaches the LoRA weights: check target_modules in lora_config")
    for name, gradient in trained.items():
        if "trainable_tokens" in name and (gradient is None or not gradient.any(dim=-1).all()):
            raise UserError("no gradient reaches one of <USER>, <BOT> and <END>: check the dataset")


def count_steps(rows: int, arguments: TrainingArguments) -> int:
    """Optimiser steps of the whole run."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    micro_batches = math.ceil(rows / (arguments.per_device_train_batch_size * arguments.world_size))
    return math.ceil(math.ceil(micro_batches / arguments.gradient_accumulation_steps) * arguments.num_train_epochs)


def foresee(
    rehearsal: Rehearsal, rows: list[Row], held_out: HeldOut, arguments: TrainingArguments
) -> tuple[int, float, float]:
    """Optimiser steps of the run, seconds of one of them, and of the run with its evaluations and certificate."""
    steps = count_steps(len(rows), arguments)
    per_step = seconds_per_step(rehearsal, count_tokens(rows) / len(rows), arguments)
    evaluations = count_evaluations(steps, len(rows), arguments)
    return steps, per_step, estimate_seconds(rehearsal, steps * per_step, evaluations, held_out, arguments)


def count_evaluations(steps: int, rows: int, arguments: TrainingArguments) -> int:
    """Evaluations of a training of `steps` steps, the one at its end included."""
    if arguments.eval_strategy == "epoch":
        per_epoch = math.ceil(rows / (arguments.train_batch_size * arguments.world_size))
        return max(1, math.ceil(steps / math.ceil(per_epoch / arguments.gradient_accumulation_steps)))
    if arguments.eval_strategy == "steps":
        every = arguments.eval_steps or arguments.logging_steps
        return max(1, math.ceil(steps / (every if every >= 1 else math.ceil(every * steps))))
    return 1


def estimate_seconds(
    rehearsal: Rehearsal, training_seconds: float, evaluations: int, held_out: HeldOut, arguments: TrainingArguments
) -> float:
    """Seconds of training (`training_seconds` for its steps), its evaluations, the merge's certificate and the sampler.

    A forward pass is half of a step's work: 2 FLOP a weight and token forward, 2 more backward, since frozen
    weights get no gradient (Kaplan et al. 2020, "Scaling laws for neural language models", section 2.1).
    """
    tokens = count_tokens(held_out.rows)
    # Two models on 100 dialogues of some 150 tokens, one at a time, which takes twice as long as in rows; 640 short
    # replies for the sampler, the model card's conversations, and saving. The constant was fitted on three runs of 2
    # to 5 minutes on a CPU, which it puts at 0.93 to 1.07 of the time that they took.
    merging = 4 * min(tokens, 15_000) + 70_000
    forward_tokens = (1 + evaluations) * tokens / arguments.world_size + merging
    return training_seconds + forward_tokens * rehearsal.seconds / rehearsal.tokens / 2


def affordable_share(rehearsal: Rehearsal, held_out: HeldOut, seconds: float, arguments: TrainingArguments) -> float:
    """Share of the held-out dialogues that a tenth of `seconds` is enough to score; at most 1."""
    tokens = count_tokens(held_out.rows) / arguments.world_size
    return min(1.0, 0.1 * seconds / (tokens * rehearsal.seconds / rehearsal.tokens / 2))


def seconds_per_step(rehearsal: Rehearsal, mean_row: float, arguments: TrainingArguments) -> float:
    """Seconds of an optimiser step on rows of `mean_row` tokens; the rehearsal took the longest rows."""
    rows = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps
    return rehearsal.seconds * rows * mean_row / rehearsal.tokens


def ask_before_days(seconds: float, yes: bool, cheaper: list[str]) -> None:
    """A run of more than a day asks first. Raises UserError where the answer is no, or nobody is there."""
    if seconds < 86400 or yes:
        return
    advice = f"cheaper: {' or '.join(f'--preset {name}' for name in cheaper)}, or --max_train_dialogues N"
    if not sys.stdin.isatty():
        raise UserError(f"this run would take {seconds / 86400:.1f} days; add --yes to start it all the same; {advice}")
    if input(f"This run would take {seconds / 86400:.1f} days ({advice}). Start it? [y/N] ").strip().lower() != "y":
        raise UserError("not started")
