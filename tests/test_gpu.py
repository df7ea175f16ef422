"""What holds for every op on a GPU: the same bits each time, on any stream and device, captured and compiled; and a
whole training step in one CUDA graph. The tests of single ops compare numbers."""

from __future__ import annotations

import pytest
import torch
from every_op import DTYPES, runner

from fastllm import models, ops
from fastllm.optim import AdamW

gpu = pytest.mark.gpu
everywhere = pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=gpu)])
every_op = pytest.mark.parametrize("op", ops.__all__)


def same(a, b) -> bool:
    return len(a) == len(b) > 0 and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@every_op
@everywhere
def test_the_same_bits_each_time(op, device):
    run = runner(op, device, torch.float32)
    first = run()
    for _ in range(1000 if device == "cuda" else 20):
        assert same(run(), first)


@every_op
@everywhere
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_runs(op, device, dtype):
    assert all(bool(x.isfinite().all()) for x in runner(op, device, dtype)() if x.is_floating_point())


@gpu
@every_op
def test_another_stream(op):
    """The op waits for what its own stream still computes, and for nothing else."""
    run = runner(op, "cuda", torch.float32)
    expected = run()
    torch.cuda.synchronize()
    streams = [torch.cuda.Stream() for _ in range(2)]
    results = []
    for stream in streams:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(10_000_000)
            results.append(run())
    torch.cuda.synchronize()
    assert all(same(result, expected) for result in results)


@gpu
@every_op
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_current(op):
    expected = [x.cpu() for x in runner(op, "cuda:0", torch.float32)()]
    with torch.cuda.device(0):
        found = runner(op, "cuda:1", torch.float32)()
    assert {x.device.index for x in found if x.is_cuda} == {1}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b)


CAPTURED = [op for op in ops.__all__ if op != "adamw" and "dropout" not in op]  # these have tests of their own


@gpu
@pytest.mark.parametrize("op", CAPTURED)
def test_captured(op):
    run = runner(op, "cuda", torch.float32)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for _ in range(3):
            expected = run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for x in found:
        x.zero_()
    graph.replay()
    assert same(found, expected)


STYLES = {"gpt2": {}, "llama": {"norm": "rms_norm", "position": "rotary", "mlp": "swiglu", "kv_heads": 2}}


def small_gpt(style: str, device: str = "cuda") -> models.GPT:
    torch.manual_seed(0)
    sizes = {"vocab_size": 97, "context": 32, "layers": 2, "heads": 4, "width": 64}
    return models.GPT(models.GPTConfig(**sizes, **STYLES[style])).to(device)


@gpu
@pytest.mark.parametrize("style", STYLES)
def test_a_whole_training_step_in_one_graph(style):
    """Forward, backward and a clipped AdamW, replayed on new tokens, beside the same steps run one by one."""
    captured, plain = (small_gpt(style).train() for _ in range(2))
    optimizers = [AdamW(m.parameters(), lr=1e-3, capturable=True, max_norm=1.0) for m in (captured, plain)]
    tokens = torch.randint(97, (4, 33), device="cuda")

    def step(model, optimizer):
        optimizer.zero_grad(set_to_none=False)
        loss = model(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        optimizer.step()
        return loss

    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for model, optimizer in zip((captured, plain), optimizers, strict=True):
            for _ in range(3):
                step(model, optimizer)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        loss = step(captured, optimizers[0])
    for seed in range(5):
        tokens.copy_(torch.randint(97, tokens.shape, generator=torch.Generator().manual_seed(seed)))
        graph.replay()
        torch.testing.assert_close(loss, step(plain, optimizers[1]))
    for a, b in zip(captured.parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a, b)


@gpu
@pytest.mark.parametrize("style", STYLES)
def test_inductor(style):
    model = small_gpt(style).train()
    tokens = torch.randint(97, (4, 33), device="cuda")
    losses, grads = [], []
    for call in (model, torch.compile(model, fullgraph=True)):
        model.zero_grad()
        loss = call(tokens[:, :-1], tokens[:, 1:])
        loss.backward()
        losses.append(loss.detach())
        grads.append([p.grad.clone() for p in model.parameters()])
    torch.testing.assert_close(*losses, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(*grads, rtol=1e-2, atol=1e-4)
