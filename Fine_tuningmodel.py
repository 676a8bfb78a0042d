"""Fine-tune a language model on dialogues with LoRA, and merge the result for `main.py` to chat with.

    python Fine_tuningmodel.py                     GPT-2-XL on DailyDialog, on a GPU of 8 GB or more
    python Fine_tuningmodel.py --preset small      GPT-2 124M, on any computer
    python Fine_tuningmodel.py --preset starter    a small model, minutes on two CPU cores, no model hub

The values below are the configuration: edit them, or override one for a single run with a flag of the
same name (`--help` lists them).
"""

import logging
import sys
import time
import warnings
from pathlib import Path

from dialogue.errors import UserError, exit_code  # before the libraries: `dialogue` quietens what they say

# isort: split
import torch
import transformers
from peft import LoraConfig
from rich.console import Console
from transformers import BitsAndBytesConfig, TrainingArguments

from dialogue import hub, machine, models, storage
from dialogue.data import corpus, packing
from dialogue.measure import merge, replies, report
from dialogue.measure.likelihood import hold_out
from dialogue.prompt import add_roles
from dialogue.train import lora, memory, options, pace, plan, runs, speedups, trainer
from dialogue.train.loss import chunked_head

# ---- Editable values ---------------------------------------------------------------------------------

base_model = "gpt2-xl"  # a causal language model: its name on the hub, or a folder
dataset = "dailydialog"  # or "chitchat", or a file or folder of dialogues
max_train_dialogues = None  # train on the first so many; None: on all
max_length = 512  # tokens a row; dialogues are packed into rows, longer ones are cut between turns
learn = "both"  # whose turns carry loss: "bot", or "both" (either speaker is a person talking)
adapter_dir = "gpt2-dialogue-lora"  # the adapters, with the report of the run
merged_dir = "gpt2-dialogue-full"  # the merged model that main.py chats with
early_stopping_patience = 2  # stop after so many evaluations in a row without a better one; 0: never

quant_config = BitsAndBytesConfig(
    load_in_8bit=True,
    llm_int8_threshold=6.0,  # activations above this are multiplied in 16 bits (LLM.int8())
)

lora_config = LoraConfig(
    r=8,  # rank of the update: more learns more, and takes more memory
    lora_alpha=32,  # the update is scaled by lora_alpha / r
    lora_dropout=0.05,
    target_modules=["c_attn", "c_proj"],  # GPT-2's; other families have theirs in dialogue/models.py
    task_type="CAUSAL_LM",
)

training_args = TrainingArguments(
    output_dir="gpt2-dialogue-checkpoints",  # adapters and optimizer state while training
    num_train_epochs=3,
    per_device_train_batch_size=8,  # packed rows of max_length tokens
    learning_rate=3e-4,
    lr_scheduler_type="cosine",
    warmup_steps=0.03,  # share of all steps over which the learning rate rises
    activation_checkpointing=False,  # True: gradient checkpointing in any case; False: where memory asks for it
    eval_strategy="epoch",
    save_strategy="steps",
    save_steps=0.05,  # a checkpoint after each twentieth of all steps; deleted when the run has its result
    save_total_limit=2,
    logging_steps=5,
    report_to="none",
    seed=42,
)

# What a preset changes; `lora` holds fields of LoraConfig, `training` fields of TrainingArguments.
presets: dict[str, dict] = {
    "xl": {},
    "small": {
        "base_model": "gpt2",
        "training": {"learning_rate": 1e-3},
    },
    "starter": {
        "base_model": models.STARTER,
        "dataset": "chitchat",
        "max_train_dialogues": 1500,  # 600 take half of the time; word perplexity is 171 then, not 148
        # One pass sees nothing twice, so there is nothing to regularise; on a CPU dropout costs a sixth of the time.
        "lora": {"lora_dropout": 0.0},
        "max_length": 256,  # chitchat's episodes have 87 tokens in the mean; attention in long rows costs time
        "training": {
            "num_train_epochs": 1,
            "per_device_train_batch_size": 4,
            "learning_rate": 2e-3,
            "eval_strategy": "steps",
            "eval_steps": 0.34,  # twice on the way, so that one can watch it learn
        },
    },
}

# ---- The recipe --------------------------------------------------------------------------------------


