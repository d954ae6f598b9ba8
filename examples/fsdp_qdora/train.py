# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Trains a DoRA adapter on a base that accelerate shards, QDoRA on NF4 among them, saves it whole and loads it on one process.

    accelerate launch --config_file fsdp.yaml train.py --model meta-llama/Llama-3.1-70B --data my_text.jsonl
    accelerate launch --config_file fsdp_cpu.yaml train.py --smoke        # two CPU ranks, a tiny model, no network

Which engine shards is the config's choice: FSDP here, DeepSpeed with those of ../deepspeed_dora.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from pathlib import Path

import torch
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.utils import broadcast_object_list, set_seed
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.utils.data import DataLoader, Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from peft import LoraConfig, PeftModel, get_peft_model
from peft.utils.other import fsdp_auto_wrap_policy


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], formatter_class=argparse.ArgumentDefaultsHelpFormatter
    )
    parser.add_argument("--model", help="hub id or folder of a causal language model")
    parser.add_argument("--data", help=".jsonl with a field `text`, or a text file of lines")
    parser.add_argument("--smoke", action="store_true", help="a tiny model and made-up rows; nothing is needed")
    parser.add_argument("--quant", choices=["none", "nf4"], default="nf4", help="storage of the frozen layers")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--seq-len", type=int, default=1024, help="tokens a row")
    parser.add_argument("--batch-size", type=int, default=1, help="rows of one rank in one pass")
    parser.add_argument("--accumulate", type=int, default=4, help="passes a step")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--output", type=Path, default=Path("adapter"))
    arguments = parser.parse_args()
    if not arguments.smoke and not (arguments.model and arguments.data):
        parser.error("name --model and --data, or try --smoke")
    if arguments.smoke:
        arguments.seq_len, arguments.batch_size, arguments.accumulate, arguments.steps = 32, 2, 2, 20
        arguments.rank, arguments.lr = 8, 4e-2
    return arguments


class Rows(Dataset):
    """Rows of token ids `[seq_len]`."""

    def __init__(self, rows: torch.Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def read_rows(arguments: argparse.Namespace) -> Rows:
    if arguments.smoke:  # counting in steps of one or two: soon learnt
        start, step = torch.randint(0, 64, (256, 1)), torch.randint(1, 3, (256, 1))
        return Rows((start + step * torch.arange(arguments.seq_len)) % 64)
    from datasets import load_dataset

    kind = "json" if arguments.data.endswith((".json", ".jsonl")) else "text"
    texts = load_dataset(kind, data_files=arguments.data, split="train")["text"]
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    ids = [token for text in texts for token in [*tokenizer(text)["input_ids"], tokenizer.eos_token_id]]
    whole = len(ids) // arguments.seq_len
    if whole == 0:
        raise ValueError(
            f"{arguments.data} has {len(ids)} tokens: fewer than one row of --seq-len {arguments.seq_len}"
        )
    return Rows(torch.tensor(ids[: whole * arguments.seq_len]).view(whole, arguments.seq_len))


def tiny_base(accelerator: Accelerator) -> str:
    """A folder with a Llama of random weights, the same for all ranks of this machine."""
    folder = [tempfile.mkdtemp() if accelerator.is_main_process else None]
    broadcast_object_list(folder)
    if accelerator.is_main_process:
        shape = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "vocab_size": 64}
        config = LlamaConfig(**shape, num_attention_heads=4, num_key_value_heads=2, tie_word_embeddings=False)
        LlamaForCausalLM(config).save_pretrained(folder[0])
    accelerator.wait_for_everyone()
    return folder[0]


def load_base(name: str, quant: str, dtype: torch.dtype) -> torch.nn.Module:
    """The frozen base. FSDP flattens a block into one tensor: the packed bytes are stored in the dtype of the rest."""
    settings = {}
    if quant == "nf4":
        settings["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype, bnb_4bit_quant_storage=dtype,
        )  # fmt: skip
    return AutoModelForCausalLM.from_pretrained(name, dtype=dtype, **settings)


def shard_on_cpu(accelerator: Accelerator) -> None:
    """Let accelerate take its FSDP path on CPU ranks, where it would fall back to DDP."""
    if os.environ.get("ACCELERATE_USE_FSDP") == "true" and accelerator.device.type == "cpu":
        accelerator.state._shared_state["distributed_type"] = DistributedType.FSDP
        accelerator.state._shared_state["fsdp_plugin"] = FullyShardedDataParallelPlugin()


