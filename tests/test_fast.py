"""The faster forward passes against transformers' and PEFT's own, with their gradients."""

import copy
import weakref
from types import SimpleNamespace

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from conftest import gpt2_tokenizer
from helpers import attached, base_model
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.models.llama.modeling_llama import LlamaRMSNorm

from dialogue.data.packing import collate, encode, pack
from dialogue.measure.loss import head_of, mean_nats
from dialogue.models import load_base
from dialogue.prompt import add_roles
from dialogue.train import speedups

DIALOGUES = [["Hi there", "Hello, how are you?", "Fine"], ["What time is it?", "Noon."], ["Bye", "See you", "ok", "!"]]


@pytest.fixture(scope="module")
def talk():
    """(tokenizer, size of its vocabulary, a batch of packed rows, a padded one among them)."""
    tokenizer = gpt2_tokenizer()
    add_roles(tokenizer)
    rows = pack(encode(tokenizer, DIALOGUES, 32).pieces, tokenizer, 32, "both")
    assert any(row["position_ids"].count(0) > 1 for row in rows) and len({len(row["labels"]) for row in rows}) > 1
    return tokenizer, len(tokenizer), collate(rows, 0)


@pytest.mark.parametrize("family", ["gpt2", "llama", "mistral"])
def test_losses_and_gradients_are_those_of_peft(family, talk):
    tokenizer, size, batch = talk
    base = base_model(family, size)
    for module in base.modules():  # the comparison needs both without noise
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if hasattr(module, "attention_dropout"):
            module.attention_dropout = 0.0
    plain, quick = attached(base, tokenizer), speedups.apply(attached(copy.deepcopy(base), tokenizer))
    assert quick.config._attn_implementation == speedups.ATTENTION
    losses = []
    for model in (plain, quick):
        model.train()
        loss = model(**batch, use_cache=False).loss
        loss.backward()
        losses.append(loss.item())
    losses.append(mean_nats(quick, batch, head_of(quick)).item())
    assert losses == pytest.approx([losses[0]] * 3, rel=1e-6)
    quick_gradients = {name: p.grad for name, p in quick.named_parameters() if p.requires_grad}
    for name, p in plain.named_parameters():
        if p.requires_grad:
            torch.testing.assert_close(quick_gradients[name], p.grad, rtol=1e-4, atol=1e-7, msg=name)


@pytest.mark.parametrize("lengths", [[[9, 1, 6], [3, 13]], [[16], [16]], [[1, 1, 1, 13], [8, 8]]])
def test_attention_within_dialogues_is_that_of_torch_with_a_mask(lengths):
    """Four heads share two keys; dialogues of very different lengths are in one batch."""
    torch.manual_seed(0)
    query, key, value = (torch.randn(2, heads, 16, 8, requires_grad=True) for heads in (4, 2, 2))
    number = torch.stack([torch.repeat_interleave(torch.tensor(row)) for row in lengths])
    mask = ((number[:, :, None] == number[:, None]) & torch.ones(16, 16, dtype=torch.bool).tril())[:, None]
    found = []
    for attend in (speedups._attend_within_dialogues, sdpa_attention_forward):
        module = SimpleNamespace(num_key_value_groups=2, is_causal=True)
        reply, _ = attend(module, query, key, value, mask)
        found.append([reply, *torch.autograd.grad(reply.square().sum(), (query, key, value))])
    for ours, theirs in zip(*found, strict=True):
        torch.testing.assert_close(ours, theirs)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rms_norm_is_that_of_llama_with_about_its_rounding(dtype):
    torch.manual_seed(0)
    norm = LlamaRMSNorm(64, eps=1e-3).to(dtype)
    norm.weight = nn.Parameter(torch.empty(64, dtype=dtype).uniform_(0.5, 2), requires_grad=False)
    x, up = torch.randn(30, 50, 64, dtype=dtype, requires_grad=True), torch.randn(30, 50, 64, dtype=dtype)
    found = []
    for forward in (norm.forward, lambda x: speedups._rms_norm_forward(norm, x)):
        y = forward(x)
        found.append([y, *torch.autograd.grad(y, x, up)])
    exact_x = x.detach().double().requires_grad_()
    exact = exact_x * torch.rsqrt(exact_x.square().mean(-1, keepdim=True) + 1e-3) * norm.weight.double()
    exact = [exact, *torch.autograd.grad(exact, exact_x, up.double())]
    for true, theirs, ours in zip(exact, *found, strict=True):
        assert (ours - true).norm() < 1.5 * (theirs - true).norm()
        assert ours.dtype == dtype


