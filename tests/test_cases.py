"""Small inputs in the shapes of public files and reports, each with its right value: never wrong in silence."""

import csv
import gzip
import io
import json
import zipfile
from collections import Counter

import numpy as np
import pyarrow
import pytest
from conftest import DAILYDIALOG, SHARED, byte_tokenizer, needs_dailydialog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pyarrow import parquet
from rich.console import Console

from dialogue.chat.batch import Reply
from dialogue.data import readers
from dialogue.data.cleaning import drop_controls
from dialogue.data.corpus import Corpus, Unlearned, without_leaks, words
from dialogue.data.packing import IGNORED, encode, pack
from dialogue.data.sources import load_corpus, read_path
from dialogue.errors import UserError
from dialogue.measure.likelihood import text_size
from dialogue.measure.replies import measure
from dialogue.prompt import add_roles, encode_dialogue
from dialogue.train import show

CASES = SHARED / "cases"


def read(path):
    left_out = Counter()
    files, _ = read_path(path, left_out, notes := [])
    return [turns for dialogues in files.values() for turns, _ in dialogues], +left_out, notes


def dialogues_of(tmp_path, name, content):
    if not isinstance(content, str | bytes):
        content = "".join(json.dumps(record) + "\n" for record in content)
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read(path)


# ---- The shared cases --------------------------------------------------------------------------------------

RIGHT = {
    "wrong-id-column.csv": lambda n: [
        f"Do you sell item {n}?", f"Yes it costs {n} coins.", "Great I take it.", "Thank you.",
    ],
    "who-speaks.csv": lambda n: [
        f"can anyone help with disk {n}\nit does not mount", f"which model is disk {n}", f"a model {n}",
    ],
    "turn-index.csv": lambda n: [
        "Which number is free?", f"Number {n} is free.", f"Then I take number {n}.", "It is yours.",
    ],
    "empty-turn.jsonl": lambda n: [
        f"Hi, do you ship to zone {n}?\nHello? Are you there?", f"Yes, we ship to zone {n}.",
    ],
    "do-not-learn.jsonl": lambda n: [
        f"How old is tower {n}?", "WRONG", "Really?", f"It is {n} hundred years old.",
    ],
}  # fmt: skip


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")
@pytest.mark.parametrize("name", RIGHT)
def test_who_said_what(name):
    dialogues, left_out, _ = read(CASES / name)
    assert dialogues == [RIGHT[name](n) for n in range(len(dialogues))]
    assert len(dialogues) >= 6
    assert not left_out


@pytest.mark.skipif(not CASES.is_dir(), reason="the shared cases are not here")
def test_the_other_cases():
    with pytest.raises(UserError, match=r"commas\.csv:2: 3 fields"):
        load_corpus(str(CASES / "commas.csv"))
    with pytest.raises(UserError, match=r"stray-quote\.csv:6: a quotation mark"):
        load_corpus(str(CASES / "stray-quote.csv"))
    assert read(CASES / "own-punctuation.jsonl")[0] == [
        ["你好！请问几点开门？", "九点，欢迎光临。"],
        ["Ça va ?", "Oui ! J’arrive : attends."],
        ["One\nTwo\nThree", "First line\nSecond line"],
    ]
    assert [len(turns) for turns in read(CASES / "lists.csv")[0]] == [4, 2]
    greeted = load_corpus(str(CASES / "same-greeting.jsonl"))
    assert len(greeted.train) + len(greeted.validation) + len(greeted.test) == 500
    assert without_leaks(greeted).train == greeted.train
    alike = without_leaks(load_corpus(str(CASES / "alike.jsonl")))
    assert len(alike.train) + len(alike.validation) + len(alike.test) == 10


def test_a_text_that_speaks_of_the_separator_is_taken_as_it_is(tmp_path):
    lines = numbered(0, 50) + json.dumps({"dialog": ["What is __eou__ ?", "The end of a turn , there ."]}) + "\n"
    (tmp_path / "a.jsonl").write_text(lines)
    corpus = load_corpus(str(tmp_path / "a.jsonl"))
    assert "text taken as it is" in corpus.notes
    assert ["What is __eou__ ?", "The end of a turn , there ."] in corpus.train + corpus.validation + corpus.test


# ---- Tables: columns by content ------------------------------------------------------------------------------

FOUR = ["Is it open?", "Yes.", "Until when?", "Until nine."]


