# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Draws time and memory of the rows that may be quoted, against upstream's LoRA and the floor.

python plot.py [FILE ...]          # results/NAME.jsonl gives results/NAME.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from registry import CASES, IMPLEMENTATIONS
from rows import files, latest_runs, read
from verify import faults

matplotlib.use("Agg")

import matplotlib.pyplot as plt

LABELS = {
    "floor": "no adapter (floor)",
    "upstream-lora": "LoRA, upstream",
    "upstream-dora": "DoRA, upstream",
    "lora": "LoRA, ours",
    "dora": "DoRA, ours, PyTorch",
    "dora-triton": "DoRA, ours, Triton",
}
COLOURS = {
    "floor": "#b0b0b0",
    "upstream-lora": "#f2b134",
    "upstream-dora": "#d1495b",
    "lora": "#7fb7be",
    "dora": "#3d7ea6",
    "dora-triton": "#1b3a5c",
}


def draw_panel(axes, runs: dict[str, dict[str, dict]], field: str, title: str) -> None:
    """One group of bars a case: `field` divided by upstream LoRA's, the value itself written above the bar."""
    names = [name for name in IMPLEMENTATIONS if any(name in run for run in runs.values())]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for position, run in enumerate(runs.values()):
            if name not in run:
                continue
            unit = run.get("upstream-lora", run.get("upstream-dora", run[name]))[field]
            x = position + (i - (len(names) - 1) / 2) * width
            axes.bar(x, run[name][field] / unit, width, color=COLOURS[name])
            value = f"{run[name][field]:,.0f}" if run[name][field] >= 100 else f"{run[name][field]:.3g}"
            axes.annotate(value, (x, run[name][field] / unit), ha="center", va="bottom", fontsize=6, rotation=90)
    axes.axhline(1.0, color="#f2b134", linewidth=1, linestyle="--")
    axes.set_xticks(range(len(runs)), list(runs))
    axes.set_title(title)
    axes.margins(y=0.15)
    axes.spines[["top", "right"]].set_visible(False)


def draw(path: Path) -> Path | None:
    """Draws the rows of one file beside it, as a PNG; None if none of them may be quoted."""
    rows = read(path)
    rows = [row for row in rows if not faults(row, rows)]
    if not rows:
        return None
    runs = latest_runs(rows)
    runs = {name: runs[name] for name in CASES if name in runs}
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(max(7.0, 2.2 * len(runs)), 8), layout="constrained")
    draw_panel(upper, runs, "p50_ms", "time of an optimizer step, relative to upstream's LoRA (ms above the bars)")
    draw_panel(lower, runs, "peak_mib", "peak memory, relative to upstream's LoRA (MiB above the bars)")
    names = [name for name in IMPLEMENTATIONS if any(name in run for run in runs.values())]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name], label=LABELS[name]) for name in names]
    figure.legend(handles=handles, fontsize=8, frameon=False, ncols=4, loc="outside lower center")
    figure.suptitle(rows[-1]["device"])
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=150, metadata={"Software": None})
    plt.close(figure)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("files", nargs="*", type=Path, help="files of rows; default: all under results/")
    for path in files(parser.parse_args().files):
        print(draw(path) or f"{path}: no row that may be quoted")


if __name__ == "__main__":
    main()
