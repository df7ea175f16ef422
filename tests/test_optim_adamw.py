"""fastllm.optim.AdamW beside torch.optim.AdamW: results, memory, clipping, errors."""

from __future__ import annotations

import pytest
import torch
from optim_suite import LANES, SHAPES, assert_as_torchs_fused, assert_equal, parameters, run, set_grads

import fastllm
from fastllm import _ext, models
from fastllm.optim import AdamW


def roundings(a: torch.Tensor, b: torch.Tensor, before: torch.Tensor) -> float:
    """The largest difference in roundings of float32, of the larger of what it was and what it is: a difference of two
    numbers can be smaller than both."""
    size = torch.maximum(torch.maximum(a.abs(), before.abs()), torch.tensor(1e-30))
    return float(((a - b).abs() / size).max()) * 2**23


OPTIONS = {  # those of PyTorch's own tests of its AdamW, and a few more
    "default": {},
    "lr": {"lr": 0.01},
    "weight decay": {"weight_decay": 0.1},
    "maximize": {"weight_decay": 0.1, "maximize": True},
    "amsgrad": {"weight_decay": 0.1, "amsgrad": True},
    "tensor lr": {"lr": torch.tensor(0.01)},
    "tensor betas": {"betas": (torch.tensor([[[0.9]]]), torch.tensor([[0.99]])), "lr": torch.tensor(1e-3)},
    "betas below a half": {"betas": (0.3, 0.7), "eps": 1e-4},
    "zeros": {"weight_decay": 0.0, "lr": 0.0},
}
CUDA_OPTIONS = {
    "capturable": {"capturable": True},
    "capturable, amsgrad": {"weight_decay": 0.1, "amsgrad": True, "capturable": True},
    "capturable, tensor lr": {"lr": torch.tensor(0.001), "amsgrad": True, "capturable": True},
    "capturable, tensor betas": {**OPTIONS["tensor betas"], "amsgrad": True, "capturable": True},
}
CASES = [
    *(pytest.param("cpu", given, id=f"cpu {name}") for name, given in OPTIONS.items()),
    *(
        pytest.param("cuda", given, id=f"cuda {name}", marks=pytest.mark.gpu)
        for name, given in (OPTIONS | CUDA_OPTIONS).items()
    ),
]


@pytest.mark.parametrize("foreach", [None, False, True])
@pytest.mark.parametrize("fused", [None, True])
@pytest.mark.parametrize(("device", "given"), CASES)
def test_torch_cases(device, given, fused, foreach):
    if fused and foreach:
        return  # an error in both; see test_torch_errors
    kwargs = {
        key: value.to(device) if isinstance(value, torch.Tensor) and given.get("capturable") else value
        for key, value in given.items()
    }
    if foreach and (isinstance(kwargs.get("lr"), torch.Tensor) and not kwargs.get("capturable")):
        return
    lists = [[torch.nn.Parameter(p.detach().to(device)) for p in parameters()] for _ in range(2)]
    ours = AdamW(lists[0], fused=fused, foreach=foreach, **kwargs)
    # From tensors, torch's loop computes the corrections of the betas in float32, which cancels; its fused kernel does
    # not.
    tensors = isinstance(kwargs.get("lr"), torch.Tensor) and not kwargs.get("capturable")
    stock = torch.optim.AdamW(lists[1], fused=tensors or fused, foreach=None if tensors else foreach, **kwargs)
    for seed in range(10):
        generator = torch.Generator().manual_seed(seed)
        # One step from the same place, since what two roundings make of it later is another matter.
        for a, b in zip(*lists, strict=True):
            b.data.copy_(a.data)
            if stock.state:
                for key in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq"):
                    if key in stock.state[b]:
                        stock.state[b][key].copy_(ours.state[a][key])
            a.grad = torch.randn(a.shape, generator=generator).to(device)
            b.grad = a.grad.clone()
        before = {
            a: {"param": a.detach().cpu().clone(), **{k: v.cpu().clone() for k, v in ours.state[a].items()}}
            for a in lists[0]
        }
        ours.step()
        stock.step()
        for a, b in zip(*lists, strict=True):
            assert roundings(a.detach().cpu(), b.detach().cpu(), before[a]["param"]) <= 2
            for key, value in stock.state[b].items():
                mine = ours.state[a][key]
                assert (mine.shape, mine.dtype, mine.device) == (value.shape, torch.float32, value.device)
                assert roundings(mine.cpu(), value.cpu(), before[a].get(key, torch.zeros(()))) <= 2
    assert ours.state_dict().keys() == stock.state_dict().keys()
    assert [g.keys() for g in ours.state_dict()["param_groups"]] == [
        g.keys() for g in stock.state_dict()["param_groups"]
    ]
    assert [s.keys() for s in ours.state_dict()["state"].values()] == [
        s.keys() for s in stock.state_dict()["state"].values()
    ]


