"""The folders in other people's hands: the same greedy reply as `main.py --temp 0`, from each of them.

Peers that are not installed are skipped; `requirements-peers.txt` has them.
"""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from pathlib import Path

import pexpect
import pytest
import torch
from conftest import byte_tokenizer, gpt2_tokenizer
from gguf import GGUFReader, TokenType
from helpers import memorised
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    pipeline,
)

import main as chat
from dialogue.errors import exit_code
from dialogue.export import main as export
from dialogue.prompt import encode_dialogue

CPU = torch.device("cpu")
TALK = [
    ["Hello, how are you?", "I'm fine, thank you.", "And your 2 cats?", "They sleep all day."],
    ["What time is it?", "It's noon."],
    ["Are you hungry?", "Yes, very!", "Let's eat.", "Naïve café, 你好!"],
]
ASKED = [TALK[0][0], TALK[1][0], TALK[2][0]]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """(adapter folder, merged folder) of a GPT-2 with the real tokenizer."""
    return memorised("gpt2", gpt2_tokenizer(), tmp_path_factory.mktemp("gpt2"), TALK)


@pytest.fixture(scope="module")
def merged(folders):
    return folders[1]


def ours(folder, message):
    """What `main.py --temp 0 --max_t 16` answers."""
    return chat.generate_text(message, 16, 0.0, conversation=chat.start_conversation(str(folder), "float32"))


def user(message):
    return [{"role": "user", "content": message}]


def test_main_says_what_was_learned(merged):
    assert [ours(merged, message) for message in ASKED] == [dialogue[1] for dialogue in TALK]


def test_transformers_pipeline(merged):
    generator = pipeline("text-generation", str(merged), device="cpu")
    for message in ASKED:
        answer = generator(user(message), max_new_tokens=16, do_sample=False)
        assert answer[0]["generated_text"][-1] == {"role": "assistant", "content": ours(merged, message)}


def test_peft_loads_the_adapter_folder(folders):
    adapters, merged = folders
    tokenizer = AutoTokenizer.from_pretrained(adapters)
    prompt = tokenizer.apply_chat_template(user(ASKED[0]), add_generation_prompt=True, return_tensors="pt")
    base = AutoModelForCausalLM.from_pretrained(adapters.parent / "base")
    for model in (AutoPeftModelForCausalLM.from_pretrained(adapters), PeftModel.from_pretrained(base, adapters)):
        output = model.generate(**prompt, max_new_tokens=16, do_sample=False, eos_token_id=tokenizer.eos_token_id)
        reply = tokenizer.decode(output[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert reply == ours(merged, ASKED[0])


def test_ctranslate2(merged, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    ctranslate2.converters.TransformersConverter(str(merged)).convert(str(tmp_path / "ct2"))
    generator = ctranslate2.Generator(str(tmp_path / "ct2"), device="cpu")
    tokenizer = AutoTokenizer.from_pretrained(merged)
    for message in ASKED:
        text = tokenizer.apply_chat_template(user(message), add_generation_prompt=True, tokenize=False)
        tokens = tokenizer.convert_ids_to_tokens(tokenizer(text, add_special_tokens=False)["input_ids"])
        result = generator.generate_batch([tokens], max_length=16, end_token="<END>", include_prompt_in_result=False)
        assert tokenizer.decode(result[0].sequences_ids[0], skip_special_tokens=True) == ours(merged, message)


# ---- GGUF --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["gpt2", "llama"])
def small(request, tmp_path_factory):
    """(merged folder, its GGUF) of each family, with 260 tokens, since gguf's reader takes 50 us a token."""
    _, folder = memorised(request.param, byte_tokenizer(), tmp_path_factory.mktemp(request.param), TALK)
    export(["gguf", "--model", str(folder)])
    return folder, folder.with_name("full.gguf")


def test_gguf_holds_the_same_model(small):
    """transformers reads the file back, and computes the same logits."""
    folder, gguf = small
    again = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32).eval()
    ids = torch.tensor([[t for turn in encode_dialogue(AutoTokenizer.from_pretrained(folder), TALK[2]) for t in turn]])
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()(ids).logits
    torch.testing.assert_close(again(ids).logits, expected, rtol=1e-4, atol=1e-4)


def test_gguf_says_what_ends_a_reply_and_adds_nothing(small):
    folder, gguf = small
    tokenizer = AutoTokenizer.from_pretrained(folder)
    fields = {name.removeprefix("tokenizer."): field.contents() for name, field in GGUFReader(gguf).fields.items()}
    assert fields["ggml.eos_token_id"] == tokenizer.eos_token_id
    assert fields["ggml.padding_token_id"] == tokenizer.pad_token_id
    assert fields["ggml.add_bos_token"] is False
    assert fields["chat_template"] == tokenizer.chat_template
    assert {fields["ggml.token_type"][i] for i in tokenizer.all_special_ids} == {TokenType.CONTROL}
    assert fields["ggml.tokens"][-3:] == ["<USER>", "<BOT>", "<END>"]


@pytest.mark.parametrize("family", ["gpt2", "llama"])
def test_llama_cpp(family, request, tmp_path):
    llama_cpp = pytest.importorskip("llama_cpp")
    folder = request.getfixturevalue("merged") if family == "gpt2" else memorised(family, gpt2_tokenizer(), tmp_path)[1]
    export(["gguf", "--model", str(folder), "--out", str(tmp_path / "model.gguf")])
    engine = llama_cpp.Llama(str(tmp_path / "model.gguf"), n_ctx=128, n_threads=1, verbose=False)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    for message in ASKED:
        text = tokenizer.apply_chat_template(user(message), add_generation_prompt=True, tokenize=False)
        ids = engine.tokenize(text.encode(), add_bos=True, special=True)
        assert ids == tokenizer(text)["input_ids"], "llama.cpp cuts the text otherwise, or adds to it"
        answer = engine.create_chat_completion(user(message), temperature=0.0, max_tokens=16)["choices"][0]
        assert answer["message"]["content"] == ours(folder, message)
        assert answer["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"activation_function": "relu", "hidden_act": "relu"}, "cannot be written here"),
        (
            {"model_type": "gpt_neox", "num_hidden_layers": 1, "hidden_size": 8, "intermediate_size": 8}
            | {"num_attention_heads": 2, "vocab_size": 50},
            "convert_hf_to_gguf.py",
        ),
        ({"model_type": "nobody-knows"}, "cannot be loaded"),
        (None, "train one first"),
    ],
)
def test_what_gguf_cannot_say_is_refused_in_one_line(change, said, merged, tmp_path, capsys):
    folder = tmp_path / "model"
    if change:
        shutil.copytree(merged, folder)
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | change))
    assert exit_code(lambda: export(["gguf", "--model", str(folder)])) == 2
    assert said in capsys.readouterr().err
    assert not list(tmp_path.glob("*.gguf*")) and not list(tmp_path.glob(".*"))


