"""A merged model read without transformers is the model that transformers reads."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, dialogue_tokenizer
from helpers import CONFIGS, CONTEXT, WIDE_LLAMA, random_model
from hypothesis import given
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, LlamaConfig

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


def sealed_again(folder):
    (folder / "manifest.json").unlink()
    storage.seal(folder)
    return str(folder)


def outcome(read, name):
    """What comes of reading a model: logits, or what is said."""
    try:
        return read(name)
    except UserError as error:
        return str(error)


def by_transformers(name):
    model, _ = models.load(name, None, torch.device("cpu"))
    return Decoder(model, "int8", CONTEXT).step([1, 2, 3]).tolist()


ODD = [{"head_dim": None}, {"head_dim": 6}, {"rope_parameters": None, "rope_theta": 500.0}, {"model_type": "gpt2"},
       {"num_hidden_layers": 4}, {"hidden_size": 24}, {"vocab_size": 400}, {"vocab_size": 200},
       {"tie_word_embeddings": False}, {"num_attention_heads": 3, "num_key_value_heads": 1}]  # fmt: skip


@pytest.mark.parametrize("odd", ODD, ids=str)
def test_a_config_that_is_odd_ends_as_it_does_in_transformers(tmp_path, odd):
    folder = write(LlamaConfig(**WIDE_LLAMA, tie_word_embeddings=True), tmp_path / "odd")
    config = json.loads((folder / "config.json").read_text())
    storage.write_json(folder / "config.json", config | odd)
    name = sealed_again(folder)
    assert outcome(lambda name: load(name).logits([1, 2, 3]).tolist(), name) == outcome(by_transformers, name)


def test_a_weight_that_is_missing_is_named(tmp_path):
    folder = write(CONFIGS["llama, wide heads, biases"], tmp_path / "less")
    weights = load_file(folder / "model.safetensors")
    for missing in ("model.layers.1.mlp.gate_proj.bias", "lm_head.weight", "model.norm.weight"):
        kept = {name: of for name, of in weights.items() if name != missing}
        save_file(kept, folder / "model.safetensors", {"format": "pt"})
        with pytest.raises(UserError, match=f"weights are missing, {missing}"):
            load(sealed_again(folder))


def test_a_file_beside_the_weights_is_none_of_them(written, tmp_path):
    name, ids = str(copied(written, tmp_path)), [1, 2, 3]
    nothing = {name: torch.zeros_like(of) for name, of in load_file(written / "model.safetensors").items()}
    save_file(nothing, tmp_path / "model_old.safetensors", {"format": "pt"})
    for precision in ("int8", "float32"):
        assert torch.equal(load(name, precision).logits(ids), load(str(written), precision).logits(ids))
    exact = models.load(name, torch.float32, torch.device("cpu"))[0]
    assert exact.get_input_embeddings().weight.abs().sum() > 0


def test_weights_may_stand_in_several_files(written, tmp_path):
    model, _ = models.load(str(copied(written, tmp_path)), None, torch.device("cpu"))
    (tmp_path / "model.safetensors").unlink()
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    name = sealed_again(tmp_path)
    assert merged.read(name) and len(list(tmp_path.glob("*.safetensors"))) > 1
    assert torch.equal(load(name).logits([1, 2, 3]), load(str(written)).logits([1, 2, 3]))


def test_a_folder_that_goes_away_meanwhile_is_said_in_a_line(written, tmp_path, monkeypatch):
    folder, whole = copied(written, tmp_path), merged.Tokenizer

    def slow(folder):
        tokenizer = whole(folder)
        shutil.rmtree(folder)
        return tokenizer

    monkeypatch.setattr(merged, "Tokenizer", slow)
    monkeypatch.setattr(merged, "Tensors", lambda paths, dtype: {})
    with pytest.raises(UserError, match="cannot be loaded"):
        load(str(folder))


def test_a_special_token_may_be_nothing(written, tmp_path):
    said = json.loads((copied(written, tmp_path) / "tokenizer_config.json").read_text())
    storage.write_json(tmp_path / "tokenizer_config.json", said | {"mask_token": None})
    assert merged.read(sealed_again(tmp_path))


def test_a_folder_that_is_damaged_is_refused(written, tmp_path):
    copied(written, tmp_path)
    weights = bytearray((tmp_path / "model.safetensors").read_bytes())
    weights[-5] ^= 1
    (tmp_path / "model.safetensors").write_bytes(weights)
    with pytest.raises(UserError, match=r"model\.safetensors is not what was written"):
        load(str(tmp_path))
