"""Any causal language model of transformers as an engine: what `dialogue/chat/decoder.py` does not know."""

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel


class TransformersEngine:
    """What `Decoder` does for one sequence, with any causal language model of transformers."""

    def __init__(self, model: PreTrainedModel) -> None:
        self.model = model.eval()
        self.precision = str(model.dtype).removeprefix("torch.")
        self.length = 0
        self.reset()

    @torch.inference_mode()
    def step(self, ids: list[int]) -> Tensor:
        """Read one or more new tokens; logits (V,) float32 after the last of them."""
        new = torch.tensor([ids], device=self.model.device)
        try:
            output = self.model(input_ids=new, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
            self.length += len(ids)
        except BaseException:  # Ctrl-C as well: some layers have read the tokens, some have not
            self.reset()
            raise
        return output.logits[0, -1].float()

    def truncate(self, length: int) -> None:
        """Forget what follows the first `length` tokens; everything, where the cache cannot be cut."""
        if length >= self.length:
            return
        try:
            self.cache.crop(length - self.length)  # negative: so many from the end
            self.length = length
        except (RuntimeError, ValueError):  # a sliding window or a recurrent state cannot be cut
            self.reset()
        except KeyboardInterrupt:  # some layers are cut, some are not
            self.reset()
            raise

    def reset(self) -> None:
        """Forget everything."""
        self.cache = DynamicCache(config=self.model.config)
        self.length = 0
