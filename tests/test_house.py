"""The shape of the house: imports run one way, chatting pays for no training code, and no file grows without bound."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
ROOMS = ["shared", "data", "chat", "measure", "train", "scripts"]
COMMANDS = {"dialogue/evaluate.py", "dialogue/export.py"}  # run by themselves, as the scripts are
FILES = [*sorted(ROOT.glob("dialogue/**/*.py")), ROOT / "Fine_tuningmodel.py", ROOT / "main.py"]


def room_of(file: Path) -> int:
    """The place of a file's room in `ROOMS`."""
    name = file.relative_to(ROOT).as_posix()
    if name in COMMANDS or "/" not in name:
        return ROOMS.index("scripts")
    parts = name.split("/")
    return ROOMS.index(parts[1]) if len(parts) == 3 else 0


def imported(file: Path) -> set[Path]:
    """The project's files that one of them imports, wherever the import stands, also for the type checker alone."""
    found = set()
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            names = [node.module or "", *(f"{node.module}.{alias.name}" for alias in node.names)]
        for name in names:
            path = ROOT.joinpath(*name.split("."))
            found |= {each for each in (path.with_suffix(".py"), path / "__init__.py") if each in FILES}
    return found - {file}


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_imports_run_one_way(file):
    for other in imported(file):
        assert room_of(other) <= room_of(file), f"{file} imports {other}"


def test_no_module_imports_itself_by_a_detour():
    waiting = {file: {other for other in imported(file) if other.name != "__init__.py"} for file in FILES}
    while free := [file for file, needed in waiting.items() if not needed & waiting.keys()]:
        for file in free:
            del waiting[file]
    assert not waiting, f"a circle among {sorted(map(str, waiting))}"


def test_tests_share_what_they_need_in_helpers_alone():
    for file in ROOT.glob("tests/*.py"):
        assert not re.findall(r"^\s*(?:from|import) test_\w+", file.read_text(encoding="utf-8"), re.MULTILINE), file


def test_chatting_imports_no_training_code():
    code = (
        "import sys, main\n"
        "from dialogue.chat import conversation, engine, terminal\n"
        "heavy = {'peft', 'datasets', 'bitsandbytes', 'dialogue.train', 'dialogue.measure'}\n"
        "print(sorted(heavy & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert run.stdout == "[]\n"


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.relative_to(ROOT).as_posix())
def test_files_and_functions_stay_small(file):
    text = file.read_text(encoding="utf-8")
    assert text.count("\n") <= 280
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno < 60, node.name
