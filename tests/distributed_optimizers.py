"""What test_trainer_optimizers.py starts, once a rank: python distributed_optimizers.py CASE RANK WORLD FOLDER."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import distribute_tensor

from fastllm.models import GPT, GPTConfig
from fastllm.trainer.ema import EMA
from fastllm.trainer.optimizers import gather, local, make_optimizer, place

DEFAULTS = {
    "optimizer": "adamw",
    "lr": 1e-2,
    "weight_decay": 0.1,
    "beta1": 0.9,
    "beta2": 0.95,
    "eps": 1e-8,
    "momentum": 0.9,
    "clip": 0.5,
    "layer_decay": 1.0,
    "head_lr_ratio": 1.0,
    "moment_dtype": None,
    "master_weights": None,
}
KINDS = (
    {"optimizer": "adamw"},
    {"optimizer": "adamw", "master_weights": "remainder"},
    {"optimizer": "torch_adamw", "layer_decay": 0.5},
    {"optimizer": "sgd"},
    {"optimizer": "muon"},
)


def make_config(**changes) -> SimpleNamespace:
    return SimpleNamespace(**{**DEFAULTS, **changes})


def make_model(dtype: torch.dtype = torch.float32, **changes) -> GPT:
    torch.manual_seed(0)
    # Three ranks do not share 11 rows evenly.
    shape = {"vocab_size": 11, "context": 5, "layers": 2, "heads": 2, "width": 8, "tie_embeddings": False}
    return GPT(GPTConfig(**{**shape, "ops": "torch", **changes})).to(dtype)


def set_grads(model: torch.nn.Module, step: int) -> None:
    """The same gradients on any number of ranks."""
    generator = torch.Generator().manual_seed(step)
    for _, parameter in sorted(model.named_parameters()):
        grad = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
        if hasattr(parameter, "device_mesh"):
            grad = distribute_tensor(grad, parameter.device_mesh, parameter.placements)
        parameter.grad = grad


def train(model: torch.nn.Module, optimizer, steps: range, ema: EMA | None = None) -> list[float]:
    norms = []
    for step in steps:
        set_grads(model, step)
        norms.append(float(optimizer.step(torch.zeros(()))))
        if ema is not None:
            ema.update(torch.zeros(()))
    return norms


def make(world: int, **changes):
    model = make_model(torch.bfloat16 if changes.get("master_weights") else torch.float32)
    if world > 1:
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    return model, make_optimizer(model, make_config(**changes)), EMA(model, 0.9)


def whole(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return gather(dict(model.named_parameters()))


def assert_close(found: dict[str, torch.Tensor], expected: dict[str, torch.Tensor], kind: dict) -> None:
    assert found.keys() == expected.keys()
    # Ranks add in another order; weights are rounded to bfloat16 where there are masters, and muon computes in it.
    rtol = 2**-7 if "master_weights" in kind else 1e-2 if kind["optimizer"] == "muon" else 1e-5
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=rtol, atol=rtol / 10, msg=f"{kind}: {name}")


def sharded(rank: int, world: int, folder: Path, kinds: tuple[dict, ...] = KINDS) -> None:
    """A sharded model takes the steps of a whole one. Leaves its state to `load`."""
    for number, kind in enumerate(kinds):
        alone, sole, sole_ema = make(1, **kind)
        expected = train(alone, sole, range(3), sole_ema)
        model, optimizer, ema = make(world, **kind)
        norms = train(model, optimizer, range(3), ema)
        torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected), rtol=1e-5, atol=0)
        assert_close(whole(model), whole(alone), kind)
        assert_close(gather(ema.tensors()), sole_ema.tensors(), kind)
        tensors, averages = gather(optimizer.state_tensors()), gather(ema.tensors())
        assert {key: x.shape for key, x in tensors.items()} == {key: x.shape for key, x in sole.state_tensors().items()}
        before, values = whole(model), json.dumps(optimizer.state_values())
        train(model, optimizer, range(3, 6), ema)
        after, average = whole(model), gather(ema.tensors())
        if rank == 0:
            saved = {"tensors": tensors, "averages": averages, "before": before, "after": after, "average": average}
            for name, part in saved.items():
                save_file(part, folder / f"{name}{number}")
            (folder / f"values{number}").write_text(values, encoding="utf-8")


def sharded_briefly(rank: int, world: int, folder: Path) -> None:
    sharded(rank, world, folder, KINDS[:1])


def load(rank: int, world: int, folder: Path, kinds: tuple[dict, ...] = KINDS) -> None:
    """Any number of ranks goes on from what `sharded` left."""
    for number, kind in enumerate(kinds):
        names = ("tensors", "averages", "before", "after", "average")
        saved = {name: load_file(folder / f"{name}{number}") for name in names}
        model, optimizer, ema = make(world, **kind)
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(place(saved["before"][name], parameter))
        optimizer.load(saved["tensors"], json.loads((folder / f"values{number}").read_text(encoding="utf-8")))
        ema.load(saved["averages"])
        for name, x in gather(optimizer.state_tensors()).items():
            assert torch.equal(x, saved["tensors"][name]), (kind, name)
        for x in map(local, optimizer.state_tensors().values()):
            assert x.untyped_storage().nbytes() == x.nbytes, "a part must not keep the whole in memory"
        train(model, optimizer, range(3, 6), ema)
        assert_close(whole(model), saved["after"], kind)
        assert_close(gather(ema.tensors()), saved["average"], kind)


def swapped(rank: int, world: int, folder: Path) -> None:
    """Behind `swapped`, a model that kept gathered weights computes with its own again."""
    alone, sole, sole_ema = make(1)
    model, optimizer, ema = make(world)
    train(alone, sole, range(3), sole_ema)
    train(model, optimizer, range(3), ema)
    tokens = torch.arange(10).view(2, 5)
    with torch.no_grad():
        before = model(tokens)
        with ema.swapped(), sole_ema.swapped():
            torch.testing.assert_close(model(tokens), alone(tokens), rtol=1e-5, atol=1e-5)
            assert not torch.allclose(model(tokens), before, rtol=1e-3)
        assert torch.equal(model(tokens), before)


def refused(rank: int, world: int, folder: Path) -> None:
    with pytest.raises(ValueError, match="'adafactor' cannot train a sharded model"):
        make(world, optimizer="adafactor")
    with pytest.raises(ValueError, match="cannot be kept for a DTensor"):
        make(world, moment_dtype="uint8")


if __name__ == "__main__":
    case, rank, world, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(folder / f"store-{case}-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    for name in case.split("+"):
        globals()[name](rank, world, folder)
    dist.barrier()
    dist.destroy_process_group()
    print("passed", flush=True)
    os._exit(0)
