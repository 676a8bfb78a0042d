"""Dialogues -> fixed-length rows for training: several dialogues a row, none of them seeing another.

A row is a plain dict of equally long lists:

    input_ids     USER 15496 END BOT 5303 END   USER ...         the dialogues, one after another
    position_ids  0    1     2   3   4    5     0    ...         restart with each dialogue
    labels        -100 -100 -100 -100 5303 END  -100 ...         what is learned; -100 elsewhere

transformers builds the block-diagonal attention mask from `position_ids` that restart, but only where
no `attention_mask` and no cache is passed (source: `find_packed_sequence_indices` in
transformers/masking_utils.py), so rows carry none.
"""

from collections import Counter
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from transformers import PreTrainedTokenizerBase

from dialogue.data.corpus import Unlearned, counted
from dialogue.prompt import encode_dialogue, find_roles

IGNORED = -100  # the label that cross-entropy passes over

Row = dict[str, list[int]]


class UnlearnedIds(list[int]):
    """Ids of an `Unlearned` turn."""


class Encoded(NamedTuple):
    """Dialogues as token ids. `pieces`: each a list of turns; `notes`: what was cut or skipped."""

    pieces: list[list[list[int]]]
    notes: list[str]


def encode(tokenizer: PreTrainedTokenizerBase, dialogues: list[list[str]], max_length: int) -> Encoded:
    """Turns of text -> turns of ids, in pieces of at most `max_length` tokens (see `cut_dialogue`)."""
    pieces: list[list[list[int]]] = []
    cut = skipped = 0
    for dialogue in dialogues:
        turns = [
            UnlearnedIds(ids) if isinstance(text, Unlearned) else ids
            for text, ids in zip(dialogue, encode_dialogue(tokenizer, dialogue), strict=True)
        ]
        parts = cut_dialogue(turns, max_length)
        cut += len(parts) > 1
        skipped += len(turns) - sum(map(len, parts))  # places, of which an empty one opens a dialogue of the bot's
        pieces += parts
    notes = {f"dialogues longer than {max_length} tokens, cut between turns": cut}
    notes[f"turns skipped since with their reply they exceed {max_length} tokens"] = skipped
    return Encoded(pieces, counted(Counter(notes)))


def cut_dialogue(turns: list[list[int]], max_length: int) -> list[list[list[int]]]:
    """A dialogue -> pieces of at most `max_length` tokens, each of which starts with USER and holds a reply.

    Only where the bot opens a dialogue, the first turn is empty. Cuts lie before a USER turn. A message and its reply
    that are longer than `max_length` by themselves are left out, as is a last message that would stand alone.
    """
    pieces: list[list[list[int]]] = []
    piece: list[list[int]] = []
    room = max_length
    for start in range(0, len(turns), 2):
        pair = turns[start : start + 2]
        length = sum(map(len, pair))
        if length > room:
            pieces.append(piece)
            piece, room = [], max_length
        if length <= room:
            piece = piece + pair
            room -= length
    return [piece for piece in [*pieces, piece] if len(piece) > 1]


def supervise(turns: list[list[int]], learn: str, bot: int) -> list[int]:
    """Turns of ids -> labels, flat. `learn` is "bot" (replies only) or "both" speakers; `UnlearnedIds` carry none.

    The role token that opens a turn never carries a label: the bot is told whose turn it is. The <END>
    that closes a learned turn always does. [[USER, a, END], [BOT, b, END]] with "bot" becomes
    [-100, -100, -100, -100, b, END].
    """
    labels = []
    for turn in filter(None, turns):
        learned = (learn == "both" or turn[0] == bot) and not isinstance(turn, UnlearnedIds)
        labels += [IGNORED, *(turn[1:] if learned else [IGNORED] * (len(turn) - 1))]
    return labels


def to_row(turns: list[list[int]], learn: str, bot: int) -> Row:
    """One dialogue -> a row of its own."""
    input_ids = [token for turn in turns for token in turn]
    return {
        "input_ids": input_ids,
        "position_ids": list(range(len(input_ids))),
        "labels": supervise(turns, learn, bot),
    }


def pack(pieces: list[list[list[int]]], tokenizer: PreTrainedTokenizerBase, max_length: int, learn: str) -> list[Row]:
    """Pieces -> rows of at most `max_length` tokens, longest piece first into the fullest row that has
    room (best-fit decreasing; Johnson, "Near-optimal bin packing algorithms", 1973)."""
    bot = find_roles(tokenizer).bot
    rows: list[Row] = []
    with_room: dict[int, list[int]] = {}  # free tokens -> indices of the rows that have just so many
    for piece in sorted((to_row(turns, learn, bot) for turns in pieces), key=_length, reverse=True):
        length = _length(piece)
        room = next((free for free in range(length, max_length + 1) if with_room.get(free)), None)
        if room is None:
            rows.append({name: list(values) for name, values in piece.items()})
            index, room = len(rows) - 1, max_length
        else:
            index = with_room[room].pop()
            for name, values in piece.items():
                rows[index][name] += values
        with_room.setdefault(room - length, []).append(index)
    return rows


def one_dialogue_a_row(rows: list[Row]) -> list[Row]:
    """Packed rows -> a row for each of their dialogues."""
    apart = []
    for row in rows:
        starts = [t for t, position in enumerate(row["position_ids"]) if position == 0]
        for start, stop in zip(starts, [*starts[1:], _length(row)], strict=True):
            apart.append({name: values[start:stop] for name, values in row.items()})
    return apart


def mean_dialogue_length(rows: list[Row]) -> int:
    """Tokens of the dialogue that a token is in, in the mean over tokens: what its attention costs."""
    lengths = [_length(row) for row in one_dialogue_a_row(rows)]
    return round(sum(length**2 for length in lengths) / sum(lengths))


def fill_up(rows: list[Row], multiple: int) -> list[Row]:
    """Rows, and as many without a label as make their number divisible: several processes then take equal
    shares, and each dialogue is learned once an epoch."""
    shortest = min(rows, key=_length)
    empty = {**shortest, "labels": [IGNORED] * _length(shortest)}
    return rows + [empty] * (-len(rows) % multiple)


def count_tokens(rows: list[Row]) -> int:
    """Tokens of all rows; padding is not among them."""
    return sum(map(_length, rows))


def _length(row: Row) -> int:
    return len(row["input_ids"])


def in_batches(lengths: list[int], tokens: int) -> Iterator[list[int]]:
    """The places of rows of these lengths, in batches of like length and so little padding, the longest first: of at
    most `tokens` tokens with the padding, but for a row that is longer by itself."""
    waiting = sorted(range(len(lengths)), key=lengths.__getitem__)
    while waiting:
        size = max(1, tokens // lengths[waiting[-1]])
        waiting, part = waiting[:-size], waiting[-size:]
        yield part


def collate(rows: list[Row], pad: int) -> dict[str, torch.Tensor]:
    """Rows -> int64 tensors (B, longest row), one for each field. Padding is a dialogue of its own (positions restart
    at 0), so no token attends to it, and carries no label."""
    width = max(map(_length, rows))
    batch: dict[str, Any] = {name: [] for name in rows[0]}
    for row in rows:
        missing = width - _length(row)
        padding = {"input_ids": [pad] * missing, "position_ids": list(range(missing)), "labels": [IGNORED] * missing}
        for name, values in row.items():
            batch[name].append(values + padding.get(name, [0] * missing))
    return {name: torch.tensor(values) for name, values in batch.items()}
