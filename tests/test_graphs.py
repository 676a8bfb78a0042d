"""The GPU's engine: its step runs here on a CPU, and on tensors without data, which show that no step waits for one."""

import pytest
import torch
from conftest import dialogue_tokenizer, save_random_gpt2
from helpers import CONFIGS, CONTEXT, GREEDY, random_model, say, tokens
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import GPT2LMHeadModel, LlamaForCausalLM

import main
from dialogue.chat.conversation import Conversation
from dialogue.chat.cuda_graph import BROKEN, GraphDecoder, difference, pick
from dialogue.chat.engine import Model, make, proved
from dialogue.chat.sampling import CHAT, Sampling, candidates
from dialogue.chat.transformers_engine import TransformersEngine
from dialogue.errors import UserError

EVERYTHING = Sampling(0.7, 20, 0.9, 0.01, 1.2)


def all_tokens(engine, prompt, most, sampling, seed=0, forbidden=()):
    """`most` tokens after a prompt that is read anew."""
    engine.reset()
    generator = torch.Generator().manual_seed(seed)
    return list(engine.stream(engine.step(prompt), most, sampling, prompt, list(forbidden), generator))


@pytest.mark.parametrize("name", CONFIGS)
def test_greedy_tokens_are_those_of_transformers(name):
    model = random_model(CONFIGS[name])
    engine, prompt = GraphDecoder(model, CONTEXT), tokens(20)
    said = all_tokens(engine, prompt, CONTEXT - 20, GREEDY)
    whole = model(torch.tensor([prompt + said])).logits[0].detach()
    assert said == whole[19:-1].argmax(-1).tolist()
    assert engine.length == CONTEXT - 1, "the last token was drawn, not read"
    torch.testing.assert_close(engine.step(said[-1:]), whole[-1], rtol=1e-4, atol=1e-4)


def test_a_seed_repeats_and_forbidden_tokens_do_not_come():
    engine = GraphDecoder(random_model(CONFIGS["gpt2"]), CONTEXT)
    banned = range(0, 300, 2)
    said = [all_tokens(engine, tokens(9), 40, EVERYTHING, seed, banned) for seed in (1, 1, 2)]
    assert said[0] == said[1] != said[2]
    assert not set(said[0]) & set(banned)


SETTINGS = st.builds(
    Sampling, st.sampled_from([0, 0.5, 1, 2]), st.sampled_from([0, 1, 5, 40]), st.sampled_from([0, 0.5, 0.9, 1]),
    st.sampled_from([0, 0.05, 0.5]), st.sampled_from([1, 1.3]),
)  # fmt: skip


@settings(max_examples=300, deadline=None)
@given(SETTINGS, st.integers(0, 10**6), st.floats(0, 1, exclude_max=True, width=32), st.booleans())
def test_the_pick_in_fixed_shapes_is_the_samplers(sampling, seed, noise, ties):
    chance = torch.Generator().manual_seed(seed)
    logits = torch.randn(60, generator=chance) * 3
    logits = logits.round() if ties else logits
    seen, forbidden = (torch.rand(60, generator=chance) < share for share in (0.3, 0.1))
    token = pick(logits, sampling, seen, forbidden, torch.tensor([noise]))
    allowed = candidates(logits, sampling, seen.nonzero()[:, 0].tolist(), forbidden.nonzero()[:, 0].tolist())
    if ties:  # which of equal ones stays under top-p is open, and so is their order
        penalised = torch.where(seen, torch.where(logits > 0, logits / sampling.repetition_penalty,
                                                  logits * sampling.repetition_penalty), logits)  # fmt: skip
        assert not forbidden[token] and penalised[token].item() in penalised[allowed.ids].tolist()
        return
    chances, order = allowed.probabilities.sort(descending=True)
    sums = chances.cumsum(0)
    near = (sums >= noise - 1e-5) & (sums - chances <= noise + 1e-5)  # rounding decides between neighbours
    assert token in allowed.ids[order[near]].tolist()


