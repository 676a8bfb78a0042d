"""`main.py` as a person or a script runs it: real processes, a real pseudo-terminal."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pexpect
import pytest
from test_generation import merged  # noqa: F401 (a fixture)

import main as chat

MAIN = Path(__file__).resolve().parents[1] / "main.py"


def run(folder, *flags, said=None):
    """(standard output, standard error, exit code) of main.py in `folder`."""
    done = subprocess.run(
        [sys.executable, MAIN, *flags], cwd=folder, input=said, capture_output=True, text=True, timeout=280, check=False
    )
    return done.stdout, done.stderr, done.returncode


@pytest.fixture
def home(merged, tmp_path, monkeypatch):  # noqa: F811
    """A working directory in which a model was trained."""
    (tmp_path / "gpt2-dialogue-full").symlink_to(merged)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    return tmp_path


def test_no_model_says_how_to_train_one(tmp_path):
    out, err, code = run(tmp_path)
    assert (out, code) == ("", 2)
    assert len(err.strip().splitlines()) == 1
    assert "python Fine_tuningmodel.py" in err


def test_pipe_gets_replies_only(home):
    out, err, code = run(home, "--max_t", "4", "--temp", "0", "--stats", "json", said="Hi\n\nAnd <END> you?\n")
    assert code == 0
    assert len(out.splitlines()) >= 2
    assert "\x1b" not in out + err
    stats = [json.loads(line) for line in err.splitlines()]
    assert [set(line) for line in stats] == [
        {"prompt_tokens", "new_tokens", "first_token_seconds", "tokens_per_second", "precision"}
    ] * 2


def test_generate_text_works_alone_and_its_defaults_are_the_chat_s(home, monkeypatch):
    monkeypatch.chdir(home)
    pieces = []
    reply = chat.generate_text("Hello", 6, temp=0, on_text=pieces.append)
    assert reply == "".join(pieces)
    assert chat.generate_text("Hello", max_t=6, temp=0) == reply
    assert list(chat.settings().items())[:4] == [("max_t", 50), ("temp", 0.8), ("top_k", 40), ("top_p", 0.9)]


def test_a_conversation_on_a_terminal(home):
    """One session for all of it: a start of the process costs seconds."""
    terminal = pexpect.spawn(
        sys.executable, [str(MAIN), "--seed", "5", "--max_t", "90"], cwd=home, encoding="utf-8", timeout=120,
        dimensions=(24, 60), env={**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"},
    )  # fmt: skip

    def command(text, *expected):
        terminal.sendline(text)
        for pattern in expected:
            terminal.expect(pattern)

    terminal.expect("/help lists commands")
    terminal.expect("you>")
    terminal.sendintr()
    terminal.expect("type exit to leave")
    command("/undo", "nothing to take back")
    command("Hello you", "bot> ", "tokens/s")
    terminal.setwinsize(30, 40)
    command("/set temp 0", r"temp = 0")
    command("/set max_t 5", r"max_t = 5")
    command("/set temp hot", "needs a number")
    command("/set top_p 7", "must lie between")
    command("/show", r"max_t = 5", r"temp = 0.0", r"context = \d+/96")
    command("/retry", "bot> ", "tokens/s")
    command("/save talk.json", "saved to talk.json")
    command("/undo", "taken back: Hello you")
    command("/load talk.json", "2 turns loaded")
    command("/load nowhere.json", "could not be read")
    command("/context", "<USER>Hello you<END>")
    command("/nonsense", "no command /nonsense")
    command("//slash", "bot> ", "tokens/s")
    command("/reset", "a new conversation")
    command("/set max_t 85", "max_t = 85")
    command("/set temp 1.5", "temp = 1.5")
    terminal.sendline("talk on and on")
    terminal.expect("bot> ..")
    terminal.sendintr()
    terminal.expect(r"\[stopped\]|tokens/s")
    command("exit", "Bye")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
    saved = json.loads((home / "talk.json").read_text())
    assert [message["role"] for message in saved] == ["user", "assistant"]
    assert saved[0]["content"] == "Hello you"
    assert "Hello you" in (home / "state/gpt2-dialogue/history").read_text()


def test_end_of_file_leaves_before_the_model_is_there(home):
    terminal = pexpect.spawn(sys.executable, [str(MAIN)], cwd=home, encoding="utf-8", timeout=60)
    terminal.expect("you>")
    terminal.sendeof()
    terminal.expect("Bye")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0


@pytest.mark.parametrize("flags", [["--temp", "hot"], ["--nonsense"], ["--model", "nowhere", "--prompt", "Hi"]])
def test_mistakes_are_said_in_a_line(home, flags):
    out, err, code = run(home, *flags)
    assert (out, code) == ("", 2)
    assert re.search("error: ", err.splitlines()[-1])
    assert "Traceback" not in err
