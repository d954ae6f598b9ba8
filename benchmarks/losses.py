# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Trains the example's small model by our DoRA and by upstream's, and stores both curves of losses in one row.

    python losses.py                               # fp32 and bf16, 500 steps each
    python losses.py --peer /path/to/upstream/environment/bin/python

It is the main job of examples/dora_finetuning: an NF4 base, all linear layers, rank 16, AdamW under a cosine. Both
trainings, each in a process of its own, are given the same base, rows, order and start of A. On a GPU ours runs on the
kernels. Rows go to `results/losses-DEVICE.jsonl`; verify.py holds them to `registry.LOSS_BOUND`, plot.py draws them.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
import time
from contextlib import nullcontext
from pathlib import Path

import torch
from measure import SEED, device_name, seed_factors, versions_of
from registry import IMPLEMENTATIONS, PRECISIONS
from rows import CURVES, MARK, ROOT, SOURCE, append, commit, path_of, source_digest
from run import find_peer, start
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, get_cosine_schedule_with_warmup

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
RANK, WARM = 16, 1 / 20
# That of the example for a model of one's own. The small one can take more, but then tells rounding from rounding
# ever less: at 1e-3 upstream's own curve in bf16 is 3e-3 from its curve in fp32, and at 5e-3 two curves in fp32 part.
LEARNING_RATE = 2e-4
# The main job's rows on a GPU; a quarter of their length where a step takes a second.
BATCH, SEQ = 4, 256 if DEVICE == "cuda" else 64


def write_inputs(folder: Path, steps: int) -> None:
    """Puts the base's path and the rows `[steps, BATCH, SEQ]` of every step into `folder`, for all trainings alike."""
    sys.path.insert(0, str(ROOT / "examples" / "dora_finetuning"))
    from make_base import find_base
    from texts import cpp_headers, rows_of_tokens

    base = find_base()
    rows = rows_of_tokens(cpp_headers()["train"], AutoTokenizer.from_pretrained(base), SEQ)
    order = torch.randperm(len(rows), generator=torch.Generator().manual_seed(SEED))
    ids = rows[order[torch.arange(steps * BATCH) % len(rows)]].view(steps, BATCH, SEQ)
    torch.save({"base": str(base), "ids": ids}, folder / "inputs.pt")


def build(base: str, implementation: str, dtype: torch.dtype) -> torch.nn.Module:
    """The quantised base with a DoRA adapter of whichever `peft` is imported."""
    from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training

    quantization = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=dtype
    )
    model = AutoModelForCausalLM.from_pretrained(
        base, quantization_config=quantization, dtype=dtype, device_map={"": DEVICE}
    )
    model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=False)
    options = IMPLEMENTATIONS[implementation].config
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules="all-linear", task_type="CAUSAL_LM", **options)
    model = get_peft_model(model, config)
    seed_factors(model, DEVICE)
    return model.train()


def train(implementation: str, precision: str, inputs: Path) -> dict:
    """One training in this process: its curve, how long it took, where, and on what versions."""
    given = torch.load(inputs)
    dtype = PRECISIONS[precision]
    model = build(given["base"], implementation, dtype)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    steps = len(given["ids"])
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, weight_decay=0.0, fused=True)
    schedule = get_cosine_schedule_with_warmup(optimizer, max(1, round(WARM * steps)), steps)
    losses, begin = [], time.perf_counter()
    for ids in given["ids"].to(DEVICE):
        with nullcontext() if dtype == torch.float32 else torch.autocast(DEVICE, dtype):
            loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
        losses.append(loss.item())
    return {
        "losses": [round(loss, 7) for loss in losses],
        "seconds": round(time.perf_counter() - begin, 1),
        "device": device_name(DEVICE),
        "versions": versions_of(IMPLEMENTATIONS[implementation], SOURCE),
    }


def compare(precision: str, peer: str, inputs: Path) -> dict:
    """A row: ours beside upstream's DoRA in one precision."""
    ours = "dora-triton" if DEVICE == "cuda" else "dora"
    row = {"precision": precision, "implementation": ours, "trainings": {}}
    for name in (ours, "upstream-dora"):
        arguments = ["--train", name, "--precisions", precision, "--inputs", str(inputs)]
        row["trainings"][name] = start("losses.py", arguments, IMPLEMENTATIONS[name].package, peer)
    return row


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--peer", help="the interpreter that has upstream's peft installed; default: as for run.py")
    parser.add_argument("--output", type=Path, help="the file for the rows; default: results/losses-DEVICE.jsonl")
    parser.add_argument("--commit", default=None, help="the commit to write down where there is no repository")
    parser.add_argument("--train", choices=IMPLEMENTATIONS, help="only this training, in this process, on --inputs")
    parser.add_argument("--inputs", type=Path, help="with --train: the file of base and rows")
    return parser.parse_args()


def main() -> None:
    arguments = parse_arguments()
    if arguments.train:
        print(MARK + json.dumps(train(arguments.train, arguments.precisions[0], arguments.inputs)), flush=True)
        return
    peer = arguments.peer or find_peer()
    run = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    with tempfile.TemporaryDirectory() as folder:
        write_inputs(Path(folder), arguments.steps)
        for precision in arguments.precisions:
            head = {"run": run, "commit": arguments.commit or commit(), "source": source_digest()}
            row = {**head, **compare(precision, peer, Path(folder) / "inputs.pt")}
            append(row, arguments.output or path_of(device_name(DEVICE), CURVES))
            print(precision, {name: one["seconds"] for name, one in row["trainings"].items()}, flush=True)


if __name__ == "__main__":
    main()
