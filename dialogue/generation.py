"""A conversation with a model: what was said, the cache of what the model has read, a stream of text."""

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, DynamicCache, PreTrainedModel, PreTrainedTokenizerBase

from dialogue.base_model import context_length, pick_device, pick_dtype
from dialogue.errors import UserError
from dialogue.plaintext import plain, stable
from dialogue.prompt import decode_text, encode_text, find_roles
from dialogue.sampling import candidates, draw, penalise

PRECISIONS = ("auto", "float32", "bfloat16", "float16")


class Sampling(NamedTuple):
    """How a token is chosen; the fields of `generate_text` and two more."""

    max_t: int = 50  # tokens of a reply, at most
    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.9
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def check(self) -> None:
        """Raises UserError for a value outside its range."""
        ranges = {
            "max_t": (1, 100_000), "temp": (0, 100), "top_k": (0, 10_000_000), "top_p": (0, 1), "min_p": (0, 1),
            "repetition_penalty": (0.01, 100),
        }  # fmt: skip
        for name, (low, high) in ranges.items():
            if not low <= getattr(self, name) <= high:
                raise UserError(f"{name} must lie between {low} and {high}, not {getattr(self, name)}")


class Stats(NamedTuple):
    """One reply in numbers. `prompt_tokens` are those that had to be read anew."""

    prompt_tokens: int
    new_tokens: int
    first_token_seconds: float
    tokens_per_second: float  # after the first one
    precision: str


