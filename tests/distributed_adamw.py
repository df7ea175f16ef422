"""What test_optim_distributed.py starts, once a rank: python distributed_adamw.py CASE RANK WORLD FOLDER."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module

from fastllm.optim import AdamW

BATCHES = 8


def make_model(width: int = 7) -> torch.nn.Module:
    torch.manual_seed(0)
    # 7 and 5 rows do not split evenly over two ranks.
    return torch.nn.Sequential(
        torch.nn.Linear(6, width), torch.nn.Tanh(), torch.nn.Linear(width, 5), torch.nn.LayerNorm(5)
    )


def batch(i: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(i)
    return torch.randn(8, 6, generator=generator), torch.randn(8, 5, generator=generator)


def train(model: torch.nn.Module, optimizer: torch.optim.Optimizer, steps: range, rank: int = 0, world: int = 1):
    """Each rank takes its part of every batch; gradients are averaged by whoever shards. Returns the norms."""
    norms = []
    for i in steps:
        x, y = (t.chunk(world)[rank] for t in batch(i))
        loss = torch.nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        norms.append(float(optimizer.grad_norm))
    return norms


def whole(model: torch.nn.Module) -> list[torch.Tensor]:
    return [p.full_tensor() if isinstance(p, DTensor) else p.detach() for p in model.parameters()]


def make_optimizer(model: torch.nn.Module, **kwargs) -> AdamW:
    return AdamW(model.parameters(), lr=1e-2, max_norm=0.5, **kwargs)


def fsdp(rank: int, world: int, folder: Path) -> None:
    """fully_shard gives the weights and norms of one process."""
    alone = make_model()
    expected = train(alone, make_optimizer(alone), range(BATCHES))
    model = make_model()
    fully_shard(model[0])
    fully_shard(model)
    optimizer = make_optimizer(model)
    norms = train(model, optimizer, range(BATCHES), rank, world)
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected), rtol=1e-5, atol=0)
    for a, b in zip(whole(model), whole(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    for p in model.parameters():
        state = optimizer.state[p]
        assert isinstance(state["exp_avg"], DTensor)
        assert state["exp_avg"].placements == p.placements
        assert state["step"].shape == ()
        assert not isinstance(state["step"], DTensor)
    with pytest.raises(ValueError, match="cannot be kept for a DTensor"):
        AdamW(model.parameters(), moment_dtype=torch.uint8)


def masters(rank: int, world: int, folder: Path) -> None:
    """Remainders and float32 masters agree for shards too."""
    results = []
    for kind in ("float32", "remainder"):
        model = make_model().bfloat16()
        fully_shard(model)
        optimizer = make_optimizer(model, master_weights=kind)
        for i in range(BATCHES):
            for p in model.parameters():
                local = p.to_local()
                noise = torch.randn(local.shape, generator=torch.Generator().manual_seed(10 * i + rank))
                p.grad = DTensor.from_local(
                    noise.bfloat16() + local, p.device_mesh, p.placements, shape=p.shape, stride=p.stride()
                )
            optimizer.step()
        results.append(whole(model))
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


def tensor_parallel(rank: int, world: int, folder: Path) -> None:
    """Sharded and replicated parameters in one model: each counts once in the norm."""
    alone = make_model(8)
    expected = train(alone, make_optimizer(alone), range(BATCHES))
    mesh = init_device_mesh("cpu", (world,))
    model = make_model(8)
    parallelize_module(model, mesh, {"0": ColwiseParallel(), "2": RowwiseParallel()})
    optimizer = make_optimizer(model)
    norms = train(model, optimizer, range(BATCHES))
    torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected), rtol=1e-5, atol=0)
    for a, b in zip(whole(model), whole(alone), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)
    placements = {type(q) for p in model.parameters() if isinstance(p, DTensor) for q in p.placements}
    assert placements == {Shard, Replicate}


def two_dimensions(rank: int, world: int, folder: Path) -> None:
    """FSDP over tensor parallelism, and hybrid sharding: the norm counts every element once."""
    alone = make_model(8)
    expected = train(alone, make_optimizer(alone), range(BATCHES))
    for kind in ("fsdp of tp", "hsdp"):
        mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("outer", "inner"))
        model = make_model(8)
        if kind == "fsdp of tp":
            plan = {"0": ColwiseParallel(), "2": RowwiseParallel()}
            parallelize_module(model, mesh["inner"], plan)
            fully_shard(model, mesh=mesh["outer"])
            part, parts = rank // 2, 2
        else:
            fully_shard(model, mesh=mesh)
            part, parts = rank, 4
        optimizer = make_optimizer(model)
        norms = train(model, optimizer, range(BATCHES), part, parts)
        torch.testing.assert_close(torch.tensor(norms), torch.tensor(expected), rtol=1e-5, atol=0)
        for a, b in zip(whole(model), whole(alone), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def stochastic(rank: int, world: int, folder: Path) -> None:
    """Shards draw different numbers; replicas the same."""
    mesh = init_device_mesh("cpu", (world,))
    for placement in (Shard(0), Replicate()):
        values = torch.ones(2 * world * 500, dtype=torch.bfloat16)
        param = torch.nn.Parameter(distribute_tensor(values, mesh, [placement]))
        optimizer = AdamW([param], lr=1e-3, stochastic_rounding=True, moment_dtype=torch.float32)
        param.grad = distribute_tensor(torch.ones_like(values), mesh, [placement])
        optimizer.step()
        locals_ = [torch.empty_like(param.to_local()) for _ in range(world)]
        dist.all_gather(locals_, param.to_local().detach().contiguous())
        same = torch.equal(locals_[0], locals_[1])
        assert same == (placement == Replicate())


def placed(rank: int, world: int, folder: Path) -> None:
    """A gradient placed otherwise than its parameter is brought to it."""
    mesh = init_device_mesh("cpu", (world,))
    values, grads = torch.randn(6, 4, generator=torch.Generator().manual_seed(0)), torch.ones(6, 4)
    param = torch.nn.Parameter(distribute_tensor(values, mesh, [Shard(0)]))
    optimizer = AdamW([param], max_norm=1.0)
    param.grad = distribute_tensor(grads, mesh, [Replicate()])
    optimizer.step()
    plain = torch.nn.Parameter(values.clone())
    plain.grad = grads
    AdamW([plain], max_norm=1.0).step()
    torch.testing.assert_close(param.full_tensor(), plain, rtol=1e-6, atol=0)
    torch.testing.assert_close(optimizer.grad_norm, torch.tensor(24.0).sqrt())
    optimizer.grad_scale, optimizer.found_inf = torch.tensor(4.0), torch.tensor(0.0)
    param.grad = distribute_tensor(grads, mesh, [Replicate()])
    optimizer.step()
    torch.testing.assert_close(param.grad.full_tensor(), grads / 4)


def _sharded(kwargs: dict) -> tuple[torch.nn.Module, AdamW]:
    model = make_model().to(torch.bfloat16 if kwargs else torch.float32)
    fully_shard(model)
    return model, make_optimizer(model, **kwargs)


OPTIONS = ({}, {"master_weights": "remainder"})


def _train_whole(model: torch.nn.Module, optimizer: AdamW, steps: range) -> None:
    """The same gradients on any number of ranks."""
    for i in steps:
        for j, p in enumerate(model.parameters()):
            grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(100 * i + j)).to(p.dtype)
            p.grad = distribute_tensor(grad, p.device_mesh, p.placements)
        optimizer.step()


def save(rank: int, world: int, folder: Path) -> None:
    for number, kwargs in enumerate(OPTIONS):
        model, optimizer = _sharded(kwargs)
        _train_whole(model, optimizer, range(4))
        options = StateDictOptions()
        state = {
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }
        dcp.save(state, checkpoint_id=folder / f"dcp{number}")
        _train_whole(model, optimizer, range(4, 8))
        weights = whole(model)  # a collective: every rank takes part
        if rank == 0:
            torch.save(weights, folder / f"weights{number}.pt")


def load(rank: int, world: int, folder: Path) -> None:
    """What any number of ranks saved goes on on this one."""
    for number, kwargs in enumerate(OPTIONS):
        model, optimizer = _sharded(kwargs)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(0)
        state = {"model": get_model_state_dict(model), "optimizer": get_optimizer_state_dict(model, optimizer)}
        dcp.load(state, checkpoint_id=folder / f"dcp{number}")
        set_model_state_dict(model, state["model"])
        set_optimizer_state_dict(model, optimizer, state["optimizer"])
        for entry in optimizer.state.values():
            assert int(entry["step"]) == 4
        _train_whole(model, optimizer, range(4, 8))
        for a, b in zip(whole(model), torch.load(folder / f"weights{number}.pt"), strict=True):
            # Another number of ranks sums the norm in another order.
            torch.testing.assert_close(a, b, rtol=1e-6 if not kwargs else 2**-8, atol=1e-7)


if __name__ == "__main__":
    case, rank, world, folder = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4])
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(str(folder / f"store-{case}-{world}"), world)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=world)
    globals()[case](rank, world, folder)
    dist.barrier()
    dist.destroy_process_group()
    print("passed", flush=True)
    os._exit(0)  # at a normal exit, a thread that torch's checkpointing left running sometimes ends in std::terminate
