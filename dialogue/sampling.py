"""Logits in, token out: repetition penalty -> temperature -> top-k -> top-p -> min-p -> one draw.

The order, the kept sets and the probabilities are those of transformers' logits warpers. Nothing here
changes the logits it is given.
"""

from typing import NamedTuple

import torch
from torch import Tensor


class Candidates(NamedTuple):
    """What may be drawn: token ids (N,) int64 and their probabilities (N,) float32, which sum to 1."""

    ids: Tensor
    probabilities: Tensor


def penalise(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """(V,) -> (V,): logits of the ids `seen` (N,) divided by `penalty` where positive, else multiplied
    (Keskar et al. 2019, "CTRL", section 4.1)."""
    if penalty == 1 or not len(seen):
        return logits
    values = logits[seen]
    return logits.scatter(0, seen, torch.where(values > 0, values / penalty, values * penalty))


def candidates(logits: Tensor, temp: float, top_k: int, top_p: float, min_p: float = 0.0) -> Candidates:
    """(V,) -> what is left of it, most of it usually nothing.

    `temp` divides the logits; 0 keeps the most probable token alone. `top_k` keeps the k largest and their
    ties; 0 keeps all. `top_p` keeps the smallest set that holds this share of the probability (Holtzman et
    al. 2020, "The Curious Case of Neural Text Degeneration"), at least one token. `min_p` keeps what is at
    least this share as probable as the best. Raises ValueError for logits that are not numbers.
    """
    logits = logits.float()
    if logits.isnan().any() or logits.isposinf().any() or logits.isneginf().all():
        raise ValueError("the model's logits are not finite numbers: its weights are broken")
    if temp == 0:
        return Candidates(logits.argmax()[None], torch.ones(1, device=logits.device))
    logits = logits / temp
    if top_k:
        smallest = logits.topk(min(top_k, len(logits))).values[-1]
        ids = (logits >= smallest).nonzero()[:, 0]
    else:
        ids = torch.arange(len(logits), device=logits.device)
    kept = logits[ids]
    if top_p < 1:
        # Ascending, so that what is dropped is a prefix: the sum up to a token, itself included, is at most
        # 1 - top_p. [0.1, 0.2, 0.7] with 0.8: sums [0.1, 0.3, 1.0], and the first is dropped.
        ascending, order = kept.sort()
        keep = ascending.softmax(0).cumsum(0) > 1 - top_p
        keep[-1] = True
        ids, kept = ids[order[keep]], ascending[keep]
    probabilities = kept.softmax(0)
    if min_p:
        keep = probabilities >= min_p * probabilities.max()
        ids, probabilities = ids[keep], kept[keep].softmax(0)
    return Candidates(ids, probabilities)


def draw(choice: Candidates, generator: torch.Generator | None = None) -> int:
    """One token id."""
    return int(choice.ids[torch.multinomial(choice.probabilities, 1, generator=generator)])
