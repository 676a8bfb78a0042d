"""What the two scripts call, one module for each station that a dialogue passes through.

Importing it before the libraries keeps two of them from warning, at their own import, about what nobody can act on.
"""

import logging

for name in (
    "bitsandbytes.backends.cpu.ops",  # a kernel for 4 bits, which nothing here uses
    "torch.distributed.elastic.multiprocessing.redirects",  # what macOS and Windows cannot do for torchrun's logs
):
    logging.getLogger(name).setLevel(logging.ERROR)
