"""The blind comparison: what the reader sees, and what comes of the choices."""

import json

import pytest
from conftest import byte_tokenizer, save_random_gpt2
from transformers import AutoTokenizer

from benchmarks import blind
from dialogue.errors import UserError
from dialogue.prompt import add_roles

CONTEXTS = [[f"Message {number}"] for number in range(12)] + [["Hi", "Hello", "Bye"]]
REPLIES = [[f"left {n}" for n in range(12)] + ["Bye!"], [f"right {n}" for n in range(12)] + ["Bye!"]]


def test_a_reader_who_prefers_one_bot_lets_it_win_whatever_the_sides():
    text, key = blind.pair_up(CONTEXTS, REPLIES, seed=3)
    assert len(key["first"]) == 12 and key["same"] == 1 and {0, 1} == set(key["first"].values())
    choices = ""
    for pair in text.split("\n\n")[1:]:
        number, *_, one, two = pair.strip().splitlines()
        assert sorted(reply.split()[1] for reply in (one, two)) == ["left", "right"]
        choices += f"{number} {1 if 'right' in one else 2}\n"
    winners = blind.read_choices(choices, key["first"])
    assert winners == [1] * 12
    assert "B wins 100% of the decided pairs" in blind.result(winners, ["old", "new"], 1)


def test_ties_and_an_interval_by_hand():
    said = blind.result([0] * 25 + [1] * 75 + [-1] * 10, ["old", "new"], 2)
    assert said.startswith("A (old) 25, B (new) 75, neither 10, the same reply 2. B wins 75% of the decided pairs (")
    low, high = (int(part.strip("%).")) for part in said.rsplit("(")[-1].split(" to "))
    assert abs(low - 67) <= 1 and abs(high - 83) <= 1  # 1.96 * sqrt(0.75 * 0.25 / 100) = 0.085
    assert blind.result([-1], ["old", "new"], 0) == "A (old) 0, B (new) 0, neither 1, the same reply 0."


def test_choices_with_a_gap_are_refused():
    assert blind.read_choices("1: 2\n2. =\n 3) 1", {"1": 0, "2": 1, "3": 1}) == [1, -1, 1]
    with pytest.raises(UserError, match="no choice for 1 pairs, 2 for one"):
        blind.read_choices("1: 2\n12: 1", {"1": 0, "2": 1})


def test_bots_with_settings(tmp_path):
    assert blind.parse_bot("a/b:temp=0,top_k=3") == ("a/b", {"temp": 0, "top_k": 3})
    with pytest.raises(UserError, match="no setting"):
        blind.parse_bot("a:temp=cold")
    (tmp_path / "run.json").write_text("{}")
    (tmp_path / "generation_config.json").write_text(json.dumps({"temperature": 0.3, "max_new_tokens": 9}))
    assert blind.parse_bot(f"{tmp_path}:fitted") == (str(tmp_path), {"temp": 0.3, "max_t": 9})


def test_the_chat_itself_answers_and_what_it_lacks_is_one_line(tmp_path):
    tokenizer = byte_tokenizer()
    add_roles(tokenizer)
    folder = str(save_random_gpt2(tmp_path, tokenizer))
    assert AutoTokenizer.from_pretrained(folder).eos_token == "<END>"
    first = blind.answers(f"{folder}:max_t=4", CONTEXTS[-2:], seed=0)
    assert first == blind.answers(f"{folder}:max_t=4", CONTEXTS[-2:], seed=0) and len(first) == 2
    with pytest.raises(UserError, match="no such setting"):
        blind.answers(f"{folder}:colour=4", CONTEXTS[-1:], seed=0)
    with pytest.raises(UserError, match="no model in"):
        blind.answers("./nowhere", CONTEXTS, seed=0)
