"""Parts of a training for tests: a `Run` from flags, a `Plan` for rows that are there already."""

import Fine_tuningmodel as script
from dialogue.measure.likelihood import HeldOut
from dialogue.train import options
from dialogue.train.memory import Fit
from dialogue.train.plan import Plan, Rehearsal, count_steps
from dialogue.train.rows import Rows
from dialogue.train.trainer import Trained, train


def run_of(*flags, arguments=None, lora=None, quant=None):
    """What `Fine_tuningmodel.py` makes of flags, with edited values in place of its own."""
    names = ("base_model", "dataset", "max_train_dialogues", "max_length", "learn", "bot", "silence", "adapter_dir",
             "merged_dir", "early_stopping_patience")  # fmt: skip
    return options.resolve(
        list(flags), script.presets, lora or script.lora_config, quant or script.quant_config,
        arguments or script.training_args, **{name: getattr(script, name) for name in names},
    )  # fmt: skip


def plan_of(rows, held_out, arguments, dtype):
    """The plan of a training on packed rows as `arguments` stand, without a rehearsal."""
    fit = Fit(dtype, False, False, arguments.per_device_train_batch_size)
    whole = Rows(rows, held_out, [], 0, len(rows), [], [])
    return Plan(whole, fit, arguments, Rehearsal(1.0, 1, 0), count_steps(len(rows), arguments), 1.0, True)


def train_on(model, tokenizer, rows, held_out: HeldOut, arguments, *flags, callbacks=()) -> Trained:
    """Train a model with LoRA on packed rows."""
    run = run_of("--early_stopping_patience", "0", *flags, arguments=arguments)
    plan = plan_of(rows, held_out, arguments, model.dtype)
    return train(model, tokenizer, plan, run, {}, callbacks=callbacks)
