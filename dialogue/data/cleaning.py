"""Undo the tokenisation of DailyDialog's text, and change nothing else.

The release separates punctuation ("Good morning , sir ."), spaces out apostrophes ("I don ’ t") and runs
sentences together ("right.But"). A bot trained on that answers "I don ’ t know .".
"""

import re

# Full-width ASCII (U+FF01 to U+FF5E) lies at a fixed distance from ASCII
# (Unicode, chart "Halfwidth and Fullwidth Forms").
_CHARACTERS = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F)} | {
    ord("。"): ".", ord("、"): ",", ord("′"): "'",
}  # fmt: skip
# Control characters: C0 but for newline and tab, DEL, C1. Lone surrogates too: they are no text, and the
# tokenizer raises on them. Those that part lines (Unicode, chapter 5.8: VT, FF, CR, NEL, LS, PS) become newlines.
_NO_TEXT: dict[int, str | None] = dict.fromkeys((*range(9), *range(11, 32), *range(127, 160), *range(0xD800, 0xE000)))
_NO_TEXT |= dict.fromkeys((0x0B, 0x0C, 0x0D, 0x1C, 0x1D, 0x1E, 0x85, 0x2028, 0x2029), "\n")

_STEPS = [
    # "I don ’ t", "Let ' s": the apostrophe of a contraction, spaced out on both sides
    (re.compile(r"(?<=\w) ?[’‘'] (?=(?:s|t|m|re|ve|ll|d)\b)", re.IGNORECASE), "'"),
    # "I ’ Ve": the release capitalises this one, some 900 times
    (re.compile(r"(?<=\w)'Ve\b"), "'ve"),
    # "my parents ’ house": any other curly apostrophe belongs to the word before it
    (re.compile(r"(?<=\w) ’(?= |$)"), "'"),
    # "‘ hello": an opening quote belongs to the word after it
    (re.compile(r"‘ (?=\w)"), "'"),
    (re.compile(r"[’‘]"), "'"),
    # words with an apostrophe inside: "six o ’ clock", "yes , ma ’ am", "c ’ mon"
    (re.compile(r"\b(ma|o|c) ?' (am|clock|mon)\b", re.IGNORECASE), r"\1'\2"),
    # "at 2 p . m ."
    (re.compile(r"\b([ap]) ?\. m(?= ?\.)", re.IGNORECASE), r"\1.m"),
    # "Good morning , sir ." but not " .NET", " :)" or " :'("
    (re.compile(r"(?<! ) +(?=[.,?!;](?:[\s.,?!;:\"']|$)|:(?:[\s\"]|$))"), ""),
]

# "right.But", "can't.My", "Mr.White", "8 p.m.Any" and "10.Stay", but not "Ph.D", "U.S.A." or "Stars.com".
_RUN_TOGETHER = re.compile(
    r"(?<=[a-z'][a-z][.?!])(?=[A-Z](?:[a-z']|\W|$))|(?<=[A-Z][a-z]\.)(?=[A-Z][a-z'])|(?<=[ap]\.m\.)(?=[A-Z][a-z])"
    r"|(?<=\d\.)(?=[A-Z][a-z])"
)
# Web and mail addresses, and code such as "Foo.Bar(x)"; the release has no such words that run together.
_NO_PROSE = re.compile(r"://|@|www\.|[(=_/]", re.IGNORECASE)


# The look of the release: "it isn ' t". A quarter of its dialogues have it; French sets marks apart, but not this one.
_APART = re.compile(r"\w ?[’'] (?:s|t|m|re|ve|ll|d)\b")


def looks_tokenised(dialogues: list[list[str]]) -> bool:
    """Whether this is DailyDialog's text as released, whatever the file around it: a tenth has that look, and ten."""
    sample = dialogues[:1000]
    return sum(any(map(_APART.search, turns)) for turns in sample) > max(10, len(sample) // 10)


def clean(text: str) -> str:
    """One turn as a person would type it. Text that is clean already comes back unchanged."""
    text = drop_controls(text).translate(_CHARACTERS)
    for pattern, replacement in _STEPS:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\S+", lambda word: word[0] if _NO_PROSE.search(word[0]) else _RUN_TOGETHER.sub(" ", word[0]), text)
    return text.strip()


def drop_controls(text: str) -> str:
    """Without control characters and lone surrogates, lines parted by newlines: all that is done to other text."""
    return text.replace("\r\n", "\n").translate(_NO_TEXT)
