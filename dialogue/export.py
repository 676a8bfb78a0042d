"""The merged model as one GGUF file, for llama.cpp and what is built on it.

    python -m dialogue.export gguf                            gpt2-dialogue-full/ -> gpt2-dialogue-full.gguf
    python -m dialogue.export gguf --model DIR --out FILE

CTranslate2, vLLM and `transformers serve` read the merged folder as it is.
"""

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dialogue.errors import Parser, UserError, exit_code, said_in_a_line
from dialogue.models import load, load_config
from dialogue.prompt import find_roles
from dialogue.storage import read_json

OTHERS = "llama.cpp's own convert_hf_to_gguf.py reads the folder as well, and knows more models"

# llama.cpp's name for a way to cut text before BPE -> the pre-tokenizer's steps in tokenizer.json.
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
PRE_TOKENIZERS = {"gpt-2": [BYTE_LEVEL], "smollm": [{"type": "Digits", "individual_digits": True}, BYTE_LEVEL]}


def write_gguf(folder: Path, target: Path) -> None:
    """Write the merged model in `folder` to `target`: matrices in float16, the rest in float32. Raises UserError for a
    folder that holds no dialogue model, or one that cannot be said in GGUF here (families other than GPT-2 and Llama,
    tokenizers other than byte-level BPE)."""
    from gguf import MODEL_ARCH, GGMLQuantizationType, GGUFWriter, get_tensor_name_map

    if not (folder / "config.json").is_file():
        raise UserError(f"no merged model in {folder}/: train one first with `python Fine_tuningmodel.py`")
    config = load_config(str(folder))
    _check_family(config)
    model, tokenizer = load(str(folder), torch.float16, torch.device("cpu"))
    beside = target.with_name(f".{target.name}.unfinished")
    writer = GGUFWriter(beside, config.model_type)
    writer.add_name(folder.resolve().name)
    _describe(writer, config)
    with said_in_a_line(target), ExitStack() as end:
        end.callback(beside.unlink, missing_ok=True)
        _add_tokenizer(writer, folder, tokenizer, config.vocab_size)
        names = get_tensor_name_map(MODEL_ARCH[config.model_type.upper()], config.num_hidden_layers)
        for name, tensor in model.state_dict().items():
            if name == "lm_head.weight" and config.tie_word_embeddings:
                continue  # llama.cpp takes the embedding where there is no head
            new = names.get_name(name, (".weight", ".bias"))
            if new is None:
                raise UserError(f"{folder} has {name}, for which GGUF has no name; {OTHERS}")
            small = tensor.dim() == 1 or new.startswith("position_embd")
            tensor = _arrange(name, tensor, config).to(torch.float32 if small else torch.float16)
            kind = GGMLQuantizationType.F32 if small else GGMLQuantizationType.F16
            writer.add_tensor(new, tensor.contiguous().numpy(), raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        beside.replace(target)


def _check_family(config: PretrainedConfig) -> None:
    """Raises UserError for what llama.cpp would compute otherwise."""
    rope = (getattr(config, "rope_parameters", None) or {}).get("rope_type")
    gpt2 = config.model_type == "gpt2" and config.activation_function == "gelu_new"
    llama = config.model_type == "llama" and config.hidden_act == "silu" and rope == "default"
    if not gpt2 and not llama:
        raise UserError(f"a {config.model_type} model of this kind cannot be written here; {OTHERS}")


def _describe(writer: Any, config: PretrainedConfig) -> None:
    """The model's numbers."""
    writer.add_file_type(1)  # mostly float16 (llama.cpp's LLAMA_FTYPE_MOSTLY_F16)
    writer.add_vocab_size(config.vocab_size)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(config.num_attention_heads)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * config.n_embd)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _arrange(name: str, tensor: torch.Tensor, config: PretrainedConfig) -> torch.Tensor:
    """Weights as llama.cpp multiplies them. GPT-2's Conv1D keeps (in, out), GGUF (out, in). Llama's rotary embedding
    turns pairs (i, i + d/2) of a head of size d in transformers, neighbours (2i, 2i + 1) in llama.cpp: the rows of q
    and k change places."""
    if config.model_type == "gpt2":
        return tensor.T if ".c_" in name and name.endswith(".weight") else tensor
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
    if heads is None:
        return tensor
    return tensor.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2)


def _add_tokenizer(writer: Any, folder: Path, tokenizer: PreTrainedTokenizerBase, rows: int) -> None:
    """Vocabulary, merges, special tokens and chat template; nothing is put before a conversation."""
    from gguf import SpecialVocab, TokenType

    shape = {"model": {"type": str}, "pre_tokenizer": dict | None, "normalizer": dict | None}
    saved = read_json(folder / "tokenizer.json", shape)
    cut = saved["pre_tokenizer"] or {}
    steps = cut.get("pretokenizers", [cut])
    pre = next((name for name, known in PRE_TOKENIZERS.items() if steps == known), None)
    if saved["model"]["type"] != "BPE" or saved["model"].get("byte_fallback") or saved["normalizer"] or not pre:
        raise UserError(f"the tokenizer of {folder} cannot be written here; {OTHERS}")
    tokens, types = [f"[unused {index}]" for index in range(rows)], [TokenType.UNUSED] * rows
    for token, index in tokenizer.get_vocab().items():
        tokens[index], types[index] = token, TokenType.NORMAL
    for index, added in tokenizer.added_tokens_decoder.items():
        types[index] = TokenType.CONTROL if added.special else TokenType.USER_DEFINED
    writer.add_tokenizer_model("gpt2")  # GGUF's name for byte-level BPE
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    special = SpecialVocab(folder, load_merges=True, n_vocab=rows)
    special.special_token_ids["eos"] = find_roles(tokenizer).end
    special.add_special_token = {"bos": False, "eos": False}
    special.add_to_gguf(writer, quiet=True)


def main(argv: list[str] | None = None) -> None:
    """Write the file, and say what to do with it."""
    parser = Parser(prog="python -m dialogue.export", description="Write the merged model as GGUF.")
    parser.add_argument("format", choices=["gguf"])
    parser.add_argument("--model", type=Path, default="gpt2-dialogue-full", metavar="DIR", help="default: %(default)s")
    parser.add_argument("--out", type=Path, metavar="FILE", help="default: beside the folder, with .gguf")
    flags = parser.parse_args(argv)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    model = flags.model if flags.model.name else flags.model.resolve()  # "." has no name
    target = flags.out or model.with_name(f"{model.name}.gguf")
    if not os.path.isdir(target.parent) or (os.path.exists(target) and not os.path.isfile(target)):
        raise UserError(f"{target} cannot be written: --out takes the name of a file in a folder that is there")
    write_gguf(flags.model, target)
    print(f"{target}: {target.stat().st_size / 1e6:.0f} MB, for llama.cpp and what is built on it")


if __name__ == "__main__":
    sys.exit(exit_code(main))
