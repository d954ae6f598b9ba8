# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Refuses rows that may not be quoted, and says which goals the others meet.

    python verify.py [FILE ...] [--goals]

A row of times is refused if a field is missing or out of order, if its tests were not green on the sources that it measured (on
a GPU for a row of a GPU), or if its losses are not those of the same method upstream; a row of
curves, if it is not whole, if nothing was learnt, or if ours strays from upstream's. The exit code is 1 if a row is
refused, and with --goals also if a goal that has rows is missed.
"""

from __future__ import annotations

import argparse
import math
import sys
from pathlib import Path

from registry import CASES, GOALS, IMPLEMENTATIONS, LOSS_BOUND, LOSS_GAIN, LOSS_STEPS, PRECISIONS, Goal
from rows import files, has_curves, latest_runs, read, time_ratio

FIELDS = {
    "case": str,
    "implementation": str,
    "run": str,
    "commit": str,
    "source": str,
    "device": str,
    "versions": dict,
    "p20_ms": float,
    "p50_ms": float,
    "p80_ms": float,
    "peak_mib": float,
    "times_ms": list,
    "losses": list,
}
# Same weights, same batches, same start of A: two implementations of one method differ by rounding alone. The losses
# are near ln(vocabulary) ≈ 10, printed to 1e-6, and computed in bf16 after up to eleven AdamW steps. Without training
# they are of few tokens' logits, over which rounding does not average out.
LOSS_TOLERANCE = {"train": 2e-2, "prefill": 1e-1, "decode": 1e-1}
# Green tests of something else, or a handful of them, say nothing of what was measured.
TESTS, LEAST_TESTS = "tests/dora", 100
COUNTERPART = {
    "lora": "upstream-lora",
    "dora": "upstream-dora",
    "dora-triton": "upstream-dora",
    "dora-triton-graph": "upstream-dora",
    "dora-triton-compiled": "upstream-dora",
}


def faults_of_fields(row: dict) -> list[str]:
    """What is wrong with the fields of `row`, taken alone."""
    faults = []
    for name, kind in FIELDS.items():
        value = row.get(name)
        if name == "peak_mib" and value is None and str(row.get("implementation")).endswith("-graph"):
            continue  # not measured: the first rows of captured steps counted what is outside of the graph alone
        if kind is float and isinstance(value, int) and not isinstance(value, bool):
            value = float(value)
        if not isinstance(value, kind):
            faults.append(f"{name} is {value!r}, not {kind.__name__}")
    if faults:
        return faults
    if row["case"] not in CASES:
        faults.append(f"case {row['case']!r} is not in the registry")
    if row["implementation"] not in IMPLEMENTATIONS:
        faults.append(f"implementation {row['implementation']!r} is not in the registry")
    if not 0 < row["p20_ms"] <= row["p50_ms"] <= row["p80_ms"] < math.inf:
        faults.append("0 < p20 <= p50 <= p80 does not hold")
    if not row["times_ms"] or not row["losses"] or not all(map(math.isfinite, row["losses"])):
        faults.append("no times, no losses, or a loss that is not finite")
    return faults


def faults_of_tests(row: dict) -> list[str]:
    """Whether the tests of our package were green on the sources that `row` measured."""
    if IMPLEMENTATIONS[row["implementation"]].package != "ours":
        return []
    tests = row.get("tests")
    if not isinstance(tests, dict):
        return ["no tests ran with it (run.py --verify)"]
    faults = []
    if tests.get("exit") != 0 or tests.get("failed") != 0 or not tests.get("passed"):
        faults.append(f"its tests are not green: {tests.get('passed')} passed, {tests.get('failed')} failed")
    elif TESTS not in str(tests.get("command")).split() or tests["passed"] < LEAST_TESTS:
        faults.append(f"its tests are not those of {TESTS}, of which at least {LEAST_TESTS} must have passed")
    if tests.get("source") != row["source"]:
        faults.append("its tests ran on other sources")
    if CASES[row["case"]].device == "cuda" and tests.get("gpu") != row["device"]:
        faults.append(f"its tests ran on {tests.get('gpu') or 'the CPU'}, not on {row['device']}")
    return faults


def faults_of_losses(row: dict, run: list[dict]) -> list[str]:
    """Whether `row` trained as upstream's row of the same method and run did."""
    name = COUNTERPART.get(row["implementation"])
    peers = [other for other in run if other["implementation"] == name and other["case"] == row["case"]]
    if not peers:
        return []
    apart = max(abs(a - b) for a, b in zip(row["losses"], peers[0]["losses"], strict=False))
    tolerance = LOSS_TOLERANCE[CASES[row["case"]].kind]
    if apart > tolerance:
        return [f"its losses differ from {name}'s by {apart:.2e}, more than {tolerance:.0e}"]
    return []


