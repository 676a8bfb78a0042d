"""A merged model read without transformers is the model that transformers reads."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, dialogue_tokenizer
from helpers import CONFIGS, random_model
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from dialogue import models, storage
from dialogue.chat import merged
from dialogue.chat.decoder import Decoder
from dialogue.chat.engine import load
from dialogue.errors import UserError
from dialogue.prompt import add_roles, decode_text, encode_text, never_drawn

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", params=[name for name in CONFIGS if "stretched" not in name], ids=str)
def written(request, tmp_path_factory):
    """The folder of a merged model, as a run leaves it."""
    return write(CONFIGS[request.param], tmp_path_factory.mktemp("merged") / "full")


def write(config, folder):
    random_model(config).half().save_pretrained(folder)
    tokenizer = byte_tokenizer()
    add_roles(tokenizer)
    tokenizer.save_pretrained(folder)
    storage.write_json(folder / storage.RUN_FILE, {})
    storage.seal(folder)
    return folder


@pytest.mark.parametrize("precision", ["float32", "int8"])
def test_it_has_the_bits_that_transformers_reads(written, precision):
    parts, _, context = merged.read(str(written))
    model, _ = models.load(str(written), None, torch.device("cpu"))
    ours, theirs = Decoder(parts, precision, context), Decoder(model, precision, context)
    assert (ours.parameters, context) == (theirs.parameters, models.context_length(model.config))
    ids = list(range(1, 40))
    assert torch.equal(ours.read(ids, 39), theirs.read(ids, 39))
    assert torch.equal(ours.step([7]), theirs.step([7]))


TOKENIZER = dialogue_tokenizer()


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    TOKENIZER.save_pretrained(folder)
    return merged.Tokenizer(folder), AutoTokenizer.from_pretrained(folder)


@given(text=st.text() | st.sampled_from(["<END>", "Hi<USER> there", "<|endoftext|>", " a  b\n", "I'm 42.", "naïve 🙂"]))
def test_its_tokenizer_is_that_of_transformers(tokenizers, text):
    ours, theirs = tokenizers
    text = text.encode("utf-8", "replace").decode()
    ids = encode_text(theirs, text)
    assert encode_text(ours, text) == ids
    for cut in (ids, ids[:-1], ids[1:]):
        assert decode_text(ours, cut) == decode_text(theirs, cut)
    every = [*theirs.all_special_ids, *ids]
    assert decode_text(ours, every) == decode_text(theirs, every)


def test_its_tokenizer_knows_the_same_tokens(tokenizers):
    ours, theirs = tokenizers
    assert ours.get_vocab() == theirs.get_vocab()
    assert never_drawn(ours, len(theirs) + 3) == never_drawn(theirs, len(theirs) + 3)


def test_a_chat_on_a_cpu_imports_no_transformers(written):
    code = (
        "import sys, main\n"
        f"print(main.generate_text('Hi', 3, conversation=main.start_conversation({str(written)!r}, device='cpu')))\n"
        "print('transformers' in sys.modules, file=sys.stderr)"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stderr.split()[-1] == "False"


def copied(written, folder, without=()):
    for file in written.iterdir():
        if file.name not in without:
            (folder / file.name).write_bytes(file.read_bytes())
    return folder


@pytest.mark.parametrize("without", [("manifest.json",), ("run.json", "manifest.json")])
def test_a_folder_that_no_run_wrote_is_left_to_transformers(written, tmp_path, without):
    assert merged.read(str(copied(written, tmp_path, without))) is None
    ids = list(range(30))
    assert torch.equal(load(str(tmp_path)).logits(ids), load(str(written)).logits(ids))


def test_what_it_cannot_compute_is_left_to_transformers(tmp_path):
    folder = write(CONFIGS["llama, its own head, stretched"], tmp_path / "stretched")
    assert merged.read(str(folder)) is None
    assert load(str(folder)).engine.precision == "int8"


@pytest.mark.parametrize("odd", [{"head_dim": None}, {"rope_parameters": 3}, {"model_type": "gpt2"}])
def test_a_config_that_is_odd_is_left_to_transformers(tmp_path, odd):
    folder = write(CONFIGS["llama, three queries a key"], tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    storage.write_json(folder / "config.json", config | odd)
    (folder / "manifest.json").unlink()
    storage.seal(folder)
    assert merged.read(str(folder)) is None


def test_a_folder_that_is_damaged_is_refused(written, tmp_path):
    copied(written, tmp_path)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors is not what was written"):
        load(str(tmp_path))
