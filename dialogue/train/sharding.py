"""A base model split over several processes with FSDP, where accelerate's configuration file asks for it.

Split before the first forward pass, not by Trainer: rehearsal and plan then measure what training will take, and no GPU
ever holds the whole model. Trainer finds it split and leaves it so (accelerate's `fsdp2_prepare_model`). All processes
have to take part in each forward pass, and in `whole`.
"""

import os
import warnings
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor, nn

from dialogue.errors import UserError
from dialogue.train import memory


def asked(load_in_8bit: str = "auto") -> bool:
    """Whether `accelerate launch` was told to split the model. Raises UserError for what does not go with that."""
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or not dist.is_initialized():
        return False
    if load_in_8bit == "yes":
        raise UserError("FSDP cannot split weights in 8 bits: add --load_in_8bit no")
    if os.environ.get("FSDP_VERSION") != "2":
        raise UserError("FSDP: set fsdp_version: 2 in accelerate's configuration file, as in examples/fsdp.yaml")
    if os.environ.get("FSDP_ACTIVATION_CHECKPOINTING", "false").lower() == "true":
        raise UserError("FSDP: set fsdp_activation_checkpointing: false, and add --activation_checkpointing True")
    # With it all processes but the first would load weights without values.
    os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] = "false"
    return True


def split(model: PeftModel) -> None:
    """Leave a share of each parameter in this process, on its device, in place.

    Blocks are gathered one at a time. Embeddings, last norm and head are the root's, and whole for all of its passes:
    the loss in chunks reads the head's weight without calling the head. Between passes parameters are always shares.
    """
    from accelerate import FullyShardedDataParallelPlugin
    from accelerate.utils.fsdp_utils import fsdp2_prepare_auto_wrap_policy
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    plugin: Any = FullyShardedDataParallelPlugin()  # from the environment that `accelerate launch` made of its file
    plugin.set_auto_wrap_policy(model)
    is_block = fsdp2_prepare_auto_wrap_policy(plugin, model) or (lambda module: False)
    options = {
        "mp_policy": plugin.mixed_precision_policy or MixedPrecisionPolicy(),
        "offload_policy": plugin.cpu_offload,
        "shard_placement_fn": _placement,
    }
    for module in list(model.modules()):
        if is_block(module):
            fully_shard(module, reshard_after_forward=plugin.reshard_after_forward, **options)
    fully_shard(model, reshard_after_forward=True, **options)
    # Of writing into the logits, which are a view here; nobody does.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    # For Trainer's own plugin: it would look for blocks under the name of their class, which `fully_shard` has changed.
    os.environ["FSDP_AUTO_WRAP_POLICY"] = "NO_WRAP"


def _placement(parameter: nn.Parameter) -> Any:
    """Along the longer side where that is even: of three token rows the fourth process would get none, and accelerate
    takes two parameters without elements for one."""
    from torch.distributed.tensor import Shard

    wide = parameter.dim() == 2 and parameter.shape[1] > parameter.shape[0]
    return Shard(1) if wide and parameter.shape[1] % dist.get_world_size() == 0 else None


def join(model: PeftModel, load: Callable[[torch.device], PeftModel], device: torch.device) -> PeftModel:
    """In the first process, which has the rest to do alone, an ordinary model with what was trained.

    `load` makes one of the base model. On `device` if two of them fit there, since the merge compares two; else on the
    CPU. The other processes get `model` back.
    """
    weights = trained(model)
    if dist.get_rank():
        return model
    ordinary = load(device if 5 * model.num_parameters() < memory.free(device) else torch.device("cpu"))
    ordinary.load_state_dict(weights, strict=False)
    return ordinary


def whole(tensor: Tensor) -> Tensor:
    """The tensor itself, or one put together from the shares of all processes, each of which has to call this."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def trained(model: Any) -> dict[str, Tensor]:
    """What is trained, whole and on the CPU, under its names in `model`."""
    return {name: whole(p.detach()).cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def put(parameter: Any, value: Tensor) -> None:
    """Write the whole `value` into `parameter`, or this process's share of it."""
    if hasattr(parameter, "full_tensor"):
        from torch.distributed.tensor import distribute_tensor

        value = value.to(parameter.device)
        value = distribute_tensor(value, parameter.device_mesh, parameter.placements, src_data_rank=None)
    parameter.copy_(value)
