"""Weights in safetensors: their sizes, and the weights themselves without a copy of their file in memory."""

import math
from contextlib import suppress
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.utils import cached_file


def sizes(folder: Path) -> list[int]:
    """Elements of each tensor in a folder's safetensors, from their headers; none where there is no such folder."""
    found = []
    for path in folder.glob("model*.safetensors"):
        with safe_open(path, "pt") as file:
            found += [math.prod(file.get_slice(name).get_shape()) for name in file.offset_keys()]
    return found


def read(name: str, dtype: torch.dtype, local: bool) -> dict[str, Tensor]:
    """Name -> tensor, floating ones as `dtype`, of a model in a folder or in one file on the hub (`local`: in its
    cache); none for others.

    One tensor after the other, by reading and not by mapping the file: transformers maps it, and what it has read stays
    in memory beside the weights until all is loaded (GPT-2-XL from float32: 9.5 GB at the peak, and 3.5 afterwards).
    """
    paths = sorted(Path(name).glob("model*.safetensors"))
    if not paths and not Path(name).is_dir():
        with suppress(OSError):  # several files, or not to be had: transformers knows more
            paths = [Path(str(cached_file(name, "model.safetensors", local_files_only=local)))]
    found = {}
    for path in paths:
        with safe_open(path, "pt", backend="pread") as file:
            for key in file.offset_keys():
                tensor = file.get_tensor(key)
                found[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return found
