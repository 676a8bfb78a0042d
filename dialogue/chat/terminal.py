"""The conversation as a person sees it, or a script: a prompt, words as they are made, one line of figures."""

import os
import re
import select
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING, Any

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter, WordCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory
from prompt_toolkit.key_binding import KeyBindings, KeyPressEvent

from dialogue.chat import commands
from dialogue.chat.history import KEPT, History, open_history, state_folder
from dialogue.chat.messages import Messages
from dialogue.chat.session import Chat, figures, write
from dialogue.errors import ENDINGS, UserError, handled, in_a_line
from dialogue.plaintext import plain

try:
    import termios
except ImportError:  # Windows
    termios = None  # type: ignore[assignment]

# torch and transformers take seconds to import; that happens while the person types.
if TYPE_CHECKING:
    from dialogue.chat.conversation import Conversation

QUOTES = '"""'  # a message that starts with them ends with them, lines later


def answer(
    messages: Iterable[str], start: Callable[[], "Conversation"], generate: Callable[..., str], chosen: dict, stats: str
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
            if conversation.stats and stats != "off":
                print(figures(conversation.stats, stats), file=sys.stderr)
        else:
            if not conversation:
                raise UserError("there is no message to answer: all that came in is empty")
    except BrokenPipeError:  # who read the replies has enough of them
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    if failed:
        sys.exit(2)


def _write_in_line(piece: str) -> None:
    write(re.sub("[\n\u2028\u2029]", " ", piece))


def chat(
    start: "Callable[[], Conversation]",
    generate: Callable[..., str],
    defaults: dict,
    chosen: dict,
    stats: str,
    top: str,
    earlier: Messages,
    private: bool,
) -> None:
    """The conversation on a terminal, until `exit` or end of file. `top` says which model it is with, `earlier` is what
    it goes on with; where it is private, nothing of it is kept."""
    loading = in_background(start)
    this, history = Chat(loading, generate, defaults, chosen, stats), InMemoryHistory() if private else open_history()
    this.kept = None if private else state_folder() / KEPT
    session: PromptSession = PromptSession(
        history=history,
        completer=_Completer([*commands.COMMANDS, *(f"/set {name}" for name in defaults)]),
        complete_while_typing=False,
        multiline=True,  # a pasted text keeps its lines
        key_bindings=_keys(),
        enable_suspend=True,
        enable_open_in_editor=True,
    )
    loading.add_done_callback(lambda _: _refresh(session, loading))
    try:
        with handled(lambda number, _: sys.exit(128 + number), *ENDINGS), _unseen():
            this.note(f"{top}\nType a message; /help lists commands, exit leaves.")
            this.ask = lambda prompt, text: session.prompt(prompt, default=text)
            this.show_turns(earlier)
            draft = ""
            while (line := _ask(session, this, draft)).lower() not in commands.LEAVE:
                if isinstance(history, History) and history.problem:
                    this.note(f"messages are kept in memory only: {history.problem}")
                    history.problem = ""
                draft = "" if _obey(this, line) else line
                this.keep()
            this.note("Bye.")
    finally:
        leaving = sys.exc_info()[1]
        if not loading.done() and (leaving is None or isinstance(leaving, SystemExit)):
            # A thread in the middle of an import cannot be stopped, and nobody waits for it.
            sys.stdout.flush()
            os._exit(int(leaving.code or 0) if leaving else 0)


def _ask(session: PromptSession, this: Chat, draft: str) -> str:
    """The next line, which begins as `draft`; "exit" at the end of file. Raises what went wrong with the model."""
    while True:
        try:
            return session.prompt(this.prompt, default=draft).strip()
        except KeyboardInterrupt:
            draft = ""
            if not session.default_buffer.text:
                this.note("type exit to leave")
        except EOFError:
            return "exit"


def _obey(this: Chat, line: str) -> bool:
    """Carry out a command, or send a message. False where Ctrl-C came before the model was there to get it."""
    try:
        if line.startswith(QUOTES):
            this.say(line.removeprefix(QUOTES).removesuffix(QUOTES).strip())
        elif command := commands.find(line, this.settings()):
            commands.run(this, command)
        elif line:
            this.say(line.removeprefix("/"))
    except UserError as error:
        if this.loading.done() and this.loading.exception():
            raise
        this.console.print(plain(str(error)), style="red", markup=False)
    except KeyboardInterrupt:
        this.note("stopped")
        return this.loading.done()
    return True


@contextmanager
def _unseen() -> Iterator[None]:
    """Between prompts, what is typed is not shown; it waits for the next prompt, also after Ctrl-C."""
    if not termios:
        yield
        return
    before = termios.tcgetattr(sys.stdin)
    unseen = termios.tcgetattr(sys.stdin)
    unseen[3] = unseen[3] & ~(termios.ECHO | termios.ICANON) | termios.NOFLSH
    termios.tcsetattr(sys.stdin, termios.TCSANOW, unseen)
    try:
        yield
    finally:
        with suppress(termios.error):  # the terminal's window was closed
            termios.tcsetattr(sys.stdin, termios.TCSANOW, before)


def _refresh(session: PromptSession, loading: "Future[Conversation]") -> None:
    """From the thread that loads: show used/limit in the prompt; end the prompt if there is no model."""
    app, error = session.app, loading.exception()

    def refresh() -> None:
        if error and app.is_running and not app.is_done:
            app.exit(exception=error)
        app.invalidate()

    if app.loop and app.is_running:
        app.loop.call_soon_threadsafe(refresh)


class _Completer(Completer):
    """Commands and settings, and file names after /save and /load."""

    def __init__(self, words: list[str]) -> None:
        self.words, self.paths = WordCompleter(words, ignore_case=True, sentence=True), PathCompleter(expanduser=True)

    def get_completions(self, document: Document, event: CompleteEvent) -> Iterable[Completion]:
        command, space, rest = document.text_before_cursor.partition(" ")
        if space and command.lower() in ("/save", "/load"):
            return self.paths.get_completions(Document(rest), event)
        return self.words.get_completions(document, event)


def _keys() -> KeyBindings:
    """Enter sends, Alt-Enter makes a new line: prompt_toolkit has it the other way round for many lines."""
    keys = KeyBindings()

    @keys.add("enter")
    def enter(event: KeyPressEvent) -> None:
        buffer = event.current_buffer
        quoted = buffer.text.startswith(QUOTES) and (len(buffer.text) < 6 or not buffer.text.rstrip().endswith(QUOTES))
        if quoted or _more_follows(event):
            buffer.insert_text("\n")
        else:
            buffer.validate_and_handle()

    keys.add("escape", "enter")(lambda event: event.current_buffer.insert_text("\n"))
    return keys


def _more_follows(event: KeyPressEvent) -> bool:
    """Whether text came in together with this Enter: nobody types so fast, it is pasted."""
    coming = (press.data for press in event.key_processor.input_queue)
    if any(len(data) == 1 and (data.isprintable() or data in "\r\n\t") for data in coming):
        return True
    return bool(termios and select.select([event.app.input.fileno()], [], [], 0)[0])


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
