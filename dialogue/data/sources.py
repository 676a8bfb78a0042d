"""Where dialogues come from: the hub, the package index, files and folders. `load_corpus` knows them all."""

import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

from dialogue import hub
from dialogue.data import chitchat
from dialogue.data.cleaning import clean, looks_tokenised
from dialogue.data.corpus import SPLITS, Corpus, Dialogues, counted, hold_out, rough, split_by_name
from dialogue.data.exports import SILENCE
from dialogue.data.readers import EOU, SUFFIXES, NoDialogues, Parts, Record, faults_named, read_records, shown, walk
from dialogue.data.records import to_dialogues, wanted_columns
from dialogue.errors import UserError, in_a_line

DAILYDIALOG_LICENCE = "CC BY-NC-SA 4.0 (Li et al. 2017, 'DailyDialog')"
DAILYDIALOG_SIZES = {"train": 11_118, "validation": 1_000, "test": 1_000}

Files = dict[Parts, list[tuple[list[str], str | None]]]  # dialogues of each file, with the split that a record names

# Where DailyDialog lies on the hub: (repository, revision, file of a split). Tried in order. The loading
# script that `load_dataset("daily_dialog")` asks for is refused by datasets 4 and later, so these are data
# files only.
SOURCES = [
    ("li2017dailydialog/daily_dialog", "refs/convert/parquet", "default/{split}/0000.parquet"),
    ("OpenRL/daily_dialog", "refs/convert/parquet", "default/{split}/0000.parquet"),
    ("roskoN/dailydialog", "main", "{split}.zip"),
]
KNOWN = ("dailydialog", "chitchat")  # data sets by name; English


def load_corpus(dataset: str, bot: str | None = None, silence: float = SILENCE) -> Corpus:
    """Load "dailydialog", "chitchat", the path of a file or folder, or OWNER/NAME of the hub. A folder that happens to
    be called "dailydialog" is "./dailydialog". `bot` and `silence` are those of `to_dialogues`. Raises UserError for
    anything that cannot be read or holds no dialogue."""
    left_out: Counter[str] = Counter()
    notes: list[str] = []
    if bot and dataset in KNOWN:
        raise UserError(f"--bot {bot} names a speaker of your own chats, and {dataset} has no names: leave it out")
    if dataset in KNOWN:
        return chitchat.load() if dataset == "chitchat" else _dailydialog()
    # os.path and not Path: a name too long, or a folder that may not be entered, is False there and no exception.
    path = os.path.expanduser(dataset)
    if dataset and os.path.exists(path):
        files, released = read_path(Path(path), left_out, notes, bot, silence)
        return _gather(files, shown(path), released, left_out, notes)
    if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", dataset) and not dataset.lower().endswith(SUFFIXES):
        released = "dailydialog" in re.sub(r"[\W_]", "", dataset.lower())
        return _gather(_from_hub(dataset, left_out, notes, bot), dataset, released, left_out, notes)
    choices = "choose dailydialog, chitchat, the path of a file or folder, or OWNER/NAME of the hub"
    raise UserError(f"dataset {shown(path)!r} does not exist: {choices}")


