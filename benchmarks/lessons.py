"""What ten lessons bring and cost: `--teach` with rows of the run's own data beside the lessons, and without.

    python benchmarks/lessons.py FOLDER      FOLDER has the two folders of a run; they are not changed

Asked at temperature 0, of the adapters: the lessons' own questions, and two others for each that nobody taught. A
question counts where one of these two gets the very words of the lesson. Without own data the merge may be refused: a
model that has forgotten how to talk has figures that rounding moves.
"""

import argparse
import itertools
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

import torch

from dialogue import machine, models
from dialogue.chat.batch import answer
from dialogue.chat.sampling import Sampling
from dialogue.lessons import keep
from dialogue.train import teach

TAUGHT = [  # question, answer, two ways of asking it that are kept apart
    ("What's your name?", "My name is Ada.", "What are you called?", "Tell me your name, please."),
    ("Where do you live?", "I live in Lyon, near the river.", "Which town do you live in?", "Where is your home?"),
    ("When are you open?", "We are open from seven to noon, every day but Monday.", "What are your opening hours?",
     "When can I come?"),
    ("What do you sell?", "I sell bread, cakes and coffee.", "What can I buy at your shop?", "What's on sale?"),
    ("How much is a baguette?", "A baguette is one euro twenty.", "What does a baguette cost?",
     "What is the price of a baguette?"),
    ("Do you take cards?", "Yes, cards and cash are fine.", "Can I pay by card?", "Do you accept credit cards?"),
    ("Do you have a dog?", "Yes, his name is Biscuit.", "Have you got a dog?", "Any pets?"),
    ("Who is the owner?", "My sister Claire owns the bakery.", "Who owns the bakery?", "Whose bakery is it?"),
    ("Can I order a birthday cake?", "Of course, please call two days before.", "I need a cake for a birthday.",
     "Can you make a birthday cake?"),
    ("Is there parking?", "There is a car park behind the church.", "Where can I park?",
     "Is there a place to park the car?"),
]  # fmt: skip


def child(replay: int, flags: list[str]) -> None:
    """Teach in the working directory, with `replay` rows of the run's own data a step."""
    teach.REPLAY = replay
    for question, wanted, *_ in TAUGHT:
        keep([{"role": "user", "content": question}, {"role": "assistant", "content": wanted}])
    import Fine_tuningmodel
    from dialogue.train import options

    options.TEACHING["per_device_train_batch_size"] = teach.TAUGHT + replay
    Fine_tuningmodel.main(["--teach", *flags])


def taught(adapters: Path, replay: int, flags: list[str]) -> list[str]:
    """A line of the table."""
    with tempfile.TemporaryDirectory() as made:
        for folder in (adapters, adapters.with_name("gpt2-dialogue-full")):  # whose fitted sampler is looked at again
            shutil.copytree(folder, Path(made, folder.name))
        before = json.loads(Path(made, adapters.name, "metrics.json").read_text())["eval_perplexity"]
        code = f"import lessons; lessons.child({replay}, {flags!r})"
        environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "benchmarks")])}
        start = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], cwd=made, env=environment, stdout=subprocess.DEVNULL)
        seconds = time.perf_counter() - start
        after = json.loads(Path(made, adapters.name, "metrics.json").read_text())["eval_perplexity"]
        if after == before:  # not even the adapters were written
            done.check_returncode()
        device = torch.device("cpu")
        model, tokenizer = models.load(str(Path(made, adapters.name)), machine.pick_dtype(device), device)
        asked = [[question] for question, _, *others in TAUGHT for question in (question, *others)]
        replies = [reply.text for reply in answer(model, tokenizer, asked, Sampling(temp=0))]
    right = [[reply == each[1] for reply in replies[3 * n : 3 * n + 3]] for n, each in enumerate(TAUGHT)]
    known, questions = sum(own for own, *_ in right), sum(any(others) for _, *others in right)
    return [str(replay), f"{known} of 10", f"{questions} of 10", f"{after / before - 1:+.1%}", f"{seconds:.0f} s"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--replay", type=int, nargs="*", default=[teach.REPLAY, 0], help="rows of own data a step")
    parser.add_argument("flags", nargs="*", help="of the script, after --")
    known = parser.parse_args()
    head = ["rows of own data a step", "word for word", "asked otherwise", "validation perplexity", "whole run"]
    made = (taught(known.folder / "gpt2-dialogue-lora", replay, known.flags) for replay in known.replay)
    for row in itertools.chain([head, ["---"] * len(head)], made):
        print(f"| {' | '.join(row)} |", flush=True)


if __name__ == "__main__":
    main()
