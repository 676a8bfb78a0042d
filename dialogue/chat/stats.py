"""What a reply cost."""

from typing import NamedTuple


class Stats(NamedTuple):
    """One reply in numbers."""

    prompt_tokens: int  # that had to be read for it; what the cache held is not among them
    new_tokens: int  # <END> is not among them
    first_token_seconds: float
    tokens_per_second: float  # after the first one
    precision: str
    candidates: int = 1  # that it was chosen from; while they are drawn, `new_tokens` are those of all

    @property
    def seconds(self) -> float:
        """The whole wait. The chosen one of several candidates comes all at once."""
        streamed = self.tokens_per_second if self.candidates == 1 else 0.0
        return self.first_token_seconds + ((self.new_tokens - 1) / streamed if streamed else 0.0)
