# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Measures sharded training on several GPUs of one host through NCCL, ours beside an installed upstream, and stores the rows.

    python benchmarks/two_gpus.py                                    # 8B under FSDP2 on one GPU and on two
    python benchmarks/two_gpus.py --cases 70b-nf4 --worlds 2         # 70B QDoRA under FSDP
    python benchmarks/two_gpus.py --cases tiny tiny-nf4 --implementations dora-triton    # CPU ranks, through gloo

A rank is a process with one GPU. All ranks get the same rows, so that losses are those of one GPU, and the tokens of a step
grow with the ranks: time(1) / time(n) is the weak scaling. One GPU runs the model as it is, unsharded.
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
from pathlib import Path

import torch
from measure import MARK, add_adapter, build_base, device_name, timed_steps, versions_of
from registry import CASES as SINGLE
from registry import IMPLEMENTATIONS, LLAMA_8B, LLAMA_70B, Case, Implementation
from rows import RESULTS, ROOT, SOURCE, append, commit, path_of, source_digest
from run import MeasurementError, environment_of, find_peer
from steps import SEED, make_step
from torch import nn

CASES = {
    case.name: case
    for case in (
        Case("8b", "8B×32, bf16, 4,096 tokens a rank, r 16, checkpointing, FSDP2", LLAMA_8B, 32, "bf16", 1, 4096, 16, True),
        Case(
            "70b-nf4", "70B×80, NF4, 4 × 1,024 tokens a rank, r 12, checkpointing, FSDP", LLAMA_70B, 80, "nf4", 1, 1024, 12,
            True, accumulation=4, warm=1, steps=3,
        ),
        SINGLE["tiny"],
        SINGLE["tiny-bf16"],
        SINGLE["tiny-nf4"],
    )
}  # fmt: skip
TIMEOUT_S = 1800


# ---- one rank ------------------------------------------------------------------------------------------------------
def shard(model: nn.Module, case: Case) -> nn.Module:
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


def measure(case: Case, implementation: Implementation, source: Path) -> dict:
    """This rank's row; with several ranks the time is the slowest rank's and the peak the largest."""
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if case.device == "cuda":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group("nccl" if case.device == "cuda" else "gloo")
    torch.manual_seed(SEED)
    model = add_adapter(build_base(case, storage=torch.bfloat16 if world > 1 else torch.uint8), case, implementation)
    if world > 1:
        model = shard(model, case)
    if case.device == "cuda":
        torch.cuda.empty_cache()
    row = timed_steps(make_step(model, case, "eager"), case)
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
def start(case: str, implementation: str, world: int, peer: str) -> dict:
    """The row of one case, implementation and number of ranks.

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
    command += ["--rank", case, implementation, "--source", str(SOURCE)]
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
    raise MeasurementError(f"{case} {implementation} on {world}: {[rank.returncode for rank in ranks]}\n{errors}")


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
    names = [name for name in IMPLEMENTATIONS if IMPLEMENTATIONS[name].package]
    default = ["upstream-lora", "upstream-dora", "lora", "dora-triton"]
    parser.add_argument("--implementations", nargs="+", choices=names, default=default)
    parser.add_argument("--worlds", nargs="+", type=int, default=[1, 2], help="numbers of ranks")
    parser.add_argument("--peer", help="the interpreter that has upstream's peft installed")
    parser.add_argument("--output", type=Path, help="the file for the rows; default: results/sharded/DEVICE.jsonl")
    parser.add_argument("--commit", help="the commit to write down where there is no repository")
    parser.add_argument("--rank", nargs=2, metavar=("CASE", "IMPLEMENTATION"), help=argparse.SUPPRESS)
    parser.add_argument("--source", type=Path, help=argparse.SUPPRESS)
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    if arguments.rank:
        case, implementation = arguments.rank
        row = measure(CASES[case], IMPLEMENTATIONS[implementation], arguments.source.resolve())
        print(MARK + json.dumps(row), flush=True)
        return 0
    upstream = any(IMPLEMENTATIONS[name].package == "upstream" for name in arguments.implementations)
    peer = arguments.peer or (find_peer() if upstream else sys.executable)
    run = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    known = {"run": run, "commit": arguments.commit or commit(), "source": source_digest()}
    failed = 0
    for name in arguments.cases:
        for implementation in arguments.implementations:
            alone = None
            for world in sorted(arguments.worlds):
                try:
                    row = start(name, implementation, world, peer)
                except MeasurementError as error:
                    failed += 1
                    print(f"FAILED {error}", file=sys.stderr, flush=True)
                    continue
                alone = row["p50_ms"] if world == 1 else alone
                row["weak_scaling"] = None if alone is None else round(alone / row["p50_ms"], 4)
                row = {"case": name, "implementation": implementation, **known, **row}
                append(row, arguments.output or RESULTS / "sharded" / path_of(row["device"]).name)
                print(
                    f"{name:10} {implementation:15} {world} ranks {row['p50_ms']:10.2f} ms {row['peak_mib']:10.1f} MiB "
                    f"scaling {row['weak_scaling']}", flush=True,
                )  # fmt: skip
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
