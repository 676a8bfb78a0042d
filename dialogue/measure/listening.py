"""Does what the model says fit what was said? Choices among 20, after Lowe et al. 2015, "The Ubuntu Dialogue Corpus".

Two questions, both answered by likelihoods alone:

- Does the model know which reply belongs to a context: that of the person who answered, or one of 19 others'?
- Does another model, the judge, find the context that a reply was made for among 20?

Plain log p(reply | context) prefers what fits everywhere, so what a reply gets anyway is taken off it: log p(reply) in
Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models", section 4.1.
"""

import itertools
import math
from collections.abc import Callable, Container
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import numpy as np
import torch
from transformers import PreTrainedTokenizerBase

from dialogue.chat.batch import CHAT, Reply, answer
from dialogue.chat.drafts import SideBySide, side_by_side
from dialogue.chat.rerank import LAMBDA, NOTHING
from dialogue.chat.sampling import Sampling
from dialogue.data.corpus import Dialogues
from dialogue.data.packing import IGNORED, Row, in_batches
from dialogue.measure.likelihood import Estimate, bootstrap, nats_of_each
from dialogue.measure.loss import hidden_states
from dialogue.measure.replies import Context, measure
from dialogue.models import context_length
from dialogue.prompt import encode_dialogue, encode_text, find_roles

CHOICES = 20
LONGEST = 7  # turns of a context, at most
TOKENS = 768  # that are read at once, but for a context and one reply that are longer
TIED = 1e-3  # nats: what differs by less is equally likely, rounding apart

Lent = dict[str, Callable[[], AbstractContextManager[Any]]]  # who -> what lends their model, one at a time


class Format(NamedTuple):
    """How a model reads: turns (USER's last) -> ids up to where the reply begins; a reply -> its ids and its end."""

    prompt: Callable[[list[str]], list[int]]
    reply: Callable[[str], list[int]]


def our_format(tokenizer: PreTrainedTokenizerBase) -> Format:
    """`<USER>` message `<END>` `<BOT>` reply `<END>`."""
    roles = find_roles(tokenizer)
    return Format(
        lambda turns: [token for turn in encode_dialogue(tokenizer, turns) for token in turn] + [roles.bot],
        lambda text: [*encode_text(tokenizer, text), roles.end],
    )


