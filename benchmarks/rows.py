# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Rows: where they are kept, how they are read and written, and what identifies the sources that they speak of."""

from __future__ import annotations

import hashlib
import json
import re
import subprocess
from collections.abc import Collection
from pathlib import Path
from statistics import median

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"
SOURCE = ROOT / "src"
MARK, READY = "ROW ", "READY"  # what a measuring process says: its row after MARK, and that it waits for its turn


def source_digest() -> str:
    """Sixteen hex digits over our package's files: equal for equal sources, committed or not."""
    digest = hashlib.sha256()
    for path in sorted((SOURCE / "peft").rglob("*")):
        if path.suffix in (".py", ".json") and path.is_file():
            digest.update(path.relative_to(SOURCE).as_posix().encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:16]


def commit() -> str:
    """The checked-out commit, with `+` if the tree differs from it; `"unknown"` outside a repository."""
    try:
        head = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
        changed = subprocess.run(
            ["git", "status", "--porcelain", "--", "src"], cwd=ROOT, capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"
    return head + ("+" if changed else "")


def path_of(device: str, prefix: str = "") -> Path:
    """The file of a device's rows, such as `results/nvidia-h100-80gb-hbm3.jsonl`, its name after `prefix`."""
    return RESULTS / (prefix + re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".jsonl")


def append(row: dict, path: Path) -> None:
    """Adds `row` to `path` as one line, in one write."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row, ensure_ascii=False) + "\n")


def read(path: Path) -> list[dict]:
    """The rows of one file.

    Raises:
        ValueError: if a line is no JSON object, with its number.
    """
    rows = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
        if not isinstance(row, dict):
            raise ValueError(f"{path}, line {number}: not an object")
        rows.append(row)
    return rows


CURVES = "losses-"  # what the name of a file of curves (losses.py) begins with


def files(paths: list[Path] | None = None) -> list[Path]:
    """`paths`, or every file of rows that stands in the repository, curves among them."""
    return paths or sorted(RESULTS.glob("*.jsonl"))


def has_curves(path: Path) -> bool:
    return path.name.startswith(CURVES)


def latest_runs(rows: list[dict], needed: Collection[str] | None = None) -> dict[str, dict[str, dict]]:
    """For each case the rows of its last run, or of the last one with an implementation of `needed`: `{case: {implementation: row}}`.

    A run measures all its implementations on one machine. Its rounds are joined: times by their median, the peak by its
    maximum, so that one slow process does not decide.
    """
    last = {row["case"]: row["run"] for row in rows if needed is None or row["implementation"] in needed}
    joined: dict[str, dict[str, dict]] = {}
    for case, run in last.items():
        rounds: dict[str, list[dict]] = {}
        for row in rows:
            if row["case"] == case and row["run"] == run:
                rounds.setdefault(row["implementation"], []).append(row)
        joined[case] = {name: join_rounds(same) for name, same in rounds.items()}
    return joined


def join_rounds(same: list[dict]) -> dict:
    """One row for the rounds `same` of one case and implementation: that of median time, with the highest peak and the
    times of all rounds."""
    middle = sorted(same, key=lambda row: row["p50_ms"])[(len(same) - 1) // 2]
    peaks = [row["peak_mib"] for row in same if row["peak_mib"] is not None]
    by_round = {row["round"]: row["p50_ms"] for row in same}
    return {**middle, "peak_mib": max(peaks, default=None), "rounds": len(same), "by_round": by_round}


def time_ratio(row: dict, other: dict) -> float:
    """The time of one joined row as a part of another's: the median over their common rounds, since what a host can do changes
    from minute to minute, and the processes of a round run one after the other."""
    mine, its = row.get("by_round", {}), other.get("by_round", {})
    pairs = [(time, its[i]) for i, time in mine.items() if i in its]
    return median(time / unit for time, unit in pairs or [(row["p50_ms"], other["p50_ms"])])
