"""Checkpoints: directories `checkpoint-<step>` that are there whole or not at all.

model.safetensors   weights
ema.safetensors     their average, where the run has one: what is validated, and loaded to run
state.safetensors   tensors of the optimizer, by parameter names, and of the loop
state.json          step, the optimizer's numbers, the best validation so far
config.json         {"model": {"architecture": "GPT", ...}, "train": TrainConfig, ...}
tokenizer.json      where the run has one
checksums.json      size and SHA-256 of each of them

None of it depends on how many processes wrote it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import shutil
import threading
from collections.abc import Iterator
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from fastllm import models
from fastllm._extras import require
from fastllm.data import load_tokenizer, read_text
from fastllm.trainer._files import reading, writing
from fastllm.trainer.config import RunConfig
from fastllm.trainer.memory import check_memory
from fastllm.trainer.optimizers import check_shape, local, place

if TYPE_CHECKING:
    from tokenizers import Tokenizer

_NAME = re.compile(r"checkpoint-(\d+)")
_SUMS = "checksums.json"
_PARTS = {"model.safetensors", "state.safetensors", "state.json", "config.json"}  # of every checkpoint
ARCHITECTURES: dict[str, tuple[Any, Any]] = {
    "GPT": (models.GPT, models.GPTConfig),
    "Bert": (models.Bert, models.BertConfig),
    "Transformer": (models.Transformer, models.TransformerConfig),
}
"""By name: a model and its configuration."""


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
    older = [other for other in list_checkpoints(path.parent) if match and step_of(other) < int(match[1])]
    return f"; the checkpoint before it is {older[-1]}: delete {path} to go on from there" if older else ""


def step_of(path: Path) -> int:
    """The step of the checkpoint at `path`, by its name."""
    return int(path.name.rpartition("-")[2])


def _sync(path: Path) -> None:
    """Waits until what was written to `path` is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def weights_of(model: torch.nn.Module) -> dict[str, Tensor]:
    """Weights and buffers by name; those that share memory once, by their first name."""
    seen: set[Any] = set()
    found = {}
    for name, tensor in model.state_dict().items():
        memory = (tensor.data_ptr(), tensor.shape, tensor.stride()) if type(tensor) is Tensor else name
        if memory not in seen or not tensor.numel():
            found[name] = tensor
        seen.add(memory)
    return found


