"""The best of several replies: how it is drawn, scored and kept, and that one alone stays as it was."""

import pytest
import torch
from conftest import dialogue_tokenizer
from helpers import say, tokens
from transformers import AutoModelForCausalLM

from dialogue.chat import drafts
from dialogue.chat.commands import run
from dialogue.chat.conversation import Conversation, check
from dialogue.chat.decoder import Decoder
from dialogue.chat.engine import Model
from dialogue.chat.rerank import ALPHA, COOLER, LAMBDA, Candidate, fault, rank
from dialogue.chat.sampling import Sampling, candidates, draw
from dialogue.chat.session import Chat
from dialogue.chat.terminal import in_background
from dialogue.chat.transformers_engine import TransformersEngine
from dialogue.errors import UserError
from dialogue.prompt import without_roles

WARM = Sampling(temp=0.9, top_k=40, repetition_penalty=1.1)
ENGINES = ("float32", "int8")


@pytest.fixture(scope="module")
def models(merged):
    peer = AutoModelForCausalLM.from_pretrained(merged).eval()
    engines = {
        "float32": Decoder(peer, "float32", 96),
        "int8": Decoder(peer, "int8", 96),
        "transformers": TransformersEngine(peer),
    }
    return {name: Model(engine, dialogue_tokenizer(), 96) for name, engine in engines.items()}


def best(talk, message, count=5, max_t=10, sampling=WARM):
    return "".join(talk.reply(message, max_t, sampling, count))


@torch.no_grad()
def nats(talk, prompt, reply):
    """log p(reply | prompt) by transformers' code, which reads everything anew."""
    peer = AutoModelForCausalLM.from_pretrained(talk).eval()
    logs = peer(torch.tensor([prompt + reply])).logits[0].log_softmax(-1)
    return sum(float(logs[len(prompt) - 1 + place, token]) for place, token in enumerate(reply))


@pytest.mark.parametrize("name", ENGINES)
def test_log_probabilities_are_those_of_the_model_and_leave_the_cache_alone(models, merged, name, monkeypatch):
    model, replies = models[name], [tokens(count, count) for count in (1, 5, 3, 9)]
    prompt, held = tokens(4, 8), tokens(20, 9)
    before = model.logits(held)
    for at_once in (512, 12):  # all together, and in parts
        monkeypatch.setattr(drafts, "AT_ONCE", at_once)
        found = drafts.log_probabilities(model, prompt, replies)
        expected = [nats(merged, prompt, reply) for reply in replies]
        assert found == pytest.approx(expected, rel=2e-3 if name == "int8" else 1e-4)
    read = model.tokens_read
    again = model.logits(held)
    assert model.tokens_read - read == 1, "the cache was lost"
    torch.testing.assert_close(again, before, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("name", ENGINES)
def test_each_draft_is_what_it_would_be_alone(models, merged, name):
    model, prompt, samplings = models[name], tokens(12), [Sampling(temp=0), WARM, WARM, Sampling()]
    *_, written = drafts.write(model, prompt, 8, samplings, torch.Generator().manual_seed(4))
    seeds = torch.randint(2**62, (4,), generator=torch.Generator().manual_seed(4)).tolist()
    for draft, sampling, seed in zip(written, samplings, seeds, strict=True):
        chance, said = torch.Generator().manual_seed(seed), []
        while len(said) < 8 and said[-1:] != [model.roles.end]:
            seen = without_roles(prompt, model.roles) + said
            said.append(draw(candidates(model.logits(prompt + said), sampling, seen, model.forbidden), chance))
        assert draft.tokens == said
        assert draft.nats == pytest.approx(nats(merged, prompt, said), rel=2e-3 if name == "int8" else 1e-4)


@pytest.mark.parametrize("name", ENGINES)
def test_the_best_is_given_and_the_next_turn_costs_its_own_tokens_only(models, name):
    talk, again = (Conversation(models[name], seed=5) for _ in range(2))
    for message in ("Hi", "How are you?"):
        before, used = talk.model.tokens_read, talk.used
        text = best(talk, message)
        ranked, cost = talk.candidates, talk.model.tokens_read - before
        assert text == ranked[0].text == talk.text(-1) and ranked == rank(ranked)
        assert sorted(each.temp for each in ranked) == [0, *[COOLER * WARM.temp] * 4]
        assert talk.stats.startswith(f"{len(ranked[0].tokens)} tokens, the best of 5, ")
        last = [each.tokens for each in ranked][-1]
        drawn = sum(len(each.tokens) - (each.fault == "cut") for each in ranked)
        assert cost <= talk.used - used + drawn, "of the text before, nothing is read again"
        assert best(again, message) == text, "the same seed, another conversation"
        assert talk.why(WARM)[0].drawn > 0
    assert talk.take(5) == talk.text(-1) and talk.turns[-1][1:-1] == last
    assert say(talk, "And now?")
    assert talk.candidates == []
    with pytest.raises(UserError, match="no candidates"):
        talk.take(1)


def test_what_was_kept_is_what_reading_it_gives(models, merged):
    peer = AutoModelForCausalLM.from_pretrained(merged).eval()
    talk = Conversation(models["float32"], seed=1)
    best(talk, "Hello there")
    ids = [token for turn in talk.turns for token in turn]
    before = talk.model.tokens_read
    logits = talk.model.logits(ids)
    assert talk.model.tokens_read - before <= 2
    torch.testing.assert_close(logits, peer(torch.tensor([ids])).logits[0, -1].detach(), rtol=1e-4, atol=1e-4)


def test_one_alone_and_temperature_0_are_drawn_as_ever(models):
    for sampling, count in ((WARM, 1), (Sampling(temp=0), 8)):
        plainly, with_it = (Conversation(models["float32"], seed=9) for _ in range(2))
        for message in ("Hi", "And you?"):
            assert say(plainly, message, 10, sampling) == best(with_it, message, count, 10, sampling)
            assert plainly.turns == with_it.turns and with_it.candidates == []
    with pytest.raises(UserError, match="best_of must be"):
        check(50, best_of=-1)
    talk = Conversation(models["transformers"], seed=9)
    assert best(talk, "Hi", 0) and talk.candidates == [], "other engines draw one"
    turns = talk.turns
    with pytest.raises(UserError, match="best_of must be 0 or 1"):
        best(talk, "Hi", 2)
    assert talk.turns is turns


def test_stopping_while_it_thinks_leaves_no_trace(models):
    talk = Conversation(models["int8"], seed=2)
    best(talk, "Hi")
    turns = talk.turns
    thinking = talk.reply("Tell me more", 10, WARM, 4)
    assert [next(thinking) for _ in range(3)] == [""] * 3
    assert talk.stats.startswith("12 tokens of 4 candidates, ")
    thinking.close()
    assert talk.turns is turns
    reference = Conversation(models["int8"], seed=2)
    best(reference, "Hi")
    assert say(talk, "go on") == say(reference, "go on")


def test_alt_shows_the_candidates_and_takes_another(models, capsys):
    talk = Conversation(models["int8"], seed=5)

    def generate(message, conversation, on_text, max_t, best_of, **cuts):
        for piece in conversation.reply(message, max_t, Sampling(**cuts), best_of):
            on_text(piece)

    settings = {"max_t": 10, "temp": 0.8, "best_of": 1}
    chat = Chat(in_background(lambda: talk), generate, {}, settings)
    chat.loading.result()
    chat.say("Hi")
    with pytest.raises(UserError, match="/set best_of 8"):
        run(chat, "/alt")
    run(chat, "/set best_of 4")
    chat.say("How are you?")
    assert "tokens, the best of 4," in capsys.readouterr().out
    third = talk.candidates[2]
    run(chat, "/alt")
    shown = capsys.readouterr().out
    assert all(f"{place}  " in shown for place in range(1, 5)) and "temperature 0" in shown
    for wrong in ("/alt 5", "/alt 0", "/alt first", "/alt 99999999999"):
        with pytest.raises(UserError, match="4 candidates"):
            run(chat, wrong)
    run(chat, "/alt 3")
    assert talk.turns[-1][1:-1] == third.tokens
    assert [each.token for each in talk.why(WARM)][:-1] == third.tokens
    run(chat, "/why")
    assert "of 4:" in capsys.readouterr().out
    run(chat, "/undo")
    with pytest.raises(UserError, match="drawn alone"):
        run(chat, "/alt")


# ---- The order ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "found"),
    [
        ("How old was it?", ""),
        ("my dog died, yesterday!", "parrot"),
        ("So my dog died yesterday", "parrot"),
        ("Oh no, my dog died yesterday too, and I cried all day", ""),
        (" ... ", "empty"),
        ("I like it and I like it and you", "repeats"),
    ],
)
def test_what_nobody_wants_is_found(reply, found):
    assert fault(reply, ["My dog died yesterday."], ended=True) == found


