"""What the chat keeps between two starts, in files that their owner alone can read: what was typed, and the last
conversation."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from prompt_toolkit.history import FileHistory

from dialogue.chat.commands import read_messages
from dialogue.chat.messages import Messages, check_messages
from dialogue.errors import UserError
from dialogue.plaintext import plain

KEPT = "conversation.json"  # the last conversation, beside the history


class History(FileHistory):
    """Earlier messages, in a file that its owner alone can read; in memory where that fails."""

    problem: str | None = None  # why they are not in the file; "" when it was said

    def load_history_strings(self) -> Iterable[str]:
        with self._or_memory():
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        if self.problem is None:
            with self._or_memory():
                super().store_string(string)

    @contextmanager
    def _or_memory(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self.problem = f"{self.filename!s}: {error.strerror}"


def state_folder() -> Path:
    """Where the user's programs keep what they were doing (XDG Base Directory Specification, 0.8)."""
    return Path(os.environ.get("XDG_STATE_HOME") or os.path.expanduser("~/.local/state")) / "gpt2-dialogue"


def last_conversation() -> Messages:
    """What was kept of the last conversation. Raises UserError where nothing was."""
    kept = state_folder() / KEPT
    if not kept.is_file():
        raise UserError(f"there is no earlier conversation to go on with ({plain(str(kept))} is not there)")
    messages = read_messages(kept)
    check_messages(messages)
    return messages


def open_history() -> History:
    """The messages of earlier conversations, from a file in the user's state folder."""
    history = History("history")
    with history._or_memory():
        folder = state_folder()
        history.filename = folder / "history"
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(history.filename, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        os.chmod(history.filename, 0o600)
    return history
