# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Writes the tables of measured results into the pages that quote them; what has no row that may be quoted is not written.

python table.py            # print them
python table.py --write    # put them between the marks in README.md and in pages of docs/source
python table.py --check    # fail if a page says something else than the rows
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

from registry import CASES, IMPLEMENTATIONS
from rows import RESULTS, ROOT, files, has_curves, latest_runs, read, time_ratio
from verify import curves_apart, faults, faults_of_curves

sys.path.append(str(ROOT / "docs"))
from marked import between

BEGIN, END = "<!-- results: begin (benchmarks/table.py) -->", "<!-- results: end -->"
GUIDES = ROOT / "docs" / "source" / "developer_guides"
COLUMNS = {
    "floor": "no adapter",
    "upstream-lora": "upstream LoRA",
    "upstream-dora": "upstream DoRA",
    "lora": "our LoRA",
    "dora": "our DoRA, PyTorch",
    "dora-triton": "**our DoRA, Triton**",
    "dora-triton-graph": "in a CUDA graph",
    "dora-triton-compiled": "compiled",
}
GRAPHS = ["upstream-lora", "dora-triton", "dora-triton-graph", "dora-triton-compiled"]
NOTHING = (
    "No row of a GPU stands in the repository for this yet. `make bench` on a machine with one measures ours beside "
    "upstream, stores the rows in `benchmarks/results/`, and fills this place."
)


@dataclass(frozen=True)
class Quoted:
    """What a page quotes: the cases of some kinds that were measured with one of `needed`, but for the tiny ones, which only
    say that the harness works; of `columns`."""

    kinds: tuple[str, ...]
    columns: list[str]
    needed: tuple[str, ...] = tuple(COLUMNS)

    def wants(self, case: str, run: dict[str, dict]) -> bool:
        if case.startswith("tiny"):
            return False
        return CASES[case].kind in self.kinds and any(name in run for name in self.needed)


TRAINING = Quoted(("train",), list(COLUMNS)[:6])
PAGES = {
    ROOT / "README.md": TRAINING,
    ROOT / "docs" / "source" / "methods" / "dora_triton.md": TRAINING,
    GUIDES / "inference.md": Quoted(("decode", "prefill"), list(COLUMNS)),
    GUIDES / "torch_compile.md": Quoted(("train", "decode"), GRAPHS, tuple(GRAPHS[2:])),
}


def cell(run: dict[str, dict], name: str) -> str:
    """`time / memory` of one implementation, with the ratio of its time to upstream LoRA's in the same run."""
    if name not in run:
        return ""
    row = run[name]
    milliseconds = f"{row['p50_ms']:,.0f}" if row["p50_ms"] >= 100 else f"{row['p50_ms']:.3g}"
    text = milliseconds if row["peak_mib"] is None else f"{milliseconds} / {row['peak_mib']:,.0f}"
    if "upstream-lora" in run and IMPLEMENTATIONS[name].package == "ours":
        text += f" ({time_ratio(row, run['upstream-lora']):.2f}×)"
    return text


def table_of(path: Path, quoted: Quoted = TRAINING) -> str | None:
    """The table of one file's rows, as far as a page quotes them; None if none of them may be quoted."""
    rows = read(path)
    runs = latest_runs([row for row in rows if not faults(row, rows)], quoted.needed)
    runs = {name: runs[name] for name in CASES if name in runs and quoted.wants(name, runs[name])}
    if not runs:
        return None
    columns = [name for name in quoted.columns if any(name in run for run in runs.values())]
    last = next(reversed(runs.values()))
    row = last.get("dora-triton") or next(iter(last.values()))
    versions = row["versions"]
    lines = [
        f"{row['device']}, torch {versions['torch']}, triton {versions['triton']}, transformers "
        f"{versions['transformers']}; milliseconds a step (median) / peak MiB; in brackets the time as a "
        "part of upstream LoRA's in the same round (the median of the rounds).",
        "",
        "| case | " + " | ".join(COLUMNS[name] for name in columns) + " |",
        "| --- |" + " ---: |" * len(columns),
    ]
    for name, run in runs.items():
        lines.append(f"| {name}: {CASES[name].what} | " + " | ".join(cell(run, column) for column in columns) + " |")
    return "\n".join(lines)


def sentence_of(path: Path) -> str | None:
    """What one file's curves say, the last of each precision; None if none of them may be quoted."""
    rows = {row["precision"]: row for row in read(path) if not faults_of_curves(row)}
    if not rows:
        return None
    ours, upstream = next(iter(rows.values()))["trainings"].values()
    steps = min(len(training["losses"]) for row in rows.values() for training in row["trainings"].values())
    apart = " and ".join(f"{curves_apart(row):.1e} in {precision}" for precision, row in rows.items())
    return (
        f"{ours['device']}: over {steps} steps of the example's small model the losses of our DoRA and of upstream's "
        f"(peft {upstream['versions']['peft']}) differ by {apart} in the mean; curves in `benchmarks/results/{path.stem}.png`."
    )


def results(quoted: Quoted) -> str:
    """The tables of every GPU that has rows, or the sentence that says how to get them; those of CPUs; then what the curves
    say."""
    curves = [sentence_of(path) for path in files() if has_curves(path)]
    tables = {path.name: table_of(path, quoted) for path in files() if not has_curves(path)}
    gpus = [table for name, table in tables.items() if table and not name.startswith("cpu")]
    cpus = [table for name, table in tables.items() if name.startswith("cpu")]
    return "\n\n".join(filter(None, [*(gpus or [NOTHING]), *cpus, *curves]))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite the pages")
    parser.add_argument("--check", action="store_true", help="fail if a page differs")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.check):
        print("\n\n".join(f"{path.relative_to(ROOT)}:\n\n{results(quoted)}" for path, quoted in PAGES.items()))
        return 0
    stale = 0
    for path, quoted in PAGES.items():
        page = path.read_text(encoding="utf-8")
        new = between(page, BEGIN, END, results(quoted))
        if new != page:
            stale += 1
            if arguments.write:
                path.write_text(new, encoding="utf-8")
            print(f"{'rewritten' if arguments.write else 'STALE'}: {path.relative_to(ROOT)}")
    print(f"from {RESULTS.relative_to(ROOT)}: {len(files())} files of rows")
    return 1 if stale and arguments.check else 0


if __name__ == "__main__":
    sys.exit(main())
