"""Sampler settings with which the model's replies are most like people's."""

import dataclasses
import math
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from dialogue.chat.sampling import Sampling
from dialogue.data.corpus import Dialogues
from dialogue.measure.replies import CHAT, Reply, answer, find_contexts, measure

# What is tried beside the defaults, one setting after the other, each with the best of those before it; a whole grid
# would take five times as long.
SWEEP = {"repetition_penalty": (1.03, 1.06), "temp": (0.7, 0.9), "top_p": (0.8, 0.95), "top_k": (20, 100)}

Figures = dict[str, float]


class Fitted(NamedTuple):
    """The best settings, and the figures of people's replies, of the chat's defaults', and of the best settings'."""

    sampling: Sampling
    max_t: int
    figures: dict[str, Figures]


def distance(bot: Figures, human: Figures) -> float:
    """How unlike people's replies are the bot's? 0 where all figures are the same.

    Sum of |ln(bot / human)| of mean length and of distinct-1 and -2, of the difference of the shares that end, and of
    five times that of the shares that repeat: 0.1 is a tenth too long, or one reply of ten that does not end, or one
    of fifty that says something twice.
    """
    ratios = (max(bot[name], 1e-3) / max(human[name], 1e-3) for name in ("words", "distinct_1", "distinct_2"))
    ends, repeats = (abs(bot[name] - human[name]) for name in ("share_that_ends", "share_that_repeats"))
    return sum(abs(math.log(ratio)) for ratio in ratios) + ends + 5 * repeats


def fit(
    model: Any, tokenizer: PreTrainedTokenizerBase, dialogues: Dialogues, seed: int, contexts: int = 64, max_t: int = 50
) -> Fitted:
    """Sweep the settings on short contexts of `dialogues`, with the same random numbers for each of them.

    A model that leaves most replies unfinished keeps the defaults: no sampler helps it.
    """
    found = find_contexts(dialogues, contexts, seed, longest=3)  # short ones: most of the time goes into replies

    def tried(sampling: Sampling) -> Figures:
        return _figures(answer(model, tokenizer, [context.turns for context in found], sampling, max_t, seed))

    human = _figures([Reply(context.human, True) for context in found])
    best, best_figures = CHAT, tried(CHAT)
    defaults = best_figures
    for name, values in SWEEP.items() if defaults["share_that_ends"] > 0.5 else ():
        changes: list[dict[str, Any]] = [{name: value} for value in values]
        for sampling in [dataclasses.replace(best, **change) for change in changes]:
            new = tried(sampling)
            if distance(new, human) < distance(best_figures, human):
                best, best_figures = sampling, new
    named = {"people": human, "defaults": defaults, "fitted": best_figures}
    return Fitted(best, max_t, {who: {**of, "distance": distance(of, human)} for who, of in named.items()})


def _figures(replies: list[Reply]) -> Figures:
    return measure(replies, set())(np.arange(len(replies)))
