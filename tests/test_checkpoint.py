"""A run that is stopped, killed or damaged goes on to bitwise the same result; real training on a CPU, dropout on."""

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, save_random_gpt2
from helpers import run_of

import Fine_tuningmodel as script
import main
from dialogue import models, storage
from dialogue.data.corpus import own_openers
from dialogue.data.sources import load_corpus
from dialogue.errors import UserError, exit_code
from dialogue.measure import merge
from dialogue.measure.likelihood import HeldOut
from dialogue.train import progress, runs, trainer

STEPS = 11  # of 4 an epoch


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """Flags for a base model and data; evaluations after each third step."""
    home = tmp_path_factory.mktemp("source")
    save_random_gpt2(home / "base", byte_tokenizer())
    with (home / "talk.jsonl").open("w") as file:
        for number in range(60):
            turns = [f"How are you, {number}?", f"Fine, and you, {number * 7}?", "Good to hear.", "Bye."]
            file.write(json.dumps({"dialog": turns}) + "\n")
    return [
        "--base_model", str(home / "base"), "--dataset", str(home / "talk.jsonl"), "--max_length", "256",
        "--per_device_train_batch_size", "4", "--max_steps", str(STEPS), "--learning_rate", "1e-2", "--save_strategy",
        "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "3",
    ]  # fmt: skip


@pytest.fixture(autouse=True)
def _always_float32(monkeypatch):
    """The precision is measured, and another one would be another result."""
    monkeypatch.setattr("dialogue.machine.pick_dtype", lambda *_: torch.float32)


def run(source, folder, *more):
    """Exit code of a run into `folder`."""
    dirs = ["--adapter_dir", str(folder / "lora"), "--merged_dir", str(folder / "full")]
    return exit_code(lambda: script.main([*source, *dirs, "--output_dir", str(folder / "checkpoints"), *more]))


def weights(folder):
    return [(folder / name).read_bytes() for name in ("lora/adapter_model.safetensors", "full/model.safetensors")]


