"""Folders that appear whole or not at all, that one process writes at a time, and can be checked; disk space that
is looked at beforehand."""

import errno
import hashlib
import math
import os
import shutil
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import permutations
from pathlib import Path

from dialogue.errors import UserError, said_in_a_line
from dialogue.json_files import as_json, read_json, write_json

RUN_FILE = "run.json"  # stands in every folder that a run wrote, and says how
MANIFEST = "manifest.json"  # name -> size and sha256 of every file beside it; written last
# Bytes. Of larger files only the size is compared: SHA-256 of GPT-2-XL's 3.1 GB takes longer than loading them.
HASHED_BELOW = 1_000_000_000


@contextmanager
def locked(*folders: Path) -> Iterator[None]:
    """Inside, no other process can lock these folders, by whatever path or link; they need not be there yet. The lock
    of a process that was killed is free. Of several processes of one run, the first locks for all. Raises UserError
    where another process holds a lock, and where one of the folders lies inside another."""
    from filelock import FileLock, Timeout  # the chat needs none

    for name, other in permutations(folders, 2):
        if Path(os.path.realpath(other)).is_relative_to(os.path.realpath(name)):
            raise UserError(
                f"{name} and {other} are the same folder, or lie one inside the other: "
                "give each its own (--adapter_dir, --merged_dir, --output_dir)"
            )
    with ExitStack() as held:
        # In one order, so that of two that start together one gets all.
        for folder in sorted(folders, key=os.path.realpath):
            file = lock_of(folder)
            try:
                file.parent.mkdir(parents=True, exist_ok=True)
                held.enter_context(FileLock(file, timeout=0))
            except Timeout as error:
                said = "is being written by another run: wait until it has ended, or choose another folder"
                raise UserError(f"{folder} {said}") from error
            except OSError as error:
                raise UserError(f"{str(folder)[:100]} cannot be created: {error.strerror or error}") from error
            held.callback(_unlink, file)  # before it is released: whoever waits for this very file tries again
        yield


def lock_of(folder: Path) -> Path:
    """The file that stands beside a folder while it is written."""
    target = Path(os.path.realpath(folder))
    return target.parent / f".{target.name}.lock"


def _unlink(file: Path) -> None:
    with suppress(OSError):  # on Windows filelock does it
        file.unlink()


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """Yields an empty folder beside `target`; at the end it is sealed and takes `target`'s place.

    After an error inside, `target` is as it was and the unfinished folder is gone. After a kill at any moment
    `target` is the old or the new folder, or `recover` makes it the old one. A link is followed.
    Raises UserError where the disk is full or does not let us write.
    """
    target = Path(os.path.realpath(target))
    beside = target.parent / f".{target.name}.unfinished"
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
    while written.exists():
        if target.exists():
            target.rename(_old(target))
        try:
            written.rename(target)
        except OSError:
            if not target.exists():  # else a chat that started between the two renames has called `recover`
                raise
    _sync(target.parent)
    recover(target)


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
        if target.exists():
            return  # the process that replaces it was faster
        raise UserError(f"{target} could not be restored from {old}: {error.strerror or error}") from error


def seal(folder: Path) -> None:
    """Write the manifest of `folder`, and have the disk keep all of it."""
    files = {}
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        files[path.relative_to(folder).as_posix()] = {"size": path.stat().st_size, "sha256": sha256(path)}
        _sync(path)
    write_json(folder / MANIFEST, files)
    mode = (folder / MANIFEST).stat().st_mode
    for name in files:
        (folder / name).chmod(mode)  # safetensors writes files that their owner alone can read
    for path in (folder / MANIFEST, *(path for path in folder.rglob("*") if path.is_dir()), folder):
        _sync(path)


def replace_files(folder: Path, texts: dict[str, str]) -> None:
    """Give small files of a sealed folder another text. Meanwhile the manifest does not name them: after a stop at any
    moment the folder is whole. Raises OSError."""
    files = read_json(folder / MANIFEST, {str: {"size": int, "sha256": str}})
    said = {name: text.encode() for name, text in texts.items()}
    new = {name: {"size": len(of), "sha256": hashlib.sha256(of).hexdigest()} for name, of in said.items()}
    written = {MANIFEST: as_json({name: of for name, of in files.items() if name not in texts}).encode(), **said}
    for name, content in [*written.items(), (MANIFEST, as_json(files | new).encode())]:
        beside = folder.with_name(f".{folder.name}.{name}")
        beside.write_bytes(content)
        _sync(beside)
        beside.replace(folder / name)


def damage(folder: Path, hash_below: float = math.inf) -> str | None:
    """What differs from the manifest, in words; None where nothing does, or where there is no manifest. Sizes are
    always compared, hashes for files of fewer than `hash_below` bytes."""
    if not os.path.lexists(folder / MANIFEST):
        return None
    try:
        name = MANIFEST
        text = (folder / MANIFEST).read_text(encoding="utf-8")
        files = read_json(folder / MANIFEST, {str: {"size": int, "sha256": str}})
        if text != as_json(files):
            return f"{MANIFEST} is damaged"
        for name, said in files.items():
            path = folder / name
            size = path.stat().st_size
            if size != said["size"]:
                return f"{name} has {size} of {said['size']} bytes"
            if size < hash_below and sha256(path) != said["sha256"]:
                return f"{name} is not what was written"
    except OSError as error:
        return f"{name} cannot be read ({error.strerror or error})"
    except (UserError, ValueError):
        return f"{MANIFEST} is damaged"
    return None


def check_whole(folder: Path, name: str) -> None:
    """Raises UserError about `name` where `folder` is not as its manifest says, twice: a training may replace it
    meanwhile."""
    if damage(folder, HASHED_BELOW) and (problem := damage(folder, HASHED_BELOW)):
        raise UserError(f"{name} is broken: {problem}; write it again, or where you changed it, delete its {MANIFEST}")


def newest_checkpoint(folder: Path) -> Path | None:
    """The newest whole checkpoint in a folder of a training that may still go on; None where there is none."""
    found = [path for path in folder.glob("checkpoint-*") if path.name[11:].isdigit() and (path / MANIFEST).is_file()]
    newest = sorted(found, key=lambda path: int(path.name[11:]), reverse=True)
    return next((path for path in newest if not damage(path, hash_below=0)), None)


def sha256(path: Path) -> str:
    """Of a file's content, in hexadecimal digits."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows has no such call for folders
    descriptor = os.open(path, os.O_RDWR if os.name == "nt" else os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:  # some file systems cannot do it with a folder
        if not path.is_dir() or error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS):
            raise
    finally:
        os.close(descriptor)


def check_free(folder: Path, overwrite: bool) -> None:
    """Raises UserError where `folder` holds something that this run must not replace, or cannot be written. An earlier
    run's result goes only with `overwrite`; anything else stays in any case."""
    try:
        recover(folder)
        if not folder.is_dir():
            parent = _existing_parent(folder)
            if os.path.lexists(folder) or not parent.is_dir() or not os.access(parent, os.W_OK):
                raise UserError(f"{folder} cannot be created: it is a file, or nobody may write there")
            return
        if os.path.ismount(os.path.realpath(folder)):
            raise UserError(f"{folder} is a mount point, which cannot be replaced: choose a folder inside it")
        if not any(folder.iterdir()):
            return
        is_result = (folder / RUN_FILE).is_file()
    except OSError as error:
        raise UserError(f"{str(folder)[:100]} cannot be used: {error.strerror or error}") from error
    if not is_result:
        raise UserError(f"{folder} holds files that are not a run's result: choose another folder")
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
