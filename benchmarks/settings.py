"""Which settings should the starter have? Each is changed alone, on one budget of training tokens.

    python -m benchmarks.settings                    all of them; writes benchmarks/settings.md
    python -m benchmarks.settings --only "r 32"      one of them; prints its row

Base model, data and seed are the same for all rows; data and base are loaded once.
"""

import argparse
import copy
import shutil
import tempfile
import time
from pathlib import Path

import torch
import transformers
from peft import PeftModel

import Fine_tuningmodel as script
from dialogue import machine, models
from dialogue.data import corpus, packing, sources
from dialogue.measure import report
from dialogue.measure.likelihood import hold_out
from dialogue.measure.replies import Reply, answer, find_contexts, measure
from dialogue.prompt import add_roles
from dialogue.train import lora, options, speedups, trainer

PRESET = script.presets["starter"]
CONTEXTS = 100  # replies a row

# name -> what differs from the starter's preset; `share` is the share of the dialogues, so that epochs cost nothing
VARIATIONS: dict[str, dict] = {
    "as the preset": {},
    "learning rate 3e-4": {"training": {"learning_rate": 3e-4}},
    "learning rate 5e-4": {"training": {"learning_rate": 5e-4}},
    "learning rate 2e-3": {"training": {"learning_rate": 2e-3}},
    "learning rate 4e-3": {"training": {"learning_rate": 4e-3}},
    "r 4": {"lora": {"r": 4}},
    "r 32": {"lora": {"r": 32}},
    "loss on the bot's turns alone": {"learn": "bot"},
    "half the dialogues, 2 epochs": {"share": 1 / 2, "training": {"num_train_epochs": 2}},
    "a third of the dialogues, 3 epochs": {"share": 1 / 3, "training": {"num_train_epochs": 3}},
    "random rows for the role tokens": {"random_rows": True},
    "2 rows a step": {"training": {"per_device_train_batch_size": 2}},
    "another seed": {"training": {"seed": 43}},  # how much is chance
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dialogues", type=int, default=300, help="training dialogues a row (default: %(default)s)")
    parser.add_argument("--only", choices=VARIATIONS, metavar="NAME")
    flags = parser.parse_args()
    transformers.logging.set_verbosity_error()
    talk = corpus.without_leaks(sources.load_corpus(PRESET["dataset"]))
    tokenizer = models.load_tokenizer(PRESET["base_model"])
    roles = add_roles(tokenizer)
    device = machine.pick_device()
    base = models.load_base(PRESET["base_model"], machine.pick_dtype(device), device, tokenizer)
    speedups.keep_freed_memory()
    speedups.trim_base(base)
    length = PRESET["max_length"]
    validation = hold_out(packing.encode(tokenizer, talk.validation[:100], length).pieces, tokenizer, length)
    contexts = find_contexts(talk.test, CONTEXTS, seed=0)

    def row(name: str, change: dict) -> list[str]:
        folder = tempfile.mkdtemp()
        once = {"output_dir": folder, "save_strategy": "no", "eval_strategy": "no"}
        fields = PRESET["training"] | once | change.get("training", {})
        arguments = options.override(script.training_args, fields)
        transformers.set_seed(arguments.seed)
        pieces = packing.encode(tokenizer, talk.train[: round(flags.dialogues * change.get("share", 1))], length).pieces
        rows = packing.pack(pieces, tokenizer, length, change.get("learn", script.learn))
        fresh = copy.deepcopy(base)
        if change.get("random_rows"):
            with torch.no_grad():
                fresh.get_input_embeddings().weight[list(roles)] = torch.randn(3, base.config.hidden_size).mul(
                    base.config.initializer_range
                ).to(base.dtype)  # fmt: skip
        model: PeftModel = lora.attach(fresh, script.lora_config, roles, PRESET["lora"] | change.get("lora", {}))
        speedups.speed_up(model)
        start = time.perf_counter()
        trained = trainer.train(model, tokenizer, rows, validation, arguments, run={})
        seconds = time.perf_counter() - start
        shutil.rmtree(folder)
        said = answer(model.merge_and_unload(), tokenizer, [context.turns for context in contexts])
        figures = measure(said, set())(range(len(said)))
        return [
            name, f"{trained.score.nats_per_token:.3f}", f"{trained.score.figures()['word_perplexity']:.1f}",
            f"{figures['share_that_ends']:.0%}", f"{figures['share_that_repeats']:.0%}", f"{figures['words']:.1f}",
            f"{figures['distinct_2']:.2f}", f"{trained.tokens:,}", f"{seconds:.0f}",
        ]  # fmt: skip

    rows = []
    for name, change in VARIATIONS.items():
        if flags.only in (None, name):
            rows.append(row(name, change))
            print(" | ".join(rows[-1]), flush=True)
    if flags.only:
        return
    people = measure([Reply(context.human, True) for context in contexts], set())(range(len(contexts)))
    head = ["", "nats a token", "word perplexity", "ends", "repeats", "words", "distinct-2", "tokens", "seconds"]
    Path(__file__).with_suffix(".md").write_text(
        f"""# The starter's settings, each changed alone

`python -m benchmarks.settings` on {machine.hardware(device)}, {base.dtype}: {flags.dialogues} dialogues of
{talk.source}, likelihood on 100 validation dialogues, replies to {CONTEXTS} contexts of the test split (at most
60 tokens, the chat's sampler). People's replies to these: {people["words"]:.1f} words, distinct-2
{people["distinct_2"]:.2f}, {people["share_that_repeats"]:.0%} with a 3-gram that stands twice.

{report.markdown_table(head, rows)}
""",
        encoding="utf-8",
    )


if __name__ == "__main__":
    main()
