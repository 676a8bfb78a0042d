"""Every figure against one made by hand or by another's code; the command as a person runs it."""

import copy
import itertools
import json
import math
import shutil
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import DAILYDIALOG, gpt2_tokenizer, needs_dailydialog
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    PreTrainedTokenizerFast,
)

import Fine_tuningmodel as script
from dialogue import evaluate, storage
from dialogue.chat.batch import Reply, answer, answer_by_each
from dialogue.chat.sampling import Sampling
from dialogue.data import packing
from dialogue.data.corpus import Corpus, fold, without_leaks, without_overlap
from dialogue.data.sources import load_corpus
from dialogue.errors import UserError, exit_code
from dialogue.measure import fitting, likelihood, listening, merge, replies
from dialogue.measure.likelihood import Score, bootstrap, hold_out, score_each
from dialogue.measure.replies import OPENERS, Context, converse, find_contexts, measure
from dialogue.models import load_base
from dialogue.prompt import add_roles, find_roles
from dialogue.train import lora, speedups

TALK = [
    ["Hello there!", "Hi. How are you?", "Fine.", "Good to hear that."],
    ["What time is it?", "It's noon."],
    ["Are you hungry?", "Yes, very. Let's eat something.", "Pizza?", "I love it!"],
]


@pytest.fixture(scope="module")
def base(random_gpt2):
    """A small random GPT-2 with role tokens, and its tokenizer."""
    tokenizer = AutoTokenizer.from_pretrained(random_gpt2)
    add_roles(tokenizer)
    return load_base(str(random_gpt2), torch.float32, torch.device("cpu"), tokenizer).eval(), tokenizer


@pytest.fixture(scope="module")
def tuned(base, random_gpt2, tmp_path_factory):
    """Folder of a "tuned" model: the base with its <END> row moved, as a run leaves it."""
    model, tokenizer = base
    folder = tmp_path_factory.mktemp("tuned")
    moved = AutoModelForCausalLM.from_pretrained(random_gpt2)
    moved.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    moved.load_state_dict(model.state_dict())
    with torch.no_grad():
        moved.transformer.h[0].mlp.c_proj.bias += 0.1
    moved.config.eos_token_id = tokenizer.eos_token_id
    moved.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    (folder / "run.json").write_text(json.dumps({"settings": {"base_model": str(random_gpt2)}}))
    return folder


# ---- Likelihood ----------------------------------------------------------------------------------------


def test_figures_of_a_score_by_hand():
    """8 nats on 4 tokens that are 2 words of 10 characters."""
    figures = Score(nats=8.0, tokens=4, words=2, characters=10).figures()
    assert figures["nats_per_token"] == 2
    assert figures["perplexity"] == pytest.approx(math.e**2)
    assert figures["word_perplexity"] == pytest.approx(math.e**4)
    assert figures["bits_per_character"] == pytest.approx(0.8 / math.log(2))


def test_each_dialogue_is_scored_on_its_reply_tokens_as_transformers_scores_it(base):
    model, tokenizer = base
    pieces = packing.encode(tokenizer, TALK, 256).pieces
    scores = score_each(model, pieces, tokenizer)
    rows = [packing.to_row(turns, "bot", find_roles(tokenizer).bot) for turns in pieces]
    assert np.allclose(likelihood.nats_of_each(model, rows, batch_tokens=80), scores[:, :2], rtol=1e-5)  # other batches
    for turns, (nats, tokens, _words, _characters) in zip(pieces, scores, strict=True):
        ids = torch.tensor([[token for turn in turns for token in turn]])
        labels = ids.clone()
        place = 0
        for number, turn in enumerate(turns):
            labels[0, place : place + (1 if number % 2 else len(turn))] = -100  # all but a reply's text and its <END>
            place += len(turn)
        assert tokens == sum(len(turn) - 1 for turn in turns[1::2])
        with torch.no_grad():
            assert nats == pytest.approx(model(input_ids=ids, labels=labels).loss.item() * tokens, rel=1e-5)
    assert scores[1, 2:].tolist() == [2, 10]  # "It's noon."
    packed = hold_out(pieces, tokenizer, 256).score(model, 2)
    assert np.allclose(scores.sum(0), packed, rtol=1e-4), "the packed score is another"


