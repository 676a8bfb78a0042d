"""Settings of libraries that the recipe does not obey: named before the rehearsal, never passed over in silence."""

from inspect import signature
from typing import Any

from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainingArguments

from dialogue import machine
from dialogue.errors import UserError

# Fields of TrainingArguments that nothing here reads, or whose place another choice takes -> why.
REFUSED = {
    "label_smoothing_factor label_names": "the loss is plain cross-entropy",
    "fp16 bf16 fp16_full_eval bf16_full_eval": "the precision is chosen for this machine",
    "torch_compile use_liger_kernel liger_kernel_config use_cache": "the forward passes are replaced by faster ones",
    "auto_find_batch_size accelerator_config": "the rehearsal finds the batch",
    "dataloader_drop_last length_column_name": "rows are packed, and all of them learned",
    "fsdp fsdp_config deepspeed parallelism_config": "the base is not split (torchrun takes several GPUs)",
    "include_for_metrics batch_eval_metrics do_predict": "an evaluation sums the loss of replies",
    "metric_for_best_model greater_is_better save_strategy": "the adapters with the least loss are kept in any case",
    "save_only_model save_on_each_node": "checkpoints are whole, and the first process writes them",
    "ignore_data_skip restore_callback_states_from_checkpoint resume_from_checkpoint": "a run goes on exactly",
    "hub_strategy hub_always_push hub_revision": "both folders are uploaded after the run",
    "optim_target_modules": "LoRA's matrices are small; choose another optim",
    "use_cpu": "a GPU is taken where there is one (CUDA_VISIBLE_DEVICES= hides it)",
}
# Fields of the others that are obeyed, or set here in any case; the rest is refused.
LORA = (
    "r lora_alpha lora_dropout lora_bias use_rslora use_dora target_modules exclude_modules layers_to_transform "
    "layers_pattern rank_pattern alpha_pattern fan_in_fan_out peft_type peft_version"
)
QUANT = "llm_int8_threshold llm_int8_skip_modules kwargs"
# What is obeyed beside the usual value.
ALSO: dict[str, tuple] = {
    "metric_for_best_model": ("loss", "eval_loss"), "greater_is_better": (False,), "save_strategy": ("epoch", "no"),
    "task_type": ("CAUSAL_LM",), "init_lora_weights": (False, "gaussian", "orthogonal"),
}  # fmt: skip


def check_obeyable(arguments: TrainingArguments, lora: LoraConfig, quant: BitsAndBytesConfig) -> None:
    """Raises UserError for a setting that would be passed over."""
    if arguments.optim_args and arguments.optim in ("adamw_torch", "adamw_torch_fused", "adafactor"):
        raise UserError(f"optim_args cannot be obeyed: {arguments.optim.value} reads none")  # type: ignore[attr-defined]
    usual = TrainingArguments("unused", use_cpu=machine.pick_device().type == "cpu")
    asked: list[Any] = [(arguments, usual, name, why) for names, why in REFUSED.items() for name in names.split()]
    for given, plain, obeyed, why in (
        (lora, LoraConfig(), LORA, "plain LoRA, rsLoRA and DoRA are trained, and merged into the base"),
        (quant, BitsAndBytesConfig(load_in_8bit=True), QUANT, "bases have 8 bits, or by --load_in_8bit no 16"),
    ):
        others = {*signature(type(plain)).parameters} - {*obeyed.split()}
        asked += [(given, plain, name, why) for name in sorted(others)]
    for given, plain, name, why in asked:
        if (value := getattr(given, name)) not in (getattr(plain, name), *ALSO.get(name, ())):
            raise UserError(f"{name}={value!r:.100} of {type(given).__name__} cannot be obeyed: {why}")