def faults(row: dict, rows: list[dict]) -> list[str]:
    """Why `row`, one of `rows`, may not be quoted; empty if it may."""
    found = faults_of_fields(row)
    if found:
        return found
    run = [other for other in rows if other.get("run") == row["run"] and not faults_of_fields(other)]
    return faults_of_tests(row) + faults_of_losses(row, run)


def curves_apart(row: dict) -> float:
    """The mean over the steps of |Δ| between the two losses of one row of curves."""
    ours, upstream = (training["losses"] for training in row["trainings"].values())
    return sum(abs(a - b) for a, b in zip(ours, upstream, strict=True)) / len(ours)


def faults_of_curves(row: dict) -> list[str]:
    """Why a row of `losses.py` may not be quoted; empty if it may."""
    for name in ("run", "commit", "source", "implementation"):
        if not isinstance(row.get(name), str):
            return [f"{name} is {row.get(name)!r}, not str"]
    if row.get("precision") not in PRECISIONS:
        return [f"precision {row.get('precision')!r} is none of {', '.join(PRECISIONS)}"]
    trainings = row.get("trainings")
    wanted = {row["implementation"], COUNTERPART.get(row["implementation"])}
    if not isinstance(trainings, dict) or set(trainings) != wanted:
        return [f"it has not the trainings of {row['implementation']} and upstream alone"]
    curves = [training["losses"] for training in trainings.values()]
    if len({len(curve) for curve in curves}) != 1 or len(curves[0]) < LOSS_STEPS:
        return [f"its curves differ in length, or have less than {LOSS_STEPS} steps"]
    if not all(map(math.isfinite, curves[0] + curves[1])):
        return ["a loss is not finite"]
    if any(sum(curve[-50:]) > (1 - LOSS_GAIN) * sum(curve[:50]) for curve in curves):
        return [f"a loss fell by less than {LOSS_GAIN:.0%}: nothing was learnt"]
    apart = curves_apart(row)
    return [] if apart <= LOSS_BOUND else [f"mean |Δ| of the losses is {apart:.2e}, more than {LOSS_BOUND:.0e}"]


def check_goal(goal: Goal, run: dict[str, dict]) -> tuple[bool, str] | None:
    """`(met, what was found)` for one case's rows, or None where a row that the goal speaks of is not there."""
    ours = run.get(goal.implementation)
    other = run.get(goal.against) if goal.against else ours
    if ours is None or other is None:
        return None
    found = []
    if goal.at_most_ms is not None:
        found.append((ours["p50_ms"] <= goal.at_most_ms, f"{ours['p50_ms']:.2f} ms of {goal.at_most_ms}"))
    if goal.time is not None:
        ratio = time_ratio(ours, other)
        found.append((ratio <= goal.time, f"time {ratio:.3f} of {goal.against}, goal {goal.time}"))
    if goal.memory is not None:
        ratio = ours["peak_mib"] / other["peak_mib"]
        found.append((ratio <= goal.memory, f"memory {ratio:.3f}, goal {goal.memory}"))
    if goal.less_mib is not None:
        less = other["peak_mib"] - ours["peak_mib"]
        found.append((less >= goal.less_mib, f"{less:,.0f} MiB less, goal {goal.less_mib:,.0f}"))
    return all(met for met, _ in found), "; ".join(text for _, text in found)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="files of rows; default: all under results/")
    parser.add_argument("--goals", action="store_true", help="fail if a goal is missed")
    arguments = parser.parse_args()
    refused = missed = accepted = 0
    for path in files(arguments.files):
        rows = read(path)
        good = []
        for number, row in enumerate(rows, 1):
            found = faults_of_curves(row) if has_curves(path) else faults(row, rows)
            if found:
                refused += 1
                what = row.get("precision" if has_curves(path) else "case")
                print(f"REFUSED {path.name}:{number} {what} {row.get('implementation')}: {'; '.join(found)}")
            else:
                good.append(row)
        accepted += len(good)
        if has_curves(path):
            for row in good:
                print(
                    f"met    {path.stem} {row['precision']}: mean |Δ| {curves_apart(row):.1e}, bound {LOSS_BOUND:.0e}"
                )
            continue
        runs = latest_runs(good)
        for goal in GOALS:
            answer = check_goal(goal, runs.get(goal.case, {}))
            if answer is not None:
                missed += not answer[0]
                print(f"{'met   ' if answer[0] else 'MISSED'} {goal.case} {goal.implementation}: {answer[1]}")
    print(f"{accepted} rows may be quoted, {refused} are refused, {missed} goals are missed")
    return 1 if refused or (arguments.goals and missed) else 0


if __name__ == "__main__":
    sys.exit(main())