def test_a_mean_has_the_interval_of_the_textbook():
    values = np.random.default_rng(1).normal(5, 2, size=400)
    estimate = bootstrap(400, lambda at: {"mean": float(values[at].mean())}, seed=3)["mean"]
    half = 1.96 * values.std() / 20
    assert estimate.value == pytest.approx(values.mean())
    assert estimate.low == pytest.approx(values.mean() - half, abs=0.03)
    assert estimate.high == pytest.approx(values.mean() + half, abs=0.03)


# ---- Replies -------------------------------------------------------------------------------------------


def test_figures_of_replies_by_hand():
    said = [Reply("I like tea.", True), Reply("i like tea, I like tea", False), Reply("Yes!", True)]
    figures = measure(said, ["Tea?"] * 3, known={"yes"})(np.arange(3))
    assert figures["distinct_1"] == 4 / 10  # i, like, tea, yes
    assert figures["distinct_2"] == 3 / 7  # i like, like tea, tea i
    assert figures["words"] == pytest.approx(10 / 3)
    assert figures["share_that_ends"] == pytest.approx(2 / 3)
    assert figures["share_that_repeats"] == figures["share_that_copies"] == pytest.approx(1 / 3)
    same_beginning = [Reply("I'm a student. I'm a teacher - too", True)]  # two words twice, not three
    figures = measure(same_beginning, ["And you?"])(np.arange(1))
    assert (figures["words"], figures["share_that_repeats"]) == (7, 0)


def test_parrots_and_replies_that_are_said_again():
    messages = ["I lost my wallet on the bus.", "I lost my wallet on the bus.", "Hello!", "Bye."]
    said = [
        "You lost my wallet on the bus?",
        "Oh no! Where did you see it last?",
        "hello",
        "Oh no, where did you see it last?",
    ]
    figures = measure([Reply(text, True) for text in said], messages)
    assert figures(np.arange(4))["share_that_parrots"] == figures(np.arange(4))["share_that_is_said_again"] == 0.5
    assert figures(np.array([0, 2]))["share_that_parrots"] == 1
    same_message_twice = measure([Reply("Hi.", True)] * 2, ["Hello!", "hello"])
    assert same_message_twice(np.arange(2))["share_that_is_said_again"] == 0


def test_distinct_n_lies_in_its_own_interval():
    """Resampling alone lowers it, which must not move the interval away from the figure."""
    said = [Reply(f"word{number} and word{number + 1}", True) for number in range(60)]
    estimate = bootstrap(60, measure(said, [""] * 60), seed=0, resamples=200)["distinct_1"]
    assert estimate.low < estimate.value < estimate.high


def test_greedy_replies_are_those_of_transformers_whatever_the_batch(base):
    model, tokenizer = base
    contexts = [turns[:1] for turns in TALK] + [TALK[0][:3]]
    ours = answer(model, tokenizer, contexts, Sampling(temp=0), max_t=12, at_once=3)
    roles = add_roles(tokenizer)
    forbidden = sorted({*tokenizer.all_special_ids, *roles} - {roles.end})
    for turns, reply in zip(contexts, ours, strict=True):
        messages = [{"role": ("user", "assistant")[n % 2], "content": turn} for n, turn in enumerate(turns)]
        ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]
        config = GenerationConfig(
            max_new_tokens=12, do_sample=False, suppress_tokens=forbidden, eos_token_id=roles.end,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        said = model.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, ids.shape[1] :]
        assert reply.text == tokenizer.decode(said[said != roles.end]).removesuffix("\ufffd").strip()
        assert reply.ended == (roles.end in said)


def test_a_model_in_training_answers_a_batch_as_its_base_does(base):
    """Untrained LoRA changes nothing, and neither does what makes its training fast."""
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    contexts = [turns[:1] for turns in TALK]
    expected = answer(model, tokenizer, contexts, Sampling(temp=0), max_t=12)
    training = speedups.apply(lora.attach(model, script.lora_config, tokenizer))
    assert answer(training, tokenizer, contexts, Sampling(temp=0), max_t=12) == expected


