"""What people, disks and downloads can get wrong: each ends with one clear line, or is handled and counted.

Files of dialogues have a table of their own in test_corpus.py, broken model folders in test_generation.py.
"""

import io
import json
import os
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import byte_tokenizer, save_random_gpt2
from safetensors.torch import load_file, save_file

import Fine_tuningmodel as script
import main as chat
from dialogue import evaluate, export, machine, storage
from dialogue.errors import UserError, exit_code
from dialogue.prompt import add_roles
from dialogue.train import trainer

DIALOGUE = {"dialog": ["Hello, how are you?", "Fine, thank you."]}
GOOD = "".join(json.dumps({"dialog": [f"Hello {n}", f"And you, {n}?"]}) + "\n" for n in range(30))


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A small base model, as a download would look."""
    return save_random_gpt2(tmp_path_factory.mktemp("base") / "base", byte_tokenizer(), width=16, heads=2, layers=1)


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """A small dialogue model with a manifest."""
    tokenizer = byte_tokenizer()
    add_roles(tokenizer)
    folder = save_random_gpt2(tmp_path_factory.mktemp("chat") / "merged", tokenizer, width=16, heads=2, layers=1)
    (folder / "generation_config.json").write_text('{"temperature": 0.7}')
    storage.seal(folder)
    return folder


@pytest.fixture
def here(tmp_path, monkeypatch):
    """The working directory, with good data and nothing else."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "talk.jsonl").write_text(GOOD)
    return tmp_path


def write(name, content):
    """Write a file of text or bytes in the working directory."""
    path = os.path.join(os.getcwd(), name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "wb") as file:
        file.write(content if isinstance(content, bytes) else content.encode("utf-8", "surrogatepass"))


def one_line(captured, said):
    """Standard error ends with one line that says `said`, and no control sequence is anywhere."""
    lines = captured.err.strip().splitlines()
    assert lines and lines[-1].startswith("error: ") and re.search(said, lines[-1]), captured.err
    assert "Traceback" not in captured.err
    assert not set(captured.out + captured.err) & set("\x1b\x07\x9b\u202e"), captured
    return lines[-1]


# ---- Training: the dataset ---------------------------------------------------------------------------

WRONG_DATA = {
    "NUL bytes": ("nul.jsonl", b"\0" * 5000, "not a line of JSON"),
    "half a number": ("int.jsonl", '{"dialog": ' + "1" * 5000 + "}\n", "int.jsonl:1"),
    "nothing but blank turns": ("blank.jsonl", '{"dialog": [" ", "\\t"]}\n' * 5, "no dialogue of two turns"),
    "one speaker only": (
        "one.jsonl", json.dumps({"messages": [{"role": "user", "content": "Hi"}] * 3}) + "\n",
        "fewer than two turns left out: 1",
    ),
    "the assistant alone": (
        "bot.jsonl", json.dumps({"messages": [{"role": "assistant", "content": "Hi"}] * 2}) + "\n", "no dialogue",
    ),
    "content that is a number": ("n.jsonl", '{"messages": [{"role": "user", "content": 5}]}\n', "n.jsonl:1"),
    "turns that are null": ("null.jsonl", '{"dialog": null}\n', "null.jsonl:1"),
    "a string for a list": ("string.jsonl", '{"dialog": "Hi"}\n', "string.jsonl:1"),
    "an HTML page": ("page.jsonl", "<!DOCTYPE html>\n<html></html>\n", "page.jsonl:1"),
    "a truncated gzip": ("a.jsonl", b"\x1f\x8b\x08\x00" + b"\xff" * 40, "a.jsonl cannot be read"),
    "a quote that never ends": ("quote.csv", 'dialog\n"[""a"", ""b""]\n' * 3, "quote.csv"),
    "a table without rows": ("header.csv", "dialog\n", "columns|no dialogue"),
    "a name full of commands": ("\x1b[31mred\u202e\n[bold].jsonl", "{", "red"),
    "a name that ends in no known way": ("talk.docx", b"PK", "unknown kind of file"),
    "an empty file among good ones": ("folder/empty.jsonl", "", "empty.jsonl is empty"),
    "dialogues longer than the context": ("long.jsonl", json.dumps({"dialog": ["a " * 50_000] * 2}) + "\n", "too few"),
}  # fmt: skip


