# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Pages of which scripts write a part, between two marks."""

from __future__ import annotations

import argparse
from pathlib import Path


def between(page: str, begin: str, end: str, text: str) -> str:
    """`page` with `text` between two marks.

    Raises:
        ValueError: The marks are not there, once each and in order.
    """
    head, first, rest = page.partition(begin)
    _, last, tail = rest.partition(end)
    if not first or not last or begin in tail or end in head + tail:
        raise ValueError(f"expected the marks {begin!r} and {end!r}, once each and in order")
    return f"{head}{begin}\n{text}\n{end}{tail}"


def run(description: str, pages: list[Path], begin: str, end: str, text: str) -> int:
    """The main function of such a script: print `text`, or with `--write` or `--check` see to it that the pages hold it.

    Returns:
        The exit code: 1 where `--check` finds another text.
    """
    parser = argparse.ArgumentParser(description=description.splitlines()[0])
    parser.add_argument("--write", action="store_true", help="rewrite what differs")
    parser.add_argument("--check", action="store_true", help="fail if something differs")
    arguments = parser.parse_args()
    if not (arguments.write or arguments.check):
        print(text)
        return 0
    stale = False
    for path in pages:
        page = path.read_text(encoding="utf-8")
        new = between(page, begin, end, text)
        if new == page:
            continue
        stale = True
        if arguments.write:
            path.write_text(new, encoding="utf-8")
        print(f"{path.name}: {'rewritten' if arguments.write else f'stale, run python {parser.prog} --write'}")
    return 1 if stale and arguments.check else 0
