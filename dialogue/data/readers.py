"""One file of dialogues, in any of the known formats -> lists of turns.

Everything a file can have wrong ends as a UserError that names the file, the line and what to do.
`skipped` counts what was left out, by reason.
"""

import csv
import io
import json
import zipfile
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dialogue.data.cleaning import clean, drop_controls
from dialogue.errors import UserError

Dialogues = list[list[str]]

ONE_TURN = "dialogues of fewer than two turns skipped"
SYSTEM = "system messages dropped"
LEADING = "opening messages of the assistant dropped (a dialogue starts with the user)"

COLUMNS = ("dialog", "dialogue", "messages", "conversations")
SHAPE = '{"dialog": ["Hi", "Hello"]} or {"messages": [{"role": "user", "content": "Hi"}, ...]}'


def read_file(path: Path, skipped: Counter[str]) -> Dialogues:
    """Read one file; its suffix says which format. Raises UserError."""
    readers = {
        ".jsonl": _json_lines, ".json": _json_lines, ".csv": _csv, ".parquet": _parquet, ".txt": _release, ".zip": _zip,
    }  # fmt: skip
    reader = readers.get(path.suffix.lower())
    if reader is None:
        raise UserError(f"{path}: unknown kind of file; known are {', '.join(readers)}")
    try:
        if not path.stat().st_size:
            raise UserError(f"{path} is empty")
        return [turns for turns in reader(path, skipped) if _long_enough(turns, skipped)]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}") from error
    except RecursionError as error:
        raise UserError(f"{path}: nested too deeply to be dialogues") from error


def _long_enough(turns: list[str], skipped: Counter[str]) -> bool:
    skipped[ONE_TURN] += len(turns) < 2
    return len(turns) >= 2


def _text(data: bytes, name: object) -> str:
    """UTF-8, with or without a byte order mark and Windows line ends."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{name}:{line}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error


def _release(path: Path, skipped: Counter[str]) -> Iterator[list[str]]:
    return _eou_lines(_text(path.read_bytes(), path))


def _eou_lines(text: str) -> Iterator[list[str]]:
    """The original release: one dialogue a line, each turn closed by `__eou__`."""
    for line in text.split("\n"):
        if line.strip():
            yield _cleaned(line.split("__eou__"))


def _cleaned(turns: list[str]) -> list[str]:
    return [turn for turn in map(clean, turns) if turn]


def _zip(path: Path, skipped: Counter[str]) -> Iterator[list[str]]:
    """A zip of the release; `dialogues_act_*` and `dialogues_emotion_*` beside the text are labels."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = [
                name
                for name in archive.namelist()
                if Path(name).name.startswith("dialogues_") and name.endswith(".txt")
                and not Path(name).name.startswith(("dialogues_act", "dialogues_emotion"))
            ]  # fmt: skip
            texts = [_text(archive.read(name), f"{path}/{name}") for name in names]
    except (zipfile.BadZipFile, NotImplementedError, RuntimeError, EOFError, zlib.error) as error:
        raise UserError(f"{path} is a broken zip ({error}): download it again") from error
    if not texts:
        raise UserError(f"{path} holds no dialogues_*.txt: it is not DailyDialog's release")
    for text in texts:
        yield from _eou_lines(text)


def _json_lines(path: Path, skipped: Counter[str]) -> Iterator[list[str]]:
    for number, line in enumerate(_text(path.read_bytes(), path).split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except ValueError as error:
            raise UserError(f"{path}:{number}: not a line of JSON ({error}); each line is like {SHAPE}") from error
        yield _turns(record, f"{path}:{number}", skipped)


def _parquet(path: Path, skipped: Counter[str]) -> Iterator[list[str]]:
    import pyarrow
    from pyarrow import parquet

    try:
        table = parquet.read_table(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{path} is no readable Parquet file ({' '.join(str(error).split())[:120]})") from error
    for number, record in enumerate(table.to_pylist(), 1):
        yield _turns(record, f"{path}, row {number}", skipped)


def _csv(path: Path, skipped: Counter[str]) -> Iterator[list[str]]:
    """A column `dialog` (a JSON list, or turns with `__eou__` between them), or one utterance a row: a
    column whose name ends in "id" that says which dialogue, and one called text or utterance."""
    csv.field_size_limit(1 << 27)
    try:
        rows = list(csv.DictReader(io.StringIO(_text(path.read_bytes(), path).replace("\0", ""))))
    except csv.Error as error:
        raise UserError(f"{path} is no readable CSV ({error})") from error
    columns = list(rows[0]) if rows else []
    listed = next((name for name in columns if name in COLUMNS), None)
    identifier = next((name for name in columns if name and name.lower().endswith("id")), None)
    spoken = next((name for name in columns if name in ("text", "utterance", "turn", "message")), None)
    if listed:
        for number, row in enumerate(rows, 2):
            yield _listed(row[listed] or "", listed, f"{path}:{number}", skipped)
    elif identifier and spoken:
        dialogues: dict[str, list[str]] = {}
        for row in rows:
            dialogues.setdefault(row[identifier], []).append(row[spoken] or "")
        for turns in dialogues.values():
            yield _cleaned(turns)
    else:
        raise UserError(f"{path}: columns {columns[:8]}; needed is dialog, or an id column and text (one turn a row)")


def _listed(cell: str, column: str, where: str, skipped: Counter[str]) -> list[str]:
    if "__eou__" in cell:
        return _cleaned(cell.split("__eou__"))
    try:
        return _turns({column: json.loads(cell)}, where, skipped)
    except ValueError as error:
        raise UserError(f"{where}: column {column} is neither a JSON list nor turns with __eou__ between") from error


def _turns(record: Any, where: str, skipped: Counter[str]) -> list[str]:
    """One record -> turns. Text of `messages` is a person's own and is taken as it stands."""
    column = next((name for name in COLUMNS if isinstance(record, dict) and record.get(name) is not None), None)
    turns = record[column] if column else None
    if isinstance(turns, list) and all(isinstance(turn, str) for turn in turns):
        return _cleaned(turns)
    if isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns):
        return _messages(turns, where, skipped)
    raise UserError(f"{where}: not a dialogue; needed is {SHAPE}")


def _messages(messages: list[dict[str, Any]], where: str, skipped: Counter[str]) -> list[str]:
    """Messages with roles -> turns: neighbours of one role are joined by a newline, so that roles alternate."""
    turns: list[str] = []
    last = "assistant"
    for message in messages:
        role, content = message.get("role"), message.get("content")
        if role not in ("user", "assistant", "system") or not isinstance(content, str):
            raise UserError(f"{where}: each message needs a role (user, assistant or system) and a text as content")
        content = drop_controls(content).strip()
        if role == "system":
            skipped[SYSTEM] += 1
        elif not content:
            continue
        elif role == "assistant" and not turns:
            skipped[LEADING] += 1
        elif role == last:
            turns[-1] += "\n" + content
        else:
            turns.append(content)
            last = role
    return turns
