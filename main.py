"""Chat with the model that `Fine_tuningmodel.py` trained.

    python main.py                       a conversation; `exit` quits, `/help` lists the commands
    python main.py --prompt "Hi"         one reply
    echo Hi | python main.py             a reply for each line

Edit a default of `generate_text` to change the chat; a flag changes it for one run.
"""

import argparse
import functools
import inspect
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dialogue import terminal
from dialogue.errors import UserError, exit_code

# torch and transformers take seconds to import; that happens while the person types.
if TYPE_CHECKING:
    from dialogue.generation import Conversation

# ---- Editable values ---------------------------------------------------------------------------------

model_dir = "gpt2-dialogue-full"  # the merged model, an adapter folder, or a name on the hub


def generate_text(
    prompt: str,
    max_t: int = 50,  # tokens of a reply, at most
    temp: float = 0.8,  # 0: always the most probable token; above 1: wilder
    top_k: int = 40,  # draw from the so many most probable tokens; 0: from all
    top_p: float = 0.9,  # draw from the most probable tokens that hold this share of the probability
    *,
    min_p: float = 0.0,  # leave out what is less than this share as probable as the best
    repetition_penalty: float = 1.0,  # above 1: tokens that were there already become less probable
    conversation: "Conversation | None" = None,  # what `prompt` continues; None: a new one
    on_text: Callable[[str], Any] | None = None,  # gets each piece of the reply as it is made
) -> str:
    """The bot's reply to `prompt`. Raises UserError for a value out of range or a message too long."""
    from dialogue.generation import Sampling

    sampling = Sampling(max_t, temp, top_k, top_p, min_p, repetition_penalty)
    pieces = []
    for piece in (conversation or start_conversation(model_dir)).reply(prompt, sampling):
        pieces.append(piece)
        if on_text:
            on_text(piece)
    return "".join(pieces)


# ---- The chat ----------------------------------------------------------------------------------------


def start_conversation(model: str, precision: str = "auto", seed: int | None = None) -> "Conversation":
    """A new conversation with a model, which is loaded at its first use."""
    from dialogue.generation import Conversation

    weights, tokenizer = _load(model, precision)
    return Conversation(weights, tokenizer, seed)


@functools.cache
def _load(model: str, precision: str) -> Any:
    from dialogue import generation

    return generation.load(model, precision)


def parse(argv: list[str] | None) -> argparse.Namespace:
    """Flags; a setting of `generate_text` that was not given is None."""
    parser = argparse.ArgumentParser(prog="main.py", description="Chat with the fine-tuned model.", allow_abbrev=False)
    add = parser.add_argument
    add("--model", default=model_dir, metavar="DIR", help=f"merged model, adapters, or hub name (default: {model_dir})")
    add("--prompt", metavar="TEXT", help="print one reply and end")
    for name, default in settings().items():
        about = {"max_t": "tokens of a reply, at most", "temp": "temperature; 0: the most probable token"}.get(name, "")
        add(f"--{name}", type=type(default), metavar="N", help=f"{about or name} (default: {default})")
    add("--seed", type=int, metavar="N", help="makes a whole conversation repeat exactly")
    add(
        "--precision", choices=terminal.PRECISIONS, default="auto", help="of the weights; auto: fastest of full quality"
    )
    add("--stats", choices=("on", "off", "json"), default="on", help="after each reply; json: on standard error")
    add("--debug", action="store_true", help="show a traceback for every error")
    return parser.parse_args(argv)


def settings() -> dict[str, Any]:
    """The settings of `generate_text` with their defaults."""
    parameters = inspect.signature(generate_text).parameters.values()
    return {p.name: p.default for p in parameters if isinstance(p.default, (int, float))}


def main(argv: list[str] | None = None) -> None:
    """Say what is missing at once; then talk, while the model loads behind the first prompt."""
    flags = parse(argv)
    if flags.model == model_dir and not Path(model_dir).is_dir():
        raise UserError(
            f"no model in {model_dir}/: train one first with `python Fine_tuningmodel.py` "
            "(`--preset starter` takes minutes on a CPU)"
        )
    chosen = {name: getattr(flags, name) for name in settings() if getattr(flags, name) is not None}
    start = functools.partial(start_conversation, flags.model, flags.precision, flags.seed)
    if flags.prompt is not None:
        terminal.answer([flags.prompt], start, generate_text, chosen, flags.stats)
    elif sys.stdin.isatty():
        terminal.chat(start, generate_text, settings(), chosen, flags.stats)
    else:
        terminal.answer(sys.stdin, start, generate_text, chosen, flags.stats)


if __name__ == "__main__":
    sys.exit(exit_code(main, debug="--debug" in sys.argv))