def test_the_picks_frequencies_are_the_samplers_probabilities():
    logits, none = torch.randn(50, generator=torch.Generator().manual_seed(5)) * 2, torch.zeros(50, dtype=torch.bool)
    sampling = Sampling(0.9, 10, 0.95)
    noise = (torch.arange(4000) + 0.5) / 4000
    drawn = torch.cat([pick(logits, sampling, none, none, at[None]) for at in noise]).bincount(minlength=50) / 4000
    choice = candidates(logits, sampling)
    expected = torch.zeros(50).index_put_((choice.ids,), choice.probabilities)
    torch.testing.assert_close(drawn, expected, rtol=0, atol=1e-3)


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
def test_broken_weights_are_said_to_be_broken(bad):
    engine = GraphDecoder(random_model(CONFIGS["gpt2"]), CONTEXT)
    logits = engine.step([1, 2, 3])
    logits[7] = bad
    with pytest.raises(UserError, match="weights are broken"):
        list(engine.stream(logits, 5, EVERYTHING, [1, 2, 3], [], torch.Generator()))
    assert pick(torch.full((9,), -torch.inf), GREEDY, *torch.zeros(2, 9, dtype=torch.bool), torch.zeros(1)) == BROKEN


class NoNumberIsAssigned(TorchFunctionMode):
    """`tensor[i] = number` on a GPU copies from the host (PyTorch, issue 186482), and waits for the copy."""

    def __torch_function__(self, function, types, arguments=(), options=None):
        assert function is not torch.Tensor.__setitem__ or isinstance(arguments[2], torch.Tensor), arguments
        return function(*arguments, **(options or {}))


class NoTensorOfTheHost(TorchDispatchMode):
    """Beside tensors without data, one that has data comes from the host: `torch.tensor(...)`, an index list."""

    def __torch_dispatch__(self, function, types, arguments=(), options=None):
        result = function(*arguments, **(options or {}))
        for leaf in tree_leaves((arguments, options, result)):
            assert not isinstance(leaf, torch.Tensor) or leaf.is_meta, function
        return result


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("sampling", [GREEDY, EVERYTHING, Sampling()])
def test_no_step_waits_for_a_value_or_copies_from_the_host(name, sampling):
    """Tensors without data raise where a value would be asked for: `.item()`, a shape that depends on one."""
    with torch.device("meta"):
        config = CONFIGS[name]
        model = (GPT2LMHeadModel if config.model_type == "gpt2" else LlamaForCausalLM)(config).bfloat16()
    engine = GraphDecoder(model, CONTEXT)
    with torch.inference_mode(), NoNumberIsAssigned(), NoTensorOfTheHost():
        engine.step_once(sampling, 64)


@pytest.mark.parametrize("name", CONFIGS)
def test_attention_may_come_in_the_layout_of_a_gpus_kernels(name, monkeypatch):
    """Flash and memory-efficient kernels return (B, T, heads, size) transposed (torch/_meta_registrations.py)."""
    attend = torch.nn.functional.scaled_dot_product_attention
    monkeypatch.setattr(
        torch.nn.functional, "scaled_dot_product_attention",
        lambda *given, **named: attend(*given, **named).transpose(1, 2).contiguous().transpose(1, 2),
    )  # fmt: skip
    test_greedy_tokens_are_those_of_transformers(name)


