"""What a run says of itself: on the screen an example, the plan, the result; in its folders how it went."""

import datetime
import math
import shlex
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from peft import PeftModel
from rich.console import Console
from rich.table import Table
from rich.text import Text
from transformers import PreTrainedTokenizerBase, TrainingArguments

from dialogue import machine, models
from dialogue.data.corpus import Corpus, Dialogues, rough
from dialogue.data.packing import IGNORED, Row, count_tokens
from dialogue.measure import report
from dialogue.measure.replies import converse
from dialogue.plaintext import plain
from dialogue.prompt import decode_text
from dialogue.storage import read_json
from dialogue.train import lora, teach
from dialogue.train.memory import Load, count_weights, estimate, estimate_certificate
from dialogue.train.options import Run, override
from dialogue.train.plan import Plan, count_steps
from dialogue.train.trainer import Trained

ENOUGH = 30  # steps; the learning rate rises and falls in fewer before much is learned

# The TrainingArguments that a reader of the model card wants to see.
TRAINING_SETTINGS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "activation_checkpointing", "seed",
)  # fmt: skip
CHOSEN = (
    "base_model", "dataset", "max_train_dialogues", "max_length", "learn", "bot", "silence", "adapter_dir",
    "merged_dir", "early_stopping_patience",
)  # fmt: skip


def line(console: Console, text: str) -> None:
    """A line of plain text, not broken: it may be there to be copied. Nothing for no text."""
    if text:
        console.print(plain(text), highlight=False, markup=False, soft_wrap=True)


def plan(console: Console, plan: Plan, run: Run, corpus: Corpus, model: PeftModel, load: Load, before: int) -> None:
    """The plan as a table; `before` is what the process had taken when it was made, in bytes."""
    rows, arguments, rehearsed = plan.rows, plan.arguments, plan.rehearsal
    trained = model.num_parameters(only_trainable=True)
    weights = count_weights(load.config)
    expected, after = (before + of(load, plan.fit, weights) for of in (estimate, estimate_certificate))
    free = machine.free_memory(model.device, arguments.world_size)
    times = arguments.gradient_accumulation_steps
    batch = f"{plan.rows_a_step} rows a step: {plan.fit.rows} at once, {times} times"
    batch += f", in {arguments.world_size} processes" * (arguments.world_size > 1)
    epochs = round(plan.steps * plan.rows_a_step / len(rows.train), 2)
    what = {
        "base model": f"{run.base_model} ({(model.num_parameters() - trained) / 1e6:.0f} M parameters)",
        "device": machine.hardware(model.device),
        "precision": precision_in_words(plan),
        "trainable": f"{trained:,} parameters: LoRA r={run.lora.r} and three token rows",
        "dialogues": "; ".join([f"{rows.dialogues:,} of {corpus.source}", *corpus.notes, *rows.notes]),
        "tokens": f"{count_tokens(rows.train):,} an epoch, in {len(rows.train):,} rows of {rows.length}"
        + "; one dialogue a row, since this base would let packed ones see each other" * (not plan.packed),
        "steps": f"{plan.steps:,} in {epochs if arguments.max_steps > 0 else arguments.num_train_epochs:g} epochs"
        + more_epochs(len(rows.train), plan.steps, arguments),
        "batch": f"{batch}; activation checkpointing {'on' if plan.fit.checkpointing else 'off'}",
        "memory": f"{expected / 1e9:.1f} GB at the peak by arithmetic, {rehearsed.peak_bytes / 1e9:.1f} GB rehearsed; "
        f"{after / 1e9:.1f} GB for the merged model's certificate; {free / 1e9:.0f} GB are still free",
        "time": f"about {machine.duration(plan.seconds)} "
        f"(rehearsed: {rehearsed.tokens / rehearsed.seconds:.0f} tokens/s)",
    }
    table = Table(title="Plan", title_justify="left", show_header=False, box=None, padding=(0, 2, 0, 0))
    table.add_column(style="bold")
    table.add_column()
    for name, value in what.items():
        table.add_row(name, Text(plain(value)))
    console.print(table)


def more_epochs(rows: int, steps: int, arguments: TrainingArguments) -> str:
    """Advice where so few rows make so few steps that hardly anything is learned; none where steps are asked for."""
    an_epoch = count_steps(rows, override(arguments, {"num_train_epochs": 1}))
    epochs = math.ceil(ENOUGH / an_epoch)
    few = steps < ENOUGH and arguments.max_steps <= 0
    return f"; that is little: --num_train_epochs {epochs} makes {epochs * an_epoch}" * few


def example(console: Console, tokenizer: PreTrainedTokenizerBase, row: Row) -> None:
    """The first dialogue of `row`: what is learned in green, what is only read dim."""
    text = Text("One dialogue as the model reads it (green: learned): ", style="bold")
    end = next((i for i in range(1, len(row["position_ids"])) if row["position_ids"][i] == 0), len(row["input_ids"]))
    pairs = zip(row["input_ids"][:end], row["labels"][:end], strict=True)
    for learned, part in groupby(pairs, lambda pair: pair[1] != IGNORED):  # a token alone may be half of a character
        text.append(plain(decode_text(tokenizer, [token for token, _ in part])), style="green" if learned else "dim")
    console.print(text)


