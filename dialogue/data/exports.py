"""Exports of chats -> conversations: WhatsApp's text, Telegram's and DiscordChatExporter's JSON, lines of `Name: text`.

WhatsApp writes the head of a line as the phone's language does, and marks by U+200E what it wrote itself. The formats
were read off public reports: github.com/joweich/chat-miner (test/whatsapp), github.com/Pustur/whatsapp-chat-parser
(issues 224, 248, 258), github.com/mowolf/ChatAnalyzer (issue 11), github.com/dimagi/open-chat-studio (issue 221).
"""

import datetime
import itertools
import math
import re
from collections import Counter
from collections.abc import Callable
from typing import Any

from dialogue.data.speakers import SYSTEM, Conversation, Said
from dialogue.errors import UserError

SILENCE = 60.0  # minutes that part two conversations
MEDIA = "media, calls, deleted and forwarded messages left out"
SAID = ("message", "Default", "Reply")  # types of Telegram's and Discord's messages that a person wrote

MARKS = dict.fromkeys((0x200E, 0x200F, 0xFEFF, *range(0x202A, 0x202F), *range(0x2066, 0x206A)))  # invisible
# "[31/12/2019, 2:14:40 a.m.] ", "02.05.18 à 18:00 - ", "3/24/14, 1:59:59 PM: ", "[2024/10/31 下午9:05:46] "
HEAD = re.compile(
    r"(\[)?(\d{1,4})([./-])\s?(\d{1,2})\3\s?(\d{1,4})([^\d\[\]:–-]{1,12})(\d{1,2})[:.](\d\d)(?:[:.]\d\d)?"
    r"([^\d\[\]:–-]{0,9}?)(?(1)\]|(?:\s[–-]|:)(?=\s))\s?"
)
HALVES = dict.fromkeys(["am", "上午", "凌晨", "早上", "午前", "오전", "ص", "قظ", "πμ", "öö", "de"], 0)
HALVES |= dict.fromkeys(["pm", "下午", "中午", "晚上", "午後", "오후", "م", "بظ", "μμ", "ös", "du"], 12)
ORDERS = {"day, month, year": (2, 1, 0), "month, day, year": (2, 0, 1), "year, month, day": (0, 1, 2)}
NAME = re.compile(r"([^:]{1,80}?):(?:\s|$)")  # before what was said, in WhatsApp's lines
NAMED = re.compile(r"([^\s:][^:]{0,39}):\s+(?=\S)")  # in plain lines

# What WhatsApp wrote: after U+200E, or that an edit was made; and a message that tells of a file or a call, in the
# brackets of Android, by the name of the file, or in words, since the mark gets lost on the way through an editor.
OWN = re.compile(r"(?:^.*•\s*)?\u200e.*| ?<[^<>]*(?:edited|bearbeitet|edit[aó]|modifi|bewerkt|изменен)[^<>]*>$", re.M)
MARKER = re.compile(
    r"<[^<>]{3,}>|.+\.(?:jpe?g|png|webp|gif|mp4|3gp|opus|ogg|m4a|mp3|aac|pdf|docx?|xlsx?|pptx?|zip|vcf|txt) \([^()]+\)"
    r"|(?:\w+ ){1,2}(?:omitted|weggelassen|omise?|absente?|omess[oa]|omitid[oa]|ocultad[oa]|weggelaten|edilmedi)|null"
    r"|(?:messages|nachrichten|los mensajes|les messages|mesajlar)\b.*(?:encrypted|verschlüsselt|extremo|bout|uçtan).*"
    r"|(?:this message was|you) deleted(?: this message)?|(?:diese nachricht wurde|du hast diese nachricht) gelöscht"
    r"|este mensaje fue eliminado|eliminaste este mensaje|esta mensagem foi apagada|você apagou esta mensagem"
    r"|ce message a été supprimé|questo messaggio è stato eliminato|данное сообщение удалено"
    r"|(?:dit bericht is|je hebt dit bericht) verwijderd|missed \w+ call|verpasster \w+anruf|llamada perdida",
    re.IGNORECASE,
)

