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
from fastllm.data import load_tokenizer, read_text
from fastllm.models import GPT, GPTConfig
from fastllm.trainer._files import reading, writing
from fastllm.trainer.memory import check_memory

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
        ValueError: for an empty path.
    """
    if not str(path):
        raise ValueError("the path of a checkpoint must not be empty")
    path = Path(path)
    if (path / "config.json").is_file() or (_NAME.fullmatch(path.name) and path.is_dir()):
        return path
    found = list_checkpoints(path)
    if not found:
        raise FileNotFoundError(f"no checkpoint at {path}")
    return found[-1]


def _before(path: Path) -> str:
    """What an error says of the checkpoint before the one at `path`."""
    match = _NAME.fullmatch(path.name)
    older = [other for other in list_checkpoints(path.parent) if match and _step(other) < int(match[1])]
    return f"; the checkpoint before it is {older[-1]}: delete {path} to go on from there" if older else ""


def _step(path: Path) -> int:
    return int(path.name.rpartition("-")[2])


def _sync(path: Path) -> None:
    """Waits until what was written to `path` is on the disk."""
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
    nothing by the name of a checkpoint that is not one. What fails is removed.

    Raises:
        OSError: for what the disk says, and where the checkpoint is there already; it names the newest checkpoint that
            is there.
    """
    target = out / f"checkpoint-{step}"
    partial = out / f".{target.name}.partial"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        _write(partial, model, state, config, tokenizer)
        os.replace(partial, target)
        with writing(out):
            _sync(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if not isinstance(error, OSError):
            raise
        found = list_checkpoints(out)
        rest = f"{found[-1]} is whole, to be resumed from" if found else "the run has no checkpoint yet"
        if error.errno is None:
            raise OSError(f"{error}; {rest}") from error
        raise OSError(error.errno, f"{os.strerror(error.errno)}; {rest}", str(target)) from error
    for old in list_checkpoints(out)[: -keep if keep else 0]:
        _delete(old)
    return target


def _write(
    folder: Path, model: torch.nn.Module, state: dict[str, Any], config: dict[str, Any], tokenizer: Tokenizer | None
) -> None:
    file = folder / "model.safetensors"
    with writing(file):
        # save_model, not save_file: it stores weights that share memory once.
        require("safetensors.torch", "train").save_model(model, str(file))
    file = folder / "state.pt"
    with writing(file), open(file, "wb") as opened:  # by its name, torch would lose what the system said
        torch.save(state, opened)
    file = folder / "config.json"
    with writing(file):
        file.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    if tokenizer is not None:
        file = folder / "tokenizer.json"
        with writing(file):
            tokenizer.save(str(file))
    for path in (*folder.iterdir(), folder):
        with writing(path):
            _sync(path)


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
        OSError: where it cannot be read.
        ValueError: where it is damaged.
    """
    file = path / "config.json"
    with reading(file, _before(path), "is not a checkpoint's"):
        config = json.loads(read_text(file))
        if not isinstance(config, dict) or not isinstance(config.get("model"), dict):
            raise ValueError('it lacks "model"')
        GPTConfig.from_dict(config["model"])
        return config


def load_weights(path: Path, model: torch.nn.Module) -> None:
    """Reads the weights of the checkpoint at `path` into `model`, in place.

    Raises:
        OSError: where they cannot be read.
        ValueError: where they are damaged, not finite or do not fit, naming the file.
    """
    file = path / "model.safetensors"
    with reading(file, _before(path)):
        require("safetensors.torch", "train").load_model(model, str(file))
        for name, weight in model.named_parameters():
            if not weight.isfinite().all():
                raise ValueError(f"{name} has values that are not finite")


def load_state(path: Path) -> dict[str, Any]:
    """state.pt of the checkpoint at `path`: what `save_checkpoint` was given as `state`.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is damaged.
    """
    file = path / "state.pt"
    with reading(file, _before(path)):
        state = torch.load(file, map_location="cpu", weights_only=True)
        if not isinstance(state, dict):
            raise ValueError(f"it holds a {type(state).__name__}, not the state of a training run")
        return state


def load_checkpoint_tokenizer(path: Path) -> Tokenizer:
    """tokenizer.json of the checkpoint at `path`.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is damaged.
    """
    file = path / "tokenizer.json"
    with reading(file, _before(path)):
        return load_tokenizer(file)


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[GPT, Tokenizer | None]:
    """The model and the tokenizer of the checkpoint at `path`, or of the newest one in it; the model in eval mode.

    Raises:
        FileNotFoundError: where there is none.
        OSError: where a file cannot be read.
        ValueError: where it is damaged.
    """
    path = find_checkpoint(path)
    config = GPTConfig.from_dict(load_config(path)["model"])
    with reading(path / "config.json", _before(path)):
        check_memory(config, torch.device(device))
    model = GPT(config)
    load_weights(path, model)
    tokenizer = load_checkpoint_tokenizer(path) if (path / "tokenizer.json").exists() else None
    return model.to(device).eval(), tokenizer
