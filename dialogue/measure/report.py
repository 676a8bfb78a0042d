"""What a person is told: the plan before a run, the report beside the adapters after it."""

import shlex
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from huggingface_hub import ModelCardData
from peft import LoraConfig
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TrainingArguments

from dialogue import machine
from dialogue.data.corpus import DAILYDIALOG_LICENCE, Corpus, Dialogues
from dialogue.data.packing import IGNORED, Row
from dialogue.measure.fitting import Fitted
from dialogue.measure.likelihood import Score
from dialogue.models import STARTER, STARTER_ON_HUB, licence
from dialogue.plaintext import plain
from dialogue.prompt import decode_text
from dialogue.storage import RUN_FILE, read_json, write_json

if TYPE_CHECKING:
    from dialogue.train.trainer import Trained

# The TrainingArguments that a reader of the model card wants to see.
TRAINING_SETTINGS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "activation_checkpointing", "seed",
)  # fmt: skip


def steps_in_words(steps: int, rows: int, arguments: TrainingArguments) -> str:
    """ "120 in 3 epochs"; with a number of steps or a time budget, the epochs that come of it."""
    a_step = arguments.per_device_train_batch_size * arguments.gradient_accumulation_steps * arguments.world_size
    epochs = arguments.num_train_epochs if arguments.max_steps < 1 else round(steps * a_step / rows, 2)
    return f"{steps:,} in {epochs:g} epochs"


def batch_in_words(arguments: TrainingArguments) -> str:
    """ "8 rows a step: 2 at once, 2 times, in 2 processes; activation checkpointing off"."""
    rows, times = arguments.per_device_train_batch_size, arguments.gradient_accumulation_steps
    processes = f", in {arguments.world_size} processes" if arguments.world_size > 1 else ""
    checkpointing = "on" if arguments.activation_checkpointing else "off"
    return (
        f"{rows * times * arguments.world_size} rows a step: {rows} at once, {times} times{processes}; "
        f"activation checkpointing {checkpointing}"
    )


def show_plan(console: Console, plan: dict[str, str]) -> None:
    """Print the plan as a two-column table."""
    table = Table(title="Plan", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, value in plan.items():
        table.add_row(name, Text(plain(value)))
    console.print(table)


def show_example(console: Console, tokenizer: PreTrainedTokenizerBase, row: Row) -> None:
    """Print the first dialogue of `row`: what is learned in green, what is only read dim."""
    text = Text("One dialogue as the model reads it (green: learned): ", style="bold")
    end = next((i for i in range(1, len(row["position_ids"])) if row["position_ids"][i] == 0), len(row["input_ids"]))
    for token, label in zip(row["input_ids"][:end], row["labels"][:end], strict=True):
        text.append(plain(decode_text(tokenizer, [token])), style="dim" if label == IGNORED else "green")
    console.print(text)


def draw_curves(history: list[dict[str, float]], path: Path) -> None:
    """Loss (training, validation) and learning rate over the steps, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 5), layout="constrained")
    loss_axes, rate_axes = figure.subplots(2, 1, sharex=True, height_ratios=[3, 1])
    for key, label, style in (("loss", "training", "-"), ("eval_loss", "validation", "o-")):
        points = [(entry["step"], entry[key]) for entry in history if key in entry]
        if points:
            loss_axes.plot(*zip(*points, strict=True), style, label=label)
    loss_axes.set_ylabel("loss (nats per token)")
    if loss_axes.lines:
        loss_axes.legend()
    points = [(entry["step"], entry["learning_rate"]) for entry in history if "learning_rate" in entry]
    if points:
        rate_axes.plot(*zip(*points, strict=True), color="tab:gray")
    rate_axes.set_ylabel("learning rate")
    rate_axes.set_xlabel("step")
    figure.savefig(path, dpi=120)


def write_card(folder: Path, run: dict[str, Any], metrics: dict[str, Any], fitted: Fitted | None = None) -> None:
    """The model card (`README.md`) of the adapters or of the merged model; a model hub reads its front matter.

    `run` is what its run.json holds.
    """
    facts = run["facts"]
    figures = markdown_table(
        ["", "base model, untuned, same format", "tuned"],
        [
            [label, f"{metrics[f'base_eval_{key}']:.3f}", f"{metrics[f'eval_{key}']:.3f}"]
            for label, key in (
                ("nats per token", "nats_per_token"),
                ("perplexity per token", "perplexity"),
                ("perplexity per word", "word_perplexity"),
                ("bits per character", "bits_per_character"),
            )
        ],
    )
    curves = "![Curves](curves.png)\n\n" if (folder / "curves.png").is_file() else ""
    listed = "\n".join(f"- {name}: `{value}`" for name, value in run["settings"].items())
    folder.joinpath("README.md").write_text(
        f"""---
{_front_matter(folder, facts)}
---

# A dialogue model: {facts["base model"]}, fine-tuned with LoRA

{markdown_table(["", ""], facts.items())}

## How good it is

On the replies of the validation split (every reply token and its `<END>` count, nothing else):

{figures}

{curves}{_conversations(run["conversations"])}{_sampler(fitted) if fitted else ""}## How it reads

`<USER>` message `<END>` `<BOT>` reply `<END>` ..., without spaces around the tokens; `<END>` is the EOS token, and the
chat template writes just this.

## Settings

{listed}

Repeat with: `{run["command"]}`
""",
        encoding="utf-8",
    )


def _front_matter(folder: Path, facts: dict[str, Any]) -> str:
    """What the hub wants to know of a model, as YAML (huggingface.co/docs/hub/model-cards)."""
    base, data = facts["base model"], facts["licence of the data"]
    licences = {data, facts["licence of the base model"]}
    if "NC" in data:
        licence = "cc-by-nc-sa-4.0"
    elif licences <= {"MIT", "Apache-2.0"}:
        licence = "apache-2.0" if "Apache-2.0" in licences else "mit"
    else:
        licence = "other"
    adapters = (folder / "adapter_config.json").is_file()
    return ModelCardData(
        base_model=None if Path(base).is_dir() else STARTER_ON_HUB if base == STARTER else base,
        datasets=["li2017dailydialog/daily_dialog"] if data == DAILYDIALOG_LICENCE else None,
        license=licence,
        language="en",
        library_name="peft" if adapters else "transformers",
        pipeline_tag="text-generation",
        tags=["dialogue", "conversational", "lora"],
    ).to_yaml()


def _conversations(talks: dict[str, Dialogues]) -> str:
    """The same messages of a user, answered before and after training."""
    rows = [
        ["", *(turns[place] for turns in pair)] if place % 2 else [turn, *("" for _ in pair)]
        for pair in zip(*talks.values(), strict=True)
        for place, turn in enumerate(pair[0])
    ]
    return f"## Eight conversations\n\nThe model's own replies.\n\n{markdown_table(['', *talks], rows)}\n\n"


def _sampler(fitted: Fitted) -> str:
    names = list(fitted.figures["people"])
    rows = [[name.replace("_", " "), *(f"{of[name]:.3f}" for of in fitted.figures.values())] for name in names]
    settings = ", ".join(f"{name} {value}" for name, value in vars(fitted.sampling).items() if name != "min_p")
    return f"""## Sampler

`generation_config.json` has the settings whose replies to validation contexts were most like people's: {settings}
(`main.py --sampler fitted`).

{markdown_table(["replies", *fitted.figures], rows)}

"""


def markdown_table(head: list[str], rows: Iterable[Iterable[Any]]) -> str:
    """A Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    cells = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in cells)


