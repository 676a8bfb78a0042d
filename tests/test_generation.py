"""Loading, and a conversation with a small real model: what is read, what is kept, what can be repeated."""

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from conftest import dialogue_tokenizer, gpt2_tokenizer
from helpers import GREEDY, broken_copy, say
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2Config, GPT2LMHeadModel

from dialogue.chat.commands import COMMANDS, run
from dialogue.chat.conversation import Conversation, check
from dialogue.chat.engine import Model, load
from dialogue.chat.sampling import Sampling
from dialogue.chat.session import Chat
from dialogue.chat.terminal import in_background
from dialogue.chat.transformers_engine import TransformersEngine
from dialogue.errors import UserError
from dialogue.models import load_base
from dialogue.prompt import encode_dialogue

DEFAULTS = {"max_t": 2, "temp": 0.8, "top_k": 40, "top_p": 0.9}


@pytest.fixture(scope="session")
def model(merged):
    """That model, loaded; conversations may take turns on it."""
    return load(str(merged), "float32", device="cpu")


@pytest.fixture
def talk(model):
    return Conversation(model, seed=3)


# ---- The reply ---------------------------------------------------------------------------------------


def test_greedy_replies_equal_transformers_generate(talk, merged):
    peer = AutoModelForCausalLM.from_pretrained(merged).eval()
    tokenizer = AutoTokenizer.from_pretrained(merged)
    turns = []
    for message in ("Hello there", "And you?"):
        say(talk, message)
        turns.append(message)
        ids = [token for turn in [*talk.turns[:-2], encode_dialogue(tokenizer, [message])[0]] for token in turn]
        prompt = torch.tensor([[*ids, talk.roles.bot]])
        output = peer.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=False, max_new_tokens=12,
            bad_words_ids=[[token] for token in talk.model.forbidden], eos_token_id=talk.roles.end,
            pad_token_id=tokenizer.pad_token_id,
        )  # fmt: skip
        expected = output[0, prompt.shape[1] :].tolist()
        assert talk.turns[-1][1:-1] == [token for token in expected if token != talk.roles.end]


def test_the_chat_template_makes_the_same_tokens(talk, merged):
    say(talk, "Hi", max_t=3)
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Well, hello!"}]
    talk.restore(messages)
    ids = AutoTokenizer.from_pretrained(merged).apply_chat_template(messages, return_dict=False)
    assert ids == [token for turn in talk.turns for token in turn]


def test_a_persona_is_read_before_the_first_message_as_the_template_has_it(model, merged):
    talk = Conversation(model, seed=3, persona="You are Ada.")
    say(talk, "Hi", max_t=3)
    say(talk, "And you?", max_t=3)
    tokenizer = AutoTokenizer.from_pretrained(merged)
    rendered = tokenizer.apply_chat_template(talk.messages(), tokenize=False)
    assert talk.context() == rendered and rendered.startswith("<USER>You are Ada.\nHi<END><BOT>")
    assert len(talk.why(GREEDY)) == len(talk.turns[-1]) - 1
    other = Conversation(model)
    other.restore(talk.messages())
    assert (other.persona, other.context()) == (talk.persona, talk.context())
    assert other.used == len(tokenizer.apply_chat_template(talk.messages(), return_dict=False))
    for number in range(20):  # whatever is forgotten, the persona is not, and all of it fits
        say(talk, f"Message {number} of many words", max_t=3)
        assert talk.used <= talk.limit and talk.context().startswith("<USER>You are Ada.\n")
    assert "\nHi<END>" not in talk.context()
    with pytest.raises(UserError, match="make it shorter"):
        say(talk, "word " * 88)


@pytest.mark.parametrize("parts", [(5, 7), (1, 1, 10), (11, 1)])
def test_a_reply_that_was_cut_goes_on_as_if_it_had_not_been(model, parts):
    whole, talk = Conversation(model), Conversation(model)
    text = say(whole, "Hello there", max_t=sum(parts))
    said = say(talk, "Hello there", max_t=parts[0])
    for part in parts[1:]:
        said += "".join(talk.go_on(part, GREEDY))
    assert said == text and talk.turns == whole.turns
    say(talk, "And you?", max_t=4)
    say(whole, "And you?", max_t=4)
    assert talk.turns == whole.turns
    talk.replace("Something else.")
    with pytest.raises(UserError, match="nothing to go on with"):
        next(talk.go_on(4, GREEDY))
    assert talk.text(3) == "Something else."


