"""What only a GPU can say, one question a command, each in minutes; random weights in GPT-2-XL's shape.

    python benchmarks/cuda.py env          versions, free memory, bandwidth of reads
    python benchmarks/cuda.py graphs       is the chat's engine taken, and does it repeat itself?
    python benchmarks/cuda.py chat         tokens/s beside transformers' generate, share of the bandwidth, first token
    python benchmarks/cuda.py train        peak memory against the plan, tokens/s, for each way to train
    python benchmarks/cuda.py original     the same in the way of the original: 8 bits, each dialogue padded to 512
    python benchmarks/cuda.py whole        training, merge, fit and a reply on a card that has 7.6 GB free

`--tiny --device cpu` is a dry run of the script itself.
"""

import argparse
import logging
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
import dialogue  # noqa: F401  (before torch)

# isort: split
import torch
from peft import LoraConfig
from transformers import AutoTokenizer, BitsAndBytesConfig, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

from dialogue import machine, models
from dialogue.chat.cuda_graph import GraphDecoder
from dialogue.chat.engine import proved
from dialogue.chat.sampling import CHAT, Sampling
from dialogue.data import packing
from dialogue.data.sources import load_corpus
from dialogue.measure.loss import head_of, mean_nats
from dialogue.prompt import add_roles
from dialogue.train import lora, memory, speedups

