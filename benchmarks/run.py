# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Measures ours beside an installed upstream, one process a case and implementation, in turn, and stores the rows. The
processes of a case are started together, and import; none touches the device before its turn, when the others only wait.

    python run.py                               # every case that this machine can run
    python run.py --cases c1 c4 --rounds 3 --verify
    python run.py --peer /path/to/upstream/environment/bin/python

Ours is imported from `src` by PYTHONPATH; upstream is the `peft` that the peer interpreter finds without it. Without
--peer that is this interpreter, or where it has no peft but ours, the environment that tests/interop builds. With --verify
the tests of what is measured run first, and rows carry their result; verify.py refuses rows without it. A later call may
take it over (--tested FILE, the file of those rows), as long as sources and GPU are the same.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from registry import CASES, IMPLEMENTATIONS, PACKED, implementations_of, predict_ms
from rows import MARK, READY, ROOT, SOURCE, append, commit, path_of, read, source_digest
from verify import TESTS

TIMEOUT_S = 3600


class MeasurementError(RuntimeError):
    """A process that should have printed a row did not."""


def environment_of(package: str | None) -> dict[str, str]:
    """This process's environment with our sources first on the path, or off it for upstream."""
    environment = dict(os.environ)
    others = [
        entry
        for entry in environment.pop("PYTHONPATH", "").split(os.pathsep)
        if entry and Path(entry).resolve() != SOURCE
    ]
    path = others if package == "upstream" else [str(SOURCE), *others]
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(path)
    environment.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    return environment


class Process:
    """`script` of this folder in a process of its own, on `package` (None: on neither)."""

    def __init__(self, script: str, arguments: list[str], package: str | None, peer: str) -> None:
        self.name = " ".join([script, *arguments])
        # A file, since nobody reads a pipe while the process waits.
        self.errors = tempfile.TemporaryFile("w+")
        self.process = subprocess.Popen(
            [peer if package == "upstream" else sys.executable, str(ROOT / "benchmarks" / script), *arguments],
            env=environment_of(package), cwd=ROOT, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.errors,
        )  # fmt: skip

    def wait_until_ready(self) -> None:
        """Returns when the process has said that it waits for its turn, or has ended."""
        for line in self.process.stdout:
            if line.strip() == READY:
                return

    def finish(self, timeout: float = TIMEOUT_S) -> dict:
        """Gives the process its turn; what it says in one line.

        Raises:
            MeasurementError: if it fails or prints no such line; the end of its error output is in the message.
            subprocess.TimeoutExpired: if it has not ended after `timeout` seconds; it is killed.
        """
        with self.errors:
            try:
                said, _ = self.process.communicate("\n", timeout)
            except subprocess.TimeoutExpired:
                self.kill()
                raise
            self.errors.seek(0)
            errors = self.errors.read()
        for line in said.splitlines():
            if self.process.returncode == 0 and line.startswith(MARK):
                return json.loads(line[len(MARK) :])
        raise MeasurementError(f"{self.name}: exit code {self.process.returncode}\n{errors[-1000:]}")

    def kill(self) -> None:
        self.process.kill()
        self.process.wait()


def start(script: str, arguments: list[str], package: str | None, peer: str, timeout: float = TIMEOUT_S) -> dict:
    """What `script` says, which waits for no turn; errors as from `Process.finish`."""
    return Process(script, arguments, package, peer).finish(timeout)


def waiting(case: str, implementations: list[str], peer: str) -> dict[str, Process]:
    """A process for each of `implementations`, which has imported what it needs and waits for its turn."""
    processes = {
        name: Process(
            "measure.py", [case, name, "--source", str(SOURCE), "--wait"], IMPLEMENTATIONS[name].package, peer
        )
        for name in implementations
    }
    for process in processes.values():
        process.wait_until_ready()
    return processes


def find_peer() -> str:
    """An interpreter that has upstream's `peft`: this one, or the one that the interop tests build for themselves."""
    probe = "import importlib.util as u; spec = u.find_spec('peft'); print(spec.origin if spec else '')"
    command = [sys.executable, "-c", probe]
    done = subprocess.run(
        command, env=environment_of("upstream"), cwd=ROOT / "benchmarks", capture_output=True, text=True
    )
    origin = done.stdout.strip()
    if origin and not Path(origin).resolve().is_relative_to(SOURCE):
        return sys.executable
    sys.path[:0] = [str(ROOT / "tests"), str(ROOT / "tests" / "interop")]
    from peer import peer_python

    return str(peer_python())


