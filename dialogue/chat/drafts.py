"""Several replies to one prompt, drawn side by side, and what they would get after another prompt."""

import itertools
from collections.abc import Generator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dialogue.chat.decoder import Decoder
from dialogue.chat.engine import Model
from dialogue.chat.rerank import Candidate, fault, rank
from dialogue.chat.sampling import Draft, Sampling
from dialogue.errors import UserError
from dialogue.prompt import decode_reply, without_roles

AT_ONCE = 512  # tokens whose logits are computed together


def decoder_of(model: Model) -> Decoder:
    """The engine, where it can read several texts at once. Raises UserError where it cannot."""
    if not isinstance(model.engine, Decoder):
        raise UserError("only GPT-2 and Llama models draw several candidates: best_of must be 0 or 1")
    return model.engine


def write(
    model: Model, prompt: list[int], most: int, samplings: Sequence[Sampling], generator: torch.Generator
) -> Generator[list[Draft], None, None]:
    """Draw a reply of up to `most` tokens after `prompt` with each of `samplings`; yields all after each token.

    Each has random numbers of its own, which start from `generator`. Raises UserError as `decoder_of` does, and for
    logits that are not finite numbers.
    """
    decoder, count = decoder_of(model), len(samplings)
    seeds = torch.randint(2**62, (count,), generator=generator).tolist()
    drafts = [Draft(each, torch.Generator().manual_seed(seed)) for each, seed in zip(samplings, seeds, strict=True)]
    spoken, live = without_roles(prompt, model.roles), list(range(count))
    logits = model.logits(prompt).expand(count, -1)
    for step in range(most):
        if step:
            model.tokens_read += len(live)
            logits = decoder.branch([drafts[slot].tokens[-1] for slot in live], live, step - 1, count)
        logits = logits.cpu()
        for slot, row, log_sum in zip(live, logits, logits.logsumexp(1), strict=True):
            drafts[slot].draw(row, log_sum, spoken, model.forbidden)
        yield drafts
        live = [slot for slot in live if drafts[slot].tokens[-1] != model.roles.end]
        if not live:
            return


def log_probabilities(model: Model, prompt: list[int], replies: list[list[int]]) -> list[float]:
    """log p(reply | prompt) in nats of each reply. What the decoder's cache holds stays as it is."""
    found: list[float] = []
    part: list[list[int]] = []
    for reply in [*replies, None]:
        if part and (reply is None or len(prompt) + sum(map(len, [*part, reply])) > AT_ONCE):
            found += _log_probabilities(decoder_of(model), prompt, part)
            part = []
        part += [reply] if reply else []
    return found


class SideBySide(NamedTuple):
    """A prompt once, and replies to it behind each other, each at the positions behind the prompt."""

    ids: list[int]
    positions: list[int]
    sees: Tensor  # (T, T) bool: each token sees the prompt and what is before it in its own reply
    before: list[list[int]]  # of each reply, where each of its tokens was still to come


def side_by_side(prompt: list[int], replies: list[list[int]]) -> SideBySide:
    """Lay the replies out, so that the prompt is read once for all of them."""
    start = len(prompt)
    owner = torch.tensor([-1] * start + [slot for slot, reply in enumerate(replies) for _ in reply])
    ids = prompt + [token for reply in replies for token in reply]
    positions = [*range(start), *(start + place for reply in replies for place in range(len(reply)))]
    sees = ((owner[:, None] == owner) | (owner == -1)).tril_()
    begins = itertools.accumulate(map(len, replies), initial=start)
    before = [[start - 1, *range(at, at + len(reply) - 1)] for at, reply in zip(begins, replies, strict=False)]
    return SideBySide(ids, positions, sees, before)


def _log_probabilities(decoder: Decoder, prompt: list[int], replies: list[list[int]]) -> list[float]:
    row = side_by_side(prompt, replies)
    held = torch.zeros(len(row.ids), decoder.length, dtype=torch.bool)
    places = list(range(decoder.length, decoder.length + len(row.ids)))
    logs = decoder.aside(row.ids, row.positions, places, torch.cat([held, row.sees], dim=1)).log_softmax(-1)
    return [float(logs[at, reply].sum()) for at, reply in zip(row.before, replies, strict=True)]


def ranked(
    model: Model, prompt: list[int], drafts: list[Draft], said: list[str], nothing: list[int]
) -> list[Candidate]:
    """The drafts as candidates, the best first; what was read of it stays in the cache. `said` is what a reply must not
    say again, `nothing` (ids) a message that says nothing."""
    found = []
    for draft in drafts:
        ended = draft.tokens[-1] == model.roles.end
        tokens = draft.tokens[: len(draft.tokens) - ended]
        text = decode_reply(model.tokenizer, tokens)
        found.append(Candidate(tokens, text, draft.nats, temp=draft.sampling.temp, fault=fault(text, said, ended)))
    sound = [place for place, each in enumerate(found) if not each.fault]
    alone = log_probabilities(model, nothing, [drafts[place].tokens for place in sound])
    for place, nats in zip(sound, alone, strict=True):
        found[place] = found[place]._replace(alone=nats)
    best_first = rank(found)
    chosen = found.index(best_first[0])
    decoder_of(model).keep(chosen, len(drafts[chosen].tokens) - 1, len(drafts))
    model.held = prompt + drafts[chosen].tokens
    return best_first
