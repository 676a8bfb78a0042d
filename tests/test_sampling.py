"""The sampler against transformers' own warpers: the same kept sets, the same probabilities."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from dialogue.sampling import candidates, draw, penalise

# Halves make ties frequent; floats make them rare; minus infinity is what a ban leaves behind.
values = st.one_of(st.integers(-12, 12).map(lambda n: n / 2), st.floats(-30, 30, width=32), st.just(-math.inf))
logits = st.lists(values, min_size=2, max_size=60).filter(lambda row: max(row) > -math.inf)


@settings(max_examples=1500, deadline=None)
@given(
    logits,
    st.floats(0.1, 5),
    st.integers(0, 80),
    st.sampled_from([0.0, 0.1, 0.35, 0.5, 0.9, 0.99, 1.0]),
    st.sampled_from([0.0, 0.05, 0.3, 1.0]),
    st.sampled_from([1.0, 1.3, 0.7]),
    st.sets(st.integers(0, 1), max_size=2),
)
def test_as_transformers_does_it(row, temp, top_k, top_p, min_p, penalty, seen):
    scores = torch.tensor(row)
    ids = torch.tensor(sorted(seen), dtype=torch.long)
    warpers = LogitsProcessorList()
    if penalty != 1 and seen:
        warpers.append(RepetitionPenaltyLogitsProcessor(penalty))
    warpers.append(TemperatureLogitsWarper(temp))
    if top_k:
        warpers.append(TopKLogitsWarper(top_k))
    if top_p < 1:
        warpers.append(TopPLogitsWarper(top_p))
    if min_p:
        warpers.append(MinPLogitsWarper(min_p))
    expected = warpers(ids[None], scores[None].clone())[0].softmax(0)

    before = scores.clone()
    kept = candidates(penalise(scores, ids, penalty), temp, top_k, top_p, min_p)
    assert torch.equal(scores, before), "the logits were changed"
    ours = torch.zeros_like(scores).index_put((kept.ids,), kept.probabilities)
    # Exactly at the edge of top-p, a sum of float32 may fall on either side of it, by the order of the additions.
    near_edge = (scores / temp).softmax(0).sort().values.cumsum(0).sub(1 - top_p).abs().min() < 1e-5
    if not near_edge and not _ties(expected, ours):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-6)
    assert ours.sum() == pytest.approx(1, abs=1e-5)


def _ties(expected, ours):
    """Top-p cuts between equal logits: which of them stays is the sort's choice, the values are not."""
    return torch.allclose(expected.sort().values, ours.sort().values, rtol=1e-4, atol=1e-6)


def test_edges():
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0])
    assert candidates(scores, 0, 40, 0.9).ids.tolist() == [1], "greedy takes the first of the best"
    assert candidates(scores, 1, 1, 1.0).ids.tolist() == [1, 3], "top-k keeps ties"
    assert len(candidates(scores, 1, 99, 1.0).ids) == 4
    assert len(candidates(scores, 1, 0, 1.0).ids) == 4
    assert len(candidates(scores, 1, 0, 0.0).ids) == 1


@pytest.mark.parametrize("broken", [math.nan, math.inf])
def test_logits_that_are_no_numbers_are_refused(broken):
    with pytest.raises(ValueError, match="not finite"):
        candidates(torch.tensor([0.0, broken]), 1, 40, 0.9)
    with pytest.raises(ValueError, match="not finite"):
        candidates(torch.full((4,), -math.inf), 0, 0, 1)


def test_draws_follow_the_probabilities_and_the_seed():
    choice = candidates(torch.tensor([0.0, math.log(3.0), -math.inf]), 1, 0, 1)
    generator = torch.Generator().manual_seed(5)
    drawn = [draw(choice, generator) for _ in range(4000)]
    assert 2 not in drawn
    assert drawn.count(1) / len(drawn) == pytest.approx(0.75, abs=0.03)
    generator.manual_seed(5)
    assert drawn[:50] == [draw(choice, generator) for _ in range(50)]
