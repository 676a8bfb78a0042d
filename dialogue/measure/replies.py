"""What does the model answer? Replies in batches, and what can be said of them without a reader."""

import random
import re
from collections import Counter
from collections.abc import Callable
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from dialogue.chat.sampling import Sampling, candidates, draw
from dialogue.data.corpus import Dialogues, fold
from dialogue.prompt import BOT, END, USER, decode_text, encode_dialogue, find_roles, without_roles

CHAT = Sampling(temp=0.8, top_k=40, top_p=0.9)  # the defaults of `generate_text`

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


class Reply(NamedTuple):
    text: str
    ended: bool  # by <END>, before the limit


class Context(NamedTuple):
    turns: list[str]  # the last one is USER's
    human: str  # what a person answered


def find_contexts(dialogues: Dialogues, count: int, seed: int, longest: int | None = None) -> list[Context]:
    """One context from each of the first `count` dialogues, cut before a reply that the seed picks.

    `longest` is the most turns that a context may have.
    """
    chance = random.Random(seed)
    contexts = []
    for turns in dialogues[:count]:
        place = chance.choice(range(1, min(len(turns), (longest or len(turns)) + 1), 2))
        contexts.append(Context(turns[:place], turns[place]))
    return contexts


@torch.no_grad()
def answer(
    model: Any,
    tokenizer: PreTrainedTokenizerBase,
    contexts: Dialogues,
    sampling: Sampling = CHAT,
    max_t: int = 60,
    seed: int = 0,
    batch_size: int = 64,
) -> list[Reply]:
    """A reply to each of `contexts` (turns, USER's last), of at most `max_t` tokens, drawn by the chat's own sampler.

    Each reply has a random state of its own, so neither the batch nor the caller's random state matters to it, and
    the caller's stays as it is. A reply that has ended leaves its batch.
    """
    roles, was_training = find_roles(tokenizer), model.training
    rows = model.get_output_embeddings().weight.shape[0]
    forbidden = sorted({*tokenizer.all_special_ids, *roles, *range(len(tokenizer), rows)} - {roles.end})
    room = model.config.max_position_embeddings - max_t
    prompts = [[*_newest(encode_dialogue(tokenizer, turns), room), roles.bot] for turns in contexts]
    chance = [torch.Generator().manual_seed(seed * 1_000_003 + index) for index in range(len(prompts))]
    said: list[list[int]] = [[] for _ in prompts]
    spoken = [without_roles(prompt, roles) for prompt in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    model.eval()
    for start in range(0, len(order), batch_size):
        talking = order[start : start + batch_size]
        width = len(prompts[talking[-1]])
        padding = torch.tensor([[width - len(prompts[index])] for index in talking])
        ids = torch.tensor([[0] * (width - len(prompts[index])) + prompts[index] for index in talking])
        mask = (torch.arange(width) >= padding).long()  # (B, width): padding stands on the left
        cache = DynamicCache(config=model.config)
        for _ in range(max_t):
            positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
            logits = model(
                input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
                position_ids=positions.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=1,
            ).logits[:, -1].float().cpu()  # fmt: skip
            for index, row in zip(talking, logits, strict=True):
                choice = candidates(row, sampling, spoken[index] + said[index], forbidden)
                said[index].append(draw(choice, chance[index]))
            going = [place for place, index in enumerate(talking) if said[index][-1] != roles.end]
            if not going:
                break
            if len(going) < len(talking):
                talking, mask = [talking[place] for place in going], mask[going]
                cache.batch_select_indices(torch.tensor(going, device=model.device))
            ids = torch.tensor([[said[index][-1]] for index in talking])
            mask = torch.cat([mask, torch.ones_like(ids)], dim=1)
    model.train(was_training)
    ended = [tokens[-1:] == [roles.end] for tokens in said]
    return [
        Reply(decode_text(tokenizer, tokens[: len(tokens) - done]).strip(), done)
        for tokens, done in zip(said, ended, strict=True)
    ]


def _newest(turns: list[list[int]], room: int) -> list[int]:
    """The newest turns that fit into `room` tokens with the <BOT> that follows, from a turn of USER on."""
    while len(turns) > 2 and sum(map(len, turns)) >= room:
        turns = turns[2:]
    return list(chain.from_iterable(turns))[-room + 1 :]


def converse(model: Any, tokenizer: PreTrainedTokenizerBase, seed: int) -> Dialogues:
    """The model's side of `CONVERSATIONS`, all eight at once."""
    talks: Dialogues = [[] for _ in CONVERSATIONS]
    for messages in zip(*CONVERSATIONS, strict=True):
        talks = [[*turns, message] for turns, message in zip(talks, messages, strict=True)]
        replies = answer(model, tokenizer, talks, max_t=40, seed=seed)
        talks = [[*turns, reply.text] for turns, reply in zip(talks, replies, strict=True)]
    return talks


def words_of(text: str) -> list[str]:
    """ "I'm fine, thanks - and you?" -> ["im", "fine", "thanks", "and", "you"]."""
    words = (fold(word).replace(" ", "") for word in text.split())
    return [word for word in words if word]


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    """["a", "b", "c"], 2 -> [("a", "b"), ("b", "c")]."""
    return list(zip(*(words[start:] for start in range(n)), strict=False))


def measure(replies: list[Reply], known: set[str]) -> Callable[[np.ndarray], dict[str, float]]:
    """Figures of the replies at given indices; words are what white space separates, without case and punctuation.

    distinct-n is the number of different n-grams over the number of all of them (Li et al. 2016, "A
    Diversity-Promoting Objective Function for Neural Conversation Models", section 5.3); it falls with the number
    of replies, so compare equal numbers. A reply repeats in which a 3-gram stands twice, and copies if it is one of
    `known` (folded).
    """
    words = [words_of(reply.text) for reply in replies]
    grams = {n: [ngrams(reply, n) for reply in words] for n in (1, 2)}
    rows = np.array(
        [
            (len(spoken), reply.ended, len(set(threes := ngrams(spoken, 3))) < len(threes), fold(reply.text) in known)
            for reply, spoken in zip(replies, words, strict=True)
        ],
        dtype=float,
    )

    def figures(at: np.ndarray) -> dict[str, float]:
        length, ended, repeats, copies = rows[at].mean(axis=0).tolist()
        distinct = {}
        for n in (1, 2):
            found = list(chain.from_iterable(grams[n][index] for index in at))
            distinct[f"distinct_{n}"] = len(set(found)) / max(1, len(found))
        return {
            **distinct,
            "words": length,
            "share_that_ends": ended,
            "share_that_repeats": repeats,
            "share_that_copies": copies,
        }

    return figures


_SPACED = re.compile(r"\s[’‘'](?=\s|\w{1,2}\b)|[’‘']\s+(?:s|t|m|re|ve|ll|d)\b|\w\s+[.,?!](?:\s|$)")


def check_openers(openers: list[str], replies: list[Reply]) -> dict[str, list[bool]]:
    """Property -> whether each reply to an opener has it. All must hold of any reply, whatever it says."""
    folded = [fold(reply.text) or reply.text for reply in replies]
    often = Counter(folded)
    return {
        "are_not_empty": [bool(reply.text) for reply in replies],
        "end_by_themselves": [reply.ended for reply in replies],
        "show_no_special_token": [not re.search(f"{USER}|{BOT}|{END}|<\\|", reply.text) for reply in replies],
        "are_spaced_as_people_write": [not _SPACED.search(reply.text) for reply in replies],
        "are_not_the_users_own_words": [text != fold(opener) for opener, text in zip(openers, folded, strict=True)],
        "answer_at_most_three_openers": [often[text] <= 3 for text in folded],
    }
