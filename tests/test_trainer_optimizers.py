"""Optimizers by name, alone and over shards."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from distributed_optimizers import KINDS, load, make_config, make_model, set_grads, train
from ranks import run_ranks

from fastllm.models import Bert, BertConfig, Transformer, TransformerConfig
from fastllm.optim import AdamW
from fastllm.trainer.optimizers import OPTIMIZERS, lr_scales, make_optimizer

HERE = Path(__file__).parent
without_distributed = pytest.mark.skipif(
    not torch.distributed.is_available(), reason="torch was built without distributed"
)
ALL = (
    *KINDS,
    {"optimizer": "adafactor"},
    {"moment_dtype": "uint8"},
    {"moment_dtype": "bfloat16", "layer_decay": 0.7},
    {"master_weights": "float32"},
    {"master_weights": "remainder", "moment_dtype": "uint8"},
)
by_kind = pytest.mark.parametrize("kind", ALL, ids=lambda kind: "-".join(map(str, kind.values())))


def make(**kind):
    model = make_model(torch.bfloat16 if kind.get("master_weights") else torch.float32)
    return model, make_optimizer(model, make_config(**kind))


def copies(tensors) -> dict:
    return {name: tensor.detach().clone() for name, tensor in dict(tensors).items()}


def assert_equal(found, expected) -> None:
    found, expected = dict(found), dict(expected)
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name


def test_groups_of_the_default():
    model, optimizer = make()
    (adamw,) = optimizer.optimizers
    assert type(adamw) is AdamW
    assert [(group["weight_decay"], group["lr"]) for group in adamw.param_groups] == [(0.1, 1e-2), (0.0, 1e-2)]
    assert adamw.param_groups[0]["params"] == [p for p in model.parameters() if p.ndim >= 2]
    assert adamw.param_groups[1]["params"] == [p for p in model.parameters() if p.ndim < 2]
    assert not optimizer.waits
    model.embedding.weight.requires_grad_(False)
    frozen = make_optimizer(model, make_config())
    assert not any(p is model.embedding.weight for group in frozen.param_groups for p in group["params"])


def test_rates_of_layers():
    model, optimizer = make(layer_decay=0.5, head_lr_ratio=4.0)
    optimizer.set_rate(0.3)
    rates = {id(p): group["lr"] for group in optimizer.param_groups for p in group["params"]}
    found = {name: rates[id(p)] / 0.3 for name, p in model.named_parameters()}
    assert found["embedding.weight"] == found["positions.weight"] == pytest.approx(0.125)
    assert found["blocks.0.attention.qkv_proj.weight"] == found["blocks.0.mlp_norm.bias"] == pytest.approx(0.25)
    assert found["blocks.1.mlp.up_proj.weight"] == pytest.approx(0.5)
    assert found["norm.weight"] == pytest.approx(1.0)
    assert found["head.weight"] == pytest.approx(4.0)
    assert [group["weight_decay"] for group in optimizer.param_groups] == [0.1] * 4 + [0.0] * 3


def test_rates_of_other_models():
    shape = {"vocab_size": 11, "context": 8, "heads": 2, "width": 8}
    bert = Bert(BertConfig(**shape, layers=1, head="classification"))
    found = lr_scales([name for name, _ in bert.named_parameters()], 0.5, 2.0)
    below = ("embedding.weight", "token_types.weight", "positions.weight", "embedding_norm.bias")
    assert {found[name] for name in below} == {0.25}
    assert found["blocks.0.mlp.up_proj.bias"] == 0.5
    assert found["pooler.dense.weight"] == 1.0
    assert found["head.weight"] == found["head.bias"] == 2.0
    config = TransformerConfig(**shape, layers=3, encoder_layers=1, position="relative")
    found = lr_scales([name for name, _ in Transformer(config).named_parameters()], 0.5)
    assert found["encoder.blocks.0.mlp.up_proj.weight"] == found["decoder.blocks.2.mlp.up_proj.weight"] == 0.5
    assert found["decoder.blocks.0.cross_attention.q_proj.weight"] == 0.125
    assert found["embedding.weight"] == found["decoder.relative.table.weight"] == 0.0625
    assert found["encoder.relative.table.weight"] == 0.25


def test_muon_has_the_matrices_of_blocks():
    model, optimizer = make(optimizer="muon")
    muon, adamw = optimizer.optimizers
    assert type(muon) is torch.optim.Muon
    assert type(adamw) is AdamW
    hidden = {id(p) for p in muon.param_groups[0]["params"]}
    assert len(hidden) == 2 * 4
    assert hidden == {id(p) for name, p in model.named_parameters() if name.startswith("blocks.") and p.ndim == 2}
    before = copies(model.named_parameters())
    set_grads(model, 0)
    optimizer.set_rate(1e-2)
    optimizer.step()
    for name, p in model.named_parameters():  # one rate moves both alike
        moved = (p.detach() - before[name] * (1 - 1e-2 * (0.1 if p.ndim == 2 else 0))).square().mean().sqrt()
        assert 1e-3 < float(moved) < 1.2e-2, name


def test_sgd_and_torch_adamw_are_torchs():
    for kind, reference in (
        ("sgd", lambda p, wd: torch.optim.SGD(p, lr=1e-2, momentum=0.9, weight_decay=wd)),
        ("torch_adamw", lambda p, wd: torch.optim.AdamW(p, lr=1e-2, betas=(0.9, 0.95), weight_decay=wd, fused=True)),
    ):
        model, optimizer = make(optimizer=kind)
        twin = make_model()
        stock = [reference([p for p in twin.parameters() if (p.ndim > 1) == m], 0.1 * m) for m in (True, False)]
        for step in range(3):
            set_grads(model, step)
            set_grads(twin, step)
            norm = optimizer.step()
            assert float(norm) == pytest.approx(float(torch.nn.utils.clip_grad_norm_(twin.parameters(), 0.5)))
            for each in stock:
                each.step()
        for (name, p), q in zip(model.named_parameters(), twin.parameters(), strict=True):
            torch.testing.assert_close(p, q, msg=name)


@by_kind
def test_the_norm_is_that_before_clipping(kind):
    model, optimizer = make(**kind)
    set_grads(model, 0)
    expected = math.sqrt(sum(float(p.grad.double().square().sum()) for p in model.parameters()))
    norm = optimizer.step()
    assert norm.shape == ()
    assert norm.dtype == torch.float32
    assert float(norm) == pytest.approx(expected, rel=1e-5)
    optimizer.zero_grad()
    with pytest.raises(ValueError, match="no parameter has a gradient"):
        optimizer.step()


@pytest.mark.parametrize("kind", [{}, {"optimizer": "torch_adamw"}, {"optimizer": "muon"}], ids=str)
def test_without_clipping(kind):
    results = []
    for clip in (0.0, 1e9):
        model, optimizer = make(**kind, clip=clip)
        train(model, optimizer, range(2))
        results.append(copies(model.named_parameters()))
    assert_equal(*results)


@by_kind
def test_a_bad_step_changes_nothing(kind):
    model, optimizer = make(**kind)
    train(model, optimizer, range(2))
    weights, state = copies(model.named_parameters()), copies(optimizer.state_tensors())
    set_grads(model, 2)
    assert math.isfinite(optimizer.step(torch.tensor(1.0)))
    model.head.weight.grad[3, 2] = math.nan
    assert math.isnan(optimizer.step(torch.tensor(0.0)))
    model.head.weight.grad[3, 2] = math.inf
    assert math.isinf(optimizer.step())
    assert_equal(model.named_parameters(), weights)
    assert_equal(optimizer.state_tensors(), state)
    train(model, optimizer, range(2, 3))  # what follows is as if nothing had been
    twin, other = make(**kind)
    train(twin, other, range(3))
    assert_equal(model.named_parameters(), twin.named_parameters())


@by_kind
def test_a_loaded_state_goes_on_to_the_last_bit(kind):
    model, optimizer = make(**kind)
    optimizer.set_rate(3e-3)
    train(model, optimizer, range(3))
    second, other = make(**kind)
    second.load_state_dict(model.state_dict())
    tensors, values = optimizer.state_tensors(), json.loads(json.dumps(optimizer.state_values()))
    assert all(key.split(".", 3)[3] in dict(model.named_parameters()) for key in tensors)
    other.load(dict(reversed(tensors.items())), values)
    assert_equal(other.state_tensors(), tensors)
    for name, tensor in tensors.items():
        assert other.state_tensors()[name].dtype == tensor.dtype
    train(model, optimizer, range(3, 6))
    train(second, other, range(3, 6))
    assert_equal(second.named_parameters(), model.named_parameters())
    assert_equal(other.state_tensors(), optimizer.state_tensors())


def test_state_goes_by_names():
    """Parameters in another order, and with other groups, find their own state."""
    model, optimizer = make()
    train(model, optimizer, range(3))
    second = make_model()
    second.load_state_dict(model.state_dict())
    second._modules["norm"] = second._modules.pop("norm")
    assert [name for name, _ in second.named_parameters()] != [name for name, _ in model.named_parameters()]
    other = make_optimizer(second, make_config(layer_decay=0.9, weight_decay=0.3))
    other.load(optimizer.state_tensors(), optimizer.state_values())
    assert_equal(other.state_tensors(), optimizer.state_tensors())
    assert {group["weight_decay"] for group in other.param_groups} == {0.0, 0.3}  # the config's
    assert len({group["lr"] for group in other.param_groups}) == 4


def test_moments_of_another_dtype_are_converted():
    model, optimizer = make(moment_dtype="uint8")
    train(model, optimizer, range(2))
    _, other = make()
    other.load(optimizer.state_tensors(), optimizer.state_values())
    assert other.state_tensors()["optimizer.0.exp_avg.head.weight"].dtype == torch.float32


def test_a_state_that_does_not_fit_is_named():
    model, optimizer = make()
    train(model, optimizer, range(1))
    tensors, values = optimizer.state_tensors(), optimizer.state_values()
    key = "optimizer.0.exp_avg.head.weight"
    with pytest.raises(ValueError, match=r"lacks exp_avg of head\.weight"):
        optimizer.load({name: tensor for name, tensor in tensors.items() if name != key}, values)
    with pytest.raises(ValueError, match=r"has exp_avg of x, which is not among what was saved"):
        optimizer.load({**tensors, "optimizer.0.exp_avg.x": torch.zeros(1)}, values)
    with pytest.raises(ValueError, match=r"exp_avg of head\.weight has shape \(8, 11\) for weights of \(11, 8\)"):
        optimizer.load({**tensors, key: torch.zeros(8, 11)}, values)
    with pytest.raises(ValueError, match="of optimizer 'adamw', not of 'sgd'"):
        make(optimizer="sgd")[1].load(tensors, values)
    tied = make_optimizer(make_model(tie_embeddings=True), make_config())
    with pytest.raises(ValueError, match=r"step of head\.weight, which the model does not train"):
        tied.load(tensors, values)
    with pytest.raises(ValueError, match="'x' is not a name of an optimizer's state"):
        optimizer.load({**tensors, "x": torch.zeros(1)}, values)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"optimizer": "fastllm"}, "optimizer must be one of .*got 'fastllm'"),
        ({"moment_dtype": "float64"}, "moment_dtype must be one of .*got 'float64'"),
        ({"optimizer": "sgd", "moment_dtype": "uint8"}, "moment_dtype='uint8' is for optimizer 'adamw', not for 'sgd'"),
        ({"optimizer": "muon", "master_weights": "float32"}, "master_weights='float32' is for optimizer 'adamw'"),
        ({"momentum": 1.0}, r"momentum must be in \[0, 1\), got 1.0"),
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\], got 0.0"),
        ({"head_lr_ratio": math.inf}, "head_lr_ratio must be positive and finite, got inf"),
    ],
)
def test_options_that_do_not_fit_are_named(changes, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(make_model(), make_config(**changes))


def test_models_without_blocks():
    model = torch.nn.Linear(3, 2)
    assert len(make_optimizer(model, make_config()).param_groups) == 2
    with pytest.raises(ValueError, match=r"layer_decay=0\.5 needs a model with numbered blocks"):
        make_optimizer(model, make_config(layer_decay=0.5))
    with pytest.raises(ValueError, match="'muon' needs a model with matrices in numbered blocks"):
        make_optimizer(model, make_config(optimizer="muon"))


def test_every_optimizer_lowers_a_loss():
    tokens = torch.randint(11, (8, 6), generator=torch.Generator().manual_seed(0))
    for kind in OPTIMIZERS:
        model = make_model()
        optimizer = make_optimizer(model, make_config(optimizer=kind, lr=0.03))
        losses = []
        for _ in range(30):
            loss = model(tokens[:, :-1], tokens[:, 1:])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[-1] < 0.9 * losses[0], (kind, losses)


def run(case: str, folder: Path, world: int) -> None:
    run_ranks("distributed_optimizers.py", case, world, folder, world=world)


@without_distributed
def test_two_ranks(tmp_path):
    run("sharded_briefly+swapped+refused", tmp_path, 2)
    load(0, 1, tmp_path, KINDS[:1])


@pytest.mark.slow
@without_distributed
def test_state_on_another_number_of_ranks(tmp_path):
    run("sharded", tmp_path, 2)
    run("load", tmp_path, 2)
    run("load", tmp_path, 3)
    load(0, 1, tmp_path)
