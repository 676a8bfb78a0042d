"""The arithmetic of memory against what autograd really keeps, and what it decides."""

import pytest
import torch
from conftest import gpt2_tokenizer
from test_fast import attached, base_model
from transformers import BitsAndBytesConfig, GPT2Config, TrainingArguments

from dialogue.models import load_base
from dialogue.prompt import Roles
from dialogue.train import memory, speedups
from dialogue.train.loss import chunked_head
from dialogue.train.options import parse

SPAN = 64  # tokens of a dialogue, and of a row


def kept_bytes(model, rows):
    """Bytes that a forward pass leaves for the backward pass, weights left out."""
    ids = torch.randint(0, 200, (rows, SPAN))
    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    kept = {}

    def note(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage
        return tensor

    positions = torch.arange(SPAN).expand(rows, -1)
    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        loss = model(input_ids=ids, labels=ids, position_ids=positions, use_cache=False).loss
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_a_block_keeps_is_what_the_arithmetic_says(family, dropout):
    """Two models that differ by a block, so that everything outside the blocks cancels."""
    totals = []
    for layers in (1, 2):
        base = base_model(family, 300, layers=layers).to(torch.bfloat16)
        speedups.trim_base(base)
        model = attached(base, Roles(297, 298, 299), dropout).train()
        speedups.speed_up(model)
        with chunked_head(model):
            totals.append(kept_bytes(model, 2))
    needs = memory.Needs(2, SPAN, SPAN)
    expected = memory.kept_by_a_block(base.config, needs, dropout > 0) * 2 * SPAN * 2
    assert totals[1] - totals[0] == pytest.approx(expected, rel=0.05)


def test_parameters_are_counted_from_the_config_alone():
    base = base_model("gpt2", 300)
    weights = memory.count_weights(base.config)
    assert weights.inside + weights.outside == base.num_parameters()
    assert weights.inside == sum(p.numel() for n, p in base.named_parameters() if ".h." in n and p.dim() == 2)
    model = attached(base, Roles(297, 298, 299))
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert memory.count_trained(base.config, 4) == trained


XL = GPT2Config(n_embd=1600, n_layer=48, n_head=25)


def choose(gigabytes, fixed=None, rows=8, length=256):
    needs = memory.Needs(rows, length, dtype=torch.bfloat16, device="cuda")
    return memory.choose(XL, 8, 0.05, needs, int(gigabytes * 1e9), fixed or {})


def test_memory_decides_how_lean_a_run_is():
    roomy, _ = choose(80)
    assert (roomy.rows, roomy.checkpointing, roomy.in_8bit) == (8, False, False)
    fewer, _ = choose(8)
    assert fewer.rows < 8 and not fewer.checkpointing and not fewer.in_8bit
    lean, expected = choose(3.5)
    assert lean.in_8bit and expected < 3.5e9
    leanest, expected = choose(0.1)
    assert leanest.rows == 1 and leanest.checkpointing and leanest.in_8bit and expected > 1e8
    assert choose(80, {"in_8bit": True, "checkpointing": True})[0][4:6] == (True, True)
    assert [choose(size, rows=6)[0].rows for size in (80, 0.1)] == [6, 1]


def test_gpt2_xl_in_8_bits_with_8_rows_of_256_tokens_stays_below_4_2_gb():
    _, expected = choose(80, {"in_8bit": True, "checkpointing": True})
    assert 1.5e9 < expected < 4.2e9


def test_a_flag_is_not_overruled(tmp_path):
    cpu = torch.device("cpu")
    arguments = TrainingArguments(output_dir=tmp_path)
    flags, fields = parse(["--gradient_checkpointing", "False", "--load_in_8bit", "no"], {"xl": {}})
    assert memory.decided(flags.load_in_8bit, fields, arguments, cpu, 10**8) == {
        "in_8bit": False,
        "checkpointing": False,
    }
    assert memory.decided("auto", {}, arguments, cpu, 10**10) == {}
    gpu = torch.device("cuda")
    assert memory.decided("auto", {}, arguments, gpu, 10**8) == {}
    assert memory.decided("auto", {}, arguments, gpu, 10**10) == {"in_8bit": True}
    assert memory.decided("no", {}, arguments, gpu, 10**10) == {"in_8bit": False}
    edited = TrainingArguments(output_dir=tmp_path, activation_checkpointing=True)
    assert memory.decided("auto", {}, edited, cpu, 10**8) == {"checkpointing": True}


def test_weights_in_8_bits_let_go_of_their_file(random_gpt2):
    """What stayed in 16 bits would otherwise be a view of the file, and hold all of it in memory."""
    tokenizer = gpt2_tokenizer()
    quantised = BitsAndBytesConfig(load_in_8bit=True)
    model = load_base(str(random_gpt2), torch.bfloat16, torch.device("cpu"), tokenizer, quantised)
    assert any(parameter.dtype == torch.int8 for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().nbytes() <= parameter.nbytes + 64, name
