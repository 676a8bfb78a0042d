"""A run explains itself: the command in `run.json` makes the same adapters again, bit for bit."""

import importlib.util
import json
import re
import shlex
import subprocess
import sys
import threading
import types
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, save_random_gpt2

import Fine_tuningmodel as script
from dialogue import evaluate, models
from dialogue.errors import UserError, exit_code
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
        assert line.startswith(("step ", "  you> ", "  bot> ", "after the last step: ")) or not line, (
            "a line that nobody can act on"
        )


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed")
def test_tensorboard_gets_the_losses(home):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    script.main([*FLAGS, "--report_to", "tensorboard", "--eval_strategy", "steps", "--eval_steps", "3"])
    events = EventAccumulator(str(next((home / "gpt2-dialogue-checkpoints").rglob("*tfevents*"))))
    events.Reload()
    assert {"train/loss", "train/learning_rate", "eval/loss", "eval/perplexity"} <= set(events.Tags()["scalars"])
    assert [point.step for point in events.Scalars("train/loss")] == [2, 4, 6]


@pytest.mark.skipif(not importlib.util.find_spec("tensorboard"), reason="tensorboard is not installed")
def test_two_runs_of_one_process_log_into_folders_of_their_own(home):
    for name in "ab":
        dirs = ["--adapter_dir", f"{name}/lora", "--merged_dir", f"{name}/full", "--output_dir", f"{name}/checkpoints"]
        script.main([*FLAGS, "--max_steps", "1", *dirs, "--report_to", "tensorboard"])
        assert len(list((home / name).rglob("*tfevents*"))) == 1


def test_more_data_on_top_of_a_tuned_model(home):
    """The way that docs/own-data.md describes: adapters of the second run refer to the first run's merged model."""
    first = ["--merged_dir", "first-full", "--adapter_dir", "first-lora"]
    second = ["--base_model", "first-full", "--merged_dir", "second-full", "--adapter_dir", "second-lora"]
    thread = threading.Thread(target=script.main, args=([*FLAGS, *first],))  # as a notebook may do it
    thread.start()
    thread.join()
    before = (home / "first-full/model.safetensors").read_bytes()
    script.main([*FLAGS, *second])
    assert (home / "first-full/model.safetensors").read_bytes() == before
    assert json.loads((home / "second-lora/adapter_config.json").read_text())["base_model_name_or_path"] == "first-full"
    metrics = [json.loads((home / name / "metrics.json").read_text()) for name in ("first-lora", "second-lora")]
    assert metrics[1]["base_eval_nats_per_token"] == pytest.approx(metrics[0]["eval_nats_per_token"], rel=0.01)
    assert metrics[1]["eval_nats_per_token"] < metrics[0]["eval_nats_per_token"]
    certificate = json.loads((home / "second-full/certificate.json").read_text())
    assert certificate["greedy_agreement"] > 0.9 and certificate["rough"]
    whole, adapters = (models.load(name, None, torch.device("cpu"))[0] for name in ("second-full", "second-lora"))
    for one, other in zip(whole.parameters(), adapters.parameters(), strict=True):
        torch.testing.assert_close(one.float(), other.float(), rtol=2e-3, atol=1e-3)
    flags = ["--model", "second-full", "--contexts", "3", "--max_t", "4", "--json", "figures.json"]
    evaluate.main(flags)
    figures = json.loads((home / "figures.json").read_text())
    assert figures["settings"]["base"] == "first-full"
    likely = next(iter(figures["base"])), "nats_per_token"
    assert figures["tuned"][likely[0]][likely[1]]["value"] < figures["base"][likely[0]][likely[1]]["value"]

    (home / "link").symlink_to("first-full")
    for base, merged in (("first-full", "first-full"), ("first-full", "link"), ("link", "./first-full")):
        dirs = ["--base_model", base, "--merged_dir", merged, "--adapter_dir", "third-lora", "--overwrite"]
        with pytest.raises(UserError, match="would be replaced, and"):
            script.main([*FLAGS, *dirs])
    with pytest.raises(UserError, match="and first-lora/talk"):
        (home / "first-lora/talk.jsonl").write_bytes((home / "talk.jsonl").read_bytes())
        script.main([*FLAGS, *first, "--overwrite", "--dataset", "first-lora/talk.jsonl"])
    assert (home / "first-full/model.safetensors").read_bytes() == before


def test_figures_of_few_dialogues_say_so_wherever_they_stand(home, capsys):
    script.main(FLAGS)
    said = r"figures of so few dialogues \(\d+\) are rough"
    out = " ".join(capsys.readouterr().out.split())
    assert re.search(f"Plan.*{said}.*Perplexity on validation replies.*{said}", out)
    evaluate.main(["--model", "gpt2-dialogue-full", "--contexts", "3", "--max_t", "4"])
    assert re.search(said, " ".join(capsys.readouterr().out.split()))
    adapters, merged = ((home / f"gpt2-dialogue-{name}/README.md").read_text() for name in ("lora", "full"))
    for card in (adapters, merged):
        assert re.search(f"How good it is\\s+On the replies of \\d+ validation dialogues; {said}", card)
    assert re.search(rf"{said}; `main.py` starts with them", merged)


def test_a_login_that_is_missing_is_said_before_the_rehearsal(home, capsys, monkeypatch):
    """wandb asks for a key only when the training begins; where nobody is there to answer, that is an error."""

    class NotLoggedIn(types.ModuleType):
        def login(self):
            raise RuntimeError("No API key configured.\nUse `wandb login` to log in.")

    monkeypatch.setitem(sys.modules, "wandb", NotLoggedIn("wandb"))
    monkeypatch.setattr("dialogue.train.options.get_available_reporting_integrations", lambda: ["wandb"])
    assert exit_code(lambda: script.main([*FLAGS, "--report_to", "wandb"])) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1 and "--report_to wandb: No API key" in captured.err
    assert "Plan" not in captured.out and not list(home.glob("gpt2*"))
