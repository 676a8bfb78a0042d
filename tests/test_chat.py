"""`main.py` as a person or a script runs it: real processes, a real pseudo-terminal."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import termios
import threading
import time
from pathlib import Path

import pexpect
import pytest
import torch
from helpers import broken_copy

import main as chat
from dialogue import models
from dialogue.chat import terminal
from dialogue.chat.conversation import Conversation
from dialogue.chat.decoder import Decoder
from dialogue.chat.engine import Model
from dialogue.chat.session import Chat
from dialogue.chat.transformers_engine import TransformersEngine
from dialogue.errors import UserError, exit_code, handled

MAIN = Path(__file__).resolve().parents[1] / "main.py"
LIVE = "\x1b\\[J.*\n\x1b\\[2m\\d+ tokens, .* tokens/s.*\x1b\\[1A"  # below the text, and up again
STATS = r"(\d+) tokens, [\d.]+ s, \d+ tokens/s, (\w+)"


@pytest.fixture
def home(merged, tmp_path, monkeypatch):
    """The working directory, in which a model was trained."""
    (tmp_path / "gpt2-dialogue-full").symlink_to(merged)
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "state"))
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(capsys, *flags):
    """(exit code, standard output, standard error) of main.py, in this process: a new one costs seconds."""
    try:
        code = exit_code(lambda: chat.main(list(flags)))
    except SystemExit as end:
        code = end.code
    return code, *capsys.readouterr()


# ---- For scripts -------------------------------------------------------------------------------------


def test_a_pipe_gets_replies_only_and_a_merged_model_costs_no_peft(home):
    """The real thing once: a process of its own, between pipes, given bytes that are no text."""
    code = (
        "import sys; sys.path.insert(0, sys.argv.pop(1)); import main; from dialogue.errors import exit_code\n"
        "light = not {'torch', 'transformers'} & set(sys.modules)\n"
        "assert exit_code(lambda: main.main(sys.argv[1:])) == 0\n"
        "print(light, sorted({'peft', 'datasets', 'bitsandbytes'} & set(sys.modules)), file=sys.stderr)"
    )
    flags = ["--max_t", "4", "--temp", "0"]
    done = subprocess.run(
        [sys.executable, "-c", code, str(MAIN.parent), *flags],
        input=b"Hi\n\nAnd <END> \xff\x1b[31myou?\nexit\n",
        capture_output=True,
        timeout=280,
    )
    out, err = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, err
    assert len(out.splitlines()) >= 2
    assert "\x1b" not in out + err
    *stats, modules = err.splitlines()
    assert len(stats) == 2 and all(re.fullmatch(STATS, line) for line in stats)
    assert modules == "True []"


def test_seed_repeats_a_whole_conversation(home, capsys, monkeypatch):
    said = []
    for seed in ("5", "5", "6"):
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\nAnd you?\n"))
        code, out, _ = run(capsys, "--seed", seed, "--max_t", "8", "--best_of", "1")
        assert code == 0
        said.append(out)
    assert said[0] == said[1] != said[2]


def test_generate_text_works_alone_and_its_defaults_are_the_chat_s(home, capsys, monkeypatch):
    pieces = []
    reply = chat.generate_text("Hello", 6, temp=0, on_text=pieces.append)
    assert reply == "".join(pieces)
    assert chat.generate_text("Hello", max_t=6, temp=0) == reply
    assert list(chat.settings().items())[:4] == [("max_t", 50), ("temp", 0.8), ("top_k", 40), ("top_p", 0.9)]
    # A person edits the defaults: max_t, temp, top_k, top_p.
    monkeypatch.setattr(chat.generate_text, "__defaults__", (6, 0, 40, 0.9))
    assert run(capsys, "--prompt", "Hello")[:2] == (0, f"{reply}\n")
    assert len(run(capsys, "--prompt", "Hello", "--max_t", "3")[1]) < len(reply)


def test_the_cpu_can_be_asked_for(home, capsys, monkeypatch):
    """Also where there is a GPU: which one there is, is not even asked."""
    from dialogue import machine

    chat._load.cache_clear()
    monkeypatch.setattr(machine, "pick_device", lambda: pytest.fail("a GPU is taken"))
    code, out, err = run(capsys, "--device", "cpu", "--prompt", "Hi", "--max_t", "3")
    assert code == 0 and out and ", int8\n" in err
    assert run(capsys, "--device", "cuda", "--prompt", "Hi")[0] == 2


def test_fitted_settings_come_with_the_model(home, merged, tmp_path, capsys):
    values = {"temperature": 0, "max_new_tokens": 3, "eos_token_id": 1}
    folder = tmp_path / "fitted"
    folder.mkdir()
    broken_copy(merged, folder, "generation_config.json", lambda data: json.dumps(values).encode())
    assert chat.fitted(str(folder)) == {}, "a model that was not trained here has no fitted settings"
    (folder / "run.json").write_text("{}")
    assert chat.fitted(str(folder)) == {"temp": 0, "max_t": 3}
    code, _, err = run(capsys, "--model", str(folder), "--prompt", "Hi")
    assert code == 0 and int(err.split()[0]) <= 3
    assert "Settings fitted to it: max_t 3, temp 0" in chat.described(str(folder), chat.fitted(str(folder)))
    _, _, err = run(capsys, "--model", str(folder), "--prompt", "Hi", "--max_t", "5")
    assert int(err.split()[0]) == 5, "a flag comes before what was fitted"
    _, _, err = run(capsys, "--model", str(folder), "--prompt", "Hi", "--sampler", "defaults")
    assert int(err.split()[0]) > 5
    (folder / "generation_config.json").write_text("[")
    assert run(capsys, "--model", str(folder), "--sampler", "fitted")[0] == 2


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="Linux has it")
@pytest.mark.parametrize("unbuffered", ["", "1"])
@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        ("--prompt Hi --max_t 2 >/dev/full", 2, "<stdout> could not be written: No space left on device"),
        ("--model /nowhere 2>/dev/full", 2, ""),
        ("--version >&-", 2, "standard output is closed"),
        ("<&-", 2, "there is no message to answer"),
        ("--model /nowhere <&- >&- 2>&-", 2, ""),
        ("--version <&- 2>&-", 0, ""),
        ("--version; rmdir ../gone; $0 $1 --version", 2, "the working directory cannot be used"),
    ],
)
def test_streams_and_folders_that_are_gone_are_one_line(line, code, said, unbuffered, home):
    (home / "gone").mkdir()
    done = subprocess.run(
        ["sh", "-c", f"$0 $1 {line}", sys.executable, str(MAIN)],
        cwd=home / "gone" if "gone" in line else home,
        env={**os.environ, "PYTHONUNBUFFERED": unbuffered},
        capture_output=True,
        text=True,
        timeout=100,
    )
    assert done.returncode == code and said in done.stderr, done.stderr
    assert done.stderr.count("\n") == (1 if said else 0), done.stderr


def test_both_scripts_say_their_version(capsys):
    import Fine_tuningmodel as script
    from dialogue import __version__

    for main in (chat.main, script.main):
        with pytest.raises(SystemExit) as end:
            main(["--version"])
        assert end.value.code == 0 and capsys.readouterr().out == f"gpt2-dialogue {__version__}\n"
    changelog = (MAIN.parent / "CHANGELOG.md").read_text(encoding="utf-8")
    assert changelog.split("\n## ")[1].startswith(f"{__version__} (")


def test_the_unedited_settings_are_those_that_stand_in_the_signature():
    assert chat.settings() == chat.UNEDITED


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--temp", "-1"], "temp must be"),
        (["--max_t", "0"], "max_t must be"),
        (["--seed", str(2**80)], "seed must be"),
        (["--model", "nowhere"], "nowhere cannot be loaded"),
        (["--model", "./nowhere"], r"no model in \./nowhere/: train one first"),
        (["--model", "."], "no model in"),
        (["--model", ""], "no model in"),
        (["--model", "gpt2-dialogue-full/config.json"], "no model in"),
        (["--prompt", " "], "there is no message to answer"),
        (["--prompt", "long " * 200], "make it shorter"),
    ],
)
def test_mistakes_are_one_line(home, capsys, flags, said):
    code, out, err = run(capsys, "--prompt", "Hi", *flags)
    assert (code, out) == (2, "")
    assert re.fullmatch(rf"error: .*{said}.*\n", err), err


def test_no_model_says_how_to_train_one(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code, out, err = run(capsys)
    assert (code, out) == (2, "")
    assert re.fullmatch(
        r"error: no model in gpt2-dialogue-full/: .*python Fine_tuningmodel\.py.*--preset starter.*\n", err
    )


def test_debug_shows_the_traceback(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError):
        exit_code(lambda: chat.main([]), debug=True)


def test_in_a_thread_as_in_a_notebook(home, capsys):
    """Handlers of signals belong to the main thread; without them all else works."""
    done = []
    flags = ("--prompt", "Hi", "--max_t", "3")
    thread = threading.Thread(target=lambda: done.append(exit_code(lambda: chat.main(list(flags)))))
    thread.start()
    thread.join()
    assert done == [0] and capsys.readouterr().out


def test_a_code_page_that_lacks_a_character_is_no_error(home):
    """As a redirected output on Windows, whose encoding is the code page's."""
    code = "import sys; from dialogue.errors import UserError, exit_code\n"
    code += "def run():\n print('\u4f60 ok'); raise UserError('\u4f60')"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}\nsys.exit(exit_code(run))"], capture_output=True, cwd=MAIN.parent,
        env={**os.environ, "PYTHONIOENCODING": "cp1252"}, timeout=60,
    )  # fmt: skip
    assert (done.returncode, done.stdout, done.stderr) == (2, b"? ok\n", b"error: ?\n")


