"""The conversation as a person sees it: a prompt, words as they are made, commands."""

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.formatted_text import ANSI
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from rich.console import Console
from rich.table import Table

from dialogue.errors import UserError
from dialogue.plaintext import plain

if TYPE_CHECKING:
    from dialogue.generation import Conversation, Stats

PRECISIONS = ("auto", "float32", "bfloat16", "float16")

HELP = {
    "/help": "this list",
    "/reset": "forget the conversation",
    "/retry": "another answer to the last message",
    "/undo": "take the last message and its answer back",
    "/set NAME VALUE": "change a setting: max_t, temp, top_k, top_p, min_p, repetition_penalty or seed",
    "/show": "the settings",
    "/context": "exactly what the model reads",
    "/save FILE": "write the conversation as JSON chat messages",
    "/load FILE": "continue a saved conversation",
    "exit": "leave (so does Ctrl-D); Ctrl-C stops a reply",
}


def answer(
    messages: Iterable[str], start: Callable[[], "Conversation"], generate: Callable[..., str], chosen: dict, stats: str
) -> None:
    """For scripts: one reply a message on standard output, everything else on standard error."""
    conversation = start()
    for message in messages:
        if not message.strip():
            continue
        generate(message.strip(), **chosen, conversation=conversation, on_text=_write)
        _write("\n")
        if stats == "json" and conversation.stats:
            print(json.dumps(conversation.stats._asdict()), file=sys.stderr)


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


class Chat:
    """What a command can look at and change."""

    def __init__(
        self, generate: Callable[..., str], settings: dict[str, Any], chosen: dict[str, Any], stats: str
    ) -> None:
        self.generate, self.defaults, self.chosen, self.stats = generate, settings, chosen, stats
        self.console = Console(highlight=False)
        self.conversation: Conversation

    def say(self, message: str) -> None:
        """Send a message and print the reply as it is made. Ctrl-C ends the reply and keeps what was said."""
        _write("bot> ")
        column = Column(self.console.width, start=5)
        with interruptible() as stopped:

            def on_text(piece: str) -> None:
                _write(column.wrap(piece))
                if stopped.is_set():
                    raise Stop

            try:
                self.generate(message, **self.chosen, conversation=self.conversation, on_text=on_text)
                _write(column.rest())
            except Stop:
                _write(column.rest() + " [stopped]")
        _write("\n")
        if self.conversation.forgotten:
            self.console.print(f"({self.conversation.forgotten} oldest turns forgotten)", style="dim")
        if self.conversation.stats:
            self.show_stats(self.conversation.stats)

    def show_stats(self, stats: "Stats") -> None:
        """One dim line, one JSON object on standard error, or nothing."""
        if self.stats == "json":
            print(json.dumps(stats._asdict()), file=sys.stderr)
        elif self.stats == "on":
            self.console.print(
                f"{stats.new_tokens} tokens, first after {stats.first_token_seconds:.1f} s, "
                f"{stats.tokens_per_second:.0f} tokens/s, {stats.precision}",
                style="dim",
            )

    def run(self, line: str) -> None:
        """A command. Raises UserError where it is wrong; nothing has changed then."""
        name, _, rest = line[1:].partition(" ")
        command = getattr(self, f"do_{name}", None)
        if command is None:
            raise UserError(
                f"there is no command /{plain(name)}: /help lists them; // sends a message that starts with /"
            )
        command(rest.strip())

    def do_help(self, rest: str) -> None:
        table = Table(box=None, show_header=False, padding=(0, 2, 0, 0))
        for name, about in HELP.items():
            table.add_row(name, about)
        self.console.print(table)

    def do_reset(self, rest: str) -> None:
        self.conversation.turns = []
        self.console.print("(a new conversation)", style="dim")

    def do_retry(self, rest: str) -> None:
        message = self.conversation.undo()
        if message is None:
            raise UserError("there is no message to answer again")
        self.say(message)

    def do_undo(self, rest: str) -> None:
        message = self.conversation.undo()
        if message is None:
            raise UserError("there is nothing to take back")
        self.console.print(f"(taken back: {message})", style="dim", markup=False)

    def do_set(self, rest: str) -> None:
        from dialogue.generation import Sampling

        name, _, value = rest.partition(" ")
        if name == "seed":
            self.conversation.generator.manual_seed(_number(int, "seed", value))
        elif name in self.defaults:
            number = _number(type(self.defaults[name]), name, value)
            Sampling(**{name: number}).check()
            self.chosen[name] = number
        else:
            raise UserError(f"there is no setting {plain(name)!r}: choose {', '.join(self.defaults)} or seed")
        self.console.print(f"({name} = {value})", style="dim", markup=False)

    def do_show(self, rest: str) -> None:
        for name, value in (self.defaults | self.chosen).items():
            self.console.print(f"{name} = {value}")
        self.console.print(f"context = {self.conversation.used}/{self.conversation.limit} tokens")

    def do_context(self, rest: str) -> None:
        from dialogue.prompt import decode_text

        ids = [token for turn in self.conversation.turns for token in turn]
        self.console.print(plain(decode_text(self.conversation.tokenizer, ids)), markup=False)

    def do_save(self, rest: str) -> None:
        if not rest:
            raise UserError("/save needs the name of a file")
        try:
            Path(rest).write_text(
                json.dumps(self.conversation.messages(), indent=2, ensure_ascii=False), encoding="utf-8"
            )
        except OSError as error:
            raise UserError(f"{plain(rest)} could not be written: {error.strerror}") from error
        self.console.print(f"(saved to {plain(rest)})", style="dim", markup=False)

    def do_load(self, rest: str) -> None:
        try:
            self.conversation.restore(json.loads(Path(rest).read_text(encoding="utf-8")))
        except OSError as error:
            raise UserError(f"{plain(rest)} could not be read: {error.strerror}") from error
        except (ValueError, RecursionError) as error:
            raise UserError(f"{plain(rest)} is not a saved conversation: {plain(str(error))}") from error
        self.console.print(f"({len(self.conversation.turns)} turns loaded)", style="dim")


