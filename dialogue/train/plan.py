"""The plan of a run: a rehearsal of two real batches, and what it says about steps, time and memory."""

import math
import sys
import time
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from transformers import PreTrainedTokenizerBase, TrainingArguments

from dialogue import machine
from dialogue.data.packing import IGNORED, Row, collate, count_tokens, one_dialogue_a_row
from dialogue.errors import UserError
from dialogue.measure.likelihood import HeldOut
from dialogue.measure.loss import head_of, hidden_states, mean_nats
from dialogue.train.memory import Fit
from dialogue.train.options import Run, override
from dialogue.train.rows import Rows

AROUND = 1.15  # a step over its passes: optimiser, checkpoints, log. Fitted to a run of the starter
DECAY = 0.6  # of all steps, where the learning rate is constant first
ALIKE = 0.02  # relative error of hidden states in 16 bits; of packed dialogues that see each other it is 0.3 and more


class Rehearsal(NamedTuple):
    """What one real micro-batch, forward and backward, measured."""

    seconds: float
    tokens: int  # in that micro-batch, padding left out
    peak_bytes: int  # CUDA: allocated; elsewhere: resident set of the process


class Plan(NamedTuple):
    """How the run will go."""

    rows: Rows  # packed, or where the base would let dialogues see each other, one dialogue a row
    fit: Fit  # what memory really took
    arguments: TrainingArguments  # of `fit`, and with the steps that a budget allows
    rehearsal: Rehearsal
    steps: int
    seconds: float  # of the whole run
    packed: bool

    @property
    def rows_a_step(self) -> int:
        """The effective batch, of all processes."""
        return self.fit.rows * self.arguments.gradient_accumulation_steps * self.arguments.world_size

    def confirm(self, run: Run) -> None:
        """A run of more than a day asks first. Raises UserError where the answer is no, or nobody is there."""
        days = self.seconds / 86400
        if days < 1 or run.yes:
            return
        advice = f"cheaper: {' or '.join(f'--preset {name}' for name in run.cheaper)}, or --max_train_dialogues N"
        if not sys.stdin.isatty():
            raise UserError(f"this run would take {days:.1f} days; add --yes to start it all the same; {advice}")
        if input(f"This run would take {days:.1f} days ({advice}). Start it? [y/N] ").strip().lower() != "y":
            raise UserError("not started")