@pytest.fixture(scope="module")
def whole(source, tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("whole")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dialogue.machine.pick_dtype", lambda *_: torch.float32)
        assert run(source, folder) == 0
    return folder


@pytest.fixture(scope="module")
def stopped(source, tmp_path_factory):
    """The folder of a run that SIGTERM ended after step 6."""
    folder = tmp_path_factory.mktemp("stopped")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("dialogue.machine.pick_dtype", lambda *_: torch.float32)
        stop_after(patch, 6, signal.SIGTERM)
        assert run(source, folder) == 143
    return folder


def stop_after(patch, step, number):
    """Send this process a signal when `step` ends."""
    on_step_end = progress.Progressed.on_step_end

    def on_step_end_and_stop(self, args, state, control, **keywords):
        on_step_end(self, args, state, control, **keywords)
        if state.global_step == step:
            os.kill(os.getpid(), number)

    patch.setattr(progress.Progressed, "on_step_end", on_step_end_and_stop)


def stop_in_evaluation(patch, number):
    """Send this process a signal in the middle of the next evaluation but one; the first is of the untuned model."""
    score, calls = HeldOut.score, []

    def score_and_stop(self, model, batch_size):
        calls.append(1)
        if len(calls) == 2:
            os.kill(os.getpid(), number)
        return score(self, model, batch_size)

    patch.setattr(HeldOut, "score", score_and_stop)


def test_stopped_anywhere_it_ends_with_bitwise_the_same(source, whole, tmp_path, monkeypatch, capsys):
    stops = [
        (lambda patch: stop_after(patch, 1, signal.SIGINT), 130, 1),
        (lambda patch: stop_in_evaluation(patch, signal.SIGTERM), 143, 3),
        (lambda patch: stop_in_evaluation(patch, signal.SIGINT), 130, 3),  # the evaluation that was still due
        (lambda patch: stop_after(patch, 8, signal.SIGTERM), 143, 8),  # the end of an epoch
        (lambda patch: stop_after(patch, STEPS, signal.SIGINT), 130, STEPS),
    ]
    for stop, code, step in stops:
        with monkeypatch.context() as patch:
            stop(patch)
            assert run(source, tmp_path) == code
        assert f"stopped and saved at step {step} of {STEPS}: the same command" in capsys.readouterr().err
        newest = runs.checkpoints(tmp_path / "checkpoints")[0]
        assert newest.name == f"checkpoint-{step}" and storage.damage(newest) is None
    assert run(source, tmp_path) == 0
    assert f"Resuming from {newest}" in capsys.readouterr().out
    assert weights(tmp_path) == weights(whole)
    assert {path.name for path in tmp_path.iterdir()} == {"lora", "full"}, "checkpoints are of no more use"
    scores = [json.loads((folder / "lora/metrics.json").read_text()) for folder in (tmp_path, whole)]
    assert scores[0]["eval_nats_per_token"] == scores[1]["eval_nats_per_token"]
    assert scores[0]["train_tokens"] == scores[1]["train_tokens"]


def test_a_chat_beside_the_training_takes_the_newest_whole_checkpoint_and_changes_nothing(
    source, whole, tmp_path, monkeypatch, capsys
):
    """At the end of step 5; random numbers of its own stand for the process of its own."""
    on_step_end, home, said = progress.Progressed.on_step_end, tmp_path / "checkpoints", []

    def chat(bar, args, state, control, **keywords):
        on_step_end(bar, args, state, control, **keywords)
        if state.global_step == 5:
            assert main.find_model(str(home)) == str(home / "checkpoint-4")
            with torch.random.fork_rng():
                said.append(exit_code(lambda: main.main(["--model", str(home), "--prompt", "Hi", "--max_t", "3"])))

    monkeypatch.setattr(progress.Progressed, "on_step_end", chat)
    assert run(source, tmp_path) == 0
    assert said == [0] and "tokens/s, int8" in capsys.readouterr().err
    assert weights(tmp_path) == weights(whole)


def test_a_checkpoint_that_vanishes_while_it_is_loaded_is_one_line(stopped, tmp_path, monkeypatch, capsys):
    home = copy_of(stopped, tmp_path) / "checkpoints"
    newest = runs.checkpoints(home)[0]
    load = models.load
    monkeypatch.setattr(models, "load", lambda *args: (shutil.rmtree(newest), load(*args))[1])
    assert exit_code(lambda: main.main(["--model", str(home), "--prompt", "Hi"])) == 2
    assert capsys.readouterr().err.startswith("error: ")


def test_sample_replies_are_shown_and_change_nothing(source, whole, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(trainer.DialogueTrainer, "sample_replies", lambda self: [("Hi", "\x1b[31mred\u202e")])
    assert run(source, tmp_path) == 0
    assert weights(tmp_path) == weights(whole)
    assert capsys.readouterr().err.count("you> Hi\n  bot> red\n") == 4
    monkeypatch.undo()
    with monkeypatch.context() as patch:
        patch.setattr("dialogue.machine.pick_dtype", lambda *_: torch.float32)
        assert run(source, tmp_path, "--overwrite", "--max_steps", "3") == 0
    said = capsys.readouterr().err
    openers = own_openers(load_corpus(source[3]), 2)
    assert len(openers) == 2 and all(f"you> {opener}\n  bot> " in said for opener in openers), "of the validation split"


def test_a_killed_merge_is_finished_without_training_again(source, whole, tmp_path, monkeypatch, capsys):
    with monkeypatch.context() as patch:
        patch.setattr(merge, "certify", lambda *_, **__: os.kill(os.getpid(), signal.SIGTERM))
        assert run(source, tmp_path) == 143
    assert {path.name for path in tmp_path.iterdir()} == {"checkpoints", "lora"}
    monkeypatch.setattr(trainer, "train", None)
    assert run(source, tmp_path) == 0
    assert "only the merge is to be done" in capsys.readouterr().out
    assert (tmp_path / "full/run.json").read_bytes() == (tmp_path / "lora/run.json").read_bytes()
    assert weights(tmp_path) == weights(whole)
    assert run(source, tmp_path) == 2
    assert "add --overwrite" in capsys.readouterr().err


def copy_of(folder, target):
    """Checkpoints of a run into the same folder names."""
    shutil.copytree(folder, target, dirs_exist_ok=True)
    return target


def test_another_run_is_named_field_by_field(source, stopped, tmp_path, monkeypatch, capsys):
    copy_of(stopped, tmp_path)
    before = sorted((tmp_path / "checkpoints").iterdir())
    for more in ((), ("--no-resume",)):
        assert run(source, tmp_path, "--learning_rate", "0.5", "--learn", "bot", *more) == 2
        said = capsys.readouterr().err
        assert "learning_rate 0.01, now 0.5" in said and "learn both, now bot" in said and "training data" in said
        assert "seed" not in said and said.count("\n") == 1
    assert sorted((tmp_path / "checkpoints").iterdir()) == before
    monkeypatch.setattr(trainer, "train", lambda *args: pytest.fail(f"resumed: {args[-1]}") if args[-1] else 1 / 0)
    with pytest.raises(ZeroDivisionError):
        run(source, tmp_path, "--learning_rate", "0.5", "--overwrite")
    assert not (tmp_path / "checkpoints").exists()
    assert run(source, tmp_path, "--resume") == 2
    assert "no unfinished run" in capsys.readouterr().err
    copy_of(stopped, tmp_path)
    with pytest.raises(ZeroDivisionError):
        run(source, tmp_path, "--no-resume")
    assert not (tmp_path / "checkpoints").exists()


def test_what_does_not_decide_the_result_may_change(source, stopped, whole, tmp_path):
    copy_of(stopped, tmp_path)
    assert run(source, tmp_path, "--logging_steps", "1", "--save_steps", "50", "--resume") == 0
    assert weights(tmp_path) == weights(whole)


@pytest.mark.parametrize("name", [runs.STATE, storage.RUN_FILE])
def test_a_checkpoint_of_another_shape_is_named_and_the_one_before_is_used(
    name, source, stopped, whole, tmp_path, capsys
):
    copy_of(stopped, tmp_path)
    newest = runs.checkpoints(tmp_path / "checkpoints")[0]
    (newest / name).write_text('{"scores": []}')
    (newest / storage.MANIFEST).unlink()
    storage.seal(newest)
    assert run(source, tmp_path) == 0
    said = capsys.readouterr().err
    assert f"{newest} is broken and passed over: " in said and f"{name} is not as it was written" in said
    assert weights(tmp_path) == weights(whole)


def test_a_broken_checkpoint_is_named_and_the_one_before_is_used(source, stopped, whole, tmp_path, capsys):
    copy_of(stopped, tmp_path)
    newest, before = runs.checkpoints(tmp_path / "checkpoints")
    (newest / "optimizer.pt").write_bytes((newest / "optimizer.pt").read_bytes()[:-1])
    assert run(source, tmp_path) == 0
    out, err = capsys.readouterr()
    assert f"{newest} is broken and passed over: optimizer.pt has" in err
    assert f"Resuming from {before}" in out
    assert weights(tmp_path) == weights(whole)


def test_checkpoints_of_another_program_stay(source, tmp_path, capsys):
    foreign = tmp_path / "checkpoints/checkpoint-5/model.safetensors"
    foreign.parent.mkdir(parents=True)
    foreign.write_text("weeks of work")
    assert run(source, tmp_path, "--overwrite") == 2
    assert "was not written by this version" in capsys.readouterr().err
    assert foreign.read_text() == "weeks of work"


def test_nothing_unpickled_from_a_checkpoint_can_run_code(source, stopped, tmp_path, capsys):
    """A manifest proves that a folder is whole, not who wrote it."""
    copy_of(stopped, tmp_path)

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "owned"),)

    for name in ("optimizer.pt", "scheduler.pt", "rng_state.pth"):
        newest = copy_of(runs.checkpoints(stopped / "checkpoints")[0], tmp_path / "checkpoints/checkpoint-6")
        torch.save(Evil(), newest / name)
        (newest / storage.MANIFEST).unlink()
        storage.seal(newest)
        assert "training_args.bin" not in os.listdir(newest)
        assert run(source, tmp_path) == 2
        assert "may run code, and is not read" in capsys.readouterr().err
    assert not (tmp_path / "owned").exists()


