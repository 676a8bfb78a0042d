"""Rows with one turn of a dialogue each -> conversations. Columns are recognised by name, and tried by content."""

import math
import re
from datetime import datetime
from typing import Any

from dialogue.data.readers import SHAPE, NoDialogues, Record
from dialogue.data.speakers import SPEAKER, TEXTS, Conversation, Said, is_learned, own_split, plain_name
from dialogue.errors import UserError

BOT_FLAGS = {"isagent": 1, "isbot": 1, "isassistant": 1, "isuser": 0, "iscustomer": 0, "inbound": 0}  # of a true one
DIALOGUE = re.compile(r"(dialog|dialogue|conv|conversation|session|thread|chat|call|episode|ticket|case)[a-z]*")
ORDER = re.compile(r"(turn|utterance|utt|line)(id|number|num|no)?|(turn|utterance|utt|message)?(idx|index|order)")
TIME = re.compile(r"timestamp|time|date|datetime|createdat|sentat")


def from_rows(records: list[Record], name: str, notes: list[str]) -> list[Conversation]:
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
    try:
        numbers = [float(value) for value in values]
        return numbers if all(map(math.isfinite, numbers)) else None
    except (TypeError, ValueError, OverflowError):
        pass
    try:
        times = [value if isinstance(value, datetime) else datetime.fromisoformat(value) for value in values]
        return [time.timestamp() for time in times]
    except (TypeError, ValueError, OverflowError, OSError):
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
