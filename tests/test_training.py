"""Trainings that run out of memory, against a clock, and in several processes: the same losses all the same."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import plan_of, run_of, train_on
from peft import LoraConfig
from transformers import TrainerCallback, TrainingArguments, set_seed

from dialogue.data.packing import IGNORED, encode, fill_up, mean_dialogue_length, pack
from dialogue.errors import UserError
from dialogue.measure.likelihood import hold_out
from dialogue.models import load_base
from dialogue.prompt import add_roles
from dialogue.train import options, plan, speedups, trainer
from dialogue.train.lora import attach

DIALOGUES = [[f"Hello, I am number {n}.", "How are you?", "Fine " * (n % 5 + 1)] for n in range(32)]
LENGTH = 64


def prepare(folder, tokenizer):
    """(model with LoRA and no dropout, rows, held-out dialogues)."""
    add_roles(tokenizer)
    set_seed(3)
    base = load_base(str(folder), torch.float32, torch.device("cpu"), tokenizer)
    targets = ["c_attn", "c_proj"]
    lora = LoraConfig(r=4, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM")
    model = speedups.apply(attach(base, lora, tokenizer))
    pieces = encode(tokenizer, DIALOGUES, LENGTH).pieces
    return model, pack(pieces, tokenizer, LENGTH, "both")[:16], hold_out(pieces[:7], tokenizer, LENGTH)


def settings(folder, **changes):
    fixed = {
        "output_dir": str(folder), "max_steps": 4, "per_device_train_batch_size": 4, "learning_rate": 1e-2,
        "logging_steps": 1, "report_to": "none", "save_strategy": "no", "seed": 5, "dataloader_pin_memory": False,
    }  # fmt: skip
    return TrainingArguments(**fixed | changes)


def losses(trained):
    """(losses of the steps, loss on the held-out dialogues)."""
    return [entry["loss"] for entry in trained.history if "loss" in entry], trained.score.nats_per_token


@pytest.fixture(scope="module")
def expected(random_gpt2, tmp_path_factory):
    """Losses of a plain run with four rows a step."""
    from conftest import gpt2_tokenizer

    tokenizer = gpt2_tokenizer()
    model, rows, held_out = prepare(random_gpt2, tokenizer)
    return losses(train_on(model, tokenizer, rows, held_out, settings(tmp_path_factory.mktemp("plain"))))


def out_of_memory_beyond(model, rows, where=lambda hidden: True):
    """A device whose memory takes the forward pass of `rows` rows, and the backward pass of half as many."""
    seen = []
    inner = model.get_base_model().transformer.h[0]

    def check(module, arguments, output):
        count = len(output[0] if isinstance(output, tuple) else output)
        seen.append(count)
        if count > rows and where(output[0] if isinstance(output, tuple) else output):
            raise torch.OutOfMemoryError("CUDA out of memory")
        if count == rows:
            hidden = output[0] if isinstance(output, tuple) else output
            if hidden.requires_grad:
                hidden.register_hook(run_out)

    def run_out(gradient):
        raise torch.OutOfMemoryError("CUDA out of memory")

    inner.register_forward_hook(check)
    return seen


def test_out_of_memory_in_the_rehearsal_keeps_the_effective_batch(random_gpt2, tokenizer, tmp_path, expected):
    model, rows, held_out = prepare(random_gpt2, tokenizer)
    out_of_memory_beyond(model, 2)
    asked = settings(tmp_path)
    whole = plan_of(rows, held_out, asked, torch.float32)
    planned = plan.rehearse(model, tokenizer, whole.rows, run_of(arguments=asked), whole.fit)
    arguments = planned.arguments
    assert (planned.fit.rows, arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps) == (1, 1, 4)
    arguments.per_device_eval_batch_size = 1
    found = losses(train_on(model, tokenizer, rows, held_out, arguments))
    assert found[0] == pytest.approx(expected[0], rel=1e-5)


def test_a_single_row_that_does_not_fit_is_said_in_a_line(random_gpt2, tokenizer, tmp_path):
    model, rows, held_out = prepare(random_gpt2, tokenizer)
    whole = plan_of(rows, held_out, settings(tmp_path), torch.float32)
    out_of_memory_beyond(model, 0, where=lambda hidden: hidden.requires_grad)
    with pytest.raises(UserError, match=r"single row.*--max_length"):
        plan.rehearse(model, tokenizer, whole.rows, run_of(arguments=whole.arguments), whole.fit)


def test_a_budget_becomes_steps_and_a_clock_that_ends_the_run(random_gpt2, tokenizer, tmp_path, monkeypatch):
    """The rehearsal promises steps of 1.5 s; they take 3 s, and the run ends on time all the same."""
    model, rows, held_out = prepare(random_gpt2, tokenizer)
    arguments = settings(tmp_path, max_steps=-1, num_train_epochs=100, lr_scheduler_type="linear")
    run = run_of("--budget", "1m", arguments=arguments)
    whole = plan_of(rows, held_out, arguments, torch.float32)
    rehearsal = plan.Rehearsal(1.5, round(4 * plan.count_tokens(rows) / len(rows)), 0)
    planned = plan.foresee(rehearsal, whole.rows, run, whole.fit)
    reserve = plan.evaluation_seconds(rehearsal, held_out, arguments)
    assert planned.steps * plan.AROUND * 1.5 + reserve == pytest.approx(60, rel=0.1)
    assert planned.arguments.max_steps == planned.steps, "the schedule goes over the steps that fit"

    clock = [100.0]
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: clock[0])

    class Slow(TrainerCallback):
        def on_step_begin(self, args, state, control, **_):
            clock[0] += 3.0

    trained = trainer.train(model, tokenizer, planned, run, {}, callbacks=(Slow(),))
    assert trained.seconds == pytest.approx(60, abs=3)
    assert trained.steps < planned.steps
    assert trained.steps in [entry["step"] for entry in trained.history if "eval_loss" in entry], "not evaluated"


def test_budgets_are_written_as_people_do():
    written = {"90s": 90, "20m": 1200, "1h30m": 5400, "2h": 7200, "1H5S": 3605}
    assert {text: options.parse_duration(text) for text in written} == written
    for text in ("", "20", "m", "1.5h", "-3m", "0s"):
        with pytest.raises(UserError, match="20m"):
            options.parse_duration(text)


def test_rows_are_filled_up_without_a_label_more():
    row = {"input_ids": [1, 2, 3], "position_ids": [0, 1, 0], "labels": [IGNORED, 2, 3]}
    filled = fill_up([row] * 5, 4)
    assert len(filled) == 8 and filled[:5] == [row] * 5
    assert all(set(extra["labels"]) == {IGNORED} for extra in filled[5:])
    assert fill_up([row] * 8, 4) == [row] * 8
    assert mean_dialogue_length([row]) == round((4 + 1) / 3)


def torchrun(function, *arguments):
    """A function of this file in two processes that talk through gloo."""
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(["", *sys.path])}
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--master_port=0", "--standalone"]
    return subprocess.run(
        [*command, __file__, function, *map(str, arguments)],
        capture_output=True, text=True, env=environment, timeout=240, check=False,
    )  # fmt: skip


def share(folder, out):
    """What each of several processes runs: its share of the same training."""
    from conftest import gpt2_tokenizer

    tokenizer = gpt2_tokenizer()
    model, rows, held_out = prepare(folder, tokenizer)
    arguments = settings(Path(out) / "checkpoints", per_device_train_batch_size=2, use_cpu=True)
    found = losses(train_on(model, tokenizer, rows, held_out, arguments))
    Path(out, f"{arguments.process_index}-of-{arguments.world_size}.json").write_text(json.dumps(found))


def test_two_processes_have_the_losses_of_one(random_gpt2, tmp_path, expected):
    """`torchrun` with gloo on a CPU: two rows a process, against four in one."""
    run = torchrun("share", random_gpt2, tmp_path)
    assert run.returncode == 0, run.stderr
    assert sorted(path.name for path in tmp_path.glob("*.json")) == ["0-of-2.json", "1-of-2.json"]
    for file in tmp_path.glob("*.json"):
        steps, held_out = json.loads(file.read_text())
        assert held_out == pytest.approx(expected[1], rel=1e-5)
        if steps:  # the first process keeps the log
            assert steps == pytest.approx(expected[0], rel=1e-4)
    assert run.stderr.count("step 4/4") >= 1


def rehearse_with_less_memory_in_the_second(folder, out):
    """What each of two processes runs: the second one's device takes a single row."""
    from conftest import gpt2_tokenizer

    tokenizer = gpt2_tokenizer()
    model, rows, held_out = prepare(folder, tokenizer)
    arguments = settings(Path(out) / "checkpoints", use_cpu=True)
    whole = plan_of(rows, held_out, arguments, torch.float32)
    if arguments.process_index:
        out_of_memory_beyond(model, 2, where=lambda hidden: hidden.requires_grad)
    planned = plan.rehearse(model, tokenizer, whole.rows, run_of(arguments=arguments), whole.fit)
    found = planned.fit.rows, planned.arguments.gradient_accumulation_steps, planned.steps
    Path(out, f"{arguments.process_index}.json").write_text(json.dumps(found))


def test_processes_agree_on_the_smallest_batch(random_gpt2, tmp_path):
    run = torchrun("rehearse_with_less_memory_in_the_second", random_gpt2, tmp_path)
    assert run.returncode == 0, run.stderr
    found = [json.loads((tmp_path / f"{number}.json").read_text()) for number in (0, 1)]
    assert found[0] == found[1] == [1, 4, 4]


if __name__ == "__main__":
    globals()[sys.argv[1]](*sys.argv[2:])
