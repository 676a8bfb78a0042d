"""What is written to a terminal, a pipe and a history file; without a model."""

import io
import os
import shutil
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.cells import cell_len

from dialogue.chat import commands, history, session, terminal
from dialogue.errors import UserError

letters = st.text(alphabet="abc  \n\t你好👋🏽é,", max_size=12)


def lay(pieces, width, column=0):
    wrap = session.Wrap(lambda: width, column)
    return "".join(wrap.add(piece) for piece in pieces) + wrap.rest()


@given(st.lists(letters, max_size=12), st.integers(8, 40))
def test_lines_break_at_the_edge_and_nothing_is_lost(pieces, width):
    text = "".join(pieces)
    out = lay(pieces, width)
    assert all(cell_len(line) < width for line in out.split("\n"))
    assert "".join(out.split()) == "".join(text.split())
    assert out == lay(text, width), "how the text is cut into pieces shows"


def test_words_stay_whole():
    assert lay(["Good mor", "ning to", " you all"], 10) == "Good \nmorning \nto you \nall"
    assert lay(["bot says hi"], 10, column=5) == "bot \nsays hi"
    assert lay("abcdefghijklmno", 8) == "abcdefg\nhijklmn\no"
    assert lay("你好你好你好", 8) == "你好你\n好你好"
    wrap = session.Wrap(lambda: 40, 0)
    assert wrap.add("half a wo") == "half a ", "a word waits until it ends"
    assert wrap.add("rd 你好") == "word 你"


def test_a_resized_terminal_is_noticed():
    width = 40
    wrap = session.Wrap(lambda: width, 0)
    assert wrap.add("one two ") == "one two "
    width = 10
    assert wrap.add("three four ") == "\nthree \nfour "


class Replies:
    """What `answer` needs of a conversation."""

    stats = "5 tokens, 1.0 s, 8 tokens/s, float32"
    forgotten = 0


def answer(messages):
    heard = []

    def generate(message, conversation, on_text, **chosen):
        if message == "long":
            raise UserError("make it shorter")
        heard.append((message, chosen))
        on_text(f"re: {message}")

    terminal.answer(messages, Replies, generate, {"temp": 0})
    return heard


def test_replies_go_to_standard_output_and_the_rest_does_not(capsys):
    assert answer(["Hi\n", "\n", " you \n", "exit\n", "never\n"]) == [("Hi", {"temp": 0}), ("you", {"temp": 0})]
    out, err = capsys.readouterr()
    assert out == "re: Hi\nre: you\n"
    assert err == "5 tokens, 1.0 s, 8 tokens/s, float32\n" * 2


def test_a_message_that_fails_takes_no_other_with_it(capsys):
    with pytest.raises(SystemExit) as end:
        answer(["Hi", "", "long", "you", "long", "again"])
    assert end.value.code == 2
    out, err = capsys.readouterr()
    assert out == "re: Hi\nre: you\nre: again\n"
    assert [line for line in err.splitlines() if "tokens" not in line] == [
        "error: message 2: make it shorter",
        "error: message 4: make it shorter",
    ]


def test_no_message_costs_no_model():
    for messages in ([], ["\n", " "]):
        with pytest.raises(UserError, match="no message to answer"):
            terminal.answer(messages, lambda: pytest.fail("a model is loaded"), print, {})
    terminal.answer(["exit", "never"], lambda: pytest.fail("a model is loaded"), print, {})


def test_a_reply_is_one_line(capsys):
    terminal.answer(["Hi"], Replies, lambda *_, on_text, **__: on_text("one\ntwo\u2028three"), {})
    assert capsys.readouterr().out == "one two three\n"


def test_a_reader_who_leaves_is_no_error(monkeypatch):
    reading, writing = os.pipe()
    os.close(reading)
    with open(writing, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert answer(["Hi", "again"]) == [("Hi", {"temp": 0})]


def test_history_is_kept_for_its_owner_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    file = tmp_path / "gpt2-dialogue/history"
    file.parent.mkdir()
    file.touch(0o644)
    history.open_history().append_string("hello \udc80")
    assert list(history.open_history().load_history_strings()) == ["hello ?"]
    assert file.stat().st_mode & 0o777 == 0o600


@pytest.mark.parametrize("way", ["full disk", "vanished folder", "a file in its place", "a folder in its place"])
def test_history_goes_on_in_memory(way, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path))
    if way == "a file in its place":
        (tmp_path / "gpt2-dialogue").touch()
    if way == "a folder in its place":
        (tmp_path / "gpt2-dialogue/history").mkdir(parents=True)
    kept = history.open_history()
    if way == "vanished folder":
        shutil.rmtree(tmp_path / "gpt2-dialogue")
    assert list(kept.load_history_strings()) == []
    if way == "full disk":
        kept.filename = "/dev/full"  # to be written only: reading it never ends
    for said in ("hello", "again"):
        kept.append_string(said)
    assert kept.get_strings() == ["hello", "again"]


@pytest.mark.parametrize(
    ("line", "said"),
    [("/nonsense", "no command /nonsense"), ("/", "no command /"), ("/set temp", "temp must be a number"),
     ("/set mood 3", "no setting mood"), ("/set temp hot", "temp must be a number"), ("/set top_k 1.5", "whole number"),
     ("/set top_p 7", "top_p must be"), ("/set max_t 0", "max_t must be"), ("/save", "typed /save FILE"),
     ("/undo twice", "typed /undo"), ("/load nowhere.json", "is no file"), ("/load .", "is no file"),
     ("/load /dev/zero", "is no file"), ("/load pipe", "is no file"), ("/save pipe", "take another name"),
     ("/save /dev/full", "is no file; take another name"),
     ("/save /dev/null", "take another name"), ("/save .", "is no file"), ("/save file.txt", "take another name")],
)  # fmt: skip
def test_a_wrong_command_explains_itself_and_changes_nothing(line, said, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file.txt").write_text("a text")
    os.mkfifo("pipe")
    chat = chat_of({"max_t": 50, "temp": 0.8, "top_k": 40, "top_p": 0.9})
    with pytest.raises(UserError, match=said):
        commands.run(chat, line)
    assert chat.chosen == {} and (tmp_path / "file.txt").read_text() == "a text"


def chat_of(settings):
    loading = terminal.in_background(lambda: None)
    loading.result()
    return session.Chat(loading, print, settings, {})


def test_set_changes_and_shows(capsys):
    chat = chat_of({"max_t": 50, "temp": 0.8, "top_k": 40, "top_p": 0.9})
    commands.run(chat, "/SET temp 0.5")
    commands.run(chat, "/set")
    assert chat.chosen == {"temp": 0.5}
    assert [line.split() for line in capsys.readouterr().out.splitlines()] == [
        ["temp", "=", "0.5"], ["max_t", "50", "default"], ["temp", "0.5"], ["top_k", "40", "default"],
        ["top_p", "0.9", "default"],
    ]  # fmt: skip


def test_plain_text_without_colours(monkeypatch):
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    chat = chat_of({})
    chat.note("nothing but text [red]here[/red]")
    commands.show_help(chat, "")
    assert "\x1b" not in sys.stdout.getvalue()
    assert "[red]here[/red]" in sys.stdout.getvalue()
    assert all(f"{usage} " in sys.stdout.getvalue() for usage, _ in commands.COMMANDS.values())
