"""Which of several replies fits best what was said. Pure functions; no model is known here.

A plain language model finds those replies most probable that fit everywhere. So what a reply would get without the
message is subtracted (Li et al. 2016, "A Diversity-Promoting Objective Function for Neural Conversation Models",
section 3: maximum mutual information, the form with lambda). Replies that nobody wants come last, whatever they score.
"""

from typing import NamedTuple

from dialogue.data.corpus import fold, words

LAMBDA = 0.7  # of what a reply would get anyway; 1: only what the message adds counts
ALPHA = 1.0  # the score is divided by length ** ALPHA; 0.5: short replies win
COOLER = 0.6  # times the chat's temperature: cooler candidates make more sense, and choosing brings variety back
# A message that says nothing: what a reply gets after it, it would get anyway. Of 20 replies of DailyDialog a starter
# found the true one as often with this one alone as with the mean over three (62 and 61 %, 80 contexts, LAMBDA 1).
NOTHING = "..."


class Candidate(NamedTuple):
    """One reply. Log-probabilities are in nats, of all its tokens and <END>."""

    tokens: list[int]  # <END> is not among them
    text: str
    given: float  # log p(reply | all that was said)
    alone: float = 0.0  # log p(reply | `NOTHING`)
    temp: float = 0.0  # that it was drawn at
    fault: str = ""  # what puts it last

    @property
    def score(self) -> float:
        """Higher is better."""
        return (self.given - LAMBDA * self.alone) / (len(self.tokens) + 1) ** ALPHA


def rank(candidates: list[Candidate]) -> list[Candidate]:
    """The best first; those with a fault after all others."""
    return sorted(candidates, key=lambda each: (bool(each.fault), -each.score))


def fault(text: str, said: list[str], ended: bool) -> str:
    """What is wrong with a reply, in a word; "" where nothing is. `said`: what it must not say again, the message that
    it answers and what either speaker said before."""
    ours, before = words_of(text), [words_of(each) for each in said]
    threes, theirs = ngrams(ours, 3), [set(ngrams(each, 3)) for each in before]
    if not ours:
        return "empty"
    if not ended:
        return "cut"
    if ours in before or (threes and any(2 * sum(three in of for three in threes) >= len(threes) for of in theirs)):
        return "parrot"
    return "repeats" if len(set(threes)) < len(threes) else ""


def words_of(text: str) -> list[str]:
    """ "I'm fine, thanks - and you?" -> ["im", "fine", "thanks", "and", "you"]."""
    return list(filter(None, (fold(word).replace(" ", "") for word in words(text))))


def ngrams(words: list[str], n: int) -> list[tuple[str, ...]]:
    """["a", "b", "c"], 2 -> [("a", "b"), ("b", "c")]."""
    return list(zip(*(words[start:] for start in range(n)), strict=False))
