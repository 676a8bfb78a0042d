"""What can be said of replies without a reader?"""

import random
import re
from collections import Counter
from collections.abc import Callable, Container
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from transformers import PreTrainedTokenizerBase

from dialogue.chat.batch import Reply, answer
from dialogue.chat.rerank import fault, ngrams, words_of
from dialogue.data.corpus import Dialogues, fold

# 40 everyday openers: greetings, food, work, travel, feelings, questions about the bot.
OPENERS = Path(__file__).with_name("openers.txt").read_text(encoding="utf-8").splitlines()

# What a person says in the conversations that every run's model card shows.
CONVERSATIONS = [
    ("Hello, how are you?", "What did you do today?"),
    ("What did you have for breakfast?", "That sounds good. I only had coffee."),
    ("I have a job interview tomorrow.", "Do you have any advice?"),
    ("Have you ever been to Italy?", "I would love to go there."),
    ("I'm so tired today.", "Maybe I should go to bed early."),
    ("Are you a robot?", "How can I be sure?"),
    ("Have you seen any good movies lately?", "What was it about?"),
    ("It's raining again.", "What do you want to do?"),
]


# As no person writes: "I don ' t know ."
_SPACED = re.compile(r"\s[’‘'](?=\s|\w{1,2}\b)|[’‘']\s+(?:s|t|m|re|ve|ll|d)\b|\w\s+[.,?!](?:\s|$)")


class Context(NamedTuple):
    turns: list[str]  # the last one is USER's
    human: str  # what a person answered


def find_contexts(
    dialogues: Dialogues, count: int, seed: int, shortest: int = 1, longest: int | None = None
) -> list[Context]:
    """One context from each of the first `count` dialogues, cut before a reply that the seed picks. A context has
    `shortest` to `longest` turns; of a dialogue that is too short, as many as it has. A dialogue whose reply was picked
    already is passed over, so that no reply belongs to two contexts."""
    chance, known = random.Random(seed), set[str]()
    contexts: list[Context] = []
    for turns in dialogues:
        places = range(1, min(len(turns), (longest or len(turns)) + 1), 2)
        place = chance.choice([place for place in places if place >= shortest] or places[-1:])
        reply = fold(turns[place])
        if reply not in known and len(contexts) < count:
            known.add(reply)
            contexts.append(Context(turns[:place], turns[place]))
    return contexts


def converse(model: Any, tokenizer: PreTrainedTokenizerBase, seed: int, openers: tuple[str, ...] = ()) -> Dialogues:
    """The model's replies to `openers`, or where there are none its side of `CONVERSATIONS`, all at once."""
    asked = [openers] if openers else zip(*CONVERSATIONS, strict=True)
    talks: Dialogues = [[] for _ in openers or CONVERSATIONS]
    for messages in asked:
        talks = [[*turns, message] for turns, message in zip(talks, messages, strict=True)]
        replies = answer(model, tokenizer, talks, max_t=40, seed=seed)
        talks = [[*turns, reply.text] for turns, reply in zip(talks, replies, strict=True)]
    return talks


def measure(
    replies: list[Reply], messages: list[str], known: Container[str] = ()
) -> Callable[[np.ndarray], dict[str, float]]:
    """Figures of the replies at given indices; words are those of `corpus.words`, without case and punctuation.

    distinct-n is the number of different n-grams over the number of all of them (Li et al. 2016, "A
    Diversity-Promoting Objective Function for Neural Conversation Models", section 5.3); it falls with the number
    of replies, so compare equal numbers. A reply copies if it is one of `known` (folded). `messages` are what was
    replied to; a reply is said again if another message got the same.
    """
    words, heard = [words_of(reply.text) for reply in replies], [words_of(message) for message in messages]
    often = Counter(said for _, said in {(tuple(to), tuple(spoken)) for to, spoken in zip(heard, words, strict=True)})
    faults = [fault(reply.text, [message], True) for reply, message in zip(replies, messages, strict=True)]
    grams = {n: [ngrams(reply, n) for reply in words] for n in (1, 2)}
    columns = {
        "words": list(map(len, words)),
        "share_that_ends": [reply.ended for reply in replies],
        "share_that_is_empty": [found == "empty" for found in faults],
        "share_that_repeats": [found == "repeats" for found in faults],
        "share_that_parrots": [found == "parrot" for found in faults],
        "share_that_is_said_again": [often[tuple(spoken)] > 1 for spoken in words],
        "share_that_copies": [fold(reply.text) in known for reply in replies],
        "share_that_is_spaced_wrongly": [bool(_SPACED.search(reply.text)) for reply in replies],
    }
    rows = np.array(list(columns.values()), dtype=float)

    def figures(at: np.ndarray) -> dict[str, float]:
        found = {n: list(chain.from_iterable(grams[n][index] for index in at)) for n in (1, 2)}
        distinct = {f"distinct_{n}": len(set(of)) / max(1, len(of)) for n, of in found.items()}
        return {**distinct, **dict(zip(columns, rows[:, at].mean(axis=1).tolist(), strict=True))}

    return figures
