# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""LoRA on a bare parameter of a module, such as the stacked weights of experts: W + s·BA while the module runs."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from peft import dora
from peft.engine.machine import MergeJournal, assign
from peft.engine.method import Folded
from peft.weights.torchao import is_torchao_tensor

from ..variants.dora import DoraParameterVariant
from .base import LoraLayer

if TYPE_CHECKING:
    from ..config import LoraConfig
    from .variant import LoraVariant

# Options that have no meaning for a parameter, with the value that leaves them off.
_REFUSED = (
    ("lora_dropout", 0.0),
    ("fan_in_fan_out", False),
    ("lora_bias", False),
    ("kasa_config", None),
    ("velora_config", None),
)


def _holds_codes(parameter: torch.Tensor) -> bool:
    return not parameter.is_floating_point() or parameter.element_size() < 2 or is_torchao_tensor(parameter)


class _LoraParameterProxy(nn.Module):
    """What stands for a parameter while its module runs.

    Args:
        delta_weight: What adapters add to it.
    """

    def __init__(self, delta_weight: torch.Tensor) -> None:
        super().__init__()
        self.delta_weight = delta_weight

    def forward(self, W: torch.Tensor) -> torch.Tensor:
        return W + self.delta_weight.to(W)


class Block(NamedTuple):
    """A parameter of the base layer, and which part of the adapter's matrices is its own.

    Args:
        parameter: Its name.
        rows: Its output features among the adapter's.
        columns: Its input features among the adapter's.
    """

    parameter: str
    rows: slice = slice(None)
    columns: slice = slice(None)


