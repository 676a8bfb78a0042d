"""Each field of the libraries' settings is obeyed, refused in a line, or of no concern."""

import copy
import dataclasses
import inspect
import os
from pathlib import Path

import pytest
import torch
from bitsandbytes.nn import Linear8bitLt
from conftest import byte_tokenizer, save_random_gpt2
from helpers import plan_of, run_of
from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainingArguments

from dialogue.data.packing import encode, pack
from dialogue.errors import UserError
from dialogue.measure.likelihood import HeldOut, hold_out
from dialogue.models import load_base
from dialogue.prompt import add_roles
from dialogue.train import lora, refused, speedups, trainer
from dialogue.train.options import override, repeat_command
from dialogue.train.progress import Progressed

DIALOGUES = [["Hello you", f"I am number {n} of {n * n}."] for n in range(18)]
USUAL = {
    "per_device_train_batch_size": 2, "max_steps": 3, "learning_rate": 1e-2, "logging_steps": 1, "save_strategy": "no",
    "eval_strategy": "steps", "eval_steps": 2, "optim": "adamw_torch", "max_grad_norm": 100.0, "use_cpu": True,
}  # fmt: skip

# Field -> other values than the usual, with which the training goes another way (`way`).
OBEYED = {
    "per_device_train_batch_size": {"per_device_train_batch_size": 3},
    "num_train_epochs": {"num_train_epochs": 2, "max_steps": -1},
    "max_steps": {"max_steps": 2},
    "learning_rate": {"learning_rate": 2e-2},
    "lr_scheduler_type": {"lr_scheduler_type": "constant"},
    "lr_scheduler_kwargs": {"lr_scheduler_type": "cosine", "lr_scheduler_kwargs": {"num_cycles": 2}},
    "warmup_steps": {"warmup_steps": 2},
    "optim": {"optim": "sgd"},
    "optim_args": {"optim": "sgd", "optim_args": "momentum=0.9"},
    "weight_decay": {"weight_decay": 0.5},
    "adam_beta1": {"adam_beta1": 0.5},
    "adam_beta2": {"adam_beta2": 0.5},
    "adam_epsilon": {"adam_epsilon": 1e-2},
    "gradient_accumulation_steps": {"gradient_accumulation_steps": 2},
    "max_grad_norm": {"max_grad_norm": 0.01, "optim": "sgd"},
    "neftune_noise_alpha": {"neftune_noise_alpha": 50.0},
    "seed": {"seed": 7},
    "data_seed": {"data_seed": 7},
    "train_sampling_strategy": {"train_sampling_strategy": "sequential"},
    "full_determinism": {"full_determinism": True},
    "logging_strategy": {"logging_strategy": "no"},
    "logging_steps": {"logging_steps": 2},
    "logging_first_step": {"logging_steps": 2, "logging_first_step": True},
    "eval_strategy": {"eval_strategy": "epoch"},
    "eval_steps": {"eval_steps": 1},
    "eval_delay": {"eval_delay": 3},
    "eval_on_start": {"eval_on_start": True},
    "per_device_eval_batch_size": {"per_device_eval_batch_size": 1},
    "save_strategy": {"save_strategy": "epoch"},
    "save_steps": {"save_strategy": "steps", "save_steps": 1},
    "save_total_limit": {"save_strategy": "steps", "save_steps": 1, "save_total_limit": 1},
    "include_num_input_tokens_seen": {"include_num_input_tokens_seen": "all"},
}  # fmt: skip
LOADED = {"num_workers": 1, "persistent_workers": True, "prefetch_factor": 5, "in_order": False}  # dataloader_...
ELSEWHERE = {  # field -> the test that sees it obeyed, in this folder
    "output_dir": "test_checkpoint.py", "report_to": "test_repeat.py",
    "activation_checkpointing_kwargs": "test_settings.py", "push_to_hub": "test_hub.py", "hub_token": "test_hub.py",
    "hub_model_id": "test_hub.py",
    "gradient_checkpointing": "test_settings.py",
    "gradient_checkpointing_kwargs": "test_settings.py", "activation_checkpointing": "test_settings.py",
    "dataloader_multiprocessing_context": "test_settings.py",
}  # fmt: skip
OF_NO_CONCERN = {
    "what is logged, and where to; nothing of the training": (
        "log_on_each_node logging_nan_inf_filter log_level log_level_replica disable_tqdm run_name project "
        "trackio_space_id trackio_bucket_id trackio_static_space_id debug skip_memory_metrics"
    ),
    "time and memory of a GPU, not the result": "tf32 torch_empty_cache_steps dataloader_pin_memory",
    "who may see what is uploaded; the hub obeys": "hub_private_repo",
    "how processes share the work; accelerate obeys": (
        "local_rank average_tokens_across_devices "
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend ddp_timeout"
    ),
    "how predictions are gathered: there are none": (
        "prediction_loss_only eval_do_concat_batches eval_use_gather_object eval_accumulation_steps"
    ),
    "read with refused torch_compile, which they switch on": "torch_compile_backend torch_compile_mode",
    "what is done in any case": "load_best_model_at_end enable_jit_checkpoint do_train do_eval remove_unused_columns",
}


