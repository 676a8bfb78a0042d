"""Weights as int8, in memory that a processor reads at its full speed."""

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional

from dialogue.chat.int8 import LANES, Matrix

# Bytes that are asked for at once: numpy takes huge pages from 4 MB on. What is never written costs no memory.
BLOCK = 1 << 26


class Quantiser:
    """Turns weights (out, in) and biases (out,), of any float dtype, into int8.

    A token reads every weight once, and at each new page of 4 KB the processor has to look up where it lies. In huge
    pages (2 MB) weights are read at 25 GB/s instead of 17 (the starter, two cores of an Intel Xeon). On Linux numpy
    asks for them (source: numpy's reference, "Global Configuration Options"); small matrices have to share an array.
    """

    def __init__(self) -> None:
        self.free = np.empty(0, np.int8)

    def __call__(self, weight: Tensor, bias: Tensor | None) -> Matrix:
        """The product with a weight, (n, in) -> (n, out).

        A row's largest weight sets its steps. So large columns are made smaller, and what they meet larger, by the
        root of their size: that took 40 % off the KL divergence from the float32 model (SmolLM2-135M).
        """
        # Blocks stay in the processor's cache: twice as fast. GPT-2's weights come transposed.
        (rows, columns), blocks = weight.shape, [block.contiguous() for block in weight.split(256)]
        squares = torch.stack([block.float().square().sum(0) for block in blocks]).sum(0)
        column = (squares / rows).sqrt_().clamp_(min=1e-12).sqrt_()
        padded, width = rows + -rows % 4, columns + -columns % LANES
        rounded = torch.from_numpy(self._take(padded, width)).zero_()
        scale, shift = torch.zeros(2, padded)
        for block, to, step in zip(blocks, rounded[:rows, :columns].split(256), scale[:rows].split(256), strict=True):
            w = block.float() / column
            step.copy_(w.abs().amax(1).div_(127).clamp_(min=1e-12))
            to.copy_(w.div_(step[:, None]).round_())
        shift[:rows] = 0 if bias is None else bias
        column = functional.pad(column, (0, width - columns))
        return Matrix(rounded.numpy(), scale.numpy(), column.numpy(), shift.numpy(), rows)

    def _take(self, rows: int, columns: int) -> np.ndarray:
        """Memory (rows, columns) int8."""
        size = rows * columns
        if size > len(self.free):
            self.free = np.empty(max(size, BLOCK), np.int8)
        taken, self.free = self.free[:size], self.free[size:]
        return taken.reshape(rows, columns)
