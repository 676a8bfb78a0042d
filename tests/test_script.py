"""`Fine_tuningmodel.py` as a person runs it: real training steps on a small GPT-2, real folders."""

import json
import shlex
import warnings
from contextlib import closing

import pytest
import torch
from conftest import DAILYDIALOG, needs_dailydialog
from huggingface_hub import ModelCard
from safetensors import safe_open
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, TrainingArguments

import Fine_tuningmodel as script
from dialogue.chat import merged
from dialogue.chat.engine import load
from dialogue.data.corpus import own_openers
from dialogue.data.sources import DAILYDIALOG_LICENCE, load_corpus
from dialogue.errors import UserError, exit_code
from dialogue.measure.report import write_card
from dialogue.models import STARTER, load_base
from dialogue.train import progress

TALK = [
    ["Hello, how are you?", "I'm fine, thank you.", "Good to hear.", "And you?"],
    ["What time is it?", "It's noon."],
    ["Are you hungry?", "Yes, very.", "Let's eat."],
    ["Where do you live?", "In a small town by the sea."],
]


@pytest.fixture(scope="module")
def talk(tmp_path_factory):
    """A JSON Lines file of 80 short dialogues."""
    path = tmp_path_factory.mktemp("data") / "talk.jsonl"
    with path.open("w") as file:
        for number in range(80):
            turns = [f"{turn} ({number})" for turn in TALK[number % len(TALK)]]
            file.write(json.dumps({"dialog": turns}) + "\n")
    return path


@pytest.fixture(scope="module")
def run(random_gpt2, talk, tmp_path_factory):
    """One whole run: (folder of adapters, folder of the merged model, flags)."""
    home = tmp_path_factory.mktemp("run")
    flags = [
        "--base_model", str(random_gpt2), "--dataset", str(talk), "--max_steps", "12", "--learning_rate", "2e-2",
        "--per_device_train_batch_size", "4", "--max_length", "128", "--adapter_dir", str(home / "lora"),
        "--merged_dir", str(home / "full"), "--output_dir", str(home / "checkpoints"), "--logging_steps", "1",
    ]  # fmt: skip
    script.main(flags)
    return home / "lora", home / "full", flags


def test_the_chat_reads_what_a_run_wrote_without_transformers(run):
    _, merged_folder, _ = run
    assert merged.read(str(merged_folder))
    assert load(str(merged_folder)).engine.precision == "int8"


def test_training_lowers_the_loss_and_says_so(run):
    adapters, _, _ = run
    metrics = json.loads((adapters / "metrics.json").read_text())
    assert metrics["eval_nats_per_token"] < metrics["base_eval_nats_per_token"]
    assert metrics["steps"] == 12
    assert metrics["train_tokens"] > 0 and metrics["train_tokens_per_second"] > 0
    assert metrics["peak_memory_bytes"] > 0
    assert metrics["eval_word_perplexity"] > metrics["eval_perplexity"] > 1


def test_merged_model_loads_without_a_warning_and_is_tied(run, recwarn):
    _, merged, _ = run
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        model, loading = AutoModelForCausalLM.from_pretrained(merged, output_loading_info=True)
    assert not any(loading.values()), loading
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    with safe_open(merged / "model.safetensors", "pt") as file:
        names = list(file.keys())
        assert {file.get_slice(name).get_dtype() for name in names} == {"F16"}
    assert not any("lora" in name or "base_layer" in name for name in names)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    assert tokenizer.eos_token == "<END>"
    assert model.generation_config.eos_token_id == tokenizer.eos_token_id == len(tokenizer) - 1
    assert tokenizer.pad_token_id not in (None, tokenizer.eos_token_id)


def test_token_rows_moved_and_both_ends_of_the_merged_model_carry_them(run, random_gpt2):
    adapters, merged, _ = run
    rows = next(v for k, v in load_file(adapters / "adapter_model.safetensors").items() if "trainable_tokens" in k)
    tokenizer = AutoTokenizer.from_pretrained(adapters)
    start = (
        load_base(str(random_gpt2), torch.float32, torch.device("cpu"), tokenizer).get_input_embeddings().weight[-3:]
    )
    assert ((rows - start).norm(dim=-1) > 0.01).all(), "a token row stayed at its initialisation"
    model = AutoModelForCausalLM.from_pretrained(merged)
    for end in (model.get_input_embeddings(), model.get_output_embeddings()):
        torch.testing.assert_close(end.weight[-3:].float(), rows, rtol=1e-3, atol=1e-3)