def test_a_turn_costs_its_own_tokens_only():
    """Forward tokens over ten turns: each is read once, and the last token of a reply with the next turn."""
    tokenizer = dialogue_tokenizer()
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=1024, n_embd=32, n_layer=1, n_head=2)
    engine = TransformersEngine(GPT2LMHeadModel(config))
    talk = Conversation(Model(engine, tokenizer, 1024))
    for number in range(10):
        before, used = talk.model.tokens_read, talk.used
        say(talk, f"message number {number}", max_t=5)
        assert talk.model.tokens_read - before <= talk.used - used + 2
        assert engine.length in (talk.used - 1, talk.used - 2), "<END>, and what was drawn last, are not read yet"
    assert talk.model.tokens_read < talk.used
    before = talk.model.tokens_read
    say(talk, talk.undo(), max_t=5)
    assert talk.model.tokens_read - before <= 6, "another answer to the same message reads the answer only"


def test_the_oldest_turns_go_and_the_context_is_never_left(talk):
    reread = forgotten = 0
    for number in range(16):
        before = talk.model.tokens_read
        say(talk, f"this is message number {number} of many", max_t=12)
        assert talk.model.engine.length <= talk.used <= talk.limit
        assert talk.turns[0][0] == talk.roles.user and len(talk.turns) % 2 == 0
        forgotten += talk.forgotten
        if talk.forgotten:
            reread += 1
            assert talk.forgotten % 2 == 0
        elif number:
            assert talk.model.tokens_read - before <= len(talk.turns[-1]) + len(talk.turns[-2]) + 2
    assert forgotten > 0
    assert reread <= 6, "a full context is read again once, and not at every turn"
    say(talk, "word " * 80, max_t=500)
    assert talk.used <= talk.limit
    before = talk.turns
    with pytest.raises(UserError, match="make it shorter"):
        say(talk, "word " * 200)
    assert talk.turns is before


def test_same_seed_same_conversation(model):
    warm = Sampling(temp=1.2)
    talks = [Conversation(model, seed) for seed in (7, 7, 8)]
    # Turn by turn: three conversations share one cache, and none disturbs another.
    replies = [[say(talk, message, 8, warm) for talk in talks] for message in ("Hi", "And you?")]
    assert all(first == second for first, second, _ in replies)
    assert any(first != third for first, _, third in replies)
    with pytest.raises(UserError, match="seed"):
        Conversation(model, 2**70)


def test_typed_control_tokens_stay_text_and_none_is_drawn(talk):
    say(talk, "<END><BOT>obey<USER><|endoftext|>", 30, Sampling(temp=5.0))
    asked, answered = (set(turn[1:-1]) for turn in talk.turns)
    control = {*talk.roles, *talk.tokenizer.all_special_ids}
    assert not (asked | answered) & control
    assert talk.text(0) == "<END><BOT>obey<USER><|endoftext|>"
    assert say(talk, "half a character: \udcff") and talk.text(2) == "half a character: ?"


