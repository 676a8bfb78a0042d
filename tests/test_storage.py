"""Folders appear whole or not at all."""

import errno
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

import main
from dialogue import storage
from dialogue.errors import UserError
from dialogue.json_files import read_json, write_private
from dialogue.storage import (
    MANIFEST,
    RUN_FILE,
    check_free,
    check_space,
    damage,
    locked,
    recover,
    whole_folder,
)


def names(folder):
    return sorted(path.name for path in folder.iterdir())


def test_after_an_error_the_old_result_stands_and_nothing_else(tmp_path):
    target = tmp_path / "result"
    with whole_folder(target) as folder:
        (folder / "a.txt").write_text("old")
        assert not target.exists(), "visible before it was whole"
    with pytest.raises(KeyboardInterrupt), whole_folder(target) as folder:
        (folder / "a.txt").write_text("new")
        raise KeyboardInterrupt
    assert (target / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["result"]
    with whole_folder(target) as folder:
        (folder / "b.txt").write_text("new")
    assert names(target) == ["b.txt", MANIFEST]
    assert names(tmp_path) == ["result"]


def test_what_may_be_written_over(tmp_path):
    check_free(tmp_path / "none", overwrite=False)
    (tmp_path / "empty").mkdir()
    check_free(tmp_path / "empty", overwrite=False)
    result = tmp_path / "result"
    result.mkdir()
    (result / RUN_FILE).write_text("{}")
    with pytest.raises(UserError, match="add --overwrite"):
        check_free(result, overwrite=False)
    check_free(result, overwrite=True)
    with pytest.raises(UserError, match="not a run's result"):
        check_free(tmp_path, overwrite=True)
    with pytest.raises(UserError, match="cannot be created: it is a file"):
        check_free(result / RUN_FILE, overwrite=True)


def test_too_little_disk_is_said_beforehand(tmp_path):
    check_space({tmp_path / "a" / "b": 1000})
    with pytest.raises(UserError, match=r"not enough disk .* 1000000000\.0 GB needed"):
        check_space({tmp_path / "a" / "b": 10**18})
    free = shutil.disk_usage(tmp_path).free
    with pytest.raises(UserError, match="not enough disk"):  # each would fit, both do not
        check_space({tmp_path / "a": free * 2 // 3, tmp_path / "b": free * 2 // 3})


def write_result(target, text="old"):
    with whole_folder(target) as folder:
        (folder / "a.txt").write_text(text)
        (folder / "inner").mkdir()
        (folder / "inner/b.txt").write_text(text * 9)
    return target


@pytest.mark.parametrize("moment", ["between the renames", "after them"])
def test_a_replacement_that_was_cut_is_recovered(moment, tmp_path, monkeypatch):
    target = write_result(tmp_path / "result")
    rename, calls = Path.rename, []

    def killed(path, to):
        calls.append(path)
        if len(calls) == 2 and moment == "between the renames":
            raise SystemExit  # stands for a kill: nothing after it runs
        rename(path, to)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(Path, "rename", killed)
        patch.setattr("dialogue.storage.recover", lambda _: None)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)
        write_result(target, "new")
        raise SystemExit
    recover(target)
    assert (target / "a.txt").read_text() == ("old" if moment == "between the renames" else "new")
    assert not damage(target)
    assert ".result.old" not in names(tmp_path)


def test_a_chat_that_starts_in_the_middle_of_a_replacement_does_not_undo_it(tmp_path, monkeypatch):
    target = write_result(tmp_path / "result")
    rename, restored = Path.rename, []

    def then_a_chat_starts(path, to):
        rename(path, to)
        if path == target and not restored:
            restored.append(path)
            recover(target)

    monkeypatch.setattr(Path, "rename", then_a_chat_starts)
    write_result(target, "new")
    assert restored and (target / "a.txt").read_text() == "new" and not damage(target)
    assert names(tmp_path) == ["result"]


def test_a_chat_that_starts_between_the_renames_finds_the_new_folder(tmp_path, monkeypatch):
    """The training goes on at each moment at which the chat has looked and not found."""
    target, away = write_result(tmp_path / "result"), tmp_path / "away"
    (target / "config.json").write_text("{}")
    target.rename(away)
    with monkeypatch.context() as patch:
        patch.setattr(time, "sleep", lambda _: away.rename(target))
        assert main.find_model(str(target)) == str(target)
    rename = Path.rename
    rename(target, away)
    shutil.copytree(away, storage._old(target))
    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", lambda path, to: (rename(away, target), rename(path, to)))
        recover(target)
    (target / "a.txt").write_text("half")
    look = storage.damage
    with monkeypatch.context() as patch:
        patch.setattr(storage, "damage", lambda *_: (patch.undo(), look(*_), (target / "a.txt").write_text("old"))[1])
        storage.check_whole(target, str(target))
    (target / "a.txt").write_text("half")
    with pytest.raises(UserError, match=r"a\.txt has 4 of 3 bytes"):
        storage.check_whole(target, str(target))


@pytest.mark.parametrize(
    "harm", [lambda data: data[:-1], lambda data: b"", lambda data: bytes([data[0] ^ 1]) + data[1:]]
)
@pytest.mark.parametrize("name", ["a.txt", "inner/b.txt", MANIFEST])
def test_damage_is_found(name, harm, tmp_path):
    target = write_result(tmp_path / "result")
    assert damage(target) is None
    data = (target / name).read_bytes()
    (target / name).write_bytes(harm(data))
    assert damage(target), f"{name} {harm(data)[:20]}"
    (target / name).unlink()
    assert bool(damage(target)) == (name != MANIFEST), "what other programs wrote has no manifest"


def test_large_files_are_compared_by_size_only(tmp_path):
    target = write_result(tmp_path / "result", "long")
    (target / "inner/b.txt").write_text("gnol" * 9)
    assert damage(target, hash_below=5) is None
    (target / "a.txt").write_text("gnol")
    assert "a.txt is not what was written" in str(damage(target, hash_below=5))


def test_a_link_to_another_disk_stays_a_link(tmp_path):
    write_result(tmp_path / "big_disk")
    (tmp_path / "result").symlink_to("big_disk")
    write_result(tmp_path / "result", "new")
    assert (tmp_path / "result").is_symlink() and (tmp_path / "big_disk/a.txt").read_text() == "new"


@pytest.mark.parametrize(
    ("error", "said"),
    [(OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)), "No space left"),
     (RuntimeError("[enforce fail] . unexpected pos 64 vs 0"), "unexpected pos"),
     (Exception("Error while serializing: I/O error: No space left on device (os error 28)"), "No space left")],
)  # fmt: skip
def test_a_full_disk_is_a_line_whoever_says_it(error, said, tmp_path):
    target = write_result(tmp_path / "result")
    with pytest.raises(UserError, match=f"result could not be written: .*{said}"), whole_folder(target):
        raise error
    assert (target / "a.txt").read_text() == "old" and not damage(target)


