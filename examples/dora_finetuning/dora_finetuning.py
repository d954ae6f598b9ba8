# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Fine-tunes a (quantised) causal language model with DoRA, saves the adapter, loads it back, merges it, and checks all three.

With no arguments it needs neither network nor GPU: a small Llama that knows English and Python (make_base.py) is
quantised to NF4 and learns C++ from the headers that ship with torch. For a model and a text of your own:

    python dora_finetuning.py --model meta-llama/Llama-3.1-8B --data my_text.jsonl --rank 16 --seq-len 1024
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

import torch
from datasets import Dataset, DatasetDict, load_dataset
from make_base import find_base
from texts import cpp_headers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    Trainer,
    TrainingArguments,
    default_data_collator,
    set_seed,
)

import peft
from peft import LoraConfig, PeftModel, get_peft_model, prepare_model_for_kbit_training

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
# How far logits may lie apart, as a part of the largest one, where mathematics says that they are equal. A reload runs
# the same operations on the same numbers. A merge rounds W' to the base's dtype and adds in another order. The
# LLM.int8() product also rounds its input to 8 bits, which no floating-point weight reproduces.
RELOAD_TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[DTYPE]
MERGE_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 5e-2}[DTYPE]
INT8_TOLERANCE = 0.15
# What the small model must gain on C++: held-out perplexity falls by at least this part.
LEAST_GAIN = 0.2


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--model", help="hub id or folder; without it, the small model that make_base.py makes")
    parser.add_argument(
        "--data", help=".txt, .json/.jsonl with a field `text`, or a dataset id; without it, C++ headers"
    )
    parser.add_argument("--quant", choices=["none", "nf4", "int8"], default="nf4", help="storage of the frozen layers")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dora", action=switch, default=True, help="DoRA; --no-dora is plain LoRA")
    parser.add_argument("--triton", action=switch, default=True, help="DoRA's Triton kernels (PyTorch without a GPU)")
    parser.add_argument("--seq-len", type=int, default=256, help="tokens a row")
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step")
    parser.add_argument("--steps", type=int, default=240, help="optimizer steps")
    parser.add_argument("--lr", type=float, help="peak learning rate; 5e-3 for the small model, else 2e-4")
    parser.add_argument("--held-out-rows", type=int, default=24, help="at most so many rows are held out")
    parser.add_argument("--checkpointing", action=switch, default=False, help="gradient checkpointing")
    parser.add_argument("--output", type=Path, default=Path("dora-adapter"), help="folder for the adapter")
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    if arguments.rank < 1 or arguments.seq_len < 2 or arguments.steps < 1:
        parser.error("--rank and --steps must be at least 1, --seq-len at least 2")
    return arguments


def load_texts(data: str | None, seed: int) -> DatasetDict:
    """The splits `train` and `held_out`, each with a column `text`.

    Args:
        data (`str`, *optional*): a file of lines, a file of JSON lines, or a dataset id.
        seed (`int`): decides which twentieth of `data` is held out, where it brings no test or validation split.

    Raises:
        ValueError: if `data` has no column `text`.
    """
    if data is None:
        return DatasetDict({split: Dataset.from_dict({"text": texts}) for split, texts in cpp_headers().items()})
    kind = {".txt": "text", ".json": "json", ".jsonl": "json"}.get(Path(data).suffix)
    loaded = load_dataset(kind, data_files=data) if kind else load_dataset(data)
    held_out = next((loaded[name] for name in ("validation", "test") if name in loaded), None)
    train = loaded["train"]
    if held_out is None:
        split = train.train_test_split(test_size=0.05, seed=seed)
        train, held_out = split["train"], split["test"]
    if "text" not in train.column_names:
        raise ValueError(f"--data {data} has the columns {train.column_names}, but none named `text`")
    return DatasetDict(train=train, held_out=held_out)


