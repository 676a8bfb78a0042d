"""What the chat keeps: conversations, as chat messages that other programs read too, and what was typed."""

import json
import os
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any

from prompt_toolkit.history import FileHistory

from dialogue.errors import UserError
from dialogue.plaintext import plain

SHAPE = "a list of messages whose roles alternate, user first and assistant last, each with a content"

Messages = list[dict[str, str]]
ROLES = ("user", "assistant")  # of turns, by their number
KEPT = "conversation.json"  # the last conversation, beside the history


def check_messages(messages: Any) -> tuple[str, Messages]:
    """Messages -> the persona, which a system message at the start holds, and the turns.

    Raises UserError for anything but a conversation.
    """
    persona = ""
    first = messages[0] if isinstance(messages, list) and messages else None
    if isinstance(first, dict) and first.get("role") == "system" and isinstance(first.get("content"), str):
        persona, messages = first["content"], messages[1:]
    if not isinstance(messages, list) or len(messages) % 2:
        raise UserError(f"not a conversation: needed is {SHAPE}")
    for index, message in enumerate(messages):
        named = isinstance(message, dict) and message.get("role") == ROLES[index % 2]
        if not named or not isinstance(message.get("content"), str):
            raise UserError(f"not a conversation (message {index + 1}): needed is {SHAPE}")
    return persona, messages


def read_messages(path: Path) -> Any:
    """The JSON in a file. Raises UserError where there is none."""
    if not os.path.isfile(path):  # reading /dev/zero never ends
        raise UserError(f"{plain(str(path))} is no file")
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"{plain(str(path))} could not be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"{plain(str(path))} is not a saved conversation: {plain(str(error))}") from error


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
