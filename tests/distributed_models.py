"""What test_sharded_models.py starts, once a rank: python distributed_models.py CASE RANK FOLDER."""

from __future__ import annotations

import copy
import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from torch.distributed.fsdp import fully_shard

from fastllm import nn
from fastllm.models import GPT, GPTConfig
from fastllm.models.layers import Block

WORLD = 2
SIZE = {"vocab_size": 65, "context": 12, "layers": 2, "heads": 2, "width": 32}
TOKENS = torch.randint(65, (4, 13), generator=torch.Generator().manual_seed(0))


class Everything(torch.nn.Module):
    """All modules of fastllm.nn that have parameters, in the ways that they can be called."""

    def __init__(self):
        super().__init__()
        self.embedding = torch.nn.Embedding(65, 16)
        self.first, self.second = nn.RMSNorm(16), nn.LayerNorm(16)
        self.mlp, self.gelu = nn.SwiGLU(16, 24), nn.GEGLU(16, 24, bias=True)
        self.loss = nn.LinearCrossEntropyLoss(16, 65, bias=True)

    def forward(self, tokens, targets):
        x = self.embedding(tokens)
        normed, x = self.first.add(self.mlp(self.first(x)), x)
        normed, x = self.second.add(self.gelu(normed), x)
        return self.loss(normed + self.second(x), targets)


def leaves(model: torch.nn.Module) -> list[torch.nn.Module]:
    return [m for m in model.modules() if list(m.parameters(recurse=False))]


def shard(model: torch.nn.Module, how: str) -> None:
    if how == "leaves":
        for module in leaves(model):
            fully_shard(module)
    elif how == "blocks":  # as torchtitan, which keeps the last two together
        for block in model.blocks:
            fully_shard(block)
        fully_shard([model.norm, model.embedding if model.head is None else model.head])
    elif how == "ends":
        fully_shard(model.embedding)
        fully_shard(model.norm)
        if model.head is not None:
            fully_shard(model.head)
    fully_shard(model)


def check(model: torch.nn.Module, how: str, rank: int, checkpointed: str = "", compiled: bool = False) -> None:
    """Loss and gradients of two passes are those of the whole model on the whole batch."""
    alone = copy.deepcopy(model)
    if checkpointed == "model":
        model.checkpoint_activations()
    elif checkpointed == "torch":
        apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Block))
    shard(model, how)
    call = torch.compile(model, backend="aot_eager") if compiled else model
    for part in (TOKENS, TOKENS.flip(0)):
        for one in (alone, model):
            one.zero_grad()
        expected = alone(part[:, :-1], part[:, 1:])
        mine = part.chunk(WORLD)[rank]
        loss = call(mine[:, :-1], mine[:, 1:])
        expected.backward()
        loss.backward()
        total = loss.detach().clone()
        dist.all_reduce(total)
        torch.testing.assert_close(total / WORLD, expected.detach(), rtol=1e-5, atol=1e-6)
        for (name, p), q in zip(alone.named_parameters(), model.parameters(), strict=True):
            torch.testing.assert_close(q.grad.full_tensor(), p.grad, rtol=1e-4, atol=1e-6, msg=lambda m, n=name: n + m)


def small_gpt(**changes) -> GPT:
    torch.manual_seed(1)
    make = GPTConfig.llama if changes.pop("llama", False) else GPTConfig.gpt2
    return GPT(make(**{**SIZE, **changes}))


def generated() -> None:
    """Logits and tokens without gradients, and names in the state_dict."""
    for changes in ({}, {"llama": True}):
        model = small_gpt(**changes)
        with torch.no_grad():
            alone = model(TOKENS[:, :-1])
        expected = model.generate(TOKENS[:2, :4], 5, temperature=0.0)
        names = set(model.state_dict())
        shard(model, "leaves")
        assert set(model.state_dict()) == names
        with torch.no_grad():
            torch.testing.assert_close(model(TOKENS[:, :-1]), alone)
        assert torch.equal(model.generate(TOKENS[:2, :4], 5, temperature=0.0), expected)


def eager(rank: int) -> None:
    torch.manual_seed(0)
    check(Everything(), "leaves", rank)
    check(small_gpt(), "leaves", rank)
    check(small_gpt(llama=True), "blocks", rank)
    check(small_gpt(llama=True, layers=3), "blocks", rank, checkpointed="model")


def more(rank: int) -> None:
    torch.manual_seed(0)
    check(Everything(), "root", rank)
    for how in ("leaves", "blocks", "ends", "root"):
        for changes in ({}, {"llama": True, "qk_norm": True}, {"llama": True, "tie_embeddings": True}):
            check(small_gpt(**changes), how, rank)
    for changes in ({"ops": "torch"}, {"ops": "torch", "llama": True}, {"document_token": 3}):
        check(small_gpt(**changes), "leaves", rank)
    check(small_gpt(llama=True), "blocks", rank, checkpointed="torch")
    for how in ("leaves", "root"):
        check(small_gpt(), how, rank, checkpointed="model")
    generated()


def compiled(rank: int) -> None:
    check(small_gpt(llama=True), "blocks", rank, compiled=True)
    check(small_gpt(llama=True), "blocks", rank, checkpointed="model", compiled=True)


if __name__ == "__main__":
    case, rank, folder = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3])
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    dist.init_process_group("gloo", store=dist.FileStore(str(folder / f"store-{case}"), WORLD), rank=rank, world_size=2)
    globals()[case](rank)
    dist.barrier()
    dist.destroy_process_group()
    print("passed", flush=True)
    os._exit(0)
