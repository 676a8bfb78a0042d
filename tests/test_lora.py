"""What is trained, what a folder holds, and the loss in chunks against the plain one."""

import dataclasses

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig
from safetensors import safe_open
from transformers import GPT2Config

from dialogue.data.packing import collate, encode, pack
from dialogue.errors import UserError
from dialogue.measure.loss import Head, _ChunkedCrossEntropy, head_of, mean_nats, summed_nats
from dialogue.models import load_base
from dialogue.prompt import add_roles
from dialogue.train.lora import attach, count_trained, save

CPU = torch.device("cpu")
DIALOGUES = [["Hi there", "Hello, how are you?", "Fine"], ["What time is it?", "Noon."], ["Bye", "See you"]]


def gpt2_lora():
    return LoraConfig(r=4, lora_alpha=8, lora_dropout=0.0, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")


@pytest.fixture
def attached(random_gpt2, tokenizer):
    """(model with LoRA, tokenizer, a packed batch)."""
    add_roles(tokenizer)
    torch.manual_seed(1)
    model = attach(load_base(str(random_gpt2), torch.float32, CPU, tokenizer), gpt2_lora(), tokenizer)
    model.config.use_cache = False
    rows = pack(encode(tokenizer, DIALOGUES, 128).pieces, tokenizer, 128, "both")
    return model, tokenizer, collate(rows, tokenizer.pad_token_id)


def gradients(model):
    return {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}


def test_chunked_loss_and_gradients_equal_the_plain_ones(attached, monkeypatch):
    monkeypatch.setattr("dialogue.measure.loss.CHUNK", 7)  # several chunks, the last one short
    model, _, batch = attached
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.02)
    model.train()
    labels = int((batch["labels"][:, 1:] != -100).sum())
    for divisor in ({}, {"num_items_in_batch": 5}):
        plain = model(**batch, **divisor).loss
        plain.backward()
        expected = gradients(model)
        model.zero_grad()
        chunked = summed_nats(model, batch, head_of(model)) / divisor.get("num_items_in_batch", labels)
        chunked.backward()
        assert chunked.item() == pytest.approx(plain.item(), rel=1e-5)
        assert gradients(model).keys() == expected.keys()
        for name, gradient in gradients(model).items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)
        model.zero_grad()


def test_an_untied_head_trains_its_own_rows(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    add_roles(tokenizer)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=False,
    )
    model = attach(LlamaForCausalLM(config), gpt2_lora(), tokenizer)
    batch = collate(pack(encode(tokenizer, DIALOGUES, 128).pieces, tokenizer, 128, "both"), 0)
    plain = model(**batch, use_cache=False).loss
    plain.backward()
    expected = gradients(model)
    assert sum("trainable_tokens" in name for name in expected) == 2
    model.zero_grad()
    chunked = mean_nats(model, batch, head_of(model))
    chunked.backward()
    assert chunked.item() == pytest.approx(plain.item(), rel=1e-5)
    for name, gradient in gradients(model).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6, msg=name)


def test_a_plain_model_has_the_same_likelihood_in_chunks(random_gpt2, attached):
    _, tokenizer, batch = attached
    base = load_base(str(random_gpt2), torch.float32, CPU, tokenizer).eval()
    expected = base(**batch, use_cache=False).loss.item()
    assert mean_nats(base, batch, head_of(base)).item() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("changes", [{}, {"r": 3, "target_modules": ["c_fc"]}, {"use_dora": True}, {"lora_bias": True}])
def test_what_is_trained_is_counted_from_the_config_alone(random_gpt2, tokenizer, changes):
    add_roles(tokenizer)
    base = load_base(str(random_gpt2), torch.float32, CPU, tokenizer)
    lora = dataclasses.replace(gpt2_lora(), **changes)
    state = torch.get_rng_state()
    counted = count_trained(GPT2Config.from_pretrained(random_gpt2), lora, tokenizer)
    assert torch.equal(torch.get_rng_state(), state), "LoRA's own start would be another one"
    assert counted == attach(base, lora, tokenizer).num_parameters(only_trainable=True)


