"""What a conversation in a terminal holds: settings, the reply as it is written, one line of figures."""

import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from dialogue.json_files import write_private
from dialogue.plaintext import plain

# torch and transformers take seconds to import; that happens while the person types.
if TYPE_CHECKING:
    from dialogue.chat.conversation import Conversation
    from dialogue.chat.history import Messages


def write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Chat:
    """What the commands can look at and change."""

    def __init__(
        self, loading: "Future[Conversation]", generate: Callable[..., str], defaults: dict, chosen: dict
    ) -> None:
        self.loading, self.generate, self.defaults = loading, generate, defaults
        self.chosen = chosen  # settings that were fitted, or that a flag or /set gave
        self.ask: Callable[[str, str], str] = lambda prompt, text: text  # lets the person edit a text
        self.kept: Path | None = None  # where the conversation is kept after each turn
        self.console = Console(highlight=False)
        self.patience = 0  # the Ctrl-C that raises, counted from now; between messages none does

    @property
    def conversation(self) -> "Conversation":
        """Waits for the model where it is not there yet. Raises what went wrong with it."""
        if not self.loading.done():
            self.patience = 1
            self.note("loading the model ...")
        return self.loading.result()

    def settings(self) -> dict[str, Any]:
        """What the next reply is made with."""
        return self.defaults | self.chosen

    def note(self, text: str) -> None:
        """A line that is neither the person's nor the bot's."""
        self.console.print(text, style="dim", markup=False)

    def rows(self, rows: list[list[str]], *titles: str) -> None:
        """A table."""
        table = Table(*titles, box=None, show_header=bool(titles), padding=(0, 2, 0, 0))
        for row in rows:
            table.add_row(*map(Text, row))
        for column in table.columns[1:] if titles else ():
            column.justify = "right"
        self.console.print(table)

    def prompt(self) -> str:
        """Tokens used/limit, and where to type; before the model is there, just that."""
        if not self.loading.done() or self.loading.exception():
            return "you> "
        return f"{self.conversation.used}/{self.conversation.limit} you> "

    def interrupt(self, *_: Any) -> None:
        """Ctrl-C. A reply notices the first one between two tokens: no forward pass is cut in half, and no file."""
        self.patience -= 1
        if self.patience == 0:
            raise KeyboardInterrupt

    def say(self, message: str) -> None:
        """Send a message and show the reply as it is made."""
        talk = self.conversation
        self.show(lambda on_text: self.generate(message, **self.chosen, conversation=talk, on_text=on_text))

    def show(self, make: Callable[[Callable[[str], None]], Any]) -> None:
        """Show a reply as `make` makes it, piece by piece. Ctrl-C ends the reply and keeps what was said."""
        conversation = self.conversation
        wrap, end, self.patience = Wrap(lambda: self.console.width, column=5), "", 2
        self.console.print("bot> ", end="", style="bold")
        live = self.console.color_system not in (None, "windows")  # which show escape sequences as text
        below = "\x1b[J" * live  # clears the live line

        def on_text(piece: str) -> None:
            text = below + wrap.add(piece)
            if live:
                # One line down, the figures, one line up, to where the text goes on. Relative, since the line break may
                # scroll the screen.
                line = conversation.stats[: self.console.width - 1]
                text += f"\n\x1b[2m{line}\x1b[0m\x1b[1A\x1b[{wrap.column + 1}G"
            write(text)
            if self.patience == 1:
                self.interrupt()

        try:
            make(on_text)
            end = " [cut: /more goes on]" if conversation.cut is conversation.turns else ""
        except KeyboardInterrupt:
            end = " [stopped]"
        finally:
            write(below + wrap.rest() + end + "\n")
        self.announce_forgotten()
        if conversation.stats:
            self.note(conversation.stats)

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


class Wrap:
    """Breaks lines between words, at the terminal's edge, while the text arrives in pieces: a word is held back until
    it ends. A wide character (Chinese, an emoji) is a word of its own."""

    def __init__(self, width: Callable[[], int], column: int) -> None:
        self.width, self.column, self.word = width, column, ""

    def add(self, piece: str) -> str:
        """Text to write now. The last column stays free: there, terminals differ in where the cursor is."""
        out = ""
        for character in piece:
            # Skin tones and what follows a zero-width joiner belong to the emoji before them.
            joined = self.word.endswith("\u200d") or "\U0001f3fb" <= character <= "\U0001f3ff"
            wide = cell_len(character) == 2 and not joined
            if character in " \t\n" or wide or cell_len(self.word + character) >= self.width():
                out += self.rest()
            if character == "\n":
                out, self.column = out + "\n", 0
            elif character in " \t":
                out += " " * (self.column < self.width() - 1)
                self.column += 1
            else:
                self.word += character
        return out

    def rest(self) -> str:
        """The word that was held back."""
        word, self.word = self.word, ""
        if self.column and self.column + cell_len(word) >= self.width():
            word, self.column = "\n" + word, 0
        self.column += cell_len(word)
        return word
