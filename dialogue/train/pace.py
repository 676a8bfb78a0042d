"""A run that ends on time and goes on when memory is short, with the same effective batch."""

import re
import time
from typing import Any

import torch
import torch.distributed as dist
from transformers import TrainerCallback, TrainingArguments

from dialogue import machine
from dialogue.errors import UserError
from dialogue.train.options import override


def parse_duration(text: str) -> float:
    """ "90s", "20m", "1h30m" -> seconds. Raises UserError for anything else."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip().lower())
    hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    if not hours + minutes + seconds:
        raise UserError(f"--budget {text}: write a time as 90s, 20m or 1h30m")
    return 3600.0 * hours + 60 * minutes + seconds


def halve(arguments: TrainingArguments) -> TrainingArguments:
    """A smaller micro-batch and more accumulation; the effective batch stays. Raises UserError at one row."""
    rows = arguments.per_device_train_batch_size
    if rows == 1:
        raise UserError("not enough memory for a single row: lower --max_length, or take a smaller base model")
    smaller = next(part for part in range(rows // 2, 0, -1) if rows % part == 0)
    steps = arguments.gradient_accumulation_steps * rows // smaller
    return override(arguments, {"per_device_train_batch_size": smaller, "gradient_accumulation_steps": steps})


class Budget(TrainerCallback):
    """Stops a training after `seconds`, its evaluations included; the learning rate follows the share that is spent.

    `reserve` is kept for the last evaluation. With several processes the first one's clock counts.
    """

    def __init__(self, seconds: float, reserve: float = 0.0) -> None:
        self.seconds, self.reserve = seconds, reserve
        self.start = self.now = time.perf_counter()
        self.step_began = self.already = 0.0  # seconds spent before a stop, where a run goes on

    def spent(self) -> float:
        """Share of the time for steps that was over at the end of the last one."""
        return min(1.0, (self.now - self.start) / max(self.seconds - self.reserve, 1e-9))

    def on_train_begin(self, args, state, control, **_: Any) -> None:
        self.now = time.perf_counter()
        self.start = self.now - self.already

    def on_optimizer_step(self, args, state, control, **_: Any) -> None:
        self.look(args)

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        self.step_began = self.now

    def on_step_end(self, args, state, control, **_: Any) -> None:
        took = self.now - self.step_began
        # Half a step is the best guess on which side of the end the next one's end lies nearer.
        control.should_training_stop |= self.now + took / 2 > self.start + self.seconds - self.reserve

    def on_evaluate(self, args, state, control, **_: Any) -> None:
        self.look(args)

    def look(self, args: TrainingArguments) -> None:
        """Read the clock; all processes see the same time, so that they take the same steps."""
        self.now = time.perf_counter()
        if args.world_size > 1:
            elapsed = torch.tensor([self.now - self.start], dtype=torch.float64, device=args.device)
            dist.broadcast(elapsed, 0)
            self.now = self.start + elapsed.item()


class Paced:
    """Mixed into a Trainer: a micro-batch that does not fit into memory is computed in parts, and the schedule
    follows `budget` where there is one."""

    budget: Budget | None = None
    rows_at_once = 2**30

    def create_scheduler(self, num_training_steps: int, optimizer: Any = None) -> Any:
        """Trainer's schedule; with a budget, at the share of time that is spent in place of the share of steps."""
        scheduler = super().create_scheduler(num_training_steps, optimizer)  # type: ignore[misc]
        budget = self.budget
        if budget is not None:
            if not hasattr(scheduler, "lr_lambdas"):
                raise UserError("--budget needs a schedule over time: --lr_scheduler_type cosine, or linear")
            scheduler.lr_lambdas = [
                lambda _, at=at: at(budget.spent() * num_training_steps) for at in scheduler.lr_lambdas
            ]
        return scheduler

    def training_step(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any = None) -> torch.Tensor:
        """Forward and backward. Out of memory halves the rows at once, from here on; the loss is a sum over the
        effective batch's labels, so the parts' gradients add up to the same."""
        rows = len(inputs["input_ids"])
        trained = [p for p in model.parameters() if p.requires_grad]
        before = [None if p.grad is None else p.grad.clone() for p in trained]
        while True:
            try:
                return self._in_parts(model, inputs, num_items_in_batch)
            except torch.OutOfMemoryError as error:
                at_once = min(self.rows_at_once, rows)
                if at_once == 1 or num_items_in_batch is None or dist.is_initialized():
                    raise UserError("out of memory: lower --per_device_train_batch_size or --max_length") from error
                self.rows_at_once = at_once // 2
            # A backward pass that broke off has left gradients in some parameters.
            for p, gradient in zip(trained, before, strict=True):
                p.grad = None if gradient is None else gradient.clone()
            machine.release_memory()

    def _in_parts(self, model: Any, inputs: dict[str, Any], num_items_in_batch: Any) -> torch.Tensor:
        parts = [
            {name: values[start : start + self.rows_at_once] for name, values in inputs.items()}
            for start in range(0, len(inputs["input_ids"]), self.rows_at_once)
        ]
        return sum(super(Paced, self).training_step(model, part, num_items_in_batch) for part in parts)  # type: ignore


def agreed(value: Any) -> Any:
    """The first process's `value`, in all of them: what was measured differs, and they must take the same steps."""
    if not dist.is_initialized():
        return value
    values = [value]
    dist.broadcast_object_list(values, 0)
    return values[0]
