"""Training speed, memory and loss side by side: the original's recipe, transformers' Trainer, TRL, and this project.

    pip install -r requirements.txt -r benchmarks/requirements.txt
    python benchmarks/training.py DAILYDIALOG --tokenizer GPT2_TOKENIZER_FOLDER     speed on a random GPT-2 124M
    python benchmarks/training.py DAILYDIALOG --epochs 1 --base SmolLM2-135M-Instruct    validation losses as well
    python benchmarks/training.py DAILYDIALOG --curves curves.png                   loss of the starter, two settings

Every peer trains the same LoRA on the same dialogues in a process of its own. Real tokens are counted, padding is not.
Seconds are counted twice: of the wall clock, and of the processor (with `--threads 1` it is the one to read on a
machine that others use too). On a GPU: not measured.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import torch
import transformers
from helpers import train_on
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, GPT2Tokenizer, Trainer, TrainerCallback, TrainingArguments

from dialogue import machine, models
from dialogue.data import packing, sources
from dialogue.measure.likelihood import hold_out
from dialogue.prompt import add_roles
from dialogue.train import lora, speedups

PEERS = {
    "original": "pad to 512, float32, batch of 4",
    "trainer": "Trainer, padded to the longest of 4, bfloat16",
    "trl": "TRL SFTTrainer, padded to the longest of 4, bfloat16",
    "trl packed": "TRL SFTTrainer, packed to 512, 2 rows, bfloat16",
    "ours": "this project: packed to 512, 2 rows, bfloat16",
    "ours, dropout": "the same with GPT-2's own dropout left on",
}
CPU = torch.device("cpu")
LENGTH = 512


class Clock(TrainerCallback):
    """Seconds of the wall clock and of the processor in all steps after the first; ends the training in time."""

    def __init__(self, seconds: float) -> None:
        self.limit, self.steps, self.wall, self.cpu = seconds, 0, 0.0, 0.0

    def on_step_begin(self, args, state, control, **_: Any) -> None:
        self.began = time.perf_counter(), time.process_time()

    def on_step_end(self, args, state, control, **_: Any) -> None:
        if state.global_step > 1:
            self.wall += time.perf_counter() - self.began[0]
            self.cpu += time.process_time() - self.began[1]
            self.steps += 1
        control.should_training_stop |= self.steps > 1 and self.wall > self.limit


def matrix_rate(threads: int) -> dict[str, float]:
    """FLOP a second of a bfloat16 (1024, 768) x (768, 3072) product, by either clock: the best of 20."""
    activations, weight = torch.randn(1024, 768).bfloat16(), torch.randn(3072, 768).bfloat16()
    seconds: dict[str, list[float]] = {"wall": [], "cpu": []}
    for _ in range(20):
        wall, cpu = time.perf_counter(), time.process_time()
        torch.nn.functional.linear(activations, weight)
        seconds["cpu"].append(time.process_time() - cpu)
        seconds["wall"].append(time.perf_counter() - wall)
    return {clock: 2 * 1024 * 768 * 3072 / min(values) for clock, values in seconds.items()}


def pad(rows: list[packing.Row], width: int | None) -> dict[str, torch.Tensor]:
    """Rows -> a padded batch with an attention mask."""
    width = width or max(len(row["labels"]) for row in rows)
    fill = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**row, "attention_mask": [1] * len(row["labels"])} for row in rows]
    return {
        name: torch.tensor([row[name] + [value] * (width - len(row[name])) for row in rows])
        for name, value in fill.items()
    }


def leaks(trainer: Any) -> float:
    """How far the logits of a packed row's last dialogue move when its first dialogue changes."""
    batch = next(iter(trainer.get_train_dataloader()))
    model = trainer.model.eval()
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    other = {**inputs, "input_ids": inputs["input_ids"].clone()}
    other["input_ids"][0, 1:20] = 1000
    with torch.no_grad():
        before, after = model(**inputs).logits[0, -1].float(), model(**other).logits[0, -1].float()
    model.train()
    return (before - after).abs().max().item()