def test_certificate_and_repeat_command_lie_beside_the_model(run):
    adapters, merged, flags = run
    certificate = json.loads((merged / "certificate.json").read_text())
    assert certificate["reply_tokens"] > 0
    assert abs(certificate["perplexity_change"]) < 0.005
    assert certificate["greedy_agreement"] > 0.95
    assert certificate["chat_precision"] == "int8"
    assert abs(certificate["chat_perplexity_change"]) < 0.01
    command = json.loads((adapters / "run.json").read_text())["command"]
    assert shlex.split(command) == ["python", "Fine_tuningmodel.py", *flags]
    card = (adapters / "README.md").read_text()
    assert command in card and "perplexity per word" in card
    assert (adapters / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_both_cards_are_ones_that_a_hub_reads_and_show_the_model_talking(run):
    for folder, library in zip(run[:2], ("peft", "transformers"), strict=True):
        card = ModelCard.load(folder / "README.md")
        assert card.data.library_name == library
        assert card.data.base_model is None, "a local folder is no model of the hub"
        assert {"dialogue", "lora"} <= set(card.data.tags)
        assert card.data.license == "other"  # nobody said what the data's is
        assert card.data.language is None, "nobody said what the data's is"
        for opener in own_openers(load_corpus(run[2][3]), 8):
            assert f"| {opener} |" in card.text
        assert "| before | after |" in card.text
    assert "| people | defaults | fitted |" in card.text
    assert "curves.png" in ModelCard.load(run[0] / "README.md").text
    sampler = GenerationConfig.from_pretrained(run[1])
    assert (sampler.temperature, sampler.top_k, sampler.top_p, sampler.repetition_penalty) == (0.8, 40, 0.9, 1.0)
    assert sampler.max_new_tokens == 50


def test_the_front_matter_names_base_data_and_the_stricter_licence(tmp_path):
    facts = {"base model": "gpt2-xl", "licence of the data": DAILYDIALOG_LICENCE, "licence of the base model": "MIT"}
    run = {"facts": facts, "settings": {}, "conversations": {}, "command": "python Fine_tuningmodel.py"}
    names = ("nats_per_token", "perplexity", "word_perplexity", "bits_per_character")
    metrics = {f"{who}eval_{name}": 1.0 for name in names for who in ("", "base_")}
    write_card(tmp_path, run, metrics)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.license, data.language) == ("gpt2-xl", "cc-by-nc-sa-4.0", "en")
    assert data.datasets == ["li2017dailydialog/daily_dialog"]
    write_card(tmp_path, {**run, "facts": facts | {"base model": STARTER, "licence of the data": "MIT"}}, metrics)
    data = ModelCard.load(tmp_path / "README.md").data
    assert (data.base_model, data.license, data.datasets) == (f"HuggingFaceTB/{STARTER}", "mit", None)


def test_another_run_is_not_overwritten_unless_told(run, capsys):
    adapters, _, flags = run
    before = (adapters / "adapter_model.safetensors").read_bytes()
    assert exit_code(lambda: script.main(flags)) == 2
    assert "--overwrite" in capsys.readouterr().err
    assert (adapters / "adapter_model.safetensors").read_bytes() == before


def test_a_folder_that_is_no_result_is_never_replaced(run, tmp_path):
    _, _, flags = run
    (tmp_path / "thesis.txt").write_text("years of work")
    with pytest.raises(UserError, match="not a run's result"):
        script.main([*flags, "--adapter_dir", str(tmp_path), "--overwrite"])
    assert (tmp_path / "thesis.txt").read_text() == "years of work"


