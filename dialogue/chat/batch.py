"""Replies to many contexts at once, drawn as the chat draws them."""

from itertools import chain
from typing import Any, NamedTuple

import torch
from transformers import DynamicCache, PreTrainedTokenizerBase

from dialogue.chat.sampling import Sampling, candidates, draw
from dialogue.prompt import decode_text, encode_dialogue, find_roles, without_roles

CHAT = Sampling(temp=0.8, top_k=40, top_p=0.9)  # the defaults of `generate_text`


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
