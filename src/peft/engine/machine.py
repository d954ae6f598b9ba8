# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""What every adapted layer does, written once: forward, mixed batches, merging and its undoing."""

from __future__ import annotations

import warnings
from abc import abstractmethod
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any
from weakref import WeakKeyDictionary, WeakValueDictionary

import torch

from peft.utils.warning import PeftWarning
from peft.weights import find_weight

from .devices import Apart, apart_from_base, base_device_of, brought_to_base
from .layer import BaseTunerLayer, Changes, check_adapters_to_merge
from .method import Folded, Method

BASE_ADAPTER = "__base__"  # in a mixed batch: the rows that no adapter touches


def index_of(rows: tuple[int, ...], device: torch.device) -> torch.Tensor:
    """Row numbers as a tensor on `device`, copied there once: a copy makes the host wait and cannot be captured."""
    if torch.compiler.is_compiling():
        return torch.tensor(rows, device=device)
    return _kept_index(rows, device)


@lru_cache(maxsize=256)
def _kept_index(rows: tuple[int, ...], device: torch.device) -> torch.Tensor:
    with torch.inference_mode(False):  # autograd may have to save it
        return torch.tensor(rows, device=device)


@lru_cache(maxsize=256)
def sorted_by_adapter(names: tuple[str, ...]) -> tuple[dict[str, slice], tuple[int, ...] | None, tuple[int, ...]]:
    """The rows of a mixed batch put together by adapter: which each then has, and the old row of each new one and back.

    None in the second place says that they are together already.
    """
    places = list(dict.fromkeys(names))
    order = sorted(range(len(names)), key=lambda i: places.index(names[i]))
    starts = [0]
    for name in places:
        starts.append(starts[-1] + names.count(name))
    groups = {name: slice(*starts[i : i + 2]) for i, name in enumerate(places)}
    back = tuple(sorted(range(len(order)), key=order.__getitem__))
    return groups, None if order == sorted(order) else tuple(order), back


@dataclass
class MergeJournal:
    """What a merged layer keeps so that it can be undone.

    Args:
        steps: `(adapter, kept)` in the order in which the adapters went in.
        snapshot: The stored bytes of a lossy weight from before the first one, else None.
        bias: A copy of the bias from before the first adapter that changed it, else None.
    """

    steps: list[tuple[str, Any]] = field(default_factory=list)
    snapshot: Any = None
    bias: torch.Tensor | None = None


