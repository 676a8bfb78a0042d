"""Cross-entropy over a large vocabulary without the large logits.

GPT-2's head maps each position to 50,260 logits: for 8 x 512 tokens 0.8 GB in float32, as much again for
their gradient. Here logits exist only where a label is, and only `CHUNK` positions at a time; the
gradient is taken in the same pass. torch's own `linear_cross_entropy` (2.13) chunks too, but with three
trained token rows in the weight it must compute the gradient of the whole weight, a third more work.
"""

from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn

CHUNK = 256  # positions; (256, 50260) float32 logits are 51 MB


class Head(NamedTuple):
    """The matrix that turns hidden states into logits, some of whose rows have trained values."""

    weight: Tensor  # (V, H), frozen
    rows: Tensor  # (R, H), trained: they stand for the rows `ids` of `weight`
    ids: Tensor  # (R,) int64
    mean: Tensor  # (H,) float32: the mean row of `weight`


def head_of(model: Any) -> Head:
    """The head of a causal language model, or of a PeftModel with trained token rows."""
    head = model.get_output_embeddings()
    if not isinstance(model, PeftModel):
        weight, none = head.weight, torch.empty(0, dtype=torch.long, device=head.weight.device)
        return Head(weight, weight[:0], none, weight.detach().mean(0, dtype=torch.float32))
    lm: Any = model.get_base_model()
    tokens: Any = (lm.get_input_embeddings() if lm.config.tie_word_embeddings else head).token_adapter
    weight = tokens.base_layer.weight
    ids = torch.tensor(tokens.token_indices[model.active_adapter], device=weight.device)
    trained = tokens.trainable_tokens_delta[model.active_adapter]
    return Head(weight, trained, ids, weight.detach().mean(0, dtype=torch.float32))


def hidden_states(model: Any, batch: dict[str, Tensor], mask: Tensor | None = None) -> Tensor:
    """The last hidden states (B, T, H) of a causal language model, without the logits of all positions. `mask` (B, 1,
    T, T), added to attention's scores, takes the place of a causal one within dialogues.

    From its decoder; a model that is wrapped for several processes has to be called whole, which takes a sixth longer.
    """
    inputs = {name: batch[name] for name in ("input_ids", "position_ids")}
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return model(**inputs, use_cache=False, output_hidden_states=-1, logits_to_keep=1).hidden_states[-1]
    return model.get_decoder()(**inputs, attention_mask=mask, use_cache=False).last_hidden_state


def summed_nats(model: nn.Module, batch: dict[str, Tensor], head: Head) -> Tensor:
    """Nats of the labels (B, T) of `batch`, summed: a float32 scalar with a gradient.

    Position t predicts label t + 1. `head` is `model`'s, which may be wrapped for several processes.
    """
    targets = batch["labels"][:, 1:]
    labelled = targets != -100
    return summed_cross_entropy(hidden_states(model, batch)[:, :-1][labelled], head, targets[labelled])


def mean_nats(model: nn.Module, batch: dict[str, Tensor], head: Head) -> Tensor:
    """Nats a label of `batch`: a float32 scalar with a gradient."""
    return summed_nats(model, batch, head) / (batch["labels"][:, 1:] != -100).sum()


def summed_cross_entropy(hidden: Tensor, head: Head, labels: Tensor) -> Tensor:
    """Nats of labels (N,) that hidden states (N, H) predict, summed: a float32 scalar with a gradient."""
    return _ChunkedCrossEntropy.apply(hidden, *head, labels)


def summed_divergence(hidden: Tensor, head: Head, before: Tensor, rows_before: Tensor) -> Tensor:
    """KL(before || now) in nats, summed over positions whose hidden states (N, H) are given: a float32 scalar with a
    gradient. The head's trained rows were `rows_before` (R, H)."""
    return _ChunkedCrossEntropy.apply(hidden, *head, None, before, rows_before)


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, weight: Tensor, rows: Tensor, row_ids: Tensor, mean: Tensor, labels: Tensor | None,
        before: Any = None, rows_before: Any = None,
    ) -> Tensor:  # fmt: skip
        """(N, H), frozen (V, H), trained rows (R, H), (R,), mean row (H,), (N,) -> summed nats, float32 scalar.

        With `before` (N, H) and `rows_before` (R, H) in place of labels: the KL divergence from what these would say.
        """
        need_gradient = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        rows_gradient = torch.zeros_like(rows, dtype=torch.float32)
        typed_rows = rows.to(weight.dtype)
        for start in range(0, len(hidden), CHUNK):
            part = slice(start, start + CHUNK)
            x = hidden[part].to(weight.dtype)
            log_probabilities = _log_probabilities(x, weight, typed_rows, row_ids, mean)
            if labels is not None:
                total += torch.nn.functional.nll_loss(log_probabilities, labels[part], reduction="sum")
            else:
                was = _log_probabilities(before[part].to(x.dtype), weight, rows_before.to(x.dtype), row_ids, mean)
                total += torch.nn.functional.kl_div(log_probabilities, was, reduction="sum", log_target=True)
            if not need_gradient:
                continue
            # d(-log softmax(z)[y]) / dz = softmax(z) - onehot(y); of the KL divergence it is softmax(z) - before
            gradient = log_probabilities.exp_()
            if labels is not None:
                gradient[torch.arange(len(x), device=x.device), labels[part]] -= 1
            else:
                gradient -= was.exp_()
            gradient = gradient.to(weight.dtype)
            gradient_at_rows = gradient[:, row_ids]
            rows_gradient += (gradient_at_rows.T @ x).float()
            gradient[:, row_ids] = 0
            hidden_gradient[part] = (gradient @ weight + gradient_at_rows @ typed_rows).to(hidden.dtype)
        if need_gradient:
            ctx.save_for_backward(hidden_gradient, rows_gradient.to(rows.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, *scale: Tensor) -> tuple[Tensor | None, ...]:
        hidden_gradient, rows_gradient = ctx.saved_tensors
        return hidden_gradient * scale[0], None, rows_gradient * scale[0], *[None] * 5


def _log_probabilities(x: Tensor, weight: Tensor, rows: Tensor, row_ids: Tensor, mean: Tensor) -> Tensor:
    """(N, H), (V, H), (R, H), (R,), (H,) -> (N, V) float32.

    GPT-2's logits lie near -112, where bfloat16 has steps of one half. A softmax does not see a constant, so the
    mean logit is subtracted before the product is rounded: at that offset the KL divergence from exact logits
    falls from 0.010 to 0.00001, and the product takes a tenth longer (in float32, seven times as long).
    """
    shift = -(x.float() @ mean)[:, None].to(x.dtype)
    logits = torch.addmm(shift, x, weight.T).float()
    logits[:, row_ids] = torch.addmm(shift, x, rows.T).float()
    return logits.log_softmax(-1)
