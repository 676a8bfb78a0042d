"""A file, by its content -> records: JSON objects and arrays, rows of a table, lines of DailyDialog's release.

Everything a file can have wrong ends as a UserError that names the file, the line and what to do. Nothing is unpacked
or parsed before its size was looked at.
"""

import csv
import io
import itertools
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from dialogue.data import exports
from dialogue.errors import UserError, in_a_line

LARGEST = 1 << 30  # bytes of one file, unpacked: text takes some four times as much while it is read
DEEPEST = 3  # archives in archives
SUFFIXES = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".txt", ".parquet", ".zip", ".gz", ".zst")
SHAPE = '{"dialog": ["Hi", "Hello"]} or {"messages": [{"role": "user", "content": "Hi"}, ...]}'
EOU = "__eou__"  # closes each turn of DailyDialog's release

Parts = tuple[str, ...]  # folders, archives and the file, as they lie in each other


class NoDialogues(UserError):
    """A file that is something else, such as a readme: passed over in a folder."""


class Record(NamedTuple):
    where: str  # file and line
    value: Any


@contextmanager
def faults_named(name: object) -> Iterator[None]:
    """What can go wrong with a file (a broken archive, JSON too deep) is a UserError that begins with its name."""
    try:
        yield
    except (zipfile.BadZipFile, zlib.error, EOFError, RuntimeError, OSError, MemoryError) as error:
        reason = getattr(error, "strerror", None) or in_a_line(error)
        raise UserError(f"{name} cannot be read ({reason}): save it again, or split it into smaller files") from error


def shown(path: Path | str) -> str:
    """A path as text that can be printed and written, also where its bytes are not UTF-8."""
    return os.fsencode(path).decode("utf-8", "replace")


def _check_size(size: int, name: object) -> None:
    if size > LARGEST:
        raise UserError(f"{name} has more than {LARGEST / 1e9:.1f} GB (unpacked, if it is packed): split it")


def walk(path: Path, passed_over: list[str]) -> Iterator[tuple[Parts, bytes]]:
    """The files at `path`, those in archives too, with their parts below it: `()` for one that is a file itself. Hidden
    files and macOS's copies in archives are passed over; names of other kinds of file go to `passed_over`."""
    with faults_named(path):
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        if files == [path] and not path.is_file():  # reading it may never end
            raise UserError(f"{path} is a device or a pipe: give a file or a folder")
    for file in files:
        parts = tuple(map(shown, file.relative_to(path).parts))
        if parts and not _is_wanted(parts, passed_over):
            continue
        with faults_named(file):
            size = file.stat().st_size
            _check_size(size, file)
            data = file.read_bytes()
        if not size:
            raise UserError(f"{file} is empty")
        yield from _unpack(data, parts, shown(file), passed_over)


def _is_wanted(parts: Parts, passed_over: list[str]) -> bool:
    if any(part.startswith(".") or part == "__MACOSX" for part in parts):
        return False
    if not parts[-1].lower().endswith(SUFFIXES):
        passed_over.append("/".join(parts))
        return False
    return True


def _unpack(
    data: bytes, parts: Parts, name: str, passed_over: list[str], depth: int = 0
) -> Iterator[tuple[Parts, bytes]]:
    """The data itself, or what lies in it where it is an archive."""
    if depth > DEEPEST:
        raise UserError(f"{name}: archives in archives, more than {DEEPEST} deep; unpack it first")
    if data.startswith(b"PK\x03\x04") or name.lower().endswith(".zip"):
        with faults_named(name), zipfile.ZipFile(io.BytesIO(data)) as archive:
            members = [info for info in archive.infolist() if not info.is_dir()]
            members = [info for info in members if _is_wanted(tuple(info.filename.split("/")), passed_over)]
            _check_size(sum(info.file_size for info in members), name)
            contents = [(info.filename, archive.read(info)) for info in members]
        for member, content in contents:
            yield from _unpack(content, (*parts, *member.split("/")), f"{name}/{member}", passed_over, depth + 1)
    elif data.startswith((b"\x1f\x8b", b"\x28\xb5\x2f\xfd")):
        import pyarrow  # which `datasets` brings along, with gzip and zstd

        with faults_named(name):
            kind = "gzip" if data[0] == 0x1F else "zstd"
            with pyarrow.CompressedInputStream(pyarrow.BufferReader(data), kind) as stream:
                unpacked = stream.read(LARGEST + 1)
        _check_size(len(unpacked), name)
        yield from _unpack(unpacked, parts, name, passed_over, depth + 1)
    else:
        yield parts, data