def test_replies_repeat_and_leave_the_random_state_alone(base):
    model, tokenizer = base
    before = torch.get_rng_state()
    model.train()
    first = converse(model, tokenizer, seed=5)
    assert model.training
    model.eval()
    assert first == converse(model, tokenizer, seed=5) != converse(model, tokenizer, seed=6)
    assert torch.equal(torch.get_rng_state(), before), "training would go another way"
    assert [turns[::2] for turns in first] == [list(messages) for messages in replies.CONVERSATIONS]


def test_a_long_context_keeps_its_newest_turns(base):
    model, tokenizer = base
    turns = ["word " * 60, "word " * 60] * 6 + ["And now?"]
    assert len(answer(model, tokenizer, [turns, ["x " * 900]], max_t=5)) == 2


def test_the_openers_are_forty_different_ones():
    assert len(OPENERS) == len({fold(opener) for opener in OPENERS}) == 40


def test_each_fault_of_a_reply_is_seen():
    good = [Reply(f"I'm fine, and that's number {number}.", True) for number in range(40)]
    faults = {
        "ends": Reply("And then and then", False),
        "is_empty": Reply("", True),
        "repeats": Reply("I like it. I like it.", True),
        "parrots": Reply(OPENERS[0].upper(), True),
        "is_said_again": good[1],
        "is_spaced_wrongly": Reply("I don ’ t know.", True),
    }
    usual = measure(good, OPENERS)(np.arange(40))
    for name, reply in faults.items():
        found = measure([reply, *good[1:]], OPENERS)(np.array([0]))
        changed = {key for key in found if key.startswith("share") and found[key] != usual[key]}
        assert changed == {f"share_that_{name}"}, reply
    for text in ("I don' t know.", "It is noon .", "I 'm fine.", "Well , yes."):
        assert measure([Reply(text, True)], [""])(np.array([0]))["share_that_is_spaced_wrongly"], text
    for text in ("My parents' house is :) ...", "'Hello' is what I say", "It's 5 o'clock, isn't it?"):
        assert not measure([Reply(text, True)], [""])(np.array([0]))["share_that_is_spaced_wrongly"], text


# ---- Does it listen? -----------------------------------------------------------------------------------

THINGS = [f"{first}{second}" for first in "bdfgklmn" for second in ("ead", "ot", "ill", "ark", "ust")]  # 40 words


def made(hears):
    """A GPT-2 whose logits are known: those of words that were said rise by as much as it `hears`, all else is equal.

    Embeddings are one-hot, attention is the mean over what came before, and the head is the embedding.
    """
    words = {word: number for number, word in enumerate(["<|endoftext|>", *THINGS])}
    core = Tokenizer(WordLevel(words, unk_token="<|endoftext|>"))
    core.pre_tokenizer = Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<|endoftext|>", unk_token="<|endoftext|>")
    add_roles(tokenizer)
    width = len(tokenizer)
    config = GPT2Config(vocab_size=width, n_embd=width, n_layer=1, n_head=1, n_positions=64, eos_token_id=width - 1)
    model = GPT2LMHeadModel(config).eval()
    block = model.transformer.h[0]
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.fill_(1.0 if "ln_" in name and "weight" in name else 0.0)
        model.transformer.wte.weight.copy_(torch.eye(width))
        block.attn.c_attn.weight[:, 2 * width :] = torch.eye(width)
        block.attn.c_proj.weight.copy_(hears * torch.eye(width))
    return model, tokenizer


CONTEXTS = [Context([thing], f"{thing} {thing}") for thing in THINGS]


def test_a_model_that_ignores_the_context_is_at_chance_and_one_that_hears_every_word_finds_all():
    for hears, found in ((0.0, 1 / 20), (2.0, 1.0)):
        figures = listening.true_replies(*made(hears), CONTEXTS, seed=1, control=True)
        means = {name: values.mean() for name, values in figures.items()}
        assert means == {
            "share_of_true_replies_found": pytest.approx(found),
            "share_found_by_probability": pytest.approx(found),
            "share_found_after_other_contexts": pytest.approx(1 / 20),
        }


