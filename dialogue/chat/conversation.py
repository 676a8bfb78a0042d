"""A conversation with a model: what was said, what is forgotten, the reply as a stream of text."""

import time
from collections.abc import Generator
from dataclasses import replace
from typing import Any

import torch

from dialogue.chat import drafts, rerank
from dialogue.chat.engine import Model
from dialogue.chat.history import ROLES, Messages, check_messages
from dialogue.chat.sampling import Explained, Sampling, explain
from dialogue.errors import UserError
from dialogue.plaintext import plain, stable
from dialogue.prompt import decode_reply, decode_text, encode_turn, with_persona, without_roles


def check(max_t: int, best_of: int = 0, **values: Any) -> Sampling:
    """The sampling that `values` name. Raises UserError for a value out of range."""
    if not isinstance(max_t, int) or max_t < 1:
        raise UserError(f"max_t must be a whole number above 0, not {max_t}")
    if not isinstance(best_of, int) or not 0 <= best_of <= 64:
        raise UserError(f"best_of must be a whole number from 0 to 64, not {best_of}")
    return Sampling(**values)


class Conversation:
    """Turns so far. The model's cache outlives a turn, so that a turn costs its own new tokens only."""

    def __init__(self, model: Model, seed: int | None = None, persona: str = "") -> None:
        self.model, self.tokenizer, self.roles, self.limit = model, model.tokenizer, model.roles, model.limit
        self.persona = persona.strip()  # what the bot is told about itself, before the first message
        self.turns: list[list[int]] = []  # closed turns of ids: USER's, BOT's, USER's, ...
        self.cut: list[list[int]] | None = None  # `turns`, where the last answer ended before its <END>
        self.forgotten = 0  # turns that left the context for the last reply
        self.sampling: Sampling | None = None  # of the last reply
        self.stats = ""  # of the last reply: tokens, time and precision in a line
        self._choice: tuple[Any, list[rerank.Candidate]] = None, []  # turns, and the candidates for the last of them
        self.generator = torch.Generator()
        try:
            self.generator.seed() if seed is None else self.generator.manual_seed(seed)
        except (RuntimeError, ValueError, OverflowError) as error:
            raise UserError(f"seed must be a whole number of at most 64 bits, not {seed}") from error

    @property
    def used(self) -> int:
        """Tokens of the conversation so far."""
        return len(self._read(self.turns))

    def reply(self, message: str, max_t: int, sampling: Sampling, best_of: int = 1) -> Generator[str, None, None]:
        """Say `message`, and yield the answer piece by piece; whole characters, no control sequences.

        With `best_of` above 1 (0: `Model.quick_candidates`) the answer that fits best of so many is given
        (`dialogue/chat/rerank.py`), after an empty piece with each token. At temperature 0 one is drawn. Stops at
        <END>, after `max_t` tokens, at the end of the context, or when the caller closes the iterator; what was said
        until then is kept. Conversations in other threads wait for the model. Raises UserError for a message that is
        too long and logits that are no numbers. Where nothing was said, all is as it was before.
        """
        turn, spent = self._turn(0, message), len(self._turn(0, with_persona(self.persona, ""))) - 2
        free = self.limit - len(turn) - spent - 2  # <BOT> and <END> of the answer
        if free < 1:
            fit = max(0, self.limit - 5 - spent)
            raise UserError(f"the message has {len(turn) - 2} tokens, {fit} fit: make it shorter")
        kept = self._newest(free - min(max_t, free // 2))
        said: list[int] = []
        ranked: list[rerank.Candidate] = []
        self.stats, self.forgotten = "", 0
        prompt = [*self._read([*kept, turn]), self.roles.bot]
        most, count = min(max_t, self.limit - 1 - len(prompt)), best_of or self.model.quick_candidates
        try:
            with self.model.alone():
                if count > 1 and sampling.temp > 0:
                    earlier = [message, *(decode_reply(self.tokenizer, each[1:-1]) for each in kept)]
                    ranked = yield from self._best(prompt, earlier, most, sampling, count)
                    said += [*ranked[0].tokens, *([] if ranked[0].fault == "cut" else [self.roles.end])]
                    yield plain(ranked[0].text)
                else:
                    yield from self._stream(prompt, said, most, sampling)
        finally:
            if said:
                self.forgotten = len(self.turns) - len(kept)
                self._close([*kept, turn], said)
                self._choice = self.turns, ranked
                self.sampling = replace(sampling, temp=ranked[0].temp) if ranked else sampling

    def go_on(self, max_t: int, sampling: Sampling) -> Generator[str, None, None]:
        """Yield up to `max_t` tokens more of an answer that ended before its <END>, as `reply` does."""
        if self.cut is not self.turns:
            raise UserError("the last reply is whole: there is nothing to go on with")
        if (room := self.limit - self.used) < 1:
            raise UserError("the context is full: /reset begins a new conversation")
        *before, answer = self.turns
        said, self.stats = answer[1:-1], ""
        try:
            with self.model.alone():
                yield from self._stream([*self._read(before), self.roles.bot], said, min(max_t, room), sampling)
        finally:
            self._close(before, said)
            self._choice, self.sampling = (None, []), sampling

    def _close(self, turns: list[list[int]], said: list[int]) -> None:
        """Let the answer follow `turns`, at one stroke: Ctrl-C may come at any time. Without an <END>, which `said` may
        have, it was cut."""
        whole = said[-1:] == [self.roles.end]
        self.turns = [*turns, [self.roles.bot, *said, *([] if whole else [self.roles.end])]]
        self.cut = None if whole else self.turns

    def _stream(self, prompt: list[int], said: list[int], most: int, sampling: Sampling) -> Generator[str, None, None]:
        """Yield text while `said`, with what there is of the reply already, fills with its ids up to <END>."""
        start, before, words = time.perf_counter(), len(said), said
        shown = plain(decode_reply(self.tokenizer, said)).strip()
        for token in self.model.tokens(prompt + said, most, sampling, self.generator):
            said.append(token)
            words = said[: len(said) - (token == self.roles.end)]
            self._count(len(words) - before, start)
            if token == self.roles.end:
                break
            # All of it is decoded each time: a token alone may be half of a character.
            text = stable(decode_text(self.tokenizer, words)).strip()
            if len(text) > len(shown) and text.startswith(shown):
                yield text[len(shown) :]
                shown = text
        if rest := plain(decode_reply(self.tokenizer, words)).strip()[len(shown) :]:
            yield rest

    def _count(self, tokens: int, start: float, drawn: int = 0, of: str = "") -> None:
        """Say what so many tokens `of` candidates cost, also while they are made; `drawn` were drawn for them."""
        seconds = time.perf_counter() - start
        rate = (drawn or tokens) / seconds
        self.stats = f"{tokens} tokens{of}, {seconds:.1f} s, {rate:.0f} tokens/s, {self.model.engine.precision}"

    def _best(
        self, prompt: list[int], said: list[str], most: int, sampling: Sampling, count: int
    ) -> Generator[str, None, list[rerank.Candidate]]:
        """Candidates for the answer, the best first; yields an empty piece with each token that is drawn."""
        start, drawn, written = time.perf_counter(), 0, list[drafts.Draft]()
        temps = [0.0] + [sampling.temp * rerank.COOLER] * (count - 1)
        samplings = [replace(sampling, temp=temp) for temp in temps]
        for written in drafts.write(self.model, prompt, most, samplings, self.generator):
            drawn = sum(len(draft.tokens) for draft in written)
            self._count(drawn, start, of=f" of {count} candidates")
            yield ""
        nothing = [*self._turn(0, rerank.NOTHING), self.roles.bot]
        ranked = drafts.ranked(self.model, prompt, written, said, nothing)
        self._count(len(ranked[0].tokens), start, drawn, f", the best of {count}")
        return ranked

    @property
    def candidates(self) -> list[rerank.Candidate]:
        """What the last answer was chosen from, the best first; none where it was drawn alone."""
        return self._choice[1] if self._choice[0] is self.turns else []

    def take(self, number: int) -> str:
        """Put candidate `number`, from 1, in the place of the last answer; its text. Raises UserError without one."""
        ranked = self.candidates
        if not 1 <= number <= len(ranked):
            raise UserError(f"the last reply has {len(ranked) or 'no'} candidates" + ", from 1" * bool(ranked))
        chosen = ranked[number - 1]
        self.turns = [*self.turns[:-1], [self.roles.bot, *chosen.tokens, self.roles.end]]
        self.cut = self.turns if chosen.fault == "cut" else None
        self._choice = self.turns, ranked
        self.sampling = replace(self.sampling or Sampling(), temp=chosen.temp)
        return plain(chosen.text)

    def _newest(self, room: int) -> list[list[int]]:
        """The turns, or where they exceed `room` tokens the newest of them; a message goes with its answer.

        Then a quarter of `room` is left free: the rest is read again once, and not at every turn from now on.
        """
        sizes, oldest = list(map(len, self.turns)), 0
        while sum(sizes) > room and sum(sizes[oldest:]) > room * 3 // 4:
            oldest += 2
        return self.turns[oldest:]

    def why(self, sampling: Sampling) -> list[Explained]:
        """How each token of the last answer, and the <END> after it, came to be drawn.

        The answer is read once more: nothing needs to be kept while it is made. `sampling` stands in where
        the conversation was loaded from a file.
        """
        if not self.turns:
            return []
        answer, ids = self.turns[-1], self._read(self.turns)
        ids = ids[: len(ids) - len(answer) + 1]
        spoken = without_roles(ids, self.model.roles)
        explained, sampling = [], self.sampling or sampling
        with self.model.alone():
            for token in answer[1:]:
                explained.append(explain(self.model.logits(ids), token, sampling, spoken, self.model.forbidden))
                ids.append(token)
                spoken.append(token)
        return explained

    def undo(self) -> str | None:
        """Take the last message and its answer back; returns the message, None where there is none."""
        if not self.turns:
            return None
        message = self.text(len(self.turns) - 2)
        self.turns = self.turns[:-2]
        return message

    def text(self, turn: int) -> str:
        """A turn's text without its role token and <END>."""
        return (decode_reply if turn % 2 else decode_text)(self.tokenizer, self.turns[turn][1:-1])

    def context(self) -> str:
        """Exactly what the model has been told, control tokens included."""
        return decode_text(self.tokenizer, self._read(self.turns))

    def messages(self) -> Messages:
        """The conversation in the shape of chat messages."""
        texts = [decode_text(self.tokenizer, turn[1:-1]) for turn in self.turns]
        turns = [{"role": ROLES[index % 2], "content": text} for index, text in enumerate(texts)]
        return [{"role": "system", "content": self.persona}] * bool(self.persona) + turns

    def restore(self, messages: Any) -> None:
        """Take over a conversation of that shape; of one that is too long, the newest turns.

        Raises UserError for any other shape, and changes nothing then.
        """
        self.persona, messages = check_messages(messages)
        self.turns = [self._turn(index, message["content"]) for index, message in enumerate(messages)]
        kept = self._newest(self.limit)
        self.turns, self.forgotten, self.sampling = kept, len(messages) - len(kept), None

    def replace(self, text: str) -> None:
        """Let the last answer be `text`."""
        self.turns = [*self.turns[:-1], self._turn(1, text)]

    def _read(self, turns: list[list[int]]) -> list[int]:
        """`turns` as the model reads them: the first message stands behind the persona."""
        if self.persona and turns:
            first = decode_text(self.tokenizer, turns[0][1:-1])
            turns = [self._turn(0, with_persona(self.persona, first)), *turns[1:]]
        return [token for turn in turns for token in turn]

    def _turn(self, index: int, text: str) -> list[int]:
        """A closed turn of ids. Half a character that came in becomes a "?"."""
        whole = text.encode("utf-8", "replace").decode("utf-8")
        role = self.roles.bot if index % 2 else self.roles.user
        return encode_turn(self.tokenizer, role, whole, self.roles.end)
