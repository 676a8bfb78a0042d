"""Chats as their apps export them: with random joins, gaps and languages, each format is read back."""

import json
from collections import Counter
from datetime import datetime, timedelta

import pytest
from helpers import CHAT, run_of
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dialogue.data.sources import load_corpus, read_path
from dialogue.errors import UserError
from dialogue.train.runs import NOT_DESCRIBED

# Heads of WhatsApp's lines as public reports show them. An hour of 12 is {h}, an hour of 24 {H}; AM and PM are {half}.
HEADS = {
    "American": ("{m}/{d}/{yy}, {h}:{M}\u202f{half} - ", "AM PM"),
    "American on an iPhone": ("[{m}/{d}/{yy}, {h}:{M}:09\u202f{half}] ", "AM PM"),
    "American, 24 hours": ("{m}/{d}/{yy}, {H}:{M} - ", ""),
    "an iPhone of 2014": ("{m}/{d}/{yy}, {h}:{M}:09 {half}: ", "AM PM"),
    "British": ("{dd}/{mm}/{yyyy}, {HH}:{M} - ", ""),
    "British, 12 hours": ("{dd}/{mm}/{yyyy}, {h}:{M} {half} - ", "am pm"),
    "Australian on an iPhone": ("[{d}/{m}/{yyyy}, {h}:{M}:09 {half}] ", "a.m. p.m."),
    "Spanish": ("{d}/{m}/{yy} {H}:{M} - ", ""),
    "Colombian": ("{d}/{m}/{yyyy} {h}:{M} {half} - ", "a.\u00a0m. p.\u00a0m."),
    "German": ("{dd}.{mm}.{yy}, {HH}:{M} - ", ""),
    "German on an iPhone": ("\u200e[{dd}.{mm}.{yy}, {HH}:{M}:09] ", ""),
    "French": ("{dd}.{mm}.{yy} à {HH}:{M} - ", ""),
    "Dutch": ("{dd}-{mm}-{yyyy} {HH}:{M} - ", ""),
    "Finnish on an iPhone": ("[{d}.{m}.{yyyy} klo {H}.{M}.09] ", ""),
    "Indonesian": ("{dd}/{mm}/{yy} {HH}.{M} - ", ""),
    "Turkish on an iPhone": ("[{d}.{mm}.{yyyy} {HH}:{M}:09] ", ""),
    "Canadian": ("{yyyy}-{mm}-{dd}, {h}:{M} {half} - ", "a.m. p.m."),
    "South African": ("{yyyy}/{mm}/{dd}, {h}:{M}\u202f{half} - ", "am pm"),
    "Swedish": ("{yyyy}-{mm}-{dd} {HH}:{M} - ", ""),
    "Hungarian": ("{yyyy}. {mm}. {dd}. {H}:{M} - ", ""),
    "Chinese on an iPhone": ("[{yyyy}/{m}/{d} {half}{h}:{M}:09] ", "上午 下午"),
    "Korean": ("{yyyy}. {m}. {d}. {half} {h}:{M} - ", "오전 오후"),
    "Arabic": ("\u200f{d}\u200f/{m}\u200f/{yyyy}، {h}:{M} {half} - ", "ص م"),
}
SAYS_NOTHING = [
    "<Media omitted>", "<Medien ausgeschlossen>", "<Multimedia omitido>", "<Médias omis>", "<Без медиафайлов>", "null",
    "\u200eimage omitted", "\u200eBild weggelassen", "\u200egörüntü dahil edilmedi", "image omitted", "audio omesso",
    "\u200e<attached: 00000004-PHOTO-2022-12-31-14-17-51.jpg>", "IMG-20250330-WA0010.jpg (archivo adjunto)",
    "invoice.pdf • \u200e3 pages \u200edocument omitted", "\u200eMissed voice call", "This message was deleted",
    "Diese Nachricht wurde gelöscht.", "Messages and calls are end-to-end encrypted. Tap to learn more.",
]  # fmt: skip
BY_NOBODY = ["Ann created group “Us”", "You were added", 'Ann changed the subject from "A: b" to "B: c"']