def test_without_adapters_and_with_a_cache_the_base_model_answers(talk):
    tokenizer, size, _ = talk
    base = base_model("gpt2", size)
    expected = copy.deepcopy(base).eval()
    model = speedups.apply(attached(base, tokenizer)).eval()
    ids = torch.arange(12)[None] + 30
    with torch.no_grad(), model.disable_adapter():
        torch.testing.assert_close(model(ids, use_cache=False).logits, expected(ids).logits)
        first = model(ids[:, :8], use_cache=True)
        second = model(ids[:, 8:], past_key_values=first.past_key_values, use_cache=True)
        torch.testing.assert_close(second.logits, expected(ids).logits[:, 8:], rtol=1e-4, atol=1e-5)


def test_a_frozen_base_has_no_dropout_of_its_own_unless_wished(talk):
    tokenizer, size, batch = talk
    for keep in (False, True):
        base = base_model("gpt2", size)
        model = speedups.apply(attached(base, tokenizer), keep_dropout=keep).train()
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


def test_loras_own_bias_is_trained_and_used(talk):
    tokenizer, size, batch = talk
    models = [attached(base_model("gpt2", size), tokenizer, lora_bias=True) for _ in range(2)]
    speedups.apply(models[1])
    gradients = []
    for model in models:
        for name, p in model.named_parameters():
            if "lora_B" in name and name.endswith("bias"):
                p.data.fill_(0.1)
        for module in model.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
        loss = model.train()(**batch, use_cache=False).loss
        loss.backward()
        gradients.append([loss.item(), *(p.grad.norm().item() for n, p in model.named_parameters() if "lora_B" in n)])
    assert gradients[1] == pytest.approx(gradients[0], rel=1e-4, abs=1e-5)


def test_evaluation_applies_lora_as_it_is_saved(talk):
    """After few steps all entries of B have about one size, which bfloat16 rounds all the same way."""
    tokenizer, size, batch = talk
    model = speedups.apply(attached(base_model("gpt2", size).bfloat16(), tokenizer))
    layer = next(layer for layer in model.modules() if hasattr(layer, "lora_B"))
    layer.lora_B["default"].weight.data.fill_(1.0017)  # bfloat16 has 1.0 and 1.0078
    x = torch.ones(1, 2, layer.in_features, dtype=torch.bfloat16)
    exact = type(layer).forward(layer, x)
    assert torch.equal(layer.eval()(x), exact)


@pytest.mark.parametrize("checkpointing", [False, True])
def test_products_in_8_bits_have_bitwise_the_gradients_of_bitsandbytes(talk, checkpointing, tmp_path):
    tokenizer, size, batch = talk
    base_model("gpt2", size).save_pretrained(tmp_path)
    quantised = BitsAndBytesConfig(load_in_8bit=True)
    found = []
    for own in (False, True):
        base = load_base(str(tmp_path), torch.bfloat16, torch.device("cpu"), tokenizer, quantised)
        model = speedups.apply(attached(base, tokenizer))
        products = [layer for layer in model.modules() if isinstance(layer, Linear8bitLt)]
        assert len(products) == 8
        if not own:
            for layer in products:
                del layer.forward
        if checkpointing:
            model.activation_checkpointing_enable()
        model.train()
        loss = mean_nats(model, batch, head_of(model))
        loss.backward()
        found.append({n: p.grad for n, p in model.named_parameters() if p.grad is not None} | {"loss": loss.detach()})
    assert found[0].keys() == found[1].keys()
    for name, gradient in found[0].items():
        assert torch.equal(found[1][name], gradient), name


def test_a_product_in_8_bits_keeps_no_input(tmp_path):
    """bitsandbytes' own keeps it where autograd's hooks, and so activation checkpointing, cannot see it."""
    base_model("gpt2", 300).save_pretrained(tmp_path)
    model = AutoModelForCausalLM.from_pretrained(tmp_path, quantization_config=BitsAndBytesConfig(load_in_8bit=True))
    layer = next(layer for layer in model.modules() if isinstance(layer, Linear8bitLt))
    for product, keeps in ((layer, True), (lambda x: speedups._Int8Product.apply(x, layer), False)):
        x = torch.randn(2, 3, layer.in_features, requires_grad=True)
        doubled = x * 2
        y, input_kept = product(doubled), weakref.ref(doubled)
        del doubled
        assert (input_kept() is not None) is keeps
        del y


@pytest.mark.parametrize(
    ("lengths", "groups"), [([20] * 20, [(20, 32)]), ([10, 10, 9, 8, 1], [(5, 16)]), ([24], [(1, 32)])]
)
def test_dialogues_of_about_one_length_share_their_products(lengths, groups):
    blocks = [torch.ones(length, length, dtype=torch.bool).tril() for length in lengths]
    assert speedups._layout(torch.block_diag(*blocks)[None, None].bool(), 1, sum(lengths))[2] == groups
