"""Logits in, token out: repetition penalty -> temperature -> top-k -> top-p -> min-p -> one draw.

Order, kept sets and probabilities are those of transformers' logits processors and warpers (source:
`transformers/generation/logits_process.py`, and `_get_logits_processor` for the order). Pure functions on
tensors; nothing here knows a model or a tokenizer, or changes the logits that it is given.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dialogue.errors import UserError

RANGES = {
    "temp": (0, 100),
    "top_k": (0, 10**9),
    "top_p": (0, 1),
    "min_p": (0, 1),
    "repetition_penalty": (0.01, 100),
}


@dataclass(frozen=True)
class Sampling:
    """How a token is drawn; as it stands here, from the model's own distribution.

    Raises UserError for a value out of range.
    """

    temp: float = 1.0  # divides the logits; 0: always the most probable token
    top_k: int = 0  # keep the so many most probable tokens; 0: all
    top_p: float = 1.0  # keep the most probable tokens that hold this share of the probability
    min_p: float = 0.0  # drop what is less than this share as probable as the best
    repetition_penalty: float = 1.0  # above 1: tokens that were there already become less probable

    def __post_init__(self) -> None:
        for name, (low, high) in RANGES.items():
            value = getattr(self, name)
            if not isinstance(value, (int, float)) or not low <= value <= high:
                raise UserError(f"{name} must be a number between {low} and {high}, not {value}")
        if self.top_k != int(self.top_k):
            raise UserError(f"top_k must be a whole number, not {self.top_k}")
        if 0 < self.temp < 0.001:  # logits / temp would leave the range of float32
            raise UserError(f"temp must be 0, or at least 0.001, not {self.temp}")


CHAT = Sampling(temp=0.8, top_k=40, top_p=0.9)  # the defaults of `generate_text`


class Candidates(NamedTuple):
    """What may be drawn: token ids (N,) int64 and their probabilities (N,) float32, which sum to 1."""

    ids: Tensor
    probabilities: Tensor

    def probability(self, token: int) -> float:
        """Of one token; 0 for one that was removed."""
        return float(self.probabilities[self.ids == token].sum())


def penalise(logits: Tensor, seen: Sequence[int], penalty: float) -> Tensor:
    """(V,) -> (V,): logits of the ids in `seen` divided by `penalty` where positive, else multiplied
    (Keskar et al. 2019, "CTRL", section 4.1)."""
    if penalty == 1 or not seen:
        return logits
    ids = torch.tensor(sorted(set(seen)), device=logits.device)
    values = logits[ids]
    return logits.scatter(0, ids, torch.where(values > 0, values / penalty, values * penalty))


def candidates(
    logits: Tensor, sampling: Sampling, seen: Sequence[int] = (), forbidden: Sequence[int] = ()
) -> Candidates:
    """(V,) -> the tokens that may be drawn: none of `forbidden`, those in `seen` penalised.

    Top-k keeps the k largest and what equals the last of them. Top-p keeps the smallest set that holds this
    share of the probability, at least one token; of equal ones, those with the higher ids stay (Holtzman et
    al. 2020, "The Curious Case of Neural Text Degeneration"). Min-p is relative to the best token (Nguyen
    et al. 2024, "Turning Up the Heat").
    Raises UserError for logits that are not numbers.
    """
    logits = penalise(logits.float(), seen, sampling.repetition_penalty)
    logits = logits.index_fill(0, torch.tensor(forbidden, dtype=torch.long, device=logits.device), -torch.inf)
    k = int(sampling.top_k) if sampling.temp else 1
    best = logits.topk(k + 1 if 0 < k < len(logits) else 1)
    values = best.values.tolist()
    if not math.isfinite(values[0]):  # NaN where any is NaN
        raise UserError("the model's logits are not finite numbers: its weights are broken")
    if len(values) == 1:
        ids = torch.arange(len(logits), device=logits.device)
    elif values[-2] > values[-1]:
        ids = best.indices[:-1].sort().values
    else:
        ids = (logits >= values[-2]).nonzero()[:, 0]
    kept = logits[ids]
    if sampling.temp == 0:
        return Candidates(ids[:1], torch.ones(1, device=logits.device))
    kept = kept / sampling.temp
    if sampling.top_p < 1:
        # Ascending, so that what is dropped is a prefix: the sum up to a token, itself included, is at most
        # 1 - top_p. [0.1, 0.2, 0.7] with 0.8: sums [0.1, 0.3, 1.0], and the first is dropped.
        ascending, order = kept.sort(stable=True)
        keep = ascending.softmax(0).cumsum(0) > 1 - sampling.top_p
        keep[-1] = True
        ids, kept = ids[order[keep]], ascending[keep]
    probabilities = kept.softmax(0)
    if sampling.min_p:
        likely = probabilities >= probabilities.max() * sampling.min_p
        ids, probabilities = ids[likely], kept[likely].softmax(0)
    return Candidates(ids, probabilities)


def draw(choice: Candidates, generator: torch.Generator | None = None) -> int:
    """One token id. `generator` lives on the CPU, so that a seed means the same on every device."""
    place = int(torch.multinomial(choice.probabilities.cpu(), 1, generator=generator))
    return int(choice.ids[place])


@dataclass
class Draft:
    """A reply that is being drawn."""

    sampling: Sampling
    chance: torch.Generator
    tokens: list[int] = field(default_factory=list)
    nats: float = 0.0  # their log-probability, by the model alone

    def draw(self, logits: Tensor, log_sum: Tensor, spoken: list[int], forbidden: Sequence[int]) -> int:
        """The next token, from logits (V,) whose `logsumexp` is given. `spoken` was said before the reply."""
        choice = candidates(logits, self.sampling, spoken + self.tokens, forbidden)
        self.tokens.append(draw(choice, self.chance))
        self.nats += float(logits[self.tokens[-1]] - log_sum)
        return self.tokens[-1]


class Explained(NamedTuple):
    """How one token came to be drawn. Counts are of tokens with any probability at all."""

    token: int
    rank: int  # 1: the model's first choice
    probability: float  # by the model alone
    tempered: float  # after repetition penalty and temperature
    drawn: float  # after the cuts; 0: it could not have been drawn
    removed: dict[str, int]  # tokens that temp, top_k, top_p and min_p removed, each from what was left


def explain(
    logits: Tensor, token: int, sampling: Sampling, seen: Sequence[int] = (), forbidden: Sequence[int] = ()
) -> Explained:
    """What `candidates` makes of `logits` (V,), step by step, seen from one `token`."""
    alone = candidates(logits, Sampling(), forbidden=forbidden)
    left, removed, tempered = int((alone.probabilities > 0).sum()), {}, 0.0
    choice = alone
    settings: dict[str, Any] = {"repetition_penalty": sampling.repetition_penalty}
    for name in ("temp", "top_k", "top_p", "min_p"):
        settings[name] = getattr(sampling, name)
        choice = candidates(logits, Sampling(**settings), seen, forbidden)
        count = min(left, len(choice.ids))  # without a cut, tokens of probability 0 are among them
        removed[name], left = left - count, count
        if name == "temp":
            tempered = choice.probability(token)
    probability = alone.probability(token)
    rank = 1 + int((alone.probabilities > probability).sum())
    return Explained(token, rank, probability, tempered, choice.probability(token), removed)
