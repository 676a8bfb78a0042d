"""Replies to many contexts at once, drawn as the chat draws them."""

from itertools import chain
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from dialogue import machine
from dialogue.chat.sampling import CHAT, Sampling, candidates, draw
from dialogue.prompt import decode_reply, encode_dialogue, find_roles, never_drawn, without_roles


class Reply(NamedTuple):
    text: str
    ended: bool  # by <END>, before the limit


@torch.no_grad()
def answer(
    model: Any, tokenizer: PreTrainedTokenizerBase, contexts: list[list[str]], sampling: Sampling = CHAT,
    max_t: int = 60, seed: int = 0, batch_size: int = 64,
) -> list[Reply]:  # fmt: skip
    """A reply to each of `contexts` (turns, USER's last), of at most `max_t` tokens, drawn by the chat's own sampler.

    Each reply has a random state of its own, so neither the batch nor the caller's random state matters to it, and
    the caller's stays as it is. Where the device has too little memory, fewer replies are drawn at once.
    """
    roles, was_training = find_roles(tokenizer), model.training
    room = model.config.max_position_embeddings - max_t
    prompts = [[*_newest(encode_dialogue(tokenizer, turns), room), roles.bot] for turns in contexts]
    waiting = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    said: dict[int, list[int]] = {}
    at_once = batch_size
    model.eval()
    while waiting:
        part = waiting[:at_once]
        try:
            said |= _side_by_side(model, tokenizer, {index: prompts[index] for index in part}, sampling, max_t, seed)
        except Exception as error:
            if at_once == 1 or not machine.is_out_of_memory(error):
                raise
            at_once = len(part) // 2 or 1
            machine.release_memory()
            continue
        waiting = waiting[at_once:]
    model.train(was_training)
    found = []
    for index in range(len(prompts)):
        ended = said[index][-1:] == [roles.end]
        found.append(Reply(decode_reply(tokenizer, said[index][: len(said[index]) - ended]), ended))
    return found


def _side_by_side(
    model: Any, tokenizer: PreTrainedTokenizerBase, prompts: dict[int, list[int]], sampling: Sampling, max_t: int,
    seed: int,
) -> dict[int, list[int]]:  # fmt: skip
    """Prompts of ids by index, shortest first -> drawn ids, <END> included. A reply that has ended leaves the batch."""
    roles = find_roles(tokenizer)
    forbidden = never_drawn(tokenizer, model.get_output_embeddings().weight.shape[0])
    chance = {index: torch.Generator().manual_seed(seed * 1_000_003 + index) for index in prompts}
    said: dict[int, list[int]] = {index: [] for index in prompts}
    spoken = {index: without_roles(prompt, roles) for index, prompt in prompts.items()}
    talking, width = list(prompts), max(map(len, prompts.values()))
    padding = torch.tensor([[width - len(prompt)] for prompt in prompts.values()])
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts.values()])
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
    return said


def _newest(turns: list[list[int]], room: int) -> list[int]:
    """The newest turns that fit into `room` tokens with the <BOT> that follows, from a turn of USER on."""
    while len(turns) > 2 and sum(map(len, turns)) >= room:
        turns = turns[2:]
    return list(chain.from_iterable(turns))[-room + 1 :]
