# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Makes the small base model of the example: a Llama trained on the English and the Python that ship with CPython.

    python make_base.py [--output FOLDER]

It needs neither network nor GPU, takes about two minutes on two cores, and happens once: the model is kept in a cache
folder under a name that says with what recipe it was made.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path

import torch
from texts import english_and_python, rows_of_tokens
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm.auto import tqdm
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

END = "<|end|>"
RECIPE = {
    "version": 1,
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 704,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 4,
    "max_position_embeddings": 512,
    "seq_len": 128,
    "batch_size": 8,
    "steps": 480,
    "lr": 3e-3,
    "characters": 6_000_000,
    "seed": 0,
}


def cache_folder() -> Path:
    """The folder where what the examples make is kept: `$XDG_CACHE_HOME/peft-triton`, else `~/.cache/peft-triton`."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "peft-triton"


def base_folder() -> Path:
    """Where the base model of this recipe lies, or would."""
    recipe = json.dumps({**RECIPE, "torch": torch.__version__}, sort_keys=True)
    return cache_folder() / f"small-llama-{hashlib.sha256(recipe.encode()).hexdigest()[:12]}"


def train_tokenizer(documents: list[str]) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `RECIPE["vocab_size"]` tokens, made from `documents`: no text is out of its vocabulary."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=RECIPE["vocab_size"],
        special_tokens=[END],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(documents, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token=END,
        pad_token=END,
        model_max_length=RECIPE["max_position_embeddings"],
    )


def train_model(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> LlamaForCausalLM:
    """Trains the model from nothing on `documents` with AdamW and a cosine schedule; the same on every run."""
    torch.manual_seed(RECIPE["seed"])
    names = ("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        max_position_embeddings=RECIPE["max_position_embeddings"],
        tie_word_embeddings=True,
        bos_token_id=tokenizer.eos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.eos_token_id,
        **{name: RECIPE[name] for name in names},
    )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = LlamaForCausalLM(config).to(device)

    rows = rows_of_tokens(documents, tokenizer, RECIPE["seq_len"])
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(RECIPE["seed"]))

    optimizer = torch.optim.AdamW(model.parameters(), lr=RECIPE["lr"], betas=(0.9, 0.95), weight_decay=0.1)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RECIPE["lr"], RECIPE["steps"], pct_start=0.1)
    bar = tqdm(range(RECIPE["steps"]), desc="training the base", unit="step")
    for step in bar:
        now = torch.arange(step * RECIPE["batch_size"], (step + 1) * RECIPE["batch_size"]) % len(rows)
        batch = rows[order[now]].to(device)
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        bar.set_postfix(loss=f"{loss.item():.3f}")
    return model.eval().cpu()


def make_base(folder: Path) -> None:
    """Makes the model and its tokenizer and puts both into `folder`, whole or not at all.

    Args:
        folder (`Path`): written beside itself first, then renamed; one that another process finished meanwhile stays.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix=f"{folder.name}-", dir=folder.parent))
    try:
        documents = english_and_python(RECIPE["characters"], RECIPE["seed"])
        tokenizer = train_tokenizer(documents)
        model = train_model(tokenizer, documents)
        model.save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        try:
            scratch.rename(folder)
        except OSError:
            if not (folder / "config.json").is_file():
                raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def find_base() -> Path:
    """The folder of the base model, which is made first where it is not there yet (about two minutes on two cores)."""
    folder = base_folder()
    if not (folder / "config.json").is_file():
        print(f"making the base model, once: {folder}", flush=True)
        start = time.perf_counter()
        make_base(folder)
        print(f"the base model is made ({time.perf_counter() - start:.0f} s)", flush=True)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, help="a folder of your choice in place of the cache folder's")
    arguments = parser.parse_args()
    if arguments.output is None:
        print(find_base())
    else:
        make_base(arguments.output)
        print(arguments.output)


if __name__ == "__main__":
    main()