def table(header, rows):
    return header + "\n" + "\n".join(rows) + "\n"


@pytest.mark.parametrize(
    ("header", "row"),
    [
        ("dialogue_id,text", "{d},{t}"),
        ("id,conversation_id,text", "{d}{i},{d},{t}"),
        ("conv;speaker;utterance", "{d};{s};{t}"),
        ("session\trole\tcontent", "{d}\t{r}\t{t}"),
        ("thread|is_agent|message", "{d}|{b}|{t}"),
        ("call_id,inbound,text", "{d},{p},{t}"),
        ("speaker_id,conversation_id,shop_id,text", "{s},{d},7,{t}"),
        ("dialogue_id,sent_at,from,text", "{d},2024-01-01T10:0{i},{s},{t}"),
        ("dialogue_id,user,role,text", "{d},{s}{d},{r},{t}"),
        ("conv_id,utterance_idx,context,prompt,speaker_idx,utterance,tags", "h{d},{i},glad,x,{s},{t},"),
    ],
)
def test_tables_are_read_by_what_their_columns_hold(tmp_path, header, row):
    rows = [
        row.format(d=d, i=i, t=text, s="ab"[i % 2], r=("user", "assistant")[i % 2], b=i % 2 == 1, p=i % 2 == 0)
        for d in range(4)
        for i, text in enumerate(FOUR)
    ]
    dialogues, _, notes = dialogues_of(tmp_path, "a.csv", table(header, rows))
    assert dialogues == [FOUR] * 4
    assert any("tells the dialogues apart" in note for note in notes)
    shuffled = [json.dumps(dict(zip(["dialogue_id", "turn", "text"], (d, i, FOUR[i]), strict=True)))
                for i in (2, 0, 3, 1) for d in range(4)]  # fmt: skip
    assert dialogues_of(tmp_path, "rows.jsonl", "\n".join(shuffled))[0] == [FOUR] * 4


def test_two_columns_that_could_both_tell_dialogues_apart(tmp_path):
    rows = [f"{n // 2},{n % 5},text {n}" for n in range(20)]
    with pytest.raises(UserError, match=r"chat and session could both.*rename the right one to dialogue_id"):
        dialogues_of(tmp_path, "a.csv", table("chat,session,text", rows))
    assert len(dialogues_of(tmp_path, "a.csv", table("dialogue_id,session,text", rows))[0]) == 10


@pytest.mark.parametrize(
    ("content", "said"),
    [
        ("dialogue_id,text\n0,Hi\n0\n", "a.csv:3: 1 fields"),
        ("dialogue_id,text\n0,Hi\n0,Ho\n1,a,b\n", "a.csv:4: 3 fields"),
        ('dialogue_id,text\n0,"Hi\n0,Ho\n1,Hi\n1,"Ho"\n', "a.csv:2: a quotation mark"),
        ('dialogue_id,text\n0,"Hi\n0,Ho\n1,Hi\n1,Ho"\n', "a.csv:2: a quotation mark opens a text that"),
        ("text\nHi\nHo\n", "columns text"),
        ("dialog\n\"['Hi' 'Ho']\"\n", "a.csv:2: a list as NumPy prints it, without commas"),
        ("dialog\n\"['Hi'\n 'Ho']\"\n", "a.csv:2: a list as NumPy prints it, without commas"),
        ("dialogue_id,text,split\n0,Hi,mine\n0,Ho,mine\n", "the split 'mine' is unknown"),
        ("dialogue_id,text,weight\n0,Hi,0.5\n0,Ho,1\n", "a.csv:2: weight is '0.5'"),
    ],
)  # fmt: skip
def test_what_a_table_has_wrong_is_named_with_its_line(tmp_path, content, said):
    with pytest.raises(UserError) as error:
        dialogues_of(tmp_path, "a.csv", content)
    assert said in str(error.value)


def test_lines_in_a_cell_are_text(tmp_path):
    content = 'dialogue_id,text\n0,"Dear Ann,\nhow are you?\n"\n0,"Fine, and you?"\n'
    assert dialogues_of(tmp_path, "a.csv", content)[0] == [["Dear Ann,\nhow are you?", "Fine, and you?"]]


# ---- Any shape of record ------------------------------------------------------------------------------------

