"""What happens between two steps of a training: the last evaluation, signals, the clock, whole checkpoints."""

import math
from pathlib import Path
from typing import Any

from transformers import DefaultFlowCallback, TrainerCallback, TrainerControl

from dialogue import machine, storage
from dialogue.train import runs


class Over(Exception):
    """All steps are done, or no evaluation gets better any more, where a run was to go on."""


class Keeper(TrainerCallback):
    """Evaluates once more at the end, saves after a signal, and gives whole checkpoints their place."""

    def __init__(self, trainer: Any, home: Path, keep: int, seconds: float | None = None) -> None:
        self.trainer, self.home, self.keep = trainer, home, keep  # checkpoints go into `home`, so many are kept
        self.seconds = seconds  # that the training may take
        self.signal = 0  # that all processes know of
        self.saved_step = -1

    def on_train_begin(self, args, state, control, **keywords: Any) -> None:
        """Where a run goes on: the evaluation that its checkpoint, written in the middle of a step, still owes."""
        if state.global_step == 0:
            return
        self.saved_step = state.global_step
        due, flow = TrainerControl(), DefaultFlowCallback()  # what Trainer does at the end of this step
        flow.on_step_end(args, state, due)
        if state.global_step % math.ceil(len(keywords["train_dataloader"]) / args.gradient_accumulation_steps) == 0:
            flow.on_epoch_end(args, state, due)
        if due.should_evaluate and state.global_step not in self.trainer.scores:
            self.trainer.evaluate()
        if self.trainer.is_over() or control.should_training_stop:
            raise Over  # Trainer itself would do another step

    def on_step_end(self, args, state, control, **_: Any) -> None:
        readings = machine.gather((self.trainer.seconds, self.trainer.signals.number))
        self.signal = max(number for _, number in readings)  # whichever process got it, all stop at the same step
        spent = readings[0][0]
        if self.seconds and spent * (1 + 0.5 / state.global_step) > self.seconds:  # half a step is the best guess
            control.should_training_stop = True
        if control.should_training_stop:
            control.should_evaluate = True  # the last step's adapters count as well
        self._leave_if_asked(state, control)

    def on_epoch_end(self, args, state, control, **_: Any) -> None:
        control.should_evaluate &= state.global_step not in self.trainer.scores
        self._leave_if_asked(state, control)

    def _leave_if_asked(self, state, control) -> None:
        """After a signal: no evaluation any more, but a checkpoint, and the end."""
        if self.signal:
            control.should_evaluate, control.should_training_stop = False, True
            control.should_save = self.saved_step != state.global_step

    def on_save(self, args, state, control, **_: Any) -> None:
        name = f"checkpoint-{state.global_step}"
        machine.gather(None)  # until each process has written its random states
        if args.should_save:
            written = Path(args.output_dir, name)
            self.trainer.write_state(written)
            storage.put_in_place(written, self.home / name)
            runs.clear(self.home, self.keep, state.global_step)
        self.saved_step = state.global_step
