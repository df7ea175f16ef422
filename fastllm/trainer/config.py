"""The configuration of a run, from YAML or flags: a dataclass a section; an unknown key is told the nearest one."""

from __future__ import annotations

import dataclasses
import difflib
import math
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from fastllm._extras import require
from fastllm.data import read_text
from fastllm.optim._state import MASTER_KEYS
from fastllm.trainer.optimizers import MOMENT_DTYPES, OPTIMIZERS
from fastllm.trainer.schedule import SCHEDULES

T = TypeVar("T")
OBJECTIVES = ("causal_lm", "masked_lm", "classification", "seq2seq", "question_answering")
PRECISIONS = ("float32", "bfloat16", "pure_bfloat16")


def _rule(text: str, least: float | None = None, most: float = math.inf, choices: Any = None) -> dict[str, Any]:
    return {"text": text, "least": least, "most": most, "choices": choices}


def option(default: Any, text: str, **rule: Any) -> Any:
    """A field of a configuration: its default, what `--help` says of it, and the values that it takes."""
    return field(default=default, metadata=_rule(text, **rule))


def _check(config: Any) -> None:
    """Raises ValueError for a value outside of what its `option` says, naming it."""
    name = type(config).__name__
    for entry in dataclasses.fields(config):
        value, rule = getattr(config, entry.name), entry.metadata
        if rule["choices"] is not None and value not in rule["choices"]:
            choices = ", ".join(map(str, rule["choices"]))
            raise ValueError(f"{name}: {entry.name} must be one of {choices}, got {value!r}")
        if rule["least"] is None or value is None:
            continue
        least, most = rule["least"], rule["most"]
        if isinstance(entry.default, int):
            if value < least:
                raise ValueError(f"{name}: {entry.name} must be at least {least}, got {value}")
            if value >= 2**63 and most == math.inf:
                raise ValueError(f"{name}: {entry.name} must be less than 2^63, got {value}")
        elif not (least <= value <= most and value < math.inf):
            wanted = "finite and not negative" if most == math.inf else f"in [{least}, {most}]"
            raise ValueError(f"{name}: {entry.name} must be {wanted}, got {value}")


