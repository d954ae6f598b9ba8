# Copyright 2026 The PEFT-Triton authors. Licensed under the Apache License, Version 2.0.
"""The config of a LoRA or DoRA adapter: its options are checked against each other when it is built, single values when it is
put to use."""

from __future__ import annotations

import re
import warnings
from dataclasses import asdict, dataclass, field, fields
from numbers import Integral, Real
from typing import Any, Literal

from torch import nn

from peft.config import PeftConfig, known_fields
from peft.utils.peft_types import PeftType

from .options import (
    ArrowConfig,
    BdLoraConfig,
    CordaConfig,
    EvaConfig,
    KasaConfig,
    LoftQConfig,
    LoraGAConfig,
    LoraRuntimeConfig,
    MontecloraConfig,
    VeloraConfig,
)

BIASES = ("none", "all", "lora_only")
INITS = ("gaussian", "eva", "olora", "pissa", "corda", "loftq", "orthogonal", "mica", "lora_ga")
_IN_ANY_CASE = ("gaussian", "olora", "mica")  # as the release reads them; it refuses other spellings of the rest
_PISSA_NITER = re.compile(r"pissa_niter_\d+")


@dataclass
class LoraConfig(PeftConfig):
    """The settings of one LoRA (arXiv 2106.09685) or DoRA (arXiv 2402.09353) adapter.

    Args:
        r: Rank, at least 1.
        target_modules: Modules to adapt: names or suffixes of names, one regular expression that matches whole names,
            or "all-linear"; None for the defaults of the model's type.
        exclude_modules: Modules to leave out, named likewise.
        lora_alpha: Numerator of the scaling `lora_alpha / r`.
        lora_dropout: Probability with which an input of the branch is dropped in training, in [0, 1].
        fan_in_fan_out: Whether the base layer stores its weight `[in, out]`; set by itself where that is known.
        bias: Biases to train: "none", "all", or "lora_only" for those of adapted layers.
        use_rslora: Scale by `lora_alpha / √r` instead (arXiv 2312.03732).
        modules_to_save: Modules to train in full and save with the adapter, such as a new head: whatever their names end in
            one of these, at a dot or not.
        init_lora_weights: The start of A and B: True, False, or one of the names in `INITS`.
        layers_to_transform: Numbers of the layers to adapt; None for all.
        layers_pattern: Name of the module list that these numbers count in.
        rank_pattern: Other ranks by module name or pattern.
        alpha_pattern: Other values of `lora_alpha`, likewise.
        megatron_config: Megatron's transformer config, for its parallel layers.
        megatron_core: Module path of Megatron's core.
        trainable_token_indices: Rows of embeddings to train, a list or by the embedding's name.
        loftq_config: Settings of `init_lora_weights="loftq"`.
        eva_config: Settings of "eva".
        corda_config: Settings of "corda".
        lora_ga_config: Settings of "lora_ga".
        use_dora: Learn the magnitude of each output feature apart from its direction.
        use_dora_triton: Run DoRA on this package's Triton kernels where there is a GPU. Saved only when it is on, so
            that other releases read the file.
        velora_config: Settings of VeLoRA, which it switches on.
        alora_invocation_tokens: Token ids after which the adapter acts (aLoRA).
        use_qalora: Average the input in groups (QALoRA).
        qalora_group_size: Size of these groups.
        monteclora_config: Settings of MonteCLoRA, which it switches on.
        layer_replication: Ranges of layers to stack anew.
        runtime_config: Settings of this process, never saved.
        lora_bias: Give B a bias.
        target_parameters: Names of bare parameters to adapt, such as stacked experts.
        use_bdlora: Settings of block-diagonal LoRA, which it switches on.
        arrow_config: Settings of Arrow routing, which it switches on.
        kasa_config: Settings of KaSA, which it switches on.
        ensure_weight_tying: Keep adapters of tied layers tied.

    Raises:
        ValueError: Two options exclude one another.
        TypeError: `target_parameters` is a string.
    """

    r: int = field(default=8, metadata={"help": "Rank."})
    target_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to adapt."})
    exclude_modules: list[str] | str | None = field(default=None, metadata={"help": "Modules to leave out."})
    lora_alpha: int = field(default=8, metadata={"help": "Numerator of the scaling."})
    lora_dropout: float = field(default=0.0, metadata={"help": "Dropout of the branch's input."})
    fan_in_fan_out: bool = field(default=False, metadata={"help": "Whether the weight is stored [in, out]."})
    bias: Literal["none", "all", "lora_only"] = field(default="none", metadata={"help": "Biases to train."})
    use_rslora: bool = field(default=False, metadata={"help": "Scale by alpha over the root of r."})
    modules_to_save: list[str] | None = field(default=None, metadata={"help": "Modules to train in full."})
    init_lora_weights: (
        bool
        | Literal[
            "corda",
            "eva",
            "gaussian",
            "loftq",
            "lora_ga",
            "mica",
            "olora",
            "orthogonal",
            "pissa",
            "pissa_niter_[number of iters]",
        ]
    ) = field(default=True, metadata={"help": "Start of A and B."})
    layers_to_transform: list[int] | int | None = field(default=None, metadata={"help": "Numbers of layers to adapt."})
    layers_pattern: list[str] | str | None = field(default=None, metadata={"help": "Module list of these numbers."})
    rank_pattern: dict | None = field(default_factory=dict, metadata={"help": "Other ranks by name."})
    alpha_pattern: dict | None = field(default_factory=dict, metadata={"help": "Other alphas by name."})
    megatron_config: dict | None = field(default=None, metadata={"help": "Megatron's transformer config."})
    megatron_core: str | None = field(default="megatron.core", metadata={"help": "Module path of Megatron's core."})
    trainable_token_indices: list[int] | dict[str, list[int]] | None = field(
        default=None, metadata={"help": "Rows of embeddings to train."}
    )
    loftq_config: LoftQConfig | dict = field(default_factory=dict, metadata={"help": "Settings of LoftQ."})
    eva_config: EvaConfig | None = field(default=None, metadata={"help": "Settings of EVA."})
    corda_config: CordaConfig | None = field(default=None, metadata={"help": "Settings of CorDA."})
    lora_ga_config: LoraGAConfig | None = field(default=None, metadata={"help": "Settings of LoRA-GA."})
    use_dora: bool = field(default=False, metadata={"help": "Learn magnitudes apart from directions."})
    use_dora_triton: bool = field(default=False, metadata={"help": "Run DoRA on Triton kernels."})
    velora_config: VeloraConfig | dict | None = field(default=None, metadata={"help": "Settings of VeLoRA."})
    alora_invocation_tokens: list[int] | None = field(default=None, metadata={"help": "aLoRA's invocation tokens."})
    use_qalora: bool = field(default=False, metadata={"help": "Average the input in groups."})
    qalora_group_size: int = field(default=16, metadata={"help": "Size of these groups."})
    monteclora_config: MontecloraConfig | None = field(default=None, metadata={"help": "Settings of MonteCLoRA."})
    layer_replication: list[tuple[int, int]] | None = field(default=None, metadata={"help": "Ranges to stack anew."})
    runtime_config: LoraRuntimeConfig = field(
        default_factory=LoraRuntimeConfig, metadata={"help": "Settings of this process."}
    )
    lora_bias: bool = field(default=False, metadata={"help": "Give B a bias."})
    target_parameters: list[str] | None = field(default=None, metadata={"help": "Bare parameters to adapt."})
    use_bdlora: BdLoraConfig | None = field(default=None, metadata={"help": "Settings of block-diagonal LoRA."})
    arrow_config: ArrowConfig | None = field(default=None, metadata={"help": "Settings of Arrow."})
    kasa_config: KasaConfig | None = field(default=None, metadata={"help": "Settings of KaSA."})
    ensure_weight_tying: bool = field(default=False, metadata={"help": "Keep tied layers' adapters tied."})

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType.LORA
        for name in ("target_modules", "exclude_modules"):
            if isinstance(getattr(self, name), list):
                setattr(self, name, set(getattr(self, name)))
        if isinstance(self.target_parameters, str):
            raise TypeError(f"target_parameters={self.target_parameters!r} must be a list of names, not a string.")
        self.r = int(self.r) if _is_integer(self.r) else self.r  # NumPy's are not saved as JSON
        self._read_options()
        self._check_targets()
        self._check_dora()
        self._check_init()
        self._custom_modules: dict[type[nn.Module], type[nn.Module]] | None = None
        self.modules_to_tie: set[str] | None = None
        self.target_modules_to_tie: set[str] | None = None

    def _read_options(self) -> None:
        """Turn the settings that came as dicts, as from a file, into their dataclasses."""
        for name, option_cls in (
            ("eva_config", EvaConfig),
            ("corda_config", CordaConfig),
            ("lora_ga_config", LoraGAConfig),
            ("velora_config", VeloraConfig),
            ("monteclora_config", MontecloraConfig),
            ("use_bdlora", BdLoraConfig),
            ("arrow_config", ArrowConfig),
            ("kasa_config", KasaConfig),
        ):
            values = getattr(self, name)
            if isinstance(values, dict):
                later = {option.name for option in fields(option_cls) if not option.init}
                setattr(self, name, option_cls(**known_fields(option_cls, values, later)))
                for option in later & values.keys():
                    setattr(getattr(self, name), option, values[option])

    def check_values(self) -> None:
        """Refuse values that no adapter can be made with; it is called when one is made, before the model is changed.

        Raises:
            TypeError: A rank is no integer, `lora_dropout` no number, or `modules_to_save` not a list of names.
            ValueError: A rank is not positive, `lora_dropout` no probability, or `init_lora_weights` unknown.
            NotImplementedError: `bias` is unknown.
        """
        _check_rank("r", self.r)
        for name, rank in (self.rank_pattern or {}).items():
            _check_rank(f"rank_pattern[{name!r}]", rank)
        if self.bias not in BIASES:
            known = ", ".join(map(repr, BIASES))
            raise NotImplementedError(f"bias={self.bias!r} is unknown: use one of {known}.")
        number = isinstance(self.lora_dropout, Real)
        if not number or not 0.0 <= self.lora_dropout <= 1.0:
            error = f"lora_dropout={self.lora_dropout!r} must lie between 0 and 1: it is a probability."
            raise ValueError(error) if number else TypeError(error)
        saved = self.modules_to_save
        if isinstance(saved, str) or "" in (saved or ()):  # the end of every name
            raise TypeError(f"modules_to_save={saved!r} must be a list of names of modules.")
        init = self.init_lora_weights
        if isinstance(init, str) and not _is_known_start(init):
            raise ValueError(
                f"init_lora_weights={init!r} is unknown: use True, False, 'pissa_niter_N' or one of "
                f"{', '.join(map(repr, INITS))}, in lower case."
            )

    def _check_targets(self) -> None:
        if isinstance(self.target_modules, str):
            for name in ("layers_to_transform", "layers_pattern"):
                if getattr(self, name) is not None:
                    raise ValueError(
                        f"{name}={getattr(self, name)!r} needs target_modules as a list of names; "
                        f"{self.target_modules!r} is a pattern: put the layers' numbers into it."
                    )
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError(
                f"layers_pattern={self.layers_pattern!r} has no effect without layers_to_transform: set both."
            )

    def _check_dora(self) -> None:
        if self.use_dora_triton and not self.use_dora:
            raise ValueError("use_dora_triton=True needs use_dora=True: it is DoRA that the kernels compute.")

    def _check_init(self) -> None:
        init = self.init_lora_weights
        if self.lora_bias and init not in (True, False):
            raise ValueError(
                f"lora_bias=True needs init_lora_weights=True or False, got {init!r}: other starts know nothing of a bias."
            )
        if init == "loftq" and not self.loftq_config:
            raise ValueError("init_lora_weights='loftq' needs loftq_config, such as LoftQConfig(loftq_bits=4).")
        for name, option_cls in (("eva", EvaConfig), ("corda", CordaConfig)):
            if init == name and getattr(self, f"{name}_config") is None:
                warnings.warn(
                    f"init_lora_weights={init!r} without {name}_config: its defaults are taken.", stacklevel=4
                )
                setattr(self, f"{name}_config", option_cls())
            elif init != name and getattr(self, f"{name}_config") is not None:
                warnings.warn(f"{name}_config has no effect with init_lora_weights={init!r}.", stacklevel=4)
        if init == "loftq":
            self.loftq_config = (
                dict(vars(self.loftq_config)) if not isinstance(self.loftq_config, dict) else self.loftq_config
            )
        elif self.loftq_config:
            warnings.warn(f"loftq_config has no effect with init_lora_weights={init!r}.", stacklevel=4)
            self.loftq_config = {}

    def to_dict(self) -> dict:
        """The fields as they are saved: without the settings of this process, and `use_dora_triton` only when on."""
        content = asdict(self)
        content.pop("runtime_config")
        if not self.use_dora_triton:
            content.pop("use_dora_triton")
        return content

    def _register_custom_module(self, mapping: dict[type[nn.Module], type[Any]]) -> None:
        """Use own LoRA layers: a dict from classes of base layers to the classes that go around them. Not saved."""
        self._custom_modules = {**(self._custom_modules or {}), **mapping}


def _is_integer(value: Any) -> bool:
    return isinstance(value, Integral) and not isinstance(value, bool)


def _is_known_start(name: str) -> bool:
    return name in INITS or name.lower() in _IN_ANY_CASE or _PISSA_NITER.fullmatch(name) is not None


def _check_rank(name: str, rank: Any) -> None:
    if not _is_integer(rank) or rank <= 0:
        error = f"{name}={rank!r} must be a positive integer: it is the rank of the adapter."
        raise ValueError(error) if _is_integer(rank) else TypeError(error)
