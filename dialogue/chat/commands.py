"""What a person can type besides a message. A command that is wrong raises UserError and changes nothing."""

import os
import re
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dialogue import lessons
from dialogue.chat.history import check_messages, read_messages
from dialogue.errors import UserError
from dialogue.json_files import read_json, write_private
from dialogue.plaintext import plain
from dialogue.storage import RUN_FILE

if TYPE_CHECKING:
    from dialogue.chat.rerank import Candidate
    from dialogue.chat.session import Chat

COMMANDS: dict[str, tuple[str, Callable[["Chat", str], None]]] = {}  # name -> (how to type it, what it does)
LEAVE = ("exit", "quit", "bye", "/exit", "/quit", "/bye", "/q")
WHOLE_NUMBERS = ("max_t", "top_k", "best_of")  # the other settings are any numbers
# Settings that a run fits, and their names in generation_config.json.
FITTED = {"max_t": "max_new_tokens", "temp": "temperature", "top_k": "top_k", "top_p": "top_p",
          "min_p": "min_p", "repetition_penalty": "repetition_penalty"}  # fmt: skip


def fitted(folder: str | Path) -> dict[str, Any]:
    """Settings from the generation_config.json of a model that was trained here, as far as it has them."""
    if not all(os.path.isfile(Path(folder, file)) for file in (RUN_FILE, "generation_config.json")):
        return {}
    values = read_json(Path(folder, "generation_config.json"), {})
    values |= {"temperature": 0.0} if values.get("do_sample") is False else {}
    return {name: values[theirs] for name, theirs in FITTED.items() if values.get(theirs) is not None}


def command(usage: str) -> Callable:
    """Enter a function, whose docstring `/help` shows, under the first word of `usage`."""

    def enter(function: Callable[["Chat", str], None]) -> Callable[["Chat", str], None]:
        COMMANDS[usage.split()[0]] = (usage, function)
        return function

    return enter


def run(chat: "Chat", line: str) -> None:
    """Carry out a line that starts with "/"."""
    name, *rest = line.split(maxsplit=1)
    if name.lower() not in COMMANDS:
        raise UserError(f"there is no command {plain(name)}: /help lists them")
    usage, function = COMMANDS[name.lower()]
    if bool(rest) != (" " in usage) and (rest or not usage.endswith("]")):
        raise UserError(f"it is typed {usage}")
    function(chat, rest[0].strip() if rest else "")


@command("/help")
def show_help(chat: "Chat", rest: str) -> None:
    """this list"""
    lines = [[usage, str(function.__doc__)] for usage, function in COMMANDS.values()]
    lines += [["exit", "leave (so does Ctrl-D); Ctrl-C stops a reply"], ["Alt-Enter", "a new line in a message"]]
    lines += [["Ctrl-X Ctrl-E", "write the message in $EDITOR"]]
    chat.rows(lines)


@command("/reset")
def reset(chat: "Chat", rest: str) -> None:
    """forget the conversation"""
    chat.conversation.turns = []
    chat.note("a new conversation")


@command("/retry")
def retry(chat: "Chat", rest: str) -> None:
    """another answer to the last message"""
    before = chat.conversation.turns
    message = chat.conversation.undo()
    if message is None:
        raise UserError("there is no message to answer again")
    remaining = chat.conversation.turns
    try:
        chat.say(message)
    finally:
        if chat.conversation.turns is remaining:  # no answer came
            chat.conversation.turns = before


@command("/more")
def more(chat: "Chat", rest: str) -> None:
    """go on with a reply that was cut"""
    from dialogue.chat.conversation import check

    settings, talk = chat.settings(), chat.conversation
    sampling = check(**settings)

    def go_on(on_text: Callable[[str], None]) -> None:
        with closing(talk.go_on(settings["max_t"], sampling)) as pieces:
            for piece in pieces:
                on_text(piece)

    chat.show(go_on)


@command("/edit")
def edit(chat: "Chat", rest: str) -> None:
    """write what the last reply should have been; --teach learns it"""
    talk = chat.conversation
    if not talk.turns:
        raise UserError("there is no reply yet")
    text = chat.ask("bot> ", plain(talk.text(len(talk.turns) - 1))).strip()
    if not text:
        raise UserError("nothing is changed: an empty reply cannot be learned")
    talk.replace(text)
    good(chat, rest)


@command("/good")
def good(chat: "Chat", rest: str) -> None:
    """keep the last message and its reply; --teach learns them"""
    if not chat.conversation.turns:
        raise UserError("there is no reply yet")
    lessons.keep(chat.conversation.messages())
    chat.note(f"kept in {lessons.LESSONS}: `python Fine_tuningmodel.py --teach` learns what is there")


@command("/undo")
def undo(chat: "Chat", rest: str) -> None:
    """take the last message and its answer back"""
    message = chat.conversation.undo()
    if message is None:
        raise UserError("there is nothing to take back")
    chat.note(f"taken back: {plain(message)}")


