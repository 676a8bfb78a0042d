"""Chat with the model that `Fine_tuningmodel.py` trained.

    python main.py                       a conversation; `exit` quits, `/help` lists the commands
    python main.py --prompt "Hi"         one reply
    echo Hi | python main.py             a line of reply for each line; 2 is the exit code where one had none

Edit a default of `generate_text` to change the chat; a flag changes it for one run.
"""

import functools
import inspect
import os
import sys
import time
import warnings
from argparse import Namespace
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dialogue import storage
from dialogue.chat import history, terminal
from dialogue.chat.commands import WHOLE_NUMBERS, fitted
from dialogue.chat.session import Chat
from dialogue.errors import Parser, UserError, exit_code
from dialogue.plaintext import plain

# torch and transformers take seconds to import; that happens while the person types.
if TYPE_CHECKING:
    from dialogue.chat.conversation import Conversation
    from dialogue.chat.engine import Model

# ---- Editable values ---------------------------------------------------------------------------------

model_dir = "gpt2-dialogue-full"  # the merged model, adapters, checkpoints of a training, or a name on the hub
persona = ""  # what the bot is told about itself, for example "You are Ada, a baker from Lyon."


def generate_text(
    prompt: str,
    max_t: int = 50,  # tokens of a reply, at most
    temp: float = 0.8,  # 0: always the most probable token; above 1: wilder
    top_k: int = 40,  # draw from the so many most probable tokens; 0: from all
    top_p: float = 0.9,  # draw from the most probable tokens that hold this share of the probability
    *,
    min_p: float = 0.0,  # leave out what is less than this share as probable as the best
    repetition_penalty: float = 1.0,  # above 1: tokens that were there already become less probable
    best_of: int = 0,  # draw so many replies, and give the one that fits best; 0: as many as this model is quick with
    conversation: "Conversation | None" = None,  # what `prompt` continues; None: a new one
    on_text: Callable[[str], Any] | None = None,  # gets each piece of the reply as it is made
) -> str:
    """The bot's reply to `prompt`. Raises UserError for a value out of range or a message too long."""
    from dialogue.chat.conversation import check

    sampling = check(
        max_t, best_of, temp=temp, top_k=top_k, top_p=top_p, min_p=min_p, repetition_penalty=repetition_penalty
    )
    pieces = (conversation or start_conversation(model_dir)).reply(prompt, max_t, sampling, best_of)
    reply = ""
    with closing(pieces):  # also when `on_text` raises: what was said is kept
        for piece in pieces:
            reply += piece
            if on_text:
                on_text(piece)
    return reply


# ---- The chat ----------------------------------------------------------------------------------------

SETTINGS = {  # name -> what `--help` says
    "max_t": "tokens of a reply, at most",
    "temp": "temperature; 0: always the most probable token",
    "top_k": "draw from the so many most probable tokens; 0: from all",
    "top_p": "draw from the most probable tokens that hold this share of the probability",
    "min_p": "leave out what is less than this share as probable as the best",
    "repetition_penalty": "above 1: tokens that were there already become less probable",
    "best_of": "draw so many replies, and give the one that fits best; 0: as many as this model is quick with",
}


def settings() -> dict[str, Any]:
    """The settings with their defaults, as `generate_text` has them."""
    return {name: inspect.signature(generate_text).parameters[name].default for name in SETTINGS}


# As they stand above; what the model's own run fitted takes the place of those that nobody edited.
UNEDITED = {"max_t": 50, "temp": 0.8, "top_k": 40, "top_p": 0.9, "min_p": 0.0, "repetition_penalty": 1.0, "best_of": 0}


def start_conversation(
    model: str, precision: str = "auto", seed: int | None = None, device: str | None = None
) -> "Conversation":
    """A new conversation with a model, which is loaded at its first use."""
    from dialogue.chat.conversation import Conversation

    return Conversation(_load(model, precision, device), seed, persona)


@functools.cache
def _load(model: str, precision: str, device: str | None) -> "Model":
    from dialogue.chat import engine

    return engine.load(model, precision, device)


