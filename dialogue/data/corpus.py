"""Files and hub datasets -> clean dialogues.

A dialogue is a list of turns (strings), speakers alternating. `load_corpus` knows two names, "dailydialog"
and "chitchat", and else reads what lies at a path.
"""

import hashlib
import html
import itertools
import json
import os
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

from dialogue import hub, wheels
from dialogue.data.readers import ONE_TURN, read_file
from dialogue.errors import UserError

Dialogues = list[list[str]]

DAILYDIALOG_LICENCE = "CC BY-NC-SA 4.0 (Li et al. 2017, 'DailyDialog')"
DAILYDIALOG_SIZES = {"train": 11_118, "validation": 1_000, "test": 1_000}

# Where DailyDialog lies on the hub: (repository, revision, file of a split). Tried in order. The loading
# script that `load_dataset("daily_dialog")` asks for is refused by datasets 4 and later, so these are data
# files only.
SOURCES = [
    ("li2017dailydialog/daily_dialog", "refs/convert/parquet", "default/{split}/0000.parquet"),
    ("OpenRL/daily_dialog", "refs/convert/parquet", "default/{split}/0000.parquet"),
    ("roskoN/dailydialog", "main", "{split}.zip"),
]
SHARED_WORDS = 10  # of a message and its reply: shorter pairs ("How are you?" "Fine.") are anybody's
EPISODE = 8  # turns of a chitchat dialogue: four messages and their replies
EPISODE_WORDS = 20  # of a turn, at most: whoever learns from longer ones rambles, and then repeats himself
SPLITS = {"train": ("train",), "validation": ("validation", "valid", "dev", "val"), "test": ("test",)}


class Corpus(NamedTuple):
    """Three splits of clean dialogues; `notes` says what was left out."""

    train: Dialogues
    validation: Dialogues
    test: Dialogues
    source: str
    licence: str | None
    notes: list[str]


def load_corpus(dataset: str) -> Corpus:
    """Load "dailydialog", "chitchat", or a path: a file (.jsonl, .json, .csv, .parquet, .txt, .zip) or a folder.

    A path is what exists, or has a separator, a dot or a leading "~". A folder in the working directory that
    happens to be called "dailydialog" is not taken for the dataset: that one is "./dailydialog".
    Raises UserError, one line, for anything that cannot be read or holds no dialogue.
    """
    if dataset == "dailydialog":
        return _from_hub()
    if dataset == "chitchat":
        return _chitchat()
    if dataset and (os.path.exists(dataset) or {os.sep, "/"} & set(dataset) or "." in dataset or dataset[0] == "~"):
        return _from_path(Path(os.path.expanduser(dataset)))
    raise UserError(f"there is no dataset {dataset!r}: choose dailydialog, chitchat, or the path of a file or folder")


