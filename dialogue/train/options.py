"""What was asked for: flags of `Fine_tuningmodel.py`, its presets and its editable values, in one `Run`."""

import argparse
import dataclasses
import difflib
import functools
import os
import re
import shlex
import sys
from itertools import pairwise, product
from pathlib import Path
from typing import Any, cast

from peft import LoraConfig
from transformers import BitsAndBytesConfig, HfArgumentParser, TrainingArguments
from transformers.integrations import get_available_reporting_integrations

from dialogue import machine, storage
from dialogue.errors import Parser, UserError, in_a_line
from dialogue.train.refused import LORA as OBEYED_OF_LORA
from dialogue.train.refused import check_obeyable
from dialogue.train.teach import REPLAY, TAUGHT

EPILOGUE = """
Any field of transformers' TrainingArguments is a flag as well and overrides the value in the script, for instance
  --num_train_epochs 1   --max_steps 100   --learning_rate 1e-4   --per_device_train_batch_size 4
  --gradient_accumulation_steps 2   --gradient_checkpointing False   --seed 7   --report_to tensorboard
All of them: https://huggingface.co/docs/transformers/main_classes/trainer#transformers.TrainingArguments
"""

# TrainingArguments that nothing else checks before they fail somewhere in a library: name, least, most.
RANGES = (
    ("learning_rate", 0, 1e6), ("num_train_epochs", 1e-6, 1e9), ("seed", 0, 2**32 - 1),
    ("per_device_train_batch_size", 1, 1e9), ("per_device_eval_batch_size", 1, 1e9),
    ("gradient_accumulation_steps", 1, 1e9),
)  # fmt: skip

