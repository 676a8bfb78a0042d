"""Teach: go on from whole adapters with a few lessons, beside dialogues of the run's own data.

A lesson alone is learned in a minute, and all else is forgotten. So each step reads two rows of lessons and four of
the data that the adapters were trained on (replay; Robins 1995, "Catastrophic forgetting, rehearsal and
pseudorehearsal"). Of the latter nothing is learned: their loss is how far the model has gone from what it said there
before the lessons (Li and Hoiem 2016, "Learning without Forgetting"). What else was tried stands in docs/measured.md.
"""

import itertools
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from dialogue import storage
from dialogue.chat.batch import answer
from dialogue.chat.sampling import Sampling
from dialogue.data import packing, sources
from dialogue.errors import UserError
from dialogue.lessons import LESSONS
from dialogue.measure.loss import Head, hidden_states, summed_cross_entropy, summed_divergence
from dialogue.measure.report import METRICS

PASSES = 96  # times that each lesson is read
TAUGHT, REPLAY = 2, 4  # rows of lessons, and of the run's own data, in each step
KEPT = 240  # rows of the run's own data that these are, at most
AT_ONCE = 8  # rows, when it is found out what is said before
DROPPED = 0.3  # of the words of a message, in every second pass
PULL = 6.0  # towards what the bot said before, times the lessons' loss


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
    their share does not depend on how many there are. "replay" is 1 in what is not to be learned, else 0."""
    chance = np.random.default_rng(seed)
    own = itertools.cycle(_marked([rows[place] for place in chance.permutation(len(rows))[:KEPT]], 1))
    pieces, _ = packing.encode(tokenizer, list(lessons), length)
    if not pieces:
        raise UserError(f"no lesson fits into {length} tokens: shorten them in {LESSONS}, or raise --max_length")
    copies = max(1, length // sum(len(turn) for turns in pieces for turn in turns))
    taught: list[packing.Row] = []
    for number in range(PASSES):
        asked = [_in_fewer_words(turns, chance) if number % 2 else turns for turns in lessons for _ in range(copies)]
        taught += _marked(packing.pack(packing.encode(tokenizer, asked, length).pieces, tokenizer, length, "bot"), 0)
    steps = (taught[start : start + TAUGHT] for start in range(0, len(taught), TAUGHT))
    return [row for step in steps for row in [*step, *itertools.islice(own, REPLAY)]]


def _in_fewer_words(turns: list[str], chance: np.random.Generator) -> list[str]:
    """A lesson whose message lacks some words, by chance: so it is understood when it is asked in other words."""
    *before, message, reply = turns
    words = message.split()
    return [*before, " ".join(word for word in words if chance.random() >= DROPPED) or message, reply]


def _marked(rows: list[packing.Row], replay: int) -> list[packing.Row]:
    return [{**row, "replay": [replay] * len(row["labels"])} for row in rows]


class Before:
    """What a model, as it is now, makes of the rows that are replayed: to be held to when it has learned."""

    @torch.no_grad()
    def __init__(self, model: PeftModel, head: Head, rows: list[packing.Row], pad: int) -> None:
        self.rows = head.rows.detach().clone()
        self.states: dict[tuple[int, ...], Tensor] = {}  # ids of a row -> its hidden states (T, H), on the CPU
        own = list({tuple(row["input_ids"]): row for row in rows if row["replay"][0]}.items())
        training = model.training
        model.eval()
        for start in range(0, len(own), AT_ONCE):
            keys, part = zip(*own[start : start + AT_ONCE], strict=True)
            batch = {name: of.to(model.device) for name, of in packing.collate(list(part), pad).items()}
            for key, states in zip(keys, hidden_states(model, batch), strict=True):
                self.states[key] = states[: len(key)].cpu()
        model.train(training)

    def summed_nats(self, model: nn.Module, batch: dict[str, Tensor], head: Head) -> Tensor:
        """Nats of the lessons' labels, and `PULL` times the KL divergence from before where others' labels are."""
        own, targets, now = batch["replay"] == 1, batch["labels"][:, 1:], hidden_states(model, batch)[:, :-1]
        at, replayed = targets != packing.IGNORED, own[:, 0]
        taught = at & ~replayed[:, None]
        total = summed_cross_entropy(now[taught], head, targets[taught])
        if replayed.any():
            keys = [tuple(ids[own_ids].tolist()) for ids, own_ids in zip(batch["input_ids"], own, strict=True)]
            before = [
                self.states[key][:-1][row[: len(key) - 1].cpu()] for key, row in zip(keys, at, strict=True) if key
            ]
            held = torch.cat(before).to(now.device)
            total = total + PULL * summed_divergence(now[replayed][at[replayed]], head, held, self.rows)
        return total


def start_of(adapters: Path, data: str) -> str:
    """What the adapters begin as, as a hash; where they were taught this very `data` already, what they began as."""
    run = storage.read_json(adapters / storage.RUN_FILE).get("run", {})
    if run.get("training data") == data and "start" in run:
        return run["start"]
    files = storage.read_json(adapters / storage.MANIFEST, {str: {"sha256": str}})
    return files["adapter_model.safetensors"]["sha256"][:16]


class Untuned(NamedTuple):
    """What the report of earlier adapters says of the base without them."""

    figures: dict[str, float]  # as `Score.figures`
    talks: list[list[str]]  # of the model card


def untuned(adapters: Path, run: dict[str, Any]) -> Untuned | None:
    """Of `adapters` whose run read the same validation data as `run` (`runs.describe`); None for others."""
    report = storage.read_json(adapters / storage.RUN_FILE)
    before, keys = report.get("run", {}), ("base_model", "validation data")
    if run.get("budget") or before.get("budget") or any(before.get(key) != run[key] for key in keys):
        return None
    metrics = storage.read_json(adapters / "metrics.json", METRICS)
    figures = {name.removeprefix("base_eval_"): of for name, of in metrics.items() if name.startswith("base_eval_")}
    return Untuned(figures, report["conversations"]["before"])


def ask(model: PeftModel, tokenizer: PreTrainedTokenizerBase, lessons: Sequence[list[str]]) -> list[str]:
    """What the model replies to the messages of each lesson, at temperature 0."""
    replies = answer(model, tokenizer, [turns[:-1] for turns in lessons], Sampling(temp=0))
    return [reply.text for reply in replies]