def test_what_fits_everywhere_is_found_by_probability_and_not_by_the_difference():
    """An empty reply is likelier than any other, so plain probability picks it in each of its 20 choices."""
    contexts = [Context([THINGS[0]], ""), *CONTEXTS[1:]]
    figures = listening.true_replies(*made(2.0), contexts, seed=1)
    assert figures["share_found_by_probability"].mean() == pytest.approx(21 / 40)
    assert figures["share_of_true_replies_found"].mean() >= 39 / 40


def test_the_judge_finds_replies_that_fit_and_parrots_are_caught():
    model, tokenizer = made(2.0)
    contexts = [[f"{thing} {thing} {thing}"] for thing in THINGS]
    messages = [turns[0] for turns in contexts]
    said = {"people": THINGS, "dull": [THINGS[0]] * 40, "parrots": messages}
    fit = listening.fit_of_replies(model, listening.our_format(tokenizer), contexts, said, seed=1)
    assert {who: values.mean() for who, values in fit.items()} == {
        "people": 1,
        "dull": pytest.approx(1 / 20),
        "parrots": 1,  # the judge alone does not see them
    }
    figures = {who: measure([Reply(text, True) for text in of], messages)(np.arange(40)) for who, of in said.items()}
    assert [figures[who]["share_that_parrots"] for who in said] == [0, 0, 1]
    assert [figures[who]["share_that_is_said_again"] for who in said] == [0, 1, 0]


def test_what_a_reply_gets_anyway_by_hand():
    drawn = np.array([[0, 1, 2], [1, 2, 3], [2, 3, 0], [3, 0, 1]])
    scores = np.log([[0.9, 0.1, 0.2], [0.8, 0.3, 0.4], [0.7, 0.5, 0.6], [0.6, 0.2, 0.4]])
    # Reply 1 for context 0: its own is 1, so only 3 is left. Reply 3 for context 1: only 2 is.
    found = listening.elsewhere(scores, drawn)
    assert found[0] == pytest.approx(np.log([(0.6 + 0.2) / 2, 0.4, 0.3]))
    assert found[1] == pytest.approx(np.log([(0.1 + 0.4) / 2, 0.2, 0.5]))


def test_of_two_contexts_the_true_reply_is_not_found_by_their_number():
    model, tokenizer = made(0.0)
    assert listening.true_replies(model, tokenizer, CONTEXTS[:2], 1)["share_of_true_replies_found"].mean() == 0.5


def test_replies_are_scored_as_transformers_scores_them(base, monkeypatch):
    model, tokenizer = base
    monkeypatch.setattr(listening, "TOKENS", 30)  # a long reply has a row of its own
    style, texts = listening.our_format(tokenizer), ["Yes.", "", "I would like a cup of tea, please.", "No!"]
    contexts = [TALK[0][:3], ["Hi " * 30]]
    found = listening.score_replies(model, style, contexts, texts, [[3, 0, 2, 1], [2]])
    for turns, wanted, scores in zip(contexts, [[3, 0, 2, 1], [2]], found, strict=True):
        for index, score in zip(wanted, scores, strict=True):
            prompt, reply = style.prompt(turns), style.reply(texts[index])
            assert reply[-1] == tokenizer.eos_token_id
            ids = torch.tensor([prompt + reply])
            with torch.no_grad():
                loss = model(ids, labels=torch.tensor([[-100] * len(prompt) + reply])).loss.item()
            assert score == pytest.approx(-loss * len(reply), rel=1e-4)


def test_the_judge_reads_its_own_chat_format_where_it_has_one(base, random_gpt2):
    _, tokenizer = base
    plain = AutoTokenizer.from_pretrained(random_gpt2)
    assert listening.judge_format(plain, tokenizer).prompt(["Hi"]) == listening.our_format(tokenizer).prompt(["Hi"])
    plain.chat_template = "{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '|' }}{% endfor %}bot:"
    style = listening.judge_format(plain, tokenizer)
    assert plain.decode(style.prompt(["Hi", "Hello", "Bye"])) == "user: Hi|assistant: Hello|user: Bye|bot:"
    assert style.reply("Bye")[-1] == plain.eos_token_id != tokenizer.eos_token_id


