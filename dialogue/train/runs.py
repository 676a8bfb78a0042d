"""Checkpoints: whole or not there, of one run and no other, and a Trainer that goes on from them exactly.

What Trainer keeps by itself (adapters, optimizer, schedule, random states, position in the data) it also
restores bit for bit on a CPU. Added here: folders that are whole, the evaluations so far with the best
adapters, an evaluation that was still due, and an end in good order after Ctrl-C or SIGTERM.
"""

import dataclasses
import hashlib
import shutil
import sys
import time
from array import array
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch
from peft import LoraConfig
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import Trainer, TrainerControl, TrainingArguments
from transformers.trainer_callback import DefaultFlowCallback

from dialogue import machine, storage
from dialogue.data.packing import Row
from dialogue.errors import Signals, Stopped, UserError
from dialogue.measure import merge
from dialogue.measure.likelihood import Score
from dialogue.plaintext import plain

STATE, BEST = "evaluations.json", "best_adapter.safetensors"  # ours, beside Trainer's files

# Settings that do not decide what is learned, by the start of their names.
FREE = (
    "adapter_dir", "merged_dir", "output_dir",
    "logging_", "log_", "include_num", "disable_tqdm", "report_to", "run_name", "project", "trackio",
    "save_", "enable_jit", "push_to_hub", "hub_", "load_best", "dataloader_num", "dataloader_p", "ddp_",
    "skip_memory", "do_", "resume_from", "restore_callback", "local_rank", "debug",
)  # fmt: skip


# ---- Which run it is ---------------------------------------------------------------------------------


def describe(
    settings: dict[str, Any], lora: LoraConfig, arguments: TrainingArguments, rows: list[Row], validation: list[Row]
) -> dict[str, Any]:
    """Everything that was asked for and decides the result, flat; two runs with equal ones are the same run."""
    fields = {field.name: getattr(arguments, field.name) for field in dataclasses.fields(arguments) if field.init}
    adapter = {f"lora {name}": value for name, value in dataclasses.asdict(lora).items() if name != "peft_version"}
    asked = {**settings, **adapter, **fields, "processes": arguments.world_size}
    run = {
        **{name: _plain_value(value) for name, value in asked.items() if not name.startswith(FREE)},
        "training data": _fingerprint(rows),
        "validation data": _fingerprint(validation),
    }
    return {name: value for name, value in run.items() if value is not None}


def _plain_value(value: Any) -> Any:
    """A value as JSON keeps it; sets, enums and objects as sorted or printed."""
    if isinstance(value, set | frozenset):
        return sorted(value)
    if isinstance(value, bool | int | float) or value is None:
        return value
    return str(getattr(value, "value", value))


