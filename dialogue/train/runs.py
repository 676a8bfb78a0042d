"""Which run it is, and what an earlier start of it left: nothing, a checkpoint, or whole adapters."""

import dataclasses
import hashlib
import shutil
import sys
from array import array
from collections.abc import Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from dialogue import machine, storage
from dialogue.data.packing import Row
from dialogue.errors import UserError
from dialogue.plaintext import plain
from dialogue.train import teach
from dialogue.train.memory import Fit
from dialogue.train.options import Run
from dialogue.train.rows import Rows

STATE = "evaluations.json"  # the training's own state, beside Trainer's
STATE_SHAPE = {"best_step": int | None, "seconds": int | float, "scores": {str: [int | float]}}

SAVING = ".saving"  # in the checkpoints' folder: where Trainer writes a checkpoint before it is whole

# Settings that do not decide what is learned, by the start of their names.
FREE = (
    "adapter_dir", "merged_dir", "output_dir",
    "logging_", "log_", "include_num", "disable_tqdm", "report_to", "run_name", "project", "trackio",
    "save_", "enable_jit", "push_to_hub", "hub_", "load_best", "dataloader_num", "dataloader_p", "ddp_",
    "skip_memory", "do_", "restore_callback", "local_rank", "debug",
)  # fmt: skip
# Fields of `Run` that say how to start, or stand in the description under names of their own.
NOT_DESCRIBED = {
    "lora", "quant", "arguments", "checkpointing", "plan_only", "resume", "overwrite", "yes", "cheaper", "command",
}  # fmt: skip


def describe(run: Run, rows: Rows) -> dict[str, Any]:
    """Everything that was asked for and decides the result, flat; two runs with equal ones are the same run."""
    fields = {field.name: getattr(run.arguments, field.name) for field in dataclasses.fields(run.arguments)
              if field.init}  # fmt: skip
    adapter = {f"lora {name}": value for name, value in dataclasses.asdict(run.lora).items() if name != "peft_version"}
    asked = {name: value for name, value in vars(run).items() if name not in NOT_DESCRIBED}
    asked |= {**adapter, **fields, "processes": run.arguments.world_size}
    described = {
        **{name: _plain_value(value) for name, value in asked.items() if not name.startswith(FREE)},
        "training data": _fingerprint(rows.train),
        "validation data": _fingerprint(rows.held_out.rows),
    }
    if run.teach:
        described["start"] = teach.start_of(run.adapters, described["training data"])
    return {name: value for name, value in described.items() if value is not None}


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
    fit: Fit | None = None  # what that start had chosen for the machine
    versions: Mapping[str, Any] = MappingProxyType({})


def find(run: Run, described: dict[str, Any]) -> Begun:
    """Find out what there is of a run. `run.resume`: True demands it, False starts afresh, None takes what there is. A
    plan looks at nothing. Raises UserError where a folder holds something else, which `run.overwrite` replaces where a
    run of this project wrote it, and for the finished result of this very run."""
    if run.plan_only:
        return Begun()
    wrote = [storage.read_json(folder / storage.RUN_FILE).get("run") for folder in (run.adapters, run.merged)]
    has_adapters, has_merged = (one == described for one in wrote)
    # Checkpoints are deleted last: where there is anything of them, a kill came before the end.
    left = any(run.checkpoints.glob("*checkpoint-*"))
    unfinished = has_adapters and (not has_merged or (left and not run.overwrite))
    if run.teach and has_adapters and not unfinished:
        raise UserError("these lessons are taught already: keep others in the chat, with /edit and /good")
    storage.check_free(run.adapters, run.overwrite or run.teach or unfinished)
    storage.check_free(run.merged, run.overwrite or run.teach or (has_merged and unfinished))
    if unfinished and run.resume is not False and not storage.damage(run.adapters):
        begun = Begun(trained=True, fit=_fit_of(run.adapters))
    else:
        begun = _newest(run, described)
    if run.resume and begun == Begun():
        raise UserError(f"--resume: there is no unfinished run in {run.checkpoints}")
    if run.resume is False or begun == Begun():
        clear(run.checkpoints)
        return Begun()
    return begun


