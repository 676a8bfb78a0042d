"""Records of any known shape -> dialogues: whole dialogues, pairs of prompt and response, or rows with a turn each."""

import ast
import io
import itertools
import json
import math
import re
import tokenize
from collections import Counter
from contextlib import suppress
from datetime import datetime
from typing import Any

from dialogue.data import exports, speakers
from dialogue.data.readers import EOU, SHAPE, NoDialogues, Record
from dialogue.data.speakers import LEARNED, ROLES, SPEAKER, TEXTS, Conversation, Said, is_learned, own_split, plain_name
from dialogue.errors import UserError

OTHER_CONTENT = "dialogues with images or other content than text left out"
NOT_LEARNED = "dialogues marked as not to be learned left out"

LISTS = ("messages", "conversations", "conversation", "dialog", "dialogue", "utterances", "turns")
PROMPTS = ("instruction", "prompt", "question", "query", "input", "user", "human")
RESPONSES = ("response", "output", "completion", "answer", "assistant", "bot")
# Columns of a table with a turn in each row.
BOT_FLAGS = {"isagent": 1, "isbot": 1, "isassistant": 1, "isuser": 0, "iscustomer": 0, "inbound": 0}  # of a true one
DIALOGUE = re.compile(r"(dialog|dialogue|conv|conversation|session|thread|chat|call|episode|ticket|case)[a-z]*")
ORDER = re.compile(r"(turn|utterance|utt|line)(id|number|num|no)?|(turn|utterance|utt|message)?(idx|index|order)")
TIME = re.compile(r"timestamp|time|date|datetime|createdat|sentat")


def to_dialogues(
    records: list[Record], name: str, left_out: Counter[str], notes: list[str], bot: str | None = None,
    silence: float = exports.SILENCE,
) -> list[tuple[list[str], str | None]]:  # fmt: skip
    """All records of one file -> dialogues, each with the split that its record names. Raises UserError. `left_out`
    counts what is dropped, by reason; `notes` is told how the file was read. `bot` is the name of the one whose turns
    are the bot's; `silence`, in minutes, parts the conversations of a chat."""
    first = records[0].value if records else None
    chats = exports.find_chats([record.value for record in records], name, notes)
    if chats:
        conversations = exports.to_conversations(chats, silence, left_out)
    elif isinstance(first, dict) and not _find_list(first) and not _find_pair(first):
        conversations = _from_rows(records, name, notes)
    else:
        conversations = [found for found in (_from_record(record, left_out) for record in records) if found]
    named = speakers.parts_beside(bot, conversations, name, notes) if bot or chats else {}
    parts = named or speakers.find_parts(conversations, notes)
    dialogues = [(speakers.alternate(one.messages, parts, left_out), one.split) for one in conversations]
    return [(turns, split) for turns, split in dialogues if turns]


def wanted_columns(names: list[str]) -> list[str]:
    """Those of a table's columns that may matter here."""
    known = {*LISTS, *PROMPTS, *RESPONSES, *TEXTS, *BOT_FLAGS, *LEARNED, "split", "history", "context"}
    patterns = (SPEAKER, ORDER, TIME, DIALOGUE, re.compile(".*id"))
    return [name for name in names if plain_name(name) in known or any(p.fullmatch(plain_name(name)) for p in patterns)]


def _find_list(record: dict[str, Any]) -> str | None:
    return next((name for name in record if plain_name(name) in LISTS and record[name] is not None), None)


def _find_pair(record: dict[str, Any]) -> tuple[str, str] | None:
    names = {plain_name(name): name for name, value in record.items() if isinstance(value, str)}
    pairs = itertools.product(PROMPTS, RESPONSES)
    return next(((names[one], names[other]) for one, other in pairs if one in names and other in names), None)


