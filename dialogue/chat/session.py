"""What a conversation in a terminal holds: settings, the reply as it is written, one line of figures."""

import sys
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

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

    def say(self, message: str) -> None:
        """Send a message and show the reply as it is made."""
        talk = self.conversation
        self.show(lambda on_text: self.generate(message, **self.chosen, conversation=talk, on_text=on_text))

    def show(self, make: Callable[[Callable[[str], None]], Any]) -> None:
        """Show a reply as `make` makes it, piece by piece. Ctrl-C ends the reply and keeps what was said."""
        conversation = self.conversation
        self.console.print("bot> ", end="", style="bold")
        end = ""
        try:
            make(write)
            end = " [cut: /more goes on]" if conversation.cut is conversation.turns else ""
        except KeyboardInterrupt:
            end = " [stopped]"
        finally:
            write(end + "\n")
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
