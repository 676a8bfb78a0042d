"""What a person sees while a model is trained, and after the last step: a bar, or without a terminal lines."""

import os
import sys
import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn
from transformers import TrainerCallback

from dialogue import machine
from dialogue.plaintext import plain

# What follows the last step, with its share of the time: measured on the starter (benchmarks/first_minute.py).
STAGES = {
    "conversations, adapters": 0.23, "certificate: the trained model": 0.09, "merge": 0.05,
    "certificate: the merged model": 0.13, "certificate: the chat": 0.08, "sampler": 0.42,
}  # fmt: skip


class Finishing:
    """Called with a stage and the share of it that is done, says what is being done and how much time is left."""

    def __init__(self) -> None:
        console = Console(stderr=True)
        columns = TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[left]} left")
        self.bar, self.stage = Progress(*columns, console=console, transient=True), ""
        self.task: Any = None

    def close(self) -> None:
        """Take the bar off the screen."""
        if self.bar.live.is_started:  # where there is none, an empty line would be printed
            self.bar.stop()

    def __call__(self, stage: str, share: float = 0.0) -> None:
        names = list(STAGES)
        done = sum(STAGES[name] for name in names[: names.index(stage)]) + share * STAGES[stage]
        if self.task is None:  # a run that goes on may begin with a later stage
            self.began, self.first = time.perf_counter(), done
            self.task = self.bar.add_task(stage, total=1 - done, left="?")
            if self.bar.console.is_terminal:
                self.bar.start()
        gone = time.perf_counter() - self.began
        left = machine.duration(gone / (done - self.first) * (1 - done)) if done > self.first else "?"
        self.bar.update(self.task, description=stage, completed=done - self.first, left=left)
        if stage != self.stage and not self.bar.console.is_terminal:
            print(f"after the last step: {stage}", file=sys.stderr, flush=True)
        self.stage = stage
        if share == 1:  # the last of all: what is printed next has the screen to itself
            self.close()


class Progressed(TrainerCallback):
    """A bar with loss, tokens/s and time left; without a terminal, a line for each logged step."""

    def __init__(self, tokens_per_step: float, evaluations: int, evaluation_seconds: float) -> None:
        self.tokens_per_step = tokens_per_step
        self.evaluations, self.evaluation_seconds = evaluations, evaluation_seconds  # those still to come
        # Standard error, as all progress bars: standard output stays for what was asked for.
        self.console = Console(stderr=True, quiet=int(os.environ.get("RANK", 0)) > 0)
        self.bar = Progress(
            TextColumn("training"), BarColumn(), MofNCompleteColumn(), TextColumn("loss {task.fields[loss]}"),
            TextColumn("{task.fields[rate]:.0f} tokens/s, {task.fields[left]} left"), console=self.console,
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
            "training", total=state.max_steps, completed=state.global_step, loss="?", rate=0.0, left="?"
        )
        if self.console.is_terminal:
            self.bar.start()

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        self.step_began = time.perf_counter()

    def on_step_end(self, args, state, control, **_: Any) -> None:
        self.busy += time.perf_counter() - self.step_began
        self.steps += 1
        left = (state.max_steps - state.global_step) * self.busy / self.steps
        left += self.evaluations * self.evaluation_seconds
        self.bar.update(self.task, completed=state.global_step, rate=self.rate, left=machine.duration(left))

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
