"""The Trainer, and its progress bar."""

import dataclasses
import functools
import math
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any, NamedTuple

from accelerate.utils import AutocastKwargs
from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import PreTrainedTokenizerBase, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dialogue import machine
from dialogue.chat.conversation import Conversation
from dialogue.chat.engine import Model, TransformersEngine
from dialogue.chat.sampling import Sampling
from dialogue.data.packing import Row, collate, count_tokens, fill_up
from dialogue.errors import Stopped
from dialogue.measure.likelihood import HeldOut, Score
from dialogue.models import context_length
from dialogue.plaintext import plain
from dialogue.train.lora import save_adapter
from dialogue.train.loss import chunked_head
from dialogue.train.pace import Budget, Paced
from dialogue.train.plan import count_evaluations, count_steps
from dialogue.train.runs import ResumableTrainer

OPENERS = ("Hello, how are you?", "What do you like to eat?")  # answered at every evaluation
SAMPLE_TOKENS = 24


class Pacing(NamedTuple):
    """What was measured before a training, and the time that it may take."""

    evaluation_seconds: float = 0.0
    budget: Budget | None = None


UNPACED = Pacing()


class DialogueTrainer(Paced, ResumableTrainer):
    """transformers' Trainer, with checkpoints that hold adapters only and an exact evaluation."""

    def __init__(
        self,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        held_out: HeldOut,
        progress: "Progressed",
        **keywords: Any,
    ) -> None:
        super().__init__(model=model, eval_dataset=held_out.rows, callbacks=[progress], **keywords)
        self.peft_model, self.tokenizer, self.held_out, self.progress = model, tokenizer, held_out, progress
        self.own_head: Any = nullcontext  # until the head has stepped aside, logits are logits

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False) -> None:
        """Saves the adapters only."""
        if self.args.should_save:
            save_adapter(self.peft_model, self.tokenizer, str(output_dir or self.args.output_dir))

    def evaluate(self, eval_dataset: Any = None, ignore_keys: Any = None, metric_key_prefix: str = "eval") -> dict:
        """Nats a reply token over the whole validation set. Trainer's own average weighs each batch alike,
        however many tokens it has. Two sample replies are shown with it. A signal ends it with Stopped."""
        self.signals.at_once = self.args.world_size == 1
        began = time.perf_counter()
        try:
            score = self.held_out.score_in_shares(self.peft_model, self.args)
            samples = self.sample_replies() if self.is_world_process_zero() else []
        finally:
            self.signals.at_once = False
        metrics = {f"eval_{name}": value for name, value in score.figures().items()}
        metrics["eval_loss"] = score.nats_per_token
        metrics["eval_seconds"] = time.perf_counter() - began
        if self.budget:
            self.budget.reserve = metrics["eval_seconds"]
        self.log(metrics)
        for opener, reply in samples:
            self.progress.say(f"  you> {opener}\n  bot> {reply}")
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        self.remember(score)
        return metrics

    def sample_replies(self) -> list[tuple[str, str]]:
        """Greedy answers to `OPENERS` by the model as it is now. No random state is touched."""
        model: Any = self.peft_model
        was_training = model.training
        with self.own_head():
            engine = TransformersEngine(model)  # takes the model out of training
            asked = Model(engine, self.tokenizer, context_length(model.config))
            replies = [
                "".join(Conversation(asked, seed=0).reply(opener, SAMPLE_TOKENS, Sampling(temp=0)))
                for opener in OPENERS
            ]
        model.train(was_training)
        return list(zip(OPENERS, (" ".join(reply.split()) for reply in replies), strict=True))


