"""Folders that appear whole or not at all, and disk space that is looked at beforehand."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dialogue.errors import UserError

RUN_FILE = "run.json"  # stands in every folder that a run wrote, and says how


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`; at the end it is synced and takes `target`'s place.

    After an error inside, `target` is as it was and the unfinished folder is gone.
    """
    target.parent.mkdir(parents=True, exist_ok=True)
    beside = target.with_name(f".{target.name}.unfinished")
    shutil.rmtree(beside, ignore_errors=True)
    beside.mkdir()
    try:
        yield beside
        for path in beside.rglob("*"):
            if path.is_file():
                with path.open("rb") as file:
                    os.fsync(file.fileno())
        old = target.with_name(f".{target.name}.old")
        if target.exists():
            target.rename(old)
        beside.rename(target)
        shutil.rmtree(old, ignore_errors=True)
    except OSError as error:
        raise UserError(f"{target} could not be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(beside, ignore_errors=True)


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises UserError where `folder` holds something that this run must not replace.

    An earlier run's result goes only with `overwrite`; anything else stays in any case.
    """
    if not folder.exists():
        if not os.access(_existing_parent(folder), os.W_OK):
            raise UserError(f"{folder} cannot be created: no permission to write there")
        return
    if not folder.is_dir():
        raise UserError(f"{folder} is a file: choose another folder with --adapter_dir or --merged_dir")
    if not any(folder.iterdir()):
        return
    if not (folder / RUN_FILE).is_file():
        raise UserError(
            f"{folder} holds files that are not a run's result: choose another --adapter_dir / --merged_dir"
        )
    if not overwrite:
        raise UserError(f"{folder} holds another run's result: add --overwrite to replace it, or choose another folder")


def check_space(folder: Path, needed: int) -> None:
    """Raises UserError where fewer than `needed` bytes are free on the disk that will hold `folder`."""
    free = shutil.disk_usage(_existing_parent(folder)).free
    if free < needed:
        raise UserError(
            f"not enough disk for {folder}: {needed / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
            "free some, or choose another disk with --merged_dir"
        )


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, in the order of its keys."""
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")