def measure(peer: str, options: argparse.Namespace) -> dict[str, Any]:
    """Train as `peer` does, for `options.epochs`, or else for `options.seconds`."""
    torch.set_num_threads(options.threads)
    transformers.set_seed(0)
    ours = peer.startswith("ours")
    dtype = torch.float32 if peer == "original" else torch.bfloat16
    tokenizer = models.load_tokenizer(options.base)
    roles = add_roles(tokenizer)
    talk = sources.load_corpus(options.data)
    pieces = packing.encode(tokenizer, talk.train[: options.dialogues], LENGTH).pieces
    singles = [packing.to_row(piece, "both", roles.bot) for piece in pieces]
    rows = packing.pack(pieces, tokenizer, LENGTH, "both") if ours else singles
    base = models.load_base(options.base, dtype, CPU, tokenizer)
    config = LoraConfig(
        r=8, lora_alpha=32, lora_dropout=0.05, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM"
    )
    if ours:
        machine.keep_freed_memory(True)
    model = lora.attach(base, config, tokenizer)
    if ours:
        speedups.apply(model, keep_dropout=peer != "ours")
    base.config.use_cache = False
    clock = Clock(options.seconds if options.epochs is None else float("inf"))
    settings: dict[str, Any] = {
        "output_dir": tempfile.mkdtemp(), "per_device_train_batch_size": 2 if ours or peer == "trl packed" else 4,
        "num_train_epochs": options.epochs or 50, "learning_rate": 1e-3 if ours else 3e-4, "report_to": "none",
        "save_strategy": "no", "use_cpu": True,
        "disable_tqdm": True, "logging_steps": 10**6, "dataloader_pin_memory": False,
    }  # fmt: skip
    result: dict[str, Any] = {"peer": peer, "parameters": base.num_parameters(), "rate": matrix_rate(options.threads)}
    machine.reset_peak(CPU)
    began = {"tokens": 0}

    def counted(batch: list[packing.Row], collate: Any) -> Any:
        began["tokens"] += sum(len(row["labels"]) for row in batch)
        return collate(batch)

    if peer.startswith("trl"):
        from datasets import Dataset
        from trl import SFTConfig, SFTTrainer

        base.get_output_embeddings().bias = None  # TRL's fused loss asks for it, and PEFT's wrapper has none
        trainer: Any = SFTTrainer(
            model,
            SFTConfig(**settings, packing=peer == "trl packed", max_length=LENGTH, gradient_checkpointing=False,
                      bf16=False),
            train_dataset=Dataset.from_list([{key: row[key] for key in ("input_ids", "labels")} for row in singles]),
            processing_class=tokenizer,
        )  # fmt: skip
        if peer == "trl packed":
            result["leak"] = leaks(trainer)
        collate = trainer.data_collator
        trainer.data_collator = lambda batch: counted(batch, collate)
    elif ours:
        trainer = None
        result |= time_ours(model, tokenizer, rows, pieces, settings, clock)
    else:
        width = LENGTH if peer == "original" else None
        trainer = Trainer(
            model,
            TrainingArguments(**settings),
            train_dataset=rows,
            data_collator=lambda batch: counted(batch, lambda some: pad(some, width)),
        )
    if trainer:
        trainer.add_callback(clock)
        trainer.train()
        result |= figures(clock, began["tokens"] / (clock.steps + 1))
    result["peak"] = machine.peak_memory(CPU)
    if options.epochs is not None:
        held_out = hold_out(packing.encode(tokenizer, talk.validation[:60], LENGTH).pieces, tokenizer, LENGTH)
        result["loss"] = held_out.score(model.eval(), 2).nats_per_token
    return result


def time_ours(model: Any, tokenizer: Any, rows: Any, pieces: Any, settings: dict[str, Any], clock: Clock) -> Any:
    """The project's own training, with the clock among its callbacks."""
    held_out = hold_out(pieces[:1], tokenizer, LENGTH)
    train_on(model, tokenizer, rows, held_out, TrainingArguments(**settings), callbacks=(clock,))
    per_step = sum(len(row["labels"]) for row in rows) / len(rows) * settings["per_device_train_batch_size"]
    return figures(clock, per_step)


def figures(clock: Clock, tokens_per_step: float) -> dict[str, float]:
    tokens = clock.steps * tokens_per_step
    return {"wall": tokens / clock.wall, "cpu": tokens / clock.cpu, "steps": clock.steps}


def compare(options: argparse.Namespace) -> None:
    """Run every peer in a process of its own and print the table."""
    results = {}
    for peer in options.peers.split(";"):
        command = [sys.executable, __file__, *sys.argv[1:], "--base", options.base, "--peer", peer]
        environment = {**os.environ, "OMP_NUM_THREADS": str(options.threads), "TOKENIZERS_PARALLELISM": "false"}
        run = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
        if run.returncode:
            print(f"{peer}: failed\n{run.stderr[-1500:]}", file=sys.stderr)
            continue
        results[peer] = json.loads(run.stdout.splitlines()[-1])
        print(f"{peer}: done", file=sys.stderr, flush=True)
    rate = {clock: max(result["rate"][clock] for result in results.values()) for clock in ("wall", "cpu")}
    print(f"\n{options.threads} threads, bfloat16 products {rate['wall'] / 1e9:.0f} GFLOP/s (wall), "
          f"{rate['cpu'] / 1e9:.0f} a processor second\n")  # fmt: skip
    print("| | real tokens/s | a processor second | share of the matrix rate | peak memory | steps timed | loss |")
    print("|---|---|---|---|---|---|---|")
    for peer, found in results.items():
        share, on_cpu = (4 * found["parameters"] * found[clock] / rate[clock] for clock in ("wall", "cpu"))
        loss = f"{found['loss']:.3f}" if "loss" in found else ""
        print(f"| {PEERS[peer]} | {found['wall']:.0f} | {found['cpu']:.0f} | {share:.0%} (cpu {on_cpu:.0%}) "
              f"| {found['peak'] / 1e9:.1f} GB | {found['steps']:.0f} | {loss} |")  # fmt: skip
    if "trl packed" in results:
        leak = results["trl packed"]["leak"]
        print(f"\nTRL, packed: a dialogue's logits move by {leak:.3g} with another one in its row: "
              f"{'they see each other' if leak > 1e-2 else 'correct'}")  # fmt: skip
    for peer in results.keys() - {"ours"} if "ours" in results else ():
        ratios = [results["ours"][clock] / results[peer][clock] for clock in ("wall", "cpu")]
        print(f"ours is {ratios[0]:.1f} times {peer} (processor seconds: {ratios[1]:.1f})")
    print("CUDA: not measured")