def _fit_of(folder: Path) -> Fit | None:
    """The fit in a folder's run.json; None where another version wrote it."""
    try:
        fit = storage.read_json(folder / storage.RUN_FILE)["fit"]
        return Fit(**{**fit, "dtype": getattr(torch, fit["dtype"])})
    except (KeyError, TypeError, AttributeError):
        return None


def _newest(run: Run, described: dict[str, Any]) -> Begun:
    """The newest whole checkpoint; a broken one is named and passed over."""
    for folder in checkpoints(run.checkpoints):
        try:
            sealed = (folder / storage.MANIFEST).is_file()
            if problem := storage.damage(folder) if sealed else f"it has no {storage.MANIFEST}":
                raise UserError(problem)
            saved = storage.read_json(folder / storage.RUN_FILE, {"run": dict, "versions": dict})
            storage.read_json(folder / STATE, STATE_SHAPE)
        except UserError as error:
            print(f"{folder} is broken and passed over: {plain(str(error))}", file=sys.stderr)
            continue
        if not (changed := differences(saved["run"], described)):
            return Begun(folder, fit=_fit_of(folder), versions=saved["versions"])
        if not run.overwrite:
            raise UserError(
                f"{folder} belongs to an unfinished run with other settings ({'; '.join(changed)}): repeat those to "
                "resume it, add --overwrite to start afresh, or choose another --output_dir"
            )
        break
    return Begun()


def checkpoints(folder: Path) -> list[Path]:
    """Checkpoints in `folder`, newest first. Raises UserError where one is not ours."""
    if folder.exists() and not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another folder with --output_dir")
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and path.is_dir()]
    for path in folder.glob(".checkpoint-*.old"):
        storage.recover(path.with_name(path.name[1:-4]))
    for path in found:
        if not (path / storage.MANIFEST).is_file() and not (path / storage.RUN_FILE).is_file():
            raise UserError(f"{path} was not written by this version: move it away, or choose another --output_dir")
    return sorted(found, key=lambda path: int(path.name[11:]), reverse=True)


def clear(folder: Path, keep: int = 0, step: int = -1) -> None:
    """Delete what is in `folder` but for the newest `keep` checkpoints up to `step`, and the folder if it is empty.
    Later ones than `step` were broken and passed over, and would push out those that are whole."""
    found = checkpoints(folder)
    kept = [path for path in found if int(path.name[11:]) <= step][:keep]
    for path in [path for path in found if path not in kept]:
        path.rename(path.with_name(f".{path.name}.deleted"))  # half deleted, nothing has its final name
    for path in [folder / SAVING, *folder.glob(".checkpoint-*")]:
        shutil.rmtree(path, ignore_errors=True)
    if folder.is_dir() and not any(folder.iterdir()):
        folder.rmdir()


def in_words(begun: Begun, run: Run) -> str:
    """What is gone on with, and how not to; empty for a fresh start."""
    if begun.trained:
        return f"{plain(run.adapter_dir)} is whole: only the merge is to be done (--no-resume trains again)."
    if begun.checkpoint:
        changed = differences(begun.versions, machine.versions())
        note = f" Not bit for bit what it would have been: {'; '.join(changed)}." if changed else ""
        return f"Resuming from {plain(str(begun.checkpoint))} (--no-resume starts afresh).{note}"
    return ""


def check_space(model: Any, run: Run) -> None:
    """Raises UserError where the disk will not hold the checkpoints, the adapters and the merged model."""
    trained = sum(p.numel() * p.element_size() for p in model.parameters() if p.requires_grad)
    # A checkpoint: adapters, the best ones, two moments for Adam, tokenizer. One more exists while it is written.
    one, count = 4 * trained + 20_000_000, (run.arguments.save_total_limit or 2) + 1
    merged = int(2.05 * model.num_parameters()) + 20_000_000  # two bytes a parameter, and the tokenizer
    storage.check_space({run.checkpoints: one * count, run.adapters: one, run.merged: merged})