@command("/set [NAME VALUE]")
def set_value(chat: "Chat", rest: str) -> None:
    """change a setting, such as temp; alone: show all of them"""
    from dialogue.chat.conversation import check  # imports torch; the prompt does not wait for that

    settings = chat.settings()
    if not rest:
        chat.rows([[name, str(value), "" if name in chat.chosen else "default"] for name, value in settings.items()])
        return
    name, _, text = rest.partition(" ")
    if name not in settings:
        raise UserError(f"there is no setting {plain(name)}: choose {', '.join(settings)}")
    kind: Any = int if name in WHOLE_NUMBERS else float
    try:
        value = kind(text)
    except ValueError as error:
        raise UserError(f"{name} must be a {'whole ' if kind is int else ''}number, not {plain(text)!r}") from error
    check(**{**settings, name: value})
    chat.chosen[name] = value
    chat.note(f"{name} = {value}")


@command("/context")
def context(chat: "Chat", rest: str) -> None:
    """exactly what the model reads"""
    # What a terminal would obey is shown as an escape: "\x1b".
    text = "".join(c if plain(c) else repr(c)[1:-1] for c in chat.conversation.context())
    chat.console.print(re.sub("(<END>)(?=<USER>|<BOT>)", r"\1\n", text) or "(nothing yet)", markup=False)


@command("/why")
def why(chat: "Chat", rest: str) -> None:
    """how each token of the last reply was drawn, and what the settings had removed"""
    from dialogue.chat.conversation import check
    from dialogue.prompt import decode_text

    explained = chat.conversation.why(check(**chat.settings()))
    if not explained:
        raise UserError("there is no reply yet")
    cuts = [name for name in explained[0].removed if any(each.removed[name] for each in explained)]
    lines: list[list[str]] = []
    text = ""
    for number, each in enumerate(explained, 1):
        # All of it is decoded each time: a character stands where its last token is.
        before, ids = len(text), [one.token for one in explained[:number]]
        text = decode_text(chat.conversation.tokenizer, ids).rstrip("\ufffd")
        token = repr(text[before:])[1:-1] or "(part of a character)"
        shares = (f"{share:.1%}" for share in (each.probability, each.tempered, each.drawn))
        lines.append([token, str(each.rank), *shares, *(str(each.removed[name] or "") for name in cuts)])
    chat.rows(lines, "token", "rank", "model", "temp", "drawn", *(f"-{name}" for name in cuts))
    chat.note(
        "probability by the model alone, after repetition penalty and temperature, and as drawn; "
        "then how many tokens each setting had removed"
    )
    said, ranked = chat.conversation.turns[-1][1:-1], chat.conversation.candidates
    for place, candidate in enumerate(ranked, 1):
        if candidate.tokens == said:
            chat.note(f"candidate {place} of {len(ranked)}: {standing(candidate)}; /alt lists them")
            break


@command("/alt [N]")
def alternatives(chat: "Chat", rest: str) -> None:
    """the candidates of the last reply, the best first; with N, take that one instead"""
    talk = chat.conversation
    if not talk.candidates:
        raise UserError("the last reply was drawn alone: /set best_of 8 makes the next one the best of 8 candidates")
    if rest:
        text = talk.take(int(rest) if rest.isdecimal() and len(rest) < 4 else 0)
        chat.console.print("bot> ", end="", style="bold")
        chat.console.print(text, markup=False)
        return
    for place, each in enumerate(talk.candidates, 1):
        chat.console.print(f"{place}  {plain(each.text)}", markup=False)
        chat.note(f"   {standing(each)}")


def standing(candidate: "Candidate") -> str:
    """Why a candidate stands where it does."""
    how = f", drawn at temperature {candidate.temp:.2g}"
    if candidate.fault:
        return candidate.fault + how
    given, alone = candidate.given, candidate.alone
    return f"score {candidate.score:.2f}: log p {given:.1f} here, {alone:.1f} after a message that says nothing{how}"


@command("/save FILE")
def save(chat: "Chat", rest: str) -> None:
    """write the conversation as JSON chat messages"""
    path = Path(os.path.expanduser(rest))
    if os.path.exists(path):  # Path.exists raises for a name that is too long
        try:
            check_messages(read_messages(path))
        except UserError as error:
            raise UserError(f"{error}; take another name: /save replaces saved conversations only") from error
    try:
        write_private(path, chat.conversation.messages())
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in the name
        raise UserError(f"{plain(rest)} could not be written: {getattr(error, 'strerror', error)}") from error
    chat.note(f"saved to {plain(rest)}")


@command("/load FILE")
def load(chat: "Chat", rest: str) -> None:
    """continue a saved conversation"""
    messages = read_messages(Path(os.path.expanduser(rest)))
    chat.conversation.restore(messages)
    chat.note(f"{len(chat.conversation.turns)} turns loaded")
    chat.announce_forgotten()
    chat.show_turns(chat.conversation.messages())