def train(base, *flags):
    """Exit code of the training script on good data, unless `flags` say otherwise."""
    usual = [
        "--base_model",
        str(base),
        "--dataset",
        "talk.jsonl",
        "--max_steps",
        "1",
        "--per_device_train_batch_size",
        "2",
    ]
    return exit_code(lambda: script.main([*usual, *flags]))


@pytest.mark.parametrize("what", WRONG_DATA)
def test_wrong_data(what, base, here, capsys):
    name, content, said = WRONG_DATA[what]
    write(name, content)
    assert train(base, "--dataset", "./" + name.split("/")[0]) == 2
    one_line(capsys.readouterr(), said)
    assert not (here / "gpt2-dialogue-lora").exists()


def test_a_folder_of_links_in_a_circle(base, here, capsys):
    (here / "loop").symlink_to("loop")
    assert train(base, "--dataset", "./loop") == 2
    one_line(capsys.readouterr(), "loop. does not exist")
    (here / "data").mkdir()
    (here / "data/again").symlink_to(here / "data")
    (here / "data/dangling.jsonl").symlink_to("nowhere")
    assert train(base, "--dataset", "./data") == 2
    one_line(capsys.readouterr(), "holds no data file")


@pytest.mark.parametrize("name", ["/dev/zero", "/dev/null", "./pipe"])
def test_a_device_or_a_pipe_is_no_data(name, base, here, capsys):
    os.mkfifo("pipe")
    assert train(base, "--dataset", name) == 2
    one_line(capsys.readouterr(), f"{name.strip('./')} is a device or a pipe")


ODD_DATA = {
    "byte order mark and Windows line ends": b"\xef\xbb\xbf" + GOOD.replace("\n", "\r\n").encode(),
    "control tokens in the text": GOOD + json.dumps({"dialog": ["<END><USER>", "<|endoftext|><BOT>"]}) + "\n",
    "terminal commands in the text": GOOD + json.dumps({"dialog": ["\x1b[31mred\u202e", "\x9b2J\x07[/bold]"]}) + "\n",
    "100,000 characters in a message": GOOD + json.dumps({"dialog": ["a" * 100_000, "b", "c", "d"]}) + "\n",
    "a line of ten megabytes": GOOD + json.dumps({"dialog": ["a", "b"], "junk": "x" * 10_000_000}) + "\n",
    "half an emoji": GOOD + '{"dialog": ["\\ud83d", "Hi", "Yes \\udc4b"]}\n',
    "NaN, which is no JSON": GOOD + '{"dialog": ["a", "b"], "score": NaN}\n',
    "empty turns": GOOD + '{"dialog": ["", "a", " ", "b", ""]}\n',
}  # fmt: skip


@pytest.mark.parametrize("what", ODD_DATA)
def test_odd_data_is_handled(what, base, here, capsys):
    name = "odd [/red]\x1b[1m.jsonl"
    write(name, ODD_DATA[what])
    assert train(base, "--dataset", "./" + name, "--plan") == 0
    captured = capsys.readouterr()
    assert not set(captured.out + captured.err) & set("\x1b\x07\x9b\u202e"), captured
    assert "odd [/red].jsonl" in captured.out
    if "100,000" in what:
        assert "they exceed 256 tokens: 2" in " ".join(captured.out.split())


# ---- Training: the base model ------------------------------------------------------------------------


def change_json(folder, name, **values):
    content = json.loads((folder / name).read_text())
    (folder / name).write_text(json.dumps({**content, **values}))


def change_weights(folder, change):
    path = folder / "model.safetensors"
    save_file(
        {name: change(name, weight).contiguous() for name, weight in load_file(path).items()}, path, {"format": "pt"}
    )


def to_pickle(folder):
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def with_code(folder):
    (folder / "evil.py").write_text("open('owned', 'w')\nraise SystemExit(77)")
    names = {"AutoConfig": "evil.Config", "AutoModelForCausalLM": "evil.Model"}
    change_json(folder, "config.json", model_type="evil", auto_map=names)