def fields_of(kind):
    if kind is BitsAndBytesConfig:
        return {*inspect.signature(kind).parameters}
    return {field.name for field in dataclasses.fields(kind) if field.init}


def names(groups):
    return [name for text in groups.values() for name in text.split()]


LORA_OBEYED = {
    "r": {"r": 4}, "target_modules": {"target_modules": ["c_attn"]}, "exclude_modules": {"exclude_modules": ["c_proj"]},
    "lora_alpha": {"lora_alpha": 1}, "lora_dropout": {"lora_dropout": 0.9}, "use_rslora": {"use_rslora": True},
    "layers_to_transform": {"layers_to_transform": [0]}, "use_dora": {"use_dora": True},
    "rank_pattern": {"rank_pattern": {"c_attn": 1}}, "alpha_pattern": {"alpha_pattern": {"c_attn": 64}},
    "lora_bias": {"lora_bias": True},
    "init_lora_weights": {"init_lora_weights": "gaussian"},
}  # fmt: skip
LORA_OF_NO_CONCERN = {"fan_in_fan_out", "peft_type", "peft_version"}  # set for the family, and by PEFT


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """(folder of a base model, its tokenizer with roles)."""
    tokenizer = byte_tokenizer()
    folder = save_random_gpt2(tmp_path_factory.mktemp("base") / "base", tokenizer, width=32, heads=2)
    add_roles(tokenizer)
    return folder, tokenizer


def started(base, folder, lora_fields=None, **fields):
    """(model with LoRA, tokenizer, plan, run) with the usual settings but for some."""
    path, tokenizer = base
    arguments = override(TrainingArguments(str(folder), **USUAL), fields)
    config = LoraConfig(**{"r": 2, "target_modules": ["c_attn", "c_proj"], **(lora_fields or {})})
    run = run_of("--early_stopping_patience", "0", arguments=arguments, lora=config)  # nothing is refused
    torch.manual_seed(0)
    loaded = load_base(str(path), torch.float32, torch.device("cpu"), tokenizer)
    model = speedups.apply(lora.attach(loaded, config, tokenizer))
    pieces = encode(tokenizer, DIALOGUES, 128).pieces
    rows, held_out = pack(pieces, tokenizer, 64, "both"), hold_out(pieces[:4], tokenizer, 64)
    return model, tokenizer, plan_of(rows, held_out, run.arguments, torch.float32), run


def way(base, folder, lora_fields=None, **fields):
    """How a training goes: what it learns, its evaluations, its logs, the checkpoints that it leaves."""
    model, tokenizer, plan, run = started(base, folder, lora_fields, **fields)
    sizes, score = [], HeldOut.score
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HeldOut, "score", lambda self, model, size: sizes.append(size) or score(self, model, size))
        trained = trainer.train(model, tokenizer, plan, run, {})
    learned = {name: of.sum().item() for name, of in lora.trained_weights(model).items()}
    logged = [(entry["step"], sorted(entry)) for entry in trained.history]
    left = sorted(path.name for path in run.checkpoints.glob("checkpoint-*"))
    return learned, trained.steps, sizes, logged, left, torch.are_deterministic_algorithms_enabled()


