# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Measures sharded training on several GPUs of one host through NCCL, ours beside an installed upstream, and stores the rows.

    python benchmarks/two_gpus.py                                    # 8B under FSDP2 on one GPU and on two
    python benchmarks/two_gpus.py --engines ddp zero3 tp             # the same in other hands
    python benchmarks/two_gpus.py --cases 70b-nf4 --worlds 2         # 70B QDoRA under FSDP
    python benchmarks/two_gpus.py --smoke                            # tiny models in all hands: two GPUs, or CPU ranks through gloo

A rank is a process with one GPU. All ranks get the same rows, so that losses are those of one GPU, and the tokens of a step
grow with the ranks, under tensor parallelism excepted: time(1) / time(n) is the weak scaling. One GPU runs the model as it
is, in nobody's hands.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import torch
from measure import add_adapter, build_base, device_name, timed_steps, versions_of
from registry import CASES as SINGLE
from registry import IMPLEMENTATIONS, LLAMA_8B, LLAMA_70B, Case, Implementation
from rows import MARK, RESULTS, ROOT, SOURCE, append, commit, path_of, source_digest
from run import MeasurementError, environment_of, find_peer
from steps import LEARNING_RATE, SEED, make_step, stored_dtype
from torch import nn

SMOKE = ("tiny", "tiny-bf16", "tiny-nf4")
CASES = {
    case.name: case
    for case in (
        Case("8b", "8B×32, bf16, 4,096 tokens a rank, r 16, checkpointing, FSDP2", LLAMA_8B, 32, "bf16", 1, 4096, 16, True),
        Case(
            "70b-nf4", "70B×80, NF4, 4 × 1,024 tokens a rank, r 12, checkpointing, FSDP", LLAMA_70B, 80, "nf4", 1, 1024, 12,
            True, accumulation=4, warm=1, steps=3,
        ),
        *(SINGLE[name] for name in SMOKE),
        *(replace(SINGLE[name], name=f"{name}-gpu", device="cuda") for name in SMOKE),
    )
}  # fmt: skip
ENGINES = ("fsdp", "ddp", "zero3", "tp")
TIMEOUT_S = 1800


# ---- one rank ------------------------------------------------------------------------------------------------------
def fsdp(model: nn.Module, case: Case) -> nn.Module:
    """FSDP2 with a block a unit; a packed base under FSDP1, by peft's policy and into flat bf16 parameters."""
    device = torch.device("cuda", torch.cuda.current_device()) if case.device == "cuda" else torch.device("cpu")
    if case.base == "nf4":
        from torch.distributed.fsdp import FullyShardedDataParallel

        from peft.utils.other import fsdp_auto_wrap_policy

        policy = fsdp_auto_wrap_policy(model)
        return FullyShardedDataParallel(model, auto_wrap_policy=policy, use_orig_params=False, device_id=device)
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    wrap = functools.partial(fully_shard, mesh=init_device_mesh(device.type, (torch.distributed.get_world_size(),)))
    for block in model.get_base_model().model.layers:
        wrap(block)
    return wrap(model)


def zero3(model: nn.Module, case: Case) -> nn.Module:
    """DeepSpeed's engine; in low precision all parameters are bf16, and it keeps those that are trained in fp32."""
    import deepspeed

    config = {
        "train_micro_batch_size_per_gpu": case.batch,
        "gradient_accumulation_steps": case.accumulation,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "bf16": {"enabled": stored_dtype(case) == torch.bfloat16},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
    }
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=LEARNING_RATE, fused=True)
    return deepspeed.initialize(model=model, optimizer=optimizer, model_parameters=trained, config=config)[0]