def write_report(folder: Path, run: dict[str, Any], metrics: dict[str, Any], history: list[dict[str, float]]) -> None:
    """`metrics.json`, `curves.png`, `run.json` and the model card, beside the adapters."""
    write_json(folder / "metrics.json", metrics)
    write_json(folder / RUN_FILE, run)
    draw_curves(history, folder / "curves.png")
    write_card(folder, run, metrics)


def settings(chosen: dict[str, Any], lora: LoraConfig, arguments: TrainingArguments) -> dict[str, Any]:
    """What a reader of the model card wants to know of the configuration."""
    return {
        **chosen, "r": lora.r, "lora_alpha": lora.lora_alpha,
        **{name: getattr(arguments, name) for name in TRAINING_SETTINGS},
    }  # fmt: skip


def facts(base: str, talk: Corpus, device: torch.device, precision: str, trained: "Trained") -> dict[str, str]:
    """What came of a run, in words."""
    return {
        "base model": base,
        "data": talk.source,
        "licence of the data": talk.licence or "unknown: yours to find out",
        "licence of the base model": licence(base),
        "hardware": machine.hardware(device),
        "precision": precision,
        "training time": machine.duration(trained.seconds),
        "step": f"{trained.best_step} of {trained.steps} trained, the best on the validation split",
        "peak memory": f"{machine.peak_memory(device) / 1e9:.1f} GB",
        **machine.versions(),
    }


def metrics(trained: "Trained", untuned: Score, device: torch.device, seed: int) -> dict[str, Any]:
    """What came of a run, in numbers."""
    return {
        "train_tokens_per_second": trained.tokens_per_second,
        "train_tokens": trained.tokens,
        "train_seconds": trained.seconds,
        "steps": trained.steps,
        "best_step": trained.best_step,
        "peak_memory_bytes": machine.peak_memory(device),
        **{f"eval_{name}": value for name, value in trained.score.figures().items()},
        **{f"base_eval_{name}": value for name, value in untuned.figures().items()},
        "seed": seed,
    }


def show_line(console: Console, text: str) -> None:
    """A line of plain text, not broken: it may be there to be copied."""
    console.print(plain(text), highlight=False, markup=False, soft_wrap=True)


def show_result(console: Console, adapters: Path, merged: Path, certificate: dict[str, Any]) -> None:
    """What the run achieved, what it wrote, and what to do next."""
    metrics, chat = read_json(adapters / "metrics.json"), "chat_precision" in certificate
    console.print(
        f"Perplexity on validation replies: {metrics['base_eval_perplexity']:.1f} untuned, "
        f"[bold]{metrics['eval_perplexity']:.1f}[/] tuned (per token); "
        f"merged model: {certificate['perplexity_change']:+.2%} perplexity, "
        f"{certificate['greedy_agreement']:.1%} of greedy choices the same"
        + (f"; chat in {certificate['chat_precision']}: {certificate['chat_perplexity_change']:+.2%}." if chat else ".")
    )
    console.print(Text(plain(f"Adapters and report: {adapters}/   Merged model: {merged}/")))
    extra = "" if str(merged) == "gpt2-dialogue-full" else f" --model {shlex.quote(str(merged))}"
    console.print(Text.assemble("Chat with it: ", (plain(f"python main.py{extra}"), "bold")), soft_wrap=True)