FREE = 7.6e9  # bytes that a card of 8 GB has beside a desktop
# Rows, tokens a row, activation checkpointing: the last ones keep it.
BATCHES = ((2, 512, False), (8, 256, False), (8, 512, False), (8, 256, True), (8, 512, True))
LORA = LoraConfig(r=8, lora_alpha=32, lora_dropout=0.05, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")


class Bench:
    """The questions; `flags` say where and how large."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.flags, self.device, self.tiny = flags, torch.device(flags.device), flags.tiny
        self.on_gpu = self.device.type == "cuda"
        small, xl = {"n_embd": 64, "n_layer": 2, "n_head": 4}, {"n_embd": 1600, "n_layer": 48, "n_head": 25}
        self.shape = small if self.tiny else xl

    def clock(self) -> float:
        """Seconds, when all that was asked of the device is done."""
        if self.on_gpu:
            torch.cuda.synchronize()
        return time.perf_counter()

    def bandwidth(self) -> float:
        """Bytes a second that sums over 2 GB read; the best of twelve."""
        block, seconds = torch.ones(2**20 if self.tiny else 2**30, dtype=torch.float16, device=self.device), []
        for _ in range(12):
            start = self.clock()
            for _ in range(5):
                block.sum()
            seconds.append((self.clock() - start) / 5)
        return block.nbytes / min(seconds)

    def env(self) -> None:
        names = ("torch", "transformers", "peft", "accelerate", "bitsandbytes")
        print(*(f"{name} {version(name)}" for name in names), "CUDA", torch.version.cuda)
        print(f"{machine.hardware(self.device)}: {machine.free_memory(self.device) / 1e9:.1f} GB free")
        print(f"reads {self.bandwidth() / 1e9:.0f} GB/s")

    def graphs(self) -> None:
        """`proved` holds each model against transformers; cards before Hopper have no cuDNN attention."""
        torch.manual_seed(0)
        width, layers = (36, 1) if self.tiny else (576, 4)
        gpt2 = GPT2Config(n_embd=width, n_layer=layers, n_head=9, n_positions=512, vocab_size=5000)
        llama = LlamaConfig(
            hidden_size=width, intermediate_size=width, num_hidden_layers=layers, num_attention_heads=9,
            num_key_value_heads=3, vocab_size=5000, max_position_embeddings=512,
        )  # fmt: skip
        settings = (Sampling(0), CHAT, Sampling(1.0, 0, 0.9, 0.05, 1.1))
        for cudnn in (True, False):
            torch.backends.cuda.enable_cudnn_sdp(cudnn)
            for name, model in (("GPT-2", GPT2LMHeadModel(gpt2)), ("Llama, shared keys", LlamaForCausalLM(llama))):
                for dtype in (torch.float16, torch.bfloat16):
                    engine = proved(model.to(self.device, dtype).eval(), 512)
                    taken = isinstance(engine, GraphDecoder)
                    repeats = taken and all(
                        self.reply(engine, 40, each) == self.reply(engine, 40, each) for each in settings
                    )
                    print(f"cuDNN attention {cudnn}, {name}, {dtype}: taken {taken}, repeats itself {repeats}")

    def reply(self, engine: GraphDecoder, count: int, sampling: Sampling = CHAT, told: Callable = lambda: None) -> list:
        """`count` tokens after a prompt of 64; `told` is called when the first of them is there."""
        engine.reset()
        prompt, said = list(range(100, 164)), []
        for token in engine.stream(engine.step(prompt), count, sampling, prompt, [], torch.Generator().manual_seed(1)):
            if not said:
                told()
            said.append(token)
        return said

    def random_model(self, dtype: torch.dtype, tokens: int = 50260) -> GPT2LMHeadModel:
        with torch.device("meta"):
            model = GPT2LMHeadModel(GPT2Config(**self.shape, vocab_size=tokens))
        model = model.to(dtype).to_empty(device=self.device)
        for name, weight in model.named_parameters():
            weight.data.normal_(0, 0.02) if weight.dim() > 1 else weight.data.fill_("ln" in name and "weight" in name)
        model.tie_weights()
        return model.eval()

    def chat(self) -> None:
        read = self.bandwidth()
        for dtype in (torch.float16, torch.bfloat16):
            model = self.random_model(dtype)
            size = sum(weight.nbytes for name, weight in model.named_parameters() if "wpe" not in name)
            start = self.clock()
            engine = proved(model, 1024)
            if not isinstance(engine, GraphDecoder):
                continue
            print(f"{dtype}: proved, with its first graph, in {self.clock() - start:.1f} s")
            ids = torch.arange(100, 164, device=self.device)[None]

            def theirs(count: int, model=model, ids=ids) -> object:
                return model.generate(
                    ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_k=40, top_p=0.9,
                    min_new_tokens=count, max_new_tokens=count, pad_token_id=0,
                )  # fmt: skip

            def ours(count: int, engine=engine) -> object:
                return self.reply(engine, count)

            for name, run in (("ours", ours), ("transformers' generate", theirs)):
                for count in (5,) if self.tiny else (50, 400):
                    seconds = []
                    for _ in range(2 if self.tiny else 6):  # the first is a warm-up
                        start = self.clock()
                        run(count)
                        seconds.append(self.clock() - start)
                    rate = count / statistics.median(seconds[1:])
                    share = f"{rate * size / read:.0%} of {read / 1e9:.0f} GB/s"
                    print(f"{name}, {count} tokens: {rate:.1f} tokens/s, {share}")
            start, first = self.clock(), []
            self.reply(engine, 2, told=lambda start=start, first=first: first.append(time.perf_counter() - start))
            print(f"first token after {first[0] * 1e3:.1f} ms")
            del engine, model
            machine.release_memory()

    def folder(self) -> str:
        """A base model as a download would look, written once."""
        folder = Path(self.flags.folder)
        if not (folder / "config.json").exists():
            tokenizer = AutoTokenizer.from_pretrained(self.flags.tokenizer)
            tokenizer.save_pretrained(folder)
            self.random_model(torch.float16, len(tokenizer)).save_pretrained(folder)
        return str(folder)

    def prepared(self, length: int) -> tuple:
        """The tokenizer with its roles, and encoded dialogues."""
        tokenizer = models.load_tokenizer(self.folder())
        add_roles(tokenizer)
        dialogues = load_corpus(self.flags.data).train[: 20 if self.tiny else 400]
        return tokenizer, packing.encode(tokenizer, dialogues, length).pieces

    def loaded(self, tokenizer, dtype: torch.dtype, in_8bit: bool):
        quantised = BitsAndBytesConfig(load_in_8bit=True, llm_int8_threshold=6.0) if in_8bit else None
        base = models.load_base(self.folder(), dtype, self.device, tokenizer, quantised)
        return lora.attach(base, LORA, tokenizer).train()

    def steps(self, title: str, model, batches: list, tokens: int, loss: Callable, plan: int = 0) -> None:
        """One step to warm up, and then one on each batch: real tokens/s, and the peak of memory."""
        optimizer = torch.optim.AdamW(
            [each for each in model.parameters() if each.requires_grad], 1e-4, fused=self.on_gpu
        )
        batches = [{name: values.to(self.device) for name, values in batch.items()} for batch in batches]
        try:
            for at, batch in enumerate(batches[:1] + batches):
                if at == 1:
                    machine.reset_peak(self.device)
                    start = self.clock()
                loss(model, batch).backward()
                optimizer.step()
                optimizer.zero_grad()
            rate, peak = tokens / (self.clock() - start), machine.peak_memory(self.device)
            share = f", plan {plan / 1e9:.2f} GB = {plan / peak:.2f} of it" if plan else ""
            print(f"{title}: {rate:.0f} real tokens/s, peak {peak / 1e9:.2f} GB{share}")
        except Exception as error:
            if not machine.is_out_of_memory(error):
                raise
            print(f"{title}: out of memory")

    def train(self) -> None:
        for dtype, in_8bit in ((torch.bfloat16, True), (torch.float16, True), (torch.bfloat16, False)):
            tokenizer, _ = self.prepared(256)
            model = speedups.apply(self.loaded(tokenizer, dtype, in_8bit))
            head, config = head_of(model), model.config
            trained = sum(each.numel() for each in model.parameters() if each.requires_grad)
            for rows, length, checkpointing in ((2, 64, True),) if self.tiny else BATCHES:
                packed = packing.pack(self.prepared(length)[1], tokenizer, length, "both")
                if checkpointing:
                    model.activation_checkpointing_enable()
                parts = [packed[at : at + rows] for at in range(0, rows * (1 if self.tiny else 8), rows)]
                load = memory.Load(config, trained, True, length, packing.mean_dialogue_length(packed), not self.on_gpu)
                fit = memory.Fit(dtype, in_8bit, checkpointing, rows)
                plan = memory.estimate(load, fit, memory.count_weights(config))
                title = (
                    f"{'8' if in_8bit else '16'} bits, {dtype}, {rows} x {length}{', checkpointing' * checkpointing}"
                )
                batches = [packing.collate(part, tokenizer.pad_token_id) for part in parts if part]
                self.steps(title, model, batches, sum(map(packing.count_tokens, parts)),
                           lambda model, batch, head=head: mean_nats(model, batch, head), plan)  # fmt: skip
                machine.release_memory()
            del model, head
            machine.release_memory()

    def original(self) -> None:
        tokenizer, pieces = self.prepared(512)
        model = self.loaded(tokenizer, torch.float16, True)
        batches, tokens, fill = [], 0, {"input_ids": 0, "labels": -100, "attention_mask": 0}
        rows = [packing.to_row(piece, "both", 0) for piece in pieces[: 4 if self.tiny else 32]]
        for at in range(0, len(rows), 4):
            part = [{**row, "attention_mask": [1] * len(row["labels"])} for row in rows[at : at + 4]]
            tokens += sum(len(row["labels"]) for row in part)
            padded = {
                name: [row[name] + [value] * (512 - len(row[name])) for row in part] for name, value in fill.items()
            }
            batches.append({name: torch.tensor(values) for name, values in padded.items()})
        self.steps("as the original", model, batches, tokens, lambda model, batch: model(**batch, use_cache=False).loss)

    def whole(self) -> None:
        """In processes of their own, while this one holds what a card of 8 GB would not have."""
        ballast = max(0, int(machine.free_memory(self.device) - FREE)) if self.on_gpu else 0
        held = torch.empty(ballast, dtype=torch.uint8, device=self.device)
        base = self.folder()
        train = ["Fine_tuningmodel.py", "--base_model", base, "--dataset", self.flags.data, "--num_train_epochs", "1",
                 "--max_train_dialogues", "300", "--overwrite", "--no-resume", "--yes"]  # fmt: skip
        chat = ["main.py", "--prompt", "Hello, how are you?"]
        for command in ([*train, "--plan"],) if self.tiny else (train, chat):
            start = time.perf_counter()
            command = [sys.executable, str(ROOT / command[0]), *command[1:]]
            done = subprocess.run(command, cwd=Path(base).parent, capture_output=True, text=True)
            print(done.stdout[-3000:], done.stderr[-1000:])
            print(f"exit code {done.returncode}, {time.perf_counter() - start:.0f} s")
        del held


QUESTIONS = ("env", "graphs", "chat", "train", "original", "whole")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("question", choices=QUESTIONS)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--tokenizer", default="gpt2", help="a folder, or a name on the hub")
    parser.add_argument("--data", default="dailydialog", help="as --dataset of Fine_tuningmodel.py")
    parser.add_argument("--folder", default="/tmp/xl/base", help="for the model of random weights; runs go beside it")
    flags = parser.parse_args(argv)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    getattr(Bench(flags), flags.question)()


if __name__ == "__main__":
    main()
