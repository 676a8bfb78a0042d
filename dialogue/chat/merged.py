"""A merged model that a run of this project wrote, read without transformers, whose import takes longer than the rest.

Such a folder has a manifest: what stands in it is known, its tokenizer and the names of its tensors too. What
`Decoder` cannot compute, and any other folder, is left to `dialogue/models.py`.
"""

import math
import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
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
        special = [said[name] for name in said if name.endswith("_token")] + said.get("extra_special_tokens", [])
        self.all_special_ids = self.convert_tokens_to_ids(special)

    def __call__(self, text: str, *, split_special_tokens: bool, **_: bool) -> dict[str, list[int]]:
        self.inner.encode_special_tokens = split_special_tokens
        return {"input_ids": self.inner.encode(text, add_special_tokens=False).ids}

    def decode(self, ids: list[int], **_: bool) -> str:
        return self.inner.decode(ids, skip_special_tokens=False)

    def convert_tokens_to_ids(self, tokens: list[str]) -> list[int | None]:
        return [self.inner.token_to_id(token) for token in tokens]

    def convert_ids_to_tokens(self, token: int) -> str | None:
        return self.inner.id_to_token(token)

    def get_vocab(self) -> dict[str, int]:
        return self.inner.get_vocab()


class Tensors(Mapping[str, Tensor]):
    """Tensors of files by name; each is read when it is asked for, and not kept."""

    def __init__(self, paths: list[Path]) -> None:
        opened: list[Any] = [safe_open(path, "pt", backend="pread") for path in paths]
        self.files = {name: file for file in opened for name in file.offset_keys()}

    def __getitem__(self, name: str) -> Tensor:
        return self.files[name].get_tensor(name)

    def __iter__(self) -> Iterator[str]:
        return iter(self.files)

    def __len__(self) -> int:
        return len(self.files)

    def shape(self, name: str) -> list[int]:
        return self.files[name].get_slice(name).get_shape()


def read(name: str) -> tuple[Parts, Tokenizer, int] | None:
    """A model, its tokenizer, and how many tokens it sees at once; None where it has to be read otherwise. Raises
    UserError for a folder that is damaged."""
    folder = Path(name)
    if not all(os.path.isfile(folder / file) for file in (storage.MANIFEST, storage.RUN_FILE, "config.json")):
        return None
    storage.check_whole(folder, name)
    with suppress(Exception):  # whatever is odd about it, `models` says so in words
        config = SimpleNamespace(**storage.read_json(folder / "config.json"))
        rotation = getattr(config, "rope_parameters", None) or {"rope_type": "default"}
        if not supported(config) or rotation["rope_type"] != "default":
            return None
        tokenizer, tensors = Tokenizer(folder), Tensors(sorted(folder.glob("model*.safetensors")))
        find_roles(tokenizer)  # type: ignore[arg-type]
        frequencies = None
        if "rope_theta" in rotation:
            size = config.head_dim
            frequencies = 1 / rotation["rope_theta"] ** (torch.arange(0, size, 2).float() / size)
        parameters = sum(math.prod(tensors.shape(each)) for each in tensors)
        context = config.n_positions if config.model_type == "gpt2" else config.max_position_embeddings
        return Parts(config, tensors, parameters, frequencies, 1.0), tokenizer, context
    return None
