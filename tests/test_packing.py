"""Rows: what is learned, what sees what, and that nothing is lost."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from dialogue.data.packing import IGNORED, collate, cut_dialogue, encode, in_batches, pack, supervise, to_row
from dialogue.prompt import add_roles

USER, BOT, END = 1, 2, 3


def turns_of(lengths):
    """Turns of the given lengths, each a role, some text ids, and END."""
    return [[BOT if i % 2 else USER, *[9] * (n - 2), END] for i, n in enumerate(lengths)]


lengths = st.lists(st.integers(2, 40), min_size=2, max_size=12)


def test_only_replies_are_learned_and_each_end_is_among_them():
    turns = [[USER, 11, END], [BOT, 21, 22, END]]
    assert supervise(turns, "bot", BOT) == [IGNORED, IGNORED, IGNORED, IGNORED, 21, 22, END]
    assert supervise(turns, "both", BOT) == [IGNORED, 11, END, IGNORED, 21, 22, END]


@given(lengths, st.integers(4, 60))
def test_pieces_fit_start_with_the_user_and_keep_whole_turns(lengths, max_length):
    turns = turns_of(lengths)
    pieces = cut_dialogue(turns, max_length)
    for piece in pieces:
        assert sum(map(len, piece)) <= max_length
        assert piece[0][0] == USER
        assert len(piece) > 1
    kept = [turn for piece in pieces for turn in piece]
    remaining = iter(turns)
    assert all(any(turn is other for other in remaining) for turn in kept), "turns changed or moved"


def test_what_does_not_fit_is_counted(tokenizer):
    add_roles(tokenizer)
    dialogues = [["hi", "hello"], ["x " * 500, "y"], ["a", "b " * 30] * 3]
    encoded = encode(tokenizer, dialogues, 100)
    assert len(encoded.pieces) >= 3
    assert any("cut between turns" in note for note in encoded.notes)
    assert "turns skipped since with their reply they exceed 100 tokens: 2" in encoded.notes


@given(st.lists(lengths, min_size=1, max_size=30))
def test_packing_keeps_every_token_and_rows_are_full(dialogues):
    class Tokenizer:
        def convert_tokens_to_ids(self, tokens):
            return [USER, BOT, END]

        def convert_ids_to_tokens(self, number):
            return {USER: "<USER>", BOT: "<BOT>", END: "<END>"}[number]

    pieces = [piece for lengths in dialogues for piece in cut_dialogue(turns_of(lengths), 128)]
    rows = pack(pieces, Tokenizer(), 128, "both")
    assert sorted(token for row in rows for token in row["input_ids"]) == sorted(
        token for piece in pieces for turn in piece for token in turn
    )
    assert sum(row["position_ids"].count(0) for row in rows) == len(pieces)
    used = sorted(len(row["input_ids"]) for row in rows)
    assert all(length <= 128 for length in used)
    assert len(used) < 2 or used[0] + used[1] > 128, "two rows would have fitted into one"


@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_packed_dialogues_do_not_see_each_other(random_gpt2, tokenizer, training):
    """Loss and gradients of a padded batch of packed rows equal those of the dialogues one by one."""
    roles = add_roles(tokenizer)
    dialogues = [["Hi there", "Hello", "How are you"], ["What time is it?", "Noon."], ["Bye", "See you", "ok", "!"]]
    pieces = encode(tokenizer, dialogues, 64).pieces
    model = AutoModelForCausalLM.from_pretrained(
        random_gpt2, dtype=torch.float64, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0
    )
    model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    model.train(training)

    def loss_and_gradient(batches):
        model.zero_grad()
        total = 0.0
        for batch in batches:
            total += model(**batch, use_cache=False, num_items_in_batch=1).loss
        total.backward()
        return total.item(), model.transformer.h[0].attn.c_attn.weight.grad.clone()

    alone = [collate([to_row(piece, "both", roles.bot)], 0) for piece in pieces]
    packed = pack(pieces, tokenizer, 64, "both")
    assert len(packed) < len(pieces)
    loss_alone, gradient_alone = loss_and_gradient(alone)
    loss_packed, gradient_packed = loss_and_gradient([collate([*packed, to_row(pieces[0], "both", roles.bot)], 0)])
    extra_loss, extra_gradient = loss_and_gradient(alone[:1])
    # transformers' own loss is computed in float32, whatever the model's dtype
    assert loss_packed == pytest.approx(loss_alone + extra_loss, rel=1e-6)
    torch.testing.assert_close(gradient_packed, gradient_alone + extra_gradient, rtol=1e-5, atol=1e-5)

    row = max(packed, key=lambda row: row["position_ids"].count(0))
    starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
    assert len(starts) > 1
    logits = model(**collate([row], 0), use_cache=False).logits[0]
    for start, stop in zip(starts, [*starts[1:], len(row["input_ids"])], strict=True):
        one = torch.tensor([row["input_ids"][start:stop]])
        torch.testing.assert_close(logits[start:stop], model(one, use_cache=False).logits[0], rtol=0, atol=1e-9)


@given(st.lists(st.integers(1, 50), max_size=30), st.integers(1, 200))
def test_batches_have_every_row_once_and_no_more_tokens_than_wanted(lengths, tokens):
    batches = list(in_batches(lengths, tokens))
    assert sorted(place for part in batches for place in part) == list(range(len(lengths)))
    assert all(len(part) == 1 or len(part) * max(lengths[place] for place in part) <= tokens for part in batches)