PARAM = torch.nn.Parameter(torch.randn(1, 1))
TENSOR_BETA = torch.tensor(0.9)


@pytest.mark.parametrize(
    ("params", "kwargs", "error", "message"),
    [
        (PARAM, {}, TypeError, "should be an iterable of Tensors or dicts"),
        ([PARAM, PARAM], {}, ValueError, "given twice"),  # torch only warns
        ([{"params": PARAM}, {"params": PARAM}], {}, ValueError, "more than one parameter group"),
        (None, {"lr": torch.tensor([0.001, 0.001])}, ValueError, "Tensor lr must be 1-element"),
        ([("weight", PARAM), torch.nn.Parameter(torch.randn(1))], {}, ValueError, "Some param names are missing"),
        (
            [{"params": [PARAM]}, {"params": [("weight", torch.nn.Parameter(torch.randn(1)))]}],
            {},
            ValueError,
            "cannot add param group with names to the optimizer",
        ),
        (None, {"betas": (1.0, 0.0)}, ValueError, "Invalid beta parameter at index 0: 1.0"),
        (None, {"weight_decay": -1}, ValueError, "Invalid weight_decay value: -1"),
        (None, {"lr": torch.tensor(0.001), "foreach": True}, ValueError, "lr as a Tensor is not supported"),
        (None, {"betas": (0.9, TENSOR_BETA)}, ValueError, "betas must be either both floats or both Tensors"),
        (None, {"betas": (TENSOR_BETA, 0.9)}, ValueError, "betas must be either both floats or both Tensors"),
        (None, {"betas": (TENSOR_BETA, TENSOR_BETA), "foreach": True}, ValueError, r"betas\[0\] as a Tensor is not"),
    ],
)
def test_torch_errors(params, kwargs, error, message):
    with pytest.raises(error, match=message):
        AdamW(parameters() if params is None else params, **kwargs)


@pytest.mark.parametrize("options", [{}, {"amsgrad": True}, {"maximize": True}, {"betas": (0.3, 0.7)}], ids=str)
@pytest.mark.parametrize("size", [1, 7, 16, 25, 1003, 100_003])
def test_bits_of_torchs_fused_kernel(size, options):
    """Parameters and moments, three steps on the same gradients."""
    lists = [parameters(shapes=[(size,)]) for _ in range(2)]
    optimizers = [kind(p, fused=True, **options) for kind, p in zip((AdamW, torch.optim.AdamW), lists, strict=True)]
    for seed in range(3):
        set_grads(seed, *lists)
        for optimizer in optimizers:
            optimizer.step()
    assert_as_torchs_fused(*lists)
    for key in ("exp_avg", "exp_avg_sq"):
        found = [[optimizer.state[p][key] for p in params] for optimizer, params in zip(optimizers, lists, strict=True)]
        assert_as_torchs_fused(*found)


