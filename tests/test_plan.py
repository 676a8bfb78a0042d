"""What the plan finds out before a training: packed dialogues that see each other, settings that cannot be obeyed."""

import dataclasses

import pytest
import torch
from conftest import byte_tokenizer
from helpers import plan_of, run_of
from peft import LoraConfig
from transformers import (
    BitsAndBytesConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    OPTConfig,
    OPTForCausalLM,
    TrainingArguments,
)

from dialogue.data.packing import encode, pack
from dialogue.errors import UserError
from dialogue.measure.likelihood import hold_out
from dialogue.prompt import add_roles
from dialogue.train import plan, show, speedups
from dialogue.train.lora import attach

DIALOGUES = [["Hello you", f"I am number {n}."] for n in range(12)]


def prepared(kind):
    """(model with LoRA, tokenizer, packed rows, held-out dialogues)."""
    tokenizer = byte_tokenizer()
    add_roles(tokenizer)
    torch.manual_seed(0)
    size, shape = len(tokenizer), {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    if kind == "opt":
        config = OPTConfig(vocab_size=size, ffn_dim=64, max_position_embeddings=128, word_embed_proj_dim=32, **shape)
        base = OPTForCausalLM(config)
    elif kind == "llama":
        base = LlamaForCausalLM(LlamaConfig(vocab_size=size, intermediate_size=64, tie_word_embeddings=True, **shape))
    else:
        base = GPT2LMHeadModel(GPT2Config(vocab_size=size, n_positions=128, n_embd=32, n_layer=2, n_head=2))
    for p in base.parameters():
        p.data.mul_(5)  # attention that matters
    targets = ["c_attn"] if kind == "gpt2" else ["q_proj", "v_proj"]
    lora = LoraConfig(r=2, target_modules=targets, task_type="CAUSAL_LM")
    model = speedups.apply(attach(base, lora, tokenizer))
    pieces = encode(tokenizer, DIALOGUES, 128).pieces
    return model, tokenizer, pack(pieces, tokenizer, 128, "both"), hold_out(pieces[:4], tokenizer, 128)


@pytest.mark.parametrize("kind", ["gpt2", "llama", "opt"])
def test_dialogues_that_would_see_each_other_get_rows_of_their_own(kind, tmp_path):
    """OPT's code does not pass positions to its mask."""
    model, tokenizer, rows, held_out = prepared(kind)
    assert all(row["position_ids"].count(0) > 1 for row in rows[:-1])
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=2)
    whole = plan_of(rows, held_out, arguments, torch.float32)
    planned = plan.rehearse(model, tokenizer, whole.rows, run_of(arguments=arguments), whole.fit)
    assert planned.packed is (kind != "opt")
    counts = {row["position_ids"].count(0) for row in [*planned.rows.train, *planned.rows.held_out.rows]}
    assert (counts == {1}) is (kind == "opt")
    assert plan.count_tokens(planned.rows.train) == plan.count_tokens(rows), "a token was lost"
    assert planned.rows.held_out.words == held_out.words


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"arguments": {"label_smoothing_factor": 0.1}}, "label_smoothing_factor"),
        ({"arguments": {"bf16": True, "use_cpu": True}}, "bf16=True"),
        ({"arguments": {"auto_find_batch_size": True}}, "auto_find_batch_size"),
        ({"quant": {"load_in_4bit": True}}, "load_in_4bit"),
        ({"lora": {"modules_to_save": ["lm_head"]}}, "modules_to_save"),
        ({"lora": {"init_lora_weights": "olora"}}, "init_lora_weights='olora'"),
        ({"lora": {"init_lora_weights": "pissa"}}, "merged into the base"),
        ({"lora": {"bias": "all"}}, "bias='all' of LoraConfig"),
    ],
)
def test_a_setting_that_cannot_be_obeyed_is_refused_in_a_line(changes, said):
    lora = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM", **changes.get("lora", {}))
    with pytest.raises(UserError, match=said) as error:
        run_of(
            arguments=TrainingArguments(**changes.get("arguments", {})),
            lora=lora,
            quant=BitsAndBytesConfig(**changes.get("quant", {"load_in_8bit": True})),
        )
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("rows", "given", "advice"),
    [
        (40, {"num_train_epochs": 1}, "; that is little: --num_train_epochs 6 makes 30"),
        (32, {"num_train_epochs": 2}, "; that is little: --num_train_epochs 8 makes 32"),
        (32, {"num_train_epochs": 8}, ""),
        (400, {"num_train_epochs": 1}, ""),
        (40, {"max_steps": 4}, ""),  # asked for, or what a budget allows
    ],
)
def test_the_plan_says_when_so_few_rows_make_too_few_steps(rows, given, advice, tmp_path):
    arguments = TrainingArguments(output_dir=str(tmp_path), per_device_train_batch_size=8, **given)
    assert show.more_epochs(rows, plan.count_steps(rows, arguments), arguments) == advice


def test_a_preset_changes_lora_in_one_place():
    run = run_of("--preset", "starter")
    assert run.lora.lora_dropout == 0.0
    assert run_of("--preset", "small").lora.lora_dropout == 0.05
    assert dataclasses.is_dataclass(run) and run.arguments.learning_rate == 2e-3
