"""Folders that appear whole or not at all, and can be checked; disk space that is looked at beforehand."""

import hashlib
import json
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dialogue.errors import UserError

RUN_FILE = "run.json"  # stands in every folder that a run wrote, and says how
MANIFEST = "manifest.json"  # name -> size and sha256 of every file beside it; written last


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`; at the end it is sealed and takes `target`'s place.

    After an error inside, `target` is as it was and the unfinished folder is gone. After a kill at any moment
    `target` is the old or the new folder, or `recover` makes it the old one. A link is followed.
    Raises UserError where the disk is full or does not let us write.
    """
    target = Path(os.path.realpath(target))
    beside = unfinished(target)
    try:
        with said_in_a_line(target):
            recover(target)
            shutil.rmtree(beside, ignore_errors=True)
            beside.mkdir(parents=True)
            yield beside
            put_in_place(beside, target)
    finally:
        shutil.rmtree(beside, ignore_errors=True)
        recover(target)


def put_in_place(written: Path, target: Path) -> None:
    """Seal the folder `written` and let it take the place of `target`, on the same disk."""
    seal(written)
    if target.exists():
        target.rename(_old(target))
    written.rename(target)
    _sync(target.parent)
    recover(target)


@contextmanager
def said_in_a_line(target: Path) -> Iterator[None]:
    """Inside, a disk that is full or does not let us write is a UserError that names `target`."""
    try:
        yield
    except Exception as error:
        if (reason := _write_error(error, target.parent)) is None:
            raise
        raise UserError(f"{target} could not be written: {reason}; what was there before is as it was") from error


def unfinished(target: Path) -> Path:
    """Where `whole_folder` collects the files of `target`."""
    return target.parent / f".{target.name}.unfinished"


def _old(target: Path) -> Path:
    return target.parent / f".{target.name}.old"


def recover(target: Path) -> None:
    """Undo a replacement that was cut between its two renames; clear one that was cut after them."""
    target = Path(os.path.realpath(target))
    old = _old(target)
    if not os.path.lexists(old):
        return
    try:
        if target.exists():
            shutil.rmtree(old, ignore_errors=True)
        else:
            old.rename(target)
    except OSError as error:
        raise UserError(f"{target} could not be restored from {old}: {error.strerror or error}") from error


def _write_error(error: Exception, folder: Path) -> str | None:
    """Why something could not be written, where that is what happened. safetensors has it in its text; torch's
    writer notices that it failed, and not why."""
    if isinstance(error, OSError):
        return str(error.strerror or error)
    text = str(error)
    if "os error 28" in text or "No space left" in text:
        return "No space left on device"
    if any(sign in text for sign in ("I/O error", "PytorchStreamWriter failed", "unexpected pos ")):
        full = shutil.disk_usage(folder).free < 1_000_000
        return "No space left on device" if full else " ".join(text.split())[:160]
    return None


def seal(folder: Path) -> None:
    """Write the manifest of `folder`, and have the disk keep all of it."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": _sha256(path)}
        _sync(path)
    write_json(folder / MANIFEST, files)
    for path in (folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(path)


def damage(folder: Path, hash_below: float = math.inf) -> str | None:
    """What differs from the manifest, in words; None where nothing does, or where there is no manifest.

    Sizes are always compared, hashes for files of fewer than `hash_below` bytes.
    """
    if not os.path.lexists(folder / MANIFEST):
        return None
    try:
        files = read_json(folder / MANIFEST, {str: {"size": int, "sha256": str}})
        name = MANIFEST
        if (folder / MANIFEST).read_text(encoding="utf-8") != _as_json(files):
            return f"{MANIFEST} is damaged"
        for name, said in files.items():
            path = folder / name
            size = path.stat().st_size
            if size != said["size"]:
                return f"{name} has {size} of {said['size']} bytes"
            if size < hash_below and _sha256(path) != said["sha256"]:
                return f"{name} is not what was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    except (UserError, ValueError):
        return f"{MANIFEST} is damaged"
    return None


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such call for folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_apart(*folders: Path) -> None:
    """Raises UserError where two of a run's folders are the same folder, or one lies inside another."""
    real = [Path(os.path.realpath(folder)) for folder in folders]
    for first, name in zip(real, folders, strict=True):
        for second, other in zip(real, folders, strict=True):
            if other is not name and second.is_relative_to(first):
                how = "are the same folder" if first == second else "lie one inside the other"
                raise UserError(
                    f"{name} and {other} {how}: give each its own (--adapter_dir, --merged_dir, --output_dir)"
                )


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises UserError where `folder` holds something that this run must not replace, or cannot be written.

    An earlier run's result goes only with `overwrite`; anything else stays in any case.
    """
    try:
        recover(folder)
        if not folder.is_dir():
            if folder.exists():
                raise UserError(f"{folder} is a file: choose another folder with --adapter_dir or --merged_dir")
            parent = _existing_parent(folder)
            if os.path.islink(folder) or not parent.is_dir() or not os.access(parent, os.W_OK):
                raise UserError(f"{folder} cannot be created: no permission to write there, or no folder above it")
            return
        if not any(folder.iterdir()):
            return
        is_result = (folder / RUN_FILE).is_file()
    except OSError as error:
        raise UserError(f"{str(folder)[:100]} cannot be used: {error.strerror or error}") from error
    if not is_result:
        raise UserError(
            f"{folder} holds files that are not a run's result: choose another --adapter_dir / --merged_dir"
        )
    if not overwrite:
        raise UserError(f"{folder} holds another run's result: add --overwrite to replace it, or choose another folder")


def check_space(needed: dict[Path, int]) -> None:
    """Raises UserError where the disks that will hold these folders have fewer free bytes than they need."""
    sums: Counter[int] = Counter()
    for folder, size in needed.items():
        parent = _existing_parent(folder)
        disk = os.stat(parent).st_dev
        sums[disk] += size
        free = shutil.disk_usage(parent).free
        if free < sums[disk]:
            raise UserError(
                f"not enough disk for {folder}: {sums[disk] / 1e9:.1f} GB needed, {free / 1e9:.1f} GB free; "
                "free some, or choose another disk with --output_dir, --adapter_dir and --merged_dir"
            )


def _existing_parent(path: Path) -> Path:
    path = path.absolute()
    while not path.exists():
        path = path.parent
    return path


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, in the order of its keys."""
    path.write_text(_as_json(content), encoding="utf-8")


def _as_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"


def read_json(path: Path, shape: Any = None) -> Any:
    """The JSON in a file, of a shape that `_wrong` knows. Raises UserError for a file that is not so.

    Without a shape: an object, and {} where there is none.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        problem = _wrong(content, {} if shape is None else shape)
    except OSError as error:
        problem = str(error.strerror or error)
    except (ValueError, RecursionError):
        problem = "it is not JSON"
    if problem and shape is not None:
        raise UserError(f"{path} is not as it was written: {problem}; write it again, or move it away")
    return {} if problem else content


def _wrong(content: Any, shape: Any, name: str = "its content") -> str | None:
    """What is missing or of another type than in `shape`, in words.

    A shape is a type, `[shape]` of a list's items, {"name": shape} of what an object must have, or {str: shape} of all
    that it has.
    """
    if isinstance(shape, dict) and isinstance(content, dict):
        inner = [(key, content.get(key), each) for key, each in shape.items() if key is not str]
        inner += [(key, each, shape[str]) for key, each in content.items() if str in shape]
    elif isinstance(shape, list) and isinstance(content, list):
        inner = [(f"{name}[{place}]", each, shape[0]) for place, each in enumerate(content)]
    else:
        fits = not isinstance(shape, dict | list) and isinstance(content, shape)
        return None if fits else f"{name} is missing, or of the wrong type"
    return next(filter(None, (_wrong(each, kind, key) for key, each, kind in inner)), None)


def write_private(path: Path, content: Any) -> None:
    """Write JSON that the owner alone can read; the file is the old one or the new one, never half of it.

    A link is followed. Raises OSError.
    """
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name[:200]}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(_as_json(content))
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
