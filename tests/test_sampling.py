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

from dialogue.chat.sampling import Sampling, candidates, draw, explain, penalise
from dialogue.errors import UserError

# Halves make ties frequent; floats make them rare; minus infinity is what a ban leaves behind.
values = st.one_of(st.integers(-12, 12).map(lambda n: n / 2), st.floats(-30, 30, width=32), st.just(-math.inf))
rows = st.lists(values, min_size=2, max_size=24).filter(lambda row: max(row) > -math.inf)
samplings = st.builds(
    Sampling,
    temp=st.floats(0.1, 5),
    top_k=st.integers(0, 30),
    top_p=st.one_of(st.sampled_from([0.0, 0.5, 0.9, 1.0]), st.floats(0, 1)),
    min_p=st.one_of(st.sampled_from([0.0, 0.05, 1.0]), st.floats(0, 1)),
    repetition_penalty=st.sampled_from([1.0, 1.3, 0.7]),
)


def peers(scores, seen, sampling):
    """(V,) -> (V,) probabilities, as transformers' `generate` would have them."""
    warpers = LogitsProcessorList()
    if seen:
        warpers.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    warpers.append(TemperatureLogitsWarper(sampling.temp))
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return warpers(torch.tensor([seen], dtype=torch.long), scores[None].clone())[0].softmax(0)


def near_an_edge(scores, sampling):
    """Whether a share of the probability is within rounding of a threshold: float32 sums differ by their
    order there, and either side is right."""
    left = candidates(scores, Sampling(temp=sampling.temp, top_k=sampling.top_k)).probabilities.double()
    sums = left.sort().values.cumsum(0)
    ratios = left / left.max()
    at_top_p = 0 < sampling.top_p < 1 and (sums - (1 - sampling.top_p)).abs().min() < 1e-5
    return bool(at_top_p or (sampling.min_p and (ratios - sampling.min_p).abs().min() < 1e-5))


@settings(max_examples=2000, deadline=None)
@given(rows, st.sets(st.integers(0, 23), max_size=5), samplings)
def test_as_transformers_does_it(row, seen, sampling):
    scores = torch.tensor(row)
    seen = sorted(token for token in seen if token < len(row))
    penalised = penalise(scores, seen, sampling.repetition_penalty)
    kept = candidates(scores, sampling, seen)
    assert scores.tolist() == row, "the logits were changed"
    assert kept.probabilities.sum() == pytest.approx(1, abs=1e-5)
    if near_an_edge(penalised, sampling):
        return
    ours = torch.zeros_like(scores).index_put((kept.ids,), kept.probabilities)
    expected = peers(scores, seen, sampling)
    # Where top-p cuts between equal tokens, their sort is unstable: how many stay is fixed, and not which.
    worst = penalised[ours > 0].min()
    if bool((ours > 0)[penalised == worst].all()):
        assert torch.equal(ours > 0, expected > 0)
        assert torch.allclose(ours, expected, rtol=1e-4, atol=1e-6)
    assert sorted(penalised[ours > 0].tolist()) == sorted(penalised[expected > 0].tolist())
    assert torch.allclose(ours.sort().values, expected.sort().values, rtol=1e-4, atol=1e-6)


def test_over_a_whole_vocabulary():
    torch.manual_seed(0)
    for sampling in (
        Sampling(0.8, 40, 0.9),
        Sampling(0.7, 0, 0.95),
        Sampling(1.3, 0, 1.0, 0.05),
        Sampling(1.0, 200, 0.5),
    ):
        scores = torch.randn(50_260) * 3
        kept = candidates(scores, sampling)
        expected = peers(scores, [], sampling)
        assert set(kept.ids.tolist()) == set(expected.nonzero()[:, 0].tolist())
        assert torch.allclose(kept.probabilities, expected[kept.ids], rtol=1e-4, atol=1e-6)


