"""The certificate: rounding passes, on few tokens too, and another model does not."""

import copy

import pytest
import torch
from conftest import byte_tokenizer
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel

from dialogue.data.packing import encode, to_row
from dialogue.errors import UserError
from dialogue.measure import merge
from dialogue.measure.merge import MAX_PERPLEXITY_CHANGE, certify, witness_of
from dialogue.prompt import add_roles
from dialogue.train import speedups
from dialogue.train.lora import attach


@pytest.mark.parametrize("dialogues", [1, 60])
def test_rounding_passes_and_another_model_does_not(dialogues):
    tokenizer = byte_tokenizer()
    roles = add_roles(tokenizer)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=2, n_head=4)
    config.initializer_range = 0.3  # far from uniform, so that rounding is seen
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trained = attach(GPT2LMHeadModel(config), lora, tokenizer).eval()
    merged = copy.deepcopy(trained).merge_and_unload().bfloat16()
    other = copy.deepcopy(trained).unload()
    pieces = encode(tokenizer, [["Hi", f"No {n}."] for n in range(dialogues)], 64).pieces
    rows = [to_row(piece, "bot", roles.bot) for piece in pieces]

    def compare(other):
        first, second = (witness_of(model, rows, tokenizer.pad_token_id) for model in (trained, other))
        return certify(first, second, quantised=False, device=torch.device("cpu"))[0]

    certificate = compare(merged)
    assert abs(certificate["perplexity_change"]) <= certificate["largest_perplexity_change_allowed"]
    if dialogues == 1:
        assert abs(certificate["perplexity_change"]) > MAX_PERPLEXITY_CHANGE["16-bit"], "the case that is meant"
    with pytest.raises(UserError, match="not the one that was trained"):
        compare(other)


def random_model(tokenizer, offset=0.0):
    """A GPT-2 with LoRA whose logits lie around `offset`, as GPT-2's own lie around -112."""
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=2, n_head=4)
    model = GPT2LMHeadModel(config)
    with torch.no_grad():  # one direction of the last hidden state is the same everywhere
        model.transformer.ln_f.bias[0] = 10.0
        model.transformer.ln_f.weight[0] = 0.0
        model.transformer.wte.weight[:, 0] = offset / 10
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    return attach(model, lora, tokenizer).eval()


def test_logits_far_from_zero_are_compared_in_float32():
    """In bfloat16 they have steps of one half near -112: two right models would differ by more than is allowed."""
    tokenizer = byte_tokenizer()
    roles = add_roles(tokenizer)
    pieces = encode(tokenizer, [["Hi", f"No {n}."] for n in range(60)], 64).pieces
    rows = [to_row(piece, "bot", roles.bot) for piece in pieces]
    trained = random_model(tokenizer, offset=-112.0)
    logits = trained(torch.tensor([[1, 2, 3]])).logits
    assert -114 < logits.mean() < -110
    merged = copy.deepcopy(trained).merge_and_unload().half().float()
    witnesses = [witness_of(model, rows, 0) for model in (trained, merged, copy.deepcopy(trained).unload())]
    certificate, _ = certify(witnesses[0], witnesses[1], quantised=False, device=torch.device("cpu"))
    assert certificate["kl_nats_per_token"] < 1e-4
    with pytest.raises(UserError, match="not the one that was trained"):
        certify(witnesses[0], witnesses[2], quantised=False, device=torch.device("cpu"))


def test_a_run_of_few_steps_is_certified(tmp_path):
    """After three steps all entries of B have about one size; rounded to bfloat16, all of them are off the same way."""
    tokenizer = byte_tokenizer()
    roles = add_roles(tokenizer)
    pieces = encode(tokenizer, [["Hi", f"No {n}."] for n in range(60)], 64).pieces
    rows = [to_row(piece, "bot", roles.bot) for piece in pieces]
    base = random_model(tokenizer).unload().bfloat16()
    lora = LoraConfig(r=8, lora_alpha=512, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
    model = speedups.apply(attach(base, lora, tokenizer)).eval()
    for name, p in model.named_parameters():
        if "lora_B" in name:
            p.data.fill_(1.0017e-3)
    exact = copy.deepcopy(model)
    merged = witness_of(copy.deepcopy(model).float().merge_and_unload(), rows, 0)
    certify(witness_of(exact, rows, 0), merged, quantised=False, device=torch.device("cpu"))


@pytest.mark.parametrize("phase", ["load", "witness_of", "certify", "fit"])
def test_a_device_without_room_for_the_merged_model_leaves_it_to_the_cpu(phase, tmp_path, monkeypatch, capsys):
    """A ballast for each phase: the device is full there, and the certificate is made on the CPU all the same."""
    tokenizer = byte_tokenizer()
    roles = add_roles(tokenizer)
    dialogues = [["Hi", f"No {n}."] for n in range(12)]
    rows = [to_row(piece, "bot", roles.bot) for piece in encode(tokenizer, dialogues, 64).pieces]
    trained = random_model(tokenizer)
    witness = witness_of(trained, rows, 0)
    merged = trained.merge_and_unload()
    merged.config.eos_token_id = roles.end
    merged.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    # A device that is none, for which the CPU works until the phase in which it is full.
    cpu, load, certify_there = torch.device("cpu"), merge.load, merge.certify
    monkeypatch.setattr(merge, "load", lambda name, dtype, _: load(name, torch.float32, cpu))
    monkeypatch.setattr(merge, "certify", lambda one, other, quantised, _: certify_there(one, other, quantised, cpu))
    works, calls = getattr(merge, phase), []

    def full_at_first(*args, **keywords):
        if not calls:
            calls.append(1)
            raise torch.OutOfMemoryError("CUDA out of memory")
        return works(*args, **keywords)

    monkeypatch.setattr(merge, phase, full_at_first)
    certificate, fitted = merge.judge(
        witness, tmp_path, rows, dialogues, 0, torch.float32, torch.device("meta"), False, 0
    )
    assert "certified on the CPU" in capsys.readouterr().err
    assert certificate["kl_nats_per_token"] < 1e-4 and fitted.max_t
