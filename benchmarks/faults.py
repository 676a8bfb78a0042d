"""Kill, starve and damage a small real run, and see whether anything is lost.

    python benchmarks/faults.py                          5 kills, and every fault at every file: some minutes
    python benchmarks/faults.py --kills 50 --pairs 20    the goal

Each kill is a SIGKILL at a random moment of a run from its first step to its last file. The same command is then
started again, and has to end with bitwise the adapters and the merged model of a run that nobody killed. Of two runs
that are started into the same folders at random offsets, one goes on as if it were alone. Runs on the CPU, with
dropout. Starting Python takes longer than the run, so runs are forks of this warmed-up process.
"""

import argparse
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stderr
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")  # a fork has no threads but its own
ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import torch
from conftest import byte_tokenizer, save_random_gpt2
from helpers import run_of

import Fine_tuningmodel as script
from dialogue import storage
from dialogue.errors import exit_code
from dialogue.train import runs
from dialogue.train.trainer import DialogueTrainer

# Measured anew in each run, the precision could change between the first start and the next.
script.machine.pick_dtype = lambda *_: torch.float32
STEPS = 12  # in epochs of 5: the run ends in the middle of one
NOBODY = 65534  # a user id without rights, for when this runs as root


class Bench:
    """A folder with a base model and data, in which runs are started."""

    def __init__(self, home: Path) -> None:
        self.home, self.seconds = home, 0.0  # that a run takes alone
        home.chmod(0o755)  # also for who has no rights
        save_random_gpt2(home / "base", byte_tokenizer())
        with (home / "talk.jsonl").open("w") as file:
            for number in range(60):
                turns = [f"How are you, {number}?", f"Fine, and you, {number * 7}?", "Good to hear.", "Bye."]
                file.write(json.dumps({"dialog": turns}) + "\n")

    def flags(self, folder: Path, *more: str) -> list[str]:
        """A run into `folder` that saves after each second step and evaluates after each third, and each epoch's."""
        return [
            "--base_model", str(self.home / "base"), "--dataset", str(self.home / "talk.jsonl"), "--max_length", "128",
            "--per_device_train_batch_size", "4", "--max_steps", str(STEPS), "--learning_rate", "1e-2",
            "--save_strategy", "steps", "--save_steps", "2", "--eval_strategy", "steps", "--eval_steps", "3",
            "--adapter_dir", str(folder / "lora"), "--merged_dir", str(folder / "full"), "--output_dir",
            str(folder / "checkpoints"), *more,
        ]  # fmt: skip

    def start(self, folder: Path, *more: str, before: Callable[[], object] = lambda: None, to: str = "log") -> int:
        """Fork a run that writes into folder/`to`; its process id."""
        folder.mkdir(exist_ok=True)
        sys.stdout.flush()
        if child := os.fork():
            return child
        code = 99
        try:
            log = os.open(folder / to, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(log, 1), os.dup2(log, 2)
            before()
            code = exit_code(lambda: script.main(self.flags(folder, *more)))
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stdout.flush()
            os._exit(code)

    def run(self, folder: Path, *more: str, before: Callable[[], object] = lambda: None) -> int:
        """A run to its end; its exit code."""
        return exit_code_of(self.start(folder, *more, before=before))


def wait_until(child: int, there: Callable[[], bool], folder: Path) -> None:
    """Wait for something that the run `child` does."""
    while not there():
        assert os.waitpid(child, os.WNOHANG) == (0, 0), log(folder)
        time.sleep(0.005)


def exit_code_of(child: int) -> int:
    """Wait for the end of a run."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def log(folder: Path) -> str:
    """What the runs in `folder` printed."""
    return (folder / "log").read_text() if (folder / "log").exists() else ""


def results(folder: Path) -> tuple[bytes, bytes]:
    """The weights of the adapters and of the merged model."""
    return (folder / "lora/adapter_model.safetensors").read_bytes(), (folder / "full/model.safetensors").read_bytes()


def check_whole(folder: Path) -> None:
    """Whatever has its final name is whole."""
    for each in [folder / "lora", folder / "full", *folder.glob("checkpoints/checkpoint-*")]:
        if each.exists():
            assert (each / storage.MANIFEST).is_file() and not storage.damage(each), each


def check_nothing_left(folder: Path) -> None:
    """Two whole results, and no other file."""
    check_whole(folder)
    others = [path for path in folder.iterdir() if path.name not in ("full", "lora", "log")]
    assert not [path for other in others for path in other.rglob("*")], others


def moment(folder: Path) -> str:
    """What a run was doing when it was killed, from what it left."""
    if (folder / "full").exists():
        return "after the merge"
    if (folder / ".full.unfinished").exists():
        return "merging"
    if (folder / ".lora.unfinished").exists() or (folder / "lora").exists():
        return "saving adapters"
    if list(folder.glob("checkpoints/.checkpoint-*.deleted")):
        return "deleting a checkpoint"
    if list(folder.glob(f"checkpoints/{runs.SAVING}/checkpoint-*")):
        return "saving a checkpoint"
    return "training" if (folder / "checkpoints").exists() else "before the first checkpoint"


def kill_at_random(bench: Bench, kills: int, chance: random.Random) -> None:
    """`kills` runs, each killed once and started again."""
    whole = bench.home / "whole"
    began = time.monotonic()
    child = bench.start(whole)
    wait_until(child, lambda: "Repeat this run" in log(whole), whole)
    ready = time.monotonic() - began  # loading and rehearsing; nothing is written until then
    assert exit_code_of(child) == 0, log(whole)
    bench.seconds = length = time.monotonic() - began
    expected = results(whole)
    check_nothing_left(whole)
    print(f"a run takes {length:.1f} s, {ready:.1f} s of it before the first step", flush=True)
    moments: Counter[str] = Counter()
    while moments.total() < kills:
        folder = bench.home / f"killed-{moments.total()}"
        child = bench.start(folder)
        time.sleep(chance.uniform(ready, length))
        os.kill(child, signal.SIGKILL)
        if exit_code_of(child) == -signal.SIGKILL:  # else it had ended before
            moments[moment(folder)] += 1
            check_whole(folder)
            if list(folder.glob("checkpoints/*")) or not (folder / "full").exists():
                assert bench.run(folder) == 0, log(folder)
        assert results(folder) == expected, f"{folder}: another result"
        check_nothing_left(folder)
        shutil.rmtree(folder)
    print(f"{kills} of {kills} kills resumed to bitwise the same result: {dict(moments)}", flush=True)


def start_in_pairs(bench: Bench, pairs: int, chance: random.Random) -> None:
    """`pairs` times two runs into the same folders: one goes on, the other says in a line why not."""
    refused: Counter[str] = Counter()
    for number in range(pairs):
        folder = bench.home / f"pair-{number}"
        children = [bench.start(folder, to="first")]
        time.sleep(chance.choice((0.0, chance.uniform(0, 0.7 * bench.seconds))))
        children.append(bench.start(folder, to="second"))
        codes = [exit_code_of(child) for child in children]
        said = {name: (folder / name).read_text() for name in ("first", "second")}
        assert sorted(codes) == [0, 2], (codes, said)
        last = list(said.values())[codes.index(2)].strip().splitlines()[-1]
        assert last.startswith("error: ") and "Traceback" not in last, said
        assert "is being written by another run" in last, last
        refused[list(said)[codes.index(2)]] += 1
        assert results(folder) == results(bench.home / "whole"), f"{folder}: another result"
        check_whole(folder)
        shutil.rmtree(folder)
    print(f"{pairs} of {pairs} pairs: one went on to bitwise the same result; refused: {dict(refused)}", flush=True)


def stopped_run(bench: Bench, name: str) -> Path:
    """A run that was ended by SIGTERM with several checkpoints."""
    folder = bench.home / name
    child = bench.start(folder)
    wait_until(child, (folder / "checkpoints/checkpoint-6").exists, folder)
    os.kill(child, signal.SIGTERM)
    code = exit_code_of(child)
    assert code == 143 and "the same command goes on" in log(folder), (code, log(folder))
    return folder


def newest_whole(bench: Bench, folder: Path) -> Path | None:
    """The checkpoint that the next start would go on from."""
    newest = runs.checkpoints(folder / "checkpoints")[0]
    run = json.loads((bench.home / "run.json").read_text())
    with redirect_stderr(io.StringIO()) as said:
        found = runs.find(run_of(*bench.flags(folder)), run).checkpoint
    assert (found != newest) == (f"{newest} is broken and passed over" in said.getvalue())
    return found


def damage_each_file(bench: Bench, chance: random.Random) -> None:
    """Truncate each file of the newest checkpoint, and flip one byte of it: the one before has to be used."""
    folder = stopped_run(bench, "damaged")
    newest, before = runs.checkpoints(folder / "checkpoints")[:2]
    run = json.loads((newest / storage.RUN_FILE).read_text())["run"]
    storage.write_json(bench.home / "run.json", run)
    assert newest_whole(bench, folder) == newest
    files = sorted(path for path in newest.rglob("*") if path.is_file())
    for path in files:
        data = path.read_bytes()
        place = chance.randrange(len(data))
        flipped = data[:place] + bytes([data[place] ^ (1 << chance.randrange(8))]) + data[place + 1 :]
        for harm, content in (("truncated", data[:-1]), ("emptied", b""), ("flipped", flipped)):
            path.write_bytes(content)
            assert newest_whole(bench, folder) == before, f"{path.name} {harm} at {place}: not noticed"
        path.write_bytes(data)
    if os.geteuid() == 0:
        for path in files:
            path.chmod(0)
            os.seteuid(NOBODY)
            assert "cannot be read" in str(storage.damage(newest)), path
            os.seteuid(0)
            path.chmod(0o644)
    print(
        f"{len(files)} files of a checkpoint: each truncated, emptied, flipped and unreadable one noticed", flush=True
    )
    path = newest / "optimizer.pt"
    path.write_bytes(path.read_bytes()[:-1])
    assert bench.run(folder) == 0, log(folder)
    assert "passed over: optimizer.pt has" in log(folder)
    assert results(folder) == results(bench.home / "whole")
    print("resumed from the checkpoint before: bitwise the same result", flush=True)


@contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of `size` bytes."""
    folder.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", str(folder)], check=True)


def fill_the_disk(bench: Bench, chance: random.Random) -> None:
    """A disk that is full at some point of the run: a line, a whole checkpoint; with more room it goes on."""
    runs.check_space = lambda *_: None  # it would have said so before the first step
    with small_disk(bench.home / "disk", 1 << 30) as disk:
        filler = disk / "filler"
        folder = disk / "run"
        child = bench.start(folder)
        wait_until(child, (folder / "checkpoints/checkpoint-2").exists, folder)
        os.kill(child, signal.SIGSTOP)
        with filler.open("wb") as file:
            os.posix_fallocate(file.fileno(), 0, shutil.disk_usage(disk).free - chance.randrange(10_000, 200_000))
        os.kill(child, signal.SIGCONT)
        code = exit_code_of(child)
        assert code == 2 and log(folder).splitlines()[-1].startswith("error: "), (code, log(folder))
        assert "No space left" in log(folder) and "Traceback" not in log(folder), log(folder)
        check_whole(folder)
        assert list(folder.glob("checkpoints/checkpoint-*"))
        print(f"full disk: {log(folder).splitlines()[-1][:150]}", flush=True)
        filler.unlink()
        assert bench.run(folder) == 0, log(folder)
        assert results(folder) == results(bench.home / "whole")
        check_nothing_left(folder)


def take_permission(bench: Bench) -> None:
    """The checkpoints' folder loses its permissions in the middle of a run."""
    folder = bench.home / "forbidden"
    save = DialogueTrainer.save_model

    def forbidden(trainer: DialogueTrainer, *args: object, **keywords: object) -> None:
        if trainer.state.global_step == 4:
            (folder / "checkpoints").chmod(0o555)
            if os.geteuid() == 0:  # who may write all the same
                os.seteuid(NOBODY)
        save(trainer, *args, **keywords)

    child = bench.start(folder, before=lambda: setattr(DialogueTrainer, "save_model", forbidden))
    code = exit_code_of(child)
    assert code == 2 and "Permission denied" in log(folder).splitlines()[-1], (code, log(folder))
    assert "Traceback" not in log(folder)
    check_whole(folder)
    print(f"no permission: {log(folder).splitlines()[-1][:150]}", flush=True)
    (folder / "checkpoints").chmod(0o755)
    assert bench.run(folder) == 0, log(folder)
    assert results(folder) == results(bench.home / "whole")


def main(argv: list[str] | None = None) -> None:
    """All of it; raises AssertionError at the first loss."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=5)
    parser.add_argument("--pairs", type=int, default=2, help="of runs into the same folders (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0)
    flags = parser.parse_args(argv)
    chance = random.Random(flags.seed)
    with tempfile.TemporaryDirectory() as home:
        bench = Bench(Path(home))
        kill_at_random(bench, flags.kills, chance)
        start_in_pairs(bench, flags.pairs, chance)
        damage_each_file(bench, chance)
        take_permission(bench)
        if os.geteuid() == 0:
            fill_the_disk(bench, chance)
        else:
            print("full disk: not tried, since only root can mount a small one")


if __name__ == "__main__":
    main()
