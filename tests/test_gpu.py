"""What holds for every op on a GPU: the same bits each time, on any stream and device, captured and compiled; and a
whole training step in one CUDA graph. The tests of single ops compare numbers."""

from __future__ import annotations

import pytest
import torch
from every_op import ATTENTION, DTYPES, VARIANTS, VARLEN, check, runner

from fastllm import models
from fastllm.optim import AdamW

gpu = pytest.mark.gpu
CALLS = [(op, name) for op, variants in VARIANTS.items() for name in variants]
SMALL = [(op, "small") for op in VARIANTS]


def calls(chosen=CALLS, devices=("cuda",)):
    """Parametrizes (op, variant, device): everywhere on a GPU, and the small ones on a CPU where that is asked for."""
    found = [
        pytest.param(op, name, device, id=f"{op} {name} {device}", marks=gpu if device == "cuda" else ())
        for device in devices
        for op, name in chosen
        if device == "cuda" or name == "small"
    ]
    return pytest.mark.parametrize(("op", "variant", "device"), found)


def dtype_of(op: str, variant: str) -> torch.dtype:
    """float32, or what the variant is for."""
    return VARIANTS[op][variant].dtypes[0]


def differences(a: list[torch.Tensor], b: list[torch.Tensor]) -> torch.Tensor:
    """How many elements of two results differ, NaN from nothing; on their device, which is not waited for."""
    assert len(a) == len(b) > 0
    assert all(x.shape == y.shape for x, y in zip(a, b, strict=True))
    unequal = ((x != y) & ~(x.isnan() & y.isnan()) for x, y in zip(a, b, strict=True) if x.numel())
    return torch.stack([each.sum().to(a[0].device) for each in unequal]).sum()


def same(a, b) -> bool:
    return int(differences(a, b)) == 0


def repetitions(variant: str, device: str) -> int:
    if device == "cpu":
        return 20
    return 5 if variant == "many tensors" else 1000 if variant == "small" else 100


@calls(devices=("cpu", "cuda"))
def test_the_same_bits_each_time(op, variant, device):
    run = runner(op, device, dtype_of(op, variant), variant)
    first = run()
    found = torch.zeros((), dtype=torch.int64, device=first[0].device)
    for _ in range(repetitions(variant, device)):
        found += differences(run(), first)
    assert int(found) == 0


@calls(SMALL, devices=("cpu", "cuda"))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_runs(op, variant, device, dtype):
    assert all(bool(x.isfinite().all()) for x in runner(op, device, dtype, variant)() if x.is_floating_point())


@calls(devices=("cpu", "cuda"))
def test_numbers(op, variant, device):
    for dtype in VARIANTS[op][variant].dtypes:
        check(op, variant, dtype, device)


@calls()
def test_another_stream(op, variant, device):
    """Every kernel runs on the stream of its call: one that does not would find NaN, since the inputs are written there
    after a pause."""
    runs = [runner(op, device, dtype_of(op, variant), variant) for _ in range(2)]  # what one writes is its own
    values = [[x.detach().clone() for x in run.inputs] for run in runs]
    expected = runs[0]()
    for run in runs:
        for x in run.inputs:
            x.detach().fill_(float("nan"))
    torch.cuda.synchronize()
    results = []
    for run, inputs in zip(runs, values, strict=True):
        with torch.cuda.stream(torch.cuda.Stream()):
            torch.cuda._sleep(100_000_000)
            for x, value in zip(run.inputs, inputs, strict=True):
                x.detach().copy_(value)
            results.append(run())
    torch.cuda.synchronize()
    assert all(same(result, expected) for result in results)


@calls()
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_device_that_is_not_current(op, variant, device):
    dtype = dtype_of(op, variant)
    expected = [x.cpu() for x in runner(op, "cuda:0", dtype, variant)()]
    with torch.cuda.device(0):
        found = runner(op, "cuda:1", dtype, variant)()
    assert {x.device.index for x in found if x.is_cuda} == {1}
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a.cpu(), b)


def captured(op: str, variant: str) -> bool:
    """adamw, and dropout, whose masks a graph draws anew, have tests of their own."""
    return op != "adamw" and "dropout" not in op and "dropout" not in str(ATTENTION.get(variant, VARLEN.get(variant)))


@calls([call for call in CALLS if captured(*call)])
def test_captured(op, variant, device):
    run = runner(op, device, dtype_of(op, variant), variant)
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
