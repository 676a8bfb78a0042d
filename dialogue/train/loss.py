"""Cross-entropy over a large vocabulary without the large logits.

GPT-2's head maps each position to 50,260 logits: for 8 x 512 tokens 0.8 GB in float32, as much again for
their gradient. Here logits exist only where a label is, and only `CHUNK` positions at a time; the
gradient is taken in the same pass. torch's own `linear_cross_entropy` (2.13) chunks too, but with three
trained token rows in the weight it must compute the gradient of the whole weight, a third more work.
"""

from contextlib import contextmanager
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn

CHUNK = 256  # positions; (256, 50260) float32 logits are 51 MB


class _ChunkedCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, rows: Tensor, weight: Tensor, row_ids: Tensor, labels: Tensor) -> Tensor:
        """(T, H), trained rows (R, H), frozen (V, H), (R,), (T,) -> summed nats, float32 scalar."""
        need_gradient = any(ctx.needs_input_grad)
        total = torch.zeros((), dtype=torch.float32, device=hidden.device)
        hidden_gradient = torch.empty_like(hidden)
        rows_gradient = torch.zeros_like(rows, dtype=torch.float32)
        typed_rows = rows.to(weight.dtype)
        for start in range(0, len(labels), CHUNK):
            part = slice(start, start + CHUNK)
            x, y = hidden[part].to(weight.dtype), labels[part]
            logits = (x @ weight.T).float()
            logits[:, row_ids] = (x @ typed_rows.T).float()
            log_probabilities = logits.log_softmax(-1)
            del logits
            total += torch.nn.functional.nll_loss(log_probabilities, y, reduction="sum")
            if not need_gradient:
                continue
            # d(-log softmax(z)[y]) / dz = softmax(z) - onehot(y)
            gradient = log_probabilities.exp_()
            gradient[torch.arange(len(y), device=y.device), y] -= 1
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
        return hidden_gradient * scale[0], rows_gradient * scale[0], None, None, None


def chunked_cross_entropy(hidden: Tensor, rows: Tensor, weight: Tensor, row_ids: Tensor, labels: Tensor) -> Tensor:
    """Nats of `labels` (B, T) under a linear head, summed over all positions that have a label.

    Position t predicts label t + 1. `hidden` (B, T, H) is the model's last hidden state; `weight` (V, H)
    is frozen, but for the rows `row_ids` (R,), whose trained values are `rows` (R, H). Float32 scalar.
    """
    targets = labels[:, 1:].reshape(-1)
    labelled = targets != -100
    return _ChunkedCrossEntropy.apply(
        hidden[:, :-1].reshape(-1, hidden.shape[-1])[labelled], rows, weight, row_ids, targets[labelled]
    )


@contextmanager
def chunked_head(model: PeftModel, adapter: str = "default"):
    """Inside, `model(**batch).loss` is computed in chunks, and `.logits` holds hidden states instead.

    The head steps aside, or where it has token rows of its own to be trained, stays and lets hidden states through.
    So these reach the loss function, and everything that wraps `model` (data parallel, checkpointing, Trainer) works
    as with any other model. Mean nats a label, or summed nats over `num_items_in_batch` where Trainer gives it.
    Yields a context manager inside which `.logits` are logits again.
    """
    lm: Any = model.get_base_model()
    head, own_loss = lm.get_output_embeddings(), lm.loss_function
    tied = lm.config.tie_word_embeddings
    tokens = (lm.get_input_embeddings() if tied else head).token_adapter

    def loss_function(logits: Tensor, labels: Tensor, num_items_in_batch: Any = None, **_: Any) -> Tensor:
        row_ids = torch.tensor(tokens.token_indices[adapter], device=logits.device)
        nats = chunked_cross_entropy(
            logits, tokens.trainable_tokens_delta[adapter], tokens.base_layer.weight, row_ids, labels
        )
        return nats / ((labels[:, 1:] != -100).sum() if num_items_in_batch is None else num_items_in_batch)

    def step_aside() -> None:
        if tied:
            lm.set_output_embeddings(nn.Identity())
        else:
            head.forward = lambda hidden: hidden

    def step_back() -> None:
        if tied:
            lm.set_output_embeddings(head)
        else:
            del head.forward

    @contextmanager
    def own_head():
        step_back()
        try:
            yield
        finally:
            step_aside()

    step_aside()
    lm.loss_function = loss_function
    try:
        yield own_head
    finally:
        step_back()
        lm.loss_function = own_loss