def read_path(
    path: Path, left_out: Counter[str], notes: list[str], bot: str | None = None, silence: float = SILENCE
) -> tuple[Files, bool]:
    """All dialogues at `path`, and whether they have the separators of DailyDialog's release. What holds no dialogues
    in a folder or an archive is passed over, and named in the notes."""
    files: Files = {}
    passed_over: list[str] = []
    released = False
    for parts, data in walk(path, passed_over):
        name = "/".join((shown(path), *parts))
        try:
            with faults_named(name):
                records = list(read_records(data, name, wanted_columns))
                files[parts] = to_dialogues(records, name, left_out, notes, bot, silence)
        except NoDialogues:
            if not parts:
                raise
            passed_over.append("/".join(parts))
            continue
        released |= data.count(EOU.encode()) >= len(records) > 0
    if not files:
        raise UserError(f"{path} holds no data file with dialogues ({', '.join(SUFFIXES)}): see docs/own-data.md")
    if passed_over:
        notes.append(f"not read: {_some(passed_over)}")
    return files, released


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _gather(files: Files, source: str, released: bool, left_out: Counter[str], notes: list[str]) -> Corpus:
    """Dialogues of files -> splits: as the records say, else as the names of the files do, else held out. DailyDialog
    is known by its text or its separators: only its tokenisation is undone, and its test split is never trained on."""
    tokenised = looks_tokenised([turns for dialogues in files.values() for turns, _ in dialogues])
    found: dict[str, Dialogues] = {name: [] for name in SPLITS}
    origin: dict[str, list[str]] = {name: [] for name in SPLITS}
    three = sum(DAILYDIALOG_SIZES.values())  # dialogues_text.txt has all splits once more
    whole = {parts for parts in files if (tokenised or released) and len(files[parts]) == three}
    if whole and len(files) > len(whole):
        notes.append(f"not read, since it repeats the splits: {_some(['/'.join(parts) for parts in whole])}")
        files = {parts: dialogues for parts, dialogues in files.items() if parts not in whole}
    splits = _splits_by_name(list(files))
    for parts, dialogues in files.items():
        split = splits[parts]
        named = split_by_name("/".join((Path(source).name, *parts)))
        is_test = parts in whole or (split, named) == ("train", "test")
        if is_test and (tokenised or (released and len(dialogues) >= DAILYDIALOG_SIZES["test"])):
            raise UserError(f"{source} holds DailyDialog's test split, never trained on: give its train.zip as well")
        origin[split].append("/".join(parts))
        for turns, own in dialogues:
            found[own or split].append(turns)
    if tokenised or released:
        found = {name: [list(map(clean, turns)) for turns in found[name]] for name in SPLITS}
    as_text = "DailyDialog's tokenisation undone" if tokenised or released else "text taken as it is"
    notes = [*dict.fromkeys(notes), as_text]
    if len(files) > 1:
        notes += [f"{name} from {_some(origin[name])}" for name in SPLITS if origin[name]]
    notes += counted(left_out)
    if not any(found.values()):
        raise UserError("; ".join([f"{source} holds no dialogue of two turns or more", *notes]))
    if not found["train"]:
        raise UserError(f"{source} holds no training dialogues: a file named like its split, or without a split's name")
    missing = [name for name in ("validation", "test") if not found[name]]
    if missing:
        found |= hold_out(found["train"], missing)
        if not found["train"] or not found["validation"]:
            raise UserError(f"{source} holds too few dialogues to keep one apart for validation: give at least two")
        notes.append(f"{' and '.join(f'{len(found[name]):,} for {name}' for name in missing)} held out")
    notes += filter(None, [rough(len(found["validation"])).removeprefix("; ")])
    return Corpus(**found, source=source, licence=DAILYDIALOG_LICENCE if tokenised else None, notes=notes)


def _splits_by_name(files: list[Parts]) -> dict[Parts, str]:
    """ "validation/part-0.jsonl" -> "validation", where a split of another name lies beside it; else train."""
    beside: dict[Parts, set[str | None]] = {}
    for parts in files:
        for depth, part in enumerate(parts):
            beside.setdefault(parts[:depth], set()).add(split_by_name(part))
    splits = dict.fromkeys(files, "train")
    for parts in files:
        for depth, part in enumerate(parts):  # the innermost name decides
            if split_by_name(part) and len(beside[parts[:depth]] - {None}) > 1:
                splits[parts] = str(split_by_name(part))
    return splits


def _from_hub(name: str, left_out: Counter[str], notes: list[str], bot: str | None) -> Files:
    """A dataset of the hub, from its data files: `datasets` 4 and later run no code of a repository."""
    import datasets

    datasets.disable_progress_bars()
    try:
        loaded = datasets.load_dataset(name)
    except Exception as error:  # no such name, no network, a configuration to be chosen: the message says which
        raise UserError(f"{name} is no path here, and no dataset that the hub gives: {in_a_line(error)}") from error
    files: Files = {}
    for split, rows in loaded.items():
        rows = rows.select_columns(wanted_columns(rows.column_names))
        records = [Record(f"{name}, {split} {number}", row) for number, row in enumerate(rows, 1)]
        files[(str(split),)] = to_dialogues(records, f"{name}/{split}", left_out, notes, bot)
    return files


def _dailydialog() -> Corpus:
    """DailyDialog from the first source that has all of it."""
    from huggingface_hub import hf_hub_download

    offline = not hub.reachable()
    failures = []
    for repository, revision, pattern in SOURCES:
        found: dict[str, Dialogues] = {}
        left_out: Counter[str] = Counter()
        try:
            for name in SPLITS:
                places: dict[str, Any] = {"repo_type": "dataset", "revision": revision, "local_files_only": offline}
                file = hf_hub_download(repository, pattern.format(split=name), **places)
                files, _ = read_path(Path(file), left_out, [])
                found[name] = [list(map(clean, turns)) for dialogues in files.values() for turns, _ in dialogues]
            sizes = {name: len(found[name]) for name in SPLITS}
            if sizes != DAILYDIALOG_SIZES:
                raise ValueError(f"has {sizes} dialogues, expected {DAILYDIALOG_SIZES}")
            return Corpus(**found, source="DailyDialog", licence=DAILYDIALOG_LICENCE, notes=counted(left_out))
        except Exception as error:  # whatever went wrong with this source, it is named below
            failures.append(f"{repository}: {in_a_line(error)[:150]}")
    raise UserError(
        f"DailyDialog could not be loaded ({'no network' if offline else 'the hub refused'}, and not in the cache): "
        "use `--preset starter`, which needs the Python package index only, or `--dataset PATH` with a copy of "
        f"yours. Tried {'; '.join(failures)}"
    )