def lowering(folder):
    content = json.loads((folder / "tokenizer.json").read_text())
    (folder / "tokenizer.json").write_text(json.dumps({**content, "normalizer": {"type": "Lowercase"}}))


def without_length(folder):
    """Of a family without positions."""
    from transformers import BloomConfig

    BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=2).save_pretrained(folder)


def cut(name, keep=0.5):
    def change(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * keep)])

    return change


WRONG_BASE = {
    "an empty folder": (lambda f: [p.unlink() for p in f.iterdir()], "cannot be loaded"),
    "no config": (lambda f: (f / "config.json").unlink(), "cannot be loaded"),
    "a config cut in half": (cut("config.json"), "cannot be loaded"),
    "a config that is a list": (lambda f: (f / "config.json").write_text("[1]"), "cannot be loaded"),
    "an unknown kind of model": (lambda f: change_json(f, "config.json", model_type="abacus"), "abacus|model_type"),
    "a model that is no language model": (lambda f: change_json(f, "config.json", model_type="vit"), "ViT|be loaded"),
    "a config of nonsense": (lambda f: change_json(f, "config.json", n_head=0), "cannot be loaded|n_head"),
    "a config of text for numbers": (lambda f: change_json(f, "config.json", n_embd="many"), "cannot be loaded"),
    "a context of three tokens": (lambda f: change_json(f, "config.json", n_positions=3), "--max_length|be loaded"),
    "weights cut short": (cut("model.safetensors"), "cannot be loaded"),
    "weights of zero bytes": (cut("model.safetensors", 0), "cannot be loaded"),
    "weights that are text": (lambda f: (f / "model.safetensors").write_text("hello"), "cannot be loaded"),
    "pickled weights only": (to_pickle, "safetensors"),
    "weights of another shape": (
        lambda f: change_weights(f, lambda n, w: w[:5] if "wte" in n else w), "cannot be loaded|shape",
    ),
    "weights that are missing": (lambda f: change_json(f, "config.json", n_layer=3), "weights are missing"),
    "weights that are NaN": (lambda f: change_weights(f, lambda n, w: w * torch.nan), "not finite|broken"),
    "weights that are integers": (
        lambda f: change_weights(f, lambda n, w: w.to(torch.int32)), "not finite|broken|no gradient",
    ),
    "no tokenizer": (lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "tokenizer"),
    "a tokenizer cut in half": (cut("tokenizer.json"), "cannot be loaded|tokenizer"),
    "a tokenizer of zero bytes": (cut("tokenizer.json", 0), "cannot be loaded|tokenizer"),
    "a tokenizer that lowers": (lowering, r"does not give text back as it was \('Hello, you!' becomes 'hello, you!'\)"),
    "a config without a length": (without_length, r"no context length \(max_position_embeddings\)"),
    "code beside the model": (with_code, "trust_remote_code|cannot be loaded"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG_BASE)
def test_wrong_base_model(what, base, here, capsys):
    shutil.copytree(base, here / "model")
    change, said = WRONG_BASE[what]
    change(here / "model")
    assert train("./model") == 2
    one_line(capsys.readouterr(), said)
    assert not list(here.glob("*gpt2-dialogue*")) and not (here / "owned").exists()


# ---- Training: flags and folders ---------------------------------------------------------------------

WRONG_FLAGS = [
    (["--max_train_dialogues", "-1"], "not a positive number"),
    (["--max_length", "many"], "max_length"),
    (["--early_stopping_patience", "-1"], "not a positive number"),
    (["--learning_rate", "nan"], "learning_rate"),
    (["--learning_rate", "-1"], "learning_rate"),
    (["--num_train_epochs", "0", "--max_steps", "-1"], "num_train_epochs|nothing to train"),
    (["--num_train_epochs", "nan", "--max_steps", "-1"], "num_train_epochs"),
    (["--per_device_train_batch_size", "0"], "per_device_train_batch_size"),
    (["--gradient_accumulation_steps", "0"], "gradient_accumulation_steps"),
    (["--per_device_eval_batch_size", "0"], "per_device_eval_batch_size"),
    (["--seed", "-1"], "seed"),
    (["--seed", "9" * 30], "seed"),
    (["--optim", "sgdd"], "optim"),
    (["--warmup_steps", "-3"], "warmup_steps"),
    (["--eval_strategy", "sometimes"], "sometimes"),
    (["--logging_steps", "0"], "logging_steps"),
    (["--deepspeed", "nowhere.json"], "deepspeed|nowhere"),
    (["--base_model", ""], "cannot be loaded"),
    (["--base_model", "talk.jsonl"], "talk.jsonl"),
    (["--base_model", "a" * 300], "a" * 50),
    (["--base_model", "\x1b[31mred/model"], "red/model"),
    (["--dataset", ""], "dataset .. does not exist"),
    (["--dataset", "\x1b[31m./nowhere"], "nowhere"),
    (["--resume"], "no unfinished run"),
    (["--resume_from_checkpoint", "nowhere"], "nowhere"),
    (["--adapter_dir", "talk.jsonl"], "talk.jsonl cannot be created: it is a file"),
    (["--adapter_dir", "talk.jsonl/inside"], "cannot be created"),
    (["--adapter_dir", "."], "inside the other|not a run's result"),
    (["--adapter_dir", ""], "inside the other|not a run's result"),
    (["--adapter_dir", "same", "--merged_dir", "same"], "same folder"),
    (["--adapter_dir", "same", "--merged_dir", "./x/../same"], "same folder"),
    (["--adapter_dir", "out/lora", "--merged_dir", "out"], "one inside the other"),
    (["--output_dir", "talk.jsonl"], "talk.jsonl"),
    (["--merged_dir", "a" * 300], "cannot be used|cannot be created"),
    (["--merged_dir", "loop"], "loop"),
    (["--merged_dir", "/proc/nothing/full"], "not enough disk|cannot be created"),
    (["--push_to_hub", "maybe"], "push_to_hub"),
    (["\x1b[31m"], "unknown flag"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "said"),
    WRONG_FLAGS,
    ids=lambda value: " ".join(value)[:40].replace("\x1b", "") if isinstance(value, list) else "",
)
def test_wrong_flags(flags, said, base, here, capsys):
    (here / "loop").symlink_to("loop")
    assert train(base, *flags) == 2
    one_line(capsys.readouterr(), said)
    assert sorted(path.name for path in here.iterdir()) == ["loop", "talk.jsonl"], "something was left behind"


@pytest.mark.parametrize("name", ["gpt2-dialogue-lora", "gpt2-dialogue-checkpoints"])
def test_a_folder_that_may_not_be_written(name, base, here, capsys, monkeypatch):
    """Permissions do not bind root, who meets a read-only file system instead: here, /proc."""
    (here / name).symlink_to("/proc/self")
    assert train(base) == 2
    one_line(capsys.readouterr(), f"{name}|/proc")


# ---- Chat --------------------------------------------------------------------------------------------


def adapter(folder, base):
    from peft import LoraConfig

    from dialogue.models import load_base
    from dialogue.train.lora import attach, save

    tokenizer = byte_tokenizer()
    add_roles(tokenizer)
    folder.mkdir()
    model = load_base(str(base), torch.float32, torch.device("cpu"), tokenizer)
    lora = LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM")
    save(attach(model, lora, tokenizer), tokenizer, folder)


def flip(name):
    def change(folder):
        data = bytearray((folder / name).read_bytes())
        data[len(data) // 2] ^= 1
        (folder / name).write_bytes(data)

    return change


def pickled_adapter(folder):
    torch.save(load_file(folder / "adapter_model.safetensors"), folder / "adapter_model.bin")
    (folder / "adapter_model.safetensors").unlink()


WRONG_MODEL = {
    "a flipped byte in the weights": ("merged", flip("model.safetensors"), "model.safetensors is not what was written"),
    "a flipped byte in the tokenizer": ("merged", flip("tokenizer.json"), "tokenizer.json is not what was written"),
    "a flipped byte in the config": ("merged", flip("config.json"), "config.json is not what was written"),
    "a flipped byte in the manifest": ("merged", flip("manifest.json"), "is broken"),
    "weights cut short": ("merged", cut("model.safetensors"), r"model.safetensors has \d+ of"),
    "a file that is gone": ("merged", lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json cannot be read"),
    "pickled weights only": ("unsealed", to_pickle, "safetensors"),
    "code beside the model": ("unsealed", with_code, "trust_remote_code|cannot be loaded"),
    "a config of nonsense": ("unsealed", lambda f: change_json(f, "config.json", n_head=0), "cannot be loaded"),
    "NaN weights": ("unsealed", lambda f: change_weights(f, lambda n, w: w * torch.nan), "not finite"),
    "a pickled adapter": ("adapter", pickled_adapter, "no adapter_model.safetensors"),
    "an adapter cut short": ("adapter", cut("adapter_model.safetensors"), "cannot be loaded"),
    "an adapter's config cut short": ("adapter", cut("adapter_config.json"), "cannot be loaded"),
    "an adapter of another shape": (
        "adapter", lambda f: change_json(f, "adapter_config.json", r=5), "cannot be loaded",
    ),
    "an adapter of a base that is gone": (
        "adapter", lambda f: change_json(f, "adapter_config.json", base_model_name_or_path="\x1b[31mgone"), "gone",
    ),
}  # fmt: skip


def say(*flags):
    """Exit code of one reply."""
    try:
        return exit_code(lambda: chat.main(["--max_t", "3", "--prompt", "Hi", *flags]))
    except SystemExit as end:  # one of the messages failed
        return end.code


@pytest.mark.parametrize("what", WRONG_MODEL)
def test_wrong_model(what, merged, base, here, capsys):
    kind, change, said = WRONG_MODEL[what]
    folder = here / "model"
    chat._load.cache_clear()
    if kind == "adapter":
        adapter(folder, base)
    else:
        shutil.copytree(merged, folder)
    if kind == "unsealed":
        (folder / storage.MANIFEST).unlink()
    assert say("--model", "./model") == 0, "it was good before"
    capsys.readouterr()
    change(folder)
    chat._load.cache_clear()
    assert say("--model", "./model") == 2
    one_line(capsys.readouterr(), said)
    assert not (here / "owned").exists()


# ---- Every reader of a model's folder: chat, evaluation, export, and the training that starts from one ----


def without(folder, name):
    path = folder / "model.safetensors"
    save_file({key: weight for key, weight in load_file(path).items() if key != name}, path, {"format": "pt"})


def fewer_rows(folder):
    size = json.loads((folder / "config.json").read_text())["vocab_size"]
    change_json(folder, "config.json", vocab_size=size - 1)
    change_weights(folder, lambda name, weight: weight[: size - 1] if "wte" in name else weight)


def without_roles(folder):
    byte_tokenizer().save_pretrained(folder)


def sealed(change):
    """The change comes after the manifest."""

    def both(folder):
        storage.seal(folder)
        change(folder)

    return both


WRONG_FOLDERS = {
    "pickled weights only": (to_pickle, "safetensors"),
    "code beside the model": (with_code, "cannot be loaded"),
    "ten million layers": (lambda f: change_json(f, "config.json", n_layer=10**7), "10,000,000 layers"),
    "a vocabulary of a trillion": (lambda f: change_json(f, "config.json", vocab_size=10**12), "out of memory"),
    "a weight that is missing": (lambda f: without(f, "transformer.h.0.ln_1.bias"), "weights are missing"),
    "a weight that is missing, and another too many": (
        lambda f: change_weights(f, lambda n, w: w) or save_file(
            {n.replace("ln_f.bias", "ln_g.bias"): w for n, w in load_file(f / "model.safetensors").items()},
            f / "model.safetensors", {"format": "pt"},
        ), r"weights are missing, transformer.ln_f.bias",
    ),
    "weights of another shape": (
        lambda f: change_weights(f, lambda n, w: w.flatten() if n.endswith("c_fc.weight") else w), "has the shape",
    ),
    "an activation that nobody knows": (
        lambda f: change_json(f, "config.json", activation_function="evil"), "cannot be loaded: 'evil'",
    ),
    "no vocabulary": (
        lambda f: [(f / n).unlink() for n in ("tokenizer.json", "tokenizer_config.json")], "cannot be loaded",
    ),
    "a flipped byte": (sealed(flip("model.safetensors")), "model.safetensors is not what was written"),
    "fewer rows than tokens": (fewer_rows, "knows more tokens"),
    "no roles": (without_roles, "is no dialogue model"),
}  # fmt: skip

WRONG_ADAPTERS = {
    "pickled weights": (pickled_adapter, "no adapter_model.safetensors"),
    "an unknown kind": (
        lambda f: change_json(f, "adapter_config.json", peft_type="EVIL"), "cannot be loaded: 'EVIL'",
    ),
    "no base model": (
        lambda f: change_json(f, "adapter_config.json", base_model_name_or_path=None), "names no base model",
    ),
    "a weight that is missing": (
        lambda f: save_file(dict(list(load_file(f / "adapter_model.safetensors").items())[1:]),
                            f / "adapter_model.safetensors"), "weights are missing",
    ),
    "a flipped byte": (sealed(flip("adapter_model.safetensors")), "safetensors is not what was written"),
}  # fmt: skip


def score(folder, base):
    few = ["--max_dialogues", "1", "--contexts", "1", "--max_t", "1"]
    return exit_code(lambda: evaluate.main(["--model", folder, "--base", str(base), "--dataset", "talk.jsonl", *few]))


def test_figures_that_cannot_be_written_are_one_line(merged, base, here, capsys):
    few = ["--max_dialogues", "2", "--contexts", "1", "--max_t", "1", "--json", "/dev/full"]
    flags = ["--model", str(merged), "--base", str(base), "--dataset", "talk.jsonl", *few]
    assert exit_code(lambda: evaluate.main(flags)) == 2
    one_line(capsys.readouterr(), "/dev/full could not be written: No space left on device")


def say_as_written(folder, base):
    """A chat with what looks like a run's result, which is read without transformers as far as it can be."""
    storage.write_json(Path(folder, storage.RUN_FILE), {})
    if not Path(folder, storage.MANIFEST).exists():
        storage.seal(Path(folder))
    return say("--model", folder)


READERS = {
    "chat": lambda folder, base: say("--model", folder),
    "chat with a run's result": say_as_written,
    "evaluation": score,
    "export": lambda folder, base: exit_code(lambda: export.main(["gguf", "--model", folder, "--out", "x.gguf"])),
    "training": lambda folder, base: train(folder),
}


@pytest.mark.parametrize("who", READERS)
@pytest.mark.parametrize("what", WRONG_FOLDERS)
def test_every_reader_makes_the_same_checks(who, what, merged, base, here, capsys):
    if who == "training" and what in ("fewer rows than tokens", "no roles"):
        pytest.skip("a base model needs no roles, and its embedding grows")
    shutil.copytree(merged, here / "model")
    (here / "model" / storage.MANIFEST).unlink()
    change, said = WRONG_FOLDERS[what]
    change(here / "model")
    chat._load.cache_clear()
    assert READERS[who]("./model", base) == 2
    one_line(capsys.readouterr(), said)
    assert not (here / "owned").exists() and not list(here.glob("*.gguf*"))


@pytest.mark.parametrize("who", ["chat", "evaluation"])
@pytest.mark.parametrize("what", WRONG_ADAPTERS)
def test_adapters_are_checked_too(who, what, base, here, capsys):
    adapter(here / "model", base)
    change, said = WRONG_ADAPTERS[what]
    change(here / "model")
    chat._load.cache_clear()
    assert READERS[who]("./model", base) == 2
    one_line(capsys.readouterr(), said)


def test_the_wrong_flag_of_an_export_is_one_line(here, capsys):
    out = [["gguf", "--out", name] for name in (".", "/dev/null", "talk.jsonl/x.gguf", "nowhere/x.gguf", "a" * 300)]
    for flags in ([], ["gguf", "--modle", "x"], ["onnx"], ["gguf", "--model", "."], *out):
        assert exit_code(lambda flags=flags: export.main(flags)) == 2
        assert len(capsys.readouterr().err.splitlines()) == 1


# ---- Memory that is too small ---------------------------------------------------------------------------

OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.50 GiB. GPU 0 has a total capacity of 8 GiB"),
    torch.AcceleratorError("CUDA error: out of memory"),
    RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    RuntimeError("cublasLt ran into an error!"),
    RuntimeError("MPS backend out of memory (MPS allocated: 1 GB)"),
    MemoryError(),
    OSError(12, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=lambda error: str(error)[:30])
def test_too_little_memory_is_one_line(error, here, capsys):
    def run():
        raise error

    assert exit_code(run) == 2
    one_line(capsys.readouterr(), r"out of memory on the \w+, .* GB are free; close other programs")
    with pytest.raises(type(error)):
        exit_code(run, debug=True)


def test_too_little_memory_while_a_model_loads_or_replies(merged, base, here, capsys, monkeypatch):
    def take_too_much(*_, **__):
        torch.empty(10**15)

    monkeypatch.setattr("dialogue.models.PreTrainedModel.from_pretrained", take_too_much)
    chat._load.cache_clear()
    for run in (lambda: say("--model", str(merged)), lambda: train(base)):
        assert run() == 2
        one_line(capsys.readouterr(), r"out of memory on the CPU, .* GB are free")
    monkeypatch.undo()
    monkeypatch.setattr("dialogue.chat.decoder.Decoder.step", take_too_much)
    assert say("--model", str(merged)) == 2
    one_line(capsys.readouterr(), "out of memory on the CPU")
    assert not machine.is_out_of_memory(RuntimeError("shape mismatch")), "a bug keeps its traceback"


WRONG_WORDS = [
    (["--temp", "nan"], "temp must be"),
    (["--temp", "hot"], "invalid float"),
    (["--top_k", "1.5"], "invalid int"),
    (["--top_k", "-4"], "top_k must be"),
    (["--top_p", "2"], "top_p must be"),
    (["--min_p", "-1"], "min_p must be"),
    (["--repetition_penalty", "0"], "repetition_penalty must be"),
    (["--max_t", "-3"], "max_t must be"),
    (["--seed", "tomorrow"], "invalid int"),
    (["--precision", "int3"], "invalid choice"),
    (["--tempo", "1"], "unrecognized arguments"),
    (["\x1b[31mHi"], "unrecognized arguments"),
    (["--model", ""], "no model in|cannot be loaded|--model"),
    (["--model", "talk.jsonl"], "no model in talk.jsonl"),
    (["--model", "./loop"], "no model in"),
    (["--model", "a" * 300], "no model in|cannot be loaded"),
    (["--model", "\x1b[31m./red"], "red"),
    (["--prompt", "a" * 100_000], r"has \d+ tokens, 251 fit: make it shorter"),
]  # fmt: skip


@pytest.mark.parametrize(
    ("flags", "said"),
    WRONG_WORDS,
    ids=lambda value: " ".join(value)[:30].replace("\x1b", "") if isinstance(value, list) else "",
)
def test_wrong_words_to_the_chat(flags, said, merged, here, capsys):
    (here / "loop").symlink_to("loop")
    assert say("--model", str(merged), *flags) == 2
    one_line(capsys.readouterr(), said)


@pytest.mark.parametrize(
    "content", ["{", "[1]", '{"temperature": "hot"}', '{"top_k": null, "temperature": [1]}', b"\xff"]
)
def test_a_wrong_generation_config(content, merged, here, capsys):
    shutil.copytree(merged, here / "model")
    (here / "model" / storage.MANIFEST).unlink()
    write("model/generation_config.json", content)
    write("model/run.json", "{}")
    assert say("--model", "./model") == 2
    one_line(capsys.readouterr(), "generation_config|temp must be")


def test_odd_messages_get_a_reply(merged, here, monkeypatch, capsys):
    odd = ["<END><USER><BOT>", "\0", "\x1b[31m", "\udcff", "\ufeff", "👋🏽", "[/bold]", "/nonsense", "\x9b2J"]
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join(odd) + "\n"))
    assert exit_code(lambda: chat.main(["--model", str(merged), "--max_t", "3"])) == 0
    captured = capsys.readouterr()
    assert not set(captured.out + captured.err) & set("\x1b\x07\x9b\u202e")


def test_debug_shows_tracebacks(base, here, monkeypatch):
    for run in (lambda: chat.main(["--model", "./nowhere"]), lambda: script.main(["--dataset", "./nowhere"])):
        with pytest.raises(UserError):
            exit_code(run, debug=True)
    monkeypatch.setattr(trainer, "train", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):  # a bug shows itself in any case
        train(base)
