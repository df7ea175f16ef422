"""What two processes run for test_patch_distributed.py."""

from __future__ import annotations

import sys

import pytest
import torch
import torch.distributed as dist
from patch_models import VOCABULARY, model_of

from fastllm.patching import patch

IDS = torch.randint(10, VOCABULARY, (4, 12), generator=torch.Generator().manual_seed(0))


def losses(model, ids: torch.Tensor, average: bool) -> list[float]:
    """Of three steps; each rank its own rows, the mean of both for all."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    found = []
    for _ in range(3):
        loss = model(input_ids=ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        value = loss.detach().clone()
        if average:
            dist.all_reduce(value)
            value /= dist.get_world_size()
        found.append(float(value))
    return found


def tensor_parallel() -> None:
    """Norms of rows cut in every way, beside those of whole ones."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_module, distribute_tensor

    from fastllm import ops

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    for norm in (torch.nn.LayerNorm(16), torch.nn.LayerNorm(16, bias=False), torch.nn.RMSNorm(16)):
        parameters = [p for p in norm.parameters() if torch.nn.init.normal_(p) is not None]
        x, dy = torch.randn(4, 6, 16), torch.randn(4, 6, 16)
        whole = x.clone().requires_grad_()
        wanted = norm(whole)
        wanted.backward(dy)
        grads = [whole.grad, *(p.grad for p in parameters)]
        norm.zero_grad()
        distribute_module(norm, mesh)
        assert patch(norm).replaced
        for placement in (Shard(0), Shard(1), Shard(2), Replicate(), Partial()):
            if placement.is_partial():
                cut = DTensor.from_local(x / 2, mesh, [placement])
            else:
                cut = distribute_tensor(x, mesh, [placement])
            cut.requires_grad_()
            y = norm(cut)
            # Local where the placement allows it.
            assert not isinstance(placement, Shard) or placement.dim == 2 or y.placements == (placement,), y.placements
            y.backward(distribute_tensor(dy, mesh, [Replicate()]))
            torch.testing.assert_close(y.full_tensor(), wanted)
            got = [cut.grad.full_tensor(), *(p.grad.full_tensor() for p in norm.parameters())]
            torch.testing.assert_close(got, grads, rtol=1e-4, atol=1e-5)
            norm.zero_grad()
    cut = distribute_tensor(x, mesh, [Shard(1)])
    for function in (ops.add_layer_norm, ops.add_rms_norm):
        y, total = function(cut, cut, (16,), distribute_tensor(torch.ones(16), mesh, [Replicate()]))
        expected = function(x, x, (16,), torch.ones(16))
        torch.testing.assert_close((y.full_tensor(), total.full_tensor()), expected)
        assert y.placements == total.placements == (Shard(1),)
    with pytest.raises((RuntimeError, NotImplementedError), match="sharding strategy"):
        ops.swiglu(cut, cut)


def main(kind: str, rank: int, file: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    if kind == "tensor-parallel":
        tensor_parallel()
    else:
        for name in ("gpt2", "llama", "bert"):
            print(name, file=sys.stderr)
            data_parallel(kind, name, rank)
    dist.barrier()  # a rank that leaves while the other still talks to it can abort
    dist.destroy_process_group()


def data_parallel(kind: str, name: str, rank: int) -> None:
    wanted = losses(model_of(name).train(), IDS, False)
    model = model_of(name).train()
    if kind == "ddp":
        patch(model)
        model = torch.nn.parallel.DistributedDataParallel(model)
    else:
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import fully_shard

        mesh = init_device_mesh("cpu", (2,))
        if kind == "fsdp-after":
            report = patch(model)
        layers = {"gpt2": "transformer.h", "llama": "model.layers", "bert": "bert.encoder.layer"}[name]
        for layer in model.get_submodule(layers):
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if kind == "fsdp-before":
            report = patch(model)
        found = {entry.now for entry in report.replaced}
        assert "attention" in found, report
        assert {"gpt2": "layer_norm", "llama": "rms_norm", "bert": "dropout_add_layer_norm"}[name] in found, report
        if kind == "fsdp-after":
            assert "linear_cross_entropy" in found, report
        else:
            assert "before fully_shard" in report.left[0].reason, report
    got = losses(model, IDS.chunk(2)[rank], True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), sys.argv[3])