def pack(texts: DatasetDict, tokenizer, seq_len: int) -> DatasetDict:
    """Joins each split's documents, each closed by the end token, and cuts the stream into rows of `seq_len` tokens."""

    def rows_of(batch):
        stream = [
            i for ids in tokenizer(batch["text"], verbose=False)["input_ids"] for i in (*ids, tokenizer.eos_token_id)
        ]
        rows = [stream[start : start + seq_len] for start in range(0, len(stream) - seq_len + 1, seq_len)]
        return {"input_ids": rows, "labels": rows}

    columns = texts["train"].column_names
    return DatasetDict(
        {
            name: split.map(rows_of, batched=True, remove_columns=columns, desc=f"packing {name}")
            for name, split in texts.items()
        }
    )


def load_base(model: str, quant: str):
    """The frozen base on the device, its linear layers stored as `quant` says, the rest in bf16 (GPU) or fp32 (CPU)."""
    quantization = {
        "none": None,
        "nf4": BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=DTYPE,
        ),
        "int8": BitsAndBytesConfig(load_in_8bit=True),
    }[quant]
    return AutoModelForCausalLM.from_pretrained(
        model, quantization_config=quantization, dtype=DTYPE, device_map={"": DEVICE}
    )


@torch.no_grad()
def logits_of(model, ids: torch.Tensor) -> torch.Tensor:
    """Logits `[batch, tokens, vocabulary]` in fp32, without dropout."""
    model.eval()
    return model(input_ids=ids.to(DEVICE)).logits.float()


def assert_equal_logits(what: str, got: torch.Tensor, expected: torch.Tensor, tolerance: float) -> None:
    """Prints how far `got` is from `expected` and raises an `AssertionError` beyond `tolerance` × the largest logit."""
    apart = ((got - expected).abs().max() / expected.abs().max()).item()
    print(f"{what}: logits differ by {apart:.1e} of the largest (at most {tolerance:.0e})", flush=True)
    assert apart <= tolerance, f"{what}: logits differ by {apart:.3e} of the largest, more than {tolerance:.0e}"


@torch.no_grad()
def sample(model, tokenizer, prompt: str) -> str:
    """`prompt` and what the model writes after it, drawn with a fixed seed from the 20 likeliest tokens at a time."""
    model.eval()
    set_seed(0)
    ids = tokenizer(prompt, return_tensors="pt").input_ids.to(DEVICE)
    mask = torch.ones_like(ids)
    out = model.generate(
        input_ids=ids, attention_mask=mask, max_new_tokens=96, do_sample=True, temperature=0.7, top_k=20
    )
    return tokenizer.decode(out[0])


def peak_memory() -> float:
    """The highest memory so far in MiB: allocated on the GPU, or resident in this process where there is none."""
    if DEVICE == "cuda":
        return torch.cuda.max_memory_allocated() / 2**20
    if sys.platform == "win32":
        import psutil

        return psutil.Process().memory_info().peak_wset / 2**20
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10


