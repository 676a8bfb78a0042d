"""Folders appear whole or not at all."""

import pytest

from dialogue.errors import UserError
from dialogue.storage import RUN_FILE, check_free, check_space, whole_folder


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
    assert names(target) == ["b.txt"]
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
    with pytest.raises(UserError, match="is a file"):
        check_free(result / RUN_FILE, overwrite=True)


def test_too_little_disk_is_said_beforehand(tmp_path):
    check_space(tmp_path / "a" / "b", 1000)
    with pytest.raises(UserError, match=r"not enough disk .* 1000000000\.0 GB needed"):
        check_space(tmp_path / "a" / "b", 10**18)
