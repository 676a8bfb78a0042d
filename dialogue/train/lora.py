"""LoRA: where it attaches, what is trained, and what its folder holds."""

import copy
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from dialogue import models
from dialogue.errors import UserError
from dialogue.prompt import Roles, find_roles


def fit_config(config: LoraConfig, model: PreTrainedModel, roles: Roles) -> LoraConfig:
    """A copy of `config` that fits `model`: its targets, and the three role tokens' rows to be trained.

    PEFT's `trainable_token_indices` trains just those rows, in the embedding and in a tied head alike (source: PEFT's
    documentation of LoRA, "Efficiently train tokens alongside LoRA"). Raises UserError where neither `config` nor the
    tables name a module that `model` has.
    """
    fitted = copy.deepcopy(config)
    modules = dict(model.named_modules())
    leaves = {name.rpartition(".")[2] for name in modules}
    wanted: Any = config.target_modules
    if isinstance(wanted, (list, set)) and not set(wanted) <= leaves:
        family = model.config.model_type
        wanted = models.LORA_TARGETS.get(family) or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(family)
        if wanted is None or not set(wanted) <= leaves:
            weights = {name: getattr(module, "weight", None) for name, module in modules.items() if "." in name}
            able = {name.rpartition(".")[2] for name, of in weights.items() if of is not None and of.dim() == 2}
            raise UserError(
                f"the base model has no modules named {', '.join(sorted(config.target_modules or []))}: put some of "
                f"{', '.join(sorted(able))} into target_modules of lora_config"
            )
    fitted.target_modules = wanted
    fitted.fan_in_fan_out = model.config.model_type in models.CONV1D_FAMILIES
    ends = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        ends.append(model.get_output_embeddings())
    names = [name.rpartition(".")[2] for name, module in modules.items() if any(module is end for end in ends)]
    fitted.trainable_token_indices = {name: list(roles) for name in names}
    return fitted


def attach(model: PreTrainedModel, config: LoraConfig, tokenizer: PreTrainedTokenizerBase) -> PeftModel:
    """`model` with trainable LoRA weights and role-token rows (float32); everything else is frozen."""
    try:
        return get_peft_model(model, fit_config(config, model, find_roles(tokenizer)))
    except (ValueError, TypeError, ImportError) as error:  # PEFT refuses what cannot go together
        raise UserError(f"lora_config: {' '.join(str(error).split())[:200]}") from error


def count_trained(config: PretrainedConfig, lora: LoraConfig, tokenizer: PreTrainedTokenizerBase) -> int:
    """Parameters that will be trained on a model that `config` describes; without memory for the model. The random
    state stays as it is."""
    model = models.without_weights(config)
    with torch.random.fork_rng(devices=[]):
        if len(tokenizer) > config.vocab_size:
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        return attach(model, lora, tokenizer).num_parameters(only_trainable=True)


def trained_weights(model: Any) -> dict[str, Tensor]:
    """Copies on the CPU of all parameters that are trained, under their names in `model`."""
    return {name: p.detach().cpu().clone() for name, p in model.named_parameters() if p.requires_grad}


def save(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Write the adapter and its tokenizer: LoRA and three rows, not a copy of the embedding matrix,
    which PEFT would add by itself once the embedding has grown."""
    model.save_pretrained(str(folder), save_embedding_layers=False)
    tokenizer.save_pretrained(folder)


def load(model: PeftModel, folder: Path) -> None:
    """Put the adapter in `folder` in the place of `model`'s own."""
    model.load_adapter(str(folder), model.active_adapter, is_trainable=True)
