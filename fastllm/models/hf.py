"""Models from and to folders in Hugging Face's format: config.json, and weights in safetensors, whole or in shards."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastllm._extras import require
from fastllm.models.bert import Bert
from fastllm.models.gpt import GPT
from fastllm.models.hf_families import FAMILIES, Family, Weight, family_of

_INDEX = "model.safetensors.index.json"
_FILE = "model.safetensors"
_OURS = ("document_token", "label_smoothing", "head_dropout", "dropout")
"""Fields that are no part of the trained function, for which config.json has no name, or not in all families."""


def load_hf(folder: str | Path, *, dtype: torch.dtype | None = None, **changes: Any) -> nn.Module:
    """The model in a folder that transformers' `save_pretrained`, or `save_hf`, has written.

    Args:
        folder: with config.json and model.safetensors, or shards and their index.
        dtype: of the weights; None is what the file has.
        changes: fields of the model's configuration, such as ops="torch" or dropout=0.0.

    Returns:
        A `GPT` for gpt2, llama and qwen3, a `Bert` for bert, a `Transformer` for marian, bart and t5; on the CPU, in
        eval mode.

    Raises:
        FileNotFoundError: for a folder or file that is not there.
        ValueError: for what is damaged, another model_type, a configuration that these models do not have, and weights
            that are missing, left over, or of another shape; it names them.
    """
    folder = Path(folder)
    if dtype is not None and not isinstance(dtype, torch.dtype):
        raise TypeError(f"load_hf: dtype must be a torch.dtype, got {dtype!r}")
    if not folder.is_dir():
        raise FileNotFoundError(f"the folder {folder} is not there (names on the Hugging Face Hub are not downloaded)")
    values = _read_json(folder / "config.json")
    name = values.get("model_type")
    if name not in FAMILIES:
        raise ValueError(f"{folder}: model_type {name!r} is not supported, only {', '.join(FAMILIES)}")
    family = FAMILIES[name]
    found = _read_weights(folder)
    try:
        config = family.read(values)
        if "context" in changes and getattr(config, "rope_scaling", None):
            raise ValueError(f"context={changes['context']} would change what rope_scaling means")
        config = replace(config, **{**values.get("fastllm", {}), **changes})
    except (TypeError, ValueError) as error:
        raise ValueError(f"{folder / 'config.json'}: {error}") from error
    if name == "t5":
        # Its configurations have said both things of a file with an output layer of its own.
        head, shared = found.get("lm_head.weight"), found.get("shared.weight")
        own = head is not None and not (shared is not None and torch.equal(head, shared))
        config = replace(config, tie_embeddings=not own)
    state = _to_ours(folder, family, config, found)
    with torch.device("meta"):
        model = family.model(config)
    model = model.to_empty(device="cpu").to(dtype or state["embedding.weight"].dtype)
    expected = model.state_dict()
    for ours, tensor in state.items():
        if expected[ours].shape != tensor.shape:
            raise ValueError(
                f"{folder}: {ours} has shape {tuple(tensor.shape)}, config.json makes it {tuple(expected[ours].shape)}"
            )
    model.load_state_dict(state)
    model.hf_config = values  # special tokens, names of labels and the like, for `save_hf`
    return model.eval()


def save_hf(model: nn.Module, folder: str | Path, *, shard_bytes: int = 5 * 10**9) -> Path:
    """Writes a `GPT`, `Bert` or `Transformer` as transformers reads it, with config.json; tied weights once.

    Args:
        model: whose configuration one of transformers' gpt2, llama, qwen3, bert, marian, bart or t5 has.
        folder: is made; files of these names in it are replaced.
        shard_bytes: the most bytes of weights a file.

    Returns:
        The folder.

    Raises:
        TypeError: for another model.
        ValueError: for a configuration that transformers' model does not have, naming the field.
        OSError: for what the disk says.
    """
    folder = Path(folder)
    model = getattr(model, "_orig_mod", model)  # of a compiled one
    config: Any = getattr(model, "config", None)
    known = tuple({family.model for family in FAMILIES.values()})
    if not isinstance(model, known):
        raise TypeError(f"save_hf: the model must be a GPT, Bert or Transformer, got {type(model).__name__}")
    name = family_of(config)
    family = FAMILIES[name]
    written = {"model_type": name, **family.write(config)}
    back = _check_expressible(name, family, config, written)
    extra = {f: getattr(config, f) for f in _OURS if hasattr(config, f) and getattr(config, f) != getattr(back, f)}
    old = ("torch_dtype", "rope_scaling", "rope_theta")  # earlier names of what is written
    before = {key: value for key, value in getattr(model, "hf_config", {}).items() if key not in old}
    if len(before.get("id2label") or ()) == len(written.get("id2label", ())):
        written = {key: value for key, value in written.items() if key not in ("id2label", "label2id")}
    # GPT-2's and Llama's classes have special tokens of their own, which a vocabulary may lack.
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), getattr(config, "document_token", None))
    values = {**(ends if isinstance(model, GPT) else {}), **before, **written, "fastllm": extra}
    if not extra:
        del values["fastllm"]
    state = model.state_dict()
    if name in ("marian", "bart"):
        state.setdefault("logits_bias", torch.zeros(config.vocab_size))
    values["dtype"] = str(state["embedding.weight"].dtype).removeprefix("torch.")
    weights = list(family.weights(config))
    if odd := {weight.ours for weight in weights} ^ state.keys():
        raise ValueError(f"save_hf: this model and transformers' {name} do not both have {_some(sorted(odd))}")
    theirs: dict[str, Tensor] = {}
    for weight in weights:
        theirs |= _split(weight, state[weight.ours].detach().cpu())
    folder.mkdir(parents=True, exist_ok=True)
    _write_weights(folder, theirs, shard_bytes)
    _write_json(folder / "config.json", values)
    return folder


def _read_json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise FileNotFoundError(f"{path} is not there")
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"{path} is damaged: it holds no object")
    return values


def _write_json(path: Path, values: dict[str, Any]) -> None:
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")
    os.replace(partial, path)


def _read_weights(folder: Path) -> dict[str, Tensor]:
    files = [_FILE]
    if not (folder / _FILE).is_file() and (folder / _INDEX).is_file():
        places = _read_json(folder / _INDEX).get("weight_map")
        if not isinstance(places, dict):
            raise ValueError(f"{folder / _INDEX} is damaged: it lacks weight_map")
        files = sorted(set(places.values()))
    load_file = require("safetensors.torch", "train").load_file
    found: dict[str, Tensor] = {}
    for file in files:
        if not (folder / file).is_file():
            hint = "; pytorch_model.bin is not read" if (folder / "pytorch_model.bin").exists() else ""
            raise FileNotFoundError(
                f"{folder / file} is not there" + (f", nor {_INDEX}{hint}" if file == _FILE else "")
            )
        try:
            found |= load_file(folder / file)
        except Exception as error:  # safetensors raises a class of its own
            raise ValueError(f"{folder / file} is damaged: {error}") from error
    return found


def _write_weights(folder: Path, tensors: dict[str, Tensor], shard_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    filled = total = 0
    for name, tensor in tensors.items():
        if shards[-1] and filled + tensor.nbytes > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += tensor.nbytes
        total += tensor.nbytes
    save_file = require("safetensors.torch", "train").save_file
    places: dict[str, str] = {}
    partial: dict[Path, Path] = {}
    try:
        for index, shard in enumerate(shards):
            file = _FILE if len(shards) == 1 else f"model-{index + 1:05}-of-{len(shards):05}.safetensors"
            partial[folder / file] = folder / f".{file}.partial"
            save_file(shard, partial[folder / file], metadata={"format": "pt"})
            places |= dict.fromkeys(shard, file)
    except BaseException:  # what was there before stays
        for path in partial.values():
            path.unlink(missing_ok=True)
        raise
    for path, written in partial.items():
        os.replace(written, path)
    for old in (*folder.glob("model-*-of-*.safetensors"), folder / _INDEX, folder / _FILE):
        if old not in partial:  # of an earlier model in other files
            old.unlink(missing_ok=True)
    if len(shards) > 1:
        _write_json(folder / _INDEX, {"metadata": {"total_size": total}, "weight_map": places})


def _to_ours(folder: Path, family: Family, config: Any, found: dict[str, Tensor]) -> dict[str, Tensor]:
    """The state_dict of our model from the tensors of theirs."""
    weights = list(family.weights(config))
    first = weights[0].theirs[0]
    if family.prefix and first not in found and first.removeprefix(family.prefix) in found:
        found = {family.prefix + name: tensor for name, tensor in found.items()}  # of the model without a head
    if family.model is Bert:  # whose older files have names of TensorFlow's
        for old, new in (("LayerNorm.gamma", "LayerNorm.weight"), ("LayerNorm.beta", "LayerNorm.bias")):
            found = {name.replace(old, new): tensor for name, tensor in found.items()}
    left = dict(found)
    state, missing = {}, []
    for weight in weights:
        parts = [left.pop(name, None) for name in weight.theirs]
        missing += [name for name, part in zip(weight.theirs, parts, strict=True) if part is None]
        if all(part is not None for part in parts):
            state[weight.ours] = _join(weight, parts)  # type: ignore[arg-type]
    if missing == ["final_logits_bias"]:  # which only newer files have
        missing = []
        state["logits_bias"] = torch.zeros(config.vocab_size, dtype=state["embedding.weight"].dtype)
    used = {name: found[name] for name in found if name not in left}
    for name, originals in family.tied.items():
        if name in left and any(torch.equal(left[name], used[original]) for original in originals if original in used):
            del left[name]
    left = {name: tensor for name, tensor in left.items() if not name.endswith(family.ignored)}
    if missing or left:
        found_text = [f"lacks {_some(missing)}"] if missing else []
        found_text += [f"has {_some(list(left))}, which the model of config.json has not"] if left else []
        hint = ""
        if family.model is Bert:
            hint = (
                '. Load it with the head that it was made with, such as head="pretraining"; `with_head` gives another'
            )
        raise ValueError(f"{folder} {' and '.join(found_text)}{hint}")
    return state


def _some(names: list[str]) -> str:
    return ", ".join(names[:4]) + (f" and {len(names) - 4} more" if len(names) > 4 else "")


def _join(weight: Weight, parts: list[Tensor]) -> Tensor:
    if weight.ours == "logits_bias":
        return parts[0].flatten()
    joined = parts[0] if len(parts) == 1 else torch.cat(parts)
    return joined.T.contiguous() if weight.transposed else joined


def _split(weight: Weight, tensor: Tensor) -> dict[str, Tensor]:
    tensor = tensor.T if weight.transposed else tensor
    if weight.ours == "logits_bias":
        tensor = tensor[None]
    parts = tensor.split(weight.rows) if len(weight.theirs) > 1 else (tensor,)
    return {name: part.contiguous() for name, part in zip(weight.theirs, parts, strict=True)}


def _resolved(config: Any) -> dict[str, Any]:
    """The fields, and for those that are None what they stand for."""
    values = asdict(config)
    for field, property_name in (
        ("hidden", "mlp_width"),
        ("kv_heads", "num_kv_heads"),
        ("head_size", "head_dim"),
        ("encoder_layers", "num_encoder_layers"),
        ("start_token", "first_token"),
        ("pooler", "has_pooler"),
    ):
        if field in values:
            values[field] = getattr(config, property_name)
    return values


def _check_expressible(name: str, family: Family, config: Any, values: dict[str, Any]) -> Any:
    """The configuration read back from what was written: a field that comes back as another is one that transformers'
    model does not have."""
    try:
        back = family.read(values)
    except ValueError as error:
        raise ValueError(f"save_hf: transformers' {name} has no such model: {error}") from error
    found = _resolved(back)
    for field, value in _resolved(config).items():
        same = (*_OURS, "ops", "logits_bias")  # a bias of zeros is none
        if field not in same and found[field] != value:
            raise ValueError(f"save_hf: transformers' {name} has no {field}={value!r}, only {found[field]!r}")
    return back