@pytest.mark.parametrize("way", ["noted", "at once", "ignored"])
def test_a_closed_terminal_ends_in_good_order(way):
    """SIGHUP is handled as SIGTERM is, and what is written then to the lost terminal is no error; `nohup` stays."""
    code = f"""
import signal, sys, time
if {way == "ignored"}:
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
from dialogue.errors import Signals, exit_code
file = open(sys.argv[1], "w")
def run():
    signals = Signals()
    def work():
        print("ready", flush=True)
        while not signals.number and {way != "ignored"}:
            time.sleep(0.02)
        if {way == "ignored"}:
            signal.raise_signal(signal.SIGHUP)
        print("saving", flush=True)
        print("saved", file=file, flush=True)
    if {way == "at once"}:
        try:
            work()
        finally:
            print("saved", file=file, flush=True)
    with signals.noted():
        work()
print(exit_code(run), file=file, flush=True)
"""
    with tempfile.NamedTemporaryFile("r") as said:
        shell = pexpect.spawn(sys.executable, ["-c", code, said.name], cwd=str(MAIN.parent), timeout=30)
        shell.expect("ready")
        shell.close(force=False) if way != "ignored" else shell.expect(pexpect.EOF)
        shell.wait() if shell.isalive() else None
        text, expected = "", ["saved", "129" if way == "at once" else "0"]
        for _ in range(200):
            text += said.read()
            if text.split() == expected:
                break
            time.sleep(0.05)
        assert text.split() == expected


