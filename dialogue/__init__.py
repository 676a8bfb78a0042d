"""What the two scripts call. Imported before the libraries, it keeps these from warnings that nobody can act on, oneDNN
from hoarding, and torch from using GPUs that nobody asked it to use."""

import logging
import os
import sys

__version__ = "0.2.0"

try:
    os.getcwd()
except OSError as error:  # torch would end the process in words of its own
    print(f"error: the working directory cannot be used ({error.strerror}): change into another", file=sys.stderr)
    sys.exit(2)

# Of several GPUs only torchrun uses more than the first. Without it Trainer would put as many micro-batches into one
# as it sees GPUs (`TrainingArguments.n_gpu`), which is neither what was rehearsed nor what was asked for.
given_gpus = os.environ.get("CUDA_VISIBLE_DEVICES")
if "LOCAL_RANK" not in os.environ:
    os.environ["CUDA_VISIBLE_DEVICES"] = ("0" if given_gpus is None else given_gpus).split(",")[0]
# Keys and values grow with each token of a reply; blocks of fixed sizes would leave holes.
if sys.platform == "linux" and "PYTORCH_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

# oneDNN keeps a kernel for each shape that it has multiplied, 1024 by default, and dialogues have many lengths: the
# starter's process grew by 0.5 GB in 40 steps. With 200 a step takes as long; with 50 GPT-2 124M takes 5 % longer, and
# has its peak after 30 steps at 2.4 GB, not 2.7 (source: oneDNN's documentation, "Primitive Cache").
os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "200")

for name in (
    "bitsandbytes.backends.cpu.ops",  # a kernel for 4 bits, which nothing here uses
    "torch.distributed.elastic.multiprocessing.redirects",  # what macOS and Windows cannot do for torchrun's logs
):
    logging.getLogger(name).setLevel(logging.ERROR)
