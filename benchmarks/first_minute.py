"""What a person waits for: the phases of a first run and of a first chat, with seconds and the memory at their peak.

    python benchmarks/first_minute.py                     the starter, in a new folder, with the code of this tree
    python benchmarks/first_minute.py --tree ../other     with that of another tree, for before and after
    python benchmarks/first_minute.py -- --preset small   any flags of the script

A phase is a call of the recipe; what happens between two of them belongs to the phase "between". The peak is the
largest resident set of the process within the phase (set back before each; Linux only). What the
packages cost to install is not among them: `time pip install -r requirements.txt` says that.
"""

import argparse
import json
import os
import runpy
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

# Module, function, and what a person calls it. The inner ones of `merge.judge` have rows of their own.
PHASES = [
    ("dialogue.data.sources", "load_corpus", "dialogues"),
    ("dialogue.models", "load_tokenizer", "tokenizer (and fetching the starter)"),
    ("dialogue.train.rows", "prepare", "token ids, rows"),
    ("dialogue.models", "load_base", "base model"),
    ("dialogue.train.plan", "rehearse", "rehearsal"),
    ("dialogue.train.trainer", "train", "training, evaluations"),
    ("dialogue.train.show", "write_adapters", "adapters, conversations, card"),
    ("dialogue.measure.merge", "witness_of", "certificate: hidden states"),
    ("dialogue.measure.merge", "write", "merge"),
    ("dialogue.measure.merge", "load", "merged model loaded"),
    ("dialogue.measure.merge", "certify", "certificate: compare"),
    ("dialogue.measure.merge", "certify_chat", "certificate: the chat's engine"),
    ("dialogue.measure.merge", "fit", "sampler's fit"),
    ("dialogue.measure.merge", "finish", "card, files"),
]


def peak() -> int:
    """Bytes of the largest resident set since the last call."""
    import torch

    from dialogue import machine  # of the tree that is measured

    cpu = torch.device("cpu")
    found = machine.peak_memory(cpu)
    machine.reset_peak(cpu)
    return found


class Clock:
    """Seconds and peak of each phase; a phase inside another one is taken off it."""

    def __init__(self) -> None:
        self.began = self.last = float(os.environ["FIRST_MINUTE_BEGAN"])
        self.rows: dict[str, list[float]] = {}
        self.open = ["imports"]

    def turn(self) -> None:
        """What passed since the last turn belongs to the phase that is open."""
        now = time.time()
        row = self.rows.setdefault(self.open[-1], [0.0, 0.0])
        row[0], row[1], self.last = row[0] + now - self.last, max(row[1], peak()), now

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        def inner(*values: Any, **named: Any) -> Any:
            self.turn()
            self.open.append(name)
            try:
                return function(*values, **named)
            finally:
                self.turn()
                self.open.pop()

        return inner


def child(script: str, flags: list[str], out: str) -> None:
    """Run the training script in this process with its phases timed; the rows go to `out`."""
    import importlib

    clock = Clock()
    sys.path.insert(0, str(Path(script).parent))
    for module, name, words in PHASES:
        found = importlib.import_module(module)
        setattr(found, name, clock.timed(words, getattr(found, name)))
    clock.turn()
    clock.open = ["between"]
    sys.argv = [script, *flags]
    try:
        runpy.run_path(script, run_name="__main__")
    finally:
        clock.turn()
        Path(out).write_text(json.dumps(clock.rows))


def first_chat(tree: Path, folder: Path) -> dict[str, list[float]]:
    """Seconds to the prompt, and from a message that is sent at once to the first letter of its reply."""
    import pexpect

    start = time.time()
    chat = pexpect.spawn(
        sys.executable, [str(tree / "main.py"), "--seed", "1", "--private"], cwd=folder, timeout=120,
        env=os.environ | {"TERM": "xterm", "PROMPT_TOOLKIT_NO_CPR": "1"}, encoding="utf-8",
    )  # fmt: skip
    rows = {}
    chat.expect("you>")
    rows["chat: to the prompt"] = [time.time() - start, 0.0]
    start = time.time()
    chat.send("Hello, how are you?\r")
    chat.expect(r"bot>[^\n]*?[A-Za-z]")
    rows["chat: a message at once, to its reply"] = [time.time() - start, 0.0]
    status = Path(f"/proc/{chat.pid}/status").read_text().splitlines()
    rows["chat: peak"] = [0.0, 1024 * next(float(line.split()[1]) for line in status if line.startswith("VmHWM"))]
    chat.expect("you>")
    chat.send("exit\r")
    chat.expect(pexpect.EOF)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).resolve().parents[1], help="whose code runs")
    parser.add_argument("--folder", type=Path, help="where it runs, and what it makes stays; a new one, which goes")
    parser.add_argument("flags", nargs="*", default=["--preset", "starter"], help="of the script, after --")
    known = parser.parse_args()
    tree, flags = known.tree.resolve(), known.flags
    with tempfile.TemporaryDirectory() as made:
        folder = (known.folder or Path(made)).resolve()
        folder.mkdir(exist_ok=True)
        out = folder / "phases.json"
        began = {"FIRST_MINUTE_BEGAN": str(time.time())}
        call = f"import first_minute as f; f.child({str(tree / 'Fine_tuningmodel.py')!r}, {flags!r}, {str(out)!r})"
        path = os.pathsep.join([str(tree), str(Path(__file__).parent)])
        environment = os.environ | began | {"PYTHONPATH": path}
        subprocess.run([sys.executable, "-c", call], cwd=folder, env=environment, check=True)
        rows = json.loads(out.read_text()) | first_chat(tree, folder)
    print("\n| phase | seconds | peak, GB |\n| --- | --- | --- |")
    for name, (seconds, most) in rows.items():
        print(f"| {name} | {seconds:.1f} | {most / 1e9:.2f} |")
    seconds, peaks = zip(*(of for name, of in rows.items() if not name.startswith("chat")), strict=True)
    print(f"| the whole run | {sum(seconds):.0f} | {max(peaks) / 1e9:.2f} |")


if __name__ == "__main__":
    main()
