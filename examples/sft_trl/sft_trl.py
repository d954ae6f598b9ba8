# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Supervised fine-tuning of a (quantised) chat model with TRL's SFTTrainer and DoRA; the adapter is loaded back and compared.

python sft_trl.py --model Qwen/Qwen3-8B --data trl-lib/Capybara --quant nf4
python sft_trl.py --smoke        # no network, no GPU: a tiny model is taught sums, in seconds
"""

from __future__ import annotations

import argparse
import random
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, load_dataset
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    BitsAndBytesConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedTokenizerFast,
    set_seed,
)
from trl import SFTConfig, SFTTrainer

from peft import LoraConfig, PeftModel

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
DTYPE = torch.bfloat16 if DEVICE == "cuda" else torch.float32
SPECIAL = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>"}
TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'user' %}{{ 'ask ' + message['content'] + ' ' }}"
    "{% else %}{{ 'say ' + message['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'say ' }}{% endif %}"
)
NUMBERS = 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="hub id or folder of a chat model")
    parser.add_argument("--data", help="dataset id, or .jsonl, with `messages`, `prompt` and `completion`, or `text`")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and its own data instead of both")
    parser.add_argument("--quant", choices=["none", "nf4"], default="none", help="storage of the frozen layers")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a row at most")
    parser.add_argument("--batch-size", type=int, default=4, help="rows a step")
    parser.add_argument("--steps", type=int, default=200, help="optimizer steps")
    parser.add_argument("--lr", type=float, default=2e-4, help="peak learning rate")
    parser.add_argument("--output", type=Path, default=Path("sft-adapter"), help="folder for the adapter")
    arguments = parser.parse_args()
    if arguments.smoke == bool(arguments.model and arguments.data):
        parser.error("give either --smoke, or both --model and --data")
    if arguments.smoke:
        arguments.seq_len, arguments.batch_size, arguments.steps, arguments.lr = 32, 16, 60, 2e-2
    return arguments


def smoke_base(folder: Path) -> None:
    """A Llama of a few thousand parameters that knows nothing, and a tokenizer of numbers and six words."""
    words = [*SPECIAL.values(), "ask", "say", "plus", *map(str, range(2 * NUMBERS))]
    vocabulary = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token="plus"))
    vocabulary.pre_tokenizer = WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=vocabulary, chat_template=TEMPLATE, **SPECIAL).save_pretrained(folder)
    sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    tokens = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    config = LlamaConfig(vocab_size=len(words), num_key_value_heads=2, **sizes, **tokens)
    LlamaForCausalLM(config).save_pretrained(folder)


def smoke_data() -> Dataset:
    """Sums of two numbers, as conversations."""
    draw = random.Random(0)
    pairs = [(draw.randrange(NUMBERS), draw.randrange(NUMBERS)) for _ in range(400)]
    rows = [
        [{"role": "user", "content": f"{a} plus {b}"}, {"role": "assistant", "content": f"{a + b}"}] for a, b in pairs
    ]
    return Dataset.from_dict({"messages": rows})


def load_data(data: str) -> Dataset:
    if Path(data).exists():
        return load_dataset("json", data_files=data, split="train")
    return load_dataset(data, split="train")


def load_base(source: str | Path, quant: str) -> Any:
    settings = {}
    if quant == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=DTYPE,
            bnb_4bit_use_double_quant=True,
        )
    return AutoModelForCausalLM.from_pretrained(source, dtype=DTYPE, device_map={"": DEVICE}, **settings)


def answer(model: Any, tokenizer: Any, question: str) -> str:
    prompt = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(prompt, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids["input_ids"].to(DEVICE)
    new = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=32, do_sample=False)[
        0, ids.shape[1] :
    ]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


def make_trainer(source: str | Path, tokenizer: Any, arguments: argparse.Namespace) -> SFTTrainer:
    return SFTTrainer(
        model=load_base(source, arguments.quant),
        args=SFTConfig(
            output_dir=str(arguments.output),
            max_length=arguments.seq_len,
            per_device_train_batch_size=arguments.batch_size,
            max_steps=arguments.steps,
            learning_rate=arguments.lr,
            lr_scheduler_type="cosine",
            warmup_steps=arguments.steps // 20,
            gradient_checkpointing=not arguments.smoke,
            bf16=DTYPE == torch.bfloat16,
            use_cpu=DEVICE == "cpu",
            logging_steps=max(arguments.steps // 20, 1),
            save_strategy="no",
            report_to=[],
        ),
        train_dataset=smoke_data() if arguments.smoke else load_data(arguments.data),
        processing_class=tokenizer,
        peft_config=LoraConfig(
            r=arguments.rank,
            lora_alpha=2 * arguments.rank,
            target_modules="all-linear",
            task_type="CAUSAL_LM",
            use_dora=True,
            use_dora_triton=DEVICE == "cuda",
            # in the tiny model everything is random: its embeddings have to learn too
            modules_to_save=["embed_tokens", "lm_head"] if arguments.smoke else None,
        ),
    )


def main() -> None:
    arguments = parse_arguments()
    set_seed(0)
    source = arguments.model
    if arguments.smoke:
        source = arguments.output / "base"
        smoke_base(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    trainer = make_trainer(source, tokenizer, arguments)
    trainer.train()
    trainer.save_model(str(arguments.output))
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}")
    if arguments.smoke and not losses[-1] < losses[0] * 2 / 3:
        raise AssertionError("the loss did not fall by a third")

    model = trainer.accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    again = PeftModel.from_pretrained(load_base(source, arguments.quant), arguments.output).eval()
    question = "3 plus 4" if arguments.smoke else "What is weight-decomposed low-rank adaptation?"
    ids = tokenizer(question, return_tensors="pt")["input_ids"].to(DEVICE)
    with torch.no_grad():
        expected, found = model(ids).logits.float(), again(ids).logits.float()
    apart = ((expected - found).abs().max() / expected.abs().max()).item()
    tolerance = {torch.float32: 1e-5, torch.bfloat16: 1e-2}[DTYPE]
    if not apart <= tolerance:
        raise AssertionError(f"the reloaded adapter's logits lie {apart:.1e} apart, more than {tolerance:.0e}")
    print(f"reloaded from {arguments.output}: logits {apart:.0e} apart")
    print(f"{question} -> {answer(again, tokenizer, question)}")


if __name__ == "__main__":
    main()
