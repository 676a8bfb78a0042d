"""What `accelerate launch` starts in tests/test_fsdp.py: Fine_tuningmodel.py, after a change to accelerate alone.

accelerate turns FSDP on for accelerators only, though torch's `fully_shard` works on a CPU with gloo as well. With
STOP_RANK in the environment, that process gets a SIGTERM when the first checkpoint is written.
"""

import os
import signal
import sys
from pathlib import Path

from accelerate.state import AcceleratorState, PartialState
from accelerate.utils import DistributedType
from transformers import Trainer

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import Fine_tuningmodel
from dialogue.errors import exit_code

plain_init, plain_save = AcceleratorState.__init__, Trainer._save_rng_state


def init(self, *args, fsdp_plugin=None, **keywords):
    """accelerate/state.py does the same for MULTI_GPU and its like."""
    plain_init(self, *args, fsdp_plugin=fsdp_plugin, **keywords)
    if self.distributed_type == DistributedType.MULTI_CPU and fsdp_plugin is not None:
        self.distributed_type = PartialState._shared_state["distributed_type"] = DistributedType.FSDP
        self.fsdp_plugin = fsdp_plugin


def save(self, folder):
    plain_save(self, folder)
    if os.environ["RANK"] == os.environ.get("STOP_RANK") and self.state.global_step == 2:
        os.kill(os.getpid(), signal.SIGTERM)


if __name__ == "__main__":
    AcceleratorState.__init__, Trainer._save_rng_state = init, save
    sys.exit(exit_code(Fine_tuningmodel.main, debug="--debug" in sys.argv))