def test_figures_of_a_model_with_adapters_stand_beside_its_bases(base, random_gpt2):
    model, tokenizer = lora.attach(copy.deepcopy(base[0]), script.lora_config, base[1]), base[1]
    plain, contexts = AutoTokenizer.from_pretrained(random_gpt2), find_contexts(TALK, 3, seed=0)

    @contextmanager
    def without():
        with model.disable_adapter():
            yield model

    lent = {"tuned": lambda: nullcontext(model), "base": without}
    found = listening.compare(lent, tokenizer, plain, contexts, max_t=4)
    assert found["tuned"] == found["base"]  # LoRA begins at nothing
    assert set(found["people"]) < set(found["base"]) and "share_of_replies_that_fit" in found["people"]
    assert model.get_model_status().enabled is True
    for name, parameter in model.named_parameters():
        parameter.data += 0.5 * ("lora_B" in name)
    moved = listening.compare(lent, tokenizer, plain, contexts, max_t=4)
    assert moved["base"] == found["base"] and moved["tuned"] != found["tuned"]


def test_contexts_are_long_where_they_can_be_and_no_reply_belongs_to_two():
    talk = [*TALK, [*TALK[0][:3], "Good to hear that!"], ["a", "b", "c", "d", "e", "f"]]
    found = find_contexts(talk, 9, seed=0, shortest=3, longest=3)
    assert [len(context.turns) for context in found] == [3, 1, 3, 3]
    assert len(find_contexts(talk, 2, seed=0)) == 2


# ---- The sampler's settings ----------------------------------------------------------------------------


def test_the_cost_of_replies_by_hand():
    human = {"words": 10, "distinct_1": 0.5, "distinct_2": 0.9, "share_that_ends": 1, "mutual_information": -1.5}
    human |= {"share_that_repeats": 0.0, "share_that_parrots": 0.0, "share_that_is_said_again": 0.0}
    assert fitting.cost(human, human) == 3
    bot = human | {"words": 20, "share_that_ends": 0.9, "share_that_repeats": 0.2, "mutual_information": -0.5}
    assert fitting.cost(bot, human) == pytest.approx(math.log(2) + 0.1 + 1.0 + 1.0)


def test_replies_to_their_own_messages_have_more_mutual_information():
    model, tokenizer = made(2.0)
    turns = [context.turns for context in CONTEXTS]
    own, others = THINGS, [*THINGS[1:], THINGS[0]]
    style, each = listening.our_format(tokenizer), [[place] for place in range(len(own))]

    after, alone = (
        np.concatenate(listening.score_replies(model, style, asked, own, each))
        for asked in (turns, [[listening.NOTHING]] * len(own))
    )
    lengths = [len(style.reply(text)) for text in own]
    said = [[Reply(text, True) for text in texts] for texts in (own, others)]
    said.append([Reply(text, True, nats) for text, nats in zip(own, after - 1, strict=True)])  # as it was drawn
    more, less, drawn = listening.mutual_information(model, tokenizer, turns, said)
    assert more.mean() > less.mean() + 0.1
    assert more == pytest.approx((after - listening.LAMBDA * alone) / lengths, abs=1e-4)
    assert drawn == pytest.approx(more - 1 / np.array(lengths), abs=1e-4)
    [[cut]] = listening.mutual_information(model, tokenizer, turns[:1], [[Reply(own[0], False)]])
    assert cut != pytest.approx(more[0]), "<END> does not count where there is none"


def test_several_settings_answer_together_as_each_alone():
    model, tokenizer = made(2.0)
    turns, shares = [context.turns for context in CONTEXTS], list[float]()
    samplings = [Sampling(temp=0), Sampling(temp=1.5), Sampling(temp=1.5, repetition_penalty=3.0)]
    together = answer_by_each(model, tokenizer, turns, samplings, 12, seed=3, at_once=60, told=shares.append)
    assert together == [answer(model, tokenizer, turns, each, 12, seed=3) for each in samplings]
    assert together[0] != together[1] != together[2] and shares == sorted(shares) and shares[-1] <= 1
    style, ended = listening.our_format(tokenizer), 0
    for said in together:
        texts, each = [reply.text for reply in said], [[place] for place in range(len(said))]
        for reply, [nats] in zip(said, listening.score_replies(model, style, turns, texts, each), strict=True):
            assert not reply.ended or reply.nats == pytest.approx(nats, rel=1e-4)
            ended += reply.ended
    assert ended > len(turns)