class Progressed(TrainerCallback):
    """A bar with loss, tokens/s and time left; without a terminal, a line for each logged step."""

    def __init__(
        self, tokens_per_step: float, evaluations: int, evaluation_seconds: float, budget: Budget | None = None
    ) -> None:
        self.tokens_per_step = tokens_per_step
        self.evaluations, self.evaluation_seconds = evaluations, evaluation_seconds  # those still to come
        self.budget = budget
        # Standard error, as all progress bars: standard output stays for what was asked for.
        self.console = Console(stderr=True, quiet=int(os.environ.get("RANK", 0)) > 0)
        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]:.0f} tokens/s, {task.fields[left]} left"), console=self.console,
        )  # fmt: skip
        self.task: Any = None
        self.steps = 0
        self.left = math.nan  # seconds to the end of the training, its evaluations included
        self.busy = self.step_began = 0.0  # seconds inside steps: evaluations and checkpoints are left out

    @property
    def rate(self) -> float:
        """Training tokens a second so far; padding does not count."""
        return self.steps * self.tokens_per_step / self.busy if self.busy else 0.0

    def on_train_begin(self, args, state, control, **_: Any) -> None:
        self.task = self.bar.add_task(
            "training", total=state.max_steps, completed=state.global_step, loss="?", rate=0.0, left="?"
        )
        if self.console.is_terminal:
            self.bar.start()

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        self.step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **_: Any) -> None:
        self.busy += time.perf_counter() - self.step_began
        self.steps += 1
        total = state.max_steps
        if self.budget:
            total = max(state.global_step, round(state.global_step / max(self.budget.spent(), 1e-3)))
        self.left = (total - state.global_step) * self.busy / self.steps + self.evaluations * self.evaluation_seconds
        left = machine.duration(self.left)
        self.bar.update(self.task, completed=state.global_step, total=total, rate=self.rate, left=left)

    def on_evaluate(self, args, state, control, **keywords: Any) -> None:
        self.evaluations = max(0, self.evaluations - 1)
        self.evaluation_seconds = keywords["metrics"]["eval_seconds"]

    def on_log(self, args, state, control, **keywords: Any) -> None:
        logs: dict[str, float] = keywords["logs"]
        if "loss" in logs:
            self.bar.update(self.task, loss=f"{logs['loss']:.3f}")
        if self.console.is_terminal:
            if "eval_loss" in logs:
                self.say(f"step {state.global_step}: validation perplexity {logs['eval_perplexity']:.2f} per token")
        elif not self.console.quiet:
            figures = "  ".join(f"{name} {value:.4g}" for name, value in logs.items() if isinstance(value, float))
            self.say(f"step {state.global_step}/{state.max_steps}  {figures}")

    def say(self, text: str) -> None:
        """A line above the bar; plain text, since a model may have written it."""
        if self.console.is_terminal:
            self.bar.print(plain(text), markup=False, highlight=False)
        else:
            print(plain(text), file=sys.stderr, flush=True)

    def on_train_end(self, args, state, control, **_: Any) -> None:
        self.bar.stop()


class Trained(NamedTuple):
    """How a training went."""

    steps: int
    best_step: int  # whose adapters the model has now
    seconds: float  # evaluations and checkpoints included; without the time between a stop and its resumption
    tokens: int  # padding left out
    tokens_per_second: float
    history: list[dict[str, float]]  # Trainer's log
    score: Score  # of the best step, on the validation split


def train(
    model: PeftModel,
    tokenizer: PreTrainedTokenizerBase,
    rows: list[Row],
    held_out: HeldOut,
    arguments: TrainingArguments,
    run: dict[str, Any],
    checkpoint: Path | None = None,
    patience: int = 0,
    pacing: Pacing = UNPACED,
) -> Trained:
    """Train `model`'s adapters in place on packed `rows`; they end as they were at the step that scores best.

    `run` stands in each checkpoint as its run.json; with `checkpoint` the training goes on from there. With a budget
    in `pacing`, the clock ends it.
    Raises Stopped after a signal, with everything saved, and UserError where a checkpoint cannot be written.
    """
    model.config.use_cache = False  # a cache would also switch the packed rows' mask off
    micro_batches = arguments.train_batch_size * arguments.world_size * arguments.gradient_accumulation_steps
    per_step = count_tokens(rows) / len(rows) * micro_batches
    if arguments.world_size > 1:
        rows = fill_up(rows, arguments.train_batch_size * arguments.world_size)
    evaluations = count_evaluations(count_steps(len(rows), arguments), len(rows), arguments)
    progress = Progressed(per_step, evaluations, *pacing)
    trainer = DialogueTrainer(
        model,
        tokenizer,
        held_out,
        progress,
        run=run,
        patience=patience,
        # A checkpoint is for going on from; which adapters are the best, and signals, are looked after here.
        args=dataclasses.replace(
            arguments, save_only_model=False, load_best_model_at_end=False, enable_jit_checkpoint=False
        ),
        train_dataset=rows,
        data_collator=functools.partial(collate, pad=held_out.pad),  # can be sent to a worker, which a lambda cannot
    )
    if pacing.budget:
        trainer.budget, pacing.budget.reserve = pacing.budget, pacing.evaluation_seconds
        trainer.callback_handler.callbacks.insert(0, pacing.budget)  # the others ask it for the time
    # Trainer's fp16 is wanted for its scaled gradients alone: the weights are 16-bit already, and under autocast
    # LayerNorm returns float32, in which bitsandbytes' int8 backward pass would then multiply.
    trainer.accelerator.autocast_handler = AutocastKwargs(enabled=False)
    trainer.remove_callback(ProgressCallback)
    trainer.remove_callback(PrinterCallback)
    if checkpoint:
        trainer.restore(checkpoint)
        if pacing.budget:
            pacing.budget.already = trainer.seconds
    try:
        with chunked_head(model) as trainer.own_head, trainer.signals.noted():
            try:
                trainer.train(resume_from_checkpoint=str(checkpoint) if checkpoint else None)
                if trainer.state.global_step not in trainer.scores:
                    trainer.evaluate()
            except Stopped:
                pass  # what is not saved yet is saved next
            trainer.leave_if_asked()
    finally:
        progress.bar.stop()
    trainer.take_best()
    steps = trainer.state.global_step
    best = steps if trainer.best_step is None else trainer.best_step
    tokens, history = round(steps * per_step), trainer.state.log_history
    return Trained(steps, best, trainer.seconds, tokens, progress.rate, history, trainer.scores[best])