def _from_record(record: Record, left_out: Counter[str]) -> Conversation | None:
    """A record that holds a whole dialogue -> its messages. None, counted, where it is not to be learned."""
    where, value = record
    split, persona = None, list[Said]()
    if isinstance(value, dict):
        split = own_split(value.get("split"), where)
        if isinstance(value.get("system"), str):
            persona.append(Said("system", value["system"]))
        if not is_learned(value, where):
            left_out[NOT_LEARNED] += 1
            return None
        column = _find_list(value)
        value = value[column] if column else _from_pair(value, where)
    if isinstance(value, str):
        value = _parse_cell(value, where)
    if isinstance(value, dict) and all(isinstance(values, list) for values in value.values()):
        lists = zip(*value.values(), strict=False)  # side by side, as Parquet may have them
        value = [dict(zip(value, item, strict=True)) for item in lists]
    if isinstance(value, list) and value and all(isinstance(turn, list) and len(turn) == 2 for turn in value):
        value = list(itertools.chain(*value))  # [["Hi", "Hello"], ...]
    if isinstance(value, list) and all(isinstance(turn, str | None) for turn in value):
        return Conversation(persona + [Said(None, turn or "") for turn in value], split)
    if not isinstance(value, list) or not all(isinstance(turn, dict) for turn in value):
        raise UserError(f"{where}: not a dialogue; needed is {SHAPE}")
    messages = [_message(message, where) for message in value]
    if None in messages:
        left_out[OTHER_CONTENT] += 1
    return None if None in messages else Conversation(persona + [each for each in messages if each], split)


def _from_pair(record: dict[str, Any], where: str) -> list[dict[str, str]]:
    """A prompt and its response, after the turns of `history` where the record has one."""
    pair = _find_pair(record)
    history = record.get("history") or []
    if not pair or not isinstance(history, list) or not all(isinstance(one, list) and len(one) == 2 for one in history):
        raise UserError(f"{where}: not a dialogue; needed is {SHAPE}")
    asked = [record[pair[0]], *(record.get(name) for name in ("input", "context") if name not in pair)]
    turns = [*itertools.chain(*history), "\n".join(text for text in asked if isinstance(text, str) and text.strip())]
    roles = itertools.cycle(("user", "assistant"))
    return [{"role": role, "content": text} for role, text in zip(roles, [*turns, record[pair[1]]], strict=False)]


def _parse_cell(cell: str, where: str) -> Any:
    """A cell of a table: turns with `__eou__` after each, a JSON list, or a Python list."""
    if EOU in cell:
        return cell.split(EOU)
    try:
        return json.loads(cell)
    except ValueError:
        pass
    try:
        found = ast.literal_eval(cell.strip())
        tokens = [token.type for token in tokenize.generate_tokens(io.StringIO(cell.strip()).readline)]
    except (ValueError, SyntaxError, MemoryError, tokenize.TokenError) as error:
        raise UserError(f"{where}: neither a JSON list, nor a Python list, nor turns with {EOU} between") from error
    strings = [kind == tokenize.STRING for kind in tokens if kind not in (tokenize.NL, tokenize.NEWLINE)]
    if any(map(all, itertools.pairwise(strings))):  # Python would take two strings without a comma for one
        raise UserError(f"{where}: a list as NumPy prints it, without commas; save it as JSON, or each turn as a row")
    return found


def _message(message: dict[str, Any], where: str) -> Said | None:
    """{"role": ..., "content": ...} under any of the known names; None where it holds other things than text."""
    fields = {plain_name(name): value for name, value in message.items()}
    names = sorted(fields, key=lambda name: name != "role")  # a name beside a role says less
    speaker = next((name for name in names if SPEAKER.fullmatch(name) and fields[name] is not None), "")
    field = next((name for name in TEXTS if name in fields), None)
    who, text = fields.get(speaker), fields.get(field or "")
    if isinstance(who, dict):  # {"author": {"role": "user"}}
        who = who.get("role") or who.get("name")
    if isinstance(text, list) and all(isinstance(part, dict) for part in text):
        if any(part.get("type", "text") != "text" for part in text):
            return None
        text = "\n".join(str(part.get("text", "")) for part in text)
    if not isinstance(who, str | int) or not field or not isinstance(text, str | None):
        raise UserError(f"{where}: each message needs a role (user, assistant or system) and a text as content")
    if speaker == "role" and str(who).casefold() not in ROLES:
        raise UserError(f"{where}: the role {str(who)[:40]!r} is unknown; known are user, assistant, system and tool")
    return Said(str(who), text or "", is_learned(message, where))


