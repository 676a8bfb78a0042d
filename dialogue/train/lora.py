"""LoRA: where it attaches, what its folder holds, and how it is merged."""

import copy
from pathlib import Path
from typing import Any

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.constants import TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from dialogue.errors import UserError
from dialogue.models import CONV1D_FAMILIES, LORA_TARGETS
from dialogue.prompt import Roles


def fit_config(config: LoraConfig, model: PreTrainedModel, roles: Roles) -> LoraConfig:
    """A copy of `config` that fits `model`: its targets, and the three role tokens' rows to be trained.

    With LoRA on the projections alone the new tokens' embeddings would stay where they began; PEFT's
    `trainable_token_indices` trains just those rows, in the embedding and in a tied head alike
    (source: PEFT's documentation of LoRA, "Efficiently train tokens alongside LoRA").
    Raises UserError where neither `config` nor the tables name a module that `model` has.
    """
    fitted = copy.deepcopy(config)
    modules = dict(model.named_modules())
    leaves = {name.rpartition(".")[2] for name in modules}
    wanted: Any = config.target_modules
    if isinstance(wanted, (list, set)) and not set(wanted) <= leaves:
        family = model.config.model_type
        wanted = LORA_TARGETS.get(family) or TRANSFORMERS_MODELS_TO_LORA_TARGET_MODULES_MAPPING.get(family)
        if wanted is None or not set(wanted) <= leaves:
            raise UserError(
                f"the base model has no modules named {', '.join(sorted(config.target_modules or []))}: put some of "
                f"{', '.join(sorted(_projections(modules)))} into target_modules of lora_config"
            )
    fitted.target_modules = wanted
    fitted.fan_in_fan_out = model.config.model_type in CONV1D_FAMILIES
    ends = [model.get_input_embeddings()]
    if not model.config.tie_word_embeddings:
        ends.append(model.get_output_embeddings())
    names = [name.rpartition(".")[2] for name, module in modules.items() if any(module is end for end in ends)]
    fitted.trainable_token_indices = {name: list(roles) for name in names}
    return fitted


def _projections(modules: dict) -> set[str]:
    """Names of the layers that LoRA could attach to."""
    return {
        name.rpartition(".")[2]
        for name, module in modules.items()
        if getattr(module, "weight", None) is not None and module.weight.dim() == 2 and "." in name
    }


def attach(
    model: PreTrainedModel, config: LoraConfig, roles: Roles, changes: dict[str, Any] | None = None
) -> PeftModel:
    """`model` with trainable LoRA weights and role-token rows (float32); everything else is frozen.

    `changes` are fields that take the place of `config`'s, which itself stays as it is.
    """
    fitted = fit_config(config, model, roles)
    for name, value in (changes or {}).items():
        setattr(fitted, name, value)
    return get_peft_model(model, fitted)


def save_adapter(model: PeftModel, tokenizer: PreTrainedTokenizerBase, folder: str) -> None:
    """Write the adapter and its tokenizer: LoRA and three rows, not a copy of the embedding matrix,
    which PEFT would add by itself once the embedding has grown."""
    model.save_pretrained(folder, save_embedding_layers=False)
    tokenizer.save_pretrained(folder)


def load_adapter(model: PeftModel, folder: Path) -> None:
    """Put the adapter in `folder` in the place of `model`'s own."""
    model.load_adapter(str(folder), model.active_adapter, is_trainable=False)