def test_folders_of_a_run_lie_apart(tmp_path):
    with locked(tmp_path / "a", tmp_path / "b", tmp_path / "ab"):
        pass
    for first, second in (("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a", "c/../a")):
        with pytest.raises(UserError, match="give each its own"), locked(tmp_path / first, tmp_path / second):
            pass


SHAPE = {"step": int, "best": int | None, "scores": {str: [int | float]}, "run": {"seed": int}}
RIGHT = '{"step": 3, "best": null, "scores": {"1": [1, 2.5]}, "run": {"seed": 1, "more": []}, "more": 1}'


@pytest.mark.parametrize(
    ("text", "said"),
    [(None, "No such file"), ("", "not JSON"), ("{", "not JSON"), ("[" * 100_000, "not JSON"), ("[]", "its content"),
     ("null", "its content"), ("3", "its content"), ("{}", "step is missing"), (RIGHT.replace("3", '"3"'), "step"),
     (RIGHT.replace("null", "1.5"), "best"), (RIGHT.replace("[1, 2.5]", "7"), "1 is missing"),
     (RIGHT.replace("2.5", "[]"), r"1\[1\]"), (RIGHT.replace('{"seed": 1, ', '{'), "seed"), (b"\xff", "not JSON"),
     ("9" * 5000, "not JSON")],
)  # fmt: skip
def test_json_of_another_shape_is_one_line(text, said, tmp_path):
    path = tmp_path / "run.json"
    if text is not None:
        path.write_bytes(text.encode() if isinstance(text, str) else text)
    with pytest.raises(UserError, match=rf"run\.json is not as it was written: .*{said}"):
        read_json(path, SHAPE)
    assert isinstance(read_json(path), dict)
    path.write_text(RIGHT)
    assert read_json(path, SHAPE)["run"]["seed"] == 1 == read_json(path)["more"]


@pytest.mark.parametrize("text", ["[]", "7", '{"a.txt": 3}', '{"a.txt": {"size": "3"}}', "[" * 100_000])
def test_a_manifest_of_another_shape_is_damage(text, tmp_path):
    target = write_result(tmp_path / "result")
    (target / MANIFEST).write_text(text)
    assert damage(target) == f"{MANIFEST} is damaged"