# ---- `transformers serve` and `transformers chat` -----------------------------------------------------


@pytest.fixture(scope="module")
def served(merged):
    """Address of a real server on loopback."""
    for name in ("openai", "fastapi", "uvicorn"):
        pytest.importorskip(name)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    log = (merged.parent / "log").open("w")
    command = [transformers_command(), "serve", str(merged), "--host", "127.0.0.1", "--port", str(port)]
    command += ["--device", "cpu", "--dtype", "float32", "--enable-cors"]
    server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        address = f"http://127.0.0.1:{port}"
        wait_for(f"{address}/health", server)
        yield address
    finally:
        server.terminate()
        server.wait(30)
        log.close()


def transformers_command():
    return str(Path(sys.executable).with_name("transformers"))


def wait_for(url, server):
    while server.poll() is None:
        try:
            urllib.request.urlopen(url, timeout=5).close()
            return
        except OSError:
            time.sleep(0.2)
    pytest.fail(f"the server ended with code {server.returncode}")


def test_transformers_serve_with_the_openai_client(served, merged):
    import openai

    client = openai.OpenAI(base_url=f"{served}/v1", api_key="none")
    for message in ASKED:
        stream = client.chat.completions.create(
            model=str(merged), messages=user(message), stream=True, temperature=0.0, max_tokens=16
        )
        pieces = [chunk.choices[0].delta.content or "" for chunk in stream if chunk.choices]
        assert "".join(pieces) == ours(merged, message)
        assert len([piece for piece in pieces if piece]) > 1, "it came in one piece"


def test_a_page_of_another_origin_may_ask_the_server(served):
    asked = urllib.request.Request(f"{served}/health", headers={"Origin": "http://page.example"})
    with urllib.request.urlopen(asked, timeout=30) as answer:
        assert answer.headers["Access-Control-Allow-Origin"] in ("*", "http://page.example")


def test_transformers_chat(served, merged, tmp_path):
    arguments = ["chat", str(merged), served, "max_new_tokens=16", "do_sample=False", "--user", "me"]
    environment = {**os.environ, "COLUMNS": "200", "TERM": "dumb", "HF_HUB_OFFLINE": "0"}
    terminal = pexpect.spawn(
        transformers_command(), arguments, env=environment, cwd=tmp_path, encoding="utf-8", timeout=120
    )
    terminal.expect("<me>:")
    terminal.sendline(ASKED[0])
    terminal.expect("<me>:")
    said = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", terminal.before)
    assert ours(merged, ASKED[0]) in said
    terminal.sendline("!exit")
    terminal.expect(pexpect.EOF)
    terminal.close()
    assert terminal.exitstatus == 0
