"""`--teach`: lessons that the chat kept are learned on top of a run's adapters."""

import json
import shutil

import pytest
import torch
from conftest import byte_tokenizer, gpt2_tokenizer
from helpers import memorised

import Fine_tuningmodel as script
from dialogue import lessons
from dialogue.chat.sampling import Sampling
from dialogue.data import packing
from dialogue.errors import UserError
from dialogue.measure import merge
from dialogue.measure.loss import head_of, summed_nats
from dialogue.models import load_base
from dialogue.prompt import add_roles
from dialogue.train import lora, teach

TALK = [
    ["Hello, how are you?", "I'm fine, thank you."], ["What time is it?", "It's noon."],
    ["Are you hungry?", "Yes, very!"], ["Where do you live?", "In a town by the sea."],
]  # fmt: skip
LESSONS = [(TALK[0][0], TALK[2][1]), (TALK[1][0], TALK[3][1])]  # other answers than it has


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    """A folder with data and the result of a run, made in the working directory as a person makes it."""
    home = tmp_path_factory.mktemp("teach")
    memorised("gpt2", gpt2_tokenizer(), home, TALK)
    shutil.rmtree(home / "lora")
    shutil.rmtree(home / "full")
    with (home / "talk.jsonl").open("w") as file:
        for number in range(60):
            turns = TALK[number % 4]
            file.write(json.dumps({"dialog": [*turns, f"{turns[0]} {number}", turns[1]]}) + "\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        flags = ["--base_model", "base", "--dataset", "talk.jsonl", "--max_length", "64", "--max_steps", "4"]
        script.main([*flags, "--learning_rate", "1e-3", "--eval_strategy", "no"])
    return home


@pytest.fixture
def taught(home, tmp_path, monkeypatch):
    """A copy of that folder, as the working directory, with two lessons."""
    here = tmp_path / "here"
    shutil.copytree(home, here)
    monkeypatch.chdir(here)
    for asked, wanted in LESSONS:
        lessons.keep([{"role": "user", "content": asked}, {"role": "assistant", "content": wanted}])
    return here


FAST = ["--teach", "--learning_rate", "1e-2"]


def test_what_was_taught_is_said_word_for_word_and_the_table_shows_it(taught, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    script.main(FAST)
    said = capsys.readouterr().out
    assert "2 of 2 lessons are said word for word" in said
    for words in (LESSONS[1][0], LESSONS[1][1], "before", "wanted", "perplexity on validation replies"):
        assert words in said
    run = json.loads((taught / "gpt2-dialogue-lora" / "run.json").read_text())
    assert run["settings"]["base_model"] == "base" and run["settings"]["dataset"] == "talk.jsonl"
    assert (taught / "gpt2-dialogue-full" / "certificate.json").is_file()
    with pytest.raises(UserError, match="taught already"):
        script.main(FAST)


def test_taught_twice_from_the_same_start_gives_the_same_bits(taught, home, monkeypatch):
    script.main(FAST)
    again = taught.parent / "again"
    shutil.copytree(home, again)
    shutil.copy(taught / lessons.LESSONS, again)
    monkeypatch.chdir(again)
    script.main(FAST)
    for name in ("gpt2-dialogue-lora/adapter_model.safetensors", "gpt2-dialogue-full/model.safetensors"):
        assert (taught / name).read_bytes() == (again / name).read_bytes()


def test_a_stop_between_adapters_and_merged_model_is_gone_on_from(taught, capsys):
    script.main(FAST)
    shutil.rmtree(taught / "gpt2-dialogue-full")
    script.main(FAST)
    assert "only the merge is to be done" in capsys.readouterr().out
    assert (taught / "gpt2-dialogue-full" / "model.safetensors").is_file()


def test_a_lesson_s_earlier_replies_are_read_and_not_learned(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    said = [("user", "Hi"), ("assistant", "WRONG"), ("user", "Who are you?"), ("assistant", "I am Ada.")]
    lessons.keep([{"role": role, "content": text} for role, text in said])
    assert lessons.LESSONS.stat().st_mode & 0o777 == 0o600
    tokenizer = byte_tokenizer()
    add_roles(tokenizer)
    other = {name: [7] * 9 for name in ("input_ids", "position_ids", "labels")}
    rows = teach.mix(teach.read_lessons(), [other], tokenizer, 64, 0)
    assert all(("replay" in row) and (row["labels"] == other["labels"]) == row["replay"][0] for row in rows)
    assert [row["replay"][0] for row in rows] == [*[0] * teach.TAUGHT, *[1] * teach.REPLAY] * (
        teach.PASSES // teach.TAUGHT
    )
    taught = [row for row in rows if not row["replay"][0]]
    learned = [tokenizer.decode([label for label in row["labels"] if label != -100]) for row in taught]
    assert set(learned) == {"I am Ada.<END>"}
    asked = [tokenizer.decode(row["input_ids"]) for row in taught]
    assert set(asked[::2]) == {"<USER>Hi<END><BOT>WRONG<END><USER>Who are you?<END><BOT>I am Ada.<END>"}
    assert any("<USER>Who you?<END>" in text for text in asked[1::2]), "it was asked in no other words"
    assert not any("<USER><END>" in text for text in asked)
    with pytest.raises(UserError, match="no lesson fits into 20 tokens: shorten them"):
        teach.mix([["Hi", "word " * 30]], [other], tokenizer, 20, 0)


def test_what_is_not_taught_is_held_where_it_was(random_gpt2):
    """The loss of a step is the lessons' cross-entropy and the divergence from before on the rest."""
    tokenizer = gpt2_tokenizer()
    add_roles(tokenizer)
    model = lora.attach(
        load_base(str(random_gpt2), torch.float32, torch.device("cpu"), tokenizer), script.lora_config, tokenizer
    )
    rows = packing.pack(packing.encode(tokenizer, TALK, 32).pieces, tokenizer, 32, "both")[:2]
    rows = [{**row, "replay": [n] * len(row["labels"])} for n, row in enumerate(rows)]
    batch, head = packing.collate(rows, 0), head_of(model)
    before = teach.Before(model, head, rows, 0)
    model.eval()
    taught, held = ({name: of[row] for name, of in batch.items() if name != "replay"} for row in ([0], [1]))
    with torch.no_grad():
        was = model(**held, use_cache=False).logits[0, :-1].log_softmax(-1)
        assert before.summed_nats(model, batch, head).item() == pytest.approx(summed_nats(model, taught, head).item())
        trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
        for parameter in trained.values():
            parameter += 0.05 * torch.randn_like(parameter)
    now = model(**held, use_cache=False).logits[0, :-1].log_softmax(-1)
    at = held["labels"][0, 1:] != -100
    divergence = torch.nn.functional.kl_div(now[at], was[at], reduction="sum", log_target=True)
    (summed_nats(model, taught, head) + teach.PULL * divergence).backward()
    expected = {name: parameter.grad.clone() for name, parameter in trained.items()}
    model.zero_grad()
    loss = before.summed_nats(model, batch, head)
    loss.backward()
    assert divergence > 0.01
    for name, parameter in trained.items():
        torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-3, atol=1e-5)


def test_without_adapters_or_lessons_there_is_a_line(tmp_path, home, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no adapters to teach: train first"):
        script.main(["--teach"])
    shutil.copytree(home, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="keep lessons in the chat first"):
        script.main(["--teach"])


def test_settings_that_were_fitted_before_are_optional(tmp_path):
    assert merge.known_sampler(tmp_path / "none") is None
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text("{broken")
    assert merge.known_sampler(tmp_path) is None
    (tmp_path / "generation_config.json").write_text('{"do_sample": false, "repetition_penalty": 1.06}')
    assert merge.known_sampler(tmp_path) == Sampling(0.0, repetition_penalty=1.06)
