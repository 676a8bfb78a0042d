"""The merged model: one ordinary model, with a certificate that it answers as the adapter did."""

import math
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch.nn import functional
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dialogue import machine, storage
from dialogue.chat import kernels
from dialogue.chat.decoder import Decoder, supported
from dialogue.chat.sampling import Sampling
from dialogue.data.corpus import Dialogues
from dialogue.data.packing import IGNORED, Row, collate
from dialogue.errors import UserError
from dialogue.measure import report
from dialogue.measure.fitting import fit
from dialogue.models import context_length, load_base
from dialogue.prompt import find_roles

# A merge in 16 bits rounds each weight once (2^-11 in float16), which moves perplexity by some 0.01 %;
# an int8 base differs from the 16-bit one by its own rounding as well, by up to about 1 %
# (Dettmers et al. 2022, "LLM.int8()", table 1). Beyond these something is wrong.
MAX_PERPLEXITY_CHANGE = {"int8": 0.02, "16-bit": 0.005}
MAX_KL = {"int8": 0.05, "16-bit": 0.005}  # nats a token


def merge(base_model: str, adapter: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Merge `adapter` into a freshly loaded float16 base, and write a complete model to `folder`.

    Never into the int8 weights that were trained against: they would be rounded a second time, and stay
    int8. On the CPU, so that a GPU that could just hold the training can still finish it.
    """
    model = load_base(base_model, torch.float16, torch.device("cpu"), tokenizer)
    merged = PeftModel.from_pretrained(model, str(adapter)).merge_and_unload()
    roles = find_roles(tokenizer)
    merged.config.eos_token_id, merged.config.pad_token_id = roles.end, tokenizer.pad_token_id
    merged.config.bos_token_id = None  # a conversation opens with <USER>, and nothing comes before it
    merged.config.use_cache = True
    merged.generation_config = GenerationConfig(eos_token_id=roles.end, pad_token_id=tokenizer.pad_token_id)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model, merged
    machine.release_memory()


def write_merged(
    trained: PeftModel, dtype: torch.dtype, adapters: Path, merged: Path, tokenizer: PreTrainedTokenizerBase,
    rows: list[Row], validation: Dialogues,
) -> dict[str, Any]:  # fmt: skip
    """Write the folder `merged`, compare it with `trained` on `rows`, and return the certificate.

    `dtype` is what is computed in. The sampler's settings are fitted on `validation`. What else is said of the run
    stands beside the adapters. Raises UserError, and leaves nothing, where they differ or the disk is full.
    """
    run, metrics = (storage.read_json(adapters / name) for name in (storage.RUN_FILE, "metrics.json"))
    storage.check_space({merged: merged_bytes(trained)})
    with storage.whole_folder(merged) as folder:
        merge(run["facts"]["base model"], adapters, tokenizer, folder)
        reloaded = load_merged(folder, dtype, trained.device)
        certificate = certify(trained, reloaded, rows, tokenizer.pad_token_id, run["decided"]["load_in_8bit"])
        certificate |= certify_chat(reloaded, rows[:30])
        fitted = fit(reloaded, tokenizer, validation, run["settings"]["seed"])
        write_sampler(folder, fitted.sampling, fitted.max_t)
        storage.write_json(folder / "certificate.json", certificate)
        storage.write_json(folder / storage.RUN_FILE, run)
        report.write_card(folder, run, metrics, fitted)
    return certificate


@torch.inference_mode()
def certify_chat(merged: PreTrainedModel, rows: list[Row]) -> dict[str, Any]:
    """What the precision that `main.py` takes by itself on this machine's CPU does to the perplexity of reply tokens.

    Empty where transformers' own code makes the replies. It also compiles what the first chat would wait for.
    """
    if merged.device.type != "cpu" or not supported(merged.config):
        return {}
    decoder = Decoder(merged, kernels.fastest(), context_length(merged.config))
    nats, tokens = {"chat": 0.0, "merged": 0.0}, 0
    for row in rows:
        ids, targets = row["input_ids"][:-1], torch.tensor(row["labels"][1:])
        at = targets != IGNORED
        decoder.reset()
        logits = {"chat": decoder.read(ids, len(ids)), "merged": merged(torch.tensor([ids]), use_cache=False).logits[0]}
        for name, of in logits.items():
            nats[name] += functional.cross_entropy(of[at].float(), targets[at], reduction="sum").item()
        tokens += int(at.sum())
    decoder.step([rows[0]["input_ids"][0]])
    change = math.expm1((nats["chat"] - nats["merged"]) / tokens)
    return {"chat_precision": decoder.precision, "chat_perplexity_change": change}


def merged_bytes(model: PreTrainedModel | PeftModel) -> int:
    """Disk for `model` merged: two bytes a parameter, and its tokenizer."""
    return int(2.05 * model.num_parameters()) + 20_000_000


def write_sampler(folder: Path, sampling: Sampling, max_t: int) -> None:
    """Put the settings into the merged model's `generation_config.json`, which other engines go by."""
    config = GenerationConfig.from_pretrained(folder)
    config.update(
        do_sample=sampling.temp > 0, temperature=sampling.temp, top_k=sampling.top_k, top_p=sampling.top_p,
        repetition_penalty=sampling.repetition_penalty, max_new_tokens=max_t,
    )  # fmt: skip
    config.save_pretrained(folder)


def read_sampler(folder: Path) -> Sampling:
    """The settings that `write_sampler` wrote. Raises UserError where there are none."""
    try:
        config = GenerationConfig.from_pretrained(folder, local_files_only=True)
        return Sampling(config.temperature, config.top_k, config.top_p, 0.0, config.repetition_penalty)
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} has no fitted sampler in its generation_config.json") from error