def test_fitted_settings_reach_the_chat(base, tuned, monkeypatch):
    import main

    model, tokenizer = copy.deepcopy(base[0]), base[1]
    monkeypatch.setattr(fitting, "SWEEP", ({"temp": 1.0}, {"repetition_penalty": 1.2}))
    monkeypatch.setattr(fitting, "cost", lambda bot, human: -bot["distinct_1"])
    with torch.no_grad():
        model.get_output_embeddings().weight[-1] *= 3  # <END> often
    fitted = fitting.fit(model, tokenizer, TALK, seed=1, contexts=3, max_t=8)
    assert set(fitted.figures) == {"people", "defaults", "fitted"}
    assert fitted.figures["fitted"]["cost"] <= fitted.figures["defaults"]["cost"]
    settings = Sampling(temp=1.0, top_k=50, top_p=1.0, repetition_penalty=1.2)  # transformers' own defaults, mostly
    merge.write_sampler(tuned, settings, 50)
    assert merge.read_sampler(tuned) == settings
    assert main.fitted(str(tuned)) == {
        "max_t": 50, "temp": 1.0, "top_k": 50, "top_p": 1.0, "repetition_penalty": 1.2,
    }  # fmt: skip


def test_a_fit_that_finds_greedy_choices_best_is_written_and_read(tmp_path):
    import main

    GenerationConfig(eos_token_id=5, pad_token_id=4).save_pretrained(tmp_path)
    merge.write_sampler(tmp_path, Sampling(0.0, 40, 0.9, repetition_penalty=1.06), 50)
    (tmp_path / "run.json").write_text("{}")
    assert merge.read_sampler(tmp_path) == Sampling(0.0, repetition_penalty=1.06)
    assert main.fitted(str(tmp_path)) == {"max_t": 50, "temp": 0.0, "repetition_penalty": 1.06}


# ---- Leaks ---------------------------------------------------------------------------------------------

LONG = ["Could you tell me the way to the station?", "Go straight on, then left."]


def test_what_stands_in_validation_or_test_is_not_trained_on():
    train = [["Hi!", "Hello."], [*LONG, "Thanks."], ["A", "b"], ["A ", " b"], ["c", "d"]]
    corpus = Corpus(train, [["hi", "HELLO!"]], [["Excuse me.", *map(str.upper, LONG)]], "here", None, ["a note"])
    clean = without_leaks(corpus)
    assert clean.train == [["A", "b"], ["c", "d"]]
    assert clean.notes == ["a note", "left out since they overlap validation or test: 2", "duplicates left out: 1"]
    assert without_overlap(corpus.test, corpus.train) == []
    with pytest.raises(UserError, match="every training dialogue"):
        without_leaks(corpus._replace(train=train[:1]))


@given(st.lists(st.lists(st.text(max_size=4), min_size=2, max_size=4), max_size=5))
def test_nothing_overlaps_what_was_kept(dialogues):
    half = len(dialogues) // 2
    kept = without_overlap(dialogues[:half], dialogues[half:])
    assert without_overlap(dialogues[half:], kept) == dialogues[half:]
    assert without_overlap(dialogues, dialogues) == []


@needs_dailydialog
def test_the_releases_leaks():
    """148 test and 118 validation dialogues stand in train, 1,607 of 6,740 test pairs do, 872 are there twice."""
    corpus = load_corpus(str(DAILYDIALOG))
    whole = {fold(" ".join(turns)) for turns in corpus.train}
    assert len(corpus.train) - len(whole) == 872
    assert sum(fold(" ".join(turns)) in whole for turns in corpus.test) == 148
    assert sum(fold(" ".join(turns)) in whole for turns in corpus.validation) == 118

    def pairs(dialogues):
        return [(fold(a), fold(b)) for turns in dialogues for a, b in itertools.pairwise(turns)]

    known = set(pairs(corpus.train))
    assert len(pairs(corpus.test)) == 6_740
    assert sum(pair in known for pair in pairs(corpus.test)) == 1_607
    clean = without_leaks(corpus)
    assert len(clean.train) == 9_853
    assert clean.notes[-2:] == ["left out since they overlap validation or test: 596", "duplicates left out: 669"]
    assert len(without_overlap(corpus.test, corpus.train)) == 722
    assert without_overlap(corpus.test, clean.train) == corpus.test


