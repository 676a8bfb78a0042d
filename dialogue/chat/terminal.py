"""The conversation as a person sees it, or a script: a prompt, words as they are made, one line of figures."""

import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import FileHistory, History, InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings

from dialogue.chat import commands
from dialogue.chat.session import Chat, figures, write
from dialogue.errors import UserError
from dialogue.plaintext import plain

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

# torch and transformers take seconds to import; that happens while the person types.
if TYPE_CHECKING:
    from dialogue.chat.conversation import Conversation


def answer(
    messages: Iterable[str], start: Callable[[], "Conversation"], generate: Callable[..., str], chosen: dict, stats: str
) -> None:
    """One reply a message on standard output, until `exit`; everything else on standard error."""
    conversation = start()
    try:
        for message in messages:
            message = message.strip()
            if message == "exit":
                break
            if not message:
                continue
            generate(message, **chosen, conversation=conversation, on_text=write)
            write("\n")
            if conversation.forgotten:
                print(f"{conversation.forgotten} oldest turns forgotten", file=sys.stderr)
            if conversation.stats and stats != "off":
                print(figures(conversation.stats, stats), file=sys.stderr)
    except BrokenPipeError:  # who read the replies has enough of them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def chat(
    start: Callable[[], "Conversation"],
    generate: Callable[..., str],
    defaults: dict,
    chosen: dict,
    stats: str,
) -> None:
    """The conversation on a terminal, until `exit` or end of file."""
    loading = in_background(start)
    this = Chat(loading, generate, defaults, chosen, stats)
    session: PromptSession = PromptSession(
        history=_history(),
        completer=WordCompleter([*commands.COMMANDS, *(f"/set {name}" for name in defaults)], sentence=True),
        complete_while_typing=False,
        multiline=True,  # a pasted text keeps its lines
        key_bindings=_keys(),
    )
    loading.add_done_callback(lambda _: _refresh(session, loading))
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    mode = termios.tcgetattr(sys.stdin) if termios else None
    this.note("Type a message; /help lists commands, exit leaves.")
    try:
        while (line := _ask(session, this)) != "exit":
            try:
                if line.startswith("/") and not line.startswith("//"):
                    commands.run(this, line)
                elif line:
                    this.say(line.removeprefix("/") if line.startswith("//") else line)
            except UserError as error:
                if loading.done() and loading.exception():
                    raise
                this.console.print(plain(str(error)), style="red", markup=False)
            except KeyboardInterrupt:
                this.note("stopped")
        this.note("Bye.")
    finally:
        signal.signal(signal.SIGTERM, before)
        if mode:  # prompt_toolkit restores it, unless SIGTERM came just while it changed it
            termios.tcsetattr(sys.stdin, termios.TCSANOW, mode)
        leaving = sys.exc_info()[1]
        if not loading.done() and (leaving is None or isinstance(leaving, SystemExit)):
            # A thread in the middle of an import cannot be stopped, and nobody waits for it.
            sys.stdout.flush()
            os._exit(143 if leaving else 0)


def _ask(session: PromptSession, this: Chat) -> str:
    """The next line; "exit" at the end of file. Raises what went wrong with the model meanwhile."""
    while True:
        try:
            return session.prompt(this.prompt).strip()
        except KeyboardInterrupt:
            if not session.default_buffer.text:
                this.note("type exit to leave")
        except EOFError:
            return "exit"


def _refresh(session: PromptSession, loading: "Future[Conversation]") -> None:
    """From the thread that loads: show used/limit in the prompt; end the prompt if there is no model."""
    app, error = session.app, loading.exception()

    def refresh() -> None:
        if error and app.is_running and not app.is_done:
            app.exit(exception=error)
        app.invalidate()

    if app.loop and app.is_running:
        app.loop.call_soon_threadsafe(refresh)


def _keys() -> KeyBindings:
    """Enter sends, Alt-Enter makes a new line: prompt_toolkit has it the other way round for many lines."""
    keys = KeyBindings()
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    return keys


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


def _history() -> History:
    """Earlier messages, from a file in the user's state folder; in memory where that cannot be written."""
    try:
        folder = Path(os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state") / "gpt2-dialogue"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        (folder / "history").open("a").close()
    except (OSError, RuntimeError):  # RuntimeError: no home
        return InMemoryHistory()
    return FileHistory(folder / "history")
