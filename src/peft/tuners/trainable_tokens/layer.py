# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The layer of trainable tokens: an embedding, or a linear output layer, some of whose rows are trained."""

from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import nn

from peft.tuners._buffer_dict import BufferDict
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from peft.utils.integrations import gather_params_ctx
from peft.utils.warning import PeftWarning
from peft.weights import find_weight

if TYPE_CHECKING:
    from .config import TrainableTokensConfig


@dataclass
class _Rows:
    """Where the trained rows of some adapters stand.

    Args:
        adapters: Adapters, in the order in which their rows are joined.
        tokens: Numbers of the tokens `[k]`.
        picks: Places of their rows among the joined ones `[k]`; None where they are in order.
        places: For each token of the vocabulary its place in `tokens`, `k` for those that are not trained.
    """

    adapters: list[str]
    tokens: torch.Tensor
    picks: torch.Tensor | None
    places: torch.Tensor


class TrainableTokensLayer(nn.Module, BaseTunerLayer):
    """An `nn.Embedding` or `nn.Linear` whose rows of some tokens are replaced by trained ones.

    The base layer runs as it is and the trained rows are put into its output, so the whole weight is never copied.
    `update_layer` adds an adapter.

    Args:
        base_layer: Embedding `[vocabulary, dim]` or linear layer with a weight of this shape.
        adapter_name: First adapter, made the active one.
        config: Config, or None.
        tied_adapter: Layer of a tied module whose rows are used here too.
        **kwargs: `token_indices` and `init_weights`, in place of a config.

    Raises:
        TypeError: The base layer is neither an embedding nor linear.
    """

    adapter_layer_names = ("trainable_tokens_delta",)
    other_param_names = ("token_indices", "trainable_tokens_original")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: TrainableTokensConfig | dict | None = None,
        tied_adapter: TrainableTokensLayer | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__()
        if not isinstance(base_layer, (nn.Embedding, nn.Linear)):
            raise TypeError(
                f"Trainable tokens are rows of an nn.Embedding or nn.Linear, not of a {type(base_layer).__name__}: "
                "name the embedding in target_modules (trainable_token_indices in a LoraConfig)."
            )
        self.base_layer = base_layer
        self.kwargs = kwargs
        # in a list, so that the tied layer is not a part of this one
        self._tied_adapter = [] if tied_adapter is None else [tied_adapter]
        if tied_adapter is None:
            self.trainable_tokens_delta = nn.ParameterDict({})
            self.trainable_tokens_original = BufferDict(persistent=False)
            self.token_indices: dict[str, list[int]] = {}
        else:
            self.trainable_tokens_delta = tied_adapter.trainable_tokens_delta
            self.trainable_tokens_original = tied_adapter.trainable_tokens_original
            self.token_indices = tied_adapter.token_indices
        # with one and the same weight, merging is the tied layer's business
        self._follows = tied_adapter is not None and tied_adapter.get_base_layer().weight is base_layer.weight
        self.merged_adapters: list[str] = tied_adapter.merged_adapters if self._follows else []
        self._disable_adapters = False
        self._active_adapter = [adapter_name]
        embedding = isinstance(base_layer, nn.Embedding)
        self.in_features = base_layer.num_embeddings if embedding else base_layer.in_features
        self.out_features = base_layer.embedding_dim if embedding else base_layer.out_features

    @property
    def tied_adapter(self) -> TrainableTokensLayer | None:
        """The layer whose rows are used here too, None for a layer with rows of its own."""
        return self._tied_adapter[0] if self._tied_adapter else None

    # ---- adapters ------------------------------------------------------------------------------------------------
    def update_layer(
        self,
        adapter_name: str,
        config: TrainableTokensConfig | dict | None = None,
        tied_adapter: nn.Module | None = None,
        **kwargs: Any,
    ) -> None:
        """Add an adapter; in a layer that is tied to another it comes with that one.

        Args:
            adapter_name: Adapter to add.
            config: Config, or None.
            tied_adapter: Accepted for symmetry with the constructor, which ties layers.
            **kwargs: `token_indices` and `init_weights`, in place of a config.

        Raises:
            ValueError: `token_indices` is missing, or a token lies outside the vocabulary.
        """
        self._replan()
        if self.tied_adapter is not None:
            return
        options = config if isinstance(config, dict) else {} if config is None else vars(config)
        options = {**options, **kwargs}
        if "token_indices" not in options:
            raise ValueError(f"token_indices is missing for the adapter {adapter_name!r}: give the tokens to train.")
        tokens = self._checked(options["token_indices"])
        rows = self._base_rows(tokens)
        start = rows if options.get("init_weights", True) else torch.randn_like(rows)
        self.token_indices[adapter_name] = tokens
        self.trainable_tokens_original[adapter_name] = rows
        self.trainable_tokens_delta[adapter_name] = nn.Parameter(start.clone())
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def _vocabulary(self) -> int:
        base_layer = self.get_base_layer()
        return base_layer.num_embeddings if isinstance(base_layer, nn.Embedding) else base_layer.out_features

    def _checked(self, tokens: Any) -> list[int]:
        tokens = [int(token) for token in tokens]
        outside = [token for token in tokens if not 0 <= token < self._vocabulary()]
        if outside:
            raise ValueError(
                f"token_indices holds {outside}, but the vocabulary has the tokens 0 to {self._vocabulary() - 1}: for "
                "new tokens, call model.resize_token_embeddings before adding the adapter."
            )
        return tokens

    @torch.no_grad()
    def _base_rows(self, tokens: list[int]) -> torch.Tensor:
        """A copy of rows of the base weight `[k, dim]`."""
        base_layer = self.get_base_layer()
        with gather_params_ctx(base_layer.parameters()):
            weight = self.get_base_weight()
            return weight[torch.tensor(tokens, dtype=torch.long, device=weight.device)].detach().clone()

    # ---- rows ----------------------------------------------------------------------------------------------------
    def _rows_of(self, adapters: list[str]) -> _Rows | None:
        """Where the rows of these adapters stand; None if none of them has any here."""
        key = tuple(name for name in adapters if self.token_indices.get(name))
        if not key:
            return None
        plans = self.__dict__.get("_run")
        if plans is None:
            plans = self.__dict__["_run"] = {}
        plan = plans.get(key)
        if plan is None or plan.tokens.device != self.trainable_tokens_delta[key[0]].device:
            plan = plans[key] = self._plan_rows(list(key))
        return plan

    def _plan_rows(self, adapters: list[str]) -> _Rows:
        owners: dict[int, str] = {}
        picks: dict[int, int] = {}
        offset = 0
        for name in adapters:
            tokens = self.token_indices[name]
            for place, token in enumerate(tokens):
                if owners.setdefault(token, name) != name:
                    raise ValueError(
                        f"The adapters {owners[token]!r} and {name!r} both train the token {token}, so they cannot be "
                        "active or merged together: activate one of them, or train different tokens."
                    )
                picks[token] = offset + place  # of a token listed twice, the last row counts
            offset += len(tokens)
        device = self.trainable_tokens_delta[adapters[0]].device
        tokens = torch.tensor(list(picks), device=device)
        places = torch.full((self._vocabulary(),), len(picks), device=device)
        places[tokens] = torch.arange(len(picks), device=device)
        order = list(picks.values())
        in_order = order == list(range(offset))
        return _Rows(adapters, tokens, None if in_order else torch.tensor(order, device=device), places)

    def _values(self, rows: _Rows) -> torch.Tensor:
        """The trained rows `[k, dim]`, in the order of `rows.tokens`."""
        values = [self.trainable_tokens_delta[name] for name in rows.adapters]
        joined = values[0] if len(values) == 1 else torch.cat(values)
        return joined if rows.picks is None else joined[rows.picks]

    def get_merged_weights(self, active_adapters: list[str]) -> torch.Tensor:
        """The base weight with the rows of some adapters in it, a new tensor with gradients to these rows.

        Args:
            active_adapters: Adapters; those without rows here are skipped.

        Raises:
            ValueError: Two of them train the same token.
        """
        weight = self.get_base_weight()
        rows = self._rows_of(active_adapters)
        if rows is None:
            return weight
        return weight.index_copy(0, rows.tokens.to(weight.device), self._values(rows).to(weight))

    # ---- merging -------------------------------------------------------------------------------------------------
    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Write the trained rows into the base weight; the rows that were there are kept for `unmerge`.

        Args:
            safe_merge: Refuse rows that are not finite, before anything is changed.
            adapter_names: Adapters to merge; None for the active ones.

        Raises:
            ValueError: Two adapters train the same token, or `safe_merge` found NaN or infinity.
        """
        if self._follows:
            wanted = self.active_adapters if adapter_names is None else adapter_names
            missing = [name for name in wanted if name not in self.merged_adapters]
            if missing:
                self.tied_adapter.merge(safe_merge=safe_merge, adapter_names=missing)
            return
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.token_indices]
        if not names:
            return
        self._rows_of([*self.merged_adapters, *names])  # refuses overlapping tokens
        for name in names:
            delta = self.trainable_tokens_delta[name]
            if safe_merge and not delta.isfinite().all():
                raise ValueError(f"Adapter {name!r} has NaN or infinity in its trained rows; nothing was merged.")
        if find_weight(self.get_base_layer()).lossy and not self.merged_adapters:
            self._snapshot = find_weight(self.get_base_layer()).snapshot()
        for name in names:
            self.trainable_tokens_original[name] = self._base_rows(self.token_indices[name])
            rows = self._rows_of([name])
            if rows is not None:
                self._write_rows(rows.tokens, self._values(rows))
            self.merged_adapters.append(name)

    @torch.no_grad()
    def unmerge(self) -> None:
        """Put the rows that the base weight had before merging back, bit for bit."""
        if not self.merged_adapters:
            if not self._follows:
                warnings.warn("No adapter is merged here, nothing to undo.", PeftWarning, stacklevel=2)
            return
        if self._follows:
            self.tied_adapter.unmerge()
            return
        weight = find_weight(self.get_base_layer())
        if weight.lossy:
            weight.restore(self.__dict__.pop("_snapshot"))
        while self.merged_adapters:
            name = self.merged_adapters.pop()
            if not weight.lossy:
                tokens = torch.tensor(self.token_indices[name], dtype=torch.long)
                self._write_rows(tokens, self.trainable_tokens_original[name])

    def _write_rows(self, tokens: torch.Tensor, values: torch.Tensor) -> None:
        base_layer = self.get_base_layer()
        weight = find_weight(base_layer)
        if weight.lossy:
            dense = weight.dense()
            dense[tokens.to(dense.device)] = values.to(dense)
            weight.write(dense)
            return
        data = base_layer.weight.data
        data[tokens.to(data.device)] = values.to(data)

    # ---- forward -------------------------------------------------------------------------------------------------
    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the layer.

        Args:
            x: Token numbers of any shape for an embedding, hidden states `[..., dim]` for a linear layer.
            *args: Further arguments of the base layer.
            **kwargs: Further arguments of the base layer and, for a batch whose rows use different adapters,
                `adapter_names`, one name a row.

        Raises:
            ValueError: Two active adapters train the same token, or `adapter_names` does not fit.
        """
        adapter_names = kwargs.pop("adapter_names", None)
        if self.disable_adapters:
            if self.merged:
                self.unmerge()
            return self.base_layer(x, *args, **kwargs)
        if adapter_names is not None:
            return self._forward_by_rows(x, adapter_names, *args, **kwargs)
        if self.merged:
            return self.base_layer(x, *args, **kwargs)
        return self.forward_adapters(x, self.active_adapters, *args, **kwargs)

    def forward_adapters(self, x: torch.Tensor, active_adapters: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        """Run the layer with the rows of some adapters, whichever are active.

        Args:
            x: As in `forward`.
            active_adapters: Adapters; those without rows here are skipped.
            *args: Further arguments of the base layer.
            **kwargs: Further arguments of the base layer.

        Raises:
            ValueError: Two of the adapters train the same token.
        """
        base_layer = self.base_layer
        rows = self._rows_of(active_adapters)
        if rows is not None and getattr(base_layer, "max_norm", None) is not None:
            return self._embed_renormalised(x, active_adapters)
        y = base_layer(x, *args, **kwargs)
        return y if rows is None else self._put_rows(x, y, rows)

    def _forward_by_rows(self, x: torch.Tensor, adapter_names: list[str], *args: Any, **kwargs: Any) -> torch.Tensor:
        if len(x) != len(adapter_names):
            raise ValueError(
                f"adapter_names has {len(adapter_names)} entries for a batch of {len(x)}: give one name a row, "
                "'__base__' for rows without an adapter."
            )
        if self.merged:
            raise ValueError("adapter_names cannot be used while adapters are merged: call unmerge_adapter() first.")
        y = self.base_layer(x, *args, **kwargs)
        for name in dict.fromkeys(adapter_names):
            rows = self._rows_of([name])
            if rows is not None:
                index = torch.tensor([i for i, other in enumerate(adapter_names) if other == name], device=x.device)
                y = y.index_copy(0, index, self._put_rows(x[index], y[index], rows))
        return y

    def _put_rows(self, x: torch.Tensor, y: torch.Tensor, rows: _Rows) -> torch.Tensor:
        """The base layer's output for `x` with the trained rows put in."""
        base_layer = self.base_layer
        values = self._values(rows).to(device=y.device, dtype=y.dtype)  # [k, dim]
        if isinstance(base_layer, nn.Embedding):
            return self._put_embeddings(x, y, rows, values)
        logits = F.linear(x.to(y.dtype), values)  # [..., k]
        tokens = rows.tokens.to(y.device)
        if base_layer.bias is not None:
            logits = logits + base_layer.bias[tokens].to(y.dtype)
        return y.index_copy(-1, tokens, logits)

    def _put_embeddings(self, x: torch.Tensor, y: torch.Tensor, rows: _Rows, values: torch.Tensor) -> torch.Tensor:
        base_layer = self.base_layer
        if base_layer.padding_idx is not None:
            # the padding token's row gets no gradient, as in nn.Embedding
            is_padding = (rows.tokens == base_layer.padding_idx).to(y.device)
            values = torch.where(is_padding[:, None], values.detach(), values)
        count = len(rows.tokens)
        places = rows.places.to(x.device)[x]  # [...], in 0 to k
        table = torch.cat([values, values.new_zeros(1, values.shape[1])])
        trained = F.embedding(places, table, padding_idx=count, scale_grad_by_freq=base_layer.scale_grad_by_freq)
        scale = getattr(base_layer, "embed_scale", None)
        if scale is not None:  # scaled embeddings of transformers (Gemma, BART): their forward multiplies by it
            trained = trained * (scale.to(trained) if isinstance(scale, torch.Tensor) else scale)
        return torch.where((places < count)[..., None], trained, y)

    def _embed_renormalised(self, x: torch.Tensor, active_adapters: list[str]) -> torch.Tensor:
        """`max_norm` shortens rows as they are looked up, so it needs the whole weight."""
        base_layer = self.base_layer
        return F.embedding(
            x,
            self.get_merged_weights(active_adapters),
            padding_idx=base_layer.padding_idx,
            max_norm=base_layer.max_norm,
            norm_type=base_layer.norm_type,
            scale_grad_by_freq=base_layer.scale_grad_by_freq,
        )