DATE = re.compile(r"(?<![\d./-])(?:\d{1,2}|\d{4})([./-])\d{1,2}\1(?:\d{4}|\d\d)(?![./-]?\d)")
PHONE = re.compile(r"(?<!\w)(?<!\d:)[+(]?\d(?:[\s()./\u2010-\u2013-]{0,3}\d){6,14}(?!\w)")
CARD = re.compile(r"(?<!\d)\d(?:[ -]?\d){12,18}(?!\d)")
LINK = re.compile(
    r"(?:(?<![\w+.-])[a-z][\w+.-]*://|www\.)(?:(?!://)\S)*?(?:[?&/=#](?=[\w-]*\d)(?=[\w-]*[a-z])[\w-]{20,}|(?<=//)[^/\s@]+@"
    r"|[?&#;/][\w-]*(?:token|key|auth|secret|sig|pass|pwd|code|session|invite)[\w-]*=)",
    re.IGNORECASE,
)


Message = tuple[str, float, str]  # who, or nothing for the app itself; the minute; the text


def _is_card(number: str) -> bool:
    """Luhn's test (ISO/IEC 7812-1, annex B)."""
    digits = [int(sign) for sign in reversed(number) if sign.isdecimal()]
    return (sum(digits[::2]) + sum(sum(divmod(2 * digit, 10)) for digit in digits[1::2])) % 10 == 0


def _is_phone(number: str) -> bool:
    """Whether it can be dialled: by its first sign, or with nine digits and more."""
    return number[0] in "+(0" or sum(map(str.isdecimal, number)) >= 9


PRIVATE: dict[str, Callable[[str], Any]] = {
    "a link with a token": LINK.search, "an e-mail address": re.compile(r"(?<![\w.+-])[\w.+-]+@[\w-]+\.\w").search,
    "a card number": lambda line: any(map(_is_card, CARD.findall(line))),
    "a phone number": lambda line: any(map(_is_phone, PHONE.findall(DATE.sub("", line)))),
}  # fmt: skip


def find_chats(values: list[Any], where: str, notes: list[str]) -> list[list[Message]]:
    """The lines of a text, or documents of JSON -> messages of each chat; none where the file is no export."""
    if all(isinstance(value, str) for value in values):
        return [_whatsapp(values, notes)] if any(map(_head, values[:20])) else _named(values)
    try:
        chats = [chat for value in values for chat in _json_chats(value)] if _json_chats(values[0]) else []
        return [_of_json(chat["messages"]) for chat in chats]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{where}: a message is not as Telegram or DiscordChatExporter write it ({error!r})") from error


def to_conversations(chats: list[list[Message]], silence: float, left_out: Counter[str]) -> list[Conversation]:
    """Chats, parted where nobody says anything for `silence` minutes; without lines that hold something private."""
    found: list[Conversation] = []
    for chat in chats:
        last = -math.inf
        left_out[SYSTEM] += sum(not who for who, _, _ in chat)
        for who, minute, text in (message for message in chat if message[0]):
            if abs(minute - last) > silence:
                found.append(Conversation([], None))
            last = minute
            left_out[MEDIA] += not text.strip()
            reasons = [next((what for what, finds in PRIVATE.items() if finds(line)), "") for line in text.split("\n")]
            left_out.update(f"lines with {what} left out" for what in reasons if what)
            said = "\n".join(line for line, what in zip(text.split("\n"), reasons, strict=True) if not what).strip()
            if said:
                found[-1].messages.append(Said(who, said))
    return found


def _speaker(name: str) -> str:
    """ "~\\u202fAnn" -> "Ann": WhatsApp has a "~" before those who are in no address book."""
    return " ".join(name.translate(MARKS).split()).lstrip("~ ") or "?"


def _head(line: str) -> tuple[tuple[str | None, str], tuple[str, ...], int, str] | None:
    """What stands before a message of WhatsApp: (bracket and separator, date, minute of the day, what follows)."""
    kept = [place for place, sign in enumerate(line[:80]) if ord(sign) not in MARKS]
    found = HEAD.match("".join(line[place] for place in kept))
    if not found:
        return None
    bracket, first, separator, second, third, before, hour, minute, after = found.groups()
    half = HALVES.get(re.sub(r"[\s.,،]", "", before + after).casefold())
    minutes = 60 * (int(hour) if half is None else int(hour) % 12 + half) + int(minute)
    return (bracket, separator), (first, second, third), minutes, line[kept[found.end() - 1] + 1 :]


def _day(date: tuple[str, ...], order: str) -> int:
    """Days since the year 1; 0 where the date has no such order. Years of two digits are those of this century."""
    year, month, day = (int(date[place]) for place in ORDERS[order])
    if len(date[ORDERS[order][0]]) not in (2, 4) or not (year and 1 <= month <= 12 and 1 <= day <= 31):
        return 0
    return datetime.date(year + 2000 * (year < 100), month, 1).toordinal() + day - 1


