"""Text that a terminal may be shown: no control sequence, whole characters only.

Model output, file names and messages of libraries are data. In a terminal, some characters are commands:
colours, cursor moves, a new window title, text that runs backwards.
"""

import re

# ECMA-48: CSI sequences, then OSC, DCS, SOS, PM and APC strings up to BEL or ST, then two-character escapes.
# A string holds no C1 character; without that rule each opener of many would read on to the end of the text.
_SEQUENCE = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]"
    r"|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x80-\x9f]*(?:\x07|\x1b\\|\x9c)"
    r"|\x1b[ -/]*[0-~]"
)
# A sequence that may still be going on at the end of what is there so far.
_UNFINISHED = re.compile(
    r"(?:(?:\x1b\[|\x9b)[0-?]*[ -/]*|(?:\x1b[\]PX^_]|[\x9d\x90\x98\x9e\x9f])[^\x07\x1b\x80-\x9f]*\x1b?|\x1b[ -/]*)\Z"
)
# C0 but for newline and tab, DEL, C1, and the bidirectional overrides (Unicode, annex 9).
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


def plain(text: str) -> str:
    """`text` without control sequences, control characters and direction overrides."""
    return _CONTROL.sub("", _SEQUENCE.sub("", text))


def stable(text: str) -> str:
    """The part of a growing text that will not change any more, made plain. Left out for now: a control sequence that
    has begun, and a character of which only some bytes are there (the tokenizer decodes them as U+FFFD)."""
    return plain(_UNFINISHED.sub("", text.rstrip("\ufffd")))