def _from_rows(records: list[Record], name: str, notes: list[str]) -> list[Conversation]:
    """Rows -> dialogues: grouped by the column that tells dialogues apart, in the order of a turn index or time."""
    if not all(isinstance(record.value, dict) for record in records):
        raise UserError(f"{name}: not all records are of one shape; needed is {SHAPE}")
    columns = list(records[0].value)
    values = {column: [record.value.get(column) for record in records] for column in columns}
    texts = [c for c in columns if plain_name(c) in TEXTS and _numbers(values[c]) is None]
    dialogue = _find_dialogue_column(values, name) if texts else None
    if not dialogue:
        raise (UserError if len(records) > 1 else NoDialogues)(
            f"{records[0].where}: not a dialogue; columns {', '.join(columns)[:200]}; needed is {SHAPE}, or each turn "
            "in a row with columns dialogue_id and text (and speaker and turn_index, where there are any)"
        )
    text = max(texts, key=lambda column: sum(len(str(value)) for value in values[column]))
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(str(record.value.get(dialogue)), []).append(record)
    others = sorted(set(columns) - {dialogue, text}, key=lambda c: (plain_name(c) != "role", columns.index(c)))
    speaker = next((column for column in others if _tells_speakers(column, groups)), None)
    order = next((c for p in (ORDER, TIME) for c in others if p.fullmatch(plain_name(c)) and _numbers(values[c])), None)
    conversations = []
    for rows in groups.values():
        keys = _numbers([row.value[order] for row in rows]) if order else None
        if keys:
            rows = [row for _, row in sorted(zip(keys, rows, strict=True), key=lambda pair: pair[0])]
        said = [Said(_who(row, speaker), str(row.get(text) or ""), is_learned(row, where)) for where, row in rows]
        conversations.append(Conversation(said, own_split(rows[0].value.get("split"), rows[0].where)))
    speaks = f"{speaker} says who speaks" if speaker else "the speakers take turns, the person first"
    in_order = f"{order} gives their order" if order else "they stand in order"
    notes.append(f"{dialogue} tells the dialogues apart, {text} has the turns, {in_order}, {speaks}")
    return conversations


def _numbers(values: list[Any]) -> list[float] | None:
    """Numbers or ISO times, as numbers; None where one is neither."""

    def time(value: Any) -> float:
        return (value if isinstance(value, datetime) else datetime.fromisoformat(value)).timestamp()

    for kind in (float, time):
        with suppress(TypeError, ValueError, OverflowError, OSError):
            if all(map(math.isfinite, numbers := [kind(value) for value in values])):
                return numbers
    return None


def _find_dialogue_column(values: dict[str, list[Any]], name: str) -> str | None:
    """The column that groups the rows. Raises UserError where two columns do so in different ways."""
    named = [column for column in values if DIALOGUE.fullmatch(plain_name(column)) and plain_name(column) not in TEXTS]
    others = [c for c in values if plain_name(c).endswith("id") and not SPEAKER.fullmatch(plain_name(c))]
    for columns in ([column for column in named if plain_name(column) == "dialogueid"], named, others):
        groupings: dict[tuple[int, ...], str] = {}
        for column in columns:
            numbers: dict[str, int] = {}
            grouping = tuple(numbers.setdefault(str(value), len(numbers)) for value in values[column])
            if len(numbers) <= 0.75 * len(grouping):  # else most dialogues would have one turn
                groupings.setdefault(grouping, column)
        if len(groupings) > 1:  # a column that is the same in all rows tells nothing apart
            groupings = {grouping: column for grouping, column in groupings.items() if any(grouping)}
        if len(groupings) > 1:
            both = " and ".join(list(groupings.values())[:2])
            raise UserError(f"{name}: {both} could both tell the dialogues apart: rename the right one to dialogue_id")
        if groupings:
            return next(iter(groupings.values()))
    return None


def _tells_speakers(column: str, groups: dict[str, list[Record]]) -> bool:
    """Whether the column has such a name, and more than one value in most dialogues."""
    if plain_name(column) not in BOT_FLAGS and not SPEAKER.fullmatch(plain_name(column)):
        return False
    several = sum(len({str(row.value.get(column)) for row in rows}) > 1 for rows in groups.values())
    return several > 0.5 * sum(len(rows) > 1 for rows in groups.values())


def _who(row: dict[str, Any], speaker: str | None) -> str | None:
    value, flag = str(row.get(speaker or "")), BOT_FLAGS.get(plain_name(speaker or ""))
    if flag is not None:
        value = "assistant" if (value.casefold() in ("true", "1", "1.0", "yes")) == flag else "user"
    return value if speaker else None