def prepare(accelerator: Accelerator, model: torch.nn.Module, loader: DataLoader, lr: float) -> tuple:
    """Model, optimizer and loader as the config shards them; FSDP makes the parameters that the optimizer is to know."""
    if accelerator.distributed_type == DistributedType.FSDP:
        plugin = accelerator.state.fsdp_plugin
        plugin.auto_wrap_policy = fsdp_auto_wrap_policy(model)
        if accelerator.device.type == "cpu":  # accelerate's name for it, cpu:0, is none that FSDP takes
            model = FullyShardedDataParallel(
                model, auto_wrap_policy=plugin.auto_wrap_policy, use_orig_params=plugin.use_orig_params,
                device_id=torch.device("cpu"),
            )  # fmt: skip
        model = accelerator.prepare(model)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=lr)
    if accelerator.distributed_type == DistributedType.FSDP:
        return model, *accelerator.prepare(optimizer, loader)
    return accelerator.prepare(model, optimizer, loader)


def train(accelerator: Accelerator, model: torch.nn.Module, optimizer, loader: DataLoader, steps: int) -> list[float]:
    """The mean loss over all ranks, one a step."""
    losses, passes = [], []
    model.train()
    while len(losses) < steps:
        for batch in loader:
            with accelerator.accumulate(model):
                loss = model(**batch).loss
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()
            passes.append(accelerator.reduce(loss.detach(), "mean").item())
            if accelerator.sync_gradients:
                losses.append(sum(passes) / len(passes))
                passes.clear()
                accelerator.print(f"step {len(losses)}: loss {losses[-1]:.4f}")
                if len(losses) == steps:
                    break
    return losses


def main() -> None:
    arguments = parse_arguments()
    accelerator = Accelerator(
        gradient_accumulation_steps=arguments.accumulate, cpu=arguments.smoke and not torch.cuda.is_available()
    )
    shard_on_cpu(accelerator)
    set_seed(0)
    dtype = torch.bfloat16 if accelerator.device.type == "cuda" else torch.float32
    name = tiny_base(accelerator) if arguments.smoke else arguments.model
    base = load_base(name, arguments.quant, dtype)
    if not arguments.smoke:
        base.gradient_checkpointing_enable({"use_reentrant": False})
        base.enable_input_require_grads()
    set_seed(0)  # the same adapter on every rank
    config = LoraConfig(
        r=arguments.rank, lora_alpha=2 * arguments.rank, target_modules="all-linear", use_dora=True,
        use_dora_triton=accelerator.device.type == "cuda", task_type="CAUSAL_LM",
    )  # fmt: skip
    model = get_peft_model(base, config)
    if accelerator.is_main_process:
        model.print_trainable_parameters()
    loader = DataLoader(read_rows(arguments), batch_size=arguments.batch_size, shuffle=True, drop_last=True)
    model, optimizer, loader = prepare(accelerator, model, loader, arguments.lr)
    losses = train(accelerator, model, optimizer, loader, arguments.steps)

    state = accelerator.get_state_dict(model)  # every rank takes part
    accelerator.unwrap_model(model).save_pretrained(
        arguments.output, state_dict=state, is_main_process=accelerator.is_main_process
    )
    accelerator.wait_for_everyone()
    if arguments.smoke and accelerator.is_main_process:
        check(name, arguments, losses)
    accelerator.end_training()


def check(name: str, arguments: argparse.Namespace, losses: list[float]) -> None:
    """On one process: the loss fell, and the saved adapter has what was learnt."""
    assert losses[-1] < 0.95 * losses[0], f"the loss went from {losses[0]:.3f} to {losses[-1]:.3f}"
    torch.manual_seed(1)
    rows = read_rows(arguments).rows[:32]
    base = LlamaForCausalLM.from_pretrained(name, dtype=torch.float32)
    with torch.no_grad():
        before = base(input_ids=rows, labels=rows).loss.item()
        after = PeftModel.from_pretrained(base, arguments.output).eval()(input_ids=rows, labels=rows).loss.item()
    assert after < 0.95 * before, f"the reloaded adapter has loss {after:.3f}, the base {before:.3f}"
    print(f"loss {losses[0]:.3f} -> {losses[-1]:.3f}; on one process, reloaded: {before:.3f} -> {after:.3f}")


if __name__ == "__main__":
    main()