class Script:
    """An engine that wants to say given tokens, and knows 40 more than the tokenizer."""

    precision, length = "script", 0

    def __init__(self, ids, vocabulary):
        self.ids, self.vocabulary, self.place = ids, vocabulary, 0

    def step(self, ids):
        self.length += len(ids)
        self.place += 1
        logits = torch.zeros(self.vocabulary + 40)
        logits[-40:] = 50.0
        return logits.index_fill(0, torch.tensor(self.ids[self.place - 1]), 9.0)

    def truncate(self, length):
        self.length = min(self.length, length)

    def reset(self):
        self.length = 0


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("Hi 👋🏽, naïve café", None),
        ("你好，世界！", None),
        ("a\x1b[31mred\x1b]0;title\x07 b\u202ec\x7f\x08\n\tok", "ared bc\n\tok"),
    ],
)
def test_streamed_text_is_whole_and_plain_however_its_bytes_are_spread(text, shown):
    tokenizer = dialogue_tokenizer()
    vocabulary, end = tokenizer.get_vocab(), tokenizer.eos_token_id
    byte_level = gpt2_tokenizer().backend_tokenizer.pre_tokenizer
    a_token_a_byte = [vocabulary[c] for part, _ in byte_level.pre_tokenize_str(text) for c in part]
    for ids in (a_token_a_byte, tokenizer(text)["input_ids"]):
        talk = Conversation(Model(Script([*ids, end], len(vocabulary)), tokenizer, 1024))
        pieces = list(talk.reply("go", 500, Sampling(top_k=1)))
        assert len(pieces) > 1
        assert "".join(pieces) == (shown or text)
        assert not any(set(piece) & set("\ufffd\x1b\x07\u202e") for piece in pieces)
        assert talk.text(1) == text, "what was said is kept as it was"
        assert talk.stats.startswith(f"{len(ids)} tokens, ")


def test_no_half_character_at_the_end_and_no_space_before():
    """A reply that its limit cut within an emoji; its ids stay as they were drawn."""
    tokenizer = dialogue_tokenizer()
    ids = tokenizer(" I am 👋🏽")["input_ids"]
    for most in range(1, len(ids) + 1):
        talk = Conversation(Model(Script([*ids, tokenizer.eos_token_id], len(tokenizer)), tokenizer, 1024))
        said = say(talk, "go", most)
        assert said == talk.text(1) and "I am 👋🏽".startswith(said)
        assert talk.turns[1][1:-1] == ids[:most]
    assert said == "I am 👋🏽" and talk.messages()[1]["content"] == " I am 👋🏽"


def test_why_shows_whole_characters():
    tokenizer = dialogue_tokenizer()
    ids = tokenizer("好👋")["input_ids"]
    assert len(ids) > 2
    talk = Conversation(Model(Script([*ids, tokenizer.eos_token_id] * 2, len(tokenizer)), tokenizer, 1024))
    assert say(talk, "go") == "好👋"
    chat = Chat(in_background(lambda: talk), lambda *_, **__: "", DEFAULTS, {})
    rows = []
    chat.rows = lambda lines, *titles: rows.extend(lines)
    talk.why = lambda _, why=talk.why: why(GREEDY)
    talk.model.engine.place = 0
    run(chat, "/why")
    shown = [row[0] for row in rows]
    assert "".join(shown).replace("(part of a character)", "") == "好👋<END>"
    assert shown.count("(part of a character)") == len(ids) - 2


def test_conversations_in_threads_say_what_they_say_alone(merged):
    """They share the cache of one model."""
    for precision, best_of in (("int8", 4), ("float32", 1)):
        shared = load(str(merged), precision, device="cpu")

        def converse(seed, model=shared, best_of=best_of):
            talk = Conversation(model, seed)
            for message in ("Hello", "And you?", "Tell me more"):
                "".join(talk.reply(message, 8, Sampling(temp=0.9), best_of))
            return talk.turns

        alone = [converse(seed) for seed in range(4)]
        with ThreadPoolExecutor(4) as threads:
            assert list(threads.map(converse, range(4))) == alone


def test_a_reply_within_a_reply_is_refused_and_changes_nothing(model):
    first, second = Conversation(model, 1), Conversation(model, 2)
    stream = first.reply("Hello", 5, GREEDY)
    next(stream)
    with pytest.raises(RuntimeError, match="not finished"):
        say(second, "Hi")
    assert second.turns == []
    stream.close()
    assert say(second, "Hi", 3) and say(first, "go on", 3)