ROLES = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]
SHAPES = {
    "save": ROLES,
    "array": [{"dialog": ["Hi", "Ho"]}, {"dialog": ["Hi", "Ho"]}],
    "array of messages": [{"messages": ROLES}, {"messages": ROLES}],
    "array of rows": [{"dialogue_id": n // 2, "text": ("Hi", "Ho")[n % 2]} for n in range(4)],
    "sharegpt": {"conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
    "lists side by side": {"conversations": {"from": ["human", "gpt"], "value": ["Hi", "Ho"]}},
    "utterances": {"utterances": [{"speaker": "USER", "text": "Hi"}, {"speaker": "SYSTEM", "text": "Ho"}]},
    "names": {"turns": [{"speaker": "Ann", "text": "Hi"}, {"speaker": "Bo", "text": "Ho"}]},
    "parts": {"messages": [{"author": {"role": "user"}, "content": [{"type": "text", "text": "Hi"}]}, ROLES[1]]},
    "prompt": {"prompt": "Hi", "response": "Ho"},
    "alpaca": {"instruction": "Hi", "input": "", "output": "Ho"},
    "question": {"question": "Hi", "answer": "Ho", "id": 7, "label": "greeting"},
    "capitals": {"Human": "Hi", "Assistant": "Ho"},
    "names beside roles": {"messages": [{"name": "Ann", **ROLES[0]}, {"name": "Ann", **ROLES[1]}]},
    "pairs": {"conversation": [["Hi", "Ho"]]},
    "prompt and messages": {"prompt": "other", "prompt_id": "0", "messages": ROLES},
}


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("pack_up", [None, "gzip", "zstd", "zip"])
def test_any_shape_whatever_its_suffix(tmp_path, shape, pack_up):
    data = json.dumps(SHAPES[shape], indent=2).encode()
    if pack_up == "zip":
        with zipfile.ZipFile(buffer := io.BytesIO(), "w") as archive:
            archive.writestr("inside/a.txt", data)
        data = buffer.getvalue()
    elif pack_up:
        data = pyarrow.compress(data, codec=pack_up, asbytes=True) if pack_up == "zstd" else gzip.compress(data)
    dialogues, _, _ = dialogues_of(tmp_path, "a.data", data)
    assert dialogues
    assert all(turns == ["Hi", "Ho"] for turns in dialogues)


TURN = st.text(st.characters(exclude_categories=["Cs", "Cc"]), max_size=12)
TALKS = st.lists(st.lists(st.tuples(st.booleans(), TURN), max_size=6), min_size=2, max_size=6)


def joined(talk):
    """What is to be read: empty turns gone, neighbours of one speaker joined, an unanswered message gone."""
    turns = []
    for is_bot, text in talk:
        text = drop_controls(text).strip()
        if text and not turns and is_bot:
            turns.append("")
        if text and len(turns) % 2 == is_bot:
            turns.append(text)
        elif text:
            turns[-1] += "\n" + text
    turns = turns[: len(turns) - len(turns) % 2]
    return turns if sum(map(bool, turns)) >= 2 else []


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(talks=TALKS, order=st.randoms(use_true_random=False))
def test_what_is_written_in_any_shape_is_read_back(tmp_path, talks, order):
    role = ("user", "assistant")
    expected = [turns for turns in map(joined, talks) if turns]
    records = [{"messages": [{"role": role[is_bot], "content": text} for is_bot, text in talk]} for talk in talks]
    assert dialogues_of(tmp_path, "a.jsonl", records)[0] == expected
    assert dialogues_of(tmp_path, "a.json", json.dumps(records))[0] == expected
    values = {"from": "from", "value": "value"}
    columns = [{name: [role[b] if name == "from" else t for b, t in talk] for name in values} for talk in talks]
    parquet.write_table(pyarrow.table({"conversations": columns}), buffer := io.BytesIO())
    assert dialogues_of(tmp_path, "a.parquet", buffer.getvalue())[0] == expected

    rows = [(d, i, role[b], t) for d, talk in enumerate(talks) for i, (b, t) in enumerate(talk)]
    several = {d for d, *_ in rows if len({r for e, _, r, _ in rows if e == d}) > 1}
    rows = [row for row in rows if row[0] in several]  # else nothing shows what the columns mean
    if len(rows) * 0.75 < len(several) or not any(t.strip() and _not_a_number(t) for *_, t in rows):
        return
    order.shuffle(rows)
    with (tmp_path / "a.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerows([("conversation_id", "turn_index", "role", "content"), *rows])
    found = read(tmp_path / "a.csv")[0]
    assert sorted(found) == sorted(turns for d in several for turns in [joined(talks[d])] if turns)


def _not_a_number(text):
    try:
        float(text)
    except ValueError:
        return True
    return False


def test_history_and_input_belong_to_the_prompt(tmp_path):
    record = {"instruction": "Sum up.", "input": "Long text.", "output": "Short.", "history": [["Hi", "Ho"]]}
    assert dialogues_of(tmp_path, "a.jsonl", [record])[0] == [["Hi", "Ho", "Sum up.\nLong text.", "Short."]]


def test_what_is_dropped_is_counted_by_its_reason(tmp_path):
    crowd = [{"speaker": name, "text": name} for name in ("Ann", "Bo", "Cy")]
    picture = [{"role": "user", "content": [{"type": "image_url"}]}, ROLES[1]]
    records = [
        {"messages": [*ROLES, {"role": "system", "content": "Be kind."}, {"role": "tool", "content": "42"}, ROLES[0]]},
        {"messages": picture},
        {"messages": ROLES, "train": False},
        {"prompt": "Hi", "completion": "Go away", "label": False},
        {"dialog": ["Hi", "x" * 200_000]},
        {"utterances": crowd},
    ]
    dialogues, left_out, _ = dialogues_of(tmp_path, "a.jsonl", records)
    assert dialogues == [["Hi", "Ho"]]
    assert sorted(left_out.values()) == [1] * 6 + [2]
    assert {reason.split()[0] for reason in left_out} == {"system", "messages", "last", "dialogues"}


PERSONA = {"role": "system", "content": "You are Ada."}


@pytest.mark.parametrize(
    "record",
    [
        {"messages": [PERSONA, *ROLES]},
        {"system": "You are Ada.", "conversations": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Ho"}]},
        {"system": "You are Ada.", "dialog": ["Hi", "Ho"]},
    ],
)
def test_a_persona_opens_the_first_message_and_is_not_learned(tmp_path, tokenizer, record):
    dialogues, left_out, _ = dialogues_of(tmp_path, "a.jsonl", [record])
    assert dialogues == [["You are Ada.\nHi", "Ho"]] and not +left_out
    assert isinstance(dialogues[0][0], Unlearned) and not isinstance(dialogues[0][1], Unlearned)
    add_roles(tokenizer)
    ids = [token for turn in encode_dialogue(tokenizer, dialogues[0]) for token in turn]
    rendered = tokenizer.apply_chat_template([PERSONA, *ROLES], tokenize=False)
    assert tokenizer.decode(ids) == rendered == "<USER>You are Ada.\nHi<END><BOT>Ho<END>"


def test_a_persona_before_a_bot_that_opens_is_a_turn_by_itself(tmp_path, tokenizer):
    messages = [PERSONA, ROLES[1], *ROLES]
    dialogues, _, _ = dialogues_of(tmp_path, "a.jsonl", [{"messages": messages}])
    assert dialogues == [["You are Ada.", "Ho", "Hi", "Ho"]] and isinstance(dialogues[0][0], Unlearned)
    add_roles(tokenizer)
    rendered = tokenizer.apply_chat_template(messages, tokenize=False)
    assert rendered == "<USER>You are Ada.<END><BOT>Ho<END><USER>Hi<END><BOT>Ho<END>"
    with pytest.raises(Exception, match="system for the first message"):
        tokenizer.apply_chat_template([*ROLES, PERSONA], tokenize=False)


@pytest.mark.parametrize(
    "mark", [{"weight": 0}, {"weight": "0.0"}, {"masked": True}, {"train": False}, {"learn": 0}, {"mask": 1}]
)
def test_what_must_not_be_learned_carries_no_label(tmp_path, tokenizer, mark):
    messages = [ROLES[0], {"role": "assistant", "content": "WRONG", **mark}, *ROLES]
    dialogues, _, _ = dialogues_of(tmp_path, "a.jsonl", [{"messages": messages}])
    assert [isinstance(turn, Unlearned) for turn in dialogues[0]] == [False, True, False, False]
    add_roles(tokenizer)
    for learn, learned in (("bot", "Ho<END>"), ("both", "Hi<END>Hi<END>Ho<END>")):
        row = pack(encode(tokenizer, dialogues, 64).pieces, tokenizer, 64, learn)[0]
        assert "WRONG" in tokenizer.decode(row["input_ids"])
        assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == learned


def test_a_mark_that_cannot_be_obeyed_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"a\.jsonl:1: weight is '0\.5'"):
        dialogues_of(tmp_path, "a.jsonl", [{"messages": [ROLES[0], {**ROLES[1], "weight": 0.5}]}])


def test_a_dialogue_that_the_bot_opens_keeps_its_replies(tmp_path, tokenizer):
    messages = [{"role": "assistant", "content": "Welcome!"}, *ROLES]
    dialogues, _, _ = dialogues_of(tmp_path, "a.jsonl", [{"messages": messages}])
    assert dialogues == [["", "Welcome!", "Hi", "Ho"]]
    add_roles(tokenizer)
    row = pack(encode(tokenizer, dialogues, 64).pieces, tokenizer, 64, "bot")[0]
    assert tokenizer.decode(row["input_ids"]) == "<BOT>Welcome!<END><USER>Hi<END><BOT>Ho<END>"
    assert tokenizer.decode([label for label in row["labels"] if label != IGNORED]) == "Welcome!<END>Ho<END>"
    assert row["input_ids"] == tokenizer.apply_chat_template(messages, return_dict=False)


# ---- Splits -------------------------------------------------------------------------------------------------


def numbered(start, count):
    return "".join(json.dumps({"dialog": [f"Hi {n}", f"Ho {n}"]}) + "\n" for n in range(start, start + count))


def sizes(corpus):
    return len(corpus.train), len(corpus.validation), len(corpus.test)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (("training.jsonl", "dev.jsonl", "evaluation.jsonl"), (100, 7, 5)),
        (("train/a.jsonl", "val/a.jsonl", "testing/a.jsonl"), (100, 7, 5)),
        (("x-train-00.jsonl", "x-valid-00.jsonl", "x-eval-00.jsonl"), (100, 7, 5)),
    ],
)
def test_splits_by_the_names_that_the_hub_documents(tmp_path, names, expected):
    for name, (start, count) in zip(names, ((0, 100), (200, 7), (300, 5)), strict=True):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(numbered(start, count))
    corpus = load_corpus(str(tmp_path))
    assert sizes(corpus) == expected
    assert f"test from {names[2]}" in corpus.notes


def test_a_name_is_a_split_only_beside_other_splits(tmp_path):
    for number, name in enumerate(("dev", "ops", "support")):  # departments
        (tmp_path / name).mkdir()
        (tmp_path / name / "chats.jsonl").write_text(numbered(100 * number, 100))
    assert len(load_corpus(str(tmp_path)).train) > 250


def test_a_record_may_name_its_split(tmp_path):
    records = [{"dialog": [f"Hi {n}", "Ho"], "split": ("train", "dev", "test")[n % 3]} for n in range(30)]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    assert sizes(load_corpus(str(tmp_path / "a.jsonl"))) == (10, 10, 10)


def test_copies_in_hidden_folders_are_passed_over_and_what_is_not_read_is_named(tmp_path):
    for name in (".ipynb_checkpoints/a.jsonl", "._a.jsonl", "__MACOSX/a.jsonl", "a.jsonl"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(numbered(0, 100))
    for name in ("README.txt", "photo.jpg", "info.json"):
        (tmp_path / name).write_text('{"version": 1}' if name == "info.json" else "About these data.")
    corpus = load_corpus(str(tmp_path))
    assert sum(sizes(corpus)) == 100
    note = next(note for note in corpus.notes if note.startswith("not read: "))
    assert sorted(note.removeprefix("not read: ").split(", ")) == ["README.txt", "info.json", "photo.jpg"]


@pytest.mark.parametrize(("count", "least"), [(2, 1), (20, 2), (50, 5), (60, 5), (200, 5)])
def test_a_held_out_split_has_a_floor(tmp_path, count, least):
    for start in range(0, 5_000, 1_000):  # wherever the hash puts them
        (tmp_path / "a.jsonl").write_text(numbered(start, count))
        corpus = load_corpus(str(tmp_path / "a.jsonl"))
        assert len(corpus.validation) >= least and len(corpus.test) >= min(least, count // 10)
        assert sum(sizes(corpus)) == count and len(corpus.train) >= count // 2
        assert any("rough" in note for note in corpus.notes)


# ---- DailyDialog, in every layout in which it was published --------------------------------------------------


def released():
    """The release's texts, {split: text}."""
    texts = {}
    for split in ("train", "validation", "test"):
        with zipfile.ZipFile(DAILYDIALOG / f"{split}.zip") as archive:
            texts[split] = archive.read(f"{split}/dialogues_{split}.txt").decode()
    return texts


def in_tables(folder):
    for split, text in released().items():
        dialogues = [line.split("__eou__")[:-1] for line in text.splitlines() if line.strip()]
        lines = ["dialog,act,emotion", *('"' + repr(turns).replace('"', '""') + '","[1]","[0]"' for turns in dialogues)]
        (folder / f"{split}.csv").write_text("\n".join(lines))


def in_parquet(folder):
    for split, text in released().items():
        dialogues = [line.split("__eou__")[:-1] for line in text.splitlines() if line.strip()]
        (folder / split).mkdir()
        columns = {"dialog": dialogues, "act": [[1]] * len(dialogues)}
        parquet.write_table(pyarrow.table(columns), folder / split / "0000.parquet")


def in_folders(folder):
    for split, text in released().items():
        (folder / split).mkdir()
        (folder / split / f"dialogues_{split}.txt").write_text(text)
        (folder / split / f"dialogues_act_{split}.txt").write_text("1 2 1\n" * 9)


def in_one_archive(folder):
    """As ijcnlp_dailydialog.zip: three archives, and all dialogues once more in one file."""
    with zipfile.ZipFile(folder / "ijcnlp_dailydialog.zip", "w") as archive:
        for split in ("train", "validation", "test"):
            archive.write(DAILYDIALOG / f"{split}.zip", f"ijcnlp_dailydialog/{split}.zip")
        archive.writestr("ijcnlp_dailydialog/dialogues_text.txt", "".join(released().values()))
        archive.writestr("ijcnlp_dailydialog/dialogues_topic.txt", "1\n" * 9)
        archive.writestr("__MACOSX/ijcnlp_dailydialog/._train.zip", "x")


@pytest.fixture(scope="module")
def plain():
    return load_corpus(str(DAILYDIALOG))


@needs_dailydialog
@pytest.mark.parametrize("layout", [in_tables, in_parquet, in_folders, in_one_archive])
def test_dailydialog_in_each_layout(tmp_path, layout, plain):
    layout(tmp_path)
    corpus = load_corpus(str(tmp_path))
    assert (corpus.train, corpus.validation, corpus.test) == (plain.train, plain.validation, plain.test)
    assert corpus.licence == plain.licence and "NC" in corpus.licence
    assert "DailyDialog's tokenisation undone" in corpus.notes


@needs_dailydialog
def test_nothing_of_the_test_split_is_trained_on(tmp_path):
    with pytest.raises(UserError, match="DailyDialog's test split"):
        load_corpus(str(DAILYDIALOG / "test.zip"))
    (tmp_path / "dialogues_text.txt").write_text("".join(released().values()))
    for path in (tmp_path, tmp_path / "dialogues_text.txt"):
        with pytest.raises(UserError, match="DailyDialog's test split"):
            load_corpus(str(path))


# ---- Time and memory have bounds -----------------------------------------------------------------------------


def test_sizes_are_looked_at_before_anything_is_unpacked(tmp_path, monkeypatch):
    monkeypatch.setattr(readers, "LARGEST", 1 << 20)
    bomb = b'{"dialog": ["' + b"a" * (5 << 20) + b'", "b"]}'
    with zipfile.ZipFile(buffer := io.BytesIO(), "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.jsonl", bomb)
    table = pyarrow.table({"dialog": [["a" * (5 << 20), "b"]]})
    parquet.write_table(table, columns := io.BytesIO(), compression="zstd", use_dictionary=False)
    packed = {
        "a.zip": buffer.getvalue(),
        "a.jsonl.gz": gzip.compress(bomb),
        "a.jsonl.zst": pyarrow.compress(bomb, codec="zstd", asbytes=True),
        "a.parquet": columns.getvalue(),
        "a.jsonl": bomb,
    }
    for name, data in packed.items():
        with pytest.raises(UserError, match=rf"{name} has more than 0\.0 GB"):
            dialogues_of(tmp_path, name, data)


def test_archives_in_archives_end_somewhere(tmp_path):
    data = numbered(0, 2).encode()
    for _ in range(9):
        data = gzip.compress(data)
    with pytest.raises(UserError, match="more than 3 deep"):
        dialogues_of(tmp_path, "a.gz", data)


def test_only_the_columns_that_matter_are_read(tmp_path):
    far = pyarrow.array([2**62, 1], pyarrow.int64()).cast(pyarrow.timestamp("us"))
    latin = pyarrow.StringArray.from_buffers(2, *pyarrow.array([b"\xff", b"a"]).buffers()[1:])
    good = {"dialog": [["Hi", "Ho"]] * 2, "remark": latin, "far_away": far}
    parquet.write_table(pyarrow.table(good), tmp_path / "a.parquet")
    assert read(tmp_path / "a.parquet")[0] == [["Hi", "Ho"]] * 2
    parquet.write_table(pyarrow.table({"prompt": latin, "response": latin}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match=r"b\.parquet is no readable Parquet file"):
        read(tmp_path / "b.parquet")


def test_memory_that_ends_is_one_line_with_the_files_name(tmp_path, monkeypatch):
    def fail(*_):
        raise MemoryError

    monkeypatch.setattr(readers, "_text", fail)
    with pytest.raises(UserError, match=r"a\.jsonl cannot be read"):
        dialogues_of(tmp_path, "a.jsonl", numbered(0, 2))


@pytest.mark.parametrize("suffix", [".json", ".jsonl", ".csv", ".txt"])
def test_nesting_without_end_is_one_line(tmp_path, suffix):
    deep = "[" * 100_000 + "]" * 100_000
    with pytest.raises(UserError, match="a" + suffix):
        dialogues_of(tmp_path, "a" + suffix, f"dialog\n{deep}\n" if suffix == ".csv" else deep)


def test_a_folder_whose_name_is_not_utf8(tmp_path):
    import os

    folder = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
    os.mkdir(folder)
    with open(os.path.join(folder, b"ch\xe2t.jsonl"), "wb") as file:
        file.write(numbered(0, 100).encode())
    corpus = load_corpus(os.fsdecode(folder))
    assert sum(sizes(corpus)) == 100
    assert all(isinstance(note.encode(), bytes) for note in [corpus.source, *corpus.notes])


# ---- Writing without white space ------------------------------------------------------------------------------


def test_where_nothing_parts_words_characters_stand_in_their_place():
    assert words("Hi  there,\n naïve 👋🏽 C++") == ["Hi", "there,", "naïve", "👋🏽", "C++"]
    assert words("我喜欢茶，and you?") == ["我", "喜", "欢", "茶", "，and", "you?"]
    assert words("カタカナ") == list("カタカナ") and len(words("สวัสดี")) == 6
    assert words("안녕 하세요") == ["안녕", "하세요"], "Korean parts its words"
    tokenizer = byte_tokenizer()
    add_roles(tokenizer)
    turns = encode_dialogue(tokenizer, ["你好吗？", "我很好谢谢", "再见", "see you soon"])
    assert text_size(turns, tokenizer) == (5 + 3, 5 + 12)
    said = [Reply("我喜欢你我喜欢你", True), Reply("我很好", True), Reply("你去哪里", True)]
    found = measure(said, ["你好", "你好吗", "你去哪里呢"])(np.arange(3))
    assert found["words"] == 5 and found["share_that_repeats"] == found["share_that_parrots"] == pytest.approx(1 / 3)


def test_leaks_are_seen_where_nothing_parts_words():
    talk = ["这个周末你想和我们一起去海边吗", "好啊我很想去我们几点出发呢"]
    corpus = Corpus([talk, ["你好", "再见"]], [["早上好", "早", *talk]], [], "", None, [])
    assert without_leaks(corpus).train == [["你好", "再见"]]


def test_characters_are_whole_in_the_plans_example(capsys):
    tokenizer = byte_tokenizer()
    add_roles(tokenizer)
    row = pack(encode(tokenizer, [["你好 👋🏽", "我很好 🎉"]], 128).pieces, tokenizer, 128, "bot")[0]
    show.example(Console(width=200), tokenizer, row)
    assert "<USER>你好 👋🏽<END><BOT>我很好 🎉<END>" in capsys.readouterr().out
