"""What the two scripts call, one module for each station that a dialogue passes through.

Importing it before the libraries keeps two of them from warning, at their own import, about what nobody can act on, and
oneDNN from hoarding.
"""

import logging
import os

# oneDNN keeps a kernel for each shape that it has multiplied, 1024 by default, and dialogues have many lengths: the
# starter's process grew by 0.5 GB in 40 steps. With fewer a step takes as long (source: oneDNN, "Primitive Cache").
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "200")

for name in (
    "bitsandbytes.backends.cpu.ops",  # a kernel for 4 bits, which nothing here uses
    "torch.distributed.elastic.multiprocessing.redirects",  # what macOS and Windows cannot do for torchrun's logs
):
    logging.getLogger(name).setLevel(logging.ERROR)