def test_forbidden_tokens_and_ties_over_a_whole_vocabulary():
    torch.manual_seed(0)
    for sampling in (Sampling(1.0, 40), Sampling(1.0, 3), Sampling(temp=0), Sampling(0.5, 40, 1.0, 0.1, 1.3)):
        for scores in (torch.randn(50_300), torch.randint(0, 30, (50_300,)).float(), torch.zeros(50_300)):
            forbidden = [int(scores.argmax()), 7, *range(50_260, 50_300)]
            seen = scores.topk(60).indices[::2].tolist()
            banned = scores.index_fill(0, torch.tensor(forbidden), -math.inf)
            kept = candidates(scores, sampling, seen, forbidden).ids.tolist()
            if sampling.temp:
                assert kept == peers(banned, seen, sampling).nonzero()[:, 0].tolist()
            else:
                assert kept == [int(banned.argmax())]


def test_edges():
    scores = torch.tensor([1.0, 3.0, 2.0, 3.0])
    assert candidates(scores, Sampling(temp=0)).ids.tolist() == [1], "greedy takes the first of the best"
    assert candidates(scores, Sampling(top_k=1)).ids.tolist() == [1, 3], "top-k keeps what equals the last"
    assert len(candidates(scores, Sampling(top_k=99)).ids) == 4
    assert len(candidates(scores, Sampling(top_k=0)).ids) == 4
    assert len(candidates(scores, Sampling(top_p=0)).ids) == 1
    assert len(candidates(scores, Sampling(top_p=1)).ids) == 4
    assert candidates(scores, Sampling(min_p=1)).ids.tolist() == [1, 3]
    assert candidates(torch.tensor([-math.inf, 5.0]), Sampling(0.001, 2, 0.5)).probability(1) == 1
    assert candidates(scores, Sampling(temp=0), forbidden=[1, 3]).ids.tolist() == [2]
    assert scores.tolist() == [1, 3, 2, 3]


@pytest.mark.parametrize("row", [[0.0, math.nan], [0.0, math.inf], [-math.inf, -math.inf]])
@pytest.mark.parametrize("temp", [0, 1])
def test_logits_that_are_no_numbers_are_refused(row, temp):
    with pytest.raises(UserError, match="not finite"):
        candidates(torch.tensor(row), Sampling(temp))


@pytest.mark.parametrize(
    "wrong",
    [{"temp": -1}, {"temp": math.nan}, {"temp": 1e-9}, {"temp": "hot"}, {"top_p": 1.5}, {"top_k": -1}, {"top_k": 2.5},
     {"min_p": 2}, {"repetition_penalty": 0}],
)  # fmt: skip
def test_a_value_out_of_range_is_named(wrong):
    with pytest.raises(UserError, match=f"^{next(iter(wrong))} must be [^\n]*$"):
        Sampling(**wrong)


def test_draws_follow_the_probabilities_and_the_seed():
    choice = candidates(torch.tensor([0.0, math.log(3.0), -math.inf]), Sampling())
    generator = torch.Generator().manual_seed(5)
    drawn = [draw(choice, generator) for _ in range(4000)]
    assert 2 not in drawn
    assert drawn.count(1) / len(drawn) == pytest.approx(0.75, abs=0.03)
    generator.manual_seed(5)
    assert drawn[:50] == [draw(choice, generator) for _ in range(50)]


def test_explained():
    # Probabilities 0.5, 0.3, 0.15, 0.05, and a token that is forbidden.
    scores = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0]).log()
    why = explain(scores, 1, Sampling(top_k=3, top_p=0.8))
    assert (why.token, why.rank) == (1, 2)
    assert why.probability == pytest.approx(0.3)
    assert why.tempered == pytest.approx(0.3)
    assert why.drawn == pytest.approx(0.3 / 0.8)
    assert why.removed == {"temp": 0, "top_k": 1, "top_p": 1, "min_p": 0}
    assert explain(scores, 3, Sampling(top_k=3)).drawn == 0
    greedy = explain(scores, 0, Sampling(temp=0, top_k=3, top_p=0.8))
    assert (greedy.tempered, greedy.drawn, greedy.removed["temp"]) == (1, 1, 3)
    assert explain(scores, 0, Sampling(repetition_penalty=2), [0]).tempered < 0.5
