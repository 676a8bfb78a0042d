"""Which settings should the starter have? Each is changed alone, on one number of training dialogues.

    python -m benchmarks.settings                    all of them; prints a table
    python -m benchmarks.settings --only "all projections, r 16"    one of them
    python -m benchmarks.settings --dataset FOLDER                  on other dialogues: DailyDialog's release

Judged is whether the model listens: whether it finds the true reply among 20, whether the untuned base finds the
context of its replies among 20, and how often it parrots, loops, or says the same to different messages.
"""

import argparse
import dataclasses
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import transformers

import Fine_tuningmodel as script
from dialogue import machine, models
from dialogue.chat.batch import Reply, answer
from dialogue.chat.sampling import CHAT, Sampling
from dialogue.data import corpus, sources
from dialogue.measure import listening, report
from dialogue.measure.replies import find_contexts, measure
from dialogue.prompt import BOT, END, USER, add_roles
from dialogue.train import lora, memory, options, rows, speedups, trainer
from dialogue.train import plan as planning

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
COLD = Sampling(temp=0, repetition_penalty=1.06)


def from_chat_markers(model: Any, tokenizer: Any) -> None:
    """Begin the role rows between the base's own chat markers and the words: <|im_start|> with "user"."""
    weight = model.get_input_embeddings().weight
    ids = tokenizer.convert_tokens_to_ids
    for token, word in ((USER, "user"), (BOT, "assistant")):
        spoken = weight[tokenizer(word, add_special_tokens=False)["input_ids"]].float().mean(0)
        weight.data[ids(token)] = ((weight[ids("<|im_start|>")].float() + spoken) / 2).to(weight.dtype)
    weight.data[ids(END)] = weight[ids("<|im_end|>")]


# name -> what differs from the starter's preset
VARIATIONS: dict[str, dict[str, Any]] = {
    "as the preset": {},
    "learning rate 1e-3": {"flags": ["--learning_rate", "1e-3"]},
    "learning rate 4e-3": {"flags": ["--learning_rate", "4e-3"]},
    "2 rows a step": {"flags": ["--per_device_train_batch_size", "2"]},
    "loss on the bot's turns alone": {"flags": ["--learn", "bot"]},
    "roles begin as chat markers": {"rows": from_chat_markers},
    "all projections, r 8": {"lora": {"target_modules": ALL}},
    "all projections, r 16": {"lora": {"target_modules": ALL, "r": 16}},
    "all projections, r 16, 2 rows a step": {
        "lora": {"target_modules": ALL, "r": 16}, "flags": ["--per_device_train_batch_size", "2"],
    },
    "another seed": {"flags": ["--seed", "43"]},  # how much is chance
}  # fmt: skip


def train(change: dict[str, Any], dataset: str, dialogues: int, folder: str) -> tuple[Any, Any, trainer.Trained, int]:
    """The model with adapters, its tokenizer, how its training went, and how many tokens that were."""
    run = options.resolve(
        ["--preset", "starter", "--dataset", dataset, "--max_train_dialogues", str(dialogues), "--output_dir", folder,
         "--yes", "--save_strategy", "no", "--eval_strategy", "no", *change.get("flags", [])],
        script.presets, script.lora_config, script.quant_config, script.training_args,
        **{name: getattr(script, name) for name in ("base_model", "dataset", "max_train_dialogues", "max_length",
           "learn", "bot", "silence", "adapter_dir", "merged_dir", "early_stopping_patience")},
    )  # fmt: skip
    run = dataclasses.replace(run, lora=dataclasses.replace(run.lora, **change.get("lora", {})))
    transformers.set_seed(run.arguments.seed)
    tokenizer, device = models.load_tokenizer(run.base_model), machine.pick_device()
    add_roles(tokenizer)
    prepared = rows.prepare(corpus.without_leaks(sources.load_corpus(run.dataset)), tokenizer, run)
    base = models.load_base(run.base_model, machine.pick_dtype(device), device, tokenizer)
    begin: Callable[[Any, Any], None] = change.get("rows", lambda *_: None)
    begin(base, tokenizer)
    model = speedups.apply(lora.attach(base, run.lora, tokenizer))
    fit = memory.Fit(base.dtype, False, False, run.arguments.per_device_train_batch_size)
    plan = planning.rehearse(model, tokenizer, prepared, run, fit)
    trained = trainer.train(model, tokenizer, plan, run, {})
    return model, tokenizer, trained, sum(len(row["input_ids"]) for row in prepared.train)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--dialogues", type=int, default=300, help="training dialogues a row (default: %(default)s)")
    parser.add_argument("--contexts", type=int, default=80, help="of the test split (default: %(default)s)")
    parser.add_argument("--dataset", default=script.presets["starter"]["dataset"], help="(default: %(default)s)")
    parser.add_argument("--only", choices=VARIATIONS, metavar="NAME")
    flags = parser.parse_args()
    transformers.logging.set_verbosity_error()
    machine.keep_freed_memory(True)
    test = sources.load_corpus(flags.dataset).test
    contexts = find_contexts(test, flags.contexts, 0, shortest=3, longest=listening.LONGEST)
    turns, messages = [context.turns for context in contexts], [context.turns[-1] for context in contexts]
    said, table = {"people": [Reply(context.human, True) for context in contexts]}, []
    for name in [flags.only] if flags.only else VARIATIONS:
        with tempfile.TemporaryDirectory() as folder:
            start = time.process_time()
            model, tokenizer, trained, tokens = train(VARIATIONS[name], flags.dataset, flags.dialogues, folder)
            seconds = time.process_time() - start
        found = listening.true_replies(model, tokenizer, contexts, 0)["share_of_true_replies_found"].mean()
        said |= {f"{name} {sampling.temp:g}": answer(model, tokenizer, turns, sampling) for sampling in (CHAT, COLD)}
        table.append(
            (name, f"{tokens:,}", f"{seconds:.0f}", f"{trained.score.figures()['word_perplexity']:.1f}", found)
        )
        print(*table[-1], sep=" | ", flush=True)
    plain = models.load_tokenizer(script.presets["starter"]["base_model"])
    style, texts = listening.judge_format(plain, tokenizer), {who: [r.text for r in of] for who, of in said.items()}
    with torch.no_grad(), model.disable_adapter():
        fit = listening.fit_of_replies(model, style, turns, texts, 0)
    lines = []
    for name, *facts, found in table:
        cells = []
        for who in (f"{name} {sampling.temp:g}" for sampling in (CHAT, COLD)):
            figures = measure(said[who], messages)(np.arange(len(turns)))
            shares = [figures[f"share_that_{does}"] for does in ("parrots", "repeats", "is_said_again")]
            cells.append(" / ".join(f"{share:.0%}" for share in (fit[who].mean(), *shares)))
        lines.append([name, *facts, f"{found:.0%}", *cells])
    head = ["", "tokens", "CPU seconds", "word perplexity", "true reply of 20"]
    kinds = ["fit / parrots / loops / said again, temperature 0.8", "the same, temperature 0"]
    print(f"People's replies fit: {fit['people'].mean():.0%}\n\n{report.markdown_table([*head, *kinds], lines)}")


if __name__ == "__main__":
    main()
