"""A dialogue model that can be asked for its next token: loading, and the key-value cache."""

import gc
import sys
import threading
from collections.abc import Generator, Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dialogue import machine
from dialogue.chat import merged
from dialogue.chat.cuda_graph import GraphDecoder, difference
from dialogue.chat.decoder import Decoder
from dialogue.chat.families import supported
from dialogue.chat.sampling import Sampling, candidates, draw
from dialogue.errors import UserError, in_a_line
from dialogue.prompt import find_roles, never_drawn, without_roles

# transformers takes seconds to import, and a merged model on a CPU is read without it.
if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from dialogue.chat.transformers_engine import TransformersEngine

    Engine = Decoder | TransformersEngine


class Model:
    """An engine with its tokenizer, and what the engine has read."""

    def __init__(self, engine: "Engine", tokenizer: Any, limit: int) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.limit = limit  # tokens that the model can see at once
        self.roles = find_roles(tokenizer)
        self.forbidden: list[int] = []  # ids that are never to be drawn; known with the first logits
        self.tokens_read = 0  # that ever went through the engine
        self.held: list[int] = []  # the cache holds the first `engine.length` of these
        self._busy, self._user = threading.Lock(), 0  # the thread that has the engine now

    @property
    def quick_candidates(self) -> int:
        """Replies that can be drawn side by side in a second or two: 8 on a CPU, for a model of a billion parameters 4;
        1 where another engine draws them (on a GPU this was not tried)."""
        if type(self.engine) is not Decoder:
            return 1
        return 8 if self.engine.parameters < 1_000_000_000 else 4

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Inside, other threads wait for the engine; this very thread would wait for itself: RuntimeError."""
        for _ in range(2):
            if not (self._busy.locked() and self._user == threading.get_ident()):
                break
            gc.collect()  # closes a reply that a second Ctrl-C cut anywhere
        else:
            raise RuntimeError("a reply of this model is not finished: read it to its end, or close it, first")
        with self._busy:
            self._user = threading.get_ident()
            try:
                yield
            finally:
                self._user = 0

    def logits(self, ids: list[int]) -> Tensor:
        """Logits (V,) after `ids`; what the cache holds of them already is not read again."""
        assert len(ids) <= self.limit, f"{len(ids)} tokens for a context of {self.limit}"
        common = min(self.engine.length, len(ids) - 1)
        while ids[:common] != self.held[:common]:
            common -= 1
        self.engine.truncate(common)
        new = ids[self.engine.length :]
        self.held = list(ids)
        logits = self.engine.step(new)
        self.tokens_read += len(new)
        self.forbidden = self.forbidden or never_drawn(self.tokenizer, len(logits))
        return logits

    def tokens(
        self, prompt: list[int], most: int, sampling: Sampling, generator: torch.Generator
    ) -> Generator[int, None, None]:
        """Draw up to `most` tokens after `prompt`, without an end at <END>: the caller stops there.

        Raises UserError for logits that are not finite numbers.
        """
        said: list[int] = []
        spoken = without_roles(prompt, self.roles)
        if isinstance(self.engine, GraphDecoder):
            logits = self.logits(prompt)
            for token in self.engine.stream(logits, most, sampling, spoken, self.forbidden, generator):
                self.tokens_read += len(said) > 0
                said.append(token)
                self.held.append(token)
                yield token
            return
        while len(said) < most:
            logits = self.logits(prompt + said)
            said.append(draw(candidates(logits, sampling, spoken + said, self.forbidden), generator))
            yield said[-1]


def load(name: str, precision: str = "auto", device: str | None = None) -> Model:
    """A merged model's folder, an adapter's folder (merged on loading), or a name on the hub.

    `precision` is "int8" or "float32"; "auto" takes the fastest of full quality on `device` (None: the best there is).
    Raises UserError, one line, for anything that is no dialogue model, and for a precision that is not to be had.
    """
    where, dtype = torch.device(device) if device else machine.pick_device(), None
    if precision == "float32":
        dtype = torch.float32
    machine.stay_on(where)
    for note in [] if device else machine.gpu_notes():
        print(note, file=sys.stderr)
    with suppress(Exception):  # whatever is wrong with the folder, `models` says it in words
        if where.type == "cpu" and (found := merged.read(name, dtype)):
            parts, tokenizer, limit = found
            return Model(Decoder(parts, "int8" if precision == "auto" else precision, limit), tokenizer, limit)
    import transformers

    from dialogue import models

    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model, its_tokenizer = models.load(name, dtype, where)
    limit = models.context_length(model.config)
    return Model(make(model, precision, limit), its_tokenizer, limit)


def make(model: "PreTrainedModel", precision: str, limit: int) -> "Engine":
    """The fastest engine that this model and its device can have, for up to `limit` tokens; `precision` as for `load`.

    On a CPU "auto" is int8 by rule: a measurement would give a seed other weights on a busy machine. On CUDA it is
    float16 where the weights are stored so, since bfloat16 drops three of their bits at the same speed.
    `model` itself takes its engine's dtype, but for those on a CPU. Raises UserError as `load` does.
    """
    if model.device.type == "cpu" and supported(model.config):
        return Decoder(model, "int8" if precision == "auto" else precision, limit)
    if precision == "int8":
        raise UserError("--precision int8 is for GPT-2 and Llama models on a CPU: take auto")
    if precision == "float32":
        model = model.float()
    elif model.device.type != "cuda" or model.dtype != torch.float16:
        model = model.to(machine.pick_dtype(model.device))  # type: ignore[arg-type]
    if model.device.type == "cuda" and model.dtype != torch.float32 and supported(model.config):
        return proved(model, limit)
    from dialogue.chat.transformers_engine import TransformersEngine

    return TransformersEngine(model)


def proved(model: "PreTrainedModel", limit: int) -> "Engine":
    """A `GraphDecoder` that draws what transformers would draw; where it does not, transformers' own engine, and a
    line on standard error says why. Its graph for a first reply is recorded then."""
    try:
        engine = GraphDecoder(model, limit)
        if not (problem := difference(engine, model)):
            return engine
    except Exception as error:  # a driver, a kernel or the memory: whatever it is, the chat can go on
        problem = in_a_line(error)
    print(f"the fast engine for GPUs does not work here ({problem}): transformers' own is used", file=sys.stderr)
    from dialogue.chat.transformers_engine import TransformersEngine

    return TransformersEngine(model)