# ---- The command ---------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path):
    for name, count in (("train", 30), ("validation", 4), ("test", 6)):
        lines = [json.dumps({"dialog": [f"{turn} ({name} {n})" for turn in TALK[n % 3]]}) for n in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join([*lines, json.dumps({"dialog": LONG})]))
    return tmp_path


def test_the_command_prints_a_table_and_writes_json(tuned, data, tmp_path, capsys):
    file = tmp_path / "figures.json"
    flags = ["--model", str(tuned), "--dataset", str(data), "--contexts", "4", "--max_t", "6", "--json", str(file)]
    evaluate.main(flags)
    printed = " ".join(capsys.readouterr().out.split())
    for words in (
        "word perplexity",
        "sampler: defaults",
        "all 7 dialogues",
        "the 6 that do not",
        "40 openers",
        "seed 0",
    ):
        assert words in printed
    found = json.loads(file.read_text())
    one = found["tuned"]["all 7 dialogues"]["perplexity"]
    assert one["low"] <= one["value"] <= one["high"]
    assert one != found["base"]["all 7 dialogues"]["perplexity"]
    assert found["people"]["replies to 4 contexts"]["share_that_ends"]["value"] == 1
    assert "share_found_after_other_contexts" in found["tuned"]["replies to 4 contexts"]


def test_figures_of_a_run_s_own_data_stand_in_both_model_cards(tuned, data, tmp_path, capsys, random_gpt2):
    names = {"adapter_dir": "lora", "merged_dir": "full"}
    run = {"settings": {"base_model": str(random_gpt2), "dataset": str(data), **names}}
    for name in names.values():
        with storage.whole_folder(tmp_path / name) as folder:
            shutil.copytree(tuned, folder, dirs_exist_ok=True)
            storage.write_json(folder / storage.RUN_FILE, run)
            (folder / "README.md").write_text("# A model\n\n## How it reads\n\nSo.\n")
    storage.replace_files(tmp_path / "lora", {"metrics.json": '{"eval_perplexity": 7.0}'})
    for contexts in ("4", "5"):
        evaluate.main(["--model", str(tmp_path / "full"), "--contexts", contexts, "--max_t", "6"])
    for name in names.values():
        card = (tmp_path / name / "README.md").read_text()
        assert card.count("## Evaluation") == card.count("## How it reads") == 1
        assert card.startswith("# A model") and card.endswith("So.\n") and "replies to 5 contexts" in card
        assert "| share of true replies found |" in card and "replies to 4 contexts" not in card
        assert storage.damage(tmp_path / name) is None
    metrics = json.loads((tmp_path / "lora" / "metrics.json").read_text())
    assert metrics["eval_perplexity"] == 7.0
    assert {"base", "tuned", "people"} == metrics["evaluation"].keys()
    assert not (tmp_path / "full" / "metrics.json").exists()
    with storage.locked(tmp_path / "lora"):
        evaluate.main(["--model", str(tmp_path / "full"), "--contexts", "4", "--max_t", "6"])
    assert "lora stays without these figures" in capsys.readouterr().err


def test_a_folder_whose_files_are_replaced_is_whole_at_any_moment(tmp_path, monkeypatch):
    with storage.whole_folder(tmp_path / "model") as folder:
        for name in ("a", "b"):
            (folder / name).write_text("old")
    moments, real = [], Path.replace

    def replace(self, target):
        real(self, target)
        moments.append(storage.damage(tmp_path / "model"))

    monkeypatch.setattr(Path, "replace", replace)
    storage.replace_files(tmp_path / "model", {"a": "new", "c": "more"})
    assert moments == [None] * 4
    assert [(tmp_path / "model" / name).read_text() for name in "abc"] == ["new", "old", "more"]
    assert {"a", "b", "c"} <= storage.read_json(tmp_path / "model" / storage.MANIFEST).keys()