def read_records(data: bytes, name: str, choose: Callable[[list[str]], list[str]]) -> Iterator[Record]:
    """The records of one file that is no archive; of Parquet the columns that `choose` picks out of all their names.
    Raises UserError; NoDialogues where it is another kind of file."""
    suffix = Path(re.sub(r"\.(gz|zst)$", "", name.lower())).suffix
    if data.startswith(b"PAR1") or suffix == ".parquet":
        yield from _parquet(data, name, choose)
        return
    text = _text(data, name)
    is_json = suffix in (".json", ".jsonl", ".ndjson") or text.lstrip()[:1] in ("{", "[")
    lines = enumerate(text.split("\n"), 1)
    if suffix in (".csv", ".tsv"):
        yield from _table(text, name)
    elif exports.is_chat(text, or_named=not is_json and EOU not in text):
        yield from (Record(f"{name}:{number}", line) for number, line in lines)
    elif is_json:
        yield from _json(text, name)
    elif EOU in text:  # DailyDialog's release: one dialogue a line
        yield from (Record(f"{name}:{number}", line.split(EOU)) for number, line in lines if line.strip())
    else:
        raise NoDialogues(f"{name}: unknown kind of file; known are {', '.join(SUFFIXES)}, with dialogues in them")


def _text(data: bytes, name: str) -> str:
    """UTF-8, with or without a byte order mark and Windows line ends."""
    try:
        return data.decode("utf-8-sig").replace("\r\n", "\n")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise UserError(f"{name}:{line}: not UTF-8 (byte {error.start}): save the file as UTF-8") from error


def _json(text: str, name: str) -> Iterator[Record]:
    """One JSON document, or one a line. A document that is an array holds records, or is the one that /save writes."""
    if not text.strip():
        return
    number = 1
    try:
        document, end = json.JSONDecoder().raw_decode(text, len(text) - len(text.lstrip()))
        if text[end:].strip():
            for number, line in enumerate(text.split("\n"), 1):
                if line.strip():
                    yield Record(f"{name}:{number}", json.loads(line))
        elif isinstance(document, list) and not _is_one_dialogue(document):
            yield from (Record(f"{name}, item {number}", item) for number, item in enumerate(document, 1))
        else:
            yield Record(f"{name}:1", document)
    except ValueError as error:
        line = f"{name}:{number + getattr(error, 'lineno', 1) - 1}"
        raise UserError(f"{line}: not a line of JSON ({error}); each line is like {SHAPE}") from error


def _is_one_dialogue(items: list[Any]) -> bool:
    """["Hi", "Hello"], or [{"role": "user", "content": "Hi"}, ...]"""
    return all(isinstance(i, str) or (isinstance(i, dict) and {"role", "content"} <= {*i}) for i in items)


def _parquet(data: bytes, name: str, choose: Callable[[list[str]], list[str]]) -> Iterator[Record]:
    """Rows of the columns that matter: others may hold anything, and take memory."""
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(data))
        columns = choose(file.schema_arrow.names)
        groups = [file.metadata.row_group(index) for index in range(file.metadata.num_row_groups)]
        chunks = [group.column(index) for group in groups for index in range(group.num_columns)]
        read = [chunk for chunk in chunks if chunk.path_in_schema.split(".")[0] in columns]
        _check_size(sum(chunk.total_uncompressed_size for chunk in read), name)
        rows = itertools.chain.from_iterable(batch.to_pylist() for batch in file.iter_batches(1000, columns=columns))
        yield from (Record(f"{name}, row {number}", row) for number, row in enumerate(rows, 1))
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        raise UserError(f"{name} is no readable Parquet file ({in_a_line(error)})") from error


def _table(text: str, name: str) -> Iterator[Record]:
    """Rows of CSV as dictionaries, with the delimiter that parts the header best. A row with another number of fields
    than the header is an error, as is a quotation mark that never ends: rows that were read on regardless would teach
    the wrong speaker."""
    csv.field_size_limit(1 << 27)
    header = text.split("\n", 1)[0]
    delimiter = max(",;\t|", key=header.count)
    source = io.StringIO(text.replace("\0", "").replace("\r", "\n"), newline="\n")
    lines = csv.reader(source, delimiter=delimiter, strict=True)
    columns: list[str] = []
    start = 1  # the line on which the row begins
    try:
        for row in lines:
            if row and columns and len(row) != len(columns):
                raise UserError(
                    f"{name}:{start}: {len(row)} fields, and the first line names {len(columns)}: put a text that "
                    f"holds {delimiter!r} into quotation marks, and leave no field out"
                )
            if any(_holds_rows(cell, row, delimiter) for cell in row if "\n" in cell):
                raise UserError(f"{name}:{start}: a quotation mark opens a text that holds other rows: remove it")
            if row and columns:
                yield Record(f"{name}:{start}", dict(zip(columns, row, strict=True)))
            columns = columns or [column.strip() for column in row]
            start = lines.line_num + 1
    except csv.Error as error:
        raise UserError(f"{name}:{start}: a quotation mark stands amid a text, or is never closed ({error})") from error


def _holds_rows(cell: str, row: list[str], delimiter: str) -> bool:
    """Whether a line of `cell` looks like a row: as many fields, the others as in this row but for digits."""

    def others(fields: list[str]) -> list[str]:
        return [re.sub(r"\d+", "0", field) for index, field in enumerate(fields) if index != row.index(cell)]

    inner = [line.split(delimiter) for line in cell.split("\n")[1:]]
    return len(row) > 1 and any(len(fields) == len(row) and others(fields) == others(row) for fields in inner)
