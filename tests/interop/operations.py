# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The table of what is done with adapters that stand: recipes of `operation_recipes.py` and their arguments."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Operation:
    """A recipe with its arguments.

    Args:
        recipe: Its name.
        arguments: Of the recipe.
        room: By how much numbers may differ, in parts of the largest, where they come from an iteration.
        low_precision: Whether a part is computed by bitsandbytes in bfloat16 on some CPUs.
        wrong: Parts of the result that upstream has wrong.
        refused: Name of the error that both sides raise; where it differs there, "ours|theirs".
        there: Name of the error that upstream alone raises.
        folder: Whether the recipe needs a folder.
    """

    recipe: str
    arguments: dict[str, Any] = field(default_factory=dict)
    room: float = 0.0
    low_precision: bool = False
    wrong: tuple[str, ...] = ()
    refused: str = ""
    there: str = ""
    folder: bool = False


_DENSITY = {"density": 0.6}
TYPES: dict[str, dict[str, Any]] = {
    "linear": {}, "cat": {}, "svd": {}, "ties": _DENSITY, "ties_svd": _DENSITY, "dare_linear": _DENSITY,
    "dare_ties": _DENSITY, "dare_linear_svd": _DENSITY, "dare_ties_svd": _DENSITY, "magnitude_prune": _DENSITY,
    "magnitude_prune_svd": _DENSITY,
}  # fmt: skip
_OTHER_RANK = {"second": {"r": 2, "lora_alpha": 9}}


def _weighted(kind: str, **arguments: Any) -> Operation:
    facts = {key: arguments.pop(key) for key in ("wrong", "refused", "low_precision") if key in arguments}
    return Operation("weighted", {"combination_type": kind, **TYPES[kind], **arguments}, **facts)


WEIGHTED: dict[str, Operation] = {
    **{kind: _weighted(kind) for kind in TYPES},
    # the release leaves a fresh magnitude in place, see test_faults.py; the factors are combined as of plain adapters
    **{f"{kind}-dora": _weighted(kind, use_dora=True, wrong=("y",)) for kind in TYPES},
    "linear-negative": _weighted("linear", weights=[0.7, -0.4]),
    "svd-cut": _weighted("svd", svd_rank=3, svd_clamp=0.9, svd_full_matrices=False),
    "ties-frequency": _weighted("ties", majority_sign_method="frequency"),
    "cat-ranks": _weighted("cat", **_OTHER_RANK),
    "svd-ranks": _weighted("svd", **_OTHER_RANK),
    "linear-ranks": _weighted("linear", **_OTHER_RANK, refused="ValueError"),
    "ties-no-density": Operation("weighted", {"combination_type": "ties"}, refused="ValueError|TypeError"),
    **{f"{kind}-nf4": _weighted(kind, base="two-nf4", low_precision=True) for kind in TYPES},
    **{
        f"{kind}-dora-nf4": _weighted(kind, base="two-nf4", low_precision=True, use_dora=True, wrong=("y",))
        for kind in TYPES
    },
    **{f"{kind}-embedded": _weighted(kind, base="embedded") for kind in ("linear", "svd", "cat")},
}
_NF4 = {"base": "two-nf4"}
OPERATIONS: dict[str, Operation] = {
    **{f"weighted-{name}": operation for name, operation in WEIGHTED.items()},
    **{
        f"reduced-{top_k}-{epsilon}-{keep}": Operation(
            "reduced", {"top_k": top_k, "threshold_epsilon": epsilon, "mitigation_lambda": keep}
        )
        for top_k, epsilon, keep in ((10, 0.9, 0.75), (2, 0.9, 0.5), (10, 0.3, 0.5), (10, 0.9, 0.0))
    },
    "rescaled": Operation("rescaled"),
    "rescaled-dora": Operation("rescaled", {"use_dora": True}),
    "rescaled-rslora": Operation("rescaled", {"use_rslora": True}),
    "rescaled-nf4": Operation("rescaled", _NF4, low_precision=True),
    **{f"mixed-{base}": Operation("mixed_batch", {"base": base}) for base in ("two", "embedded")},
    "rescaled-dora-nf4": Operation("rescaled", {**_NF4, "use_dora": True}, low_precision=True),
    "mixed-nf4": Operation("mixed_batch", _NF4, low_precision=True),
    "asked": Operation("asked"),
    "asked-tokens": Operation("asked", {"trainable_token_indices": [1, 5]}),
    "asked-saved": Operation("asked", {"modules_to_save": ["lm_head"], "trainable_token_indices": [1]}),
    "asked-nf4": Operation("asked", {"base": "llama-nf4", "use_dora": True}),
    "swapped": Operation("swapped"),
    "swapped-lower": Operation("swapped", {"rank": 2}),
    "swapped-padded": Operation("swapped", {"target_rank": 8, "rank": 8}),
    "swapped-padded-lower": Operation("swapped", {"target_rank": 6, "rank": 3}),
    "swapped-nf4": Operation("swapped", {**_NF4, "target_rank": 6}, low_precision=True),
    **{
        f"converted-{name}": Operation("converted", {"name": name}, folder=True)
        for name in ("pissa", "pissa-rslora", "olora", "corda-ipm", "loraga-ArBr-stable")
    },
    **{f"as-lora-{rank}": Operation("as_lora", {"rank": rank}) for rank in (2, 4, 0.5, 0.9)},
    # the release runs LoftQ on CUDA alone
    **{
        f"loftq-{bits}-{rounds}": Operation("loftq", {"bits": bits, "iterations": rounds}, there="AssertionError|RuntimeError")
        for bits in (4, 8)
        for rounds in (1, 3)
    },
    "loftq-2": Operation("loftq", {"bits": 2, "iterations": 1}, refused="ValueError"),
    "loftq-replaced": Operation("loftq_replaced", there="AssertionError|RuntimeError", folder=True),
    **{
        f"stepped-{optimizer}{'-dora' * dora}": Operation("stepped", {"optimizer": optimizer, "use_dora": dora})
        for optimizer in ("loraplus", "riemannian")
        for dora in (False, True)
    },
    **{
        f"stepped-{optimizer}-embedded": Operation("stepped", {"optimizer": optimizer, "base": "embedded"})
        for optimizer in ("loraplus", "riemannian")
    },
    # frozen parameters are in its groups there; (A Aᵀ)⁻¹ is taken otherwise; with DoRA it does not run
    "stepped-lorafa": Operation("stepped", {"optimizer": "lorafa"}, wrong=("groups",), room=1e-3),
    "stepped-lorafa-dora": Operation("stepped", {"optimizer": "lorafa", "use_dora": True}, there="TypeError"),
    "stepped-lorafa-nf4": Operation(
        "stepped", {"optimizer": "lorafa", **_NF4}, wrong=("groups",), room=1e-2
    ),
}  # fmt: skip
