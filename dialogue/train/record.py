"""What a run writes down about itself, for its `run.json`, `metrics.json` and model cards."""

import datetime
from pathlib import Path
from typing import Any

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from dialogue import machine, models
from dialogue.data.corpus import Corpus, Dialogues, rough
from dialogue.measure import report
from dialogue.measure.replies import converse
from dialogue.train import lora
from dialogue.train.options import Run
from dialogue.train.plan import Plan
from dialogue.train.trainer import Trained

# The TrainingArguments that a reader of the model card wants to see.
TRAINING_SETTINGS = (
    "num_train_epochs", "max_steps", "per_device_train_batch_size", "gradient_accumulation_steps", "learning_rate",
    "lr_scheduler_type", "warmup_steps", "weight_decay", "optim", "activation_checkpointing", "seed",
)  # fmt: skip
CHOSEN = (
    "base_model", "dataset", "max_train_dialogues", "max_length", "learn", "bot", "silence", "adapter_dir",
    "merged_dir", "early_stopping_patience",
)  # fmt: skip


def begin(run: Run, plan: Plan, described: dict[str, Any]) -> dict[str, Any]:
    """What stands in each checkpoint: how to repeat the run, which run it is, what was chosen for the machine."""
    return {"command": run.command, "run": described, "fit": plan.fit.to_json(), "versions": machine.versions()}


def write_adapters(
    folder: Path, model: PeftModel, tokenizer: PreTrainedTokenizerBase, run: Run, plan: Plan, corpus: Corpus,
    trained: Trained, record: dict[str, Any],
) -> None:  # fmt: skip
    """The adapters in `folder`, with metrics, curves and a model card that has conversations before and after."""
    seed, count = run.arguments.seed, len(plan.rows.validation)
    with model.disable_adapter():
        before: Dialogues = converse(model, tokenizer, seed, plan.rows.openers)
    settings = {name: getattr(run, name) for name in CHOSEN}
    settings |= {"load_in_8bit": plan.fit.in_8bit, "r": run.lora.r, "lora_alpha": run.lora.lora_alpha}
    settings |= {name: getattr(plan.arguments, name) for name in TRAINING_SETTINGS}
    peak = machine.peak_memory(model.device)
    record = record | {
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
        **{f"base_eval_{name}": value for name, value in trained.untuned.figures().items()},
        "seed": seed,
    }
    lora.save(model, tokenizer, folder)
    report.write_report(folder, record, figures, trained.history)


def precision_in_words(plan: Plan) -> str:
    """ "int8 base, bfloat16"."""
    return f"{'int8 base, ' * plan.fit.in_8bit}{str(plan.fit.dtype).removeprefix('torch.')}"