def main(argv: list[str] | None = None) -> None:
    """Load, pack, attach, rehearse, train, save, merge, certify."""
    flags, training_flags = options.parse(argv, presets)
    preset = presets[flags.preset]
    names = ("base_model", "dataset", "max_train_dialogues", "max_length", "learn", "adapter_dir", "merged_dir",
             "early_stopping_patience")  # fmt: skip
    given = {name: getattr(flags, name) for name in names if getattr(flags, name) is not None}
    chosen = {name: given.get(name, preset.get(name, globals()[name])) for name in names}
    device = machine.pick_device()
    on_cpu = {"use_cpu": device.type == "cpu"}  # several processes then talk through gloo
    arguments = options.override(training_args, on_cpu | preset.get("training", {}) | training_flags)
    adapters, merged = Path(chosen["adapter_dir"]), Path(chosen["merged_dir"])
    budget = pace.Budget(pace.parse_duration(flags.budget)) if flags.budget else None
    console = Console(quiet=arguments.process_index > 0)
    if arguments.push_to_hub and not flags.plan:
        hub.check_login(arguments.hub_token)
    transformers.set_seed(arguments.seed)

    # Dialogues -> rows of token ids
    talk = corpus.without_leaks(corpus.load_corpus(chosen["dataset"]))
    config = models.load_config(chosen["base_model"])
    tokenizer = models.load_tokenizer(chosen["base_model"])
    roles = add_roles(tokenizer)
    length = min(chosen["max_length"], models.context_length(config))
    train_pieces, notes = packing.encode(tokenizer, talk.train[: chosen["max_train_dialogues"]], length)
    held_out = talk.validation[: max(100, len(train_pieces) // 10)]
    validation_pieces, _ = packing.encode(tokenizer, held_out, length)
    if not train_pieces or not validation_pieces:
        raise UserError(f"no dialogue of {chosen['dataset']} fits into {length} tokens: raise --max_length")
    rows = packing.pack(train_pieces, tokenizer, length, chosen["learn"])
    validation = hold_out(validation_pieces, tokenizer, length)
    sample = [packing.to_row(piece, "bot", roles.bot) for piece in validation_pieces[:100]]

    # What an earlier start of this run left, if there was one
    lora_changes = preset.get("lora", {})
    own = {name: getattr(flags, name) for name in ("load_in_8bit", "budget", "keep_dropout")}
    asked = {**chosen, **lora_changes, **own}
    asked = runs.describe(asked, lora_config, arguments, rows, validation.rows)
    begun = runs.Begun()
    if not flags.plan:
        begun = runs.look(asked, adapters, merged, arguments, flags.resume, flags.overwrite)
        console.print(runs.in_words(begun, adapters), end="", highlight=False, markup=False, soft_wrap=True)

    # Base model, as precise and as quick as memory allows, with LoRA and the three token rows on top
    dtype = pace.agreed(machine.pick_dtype(device, begun.decided.get("dtype")))
    parameters = models.count_parameters(config)
    needs = memory.Needs(
        arguments.per_device_train_batch_size, length, packing.mean_span(rows), dtype, device=device.type
    )  # fmt: skip
    dropout = lora_changes.get("lora_dropout", lora_config.lora_dropout)
    fixed = memory.decided(flags.load_in_8bit, training_flags, arguments, device, parameters)
    available = machine.free_memory(device, arguments.world_size)
    needs, expected = pace.agreed(memory.choose(config, lora_config.r, dropout, needs, available, fixed))
    needs = needs._replace(**begun.decided.get("needs", {}))
    accumulation = arguments.gradient_accumulation_steps * arguments.per_device_train_batch_size // needs.rows
    expected += machine.used_memory(device)
    if not flags.plan:
        storage.check_space({merged: int(2.1 * parameters)})
    quantised = quant_config if needs.in_8bit else None
    speedups.keep_freed_memory(not needs.in_8bit)

    base = models.load_base(chosen["base_model"], dtype, device, tokenizer, quantised)
    speedups.trim_base(base, flags.keep_dropout)
    model = lora.attach(base, lora_config, roles, lora_changes)
    speedups.speed_up(model)
    arguments = options.override(
        arguments,
        # gradients underflow in float16 unless they are scaled, which is what Trainer's fp16 does
        {
            "fp16": dtype == torch.float16, "dataloader_pin_memory": device.type == "cuda",
            "activation_checkpointing": needs.checkpointing,
            "per_device_train_batch_size": needs.rows, "gradient_accumulation_steps": accumulation,
        },
    )  # fmt: skip

    if begun.trained:  # a stop came between the adapters and the merged model
        lora.load_adapter(model, adapters)
    else:
        # Rehearsal and plan
        rehearsed, arguments = plan.rehearse_what_fits(model, tokenizer, rows, arguments)
        rehearsed = pace.agreed(rehearsed)
        steps, per_step, seconds = plan.foresee(rehearsed, rows, validation, arguments)
        if budget:
            share = plan.affordable_share(rehearsed, validation, budget.seconds, arguments)
            validation = hold_out(validation_pieces[: max(1, int(share * len(validation_pieces)))], tokenizer, length)
            steps, seconds = max(1, int(budget.seconds / per_step)), budget.seconds
            # The clock ends the run: twice the steps that are likely to fit are never reached.
            arguments = options.override(arguments, {"max_steps": 2 * steps})
        precision = f"{'int8 base, ' if needs.in_8bit else ''}{str(dtype).removeprefix('torch.')}"
        report.show_example(console, tokenizer, rows[-1])
        report.show_plan(
            console,
            {
                "base model": f"{chosen['base_model']} ({parameters / 1e6:.0f} M parameters)",
                "device": machine.hardware(device),
                "precision": precision,
                "trainable": f"{model.num_parameters(only_trainable=True):,} parameters: LoRA r={lora_config.r} "
                "and three token rows",
                "dialogues": "; ".join([f"{len(train_pieces):,} of {talk.source}", *talk.notes, *notes]),
                "tokens": f"{packing.count_tokens(rows):,} an epoch, in {len(rows):,} rows of {length}",
                "steps": report.steps_in_words(steps, len(rows), arguments),
                "batch": report.batch_in_words(arguments),
                "memory": f"{expected / 1e9:.1f} GB at the peak by arithmetic, "
                f"{rehearsed.peak_bytes / 1e9:.1f} GB rehearsed; {available / 1e9:.0f} GB were free",
                "time": f"about {machine.duration(seconds)} "
                f"(rehearsed: {rehearsed.tokens / rehearsed.seconds:.0f} tokens/s)",
            },
        )
        if flags.plan:
            return
        runs.check_space(model, arguments, adapters, merged)
        plan.ask_before_days(seconds, flags.yes, [name for name in presets if name != flags.preset])

        # Train
        command = options.repeat_command(argv)
        report.show_line(console, f"Repeat this run with: {command}")
        decided = {
            "dtype": str(dtype).removeprefix("torch."),
            "load_in_8bit": needs.in_8bit,
            "needs": {
                "rows": arguments.per_device_train_batch_size,
                "in_8bit": needs.in_8bit,
                "checkpointing": needs.checkpointing,
            },
        }
        run = {"command": command, "run": asked, "decided": decided, "versions": machine.versions()}
        began = time.perf_counter()
        with chunked_head(model):
            untuned = validation.score_in_shares(model, arguments)
        pacing = trainer.Pacing(time.perf_counter() - began, budget)
        # Trainer itself would upload every checkpoint.
        local = options.override(arguments, {"push_to_hub": False})
        patience = chosen["early_stopping_patience"]
        trained = trainer.train(model, tokenizer, rows, validation, local, run, begun.checkpoint, patience, pacing)

        # Save the adapters, with the report
        if not arguments.process_index:
            with model.disable_adapter():
                before = replies.converse(model, tokenizer, arguments.seed)
            run |= {
                "settings": report.settings({**chosen, "load_in_8bit": needs.in_8bit}, lora_config, arguments),
                "facts": report.facts(chosen["base_model"], talk, device, precision, trained),
                "conversations": {"before": before, "after": replies.converse(model, tokenizer, arguments.seed)},
            }
            with storage.whole_folder(adapters) as folder:
                lora.save_adapter(model, tokenizer, str(folder))
                figures = report.metrics(trained, untuned, device, arguments.seed)
                report.write_report(folder, run, figures, trained.history)

    # Merge into a fresh 16-bit base, and compare what came out with what was trained
    if arguments.process_index:
        return  # the first process writes
    certificate = merge.write_merged(model, dtype, adapters, merged, tokenizer, sample, talk.validation)
    runs.clear(runs.home(arguments))
    report.show_result(console, adapters, merged, certificate)
    if arguments.push_to_hub:
        token, private = arguments.hub_token, arguments.hub_private_repo
        for address in hub.push(adapters, merged, arguments.hub_model_id, private, token):
            report.show_line(console, f"Uploaded: {address}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # addressed to the authors of libraries
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # one line a multiplication, of no use to anyone
    transformers.logging.disable_progress_bar()
    sys.exit(exit_code(main, debug="--debug" in sys.argv))