# ---- On a terminal -----------------------------------------------------------------------------------


class Terminal(pexpect.spawn):
    """main.py on a pseudo-terminal, as `xterm` and 60 columns wide."""

    def __init__(self, *flags, **environment):
        environment = {**os.environ, "TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1", **environment}
        super().__init__(
            sys.executable, [str(MAIN), *flags], encoding="utf-8", timeout=30, dimensions=(24, 60), env=environment
        )

    def type(self, line, *expected):
        """Send a line; each pattern has to appear, in this order."""
        self.send(line + "\r")
        for pattern in expected:
            self.expect(pattern)

    def leaves(self, code):
        """The process ends with `code`, and leaves the terminal as terminals are."""
        flags = 0
        self.expect(pexpect.EOF)
        flags = termios.tcgetattr(self.child_fd)[3]
        self.close()
        assert (self.exitstatus, self.signalstatus) == (code, None)
        assert flags & termios.ICANON and flags & termios.ECHO, "the terminal is left in raw mode"


def test_a_conversation_on_a_terminal(home):
    """One session for all of it: a start of the process costs seconds."""
    talk = Terminal("--seed", "5", "--max_t", "30", "--best_of", "1")
    talk.expect("/help lists commands")
    talk.expect("you>")
    talk.sendintr()
    talk.expect("type exit to leave")
    talk.expect("0/96.*you>")  # the model came while nobody typed

    talk.type("/undo", "nothing to take back")
    talk.type("/why", "there is no reply yet")
    talk.type("Hello you", "bot> ", LIVE, r"30 tokens, [\d.]+ s, \d+ tokens/s, \w+", "3[0-9]/96")
    talk.type("/why", "rank", "<END>", "tokens each setting")
    talk.setwinsize(30, 40)
    talk.type("/set temp 0", "temp = 0")
    talk.type("/set max_t 5", "max_t = 5")
    talk.type("/set temp hot", "must be a number")
    talk.type("/set", r"max_t +5", r"temp +0\.0", r"top_k +40 +default")
    talk.type("/retry", "bot> ", "5 tokens, ")
    talk.type("/save talk.json", "saved to talk.json")
    talk.type("/save no/where", "could not be written")
    talk.type("/undo", "taken back: Hello you")
    talk.type("/retry", "no message to answer")
    talk.type("/load talk.json", "2 turns loaded", "you> Hello you", "bot> ")
    talk.type("/context", "<USER>Hello you<END>", "<BOT>")
    talk.type("/nonsense", "no command /nonsense")
    talk.type("/reset", "a new conversation")
    talk.send("\x1b[200~two\nlines\x1b[201~")  # as a terminal sends what is pasted
    talk.type("", "bot> ", "5 tokens, ")
    talk.type("word " * 150, "the message has 150 tokens")
    talk.type("word " * 80, "bot> ", "2 oldest turns forgotten")

    talk.type("/reset", "a new conversation")
    talk.type("/set max_t 85", "max_t = 85")
    talk.type("/set temp 1.5", "temp = 1.5")
    talk.type("talk on and on", "bot> ", "2m3 tokens, ")
    talk.sendintr()
    talk.expect(r"\[stopped\]")
    talk.expect("you>")
    talk.type("/save stopped.json", "saved to stopped.json")
    talk.type("/save gpt2-dialogue-full/config.json", "not a conversation")
    talk.type("exit", "Bye")
    talk.leaves(0)

    saved = json.loads((home / "talk.json").read_text())
    assert [message["role"] for message in saved] == ["user", "assistant"]
    assert saved[0]["content"] == "Hello you"
    stopped = json.loads((home / "stopped.json").read_text())
    assert stopped[0]["content"] == "talk on and on" and stopped[1]["content"]
    history = (home / "state/gpt2-dialogue/history").read_text()
    assert "+Hello you" in history and "+two\n+lines" in history


