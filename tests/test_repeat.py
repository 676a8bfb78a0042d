"""A run explains itself: the command in `run.json` makes the same adapters again, bit for bit."""

import importlib.util
import json
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import byte_tokenizer, save_random_gpt2

import Fine_tuningmodel as script
from dialogue.machine import PACKAGES

ROOT = Path(__file__).resolve().parents[1]
FLAGS = ["--base_model", "base", "--dataset", "talk.jsonl", "--max_steps", "6", "--max_length", "96",
         "--per_device_train_batch_size", "2", "--learning_rate", "1e-2", "--logging_steps", "2"]  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """Working directory with a small base model and a file of dialogues."""
    monkeypatch.chdir(tmp_path)
    save_random_gpt2(tmp_path / "base", byte_tokenizer())
    lines = [json.dumps({"dialog": [f"Hi {n}", "Hello", "How are you?", f"Fine, {n} times."]}) for n in range(60)]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines) + "\n")
    return tmp_path


def test_the_saved_command_makes_the_same_adapters(home):
    script.main(FLAGS)
    first = (home / "gpt2-dialogue-lora/adapter_model.safetensors").read_bytes()
    run = json.loads((home / "gpt2-dialogue-lora/run.json").read_text())
    assert {"python", *PACKAGES} <= run["facts"].keys()
    assert run["settings"]["learning_rate"] == 1e-2 and run["settings"]["seed"] == 42
    assert run["command"] in (home / "gpt2-dialogue-lora/README.md").read_text()
    assert run == json.loads((home / "gpt2-dialogue-full/run.json").read_text())

    python, name, *flags = shlex.split(run["command"])
    assert python == "python"
    command = [sys.executable, str(ROOT / name), *flags, "--overwrite"]  # in another folder it needs no --overwrite
    again = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert again.returncode == 0, again.stderr
    assert (home / "gpt2-dialogue-lora/adapter_model.safetensors").read_bytes() == first
    for line in again.stderr.splitlines():
        assert line.startswith(("step ", "  you> ", "  bot> ")) or not line, "a line that nobody can act on"


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_gets_the_losses(home):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script.main([*FLAGS, "--report_to", "tensorboard", "--eval_strategy", "steps", "--eval_steps", "3"])
    events = EventAccumulator(str(next((home / "gpt2-dialogue-checkpoints").rglob("*tfevents*"))))
    events.Reload()
    assert {"train/loss", "train/learning_rate", "eval/loss", "eval/perplexity"} <= set(events.Tags()["scalars"])
    assert [point.step for point in events.Scalars("train/loss")] == [2, 4, 6]
