"""What README and docs tell a person to type: the programs' own parsers take it, and the short ways run as written."""

import argparse
import ast
import importlib
import inspect
import io
import json
import re
import shlex
import sys
from pathlib import Path

import jinja2
import pytest
from conftest import byte_tokenizer, save_random_gpt2
from helpers import CHAT

import Fine_tuningmodel as script
import main as chat
from dialogue import evaluate
from dialogue.chat.commands import COMMANDS
from dialogue.errors import UserError, exit_code
from dialogue.prompt import CHAT_TEMPLATE
from dialogue.train import options

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(ROOT.glob("docs/*.md"))]
PROGRAMS = [*ROOT.glob("*.py"), ROOT / "dialogue/evaluate.py", *sorted(ROOT.glob("benchmarks/*.py"))]
OURS = re.compile(
    r"(?P<start>(?:\w+=\S+ )*(?:!?\S*python3? |(?:torchrun|accelerate launch) (?:--\w+ \d+ )*))?"
    r"(?P<file>-m (?:dialogue|benchmarks)\.\w+|main\.py|Fine_tuningmodel\.py|benchmarks/\w+\.py)(?P<flags> [^ ].*)?$"
)
FLAGGED = ("Fine_tuningmodel", "main", "dialogue.evaluate", "benchmarks.training x")  # whose flags stand by themselves


def code_of(page):
    """The code of a page in pieces, without comments: fenced blocks by line, and what stands in back quotes. Of a
    program, the indented lines of its docstring."""
    if page.suffix == ".py":
        lines = (ast.get_docstring(ast.parse(page.read_text(encoding="utf-8"))) or "").splitlines()
        return [line[4:].split("  ")[0] for line in lines if line.startswith("    ")]
    text, fence = page.read_text(encoding="utf-8"), re.compile(r"^ *```\w*\n(.*?)^ *```", re.S | re.M)
    lines = [line for block in fence.findall(text) for line in block.splitlines()]
    lines += [" ".join(code.split()) for code in re.findall("`([^`]+)`", fence.sub("", text))]
    return [part.strip() for line in lines for part in re.split(r"&&|(?<= )#.*", line)]


def commands(page):
    """(file, flags) of each command of our own on a page."""
    for match in filter(None, map(OURS.match, code_of(page))):
        if match["start"] or match["flags"]:
            yield match["file"], shlex.split(match["flags"] or "")


def parse(program, flags, monkeypatch):
    """Raises for what `program` would not take; does nothing of what it would do."""
    flags = ["1" if re.fullmatch("[A-Z]+", flag) else flag for flag in flags]  # NAME, DIR, MINUTES
    if program == "Fine_tuningmodel":
        options.parse(flags, script.presets)
        return
    monkeypatch.setattr(script.machine, "pick_dtype", script.machine.pick_dtype)  # benchmarks/faults.py sets another
    module, real = importlib.import_module(program), argparse.ArgumentParser.parse_args
    with monkeypatch.context() as patch, pytest.raises(InterruptedError):
        patch.setattr(sys, "argv", [program, *flags])
        patch.setattr(argparse.ArgumentParser, "parse_args", lambda *given: stop_after(real(*given)))
        module.main()


def stop_after(_):
    raise InterruptedError


@pytest.mark.parametrize("page", [*PAGES, *PROGRAMS], ids=lambda page: page.name)
def test_every_command_is_one_that_its_program_takes(page, monkeypatch):
    if page.name == "pictures.py":
        pytest.importorskip("pyte")
    for file, flags in commands(page):
        program = file.removeprefix("-m ").removesuffix(".py").replace("/", ".")
        parse(program, flags, monkeypatch)
        if file.startswith("benchmarks/"):
            text = (ROOT / file).read_text(encoding="utf-8")
            needs_us = re.search(r"^(from dialogue|import (main|Fine_tuningmodel))", text, re.M)
            assert "sys.path" in text or not needs_us, f"{file} runs as `-m {program}` only"


def takes(program, code, monkeypatch):
    """Whether a program knows a flag, which may stand without its value."""
    name, *first = program.split()
    try:
        parse(name, [*first, *shlex.split(code)], monkeypatch)
    except (UserError, SystemExit) as error:
        return "expected one argument" in str(error)
    return True


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_flag_is_one_of_a_program(page, monkeypatch):
    for code in code_of(page):
        if code.startswith("--"):
            assert any(takes(program, code, monkeypatch) for program in FLAGGED), code