def written(head, moment):
    template, halves = HEADS[head]
    half = halves.split(" ")[moment.hour // 12] if halves else ""
    text = template.format(
        d=moment.day, dd=f"{moment.day:02}", m=moment.month, mm=f"{moment.month:02}", yy=f"{moment.year % 100:02}",
        yyyy=moment.year, H=moment.hour, HH=f"{moment.hour:02}", h=moment.hour % 12 or 12, M=f"{moment.minute:02}",
        half=half,
    )  # fmt: skip
    return text.translate({48 + n: 0x0660 + n for n in range(10)}) if head == "Arabic" else text


def write(folder, name, content):
    path = folder / name
    path.write_text(content if isinstance(content, str) else json.dumps(content, ensure_ascii=False), encoding="utf-8")
    return path


def read(path, bot="Bo", silence=60):
    """(dialogues, what was left out, notes)."""
    left_out, notes = Counter(), []
    files, _ = read_path(path, left_out, notes, bot, silence)
    return [turns for dialogues in files.values() for turns, _ in dialogues], +left_out, notes


# ---- What is written is read back ------------------------------------------------------------------------

WORDS = ["hello", "Grüße", "привет", "こんにちは", "مرحبا", "שלום", "😀👍🏽", "c'est", "1:0", "10/12", "[sic]", "<3"]
TEXTS = st.lists(st.sampled_from(WORDS), min_size=1, max_size=4).flatmap(
    lambda words: st.sampled_from([" ", "\n", "\n\n"]).map(lambda between: between.join(words))
)
# Conversations of (speaker, minutes since the message before, text); Bo is the bot, all others are the person.
SAID = st.tuples(st.sampled_from(["Ann", "Bo", "Zoë 🌻", "+44 20 7946 0000"]), st.integers(0, 60), TEXTS)
TALKS = st.lists(st.tuples(st.integers(61, 50_000), st.lists(SAID, min_size=1, max_size=7)), min_size=1, max_size=4)
STARTS = st.datetimes(datetime(2012, 1, 1), datetime(2030, 1, 1)).map(lambda at: at.replace(second=0, microsecond=0))
ALL = settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])


def timed(talks, start):
    """(speaker, moment, text) of all messages, and the dialogues that they are. The last message is of a 28th."""
    messages, dialogues, moment = [], [], start
    for pause, talk in [*talks, (0, [("Ann", 0, "bye"), ("Bo", 0, "bye")])]:
        moment += timedelta(minutes=pause)
        if not pause:
            moment = (moment + timedelta(days=31)).replace(day=28)
        turns = []
        for place, (who, minutes, text) in enumerate(talk):
            moment += timedelta(minutes=minutes if place else 0)
            messages.append((who, moment, text))
            if not turns and who == "Bo":
                turns.append("")
            if len(turns) % 2 == (who == "Bo"):
                turns.append(text)
            else:
                turns[-1] += "\n" + text
        dialogues += [turns] * (sum(map(bool, turns)) > 1)
    return messages, dialogues


@ALL
@given(talks=TALKS, start=STARTS, head=st.sampled_from(list(HEADS)), order=st.randoms(use_true_random=False))
def test_whatsapps_text_is_read_back(tmp_path, talks, start, head, order):
    messages, expected = timed(talks, start)
    lines = []
    for who, moment, text in messages:
        at = written(head, moment)
        tilde = "~\u202f" * order.choice((False, True))
        edited = order.choice(("", " \u200e<This message was edited>", " <Diese Nachricht wurde bearbeitet.>"))
        lines.append(f"{at}{tilde}{who}: {text}{edited}")
        lines += [f"{at}{who}: {order.choice(SAYS_NOTHING)}"] * order.choice((0, 0, 1))
        lines += [at + order.choice(BY_NOBODY)] * order.choice((0, 0, 1))
    found, _, notes = read(write(tmp_path, "_chat.txt", order.choice(("\n", "\r\n")).join(lines)))
    assert found == expected
    assert any(note.startswith("WhatsApp's dates read as") for note in notes)


@pytest.mark.parametrize("head", HEADS)
def test_each_head_of_whatsapps_lines_says_when_it_was(tmp_path, head):
    """Noon and midnight, and days that only one order of day and month has."""
    for moment in (datetime(2021, 1, 13, 0, 5), datetime(2021, 12, 31, 12, 0), datetime(2020, 3, 1, 23, 30)):
        later = moment + timedelta(minutes=90)
        lines = [f"{written(head, moment)}Ann: Hi", f"{written(head, later)}Bo: Ho"]
        lines.append(f"{written(head, datetime(2032, 10, 28, 3, 0))}Bo: late")
        path = write(tmp_path, "a.txt", "\n".join(lines))
        assert read(path, silence=90)[0] == [["Hi", "Ho"]]
        assert read(path, silence=89)[0] == []


