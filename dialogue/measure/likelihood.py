"""How likely are human replies? Nats, perplexities, bits, and intervals around any figure."""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from dialogue import machine
from dialogue.data.corpus import words
from dialogue.data.packing import IGNORED, Row, UnlearnedIds, collate, fill_up, in_batches, pack, to_row
from dialogue.measure.loss import head_of, hidden_states, summed_nats
from dialogue.prompt import decode_text, find_roles


class Score(NamedTuple):
    """Likelihood of replies. Every reply token counts, its <END> included; the other speaker's turns and the
    role tokens do not."""

    nats: float
    tokens: int
    words: int  # as `corpus.words` has them, so that models with other tokenizers compare
    characters: int

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    def figures(self) -> dict[str, float]:
        """The score as named numbers; perplexity is exp(nats / n), per token and per word."""
        return {
            "nats_per_token": self.nats_per_token,
            "perplexity": math.exp(min(self.nats_per_token, 700)),
            "word_perplexity": math.exp(min(self.nats / self.words, 700)),
            "bits_per_character": self.nats / math.log(2) / self.characters,
        }


class HeldOut(NamedTuple):
    """Dialogues kept apart: packed rows whose labels are the replies, and how much text those are."""

    rows: list[Row]
    words: int
    characters: int
    pad: int

    @torch.no_grad()
    def score(self, model: nn.Module, batch_size: int) -> Score:
        """The likelihood of the replies under `model`."""
        was_training, head = model.training, head_of(model)
        model.eval()
        nats, tokens = 0.0, 0
        for start in range(0, len(self.rows), batch_size):
            batch = collate(self.rows[start : start + batch_size], self.pad)
            tokens += int((batch["labels"][:, 1:] != IGNORED).sum())
            nats += summed_nats(model, {name: of.to(head.weight.device) for name, of in batch.items()}, head).item()
        model.train(was_training)
        return Score(nats, tokens, self.words, self.characters)

    def score_in_shares(self, model: nn.Module, arguments: TrainingArguments) -> Score:
        """The same, each process scoring its share of the rows; all of them get the whole sum."""
        rows = fill_up(self.rows, arguments.world_size)[arguments.process_index :: arguments.world_size]
        share = self._replace(rows=rows).score(model, arguments.eval_batch_size)
        nats, tokens = map(sum, zip(*machine.gather((share.nats, share.tokens)), strict=True))
        return Score(nats, tokens, self.words, self.characters)


def hold_out(pieces: list[list[list[int]]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> HeldOut:
    """Encoded dialogues -> rows to be scored on the bot's turns."""
    spoken, characters = np.sum([text_size(turns, tokenizer) for turns in pieces], axis=0).tolist()
    return HeldOut(pack(pieces, tokenizer, max_length, "bot"), spoken, characters, tokenizer.pad_token_id)


def text_size(turns: list[list[int]], tokenizer: PreTrainedTokenizerBase) -> tuple[int, int]:
    """Words and characters of an encoded dialogue's replies."""
    replies = [decode_text(tokenizer, turn[1:-1]) for turn in turns[1::2] if not isinstance(turn, UnlearnedIds)]
    return sum(len(words(reply)) for reply in replies), sum(map(len, replies))


def score_each(model: Any, pieces: list[list[list[int]]], tokenizer: PreTrainedTokenizerBase) -> np.ndarray:
    """(dialogues, 4) float64: the four fields of `Score` for each encoded dialogue, in their order."""
    bot = find_roles(tokenizer).bot
    sizes = np.array([text_size(turns, tokenizer) for turns in pieces], dtype=float)
    return np.hstack([nats_of_each(model, [to_row(turns, "bot", bot) for turns in pieces]), sizes])


@torch.no_grad()
def nats_of_each(model: Any, rows: list[Row], batch_tokens: int = 2048) -> np.ndarray:
    """(rows, 2) float64: nats of each row's labels, and how many these are. The head is a plain matrix, as
    `check_loss` in dialogue/train/plan.py makes sure; logits are made where a label is."""
    device = next(model.parameters()).device
    found = np.zeros((len(rows), 2))
    for part in in_batches([len(row["labels"]) for row in rows], batch_tokens):
        batch = {name: values.to(device) for name, values in collate([rows[i] for i in part], 0).items()}
        labels = batch["labels"][:, 1:]
        at = labels != IGNORED
        logits = model.get_output_embeddings()(hidden_states(model, batch)[:, :-1][at])
        nats = torch.zeros(at.shape, device=device)
        nats[at] = torch.nn.functional.cross_entropy(logits.float(), labels[at], reduction="none")
        found[part, 0], found[part, 1] = nats.double().sum(1).tolist(), at.sum(1).tolist()
    return found


class Estimate(NamedTuple):
    """A figure with the ends of its 95 % interval."""

    value: float
    low: float
    high: float


def bootstrap(
    count: int, figures: Callable[[np.ndarray], dict[str, float]], seed: int, resamples: int = 1000
) -> dict[str, Estimate]:
    """Figures of `count` items with 95 % intervals over resamples of the items (Efron and Tibshirani 1993, "An
    Introduction to the Bootstrap", chapter 13).

    `figures` takes the indices of a resample. A resample has items twice, which lowers distinct-n in every one of
    them, so those percentiles are moved until their mean is the figure itself.
    """
    generator = np.random.default_rng(seed)
    values = figures(np.arange(count))
    drawn = [figures(generator.integers(count, size=count)) for _ in range(resamples)]
    estimates = {}
    for name, value in values.items():
        sample = np.array([one[name] for one in drawn])
        shift = value - sample.mean() if name.startswith("distinct") else 0
        low, high = (np.quantile(sample, [0.025, 0.975]) + shift).tolist()
        estimates[name] = Estimate(value, low, high)
    return estimates
