"""Nothing that a terminal would obey gets through, however it is cut into pieces."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dialogue.plaintext import plain, stable

HOSTILE = "a\x1b[31mred\x1b[0m \x1b]0;title\x07b\x9b2Jc\x1bcd\x08\x7f\u202e!"
HOSTILE += "\x1b]8;;http://x\x1b\\link\r\n\tok \U0001f600 你好"
PLAIN = "ared bcd!link\n\tok \U0001f600 你好"


def test_plain():
    assert plain(HOSTILE) == PLAIN
    assert plain("naïve café — 你好 👋🏽 \ttab\nline") == "naïve café — 你好 👋🏽 \ttab\nline"


def grow(pieces):
    """What a reader of the stream has seen: each new stable text must extend the last one."""
    text = shown = ""
    for piece in pieces:
        text += piece
        now = stable(text)
        assert now.startswith(shown), (shown, now)
        shown = now
    return shown


def test_every_split_in_two():
    for cut in range(len(HOSTILE)):
        assert grow([HOSTILE[:cut], HOSTILE[cut:]]) == PLAIN
    assert grow(HOSTILE) == PLAIN


@given(
    st.lists(
        st.text(alphabet=st.sampled_from("ab\x1b[]0;m\x07\\\x9b\x9c\x9d\x90\n \u202ePcX1"), max_size=4), max_size=12
    )
)
def test_any_stream_grows_and_stays_plain(pieces):
    shown = grow(pieces)
    assert not set(shown) & set("\x1b\x07\x9b\x9c\x9d\x90\u202e")
    assert plain("".join(pieces)).startswith(shown)


PIECES = [b"a", b" ", b"\x1b", b"[", b"3", b"m", b"]", b"\x07", b"\xc2", b"\x9b", b"\xf0\x9f", b"\xff", b"\n"]
PIECES += ["👋🏽".encode(), "\u202e".encode()]


@given(st.lists(st.sampled_from(PIECES), max_size=14).map(b"".join))
def test_every_split_of_any_bytes(data):
    """As the tokenizer decodes a growing reply: half a character is U+FFFD, a sequence may be spread over tokens."""
    whole = plain(data.decode(errors="replace"))
    for cut in range(len(data) + 1):
        shown = stable(data[:cut].decode(errors="replace"))
        assert not set(shown) & set("\x1b\x07\x9b\u202e")
        assert whole.startswith(shown), (cut, shown, whole)


@pytest.mark.parametrize("text", ["👋🏽", "你好，世界", "né"])
def test_half_characters_wait(text):
    data = text.encode()
    for cut in range(len(data) + 1):
        assert text.startswith(stable(data[:cut].decode(errors="replace")))


@pytest.mark.parametrize(
    "opener", ["\x9d", "\x90", "\x98", "\x9e", "\x9f", "\x9b", "\x1b", "\x1b]", "\x1b[", "\x9d\x9b"]
)
def test_the_work_grows_with_the_text_and_not_with_its_square(opener):
    """Quadratic work would take minutes here."""
    text = opener * 200_000
    assert plain(text + "end\x07") in ("end", "nd", "") and stable(text) == ""
