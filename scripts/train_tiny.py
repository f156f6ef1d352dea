#!/usr/bin/env python3
# SPDX-License-Identifier: Apache-2.0
"""Train `tiny`, the model that ships with the package.

A byte-level grouped-query Llama learns the documentation strings of the Python
standard library, a text that every Python installation has. Nothing is
downloaded. The shipped weights come from these two commands, about an hour on four CPU cores:

    python3 scripts/train_tiny.py --out dualblade/data/tiny
    python3 scripts/train_tiny.py --out dualblade/data/tiny --start dualblade/data/tiny \
        --phases 4096:2:1 --steps 300 --lr 1e-3 --seed 1
"""

from __future__ import annotations

import argparse
import ast
import inspect
import math
import sysconfig
import time
from collections.abc import Callable
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

SKIP = {"test", "tests", "idlelib", "lib2to3", "site-packages", "encodings", "turtledemo"}
# (sequence length, sequences a step, share of the steps): long contexts last, where they cost most
PHASES = "512:16:0.8 2048:4:0.2"
SPECIAL = ["<pad>", "<bos>", "<eos>"]


def doc_strings(root: Path) -> list[str]:
    """Every documentation string below `root`, cleaned, without duplicates."""
    found: dict[str, None] = {}
    for path in sorted(root.rglob("*.py")):
        if SKIP & set(path.relative_to(root).parts):
            continue
        try:
            tree = ast.parse(path.read_text(encoding="utf-8"))
        except (SyntaxError, UnicodeDecodeError):
            continue
        for node in ast.walk(tree):
            if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
                text = ast.get_docstring(node)
                if text and len(text) >= 40 and text.isascii():
                    found.setdefault(text)
    return list(found)


def topics() -> list[str]:
    """The language reference that `pydoc` carries, itself a module of documentation strings."""
    from pydoc_data.topics import topics as texts

    return [inspect.cleandoc(text) for text in texts.values() if text.isascii()]


def corpus() -> list[str]:
    return topics() + doc_strings(Path(sysconfig.get_paths()["stdlib"]))


def byte_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte: a BPE without merges, so it needs no training and no unknown token."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(SPECIAL + alphabet)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, pad_token="<pad>", bos_token="<bos>", eos_token="<eos>", padding_side="left"
    )


def tiny_config(vocab_size: int) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=192,
        intermediate_size=512,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=8192,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
        tie_word_embeddings=True,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )


def encode(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> torch.Tensor:
    ids: list[int] = []
    for row in tokenizer(texts)["input_ids"]:
        ids += [tokenizer.bos_token_id, *row, tokenizer.eos_token_id]
    return torch.tensor(ids)


def batches(tokens: torch.Tensor, length: int, count: int, generator: torch.Generator) -> torch.Tensor:
    starts = torch.randint(0, len(tokens) - length, (count,), generator=generator)
    return torch.stack([tokens[s : s + length] for s in starts.tolist()])


def learning_rate(step: int, steps: int, peak: float) -> float:
    warm = min(1.0, (step + 1) / 60)
    return peak * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * step / steps)))


def schedule(phases: str, steps: int) -> list[tuple[int, int, int]]:
    """(last step, sequence length, sequences a step) of each phase."""
    bounds, done = [], 0.0
    for phase in phases.split():
        length, count, share = phase.split(":")
        done += float(share)
        bounds.append((round(done * steps), int(length), int(count)))
    return bounds


def train(
    model: LlamaForCausalLM,
    tokens: torch.Tensor,
    options: argparse.Namespace,
    save: Callable[[], None],
) -> None:
    steps, peak = options.steps, options.lr
    generator = torch.Generator().manual_seed(options.seed)
    optimiser = torch.optim.AdamW(model.parameters(), lr=peak, betas=(0.9, 0.95), weight_decay=0.05)
    bounds = schedule(options.phases, steps)
    started = time.monotonic()
    for step in range(steps):
        length, count = next((length, count) for end, length, count in bounds if step < end)
        for group in optimiser.param_groups:
            group["lr"] = learning_rate(step, steps, peak)
        rows = batches(tokens, length, count, generator)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            loss = model(input_ids=rows, labels=rows, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        if step % 25 == 0:
            spent = time.monotonic() - started
            print(f"step {step}/{steps}  {length} tokens  loss {loss.item():.3f}  {spent:.0f} s", flush=True)
        if step and step % 250 == 0:
            save()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--out", type=Path, default=Path("dualblade/data/tiny"))
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--phases", default=PHASES, help="length:sequences:share of the steps, ...")
    parser.add_argument("--start", type=Path, help="go on from this folder's weights")
    options = parser.parse_args()

    torch.manual_seed(options.seed)
    tokenizer = byte_tokenizer()
    tokens = encode(tokenizer, corpus())
    model = LlamaForCausalLM(tiny_config(len(tokenizer)))
    if options.start:
        model.load_state_dict(
            LlamaForCausalLM.from_pretrained(options.start, dtype=torch.float32).state_dict()
        )
    print(f"{len(tokens):,} bytes of text, {model.num_parameters():,} parameters", flush=True)

    def save() -> None:
        weights = LlamaForCausalLM(model.config)
        weights.bfloat16()
        weights.load_state_dict(model.state_dict())
        weights.config.dtype = torch.bfloat16
        weights.save_pretrained(options.out)
        tokenizer.save_pretrained(options.out)

    train(model.train(), tokens, options, save)
    save()


if __name__ == "__main__":
    main()
