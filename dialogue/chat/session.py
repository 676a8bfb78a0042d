"""What a conversation in a terminal holds: settings, the reply as it is written, one line of figures."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_toolkit.formatted_text import AnyFormattedText
from rich.cells import cell_len
from rich.console import Console
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from dialogue.errors import handled
from dialogue.json_files import write_private
from dialogue.plaintext import plain

# torch and transformers take seconds to import; that happens while the person types.
if TYPE_CHECKING:
    from dialogue.chat.conversation import Conversation
    from dialogue.chat.messages import Messages
    from dialogue.chat.stats import Stats


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def figures(stats: "Stats", how: str) -> str:
    """One line: a JSON object, or for a person."""
    if how == "json":
        return json.dumps(stats._asdict())
    tokens = f"{stats.new_tokens} tokens" + (f", the best of {stats.candidates}" if stats.candidates > 1 else "")
    return f"{tokens}, {stats.seconds:.1f} s, {stats.tokens_per_second:.0f} tokens/s, {stats.precision}"


class Chat:
    """What the commands can look at and change."""

    def __init__(
        self, loading: "Future[Conversation]", generate: Callable[..., str], defaults: dict, chosen: dict, stats: str
    ) -> None:
        self.loading, self.generate, self.defaults, self.stats = loading, generate, defaults, stats
        self.chosen = chosen  # settings that were fitted, or that a flag or /set gave
        self.ask: Callable[[str, str], str] = lambda prompt, text: text  # lets the person edit a text
        self.kept: Path | None = None  # where the conversation is kept after each turn
        colourless = bool(os.environ.get("NO_COLOR"))  # rich alone would still write bold and dim
        self.console = Console(highlight=False, color_system=None if colourless else "auto")
        # The old Windows console would show escape sequences as text.
        simple = self.console.is_dumb_terminal or self.console.legacy_windows
        self.rich = self.console.is_terminal and not simple and not colourless

    @property
    def conversation(self) -> "Conversation":
        """Waits for the model where it is not there yet. Raises what went wrong with it."""
        if not self.loading.done():
            self.note("loading the model ...")
        return self.loading.result()

    def settings(self) -> dict[str, Any]:
        """What the next reply is made with."""
        return self.defaults | self.chosen

    def note(self, text: str) -> None:
        """A line that is neither the person's nor the bot's."""
        self.console.print(text, style="dim", markup=False)

    def rows(self, rows: list[list[str]], titles: Sequence[str] = ()) -> None:
        """A table; where the terminal is too narrow for one, a line for each row and its cells below."""
        widths = [max(map(cell_len, column)) for column in zip(*rows, *([titles] if titles else []), strict=True)]
        if sum(widths[:-1]) + min(widths[-1], 24) + 2 * len(widths) <= self.console.width:
            table = Table(box=None, show_header=bool(titles), padding=(0, 2, 0, 0))
            for place, width in enumerate(widths):
                title = titles[place] if titles else ""
                numbers = bool(titles and place)
                table.add_column(title, justify="right" if numbers else "left", min_width=min(width, 24))
            for row in rows:
                table.add_row(*map(Text, row))
            self.console.print(table)
            return
        for first, *others in rows:
            named = zip(titles[1:] or [""] * len(others), others, strict=True)
            self.console.print(Text(first))
            cells = Text(", ".join(f"{title} {cell}".strip() for title, cell in named if cell))
            self.console.print(Padding(cells, (0, 0, 0, 2)))

    def prompt(self) -> AnyFormattedText:
        """used/limit, and where to type; before the model is there, just that."""
        if not self.loading.done() or self.loading.exception():
            return [("", "you> ")]
        return [("fg:ansibrightblack", f"{self.conversation.used}/{self.conversation.limit} "), ("", "you> ")]

    def say(self, message: str) -> None:
        """Send a message and show the reply as it is made. Ctrl-C ends the reply and keeps what was said."""
        talk = self.conversation
        self.show(lambda on_text: self.generate(message, **self.chosen, conversation=talk, on_text=on_text))

    def show(self, make: Callable[[Callable[[str], None]], Any]) -> None:
        """Show a reply as `make` makes it, piece by piece."""
        conversation = self.conversation
        self.console.print("bot> ", end="", style="bold")
        wrap = Wrap(lambda: self.console.width, column=5)
        live = self.rich and self.stats == "on"
        below = "\x1b[J" if live else ""  # clears the live line
        stopped = ""
        with interruptible() as interrupted:

            def on_text(piece: str) -> None:
                text = below + wrap.add(piece)
                if live and conversation.stats:
                    now = conversation.stats
                    of = f" of {now.candidates} candidates" if now.candidates > 1 else ""
                    line = f"{now.new_tokens} tokens{of}, {now.tokens_per_second:.0f} tokens/s"
                    # One line down, the figures, one line up, to where the text goes on. Relative, since the
                    # line break may scroll the screen.
                    text += f"\n\x1b[2m{line[: self.console.width - 1]}\x1b[0m\x1b[1A\x1b[{wrap.column + 1}G"
                write(text)
                if interrupted.is_set():
                    raise Stop

            try:
                make(on_text)
                stopped = " [cut: /more goes on]" if conversation.cut is conversation.turns else ""
            except (Stop, KeyboardInterrupt):
                stopped = " [stopped]"
            finally:
                write(below + wrap.rest() + stopped + "\n")
        self.announce_forgotten()
        if conversation.stats and self.stats == "json":
            print(figures(conversation.stats, "json"), file=sys.stderr)
        elif conversation.stats and self.stats == "on":
            self.note(figures(conversation.stats, "on"))

    def show_turns(self, messages: "Messages") -> None:
        """The newest turns again, as they were shown when they were said."""
        for message in messages[-4:]:
            bot = message["role"] == "assistant"
            self.console.print("bot> " if bot else "you> ", end="", style="bold" if bot else None)
            self.console.print(Text(plain(message["content"].strip())))

    def keep(self) -> None:
        """Keep the conversation for `--continue`, whatever happens next; where that fails, say so once."""
        if self.kept and self.loading.done() and not self.loading.exception():
            try:
                write_private(self.kept, self.conversation.messages())
            except OSError as error:
                self.note(f"this conversation is not kept: {plain(str(self.kept))}: {error.strerror}")
                self.kept = None

    def announce_forgotten(self) -> None:
        if self.conversation.forgotten:
            self.note(f"{self.conversation.forgotten} oldest turns forgotten")


class Stop(Exception):
    """The person pressed Ctrl-C while the bot was writing."""


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """Inside, Ctrl-C sets the event instead of raising, so that no forward pass is cut in half; a second
    Ctrl-C raises."""
    stopped = threading.Event()

    def on_interrupt(number: int, frame: Any) -> None:
        if stopped.is_set():
            raise KeyboardInterrupt
        stopped.set()

    with handled(on_interrupt, signal.SIGINT):
        yield stopped


class Wrap:
    """Breaks lines between words, at the terminal's edge, while the text arrives in pieces: a word is held
    back until it ends. A wide character (Chinese, an emoji) is a word of its own."""

    def __init__(self, width: Callable[[], int], column: int) -> None:
        self.width, self.column, self.word = width, column, ""

    def add(self, piece: str) -> str:
        """Text to write now. The last column stays free: there, terminals differ in where the cursor is."""
        out = ""
        for character in piece:
            if character == "\n":
                out += self.rest() + "\n"
                self.column = 0
            elif character in " \t":
                out += self.rest()
                out += " " if self.column < self.width() - 1 else ""
                self.column += 1
            else:
                # Skin tones and what follows a zero-width joiner belong to the emoji before them.
                joined = self.word.endswith("\u200d") or "\U0001f3fb" <= character <= "\U0001f3ff"
                wide = cell_len(character) == 2 and not joined
                if wide or cell_len(self.word + character) > self.width() - 1:
                    out += self.rest()
                self.word += character
        return out

    def rest(self) -> str:
        """The word that was held back."""
        word, self.word = self.word, ""
        size = cell_len(word)
        if self.column and self.column + size > self.width() - 1:
            self.column = size
            return "\n" + word
        self.column += size
        return word
