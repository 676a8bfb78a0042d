"""Sampler settings whose replies fit what was said, and are as long and as varied as people's."""

import dataclasses
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from dialogue.chat.batch import Reply, answer, answer_by_each
from dialogue.chat.sampling import CHAT, Sampling
from dialogue.data.corpus import Dialogues
from dialogue.measure.listening import mutual_information
from dialogue.measure.replies import find_contexts, measure

CONTEXTS = 48  # that each of the settings answers
FIRST = 3  # of them show whether the model ends a reply at all: trying settings with full-length replies takes minutes
# What is tried beside the defaults. Top-k and top-p stay: they matter little where the temperature is low.
SWEEP: tuple[dict[str, Any], ...] = (
    *({"temp": temp, "repetition_penalty": 1.06} for temp in (0.0, 0.3, 0.5, 0.8)),
    *({"temp": temp, "repetition_penalty": 1.03} for temp in (0.3, 0.5)),
)

Figures = dict[str, float]


class Fitted(NamedTuple):
    """The best settings, and the figures of people's replies, of the chat's defaults', and of the best settings'."""

    sampling: Sampling
    max_t: int
    figures: dict[str, Figures]
    contexts: int  # that all of them rest on


def cost(bot: Figures, human: Figures) -> float:
    """How much is wrong with the bot's replies? Lower is better.

    Sum of |ln(bot / human)| of mean length and of distinct-1 and -2, of the difference of the shares that end, and of
    five times that of the shares that repeat, parrot, or answer several messages: 0.1 is a tenth too long, or one
    reply of ten that does not end, or one of fifty that says something twice. Off this goes twice the mutual
    information of message and reply.
    """
    ratios = (max(bot[name], 1e-3) / max(human[name], 1e-3) for name in ("words", "distinct_1", "distinct_2"))
    names = [f"share_that_{does}" for does in ("ends", "repeats", "parrots", "is_said_again")]
    ends, *faults = (abs(bot[name] - human[name]) for name in names)
    unlike = sum(abs(math.log(ratio)) for ratio in ratios) + ends + 5 * sum(faults)
    return unlike - 2 * bot["mutual_information"]


def fit(
    model: Any, tokenizer: PreTrainedTokenizerBase, dialogues: Dialogues, seed: int, contexts: int = CONTEXTS,
    max_t: int = 50, told: Callable[[str, float], Any] = lambda *_: None, known: Sampling | None = None,
) -> Fitted:  # fmt: skip
    """Sweep the settings on short contexts of `dialogues`, with the same random numbers for each of them.

    A model that leaves most replies unfinished keeps the defaults: no sampler helps it. Of `known` settings, which
    suited the model before a few lessons, it is only looked whether they still are better than the defaults.
    """
    # Short ones: most of the time goes into replies.
    found = find_contexts(dialogues, contexts // 2 if known else contexts, seed, longest=3)
    turns, people = [context.turns for context in found], [context.human for context in found]
    samplings = [CHAT, *([known] if known else [dataclasses.replace(CHAT, **changes) for changes in SWEEP])]
    told("sampler", 0)
    if not any(reply.ended for reply in answer(model, tokenizer, turns[:FIRST], CHAT, max_t, seed)):
        samplings = [CHAT]  # it never ends
    replies = answer_by_each(
        model, tokenizer, turns, samplings, max_t, seed, told=lambda share: told("sampler", 0.7 * share)
    )
    replies.append([Reply(text, True) for text in people])
    fits = mutual_information(model, tokenizer, turns, replies)
    messages, all_of_them = [asked[-1] for asked in turns], np.arange(len(turns))
    every = [
        {**measure(of, messages)(all_of_them), "mutual_information": float(fit.mean())}
        for of, fit in zip(replies, fits, strict=True)
    ]
    human, defaults = every[-1], every[0]
    able = range(len(samplings)) if defaults["share_that_ends"] > 0.5 else [0]
    chosen = min(able, key=lambda number: cost(every[number], human))
    told("sampler", 1)
    named = {"people": human, "defaults": defaults, "fitted": every[chosen]}
    figures = {who: {**of, "cost": cost(of, human)} for who, of in named.items()}
    return Fitted(samplings[chosen], max_t, figures, len(found))
