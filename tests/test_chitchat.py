"""Which episodes of chitchat a starter is trained on."""

from dialogue.data import chitchat

BRIEF = ["I have a dog", "What is your dog called?", "He is called Rex", "Rex is a good name"]


def test_turns_that_take_up_words_are_found():
    assert chitchat._listening(BRIEF) == 1
    assert chitchat._listening(["I have a dog", "I have an exam", "It is cold", "The exam was hard"]) == 1 / 3
    assert chitchat._listening(["What is it?", "It is what it is", "Yes it is"]) == 0, "function words are no subject"


def test_episodes_are_brief_and_have_four_turns_at_least():
    long = " ".join(["word"] * 21)
    assert chitchat._brief_episodes([*BRIEF, long, *BRIEF[:3], long, *BRIEF, *BRIEF, *BRIEF]) == [
        BRIEF, [*BRIEF, *BRIEF], BRIEF,
    ]  # fmt: skip
    assert chitchat._brief_episodes([*BRIEF[:3], "我有一只狗"]) == [], "English has no such letters"