def _fingerprint(rows: list[Row]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for name in ("input_ids", "position_ids", "labels"):
            digest.update(array("q", row[name]).tobytes())
    return digest.hexdigest()[:16]


def differences(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """What is different, name by name; a name that one of them lacks is another version's."""
    changed = [name for name in now if name in before and before[name] != now[name]]
    return [f"{name} {before[name]}, now {now[name]}" for name in changed]


class Begun(NamedTuple):
    """What an earlier start of the same run left."""

    checkpoint: Path | None = None  # train on from here
    trained: bool = False  # the adapters are whole: what is missing is the merged model
    decided: Mapping[str, Any] = MappingProxyType({})  # what that start had chosen by itself, precision for one
    versions: Mapping[str, Any] = MappingProxyType({})


def look(
    run: dict[str, Any],
    adapters: Path,
    merged: Path,
    arguments: TrainingArguments,
    resume: bool | None,
    overwrite: bool,
) -> Begun:
    """Find out what there is of `run`. `resume`: True demands it, False starts afresh, None takes what there is.

    Raises UserError where a folder holds something else, which `overwrite` replaces where a run of this
    project wrote it, and for the finished result of this very run.
    """
    storage.check_apart(adapters, merged, home(arguments))
    has_adapters, has_merged = (_run_of(folder) == run for folder in (adapters, merged))
    # Checkpoints are deleted last: where there is anything of them, a kill came before the end.
    left = any(home(arguments).glob("*checkpoint-*"))
    unfinished = has_adapters and (not has_merged or (left and not overwrite))
    storage.check_free(adapters, overwrite or unfinished)
    storage.check_free(merged, overwrite or (has_merged and unfinished))
    if unfinished and resume is not False and not storage.damage(adapters):
        begun = Begun(trained=True, decided=storage.read_json(adapters / storage.RUN_FILE)["decided"])
    else:
        begun = _newest(run, arguments, overwrite)
    if resume and begun == Begun():
        raise UserError(f"--resume: there is no unfinished run in {arguments.output_dir}")
    if resume is False or begun == Begun():
        clear(home(arguments))
        return Begun()
    return begun


def _run_of(folder: Path) -> Any:
    return storage.read_json(folder / storage.RUN_FILE).get("run")


def _newest(run: dict[str, Any], arguments: TrainingArguments, overwrite: bool) -> Begun:
    """The newest whole checkpoint; a broken one is named and passed over."""
    given = arguments.resume_from_checkpoint
    named = [Path(given)] if given and str(given).lower() not in ("true", "false") else None
    for folder in named or checkpoints(home(arguments)):
        problem = storage.damage(folder)
        if problem or not (folder / storage.MANIFEST).is_file():
            problem = problem or f"it has no {storage.MANIFEST}"
            print(f"{folder} is broken and passed over: {plain(problem)}", file=sys.stderr)
            continue
        saved = storage.read_json(folder / storage.RUN_FILE)
        if not (changed := differences(saved["run"], run)):
            return Begun(folder, decided=saved["decided"], versions=saved["versions"])
        if not overwrite:
            raise UserError(
                f"{folder} belongs to an unfinished run with other settings ({'; '.join(changed)}): repeat those to "
                "resume it, add --overwrite to start afresh, or choose another --output_dir"
            )
        break
    if named:
        raise UserError(f"--resume_from_checkpoint {given}: no whole checkpoint of this run is there")
    return Begun()


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, newest first. Raises UserError where one is not ours."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another folder with --output_dir")
    try:
        found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir()]
        for path in folder.glob(".checkpoint-*.old"):
            storage.recover(path.with_name(path.name[1:-4]))
    except OSError as error:
        raise UserError(f"{folder} cannot be read: {error.strerror or error}") from error
    for path in found:
        if not (path / storage.MANIFEST).is_file() and not (path / storage.RUN_FILE).is_file():
            raise UserError(f"{path} was not written by this version: move it away, or choose another --output_dir")
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def home(arguments: TrainingArguments) -> Path:
    """The folder of a run's checkpoints."""
    return Path(str(arguments.output_dir))


