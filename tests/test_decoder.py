"""The decoder of our own against transformers: the same logits, whatever happened before."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from helpers import CONFIGS, CONTEXT, WIDE_LLAMA, random_model, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import GPT2Config, LlamaConfig, MistralConfig

from dialogue.chat import decoder, quantising
from dialogue.chat.decoder import Decoder
from dialogue.chat.families import supported
from dialogue.chat.quantising import Quantiser

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module", params=CONFIGS, ids=str)
def model(request):
    return random_model(CONFIGS[request.param])


@torch.no_grad()
def expected(model, ids):
    """(V,) by transformers, which reads everything anew."""
    return model(torch.tensor([ids])).logits[0, -1]


def test_float32_is_what_transformers_computes(model, monkeypatch):
    assert supported(model.config)
    monkeypatch.setattr(decoder, "CHUNK", 16)  # a prompt is read in pieces
    engine, ids = Decoder(model, "float32", CONTEXT), tokens(CONTEXT)
    whole = model(torch.tensor([ids])).logits[0].detach()
    torch.testing.assert_close(engine.step(ids[:41]), whole[40], rtol=1e-4, atol=1e-4)
    for place in range(41, CONTEXT):  # to the last position, one by one
        torch.testing.assert_close(engine.step(ids[place : place + 1]), whole[place], rtol=1e-4, atol=1e-4)
    assert engine.length == CONTEXT
    for count, logits in ((12, 12), (50, 50), (50, 20), (33, 1)):
        engine.reset()
        torch.testing.assert_close(
            engine.read(ids[:count], logits), whole[count - logits : count], rtol=1e-4, atol=1e-4
        )


@settings(max_examples=15, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 25), st.booleans()), min_size=1, max_size=8))
def test_reading_forgetting_and_interrupts_in_any_order(turns):
    for model, engine in ENGINES:
        engine.reset()
        ids = []
        for number, (count, forgotten, interrupted) in enumerate(turns):
            ids = ids[: max(len(ids) - forgotten, 0)]
            engine.truncate(len(ids))
            new = tokens(count, number)
            if len(ids) + count > CONTEXT:
                continue
            if interrupted:
                with pytest.raises(KeyboardInterrupt):
                    interrupt(engine, new)
            ids += new
            torch.testing.assert_close(engine.step(new), expected(model, ids), rtol=1e-4, atol=1e-4)
            assert engine.length == len(ids)


def interrupt(engine, ids):
    """Ctrl-C in the second of three layers, whose keys and values are written by then."""

    def raises(x):
        raise KeyboardInterrupt

    whole = engine.weights
    broken = [whole.layers[0], whole.layers[1]._replace(down=raises), whole.layers[2]]
    engine.weights = whole._replace(layers=broken)
    try:
        engine.step(ids)
    finally:
        engine.weights = whole


ENGINES = [
    (peer, Decoder(peer, "float32", CONTEXT))
    for peer in (random_model(CONFIGS["gpt2"]), random_model(CONFIGS["llama, three queries a key"]))
]


def test_int8_stays_close(model):
    """KL divergence of the next token from float32, in nats, on average."""
    ids = tokens(CONTEXT)
    whole = Decoder(model, "float32", CONTEXT).read(ids, CONTEXT).log_softmax(-1)
    fewer = Decoder(model, "int8", CONTEXT).read(ids, CONTEXT).log_softmax(-1)
    divergence = (whole.exp() * (whole - fewer)).sum(-1).mean()
    assert 0 <= divergence + 1e-7 < 2e-3, f"{divergence:.2e} nats"


def test_int8_reads_a_token_the_same_in_any_company(model):
    ids = tokens(40)
    together = Decoder(model, "int8", CONTEXT)
    logits = together.step(ids)
    alone = Decoder(model, "int8", CONTEXT)
    for token in ids:
        last = alone.step([token])
    torch.testing.assert_close(last, logits, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize("ending", [False, True])
def test_sequences_that_share_a_text_read_what_each_would_read_alone(model, precision, ending):
    """Seven of them, one after the other ends; then one is kept, and goes on. The cache has to grow for it."""
    text, count, steps = tokens(30), 7, 6
    said = [tokens(steps, 10 + slot) for slot in range(count)]
    together, alone = Decoder(model, precision, 33), Decoder(model, precision, CONTEXT)
    together.step(text)
    alone.step(text)
    for step in range(steps):
        slots = [slot for slot in range(count) if not ending or slot <= count - step - 1]
        logits = together.branch([said[slot][step] for slot in slots], slots, step, count)
        for slot, row in zip(slots, logits, strict=True):
            alone.truncate(len(text))
            for token in said[slot][: step + 1]:
                expected = alone.step([token])
            torch.testing.assert_close(row, expected, rtol=1e-4, atol=1e-4)
    together.keep(1, steps, count)
    assert together.length == len(text) + steps
    alone.truncate(len(text))
    alone.step(said[1])
    torch.testing.assert_close(together.step([7]), alone.step([7]), rtol=1e-3, atol=1e-3)


def test_an_int8_product_is_a_rounded_weight_times_the_whole_activation():
    torch.manual_seed(0)
    weight, bias = torch.randn(70, 96), torch.randn(70)
    weight[:, 5] *= 40
    x = torch.randn(3, 96) * torch.tensor([1e-3, 1.0, 1e3])[:, None]
    x[:, 7] *= 200  # an outlier, which would drown the others in 8 bits
    x[2] = 0
    exact, before = torch.nn.functional.linear(x, weight, bias), weight.clone()
    got = Quantiser()(weight, bias)(x)
    assert torch.equal(weight, before), "the model's own weights were changed"
    row_error = (got - exact).norm(dim=1) / (x.norm(dim=1) * weight.norm() / 96**0.5 + 1)
    assert row_error.max() < 0.01
    torch.testing.assert_close(got[2], bias)
    rows = torch.eye(96)  # each column of the weight, alone
    assert (Quantiser()(weight, None)(rows).T - weight).abs().max() < weight.abs().max() / 100


def test_an_int8_product_has_the_same_bits_for_a_token_alone_and_beside_others():
    torch.manual_seed(0)
    product, x = Quantiser()(torch.randn(70, 96), torch.randn(70)), torch.randn(9, 96)
    together = product(x)
    assert all(torch.equal(product(row[None])[0], beside) for row, beside in zip(x, together, strict=True))


def test_weights_that_share_memory_do_not_share_numbers(monkeypatch):
    monkeypatch.setattr(quantising, "BLOCK", 10_000)
    torch.manual_seed(0)
    weights, together = [torch.randn(rows, 96) for rows in (70, 30, 200, 3)], Quantiser()
    products, x = [together(weight, None) for weight in weights], torch.randn(2, 96)
    one, two = products[0].weight, products[1].weight
    assert two.ctypes.data == one.ctypes.data + one.nbytes, "each has pages of its own"
    for weight, product in zip(weights, products, strict=True):
        assert torch.equal(product(x), Quantiser()(weight, None)(x))


def test_no_sum_of_an_int8_product_overflows():
    largest = Quantiser()(torch.ones(4, 40_000), None)  # each weight and each activation as large as it can be
    torch.testing.assert_close(largest(torch.ones(5, 40_000)), torch.full((5, 4), 40_000.0), rtol=1e-3, atol=0)


def test_an_int8_product_shows_what_is_no_number():
    x = torch.ones(4, 32)
    x[1, 3], x[2, 3] = float("nan"), float("inf")
    got = Quantiser()(torch.randn(4, 32), None)(x)
    assert got.isfinite().all(1).tolist() == [True, False, False, True]


@pytest.mark.parametrize(
    "config",
    [
        GPT2Config(activation_function="relu"),
        GPT2Config(scale_attn_by_inverse_layer_idx=True),
        LlamaConfig(**WIDE_LLAMA, hidden_act="gelu"),
        LlamaConfig(**WIDE_LLAMA, rope_parameters={"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}),
        MistralConfig(),
    ],
)
def test_a_model_that_differs_is_left_to_transformers(config):
    assert not supported(config)


def test_loops_give_the_same_bits_compiled_and_loaded_from_the_cache(tmp_path):
    code = """
import torch
from dialogue.chat.quantising import Quantiser
weight, x = (torch.randn(*size, generator=torch.Generator().manual_seed(0)) for size in ((300, 576), (4, 576)))
print(Quantiser()(weight, weight[:, 0])(x).numpy().tobytes().hex())"""
    command, environment = [sys.executable, "-c", code], os.environ | {"GPT2_DIALOGUE_CACHE": str(tmp_path)}
    environment.pop("NUMBA_CACHE_DIR", None)
    said = [
        subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for _ in range(2)
    ]
    assert any(tmp_path.rglob("*.nbc")) and said[0] == said[1] != ""