def fold(text: str) -> str:
    """Words without case and punctuation: "Hi, I 'm Bob." -> "hi i m bob"."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def _whole(turns: list[str]) -> str:
    return fold(" ".join(turns)) or "\n".join(turns)  # emoticons alone: as they are


def _passages(turns: list[str]) -> set[str]:
    """What marks a dialogue: the whole of it, and each message and reply of `SHARED_WORDS` together; folded."""
    folded = [fold(turn) for turn in turns]
    pairs = (f"{message}\n{reply}" for message, reply in itertools.pairwise(folded))
    return {_whole(turns), *(pair for pair in pairs if len(pair.split()) >= SHARED_WORDS)}


def without_overlap(dialogues: Dialogues, other: Dialogues) -> Dialogues:
    """Those of `dialogues` that share no passage with `other`."""
    known = {passage for turns in other for passage in _passages(turns)}
    return [turns for turns in dialogues if known.isdisjoint(_passages(turns))]


def without_leaks(corpus: Corpus) -> Corpus:
    """`corpus` with a training split of which nothing stands in validation or test, and nothing twice.

    Of DailyDialog's 11,118 training dialogues, 597 overlap and 810 of the others are duplicates. Raises UserError
    where no training dialogue is left.
    """
    apart = without_overlap(corpus.train, corpus.validation + corpus.test)
    first: dict[str, list[str]] = {}
    for turns in apart:
        first.setdefault(_whole(turns), turns)
    train = list(first.values())
    if not train:
        raise UserError(f"every training dialogue of {corpus.source} stands in its validation or test split as well")
    skipped = Counter({"that overlap validation or test left out": len(corpus.train) - len(apart)})
    skipped["duplicates left out"] = len(apart) - len(train)
    return corpus._replace(train=train, notes=[*corpus.notes, *_notes(skipped)])


def split_of(text: str) -> str:
    """Deterministic split by content: of 20 parts, one is validation and one is test."""
    part = int(hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(), 16) % 20
    return {0: "validation", 1: "test"}.get(part, "train")


def _notes(skipped: Counter[str]) -> list[str]:
    return [f"{count:,} {reason}" for reason, count in skipped.items() if count]


def _from_path(path: Path) -> Corpus:
    # os.path and not Path: a name too long, or a folder that may not be entered, is False there and no exception.
    if not os.path.exists(path):
        raise UserError(
            f"dataset {path} does not exist: give the path of a file or a folder, or dailydialog or chitchat"
        )
    skipped: Counter[str] = Counter()
    found: dict[str, Dialogues] = {name: [] for name in SPLITS}
    for file in _data_files(path):
        # A single file is what there is to train on, also when its name is "test.jsonl".
        split = _split_by_name(file.relative_to(path)) if file != path else "train"
        found[split] += read_file(file, skipped)
    notes = _notes(skipped)
    if not any(found.values()):
        raise UserError("; ".join([f"{path} holds no dialogue of two turns or more", *notes]))
    if not found["train"]:
        raise UserError(f"{path} holds no training dialogues: a file named like its split, or without a split's name")
    missing = [name for name in ("validation", "test") if not found[name]]
    if missing:
        found |= hold_out(found["train"], missing)
        if not found["train"] or not found["validation"]:
            raise UserError(f"{path} holds too few dialogues to keep one apart for validation: give at least two")
        notes.append(f"{' and '.join(f'{len(found[name]):,} for {name}' for name in missing)} held out")
    known = DAILYDIALOG_LICENCE if {name: len(found[name]) for name in SPLITS} == DAILYDIALOG_SIZES else None
    return Corpus(**found, source=str(path), licence=known, notes=notes)


def hold_out(pool: Dialogues, missing: list[str]) -> dict[str, Dialogues]:
    """Deal `pool` to train and the `missing` splits, 5 % each by hash: the same dialogue always lands in the same.

    In a small pool a split may get nothing; then train, and next validation, takes one from the largest other.
    """
    parts: dict[str, Dialogues] = {name: [] for name in ("train", *missing)}
    for dialogue in pool:
        split = split_of("\n".join(dialogue))
        parts[split if split in missing else "train"].append(dialogue)
    for name in ("train", "validation"):
        if name in parts and not parts[name]:
            donors = [part for split, part in parts.items() if len(part) > (split != "test")]
            if donors:
                parts[name].append(max(donors, key=len).pop())
    return parts


def _data_files(path: Path) -> list[Path]:
    """The data files at `path`. In the original release, act and emotion labels lie beside the text."""
    if path.is_file():
        return [path]
    suffixes = {".jsonl", ".json", ".csv", ".parquet", ".txt", ".zip"}
    try:
        files = sorted(file for file in path.rglob("*") if file.suffix.lower() in suffixes and file.is_file())
    except OSError as error:
        raise UserError(f"dataset {path} cannot be read: {error.strerror}") from error
    texts = [file for file in files if not {"act", "emotion"} & set(file.stem.lower().split("_"))]
    dialogues = [file for file in texts if file.suffix.lower() != ".txt" or file.stem.startswith("dialogues")]
    if not dialogues:
        raise UserError(f"{path} holds no data file ({', '.join(sorted(suffixes))}): see the README on own data")
    return dialogues


def _split_by_name(file: Path) -> str:
    """ "dialogues_valid.txt" and "validation/part-0.jsonl" -> "validation"; a path without a split's name is train."""
    for part in reversed(file.parts):
        words = set(part.lower().replace("-", "_").replace(".", "_").split("_"))
        for split, names in SPLITS.items():
            if words & set(names):
                return split
    return "train"