def run_tests(tests: list[str]) -> dict:
    """Runs the tests of what is measured, those on the GPU too where there is one, and says how they went."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, env=environment_of("ours"), cwd=ROOT, capture_output=True, text=True)
    counts = {name: int(number) for number, name in re.findall(r"(\d+) (passed|failed|errors?)\b", done.stdout[-400:])}
    if done.returncode != 0:
        print(done.stdout[-4000:], done.stderr[-2000:], sep="\n", file=sys.stderr)
    return {
        "command": " ".join([*_pytest_options(), "pytest", *tests]),
        "exit": done.returncode,
        "passed": counts.get("passed", 0),
        "failed": counts.get("failed", 0) + counts.get("error", 0) + counts.get("errors", 0),
        "source": source_digest(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
    }


def tests_of(path: Path) -> dict:
    """The tests that ran with the rows of `path`.

    Raises:
        ValueError: if none of them was measured on these sources and this GPU, after green tests.
    """
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    for row in reversed(read(path)):
        tests = row.get("tests")
        if tests and (tests["source"], tests["gpu"], tests["exit"]) == (source_digest(), gpu, 0):
            return tests
    raise ValueError(f"--tested {path}: no row has green tests of these sources on {gpu or 'the CPU'}; use --verify")


def _pytest_options() -> list[str]:
    """The options that pytest takes from the environment, as a shell would be given them."""
    options = os.environ.get("PYTEST_ADDOPTS")
    return [f'PYTEST_ADDOPTS="{options}"'] if options else []


def cases_here(names: list[str] | None) -> list[str]:
    """The cases asked for, or all that this machine has the device and the packages for (70b only when asked for: it
    takes long)."""
    if names:
        return names
    device = "cuda" if torch.cuda.is_available() else "cpu"
    missing = {base for base, package in PACKED.items() if importlib.util.find_spec(package) is None}
    here = [name for name, case in CASES.items() if case.device == device and name != "70b"]
    return [name for name in here if CASES[name].base not in missing]


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", nargs="+", choices=CASES, help="default: all that this machine can run but 70b")
    parser.add_argument("--implementations", nargs="+", choices=IMPLEMENTATIONS, help="default: the registry's")
    parser.add_argument("--rounds", type=int, default=1, help="processes for each case and implementation")
    parser.add_argument("--peer", help="the interpreter that has upstream's peft installed; default: see above")
    parser.add_argument("--output", type=Path, help="the file for the rows; default: results/DEVICE.jsonl")
    parser.add_argument("--commit", default=None, help="the commit to write down where there is no repository")
    parser.add_argument("--verify", action="store_true", help="run the tests first; measure only if they are green")
    parser.add_argument("--tested", type=Path, help="take over the tests that ran with the rows of this file")
    parser.add_argument("--tests", nargs="+", default=[TESTS], help="pytest's arguments for --verify")
    return parser.parse_args()


def main() -> int:
    arguments = parse_arguments()
    tests = tests_of(arguments.tested) if arguments.tested else None
    if arguments.verify:
        tests = run_tests(arguments.tests)
        if tests["exit"] != 0:
            print(f"not measured: the tests are not green ({tests['failed']} failed)", file=sys.stderr)
            return 1
    run = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    known = {"run": run, "commit": arguments.commit or commit(), "source": source_digest(), "tests": tests}
    peer = arguments.peer or find_peer()
    failed = 0
    for name in cases_here(arguments.cases):
        for i_round in range(arguments.rounds):
            processes = waiting(name, arguments.implementations or implementations_of(CASES[name]), peer)
            for implementation, process in processes.items():
                prediction = predict_ms(CASES[name], IMPLEMENTATIONS[implementation])
                head = {"case": name, "implementation": implementation, "round": i_round, **known}
                head["prediction_ms"] = prediction and round(prediction, 2)
                try:
                    row = {**head, **process.finish()}
                except (MeasurementError, subprocess.TimeoutExpired) as error:
                    failed += 1
                    print(f"FAILED {error}", file=sys.stderr, flush=True)
                    continue
                append(row, arguments.output or path_of(row["device"]))
                print(
                    f"{name:10} {implementation:20} {row['p50_ms']:10.2f} ms {row['peak_mib']:10.1f} MiB", flush=True
                )
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
