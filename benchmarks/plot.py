# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Draws the rows that may be quoted: time and memory against upstream's LoRA and the floor; curves of losses.

python plot.py [FILE ...]          # results/NAME.jsonl gives results/NAME.png
"""

from __future__ import annotations

import argparse
from pathlib import Path

import matplotlib
from registry import CASES, IMPLEMENTATIONS, LOSS_BOUND
from rows import files, has_curves, latest_runs, read
from verify import curves_apart, faults, faults_of_curves

matplotlib.use("Agg")

import matplotlib.pyplot as plt

LABELS = {
    "floor": "no adapter (floor)",
    "upstream-lora": "LoRA, upstream",
    "upstream-dora": "DoRA, upstream",
    "lora": "LoRA, ours",
    "dora": "DoRA, ours, PyTorch",
    "dora-triton": "DoRA, ours, Triton",
    "dora-triton-graph": "the same in a CUDA graph",
    "dora-triton-compiled": "the same, compiled",
}
COLOURS = {
    "floor": "#b0b0b0",
    "upstream-lora": "#f2b134",
    "upstream-dora": "#d1495b",
    "lora": "#7fb7be",
    "dora": "#3d7ea6",
    "dora-triton": "#1b3a5c",
    "dora-triton-graph": "#6a4c93",
    "dora-triton-compiled": "#8ac926",
}


def draw_panel(axes, runs: dict[str, dict[str, dict]], field: str, title: str) -> None:
    """One group of bars a case: `field` divided by upstream LoRA's, the value itself written above the bar."""
    names = [name for name in IMPLEMENTATIONS if any(name in run for run in runs.values())]
    width = 0.8 / len(names)
    for i, name in enumerate(names):
        for position, run in enumerate(runs.values()):
            if name not in run or run[name][field] is None:
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
    if has_curves(path):
        return draw_curves(path)
    rows = read(path)
    rows = [row for row in rows if not faults(row, rows)]
    if not rows:
        return None
    runs = latest_runs(rows)
    runs = {name: runs[name] for name in CASES if name in runs}
    figure, (upper, lower) = plt.subplots(2, 1, figsize=(max(7.0, 2.2 * len(runs)), 8), layout="constrained")
    draw_panel(upper, runs, "p50_ms", "time of a step, relative to upstream's LoRA (ms above the bars)")
    draw_panel(lower, runs, "peak_mib", "peak memory, relative to upstream's LoRA (MiB above the bars)")
    names = [name for name in IMPLEMENTATIONS if any(name in run for run in runs.values())]
    handles = [plt.Rectangle((0, 0), 1, 1, color=COLOURS[name], label=LABELS[name]) for name in names]
    figure.legend(handles=handles, fontsize=8, frameon=False, ncols=4, loc="outside lower center")
    figure.suptitle(rows[-1]["device"])
    return save(figure, path)


def draw_curves(path: Path) -> Path | None:
    """As `draw`, of the last row in each precision: both losses, and below them how far apart they are."""
    rows = {row["precision"]: row for row in read(path) if not faults_of_curves(row)}
    if not rows:
        return None
    figure, axes = plt.subplots(2, len(rows), figsize=(6.5 * len(rows), 6), layout="constrained", squeeze=False)
    for (upper, lower), (precision, row) in zip(axes.T, rows.items(), strict=True):
        curves = {name: training["losses"] for name, training in row["trainings"].items()}
        for (name, curve), style in zip(curves.items(), ("-", ":"), strict=True):
            upper.plot(curve, style, color=COLOURS[name], linewidth=1.2, label=LABELS[name])
        upper.set_title(f"{precision}: loss of each step")
        upper.legend(frameon=False)
        ours, upstream = curves.values()
        lower.plot([abs(a - b) for a, b in zip(ours, upstream, strict=True)], color="#606060", linewidth=0.8)
        lower.axhline(LOSS_BOUND, color="#d1495b", linewidth=1, linestyle="--", label="bound of the mean")
        lower.set_yscale("symlog", linthresh=1e-7)
        lower.set_ylim(bottom=0)
        lower.set_title(f"|Δ|, mean {curves_apart(row):.1e}")
        lower.legend(frameon=False)
        for panel in (upper, lower):
            panel.spines[["top", "right"]].set_visible(False)
    figure.suptitle(next(iter(row["trainings"].values()))["device"])
    return save(figure, path)


def save(figure, path: Path) -> Path:
    """Writes `figure` beside the file of rows that it was drawn from."""
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
