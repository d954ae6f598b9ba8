# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The texts that the example learns from, all on this machine already: CPython's English and Python, torch's C++."""

from __future__ import annotations

import hashlib
import pydoc_data.topics
import random
import sysconfig
from pathlib import Path

import torch


def english_and_python(characters: int, seed: int) -> list[str]:
    """CPython's own documents: the help topics (English) and the standard library's modules (Python), in a set order.

    Returns:
        `list[str]`: whole documents, shuffled by `seed`, of `characters` characters in all.

    Raises:
        RuntimeError: if this interpreter ships without the sources of its standard library.
    """
    english = list(pydoc_data.topics.topics.values())
    python = []
    for path in sorted(Path(sysconfig.get_paths()["stdlib"]).rglob("*.py")):
        if path.parts[-2] in ("encodings", "pydoc_data") or {"site-packages", "dist-packages"} & set(path.parts):
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if 500 < len(text) < 100_000:
            python.append(text)
    if sum(map(len, python)) < 2_000_000:
        raise RuntimeError(
            f"no sources of the standard library under {sysconfig.get_paths()['stdlib']}: install them, or hand a "
            "model over with --model"
        )
    rng = random.Random(seed)
    rng.shuffle(python)
    room = characters - sum(map(len, english))
    kept = []
    for text in python:
        if room <= 0:
            break
        kept.append(text)
        room -= len(text)
    documents = english + kept
    rng.shuffle(documents)
    return documents


def cpp_headers() -> dict[str, list[str]]:
    """The hand-written C++ headers that ship with torch, as `train` and `held_out`.

    One file in eight is held out, chosen by a hash of its path.

    Raises:
        FileNotFoundError: if this torch ships no headers.
    """
    root = Path(torch.__file__).parent / "include"
    paths = sorted([*root.glob("c10/**/*.h"), *root.glob("torch/csrc/**/*.h")])
    if len(paths) < 100:
        raise FileNotFoundError(f"this torch ships no C++ headers under {root}: name a text with --data")
    splits = {"train": [], "held_out": []}
    for path in paths:
        name = path.relative_to(root).as_posix()
        split = "held_out" if hashlib.sha256(name.encode()).digest()[0] % 8 == 0 else "train"
        splits[split].append(path.read_text(encoding="utf-8", errors="ignore"))
    return splits


def rows_of_tokens(documents: list[str], tokenizer, seq_len: int) -> torch.Tensor:
    """The documents, each closed by the end token, joined and cut into rows `[rows, seq_len]`; the rest is dropped."""
    ids = [token for text in documents for token in (*tokenizer(text)["input_ids"], tokenizer.eos_token_id)]
    rows = len(ids) // seq_len
    return torch.tensor(ids[: rows * seq_len]).view(rows, seq_len)
