"""Who said what, and what of it is to be learned: messages with speakers -> turns of the person and the bot.

Roles decide who speaks, not places. Names of columns and of a message's fields are compared in small letters, without
"_" and spaces (`plain_name`).
"""

import re
from collections import Counter
from typing import Any, NamedTuple

from dialogue.data.cleaning import drop_controls
from dialogue.data.corpus import SPLITS, Unlearned, split_by_name
from dialogue.errors import UserError

LONGEST_TURN = 100_000  # characters: far more than any model's context

ONE_TURN = "dialogues of fewer than two turns left out"
SYSTEM = "system messages left out"
TOOL = "messages of tools left out"
UNANSWERED = "last messages without an answer left out"
CROWDED = "dialogues of more than two speakers left out"
TOO_LONG = f"dialogues with a turn of more than {LONGEST_TURN:,} characters left out"

TEXTS = ("text", "content", "value", "utterance", "message", "body", "turn", "sentence", "msg")
SPEAKER = re.compile(r"(role|from|speaker|sender|author|participant|agent|user|name)(id|idx|index|name|role|type)?")
# Fields that say whether something is to be learned, and which answer says that it is; a label counts where it is true
# or false (liked or not), and is a class otherwise.
LEARNED = {"weight": True, "train": True, "learn": True, "loss": True, "label": True, "masked": False, "mask": False}

PARTS = {
    "user": {"user", "human", "person", "customer", "client", "prompter", "visitor", "caller", "usr"},
    "assistant": {"assistant", "gpt", "bot", "chatbot", "chatgpt", "model", "ai", "agent", "operator"},
    "system": {"system", "developer"},
    "tool": {"tool", "function", "observation", "function_call", "tool_call", "function_response", "ipython"},
}
ROLES = {role: part for part, roles in PARTS.items() for role in roles}


class Said(NamedTuple):
    """One message; `who` is None where nothing but its place says who speaks."""

    who: str | None
    text: str
    learn: bool = True


class Conversation(NamedTuple):
    """Messages as they are in the data, and the split that the data names, if it does."""

    messages: list[Said]
    split: str | None


def plain_name(name: str) -> str:
    return re.sub(r"[\W_]+", "", str(name).lower())


def is_learned(record: dict[str, Any], where: str) -> bool:
    """Obeys `"weight": 0`, `"train": false`, `"masked": true` and their like. Raises UserError for other values."""
    answers = {"1": True, "true": True, "1.0": True, "0": False, "false": False, "0.0": False}
    marks = {name: value for name, value in record.items() if plain_name(name) in LEARNED and value not in (None, "")}
    marks = {name: value for name, value in marks.items() if isinstance(value, bool) or plain_name(name) != "label"}
    for name, value in marks.items():
        if str(value).strip().casefold() not in answers:
            raise UserError(f"{where}: {name} is {str(value)[:40]!r}; only 0 and 1, or true and false, can be obeyed")
    return all(answers[str(value).strip().casefold()] is LEARNED[plain_name(name)] for name, value in marks.items())


def own_split(value: Any, where: str) -> str | None:
    found = split_by_name(str(value or ""))
    if value and not found:
        raise UserError(f"{where}: the split {str(value)[:40]!r} is unknown; known are {', '.join(SPLITS)}")
    return found


def find_parts(conversations: list[Conversation], notes: list[str]) -> dict[str, str]:
    """Each speaker -> "user", "assistant", "system" or "tool", as far as that is the same in all conversations."""
    names = {message.who for one in conversations for message in one.messages if message.who is not None}
    parts = {name: ROLES[name.casefold()] for name in names if name.casefold() in ROLES}
    if set(parts.values()) == {"user", "system"}:
        parts = {name: "assistant" if part == "system" else part for name, part in parts.items()}
        notes.append("no assistant speaks, so the turns of system are taken for the bot's")
    unknown = names - set(parts)
    if len(unknown) == len(names) == 2:
        openers = Counter(one.messages[0].who for one in conversations if one.messages)
        person, bot = sorted(names, key=lambda name: (-openers[name], name))
        parts = {person: "user", bot: "assistant"}
        notes.append(f"{person[:40]} opens most dialogues and is the person, {bot[:40]} the bot")
    elif unknown:
        notes.append("whoever opens a dialogue is the person, and the other one the bot")
    return parts


def parts_beside(bot: str | None, conversations: list[Conversation], where: str, notes: list[str]) -> dict[str, str]:
    """The part of each speaker where `bot` is the bot. Raises UserError, with the names there are, if nobody is."""
    counts = Counter(message.who for one in conversations for message in one.messages if message.who is not None)
    if bot not in counts:
        problem = f"nobody is called {bot!r}" if bot else "nothing says whose turns are the bot's"
        listed = [f"{' '.join(name.split())[:40]} ({count:,})" for name, count in counts.most_common(20)]
        raise UserError(f"{where}: {problem}; give --bot NAME, of: {', '.join(listed) or 'no names, so leave it out'}")
    notes.append(f"{bot} is the bot, and whoever spoke before the person")
    apart = {name: ROLES.get(name.casefold(), "user") for name in counts}
    return {name: "assistant" if name == bot else apart[name].replace("assistant", "user") for name in counts}


def alternate(messages: list[Said], parts: dict[str, str], left_out: Counter[str]) -> list[str]:
    """Messages -> turns of the person and the bot in turn: neighbours of one speaker are joined by a newline.

    A system message at the start is a persona: it opens the person's first turn, which is then not learned
    (`dialogue/prompt.py`). Empty where the dialogue is left out. A last message of a known user has no answer and is
    dropped; between people the last turn is kept.
    """
    turns: list[str] = []
    local: dict[str, str] = {}
    persona = bool(messages) and parts.get(messages[0].who or "") == "system"
    for place, (who, text, learn) in enumerate(messages, -persona):
        part = ("user", "assistant")[place % 2]
        if who is not None:
            part = parts.get(who) or local.setdefault(who, "assistant" if local else "user")
        text = drop_controls(text).strip()
        if part == "system" and place < 0:
            part, learn = "user", False
        if part in ("system", "tool"):
            left_out[SYSTEM if part == "system" else TOOL] += 1
        elif text:
            if not turns and part == "assistant":
                turns.append("")
            if len(turns) % 2 == (part == "assistant"):
                turns.append(text if learn else Unlearned(text))
            else:
                kind = str if learn and not isinstance(turns[-1], Unlearned) else Unlearned
                turns[-1] = kind(f"{turns[-1]}\n{text}")
    unanswered = len(turns) % 2 and any(str(message.who).casefold() in ROLES for message in messages)
    left_out[UNANSWERED] += bool(unanswered)
    turns = turns[: len(turns) - bool(unanswered)]
    too_long = any(len(turn) > LONGEST_TURN for turn in turns)
    faults = {CROWDED: len(local) > 2, TOO_LONG: too_long, ONE_TURN: sum(map(bool, turns)) < 2}
    reasons = [reason for reason, applies in faults.items() if applies]
    left_out.update(reasons[:1])
    return [] if reasons else turns
