"""Parts of a training for tests: a `Run` from flags, a `Plan` for rows that are there already, models that know
some dialogues by heart or have random weights, a message and its reply."""

import torch
from peft import LoraConfig
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
)

import Fine_tuningmodel as script
from dialogue import storage
from dialogue.chat.sampling import Sampling
from dialogue.measure import merge
from dialogue.measure.likelihood import HeldOut
from dialogue.models import load_base
from dialogue.prompt import add_roles, encode_dialogue
from dialogue.train import options
from dialogue.train.lora import attach, save
from dialogue.train.memory import Fit
from dialogue.train.plan import Plan, Rehearsal, count_steps
from dialogue.train.rows import Rows
from dialogue.train.trainer import Trained, train

GREEDY = Sampling(temp=0)


# A chat as WhatsApp exports it.
CHAT = "".join(
    f"{day:02}.02.20, 16:0{minute} - {who}: {text} {day}\n"
    for day in range(1, 29)
    for minute, who, text in ((1, "Ann", "Are you there?"), (2, "Bo", "Yes, what is it?"), (3, "Ann", "Nothing much"))
)


def run_of(*flags, arguments=None, lora=None, quant=None):
    """What `Fine_tuningmodel.py` makes of flags, with edited values in place of its own."""
    names = ("base_model", "dataset", "max_train_dialogues", "max_length", "learn", "bot", "silence", "adapter_dir",
             "merged_dir", "early_stopping_patience")  # fmt: skip
    return options.resolve(
        list(flags), script.presets, lora or script.lora_config, quant or script.quant_config,
        arguments or script.training_args, **{name: getattr(script, name) for name in names},
    )  # fmt: skip


def plan_of(rows, held_out, arguments, dtype):
    """The plan of a training on packed rows as `arguments` stand, without a rehearsal."""
    fit = Fit(dtype, False, False, arguments.per_device_train_batch_size)
    whole = Rows(rows, held_out, [], 0, len(rows), [], [])
    return Plan(whole, fit, arguments, Rehearsal(1.0, 1, 0), count_steps(len(rows), arguments), 1.0, True)


def train_on(model, tokenizer, rows, held_out: HeldOut, arguments, *flags, callbacks=()) -> Trained:
    """Train a model with LoRA on packed rows."""
    run = run_of("--early_stopping_patience", "0", *flags, arguments=arguments)
    plan = plan_of(rows, held_out, arguments, model.dtype)
    return train(model, tokenizer, plan, run, {}, callbacks=callbacks)


def memorised(family, tokenizer, folder, talk):
    """(adapter folder, merged folder) of a 2-layer model that has learned `talk` by heart, so that no rounding
    in any engine changes what it would say."""
    add_roles(tokenizer)
    torch.manual_seed(0)
    if family == "gpt2":
        config = GPT2Config(vocab_size=len(tokenizer), n_positions=1024, n_embd=64, n_layer=2, n_head=4)
        model, rate = GPT2LMHeadModel(config), 4e-3
    else:
        config = LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=64, intermediate_size=96, num_hidden_layers=2,
            num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=256, tie_word_embeddings=True,
        )  # fmt: skip
        model, rate = LlamaForCausalLM(config), 1e-2
    config.eos_token_id = tokenizer.eos_token_id
    ids = [[token for turn in encode_dialogue(tokenizer, dialogue) for token in turn] for dialogue in talk]
    known = sorted({token for dialogue in ids for token in dialogue})  # the others' logits stay near zero
    model.eval()  # no dropout
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0)
    for _ in range(40):
        loss = torch.tensor(0.0)
        for dialogue in ids:
            hidden = model.base_model(torch.tensor([dialogue[:-1]]), use_cache=False).last_hidden_state[0]
            targets = torch.tensor([known.index(token) for token in dialogue[1:]])
            loss = loss + torch.nn.functional.cross_entropy(hidden @ model.lm_head.weight[known].T, targets)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    # As a run would go on from here: adapters, and the merge.
    base = load_base(str(folder / "base"), torch.float32, torch.device("cpu"), tokenizer)
    lora = LoraConfig(r=2, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM")
    save(attach(base, lora, tokenizer), tokenizer, folder / "lora")
    merge.write(str(folder / "base"), folder / "lora", tokenizer, folder / "full")
    return folder / "lora", folder / "full"


def say(talk, message, max_t=12, sampling=GREEDY):
    return "".join(talk.reply(message, max_t, sampling))


def broken_copy(merged, folder, name, change):
    """A copy of the model's folder, as if no run had written it, in which one file's bytes went through `change`; None
    removes it."""
    for file in merged.iterdir():
        if file.name in (storage.MANIFEST, storage.RUN_FILE):
            continue
        data = change(file.read_bytes()) if file.name == name else file.read_bytes()
        if data is not None:
            (folder / file.name).write_bytes(data)
    return str(folder)


CONTEXT = 80
WIDE_LLAMA = {
    "vocab_size": 300, "hidden_size": 48, "intermediate_size": 80, "num_hidden_layers": 3,
    "num_attention_heads": 6, "num_key_value_heads": 2, "max_position_embeddings": CONTEXT,
}  # fmt: skip
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 32}  # fmt: skip
CONFIGS = {
    "gpt2": GPT2Config(vocab_size=300, n_positions=CONTEXT, n_embd=48, n_layer=3, n_head=4),
    "llama, three queries a key": LlamaConfig(**WIDE_LLAMA),
    "llama, wide heads, biases": LlamaConfig(**WIDE_LLAMA, head_dim=16, attention_bias=True, mlp_bias=True),
    "llama, its own head, stretched": LlamaConfig(**WIDE_LLAMA, tie_word_embeddings=False, rope_parameters=LLAMA3),
}


def random_model(config):
    """Real architecture, random weights; biases and norms too, which start as 0 and 1."""
    torch.manual_seed(0)
    model = (GPT2LMHeadModel if config.model_type == "gpt2" else LlamaForCausalLM)(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() == 1:
                parameter.add_(torch.randn_like(parameter) * 0.3)
            elif "embed" not in name and "wte" not in name:
                parameter.mul_(3)
    return model


def tokens(count, seed=1):
    return torch.randint(0, 300, (count,), generator=torch.Generator().manual_seed(seed)).tolist()


GPT2 = {"n_positions": 128, "n_embd": 32, "n_layer": 2, "n_head": 4}
LLAMA = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def base_model(family, size, layers=2):
    torch.manual_seed(0)
    if family == "gpt2":
        return GPT2LMHeadModel(GPT2Config(vocab_size=size, **GPT2 | {"n_layer": layers}))
    if family == "llama":
        llama = LLAMA | {"num_hidden_layers": layers}
        return LlamaForCausalLM(LlamaConfig(vocab_size=size, attention_dropout=0.1, **llama))
    return MistralForCausalLM(MistralConfig(vocab_size=size, sliding_window=5, **LLAMA))


def attached(base, tokenizer, dropout=0.0, **changes):
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=dropout, target_modules=["c_attn", "c_proj"], **changes)
    config.task_type = "CAUSAL_LM"
    torch.manual_seed(1)
    model = attach(base, config, tokenizer)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(std=0.05)
    return model