class AdapterLayer(BaseTunerLayer):
    """A layer whose adapters are described by a `Method`: it runs them, merges them and takes them out again."""

    # ---- what a tuner's layer answers ----------------------------------------------------------------------------
    @abstractmethod
    def method(self, name: str) -> Method:
        """The maths of one adapter of this layer."""

    @abstractmethod
    def has_adapter(self, name: str) -> bool:
        """Whether this layer has parameters of the named adapter."""

    def _adapter_kwargs(self, kwargs: dict[str, Any]) -> dict[str, Any]:
        """Take the arguments that belong to adapters out of a call's keyword arguments."""
        return {}

    # ---- forward -------------------------------------------------------------------------------------------------
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        if not args and not kwargs:
            if torch.compiler.is_compiling():
                return getattr(self, self._run_name or _name_of_plan(id(self), self._changes))(x)
            run = self.__dict__.get("_run")
            if run is None:
                run = self._plan()
        else:
            run = type(self)._forward_general
        try:
            return run(self, x, *args, **kwargs)
        except RuntimeError as error:
            if not self._fails_apart(x, kwargs.get("adapter_names") or (), error):
                raise
        if not args and not kwargs:
            self.__dict__["_run"] = AdapterLayer._forward_apart
        return self._forward_apart(x, *args, **kwargs)

    def _fails_apart(self, x: torch.Tensor, adapter_names: Iterable[str], error: RuntimeError) -> bool:
        """Whether a call failed with `error` because adapters are not where the base weight is, to which they can be brought.

        Raises:
            RuntimeError: They cannot: something of them is on the meta device, or x is elsewhere.
        """
        apart = self._apart_from_base(adapter_names)
        if not apart or "_apart" in self.__dict__:
            return False
        self._refuse_empty(apart, error)
        if x.device != base_device_of(self):
            raise RuntimeError(
                f"{type(self).__name__}: {apart[0].why}, x on {x.device}. x must be where the base weight is: move the whole "
                "model, model.to(device)."
            ) from error
        return True

    def _forward_apart(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """A call with adapters that are not where the base weight is: they are brought there for its duration."""
        apart = self._apart_from_base(kwargs.get("adapter_names") or ())
        self._refuse_empty(apart)
        self.__dict__["_apart"] = apart[0].why if apart else None
        try:
            with brought_to_base(self, x.device) as any_elsewhere:
                if any_elsewhere:
                    return self._forward_general(x, *args, **kwargs)
        finally:
            del self.__dict__["_apart"]
        self._replan()  # they are together again
        return self.forward(x, *args, **kwargs)

    def _apart_from_base(self, adapter_names: Iterable[str] = ()) -> list[Apart]:
        """What is not where the base weight is of the adapters of a call: the active ones and those of a mixed batch."""
        names = [] if self.disable_adapters else [*self.active_adapters, *adapter_names]
        return apart_from_base(self, dict.fromkeys(names))

    def _refuse_empty(self, apart: list[Apart], error: RuntimeError | None = None) -> None:
        """Raise where one of the adapters, or the base weight alone, is on the meta device; that made a call fail with
        `error`."""
        for why, empty in apart:
            if empty:
                raise RuntimeError(
                    f"{type(self).__name__}: {why}. A tensor on the meta device has no values: load the adapter, or the base, "
                    "first."
                ) from error

    def _replan(self) -> None:
        super()._replan()
        _layers[id(self)] = self

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        _layers[id(self)] = self

    def _plan(self) -> Callable[[Any, torch.Tensor], torch.Tensor]:
        """Work out how calls run, and note it."""
        self._refuse_empty(self._apart_from_base())  # a product with a tensor on meta may be rubbish and no error
        run = self.__dict__["_run"] = self._plan_run()
        self.__dict__["_run_name"] = run.__name__
        return run

    def _plan_run(self) -> Callable[[Any, torch.Tensor], torch.Tensor]:
        """Choose how calls with nothing but `x` run until the adapters change again."""
        if self.merged != self.disable_adapters:  # merged, or disabled with nothing to undo
            return type(self)._forward_base
        if not self.disable_adapters and not any(self.has_adapter(name) for name in self.active_adapters):
            return type(self)._forward_base
        return type(self)._forward_general

    def call_base(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The output of the module that this layer wraps."""
        return self.base_layer(x, *args, **kwargs)

    def _forward_base(self, x: torch.Tensor) -> torch.Tensor:
        return self.call_base(x)

    def _forward_general(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        self._check_forward_args(x, *args, **kwargs)
        adapter_names = kwargs.pop("adapter_names", None)
        adapter_kwargs = self._adapter_kwargs(kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.call_base(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **adapter_kwargs, **kwargs)
        y = self.call_base(x, *args, **kwargs)
        if self.merged:
            return y
        dtype = y.dtype
        for name in self.active_adapters:
            if self.has_adapter(name):
                y = self.method(name).apply(self, name, x, y, **adapter_kwargs)
        return y.to(dtype)

    def _mixed_batch_forward(
        self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any
    ) -> torch.Tensor:
        """One batch whose rows use different adapters: `adapter_names[i]` for row `i`, `__base__` for none."""
        adapter_kwargs = self._adapter_kwargs(kwargs)
        y = self.call_base(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            if name == BASE_ADAPTER or not self.has_adapter(name):
                continue
            picked = [i for i, other in enumerate(adapter_names) if other == name]
            rows = index_of(tuple(picked), y.device)
            branch = self._pick_rows(adapter_kwargs, picked)
            changed = self.method(name).apply(self, name, x[rows], y[rows], **branch)
            y = y.index_copy(0, rows, changed.to(y.dtype))
        return y

    @staticmethod
    def _pick_rows(adapter_kwargs: dict[str, Any], picked: list[int]) -> dict[str, Any]:
        """Arguments given one a row, restricted to some rows."""
        return {
            key: [value[i] for i in picked] if isinstance(value, list) else value
            for key, value in adapter_kwargs.items()
        }

    def _check_forward_args(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> None:
        adapter_names = kwargs.get("adapter_names")
        if adapter_names is None:
            return
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} entries for a batch of {len(x)}: give one name a row, "
                f"{BASE_ADAPTER!r} for rows without an adapter."
            )
        self._check_unmerged()

    def _check_unmerged(self) -> None:
        """Refuse rows with adapters of their own while one is in the base weight of all of them."""
        if self.merged:
            raise ValueError(
                "adapter_names cannot be used while adapters are merged into the base weight: "
                "call model.unmerge_adapter() first."
            )

    # ---- merging -------------------------------------------------------------------------------------------------
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Fold adapters into the base weight, so that the base layer alone gives the adapted output.

        Args:
            safe_merge: Check the new weight for NaN and infinity before anything is changed.
            adapter_names: Adapters to fold in, in this order; None for the active ones.

        Raises:
            ValueError: `safe_merge` found a value that is not finite.
            RuntimeError: An adapter cannot be folded into this layer.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if self.has_adapter(name)]
        if not names:
            return
        self.check_mergeable(names)
        journal = self.__dict__.get("_journal") or MergeJournal()
        folded = self._read_base()
        original = self._original_base(folded, journal).weight
        kept = [(name, self.method(name).prepare_fold(self, name, original)) for name in names]
        for name, state in kept:
            folded = self.method(name).fold(self, name, folded, state)
            if safe_merge and not _is_finite(folded):
                raise ValueError(
                    f"Merging adapter {name!r} gives weights that are not finite (NaN or infinity); the base weight "
                    "was left as it is. The adapter's parameters are broken."
                )
        if not journal.steps:
            journal.snapshot = self._snapshot()
        self._write_base(folded, journal)
        journal.steps += kept
        self.__dict__["_journal"] = journal
        self.merged_adapters = [*self.merged_adapters, *names]
        self._replan()

    def check_mergeable(self, names: list[str]) -> None:
        """Raise the error that merging the named adapters would raise, before anything is changed.

        Raises:
            RuntimeError: An adapter cannot be folded into this layer; of the class that its method names. Or it has no
                values.
        """
        self._refuse_empty(apart_from_base(self, names))
        for name in names:
            method = self.method(name) if self.has_adapter(name) else None
            why_not = None if method is None else method.why_not_foldable(self, name) or self._why_not_writable()
            if why_not is not None:
                raise method.refusal(f"Adapter {name!r} cannot be merged into {type(self).__name__}: {why_not}")

    def _why_not_writable(self) -> str | None:
        """Why no new base weight can be stored, None where one can."""
        return find_weight(self.get_base_layer()).why_read_only()

    def unmerge(self) -> None:
        """Take every merged adapter out of the base weight again, the last one first.

        A quantised weight gets the very bytes back that it had; a plain one is computed back.
        """
        journal = self.__dict__.get("_journal")
        if journal is None or not journal.steps:
            warnings.warn("No adapter is merged here, nothing to undo.", PeftWarning, stacklevel=2)
            return
        self._restore_base(journal)
        self.__dict__["_journal"] = None
        self.merged_adapters = []
        self._replan()

    def _snapshot(self) -> Any:
        """The stored bytes of a base weight that is rounded when it is written, else None."""
        weight = find_weight(self.get_base_layer())
        return weight.snapshot() if weight.lossy else None

    def _original_base(self, folded: Folded, journal: MergeJournal) -> Folded:
        """The base weight and bias as they were before the adapters of the journal went in."""
        if journal.steps and journal.snapshot is not None:
            weight = find_weight(self.get_base_layer())
            merged = weight.snapshot()
            weight.restore(journal.snapshot)
            original = self._read_base()
            weight.restore(merged)
            return original
        for name, state in reversed(journal.steps):
            folded = self.method(name).unfold(self, name, folded, state)
        return folded

    def _read_base(self) -> Folded:
        """The base weight, in its own orientation, and bias, in a dtype that additions can be done in."""
        base_layer = self.get_base_layer()
        weight = find_weight(base_layer)
        data = weight.dense() if weight.lossy else base_layer.weight.data
        bias = weight.bias
        wide = torch.float64 if data.dtype == torch.float64 else torch.float32
        return Folded(data.to(wide), None if bias is None else bias.data.to(wide))

    def _write_base(self, folded: Folded, journal: MergeJournal) -> None:
        base_layer = self.get_base_layer()
        weight = find_weight(base_layer)
        if weight.lossy:
            weight.write(folded.weight)
        else:
            assign(base_layer.weight, folded.weight)
        if folded.bias is not None:
            if journal.bias is None:
                journal.bias = base_layer.bias.data.clone()
            assign(base_layer.bias, folded.bias)

    def _restore_base(self, journal: MergeJournal) -> None:
        base_layer = self.get_base_layer()
        if journal.snapshot is not None:
            find_weight(base_layer).restore(journal.snapshot)
        else:
            assign(base_layer.weight, self._original_base(self._read_base(), journal).weight)
        if journal.bias is not None:
            assign(base_layer.bias, journal.bias)


_layers: WeakValueDictionary[int, AdapterLayer] = WeakValueDictionary()


def _name_of_plan(identity: int, changes: int) -> str:
    """The method that runs a layer, chosen beside a compiler's trace; a new count of `changes` makes it ask again.

    The layer is told by its `id`, since torch 2.11 takes no module for a constant. The trace has seen that the layer has
    no `_run_name`, and must see so again where it is begun anew.
    """
    layer = _layers[identity]
    run = layer.__dict__.get("_run") or layer._plan()
    layer.__dict__["_run_name"] = None
    return run.__name__


_name_of_plan._dynamo_marked_constant = True  # torch.compiler.assume_constant_result, which would import Dynamo now


_planned: WeakKeyDictionary[torch.nn.Module, int] = WeakKeyDictionary()


def plan_compiled(model: torch.nn.Module, *args: Any) -> None:
    """A hook before a model's forward: layers within its compiled parts choose how they run before they are traced.

    What is asked for during a trace is good for one layer alone, and the next decoder layer would be compiled anew.
    """
    if torch.compiler.is_compiling() or _planned.get(model) == Changes.number:
        return
    _planned[model] = Changes.number
    for part in model.modules():
        if part._compiled_call_impl is not None or type(part).__name__ == "OptimizedModule":
            for layer in part.modules():
                if isinstance(layer, AdapterLayer) and layer._run_name is None:
                    layer._plan()


def _is_finite(folded: Folded) -> bool:
    return all(bool(torch.isfinite(tensor).all()) for tensor in folded if tensor is not None)


def assign(parameter: torch.Tensor, value: torch.Tensor) -> None:
    """Overwrite a parameter so that torch counts it: a cached norm tells by the version that its weight changed."""
    with torch.no_grad():
        parameter.copy_(value)
