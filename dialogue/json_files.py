"""JSON files: written whole, and read back only in the shape that is expected."""

import json
import os
from pathlib import Path
from typing import Any

from dialogue.errors import UserError


def write_json(path: Path, content: Any) -> None:
    """Write `content` as indented JSON, in the order of its keys."""
    path.write_text(as_json(content), encoding="utf-8")


def as_json(content: Any) -> str:
    return json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"


def read_json(path: Path, shape: Any = None) -> Any:
    """The JSON in a file, of a shape that `_wrong` knows. Raises UserError for a file that is not so. Without a shape:
    an object, and {} where there is none."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        problem = _wrong(content, {} if shape is None else shape)
    except OSError as error:
        problem = f"it cannot be read ({error.strerror or error})"
    except (ValueError, RecursionError):
        problem = "it is not JSON"
    if problem and shape is not None:
        raise UserError(f"{path} is not as it was written: {problem}; write it again, or move it away")
    return {} if problem else content


def _wrong(content: Any, shape: Any, name: str = "its content") -> str | None:
    """What is missing or of another type than in `shape`, in words. A shape is a type, `[shape]` of a list's items,
    {"name": shape} of what an object must have, or {str: shape} of all that it has."""
    if isinstance(shape, dict) and isinstance(content, dict):
        inner = [(key, content.get(key), each) for key, each in shape.items() if key is not str]
        inner += [(key, each, shape[str]) for key, each in content.items() if str in shape]
    elif isinstance(shape, list) and isinstance(content, list):
        inner = [(f"{name}[{place}]", each, shape[0]) for place, each in enumerate(content)]
    else:
        fits = not isinstance(shape, dict | list) and isinstance(content, shape)
        return None if fits else f"{name} is missing, or of the wrong type"
    return next(filter(None, (_wrong(each, kind, key) for key, each, kind in inner)), None)


def write_private(path: Path, content: Any) -> None:
    """Write JSON that the owner alone can read; the file is the old one or the new one, never half of it. A link is
    followed. Raises OSError."""
    target = Path(os.path.realpath(path))
    beside = target.with_name(f".{target.name[:200]}.{os.getpid()}")
    try:
        with open(beside, "w", encoding="utf-8", opener=lambda name, flags: os.open(name, flags, 0o600)) as file:
            file.write(as_json(content))
        beside.replace(target)
    finally:
        beside.unlink(missing_ok=True)