@dataclass
class TrainConfig:
    """How to train; each field says what it is.

    Raises:
        ValueError: for a value out of range, naming it.
    """

    steps: int = option(1000, "optimizer steps in all, those of a resumed run included", least=1)
    batch_size: int = option(16, "rows a forward pass, on each rank", least=1)
    accumulate: int = option(1, "forward passes an optimizer step", least=1)
    batch_tokens: int = option(0, "tokens an optimizer step, over all ranks: sets accumulate; 0 leaves it", least=0)
    optimizer: str = option("adamw", "adamw is fastllm's, the others are torch's", choices=OPTIMIZERS)
    lr: float = option(1e-3, "highest learning rate", least=0)
    schedule: str = option("cosine", "of the learning rate behind the warm-up", choices=SCHEDULES)
    min_lr_ratio: float = option(0.1, "lowest learning rate as a share of the highest", least=0, most=1)
    warmup: int = option(50, "steps that the learning rate rises", least=0)
    decay: float = option(0.0, "d of inverse_time's lr / (1 + d t)", least=0)
    decay_share: float = option(0.2, "share of the steps, the last ones, in which wsd falls", least=0, most=1)
    weight_decay: float = option(0.1, "of matrices; vectors (norms and biases) are not decayed", least=0)
    beta1: float = option(0.9, "AdamW's", least=0, most=1)
    beta2: float = option(0.95, "AdamW's", least=0, most=1)
    eps: float = option(1e-8, "AdamW's", least=0)
    momentum: float = option(0.9, "of sgd and muon", least=0, most=1)
    clip: float = option(1.0, "largest norm of the gradient, 0 for any", least=0)
    layer_decay: float = option(1.0, "a block's rate as a share of the next block's, for fine-tuning", least=0, most=1)
    head_lr_ratio: float = option(1.0, "rate of a new head, as a multiple", least=0)
    moment_dtype: str | None = option(None, "of AdamW's moments", choices=tuple(MOMENT_DTYPES))
    master_weights: str | None = option(
        None, "of pure_bfloat16 under adamw (default remainder, the same bits in less)", choices=(None, *MASTER_KEYS)
    )
    precision: str = option(
        "float32", "bfloat16 is autocast, pure_bfloat16 has the weights in bfloat16, too", choices=PRECISIONS
    )
    ema: float = option(0.0, "decay of an average of the weights, for validation and samples; 0 for none", least=0)
    activation_checkpointing: bool = option(False, "compute a block's activations again in the backward")
    skip_spikes: float = option(0.0, "skip a step whose loss is so many deviations above the mean; 0 none", least=0)
    eval_every: int = option(100, "steps between validations, 0 for none", least=0)
    eval_batches: int = option(0, "batches a validation, 0 for all", least=0)
    patience: int = option(0, "validations without a better loss before training stops, 0 for any number", least=0)
    checkpoint_every: int = option(500, "steps between checkpoints, 0 for the last only", least=0)
    keep: int = option(2, "checkpoints to keep, the newest, beside the best; 0 for all", least=0)
    async_checkpoint: bool = option(True, "write checkpoints while training goes on")
    sample_every: int = option(0, "steps between samples, 0 for none", least=0)
    sample_prompt: str = option("\n", "what samples continue")
    sample_tokens: int = option(64, "tokens of a sample, at most what the context takes unless given", least=1)
    seed: int = option(0, "of weights, dropout, data and samples")
    out: str = option("runs/train", "directory of checkpoints, metrics and samples")
    compile: bool = option(False, "run the model through torch.compile")
    device: str = option("auto", 'as torch.device; "auto" is a GPU where there is one')
    parallel: str = option("ddp", "under torchrun: ddp copies the model, fsdp shards it", choices=("ddp", "fsdp"))
    wandb: bool = option(False, "log to Weights & Biases, too")

    def __post_init__(self) -> None:
        if self.seed >= 2**64 or self.seed < 0:  # the one number that may have 64 bits
            raise ValueError(f"TrainConfig: seed must be at least 0 and less than 2^64, got {self.seed}")
        _check(self)
        if not self.out:
            raise ValueError("TrainConfig: out must not be empty")
        if any("\ud800" <= character <= "\udfff" for character in self.out):
            raise ValueError(f"the directory {self.out!r} cannot be used: its name is not UTF-8")
        if self.ema >= 1:
            raise ValueError(f"TrainConfig: ema must be less than 1, got {self.ema}")
        if self.accumulate > 1 and self.batch_tokens:
            raise ValueError("TrainConfig: batch_tokens sets accumulate, so only one of them can be given")
        if self.patience and not self.eval_every:
            raise ValueError(
                f"TrainConfig: patience={self.patience} counts validations, of which eval_every=0 has none"
            )
        if self.precision == "pure_bfloat16" and self.optimizer == "adamw" and self.master_weights is None:
            self.master_weights = "remainder"  # without, small updates would round to nothing
        if self.master_weights is not None and self.precision != "pure_bfloat16":
            raise ValueError(f"TrainConfig: master_weights are for precision=pure_bfloat16, got {self.precision!r}")


@dataclass
class DataConfig:
    """What to train on; each field says what it is.

    Raises:
        ValueError: for a value out of range, naming it.
    """

    text: list[str] = field(
        default_factory=list, metadata=_rule("files, folders or globs: text or rows (docs/data.md), or token files")
    )
    valid: list[str] = field(
        default_factory=list, metadata=_rule("the same, to validate on; without, the last part of --text")
    )
    objective: str = option("causal_lm", "what the model learns", choices=OBJECTIVES)
    validation: float = option(0.05, "how much of --text is held out, the last part")
    tokenizer: str | None = option(None, "JSON of a tokenizer to use instead of training one")
    vocab_size: int | None = option(None, "of the tokenizer to train (default 2048)")
    document_mask: bool | None = option(None, "attention stays inside a document (default: where there are several)")
    order: str = option("shuffled", "of windows: each once an epoch, or anywhere", choices=("shuffled", "random"))
    columns: dict[str, str] = field(default_factory=dict, metadata=_rule("names or numbers of the columns of rows"))
    preprocessing: str | None = option(None, "JSON of steps for what rows ask (fastllm data inspect --save-steps)")

    def __post_init__(self) -> None:
        _check(self)
        if not 0 < self.validation < 1:
            raise ValueError(f"the fraction of text to validate on must be in (0, 1), got {self.validation}")
        if self.preprocessing is not None and self.objective in ("causal_lm", "masked_lm"):
            raise ValueError("DataConfig: preprocessing is for rows: a language model learns text as it is written")


def nearest(name: str, known: Iterable[str]) -> str:
    found = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f"; did you mean {found[0]}?" if found else ""