@pytest.mark.skipif(not LANES, reason="torch's kernel is not vectorised on this processor")
def test_bit_for_bit_torchs_fused_kernel():
    """200 steps of training a small GPT, all of whose parameters are whole vectors: the same weights at the end as with
    torch's fused AdamW."""
    tokens = torch.randint(0, 64, (200, 4, 17), generator=torch.Generator().manual_seed(1))
    config = models.GPTConfig(vocab_size=64, context=16, layers=2, heads=2, width=32)
    finals, losses = [], []
    for kind in (AdamW, torch.optim.AdamW):
        torch.manual_seed(0)
        model = models.GPT(config)
        optimizer = kind(model.parameters(), lr=3e-3, weight_decay=0.1, fused=True)
        for batch in tokens:
            loss = model(batch[:, :-1], batch[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        finals.append([p.detach().clone() for p in model.parameters()])
        losses.append(loss.item())
    assert all(p.numel() % LANES == 0 for p in model.parameters())
    assert losses[0] == losses[1]
    assert_equal(*finals)


def test_groups_with_their_own_settings():
    lists = [parameters(), parameters()]
    optimizers = []
    for kind, params in zip((AdamW, torch.optim.AdamW), lists, strict=True):
        groups = [
            {"params": params[:2], "lr": 1e-2, "weight_decay": 0.0},
            {"params": params[2:3], "betas": (0.8, 0.95), "maximize": True, "amsgrad": True},
        ]
        optimizer = kind(groups, fused=True)
        optimizer.add_param_group({"params": params[3:], "eps": 1e-3})
        optimizers.append(optimizer)
        run(optimizer, range(10))
    assert_as_torchs_fused(*lists)
    assert len(optimizers[0].param_groups) == 3


def test_parameters_without_a_gradient_are_skipped():
    lists = [parameters(), parameters()]
    for kind, params in zip((AdamW, torch.optim.AdamW), lists, strict=True):
        optimizer = kind(params, fused=True)
        for seed in range(6):
            set_grads(seed, params)
            for i, param in enumerate(params):
                if (i + seed) % 3 == 0:
                    param.grad = None
            optimizer.step()
        steps = [int(optimizer.state[p]["step"]) for p in params]
        assert steps == [sum((i + seed) % 3 != 0 for seed in range(6)) for i in range(len(params))]
    assert_as_torchs_fused(*lists)
    optimizer = AdamW(parameters())
    optimizer.step()
    assert not optimizer.state


def test_named_parameters_closure_hooks_and_schedulers():
    lists = [parameters(), parameters()]
    calls = []
    for kind, params in zip((AdamW, torch.optim.AdamW), lists, strict=True):
        optimizer = kind([(f"p{i}", p) for i, p in enumerate(params)], lr=1e-2, fused=True)
        scheduler = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-2, total_steps=10)
        optimizer.register_step_pre_hook(lambda *_: calls.append("pre"))
        optimizer.register_step_post_hook(lambda *_: calls.append("post"))
        for _ in range(5):

            def closure(optimizer=optimizer, params=params):
                optimizer.zero_grad()
                loss = sum((p**2).sum() for p in params)
                loss.backward()
                return loss

            loss = optimizer.step(closure)
            assert loss.requires_grad
            scheduler.step()
        assert optimizer.param_groups[0]["param_names"] == [f"p{i}" for i in range(len(params))]
    assert calls == ["pre", "post"] * 10
    assert_as_torchs_fused(*lists)


def test_complex_parameters():
    lists = [
        [torch.nn.Parameter(torch.randn(5, 3, dtype=torch.complex64, generator=torch.Generator().manual_seed(0)))]
        for _ in range(2)
    ]
    for kind, params in zip((AdamW, torch.optim.AdamW), lists, strict=True):
        optimizer = kind([*params, *parameters()], amsgrad=True)
        for seed in range(3):
            generator = torch.Generator().manual_seed(seed)
            params[0].grad = torch.randn(5, 3, dtype=torch.complex64, generator=generator)
            optimizer.step()
    torch.testing.assert_close(*[params[0] for params in lists], rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("max_norm", [None, 1.0])
def test_sparse_gradients_are_refused(max_norm):
    embedding = torch.nn.Embedding(5, 3, sparse=True)
    optimizer = AdamW(embedding.parameters(), max_norm=max_norm)
    embedding(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(RuntimeError, match="does not support sparse gradients"):
        optimizer.step()


def test_a_step_is_seen_by_autograd():
    w = torch.nn.Parameter(torch.randn(3))
    optimizer = AdamW([w])
    y = (w**2).sum()
    y.backward(retain_graph=True)
    optimizer.step()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_compiled_step():
    lists = [parameters(), parameters()]
    for i, params in enumerate(lists):
        optimizer = AdamW(params)
        step = torch.compile(optimizer.step, backend="aot_eager") if i else optimizer.step
        for seed in range(3):
            set_grads(seed, params)
            step()
    assert_equal(*lists)


def test_mixed_dtypes_and_float64_in_one_group():
    params = [
        *parameters(torch.bfloat16),
        *parameters(torch.float64),
        *parameters(torch.float32),
        *parameters(torch.float16),
    ]
    alone = [
        *parameters(torch.bfloat16),
        *parameters(torch.float64),
        *parameters(torch.float32),
        *parameters(torch.float16),
    ]
    n = len(SHAPES)
    run(AdamW(params), range(3))
    optimizers = [AdamW(alone[i : i + n]) for i in range(0, 4 * n, n)]
    for seed in range(3):
        set_grads(seed, alone)
        for optimizer in optimizers:
            optimizer.step()
    assert_equal(params, alone)
    stock = parameters(torch.float64)
    optimizer = torch.optim.AdamW(stock, foreach=False)
    for seed in range(3):
        generator = torch.Generator().manual_seed(seed)
        grads = [torch.randn(shape, generator=generator) for shape in SHAPES * 4]
        for p, g in zip(stock, grads[n : 2 * n], strict=True):
            p.grad = g.double()
        optimizer.step()
    for a, b in zip(params[n : 2 * n], stock, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-14, atol=0)


# Memory formats and shared memory


def test_memory_formats():
    shape = (4, 3, 5, 6)
    weights = torch.randn(shape), torch.randn(shape)
    results = []
    for layout in ("contiguous", "channels_last", "view"):
        if layout == "channels_last":
            param = weights[0].clone().to(memory_format=torch.channels_last)
        elif layout == "view":
            param = torch.randn(4, 6, 5, 12)[:, ::2, :, ::2]
            param.copy_(weights[0])
        else:
            param = weights[0].clone()
        param = param.requires_grad_()
        optimizer = AdamW([param])
        for _ in range(3):
            param.grad = weights[1].clone()
            optimizer.step()
        if layout == "channels_last":
            assert optimizer.state[param]["exp_avg"].is_contiguous(memory_format=torch.channels_last)
        results.append(param.detach())
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


def test_the_same_parameter_twice_is_an_error():
    params = parameters()
    with pytest.raises(ValueError, match="given twice"):
        AdamW([*params, params[0]])
    with pytest.raises(ValueError, match="more than one parameter group"):
        AdamW([{"params": params}, {"params": params[:1]}])


def test_overlapping_parameters_are_an_error():
    base = torch.zeros(100)
    with pytest.raises(ValueError, match=r"parameter 1 of shape \(50,\) overlaps one of 0 in memory"):
        AdamW([base[:51].requires_grad_(), base[50:].detach().requires_grad_()])
    optimizer = AdamW([base[:50].detach().requires_grad_()])
    with pytest.raises(ValueError, match="overlaps"):
        optimizer.add_param_group({"params": [base[49:60].detach().requires_grad_()]})
    assert len(optimizer.param_groups) == 1
    with pytest.raises(ValueError, match="overlaps itself"):
        AdamW([torch.zeros(3).expand(4, 3).requires_grad_()])
    with pytest.raises(ValueError, match="overlaps"):
        AdamW([base[10:20].requires_grad_(), base[:50].view(torch.int32).view(torch.bfloat16)[30:60].requires_grad_()])


def test_parameters_without_memory_are_taken():
    from torch._subclasses.fake_tensor import FakeTensorMode

    freed = [torch.nn.Parameter(torch.zeros(4)) for _ in range(2)]
    for param in freed:
        param.untyped_storage().resize_(0)
    AdamW(freed)
    with FakeTensorMode():
        AdamW(torch.nn.Linear(4, 4).parameters())
    AdamW(torch.nn.Linear(4, 4, device="meta").parameters())


def test_views_that_do_not_overlap_are_fine():
    base = torch.randn(6, 100)
    flat = [base[0], base[1], base[2:4, ::2], base[2:4, 1::2]]
    apart = [x.clone().requires_grad_() for x in flat]
    views = [x.detach().requires_grad_() for x in flat]
    untouched = base[4:].clone()
    run(AdamW(views), range(3))
    run(AdamW(apart), range(3))
    assert_equal(views, apart)
    assert torch.equal(base[4:], untouched)


def test_state_that_was_replaced_is_used():
    params, other = parameters(), parameters()
    optimizer, reference = AdamW(params), AdamW(other)
    run(optimizer, range(3))
    run(reference, range(3))
    for p in params:
        optimizer.state[p] = {key: value.clone() for key, value in optimizer.state[p].items()}
    for p in (params[0], other[0]):
        state = (optimizer if p is params[0] else reference).state[p]
        state["step"].fill_(100)
        state["exp_avg"].data = torch.ones_like(state["exp_avg"])
    run(optimizer, range(3, 5))
    run(reference, range(3, 5))
    assert int(optimizer.state[params[0]]["step"]) == 102
    assert_equal(params, other)


def test_whatever_moves_between_steps_is_found():
    """The kernels' table is kept from step to step; everything that it points to is moved in turn."""
    lists = [
        [torch.nn.Parameter(torch.randn(6, 8, generator=torch.Generator().manual_seed(i))) for i in range(5)]
        for _ in range(2)
    ]
    kept = []  # so that no address comes back by chance
    optimizer, reference = AdamW(lists[0], amsgrad=True), AdamW(lists[1], amsgrad=True)

    def move(seed: int, param: torch.nn.Parameter) -> None:
        state = optimizer.state[param]
        if seed == 1:
            param.data = param.data.clone()
        elif seed in (2, 3, 4):
            key = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")[seed - 2]
            state[key].data = state[key].data.clone()
        elif seed == 5:
            state["step"].data = state["step"].data.clone()
        elif seed == 6:
            state["exp_avg"] = state["exp_avg"].clone()
        elif seed == 7:
            param.grad = param.grad.t().contiguous().t()  # another order of the same numbers
        elif seed == 8:
            storage = param.grad
            storage.set_(storage.untyped_storage(), 0, (6, 8), (1, 6))  # another order at the same address
            param.grad.copy_(torch.randn(6, 8, generator=torch.Generator().manual_seed(77)))
        elif seed == 9:
            param.data = param.data.t().contiguous().t()

    for seed in range(12):
        set_grads(seed, *lists)
        if seed and seed < 10:
            kept += [t for p in lists[0] for t in (p.data, p.grad, *optimizer.state[p].values())]
            for param in lists[0][1:4]:
                move(seed, param)
            if seed == 8:
                for a, b in zip(*lists, strict=True):
                    b.grad.copy_(a.grad)
        optimizer.step()
        with fastllm.use_backend("reference"):
            reference.step()
        assert_equal(*lists)


def test_a_parameter_that_changes_its_shape_or_order_at_the_same_address():
    lists = [[torch.nn.Parameter(torch.randn(64, 32, generator=torch.Generator().manual_seed(0)))] for _ in range(2)]
    optimizers = [AdamW(lists[0]), AdamW(lists[1])]

    def step(seed: int) -> None:
        for (param,), optimizer, backend in zip(lists, optimizers, (None, "reference"), strict=True):
            param.grad = torch.randn(param.shape, generator=torch.Generator().manual_seed(seed))
            with fastllm.use_backend(backend):
                optimizer.step()
        assert_equal(*lists)

    step(0)
    for (param,), optimizer in zip(lists, optimizers, strict=True):
        param.grad = None
        param.data = param.data.t()
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[param][key] = optimizer.state[param][key].t()
    step(1)
    whole = [param.data.t() for (param,) in lists]
    for (param,), data, optimizer in zip(lists, whole, optimizers, strict=True):
        param.grad = None
        param.data = data[:16]
        for key in ("exp_avg", "exp_avg_sq"):
            optimizer.state[param][key] = optimizer.state[param][key].t()[:16]
    rest = whole[0][16:].clone()
    step(2)
    assert torch.equal(whole[0][16:], rest), "no element past the end"


def test_one_table_serves_other_memory_formats(monkeypatch):
    """channels_last, and a first gradient that no table can be made for."""
    from fastllm.optim import adamw as module

    made = []
    make_table = module.make_table
    monkeypatch.setattr(module, "make_table", lambda *args: made.append(1) or make_table(*args))
    param = torch.nn.Parameter(torch.randn(4, 3, 5, 6).to(memory_format=torch.channels_last))
    optimizer = AdamW([param])
    for _ in range(5):
        param.grad = torch.randn_like(param)
        optimizer.step()
    assert len(made) == (1 if fastllm._ext.C else 0)
    made.clear()
    other = torch.nn.Parameter(torch.randn(10, 10))
    optimizer = AdamW([other])
    other.grad = torch.ones(10, 1).expand(10, 10)
    optimizer.step()
    for _ in range(5):
        other.grad = torch.ones(10, 10)
        optimizer.step()
    assert len(made) == (2 if fastllm._ext.C else 0)


# Clipping


@pytest.mark.parametrize("max_norm", [1e-3, 1.0, 1e6])
def test_clipping_equals_clip_grad_norm(max_norm):
    lists = [parameters(), parameters()]
    ours = AdamW([{"params": lists[0][:2]}, {"params": lists[0][2:], "lr": 1e-2}], max_norm=max_norm, fused=True)
    stock = torch.optim.AdamW([{"params": lists[1][:2]}, {"params": lists[1][2:], "lr": 1e-2}], fused=True)
    for seed in range(5):
        set_grads(seed, *lists)
        before = [p.grad.clone() for p in lists[0]]
        norm = torch.nn.utils.clip_grad_norm_(lists[1], max_norm)
        ours.step()
        stock.step()
        assert_equal([p.grad for p in lists[0]], before)
        torch.testing.assert_close(ours.grad_norm, norm, rtol=1e-6, atol=0)
        assert ours.grad_norm.shape == ()
    for a, b in zip(*lists, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)
    assert AdamW(parameters()).grad_norm is None


@pytest.mark.parametrize("bad", [float("inf"), float("nan")])
def test_skip_nonfinite(bad):
    params, other = parameters(), parameters()
    optimizer, reference = AdamW(params, max_norm=1.0, skip_nonfinite=True), AdamW(other, max_norm=1.0)
    for seed in range(4):
        set_grads(seed, params, other)
        if seed == 2:
            params[3].grad.fill_(bad)
            optimizer.step()
            assert not optimizer.grad_norm.isfinite()
        else:
            optimizer.step()
            reference.step()
    assert_equal(params, other)
    assert int(optimizer.state[params[0]]["step"]) == 3


def test_infinite_max_norm_only_measures():
    params, other = parameters(), parameters()
    optimizer = AdamW(params, max_norm=float("inf"))
    run(optimizer, range(3))
    run(AdamW(other), range(3))
    assert_equal(params, other)
    norm = torch.stack([p.grad.norm() for p in params]).norm()
    torch.testing.assert_close(optimizer.grad_norm, norm, rtol=1e-6, atol=0)


# Errors


@pytest.mark.parametrize(
    ("kwargs", "match"),
    [
        ({"differentiable": True}, "differentiable=True needs torch.optim.AdamW"),
        ({"max_norm": 0.0}, "max_norm must be positive, or None, got 0.0"),
        ({"max_norm": float("nan")}, "max_norm must be positive"),
        ({"skip_nonfinite": True}, "skip_nonfinite needs max_norm"),
        ({"master_weights": "fp32"}, "master_weights must be None, 'float32' or 'remainder', got 'fp32'"),
        ({"master_weights": "float32", "stochastic_rounding": True}, "exclude each other"),
        ({"moment_dtype": torch.int8}, "moment_dtype must be one of"),
        ({"moment_dtype": torch.uint8, "amsgrad": True}, "does not go with amsgrad"),
        ({"lr": -1.0}, "Invalid learning rate: -1.0"),
    ],
)
def test_bad_arguments(kwargs, match):
    with pytest.raises(ValueError, match=match):
        AdamW(parameters(), **kwargs)


def test_a_norm_that_is_no_number():
    with pytest.raises(TypeError, match="AdamW: max_norm must be a number, got 'a'"):
        AdamW(parameters(), max_norm="a")


def test_remainder_of_float16_is_an_error():
    with pytest.raises(ValueError, match=r"for bfloat16 parameters, got torch\.float16"):
        AdamW(parameters(torch.float16), master_weights="remainder")
    with pytest.raises(ValueError, match="complex numbers"):
        AdamW([torch.zeros(3, dtype=torch.complex64, requires_grad=True)], moment_dtype=torch.uint8)


def test_reference_backend_gives_the_same_bits():
    lists = [parameters(), parameters()]
    run(AdamW(lists[0]), range(5))
    with fastllm.use_backend("reference"):
        run(AdamW(lists[1]), range(5))
    assert_equal(*lists)


@pytest.mark.skipif(_ext.C is None, reason="fastllm was installed without kernels")
def test_a_forced_reference_is_the_reference(monkeypatch):
    """The table must not get in the way, or every comparison with the reference compares a kernel with itself."""
    import fastllm.optim.adamw as module

    params = parameters()
    optimizer = AdamW(params)
    set_grads(0, params)
    optimizer.step()
    monkeypatch.setattr(module, "table_step", lambda *args: pytest.fail("called"))
    with fastllm.use_backend("reference"):
        optimizer.step()


@pytest.mark.skipif(_ext.C is None, reason="fastllm was installed without kernels")
def test_a_table_knows_the_places_of_its_parameters():
    """Random numbers depend on a parameter's place: the same tensors at other places are another table."""

    def drawn(before):
        params = [torch.nn.Parameter(torch.ones(64, dtype=torch.bfloat16)) for _ in range(3)]
        optimizer = AdamW(params, lr=1e-3, stochastic_rounding=True)
        set_grads(0, params)
        params[1].grad = None  # the third is at place 2
        if before:
            optimizer.step()
            with torch.no_grad():
                for p in params:
                    p.fill_(1.0)
                for state in optimizer.state.values():
                    for tensor in state.values():
                        tensor.zero_()
        del optimizer.param_groups[0]["params"][1]  # and now at place 1
        optimizer.step()
        return [p.detach().clone() for p in params]

    assert_equal(drawn(True), drawn(False))


@pytest.mark.skipif(_ext.C is None, reason="fastllm was installed without kernels")
def test_gradients_that_are_lazily_negated():
    lists = [[torch.nn.Parameter(torch.ones(8)) for _ in range(2)] for _ in range(2)]
    lazy, plain = (AdamW(params, lr=0.1) for params in lists)
    for seed in range(3):
        for i in range(2):
            grad = torch.randn(8, generator=torch.Generator().manual_seed(10 * seed + i))
            lists[0][i].grad = torch._neg_view(grad)
            lists[1][i].grad = -grad
        lazy.step()
        plain.step()
        assert_equal(*lists)


@pytest.mark.skipif(_ext.C is None, reason="fastllm was installed without kernels")
class TestLayout:
    """What tells the optimizer that its table of addresses is still true."""

    @pytest.mark.parametrize(
        "change",
        [
            lambda x: x.clone(),
            lambda x: x.t(),
            lambda x: x[:2],
            lambda x: x.view(2, 8),
            lambda x: x.view(torch.int32),
            lambda x: x.as_strided((4, 4), (4, 0)),
            lambda x: x[1:].as_strided((4, 4), (4, 1)),
        ],
        ids=["moved", "transposed", "shorter", "reshaped", "dtype", "strides", "offset"],
    )
    def test_sees_every_change(self, change):
        x, other = torch.randn(5, 4), torch.randn(3)
        x = x[:4]
        before = _ext.C.layout([other, x], [other])
        assert _ext.C.layout([other, x], [other]) == before
        assert _ext.C.layout([other, change(x)], [other])[0] != before[0]
        grads = _ext.C.layout([other], [x])
        assert _ext.C.layout([other], [change(x)]) != grads

    def test_keeps_the_second_lists_addresses_apart(self):
        x, grad, other = torch.randn(3), torch.randn(3), torch.randn(3)
        layout, addresses = _ext.C.layout([x], [grad], [x])
        again, moved = _ext.C.layout([x], [other], [x])
        assert layout == again
        assert addresses == grad.data_ptr().to_bytes(8, "little")
        assert moved == other.data_ptr().to_bytes(8, "little")

    def test_tells_lists_apart(self):
        x = torch.randn(3)
        assert _ext.C.layout([x], [x], [x], []) != _ext.C.layout([x], [x], [], [x])

    @pytest.mark.parametrize("x", [torch.eye(2).to_sparse(), 3, None], ids=["sparse", "number", "None"])
    def test_refuses_what_has_no_address(self, x):
        with pytest.raises(RuntimeError):
            _ext.C.layout([x])