def make_trainer(model, data: DatasetDict, arguments: argparse.Namespace) -> Trainer:
    settings = TrainingArguments(
        output_dir=str(arguments.output),
        max_steps=arguments.steps,
        per_device_train_batch_size=arguments.batch_size,
        per_device_eval_batch_size=arguments.batch_size,
        learning_rate=arguments.lr or (2e-4 if arguments.model else 5e-3),
        lr_scheduler_type="cosine",
        warmup_steps=max(1, arguments.steps // 20),
        bf16=DEVICE == "cuda",
        use_cpu=DEVICE == "cpu",
        dataloader_pin_memory=DEVICE == "cuda",
        label_names=["labels"],
        logging_steps=10,
        save_strategy="no",
        report_to="none",
        seed=arguments.seed,
        **({"gradient_checkpointing": True} if arguments.checkpointing else {}),
    )
    return Trainer(
        model=model,
        args=settings,
        train_dataset=data["train"],
        eval_dataset=data["held_out"],
        data_collator=default_data_collator,
    )


def held_out_loss(trainer: Trainer, when: str) -> float:
    loss = trainer.evaluate()["eval_loss"]
    print(f"{when}: held-out loss {loss:.4f}, perplexity {math.exp(loss):.2f}", flush=True)
    return loss


def check_reload(base: str, arguments: argparse.Namespace, ids: torch.Tensor, expected: torch.Tensor) -> PeftModel:
    """Loads the saved adapter into a fresh base and asserts the trained model's logits; returns what it loaded."""
    model = PeftModel.from_pretrained(load_base(base, arguments.quant), arguments.output)
    assert_equal_logits("reloaded", logits_of(model, ids), expected, RELOAD_TOLERANCE)
    return model


def check_merge(model: PeftModel, base: str, arguments: argparse.Namespace, ids: torch.Tensor, expected: torch.Tensor):
    """Merges and asserts equal logits.

    In floating point the merged layer is the same function as base and adapter. A quantised layer must round the merged
    weight to its format again, so there two things are defined, and both are asserted: merging into the dequantised
    base (what one publishes) gives the same function, and unmerging in place gives the old bits back.
    """
    if arguments.quant == "none":
        assert_equal_logits("merged", logits_of(model.merge_and_unload(), ids), expected, MERGE_TOLERANCE)
        return
    before = logits_of(model, ids)
    model.merge_adapter()
    drift = (logits_of(model, ids) - before).pow(2).mean().sqrt() / before.pow(2).mean().sqrt()
    print(f"merged in place: rounding to {arguments.quant} again moves the logits by {drift:.1%} (rms)", flush=True)
    model.unmerge_adapter()
    assert torch.equal(logits_of(model, ids), before), "unmerging did not give the quantised layers' old bits back"

    dequantized = PeftModel.from_pretrained(load_base(base, arguments.quant).dequantize(), arguments.output)
    tolerance = INT8_TOLERANCE if arguments.quant == "int8" else MERGE_TOLERANCE
    merged = dequantized.merge_and_unload()
    assert_equal_logits("merged into the dequantised base", logits_of(merged, ids), expected, tolerance)


def main() -> None:
    arguments = parse_arguments()
    set_seed(arguments.seed)
    base = arguments.model or str(find_base())
    tokenizer = AutoTokenizer.from_pretrained(base)
    texts = load_texts(arguments.data, arguments.seed)
    data = pack(texts, tokenizer, arguments.seq_len)
    data["train"] = data["train"].shuffle(seed=arguments.seed)
    held_out = data["held_out"].shuffle(seed=arguments.seed)
    data["held_out"] = held_out.select(range(min(arguments.held_out_rows, len(held_out))))

    model = load_base(base, arguments.quant)
    if arguments.quant != "none":
        model = prepare_model_for_kbit_training(model, use_gradient_checkpointing=arguments.checkpointing)
    config = LoraConfig(
        r=arguments.rank,
        lora_alpha=2 * arguments.rank,
        target_modules="all-linear",
        use_dora=arguments.dora,
        use_dora_triton=arguments.dora and arguments.triton,
        task_type="CAUSAL_LM",
    )
    model = get_peft_model(model, config)
    model.print_trainable_parameters()
    if arguments.dora:
        peft.dora.explain(model)

    trainer = make_trainer(model, data, arguments)
    prompt = texts["held_out"][0]["text"][:80]
    before = held_out_loss(trainer, "before")
    print(f"sample before:\n{sample(model, tokenizer, prompt)}\n", flush=True)

    seconds = trainer.train().metrics["train_runtime"]
    tokens = arguments.steps * arguments.batch_size * arguments.seq_len
    print(f"trained on {tokens:,} tokens, {tokens / seconds:,.0f} a second; peak memory {peak_memory():,.0f} MiB")
    after = held_out_loss(trainer, "after")
    print(f"sample after:\n{sample(model, tokenizer, prompt)}\n", flush=True)

    gain = 1 - math.exp(after - before)
    print(f"held-out perplexity fell by {gain:.1%}", flush=True)
    if arguments.model is None and arguments.data is None:
        assert gain >= LEAST_GAIN, f"held-out perplexity fell by {gain:.1%}, less than {LEAST_GAIN:.0%}"

    model.save_pretrained(arguments.output)
    print(f"the adapter is in {arguments.output}", flush=True)
    ids = torch.tensor(data["held_out"][:2]["input_ids"])
    expected = logits_of(model, ids)
    del model, trainer
    reloaded = check_reload(base, arguments, ids, expected)
    check_merge(reloaded, base, arguments, ids, expected)


if __name__ == "__main__":
    main()
