"""What a run trains on and is measured with: dialogues as rows of token ids."""

from collections.abc import Sequence
from typing import NamedTuple

from transformers import PreTrainedTokenizerBase

from dialogue import models
from dialogue.data import packing
from dialogue.data.corpus import Corpus, own_openers
from dialogue.errors import UserError
from dialogue.measure.likelihood import HeldOut, hold_out
from dialogue.prompt import find_roles
from dialogue.train import teach
from dialogue.train.options import Run

CERTIFIED = 60  # validation dialogues of the certificate: chance moves their perplexity by a tenth of a percent
SHOWN = 8  # conversations of the model card


class Rows(NamedTuple):
    """A corpus, encoded."""

    train: list[packing.Row]  # packed
    held_out: HeldOut
    certificate: list[packing.Row]  # one dialogue each, labels on the bot's turns
    length: int  # tokens of a row, at most
    dialogues: int  # in `train`
    notes: list[str]  # what was cut or skipped
    validation: list[list[list[int]]]  # the dialogues of `held_out`
    openers: tuple[str, ...] = ()  # what samples and model card ask, of own data
    lessons: Sequence[list[str]] = ()  # dialogues whose last reply is taught; they stand in `train` too

    def with_less_held_out(self, share: float, tokenizer: PreTrainedTokenizerBase) -> "Rows":
        """Only the first `share` of the held-out dialogues, at least one; all of them from 1 on."""
        if share >= 1:
            return self
        kept = self.validation[: max(1, int(share * len(self.validation)))]
        return self._replace(held_out=hold_out(kept, tokenizer, self.length), validation=kept)


def prepare(corpus: Corpus, tokenizer: PreTrainedTokenizerBase, run: Run) -> Rows:
    """Encode and pack what `run` asks for of `corpus`. Raises UserError where nothing fits into a row. A tenth as many
    validation dialogues as training dialogues are held out, a hundred at least."""
    length = min(run.max_length, models.context_length(models.load_config(run.base_model)))
    train, notes = packing.encode(tokenizer, corpus.train[: run.max_train_dialogues], length)
    validation, _ = packing.encode(tokenizer, corpus.validation[: max(100, len(train) // 10)], length)
    if not train or not validation:
        raise UserError(f"no dialogue of {run.dataset} fits into {length} tokens: raise --max_length")
    bot = find_roles(tokenizer).bot
    lessons = teach.read_lessons() if run.teach else ()
    packed = packing.pack(train, tokenizer, length, "bot" if lessons else run.learn)
    if lessons:
        packed = teach.mix(lessons, packed, tokenizer, length, run.arguments.seed)
    return Rows(
        packed,
        hold_out(validation, tokenizer, length),
        [packing.to_row(piece, "bot", bot) for piece in validation[:CERTIFIED]],
        length, len(train), notes, validation, own_openers(corpus, SHOWN), lessons,
    )  # fmt: skip