def clear(folder: Path, keep: int = 0, step: int = -1) -> None:
    """Delete what is in `folder` but for the newest `keep` checkpoints up to `step`, and the folder if it is empty.

    Later ones than `step` were broken and passed over, and would push out those that are whole.
    """
    found = checkpoints(folder)
    kept = [path for path in found if int(path.name[11:]) <= step][:keep]
    for path in [path for path in found if path not in kept]:
        path.rename(path.with_name(f".{path.name}.deleted"))  # half deleted, nothing has its final name
    for path in folder.glob(".checkpoint-*"):
        shutil.rmtree(path, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def in_words(begun: Begun, adapters: Path) -> str:
    """What is gone on with, and how not to; empty for a fresh start."""
    if begun.trained:
        return f"{plain(str(adapters))} is whole: only the merge is to be done (--no-resume trains again).\n"
    if begun.checkpoint:
        changed = differences(begun.versions, machine.versions())
        note = f" Not bit for bit what it would have been: {'; '.join(changed)}." if changed else ""
        return f"Resuming from {plain(str(begun.checkpoint))} (--no-resume starts afresh).{note}\n"
    return ""


def check_space(model: Any, arguments: TrainingArguments, adapters: Path, merged: Path) -> None:
    """Raises UserError where the disk will not hold the checkpoints, the adapters and the merged model."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    # A checkpoint: adapters, the best ones, two moments for Adam, tokenizer. One more exists while it is written.
    one, count = 4 * trained + 20_000_000, (arguments.save_total_limit or 2) + 1
    folders = {home(arguments): one * count, adapters: one, merged: merge.merged_bytes(model)}
    storage.check_space(folders)


# ---- The Trainer -------------------------------------------------------------------------------------


def trained_weights(model: Any) -> dict[str, Tensor]:
    """Copies on the CPU of all parameters that are trained, under their names in `model`."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


class ResumableTrainer(Trainer):
    """transformers' Trainer with whole checkpoints, from which it goes on as if it had never stopped.

    A subclass scores in `evaluate`, and calls `remember` with the result.
    """

    def __init__(self, run: dict[str, Any], patience: int, **keywords: Any) -> None:
        super().__init__(**keywords)
        self.run, self.patience, self.signals = run, patience, Signals()
        self.scores: dict[int, Score] = {}  # by step
        self.best_step: int | None = None
        self.best: dict[str, Tensor] = {}  # the trained parameters at that step, on the CPU
        self.saved_step = -1
        self.began = time.perf_counter()  # earlier by what was spent before a stop
        self.writing: Path | None = None

    @property
    def seconds(self) -> float:
        """Spent on this run so far."""
        return time.perf_counter() - self.began

    # What this project keeps beside Trainer's own state

    def remember(self, score: Score) -> None:
        """Enter the score of this step; keep the adapters where it is the best, stop where none comes any more."""
        step = self.state.global_step
        best = self.scores.get(self.best_step) if self.best_step is not None else None
        self.scores[step] = score
        if score.nats_per_token < (best.nats_per_token if best else float("inf")):
            self.best_step = step
            self.best = trained_weights(self.model)
        self.control.should_training_stop |= self.is_over()

    def is_over(self) -> bool:
        """Whether all steps are done, or `patience` evaluations in a row brought nothing better."""
        later = sum(step > (self.best_step or 0) for step in self.scores)
        return self.state.global_step >= self.state.max_steps or 0 < self.patience <= later

    def take_best(self) -> None:
        """Put the best adapters into the model."""
        model: Any = self.model
        for name, parameter in model.named_parameters():
            if name in self.best:
                parameter.data.copy_(self.best[name])

    def _write_state(self, folder: Path) -> None:
        scores = {str(step): list(score) for step, score in self.scores.items()}
        state = {"step": self.state.global_step, "best_step": self.best_step, "seconds": self.seconds, "scores": scores}
        storage.write_json(folder / STATE, state)
        if self.best:
            save_file(self.best, folder / BEST)
        storage.write_json(folder / storage.RUN_FILE, self.run)

    def restore(self, folder: Path) -> None:
        """What `_write_state` wrote; Trainer restores its own state."""
        state = storage.read_json(folder / STATE)
        self.scores = {int(step): Score(*score) for step, score in state["scores"].items()}
        self.best_step, self.saved_step = state["best_step"], state["step"]
        self.began -= state["seconds"]
        self.best = load_file(folder / BEST) if self.best_step is not None else {}

    # Whole checkpoints

    def _get_output_dir(self, trial: Any) -> str:
        return str(self.writing or self.args.output_dir)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        name = f"checkpoint-{self.state.global_step}"
        target = home(self.args) / name
        first, wait = self.args.should_save, self.accelerator.wait_for_everyone
        with storage.whole_folder(target) if first else nullcontext(storage.unfinished(target)) as folder:
            wait()  # until the folder is there
            self.writing = folder
            try:
                super()._save_checkpoint(model, trial)  # writes into folder/checkpoint-N
            finally:
                self.writing = None
            wait()  # until each process has written its random states
            if first:
                for path in (folder / name).iterdir():
                    path.rename(folder / path.name)
                (folder / name).rmdir()
                self._write_state(folder)
        self.saved_step = self.state.global_step
        if first:
            clear(home(self.args), keep=self.args.save_total_limit or 2, step=self.state.global_step)

    # Going on, and leaving

    def _run_epoch(self, *args: Any, **keywords: Any) -> None:
        """An epoch; first the evaluation that a checkpoint written in the middle of its step still owes."""
        if self._owes_evaluation(keywords["num_update_steps_per_epoch"]):
            self.evaluate()
        if self.is_over():  # Trainer would do another step
            self.control.should_training_stop = True
            return
        super()._run_epoch(*args, **keywords)

    def _owes_evaluation(self, steps_per_epoch: int) -> bool:
        step, due, flow = self.state.global_step, TrainerControl(), DefaultFlowCallback()
        if step == 0 or step in self.scores:
            return False
        flow.on_step_end(self.args, self.state, due)
        if step % steps_per_epoch == 0:
            flow.on_epoch_end(self.args, self.state, due)
        return due.should_evaluate

    def _maybe_log_save_evaluate(self, *args: Any, **keywords: Any) -> None:
        """After a signal: no evaluation any more, or no more of it, but a checkpoint."""
        self._agree()
        try:
            self.control.should_evaluate &= not self.signals.number
            super()._maybe_log_save_evaluate(*args, **keywords)
        except Stopped:
            pass
        self.leave_if_asked()

    def _agree(self) -> None:
        """Several processes stop at the same step, whichever of them got the signal."""
        if self.args.world_size > 1:
            number = torch.tensor([self.signals.number], device=self.args.device)
            self.signals.number = self.signals.agreed = int(self.accelerator.gather(number).max())

    def leave_if_asked(self) -> None:
        """Raises Stopped where a signal came, when all that was done is saved."""
        if not (self.signals.agreed if self.args.world_size > 1 else self.signals.number):
            return
        if self.saved_step != self.state.global_step:
            self._save_checkpoint(self.model, None)
        raise Stopped(
            self.signals.number,
            f"stopped and saved at step {self.state.global_step} of {self.state.max_steps}: the same command goes on "
            "from there",
        )
