"""The benchmark of the GPU, on a CPU and with a small model: it runs to its end, and prints what it says."""

import json
import sys
from pathlib import Path

import pytest
from conftest import byte_tokenizer

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "benchmarks"))
import cuda

SAID = {
    "env": r"GB free\nreads", "graphs": "Llama, shared keys, torch.bfloat16: taken True, repeats itself True",
    "chat": "generate, 5 tokens: ", "train": "8 bits, torch.float16, 2 x 64, checkpointing: ",
    "original": "as the original: ", "whole": "exit code 0",
}  # fmt: skip


@pytest.mark.parametrize("question", cuda.QUESTIONS)
def test_a_dry_run(question, tmp_path, capsys):
    byte_tokenizer().save_pretrained(tmp_path / "tokenizer")
    turns = ["Hello, how are you today?", "I am fine, thank you."] * 4
    lines = [json.dumps({"dialog": [f"{n}: {turn}" for turn in turns]}) for n in range(60)]
    (tmp_path / "talk.jsonl").write_text("\n".join(lines))
    places = {"--tokenizer": "tokenizer", "--data": "talk.jsonl", "--folder": "base"}
    flags = [word for flag, name in places.items() for word in (flag, str(tmp_path / name))]
    cuda.main([question, "--tiny", "--device", "cpu", *flags])
    out = capsys.readouterr().out
    assert SAID[question].replace(r"\n", "\n").split("\n")[-1] in out, out
