"""The decoder on a GPU: a token's forward pass and its draw are one CUDA graph, and the host never waits for a token
before it asks for the next.

What a step needs stands in tensors whose addresses stay: last token, its place, the random numbers, the tokens drawn.
So a step can be recorded once and replayed (PyTorch's documentation, "CUDA Graphs"). On a CPU the same step runs as it
stands: that is how it is tested.
"""

from collections import deque
from collections.abc import Generator
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torch.nn import functional

from dialogue.chat.decoder import Decoder
from dialogue.chat.families import Norm, Product, Weights, parts_of, weights_of
from dialogue.chat.sampling import CHAT, Sampling, candidates
from dialogue.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

AHEAD = 4  # steps that are asked for before the first of them has to be there; END makes them useless, at little cost
TIES = 64  # tokens beside the `top_k` first that may equal the last of these
BROKEN = -1  # stands for the token where the logits are not finite


class GraphDecoder(Decoder):
    """A `Decoder` with 16-bit weights on a GPU, which draws its tokens there."""

    def __init__(self, model: "PreTrainedModel", context: int) -> None:
        self.precision, self.length = str(model.dtype).removeprefix("torch."), 0
        device, dtype = model.device, model.dtype
        with torch.inference_mode():
            weights = weights_of(parts_of(model), _as_stored)
            head = _in_float32(model.get_output_embeddings().weight)
            self.weights = w = _in_dtype(weights._replace(head=head), dtype)
            self.cache = torch.zeros(len(w.layers), 2, w.heads, context, w.size, device=device, dtype=dtype)
            self.last, self.place, self.count = torch.zeros(3, 1, dtype=torch.long, device=device)
            self.noise, self.drawn = torch.zeros(context, device=device), self.last.new_zeros(context)
            vocabulary = model.get_output_embeddings().weight.shape[0]
            self.seen = torch.zeros(vocabulary, dtype=torch.bool, device=device)
            self.forbidden = torch.zeros(vocabulary, dtype=torch.bool, device=device)
        self.recorded: tuple[Any, torch.cuda.CUDAGraph] | None = None
        # Each new stream keeps memory for cuBLAS.
        self.side: Any = torch.cuda.Stream(device) if device.type == "cuda" else None

    @torch.inference_mode()
    def stream(
        self, logits: Tensor, most: int, sampling: Sampling, seen: list[int], forbidden: list[int],
        generator: torch.Generator,
    ) -> Generator[int, None, None]:  # fmt: skip
        """Up to `most` tokens, the first of them drawn from `logits` (V,); the caller stops where it likes.

        Raises UserError for logits that are not finite numbers.
        """
        for mask, ids in ((self.seen, seen), (self.forbidden, forbidden)):
            mask.zero_()
            mask[ids] = True
        self.noise[:most] = torch.rand(most, generator=generator).to(self.noise.device)
        self.count.zero_()
        self._draw(logits, sampling)
        start, replay = self.length, None
        if most > 1:
            width = min(self.cache.shape[3], 1 << max(8, (start + most - 1).bit_length()))
            replay = self._record(sampling, width)
        self.place.fill_(start)
        on_gpu = self.drawn.device.type == "cuda"
        arrived = torch.zeros(most, dtype=torch.long, pin_memory=on_gpu)
        asked: deque[tuple[int, Any]] = deque()
        for index in range(most):
            if index and replay:
                replay()
            arrived[index].copy_(self.drawn[index], non_blocking=True)
            asked.append((index, torch.cuda.current_stream().record_event() if on_gpu else None))
            if len(asked) > AHEAD:
                yield self._take(arrived, start, *asked.popleft())
        while asked:
            yield self._take(arrived, start, *asked.popleft())

    def _take(self, arrived: Tensor, start: int, index: int, event: Any) -> int:
        """The token at `index`, as soon as it is there; all before it have been read by then."""
        if event:
            event.synchronize()
        self.length = start + index
        token = int(arrived[index])
        if token == BROKEN:
            raise UserError("the model's logits are not finite numbers: its weights are broken")
        return token

    def _record(self, sampling: Sampling, width: int) -> Any:
        """The step as a function without arguments; on a GPU a graph, which is kept for the next reply."""
        if self.cache.device.type != "cuda":
            return lambda: self.step_once(sampling, width)
        if self.recorded is None or self.recorded[0] != (sampling, width):
            self.recorded = None
            state = [tensor.clone() for tensor in (self.last, self.count, self.drawn, self.seen)]
            self.side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(self.side):
                for _ in range(2):  # libraries set themselves up in their first calls, which a graph cannot hold
                    self.place.fill_(self.length)  # what this writes there, the first real step writes over
                    self.step_once(sampling, width)
            torch.cuda.current_stream().wait_stream(self.side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph):
                self.step_once(sampling, width)
            for tensor, before in zip((self.last, self.count, self.drawn, self.seen), state, strict=True):
                tensor.copy_(before)
            self.recorded = (sampling, width), graph
        return self.recorded[1].replay

    def step_once(self, sampling: Sampling, width: int) -> None:
        """Read the last token and draw the next one: nothing but operations on tensors of fixed shapes."""
        ahead = torch.arange(width, device=self.place.device)[None] > self.place
        # What attention adds; it would make that of a boolean mask anew in each layer.
        mask = self.cache.new_zeros(1, width).masked_fill(ahead, -torch.inf)
        logits = self.layers(self.last.clamp(min=0), self.place, width, mask)[0]
        self.place += 1
        self._draw(logits, sampling)

    def _draw(self, logits: Tensor, sampling: Sampling) -> None:
        """Draw with the next random number from logits (V,), and take down which token it was."""
        token = pick(logits, sampling, self.seen, self.forbidden, self.noise.index_select(0, self.count))
        self.last.copy_(token)
        self.drawn.index_copy_(0, self.count, token)
        self.seen.index_fill_(0, token.clamp(min=0), True)
        self.count += 1