def lessons(
    console: Console, run: Run, lessons: Sequence[list[str]], before: list[str], after: list[str], trained: Trained
) -> None:
    """What was taught, what the bot had said, and what it says now; nothing where nothing was taught."""
    if not lessons:
        return
    table = Table("asked", "before", "wanted", "after", title="Lessons, at temperature 0", title_justify="left")
    for turns, *replies in zip(lessons, before, after, strict=True):
        table.add_row(*(Text(plain(text)) for text in (turns[-2], replies[0], turns[-1], replies[1])))
    console.print(table)
    learned = sum(reply == turns[-1] for reply, turns in zip(after, lessons, strict=True))
    known = read_json(run.adapters / "metrics.json", report.METRICS)["eval_perplexity"]
    now = trained.score.figures()["perplexity"]
    line(console, f"{learned} of {len(lessons)} lessons are said word for word; perplexity on validation replies: "
         f"{known:.1f} before, {now:.1f} after ({now / known - 1:+.1%}).")  # fmt: skip


def result(console: Console, run: Run, certificate: dict[str, Any]) -> None:
    """What the run achieved, what it wrote, and what to do next."""
    metrics, chat = read_json(run.adapters / "metrics.json", report.METRICS), "chat_precision" in certificate
    console.print(
        f"Perplexity on validation replies: {metrics['base_eval_perplexity']:.1f} untuned, "
        f"[bold]{metrics['eval_perplexity']:.1f}[/] tuned (per token); "
        f"merged model: {certificate['perplexity_change']:+.2%} perplexity, "
        f"{certificate['greedy_agreement']:.1%} of greedy choices the same"
        + (f"; chat in {certificate['chat_precision']}: {certificate['chat_perplexity_change']:+.2%}" if chat else "")
        + f"{rough(certificate['dialogues'])}."
    )
    console.print(Text(plain(f"Adapters and report: {run.adapter_dir}/   Merged model: {run.merged_dir}/")))
    extra = "" if run.merged_dir == "gpt2-dialogue-full" else f" --model {shlex.quote(run.merged_dir)}"
    console.print(Text.assemble("Chat with it: ", (plain(f"python main.py{extra}"), "bold")), soft_wrap=True)


def record(run: Run, plan: Plan, described: dict[str, Any]) -> dict[str, Any]:
    """What stands in each checkpoint: how to repeat the run, which run it is, what was chosen for the machine."""
    fit = {**plan.fit._asdict(), "dtype": str(plan.fit.dtype).removeprefix("torch.")}
    return {"command": run.command, "run": described, "fit": fit, "versions": machine.versions()}


def write_adapters(
    folder: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase, run: Run, plan: Plan, corpus: Corpus,
    trained: Trained, written: dict[str, Any],
) -> None:  # fmt: skip
    """The adapters in `folder`, with metrics, curves and a model card that has conversations before and after."""
    seed, count = run.arguments.seed, len(plan.rows.validation)
    known = teach.untuned(run.adapters, written["run"]) if run.teach else None
    with model.disable_adapter():
        before: Dialogues = known.talks if known else converse(model, tokenizer, seed, plan.rows.openers)
    settings = {name: getattr(run, name) for name in CHOSEN}
    settings |= {"load_in_8bit": plan.fit.in_8bit, "r": run.lora.r, "lora_alpha": run.lora.lora_alpha}
    settings |= {name: getattr(plan.arguments, name) for name in TRAINING_SETTINGS}
    peak = machine.peak_memory(model.device)
    written = written | {
        "settings": settings,
        "facts": {
            "date": f"{datetime.date.today()}",
            "base model": run.base_model,
            "data": corpus.source,
            "licence of the data": corpus.licence or report.UNKNOWN,
            "licence of the base model": models.licence(run.base_model),
            "hardware": machine.hardware(model.device),
            "precision": precision_in_words(plan),
            "training time": machine.duration(trained.seconds),
            "step": f"{trained.best_step} of {trained.steps} trained, the best on the validation split",
            "validated on": f"{count:,} validation dialogues{rough(count)}",
            "peak memory": f"{peak / 1e9:.1f} GB",
            **machine.versions(),
        },
        "conversations": {"before": before, "after": converse(model, tokenizer, seed, plan.rows.openers)},
    }
    figures = {
        "train_tokens_per_second": trained.tokens_per_second,
        "train_tokens": trained.tokens,
        "train_seconds": trained.seconds,
        "steps": trained.steps,
        "best_step": trained.best_step,
        "peak_memory_bytes": peak,
        **{f"eval_{name}": value for name, value in trained.score.figures().items()},
        **{f"base_eval_{name}": value for name, value in trained.untuned.items()},
        "seed": seed,
    }
    lora.save(model, tokenizer, folder)
    report.write_report(folder, written, figures, trained.history)


def precision_in_words(plan: Plan) -> str:
    """ "int8 base, bfloat16"."""
    return f"{'int8 base, ' * plan.fit.in_8bit}{str(plan.fit.dtype).removeprefix('torch.')}"
