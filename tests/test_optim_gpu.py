"""fastllm.optim.AdamW where only a GPU can tell: capture, syncs, streams, sizes."""

from __future__ import annotations

import pytest
import torch

from fastllm.optim import AdamW
from fastllm.testing import make

pytestmark = pytest.mark.gpu

SHAPES = ((1037, 7), (3,), (256,), (64, 5, 3))


def parameters(dtype: torch.dtype = torch.float32, shapes=SHAPES) -> list[torch.nn.Parameter]:
    params = [torch.nn.Parameter(make(shape, dtype, "cuda", seed=i)) for i, shape in enumerate(shapes)]
    for i, param in enumerate(params):
        param.grad = make(param.shape, dtype, "cuda", seed=100 + i)
    return params


def set_grads(params: list[torch.nn.Parameter], seed: int) -> None:
    for i, param in enumerate(params):
        param.grad.copy_(make(param.shape, param.dtype, "cuda", seed=1000 * seed + i))


def assert_equal(a, b) -> None:
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y)


@pytest.mark.parametrize("options", [{}, {"master_weights": "remainder"}, {"moment_dtype": torch.uint8}], ids=str)
def test_a_captured_step(options):
    """Learning rate, steps and gradients change between replays of one graph."""
    lists = [parameters(torch.bfloat16) for _ in range(2)]
    lr = torch.tensor(1e-2, device="cuda")
    captured = AdamW(lists[0], lr=lr, capturable=True, max_norm=1.0, **options)
    plain = AdamW(lists[1], lr=float(lr), max_norm=1.0, **options)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        for seed in range(3):
            for params, optimizer in zip(lists, (captured, plain), strict=True):
                set_grads(params, seed)
                optimizer.step()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured.step()
    for seed in range(3, 8):
        set_grads(lists[0], seed)
        set_grads(lists[1], seed)
        lr.fill_(1e-2 / seed)
        plain.param_groups[0]["lr"] = float(lr)
        graph.replay()
        plain.step()
    assert_equal(*lists)
    assert int(captured.state[lists[0][0]]["step"]) == 8


@pytest.mark.parametrize("kwargs", [{"fused": True}, {"capturable": True, "lr": torch.tensor(1e-3)}, {}], ids=str)
def test_no_step_waits_for_the_gpu(kwargs):
    kwargs = {key: value.cuda() if isinstance(value, torch.Tensor) else value for key, value in kwargs.items()}
    params = parameters()
    optimizer = AdamW(params, max_norm=1.0, skip_nonfinite=bool(kwargs), **kwargs)
    optimizer.step()
    torch.cuda.set_sync_debug_mode("error")
    try:
        optimizer.step()
        set_grads_to = [p.grad.clone() for p in params]
        for p, g in zip(params, set_grads_to, strict=True):
            p.grad = g  # gradients elsewhere
        optimizer.step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert optimizer.grad_norm.isfinite()


def test_grad_scaler_on_the_device():
    lists = [parameters() for _ in range(2)]
    ours, stock = AdamW(lists[0], fused=True), torch.optim.AdamW(lists[1], fused=True)
    scalers = [torch.amp.GradScaler("cuda", init_scale=2.0**10) for _ in range(2)]
    for seed in range(5):
        for params, optimizer, scaler in zip(lists, (ours, stock), scalers, strict=True):
            scaler.scale(torch.zeros((), device="cuda"))
            set_grads(params, seed)
            for p in params:
                p.grad *= scaler.get_scale()
            if seed == 2:
                params[0].grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
    assert int(ours.state[lists[0][0]]["step"]) == 4
    for a, b in zip(*lists, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_deterministic():
    first = None
    for _ in range(200):
        params = parameters(torch.bfloat16, (*SHAPES, (300_001,)))
        optimizer = AdamW(params, max_norm=0.1, stochastic_rounding=True, fused=True)
        optimizer.step()
        result = [*(p.detach() for p in params), optimizer.grad_norm]
        first = first or result
        assert_equal(first, result)


def test_parameters_on_both_devices():
    """The norm is one; what each device needs of the other's has arrived before it is read."""
    for _ in range(20):
        both = parameters()
        host = [torch.nn.Parameter(p.detach().cpu()) for p in both]
        for h, p in zip(host, both, strict=True):
            h.grad = p.grad.cpu()
        alone = [torch.nn.Parameter(p.detach().clone()) for p in both]
        for a, p in zip(alone, both, strict=True):
            a.grad = p.grad.clone()
        mixed = [*both[:2], *host[2:]]
        optimizer, reference = AdamW(mixed, max_norm=0.1), AdamW(alone, max_norm=0.1)
        optimizer.step()
        reference.step()
        torch.testing.assert_close(optimizer.grad_norm, reference.grad_norm, rtol=1e-6, atol=0)
        for a, b in zip(mixed, alone, strict=True):
            torch.testing.assert_close(a.detach().cpu(), b.detach().cpu(), rtol=1e-5, atol=1e-7)


def test_capturable_may_be_asked_for_later():
    params = parameters()
    optimizer = AdamW(params)
    optimizer.step()
    assert optimizer.state[params[0]]["step"].device.type == "cpu"
    optimizer.param_groups[0]["capturable"] = True
    optimizer.step()
    step = optimizer.state[params[0]]["step"]
    assert (step.device.type, float(step)) == ("cuda", 2.0)


def test_another_stream():
    """A kernel on another stream than the step's would find gradients of NaN."""
    stream = torch.cuda.Stream()
    lists = [parameters() for _ in range(2)]
    for param in lists[0]:
        param.grad.fill_(float("nan"))
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(100_000_000)
        for ours, theirs in zip(*lists, strict=True):
            ours.grad.copy_(theirs.grad)
        AdamW(lists[0], max_norm=1.0).step()
    stream.synchronize()
    AdamW(lists[1], max_norm=1.0).step()
    assert_equal(*lists)


def test_more_than_2_31_elements():
    """The last elements of a huge parameter are what they are in a small one of their own."""
    n, tail = 2**31 + 5003, 3000
    if torch.cuda.mem_get_info()[0] < 5 * 2 * n:
        pytest.skip("needs 22 GB of GPU memory")
    param = torch.nn.Parameter(torch.zeros(n, dtype=torch.bfloat16, device="cuda"))
    param.grad = torch.zeros_like(param)
    values, grads = make((tail,), torch.bfloat16, "cuda", seed=1), make((tail,), torch.bfloat16, "cuda", seed=2)
    with torch.no_grad():
        param[-tail:] = values
    param.grad[-tail:] = grads
    optimizer = AdamW([param], max_norm=1.0)
    optimizer.step()
    small = torch.nn.Parameter(values.clone())
    small.grad = grads.clone()
    alone = AdamW([small], max_norm=1.0)
    alone.step()
    torch.testing.assert_close(optimizer.grad_norm, alone.grad_norm, rtol=1e-6, atol=0)
    torch.testing.assert_close(param.detach()[-tail:], small.detach(), rtol=2**-7, atol=0)
    assert not bool(param.detach()[:-tail].any())