def save_checkpoint(
    out: Path,
    step: int,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    config: dict[str, Any],
    tokenizer: Tokenizer | None = None,
    keep: int | None = None,
) -> Path:
    """Writes `out/checkpoint-<step>` and deletes all but the newest `keep` checkpoints and the best.

    The directory is written under another name, synced to disk and then renamed: whoever is killed meanwhile leaves
    nothing by the name of a checkpoint that is not one. What fails is removed.

    Args:
        out: of the run.
        step: its number.
        tensors: by the stem of their file: "model", "state" and maybe "ema", each by name, on any device.
        state, config: become JSON. The best checkpoint is the one with the lowest `state["validation_loss"]`.
        tokenizer: of the run, if any.
        keep: None and 0 keep all.

    Raises:
        OSError: for what the disk says, and where the checkpoint is there already.
    """
    target = out / f"checkpoint-{step}"
    partial = out / f".{target.name}.partial"
    for left in out.glob(".checkpoint-*.partial"):  # by a run that was killed
        shutil.rmtree(left, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
        _write(partial, tensors, state, config, tokenizer)
        os.replace(partial, target)
        with writing(out):
            _sync(out)
    except BaseException as error:
        shutil.rmtree(partial, ignore_errors=True)
        if isinstance(error, OSError) and error.errno is not None:
            raise OSError(error.errno, os.strerror(error.errno), str(target)) from error
        raise
    best = best_checkpoint(out) if keep else None
    for old in list_checkpoints(out)[: -keep if keep else 0]:
        if old != best:
            _delete(old)
    return target


@contextlib.contextmanager
def naming_newest(out: Path) -> Iterator[None]:
    """Has an OSError say which checkpoint of the run in `out` there is to go on from."""
    try:
        yield
    except OSError as error:
        newest, _ = newest_whole(out)
        rest = f"{newest} is whole, to be resumed from" if newest else "the run has no whole checkpoint yet"
        if error.errno is None:
            raise OSError(f"{error}; {rest}") from error
        raise OSError(error.errno, f"{os.strerror(error.errno)}; {rest}", error.filename) from error


def _write(
    folder: Path,
    tensors: dict[str, dict[str, Tensor]],
    state: dict[str, Any],
    config: dict[str, Any],
    tokenizer: Tokenizer | None,
) -> None:
    save_file = require("safetensors.torch", "train").save_file
    for stem, named in tensors.items():
        file = folder / f"{stem}.safetensors"
        with writing(file):
            save_file({name: tensor.detach().contiguous() for name, tensor in named.items()}, str(file))
    for stem, values in (("state", state), ("config", config)):
        _write_json(folder / f"{stem}.json", values)
    if tokenizer is not None:
        file = folder / "tokenizer.json"
        with writing(file):
            tokenizer.save(str(file))
    write_checksums(folder)
    for path in (*folder.iterdir(), folder):
        with writing(path):
            _sync(path)


def _write_json(file: Path, values: Any) -> None:
    with writing(file):
        file.write_text(json.dumps(values, indent=2) + "\n", encoding="utf-8")


def write_checksums(folder: Path) -> None:
    """Writes the sizes and SHA-256 of what is in `folder`."""
    files = sorted(path for path in folder.iterdir() if path.name != _SUMS)
    _write_json(folder / _SUMS, {file.name: {"bytes": file.stat().st_size, "sha256": _sha256(file)} for file in files})


def _sha256(file: Path) -> str:
    digest, buffer = hashlib.sha256(), bytearray(1 << 20)  # hashlib.file_digest is newer than Python 3.10
    with open(file, "rb", buffering=0) as opened:
        while count := opened.readinto(buffer):
            digest.update(memoryview(buffer)[:count])
    return digest.hexdigest()


def verify(path: Path, without: str = "") -> None:
    """Compares the checkpoint at `path` with its checksums, but for the file that is named `without`.

    Raises:
        OSError: where a file cannot be read.
        ValueError: for a file that is missing, truncated or changed, naming it.
    """
    _verify(path, _before(path), without)


def _verify(path: Path, hint: str, without: str = "") -> None:
    with reading(path / _SUMS, hint, "is damaged"):
        sums = json.loads(read_text(path / _SUMS))
        wanted = {name: (entry["bytes"], entry["sha256"]) for name, entry in sums.items()}
        if lacking := sorted(_PARTS - wanted.keys()):
            raise ValueError(f"it has no checksum of {lacking[0]}")
    for name, (size, digest) in wanted.items():
        if name == without:
            continue
        with reading(path / name, hint, "is damaged"):
            found = (path / name).stat().st_size
            if found != size:
                raise ValueError(f"it has {found:,} bytes, {size:,} were written")
            if _sha256(path / name) != digest:
                raise ValueError("its bytes are not those that were written (SHA-256)")


def newest_whole(out: str | Path) -> tuple[Path | None, list[str]]:
    """The newest checkpoint in `out` that is whole, if any, and what is wrong with each newer one."""
    faults: list[str] = []
    for path in reversed(list_checkpoints(out)):
        try:
            _verify(path, "")
            return path, faults
        except OSError as error:
            faults.append(f"{error.filename}: {error.strerror}")
        except ValueError as error:
            faults.append(str(error))
    return None, faults


def best_checkpoint(out: Path) -> Path | None:
    """The checkpoint in `out` with the lowest validation loss, if one was validated."""
    losses = {}
    for path in list_checkpoints(out):
        try:
            loss = json.loads(read_text(path / "state.json"))["validation_loss"]
        except (OSError, ValueError, KeyError, TypeError):
            continue  # a damaged one is not the best
        if isinstance(loss, (int, float)) and math.isfinite(loss):
            losses[path] = loss
    return min(losses, key=lambda path: losses[path]) if losses else None


class Writer:
    """Writes checkpoints, if `asynchronous` in a thread while training goes on, one at a time.

    What goes wrong in the thread is raised by the next `save` or by `wait`.
    """

    def __init__(self, asynchronous: bool):
        self._asynchronous = asynchronous
        self._pending: Future[Path] | None = None

    def save(self, *args: Any) -> None:
        """As `save_checkpoint`, of tensors that nobody changes any more."""
        self.wait()
        if self._asynchronous:
            # A daemon: whoever interrupts a run for the second time does not wait for it.
            self._pending = Future()
            arguments = (self._pending, args)
            self._thread = threading.Thread(target=self._write, args=arguments, name="checkpoint", daemon=True)
            self._thread.start()
        else:
            save_checkpoint(*args)

    @staticmethod
    def _write(pending: Future[Path], args: Any) -> None:
        try:
            pending.set_result(save_checkpoint(*args))
        except BaseException as error:
            pending.set_exception(error)

    def wait(self) -> None:
        """Until what was begun is on the disk."""
        if self._pending is not None:
            error = self._pending.exception()
            # The thread still has the tensors to give back: a process that ended meanwhile would abort.
            self._thread.join()
            self._pending = None
            if error is not None:
                raise error


def _delete(path: Path) -> None:
    # First out of sight, since deleting a directory is not atomic.
    doomed = path.with_name(f".{path.name}.partial")
    os.replace(path, doomed)
    shutil.rmtree(doomed)


def delete_checkpoints(out: Path) -> None:
    """Deletes all checkpoints in `out`."""
    for path in list_checkpoints(out):
        _delete(path)


def put_aside(path: Path) -> Path:
    """Renames a damaged checkpoint, so that the run can write its step anew; returns where it is now."""
    for number in range(1000):
        aside = path.with_name(f"{path.name}.damaged" + (f"-{number}" if number else ""))
        if not aside.exists():
            break
    os.replace(path, aside)
    return aside


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
        model_config(config)
        return config


def saved_config(path: Path) -> RunConfig:
    """The configuration of the run whose checkpoint is at `path`, with all fields of its model.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is damaged.
    """
    saved = load_config(path)
    with reading(path / "config.json", _before(path)):
        return RunConfig.from_dict({name: saved[name] for name in ("data", "model", "train") if name in saved})


def model_config(config: dict[str, Any]) -> Any:
    """The model's configuration in a checkpoint's.

    Raises:
        ValueError: for an architecture or a field that there is not.
    """
    values = dict(config["model"])
    name = values.pop("architecture", None)
    if name not in ARCHITECTURES:
        raise ValueError(f"the architecture {name!r} is none of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name][1].from_dict(values)


@torch.no_grad()
def load_weights(path: Path, model: torch.nn.Module, stem: str = "model") -> None:
    """Reads the weights of the checkpoint at `path` into `model`, in place.

    Raises:
        OSError: where they cannot be read.
        ValueError: where they are damaged, not finite or do not fit, naming the file.
    """
    file = path / f"{stem}.safetensors"
    with reading(file, _before(path)):
        mine = model.state_dict()
        if any(local(weight) is not weight for weight in mine.values()):
            found = load_tensors(path, stem)
            if differing := sorted(found.keys() ^ mine.keys()):
                raise ValueError(f"it does not fit the model: {differing[0]}")
            for name, weight in mine.items():
                check_shape(name, found[name], weight, tuple(weight.shape))
                local(weight).copy_(local(place(found[name], weight)))
        else:
            require("safetensors.torch", "train").load_model(model, str(file))
        for name, weight in model.named_parameters():
            if not local(weight).isfinite().all():
                raise ValueError(f"{name} has values that are not finite")


def load_tensors(path: Path, stem: str) -> dict[str, Tensor]:
    """The tensors of a file of the checkpoint at `path`.

    Raises:
        OSError, ValueError: as `load_state`.
    """
    file = path / f"{stem}.safetensors"
    with reading(file, _before(path)):
        return require("safetensors.torch", "train").load_file(str(file))


def load_state(path: Path) -> dict[str, Any]:
    """state.json of the checkpoint at `path`: what `save_checkpoint` was given as `state`.

    Raises:
        OSError: where it cannot be read.
        ValueError: where it is damaged.
    """
    file = path / "state.json"
    with reading(file, _before(path)):
        state = json.loads(read_text(file))
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


def load_model(path: str | Path, device: torch.device | str = "cpu") -> tuple[Any, Tokenizer | None]:
    """The model and the tokenizer of the checkpoint at `path`, or of the newest one in it; the model in eval mode, with
    the average of its weights where the run has one.

    Raises:
        FileNotFoundError: where there is none.
        OSError: where a file cannot be read.
        ValueError: where it is damaged.
    """
    path = find_checkpoint(path)
    verify(path, without="state.safetensors")
    saved = load_config(path)
    config = model_config(saved)
    with reading(path / "config.json", _before(path)):
        check_memory(config, torch.device(device))
    model = ARCHITECTURES[saved["model"]["architecture"]][0](config)
    load_weights(path, model, "ema" if (path / "ema.safetensors").exists() else "model")
    tokenizer = load_checkpoint_tokenizer(path) if (path / "tokenizer.json").exists() else None
    return model.to(device).eval(), tokenizer
