"""The merged model: one ordinary model, with a certificate that it answers as the adapter did.

One large model is in memory at a time. What the trained model makes of the certificate's dialogues is kept as hidden
states (some tens of megabytes) with its head; then it can go, and the merged one is judged against that.
"""

import math
import sys
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

from dialogue import machine, storage
from dialogue.chat.commands import fitted
from dialogue.chat.decoder import Decoder
from dialogue.chat.engine import make
from dialogue.chat.sampling import Sampling
from dialogue.data.corpus import FEW, Dialogues
from dialogue.data.packing import IGNORED, Row, collate, in_batches
from dialogue.errors import UserError
from dialogue.measure import report
from dialogue.measure.fitting import Fitted, fit
from dialogue.measure.loss import CHUNK, head_of, hidden_states
from dialogue.models import context_length, load, load_base
from dialogue.prompt import find_roles

# A merge in 16 bits rounds each weight once (2^-11 in float16), which moves perplexity by some 0.01 %;
# an int8 base differs from the 16-bit one by its own rounding as well, by up to about 1 %
# (Dettmers et al. 2022, "LLM.int8()", table 1). Beyond these something is wrong.
MAX_PERPLEXITY_CHANGE = {"int8": 0.02, "16-bit": 0.005}
MAX_KL = {"int8": 0.05, "16-bit": 0.005}  # nats a token
TOKENS = 2048  # in a forward pass, but for a dialogue that is longer
CHAT_ROWS = 15  # dialogues that the chat's engine is tried on


