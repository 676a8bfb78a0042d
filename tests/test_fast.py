"""The faster forward passes against transformers' and PEFT's own, with their gradients."""

import copy

import pytest
import torch
from conftest import gpt2_tokenizer
from peft import LoraConfig
from torch import nn
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

from dialogue.data.packing import collate, encode, pack
from dialogue.prompt import add_roles
from dialogue.train import speedups
from dialogue.train.lora import attach
from dialogue.train.loss import chunked_head

DIALOGUES = [["Hi there", "Hello, how are you?", "Fine"], ["What time is it?", "Noon."], ["Bye", "See you", "ok", "!"]]
GPT2 = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def base_model(family, size, layers=2):
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=size, **GPT2 | {"n_layer": layers}))
    if family == "llama":
        llama = LLAMA | {"num_hidden_layers": layers}
        return LlamaForCausalLM(LlamaConfig(vocab_size=size, attention_dropout=0.1, **llama))
    return MistralForCausalLM(MistralConfig(vocab_size=size, sliding_window=5, **LLAMA))


def attached(base, roles, dropout=0.0):
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["c_attn", "c_proj"])
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(1)
    model = attach(base, config, roles)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return model


@pytest.fixture(scope="module")
def talk():
    """(roles, size of the vocabulary, a batch of packed rows, a padded one among them)."""
    tokenizer = gpt2_tokenizer()
    roles = add_roles(tokenizer)
    rows = pack(encode(tokenizer, DIALOGUES, 32).pieces, tokenizer, 32, "both")
    assert any(row["position_ids"].count(0) > 1 for row in rows) and len({len(row["labels"]) for row in rows}) > 1
    return roles, len(tokenizer), collate(rows, 0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_losses_and_gradients_are_those_of_peft(family, talk):
    roles, size, batch = talk
    base = base_model(family, size)
    for module in base.modules():  # the comparison needs both without noise
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    quick = copy.deepcopy(base)
    speedups.trim_base(quick)
    plain, quick = attached(base, roles), attached(quick, roles)
    speedups.speed_up(quick)
    assert quick.config._attn_implementation == speedups.ATTENTION
    losses = []
    for model in (plain, quick):
        model.train()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
    with chunked_head(quick):
        losses.append(quick(**batch, use_cache=False).loss.item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    quick_gradients = {name: p.grad for name, p in quick.named_parameters() if p.requires_grad}
    for name, p in plain.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(quick_gradients[name], p.grad, rtol=1e-4, atol=1e-7, msg=name)


def test_without_adapters_and_with_a_cache_the_base_model_answers(talk):
    roles, size, _ = talk
    base = base_model("gpt2", size)
    expected = copy.deepcopy(base).eval()
    speedups.trim_base(base)
    model = attached(base, roles).eval()
    speedups.speed_up(model)
    ids = torch.arange(12)[None] + 30
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected(ids).logits)
        first = model(ids[:, :8], use_cache=True)
        second = model(ids[:, 8:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(second.logits, expected(ids).logits[:, 8:], rtol=1e-4, atol=1e-5)


def test_a_frozen_base_has_no_dropout_of_its_own_unless_wished(talk):
    roles, size, batch = talk
    for keep in (False, True):
        base = base_model("gpt2", size)
        speedups.trim_base(base, keep_dropout=keep)
        model = attached(base, roles).train()
        speedups.speed_up(model)
        first, second = (model(**batch, use_cache=False).loss.item() for _ in range(2))
        assert (first != second) is keep


def test_cheap_dropout_drops_its_share_and_keeps_the_mean():
    torch.manual_seed(0)
    dropout = speedups.CheapDropout(0.3)
    x = torch.ones(1001, 999, requires_grad=True)
    y = dropout(x)
    assert (y == 0).float().mean().item() == pytest.approx(0.3, abs=2e-3)
    assert y.mean().item() == pytest.approx(1, abs=3e-3)
    assert not torch.equal(y, dropout(x)), "the same mask twice"
    y.sum().backward()
    torch.testing.assert_close(x.grad, y.detach())
    assert dropout.eval()(x) is x
    torch.manual_seed(7)
    first = dropout.train()(x)
    torch.manual_seed(7)
    assert torch.equal(first, dropout(x)), "the same seed, another mask"
