"""The report beside the adapters and the merged model: curves, figures, a model card."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData

from dialogue.data.corpus import Dialogues, rough
from dialogue.data.sources import DAILYDIALOG_LICENCE
from dialogue.json_files import as_json, read_json, write_json
from dialogue.measure.fitting import Fitted
from dialogue.measure.likelihood import Estimate
from dialogue.models import STARTER, STARTER_ON_HUB
from dialogue.storage import RUN_FILE, replace_files

UNKNOWN = "unknown: yours to find out"  # the licence of own data
FIGURES = {
    "nats per token": "nats_per_token",
    "perplexity per token": "perplexity",
    "perplexity per word": "word_perplexity",
    "bits per character": "bits_per_character",
}
Results = dict[str, dict[str, dict[str, Estimate]]]  # who -> what on -> figures
# Shape of metrics.json, as far as it is read back.
METRICS = {f"{of}_{name}": int | float for of in ("eval", "base_eval") for name in FIGURES.values()}


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
            for label, key in FIGURES.items()
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

On the replies of {facts.get("validated on", "the validation split")}.
Every reply token and its `<END>` count, nothing else:

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
        language=None if data == UNKNOWN else "en",  # of own data nobody knows it
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
    return f"## Conversations\n\nThe model's own replies.\n\n{markdown_table(['', *talks], rows)}\n\n"


def _sampler(fitted: Fitted) -> str:
    names = list(fitted.figures["people"])
    rows = [[name.replace("_", " "), *(f"{of[name]:.3f}" for of in fitted.figures.values())] for name in names]
    settings = ", ".join(f"{name} {value}" for name, value in vars(fitted.sampling).items() if name != "min_p")
    return f"""## Sampler

`generation_config.json` has the settings whose replies to {fitted.contexts} contexts were most like people's:
{settings}{rough(fitted.contexts)}; `main.py` starts with them.

{markdown_table(["replies", *fitted.figures], rows)}

"""


def keep_evaluation(folder: Path, about: str, results: Results) -> None:
    """Put figures of `dialogue.evaluate` into the model card of `folder`, and into its metrics.json where it has one,
    in place of those from before. Raises OSError."""
    rows = []
    for on, figures in results["tuned"].items():
        rows.append([f"**{on}**", *("" for _ in results)])
        for name in figures:
            cells = (of.get(on, {}).get(name) for of in results.values())
            rows.append([name.replace("_", " "), *(in_words(name, cell) if cell else "" for cell in cells)])
    table = markdown_table(["", *results], rows)
    card, metrics = (folder / "README.md").read_text(encoding="utf-8"), read_json(folder / "metrics.json")
    before, heading, after = card.partition("## How it reads")
    before = before.partition("## Evaluation")[0]
    texts = {"README.md": f"{before}## Evaluation\n\n{about}\n\n{table}\n\n{heading}{after}"}
    if metrics:
        texts["metrics.json"] = as_json(metrics | {"evaluation": as_numbers(results)})
    replace_files(folder, texts)


def as_numbers(results: Results) -> dict[str, Any]:
    """The same, as JSON has it."""
    return {who: {on: {n: e._asdict() for n, e in f.items()} for on, f in r.items()} for who, r in results.items()}


def in_words(name: str, estimate: Estimate) -> str:
    """ "82.3% (75%-89%)": a figure with its 95 % interval."""
    if name.startswith("share"):
        return f"{estimate.value:.1%} ({estimate.low:.0%}-{estimate.high:.0%})"
    digits = 1 if abs(estimate.value) >= 10 else 2
    value, low, high = (f"{figure:,.{digits}f}" for figure in estimate)
    return f"{value} ({low}-{high})"


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
