"""Parts of a training for tests: a `Run` from flags, a `Plan` for rows that are there already, models that know
some dialogues by heart."""

import torch
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import Fine_tuningmodel as script
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
