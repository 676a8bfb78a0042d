"""Teach: go on from whole adapters with a few lessons, beside dialogues of the run's own data.

A lesson alone is learned in a minute, and all else is forgotten. So each step reads a row of lessons and some rows of
the data that the adapters were trained on (replay; Robins 1995, "Catastrophic forgetting, rehearsal and
pseudorehearsal"). Of both the bot's turns carry loss, so that a quarter of the labels are the lessons'. With an eighth
too little was learned; with half, once more as much was forgotten (docs/measured.md).
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from dialogue import storage
from dialogue.chat.batch import answer
from dialogue.chat.sampling import Sampling
from dialogue.data import packing, sources
from dialogue.errors import UserError
from dialogue.lessons import LESSONS

PASSES = 50  # times that each lesson is read
REPLAY = 3  # rows of the run's own data beside each row of lessons, in one step


def read_lessons() -> list[list[str]]:
    """The lessons that were kept. Raises UserError where there are none."""
    if not LESSONS.is_file():
        raise UserError(f"there is no {LESSONS}: keep lessons in the chat first, with /edit and /good")
    files, _ = sources.read_path(LESSONS, Counter(), [])
    return [turns for dialogues in files.values() for turns, _ in dialogues]


def mix(
    lessons: Sequence[list[str]], rows: list[packing.Row], tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> list[packing.Row]:
    """`PASSES` times the lessons, as rows of at most `length` tokens, each before `REPLAY` rows that the seed draws of
    `rows`: read in this order, every step has its share of both. Of few lessons a row holds several copies, so that
    their share does not depend on how many there are."""
    pieces, _ = packing.encode(tokenizer, list(lessons), length)
    copies = max(1, length // sum(len(turn) for turns in pieces for turn in turns))
    taught = packing.pack(pieces * copies, tokenizer, length, "bot") * PASSES
    order = itertools.cycle(np.random.default_rng(seed).permutation(len(rows)))
    return [row for lesson in taught for row in (lesson, *(rows[next(order)] for _ in range(REPLAY)))]


def start_of(adapters: Path, data: str) -> str:
    """What the adapters begin as, as a hash; where they were taught this very `data` already, what they began as."""
    run = storage.read_json(adapters / storage.RUN_FILE).get("run", {})
    if run.get("training data") == data and "start" in run:
        return run["start"]
    files = storage.read_json(adapters / storage.MANIFEST, {str: {"sha256": str}})
    return files["adapter_model.safetensors"]["sha256"][:16]


def ask(model: PeftModel, tokenizer: PreTrainedTokenizerBase, lessons: Sequence[list[str]]) -> list[str]:
    """What the model replies to the messages of each lesson, at temperature 0."""
    replies = answer(model, tokenizer, [turns[:-1] for turns in lessons], Sampling(temp=0))
    return [reply.text for reply in replies]