def _from_hub() -> Corpus:
    """DailyDialog from the first source that has all of it."""
    from huggingface_hub import hf_hub_download

    offline = not hub.reachable()
    failures = []
    for repository, revision, pattern in SOURCES:
        found, skipped = {}, {name: Counter[str]() for name in SPLITS}
        try:
            for name in SPLITS:
                file = hf_hub_download(
                    repository,
                    pattern.format(split=name),
                    repo_type="dataset",
                    revision=revision,
                    local_files_only=offline,
                )
                found[name] = read_file(Path(file), skipped[name])
        except Exception as error:  # whatever went wrong with this source, it is named below
            failures.append(f"{repository}: {' '.join(str(error).split())[:120]}")
            continue
        sizes = {name: len(found[name]) + skipped[name][ONE_TURN] for name in SPLITS}
        if sizes == DAILYDIALOG_SIZES:
            return Corpus(
                **found,
                source="DailyDialog",
                licence=DAILYDIALOG_LICENCE,
                notes=_notes(sum(skipped.values(), Counter())),
            )
        failures.append(f"{repository}: has {sizes} dialogues, expected {DAILYDIALOG_SIZES}")
    raise UserError(
        f"DailyDialog could not be loaded ({'no network' if offline else 'the hub refused'}, and not in the cache): "
        "use `--preset starter`, which needs the Python package index only, or `--dataset PATH` with a copy of "
        f"yours. Tried {'; '.join(failures)}"
    )


def _chitchat() -> Corpus:
    """The Chit-Chat Challenge: 7,168 conversations between students, from the package index (MIT).

    A conversation runs to 41 turns in the mean; it becomes episodes of `EPISODE` turns, all the openings
    before all the second episodes and so on, in the order of a hash: the first N training dialogues are N
    different conversations, from the start, which is where every chat with the bot is.
    """
    conversations = json.loads(wheels.fetch(wheels.CHITCHAT).read_text(encoding="utf-8"))
    episodes: dict[str, list[tuple[int, list[str]]]] = {name: [] for name in SPLITS}
    short = disliked = wordy = 0
    for identifier in sorted(conversations, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        turns = _chat_turns(conversations[identifier]["messages"])
        ratings = (conversations[identifier].get("ratings") or {}).values()
        if len(turns) < 4:
            short += 1
        elif ratings and sum(map(int, ratings)) < 5 * len(ratings):
            disliked += 1
        else:
            cut = [(start, turns[start : start + EPISODE]) for start in range(0, len(turns) - 1, EPISODE)]
            brief = [(start, part) for start, part in cut if max(len(turn.split()) for turn in part) <= EPISODE_WORDS]
            wordy += len(cut) - len(brief)
            episodes[split_of(identifier)] += brief
    found = {name: [turns for _, turns in sorted(found, key=lambda e: e[0])] for name, found in episodes.items()}
    notes = [
        f"{short:,} conversations of fewer than four turns left out",
        f"{disliked:,} that their own speakers rated below 5 of 10 left out",
        f"the others cut into episodes of {EPISODE} turns",
        f"{wordy:,} episodes with a turn of more than {EPISODE_WORDS} words left out",
    ]
    return Corpus(**found, source="chitchat-dataset 0.9.0", licence="MIT", notes=notes)


def _chat_turns(groups: list[list[dict[str, Any]]]) -> list[str]:
    """Groups of messages of one sender -> turns, each on one line, since a terminal shows one reply."""
    turns: list[str] = []
    last = None
    for group in groups:
        text = _one_line(" ".join(html.unescape(message["text"]).split()) for message in group)
        if not text:
            continue
        sender = group[0]["sender"]
        if sender == last:
            turns[-1] = _one_line([turns[-1], text])
        else:
            turns.append(text)
        last = sender
    return turns


def _one_line(messages: Iterable[str]) -> str:
    """["just woke up", "Any plans?"] -> "just woke up. Any plans?"; a return before a capital stood for a full stop.

    Of the 103,000 returns inside a turn, 36 % follow a sign, 34 % part a letter from a capital (a sentence
    ends there), and 30 % a letter from a small letter (mostly the sentence goes on). A smiley ("XD") takes none.
    """
    line = ""
    for message in filter(None, messages):
        ends = re.search(r"(?:^|\s)[\w'-]*[a-z0-9]$", line) and message[0].isupper()
        line += (". " if ends else " " if line else "") + message
    return line
