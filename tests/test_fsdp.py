"""A base model split over two processes, by `accelerate launch` with examples/fsdp.yaml: the same as in one process."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, save_random_gpt2
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, GPT2Config

import Fine_tuningmodel as script
from dialogue.errors import UserError
from dialogue.train import memory, sharding

HERE = Path(__file__).resolve().parent
LAUNCH = [
    sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(HERE.parent / "examples/fsdp.yaml"),
    "--num_processes", "2", "--main_process_port", "0", str(HERE / "fsdp_on_a_cpu.py"),
]  # fmt: skip


def launch(flags, **environment):
    # oneDNN then has no kernels for bfloat16, so that float32 is measured to be faster and is chosen.
    environment |= {"ONEDNN_MAX_CPU_ISA": "AVX2", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [*LAUNCH, *flags], capture_output=True, text=True, env=os.environ | environment, timeout=240, check=False
    )


def losses(log):
    """{step: loss} of a run's standard error; both losses where a run had two parts."""
    return {int(step): float(loss) for step, loss in re.findall(r"^step (\d+)/\d+  loss (\S+)", log, re.M)}


def files(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def test_a_split_model_stopped_and_resumed_is_the_one_of_a_single_process(tmp_path, monkeypatch, capsys):
    base, talk = tmp_path / "base", tmp_path / "talk.jsonl"
    save_random_gpt2(base, byte_tokenizer())
    dialogues = [["Where do you live?", f"In house {n}, by the sea."] for n in range(240)]
    talk.write_text("".join(json.dumps({"dialog": turns}) + "\n" for turns in dialogues))

    def flags(name, rows):
        home = tmp_path / name
        return [
            "--preset", "starter", "--base_model", str(base), "--dataset", str(talk), "--max_train_dialogues", "48",
            "--max_length", "128", "--max_steps", "4", "--eval_steps", "2", "--save_steps", "2", "--logging_steps", "1",
            "--learning_rate", "2e-2", "--per_device_train_batch_size", str(rows), "--adapter_dir", str(home / "lora"),
            "--merged_dir", str(home / "full"), "--output_dir", str(home / "checkpoints"),
        ]  # fmt: skip

    stopped = launch(flags("two", 2), STOP_RANK="1")
    assert "the same command goes on from there" in stopped.stderr, stopped.stderr
    checkpoints = tmp_path / "two/checkpoints"
    assert sorted(path.name for path in checkpoints.iterdir()) == ["checkpoint-2", "checkpoint-3"]
    assert (checkpoints / "checkpoint-3/pytorch_model_fsdp.bin").is_file(), "accelerate did not split the model"
    gone_on = launch(flags("two", 2))
    assert gone_on.returncode == 0, gone_on.stderr
    assert "checkpoint-3" in gone_on.stdout and gone_on.stdout.count("split over 2 processes") == 1
    run = json.loads((tmp_path / "two/lora/run.json").read_text())

    dtype = getattr(torch, run["decided"]["dtype"])
    monkeypatch.setattr(script.base_models, "pick_dtype", lambda *_: dtype)
    capsys.readouterr()
    script.main(flags("one", 4))
    expected = losses(capsys.readouterr().err)
    assert list(expected) == [1, 2, 3, 4]
    assert losses(stopped.stderr + gone_on.stderr) == pytest.approx(expected, rel=2e-3)
    exact = dtype == torch.float32
    one, two = (json.loads((tmp_path / name / "lora/metrics.json").read_text()) for name in ("one", "two"))
    for name in ("base_eval_nats_per_token", "eval_nats_per_token"):
        assert two[name] == pytest.approx(one[name], rel=1e-5 if exact else 2e-3)
    one, two = (load_file(tmp_path / name / "lora/adapter_model.safetensors") for name in ("one", "two"))
    assert {name: weights.shape for name, weights in one.items()} == {name: two[name].shape for name in two}
    for name, weights in one.items():
        torch.testing.assert_close(two[name], weights, rtol=0, atol=1e-4 if exact else 5e-2)

    assert files(tmp_path / "two") == files(tmp_path / "one"), "other files than without FSDP"
    _, loading = AutoModelForCausalLM.from_pretrained(tmp_path / "two/full", output_loading_info=True)
    assert not any(loading.values()), loading


@pytest.mark.parametrize(
    ("load_in_8bit", "environment", "said"),
    [
        ("yes", {}, "--load_in_8bit no"),
        ("auto", {"FSDP_VERSION": "1"}, "fsdp_version: 2"),
        ("auto", {"FSDP_ACTIVATION_CHECKPOINTING": "true"}, "--activation_checkpointing True"),
    ],
)
def test_what_does_not_go_with_fsdp_is_said_in_a_line(load_in_8bit, environment, said, monkeypatch):
    monkeypatch.setattr(sharding.dist, "is_initialized", lambda: True)
    for name, value in ({"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"} | environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(UserError, match=said):
        sharding.asked(load_in_8bit)


def test_the_plan_counts_a_share_of_the_base():
    config = GPT2Config(n_embd=1600, n_layer=48, n_head=25)
    weights, whole = memory.count_weights(config), memory.Needs(1, 512, device="cuda")
    needed = [memory.estimate(config, weights, 0, 0.0, whole._replace(shards=count)) for count in (1, 2, 4)]
    assert needed[0] - needed[2] > 0.6 * 2 * sum(weights)
    assert needed[0] > needed[1] > needed[2] > 2 * sum(weights) / 4
