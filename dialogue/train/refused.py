"""Settings of libraries that the recipe does not obey: named before the rehearsal, never passed over in silence."""

from peft import LoraConfig
from transformers import BitsAndBytesConfig, TrainingArguments

from dialogue import machine
from dialogue.errors import UserError

# Why -> fields that nothing here reads, or whose place another choice takes.
REFUSED: dict[str, dict[str, str]] = {
    "training arguments": {
        "the loss is plain cross-entropy": "label_smoothing_factor label_names",
        "the precision is chosen for this machine": "fp16 bf16 fp16_full_eval bf16_full_eval",
        "the forward passes are replaced by faster ones":
            "torch_compile use_liger_kernel liger_kernel_config use_cache",
        "the rehearsal finds the batch, of whole dialogues":
            "auto_find_batch_size dataloader_drop_last accelerator_config length_column_name",
        "the base is not split (torchrun takes several GPUs)": "fsdp fsdp_config deepspeed parallelism_config",
        "an evaluation sums the loss of replies, by which the best adapters are kept":
            "include_for_metrics batch_eval_metrics do_predict metric_for_best_model greater_is_better save_strategy",
        "checkpoints are whole, and a run that was stopped goes on exactly":
            "save_only_model save_on_each_node ignore_data_skip restore_callback_states_from_checkpoint",
        "both folders are uploaded after the run": "hub_strategy hub_always_push hub_revision",
        "LoRA's matrices are small; choose another optim": "optim_target_modules",
        "a GPU is taken where there is one (CUDA_VISIBLE_DEVICES= hides it)": "use_cpu",
    },
    "lora_config": {
        "only LoRA and three token rows are trained":
            "modules_to_save trainable_token_indices inference_mode target_parameters ensure_weight_tying task_type",
        "biases are frozen; take lora_bias=True, or bias='none'": "bias",
        "it changes the base model, into which the adapters could not be merged": "init_lora_weights layer_replication",
        "--base_model says it": "base_model_name_or_path revision auto_mapping",
        "LoRA, rsLoRA and DoRA are what there is":
            "loftq_config eva_config corda_config lora_ga_config velora_config alora_invocation_tokens use_qalora "
            "qalora_group_size monteclora_config runtime_config use_bdlora arrow_config kasa_config megatron_config "
            "megatron_core",
    },
    "quant_config": {
        "bases are held in 8 bits, or with --load_in_8bit no in 16; take load_in_8bit=True":
            "load_in_4bit load_in_8bit llm_int8_has_fp16_weight llm_int8_enable_fp32_cpu_offload "
            "bnb_4bit_compute_dtype bnb_4bit_quant_type bnb_4bit_use_double_quant bnb_4bit_quant_storage",
    },
}  # fmt: skip
# What is obeyed beside the usual value.
ALSO: dict[str, tuple] = {
    "metric_for_best_model": ("loss", "eval_loss"), "greater_is_better": (False,), "save_strategy": ("epoch", "no"),
    "task_type": ("CAUSAL_LM",), "init_lora_weights": (False, "gaussian", "orthogonal"),
}  # fmt: skip


def check_obeyable(arguments: TrainingArguments, lora: LoraConfig, quant: BitsAndBytesConfig) -> None:
    """Raises UserError for a setting that would be passed over."""
    usual = TrainingArguments("unused", use_cpu=machine.pick_device().type == "cpu")
    if arguments.optim_args and arguments.optim in ("adamw_torch", "adamw_torch_fused", "adafactor"):
        raise UserError(f"optim_args cannot be obeyed: {arguments.optim.value} reads none")  # type: ignore[attr-defined]
    both = ((arguments, usual), (lora, LoraConfig()), (quant, BitsAndBytesConfig(load_in_8bit=True)))
    for (where, reasons), (given, plain) in zip(REFUSED.items(), both, strict=True):
        for why, names in reasons.items():
            for name in names.split():
                value = getattr(given, name)
                if value not in (getattr(plain, name), *ALSO.get(name, ())):
                    raise UserError(f"{name}={value!r:.100} in {where} cannot be obeyed: {why}")