def test_a_conversation_keeps_its_cache_over_turns(tmp_path):
    folder = save_random_gpt2(tmp_path / "merged", dialogue_tokenizer(), positions=96)
    peer = GPT2LMHeadModel.from_pretrained(folder).eval()
    talks = [Conversation(Model(engine, dialogue_tokenizer(), 96), seed=1)
             for engine in (GraphDecoder(peer, 96), GraphDecoder(peer, 96))]  # fmt: skip
    for message in ("Hi", "How are you?", "Good."):
        read = talks[0].model.tokens_read, talks[0].used
        texts = [say(talk, message, 8) for talk in talks]
        assert texts[0] == texts[1]
        assert talks[0].model.tokens_read - read[0] <= talks[0].used - read[1] + 2, "a turn reads its own tokens only"
        talks[1].model.engine.reset()  # reads all turns again
    stopped = talks[0].reply("Tell me more", 20, EVERYTHING)
    next(stopped)
    stopped.close()  # as Ctrl-C does; steps that nobody reads have run ahead
    ids = [token for turn in talks[0].turns for token in turn]
    expected = peer(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(talks[0].model.logits(ids), expected.detach(), rtol=1e-4, atol=1e-4)


# ---- The proof before it is used ----------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", CONFIGS)
def test_a_sound_engine_proves_itself(name, dtype, capsys):
    model = random_model(CONFIGS[name]).to(dtype)
    engine = proved(model, CONTEXT)
    assert isinstance(engine, GraphDecoder) and engine.length == 0
    assert capsys.readouterr().err == ""
    assert "logits are not those" in difference(engine, random_model(CONFIGS[name]).to(dtype).apply(shuffled)), (
        "another model"
    )


def shuffled(module):
    """Other weights of the same sizes in every MLP."""
    if type(module).__name__.endswith("MLP"):
        with torch.no_grad():
            for parameter in module.parameters():
                parameter.copy_(parameter.flatten()[torch.randperm(parameter.numel())].view_as(parameter))


def stands_still(engine, sampling, width, step=GraphDecoder.step_once):
    step(engine, sampling, width)
    engine.place -= 1


def forgets(engine, sampling, width, step=GraphDecoder.step_once):
    engine.cache[:, 1, :, 3] = 0
    step(engine, sampling, width)


def reads_another(engine, sampling, width, step=GraphDecoder.step_once):
    engine.last.add_(1).remainder_(300)
    step(engine, sampling, width)


def cannot_be_recorded(engine, sampling, width):
    raise RuntimeError("CUDA error: operation not permitted when stream is capturing\nmore")


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("step", [stands_still, forgets, reads_another, cannot_be_recorded])
def test_a_broken_step_is_found_and_transformers_talks(step, name, monkeypatch, capsys):
    monkeypatch.setattr(GraphDecoder, "step_once", step)
    model = random_model(CONFIGS[name])
    engine = proved(model, CONTEXT)
    assert isinstance(engine, TransformersEngine) and engine.model is model
    (line,) = capsys.readouterr().err.splitlines()
    assert "transformers' own is used" in line
    assert ("capturing" if step is cannot_be_recorded else "tokens it") in line


def test_a_draw_outside_of_what_is_allowed_is_found(monkeypatch):
    model = random_model(CONFIGS["gpt2"])
    monkeypatch.setattr("dialogue.chat.cuda_graph.pick", lambda logits, *_: logits.argsort()[150:151])
    assert "drew one that transformers would not draw" in difference(GraphDecoder(model, CONTEXT), model)


def test_the_graph_that_is_recorded_first_is_the_chats():
    usual = {name: value for name, value in main.settings().items() if name not in ("max_t", "best_of")}
    assert Sampling(**usual) == CHAT


def test_logits_keep_their_bits_where_gpt2_has_them():
    """GPT-2's logits lie near -112, where bfloat16's steps are 0.5."""
    model = random_model(CONFIGS["gpt2"]).bfloat16()
    with torch.no_grad():
        model.transformer.ln_f.weight[0], model.transformer.ln_f.bias[0] = 0, 8
        model.transformer.wte.weight[:, 0] = -14
    ids = torch.tensor([tokens(20)])
    got = GraphDecoder(model, CONTEXT).read(ids[0].tolist(), 20)
    with torch.inference_mode():
        exact = model.transformer(ids).last_hidden_state[0].float() @ model.lm_head.weight.float().T
        rounded = model(ids).logits[0].float()
    assert -140 < exact.mean() < -90

    def kl(logits):
        return (exact.softmax(-1) * (exact.log_softmax(-1) - logits.log_softmax(-1))).sum(-1).mean()

    assert kl(got) < 1e-4 < 1e-3 < kl(rounded)


def test_auto_on_a_cpu_is_int8_by_rule():
    model = random_model(CONFIGS["gpt2"])
    assert make(model, "auto", CONTEXT).precision == "int8"
    assert make(model, "float32", CONTEXT).precision == "float32"
