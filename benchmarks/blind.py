"""Which of two bots answers better? A reader compares their replies without knowing whose is whose.

    python -m benchmarks.blind A B                    writes blind.txt for the reader, and blind.json, the key
    python -m benchmarks.blind --choices FILE         what the reader chose -> wins, ties, an interval

A and B are each a model's folder, alone or with settings of the chat: `DIR:temp=0,best_of=8`; `DIR:fitted` takes
those that were fitted for the model. Both answer 40 everyday messages and 20 conversations of three turns, each with
the same seed. The reader gives a line a pair, its number and 1, 2 or = : "7: 2".
"""

import argparse
import json
import random
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np

import main as chat
from dialogue.data.corpus import Dialogues
from dialogue.data.sources import load_corpus
from dialogue.errors import Parser, UserError, exit_code
from dialogue.measure.likelihood import bootstrap
from dialogue.measure.replies import OPENERS, find_contexts
from dialogue.storage import read_json, write_json

INSTRUCTIONS = """{pairs} conversations. Each ends with two replies to its last message. Which would you rather get
from somebody you chat with: does it fit what was said, does it make sense? Write a line for each conversation: its
number, and 1, 2, or = where neither is better. "7: 2" says that in conversation 7 the second reply is better.
"""


def parse_bot(text: str) -> tuple[str, dict[str, Any]]:
    """ "DIR:temp=0,best_of=8" -> the folder and what `generate_text` is called with."""
    folder, _, listed = text.partition(":")
    settings: dict[str, Any] = {}
    for part in filter(None, listed.split(",")):
        name, _, value = part.partition("=")
        try:
            settings |= chat.fitted(folder) if part == "fitted" else {name: json.loads(value)}
        except ValueError as error:
            raise UserError(f"{part} is no setting: give name=number") from error
    return folder, settings


def answers(bot: str, contexts: Dialogues, seed: int) -> list[str]:
    """The bot's reply to each of `contexts`, as the chat makes it."""
    folder, settings = parse_bot(bot)
    chat.find_model(folder)
    replies = []
    for number, turns in enumerate(contexts):
        conversation = chat.start_conversation(folder, seed=seed * 1_000_003 + number)
        conversation.restore([
            {"role": ("user", "assistant")[place % 2], "content": turn} for place, turn in enumerate(turns[:-1])
        ])  # fmt: skip
        try:
            replies.append(chat.generate_text(turns[-1], conversation=conversation, **settings).strip())
        except TypeError as error:
            raise UserError(f"{bot}: the chat has no such setting ({error})") from error
    return replies


def pair_up(contexts: Dialogues, replies: list[list[str]], seed: int) -> tuple[str, dict[str, Any]]:
    """The reader's text, and the key: pair -> which bot (0 or 1) stands first. Equal replies are a tie unread."""
    chance = random.Random(seed)
    order = chance.sample(range(len(contexts)), len(contexts))
    first: dict[str, int] = {}
    text, same = "", 0
    for index in order:
        if replies[0][index] == replies[1][index]:
            same += 1
            continue
        number = str(len(first) + 1)
        first[number] = chance.randrange(2)
        said = "\n".join(f"   {'AB'[place % 2]}: {turn}" for place, turn in enumerate(contexts[index]))
        shown = [replies[first[number]][index], replies[1 - first[number]][index]]
        text += f"\n{number}.\n{said}\n      1) {shown[0]}\n      2) {shown[1]}\n"
    return INSTRUCTIONS.format(pairs=len(first)) + text, {"first": first, "same": same}


def read_choices(text: str, first: dict[str, int]) -> list[int]:
    """The reader's lines -> for each pair, which bot won: 0, 1, or -1 for neither. Raises UserError for a gap."""
    found = dict(re.findall(r"^\W*(\d+)\W*?[\s:.)]\s*([12=])\s*$", text, re.MULTILINE))
    missing = [number for number in first if number not in found]
    if missing:
        raise UserError(f'no choice for {len(missing)} pairs, {missing[0]} for one: each needs a line like "7: 2"')
    return [-1 if found[pair] == "=" else first[pair] ^ (found[pair] == "2") for pair in first]


def result(winners: list[int], bots: list[str], same: int) -> str:
    """Wins, ties, and B's share of the decided pairs with its 95 % interval."""
    decided = np.array([winner for winner in winners if winner >= 0])
    counted = f"A ({bots[0]}) {int((decided == 0).sum())}, B ({bots[1]}) {int((decided == 1).sum())}"
    ties = f"neither {len(winners) - len(decided)}, the same reply {same}"
    if not len(decided):
        return f"{counted}, {ties}."
    share = bootstrap(len(decided), lambda at: {"share": float(decided[at].mean())}, seed=0)["share"]
    return f"{counted}, {ties}. B wins {share.value:.0%} of the decided pairs ({share.low:.0%} to {share.high:.0%})."


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.blind", description=(__doc__ or "").splitlines()[0])
    add = parser.add_argument
    add("bots", nargs="*", metavar="BOT", help="A and B: a model's folder, with settings DIR:temp=0,best_of=8")
    add("--choices", type=Path, metavar="FILE", help="a reader's choices: print what came of it")
    add("--pairs", type=Path, default=Path("blind.txt"), metavar="FILE", help="for the reader (default: %(default)s)")
    add("--key", type=Path, default=Path("blind.json"), metavar="FILE", help="the key (default: %(default)s)")
    add("--dataset", default="chitchat", help="whose test split has the three turns (default: %(default)s)")
    add("--seed", type=int, default=0, help="of contexts, replies and sides (default: %(default)s)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Make the pairs, or read the choices."""
    flags = parse(argv)
    if flags.choices:
        key = read_json(flags.key)
        winners = read_choices(flags.choices.read_text(encoding="utf-8"), key["first"])
        print(result(winners, key["bots"], key["same"]))
        return
    if len(flags.bots) != 2:
        raise UserError("give two bots to compare, or --choices FILE")
    talks = [turns for turns in load_corpus(flags.dataset).test if len(turns) >= 4]
    found = find_contexts(talks, 20, flags.seed, shortest=3, longest=3)
    contexts = [[opener] for opener in OPENERS] + [context.turns for context in found]
    text, key = pair_up(contexts, [answers(bot, contexts, flags.seed) for bot in flags.bots], flags.seed)
    flags.pairs.write_text(text, encoding="utf-8")
    write_json(flags.key, {"bots": flags.bots, **key})
    print(f"{len(key['first'])} pairs in {flags.pairs}, {key['same']} more got the same reply twice; key: {flags.key}")


if __name__ == "__main__":
    sys.exit(exit_code(main))
