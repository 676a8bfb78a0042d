"""The README's pictures, from real runs: `docs/session.svg` and `docs/curves.png`.

    pip install pyte==0.8.2
    python benchmarks/pictures.py --model gpt2-dialogue-full --run gpt2-dialogue-lora

`main.py` runs in a pseudo-terminal and is typed into; pyte, a terminal in memory, draws what it prints, and rich
writes that as SVG. The curves are the run's own.
"""

import argparse
import os
import re
import shutil
import sys
import time
from itertools import groupby
from pathlib import Path

import pexpect
import pyte
from rich.console import Console
from rich.style import Style
from rich.text import Text

ROOT = Path(__file__).resolve().parents[1]
COLUMNS, ROWS = 90, 60
SAID = [
    "Hello, how are you doing today?", "I love pizza.", "I have an exam tomorrow.", "I am so tired of studying.",
    "My dog died yesterday.", "/why", "exit",
]  # fmt: skip


class Terminal(pyte.Screen):
    """A screen that answers the program's questions (where is the cursor?)."""

    child: pexpect.spawn

    def write_process_input(self, data: str) -> None:
        self.child.send(data)


def record(command: list[str], lines: list[str], pause: float) -> pyte.Screen:
    """Type `lines` into `command`, each after the screen was still for `pause` seconds; the screen at its end."""
    environment = {**os.environ, "TERM": "xterm-256color", "XDG_STATE_HOME": os.devnull}
    size = (ROWS, COLUMNS)
    child = pexpect.spawn(command[0], command[1:], dimensions=size, env=environment, cwd=ROOT, encoding="utf-8")
    screen = Terminal(COLUMNS, ROWS)
    screen.child, stream = child, pyte.Stream(screen)

    def watch() -> bool:
        """Draw what comes, until nothing does; False at the end of the program."""
        still = time.monotonic() + pause
        while time.monotonic() < still:
            try:
                # pyte knows no dim: it is drawn as grey
                stream.feed(child.read_nonblocking(4096, timeout=0.2).replace("\x1b[2m", "\x1b[90m"))
                still = time.monotonic() + pause
            except pexpect.TIMEOUT:
                pass
            except pexpect.EOF:
                return False
        return True

    for line in lines:
        if not watch():
            raise SystemExit("main.py ended too early:\n" + "\n".join(screen.display).rstrip())
        child.send(line + "\r")
    while watch():
        pass
    return screen


def colour(name: str) -> str | None:
    """pyte's name of a colour -> rich's."""
    if name == "default":
        return None
    if len(name) == 6 and all(digit in "0123456789abcdef" for digit in name):
        return f"#{name}"
    name = name.replace("brown", "yellow")
    return name.replace("bright", "bright_") if name.startswith("bright") else name


def to_svg(screen: pyte.Screen, title: str) -> str:
    """What stands on the screen, down to its last line."""
    used = max(row for row, line in enumerate(screen.display) if line.strip()) + 1
    with open(os.devnull, "w") as nowhere:
        console = Console(width=COLUMNS, record=True, file=nowhere, force_terminal=True, color_system="truecolor")
        for row in range(used):
            text = Text()
            cells = [screen.buffer[row][column] for column in range(COLUMNS)]
            for look, same in groupby(cells, key=lambda cell: (cell.fg, cell.bg, cell.bold)):
                style = Style(color=colour(look[0]), bgcolor=colour(look[1]), bold=look[2])
                run = "".join(cell.data for cell in same)
                words = run.lstrip()  # spaces in front stand alone: not every viewer keeps them
                text.append(run[: len(run) - len(words)], style).append(words, style)
            text.rstrip()
            console.print(text, no_wrap=True)
        svg = console.export_svg(title=title)
    return re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL)  # fonts from elsewhere: monospace will do


def main() -> None:
    parser = argparse.ArgumentParser(description="Make docs/session.svg and docs/curves.png.")
    parser.add_argument("--model", default="gpt2-dialogue-full", help="merged model to chat with")
    parser.add_argument("--run", type=Path, default=Path("gpt2-dialogue-lora"), help="adapter folder with curves.png")
    parser.add_argument("--seed", default="1")
    parser.add_argument("--pause", type=float, default=15.0, help="seconds of stillness that end a reply")
    flags = parser.parse_args()
    command = [sys.executable, "main.py", "--model", flags.model, "--seed", flags.seed, "--private"]
    screen = record(command, SAID, flags.pause)
    (ROOT / "docs").mkdir(exist_ok=True)
    (ROOT / "docs/session.svg").write_text(to_svg(screen, "python main.py"), encoding="utf-8")
    shutil.copy(flags.run / "curves.png", ROOT / "docs/curves.png")


if __name__ == "__main__":
    main()