def load_merged(folder: Path, dtype: torch.dtype, device: torch.device) -> PreTrainedModel:
    """The merged model as anyone would load it."""
    options: dict[str, Any] = {"dtype": dtype, "device_map": {"": device}, "use_safetensors": True}
    return AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=False, **options).eval()


@torch.no_grad()
def certify(trained: PeftModel, merged: PreTrainedModel, rows: list[Row], pad: int, quantised: bool) -> dict[str, Any]:
    """Compare the model that was trained with the merged one on rows of one dialogue each.

    Perplexity of both on reply tokens, mean KL(trained || merged) in nats a token, and the share of
    positions at which both would choose the same token. Raises UserError above the thresholds.
    """
    trained.eval()
    nats = {"adapter": 0.0, "merged": 0.0}
    kl, agree, tokens = 0.0, 0, 0
    for row in rows:
        batch = collate([row], pad)
        targets = batch["labels"][0, 1:].to(merged.device)
        at = targets != IGNORED
        logs = []
        for name, model in (("adapter", trained), ("merged", merged)):
            ids, positions = batch["input_ids"].to(model.device), batch["position_ids"].to(model.device)
            logits = model(input_ids=ids, position_ids=positions, use_cache=False).logits[0, :-1][at]
            logs.append(logits.float().log_softmax(-1))
            nats[name] -= logs[-1].gather(1, targets[at][:, None]).sum().item()
        kl += (logs[0].exp() * (logs[0] - logs[1])).sum().item()
        agree += int((logs[0].argmax(-1) == logs[1].argmax(-1)).sum())
        tokens += int(at.sum())
    change = math.expm1((nats["merged"] - nats["adapter"]) / tokens)
    kind = "int8" if quantised else "16-bit"
    # On few tokens the perplexities of two nearly equal models differ by chance: the log-ratio of their
    # probabilities has a mean of KL and, to the same order, a variance of 2 KL. Three standard errors are allowed.
    allowed = MAX_PERPLEXITY_CHANGE[kind] + 3 * math.sqrt(2 * max(kl, 0.0)) / tokens
    certificate = {
        "dialogues": len(rows),
        "reply_tokens": tokens,
        "adapter_perplexity": math.exp(min(nats["adapter"] / tokens, 700)),
        "merged_perplexity": math.exp(min(nats["merged"] / tokens, 700)),
        "perplexity_change": change,
        "kl_nats_per_token": kl / tokens,
        "greedy_agreement": agree / tokens,
        "trained_against": kind,
        "largest_perplexity_change_allowed": allowed,
        "largest_kl_allowed": MAX_KL[kind],
    }
    if not (abs(change) <= allowed and kl / tokens <= MAX_KL[kind]):
        raise UserError(
            "the merged model is not the one that was trained, and was not kept: perplexity "
            f"{certificate['adapter_perplexity']:.3f} -> {certificate['merged_perplexity']:.3f} "
            f"(allowed {allowed:.1%}), KL {kl / tokens:.4f} (allowed {MAX_KL[kind]}); "
            "the adapters are kept"
        )
    return certificate
