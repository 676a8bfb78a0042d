"""How good is it: the likelihood of human replies."""

import math
from typing import NamedTuple

import torch
from torch import nn
from transformers import PreTrainedTokenizerBase, TrainingArguments

from dialogue.packing import IGNORED, Row, collate, pack
from dialogue.prompt import decode_text


class Score(NamedTuple):
    """Likelihood of the replies of a split. Every reply token counts, its <END> included; the other
    speaker's turns and the role tokens do not."""

    nats: float
    tokens: int
    words: int  # separated by white space, so that models with other tokenizers compare

    @property
    def nats_per_token(self) -> float:
        return self.nats / self.tokens

    def figures(self) -> dict[str, float]:
        """The score as named numbers; perplexity is exp(nats / n), per token and per word."""
        return {
            "nats_per_token": self.nats_per_token,
            "perplexity": math.exp(min(self.nats_per_token, 700)),
            "word_perplexity": math.exp(min(self.nats / self.words, 700)),
        }


class HeldOut(NamedTuple):
    """Dialogues kept apart: packed rows whose labels are the replies, and how many words those have."""

    rows: list[Row]
    words: int
    pad: int

    @torch.no_grad()
    def score(self, model: nn.Module, batch_size: int) -> Score:
        """The likelihood of the replies under `model`, whose `.loss` is the mean over a batch's labels."""
        was_training = model.training
        model.eval()
        device = next(model.parameters()).device
        nats, tokens = 0.0, 0
        for start in range(0, len(self.rows), batch_size):
            batch = collate(self.rows[start : start + batch_size], self.pad)
            labelled = int((batch["labels"][:, 1:] != IGNORED).sum())
            loss = model(**{name: values.to(device) for name, values in batch.items()}, use_cache=False).loss
            nats += loss.item() * labelled
            tokens += labelled
        model.train(was_training)
        return Score(nats, tokens, self.words)

    def score_in_shares(self, model: nn.Module, arguments: TrainingArguments) -> Score:
        """The same, each process scoring its share of the rows; all of them get the whole sum."""
        batch_size, processes = arguments.eval_batch_size, arguments.world_size
        if processes == 1:
            return self.score(model, batch_size)
        share = self._replace(rows=self.rows[arguments.process_index :: processes]).score(model, batch_size)
        sums = torch.tensor([share.nats, share.tokens], dtype=torch.float64, device=next(model.parameters()).device)
        torch.distributed.all_reduce(sums)
        return Score(sums[0].item(), int(sums[1]), self.words)


def hold_out(pieces: list[list[list[int]]], tokenizer: PreTrainedTokenizerBase, max_length: int) -> HeldOut:
    """Encoded dialogues -> rows to be scored on the bot's turns."""
    words = sum(len(decode_text(tokenizer, turn[1:-1]).split()) for turns in pieces for turn in turns[1::2])
    return HeldOut(pack(pieces, tokenizer, max_length, "bot"), words, tokenizer.pad_token_id)
