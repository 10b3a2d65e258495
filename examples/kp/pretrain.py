"""Make the tiny base model of this example: its tokenizer and a small Llama, pretrained on general text from a fixed seed.

    python examples/kp/pretrain.py --out examples/kp/base

The tokenizer also sees the KP books and questions, so that their words are few tokens; the model does not. Loading the
result needs nothing of this folder: it is an ordinary Llama checkpoint with the Llama 3 chat template.
"""

from __future__ import annotations

import argparse
import math
import random
import shutil
import time
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import torch
from general_text import Document, documents
from generate import QUESTIONS_SEED, all_rows
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

HERE = Path(__file__).parent
SEED = 20260101
VOCABULARY = 2048
CONTEXT = 1024
BATCH_TOKENS = 2048
BLOCK_LENGTHS = (128, 256, 128, 256, 128, 256, 128, 1024)
"""Lengths of the training blocks, in turn: mostly short, and every eighth batch at the full context length."""
PEAK_LEARNING_RATE = 3e-3
ECHO_SHARE = 0.25
"""How many documents are followed by an echo of random tokens."""

BOS, EOS, HEADER, HEADER_END, EOT, PAD = (
    "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|finetune_right_pad_id|>",
)  # fmt: skip
SPECIAL_TOKENS = [BOS, EOS, HEADER, HEADER_END, EOT, PAD, "<|eom_id|>", "<|python_tag|>"]
WORD_PATTERN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
"""How Llama 3 splits text before byte pairs are merged."""
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% set content = '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' + message['content'] | trim + '<|eot_id|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}"
    "{{ content }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
"""The chat template of Llama 3."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=HERE / "base", help="folder that is replaced by the new model")
    parser.add_argument("--steps", type=int, default=2000, help=f"optimizer steps of {BATCH_TOKENS} tokens")
    parser.add_argument("--threads", type=int, default=2)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    tokenizer = make_tokenizer()
    model = make_model(tokenizer)
    train(model, tokenizer, steps=arguments.steps)
    save(model, tokenizer, arguments.out)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer with Llama 3's splitting, special tokens and chat template."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(WORD_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=SPECIAL_TOKENS,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    core.train_from_iterator(_tokenizer_text(), trainer)
    core.post_processor = processors.Sequence(
        [
            processors.ByteLevel(trim_offsets=False),
            processors.TemplateProcessing(single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, core.token_to_id(BOS))]),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        bos_token=BOS,
        eos_token=EOT,
        pad_token=PAD,
        chat_template=CHAT_TEMPLATE,
        model_max_length=CONTEXT,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )


def make_model(tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """An untrained Llama of about 2.4 million parameters, the same weights for the same seed."""
    torch.manual_seed(SEED)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=4,
        num_attention_heads=3,
        num_key_value_heads=1,
        head_dim=64,
        max_position_embeddings=CONTEXT,
        rope_theta=10000.0,
        rms_norm_eps=1e-5,
        tie_word_embeddings=False,
        bos_token_id=tokenizer.convert_tokens_to_ids(BOS),
        eos_token_id=[tokenizer.convert_tokens_to_ids(token) for token in (EOS, EOT)],
        pad_token_id=tokenizer.convert_tokens_to_ids(PAD),
        initializer_range=0.04,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config)


def train(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, *, steps: int) -> None:
    """Ordinary next-token training; prints a line every 25 steps."""
    matrices = [weight for weight in model.parameters() if weight.dim() > 1]
    vectors = [weight for weight in model.parameters() if weight.dim() == 1]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}], lr=0.0, betas=(0.9, 0.95)
    )
    tokens = _token_stream(tokenizer)
    began = time.monotonic()
    for step in range(steps):
        length = BLOCK_LENGTHS[step % len(BLOCK_LENGTHS)]
        batch = torch.tensor(list(islice(tokens, BATCH_TOKENS))).view(-1, length)
        for group in optimizer.param_groups:
            group["lr"] = PEAK_LEARNING_RATE * _schedule(step, steps=steps)
        loss = model(input_ids=batch, labels=batch).loss
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 25 == 0 or step == steps - 1:
            rate = (step + 1) * BATCH_TOKENS / (time.monotonic() - began)
            print(f"step {step + 1}/{steps}  loss {loss.item():.3f}  {rate:.0f} tokens/s", flush=True)


def save(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, out: Path) -> None:
    """Write the checkpoint in float16 aside and put it in the place of ``out``."""
    aside = out.with_name(out.name + ".new")
    shutil.rmtree(aside, ignore_errors=True)
    model.config.use_cache = True
    model.generation_config = GenerationConfig(
        bos_token_id=model.config.bos_token_id,
        eos_token_id=model.config.eos_token_id,
        pad_token_id=model.config.pad_token_id,
        do_sample=False,
    )
    model.to(torch.float16).save_pretrained(aside)
    tokenizer.save_pretrained(aside)
    shutil.rmtree(out, ignore_errors=True)
    aside.rename(out)
    print(f"{out}: {sum(file.stat().st_size for file in out.rglob('*') if file.is_file()) / 1e6:.1f} MB")


def render(tokenizer: PreTrainedTokenizerFast, document: Document) -> list[int]:
    """Token ids of a document: plain text between begin and end of text, a conversation through the chat template."""
    if isinstance(document, str):
        return [*tokenizer(document)["input_ids"], tokenizer.convert_tokens_to_ids(EOS)]
    text = tokenizer.apply_chat_template(document, tokenize=False)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def _token_stream(tokenizer: PreTrainedTokenizerFast) -> Iterator[int]:
    rng = random.Random(SEED)
    for document in documents(SEED):
        yield from render(tokenizer, document)
        if rng.random() < ECHO_SHARE:
            yield from _echo(tokenizer, rng)


def _echo(tokenizer: PreTrainedTokenizerFast, rng: random.Random) -> list[int]:
    """Random tokens, said two or three times: every entry of the vocabulary is met, and copying is learnt for all of them."""
    said = [rng.randrange(len(SPECIAL_TOKENS), len(tokenizer)) for _ in range(rng.randint(3, 24))]
    begin, end = tokenizer.convert_tokens_to_ids([BOS, EOS])
    return [begin, *said * rng.randint(2, 3), end]


def _schedule(step: int, *, steps: int) -> float:
    """Share of the peak learning rate: 5 % linear warm-up, then a cosine to a twentieth."""
    warmup = max(1, steps // 20)
    if step < warmup:
        return (step + 1) / warmup
    return 0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def _tokenizer_text() -> Iterator[str]:
    for document in islice(documents(SEED + 1), 3000):
        yield document if isinstance(document, str) else "\n".join(turn["content"] for turn in document)
    for row in all_rows(QUESTIONS_SEED):
        yield "\n".join(turn["content"] for turn in row["messages"])
    for book in sorted((HERE / "books").glob("*.txt")):
        yield from [book.read_text(encoding="utf-8")] * 4


if __name__ == "__main__":
    main()
