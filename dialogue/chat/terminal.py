"""The conversation as a person sees it, or a script: a prompt, words as they are made, one line of figures."""

import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import Future
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import WordCompleter
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings

from dialogue.chat import commands
from dialogue.chat.history import KEPT, Messages, open_history, state_folder
from dialogue.chat.session import Chat, write
from dialogue.errors import ENDINGS, UserError, handled, in_a_line
from dialogue.plaintext import plain

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

# torch and transformers take seconds to import; that happens while the person types.
if TYPE_CHECKING:
    from dialogue.chat.conversation import Conversation


def answer(
    messages: Iterable[str], start: Callable[[], "Conversation"], generate: Callable[..., str], chosen: dict
) -> None:
    """One line of reply a message on standard output, until `exit`; everything else on standard error.

    A message that cannot be answered gets a line of error, the later ones their replies, and the exit code is 2.
    Raises UserError, before a model is loaded, where there is no message.
    """
    conversation: Conversation | None = None
    failed = False
    try:
        for number, message in enumerate(filter(None, map(str.strip, messages)), 1):
            if message == "exit":
                break
            conversation = conversation or start()
            try:
                generate(message, **chosen, conversation=conversation, on_text=_write_in_line)
            except UserError as error:
                failed = True
                print(f"error: message {number}: {in_a_line(error)}", file=sys.stderr)
                continue
            write("\n")
            if conversation.forgotten:
                print(f"{conversation.forgotten} oldest turns forgotten", file=sys.stderr)
            print(conversation.stats, file=sys.stderr)
        else:
            if not conversation:
                raise UserError("there is no message to answer: all that came in is empty")
    except BrokenPipeError:  # who read the replies has enough of them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if failed:
        sys.exit(2)


def _write_in_line(piece: str) -> None:
    write(re.sub("[\n\u2028\u2029]", " ", piece))


def chat(this: Chat, top: str, earlier: Messages, private: bool) -> None:
    """The conversation on a terminal, until `exit` or end of file. `top` says which model it is with, `earlier` is what
    it goes on with; where it is private, nothing of it is kept."""
    this.kept = None if private else state_folder() / KEPT
    keys = KeyBindings()  # for many lines prompt_toolkit has them the other way round
    keys.add("enter")(lambda event: event.current_buffer.validate_and_handle())
    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    session: PromptSession = PromptSession(
        history=InMemoryHistory() if private else open_history(),
        completer=WordCompleter(
            [*commands.COMMANDS, *(f"/set {name}" for name in this.defaults)], ignore_case=True, sentence=True
        ),
        complete_while_typing=False,
        multiline=True,  # a pasted text keeps its lines
        key_bindings=keys,
        enable_suspend=True,
        enable_open_in_editor=True,  # Ctrl-X Ctrl-E
    )
    this.loading.add_done_callback(lambda _: _refresh(session, this.loading))
    if termios:  # between prompts, what is typed is not shown; it waits for the next prompt, also after Ctrl-C
        before, unseen = termios.tcgetattr(sys.stdin), termios.tcgetattr(sys.stdin)
        unseen[3] = unseen[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH
        termios.tcsetattr(sys.stdin, termios.TCSANOW, unseen)
    try:
        with handled(lambda number, _: sys.exit(128 + number), *ENDINGS), handled(this.interrupt, signal.SIGINT):
            this.note(f"{top}\nType a message; /help lists commands, exit leaves.")
            this.ask = lambda prompt, text: session.prompt(prompt, default=text)
            this.show_turns(earlier)
            while (line := _ask(session, this)).lower() not in commands.LEAVE:
                _obey(this, line)
                this.keep()
            this.note("Bye.")
    finally:
        leaving = sys.exc_info()[1]
        if termios:
            with suppress(termios.error):  # the terminal's window was closed
                termios.tcsetattr(sys.stdin, termios.TCSANOW, before)
        if not this.loading.done() and (leaving is None or isinstance(leaving, SystemExit)):
            # A thread in the middle of an import cannot be stopped, and nobody waits for it.
            sys.stdout.flush()
            os._exit(int(leaving.code or 0) if leaving else 0)


def _ask(session: PromptSession, this: Chat) -> str:
    """The next line; "exit" at the end of file. Raises what went wrong with the model."""
    while True:
        try:
            return session.prompt(this.prompt).strip()
        except KeyboardInterrupt:
            this.note("type exit to leave")
        except EOFError:
            return "exit"


def _obey(this: Chat, line: str) -> None:
    """Carry out a command, or send a message."""
    try:
        this.patience = 2
        try:
            if line.startswith("/"):
                commands.run(this, line)
            elif line:
                this.say(line)
        except UserError as error:
            if this.loading.done() and this.loading.exception():
                raise
            this.console.print(plain(str(error)), style="red", markup=False)
        this.patience = 0
    except KeyboardInterrupt:
        this.note("stopped")


def _refresh(session: PromptSession, loading: "Future[Conversation]") -> None:
    """From the thread that loads: show used/limit in the prompt; end the prompt if there is no model."""
    app, error = session.app, loading.exception()

    def refresh() -> None:
        if error and app.is_running and not app.is_done:
            app.exit(exception=error)
        app.invalidate()

    if app.loop and app.is_running:
        app.loop.call_soon_threadsafe(refresh)


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
