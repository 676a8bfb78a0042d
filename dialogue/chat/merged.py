"""A merged model that a run of this project wrote, read without transformers, whose import takes longer than the rest.

Such a folder has a manifest: what stands in it is known, its tokenizer and the names of its tensors too. To
`dialogue/models.py` are left any other folder, what `Decoder` does not know, and rotations that are stretched.
"""

import math
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tokenizers
import torch
from safetensors import safe_open
from torch import Tensor

from dialogue import storage
from dialogue.chat.families import Parts, supported
from dialogue.prompt import find_roles


class Tokenizer:
    """What the chat uses of a tokenizer of transformers, by the library beneath it."""

    def __init__(self, folder: Path) -> None:
        self.inner = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
        self.inner.no_truncation()
        self.inner.no_padding()
        said = storage.read_json(folder / "tokenizer_config.json")
        special = [token for name, token in said.items() if name.endswith("_token") and token]
        self.all_special_ids = self.convert_tokens_to_ids(special + said.get("extra_special_tokens", []))

    def __call__(
        self, text: str, add_special_tokens: bool, split_special_tokens: bool, verbose: bool
    ) -> dict[str, list[int]]:
        self.inner.encode_special_tokens = split_special_tokens
        return {"input_ids": self.inner.encode(text, add_special_tokens=add_special_tokens).ids}

    def decode(self, ids: list[int], clean_up_tokenization_spaces: bool) -> str:
        assert not clean_up_tokenization_spaces
        return self.inner.decode(ids, skip_special_tokens=False)

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int | None]:
        return [self.inner.token_to_id(token) for token in tokens]

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.inner.id_to_token(token)

    def get_vocab(self) -> dict[str, int]:
        return self.inner.get_vocab()


class Tensors(Mapping[str, Tensor]):
    """Tensors of files by name, as `dtype` (None: as stored); each is read when it is asked for, and not kept."""

    def __init__(self, paths: list[Path], dtype: torch.dtype | None) -> None:
        opened: list[Any] = [safe_open(path, "pt", backend="pread") for path in paths]
        self.files, self.dtype = {name: file for file in opened for name in file.offset_keys()}, dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self.files[name].get_tensor(name)
        return tensor.to(self.dtype) if self.dtype else tensor

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, name: str) -> list[int]:
        return self.files[name].get_slice(name).get_shape()


def read(name: str, dtype: torch.dtype | None = None) -> tuple[Parts, Tokenizer, int] | None:
    """A model, its tokenizer, and how many tokens it sees at once; None where it has to be read otherwise. Raises
    UserError for a folder that is damaged, and other errors for one that is odd: `models` says in words what is."""
    folder = Path(name)
    if not all(os.path.isfile(folder / file) for file in (storage.MANIFEST, storage.RUN_FILE, "config.json")):
        return None
    config = SimpleNamespace(**storage.read_json(folder / "config.json"))
    rotation = getattr(config, "rope_parameters", None) or {"rope_type": "default"}
    if not supported(config) or rotation["rope_type"] != "default":
        return None
    storage.check_whole(folder, name)
    written = storage.read_json(folder / storage.MANIFEST)  # a file beside them is none of the model's
    tensors = Tensors([folder / file for file in sorted(written) if file.endswith(".safetensors")], dtype)
    tokenizer = Tokenizer(folder)
    find_roles(tokenizer)  # type: ignore[arg-type]
    if not config.tie_word_embeddings and "lm_head.weight" not in tensors:
        raise ValueError("its head is missing")
    if max(tokenizer.get_vocab().values()) >= config.vocab_size:
        raise ValueError("its tokenizer knows more tokens than the model")
    frequencies = None
    if config.model_type == "llama":
        frequencies = 1 / rotation["rope_theta"] ** (torch.arange(0, config.head_dim, 2).float() / config.head_dim)
    parameters = sum(math.prod(tensors.shape(each)) for each in tensors)
    context = config.n_positions if config.model_type == "gpt2" else config.max_position_embeddings
    return Parts(config, tensors, parameters, frequencies, 1.0), tokenizer, context
