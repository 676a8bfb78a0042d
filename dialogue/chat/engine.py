"""A dialogue model that can be asked for its next token: loading, and the key-value cache."""

import os
from collections.abc import Generator
from pathlib import Path
from typing import Any, Protocol

import torch
import transformers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    DynamicCache,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dialogue import machine, storage
from dialogue.chat import kernels
from dialogue.chat.cuda_graph import GraphDecoder
from dialogue.chat.decoder import Decoder, supported
from dialogue.chat.sampling import Sampling, candidates, draw
from dialogue.errors import UserError, in_a_line
from dialogue.models import context_length, where
from dialogue.prompt import find_roles, has_vocabulary, without_roles

# Bytes. Of larger files only the size is compared: SHA-256 takes some 4 s for GPT-2-XL's 3.1 GB on the machine of
# the README, longer than loading them; a chat that starts at once is worth more here than a flipped bit is likely.
HASHED_BELOW = 1_000_000_000


class Engine(Protocol):
    """One sequence: tokens in, logits out, a cache in between. Anything that has this can be chatted with."""

    length: int  # tokens in the cache
    precision: str  # of the weights, as a person calls it

    def step(self, ids: list[int]) -> Tensor:
        """Read one or more new tokens; logits (V,) float32 after the last of them."""

    def truncate(self, length: int) -> None:
        """Forget what follows the first `length` tokens; more, where the cache cannot be cut there."""

    def reset(self) -> None:
        """Forget everything."""


class TransformersEngine:
    """An `Engine` over any causal language model of transformers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.precision = str(model.dtype).removeprefix("torch.")
        self.length = 0
        self.reset()

    @torch.inference_mode()
    def step(self, ids: list[int]) -> Tensor:
        new = torch.tensor([ids], device=self.model.device)
        try:
            output = self.model(input_ids=new, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        except BaseException:  # Ctrl-C as well: some layers have read the tokens, some have not
            self.reset()
            raise
        self.length += len(ids)
        return output.logits[0, -1].float()

    def truncate(self, length: int) -> None:
        if length >= self.length:
            return
        try:
            self.cache.crop(length - self.length)  # negative: so many from the end
            self.length = length
        except (RuntimeError, ValueError):  # a sliding window or a recurrent state cannot be cut
            self.reset()

    def reset(self) -> None:
        self.cache = DynamicCache(config=self.model.config)
        self.length = 0


class Model:
    """An engine with its tokenizer, and what the engine has read."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase, limit: int) -> None:
        self.engine, self.tokenizer = engine, tokenizer
        self.limit = limit  # tokens that the model can see at once
        self.roles = find_roles(tokenizer)
        self.forbidden: list[int] = []  # ids that are never to be drawn; known with the first logits
        self.tokens_read = 0  # that ever went through the engine
        self._read: list[int] = []  # the cache holds the first `engine.length` of these

    def logits(self, ids: list[int]) -> Tensor:
        """Logits (V,) after `ids`; what the cache holds of them already is not read again."""
        if len(ids) > self.limit:
            raise AssertionError(f"{len(ids)} tokens for a context of {self.limit}")
        common = min(self.engine.length, len(ids) - 1)
        while ids[:common] != self._read[:common]:
            common -= 1
        self.engine.truncate(common)
        new = ids[self.engine.length :]
        self._read = list(ids)
        logits = self.engine.step(new)
        self.tokens_read += len(new)
        if not self.forbidden:
            # Control tokens other than <END>, and rows of the embedding that no token stands for.
            unknown = set(range(len(logits))) - set(self.tokenizer.get_vocab().values())
            control = {*self.tokenizer.all_special_ids, *self.roles} - {self.roles.end}
            self.forbidden = sorted(unknown | control)
        return logits

    def tokens(
        self, prompt: list[int], most: int, sampling: Sampling, generator: torch.Generator
    ) -> Generator[int, None, None]:
        """Draw up to `most` tokens after `prompt`, without an end at <END>: the caller stops there.

        Raises ValueError for logits that are not finite numbers.
        """
        said: list[int] = []
        spoken = without_roles(prompt, self.roles)
        if isinstance(self.engine, GraphDecoder):
            logits = self.logits(prompt)
            for token in self.engine.stream(logits, most, sampling, spoken, self.forbidden, generator):
                self.tokens_read += len(said) > 0
                said.append(token)
                self._read.append(token)
                yield token
            return
        while len(said) < most:
            logits = self.logits(prompt + said)
            said.append(draw(candidates(logits, sampling, spoken + said, self.forbidden), generator))
            yield said[-1]


