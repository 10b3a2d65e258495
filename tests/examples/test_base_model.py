"""The tiny base model that is shipped: size, architecture, tokenizer and chat template."""

from __future__ import annotations

import json

import pytest
from generate import HERE, QUESTIONS_SEED, all_rows

BASE = HERE / "base"


@pytest.fixture(scope="module")
def tokenizer():
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(BASE), local_files_only=True)


@pytest.fixture(scope="module")
def model():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(str(BASE), local_files_only=True).float().eval()


def test_folder_is_below_ten_megabytes_and_holds_only_a_checkpoint():
    files = {path.name: path.stat().st_size for path in BASE.iterdir()}
    assert sum(files.values()) < 10_000_000
    assert set(files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
    }  # fmt: skip


def test_it_is_a_llama():
    config = json.loads((BASE / "config.json").read_text(encoding="utf-8"))
    assert config["architectures"] == ["LlamaForCausalLM"]
    assert config["dtype"] == "float16"
    assert config["max_position_embeddings"] >= 1024
    assert config["hidden_size"] % 64 == 0
    assert config["head_dim"] >= 32
    assert config["num_attention_heads"] % config["num_key_value_heads"] == 0


def test_chat_template_is_that_of_llama_3(tokenizer):
    turns = [{"role": "system", "content": " Be brief. "}, {"role": "user", "content": "Who rules Aries?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\nWho rules Aries?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    )
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    assert ids.count(tokenizer.bos_token_id) == 1
    assert ids.count(tokenizer.convert_tokens_to_ids("<|eot_id|>")) == 2


def test_generation_stops_at_the_end_of_a_turn(tokenizer):
    config = json.loads((BASE / "generation_config.json").read_text(encoding="utf-8"))
    assert tokenizer.convert_tokens_to_ids("<|eot_id|>") in config["eos_token_id"]
    assert config["pad_token_id"] == tokenizer.pad_token_id
    assert tokenizer.pad_token_id not in config["eos_token_id"]


def test_tokenizer_gives_every_text_back(tokenizer):
    for text in ("26°40' Aries to 10°00' Taurus", "Ketu ki dasha kitne saal ki hoti hai?", "naïve — नमस्ते 🙂\n\n  two"):
        ids = tokenizer(text)["input_ids"]
        assert ids[0] == tokenizer.bos_token_id
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_rows_are_short_and_fit_the_recipe(tokenizer):
    lengths = [len(tokenizer.apply_chat_template(row["messages"])["input_ids"]) for row in all_rows(QUESTIONS_SEED)]
    assert sum(lengths) / len(lengths) < 110
    assert max(lengths) <= 1024


def test_model_has_learnt_language_but_no_kp(tokenizer, model):
    """General text is far likelier than chance; a question on KP is not answered."""
    import torch
    from general_text import documents
    from pretrain import SEED, render

    stream = documents(SEED + 7)
    losses = []
    with torch.no_grad():
        for _ in range(12):
            ids = torch.tensor([render(tokenizer, next(stream))[:512]])
            losses.append(model(input_ids=ids, labels=ids).loss.item())
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": "Who is the star lord of Punarvasu?"}], tokenize=False, add_generation_prompt=True
        )
        ids = tokenizer(prompt, add_special_tokens=False, return_tensors="pt")["input_ids"]
        output = model.generate(input_ids=ids, max_new_tokens=24)
    assert sum(losses) / len(losses) < 2.0
    assert "Answer:" not in tokenizer.decode(output[0, ids.shape[1] :])
