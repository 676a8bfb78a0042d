"""Every way in for dialogues, and every way in which a file can be wrong."""

import json
import os
import zipfile
from collections import Counter

import pytest
from conftest import DAILYDIALOG, needs_dailydialog
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dialogue.data.corpus import hold_out
from dialogue.data.sources import DAILYDIALOG_SIZES, SOURCES, load_corpus, read_path
from dialogue.data.speakers import ONE_TURN, SYSTEM
from dialogue.errors import UserError

TALK = [["Hi there .", "Hello !"], ["How are you ?", "Fine .", "Good ."]] * 20


def write(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read_file(path, left_out):
    """The dialogues at `path`, as they stand in the data."""
    return [turns for dialogues in read_path(path, left_out, [])[0].values() for turns, _ in dialogues]


def eou(dialogues):
    return "".join(" __eou__ ".join(turns) + " __eou__\n" for turns in dialogues)


def test_each_format_gives_the_same_dialogues(tmp_path):
    import pyarrow
    from pyarrow import parquet

    parquet.write_table(pyarrow.table({"dialog": TALK}), tmp_path / "a.parquet")
    with zipfile.ZipFile(tmp_path / "train.zip", "w") as archive:
        archive.writestr("train/dialogues_train.txt", eou(TALK))
        archive.writestr("train/dialogues_act_train.txt", "1 2\n" * 9)
    csv_rows = "id,text\n" + "".join(f"{n},{turn}\n" for n, turns in enumerate(TALK) for turn in turns)
    files = [
        write(tmp_path, "a.jsonl", "".join(json.dumps({"dialog": turns}) + "\n" for turns in TALK)),
        write(tmp_path, "dialogues_a.txt", eou(TALK)),
        write(tmp_path, "windows.txt", b"\xef\xbb\xbf" + eou(TALK).replace("\n", "\r\n").encode()),
        write(tmp_path, "rows.csv", csv_rows),
        write(tmp_path, "lists.csv", "dialog\n" + "".join(f'"{" __eou__ ".join(turns)}"\n' for turns in TALK)),
        tmp_path / "a.parquet",
        tmp_path / "train.zip",
    ]
    for file in files:
        assert read_file(file, Counter()) == TALK, file.name


def test_messages_alternate_and_keep_their_text(tmp_path):
    messages = [
        {"role": "assistant", "content": "Welcome!"},
        {"role": "system", "content": "Be nice."},
        {"role": "user", "content": "I use  .NET ."},
        {"role": "user", "content": "And you ?"},
        {"role": "assistant", "content": "Python ."},
    ]
    path = write(tmp_path, "a.jsonl", json.dumps({"messages": messages}) + '\n{"dialog": ["alone"]}\n')
    skipped = Counter()
    assert read_file(path, skipped) == [["", "Welcome!", "I use  .NET .\nAnd you ?", "Python ."]]
    assert +skipped == {SYSTEM: 1, ONE_TURN: 1}


def test_no_control_character_and_no_half_emoji_reaches_the_tokenizer(tmp_path):
    messages = [{"role": "user", "content": "Hi\0 \ud83d"}, {"role": "assistant", "content": "Oh\x07"}]
    both = [{"messages": messages}, {"dialog": ["Hi\0 \ud83d", "Oh\x07"]}]
    path = write(tmp_path, "a.jsonl", "".join(json.dumps(record) + "\n" for record in both))
    assert read_file(path, Counter()) == [["Hi", "Oh"]] * 2


def test_splits_by_name_or_held_out_the_same_way_each_time(tmp_path):
    lines = "".join(json.dumps({"dialog": [f"Hi {n}", f"Hello {n}"]}) + "\n" for n in range(400))
    alone = write(tmp_path, "talk.jsonl", lines)
    corpus = load_corpus(str(alone))
    assert len(corpus.train) + len(corpus.validation) + len(corpus.test) == 400
    assert 5 <= len(corpus.validation) <= 40
    assert corpus == load_corpus(str(alone))
    folder = tmp_path / "named"
    folder.mkdir()
    for name, count in (("my_train.jsonl", 5), ("valid.jsonl", 3), ("test-1.jsonl", 2)):
        write(folder, name, "".join(lines.splitlines(keepends=True)[:count]))
    corpus = load_corpus(str(folder))
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (5, 3, 2)


def numbered(start, count):
    return "".join(json.dumps({"dialog": [f"Hi {n}", f"Hello {n}"]}) + "\n" for n in range(start, start + count))


def test_splits_by_the_names_of_folders(tmp_path):
    for number, name in enumerate(("train", "validation", "test")):
        (tmp_path / name).mkdir()
        write(tmp_path / name, "part-0.jsonl", numbered(100 * number, 5 - number))
    corpus = load_corpus(str(tmp_path))
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (5, 4, 3)
    assert corpus.test[0] == ["Hi 200", "Hello 200"], "held-out dialogues must not be trained on"


def test_a_single_file_is_trained_on_whatever_its_name(tmp_path):
    corpus = load_corpus(str(write(tmp_path, "test.jsonl", numbered(0, 100))))
    assert len(corpus.train) > 80 and corpus.validation


def test_two_dialogues_are_enough():
    for start in range(0, 2_000, 2):  # wherever the hash puts them
        pool = [[f"Hi {n}", "Hello"] for n in (start, start + 1)]
        parts = hold_out(pool, ["validation", "test"])
        assert len(parts["train"]) == len(parts["validation"]) == 1
        assert not parts["test"]


@pytest.mark.parametrize("dataset", ["", "~nobody-of-this-name/a.jsonl", "x" * 5_000 + ".jsonl", "a\0b.jsonl"])
def test_a_path_that_cannot_be_is_a_user_error(dataset):
    with pytest.raises(UserError, match=r"does not exist|there is no dataset"):
        load_corpus(dataset)


def hub_cache(folder, repository, sizes):
    """The hub client's cache as a download of `sizes` dialogues would leave it."""
    import pyarrow
    from pyarrow import parquet

    cached = folder / f"datasets--{repository.replace('/', '--')}"
    commit = "0" * 40
    (cached / "refs/refs/convert").mkdir(parents=True)
    write(cached / "refs/refs/convert", "parquet", commit)
    for name, size in sizes.items():
        file = cached / "snapshots" / commit / "default" / name / "0000.parquet"
        file.parent.mkdir(parents=True)
        parquet.write_table(pyarrow.table({"dialog": [["Hi there .", "Hello !"]] * size}), file)


def test_dailydialog_from_the_cache_without_a_network(tmp_path, monkeypatch):
    """A source that has not all of it is passed over, and the next is used."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    hub_cache(tmp_path, SOURCES[0][0], {"train": 3, "validation": 2, "test": 1})
    with pytest.raises(UserError, match=f"{SOURCES[0][0]}: has .*3.*expected .*11118"):
        load_corpus("dailydialog")
    hub_cache(tmp_path, SOURCES[1][0], DAILYDIALOG_SIZES)
    corpus = load_corpus("dailydialog")
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (11_118, 1_000, 1_000)
    assert corpus.train[0] == ["Hi there.", "Hello!"]
    assert "NC" in (corpus.licence or "")


@needs_dailydialog
def test_the_real_release():
    corpus = load_corpus(str(DAILYDIALOG))
    assert (len(corpus.train), len(corpus.validation), len(corpus.test)) == (11_118, 1_000, 1_000)
    assert "NC" in (corpus.licence or "")
    assert corpus.validation[0][:2] == [
        "Good morning, sir. Is there a bank near here?",
        "There is one. 5 blocks away from here?",
    ]


def test_a_folder_of_that_name_is_not_the_dataset(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dailydialog").mkdir()
    write(tmp_path / "dailydialog", "a.jsonl", json.dumps({"dialog": ["Hi", "Hello"]}) + "\n")
    with pytest.raises(UserError, match=r"--preset starter.*--dataset PATH.*li2017dailydialog"):
        load_corpus("dailydialog")


GOOD = b'{"dialog": ["a", "b"]}\n'
WRONG = {
    "nowhere.jsonl": (None, "does not exist"),
    "empty.jsonl": (b"", "is empty"),
    "blank.jsonl": (b"\n\n \n", "no dialogue"),
    "line.jsonl": (GOOD + b'{"dialog": ["a"\n', "line.jsonl:2: not a line of JSON"),
    "shape.jsonl": (GOOD + b'{"text": "a"}\n', "shape.jsonl:2: not a dialogue"),
    "number.jsonl": (b'{"dialog": [1, 2]}\n', "number.jsonl:1"),
    "list.jsonl": (b"[1]\n", "list.jsonl, item 1"),
    "role.jsonl": (b'{"messages": [{"role": "cat", "content": "miau"}]}\n', "role.jsonl:1"),
    "deep.jsonl": (b'{"dialog": ' + b"[" * 100_000 + b"]" * 100_000 + b"}\n", "deep.jsonl"),
    "latin.jsonl": (GOOD + '{"dialog": ["é", "b"]}'.encode("latin-1"), "latin.jsonl:2: not UTF-8"),
    "utf16.txt": ("a __eou__ b".encode("utf-16"), "not UTF-8"),
    "alone.jsonl": (
        b'{"dialog": ["a"]}\n{"dialog": ["", " "]}\n',
        "no dialogue of two turns or more; text taken as it is; dialogues of fewer than two turns left out: 2",
    ),
    "one.jsonl": (GOOD, "too few"),
    "broken.zip": (b"PK\x03\x04 nothing", "cannot be read (File is not a zip file)"),
    "broken.parquet": (b"PAR1 nothing", "no readable Parquet"),
    "columns.csv": (b"a,b\n1,2\n", "columns"),
    "cell.csv": (b"dialog\nhello\n", "cell.csv:2"),
    "song.mp3": (b"ID3", "unknown kind of file"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_in_one_line(name, tmp_path):
    content, said = WRONG[name]
    if content is not None:
        write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        load_corpus(str(tmp_path / name))
    assert said in str(error.value)
    assert "\n" not in str(error.value)


def test_a_zip_without_dialogues_and_an_empty_folder(tmp_path):
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("readme.txt", "hello")
    with pytest.raises(UserError, match="no data file"):
        load_corpus(str(tmp_path / "other.zip"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match="no data file"):
        load_corpus(str(tmp_path / "empty"))


@pytest.mark.skipif(getattr(os, "geteuid", lambda: 0)() == 0, reason="root may read everything")
def test_no_permission(tmp_path):
    path = write(tmp_path, "a.jsonl", GOOD)
    path.chmod(0)
    with pytest.raises(UserError, match="cannot be read"):
        load_corpus(str(path))


def test_an_unknown_name_is_no_dataset():
    with pytest.raises(UserError, match="choose dailydialog, chitchat"):
        load_corpus("movies")


def holds_dialogues_or_says_why_not(path):
    try:
        dialogues = read_file(path, Counter())
    except UserError as error:
        assert "\n" not in str(error)
    else:
        assert all(isinstance(turn, str) for turns in dialogues for turn in turns)
        assert all(all(turns[1:]) and sum(map(bool, turns)) >= 2 for turns in dialogues), "only the first may be empty"


ANY_JSON = st.recursive(
    st.none() | st.booleans() | st.floats() | st.integers() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=4)
        | st.dictionaries(st.sampled_from(["dialog", "messages", "role", "content", "user", "text"]), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(records=st.lists(ANY_JSON, max_size=4))
def test_any_json_is_dialogues_or_a_user_error(records, tmp_path):
    path = write(tmp_path, "fuzz.jsonl", "".join(json.dumps(record) + "\n" for record in records))
    holds_dialogues_or_says_why_not(path)


@pytest.mark.parametrize("suffix", [".jsonl", ".txt", ".csv", ".zip", ".parquet"])
@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.binary(max_size=200) | st.text(max_size=120).map(str.encode) | st.sampled_from([GOOD, b"a __eou__ b\0\n"])
)
def test_any_bytes_are_dialogues_or_a_user_error(suffix, data, tmp_path):
    path = write(tmp_path, f"fuzz{suffix}", data)
    holds_dialogues_or_says_why_not(path)