def parse(argv: list[str] | None) -> Namespace:
    """Flags; a setting that was not given is None."""
    what = (
        "Chat with the fine-tuned model. Through a pipe, each line gets one line of reply: a newline in a reply "
        "becomes a space. The exit code is 2 where a line had no reply."
    )
    parser = Parser(prog="main.py", description=what, allow_abbrev=False)
    add = parser.add_argument
    add("--model", default=model_dir, metavar="DIR",
        help=f"merged model, adapters, a training's checkpoints, or hub name (default: {model_dir})")  # fmt: skip
    add("--prompt", metavar="TEXT", help="print one reply, on one line, and end")
    for name, default in settings().items():
        kind = int if name in WHOLE_NUMBERS else float
        add(f"--{name}", type=kind, metavar="N", help=f"{SETTINGS[name]} (default: {default})")
    add("--persona", metavar="TEXT", help="what the bot is told about itself, before the first message")
    add("--continue", dest="go_on", action="store_true", help="go on with the last conversation")
    add("--private", action="store_true", help="keep nothing: neither this conversation nor what is typed")
    add("--sampler", choices=("defaults", "fitted"), default="fitted",
        help="fitted: the settings that fitted this model best; defaults: those above (default: fitted)")  # fmt: skip
    add("--seed", type=int, metavar="N", help="makes a whole conversation repeat exactly")
    add("--precision", choices=("auto", "float32", "int8"), default="auto",
        help="of the weights; auto: int8 on a CPU, 16 bits on a GPU")  # fmt: skip
    add("--device", choices=("cpu",), help="cpu: leave the GPU alone, for example where it is full")
    add("--debug", action="store_true", help="show the traceback of an error that ends the program")
    return parser.parse_args(argv)


def find_model(name: str) -> str:
    """The folder of a model, for checkpoints the newest of them; or a name that may be on the hub.

    Raises UserError for what can be neither.
    """
    folder = Path(name)
    for wait in (0, 0.1):  # a training may be replacing the folder at this very moment
        time.sleep(wait)
        storage.recover(folder)
        if any(os.path.isfile(folder / file) for file in ("config.json", "adapter_config.json")):
            return name
    if os.path.isdir(folder) and (checkpoint := storage.newest_checkpoint(folder)):
        return str(checkpoint)
    if name in ("", model_dir) or os.path.exists(name) or name.startswith((".", "/")):
        raise UserError(
            f"no model in {name.rstrip('/')}/: train one first with `python Fine_tuningmodel.py` "
            "(or `--preset starter`, which takes minutes on a CPU); to one that is being trained, "
            "--model gpt2-dialogue-checkpoints talks"
        )
    return name


def described(model: str, sampler: dict[str, Any]) -> str:
    """What stands above a conversation: the model, its base and date, where its run says so, and fitted settings."""
    facts = storage.read_json(Path(model, storage.RUN_FILE)).get("facts")
    base, date = (facts.get(name) if isinstance(facts, dict) else "" for name in ("base model", "date"))
    settings = "\nSettings fitted to it: " + ", ".join(f"{name} {value}" for name, value in sampler.items())
    return plain(model + f", trained from {base}" * bool(base) + f" on {date}" * bool(date) + settings * bool(sampler))


def main(argv: list[str] | None = None) -> None:
    """Say what is missing at once; then talk, while the model loads behind the first prompt."""
    flags = parse(argv)
    flags.model = find_model(flags.model)
    given = {name: getattr(flags, name) for name in SETTINGS if getattr(flags, name) is not None}
    own = fitted(flags.model) if flags.sampler == "fitted" else {}
    own = {name: of for name, of in own.items() if name not in given and settings()[name] == UNEDITED[name] != of}
    chosen = own | given
    earlier = history.last_conversation() if flags.go_on else []

    def start() -> "Conversation":
        from dialogue.chat.conversation import check

        check(**settings() | chosen)
        conversation = start_conversation(flags.model, flags.precision, flags.seed, flags.device)
        if earlier:
            conversation.restore(earlier)
        if flags.persona is not None:
            conversation.persona = flags.persona.strip()
        return conversation

    if not flags.debug:
        warnings.simplefilter("ignore")  # of libraries; they would stand in the middle of the prompt
    if flags.prompt is not None:
        terminal.answer([flags.prompt], start, generate_text, chosen)
    elif sys.stdin.isatty() and sys.stdout.isatty():
        talk = Chat(terminal.in_background(start), generate_text, settings(), chosen)
        terminal.chat(talk, described(flags.model, own), earlier, flags.private)
    else:
        terminal.answer(sys.stdin, start, generate_text, chosen)


if __name__ == "__main__":
    sys.exit(exit_code(main, debug="--debug" in sys.argv))