def _of_type(name: str, value: Any, kind: Any) -> Any:
    """`value`, as YAML or JSON has it, as the type of a field; YAML takes 1e-3 for a string.

    Raises:
        ValueError: where it is none of that type.
    """
    if isinstance(kind, types.UnionType):
        kinds = [one for one in typing.get_args(kind) if one is not type(None)]
        if value is None and len(kinds) < len(typing.get_args(kind)):
            return None
        kind = kinds[0]
    origin = typing.get_origin(kind) or kind
    if origin is list and isinstance(value, str):
        return [value]
    if origin is float and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            return float(value)
        except (ValueError, OverflowError):
            pass
    if isinstance(value, origin) and not (origin is int and isinstance(value, bool)):
        if kind == dict[str, str]:  # columns by their numbers
            value = {str(key): str(one) if type(one) is int else one for key, one in value.items()}
        parts = value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
        if str in typing.get_args(kind)[-1:] and not all(isinstance(part, str) for part in parts):
            raise ValueError(f"{name} must be a {origin.__name__} of str, got {value!r}")
        return value
    raise ValueError(f"{name} must be {'an' if origin is int else 'a'} {origin.__name__}, got {value!r}")


def typed(kind: Any, values: Any, name: str, others: Sequence[str] = ()) -> dict[str, Any]:
    """The values of a mapping as a dataclass's fields have them.

    Args:
        kind: the dataclass.
        values: by field, as YAML or JSON has them.
        name: of the mapping, for messages.
        others: keys that are no fields, which the mapping may have, too; they are left out.

    Raises:
        ValueError: for what is no mapping, a key that is no field, with the nearest one, and a value of another type.
    """
    if not isinstance(values, Mapping):
        raise ValueError(f"{name} must be a mapping, got {values!r}")
    hints, fields = typing.get_type_hints(kind), [field.name for field in dataclasses.fields(kind)]
    for key in values:
        if key not in (*fields, *others):
            raise ValueError(f"{name} has no key {key!r}{nearest(str(key), (*fields, *others))}")
    return {key: _of_type(f"{name}: {key}", values[key], hints[key]) for key in values if key not in others}


def from_mapping(kind: type[T], values: Any, name: str) -> T:
    """A dataclass from a mapping of its fields; ValueError as `typed`, and for what is out of range."""
    return kind(**typed(kind, values, name))


@dataclass
class RunConfig:
    """All of a run: what is printed, saved in `config.yaml` and read again.

    Attributes:
        data: what to train on.
        model: fields of the model's configuration, `preset` (a name in its PRESETS), or `init` (a run or checkpoint
            whose weights to begin with: its model, with a new head where the objective needs one).
        train: how.
        given: the keys that were given, by section, the rest being defaults.
    """

    data: DataConfig = field(default_factory=DataConfig)
    model: dict[str, Any] = field(default_factory=dict)
    train: TrainConfig = field(default_factory=TrainConfig)
    given: dict[str, dict[str, Any]] = field(default_factory=dict)

    @classmethod
    def from_dict(cls, values: Any) -> RunConfig:
        """The inverse of `to_dict`; a section that is missing has its defaults.

        Raises:
            ValueError: as `from_mapping`.
        """
        sections = ("data", "model", "train")
        if not isinstance(values, Mapping):
            raise ValueError(f"a configuration must be a mapping of {', '.join(sections)}, got {values!r}")
        for key in values:
            if key not in sections:
                raise ValueError(f"a configuration has no section {key!r}{nearest(str(key), sections)}")
        given = {name: values.get(name) or {} for name in sections}
        data = from_mapping(DataConfig, given["data"], "data")
        train = from_mapping(TrainConfig, given["train"], "train")
        if not isinstance(given["model"], Mapping):
            raise ValueError(f"model must be a mapping, got {given['model']!r}")
        return cls(data, dict(given["model"]), train, given)

    @classmethod
    def from_yaml(cls, path: str | Path) -> RunConfig:
        """Reads a YAML file.

        Raises:
            OSError: where it cannot be read.
            ValueError: where it is no YAML, or as `from_dict`, naming the file.
        """
        yaml = require("yaml", "train")
        try:
            return cls.from_dict(yaml.safe_load(read_text(path)) or {})
        except (ValueError, yaml.YAMLError) as error:
            message = str(error)
            raise ValueError(message if message.startswith(str(path)) else f"{path}: {message}") from error

    def to_dict(self) -> dict[str, Any]:
        """The three sections, with all their keys."""
        return {"data": dataclasses.asdict(self.data), "model": self.model, "train": dataclasses.asdict(self.train)}

    def to_yaml(self) -> str:
        return require("yaml", "train").safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)
