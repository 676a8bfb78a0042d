"""Text as a person types it, and nothing else changed."""

import re
import zipfile

import pytest
from conftest import DAILYDIALOG, needs_dailydialog
from hypothesis import given
from hypothesis import strategies as st

from dialogue.data.cleaning import clean, drop_controls, looks_tokenised
from dialogue.data.corpus import fold, split_by_name, without_overlap
from dialogue.data.speakers import plain_name


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ("I don ’ t know .", "I don't know."),
        ("Good morning , sir . Is there a bank near here ?", "Good morning, sir. Is there a bank near here?"),
        ("Good.Let ' s go now .", "Good. Let's go now."),
        ("you are right.But what shall we do ?", "you are right. But what shall we do?"),
        ("No.The time we have is short .", "No. The time we have is short."),
        ("How do you do , Mr.Smith ?", "How do you do, Mr. Smith?"),
        ("See you at 8 p.m.Any questions ?", "See you at 8 p.m. Any questions?"),
        ("it's already 10.Stay here !", "it's already 10. Stay here!"),
        ("That is my parents ’ house .", "That is my parents' house."),
        ("He is an acrobat 。", "He is an acrobat."),
        ("Ｈｏｗ are you ？", "How are you?"),
        ("Let me see . . . you ’ re right", "Let me see... you're right"),
        ("It′ s a gift", "It's a gift"),
        ("I ’ Ve been there .", "I've been there."),
        ("I ‘ d love to", "I'd love to"),
        ("At six o ’ clock , ma ' am .", "At six o'clock, ma'am."),
        ("It opens at 9 a . m . and closes at 5 p . m .", "It opens at 9 a.m. and closes at 5 p.m."),
        ("Sorry , I can't.My mother is here .", "Sorry, I can't. My mother is here."),
        ("half an emoji \ud83d , gone", "half an emoji, gone"),
        ("beep\x7f\x07 , boop", "beep, boop"),
        ("( CPC ) ?", "( CPC )?"),
    ],
)
def test_tokenisation_is_undone(before, after):
    assert clean(before) == after


@pytest.mark.parametrize(
    "text",
    [
        "I don't know. Let's go!", "A .NET developer", "Great :) see you", "She has a Ph.D in the U.S.A. now",
        "see Stars.com",
        "It is 3.7 miles, 1,000 yards", "http://example.org/A.Html?x=Yes.No", "write to Ann.Lee@example.org",
        "8:30 p.m.",
        "That is sad :'(", "the type is x :: Int", "call Foo.Bar(x) or Foo.Bar_baz", "see docs/Read.Me",
        "http://a.b/Is.It", "¿Qué tal? Muy bien.", "今日はいい天気", "<END> is text", "$5.99, 1:0, 50%",
        "He said 'no' to me.", "e.g. this, i.e. that", "cost: $5; tip: 10 %", "line one\nline two",
        "x = a.b(c)", "café, naïve", "",
    ],
)  # fmt: skip
def test_clean_text_stays(text):
    assert clean(text) == text


@given(st.text(alphabet=st.sampled_from("abTM .,?!'’‘。：0\n\t:)sS")) | st.text())
def test_cleaning_twice_is_cleaning_once(text):
    assert clean(clean(text)) == clean(text)


@needs_dailydialog
def test_no_artefact_is_left_in_the_real_release():
    for split in ("train", "validation", "test"):
        with zipfile.ZipFile(DAILYDIALOG / f"{split}.zip") as archive:
            text = archive.read(f"{split}/dialogues_{split}.txt").decode()
        turns = [clean(turn) for turn in text.replace("\n", "__eou__").split("__eou__")]
        artefact = r" [.,?!](\s|$)|[’‘]|[A-Za-z] ?' (s|t|m|re|ve|ll|d|am|clock)\b|'Ve\b|[a-z]{2}[.?!][A-Z][a-z]"
        assert not [turn for turn in turns if "www." not in turn and re.search(artefact, turn)]
        assert turns == [clean(turn) for turn in turns], "cleaning the release twice is cleaning it once"


def test_the_look_of_dailydialog_is_not_that_of_a_few_slips_or_of_french():
    tokenised = [["I don ’ t know .", "Let ' s go !"], ["Yes .", "No ."], ["Fine .", "Good ."]] * 20
    assert looks_tokenised(tokenised)
    assert not looks_tokenised([["it' s late", "ok"], ["Fine", "Good"]] * 5), "a few slips of the pen"
    assert not looks_tokenised([["Ça va ?", "Oui ! J’arrive : attends ."], ["C’est d’accord ?", "Oui ."]] * 50)


# What each pattern has to search longest: a run that nearly matches, many times over or without an end.
RUNS = [
    " ",
    "a ",
    " ’",
    "a ’ ",
    "'",
    "p . ",
    "o ' ",
    "Aa.",
    "aa.A",
    "1.",
    "http",
    "w",
    "a.",
    " .",
    ". ",
    "<",
    "\t ",
    "\r\n",
    "é ",
    "，",
]


@pytest.mark.parametrize("end", ["", "x", "."])
@pytest.mark.parametrize("run", RUNS)
def test_no_text_takes_more_than_linear_time(run, end):
    """A quadratic pattern would take hours for each of these, and so hang here."""
    text = run * (200_000 // len(run)) + end
    clean(text)
    looks_tokenised([[text], [text]])
    drop_controls(text)
    fold(text)
    without_overlap([[text, text]], [[text, run]])
    split_by_name(text)
    plain_name(text)