def draw(options: argparse.Namespace) -> None:
    """Validation loss of the starter over equal epochs: packed, and one dialogue a row at the original's settings."""
    from matplotlib.figure import Figure

    torch.set_num_threads(options.threads)
    machine.keep_freed_memory(True)
    tokenizer = models.load_tokenizer(options.base)
    roles = add_roles(tokenizer)
    talk = sources.load_corpus(options.data)
    pieces = packing.encode(tokenizer, talk.train[: options.dialogues], 256).pieces
    held_out = hold_out(packing.encode(tokenizer, talk.validation[:60], 256).pieces, tokenizer, 256)
    dtype = machine.pick_dtype(CPU)
    axes = (figure := Figure(figsize=(7, 4), layout="constrained")).subplots()
    for name, packed, rate, batch in (
        ("one dialogue a row, batch of 8, 3e-4 (the original)", False, 3e-4, 8),
        *((f"packed, {rows} rows a step, {rate:g}", True, rate, rows) for rate, rows in options.settings),
    ):
        transformers.set_seed(0)
        rows = packing.pack(pieces, tokenizer, 256, "both") if packed else None
        rows = rows or [packing.to_row(piece, "both", roles.bot) for piece in pieces]
        base = models.load_base(options.base, dtype, CPU, tokenizer)
        config = LoraConfig(
            r=8, lora_alpha=32, lora_dropout=0.0, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM"
        )
        model = speedups.apply(lora.attach(base, config, tokenizer))
        per_epoch = -(-len(rows) // batch)
        arguments = TrainingArguments(
            output_dir=tempfile.mkdtemp(), num_train_epochs=options.epochs, per_device_train_batch_size=batch,
            learning_rate=rate, lr_scheduler_type="cosine", warmup_steps=0.03, eval_strategy="steps",
            eval_steps=max(1, per_epoch // 3), save_strategy="no", report_to="none", use_cpu=True, logging_steps=10**6,
            dataloader_pin_memory=False,
        )  # fmt: skip
        trained = train_on(model, tokenizer, rows, held_out, arguments)
        points = [(entry["step"] / per_epoch, entry["eval_loss"]) for entry in trained.history if "eval_loss" in entry]
        points.append((options.epochs, trained.score.nats_per_token))
        print(f"{name}: {trained.steps} steps, validation loss {trained.score.nats_per_token:.4f}", flush=True)
        axes.plot(*zip(*points, strict=True), "o-", label=name, markersize=3)
    axes.set_xlabel("epochs")
    axes.set_ylabel("validation loss (nats a reply token)")
    axes.legend()
    figure.savefig(options.curves, dpi=120)


def random_gpt2(folder: str, tokenizer: str) -> str:
    """Write GPT-2 124M with random weights and its tokenizer to `folder`."""
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config()).save_pretrained(folder)
    files = [Path(tokenizer) / name for name in ("vocab.json", "merges.txt")]
    if all(file.is_file() for file in files):
        GPT2Tokenizer(vocab=str(files[0]), merges=str(files[1])).save_pretrained(folder)
    else:
        models.load_tokenizer(tokenizer).save_pretrained(folder)
    return folder


def setting(text: str) -> tuple[float, int]:
    rate, rows = text.split(":")
    return float(rate), int(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", help="DailyDialog's release, or another dataset that the script takes")
    parser.add_argument("--tokenizer", default="gpt2", help="a folder with GPT-2's vocab.json and merges.txt")
    parser.add_argument("--dialogues", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=20, help="of training, for each peer")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--peers", default=";".join(PEERS), help="which, separated by semicolons")
    parser.add_argument("--curves", help="draw the loss curves into this PNG instead")
    parser.add_argument("--epochs", type=float, help="train so long, and score 60 validation dialogues; curves: 2")
    parser.add_argument("--settings", type=setting, nargs="*", default=[(1e-3, 4)], help="of packed runs, RATE:ROWS")
    parser.add_argument("--base", help="a base model in place of the random GPT-2 124M")
    parser.add_argument("--peer", help=argparse.SUPPRESS)
    options = parser.parse_args()
    transformers.logging.set_verbosity_error()
    if options.curves:
        options.base, options.epochs = options.base or models.STARTER, options.epochs or 2
        draw(options)
    elif options.peer:
        print(json.dumps(measure(options.peer, options)))
    else:
        with tempfile.TemporaryDirectory() as folder:
            options.base = options.base or random_gpt2(folder, options.tokenizer)
            compare(options)


if __name__ == "__main__":
    main()