def _number(kind: type, name: str, text: str) -> Any:
    try:
        return kind(text)
    except ValueError as error:
        raise UserError(f"{name} needs a {'whole ' if kind is int else ''}number, not {plain(text)!r}") from error


def chat(
    start: Callable[[], "Conversation"], generate: Callable[..., str], settings: dict, chosen: dict, stats: str
) -> None:
    """The conversation on a terminal, until `exit` or end of file."""
    loading = in_background(start)
    this = Chat(generate, settings, chosen, stats)
    session: PromptSession = PromptSession(history=_history())
    this.console.print("Type a message; /help lists commands, exit leaves.", style="dim")
    loaded = False
    while True:
        used = f"{this.conversation.used}/{this.conversation.limit} " if loaded else ""
        dim = "" if os.environ.get("NO_COLOR") else "\x1b[2m"
        try:
            line = session.prompt(ANSI(f"{dim}{used}{dim and chr(27) + '[0m'}you> ")).strip()
        except KeyboardInterrupt:
            this.console.print("(type exit to leave)", style="dim")
            continue
        except EOFError:
            break
        if line == "exit":
            break
        if not line:
            continue
        if not loaded:
            this.conversation = _wait(loading, this.console)
            loaded = True
        try:
            if line.startswith("/") and not line.startswith("//"):
                this.run(line)
            else:
                this.say(line.removeprefix("/") if line.startswith("//") else line)
        except UserError as error:
            this.console.print(str(error), style="red", markup=False)
    this.console.print("Bye.", style="dim")
    if not loading.done():
        # A thread in the middle of an import cannot be stopped; nobody waits for it.
        sys.stdout.flush()
        os._exit(0)


def _wait(loading: "Future[Conversation]", console: Console) -> "Conversation":
    if not loading.done():
        console.print("(loading the model ...)", style="dim")
    return loading.result()


def in_background(work: Callable[[], Any]) -> "Future[Any]":
    """Start `work` in a thread that does not keep the program alive; its result or error waits in the future."""
    future: Future[Any] = Future()

    def run() -> None:
        try:
            future.set_result(work())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future


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

    before = signal.signal(signal.SIGINT, on_interrupt)
    try:
        yield stopped
    finally:
        signal.signal(signal.SIGINT, before)


class Column:
    """Wraps words at the terminal's edge while they arrive in pieces: a word is held back until it ends."""

    def __init__(self, width: int, start: int) -> None:
        self.width, self.column, self.word = width, start, ""

    def wrap(self, piece: str) -> str:
        """Text to write now."""
        out = ""
        for character in piece:
            if character in " \n":
                out += self.rest() + (character if character == "\n" or self.column < self.width - 1 else "")
                self.column = 0 if character == "\n" else self.column + 1
            else:
                self.word += character
        return out

    def rest(self) -> str:
        """The word that was held back."""
        from rich.cells import cell_len

        word, self.word = self.word, ""
        size = cell_len(word)
        if word and self.column and self.column + size > self.width - 1:
            self.column = size
            return "\n" + word
        self.column += size
        return word


def _history() -> History:
    """Earlier messages, from a file in the user's state folder; in memory where that cannot be written."""
    folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "gpt2-dialogue"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "history").open("a").close()
    except OSError:
        return InMemoryHistory()
    return FileHistory(folder / "history")
