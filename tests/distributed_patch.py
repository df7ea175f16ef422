"""What two processes run for test_patch_distributed.py."""

from __future__ import annotations

import sys

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


def main(kind: str, name: str, rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
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
        for layer in model.transformer.h if name == "gpt2" else model.model.layers:
            fully_shard(layer, mesh=mesh)
        fully_shard(model, mesh=mesh)
        if kind == "fsdp-before":
            report = patch(model)
        assert report.replaced, report
    got = losses(model, IDS.chunk(2)[rank], True)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-4)
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4])
