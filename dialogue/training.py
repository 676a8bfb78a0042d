"""Rehearsal, the Trainer, and its progress bar."""

import math
import sys
import time
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dialogue.errors import UserError
from dialogue.evaluate import HeldOut, Score
from dialogue.lora import save_adapter
from dialogue.loss import chunked_head
from dialogue.packing import IGNORED, Row, collate
from dialogue.prompt import find_roles


class Rehearsal(NamedTuple):
    """What one real micro-batch, forward and backward, measured."""

    seconds: float  # one micro-batch
    tokens: int  # in that micro-batch, padding left out
    peak_bytes: int  # CUDA: allocated; elsewhere: resident set of the process


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
    check_loss(model, {name: values.to(device) for name, values in collate([longest[-1]], 0).items()})
    model.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
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
    return Rehearsal(min(seconds), sum(len(row["labels"]) for row in longest), peak_memory(device))


@torch.no_grad()
def check_loss(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    """Raises UserError where the model's head does more than multiply (a bias, a scale, a cap on the logits):
    the loss in chunks would then be another loss."""
    model.eval()
    plain = model(**batch, use_cache=False).loss.item()
    with chunked_head(model):
        chunked = model(**batch, use_cache=False).loss.item()
    model.train()
    if not math.isclose(plain, chunked, rel_tol=0.01):
        raise UserError(f"this base model's head is not a plain matrix (loss {plain:.4f}, in chunks {chunked:.4f})")


def check_gradients(model: PeftModel) -> None:
    """Raises UserError unless a finite, non-zero gradient reaches LoRA and each of the three token rows."""
    trained = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
    broken = [name for name, gradient in trained.items() if gradient is not None and not gradient.isfinite().all()]
    if broken:
        raise UserError(f"the gradient of {broken[0]} is not finite: the base model's weights are broken, or its dtype")
    if not any("lora_" in name and gradient is not None and gradient.any() for name, gradient in trained.items()):
        raise UserError("no gradient reaches the LoRA weights: check target_modules in lora_config")
    for name, gradient in trained.items():
        if "trainable_tokens" in name and (gradient is None or not gradient.any(dim=-1).all()):
            raise UserError("no gradient reaches one of <USER>, <BOT> and <END>: check the dataset")


def peak_memory(device: torch.device) -> int:
    """Peak bytes so far: allocated on a CUDA device, else the resident set of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        import resource
    except ImportError:  # Windows
        import psutil

        return psutil.Process().memory_info().peak_wset
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024  # bytes on macOS, kibibytes elsewhere (getrusage(2))


def count_steps(rows: int, arguments: TrainingArguments) -> int:
    """Optimiser steps of the whole run."""
    if arguments.max_steps > 0:
        return arguments.max_steps
    micro_batches = math.ceil(rows / (arguments.per_device_train_batch_size * arguments.world_size))
    return math.ceil(math.ceil(micro_batches / arguments.gradient_accumulation_steps) * arguments.num_train_epochs)


def estimate_seconds(rehearsal: Rehearsal, steps: int, held_out: HeldOut, arguments: TrainingArguments) -> float:
    """Seconds of training, its evaluations and the merge's certificate.

    A forward pass is half of a step's work: 2 FLOP a weight and token forward, 2 more backward, since frozen
    weights get no gradient (Kaplan et al. 2020, "Scaling laws for neural language models", section 2.1).
    """
    evaluations = 1 + (arguments.num_train_epochs if arguments.eval_strategy == "epoch" else 1)
    tokens = sum(len(row["labels"]) for row in held_out.rows)
    certified = 2 * min(tokens, 15_000)  # two models on 100 dialogues, of some 150 tokens
    forward_tokens = evaluations * tokens + certified
    return (
        steps * arguments.gradient_accumulation_steps * rehearsal.seconds
        + forward_tokens * rehearsal.seconds / rehearsal.tokens / 2
    )


def ask_before_days(seconds: float, yes: bool, cheaper: list[str]) -> None:
    """A run of more than a day asks first. Raises UserError where the answer is no, or nobody is there."""
    if seconds < 86400 or yes:
        return
    advice = f"cheaper: {' or '.join(f'--preset {name}' for name in cheaper)}, or --max_train_dialogues N"
    if not sys.stdin.isatty():
        raise UserError(f"this run would take {seconds / 86400:.1f} days; add --yes to start it all the same; {advice}")
    if input(f"This run would take {seconds / 86400:.1f} days ({advice}). Start it? [y/N] ").strip().lower() != "y":
        raise UserError("not started")


class DialogueTrainer(Trainer):
    """transformers' Trainer, with checkpoints that hold adapters only and an exact evaluation."""

    def __init__(
        self, model: PeftModel, tokenizer: PreTrainedTokenizerBase, held_out: HeldOut, **keywords: Any
    ) -> None:
        super().__init__(model=model, eval_dataset=held_out.rows, **keywords)
        self.peft_model, self.tokenizer, self.held_out = model, tokenizer, held_out
        self.scores: dict[int, Score] = {}  # by step

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        if self.args.should_save:
            save_adapter(self.peft_model, self.tokenizer, str(output_dir or self.args.output_dir))

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Nats a reply token over the whole validation set. Trainer's own average weighs each batch alike,
        however many tokens it has."""
        score = self.scores[self.state.global_step] = self.held_out.score(self.peft_model, self.args.eval_batch_size)
        metrics = {f"eval_{name}": value for name, value in score.figures().items()}
        metrics["eval_loss"] = score.nats_per_token
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics


class Progressed(TrainerCallback):
    """A bar with loss, tokens/s and time left; without a terminal, a line for each logged step."""

    def __init__(self, tokens_per_step: float) -> None:
        self.tokens_per_step = tokens_per_step
        self.loss = math.nan
        # Standard error, as all progress bars: standard output stays for what was asked for.
        self.console = Console(stderr=True)
        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]:.3f}"),
            TextColumn("{task.fields[rate]:.0f} tokens/s"), TimeRemainingColumn(), console=self.console,
        )  # fmt: skip
        self.task: Any = None
        self.steps = 0
        self.busy = self.step_began = 0.0  # seconds inside steps: evaluations and checkpoints are left out

    @property
    def rate(self) -> float:
        """Training tokens a second so far; padding does not count."""
        return self.steps * self.tokens_per_step / self.busy if self.busy else 0.0

    def on_train_begin(self, args, state, control, **_: Any) -> None:
        self.task = self.bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, loss=math.nan, rate=0.0
        )
        if self.console.is_terminal:
            self.bar.start()

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        self.step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **_: Any) -> None:
        self.busy += time.perf_counter() - self.step_began
        self.steps += 1
        self.bar.update(self.task, completed=state.global_step, rate=self.rate)

    def on_log(self, args, state, control, **keywords: Any) -> None:
        logs: dict[str, float] = keywords["logs"]
        if "loss" in logs:
            self.bar.update(self.task, loss=logs["loss"])
        if self.console.is_terminal:
            if "eval_loss" in logs:
                self.bar.print(
                    f"step {state.global_step}: validation perplexity {logs['eval_perplexity']:.2f} per token"
                )
        else:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in logs.items() if isinstance(value, float))
            print(f"step {state.global_step}/{state.max_steps}  {figures}", file=sys.stderr, flush=True)

    def on_train_end(self, args, state, control, **_: Any) -> None:
        self.bar.stop()


class Trained(NamedTuple):
    """How a training went."""

    steps: int
    seconds: float  # evaluations and checkpoints included
    tokens: int  # padding left out
    tokens_per_second: float
    history: list[dict[str, float]]  # Trainer's log
    score: Score  # at the end, on the validation split


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    held_out: HeldOut,
    arguments: TrainingArguments,
) -> Trained:
    """Train `model`'s adapters in place on packed `rows`, and score them on `held_out`."""
    model.config.use_cache = False  # a cache would also switch the packed rows' mask off
    micro_batches = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    per_step = sum(len(row["labels"]) for row in rows) / len(rows) * micro_batches
    progress = Progressed(per_step)
    trainer = DialogueTrainer(
        model,
        tokenizer,
        held_out,
        args=arguments,
        train_dataset=rows,
        data_collator=lambda batch: collate(batch, held_out.pad),
        callbacks=[progress],
    )
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    start = time.perf_counter()
    with chunked_head(model):
        trainer.train(resume_from_checkpoint=arguments.resume_from_checkpoint)
        if trainer.state.global_step not in trainer.scores:
            trainer.evaluate()
        seconds = time.perf_counter() - start
    score = trainer.scores[trainer.state.global_step]
    seen = round(progress.steps * per_step)
    return Trained(trainer.state.global_step, seconds, seen, progress.rate, trainer.state.log_history, score)