def load(name: str, precision: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A merged model's folder, an adapter's folder (merged on loading), or a name on the hub.

    Weights come from safetensors only, and no code from the folder runs. Raises UserError, one line, for
    anything that is no dialogue model.
    """
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    device = pick_device()
    dtype = pick_dtype(device) if precision == "auto" else getattr(torch, precision)
    is_adapter = Path(name, "adapter_config.json").is_file()
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True}
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
        find_roles(tokenizer)
        if is_adapter:
            from peft import AutoPeftModelForCausalLM

            model = AutoPeftModelForCausalLM.from_pretrained(name, **options).merge_and_unload()
        else:
            model = AutoModelForCausalLM.from_pretrained(name, **options)
    except LookupError as error:
        raise UserError(f"{name} is no dialogue model: {error}; train one with `python Fine_tuningmodel.py`") from error
    except Exception as error:  # a broken folder fails in a library, in as many ways as there are files
        raise UserError(f"{name} cannot be loaded: {plain(' '.join(str(error).split()))[:300]}") from error
    if model.get_input_embeddings().weight.shape[0] < len(tokenizer):
        raise UserError(f"{name} is broken: its tokenizer knows more tokens than the model")
    # Without its vocabulary file, a tokenizer loads all the same, and knows the special tokens only.
    if decode_text(tokenizer, encode_text(tokenizer, "Hello, you!")) != "Hello, you!":
        raise UserError(f"{name} is broken: its tokenizer has no vocabulary")
    return model.eval(), tokenizer


class Conversation:
    """Turns so far, and a key-value cache that lives across them: a turn costs its own new tokens only."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, seed: int | None = None) -> None:
        self.model, self.tokenizer = model, tokenizer
        self.roles = find_roles(tokenizer)
        self.limit = context_length(model.config)
        self.turns: list[list[int]] = []  # closed turns of ids: USER's, BOT's, USER's, ...
        self.forgotten = 0  # turns that went out of the context during the last reply
        self.read: list[int] = []  # ids in the cache
        self.cache = DynamicCache(config=model.config)
        self.tokens_read = 0  # tokens that ever went through the model
        self.stats: Stats | None = None
        self.generator = torch.Generator(model.device)
        if seed is None:
            self.generator.seed()
        else:
            self.generator.manual_seed(seed)
        # Never drawn: control tokens other than <END>, and rows that no token stands for.
        banned = {*tokenizer.all_special_ids, *self.roles} - {self.roles.end}
        rows = model.get_output_embeddings().weight.shape[0]
        self.banned = torch.tensor([*sorted(banned), *range(len(tokenizer), rows)], device=model.device)

    def reply(self, message: str, sampling: Sampling) -> Iterator[str]:
        """Say `message`, and yield the answer piece by piece; whole characters, no control sequences.

        Stops at <END>, after `max_t` tokens, or when the caller closes the iterator; what was said until
        then is kept. Raises UserError for a message that does not fit into the context, and for a model
        whose logits are not numbers; the conversation is then as it was before.
        """
        sampling.check()
        turn = [self.roles.user, *encode_text(self.tokenizer, message), self.roles.end]
        # <BOT>, <END> and at least one token follow it.
        if len(turn) + 3 > self.limit:
            raise UserError(f"the message has {len(turn) - 2} tokens; {self.limit - 5} fit: make it shorter")
        # Whole turns, newest first, as long as a quarter of the context or `max_t` stays free for the answer.
        free = self.limit - 2 - len(turn) - min(sampling.max_t, self.limit // 4)
        kept = len(self.turns)
        while kept and len(self.turns[kept - 1]) <= free:
            kept -= 1
            free -= len(self.turns[kept])
        kept += kept % 2  # a message is forgotten together with its answer
        self.forgotten = kept
        before = self.turns
        self.turns = [*self.turns[kept:], turn]
        prompt = [token for turn in self.turns for token in turn]
        most = min(sampling.max_t, self.limit - 2 - len(prompt))
        said: list[int] = []
        try:
            yield from self._stream(prompt, said, most, sampling)
        except BaseException:
            if not said:
                self.turns = before
            raise
        finally:
            if self.turns is not before:
                self.turns = [*self.turns, [self.roles.bot, *said, self.roles.end]]

    @torch.inference_mode()
    def _stream(self, prompt: list[int], said: list[int], most: int, sampling: Sampling) -> Iterator[str]:
        """Yield text while `said` fills with the reply's ids (without <END>)."""
        shown = ""
        start = first = time.perf_counter()
        read_before = self.tokens_read
        logits = self._forward([*prompt, self.roles.bot])
        prompt_tokens = self.tokens_read - read_before
        try:
            while True:
                seen = torch.tensor(sorted({*prompt, *said}), device=logits.device)
                logits = penalise(logits, seen, sampling.repetition_penalty).index_fill(0, self.banned, -torch.inf)
                try:
                    choice = candidates(logits, sampling.temp, sampling.top_k, sampling.top_p, sampling.min_p)
                except ValueError as error:
                    raise UserError(str(error)) from error
                token = draw(choice, self.generator)
                if not said:
                    first = time.perf_counter()
                if token == self.roles.end:
                    break
                said.append(token)
                text = stable(decode_text(self.tokenizer, said))
                if len(text) > len(shown) and text.startswith(shown):
                    yield text[len(shown) :]
                    shown = text
                if len(said) == most:
                    break
                logits = self._forward([*prompt, self.roles.bot, *said])
            rest = plain(decode_text(self.tokenizer, said))
            if len(rest) > len(shown):
                yield rest[len(shown) :]
        finally:
            seconds = time.perf_counter() - first
            rate = (len(said) - 1) / seconds if len(said) > 1 and seconds else 0.0
            precision = str(self.model.dtype).removeprefix("torch.")
            self.stats = Stats(prompt_tokens, len(said), first - start, rate, precision)

    def _forward(self, ids: list[int]) -> torch.Tensor:
        """Logits (V,) float32 after `ids`; only what the cache does not hold yet is read."""
        common = 0
        while common < min(len(self.read), len(ids) - 1) and self.read[common] == ids[common]:
            common += 1
        if common < len(self.read):
            self.cache.crop(common - len(self.read))
        new = torch.tensor([ids[common:]], device=self.model.device)
        # Until the forward pass is through, the cache holds an unknown part of it.
        self.read, complete = [], False
        try:
            output = self.model(input_ids=new, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            complete = True
        finally:
            if complete:
                self.read = list(ids)
            else:
                self.cache = DynamicCache(config=self.model.config)
        self.tokens_read += new.shape[1]
        return output.logits[0, -1].float()

    @property
    def used(self) -> int:
        """Tokens of the conversation so far."""
        return sum(map(len, self.turns))

    def text(self, turn: int) -> str:
        """A turn's text without its role token and <END>."""
        return plain(decode_text(self.tokenizer, self.turns[turn][1:-1]))

    def undo(self) -> str | None:
        """Take the last message and its answer back; returns the message, None where there is none."""
        if not self.turns:
            return None
        message = self.text(-2)
        self.turns = self.turns[:-2]
        return message

    def messages(self) -> list[dict[str, str]]:
        """The conversation in the shape of chat messages."""
        return [
            {"role": "assistant" if index % 2 else "user", "content": self.text(index)}
            for index in range(len(self.turns))
        ]

    def restore(self, messages: Any) -> None:
        """Take over a conversation of that shape. Raises UserError for any other, and changes nothing then."""
        shape = "a list of messages whose roles alternate, user first and assistant last, each with a content"
        if not isinstance(messages, list) or len(messages) % 2:
            raise UserError(f"not a conversation: needed is {shape}")
        turns = []
        for index, message in enumerate(messages):
            role = ("user", "assistant")[index % 2]
            if (
                not isinstance(message, dict)
                or message.get("role") != role
                or not isinstance(message.get("content"), str)
            ):
                raise UserError(f"not a conversation (message {index + 1}): needed is {shape}")
            opening = self.roles.bot if index % 2 else self.roles.user
            turns.append([opening, *encode_text(self.tokenizer, message["content"]), self.roles.end])
        self.turns = turns
