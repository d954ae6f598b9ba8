# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""Sphinx's settings: Markdown pages, API pages from docstrings, and the contents from `_toctree.yml`."""

from pathlib import Path

import yaml

import peft

project = "PEFT with a fast DoRA"
author = "The PEFT-Triton authors"
copyright = "2026, The PEFT-Triton authors"
release = version = peft.__version__
html_title = f"peft {release}"
html_theme = "furo"

extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors = 3
autodoc_member_order = "bysource"
autodoc_typehints = "none"
# Docstrings are written for people who read the source: what is not markup is shown as it stands.
default_role = "code"
suppress_warnings = ["docutils", "ref.python"]


def contents() -> str:
    """The sections of `_toctree.yml` as Sphinx's own directives."""
    sections = yaml.safe_load(Path(__file__).with_name("_toctree.yml").read_text(encoding="utf-8"))
    blocks = []
    for section in sections:
        pages = [f"{page['title']} <{page['local']}>" for page in section["sections"] if page["local"] != "index"]
        blocks.append("\n".join(["```{toctree}", ":hidden:", f":caption: {section['title']}", "", *pages, "```"]))
    return "\n\n".join(blocks)


def add_contents(app, name: str, source: list[str]) -> None:
    if name == "index":
        source[0] += "\n" + contents()


def setup(app) -> None:
    app.connect("source-read", add_contents)