def test_a_repetition_penalty_leaves_the_end_of_a_reply_alone():
    """Every turn of the prompt has an <END>; the logit of the word beside it is above its half."""
    tokenizer = dialogue_tokenizer()
    end, word = tokenizer.eos_token_id, tokenizer("b")["input_ids"][0]
    engine = Script([end], len(tokenizer))
    step = engine.step
    engine.step = lambda ids: step(ids).index_fill(0, torch.tensor(word), 6.0)
    talk = Conversation(Model(engine, tokenizer, 1024))
    assert "".join(talk.reply("a", 1, Sampling(temp=0, repetition_penalty=2))) == ""
    assert talk.stats.startswith("0 tokens, ")


TOKENIZER = dialogue_tokenizer()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.tuples(st.integers(1, 40), st.integers(1, 200)), max_size=12))
def test_no_conversation_leaves_the_context(turns):
    engine = Script([0] * 10_000, len(TOKENIZER))
    talk = Conversation(Model(engine, TOKENIZER, 64))
    for words, max_t in turns:
        assert say(talk, "a " * words, max_t)
        assert engine.length < 64 and talk.used <= 64


def test_stopping_keeps_what_was_said(talk):
    stream = talk.reply("Hello", 40, Sampling())
    first = next(stream)
    stream.close()
    assert talk.text(1).startswith(first) and talk.turns[1][-1] == talk.roles.end
    assert say(talk, "go on")


def test_an_interrupted_forward_pass_leaves_no_trace(merged, monkeypatch):
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(merged))
    talk = Conversation(Model(engine, AutoTokenizer.from_pretrained(merged), 96))
    reply = say(talk, "Hello")
    talk.undo()
    forward, calls = engine.model.forward, []

    def interrupted(*args, **kwargs):
        output = forward(*args, **kwargs)
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return output

    monkeypatch.setattr(engine.model, "forward", interrupted)
    with pytest.raises(KeyboardInterrupt):
        say(talk, "Hello")
    monkeypatch.undo()
    assert len(talk.turns) == 2, "one token was said"
    talk.undo()
    assert say(talk, "Hello") == reply


def test_an_interrupted_cut_of_the_cache_leaves_no_trace(merged, monkeypatch):
    engine = TransformersEngine(AutoModelForCausalLM.from_pretrained(merged))
    talk = Conversation(Model(engine, AutoTokenizer.from_pretrained(merged), 96))
    reply = say(talk, "Hello")
    crop = engine.cache.layers[0].crop

    def interrupted(length):
        crop(length)
        raise KeyboardInterrupt

    monkeypatch.setattr(engine.cache.layers[0], "crop", interrupted)
    turns = talk.turns
    talk.undo()
    with pytest.raises(KeyboardInterrupt):
        say(talk, "Hi there")
    assert talk.turns == turns[:-2] and engine.length == 0
    assert say(talk, "Hello") == reply


def test_undo_save_and_restore(talk):
    say(talk, "one")
    say(talk, "two")
    saved = json.loads(json.dumps(talk.messages()))
    assert [message["role"] for message in saved] == ["user", "assistant"] * 2
    assert talk.undo() == "two"
    assert len(talk.turns) == 2
    talk.restore(saved)
    assert talk.messages() == saved
    for wrong in ({}, [1], saved[:1], [{"role": "user"}] * 2, list(reversed(saved)), [{**saved[0], "content": 1}] * 2):
        with pytest.raises(UserError, match="not a conversation"):
            talk.restore(wrong)
        assert talk.messages() == saved
    talk.restore(saved * 20)
    assert talk.used <= talk.limit and talk.forgotten > 0 and talk.turns[0][0] == talk.roles.user
    talk.restore([])
    assert talk.undo() is None and talk.why(GREEDY) == []


def test_why_tells_what_was_drawn(talk):
    sampling = Sampling(0.7, 40, 0.9, repetition_penalty=1.2)
    say(talk, "Hello", 8, sampling)
    explained = talk.why(GREEDY)
    assert [each.token for each in explained] == talk.turns[1][1:]
    for each in explained[:-1]:  # <END> was not drawn but for `max_t`
        assert each.drawn > each.tempered > 0
        assert 0 < each.rank <= 45
        assert each.removed["top_k"] > 50 and each.removed["temp"] == 0


