"""What the chat keeps between two starts, in files that their owner alone can read: what was typed, and the last
conversation."""

import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from prompt_toolkit.history import FileHistory

from dialogue.chat.commands import read_messages
from dialogue.chat.messages import Messages, check_messages
from dialogue.errors import UserError
from dialogue.plaintext import plain

KEPT = "conversation.json"  # the last conversation, beside the history


class History(FileHistory):
    """Earlier messages, in a file; where it cannot be read or written, those of this chat, in memory."""

    def load_history_strings(self) -> Iterable[str]:
        with suppress(OSError):
            return list(super().load_history_strings())
        return []

    def store_string(self, string: str) -> None:
        with suppress(OSError):
            super().store_string(string)


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
    """The messages of earlier conversations, from a file in the user's state folder that its owner alone can read."""
    folder = state_folder()
    with suppress(OSError):  # the conversation cannot be kept there either, and that is said
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        os.close(os.open(folder / "history", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600))
        os.chmod(folder / "history", 0o600)
    return History(folder / "history")
