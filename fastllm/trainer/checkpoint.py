"""Checkpoints: directories `checkpoint-<step>` that are there whole or not at all.

model.safetensors   weights
state.pt            step, optimizer and random number generators (torch.save; read with weights_only=True)
config.json         {"model": GPTConfig, "train": TrainConfig}
tokenizer.json      where the run has one
"""

from __future__ import annotations

import json
import os
import re
import shutil
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from fastllm._extras import require
from fastllm.data import load_tokenizer
from fastllm.models import GPT, GPTConfig

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NAME = re.compile(r"checkpoint-(\d+)")


def list_checkpoints(out: str | Path) -> list[Path]:
    """The checkpoints in directory `out`, oldest first; none where there is no such directory."""
    found = [(int(match[1]), path) for path in Path(out).glob("checkpoint-*") if (match := _NAME.fullmatch(path.name))]
    return [path for _, path in sorted(found)]


def find_checkpoint(path: str | Path) -> Path:
    """`path` itself if it is a checkpoint, else the newest one in it.

    Raises:
        FileNotFoundError: where there is none.
    """
    if (Path(path) / "config.json").is_file():
        return Path(path)
    found = list_checkpoints(path)
    if not found:
        raise FileNotFoundError(f"no checkpoint at {path}")
    return found[-1]


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def save_checkpoint(
    out: Path,
    step: int,
    model: torch.nn.Module,
    state: dict[str, Any],
    config: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    keep: int | None = None,
) -> Path:
    """Writes `out/checkpoint-<step>` and deletes all but the newest `keep` checkpoints.

    The directory is written under another name, synced to disk and then renamed: whoever is killed meanwhile leaves
    nothing by the name of a checkpoint that is not one.

    Raises:
        OSError: for what the disk says, and where the checkpoint is there already.
    """
    target = out / f"checkpoint-{step}"
    partial = out / f".{target.name}.partial"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    # save_model, not save_file: it stores weights that share memory once.
    require("safetensors.torch", "train").save_model(model, str(partial / "model.safetensors"))
    torch.save(state, partial / "state.pt")
    (partial / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    if tokenizer is not None:
        tokenizer.save(str(partial / "tokenizer.json"))
    for path in (*partial.iterdir(), partial):
        _sync(path)
    os.replace(partial, target)
    _sync(out)
    for old in list_checkpoints(out)[: -keep if keep else 0]:
        _delete(old)
    return target


def _delete(path: Path) -> None:
    # First out of sight, since deleting a directory is not atomic.
    doomed = path.with_name(f".{path.name}.partial")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def delete_checkpoints(out: Path) -> None:
    """Deletes all checkpoints in `out`."""
    for path in list_checkpoints(out):
        _delete(path)


def load_config(path: Path) -> dict[str, Any]:
    """config.json of the checkpoint at `path`.

    Raises:
        ValueError: where it is damaged.
    """
    try:
        config = json.loads((path / "config.json").read_text())
        if not isinstance(config, dict) or "model" not in config:
            raise ValueError('it lacks "model"')
        return config
    except ValueError as error:
        raise ValueError(f"{path / 'config.json'} is not a checkpoint's: {error}") from error


def load_weights(path: Path, model: torch.nn.Module) -> None:
    """Reads the weights of the checkpoint at `path` into `model`, in place.

    Raises:
        ValueError: where they are damaged or do not fit, naming the file.
    """
    file = path / "model.safetensors"
    try:
        require("safetensors.torch", "train").load_model(model, str(file))
    except (ImportError, OSError):
        raise
    except Exception as error:  # SafetensorError of a damaged file, RuntimeError of another model's
        raise ValueError(f"{file} cannot be loaded: {error}") from error


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer | None]:
    """The model and the tokenizer of the checkpoint at `path`, or of the newest one in it; the model in eval mode.

    Raises:
        FileNotFoundError: where there is none.
        ValueError: where it is damaged.
    """
    path = find_checkpoint(path)
    model = GPT(GPTConfig.from_dict(load_config(path)["model"]))
    load_weights(path, model)
    tokenizer_file = path / "tokenizer.json"
    tokenizer = load_tokenizer(tokenizer_file) if tokenizer_file.exists() else None
    return model.to(device).eval(), tokenizer
