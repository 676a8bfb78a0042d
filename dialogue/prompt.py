"""Roles, special tokens, and turns <-> token ids: the contract that both scripts share.

A dialogue is a list of turns (plain strings). The first speaker is USER, speakers alternate, and
every turn closes with <END>:

    <USER> Good morning. <END> <BOT> Morning! How are you? <END> <USER> Fine. <END> ...

(written here with spaces; there are none between a token and the text). The three role tokens are
inserted by id. Text is encoded with special tokens split, so "<END>" typed by a person or present
in a dataset stays seven ordinary characters and never becomes a control token.
"""

from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

USER, BOT, END = "<USER>", "<BOT>", "<END>"

# What other engines render a conversation with; token for token what `encode_dialogue` makes. A system message opens
# the first turn of the user, as `with_persona` has it; where the assistant opens, it is a turn by itself.
CHAT_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if message['role'] == 'user' -%}"
    "{{- '<USER>' + message['content'] + '<END>' if loop.index0 != 1 or messages[0]['role'] != 'system'"
    " else message['content'] + '<END>' -}}"
    "{%- elif message['role'] == 'assistant' -%}{{- '<BOT>' + message['content'] + '<END>' -}}"
    "{%- elif message['role'] == 'system' and loop.first -%}{{- '<USER>' + message['content'] -}}"
    "{{- '\n' if messages[1:] and messages[1]['role'] == 'user' else '<END>' -}}"
    "{%- else -%}"
    "{{- raise_exception('the roles are user and assistant, and system for the first message') -}}"
    "{%- endif -%}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<BOT>' -}}{%- endif -%}"
)


class Roles(NamedTuple):
    """Token ids of <USER>, <BOT> and <END>."""

    user: int
    bot: int
    end: int


def add_roles(tokenizer: "PreTrainedTokenizerBase") -> Roles:
    """Make <USER>, <BOT>, <END> special tokens, <END> the EOS, and set the chat template. Changes `tokenizer` in place.
    Padding becomes the base model's own end-of-text token, which is never <END>: a padded position must not teach the
    model to stop."""
    base_eos = tokenizer.eos_token
    tokenizer.add_special_tokens({"extra_special_tokens": [USER, BOT, END]}, replace_extra_special_tokens=False)
    if base_eos != END:  # a model that was trained here before keeps its padding
        tokenizer.pad_token = base_eos or tokenizer.unk_token or USER
    tokenizer.eos_token = END
    tokenizer.chat_template = CHAT_TEMPLATE
    return find_roles(tokenizer)


def find_roles(tokenizer: "PreTrainedTokenizerBase") -> Roles:
    """The ids of the three role tokens. Raises LookupError where the tokenizer lacks one."""
    tokens = [USER, BOT, END]
    ids: Any = tokenizer.convert_tokens_to_ids(tokens)  # not `get_vocab`, which builds a dictionary of all tokens
    missing = [
        token
        for token, number in zip(tokens, ids, strict=True)
        if number is None or tokenizer.convert_ids_to_tokens(number) != token  # an unknown one gets the unknown's id
    ]
    if missing:
        raise LookupError(f"the tokenizer has no {', '.join(missing)}")
    return Roles(*ids)


def without_roles(ids: list[int], roles: Roles) -> list[int]:
    """What a repetition penalty may fall on: the words that were said. Each turn ends with <END>; penalised, the next
    reply would find no end."""
    return [token for token in ids if token not in roles]


def never_drawn(tokenizer: "PreTrainedTokenizerBase", rows: int) -> list[int]:
    """Ids that no reply has, of an embedding with so many rows: control tokens other than <END>, and rows that no token
    stands for."""
    roles = find_roles(tokenizer)
    unknown = set(range(rows)) - set(tokenizer.get_vocab().values())
    return sorted(unknown | {*tokenizer.all_special_ids, *roles} - {roles.end})


def encode_text(tokenizer: "PreTrainedTokenizerBase", text: str) -> list[int]:
    """Text -> ids, with special tokens split: nothing in `text` can become a control token."""
    return tokenizer(text, add_special_tokens=False, split_special_tokens=True, verbose=False)["input_ids"]


def decode_text(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """Ids -> text, as it is: control tokens show."""
    return "".join(tokenizer.decode(ids, clean_up_tokenization_spaces=False))


def decode_reply(tokenizer: "PreTrainedTokenizerBase", ids: list[int]) -> str:
    """A reply as people read it: no white space around it (a model of words begins with " I"), and no half of a
    character at its end, where the limit cut it."""
    return decode_text(tokenizer, ids).removesuffix("\ufffd").strip()


def check_text(tokenizer: "PreTrainedTokenizerBase") -> None:
    """Raises ValueError where text does not survive. Without its vocabulary file a tokenizer loads all the same, and
    knows the special tokens only."""
    text = "Hello, you!"
    if (back := decode_text(tokenizer, encode_text(tokenizer, text))) != text:
        lost = f"does not give text back as it was ({text!r} becomes {back!r})"
        raise ValueError(f"its tokenizer {lost if back.strip() else 'has no vocabulary'}")


def with_persona(persona: str, message: str) -> str:
    """The person's first message, behind what the bot is told about itself; "" leaves it as it is. Of eight places the
    cheapest that works: a starter that never saw a persona found the reply that fits it among five in 22 of 25
    questions (a turn by itself 22, text before the first <USER> 21, the bot's own first turn 21)."""
    return f"{persona}\n{message}" if persona else message


def encode_turn(tokenizer: "PreTrainedTokenizerBase", role: int, text: str, end: int) -> list[int]:
    """One closed turn: [role id, text ids ..., <END> id]."""
    return [role, *encode_text(tokenizer, text), end]


def encode_dialogue(tokenizer: "PreTrainedTokenizerBase", turns: list[str]) -> list[list[int]]:
    """Turns -> one list of ids a turn; even turns are USER's, odd turns BOT's. An empty first turn becomes no ids: BOT
    opens the dialogue."""
    user, bot, end = find_roles(tokenizer)
    return [
        [] if not (text or index) else encode_turn(tokenizer, bot if index % 2 else user, text, end)
        for index, text in enumerate(turns)
    ]
