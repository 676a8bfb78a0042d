"""Replies to many contexts at once, drawn as the chat draws them."""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from dialogue import machine
from dialogue.chat.sampling import CHAT, Draft, Sampling
from dialogue.prompt import decode_reply, encode_dialogue, find_roles, never_drawn, without_roles

CACHE_BYTES = 1_500_000_000  # that keys and values of replies drawn side by side may take: 48 of 100 tokens in GPT-2-XL


@dataclass(frozen=True)
class Reply:
    """What was said to one context."""

    text: str
    ended: bool  # by <END>, before the limit
    nats: float = field(default=math.nan, compare=False)  # log p(reply | context) by the model, where it was drawn


def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, contexts: list[list[str]], sampling: Sampling = CHAT,
    max_t: int = 60, seed: int = 0, at_once: int | None = None,
) -> list[Reply]:  # fmt: skip
    """A reply to each of `contexts` (turns, USER's last), of at most `max_t` tokens, drawn by the chat's own sampler.

    Each reply has a random state of its own, so neither the batch nor the caller's random state matters to it, and
    the caller's stays as it is. Side by side are drawn as many replies as `CACHE_BYTES` hold, at most `at_once`, and
    fewer where the device has too little memory.
    """
    return answer_by_each(model, tokenizer, contexts, [sampling], max_t, seed, at_once)[0]


@torch.no_grad()
def answer_by_each(
    model: Any, tokenizer: PreTrainedTokenizerBase, contexts: list[list[str]], samplings: list[Sampling],
    max_t: int = 60, seed: int = 0, at_once: int | None = None, told: Callable[[float], Any] = lambda _: None,
) -> list[list[Reply]]:  # fmt: skip
    """What `answer` says with each of `samplings`, with the same random numbers. A prompt is read once for all.
    `told` hears the share of the replies that have ended."""
    roles, was_training = find_roles(tokenizer), model.training
    room = model.config.max_position_embeddings - max_t
    prompts = [[*_newest(encode_dialogue(tokenizer, turns), room), roles.bot] for turns in contexts]
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    said: dict[tuple[int, int], Draft] = {}
    most = at_once // len(samplings) or 1 if at_once else len(prompts)
    places = CACHE_BYTES // cache_bytes(model.config, model.dtype) // len(samplings)
    model.eval()
    while waiting:
        part = waiting[:most]
        while len(part) > 1 and len(part) * (len(prompts[part[-1]]) + max_t) > places:
            part.pop()  # the last is the longest: one that is long does not make all batches small
        try:
            asked = {index: prompts[index] for index in part}
            for drawn in _side_by_side(model, tokenizer, asked, samplings, max_t, seed):
                ended = sum(draft.tokens[-1] == roles.end for draft in drawn.values())
                told((len(said) + ended) / (len(prompts) * len(samplings)))
            said |= drawn
        except Exception as error:
            if len(part) == 1 or not machine.is_out_of_memory(error):
                raise
            most = len(part) // 2
            machine.release_memory()
            continue
        waiting = waiting[len(part) :]
    model.train(was_training)

    def reply(draft: Draft) -> Reply:
        ended = draft.tokens[-1] == roles.end
        return Reply(decode_reply(tokenizer, draft.tokens[: len(draft.tokens) - ended]), ended, draft.nats)

    return [[reply(said[index, by]) for index in range(len(prompts))] for by in range(len(samplings))]


def _side_by_side(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: dict[int, list[int]], samplings: list[Sampling],
    max_t: int, seed: int,
) -> Iterator[dict[tuple[int, int], Draft]]:  # fmt: skip
    """Prompts of ids by index, shortest first -> what was drawn for each of them by each sampling, so far, after each
    token. A reply that has ended leaves the batch."""
    roles, times = find_roles(tokenizer), len(samplings)
    forbidden = never_drawn(tokenizer, model.get_output_embeddings().weight.shape[0])
    talking = [(index, by) for index in prompts for by in range(times)]
    said = {
        (index, by): Draft(samplings[by], torch.Generator().manual_seed(seed * 1_000_003 + index))
        for index, by in talking
    }
    spoken = {index: without_roles(prompt, roles) for index, prompt in prompts.items()}
    width = max(map(len, prompts.values()))
    padding = torch.tensor([[width - len(prompt)] for prompt in prompts.values()])
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts.values()])
    mask = (torch.arange(width) >= padding).long()  # (B, width): padding stands on the left
    cache = DynamicCache(config=model.config)
    for _ in range(max_t):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        # As an index: a slice of several rows is not in one piece, and a CPU would copy the head for each of them.
        last = torch.tensor([ids.shape[1] - 1], device=model.device)
        logits = model(
            input_ids=ids.to(model.device), attention_mask=mask.to(model.device),
            position_ids=positions.to(model.device), past_key_values=cache, use_cache=True, logits_to_keep=last,
        ).logits[:, -1].float().cpu()  # fmt: skip
        if len(logits) < len(talking):  # the prompts were read
            logits, mask = logits.repeat_interleave(times, 0), mask.repeat_interleave(times, 0)
            cache.batch_repeat_interleave(times)
        for of, row, log_sum in zip(talking, logits, logits.logsumexp(1), strict=True):
            said[of].draw(row, log_sum, spoken[of[0]], forbidden)
        yield said
        going = [place for place, of in enumerate(talking) if said[of].tokens[-1] != roles.end]
        if not going:
            return
        if len(going) < len(talking):
            talking, mask = [talking[place] for place in going], mask[going]
            cache.batch_select_indices(torch.tensor(going, device=model.device))
        ids = torch.tensor([[said[of].tokens[-1]] for of in talking])
        mask = torch.cat([mask, torch.ones_like(ids)], dim=1)


def cache_bytes(config: Any, dtype: torch.dtype) -> int:
    """What keys and values of one token take."""
    heads, queries = getattr(config, "num_key_value_heads", None), config.num_attention_heads
    size = getattr(config, "head_dim", None) or config.hidden_size // queries
    return 2 * dtype.itemsize * config.num_hidden_layers * (heads or queries) * size


def _newest(turns: list[list[int]], room: int) -> list[int]:
    """The newest turns that fit into `room` tokens with the <BOT> that follows, from a turn of USER on."""
    while len(turns) > 2 and sum(map(len, turns)) >= room:
        turns = turns[2:]
    return list(chain.from_iterable(turns))[-room + 1 :]