def _whatsapp(lines: list[str], notes: list[str]) -> list[Message]:
    """Lines -> messages. Their style is that of the first head; dates have the order in which they run forwards."""
    heads = [_head(line) for line in lines]
    style = next(head[0] for head in heads if head)
    heads = [head if head and head[0] == style else None for head in heads]
    misfits = {}
    for order in ORDERS:  # of those that fit alike, the first
        days = [_day(head[1], order) for head in heads if head]
        misfits[order] = days.count(0), sum(later < day for day, later in itertools.pairwise(filter(None, days)))
    order = min(misfits, key=lambda name: misfits[name])
    notes.append(f"WhatsApp's dates read as {order}")
    messages: list[tuple[str, float, list[str]]] = []
    for line, head in zip(lines, heads, strict=True):
        if head and (day := _day(head[1], order)):
            name = NAME.match(head[3])
            # 'Ann changed the subject to "A: B"': a quotation that is still open belongs to no name
            who = _speaker(name[1]) if name and len(re.findall('["“”„«»]', name[1])) % 2 == 0 else ""
            messages.append((who, 1440 * day + head[2], [head[3][name.end() :] if name else ""]))
        elif messages:
            messages[-1][2].append(line)
    return [(who, minute, _own_words(said)) for who, minute, said in messages]


def _own_words(lines: list[str]) -> str:
    """What a person wrote of a message's lines, of which the first may tell of a file or a call instead."""
    first, *others = OWN.sub("", "\n".join(lines)).translate(MARKS).strip().split("\n")
    return "\n".join(others if MARKER.fullmatch(first.strip().rstrip(".")) else [first, *others])


def is_chat(text: str, or_named: bool) -> bool:
    """Whether this text is WhatsApp's, or lines of `Name: text` where it may be that."""
    return any(map(_head, text.split("\n", 20)[:20])) or (or_named and bool(_named(text.split("\n"))))


def _named(lines: list[str]) -> list[list[Message]]:
    """Lines of `Name: text` -> chats, parted by more empty lines than usual; none where most lines are others. A name
    says two things at least: "PS: no" goes on with what was said before."""
    lines = [line.strip() for line in lines]
    found = list(map(NAMED.match, lines))
    often = {name for name, count in Counter(match[1] for match in found if match).items() if count > 1}
    turns = [(place, match[1]) for place, match in enumerate(found) if match and match[1] in often]
    if len(often) < 2 or 2 * len(turns) < sum(map(bool, lines)):
        return []
    texts = [lines[place:end] for (place, _), (end, _) in itertools.pairwise([*turns, (len(lines), "")])]
    usual = min(text.count("") for text in texts[:-1])
    chats: list[list[Message]] = [[]]
    for (_, who), (first, *others) in zip(turns, texts, strict=True):
        chats[-1].append((_speaker(who), 0, "\n".join([first[len(who) + 1 :].strip(), *filter(None, others)])))
        chats += [[]] * (others.count("") > usual)
    return chats


def _json_chats(value: Any) -> list[dict[str, Any]]:
    """The chats in a document of Telegram (one, or all) or of DiscordChatExporter; none where it is another one."""
    match value:
        case {"type": _, "id": _, "messages": [{"type": _, "date": _}, *_]}:
            return [value]
        case {"guild": _, "channel": _, "messages": [{"type": _, "timestamp": _}, *_]}:
            return [value]
        case {"chats": {"list": [*chats]}}:
            chats += value.get("left_chats", {}).get("list", [])
            return [chat for each in chats for chat in _json_chats(each)]
    return []


def _of_json(messages: list[dict[str, Any]]) -> list[Message]:
    """Messages of Telegram ("from", "date", "text") or DiscordChatExporter ("author", "timestamp", "content"). Telegram
    has a text with links or bold words as a list of strings and entities; a deleted account has no name."""
    found = []
    for one in messages:
        author = one["author"] if "timestamp" in one else {"name": one.get("from") or one.get("from_id")}
        date = datetime.datetime.fromisoformat(re.sub(r"\.\d+|Z$", "", one.get("timestamp") or one["date"]))
        minute = date.replace(tzinfo=date.tzinfo or datetime.UTC).timestamp() / 60
        parts = "" if "forwarded_from" in one else one.get("content", one.get("text", ""))
        text = "".join(part if isinstance(part, str) else part["text"] for part in parts)
        who = _speaker(str(author.get("nickname") or author["name"])) if one["type"] in SAID else ""
        found.append((who, minute, text))
    return found
