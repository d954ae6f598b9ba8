# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The process that runs in upstream's environment: reads the name of a recipe and its arguments, answers its result."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
import sys
import traceback
import types
import warnings
from pathlib import Path


def _stand_in_for_attrs() -> None:
    """Upstream's CorDA imports attrs, which its release does not require: without it, standard dataclasses serve."""
    if importlib.util.find_spec("attr") is None:
        module = types.ModuleType("attr")
        module.dataclass = dataclasses.dataclass
        sys.modules["attr"] = module


def main() -> None:
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what libraries print must not end up among the answers
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

    _stand_in_for_attrs()
    import faults  # noqa: F401  registers its recipes
    import faults_dora  # noqa: F401  likewise
    import faults_lora  # noqa: F401  likewise
    import faults_megatron  # noqa: F401  likewise
    import operation_recipes  # noqa: F401  likewise
    import option_recipes  # noqa: F401  likewise
    import recipes
    import recipes_family  # noqa: F401
    import recipes_files  # noqa: F401
    import recipes_xlora  # noqa: F401
    from peer import receive, send

    import peft

    warnings.simplefilter("ignore")
    send(answers, {"version": peft.__version__, "location": peft.__file__})
    while True:
        try:
            recipe, arguments = receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer = {"value": recipes.run(recipe, **arguments)}
        except Exception as error:  # every failure of a recipe is an answer to it
            answer = {"raised": (type(error).__name__, str(error), traceback.format_exc())}
        send(answers, answer)


if __name__ == "__main__":
    main()