def test_a_private_file_is_whole_and_its_owner_s(tmp_path):
    file = tmp_path / "talk.json"
    file.write_text("old")
    file.chmod(0o644)
    (tmp_path / "link").symlink_to("talk.json")
    write_private(tmp_path / "link", ["new"])
    assert read_json(file, [str]) == ["new"] and file.stat().st_mode & 0o777 == 0o600
    assert names(tmp_path) == ["link", "talk.json"]
    with pytest.raises(OSError, match="No such"):
        write_private(tmp_path / "none/talk.json", [])


# ---- One process at a time ---------------------------------------------------------------------------

LOCKER = """
import sys
from pathlib import Path
from dialogue.errors import UserError
from dialogue.storage import locked
print("ready", flush=True)
sys.stdin.readline()
try:
    with locked(*map(Path, sys.argv[1:])):
        print("in", flush=True)
        sys.stdin.readline()
except UserError as error:
    print(error, flush=True)
    sys.exit(2)
"""


class Locker(subprocess.Popen):
    """A process that locks folders once it is told to, and lets go of them once it is told to."""

    def __init__(self, *folders):
        super().__init__(
            [sys.executable, "-c", LOCKER, *map(str, folders)], cwd=Path(__file__).resolve().parents[1],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
        )  # fmt: skip
        assert self.stdout.readline() == "ready\n"

    def go(self):
        self.stdin.write("\n")
        self.stdin.flush()

    def said(self):
        return self.stdout.readline().strip()


def test_the_second_to_lock_is_told_so(tmp_path):
    (tmp_path / "link").symlink_to("adapters")
    first = Locker(tmp_path / "merged", tmp_path / "adapters")
    first.go()
    assert first.said() == "in"
    for other in ((tmp_path / "adapters",), (tmp_path / "link",), (tmp_path / "x", tmp_path / "merged/../merged")):
        with pytest.raises(UserError, match="by another run: wait"), locked(*other):
            pass
    with locked(tmp_path / "other"):
        check_free(tmp_path / "adapters", overwrite=False)
        write_result(tmp_path / "adapters")  # as the first does
    first.go()
    assert first.wait() == 0
    assert names(tmp_path) == ["adapters", "link"], "lock files are left"
    with locked(tmp_path / "adapters", tmp_path / "new/merged"):
        pass
    with pytest.raises(UserError, match="give each its own"), locked(tmp_path / "adapters", tmp_path / "link"):
        pass


def test_a_lock_whose_process_is_gone_is_free(tmp_path):
    first = Locker(tmp_path / "adapters")
    first.go()
    assert first.said() == "in"
    first.kill()
    first.wait()
    assert (tmp_path / ".adapters.lock").is_file()
    second, third = Locker(tmp_path / "adapters"), Locker(tmp_path / "adapters")
    second.go()
    assert second.said() == "in"
    third.go()
    assert "written by another run" in third.said()
    second.go()
    assert (second.wait(), third.wait()) == (0, 2)
    assert names(tmp_path) == []


def test_of_two_that_start_together_exactly_one_goes_on(tmp_path):
    for _ in range(5):
        pair = [Locker(tmp_path / "a", tmp_path / "b"), Locker(tmp_path / "b", tmp_path / "a")]
        for each in pair:
            each.go()
        said = [each.said() for each in pair]
        winner = said.index("in")
        assert "by another run" in said[1 - winner]
        pair[winner].go()
        assert sorted(each.wait() for each in pair) == [0, 2]


def test_a_lock_that_cannot_be_is_one_line(tmp_path):
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be created"), locked(tmp_path / "file/a"):
        pass


# ---- File systems ------------------------------------------------------------------------------------


def test_all_files_are_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        with whole_folder(tmp_path / "result") as folder:
            (folder / "weights").touch(0o600)
    finally:
        os.umask(before)
    assert (tmp_path / "result/weights").stat().st_mode & 0o777 == 0o640


def test_folders_that_cannot_be_synced_are_no_error(tmp_path, monkeypatch):
    sync = os.fsync

    def refuse(descriptor):
        if os.path.isdir(f"/proc/self/fd/{descriptor}"):
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        sync(descriptor)

    monkeypatch.setattr(os, "fsync", refuse)
    assert not damage(write_result(tmp_path / "result"))


@pytest.mark.skipif(not os.path.ismount("/proc"), reason="a mount point is needed")
def test_a_mount_point_is_seen_beforehand():
    with pytest.raises(UserError, match="/proc is a mount point"):
        check_free(Path("/proc"), overwrite=True)