class ParameterLayer(LoraLayer):
    """What layers share whose adapters change parameters of the base layer while it runs.

    To an adapter the parameters are one stack of matrices `[n, out, in]`: a single parameter, whose first dimension may
    count experts, or `blocks` of one matrix, which is zero outside them.
    """

    plain_starts = frozenset(("eva",))  # which fills adapters of linear layers later
    parameter_name: str
    num_experts = 1
    is_transposed = False  # whether the parameter holds [n, in, out]
    dora_kind = "parameter"
    blocks: tuple[Block, ...]
    bias_name: str | None = None  # the parameter that holds the bias of all output features

    def get_param(self) -> torch.Tensor:
        """The parameter, without adapters."""
        return getattr(self.get_base_layer(), self.parameter_name)

    @property
    def weight(self) -> torch.Tensor:
        return self.get_param()

    @property
    def lora_variants(self) -> dict[tuple[str, ...], type[LoraVariant] | None]:
        return {(): None, ("use_dora",): DoraParameterVariant}

    # ---- the stack of matrices -------------------------------------------------------------------------------------
    def _stack(self, stored: torch.Tensor) -> torch.Tensor:
        """What has a parameter's shape as `[n, out, in]`."""
        stack = stored.reshape(self.num_experts, *stored.shape[-2:])
        return stack.mT if self.is_transposed else stack

    def _as_stored(self, stack: torch.Tensor, shape: torch.Size) -> torch.Tensor:
        """`[n, out, in]` in a parameter's shape."""
        return (stack.mT if self.is_transposed else stack).reshape(shape)

    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """B `[n, out, r]`, A `[n, r, in]` and the scaling, such that scaling · B A is what is added."""
        a, b = self.factors(adapter_name)
        return b.unsqueeze(0), a.unsqueeze(0), self.scaling[adapter_name]

    def _block_factors(self, name: str, block: Block) -> tuple[torch.Tensor, torch.Tensor, float]:
        b, a, scaling = self.get_delta_factors(name)
        return b[:, block.rows], a[:, :, block.columns], scaling

    def weight_norm(self, name: str | None) -> torch.Tensor:
        norms = []
        for block in self.blocks:
            stack = self._stack(self.get_base_layer()._parameters[block.parameter])
            if name is None:
                zero = stack.new_zeros(())
                b, a, scaling = zero.expand(*stack.shape[:2], 1), zero.expand(len(stack), 1, stack.shape[2]), 0.0
            else:
                b, a, scaling = self._block_factors(name, block)
            norms.append(dora.stacked_norm(stack, a, b, scaling))
        return torch.cat(norms, dim=1)

    def dora_norm(self, name: str) -> torch.Tensor:
        return self.weight_norm(name).flatten()

    def dora_route(self, name: str, away: str | None = None) -> dora.Route:
        """PyTorch, as the module makes its products itself."""
        weight = self.get_base_layer()._parameters[self.blocks[0].parameter]
        want = self._use_dora_triton.get(name, False)
        return dora.plan(device=weight.device, dtype=weight.dtype, want_triton=want, kind=self.dora_kind, away=away)

    # ---- forward ---------------------------------------------------------------------------------------------------
    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        """Let the module see its parameters with the named adapters in them, for as long as the context is open."""
        names = [name for name in active_adapters if self.has_adapter(name)]
        module = self.get_base_layer()
        shown = self._adapted_parameters(names) if names else {}
        for parameter, value in shown.items():  # an entry of the instance hides the parameter of that name
            object.__setattr__(module, parameter, value)
        try:
            yield
        finally:
            for parameter in shown:
                object.__delattr__(module, parameter)

    def _run_alone(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """The wrapped module's result with one adapter, or with none if there is none of that name."""
        with self._activate_lora([name]):
            return self.base_layer(*args, **kwargs)

    def _mixed_batch_forward(self, x: torch.Tensor, *args: Any, adapter_names: list[str], **kwargs: Any) -> Any:
        """Rows with adapters of their own: the module runs on the whole batch once for each, as all rows share its
        parameters, and each row takes its own result. Rows may be flattened with what follows them, as tokens are.

        Raises:
            ValueError: Adapters are merged, or the result has no rows to choose from.
        """
        self._check_unmerged()
        self._adapter_kwargs(kwargs)
        results = {name: self._run_alone(name, x, *args, **kwargs) for name in dict.fromkeys(adapter_names)}
        if not isinstance(next(iter(results.values())), tuple):
            return self._own_rows(results, adapter_names, self._row_dim(0))
        parts = [dict(zip(results, part, strict=True)) for part in zip(*results.values(), strict=True)]
        return tuple(self._own_rows(part, adapter_names, self._row_dim(i)) for i, part in enumerate(parts))

    def _row_dim(self, position: int) -> int:
        """The dimension of the module's result, or of the entry at `position` in it, that counts rows."""
        return 0

    def _own_rows(self, results: dict[str, Any], names: list[str], dim: int) -> torch.Tensor | None:
        """The parts along `dim` of each adapter's result that belong to rows of that adapter."""
        first = next(iter(results.values()))
        if first is None:
            return None
        if not isinstance(first, torch.Tensor) or first.dim() <= dim or first.shape[dim] % len(names):
            found = tuple(first.shape) if isinstance(first, torch.Tensor) else type(first).__name__
            raise ValueError(
                f"adapter_names has {len(names)} entries, and {type(self.get_base_layer()).__name__} gives {found}, whose "
                "rows they cannot be matched to: run one batch an adapter."
            )
        owners = [name for name in names for _ in range(first.shape[dim] // len(names))]
        y = first.clone()
        for name, result in results.items():
            rows = torch.tensor([i for i, owner in enumerate(owners) if owner == name], device=y.device)
            y.index_copy_(dim, rows, result.index_select(dim, rows))
        return y

    def _why_not_writable(self) -> str | None:
        return None  # it is a plain parameter that is written, not the weight of a layer

    def _adapted_parameters(self, names: list[str]) -> dict[str, torch.Tensor]:
        """The base layer's parameters with adapters in them, one after the other."""
        parameters = self.get_base_layer()._parameters
        shown = {block.parameter: parameters[block.parameter] for block in self.blocks}
        bias = None if self.bias_name is None else parameters[self.bias_name]
        shifted = False
        for name in names:
            norm = self.weight_norm(name) if name in self.lora_magnitude_vector else None
            for block in self.blocks:
                shown[block.parameter] = self._with_adapter(name, block, shown[block.parameter], norm)
            shift = self.low_rank_bias(name)
            if shift is not None:
                shift = self.scaling[name] * shift
                if norm is not None:
                    shift = dora.gain(self.lora_magnitude_vector[name].weight, norm.flatten()) * shift
                bias, shifted = (shift if bias is None else bias + shift.to(bias)), True
        return {**shown, self.bias_name: bias} if shifted else shown

    def _with_adapter(self, name: str, block: Block, weight: torch.Tensor, norm: torch.Tensor | None) -> torch.Tensor:
        if norm is None:
            delta = self.get_delta_weight(name) if len(self.blocks) == 1 else self._block_delta(name, block)
            return _LoraParameterProxy(delta)(weight)
        b, a, scaling = self._block_factors(name, block)
        magnitude = self.lora_magnitude_vector[name].weight.reshape(norm.shape)[:, block.rows]
        adapted = dora.stacked_weight(
            self._stack(weight), a, b, magnitude=magnitude, norm=norm[:, block.rows], scaling=scaling
        )
        return self._as_stored(adapted, weight.shape)

    def _block_delta(self, name: str, block: Block) -> torch.Tensor:
        b, a, scaling = self._block_factors(name, block)
        wide = torch.float64 if b.dtype == torch.float64 else torch.float32
        delta = ((b.to(wide) @ a.to(wide)) * scaling).to(b.dtype)
        return self._as_stored(delta, self.get_base_layer()._parameters[block.parameter].shape)

    # ---- merging: one matrix of all rows, `[n · out, in]`, zero outside the blocks ------------------------------------
    def fold_delta(self, name: str) -> torch.Tensor:
        return self._as_matrix({block.parameter: self._block_delta(name, block) for block in self.blocks})

    def low_rank_delta(self, name: str) -> torch.Tensor:
        return self.fold_delta(name)

    def _as_matrix(self, tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        first = next(iter(tensors.values()))
        wide = torch.float64 if first.dtype == torch.float64 else torch.float32
        if len(self.blocks) == 1:
            return self._stack(first).to(wide).flatten(0, 1)
        matrix = torch.zeros(self.out_features, self.in_features, dtype=wide, device=first.device)
        for block in self.blocks:
            matrix[block.rows, block.columns] = tensors[block.parameter].to(wide)
        return matrix

    def _read_base(self) -> Folded:
        parameters = self.get_base_layer()._parameters
        matrix = self._as_matrix({block.parameter: parameters[block.parameter].detach() for block in self.blocks})
        bias = None if self.bias_name is None else parameters[self.bias_name]
        return Folded(matrix, None if bias is None else bias.detach().to(matrix.dtype))

    def _write_base(self, folded: Folded, journal: MergeJournal) -> None:
        parameters = self.get_base_layer()._parameters
        for block in self.blocks:
            target = parameters[block.parameter]
            stack = folded.weight[block.rows, block.columns].unflatten(0, (self.num_experts, -1))
            assign(target, self._as_stored(stack, target.shape))
        if folded.bias is not None:
            if journal.bias is None:
                journal.bias = parameters[self.bias_name].detach().clone()
            assign(parameters[self.bias_name], folded.bias)

    def _restore_base(self, journal: MergeJournal) -> None:
        original = self._original_base(self._read_base(), journal)
        self._write_base(Folded(original.weight, journal.bias), journal)

    def _snapshot(self) -> None:
        return None


class ParamWrapper(ParameterLayer, nn.Module):
    """LoRA on one parameter `[out, in]` or `[experts, out, in]` of the wrapped module; `[experts, in, out]` where the module
    has a true `is_transposed`, as transformers' experts do.

    A is `[experts · r, in]`, expert by expert; B is `[out, r · experts]`, the experts of each rank side by side. Several
    parameters of a module are several wrappers around one another.

    Args:
        base_layer: The module, possibly in the wrapper of another of its parameters.
        adapter_name: Name of the first adapter.
        parameter_name: Name of the parameter.
        config: The adapter's settings.
        r: Its rank, by expert.
        lora_alpha: Numerator of its scaling.
        is_target_conv_1d_layer: Taken for compatibility.

    Raises:
        ValueError: The module has no such parameter, it is quantised or has neither 2 nor 3 dimensions, or the config
            asks for dropout, `fan_in_fan_out`, `lora_bias` or a variant other than DoRA.
    """

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        parameter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: int = 1,
        is_target_conv_1d_layer: bool = False,
        **kwargs: Any,
    ) -> None:
        nn.Module.__init__(self)
        self.parameter_name = parameter_name
        LoraLayer.__init__(self, base_layer, **kwargs)
        self.blocks = (Block(parameter_name),)
        self._active_adapter = adapter_name
        self.update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config)

    def _features(self, base_layer: nn.Module) -> tuple[int, int]:
        parameter = getattr(base_layer, self.parameter_name, None)
        where = f"target_parameters: {self.parameter_name} of {type(base_layer).__name__}"
        is_tensor = isinstance(parameter, torch.Tensor)
        if not is_tensor and hasattr(parameter, "shape") or is_tensor and _holds_codes(parameter):
            raise ValueError(
                f"{where} is quantised ({type(parameter).__name__}, {getattr(parameter, 'dtype', 'of no dtype')}), and what "
                "an adapter adds cannot be added to its codes: load the model dense (dequantize=True in its quantisation "
                "config), or leave the parameter out."
            )
        if not is_tensor or parameter.dim() not in (2, 3):
            found = list(parameter.shape) if is_tensor else type(parameter).__name__
            raise ValueError(f"{where} must be a parameter of 2 or 3 dimensions, got {found}.")
        self.num_experts = parameter.shape[0] if parameter.dim() == 3 else 1
        self.is_transposed = parameter.dim() == 3 and bool(getattr(base_layer, "is_transposed", False))
        rows, columns = parameter.shape[-2:]
        return (rows, columns) if self.is_transposed else (columns, rows)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: LoraConfig, **kwargs: Any) -> None:
        for option, off in _REFUSED:
            if getattr(config, option) not in (off, None, False):
                raise ValueError(
                    f"{option}={getattr(config, option)!r} is not possible on a parameter (target_parameters, here "
                    f"{self.parameter_name}): use {off!r}."
                )
        super().update_layer(adapter_name, r, lora_alpha, config, **kwargs)

    def _create_factors(self, adapter_name: str, r: int, lora_bias: bool) -> None:
        self.lora_A[adapter_name] = nn.Linear(self.in_features, r * self.num_experts, bias=False)
        self.lora_B[adapter_name] = nn.Linear(r * self.num_experts, self.out_features, bias=False)

    # ---- the updates ----------------------------------------------------------------------------------------------------
    def get_delta_factors(self, adapter_name: str) -> tuple[torch.Tensor, torch.Tensor, float]:
        """B `[experts, out, r]`, A `[experts, r, in]` and the scaling, such that scaling · B A is what is added."""
        r = self.r[adapter_name]
        b = self.lora_B[adapter_name].weight.unflatten(1, (r, self.num_experts)).permute(2, 0, 1)
        a = self.lora_A[adapter_name].weight.unflatten(0, (self.num_experts, r))
        return b, a, self.scaling[adapter_name]

    def get_delta_weight(self, adapter_name: str, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`scaling · B A` of every expert, in the parameter's shape; without a gain where the adapter is DoRA."""
        return self._block_delta(adapter_name, self.blocks[0])

    # ---- files of older releases ---------------------------------------------------------------------------------------
    @property
    def is_stack_of_rows(self) -> bool:
        """Whether the parameter is stored `[experts, out, in]`."""
        return self.get_param().dim() == 3 and not self.is_transposed

    def is_other_way_round(self, a: torch.Tensor, b: torch.Tensor) -> bool:
        """Whether a stored A and B have the features of B and A; never where there are as many of both."""
        features = (self.in_features, self.out_features)
        return self.in_features != self.out_features and features == (b.shape[0], a.shape[1])

    def turn_round(self, a: torch.Tensor, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """A and B of the transposed update, stored in the same way."""
        n = self.num_experts
        turned_a = b.unflatten(1, (-1, n)).permute(2, 1, 0).flatten(0, 1)
        turned_b = a.unflatten(0, (n, -1)).permute(2, 1, 0).flatten(1, 2)
        return turned_a.contiguous(), turned_b.contiguous()

    # ---- forward ---------------------------------------------------------------------------------------------------
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        adapter_names = kwargs.pop("adapter_names", None)
        self._adapter_kwargs(kwargs)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._mixed_batch_forward(x, *args, adapter_names=adapter_names, **kwargs)
        with self._activate_lora([] if self.merged else self.active_adapters):
            return self.base_layer(x, *args, **kwargs)

    def _run_alone(self, name: str, *args: Any, **kwargs: Any) -> Any:
        """As in every such layer; wrappers of further parameters show theirs at once, not each for rows of its own."""
        with ExitStack() as stack:
            module: nn.Module = self
            while isinstance(module, ParamWrapper):
                module._check_unmerged()
                stack.enter_context(module._activate_lora([name]))
                module = module.base_layer
            return module(*args, **kwargs)

    def unload_and_optionally_merge_module(
        self, merge: bool, safe_merge: bool, adapter_names: list[str] | None
    ) -> nn.Module:
        """The wrapped module, freed of this wrapper and of those within, with their adapters merged if asked for."""
        inner = self.base_layer
        if isinstance(inner, ParamWrapper):
            inner.unload_and_optionally_merge_module(merge, safe_merge, adapter_names)
        if merge:
            self.merge(safe_merge=safe_merge, adapter_names=adapter_names)
        elif self.merged:
            self.unmerge()
        return self.get_base_layer()

    def __repr__(self) -> str:
        head, _, rest = super().__repr__().partition("(")
        return f"{head}(\n  parameter_name={self.parameter_name!r}{rest}"
