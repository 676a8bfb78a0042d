"""Teach: go on from whole adapters with a few lessons, beside dialogues of the run's own data.

A lesson alone is learned in a minute, and all else is forgotten. So each step reads two rows of lessons and three of
the data that the adapters were trained on (replay; Robins 1995, "Catastrophic forgetting, rehearsal and
pseudorehearsal"): a quarter of the labels are then the lessons'. What other shares did stands in docs/measured.md.
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

PASSES = 120  # times that each lesson is read
TAUGHT, REPLAY = 2, 3  # rows of lessons, and of the run's own data, in each step


def read_lessons() -> list[list[str]]:
    """The lessons that were kept. Raises UserError where there are none."""
    if not LESSONS.is_file():
        raise UserError(f"there is no {LESSONS}: keep lessons in the chat first, with /edit and /good")
    files, _ = sources.read_path(LESSONS, Counter(), [])
    return [turns for dialogues in files.values() for turns, _ in dialogues]


def mix(
    lessons: Sequence[list[str]], rows: list[packing.Row], tokenizer: PreTrainedTokenizerBase, length: int, seed: int
) -> list[packing.Row]:
    """`PASSES` times the lessons, as rows of at most `length` tokens: always `TAUGHT` of them, and `REPLAY` that the
    seed draws of `rows`. Read in this order, every step has its share of both. Few lessons fill a row several times:
    their share does not depend on how many there are."""
    pieces, _ = packing.encode(tokenizer, list(lessons), length)
    copies = max(1, length // sum(len(turn) for turns in pieces for turn in turns))
    taught = packing.pack(pieces * copies, tokenizer, length, "bot") * PASSES
    own = itertools.cycle([rows[place] for place in np.random.default_rng(seed).permutation(len(rows))])
    steps = (taught[start : start + TAUGHT] for start in range(0, len(taught), TAUGHT))
    return [row for step in steps for row in [*step, *itertools.islice(own, REPLAY)]]


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