@pytest.fixture(scope="module")
def usual(base, tmp_path_factory):
    return way(base, tmp_path_factory.mktemp("usual"))


def test_what_is_the_same_goes_the_same_way(base, usual, tmp_path):
    assert way(base, tmp_path) == usual


@pytest.mark.parametrize("field", OBEYED)
def test_a_training_argument_is_obeyed(field, base, usual, tmp_path, monkeypatch):
    monkeypatch.setattr(os, "environ", os.environ.copy())
    others = {name: value for name, value in OBEYED[field].items() if name != field}
    try:
        assert way(base, tmp_path / "with", **OBEYED[field]) != (
            way(base, tmp_path / "without", **others) if others else usual
        )
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("field", LORA_OBEYED)
def test_a_field_of_lora_is_obeyed(field, base, usual, tmp_path):
    others = {name: value for name, value in LORA_OBEYED[field].items() if name != field}
    found = way(base, tmp_path / "with", LORA_OBEYED[field])
    assert found != (way(base, tmp_path / "without", others) if others else usual)


def test_a_pattern_of_layers_is_obeyed(base, tmp_path):
    started(base, tmp_path, {"layers_to_transform": [0], "layers_pattern": "h"})
    with pytest.raises(UserError, match="layers_pattern"):
        started(base, tmp_path, {"layers_to_transform": [0], "layers_pattern": "blocks"})


def test_fields_of_the_loader_are_obeyed(base, tmp_path):
    fields = {f"dataloader_{name}": value for name, value in LOADED.items()}
    model, tokenizer, plan, run = started(base, tmp_path, **fields, dataloader_multiprocessing_context="spawn")
    training = trainer.DialogueTrainer(model, tokenizer, plan, run, {}, Progressed(1.0, 1, 1.0))
    loader = training.get_train_dataloader()
    assert {name: getattr(loader, name) for name in LOADED} == LOADED
    assert loader.multiprocessing_context.get_start_method() == "spawn"


@pytest.mark.parametrize("name", ["activation_checkpointing", "gradient_checkpointing"])
def test_checkpointing_is_obeyed_by_both_names(name, base, tmp_path):
    kwargs = {"use_reentrant": False, "preserve_rng_state": False}
    fields = {name: True, f"{name}_kwargs": kwargs}
    assert run_of(f"--{name}", "True").checkpointing is True
    for arguments in (TrainingArguments(str(tmp_path), **fields), override(TrainingArguments(str(tmp_path)), fields)):
        run = run_of(arguments=override(arguments, {"use_cpu": True}))
        assert run.checkpointing and run.arguments.activation_checkpointing_kwargs == kwargs


def test_fields_of_the_quantisation_are_obeyed(base):
    path, tokenizer = base
    config = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=2.5, llm_int8_skip_modules=["c_fc", "lm_head"])
    run_of(quant=config)
    model = load_base(str(path), torch.float32, torch.device("cpu"), tokenizer, config)
    block = model.transformer.h[0]
    assert isinstance(block.attn.c_attn, Linear8bitLt) and not isinstance(block.mlp.c_fc, Linear8bitLt)
    assert block.attn.c_attn.state.threshold == 2.5


def test_each_field_stands_in_a_row():
    """An upgrade that brings a field, or takes one away, ends here: decide what becomes of it."""
    obeyed = {*OBEYED, *(f"dataloader_{name}" for name in LOADED), *ELSEWHERE, *names(OF_NO_CONCERN)}
    rows = obeyed | {*" ".join(refused.REFUSED).split()}
    assert fields_of(TrainingArguments) - rows == set(), "new"
    assert rows - fields_of(TrainingArguments) == set(), "gone"
    assert obeyed & {*" ".join(refused.REFUSED).split()} <= {*refused.ALSO}, "either obeyed or refused"
    for file in {*ELSEWHERE.values()}:
        text = Path(__file__).with_name(file).read_text()
        assert all(field in text for field, where in ELSEWHERE.items() if where == file)
    # Of the other two, what is not named as obeyed is refused.
    assert {*LORA_OBEYED, *LORA_OF_NO_CONCERN, "layers_pattern"} == {*refused.LORA.split(), "init_lora_weights"}
    assert {*refused.LORA.split()} <= fields_of(LoraConfig) and {*refused.QUANT.split()} <= fields_of(
        BitsAndBytesConfig
    )