def write(base_model: str, adapters: Path, tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Merge `adapters` into a freshly loaded float16 base, and write a complete model to `folder`. Never into the int8
    weights that were trained against: they would be rounded a second time, and stay int8. On the CPU, so that a GPU
    that could just hold the training can still finish it."""
    machine.keep_freed_memory(False)
    machine.release_memory()  # what was trained is gone by now
    model = load_base(base_model, torch.float16, torch.device("cpu"), tokenizer)
    merged = PeftModel.from_pretrained(model, str(adapters)).merge_and_unload()
    roles = find_roles(tokenizer)
    merged.config.eos_token_id, merged.config.pad_token_id = roles.end, tokenizer.pad_token_id
    merged.config.bos_token_id = None  # a conversation opens with <USER>, and nothing comes before it
    merged.config.use_cache = True
    merged.generation_config = GenerationConfig(eos_token_id=roles.end, pad_token_id=tokenizer.pad_token_id)
    merged.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    del model, merged
    machine.release_memory()


class Witness(NamedTuple):
    """What a model makes of the certificate's dialogues, on the CPU."""

    hidden: Tensor  # (N, H): the last hidden states that predict the N reply tokens
    head: Tensor  # (V, H): the head's weight, trained rows in their places
    targets: Tensor  # (N,): the reply tokens
    rows: Tensor  # (N,): the dialogue that each of them is in


@torch.no_grad()
def witness_of(model: Any, rows: list[Row], pad: int) -> Witness:
    """Run `model` over rows of one dialogue each. LoRA is applied as it is saved, in float32."""
    model.eval()
    head, hidden, targets, places = head_of(model), [], [], []
    for part in in_batches([len(row["labels"]) for row in rows], TOKENS):
        batch = collate([rows[place] for place in part], pad)
        labels = batch["labels"][:, 1:]
        at = labels != IGNORED
        states = hidden_states(model, {name: of.to(head.weight.device) for name, of in batch.items()})
        hidden.append(states[:, :-1][at.to(states.device)].cpu())
        targets.append(labels[at])
        places.append(torch.tensor(part)[at.nonzero()[:, 0]])
    weight = head.weight.detach().cpu().clone()
    weight[head.ids.cpu()] = head.rows.detach().cpu().to(weight.dtype)
    return Witness(torch.cat(hidden), weight, torch.cat(targets), torch.cat(places))


@torch.no_grad()
def certify(trained: Witness, merged: Witness, quantised: bool, device: torch.device) -> tuple[dict[str, Any], Tensor]:
    """Compare two models on the same reply tokens: (certificate, nats (N,) of the merged one).

    Perplexity of both, mean KL(trained || merged) in nats a token, and the share of positions at which both would
    choose the same token; in float32, since the logits of GPT-2 lie near -112, where bfloat16 has steps of one half.
    Raises UserError above the thresholds.
    """
    kl, agree, tokens = 0.0, 0, len(trained.targets)
    nats, heads = torch.empty(2, tokens), [one.head.to(device, torch.float32).T for one in (trained, merged)]
    for start in range(0, tokens, CHUNK):
        part = slice(start, start + CHUNK)
        hidden = (one.hidden[part].to(device, torch.float32) for one in (trained, merged))
        first, second = ((of @ head).log_softmax(-1) for of, head in zip(hidden, heads, strict=True))
        targets = trained.targets[part, None].to(device)
        nats[0, part], nats[1, part] = (-logs.gather(1, targets)[:, 0].cpu() for logs in (first, second))
        kl += (first.exp() * (first - second)).sum().item()
        agree += int((first.argmax(-1) == second.argmax(-1)).sum())
    adapter, whole = nats.double().sum(1).tolist()
    change = math.expm1((whole - adapter) / tokens)
    kind = "int8" if quantised else "16-bit"
    # On few tokens the perplexities of two nearly equal models differ by chance: the log-ratio of their
    # probabilities has a mean of KL and, to the same order, a variance of 2 KL. Three standard errors are allowed.
    allowed = MAX_PERPLEXITY_CHANGE[kind] + 3 * math.sqrt(2 * max(kl, 0.0)) / tokens
    certificate = {
        "dialogues": (dialogues := int(trained.rows.max()) + 1),
        "rough": dialogues < FEW,
        "reply_tokens": tokens,
        "adapter_perplexity": math.exp(min(adapter / tokens, 700)),
        "merged_perplexity": math.exp(min(whole / tokens, 700)),
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
            f"(allowed {allowed:.1%}), KL {kl / tokens:.4f} (allowed {MAX_KL[kind]}); the adapters are kept, and "
            "`main.py --model` takes their folder as it is; train again with --load_in_8bit no, or --no-resume"
        )
    return certificate, nats[1]


@torch.inference_mode()
def certify_chat(merged: PreTrainedModel, rows: list[Row], nats: float, tokens: int) -> dict[str, Any]:
    """Perplexity change caused by the engine that the chat takes on this machine. `nats` is what the merged model has
    on the `tokens` reply tokens of `rows`. Empty where transformers' own code makes the replies. Compiles what the
    first chat would wait for."""
    decoder, chat = make(merged, "auto", context_length(merged.config)), 0.0
    if not isinstance(decoder, Decoder):
        return {}
    for row in rows:
        targets = torch.tensor(row["labels"][1:])
        at = targets != IGNORED
        decoder.reset()
        logits = decoder.read(row["input_ids"][:-1], len(targets)).cpu()[at].float()
        chat += torch.nn.functional.cross_entropy(logits, targets[at], reduction="sum").item()
    decoder.step([rows[0]["input_ids"][0]])
    return {"chat_precision": decoder.precision, "chat_perplexity_change": math.expm1((chat - nats) / tokens)}


def judge(
    trained: Witness, folder: Path, rows: list[Row], validation: Dialogues, pad: int, dtype: torch.dtype,
    device: torch.device, quantised: bool, seed: int, told: Callable[[str, float], Any] = lambda *_: None,
    known: Sampling | None = None,
) -> tuple[dict[str, Any], Fitted]:  # fmt: skip
    """Load the merged model from `folder`: its certificate, and the sampler's settings fitted on `validation`. On the
    CPU where `device` has too little memory. `told` hears which stage begins, and how far it is. Raises UserError where
    it is not the model that was trained."""
    try:
        told("certificate: the merged model", 0)
        model, tokenizer = load(str(folder), dtype, device)
        found = witness_of(model, rows, pad)
        certificate, nats = certify(trained, found, quantised, device)
        told("certificate: the chat", 0)
        few = found.rows < CHAT_ROWS
        certificate |= certify_chat(model, rows[:CHAT_ROWS], nats[few].double().sum().item(), int(few.sum()))
        machine.release_memory()  # the chat's engine
        return certificate, fit(model, tokenizer, validation, seed, told=told, known=known)
    except Exception as error:
        if device.type == "cpu" or not machine.is_out_of_memory(error):
            raise
    print("the GPU has too little memory for the merged model: it is certified on the CPU", file=sys.stderr)
    machine.release_memory()
    cpu = torch.device("cpu")
    return judge(trained, folder, rows, validation, pad, machine.pick_dtype(cpu), cpu, quantised, seed, told, known)


def finish(folder: Path, adapters: Path, certificate: dict[str, Any], fitted: Fitted) -> None:
    """Certificate, sampler, run.json and model card of the merged model in `folder`."""
    run = storage.read_json(adapters / storage.RUN_FILE, {"facts": dict, "settings": dict})
    metrics = storage.read_json(adapters / "metrics.json", report.METRICS)
    write_sampler(folder, fitted.sampling, fitted.max_t)
    storage.write_json(folder / "certificate.json", certificate)
    storage.write_json(folder / storage.RUN_FILE, run)
    report.write_card(folder, run, metrics, fitted)


def write_sampler(folder: Path, sampling: Sampling, max_t: int) -> None:
    """Put the settings into the merged model's `generation_config.json`, which other engines go by."""
    config = GenerationConfig.from_pretrained(folder)
    drawn = {"temperature": sampling.temp, "top_k": sampling.top_k, "top_p": sampling.top_p} if sampling.temp else {}
    penalty = sampling.repetition_penalty  # the only one that transformers lets stand beside greedy choices
    config.update(do_sample=bool(drawn), **drawn, repetition_penalty=penalty, max_new_tokens=max_t)
    config.save_pretrained(folder)


def known_sampler(folder: Path) -> Sampling | None:
    """The settings that were fitted to the merged model in `folder`; None where there are none to be had."""
    with suppress(UserError):
        return read_sampler(folder)
    return None


def read_sampler(folder: Path) -> Sampling:
    """The settings that `write_sampler` wrote. Raises UserError where there are none."""
    settings = {name: value for name, value in fitted(folder).items() if name != "max_t"}
    if not settings:
        raise UserError(f"{folder} has no fitted sampler in its generation_config.json")
    return Sampling(**settings)
