"""A conversation in the shape of chat messages, as `/save` writes it and other programs read it."""

from typing import Any

from dialogue.errors import UserError

SHAPE = "a list of messages whose roles alternate, user first and assistant last, each with a content"

Messages = list[dict[str, str]]
ROLES = ("user", "assistant")  # of turns, by their number


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