@pytest.mark.parametrize(
    ("engine", "best_of", "presses"), [("float32", 4, 1), ("float32", 1, 2), ("transformers", 1, 2)]
)
def test_ctrl_c_at_any_line_leaves_what_the_next_reply_needs(merged, tmp_path, capsys, engine, best_of, presses):
    """The second of two raises where it comes. What a reply costs at each line of ours that it runs is seen."""
    talked, fresh = (models.load(str(merged), torch.float32, torch.device("cpu")) for _ in range(2))
    make = TransformersEngine if engine == "transformers" else lambda model: Decoder(model, engine, 96)
    talked, fresh = (Model(make(model), tokenizer, 96) for model, tokenizer in (talked, fresh))
    chosen, ours = {"max_t": 3, "temp": 0.9, "best_of": best_of}, (str(MAIN), str(MAIN.parent / "dialogue"))

    def turn(moment, seed=3):
        """A conversation whose second reply is interrupted at its line number `moment`, and how many lines it had."""
        talk, lines = Conversation(talked, seed), 0
        this = Chat(terminal.in_background(lambda: talk), chat.generate_text, {}, chosen)
        assert this.conversation is talk
        this.kept = tmp_path / "kept.json"

        def trace(frame, event, argument):
            nonlocal lines
            code = frame.f_code
            if not code.co_filename.startswith(ours) or code.co_name == "interrupt":
                return None
            if event == "line":
                lines += 1
                for _ in range(presses if lines == moment else 0):
                    signal.raise_signal(signal.SIGINT)
            return trace

        with handled(this.interrupt, signal.SIGINT):
            terminal._obey(this, "Hi")
            before = sys.gettrace()
            sys.settrace(trace)
            try:
                terminal._obey(this, "Tell me more")
                this.keep()
            finally:
                sys.settrace(before)
        assert json.loads(this.kept.read_text()) == talk.messages()
        return talk, lines

    (whole, count), stopped = turn(0), 0
    for moment in range(1, count + 1, count // 8):
        talk, _ = turn(moment)
        assert [turn[0] for turn in talk.turns] == [*talk.roles[:2]] * (len(talk.turns) // 2) and talk.turns
        stopped += talk.turns != whole.turns
        again = Conversation(fresh)
        again.turns = talk.turns
        again.generator.set_state(talk.generator.get_state())
        fresh.engine.reset()
        expected = chat.generate_text("And then?", **chosen, conversation=again)
        assert chat.generate_text("And then?", **chosen, conversation=talk) == expected
        assert talk.turns == again.turns
    assert stopped > 3, "Ctrl-C stops"
    said = capsys.readouterr().out
    assert "[stopped]" in said and said.count("bot> ") <= said.count("\n")


def test_ctrl_c_at_any_time_comes_back_to_the_prompt(home):
    talk = Terminal("--max_t", "40", "--best_of", "4")
    talk.expect("0/96.*you>")
    for number in range(12):
        talk.send(f"message {number}\r")
        talk.expect("bot> ")
        for _ in range(1 + number % 3):
            time.sleep(0.004 * number)
            talk.kill(signal.SIGINT)
        talk.expect("you>")
    talk.type("exit", "Bye")
    talk.leaves(0)


def test_what_people_type(home):
    """The first line; a message that was typed too early; two lines; the ways to leave."""
    (home / "editor").write_text("#!/bin/sh\nprintf ', the rest' >> $1\n")
    (home / "editor").chmod(0o755)
    talk = Terminal("--max_t", "5", "--temp", "0", VISUAL=str(home / "editor"))
    talk.expect("gpt2-dialogue-full, trained from gpt2-xl on 2026-11-25")
    talk.expect("you>")
    talk.type("are you there?", "loading the model")
    talk.sendintr()
    talk.expect("stopped")
    talk.expect("you>")
    talk.send("half")
    talk.send("\x18\x05")  # Ctrl-X Ctrl-E; what the editor leaves is sent
    talk.expect("half, the rest")
    talk.expect("5 tokens, .* s, ")
    talk.expect("you>")
    talk.type("are you there?", "bot> ", "5 tokens, .* s, ", "you>")
    talk.send("one\x1b\rtwo\r")  # Alt-Enter between them
    talk.expect("5 tokens, .* s, ")
    talk.expect("you>")
    talk.type("/save said.json", "saved to said.json")
    said = [message["content"] for message in json.loads((home / "said.json").read_text())[::2]]
    assert said == ["half, the rest", "are you there?", "one\ntwo"]
    talk.type("/set max_t 60", "max_t = 60")
    talk.type("talk on", "bot> ")
    talk.send("typed ahead")
    talk.expect("60 tokens, |you>")
    assert "typed" not in talk.before, "what was typed stands in the reply"
    talk.expect("typed ahead")
    talk.type("", "bot> ")
    talk.type("QUIT", "Bye")
    talk.leaves(0)


def test_ctrl_z_suspends_at_the_prompt(home):
    shell = pexpect.spawn("bash", ["--norc", "-i"], encoding="utf-8", timeout=30, env={**os.environ, "PS1": "shell$ "})
    shell.sendline(f"{sys.executable} {MAIN}")
    shell.expect("you>")
    shell.send("\x1a")
    shell.expect("Stopped")
    shell.sendline("fg")
    shell.expect("you>")
    shell.send("exit\r")
    shell.expect("Bye")
    shell.sendline("exit")
    shell.expect(pexpect.EOF)


def test_plain_text_where_colours_are_not_wanted(home):
    talk = Terminal("--max_t", "5", TERM="dumb")
    talk.expect("you> ")
    talk.type("Hello", "bot> ", "tokens/s", "you> ")
    shown = talk.before + talk.after
    talk.type("exit", "Bye")
    talk.leaves(0)
    assert "\x1b" not in shown.split("bot> ")[-1]


@pytest.mark.parametrize("way", ["eof", "exit", "terminated"])
def test_leaving_before_the_model_is_there(home, way):
    talk = Terminal()
    talk.expect("you>")
    if way == "terminated":
        talk.kill(signal.SIGTERM)
    else:
        talk.send("\x04" if way == "eof" else "exit\r")
        talk.expect("Bye")
    talk.leaves(143 if way == "terminated" else 0)


def test_a_broken_model_ends_the_prompt_with_a_line(home, merged, tmp_path):
    (tmp_path / "broken").mkdir()
    broken_copy(merged, tmp_path / "broken", "model.safetensors", lambda data: data[:1000])
    talk = Terminal("--model", "broken")
    talk.expect("you>")
    talk.expect("error: broken cannot be loaded: ")
    talk.leaves(2)
    assert "Traceback" not in talk.before


def test_a_killed_chat_is_gone_on_with_and_corrected(home):
    talk = Terminal("--seed", "5", "--max_t", "4", "--temp", "0", "--persona", "You are Ada.")
    talk.type("Hello there", r"\[cut: /more goes on\]", "tokens/s")
    talk.type("/more", "tokens/s")
    talk.expect("you>")
    state = home / "state" / "gpt2-dialogue" / "conversation.json"
    for _ in range(100):
        if state.is_file() and len(json.loads(state.read_text())) == 3:
            break
        time.sleep(0.05)
    talk.kill(signal.SIGKILL)
    kept = json.loads(state.read_text())
    assert kept[0] == {"role": "system", "content": "You are Ada."} and state.stat().st_mode & 0o777 == 0o600
    talk = Terminal("--continue", "--max_t", "4", "--private")
    talk.expect("you> Hello there")
    talk.expect("bot> ")
    talk.type("/edit", "bot> ")
    talk.send("\x15")  # clears the line
    talk.type("I am Ada.", "kept in gpt2-dialogue-lessons.jsonl")
    talk.type("/context", "<USER>You are Ada.", "Hello there<END>", "<BOT>I am Ada.<END>")
    talk.type("exit", "Bye")
    talk.leaves(0)
    assert json.loads(state.read_text()) == kept, "a private chat keeps nothing"
    lesson = json.loads((home / "gpt2-dialogue-lessons.jsonl").read_text())
    assert [each["content"] for each in lesson["messages"]] == ["You are Ada.", "Hello there", "I am Ada."]


def test_there_has_to_be_something_to_go_on_with(home, capsys):
    code, _, err = run(capsys, "--continue", "--prompt", "Hi")
    assert code == 2 and "there is no earlier conversation" in err


def test_the_newest_whole_checkpoint_of_a_training_can_be_talked_to(home, merged, capsys):
    from dialogue import storage

    checkpoints = home / "gpt2-dialogue-checkpoints"
    for step in (9, 10, 20):
        shutil.copytree(merged, checkpoints / f"checkpoint-{step}", ignore=shutil.ignore_patterns(storage.MANIFEST))
    storage.seal(checkpoints / "checkpoint-9")
    storage.seal(checkpoints / "checkpoint-10")  # 20 is still being written
    assert chat.find_model("gpt2-dialogue-checkpoints") == "gpt2-dialogue-checkpoints/checkpoint-10"
    assert run(capsys, "--model", "gpt2-dialogue-checkpoints", "--prompt", "Hi", "--max_t", "3")[0] == 0
    (checkpoints / "checkpoint-10" / "config.json").unlink()
    assert chat.find_model("gpt2-dialogue-checkpoints") == "gpt2-dialogue-checkpoints/checkpoint-9"
    (checkpoints / "checkpoint-9" / "config.json").unlink()
    with pytest.raises(UserError, match="to one that is being trained, --model gpt2-dialogue-checkpoints talks"):
        chat.find_model("gpt2-dialogue-checkpoints")
