"""The hub path, with the real clients against a stand-in on loopback: faults, a warm cache, uploads."""

import io
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow
import pytest
from conftest import byte_tokenizer, save_random_gpt2
from pyarrow import parquet
from stand_in_hub import Hub
from transformers import TrainingArguments

import Fine_tuningmodel as script
from dialogue import hub as hub_module
from dialogue.chat.engine import load
from dialogue.data.sources import DAILYDIALOG_SIZES, SOURCES, load_corpus
from dialogue.errors import UserError, exit_code
from dialogue.models import load_config

ROOT = Path(__file__).resolve().parents[1]
QUICK = ["--max_steps", "2", "--max_train_dialogues", "16", "--max_length", "96", "--per_device_train_batch_size", "2"]


def dailydialog():
    """Parquet files of DailyDialog's shape and sizes, of made-up dialogues."""
    files = {}
    for split, size in DAILYDIALOG_SIZES.items():
        table = {"dialog": [[f"Is it {split} {n} ?", "Yes , it is ."] for n in range(size)]}
        parquet.write_table(pyarrow.table(table), buffer := io.BytesIO())
        files[f"default/{split}/0000.parquet"] = buffer.getvalue()
    return files


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    """Folder of a GPT-2 with random weights and 257 tokens."""
    return save_random_gpt2(tmp_path_factory.mktemp("tiny") / "gpt2", byte_tokenizer())


@pytest.fixture
def hub(tiny):
    model = {file.name: file.read_bytes() for file in tiny.iterdir()}
    files = {"tiny/gpt2": model, SOURCES[0][0]: {}, SOURCES[1][0]: dailydialog()}
    with Hub(files, gated=["gated/gpt2"]) as running:
        yield running


@pytest.fixture
def online(hub, monkeypatch, tmp_path):
    """This process as if started with HF_ENDPOINT, HF_TOKEN and an empty cache."""
    constants = "huggingface_hub.constants"
    monkeypatch.setattr(f"{constants}.ENDPOINT", hub.endpoint)
    template = "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(f"{constants}.HUGGINGFACE_CO_URL_TEMPLATE", hub.endpoint + template)
    monkeypatch.setattr(f"{constants}.HF_HUB_OFFLINE", False)
    monkeypatch.setattr(f"{constants}.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("transformers.utils.hub._hf_api", None)  # it may have been made for the real hub
    monkeypatch.setenv("HF_TOKEN", hub.token)
    monkeypatch.chdir(tmp_path)
    hub_module.reachable.cache_clear()
    yield hub
    hub_module.reachable.cache_clear()


def run(folder, hub, *flags, **environment):
    """The script in a process of its own, with an empty or warm cache in `folder`."""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), **environment}
    command = [sys.executable, str(ROOT / "Fine_tuningmodel.py"), "--base_model", "tiny/gpt2", *QUICK, *flags]
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=300)


def test_a_whole_run_from_a_hub_with_faults_and_again_from_its_cache(hub, tmp_path):
    hub.faults = {
        ("GET", "config.json"): ["slow"],
        ("GET", "model.safetensors"): ["cut", "cut"],
        ("GET", "default/train/0000.parquet"): ["cut"],
    }
    first = run(tmp_path, hub, HF_HUB_OFFLINE="0")
    assert first.returncode == 0, first.stderr
    assert "DailyDialog" in first.stdout
    assert [path for method, path, _ in hub.requests if method == "GET"].count("model.safetensors") == 3
    assert not [path for method, path, _ in hub.requests if method == "POST"], "something was uploaded, unasked"
    assert load(str(tmp_path / "gpt2-dialogue-full"), "float32").limit == 256

    hub.requests.clear()
    again = run(tmp_path, hub, "--plan", HF_HUB_OFFLINE="1")
    assert again.returncode == 0, again.stderr
    assert "16 of DailyDialog" in again.stdout
    assert hub.requests == []


def test_what_the_hub_refuses_is_one_line(online):
    for name in ("gated/gpt2", "nobody/nothing"):
        with pytest.raises(UserError, match=rf"^base model {name} cannot be loaded[^\n]*$"):
            load_config(name)
    online.faults[("HEAD", "config.json")] = [503]  # a moment later it answers
    assert load_config("tiny/gpt2").n_layer == 2


def test_a_download_that_broke_off_goes_on_where_it_was(online, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 1024)  # of 10 MB, what is kept
    path = "default/train/0000.parquet"
    online.faults[("GET", path)] = ["cut", "cut"]
    assert len(load_corpus("dailydialog").train) == DAILYDIALOG_SIZES["train"]
    size = len(online.files[SOURCES[1][0]][path])
    starts = [int(part.strip("bytes=-")) for _, name, part in online.requests if name == path and part]
    assert size // 2 - 1024 < starts[0] < starts[1] < size