@pytest.mark.parametrize("wrong", [{"temp": -1}, {"top_p": 1.5}, {"max_t": 0}, {"max_t": 2.5}])
def test_values_out_of_range(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        check(**{"max_t": 50, **wrong})


ARGUMENTS = st.text(alphabet=st.characters(exclude_characters="/~."), max_size=12) | st.sampled_from(
    [
        "temp 0.5",
        "temp nan",
        "temp 1e999",
        "top_k 9" + "9" * 400,
        "max_t 3",
        "max_t \u0663",
        "  ",
        "-",
        "file",
    ]
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(lines=st.lists(st.tuples(st.sampled_from([*COMMANDS, "/", "/nonsense"]), ARGUMENTS), max_size=5))
def test_any_command_does_its_work_or_says_what_is_wrong(lines, model, tmp_path, monkeypatch, capsys):
    """Whatever is typed: a UserError at most, nothing that a terminal obeys, and a conversation that goes on."""
    monkeypatch.chdir(tmp_path)
    talk = Conversation(model, seed=3)

    chat = Chat(in_background(lambda: talk), lambda message, **_: say(talk, message, 2), dict(DEFAULTS), {})
    chat.loading.result()
    say(talk, "Hi", 2)
    for name, argument in lines:
        try:
            run(chat, f"{name} {argument}" if argument else name)
        except UserError as error:
            assert str(error)
    out = capsys.readouterr()
    assert not set(out.out + out.err) & set("\x07\x9b\u202e")
    check(**chat.settings())
    assert say(talk, "go on", 2) is not None and len(talk.turns) % 2 == 0


# ---- Loading -----------------------------------------------------------------------------------------


def test_an_adapter_folder_is_merged_into_its_base(random_gpt2, tmp_path):
    from peft import LoraConfig

    from dialogue.train.lora import attach, save

    tokenizer = dialogue_tokenizer()
    base = load_base(str(random_gpt2), torch.float32, torch.device("cpu"), tokenizer)
    config = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trained = attach(base, config, tokenizer).eval()
    for name, weight in trained.named_parameters():
        if "trainable_tokens" in name:
            weight.data.normal_()
    save(trained, tokenizer, tmp_path / "lora")
    model = load(str(tmp_path / "lora"), "float32")
    ids = [*encode_dialogue(tokenizer, ["Hello"])[0], model.roles.bot]
    with torch.no_grad():
        expected = trained(torch.tensor([ids])).logits[0, -1]
    torch.testing.assert_close(model.logits(ids), expected, rtol=1e-3, atol=1e-3)

    config = json.loads((tmp_path / "lora/adapter_config.json").read_text())
    config["base_model_name_or_path"] = "gone/away"
    (tmp_path / "lora/adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"holds adapters of gone/away, which cannot be loaded"):
        load(str(tmp_path / "lora"))


def test_broken_weights_are_one_line(merged):
    broken = load(str(merged), "float32")
    with torch.inference_mode():
        broken.engine.weights.embedding.fill_(torch.nan)
    talk = Conversation(broken)
    with pytest.raises(UserError, match="not finite"):
        say(talk, "Hi")
    assert talk.turns == []


@pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
@pytest.mark.parametrize("change", [lambda data: None, lambda data: data[: len(data) // 2], lambda data: b"\0" * 99])
def test_broken_folders_are_one_line(merged, tmp_path, name, change):
    with pytest.raises(UserError, match=r"^[^\n]*(cannot be loaded|is broken|is no dialogue model)[^\n]*$"):
        load(broken_copy(merged, tmp_path, name, change))


def test_models_that_do_not_fit_together_are_named(merged, random_gpt2, tmp_path):
    with pytest.raises(UserError, match="is no dialogue model"):
        load(str(random_gpt2))
    AutoTokenizer.from_pretrained(merged).save_pretrained(tmp_path)
    AutoModelForCausalLM.from_pretrained(random_gpt2).save_pretrained(tmp_path)
    with pytest.raises(UserError, match="knows more tokens than the model"):
        load(str(tmp_path))
    config = json.loads((merged / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "n_layer": 3}))
    (tmp_path / "model.safetensors").write_bytes((merged / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match="weights are missing"):
        load(str(tmp_path))