@ALL
@given(talks=TALKS, start=STARTS, order=st.randoms(use_true_random=False))
def test_telegrams_json_is_read_back(tmp_path, talks, start, order):
    messages, expected = timed(talks, start)
    chats = []
    for place in range(2):  # one chat, and the same twice
        said = [{"type": order.choice(("service", "unsupported")), "date": start.isoformat(), "text": ""}]
        for who, moment, text in messages:
            cut = order.randrange(len(text))
            parts = [text[:cut], {"type": "link", "text": text[cut:]}] if order.choice((0, 1)) else text
            about = {"type": "message", "date": moment.isoformat(), "from": who, "from_id": "user1", "author": "me"}
            said.append({"id": len(said), **about, "text": parts})
            said += [{"id": 0, **about, "photo": "(File not included)", "text": ""}] * order.choice((0, 0, 1))
            said += [{"id": 0, **about, "forwarded_from": "News", "text": "Read all"}] * order.choice((0, 0, 1))
        chats.append({"name": "Ann", "type": "personal_chat", "id": place, "messages": said})
    assert read(write(tmp_path, "result.json", chats[0]))[0] == expected
    assert read(write(tmp_path, "result.json", {"about": "", "chats": {"about": "", "list": chats}}))[0] == 2 * expected


@ALL
@given(talks=TALKS, start=STARTS, order=st.randoms(use_true_random=False))
def test_discords_json_is_read_back(tmp_path, talks, start, order):
    messages, expected = timed(talks, start)
    said = []
    for who, moment, text in messages:
        author = {"id": "1", "name": who, "isBot": False} if order.choice((0, 1)) else {"name": "?", "nickname": who}
        stamp = moment.isoformat() + order.choice(("+00:00", ".12+00:00", ".6350000+00:00"))
        about = {"id": "1", "timestamp": stamp, "author": author}
        said.append({**about, "type": order.choice(("Default", "Reply")), "content": text})
        said += [{**about, "type": "RecipientAdd", "content": "Added a recipient."}] * order.choice((0, 0, 1))
    chat = {"guild": {"id": "0"}, "channel": {"id": "1"}, "messages": said, "messageCount": len(said)}
    assert read(write(tmp_path, "direct.json", chat))[0] == expected


@ALL
@given(talks=TALKS, blank=st.integers(0, 2))
def test_plain_lines_are_read_back(tmp_path, talks, blank):
    """Empty lines part conversations where there are more of them than between any two turns."""
    talks = [(pause, [(who, 0, " ".join(text.split())) for who, _, text in talk]) for pause, talk in talks]
    talks = [*talks, (61, [("Ann", 0, "Hi"), ("Bo", 0, "Ho")] * 2)]
    often = {who for who, count in Counter(who for _, talk in talks for who, *_ in talk).items() if count > 1}
    talks = [(pause, kept) for pause, talk in talks if (kept := [one for one in talk if one[0] in often])]
    texts = [("\n" * (1 + blank)).join(f"{who}: {text}" for who, _, text in talk) for _, talk in talks]
    expected = timed(talks, datetime(2020, 1, 1))[1][:-1]
    assert read(write(tmp_path, "a.txt", ("\n" * (2 + blank)).join(texts)))[0] == expected


# ---- What a person sees ----------------------------------------------------------------------------------


def test_without_a_bot_one_line_lists_the_names_with_their_counts(tmp_path):
    path = write(tmp_path, "chat.txt", CHAT)
    with pytest.raises(UserError, match=r"chat.txt: nothing says whose .* --bot NAME, of: Ann \(56\), Bo \(28\)$"):
        load_corpus(str(path))
    with pytest.raises(UserError, match=r"nobody is called 'Boo'; give --bot NAME, of: Ann \(56\), Bo \(28\)$"):
        load_corpus(str(path), "Boo")
    with pytest.raises(UserError, match="chitchat has no names"):
        load_corpus("chitchat", "Bo")
    corpus = load_corpus(str(path), "Bo")
    assert len(corpus.train) + len(corpus.validation) + len(corpus.test) == 28
    assert "Bo is the bot, and whoever spoke before the person" in corpus.notes
    assert "WhatsApp's dates read as day, month, year" in corpus.notes


def test_a_bot_can_be_named_in_any_data_with_names(tmp_path):
    turns = [{"speaker": "Bo", "text": "Hi"}, {"speaker": "Ann", "text": "Ho"}, {"speaker": "Cy", "text": "Hey"}]
    assert read(write(tmp_path, "a.json", {"turns": turns}))[0] == [["", "Hi", "Ho\nHey"]]
    assert read(write(tmp_path, "a.json", {"turns": turns}), bot="Ann")[0] == [["Hi", "Ho", "Hey"]]