def test_only_lora_and_three_rows_are_trained(attached):
    model, tokenizer, batch = attached
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name or "trainable_tokens" in name for name in trained)
    rows = [p for name, p in trained.items() if "trainable_tokens" in name]
    assert [tuple(p.shape) for p in rows] == [(3, 64)]
    frozen = {name: p.clone() for name, p in model.named_parameters() if not p.requires_grad}
    before = {name: p.clone() for name, p in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=1e-2, weight_decay=0.0)
    losses = []
    for _ in range(8):
        loss = mean_nats(model, batch, head_of(model))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < losses[0], losses
    for name, p in model.named_parameters():
        if name in frozen:
            assert torch.equal(p, frozen[name]), f"{name} is frozen and moved"
    for name, p in trained.items():
        if "trainable_tokens" in name:
            assert (p != before[name]).any(dim=-1).all(), "a token row did not move"


def test_the_adapter_folder_holds_no_embedding_and_loads_by_itself(attached, tmp_path):
    model, tokenizer, batch = attached
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name or "trainable_tokens" in name:
                p.normal_(std=0.02)
    model.eval()
    expected = model(**batch).logits
    save(model, tokenizer, tmp_path)
    with safe_open(tmp_path / "adapter_model.safetensors", "pt") as file:
        shapes = [tuple(file.get_slice(name).get_shape()) for name in file.keys()]  # noqa: SIM118 (no mapping)
    assert all(len(tokenizer) not in shape for shape in shapes), "the embedding matrix was saved"
    again = AutoPeftModelForCausalLM.from_pretrained(tmp_path).eval()
    torch.testing.assert_close(again(**batch, use_cache=False).logits, expected)


def test_targets_that_the_base_lacks_are_named(random_gpt2, tokenizer):
    add_roles(tokenizer)
    base = load_base(str(random_gpt2), torch.float32, CPU, tokenizer)
    base.config.model_type = "nobody-knows"
    config = gpt2_lora()
    config.target_modules = {"q_proj"}
    with pytest.raises(UserError, match=r"no modules named q_proj.*c_attn.*target_modules"):
        attach(base, config, tokenizer)


def test_a_family_from_the_table_gets_its_own_targets(tokenizer):
    from transformers import LlamaConfig, LlamaForCausalLM

    add_roles(tokenizer)
    llama = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_key_value_heads=2,
            tie_word_embeddings=True,
        )  # fmt: skip
    )
    config = gpt2_lora()
    model = attach(llama, config, tokenizer)
    assert {name.split(".")[-4] for name, _ in model.named_parameters() if "lora_A" in name} == {
        "q_proj", "k_proj", "v_proj", "o_proj",
    }  # fmt: skip
    assert config.target_modules == {"c_attn", "c_proj"}, "the editable value was changed"


def test_logits_far_from_zero_lose_nothing_in_16_bits():
    """GPT-2's lie near -112, where bfloat16 has steps of one half."""
    torch.manual_seed(0)
    weight, hidden = torch.randn(500, 64) * 0.2, torch.randn(1, 40, 64)
    weight[:, 0], hidden[..., 0] = weight[:, 0] - 11.2, 10.0
    weight, hidden = weight.bfloat16(), hidden.bfloat16()
    labels = torch.randint(0, 500, (40,))
    exact = hidden[0].double() @ weight.double().T
    assert exact.mean() < -110
    expected = torch.nn.functional.cross_entropy(exact, labels)
    ids = torch.tensor([497, 498, 499])
    head = Head(weight, weight[ids].float(), ids, weight.mean(0, dtype=torch.float32))
    nats = _ChunkedCrossEntropy.apply(hidden[0], *head, labels) / 40
    assert nats.item() == pytest.approx(expected.item(), abs=2e-3)
    rounded = torch.nn.functional.cross_entropy((hidden[0] @ weight.T).float(), labels)
    assert abs(rounded - expected) > 4e-3, "the case that is meant"