def rehearse(model: PeftModel, tokenizer: PreTrainedTokenizerBase, rows: Rows, run: Run, fit: Fit) -> Plan:
    """Run a real micro-batch forward and backward, without a step, and plan with what it measured. Where memory is too
    small, with fewer rows at once and more accumulation. Raises UserError where something would not be learned (see the
    checks below), or where not even a single row fits. Random states are as before."""
    if any(set(row["labels"]) == {IGNORED} for row in rows.train):
        raise UserError("a training row has no label: every dialogue needs a reply for the bot to learn")
    with torch.random.fork_rng(devices=[model.device] if model.device.type == "cuda" else []):
        model.eval()
        check_loss(model, rows.train)
        packed = keeps_dialogues_apart(model, rows.train)
        model.train()
        if not packed:
            held_out = rows.held_out._replace(rows=one_dialogue_a_row(rows.held_out.rows))
            rows = rows._replace(train=one_dialogue_a_row(rows.train), held_out=held_out)
        while True:
            try:
                measured = measure(model, rows.train, tokenizer.pad_token_id, fit, run.arguments)
                break
            except Exception as error:
                if not machine.is_out_of_memory(error):
                    raise
            if fit.rows == 1:
                raise UserError("not enough memory for a single row: lower --max_length, or take a smaller base model")
            model.zero_grad(set_to_none=True)
            machine.release_memory()
            fit = fit._replace(rows=next(part for part in range(fit.rows // 2, 0, -1) if fit.rows % part == 0))
        check_gradients(model)
    model.zero_grad(set_to_none=True)
    # All processes take as many rows at once, and plan with the first one's clock.
    fit, measured = fit._replace(rows=min(machine.gather(fit.rows))), machine.gather(measured)[0]
    if run.budget:  # a tenth of it is for evaluations
        share = 0.1 * run.budget / evaluation_seconds(measured, rows.held_out, run.arguments)
        rows = rows.with_less_held_out(share, tokenizer)
    return foresee(measured, rows, run, fit, packed)


def measure(model: PeftModel, rows: list[Row], pad: int, fit: Fit, arguments: TrainingArguments) -> Rehearsal:
    """Time and memory of the two longest micro-batches; the gradients stay in the model."""
    device = model.device
    if fit.checkpointing:
        model.activation_checkpointing_enable(arguments.activation_checkpointing_kwargs)
    longest = sorted(rows, key=lambda row: len(row["labels"]), reverse=True)
    first, second = longest[: fit.rows], longest[fit.rows : 2 * fit.rows] or longest[: fit.rows]
    head, seconds = head_of(model), 0.0
    machine.reset_peak(device)
    for part in (first, second):  # the first pays for memory; kernels for new shapes are paid for in every step
        batch = {name: values.to(device) for name, values in collate(part, pad).items()}
        start = time.perf_counter()
        mean_nats(model, batch, head).backward()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        seconds = time.perf_counter() - start
    return Rehearsal(seconds, count_tokens(second), machine.peak_memory(device))


@torch.no_grad()
def check_loss(model: PeftModel, rows: list[Row]) -> None:
    """Raises UserError where the model's head does more than multiply (a bias, a scale, a cap on the logits):
    the loss in chunks would then be another loss. A few tokens tell; more would be the peak of memory."""
    shortest = min(rows, key=lambda row: len(row["labels"]))
    batch = {name: values[:, :64].to(model.device) for name, values in collate([shortest], 0).items()}
    plain = model(**batch, use_cache=False).loss.item()
    chunked = mean_nats(model, batch, head_of(model)).item()
    if not math.isfinite(plain):
        raise UserError("the base model's loss is not finite: its weights are broken; download it again")
    if not math.isclose(plain, chunked, rel_tol=0.01):
        raise UserError(f"this base model's head is not a plain matrix (loss {plain:.4f}, in chunks {chunked:.4f})")


@torch.no_grad()
def keeps_dialogues_apart(model: PeftModel, rows: list[Row]) -> bool:
    """Whether a dialogue in a packed row has the hidden states that it has alone. The code of some families (OPT, XGLM)
    does not pass positions to its mask: dialogues would see each other."""
    packed = next((row for row in rows if row["position_ids"].count(0) > 1), None)
    if packed is None:
        return True
    last = one_dialogue_a_row([packed])[-1]
    together, alone = (
        hidden_states(model, {name: of.to(model.device) for name, of in collate([row], 0).items()})[0].float()
        for row in (packed, last)
    )
    return bool((together[-len(alone) :] - alone).norm() < ALIKE * alone.norm())


def check_gradients(model: PeftModel) -> None:
    """Raises UserError unless a finite, non-zero gradient reaches LoRA and each of the three token rows."""
    trained: dict[str, Any] = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    broken = [name for name, gradient in trained.items() if gradient is not None and not gradient.isfinite().all()]
    if broken:
        raise UserError(f"the gradient of {broken[0]} is not finite: the base model's weights are broken, or its dtype")
    if not any("lora_" in name and gradient is not None and gradient.any() for name, gradient in trained.items()):
        raise UserError("no gradient reaches the LoRA weights: check target_modules in lora_config")
    for name, gradient in trained.items():
        if "trainable_tokens" in name and (gradient is None or not gradient.any(dim=-1).all()):
            raise UserError("no gradient reaches one of <USER>, <BOT> and <END>: check the dataset")


def foresee(rehearsal: Rehearsal, rows: Rows, run: Run, fit: Fit, packed: bool = True) -> Plan:
    """The plan that follows from a rehearsal; with a budget, the steps for which there is time."""
    times = run.arguments.gradient_accumulation_steps * run.arguments.per_device_train_batch_size // fit.rows
    arguments = override(
        run.arguments,
        # gradients underflow in float16 unless they are scaled, which is what Trainer's fp16 does
        {
            "fp16": fit.dtype == torch.float16, "dataloader_pin_memory": run.arguments.device.type == "cuda",
            "activation_checkpointing": fit.checkpointing, "per_device_train_batch_size": fit.rows,
            "gradient_accumulation_steps": times,
        },
    )  # fmt: skip
    mean_row = count_tokens(rows.train) / len(rows.train)
    per_step = AROUND * rehearsal.seconds * fit.rows * times * mean_row / rehearsal.tokens
    if budget := run.budget:
        reserve = evaluation_seconds(rehearsal, rows.held_out, arguments)
        arguments = override(arguments, {"max_steps": max(1, int((budget - reserve) / per_step))})
    steps = count_steps(len(rows.train), arguments)
    if arguments.lr_scheduler_type == "warmup_stable_decay" and not arguments.lr_scheduler_kwargs:
        decay = {"num_decay_steps": math.ceil(DECAY * steps), "decay_type": "linear"}
        arguments = override(arguments, {"lr_scheduler_kwargs": decay})
    evaluations = 1 if budget else 1 + count_evaluations(steps, len(rows.train), arguments)
    # Two models on the dialogues of the certificate; 340 short replies for the sampler, their likelihoods, the card's
    # conversations, and saving. Fitted to a run of the starter (benchmarks/first_minute.py).
    merging = 2 * min(count_tokens(rows.held_out.rows), 6_000) + 42_000
    seconds = (budget or steps * per_step) + evaluations * evaluation_seconds(rehearsal, rows.held_out, arguments)
    seconds += merging * rehearsal.seconds / rehearsal.tokens / 2
    return Plan(rows, fit, arguments, rehearsal, steps, seconds, packed)


def count_steps(rows: int, arguments: TrainingArguments) -> int:
    """Optimiser steps of the whole run."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    micro_batches = math.ceil(rows / (arguments.per_device_train_batch_size * arguments.world_size))
    return math.ceil(math.ceil(micro_batches / arguments.gradient_accumulation_steps) * arguments.num_train_epochs)


def count_evaluations(steps: int, rows: int, arguments: TrainingArguments) -> int:
    """Evaluations of a training of `steps` steps, the one at its end included."""
    if arguments.eval_strategy == "epoch":
        per_epoch = math.ceil(rows / (arguments.train_batch_size * arguments.world_size))
        return max(1, math.ceil(steps / math.ceil(per_epoch / arguments.gradient_accumulation_steps)))
    if arguments.eval_strategy == "steps":
        every = arguments.eval_steps or arguments.logging_steps
        return max(1, math.ceil(steps / (every if every >= 1 else math.ceil(every * steps))))
    return 1


def evaluation_seconds(rehearsal: Rehearsal, held_out: HeldOut, arguments: TrainingArguments) -> float:
    """Seconds of a forward pass over the held-out rows. It is half of a step's work: 2 FLOP a weight and token forward,
    2 more backward, since frozen weights get no gradient (Kaplan et al. 2020, "Scaling laws for neural language
    models", section 2.1)."""
    return count_tokens(held_out.rows) / arguments.world_size * rehearsal.seconds / rehearsal.tokens / 2