def test_pasted_training_arguments_work(random_gpt2, talk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pasted = TrainingArguments(num_train_epochs=5, learning_rate=1e-4, per_device_train_batch_size=4)
    monkeypatch.setattr(script, "training_args", pasted)
    script.main(["--base_model", str(random_gpt2), "--dataset", str(talk), "--max_train_dialogues", "8"])
    assert AutoModelForCausalLM.from_pretrained("gpt2-dialogue-full").num_parameters() > 0
    assert (pasted.num_train_epochs, pasted.learning_rate) == (5, 1e-4), "the editable value was changed"


def test_what_follows_the_last_step_is_said_with_the_time_that_is_left(capsys):
    with closing(progress.Finishing()) as told:
        told("certificate: the trained model")  # a run that goes on has its adapters already
        told.began -= 1400
        told("sampler")
        (task,) = told.bar.tasks
        assert task.fields["left"] == "28 min"  # 0.35 of all took 1400 s, 0.42 is left
    assert capsys.readouterr().err.splitlines() == [
        "after the last step: certificate: the trained model", "after the last step: sampler"
    ]  # fmt: skip


def test_plan_writes_nothing(random_gpt2, talk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    script.main(["--base_model", str(random_gpt2), "--dataset", str(talk), "--plan", "--num_train_epochs", "2"])
    printed = capsys.readouterr().out
    for word in ("base model", "device", "precision", "trainable", "tokens", "steps", "memory", "time"):
        assert word in printed
    assert list(tmp_path.iterdir()) == []


def test_a_chat_is_planned_with_what_was_left_out_as_counts(random_gpt2, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    head = "[{:02}.02.20, 16:05:09] "
    talk = ["~\u202fAnn: Hi", "Ann: \u200eimage omitted", "Ann: reach me at ann@example.org", "Bo: Ho {}"]
    lines = [head + one for one in talk]
    (tmp_path / "_chat.txt").write_text("\n".join(line.format(day, day) for day in range(1, 29) for line in lines))
    flags = ["--base_model", str(random_gpt2), "--dataset", "_chat.txt", "--max_length", "64", "--plan"]
    assert exit_code(lambda: script.main(flags)) == 2
    assert "give --bot NAME, of: Ann (28), Bo (28)" in capsys.readouterr().err
    script.main([*flags, "--bot", "Bo"])
    printed = " ".join(capsys.readouterr().out.split())
    assert "lines with an e-mail address left out: 28" in printed and "example.org" not in printed
    assert "figures of so few dialogues (2) are rough" in printed and "--num_train_epochs" in printed


def test_in_8_bit_on_a_cpu(random_gpt2, talk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script.main(
        [
            "--base_model",
            str(random_gpt2),
            "--dataset",
            str(talk),
            "--max_steps",
            "2",
            "--load_in_8bit",
            "yes",
            "--per_device_train_batch_size",
            "2",
            "--max_train_dialogues",
            "20",
        ]  # fmt: skip
    )
    assert json.loads((tmp_path / "gpt2-dialogue-full/certificate.json").read_text())["trained_against"] == "int8"
    weights = load_file(tmp_path / "gpt2-dialogue-full/model.safetensors")
    assert {weight.dtype for weight in weights.values()} == {torch.float16}, "the merge kept int8 weights"


def test_a_run_of_more_than_a_day_asks_first(random_gpt2, talk, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=r"days.*--preset starter"):
        script.main(["--base_model", str(random_gpt2), "--dataset", str(talk), "--max_steps", "100000000"])
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--preset", "medium"], "invalid choice: 'medium' (choose from"),
        (["--learning_rat", "1"], "--learning_rate"),
        (["--learning_rate", "fast"], "invalid float"),
        (["--max_length", "0"], "not a positive number"),
        (["--report_to", "comet_ml"], "not installed here"),
        (["--lr_scheduler_type", "zigzag"], "zigzag"),
        (["--dataset", "./nowhere.jsonl"], "nowhere.jsonl"),
        (["--base_model", "./nowhere"], "--preset starter"),
        (["--base_model", "nobody/such-a-model"], "--preset starter"),
        (["--max_length", "2"], "--max_length"),
    ],
)  # fmt: skip
def test_a_mistake_is_one_line_and_exit_code_2(flags, said, random_gpt2, talk, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    usual = ["--base_model", str(random_gpt2), "--dataset", str(talk)]
    assert exit_code(lambda: script.main([*usual, *flags])) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and said in error
    assert list(tmp_path.iterdir()) == [], "something was left behind"


@needs_dailydialog
def test_on_the_real_release(random_gpt2, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    script.main(
        [
            "--base_model",
            str(random_gpt2),
            "--dataset",
            str(DAILYDIALOG),
            "--max_steps",
            "5",
            "--max_train_dialogues",
            "100",
            "--per_device_train_batch_size",
            "2",
            "--max_length",
            "96",
        ]  # fmt: skip
    )
    assert (tmp_path / "gpt2-dialogue-lora/adapter_model.safetensors").stat().st_size < 200_000
    assert (tmp_path / "gpt2-dialogue-full/model.safetensors").is_file()
