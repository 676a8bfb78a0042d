"""The arithmetic of memory against what autograd really keeps, and what it decides."""

import pytest
import torch
from conftest import byte_tokenizer, gpt2_tokenizer
from helpers import attached, base_model, run_of
from transformers import BitsAndBytesConfig, GPT2Config, TrainingArguments

from dialogue.measure.loss import head_of, mean_nats
from dialogue.models import load_base
from dialogue.prompt import add_roles
from dialogue.train import memory, speedups

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
        loss = mean_nats(model, {"input_ids": ids, "labels": ids, "position_ids": positions}, head_of(model))
    total = sum(storage.nbytes() for storage in kept.values())
    del loss
    return total


@pytest.mark.parametrize("dropout", [0.0, 0.05])
@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_what_a_block_keeps_is_what_the_arithmetic_says(family, dropout):
    """Two models that differ by a block, so that everything outside the blocks cancels."""
    totals, tokenizer = [], byte_tokenizer()
    add_roles(tokenizer)
    for layers in (1, 2):
        base = base_model(family, 300, layers=layers).to(torch.bfloat16)
        model = speedups.apply(attached(base, tokenizer, dropout)).train()
        totals.append(kept_bytes(model, 2))
    load = memory.Load(base.config, 0, dropout > 0, SPAN, SPAN, True)
    expected = memory.kept_by_a_block(load) * 2 * SPAN * 2
    assert totals[1] - totals[0] == pytest.approx(expected, rel=0.05)


def test_parameters_are_counted_from_the_config_alone():
    base = base_model("gpt2", 300)
    weights = memory.count_weights(base.config)
    assert weights.inside + weights.outside == base.num_parameters()
    assert weights.inside == sum(p.numel() for n, p in base.named_parameters() if ".h." in n and p.dim() == 2)


XL = GPT2Config(n_embd=1600, n_layer=48, n_head=25)


WEIGHTS = memory.count_weights(XL)


def choose(monkeypatch, gigabytes, *flags, rows=8, kind="cuda", config=XL):
    """The fit on a device with so much free memory."""
    monkeypatch.setattr("dialogue.machine.free_memory", lambda *_: int(gigabytes * 1e9))
    monkeypatch.setattr("dialogue.machine.pick_dtype", lambda *_: torch.bfloat16)
    monkeypatch.setattr(memory, "count_weights", lambda _: WEIGHTS if config is XL else memory.Weights(10**7, 10**6))
    load = memory.Load(config, 6_763_200, True, 256, 150, kind == "cpu")
    run = run_of("--per_device_train_batch_size", str(rows), *flags)
    fit = memory.choose(load, run, torch.device(kind))
    return fit, memory.estimate(load, fit, WEIGHTS)


def test_memory_decides_how_lean_a_run_is(monkeypatch):
    auto = ("--load_in_8bit", "no")
    roomy, _ = choose(monkeypatch, 80, *auto)
    assert (roomy.rows, roomy.checkpointing, roomy.in_8bit) == (8, False, False)
    fewer, _ = choose(monkeypatch, 8, *auto)
    assert fewer.rows < 8 and not fewer.checkpointing
    lean, expected = choose(monkeypatch, 3.5)
    assert lean.in_8bit and expected < 3.5e9
    leanest, expected = choose(monkeypatch, 0.1)
    assert leanest.rows == 1 and leanest.checkpointing and leanest.in_8bit and expected > 1e8
    assert [choose(monkeypatch, size, rows=6)[0].rows for size in (80, 0.1)] == [6, 1]


@pytest.mark.parametrize(
    ("rows", "length", "checkpointing", "dropout", "emulated"),
    [(8, 256, True, True, 2.27), (8, 512, True, True, 2.73), (2, 512, False, True, 5.00), (4, 512, False, True, 8.06),
     (4, 512, False, False, 6.81), (8, 256, False, True, 8.01), (8, 256, False, False, 6.76)],
)  # fmt: skip
def test_gpt2_xl_in_8_bits_is_what_an_emulation_of_a_gpu_takes(rows, length, checkpointing, dropout, emulated):
    """Emulated: the CUDA branch on tensors without data, its allocations counted; not run on a GPU."""
    load = memory.Load(XL, 6_763_200, dropout, length, 150, False)
    fit = memory.Fit(torch.bfloat16, True, checkpointing, rows)
    assert memory.estimate(load, fit, WEIGHTS) / 1e9 == pytest.approx(emulated, rel=0.15)


def test_a_flag_is_not_overruled(monkeypatch):
    small = GPT2Config()
    fit, _ = choose(monkeypatch, 0.1, "--gradient_checkpointing", "False", "--load_in_8bit", "no")
    assert (fit.in_8bit, fit.checkpointing) == (False, False)
    assert choose(monkeypatch, 80, "--activation_checkpointing", "True")[0].checkpointing
    assert choose(monkeypatch, 8)[0].in_8bit, "a billion parameters on a GPU"
    assert choose(monkeypatch, 8, "--load_in_8bit", "no")[0].in_8bit is False
    assert choose(monkeypatch, 80)[0] == (torch.bfloat16, False, False, 8), "where all of a step fits at once"
    assert not choose(monkeypatch, 80, config=small)[0].in_8bit
    assert not choose(monkeypatch, 80, kind="cpu")[0].in_8bit
    assert choose(monkeypatch, 80, "--load_in_8bit", "yes", kind="cpu")[0].in_8bit
    edited = TrainingArguments(activation_checkpointing=True)
    assert run_of(arguments=edited).checkpointing is True
    assert run_of().checkpointing is None


def test_weights_in_8_bits_let_go_of_their_file(random_gpt2):
    """What stayed in 16 bits would otherwise be a view of the file, and hold all of it in memory."""
    tokenizer = gpt2_tokenizer()
    quantised = BitsAndBytesConfig(load_in_8bit=True)
    model = load_base(str(random_gpt2), torch.bfloat16, torch.device("cpu"), tokenizer, quantised)
    assert any(parameter.dtype == torch.int8 for parameter in model.parameters())
    for name, parameter in model.named_parameters():
        assert parameter.untyped_storage().nbytes() <= parameter.nbytes + 64, name
