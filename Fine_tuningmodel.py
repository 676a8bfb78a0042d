"""Fine-tune a language model on dialogues with LoRA, and merge the result for `main.py` to chat with.

    python Fine_tuningmodel.py                     GPT-2-XL on DailyDialog, on a GPU of 8 GB or more
    python Fine_tuningmodel.py --preset small      GPT-2 124M, on any computer
    python Fine_tuningmodel.py --preset starter    a small model, minutes on two CPU cores, no model hub

The values below are the configuration: edit them, or override one for a single run with a flag of the
same name (`--help` lists them).
"""

import logging
import sys
import warnings
from contextlib import closing

from dialogue.errors import exit_code  # before the libraries: `dialogue` quietens what they say

# isort: split
import transformers
from peft import LoraConfig
from rich.console import Console
from torch import distributed
from transformers import BitsAndBytesConfig, TrainingArguments

from dialogue import hub, machine, models, storage
from dialogue.data import corpus, sources
from dialogue.measure import merge
from dialogue.prompt import add_roles
from dialogue.train import lora, memory, options, progress, rows, runs, show, speedups, teach, trainer
from dialogue.train import plan as planning

# ---- Editable values ---------------------------------------------------------------------------------

base_model = "gpt2-xl"  # a causal language model: its name on the hub, or a folder
dataset = "dailydialog"  # or "chitchat", or a file or folder of dialogues
max_train_dialogues = None  # train on the first so many; None: on all
max_length = 512  # tokens a row; dialogues are packed into rows, longer ones are cut between turns
learn = "both"  # whose turns carry loss: "bot", or "both" (either speaker is a person talking)
bot = None  # whose turns are the bot's, by name: a chat has no roles; the loss is then that one's, but for --learn both
silence = 60  # minutes without a message that part two conversations of a chat
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
    """What is asked for, then the recipe; no other run may write into the same folders meanwhile."""
    run = options.resolve(
        argv, presets, lora_config, quant_config, training_args,
        base_model=base_model, dataset=dataset, max_train_dialogues=max_train_dialogues, max_length=max_length,
        learn=learn, bot=bot, silence=silence, adapter_dir=adapter_dir, merged_dir=merged_dir,
        early_stopping_patience=early_stopping_patience,
    )  # fmt: skip
    writes = not run.plan_only and not run.arguments.process_index  # the first process writes, a plan does not
    if writes:
        hub.check_login(run.arguments)
    locked = storage.locked(*(run.adapters, run.merged, run.checkpoints) if writes else ())
    with locked, closing(progress.Finishing()) as told:
        fine_tune(run, told)


def fine_tune(run: options.Run, told: progress.Finishing) -> None:
    """Dialogues -> rows -> rehearsal and plan -> adapters -> merged model with its certificate."""
    device, console = machine.pick_device(), Console(quiet=run.arguments.process_index > 0)
    show.line(console, "\n".join(machine.gpu_notes(training=True)))
    transformers.set_seed(run.arguments.seed)

    # Dialogues -> rows of token ids
    dialogues = corpus.without_leaks(sources.load_corpus(run.dataset, run.bot, run.silence))
    tokenizer = models.load_tokenizer(run.base_model)
    add_roles(tokenizer)  # <USER>, <BOT>, <END>
    prepared = rows.prepare(dialogues, tokenizer, run)

    # What an earlier start of this very run left: nothing, a checkpoint, or whole adapters
    begun = runs.find(run, described := runs.describe(run, prepared))
    show.line(console, runs.in_words(begun, run))

    # The base model, as precise and as quick as this machine allows, with LoRA and three token rows
    load, before = memory.load_of(run, prepared, tokenizer, device), machine.used_memory(device)
    fit = begun.fit or memory.choose(load, run, device)
    base = models.load_base(run.base_model, fit.dtype, device, tokenizer, quant_config if fit.in_8bit else None)
    model = speedups.apply(lora.attach(base, run.lora, tokenizer), run.keep_dropout)
    machine.keep_freed_memory(not fit.in_8bit)
    if begun.trained or run.teach:  # a stop came between the adapters and the merged model, or lessons come on top
        lora.load(model, run.adapters)
    if not begun.trained:
        plan = planning.rehearse(model, tokenizer, prepared, run, fit)  # two real batches forward and backward
        show.example(console, tokenizer, plan.rows.train[-1])
        show.plan(console, plan, run, dialogues, model, load, before)
        if run.plan_only:
            return
        runs.check_space(model, run)
        plan.confirm(run)  # more than a day asks first
        show.line(console, f"Repeat this run with: {run.command}")
        written = show.record(run, plan, described)
        untaught = teach.ask(model, tokenizer, prepared.lessons)
        trained = trainer.train(model, tokenizer, plan, run, written, begun.checkpoint)
        show.lessons(console, run, prepared.lessons, untaught, teach.ask(model, tokenizer, prepared.lessons), trained)
        if not run.arguments.process_index:
            told("conversations, adapters")
            with storage.whole_folder(run.adapters) as folder:  # appears whole, or not at all
                show.write_adapters(folder, model, tokenizer, run, plan, dialogues, trained, written)
    if run.arguments.process_index:
        return  # the first process writes

    # Merge into a fresh 16-bit base, and compare what came out with what was trained
    told("certificate: the trained model")
    witness = merge.witness_of(model, prepared.certificate, tokenizer.pad_token_id)
    del base, model
    with storage.whole_folder(run.merged) as folder:
        told("merge")
        merge.write(run.base_model, run.adapters, tokenizer, folder)
        certificate, fitted = merge.judge(
            witness, folder, prepared.certificate, dialogues.validation, tokenizer.pad_token_id, fit.dtype, device,
            fit.in_8bit, run.arguments.seed, told, merge.known_sampler(run.merged) if run.teach else None,
        )  # fmt: skip
        merge.finish(folder, run.adapters, certificate, fitted)
    runs.clear(run.checkpoints)
    show.result(console, run, certificate)
    for address in hub.push(run.adapters, run.merged, run.arguments) if run.arguments.push_to_hub else ():
        show.line(console, f"Uploaded: {address}")


if __name__ == "__main__":
    warnings.filterwarnings("ignore", category=FutureWarning)  # addressed to the authors of libraries
    transformers.logging.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # one line a multiplication, of no use to anyone
    transformers.logging.disable_progress_bar()
    code = exit_code(main, debug="--debug" in sys.argv)
    if distributed.is_initialized():
        distributed.destroy_process_group()
    sys.exit(code)