def judge_format(base: PreTrainedTokenizerBase, tokenizer: PreTrainedTokenizerBase) -> Format:
    """The format that the untuned base, whose own tokenizer is `base`, was made for; ours where it has none.

    Both formats are read by one model: the role tokens of `tokenizer` are added behind the base's own tokens.
    """
    if not base.chat_template:
        return our_format(tokenizer)

    def prompt(turns: list[str]) -> list[int]:
        messages = [{"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns)]
        encoded: Any = base.apply_chat_template(messages, add_generation_prompt=True)
        return encoded["input_ids"]

    return Format(prompt, lambda text: [*encode_text(base, text), base.eos_token_id])


@torch.no_grad()
def score_replies(
    model: Any, style: Format, contexts: Dialogues, replies: list[str], wanted: list[list[int]]
) -> list[np.ndarray]:
    """For each context, log p(reply | context) in nats of the replies whose indices are `wanted` for it, float64.
    Replies share a row, in which their context is read once; the model has to take a mask for each row."""
    was_training, room = model.training, context_length(model.config)
    model.eval()
    said = [style.reply(text)[: room // 2] for text in replies]
    rows: list[tuple[int, int, list[int]]] = []  # length, context, replies
    prompts = [style.prompt(turns)[-(room // 2) :] for turns in contexts]
    for number, (prompt, indices) in enumerate(zip(prompts, wanted, strict=True)):
        part, length = list[int](), len(prompt)
        for index in indices:
            if part and length + len(said[index]) > TOKENS:
                rows.append((length, number, part))
                part, length = [], len(prompt)
            part, length = [*part, index], length + len(said[index])
        rows += [(length, number, part)] if part else []
    scores: dict[tuple[int, int], float] = {}
    for places in in_batches([length for length, *_ in rows], TOKENS):
        batch = [rows[place] for place in places]
        laid_out = [side_by_side(prompts[number], [said[index] for index in part]) for _, number, part in batch]
        for (_, number, part), nats in zip(batch, _score_rows(model, laid_out), strict=True):
            scores |= {(number, index): score for index, score in zip(part, nats, strict=True)}
    model.train(was_training)
    return [np.array([scores[number, index] for index in indices]) for number, indices in enumerate(wanted)]


def _score_rows(model: Any, rows: list[SideBySide]) -> list[list[float]]:
    """Log-probabilities, in nats, of the replies in each row."""
    device, width = model.device, max(len(row.ids) for row in rows)
    ids, positions = torch.zeros(2, len(rows), width, dtype=torch.long)
    sees = torch.eye(width, dtype=torch.bool).repeat(len(rows), 1, 1)  # padding sees itself: a mean of nothing is NaN
    places, targets = [], []
    for number, row in enumerate(rows):
        size, start = len(row.ids), row.before[0][0] + 1
        ids[number, :size], positions[number, :size] = torch.tensor(row.ids), torch.tensor(row.positions)
        sees[number, :size, :size] = row.sees
        places += [number * width + place for reply in row.before for place in reply]
        targets += row.ids[start:]
    mask = torch.zeros(sees.shape, dtype=model.dtype).masked_fill(~sees, torch.finfo(model.dtype).min)
    inputs = {"input_ids": ids.to(device), "position_ids": positions.to(device)}
    hidden = hidden_states(model, inputs, mask.to(device)[:, None]).flatten(0, 1)
    logits = model.get_output_embeddings()(hidden[places]).float()
    nats = -torch.nn.functional.cross_entropy(logits, torch.tensor(targets, device=device), reduction="none").double()
    of_each = iter(nats.split([len(reply) for row in rows for reply in row.before]))
    return [[next(of_each).sum().item() for _ in row.before] for row in rows]


def deal(count: int, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """For each of `count` items: (N, 20) itself and then 19 others, and (N,) one that is not among these.

    The items lie in a ring in an order that the seed draws, so each is drawn equally often.
    """
    order = np.random.default_rng(seed).permutation(count)
    place = order.argsort()[:, None]
    return order[(place + np.arange(min(CHOICES, count))) % count], order[(place[:, 0] + count // 2) % count]


def first_is_best(scores: np.ndarray) -> np.ndarray:
    """(N, K) -> (N,): 1 where the first of K is the likeliest, 1/n where it is one of n equals, else 0."""
    best = scores >= scores.max(axis=1, keepdims=True) - TIED
    return best[:, 0] / best.sum(axis=1)


def true_replies(
    model: Any, tokenizer: PreTrainedTokenizerBase, contexts: list[Context], seed: int, control: bool = False
) -> dict[str, np.ndarray]:
    """Figure -> (N,) for each context, whether the model finds its true reply among 20: 1, 0, or its share of a tie.

    With `control` the same choices once more behind contexts that belong to none of them: this has to be chance.
    """
    style, (drawn, other) = our_format(tokenizer), deal(len(contexts), seed)
    turns, replies = [context.turns for context in contexts], [context.human for context in contexts]

    def scored(read: Dialogues) -> np.ndarray:
        return np.array(score_replies(model, style, read, replies, drawn.tolist()))

    scores = scored(turns)
    # Of fewer contexts too few others are left.
    anyway = elsewhere(scores, drawn) if len(contexts) >= 10 else _without_context(model, style, replies)[drawn]
    found = {
        "share_of_true_replies_found": first_is_best(scores - anyway),
        "share_found_by_probability": first_is_best(scores),
    }
    if control:
        found["share_found_after_other_contexts"] = first_is_best(scored([turns[index] for index in other]) - anyway)
    return found


def elsewhere(scores: np.ndarray, drawn: np.ndarray) -> np.ndarray:
    """(N, 20): of the replies `drawn` (N, 20) for each context, whose log-probabilities there are `scores` (N, 20), the
    log of the mean probability after all other contexts that they were drawn for, save their own. That is what a reply
    gets anyway: it finds more true replies than one message that says nothing (docs/measured.md).
    """
    count = len(scores)
    table = np.full((count, count), -np.inf)  # contexts x replies
    np.put_along_axis(table, drawn, scores, 1)
    np.fill_diagonal(table, -np.inf)
    others = table[:, drawn]  # contexts x (N, 20)
    others[np.arange(count), np.arange(count)] = -np.inf
    return np.logaddexp.reduce(others, axis=0) - np.log(np.isfinite(others).sum(axis=0))


def mutual_information(
    model: Any, tokenizer: PreTrainedTokenizerBase, contexts: Dialogues, replies: list[list[Reply]]
) -> np.ndarray:
    """(M, N): log p(reply | context) - `LAMBDA` log p(reply | nothing), in nats a token, of M times replies to each of
    N contexts. The first is what a reply got when it was drawn, where it was.

    By this the chat chooses among candidates. It falls where replies get wild, and where they fit everywhere.
    """
    style, room, roles = our_format(tokenizer), context_length(model.config) // 2, find_roles(tokenizer)

    def score(turns: list[str], reply: Reply) -> Row:
        prompt, said = style.prompt(turns)[-room:], [*encode_text(tokenizer, reply.text), *[roles.end] * reply.ended]
        ids = prompt + (said or [roles.end])[:room]
        labels = [IGNORED] * len(prompt) + ids[len(prompt) :]
        return {"input_ids": ids, "labels": labels, "position_ids": list(range(len(ids)))}

    said, was_training = list(itertools.chain(*replies)), model.training
    model.eval()
    alone, lengths = nats_of_each(model, [score([NOTHING], reply) for reply in said]).T
    asked = [turns for _ in replies for turns in contexts]
    missing = [place for place, reply in enumerate(said) if math.isnan(reply.nats)]
    given = np.array([reply.nats for reply in said])
    given[missing] = -nats_of_each(model, [score(asked[place], said[place]) for place in missing])[:, 0]
    model.train(was_training)
    return ((given + LAMBDA * alone) / lengths).reshape(len(replies), -1)


def _without_context(model: Any, style: Format, replies: list[str]) -> np.ndarray:
    """(N,) nats: log p of each reply after a message that says nothing."""
    return score_replies(model, style, [[NOTHING]], replies, [list(range(len(replies)))])[0]


def fit_of_replies(
    judge: Any, style: Format, contexts: Dialogues, said: dict[str, list[str]], seed: int
) -> dict[str, np.ndarray]:
    """Who -> (N,) for each of their replies to `contexts`, whether `judge` finds its context among 20."""
    (drawn, _), count = deal(len(contexts), seed), len(contexts)
    texts = [text for replies in said.values() for text in replies]
    asked = [np.flatnonzero((drawn == number).any(axis=1)).tolist() for number in range(count)]
    wanted = [[start + index for start in range(0, len(texts), count) for index in each] for each in asked]
    table = np.full((len(texts), count), -np.inf)
    for number, scores in enumerate(score_replies(judge, style, contexts, texts, wanted)):
        table[wanted[number], number] = scores
    parts = np.split(table, len(said))
    return {who: first_is_best(np.take_along_axis(part, drawn, 1)) for who, part in zip(said, parts, strict=True)}


def compare(
    models: Lent, tokenizer: PreTrainedTokenizerBase, base: PreTrainedTokenizerBase, contexts: list[Context],
    sampling: Sampling = CHAT, max_t: int = 60, seed: int = 0, known: Container[str] = (), control: bool = True,
) -> dict[str, dict[str, Estimate]]:  # fmt: skip
    """Who ("base", "tuned", "people") -> figures of how each hears and answers `contexts`.

    `models` lend "tuned" and "base", one at a time; `base` is the untuned base's own tokenizer, and its model the
    judge. `known` are training's turns, folded.
    """
    turns, found = [context.turns for context in contexts], {}
    said = {"people": [Reply(context.human, True) for context in contexts]}
    for who in ("tuned", "base"):  # the judge comes last: by then all replies are there
        with models[who]() as model:
            found[who] = true_replies(model, tokenizer, contexts, seed, control)
            said[who] = answer(model, tokenizer, turns, sampling, max_t, seed)
            if who == "base":
                texts = {name: [reply.text for reply in replies] for name, replies in said.items()}
                fit = fit_of_replies(model, judge_format(base, tokenizer), turns, texts, seed)
    return {
        who: {
            **shares({**found.get(who, {}), "share_of_replies_that_fit": fit[who]}, seed),
            **bootstrap(len(turns), measure(said[who], [asked[-1] for asked in turns], known), seed),
        }
        for who in ("base", "tuned", "people")
    }


def shares(found: dict[str, np.ndarray], seed: int) -> dict[str, Estimate]:
    """The means of (N,) values each, with their intervals."""
    count = len(next(iter(found.values())))
    return bootstrap(count, lambda at: {name: float(values[at].mean()) for name, values in found.items()}, seed)