def test_compare_shows_both_models_and_the_same_model_twice_is_refused(tuned, capsys):
    evaluate.main(["--model", str(tuned), "--compare", "--max_t", "3"])
    printed = capsys.readouterr().out
    assert all(heading in printed for heading in ("opener", "base", "tuned", OPENERS[0]))
    with pytest.raises(UserError, match="nothing would differ"):
        evaluate.main(["--model", str(tuned), "--base", str(tuned), "--compare", "--max_t", "3"])


def test_compare_asks_first_messages_of_own_validation_read_as_the_run_read_them(tuned, tmp_path, capsys):
    chat = "".join(f"{day:02}.02.20, 16:05 - Ann: {day} [/b]\n{day:02}.02.20, 16:06 - Bo: ok\n" for day in range(1, 29))
    (tmp_path / "chat.txt").write_text(chat)
    shutil.copytree(tuned, tmp_path / "tuned")
    run = json.loads((tuned / "run.json").read_text())
    run["settings"] |= {"dataset": str(tmp_path / "chat.txt"), "bot": "Bo", "silence": 30}
    (tmp_path / "tuned" / "run.json").write_text(json.dumps(run))
    evaluate.main(["--model", str(tmp_path / "tuned"), "--compare", "--max_t", "3"])
    printed = capsys.readouterr().out
    openers = {turns[0] for turns in load_corpus(str(tmp_path / "chat.txt"), "Bo").validation}
    assert openers and all(opener in printed for opener in openers) and OPENERS[0] not in printed
    with pytest.raises(UserError, match="give --bot"):
        evaluate.main(["--model", str(tuned), "--dataset", str(tmp_path / "chat.txt"), "--compare"])


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--model", "./nowhere"], "nowhere"),
        (["--dataset", "./nowhere.jsonl"], "nowhere.jsonl"),
        ([], "give --dataset"),
        (["--base", "./nowhere"], "nowhere"),
        (["--contexts", "0"], "--contexts: 0 is not above 0"),
        (["--max_dialogues", "-3"], "-3 is not above 0"),
        (["--max_t", "2000"], "at most 128"),
        (["--max_t", "many"], "--max_t"),
        (["--seed", "-1"], "--seed: -1 is not between"),
        (["--colour"], "unrecognized arguments: --colour"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(flags, said, tuned, data, capsys):
    usual = ["--model", str(tuned), *(["--dataset", str(data)] if "--base" in flags else [])]
    assert exit_code(lambda: evaluate.main([*usual, *flags])) == 2
    error = capsys.readouterr().err.strip().splitlines()
    assert len(error) == 1 and said in error[0]


def test_contexts_are_cut_before_a_human_reply():
    found = find_contexts(TALK, 3, seed=0, longest=1)
    assert [context.turns for context in found] == [turns[:1] for turns in TALK]
    assert [context.human for context in found] == [turns[1] for turns in TALK]
    assert {len(context.turns) for seed in range(9) for context in find_contexts(TALK, 3, seed)} == {1, 3}


def test_a_plain_gpt2_is_no_dialogue_model(random_gpt2):
    with pytest.raises(UserError, match="no dialogue model"):
        evaluate.main(["--model", str(random_gpt2)])
    with pytest.raises(UserError, match="no fitted sampler"):
        merge.read_sampler(random_gpt2)
    assert gpt2_tokenizer().eos_token != "<END>"


def test_replies_that_do_not_fit_into_memory_are_drawn_by_halves_with_the_same_result(base):
    model, tokenizer = copy.deepcopy(base[0]), base[1]
    contexts = [turns[:1] for turns in TALK] * 2
    expected, sizes = answer(model, tokenizer, contexts, max_t=8), []

    def full_beyond_two(module, args, keywords):
        sizes.append(len(keywords["input_ids"]))
        if sizes[-1] > 2:
            raise torch.OutOfMemoryError("CUDA out of memory")

    model.register_forward_pre_hook(full_beyond_two, with_kwargs=True)
    assert answer(model, tokenizer, contexts, max_t=8) == expected
    assert sizes[0] == len(contexts) and sizes.count(sizes[0]) == 1, "what did not fit was tried again"
