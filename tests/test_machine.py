"""What is said of a machine, and chosen for it; GPUs are made up of what their drivers would say."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dialogue import machine

CPU = torch.device("cpu")
ROOT = Path(__file__).resolve().parents[1]


def visible(**environment):
    """CUDA_VISIBLE_DEVICES as torch finds it after `dialogue` was imported."""
    given = {name: value for name, value in os.environ.items() if name not in ("CUDA_VISIBLE_DEVICES", "LOCAL_RANK")}
    command = [sys.executable, "-c", "import dialogue, os; print(os.environ.get('CUDA_VISIBLE_DEVICES'))"]
    return subprocess.run(command, env=given | environment, cwd=ROOT, capture_output=True, text=True).stdout.strip()


def test_without_a_launcher_one_gpu_is_used():
    """Trainer would put two micro-batches into one, and double the loss (`TrainingArguments.n_gpu`)."""
    assert visible() == "0"
    assert visible(CUDA_VISIBLE_DEVICES="2,1") == "2"
    assert visible(CUDA_VISIBLE_DEVICES="") == ""
    assert visible(CUDA_VISIBLE_DEVICES="2,1", LOCAL_RANK="1") == "2,1"
    assert visible(LOCAL_RANK="0") == "None"


@pytest.fixture
def two_gpus(tmp_path, monkeypatch):
    """A driver that knows of two, and a torch with CUDA."""
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho 'GPU 0: Tesla T4 (UUID: GPU-1)'\necho 'GPU 1: Tesla T4 (UUID: GPU-2)'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(machine, "given_gpus", None)
    return program


@pytest.mark.skipif(os.name == "nt", reason="the driver is a shell script here")
def test_gpus_that_stay_unused_are_named(two_gpus, monkeypatch):
    for training in (True, False):
        (line,) = machine.gpu_notes(training)
        assert "driver is too old for this torch (CUDA 13.0)" in line and "cu126" in line
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert machine.gpu_notes() == []
    (line,) = machine.gpu_notes(training=True)
    assert "torchrun --nproc_per_node 2 Fine_tuningmodel.py" in line
    for given, count in (("0", 0), ("3,4,5", 1), ("", 0), ("-1", 0)):
        monkeypatch.setattr(machine, "given_gpus", given)
        assert len(machine.gpu_notes(training=True)) == count
    monkeypatch.setattr(machine, "given_gpus", None)
    monkeypatch.setenv("LOCAL_RANK", "0")
    assert machine.gpu_notes(training=True) == []
    monkeypatch.delenv("LOCAL_RANK")
    two_gpus.write_text("#!/bin/sh\nexit 9\n")  # what it does where there is no GPU
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert machine.gpu_notes(training=True) == []


def test_a_cpus_dtype_is_what_it_can_multiply_and_no_clock_decides(monkeypatch):
    monkeypatch.setattr("time.perf_counter", None)
    for known, dtype in (({"avx512_bf16": True}, torch.bfloat16), ({"amx_bf16": True}, torch.bfloat16),
                         ({"avx512_f": True, "avx512_bf16": False}, torch.float32), ({}, torch.float32)):  # fmt: skip
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda known=known: known)
        assert machine.pick_dtype(CPU) == dtype
    assert machine.pick_dtype(torch.device("mps")) == torch.float32


def test_on_windows_a_full_gpu_is_out_of_memory_instead_of_slow(monkeypatch):
    """The driver is told what is free now; elsewhere, and on a CPU, nothing is asked."""
    asked = []
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (6_000_000_000, 8_000_000_000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 1_000_000_000)
    monkeypatch.setattr(torch.cuda, "set_per_process_memory_fraction", lambda *values: asked.append(values))
    gpu = torch.device("cuda", 0)
    monkeypatch.setattr(sys, "platform", "linux")
    machine.stay_on(gpu)
    monkeypatch.setattr(sys, "platform", "win32")
    machine.stay_on(torch.device("cpu"))
    assert asked == []
    machine.stay_on(gpu)
    assert asked == [(0.875, gpu)]