def test_push_to_hub(online, tiny, tmp_path, capsys):
    talk = tmp_path / "talk.jsonl"
    talk.write_text("".join(json.dumps({"dialog": [f"Hi {n}", "Hello"]}) + "\n" for n in range(40)))
    flags = ["--dataset", str(talk), *QUICK, "--push_to_hub", "--hub_model_id", "chatty", "--save_steps", "1"]
    flags += ["--hub_token", online.token]
    script.main([*flags, "--base_model", "tiny/gpt2", "--save_strategy", "steps"])
    assert f"Uploaded: {online.endpoint}/someone/chatty-lora" in capsys.readouterr().out.replace("\n", "")
    for repository, folder in (("someone/chatty", "gpt2-dialogue-full"), ("someone/chatty-lora", "gpt2-dialogue-lora")):
        written = {str(file.relative_to(folder)): file.read_bytes() for file in Path(folder).rglob("*")}
        assert online.files[repository] == written
        assert not any(online.token.encode() in content for content in written.values()), "the token was uploaded"
    assert all(b"Repeat with" in online.files[name]["README.md"] for name in ("someone/chatty", "someone/chatty-lora"))
    commits = [path for method, path, _ in online.requests if method == "POST" and "/commit/" in path]
    assert len(commits) == 2, "a checkpoint was uploaded"
    assert load("someone/chatty", "float32").limit == 256

    # Adapters of a base in a folder are of no use to anyone else.
    adapters = tmp_path / "gpt2-dialogue-lora"
    config = json.loads((adapters / "adapter_config.json").read_text())
    (adapters / "adapter_config.json").write_text(json.dumps(config | {"base_model_name_or_path": str(tiny)}))
    hub_module.push(
        adapters, tmp_path / "gpt2-dialogue-full", TrainingArguments(hub_model_id="other", hub_token=online.token)
    )
    assert "someone/other" in online.files and "someone/other-lora" not in online.files


def test_push_without_a_login_is_said_before_the_run(online, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("HF_TOKEN", "wrong")
    assert exit_code(lambda: script.main(["--push_to_hub", "--base_model", "tiny/gpt2", *QUICK])) == 2
    assert "hf auth login" in capsys.readouterr().err
    assert not list(tmp_path.glob("*gpt2*"))
    with pytest.raises(UserError, match=r"was not uploaded.*hf upload chatty"):
        (tmp_path / "adapter_config.json").write_text('{"base_model_name_or_path": "gpt2"}')
        hub_module.push(tmp_path, tmp_path, TrainingArguments(hub_model_id="chatty"))


def test_the_login_that_the_documents_name(hub, tmp_path):
    environment = {name: value for name, value in os.environ.items() if name not in ("HF_TOKEN", "HF_HUB_OFFLINE")}
    environment |= {"HF_ENDPOINT": hub.endpoint, "HF_HOME": str(tmp_path)}
    program = Path(sys.executable).with_name("hf")
    command = [str(program), "auth", "login", "--token", hub.token]
    said = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, check=False)
    assert said.returncode == 0, said.stderr
    assert (tmp_path / "token").read_text() == hub.token


def load_in_a_process(folder, hub, name):
    """`load_corpus` in a process of its own: `datasets` reads the endpoint when it is imported."""
    code = f"""
from dialogue.data.sources import load_corpus
from dialogue.errors import UserError
try:
    corpus = load_corpus({name!r})
    print(len(corpus.train), len(corpus.validation), len(corpus.test), corpus.train[0], corpus.notes)
except UserError as error:
    print("error:", error)
"""
    environment = {**os.environ, "HF_ENDPOINT": hub.endpoint, "HF_HOME": str(folder / "hf"), "HF_HUB_OFFLINE": "0"}
    found = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300
    )
    assert found.returncode == 0, found.stderr
    return found.stdout


def test_any_dataset_of_the_hub_by_its_name(hub, tmp_path):
    def chats(count, start):
        messages = [
            [{"from": "human", "value": f"Hi {start + n}"}, {"from": "gpt", "value": "Ho"}] for n in range(count)
        ]
        return "".join(json.dumps({"conversations": one, "n": 1}) + "\n" for one in messages).encode()

    code = f"open({str(tmp_path / 'ran')!r}, 'w')".encode()
    hub.files["someone/chats"] = {"data/train.jsonl": chats(90, 0), "data/test.jsonl": chats(9, 100)}
    hub.files["someone/script"] = {"script.py": code}
    said = load_in_a_process(tmp_path, hub, "someone/chats")
    assert "['Hi " in said and "'train from train', 'test from test'" in said
    train, validation, test = map(int, said.split()[:3])
    assert (train + validation, test) == (90, 9)
    for name in ("someone/script", "nobody/nothing"):
        said = load_in_a_process(tmp_path, hub, name)
        assert said.startswith(f"error: {name} is no path here, and no dataset that the hub gives")
    assert not (tmp_path / "ran").exists(), "code of a repository ran"
