"""`--teach`: lessons that the chat kept are learned on top of a run's adapters."""

import json
import shutil

import pytest
from conftest import byte_tokenizer, gpt2_tokenizer
from helpers import memorised

import Fine_tuningmodel as script
from dialogue import lessons
from dialogue.errors import UserError
from dialogue.prompt import add_roles
from dialogue.train import teach

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
    assert [row == other for row in rows] == [*[False] * teach.TAUGHT, *[True] * teach.REPLAY] * (teach.PASSES // 2)
    labels = [label for label in next(row for row in rows if row != other)["labels"] if label != -100]
    assert tokenizer.decode(labels) == "I am Ada.<END>"


def test_without_adapters_or_lessons_there_is_a_line(tmp_path, home, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match="no adapters to teach: train first"):
        script.main(["--teach"])
    shutil.copytree(home, tmp_path / "here")
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UserError, match="keep lessons in the chat first"):
        script.main(["--teach"])
