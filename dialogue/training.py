"""The Trainer, and its progress bar."""

import functools
import math
import sys
import time
from typing import Any, NamedTuple

from peft import PeftModel
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from transformers import PreTrainedTokenizerBase, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_callback import PrinterCallback, ProgressCallback

from dialogue.evaluate import HeldOut, Score
from dialogue.lora import save_adapter
from dialogue.loss import chunked_head
from dialogue.packing import Row, collate


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
        data_collator=functools.partial(collate, pad=held_out.pad),  # can be sent to a worker, which a lambda cannot
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
