"""What a dialogue and a corpus are, how one is split, and what two dialogues share. Reads no file.

A dialogue is a list of turns. Even places are the person's and odd places the bot's, always: where the bot opens,
the first turn is an empty string, which stands for nothing in the model's input. A turn that is read but must not
be learned is an `Unlearned` string.
"""

import hashlib
import itertools
import re
from collections import Counter
from typing import NamedTuple

from dialogue.errors import UserError

Dialogues = list[list[str]]

SHARED_WORDS = 10  # of a message and its reply: shorter pairs ("How are you?" "Fine.") are anybody's
COMMON = 5  # a passage that stands in more dialogues than this, or in a third of a small set, is a form of words
FLOOR = 5  # dialogues that a held-out split has at least, or a tenth of a small set
FEW = 50  # figures of fewer dialogues are rough
# Thai, Lao, Burmese, Khmer, Chinese, Japanese: no white space parts their words, so that a character is one here.
_UNPARTED = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3005-\u30ff\u3400-\u9fff\U00020000-\U0003ffff"
_WORD = re.compile(f"[{_UNPARTED}]|[^\\s{_UNPARTED}]+")
SPLITS = {
    "train": {"train", "training"},
    "validation": {"validation", "valid", "dev", "val"},
    "test": {"test", "testing", "eval", "evaluation"},
}


class Unlearned(str):
    """A turn without a label: the model reads it and is not taught to say it."""


class Corpus(NamedTuple):
    """Three splits of dialogues; `notes` says how they were read, and what was left out."""

    train: Dialogues
    validation: Dialogues
    test: Dialogues
    source: str
    licence: str | None
    notes: list[str]


def own_openers(corpus: Corpus, count: int) -> tuple[str, ...]:
    """Different first messages of the validation split, short ones. None of known data, which has English openers."""
    found = dict.fromkeys(" ".join(turns[0].split()) for turns in corpus.validation if 0 < len(turns[0]) <= 200)
    return () if corpus.licence else tuple(found)[:count]


def rough(dialogues: int) -> str:
    """What is to be said behind figures of so many dialogues; nothing from `FEW` on."""
    return f"; figures of so few dialogues ({dialogues}) are rough" if dialogues < FEW else ""


def words(text: str) -> list[str]:
    """What white space parts, and in writing without it each character."""
    return _WORD.findall(text)


def fold(text: str) -> str:
    """Words without case and punctuation: "Hi, I 'm Bob." -> "hi i m bob"."""
    return " ".join(re.findall(r"[^\W_]+", text.casefold()))


def _passages(turns: list[str]) -> set[str]:
    """What marks a dialogue: the whole of it, and each message and reply of `SHARED_WORDS` together; without case and
    the signs that part sentences. Smileys, "C++", "3 - 5" and vowel signs stay what they are."""
    wordings = [" ".join(re.split(r"[\s.,;:!?\"'’‘“”…]+", turn.casefold())).strip() or turn for turn in turns]
    pairs = (f"{message}\n{reply}" for message, reply in itertools.pairwise(wordings))
    return {"\n\n".join(wordings), *(pair for pair in pairs if len(words(pair)) >= SHARED_WORDS)}


def without_overlap(dialogues: Dialogues, other: Dialogues) -> Dialogues:
    """Those of `dialogues` that share no passage with `other`. Passages of many different dialogues, such as the
    greeting of a help desk, mark none of them."""
    marks, others = [_passages(turns) for turns in dialogues], [_passages(turns) for turns in other]
    different = set(map(frozenset, marks + others))
    counts, many = Counter(itertools.chain.from_iterable(different)), min(COMMON, max(2, len(different) // 3))
    known = {passage for passage in set().union(*others) if counts[passage] <= many}
    return [turns for turns, passages in zip(dialogues, marks, strict=True) if known.isdisjoint(passages)]


def without_leaks(corpus: Corpus) -> Corpus:
    """`corpus` with a training split of which nothing stands in validation or test, and nothing twice. Duplicates are
    the same text but for white space. Of DailyDialog's 11,118 training dialogues, 596 overlap and 669 of the others are
    duplicates. Raises UserError where no training dialogue is left."""
    apart = without_overlap(corpus.train, corpus.validation + corpus.test)
    first: dict[str, list[str]] = {}
    for turns in apart:
        first.setdefault("\n".join(" ".join(turn.split()) for turn in turns), turns)
    train = list(first.values())
    if not train:
        raise UserError(f"every training dialogue of {corpus.source} stands in its validation or test split as well")
    left_out = Counter({"left out since they overlap validation or test": len(corpus.train) - len(apart)})
    left_out["duplicates left out"] = len(apart) - len(train)
    return corpus._replace(train=train, notes=[*corpus.notes, *counted(left_out)])


def counted(reasons: Counter[str]) -> list[str]:
    """{"duplicates left out": 3} -> ["duplicates left out: 3"]; reasons that never came up are not named."""
    return [f"{reason}: {count:,}" for reason, count in reasons.items() if count]


def split_by_name(name: str) -> str | None:
    """ "dialogues_valid.txt" -> "validation": the words that the hub documents (datasets' data_files.py)."""
    words = set(re.split(r"[\W_\d]+", name.lower()))
    found = [split for split, names in SPLITS.items() if words & names]
    return found[0] if found else None


def digest(text: str) -> str:
    """SHA-256 of a text, by which dialogues are put in an order that is always the same."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def split_of(text: str) -> str:
    """Deterministic split by content: of 20 parts, one is validation and one is test."""
    return {0: "validation", 1: "test"}.get(int(digest(text), 16) % 20, "train")


def hold_out(pool: Dialogues, missing: list[str]) -> dict[str, Dialogues]:
    """Deal `pool` to train and the `missing` splits, 5 % each by hash: the same dialogue always lands in the same. A
    split that gets fewer than `FLOOR` dialogues, or than a tenth of a small pool, takes more from train, in the order
    of their hashes. Of two dialogues one is for training and one for validation."""
    parts: dict[str, Dialogues] = {name: [] for name in ("train", *missing)}
    for dialogue in pool:
        split = split_of("\n".join(dialogue))
        parts[split if split in missing else "train"].append(dialogue)
    tenth = min(FLOOR, len(pool) // 10)
    floors = {"train": 1, "validation": max(1, tenth), "test": tenth}
    for name in parts:
        while len(parts[name]) < floors[name]:
            spare = [split for split in parts if len(parts[split]) > floors[split] and split != name]
            if not spare:
                break
            donor = parts[max(spare, key=lambda split: len(parts[split]))]
            moved = min(donor, key=lambda turns: digest("\n".join(turns)))
            donor.remove(moved)
            parts[name].append(moved)
    return parts