def test_half_of_the_message_again_is_a_parrot():
    assert fault("I am so tired of studying", ["I'm so tired of studying."], ended=True) == "parrot"
    assert fault("Me too", ["Are you tired?"], ended=True) == "", "too short for three words in a row"


def test_what_the_bot_said_before_comes_last():
    before = ["Any advice?", "I'm going to be late for the speech."]
    assert fault("I'm going to be late for the speech too.", before, ended=True) == "parrot"
    assert fault("Good night!", ["Bye!", "good night"], ended=True) == "parrot"
    assert fault("Start with a joke.", before, ended=True) == ""


def test_a_fault_comes_last_and_the_message_counts():
    general = Candidate([1] * 3, "I see.", given=-4.0, alone=-4.0)
    fitting = Candidate([1] * 3, "How old was it?", given=-5.0, alone=-11.0)
    cut = Candidate([1] * 3, "Well, I", given=-0.1, fault=fault("Well, I", ["Hi"], ended=False))
    assert rank([cut, general, fitting]) == [fitting, general, cut]
    assert fitting.score == pytest.approx((-5.0 + LAMBDA * 11.0) / 4**ALPHA)


def test_where_nobody_says_a_small_model_on_a_cpu_draws_eight(models):
    small, big = (Conversation(models["float32"], seed=9) for _ in range(2))
    list(small.reply("Hello there", 8, Sampling(temp=0.8), best_of=0))
    assert len(small.candidates) == 8
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(models["float32"].engine, "parameters", 1_500_000_000)
        list(big.reply("Hello there", 8, Sampling(temp=0.8), best_of=0))
    assert len(big.candidates) == 4


def test_neither_speakers_words_are_to_be_said_again(models, monkeypatch):
    talk, ranked, heard = Conversation(models["float32"], seed=9), drafts.ranked, []
    monkeypatch.setattr(drafts, "ranked", lambda *given: heard.append(given[3]) or ranked(*given))
    talk.restore([{"role": "user", "content": "Thanks."}, {"role": "assistant", "content": "Welcome!"}])
    list(talk.reply("Goodbye!", 8, Sampling(temp=0.8), best_of=2))
    assert heard == [["Goodbye!", "Thanks.", "Welcome!"]]
