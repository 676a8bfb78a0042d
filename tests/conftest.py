"""Small real models and tokenizers, made in the process; no hub, no download."""

import os
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
# Small models gain nothing from threads, and two processes with two threads each on two cores lose much.
os.environ.setdefault("OMP_NUM_THREADS", "1")
# One cache of compiled loops, also for processes that a test gives a home of their own: seconds each.
os.environ.setdefault("NUMBA_CACHE_DIR", str(Path.home() / ".cache" / "gpt2-dialogue" / "compiled"))

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, PreTrainedTokenizerFast

from dialogue import storage
from dialogue.prompt import add_roles

SHARED = Path(__file__).resolve().parents[2] / "shared"
DAILYDIALOG = SHARED / "dailydialog"

needs_dailydialog = pytest.mark.skipif(not DAILYDIALOG.is_dir(), reason="the DailyDialog release is not here")


def gpt2_tokenizer():
    """The real GPT-2 tokenizer where its files are at hand, else a byte-level one of 257 tokens."""
    files = SHARED / "gpt2-tokenizer"
    if files.is_dir():
        return GPT2Tokenizer(vocab=str(files / "vocab.json"), merges=str(files / "merges.txt"))
    return byte_tokenizer()


def byte_tokenizer():
    """A byte-level tokenizer of 257 tokens, without merges: a model with it is small and saved at once."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: index for index, token in enumerate([*alphabet, "<|endoftext|>"])}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<|endoftext|>", eos_token="<|endoftext|>", unk_token="<|endoftext|>"
    )


def dialogue_tokenizer():
    """GPT-2's, with the role tokens."""
    tokenizer = gpt2_tokenizer()
    add_roles(tokenizer)
    return tokenizer


@pytest.fixture
def tokenizer():
    """A fresh GPT-2 tokenizer, without the role tokens."""
    return gpt2_tokenizer()


def save_random_gpt2(folder, tokenizer, layers=2, width=64, heads=4, positions=256):
    """Write a GPT-2 with random weights and `tokenizer` to `folder`, as a hub download would look."""
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=len(tokenizer), n_positions=positions, n_embd=width, n_layer=layers, n_head=heads,
        bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    GPT2LMHeadModel(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def random_gpt2(tmp_path_factory):
    """Folder of a 2-layer GPT-2 with random weights: the real architecture, small."""
    return save_random_gpt2(tmp_path_factory.mktemp("base") / "gpt2-tiny", gpt2_tokenizer())


@pytest.fixture(scope="session")
def merged(tmp_path_factory):
    """Folder of a dialogue model with random weights and a context of 96 tokens, whole as a run leaves it."""
    folder = save_random_gpt2(tmp_path_factory.mktemp("chat") / "merged", dialogue_tokenizer(), positions=96)
    storage.write_json(folder / storage.RUN_FILE, {"facts": {"base model": "gpt2-xl", "date": "2026-11-25"}})
    storage.seal(folder)
    return folder