def test_some_commands_were_found():
    found = {page.name: len(list(commands(page))) for page in PAGES}
    assert found["README.md"] > 10 and found["own-data.md"] > 5 and found["gpus.md"] == 4, found
    assert len(list(commands(ROOT / "benchmarks/cuda.py"))) == 6
    options.parse(shlex.split(" ".join(re.findall(r"--\w+ \S+", options.EPILOGUE))), script.presets)


def test_the_readme_has_the_chats_commands_defaults_and_files():
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert set(re.findall(r"`(/\w+)", text)) <= set(COMMANDS)
    written = re.search(r"generate_text\(prompt,\s([^)]*)\)", text)[1].split()
    assert " ".join(written) == ", ".join(
        f"{each.name}={each.default}"
        for each in inspect.signature(chat.generate_text).parameters.values()
        if each.kind is each.POSITIONAL_OR_KEYWORD and each.name != "prompt"
    )
    for name in re.findall(r"^([\w./]+/?)(?:, [\w/]+)?  ", text.split("## The files")[1], re.M):
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    ("page", "first", "count", "codes"),
    [("README.md", "--dataset chat.txt", 4, [2, 0, 0, 0]), ("docs/own-data.md", "--dataset shop.jsonl", 5, [0] * 5)],
)
def test_own_data_goes_as_it_is_written(page, first, count, codes, tmp_path, monkeypatch, capsys):
    """Then the figures, as docs/evaluation.md has them. A small model is the starter's base."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "chat.txt").write_text(CHAT)
    for name in ("shop", "more"):
        turns = ["What time do you open?", "At nine.", "And on Sundays?", f"We are closed in {name}."]
        lines = [json.dumps({"dialog": [f"{number}. {turn}" for turn in turns]}) for number in range(60)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(lines))
    base = save_random_gpt2(tmp_path / "base", byte_tokenizer())
    monkeypatch.setitem(script.presets["starter"], "base_model", str(base))
    mains = {"Fine_tuningmodel.py": script.main, "main.py": chat.main, "-m dialogue.evaluate": evaluate.main}
    typed = [(file, flags) for file, flags in commands(ROOT / page)]
    begin = next(place for place, (_, flags) in enumerate(typed) if first in " ".join(flags))
    figures = [(file, flags) for file, flags in commands(ROOT / "docs/evaluation.md") if "DIR" not in flags]
    ended = []
    for file, flags in [*typed[begin : begin + count], *figures]:
        monkeypatch.setattr(sys, "stdin", io.StringIO("Hi\n"))
        ended.append(exit_code(lambda file=file, flags=flags: mains[file](flags)))
    said = capsys.readouterr().err
    assert ended == [*codes, *[0 for _ in figures]] and len(figures) >= 2, said
    assert ("--bot NAME, of: Ann (56), Bo (28)" in said) == (2 in codes)


def test_the_modelfile_asks_as_the_chat_does():
    """Ollama's template, put into Jinja, makes of a conversation what our own template makes of it."""
    theirs = re.search('TEMPLATE """(.*?)"""', (ROOT / "docs/serving.md").read_text(encoding="utf-8"))[1]
    for go, jinja in (
        ("range .Messages", "for each in messages"), ("else if eq .Role", "elif each.role =="),
        ("if eq .Role", "if each.role =="), ("end }}{{ end", "endif %}{% endfor"),
    ):  # fmt: skip
        theirs = theirs.replace(f"{{{{ {go}", f"{{% {jinja}")
    theirs = re.sub(r"(\{%[^{}%]*)\}\}", r"\1%}", theirs).replace(".Content", "each.content")
    talk = [{"role": role, "content": f"{role}, {n}"} for n in range(3) for role in ("user", "assistant")][:-1]
    assert jinja2.Template(theirs).render(messages=talk) == jinja2.Template(CHAT_TEMPLATE).render(
        messages=talk, add_generation_prompt=True
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_points_to_is_there(page):
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)#:]+)\)", text):
        assert (page.parent / target).exists(), target
    tests = "\n".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/*.py"))
    for name in re.findall(r"`(test_\w+)`", text):
        assert f"def {name}(" in tests or (ROOT / f"tests/{name}.py").exists(), name