def load(name: str, precision: str = "auto") -> Model:
    """A merged model's folder, an adapter's folder (merged on loading), or a name on the hub.

    `precision` is "int8" or a torch dtype's name; "auto" takes the fastest of full quality. Weights come from
    safetensors only, and no code from the folder runs. Raises UserError, one line, for anything that is no
    dialogue model, and for a precision that is not to be had.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = machine.pick_device()
    if problem := storage.damage(Path(name), HASHED_BELOW):
        raise UserError(
            f"{name} is broken: {problem}; write it again, or where you changed it, delete its {storage.MANIFEST}"
        )
    try:
        tokenizer = AutoTokenizer.from_pretrained(name, **where(name))
        find_roles(tokenizer)
        adapter = Path(name, "adapter_config.json").is_file()
        dtype: Any = torch.float32 if adapter else "auto"  # to merge in; as stored
        if device.type != "cpu":
            dtype = _dtype(device, precision)
        options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True}
        model = _load_adapter(name, tokenizer, options) if adapter else _load_weights(name, options)
        limit = context_length(model.config)
    except UserError:
        raise
    except LookupError as error:
        raise UserError(f"{name} is no dialogue model: {error}; train one with `python Fine_tuningmodel.py`") from error
    except Exception as error:  # a broken folder fails in a library, in as many ways as there are files
        if os.path.isdir(name):
            raise UserError(
                f"{name} cannot be loaded: {in_a_line(error)}; write it again, or take another --model"
            ) from error
        raise UserError(
            f"{name} cannot be loaded: no such folder, and not to be had from the hub: {in_a_line(error)}"
        ) from error
    rows = model.get_output_embeddings().weight.shape[0]
    if rows <= max(tokenizer.get_vocab().values()):
        raise UserError(f"{name} is broken: its tokenizer knows more tokens than the model's {rows}")
    if not has_vocabulary(tokenizer):
        raise UserError(f"{name} is broken: its tokenizer has no vocabulary")
    return Model(_engine(model, precision, limit), tokenizer, limit)


def _engine(model: PreTrainedModel, precision: str, limit: int) -> Engine:
    """The fastest engine that this model and machine can have."""
    if model.device.type == "cpu" and supported(model.config):
        if precision == "auto":
            precision = kernels.fastest()
        if precision not in kernels.available():
            raise UserError(f"--precision {precision} needs an x86 processor with AVX2: take float32, or auto")
        return Decoder(model, precision, limit)
    model = model.to(_dtype(model.device, precision))  # type: ignore[arg-type]
    if model.device.type == "cuda" and model.dtype != torch.float32 and supported(model.config):
        return GraphDecoder(model, limit)
    return TransformersEngine(model)


def _dtype(device: torch.device, precision: str) -> torch.dtype:
    """Of the weights in transformers' own code, which has no int8 that is worth its time."""
    if precision == "int8":
        raise UserError("--precision int8 is for GPT-2 and Llama models on a CPU: take auto")
    return machine.pick_dtype(device) if precision == "auto" else getattr(torch, precision)


def _load_weights(name: str, options: dict[str, Any]) -> PreTrainedModel:
    loaded: Any = AutoModelForCausalLM.from_pretrained(name, **where(name), **options, output_loading_info=True)
    model, found = loaded
    if found["missing_keys"]:  # transformers would go on with random weights
        raise UserError(f"{name} is broken: weights are missing, {min(found['missing_keys'])} for one")
    return model


def _load_adapter(name: str, tokenizer: PreTrainedTokenizerBase, options: dict[str, Any]) -> PreTrainedModel:
    """The adapter's base model with the adapter merged into it."""
    from peft import PeftConfig, PeftModel  # seconds that a merged model does not cost

    if not Path(name, "adapter_model.safetensors").is_file():
        raise UserError(f"{name} is broken: it has no adapter_model.safetensors")
    base = str(PeftConfig.from_pretrained(name).base_model_name_or_path)
    try:
        model: Any = _load_weights(base, options)
    except Exception as error:
        raise UserError(f"{name} holds adapters of {base}, which cannot be loaded: {in_a_line(error)}") from error
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # the adapter brings the new rows
    return PeftModel.from_pretrained(model, name).merge_and_unload()