def split(base: nn.Module, case: Case) -> nn.Module:
    """Tensor parallelism: columns of what reads the residual stream, rows of what writes to it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

    mesh = init_device_mesh(case.device, (torch.distributed.get_world_size(),))
    styles = dict.fromkeys(case.targets, ColwiseParallel()) | dict.fromkeys(("o_proj", "down_proj"), RowwiseParallel())
    for name, module in base.named_modules():
        if name.rpartition(".")[2] in styles:
            parallelize_module(module, mesh, styles[name.rpartition(".")[2]])
    return base


def make(case: Case, implementation: Implementation, engine: str) -> Callable[[], torch.Tensor]:
    """The step of one rank, its model in the hands of `engine` where there are several ranks."""
    world = torch.distributed.get_world_size()
    packed = engine == "fsdp" and world > 1
    base = build_base(case, storage=torch.bfloat16 if packed else torch.uint8)
    if world == 1:
        return make_step(add_adapter(base, case, implementation), case, "eager")
    if engine == "tp":
        return make_step(add_adapter(split(base, case), case, implementation), case, "eager")
    model = add_adapter(base, case, implementation)
    if engine == "zero3":
        hands = zero3(model, case)
        return make_step(hands, case, "eager", hands)
    wrapped = nn.parallel.DistributedDataParallel(model) if engine == "ddp" else fsdp(model, case)
    return make_step(wrapped, case, "eager")


def measure(case: Case, implementation: Implementation, engine: str, source: Path) -> dict:
    """This rank's row; with several ranks the time is the slowest rank's and the peak the largest."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if case.device == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl" if case.device == "cuda" else "gloo")
    torch.manual_seed(SEED)
    step = make(case, implementation, engine)
    if case.device == "cuda":
        torch.cuda.empty_cache()
    row = timed_steps(step, case)
    ranks: list[dict] = [{} for _ in range(world)]
    torch.distributed.all_gather_object(ranks, {key: row[key] for key in ("p50_ms", "peak_mib", "losses")})
    slowest = max(ranks, key=lambda one: one["p50_ms"])
    row.update(p50_ms=slowest["p50_ms"], peak_mib=max(one["peak_mib"] for one in ranks), ranks=ranks, world=world)
    row["device"] = device_name(case.device)
    row["versions"] = versions_of(implementation, source)
    if case.device == "cuda":
        row["versions"]["nccl"] = ".".join(map(str, torch.cuda.nccl.version()))
    torch.distributed.destroy_process_group()
    return row