# What --teach changes: steps enough for a few lessons, each with a row of them (`teach.mix`), and one evaluation.
TEACHING: dict[str, Any] = {
    "num_train_epochs": 1, "max_steps": -1, "learning_rate": 1.1e-3, "lr_scheduler_type": "warmup_stable_decay",
    "train_sampling_strategy": "sequential",
    "per_device_train_batch_size": TAUGHT + REPLAY, "gradient_accumulation_steps": 1, "eval_strategy": "no",
    "save_steps": 0.5,
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that was asked for: a flag, else the preset's value, else the script's."""

    base_model: str
    dataset: str
    max_train_dialogues: int | None
    max_length: int  # tokens a row
    learn: str  # "bot" or "both"
    bot: str | None  # who of a chat is the bot
    silence: int  # minutes that part two conversations of a chat
    adapter_dir: str
    merged_dir: str
    early_stopping_patience: int
    load_in_8bit: str  # "auto", "yes" or "no"
    keep_dropout: bool
    budget: float | None  # seconds that the training may take; None: as long as its steps take
    lora: LoraConfig
    quant: BitsAndBytesConfig
    arguments: TrainingArguments  # with the batch that was asked for, however it will be divided
    checkpointing: bool | None  # None: as memory asks
    teach: bool  # go on from the adapters with lessons
    plan_only: bool
    resume: bool | None
    overwrite: bool
    yes: bool
    cheaper: tuple[str, ...]  # other presets
    command: str  # repeats this run

    @property
    def adapters(self) -> Path:
        return Path(self.adapter_dir)

    @property
    def merged(self) -> Path:
        return Path(self.merged_dir)

    @property
    def checkpoints(self) -> Path:
        return Path(str(self.arguments.output_dir))


def resolve(
    argv: list[str] | None, presets: dict[str, dict[str, Any]], lora: LoraConfig, quant: BitsAndBytesConfig,
    arguments: TrainingArguments, **values: Any,
) -> Run:  # fmt: skip
    """Flags over presets over the script's `values`. Raises UserError for what does not exist or cannot be obeyed."""
    flags, fields = parse(argv, presets)
    preset = presets[flags.preset]
    given = {name: getattr(flags, name) for name in values if getattr(flags, name) is not None}
    chosen = {name: preset.get(name, value) for name, value in values.items()} | given
    if flags.teach:
        settings, lora = settings_of(Path(chosen["adapter_dir"]))
        chosen |= {name: settings[name] for name in values if name in settings and name != "adapter_dir"} | given
    if chosen["bot"] and not flags.learn:
        chosen["learn"] = "bot"  # the others of a chat are other people
    on_cpu = {"use_cpu": True} if machine.pick_device().type == "cpu" else {}  # processes talk through gloo
    arguments = override(arguments, on_cpu | preset.get("training", {}) | (TEACHING if flags.teach else {}) | fields)
    lora = dataclasses.replace(lora, **({} if flags.teach else preset.get("lora", {})))
    kept: Any = arguments.activation_checkpointing
    decided = kept or {"activation_checkpointing", "gradient_checkpointing"} & set(fields)
    run = Run(
        **chosen, load_in_8bit=flags.load_in_8bit, keep_dropout=flags.keep_dropout, budget=flags.budget, lora=lora,
        quant=quant, arguments=arguments, checkpointing=bool(kept) if decided else None, teach=flags.teach,
        plan_only=flags.plan, resume=flags.resume, overwrite=flags.overwrite, yes=flags.yes,
        cheaper=tuple(name for name in presets if name != flags.preset), command=repeat_command(argv),
    )  # fmt: skip
    check_obeyable(arguments, lora, quant)
    check_kept(run)
    return run


def settings_of(adapters: Path) -> tuple[dict[str, Any], LoraConfig]:
    """What the run that wrote the adapters was asked for. Raises UserError where there are no adapters."""
    if not (adapters / storage.RUN_FILE).is_file():
        raise UserError(f"{adapters} holds no adapters to teach: train first, or name their folder with --adapter_dir")
    run = storage.read_json(adapters / storage.RUN_FILE, {"settings": {"base_model": str, "dataset": str}})
    try:
        saved = LoraConfig.from_pretrained(str(adapters))
        kept = {name: getattr(saved, name) for name in OBEYED_OF_LORA.split() if not name.startswith("peft_")}
        return run["settings"], LoraConfig(task_type="CAUSAL_LM", **kept)
    except (OSError, ValueError, TypeError, KeyError) as error:
        raise UserError(f"{adapters} holds no adapters that can be read: {in_a_line(error)}") from error


def check_kept(run: Run) -> None:
    """Raises UserError where the run would replace what its own result refers to, by whatever path or link."""
    for source, folder in product((run.base_model, run.dataset), (run.adapters, run.merged)):
        inside = os.path.exists(source) and Path(os.path.realpath(source)).is_relative_to(os.path.realpath(folder))
        if inside and (folder / storage.RUN_FILE).is_file():  # what is no run's result is refused in any case
            raise UserError(f"{folder} would be replaced, and {source} is in it: choose another folder for the result")


def parse_duration(text: str) -> float:
    """ "90s", "20m", "1h30m" -> seconds. Raises UserError for anything else."""
    match = re.fullmatch(r"(?:(\d+)h)?(?:(\d+)m)?(?:(\d+)s)?", text.strip().lower())
    hours, minutes, seconds = (int(part or 0) for part in match.groups()) if match else (0, 0, 0)
    if not hours + minutes + seconds:
        raise UserError(f"--budget {text}: write a time as 90s, 20m or 1h30m")
    return 3600.0 * hours + 60 * minutes + seconds


def parse(argv: list[str] | None, presets: dict[str, dict[str, Any]]) -> tuple[argparse.Namespace, dict[str, Any]]:
    """Flags -> (the project's own, TrainingArguments fields that were given). An own value that was not given is None,
    or False for a switch. Raises UserError for a flag or a value that does not exist."""
    what = "Fine-tune a language model on dialogues with LoRA, then merge it. Without flags, the script's values hold."
    formatted: Any = argparse.RawDescriptionHelpFormatter
    parser = Parser("Fine_tuningmodel.py", None, what, EPILOGUE, formatter_class=formatted, allow_abbrev=False)
    add = parser.add_argument
    add("--preset", default="xl", metavar="NAME", choices=presets,
        help="xl: GPT-2-XL in 8-bit, a GPU of 8 GB or more (the default); small: GPT-2 124M, any computer; "
        "starter: SmolLM2-135M and chitchat from the Python package index, minutes on two CPU cores")  # fmt: skip
    add("--base_model", metavar="NAME", help="a causal language model: its name on the hub, or a folder")
    add("--dataset", metavar="SOURCE", help="dailydialog, chitchat, or a file or folder of dialogues")
    add("--max_train_dialogues", type=_count, metavar="N", help="train on the first N dialogues only")
    add("--max_length", type=_count, metavar="N", help="tokens a row; longer dialogues are cut between turns")
    add("--learn", choices=["bot", "both"], help="whose turns are learned: the bot's, or both speakers'")
    add("--bot", metavar="NAME", help="whose turns are the bot's, by name; without --learn, only these are learned")
    add("--silence", type=_count, metavar="MINUTES", help="a silence of so many parts two conversations of a chat")
    add("--adapter_dir", metavar="DIR", help="where the adapters go")
    add("--merged_dir", metavar="DIR", help="where the merged model goes")
    add("--load_in_8bit", choices=["auto", "yes", "no"], default="auto",
        help="8-bit base weights while training; auto: on a GPU from a billion parameters on, "
        "or where memory asks for it")  # fmt: skip
    add("--budget", type=parse_duration, metavar="TIME",
        help="train for so long (90s, 20m, 1h30m), evaluations included, instead of epochs")  # fmt: skip
    add("--keep_dropout", action="store_true", help="leave the base model's own dropout on (a frozen base needs none)")
    add("--teach", action="store_true", help="go on from the adapters with the lessons that /edit and /good kept")
    add("--plan", action="store_true", help="rehearse, print the plan, and stop")
    add("--yes", action="store_true", help="start without asking, however long it takes")
    add("--resume", action=argparse.BooleanOptionalAction,
        help="go on with an unfinished run of these settings (default: if there is one), or begin anew")  # fmt: skip
    add("--early_stopping_patience", type=functools.partial(_count, least=0), metavar="N",
        help="stop after N evaluations in a row without a better one; 0: never")  # fmt: skip
    add("--overwrite", action="store_true", help="replace an earlier run's result, and another unfinished run")
    add("--debug", action="store_true", help="show a traceback for every error")
    own, rest = parser.parse_known_args(argv)
    return own, _training_fields(rest)


def _training_fields(words: list[str]) -> dict[str, Any]:
    """The TrainingArguments fields among `words`, and only those that were given."""
    parser = Parser(add_help=False, allow_abbrev=False)
    for action in HfArgumentParser(cast(Any, TrainingArguments))._actions:
        if action.option_strings and action.dest != "help":
            action.default, action.required = argparse.SUPPRESS, False
            parser._add_action(action)
    given, unknown = parser.parse_known_args(words)
    if unknown:
        names = [name for action in parser._actions for name in action.option_strings]
        close = difflib.get_close_matches(unknown[0], names, n=1)
        raise UserError(f"unknown flag {unknown[0]}" + (f": did you mean {close[0]}?" if close else "; see --help"))
    return vars(given)


def override(arguments: TrainingArguments, fields: dict[str, Any]) -> TrainingArguments:
    """A copy of `arguments` with some fields replaced. Raises UserError for a value it refuses.
    `gradient_checkpointing` is the older name of `activation_checkpointing`, and a copy follows the newer."""
    fields = {name.replace("gradient_checkpointing", "activation_checkpointing"): fields[name] for name in fields}
    try:
        replaced = dataclasses.replace(arguments, **fields)
    except (ValueError, TypeError, ImportError) as error:
        raise UserError(f"training arguments: {' '.join(str(error).split())}") from error
    for name, low, high in RANGES:
        if not low <= getattr(replaced, name) <= high:
            raise UserError(f"{name} must be between {low:g} and {high:g}, not {getattr(replaced, name)}")
    missing = {*(replaced.report_to or [])} - {"none", "all", *get_available_reporting_integrations()}
    if missing:
        raise UserError(f"--report_to {' '.join(sorted(missing))}: not installed here; install it with pip first")
    return replaced


def repeat_command(argv: list[str] | None) -> str:
    """The exact command that repeats this run, without the token of `--hub_token`: others will read it."""
    words = ["python", "Fine_tuningmodel.py", *(sys.argv[1:] if argv is None else argv)]
    is_token = re.compile("--hub[_-]token").fullmatch
    shown = [word for before, word in pairwise(words) if not (is_token(before) or is_token(word.partition("=")[0]))]
    return shlex.join([words[0], *shown])


def _count(text: str, least: int = 1) -> int:
    number = int(text)
    if number < least:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return number
