"""The certificate: rounding passes, on few tokens too, and another model does not."""

import copy

import pytest
import torch
from conftest import byte_tokenizer
from peft import LoraConfig
from transformers import GPT2Config, GPT2LMHeadModel

from dialogue.data.packing import encode, to_row
from dialogue.errors import UserError
from dialogue.measure.merge import MAX_PERPLEXITY_CHANGE, certify
from dialogue.prompt import add_roles
from dialogue.train.lora import attach


@pytest.mark.parametrize("dialogues", [1, 60])
def test_rounding_passes_and_another_model_does_not(dialogues):
    tokenizer = byte_tokenizer()
    roles = add_roles(tokenizer)
    torch.manual_seed(0)
    config = GPT2Config(vocab_size=len(tokenizer), n_positions=64, n_embd=64, n_layer=2, n_head=4)
    config.initializer_range = 0.3  # far from uniform, so that rounding is seen
    lora = LoraConfig(r=4, target_modules=["c_attn", "c_proj"], task_type="CAUSAL_LM", init_lora_weights=False)
    trained = attach(GPT2LMHeadModel(config), lora, roles).eval()
    merged = copy.deepcopy(trained).merge_and_unload().bfloat16()
    other = copy.deepcopy(trained).unload()
    pieces = encode(tokenizer, [["Hi", f"No {n}."] for n in range(dialogues)], 64).pieces
    rows = [to_row(piece, "bot", roles.bot) for piece in pieces]
    certificate = certify(trained, merged, rows, tokenizer.pad_token_id, quantised=False)
    assert abs(certificate["perplexity_change"]) <= certificate["largest_perplexity_change_allowed"]
    if dialogues == 1:
        assert abs(certificate["perplexity_change"]) > MAX_PERPLEXITY_CHANGE["16-bit"], "the case that is meant"
    with pytest.raises(UserError, match="not the one that was trained"):
        certify(trained, other, rows, tokenizer.pad_token_id, quantised=False)