def pick(logits: Tensor, sampling: Sampling, seen: Tensor, forbidden: Tensor, noise: Tensor) -> Tensor:
    """`candidates` and `draw` (`dialogue/chat/sampling.py`), fixed shapes: (V,), masks (V,), noise (1,) -> token (1,).

    The token is where the sum of the probabilities, the most probable first, passes `noise`. It is `BROKEN` where the
    logits are not finite. Of tokens that equal the last of top-k, at most `TIES` stay.
    """
    penalty, k = sampling.repetition_penalty, int(sampling.top_k)
    if penalty != 1:
        logits = torch.where(seen, torch.where(logits > 0, logits / penalty, logits * penalty), logits)
    logits = logits.masked_fill(forbidden, -torch.inf)
    values, ids = logits.topk(min(len(logits), 1 if sampling.temp == 0 else k + TIES if k else len(logits)))
    best = values[:1]  # NaN where any is NaN
    if sampling.temp > 0:
        values = values / sampling.temp
        if 0 < k < len(values):
            values = values.masked_fill(values < values[k - 1], -torch.inf)
        if sampling.top_p < 1:
            # Sums from the least probable one up, as in `candidates`; the most probable one always stays.
            up_to = values.softmax(0).flip(0).cumsum(0).flip(0)
            dropped = up_to <= 1 - sampling.top_p
            dropped[:1].fill_(False)  # `dropped[0] = False` would copy from the host, which no graph can hold
            values = values.masked_fill(dropped, -torch.inf)
        probabilities = values.softmax(0)
        if sampling.min_p:
            values = values.masked_fill(probabilities < probabilities[0] * sampling.min_p, -torch.inf)
            probabilities = values.softmax(0)
        sums = probabilities.cumsum(0)
        # Rounding can leave the last sum below 1, and noise above it.
        place = torch.searchsorted(sums, noise * sums[-1:], right=True)
        ids = ids.gather(0, torch.minimum(place, (probabilities > 0).sum() - 1).clamp(min=0))
    return torch.where(best.isfinite(), ids, BROKEN)


@torch.inference_mode()
def difference(engine: GraphDecoder, model: "PreTrainedModel") -> str | None:
    """What `engine` does otherwise than `model` in transformers' code, in a greedy reply and in one with the chat's
    defaults; None: nothing.

    In 16 bits both round: logits may differ, and that of a token that was drawn may miss what it had to reach, by a
    share of what the best one has above the mean.
    """
    most, vocabulary = min(16, engine.cache.shape[3] // 4), len(engine.seen)
    ids: list[int] = []
    read, drawn, generator = {}, [], torch.Generator().manual_seed(0)
    for sampling in (Sampling(temp=0), CHAT):  # what is recorded for these need not be when they are asked for
        ids += [(7 * at + 11) % vocabulary for at in range(min(4, most))]
        read[len(ids)] = logits = engine.step(ids[engine.length :])
        for token in engine.stream(logits, most, sampling, [], [], generator):
            drawn.append((len(ids), token, sampling))
            ids.append(token)
    read[len(ids)] = engine.step(ids[engine.length :])
    engine.reset()
    theirs = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0].float()
    theirs -= theirs.mean(-1, keepdim=True)
    slack = min(0.1, 64 * torch.finfo(model.dtype).eps) * theirs.amax(-1)
    for length, logits in read.items():
        if not (logits - logits.mean() - theirs[length - 1]).square().mean().sqrt() <= slack[length - 1]:
            return f"after {length} tokens its logits are not those of transformers"
    for length, token, sampling in drawn:
        of = theirs[length - 1]
        if not of[token] >= of[candidates(of, sampling).ids].min() - slack[length - 1]:
            return f"after {length} tokens it drew one that transformers would not draw"
    return None


def _as_stored(weight: Tensor, bias: Tensor | None) -> Product:
    """A product with the model's own weight, which stays where it is."""
    weight, bias = weight.detach(), None if bias is None else bias.detach()
    return lambda x: functional.linear(x, weight, bias)


def _in_float32(weight: Tensor) -> Product:
    """Logits with all the bits of their sums: GPT-2's lie near -100, where bfloat16's steps are 0.5."""
    weight = weight.detach().T
    if weight.is_cuda and weight.dtype != torch.float32:
        return lambda x: torch.mm(x, weight, out_dtype=torch.float32)
    return lambda x: x.float() @ weight.float()


def _in_dtype(weights: Weights, dtype: torch.dtype) -> Weights:
    """Norms and rotations in the dtype of the rest: kernels of a GPU do not take two."""

    def norm(norm: Norm) -> Norm:
        return Norm(norm.weight.to(dtype), None if norm.bias is None else norm.bias.to(dtype), norm.eps)

    layers = [layer._replace(norm_1=norm(layer.norm_1), norm_2=norm(layer.norm_2)) for layer in weights.layers]
    rotation = weights.rotation
    if rotation:
        rotation = rotation[0].to(dtype), rotation[1].to(dtype)
    return weights._replace(layers=layers, norm=norm(weights.norm), rotation=rotation)