REFUSED = [
    {"label_smoothing_factor": 0.1}, {"label_names": ["x"]}, {"bf16": True}, {"fp16": True}, {"bf16_full_eval": True},
    {"fp16_full_eval": True}, {"torch_compile": True}, {"torch_compile_mode": "default"},
    {"torch_compile_backend": "inductor"}, {"use_liger_kernel": True}, {"liger_kernel_config": {"rope": True}},
    {"use_cache": True}, {"auto_find_batch_size": True}, {"dataloader_drop_last": True},
    {"accelerator_config": {"split_batches": True}}, {"length_column_name": "x"}, {"fsdp_config": {"version": 1}},
    {"include_for_metrics": ["inputs"]}, {"batch_eval_metrics": True}, {"do_predict": True},
    {"metric_for_best_model": "words"}, {"greater_is_better": True},
    {"save_strategy": "best", "metric_for_best_model": "loss"}, {"save_only_model": True}, {"save_on_each_node": True},
    {"ignore_data_skip": True}, {"restore_callback_states_from_checkpoint": True}, {"hub_strategy": "end"},
    {"hub_always_push": True}, {"hub_revision": "x"}, {"optim_target_modules": "all-linear"},
]  # fmt: skip


@pytest.mark.parametrize("fields", REFUSED, ids=lambda fields: next(iter(fields)))
def test_a_training_argument_that_cannot_be_obeyed_is_refused_in_a_line(fields, tmp_path):
    with pytest.raises(UserError, match=r"of TrainingArguments cannot be obeyed: \w") as error:
        run_of(arguments=override(TrainingArguments(str(tmp_path), use_cpu=True), fields))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("place", range(3))
def test_each_field_that_is_refused_is_refused_with_any_other_value(place):
    usual = [TrainingArguments("x", use_cpu=True), LoraConfig(), BitsAndBytesConfig(load_in_8bit=True)]
    refused.check_obeyable(*usual)
    others = [
        " ".join(refused.REFUSED).split(),
        fields_of(LoraConfig) - {*refused.LORA.split()},
        fields_of(BitsAndBytesConfig) - {*refused.QUANT.split(), "load_in_8bit", "load_in_4bit"},
    ][place]  # fmt: skip
    assert len(others) > 5
    for name in others:
        given = list(usual)
        given[place] = copy.copy(usual[place])
        object.__setattr__(given[place], name, object())
        with pytest.raises(UserError, match=f"^{name}="):
            refused.check_obeyable(*given)


@pytest.mark.parametrize("bits", [{}, {"load_in_4bit": True}])
def test_other_bits_are_refused(bits):
    with pytest.raises(UserError, match=r"load_in_\dbit=.*bases have 8 bits"):
        run_of(quant=BitsAndBytesConfig(**bits))


def test_a_gpu_is_not_left_alone_in_silence(monkeypatch):
    monkeypatch.setattr("dialogue.machine.pick_device", lambda: torch.device("cuda"))
    with pytest.raises(UserError, match="use_cpu=True of TrainingArguments cannot be obeyed: a GPU is taken"):
        run_of("--use_cpu", "True")


@pytest.mark.parametrize("secret", ["hf_abc", "s$x", "a b", "it's"])
def test_the_command_that_repeats_a_run_holds_no_token(secret):
    for words in (
        ["--hub_token", secret],
        [f"--hub_token={secret}"],
        ["--hub-token", secret],
        [f"--hub-token={secret}"],
    ):
        assert repeat_command(["--plan", *words, "--yes"]) == "python Fine_tuningmodel.py --plan --yes"
