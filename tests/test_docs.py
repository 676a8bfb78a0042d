"""README and docs against the program: each command is one that the real parser takes, each flag and name exists."""

import inspect
import re
import shlex
from pathlib import Path

import pytest
from helpers import run_of
from transformers import TrainingArguments

import main as chat
from dialogue import evaluate, export
from dialogue.chat.commands import COMMANDS

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted(ROOT.glob("docs/*.md"))]
PARSERS = {
    "Fine_tuningmodel.py": lambda argv: run_of(*argv),
    "main.py": chat.parse,
    "dialogue.evaluate": evaluate.parse,
    "dialogue.export": export.parse,
}
# Other programs' flags that the pages name.
FOREIGN = {
    "--nproc_per_node", "--num_processes", "--host", "--port", "--enable-cors", "--model", "--output_dir",
    "--index-url", "--logdir",
}  # fmt: skip


def code(page: Path) -> list[str]:
    """Lines of fenced blocks, and inline code."""
    text = page.read_text(encoding="utf-8")
    blocks = re.findall(r"^```.*?\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE))
    return [line for block in blocks for line in block.splitlines()] + inline


def commands() -> list[tuple[str, list[str]]]:
    """(script or module, its arguments) of each command on the pages."""
    found = []
    for line in [line for page in PAGES for line in code(page)]:
        for part in re.split(r"&&|\||;|>", line):
            names = "|".join(map(re.escape, PARSERS))
            if said := re.match(rf"!?\s*(?:\S*python3? (?:-m )?|torchrun \S+ \S+ )({names})(?: |$)(.*)", part.strip()):
                found.append((said[1], shlex.split(said[2], comments=True)))
    return found


@pytest.mark.parametrize(("name", "arguments"), commands(), ids=lambda value: str(value)[:80])
def test_each_command_is_one_that_the_program_takes(name, arguments):
    if "--teach" in arguments:
        assert arguments == ["--teach"]  # needs adapters; tests/test_teach.py runs it
        return
    PARSERS[name](arguments)


def test_there_are_commands_to_look_at():
    assert len(commands()) > 15 and {name for name, _ in commands()} == PARSERS.keys()


def test_each_flag_exists():
    files = [*ROOT.glob("*.py"), *ROOT.glob("dialogue/**/*.py"), *ROOT.glob("benchmarks/*.py")]
    known = {
        flag for file in files for flag in re.findall(r"add(?:_argument)?\(\s*\"(--\w+)\"", file.read_text("utf-8"))
    }
    fields = [*inspect.signature(TrainingArguments).parameters, *chat.SETTINGS]
    known |= {f"--{name}" for name in fields} | {"--no-resume", "--version"} | FOREIGN
    for page in PAGES:
        for text in code(page):
            for flag in re.findall(r"(?<![\w-])--[a-zA-Z][\w-]*", text):
                assert flag in known, f"{page.name} names {flag}: {text}"


def test_each_command_of_the_chat_exists():
    for page in PAGES:
        for text in code(page):
            if said := re.fullmatch(r"(/[a-z]+)( [\w. ]+)?", text):
                assert said[1] in COMMANDS or said[1] in ("/exit", "/quit", "/bye"), f"{page.name} names {text}"


def test_the_signature_is_what_the_readme_says():
    parameters = inspect.signature(chat.generate_text).parameters
    said = ", ".join(f"{name}={of.default}" for name, of in list(parameters.items())[1:5])
    assert f"generate_text(prompt, {said})" in " ".join(PAGES[0].read_text(encoding="utf-8").split())


def test_each_test_that_a_page_names_exists():
    tests = "\n".join(file.read_text(encoding="utf-8") for file in ROOT.glob("tests/*.py"))
    for page in PAGES:
        for name in re.findall(r"`(test_\w+)`", page.read_text(encoding="utf-8")):
            assert f"def {name}(" in tests, f"{page.name} names {name}"


def test_each_link_leads_somewhere():
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#:]+)\)", page.read_text(encoding="utf-8")):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"