# ---- the processes -------------------------------------------------------------------------------------------------
def start(case: str, implementation: str, world: int, peer: str, engine: str = "fsdp") -> dict:
    """The row of one case, implementation and number of ranks, in the hands of one of `ENGINES`.

    Raises:
        MeasurementError: a rank failed or took too long; the end of its error output is in the message.
    """
    package = IMPLEMENTATIONS[implementation].package
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    common = {"WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "MASTER_ADDR": "127.0.0.1"}
    # NVLink multicast is not had in every container.
    common |= {"MASTER_PORT": str(port), "NCCL_NVLS_ENABLE": os.environ.get("NCCL_NVLS_ENABLE", "0")}
    command = [peer if package == "upstream" else sys.executable, str(ROOT / "benchmarks" / "two_gpus.py")]
    command += ["--rank", case, implementation, engine, "--source", str(SOURCE)]
    if CASES[case].device == "cpu":
        common["DS_ACCELERATOR"] = "cpu"
    ranks = [
        subprocess.Popen(
            command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            env={**environment_of(package), **common, "RANK": str(rank), "LOCAL_RANK": str(rank)},
        )
        for rank in range(world)
    ]  # fmt: skip
    try:
        wait_for(ranks)
        outputs = [rank.communicate() for rank in ranks]
    finally:
        for rank in ranks:
            rank.kill()
    for line in outputs[0][0].splitlines():
        if line.startswith(MARK) and not any(rank.returncode for rank in ranks):
            return json.loads(line[len(MARK) :])
    errors = "\n".join(f"rank {i}: {error[-1500:]}" for i, (_, error) in enumerate(outputs))
    raise MeasurementError(
        f"{case} {implementation} {engine} on {world}: {[rank.returncode for rank in ranks]}\n{errors}"
    )


def wait_for(ranks: list[subprocess.Popen]) -> None:
    """Wait until all ranks ended; end them all when one fails or time is over: the others would wait for it."""
    end = time.monotonic() + TIMEOUT_S
    while any(rank.poll() is None for rank in ranks):
        if any(rank.poll() for rank in ranks) or time.monotonic() > end:
            time.sleep(5)
            for rank in ranks:
                rank.terminate()
            return
        time.sleep(0.2)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, default=["8b"])
    parser.add_argument("--engines", nargs="+", choices=ENGINES, default=["fsdp"], help="what several ranks train by")
    parser.add_argument(
        "--smoke", action="store_true", help="check losses of tiny models by all engines; no row is stored"
    )
    names = [name for name in IMPLEMENTATIONS if IMPLEMENTATIONS[name].package]
    default = ["upstream-lora", "upstream-dora", "lora", "dora-triton"]
    parser.add_argument("--implementations", nargs="+", choices=names, default=default)
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2], help="numbers of ranks")
    parser.add_argument("--peer", help="the interpreter that has upstream's peft installed")
    parser.add_argument("--output", type=Path, help="the file for the rows; default: results/sharded/DEVICE.jsonl")
    parser.add_argument("--commit", help="the commit to write down where there is no repository")
    parser.add_argument("--rank", nargs=3, help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def smoke(world: int = 2) -> int:
    """Whether tiny models have the losses of one rank by every engine that is installed; the exit code."""
    kind = "-gpu" if torch.cuda.device_count() >= world else ""
    cases = {"fsdp": SMOKE, "ddp": SMOKE, "zero3": ("tiny", "tiny-bf16"), "tp": ("tiny",)}
    if find_spec("deepspeed") is None:
        del cases["zero3"]
        print("zero3: left out, deepspeed is not installed")
    failed = 0
    alone = {name: start(name + kind, "dora-triton", 1, sys.executable)["losses"] for name in SMOKE}
    for engine, names in cases.items():
        for name in names:
            found = start(name + kind, "dora-triton", world, sys.executable, engine)["losses"]
            rtol = 1e-5 if name == "tiny" and not kind else 1e-2
            off = max(abs(a - b) / abs(b) for a, b in zip(found, alone[name], strict=True))
            failed += off > rtol
            print(
                f"{name + kind:14} {engine:6} {world} ranks: losses {off:.0e} off{', TOO FAR' * (off > rtol)}",
                flush=True,
            )
    return 1 if failed else 0


def main() -> int:
    arguments = parse_arguments()
    if arguments.rank:
        case, implementation, engine = arguments.rank
        row = measure(CASES[case], IMPLEMENTATIONS[implementation], engine, arguments.source.resolve())
        print(MARK + json.dumps(row), flush=True)
        return 0
    if arguments.smoke:
        return smoke()
    upstream = any(IMPLEMENTATIONS[name].package == "upstream" for name in arguments.implementations)
    peer = arguments.peer or (find_peer() if upstream else sys.executable)
    run = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    known = {"run": run, "commit": arguments.commit or commit(), "source": source_digest()}
    failed = 0
    for name in arguments.cases:
        for implementation in arguments.implementations:
            alone = None
            hands = [(1, "alone")] if 1 in arguments.worlds else []
            hands += [
                (world, engine) for engine in arguments.engines for world in sorted(arguments.worlds) if world > 1
            ]
            for world, engine in hands:
                try:
                    row = start(name, implementation, world, peer, engine)
                except MeasurementError as error:
                    failed += 1
                    print(f"FAILED {error}", file=sys.stderr, flush=True)
                    continue
                alone = row["p50_ms"] if world == 1 else alone
                row["weak_scaling"] = None if alone is None or engine == "tp" else round(alone / row["p50_ms"], 4)
                row = {"case": name, "engine": engine, "implementation": implementation, **known, **row}
                append(row, arguments.output or RESULTS / "sharded" / path_of(row["device"]).name)
                print(
                    f"{name:10} {implementation:15} {engine:6} {world} ranks {row['p50_ms']:10.2f} ms "
                    f"{row['peak_mib']:10.1f} MiB scaling {row['weak_scaling']}", flush=True,
                )  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