@pytest.mark.parametrize(
    ("line", "what"),
    [
        ("write to ann.b+c@mail.example.org", "an e-mail address"),
        ("my card is 4111 1111 1111 1111", "a card number"),
        ("call +49 (0) 170 / 123 45 67", "a phone number"),
        ("it's 555-867-5309", "a phone number"),
        ("0171 1234567 is new", "a phone number"),
        ("https://example.org/reset?id=7&token=a1", "a link with a token"),
        ("https://chat.whatsapp.com/Ab3dEf6hIj9kLm2nOp5qRs", "a link with a token"),
        ("https://ann:secret@example.org/", "a link with a token"),
        ("on 12.05.2020 at 10:30, or 2020-05-13 12:00", None),
        ("https://example.org/how-to-bake", None),
        ("1,000,000 people in 2019-2020, 3.14159", None),
        ("12 eggs, 500 g of flour", None),
        ("it ended 1:0 10/12 10/12", None),
    ],
)
def test_private_lines_are_left_out_and_counted_but_never_shown(tmp_path, line, what):
    path = write(tmp_path, "a.txt", f"1.2.20, 16:05 - Ann: Hi\n{line}\n1.2.20, 16:06 - Bo: Ho\nwell\n")
    found, left_out, notes = read(path)
    assert found == [["Hi" if what else f"Hi\n{line}", "Ho\nwell"]]
    assert left_out == ({f"lines with {what} left out": 1} if what else {})
    assert line not in " ".join(notes)


@pytest.mark.parametrize("sign", ["a", "a.", "7", "•", " ", "/", "https://a", "<", ":", "@"])
def test_a_line_without_end_takes_no_time(tmp_path, sign):
    """Patterns that begin anywhere and run on would take minutes for the longest message that WhatsApp lets through."""
    text = sign * (65_536 // len(sign))
    found = read(write(tmp_path, "a.txt", f"1.2.20, 16:05 - Ann: x {text} x\n1.2.20, 16:06 - Bo: Ho\n"))[0]
    assert found == [[f"x {text} x", "Ho"]]


def test_what_nobody_said_is_counted(tmp_path):
    lines = ["Messages and calls are end-to-end encrypted.", "Us: \u200eAnn joined", "Ann: Hi", "Ann: null", "Bo: Ho"]
    path = write(tmp_path, "a.txt", "".join(f"1.2.20, 16:05 - {line}\n" for line in lines))
    left_out = read(path)[1]
    with pytest.raises(UserError, match=r"of: Ann \(1\), Bo \(1\)$"):
        read(path, bot=None)
    assert left_out == {"system messages left out": 1, "media, calls, deleted and forwarded messages left out": 2}


@pytest.mark.parametrize(
    ("dates", "order"),
    [
        (["1/2/20", "13/2/20"], "day, month, year"),
        (["1/2/20", "1/13/20"], "month, day, year"),
        (["1/2/20", "1/3/20", "2/1/20"], "month, day, year"),  # as days they would run backwards
        (["1/2/20", "1/3/20"], "day, month, year"),  # both would do
        (["20/1/2", "20/1/13"], "year, month, day"),
    ],
)
def test_the_order_of_day_and_month_is_inferred_over_the_whole_file(tmp_path, dates, order):
    text = "".join(f"{date}, 16:05 - Ann: Hi\n{date}, 16:06 - Bo: Ho\n" for date in dates)
    found, _, notes = read(write(tmp_path, "a.txt", text))
    assert f"WhatsApp's dates read as {order}" in notes
    assert found == [["Hi", "Ho"]] * len(dates)


def test_a_readme_is_no_chat(tmp_path):
    write(tmp_path, "README.txt", "Data: mine\nLicence: mine\nNote: all\n\nSome text.\nNote: it goes on.\n")
    write(tmp_path, "a.txt", CHAT)
    found, _, notes = read(tmp_path)
    assert len(found) == 28
    assert "not read: README.txt" in notes


@pytest.mark.parametrize("broken", [{"date": "yesterday"}, {"date": 5}, {"text": 5}, {"text": [5]}])
def test_a_broken_message_is_one_line(tmp_path, broken):
    message = {"type": "message", "date": "2020-01-01T10:00:00", "from": "Ann", "from_id": "user1", "text": "Hi"}
    with pytest.raises(UserError, match=r"result.json: a message is not as Telegram"):
        read(write(tmp_path, "result.json", {"type": "", "id": 1, "messages": [message, message | broken]}))


def test_only_the_bots_turns_are_learned_then_and_the_run_says_how_it_read(tmp_path):
    assert run_of("--bot", "Bo").learn == "bot"
    assert run_of("--bot", "Bo", "--learn", "both").learn == "both"
    assert run_of().learn == "both"
    assert (run_of("--bot", "Bo", "--silence", "30").bot, run_of("--silence", "30").silence) == ("Bo", 30)
    assert not {"bot", "silence"} & NOT_DESCRIBED, "another reading is another run"
    with pytest.raises(UserError, match="--silence"):
        run_of("--silence", "-1")
