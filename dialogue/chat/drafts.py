"""Several replies to one prompt, drawn side by side, and what they would get after another prompt."""

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from dialogue.chat.decoder import Decoder
from dialogue.chat.engine import Model, TransformersEngine
from dialogue.chat.rerank import Candidate, fault
from dialogue.chat.sampling import Sampling, candidates, draw
from dialogue.prompt import decode_reply, without_roles

AT_ONCE = 512  # tokens whose logits are computed together


@dataclass
class Draft:
    """A reply that is being drawn."""

    sampling: Sampling
    chance: torch.Generator
    tokens: list[int] = field(default_factory=list)  # <END> among them
    nats: float = 0.0  # their log-probability, by the model alone


def write(
    model: Model, prompt: list[int], most: int, samplings: Sequence[Sampling], generator: torch.Generator
) -> Generator[list[Draft], None, None]:
    """Draw a reply of up to `most` tokens after `prompt` with each of `samplings`; yields all after each token.

    Each has random numbers of its own, which start from `generator`. Engines of transformers make one after the other.
    Raises ValueError for logits that are not finite numbers.
    """
    seeds = torch.randint(2**62, (len(samplings),), generator=generator).tolist()
    drafts = [Draft(each, torch.Generator().manual_seed(seed)) for each, seed in zip(samplings, seeds, strict=True)]
    spoken, first = without_roles(prompt, model.roles), model.logits(prompt)
    engine, count = model.engine, len(drafts)
    if isinstance(engine, Decoder):

        def read(live: list[int], step: int) -> Tensor:
            model.tokens_read += len(live)
            return engine.branch([drafts[slot].tokens[-1] for slot in live], live, step, count)

        yield from _grow(model, drafts, list(range(count)), first, most, spoken, read)
        return

    def again(live: list[int], step: int) -> Tensor:
        return model.logits(prompt + drafts[live[0]].tokens)[None]

    for slot in range(count):
        yield from _grow(model, drafts, [slot], first, most, spoken, again)


def _grow(
    model: Model, drafts: list[Draft], live: list[int], first: Tensor, most: int, spoken: list[int],
    read: Callable[[list[int], int], Tensor],
) -> Generator[list[Draft], None, None]:  # fmt: skip
    """Draw for the drafts `live` until each has its <END>; `first` (V,) are the logits that all begin with."""
    logits = first.expand(len(live), -1)
    for step in range(most):
        logits = logits.cpu()
        log_sums = logits.logsumexp(1)
        for slot, row, log_sum in zip(live, logits, log_sums, strict=True):
            draft = drafts[slot]
            choice = candidates(row, draft.sampling, spoken + draft.tokens, model.forbidden)
            draft.tokens.append(draw(choice, draft.chance))
            draft.nats += float(row[draft.tokens[-1]] - log_sum)
        yield drafts
        live = [slot for slot in live if drafts[slot].tokens[-1] != model.roles.end]
        if not live or step + 1 == most:
            return
        logits = read(live, step)


def log_probabilities(model: Model, prompt: list[int], replies: list[list[int]]) -> list[float]:
    """log p(reply | prompt) in nats of each reply. What the engine's cache holds stays as it is."""
    found: list[float] = []
    part: list[list[int]] = []
    for reply in [*replies, None]:
        if part and (reply is None or len(prompt) + sum(map(len, [*part, reply])) > AT_ONCE):
            found += _log_probabilities(model, prompt, part)
            part = []
        part += [reply] if reply else []
    return found


def _log_probabilities(model: Model, prompt: list[int], replies: list[list[int]]) -> list[float]:
    engine, before = model.engine, len(prompt)
    if isinstance(engine, Decoder):
        # One text with the prompt once, of which each token sees the prompt and what is before it in its own reply.
        owner = torch.tensor([-1] * before + [slot for slot, reply in enumerate(replies) for _ in reply])
        ids = prompt + [token for reply in replies for token in reply]
        positions = [*range(before), *(before + place for reply in replies for place in range(len(reply)))]
        sees = ((owner[:, None] == owner) | (owner == -1)).tril_()
        held = torch.zeros(len(ids), engine.length, dtype=torch.bool)
        places = list(range(engine.length, engine.length + len(ids)))
        logs = engine.aside(ids, positions, places, torch.cat([held, sees], dim=1)).log_softmax(-1)
        found, start = [], before
        for reply in replies:
            at = [before - 1, *range(start, start + len(reply) - 1)]  # where each of its tokens was still to come
            found.append(float(logs[at, reply].sum()))
            start += len(reply)
        return found
    assert isinstance(engine, TransformersEngine)
    width = max(map(len, replies))
    rows = [prompt + reply + [0] * (width - len(reply)) for reply in replies]  # what follows a reply is not seen by it
    with torch.inference_mode():
        logits = engine.model(torch.tensor(rows, device=engine.model.device), use_cache=False).logits
    logs = logits[:, before - 1 :].float().log_softmax(-1)
    return [float(row[torch.arange(len(reply)), reply].sum()) for row, reply in zip(logs, replies, strict=True)]


def candidate(model: Model, draft: Draft, said: list[str]) -> Candidate:
    """A drawn reply, with what is wrong with it; `said` is what it must not say again."""
    ended = draft.tokens[-1] == model.roles.end
    tokens = draft.tokens[: len(draft.tokens) - ended]
    text = decode_reply(model.tokenizer, tokens)
    return Candidate(tokens, text, draft.nats, temp=draft.sampling.temp, fault=fault(text, said, ended))


def keep(model: Model, prompt: list[int], drafts: list[Draft], chosen: int) -> None:
    """Let what was read of the chosen draft stay in the cache, so that the next turn does not read it again."""
    tokens = drafts[chosen].tokens
    if isinstance(model.engine, Decoder):
        model.engine.keep(chosen, len(tokens) - 1, len(drafts))
        model.holds(prompt + tokens)