def test_the_best_step_is_kept_and_a_run_without_progress_ends(source, tmp_path, monkeypatch):
    """With a learning rate that ruins the model, the first evaluation is the best one."""
    flags = ["--learning_rate", "0.3", "--eval_steps", "1", "--early_stopping_patience", "2"]
    assert run(source, tmp_path, *flags) == 0
    metrics = json.loads((tmp_path / "lora/metrics.json").read_text())
    state = json.loads((tmp_path / "lora/run.json").read_text())
    assert metrics["best_step"] + 2 == metrics["steps"] < STEPS
    assert f"{metrics['best_step']} of {metrics['steps']} trained" in (tmp_path / "lora/README.md").read_text()
    best = json.loads((tmp_path / "full/certificate.json").read_text())["adapter_perplexity"]
    assert best == pytest.approx(metrics["eval_perplexity"], rel=0.02), "other adapters were saved than the best"
    assert state["settings"]["early_stopping_patience"] == 2


def test_the_second_signal_leaves_at_once(source, tmp_path):
    """The real thing once: a process of its own, whose checkpoint cannot be finished."""
    code = (
        "import sys, time, os; sys.path.insert(0, sys.argv.pop(1)); import Fine_tuningmodel as script\n"
        "from dialogue.errors import exit_code\n"
        "from dialogue import storage\n"
        "seal = storage.seal\n"
        "def slow(folder):\n"
        "    if 'checkpoint-3' in folder.name: print('saving', flush=True); time.sleep(600)\n"
        "    seal(folder)\n"
        "storage.seal = slow\n"
        "sys.exit(exit_code(lambda: script.main(sys.argv[1:])))"
    )
    flags = [
        *source,
        "--adapter_dir",
        "lora",
        "--merged_dir",
        "full",
        "--output_dir",
        "checkpoints",
        "--save_steps",
        "1",
    ]
    command = [sys.executable, "-u", "-c", code, str(Path(script.__file__).parent), *flags]
    with subprocess.Popen(
        command, cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        try:
            for line in process.stdout:
                if line == "saving\n":
                    process.send_signal(signal.SIGINT)
                if "once more leaves at once" in line:
                    process.send_signal(signal.SIGINT)
            assert process.wait(60) == -signal.SIGINT
        finally:
            process.kill()
    assert [path.name for path in runs.checkpoints(tmp_path / "checkpoints")] == ["checkpoint-2", "checkpoint-1"]
    assert all(storage.damage(path) is None for path in runs.checkpoints(tmp_path / "checkpoints"))


def test_a_full_disk_is_said_beforehand(source, tmp_path, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10**9, 10**9, 1000))
    with pytest.raises(UserError, match="not enough disk"):
        model = torch.nn.Linear(4, 4)
        model.num_parameters = lambda: 20
        runs.check_space(model, run_of("--output_dir", str(tmp_path / "checkpoints")))


def test_a_signal_behind_the_last_checkpoint_names_the_step_that_is_saved(source, tmp_path, monkeypatch, capsys):
    on_train_end = progress.Progressed.on_train_end

    def end_and_stop(self, *arguments, **keywords):
        on_train_end(self, *arguments, **keywords)
        os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(progress.Progressed, "on_train_end", end_and_stop)
    assert run(source, tmp_path, "--max_steps", "3", "--save_strategy", "no") == 143
    assert "stopped before anything was saved" in capsys.readouterr().err
    assert run(source, tmp_path, "--max_steps", "3", "--save_steps", "2") == 143
    newest = runs.checkpoints(tmp_path / "checkpoints")[0].name
    assert f"stopped and saved at step {newest.removeprefix('checkpoint-')} of 3" in capsys.readouterr().err
