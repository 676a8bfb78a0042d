"""Lessons: what the bot should have said, kept by the chat and taught by `Fine_tuningmodel.py --teach`."""

import json
import os
from functools import partial
from pathlib import Path
from typing import Any

from dialogue.errors import said_in_a_line

LESSONS = Path("gpt2-dialogue-lessons.jsonl")  # in the working directory, as the folders of a run are


def keep(messages: list[dict[str, Any]]) -> None:
    """Append the last reply of a conversation, to be learned, with the persona and the exchange before it, to be read.
    The file is an ordinary data file that its owner alone can read. Raises UserError where it cannot be written."""
    persona = [each for each in messages[:-4] if each["role"] == "system"]
    messages = [*persona, *messages[-4:]]
    read = [{**each, "weight": 0} if each["role"] == "assistant" else each for each in messages[:-1]]
    with said_in_a_line(LESSONS), open(LESSONS, "a", encoding="utf-8", opener=partial(os.open, mode=0o600)) as file:
        file.write(json.dumps({"messages": [*read, messages[-1]]}, ensure_ascii=False) + "\n")
