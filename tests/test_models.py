"""GPT: the architecture, its loss, and generation."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from model_suite import losses_of_training, text_windows

from fastllm.models import (
    GPT,
    Bert,
    BertConfig,
    GPTConfig,
    KVCache,
    Transformer,
    TransformerConfig,
    sample_token,
    torch_ops,
)
from fastllm.models.layers import rotary_tables
from fastllm.models.layout import Layout, to_device

SMALL = {"vocab_size": 61, "context": 24, "layers": 3, "heads": 4, "width": 32}
ARCHITECTURES = {
    "gpt2": GPTConfig.gpt2(**SMALL),
    "llama": GPTConfig.llama(**SMALL, kv_heads=2),
    "qk_norm": GPTConfig.llama(**SMALL, kv_heads=1, qk_norm=True, tie_embeddings=True),
    "mixed": GPTConfig(**SMALL, norm="rms_norm", mlp="swiglu", bias=False, position="sinusoidal"),
    "window": GPTConfig.llama(**SMALL, kv_heads=2, head_size=6, window=5, softcap=2.0, sinks=True, mlp="geglu"),
    "relu": GPTConfig.gpt2(**SMALL, mlp="relu", window=7),
}


@pytest.fixture(params=ARCHITECTURES)
def config(request) -> GPTConfig:
    return ARCHITECTURES[request.param]


def make(config: GPTConfig, seed: int = 0) -> GPT:
    torch.manual_seed(seed)
    model = GPT(config)
    with torch.no_grad():  # away from the initial values, at which norms' weights and biases say nothing
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def tokens(rows: int = 2, length: int = 24, seed: int = 1) -> torch.Tensor:
    return torch.randint(0, 61, (rows, length), generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"width": 30}, "heads must divide width, got heads=4, width=30"),
        ({"kv_heads": 3}, "kv_heads must divide heads, got kv_heads=3, heads=4"),
        ({"kv_heads": 0}, "num_kv_heads must be a positive int, got 0"),
        ({"heads": True}, "heads must be a positive int, got True"),
        ({"layers": 0}, "layers must be a positive int, got 0"),
        ({"width": 32.0}, "width must be a positive int, got 32.0"),
        ({"dropout": 1.0}, r"dropout must be in \[0, 1\), got 1.0"),
        ({"norm": "batch_norm"}, "norm must be one of .*, got 'batch_norm'"),
        ({"position": "alibi"}, "position must be one of .*, got 'alibi'"),
        ({"position": "relative"}, "position='relative' is for other models"),
        ({"norm_first": False}, "norm_first=False is for other models"),
        ({"position": "sinusoidal", "width": 33, "heads": 3}, "sinusoidal positions need an even width, got 33"),
        ({"window": 0}, "window must be a positive int, got 0"),
        ({"softcap": math.inf}, "softcap must be finite and not negative, got inf"),
        ({"head_size": 0}, "head_dim must be a positive int, got 0"),
        ({"position": "rotary", "width": 12}, "rotary positions need an even width / heads, got 3"),
        ({"norm_eps": 0.0}, "norm_eps must be positive, got 0.0"),
    ],
)
def test_config_names_what_does_not_fit(changes, message):
    with pytest.raises(ValueError, match=message):
        GPTConfig(**{**SMALL, **changes})


def test_config_from_dict_rejects_unknown_fields():
    with pytest.raises(ValueError, match="unknown field depth"):
        GPTConfig.from_dict({"depth": 3})


def test_gpt2_has_gpt2s_number_of_parameters():
    with torch.device("meta"):
        assert GPT(GPTConfig.gpt2()).num_parameters() == 124_439_808


@pytest.mark.parametrize(
    ("name", "millions"),
    [("gpt2-124m", 124.4), ("gpt2-355m", 354.8), ("gpt2-774m", 774.0), ("gpt2-1558m", 1557.6), ("llama-160m", 162.4)],
)
def test_presets_have_the_sizes_of_their_names(name, millions):
    with torch.device("meta"):
        model = GPT(GPTConfig.preset(name))
    assert model.num_parameters() / 1e6 == pytest.approx(millions, abs=0.1)
    with pytest.raises(ValueError, match="there is no preset 'gpt3', only gpt2-124m"):
        GPTConfig.preset("gpt3")


def test_a_window_is_so_many_positions():
    model = make(GPTConfig.llama(**{**SMALL, "layers": 1}, window=5))
    before = tokens()
    for distance, seen in ((4, True), (5, False)):
        after = before.clone()
        after[:, 20 - distance] = (after[:, 20 - distance] + 1) % 61
        assert torch.equal(model(before)[:, 20], model(after)[:, 20]) != seen


def test_initial_scale():
    model = GPT(GPTConfig.gpt2(vocab_size=512, context=64, layers=8, heads=4, width=256))
    block = model.blocks[0]
    assert block.attention.qkv_proj.weight.std().item() == pytest.approx(0.02, rel=0.05)
    for residual in (block.attention.out_proj, block.mlp.down_proj):
        assert residual.weight.std().item() == pytest.approx(0.02 / math.sqrt(16), rel=0.05)
        assert not residual.bias.any()
    loss = model(tokens(), tokens(seed=2))
    assert loss.item() == pytest.approx(math.log(512), abs=0.1)


def test_fastllm_and_torch_ops_agree(config):
    ours = make(config)
    stock = GPT(GPTConfig(**{**vars(config), "ops": "torch"}))
    stock.load_state_dict(ours.state_dict(), strict=True)
    losses = [model(tokens(), tokens(seed=2)) for model in (ours, stock)]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=1e-6)
    for loss in losses:
        loss.backward()
    for (name, a), b in zip(ours.named_parameters(), stock.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_the_future_does_not_change_the_past(config):
    model = make(config)
    before = tokens()
    after = before.clone()
    after[:, 10:] = (after[:, 10:] + 1) % 61
    a, b = model(before), model(after)
    torch.testing.assert_close(a[:, :10], b[:, :10], rtol=0, atol=0)
    assert (a[:, 10:] - b[:, 10:]).abs().amax(-1).min() > 1e-3


def test_rotate_is_a_complex_product():
    config = GPTConfig.llama(**SMALL)
    x = torch.randn(2, 4, 24, 8, dtype=torch.float64)
    cos, sin = (table.double() for table in rotary_tables(config))
    expected = torch.empty_like(x)
    for position in range(24):
        for i in range(4):
            turn = complex(math.cos(position * 10000 ** (-2 * i / 8)), math.sin(position * 10000 ** (-2 * i / 8)))
            turned = torch.complex(x[:, :, position, i], x[:, :, position, i + 4]) * turn
            expected[:, :, position, i], expected[:, :, position, i + 4] = turned.real, turned.imag
    turned, _ = torch_ops.rotary(x, x, cos, sin)
    torch.testing.assert_close(turned, expected, rtol=0, atol=1e-5)


def test_rotary_scores_depend_on_distance_only():
    cos, sin = rotary_tables(GPTConfig.llama(**SMALL))
    q, k = torch.randn(8), torch.randn(8)
    q_HTD, k_HTD = torch_ops.rotary(q.expand(1, 24, 8), k.expand(1, 24, 8), cos, sin)
    scores = q_HTD[0] @ k_HTD[0].T
    torch.testing.assert_close(scores[5:, 5:], scores[:-5, :-5])
    assert (scores[0, 1] - scores[0, 9]).abs() > 1e-3


def test_grouped_heads_are_heads_repeated():
    grouped = make(GPTConfig.llama(**SMALL, kv_heads=2))
    full = GPT(GPTConfig.llama(**SMALL))
    state = grouped.state_dict()
    for name in [name for name in state if name.endswith("qkv_proj.weight")]:
        q, k, v = state[name].unflatten(0, (-1, 8)).split((4, 2, 2))
        state[name] = torch.cat((q, k.repeat_interleave(2, 0), v.repeat_interleave(2, 0))).flatten(0, 1)
    full.load_state_dict(state)
    torch.testing.assert_close(grouped(tokens()), full(tokens()))


def test_loss_ignores_minus_100(config):
    model = make(config)
    targets = tokens(seed=2)
    targets[0, :20] = -100
    logits = model(tokens()).double()
    valid = targets != -100
    expected = -logits.log_softmax(-1)[valid].gather(1, targets[valid][:, None])
    assert model(tokens(), targets).item() == pytest.approx(expected.mean().item(), rel=1e-5)
    assert model(tokens(), targets, reduction="sum").item() == pytest.approx(expected.sum().item(), rel=1e-5)


def test_loss_is_float32_under_autocast(config):
    model = make(config)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(tokens()).dtype == torch.bfloat16
        loss = model(tokens(), tokens(seed=2))
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(model(tokens(), tokens(seed=2)).item(), rel=0.03)


def test_sum_by_count_is_the_mean(config):
    model, targets = make(config), tokens(seed=2)
    targets[0, :20] = -100
    assert model.count(targets) == 28
    options = model.prepare(tokens(), targets)
    total = model(tokens(), targets, reduction="sum", **options)
    torch.testing.assert_close(total / 28, model(tokens(), targets))
    with pytest.raises(ValueError, match="token 61 is outside the vocabulary of 61"):
        model.prepare(torch.tensor([[61]]), targets)


def test_label_smoothing_is_of_training_alone(config):
    model = make(replace(config, label_smoothing=0.2))
    logits, targets = model(tokens()).flatten(0, 1), tokens(seed=2)
    for training, smoothing in ((True, 0.2), (False, 0.0)):
        expected = F.cross_entropy(logits, targets.flatten(), label_smoothing=smoothing)
        torch.testing.assert_close(model.train(training)(tokens(), targets), expected)
    with pytest.raises(ValueError, match=r"label_smoothing must be in \[0, 1\), got 1.0"):
        replace(config, label_smoothing=1.0)


DROPPED = {**SMALL, "layers": 2, "dropout": 0.1}
MODELS = {
    "gpt2": lambda: GPT(GPTConfig.gpt2(**DROPPED)),
    "llama": lambda: GPT(GPTConfig.llama(**DROPPED, kv_heads=2, qk_norm=True, document_token=7)),
    "stock": lambda: GPT(GPTConfig.llama(**DROPPED, ops="torch")),
    "bert": lambda: Bert(BertConfig(**DROPPED, pad_token=3)),
    "transformer": lambda: Transformer(TransformerConfig(**DROPPED)),
    "t5": lambda: Transformer(TransformerConfig(**DROPPED, position="relative", norm_first=True)),
}


def losses_and_gradients(model, compiled: bool) -> tuple[list[torch.Tensor], int]:
    """A step's bits, and the bytes that its backward waits for, weights not counted."""
    weights = {tensor.untyped_storage().data_ptr() for tensor in (*model.parameters(), *model.buffers())}
    kept = {}

    def keep(x: torch.Tensor) -> torch.Tensor:
        storage = x.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return x

    torch._dynamo.reset()
    call = torch.compile(model, backend="aot_eager", fullgraph=True) if compiled else model
    options = model.prepare(tokens(), tokens(seed=2))
    model.zero_grad()
    torch.manual_seed(4)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        loss = call(tokens(), tokens(seed=2), reduction="sum", **options)
    loss.backward()
    grads = [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]
    return [loss.detach(), torch.rand(1), *grads], sum(kept.values())


@pytest.mark.parametrize(
    ("name", "compiled"),
    [
        *((name, False) for name in MODELS),
        ("gpt2", True),
        *(pytest.param(name, True, marks=pytest.mark.slow) for name in ("llama", "bert", "transformer", "t5")),
    ],
)
def test_checkpointed_activations_give_the_same_bits_for_less_memory(name, compiled):
    """Dropout included; and torch's generator goes on from where it would have been."""
    torch.manual_seed(0)
    model = MODELS[name]()
    names = list(model.state_dict())
    expected, whole = losses_and_gradients(model, compiled)
    model.checkpoint_activations()
    found, less = losses_and_gradients(model, compiled)
    for a, b in zip(expected, found, strict=True):
        assert torch.equal(a, b)
    assert less < whole / 2
    assert list(model.state_dict()) == names
    model.checkpoint_activations(False)
    assert compiled or losses_and_gradients(model, compiled)[1] == whole


def test_checkpointed_models_evaluate_and_generate():
    model = make(ARCHITECTURES["llama"]).eval()
    expected = model(tokens()), model.generate(tokens(2, 4), 20, seed=3)
    cache = KVCache(model.config, 2, 24, device=torch.device("cpu"), dtype=torch.float32)
    model.checkpoint_activations()
    assert torch.equal(model(tokens()), expected[0])
    assert torch.equal(model.generate(tokens(2, 4), 20, seed=3), expected[1])
    torch.testing.assert_close(model(tokens(), cache=cache), expected[0])


def test_to_device_goes_through_whatever_holds_tensors():
    tree = {"layouts": (Layout.of_documents(tokens(), 7, packed=True), [tokens()], None), "n": 3}
    found = to_device(tree, torch.device("meta"))
    layout = found["layouts"][0]
    assert isinstance(layout, Layout)
    assert layout.rows == (2, 24)
    assert layout.positions.device.type == layout.cu_seqlens.device.type == "meta"
    assert found["layouts"][1][0].device.type == "meta"
    assert found["layouts"][2] is None
    assert found["n"] == 3
    assert tree["layouts"][0].positions.device.type == "cpu"


def test_tied_head_is_the_embedding():
    model = make(ARCHITECTURES["gpt2"])
    assert "head.weight" not in model.state_dict()
    untied = GPT(GPTConfig.gpt2(**SMALL, tie_embeddings=False))
    untied.load_state_dict({**model.state_dict(), "head.weight": model.embedding.weight})
    torch.testing.assert_close(model(tokens()), untied(tokens()))


def test_compiles_without_graph_breaks(config):
    model = make(config)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(tokens(), tokens(seed=2)), model(tokens(), tokens(seed=2)))


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((24,), r"shape \(B, T\), not empty, got \(24,\)"),
        ((2, 0), r"not empty, got \(2, 0\)"),
        ((1, 25), "25 positions do not fit .* of 24"),
    ],
)
def test_forward_rejects(shape, message):
    with pytest.raises(ValueError, match=message):
        make(ARCHITECTURES["gpt2"])(torch.zeros(shape, dtype=torch.int64))


def test_cache_in_pieces_gives_the_logits_of_one_call(config):
    model = make(config).eval()
    cache = KVCache(config, 2, 24, device=torch.device("cpu"), dtype=torch.float32)
    with torch.no_grad():
        pieces = [model(piece, cache=cache) for piece in tokens().split([7, 1, 11, 5], dim=1)]
        torch.testing.assert_close(torch.cat(pieces, 1), model(tokens()), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    "sampling", [{"temperature": 0.0}, {"temperature": 0.9, "top_k": 20}, {"top_p": 0.9}, {}], ids=str
)
def test_generate_is_the_loop_without_cache(config, sampling):
    model = make(config)
    prompt = tokens(3, 5)
    expected = prompt
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for _ in range(19):
            new = sample_token(model(expected)[:, -1], generator=generator, **sampling)
            expected = torch.cat((expected, new[:, None]), 1)
    assert torch.equal(model.generate(prompt, 19, seed=7, **sampling), expected)


def test_generate_depends_on_its_seed_alone():
    model = make(ARCHITECTURES["llama"])
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = model.generate(tokens(2, 4), 20, seed=3)
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(model.generate(tokens(2, 4), 20, seed=3), first)
    assert not torch.equal(model.generate(tokens(2, 4), 20, seed=4), first)


def test_generate_without_dropout_and_leaves_the_mode():
    model = make(GPTConfig.gpt2(**SMALL, dropout=0.5)).train()
    outputs = [model.generate(tokens(2, 4), 20, temperature=0) for _ in range(2)]
    assert torch.equal(*outputs)
    assert model.training


def test_generate_stops():
    model = make(ARCHITECTURES["gpt2"])
    free = model.generate(tokens(2, 4), 20, seed=0)
    stop = int(free[0, 8])
    output = model.generate(tokens(2, 4), 20, seed=0, stop=stop)
    at = int((free[0, 4:] == stop).nonzero()[0]) + 4
    assert torch.equal(output[0, : at + 1], free[0, : at + 1])
    assert (output[0, at:] == stop).all()
    everything = model.generate(tokens(2, 4), 20, seed=0, stop=range(61))
    assert everything.shape == (2, 5)


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        (tokens(1, 4), {"max_new_tokens": 21}, "4 prompt tokens \\+ 21 new ones do not fit into the context of 24"),
        (tokens(1, 4), {"max_new_tokens": -1}, "max_new_tokens must not be negative, got -1"),
        (torch.zeros(1, 0, dtype=torch.int64), {"max_new_tokens": 1}, r"not empty, got \(1, 0\)"),
        (torch.tensor([[61]]), {"max_new_tokens": 1}, "token 61 is outside the vocabulary of 61"),
        (torch.tensor([[-1]]), {"max_new_tokens": 1}, "token -1 is outside"),
        (tokens(1, 4), {"max_new_tokens": 1, "temperature": -0.5}, "temperature .* got -0.5"),
        (tokens(1, 4), {"max_new_tokens": 1, "temperature": math.nan}, "temperature .* got nan"),
        (tokens(1, 4), {"max_new_tokens": 1, "top_k": 0}, "top_k must be at least 1, got 0"),
        (tokens(1, 4), {"max_new_tokens": 1, "top_p": 1.5}, r"top_p must be in \(0, 1\], got 1.5"),
    ],
)
def test_generate_rejects(prompt, arguments, message):
    with pytest.raises(ValueError, match=message):
        make(ARCHITECTURES["gpt2"]).generate(prompt, **arguments)


PROBS = torch.tensor([0.05, 0.4, 0.15, 0.3, 0.1])


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({}, PROBS),
        ({"temperature": 2.0}, PROBS.sqrt() / PROBS.sqrt().sum()),
        ({"top_k": 2}, torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),
        ({"top_k": 99}, PROBS),
        ({"top_p": 0.69}, torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),
        ({"top_p": 0.71}, torch.tensor([0, 40, 15, 30, 0]) / 85),
        ({"top_p": 0.01}, torch.tensor([0.0, 1, 0, 0, 0])),
        ({"top_k": 3, "top_p": 0.8}, torch.tensor([0, 4 / 7, 0, 3 / 7, 0])),  # of what top_k left, 82 % are the two
        ({"temperature": 0}, torch.tensor([0.0, 1, 0, 0, 0])),
    ],
    ids=str,
)
def test_sample_token_follows_the_distribution(arguments, expected):
    draws = sample_token(PROBS.log().expand(40_000, 5), generator=torch.Generator().manual_seed(0), **arguments)
    frequency = F.one_hot(draws, 5).double().mean(0)
    assert (frequency[expected == 0] == 0).all()
    torch.testing.assert_close(frequency, expected.double(), rtol=0, atol=0.012)


END = 7  # ends a document, in the tests below


def packed_tokens() -> torch.Tensor:
    """Rows of several documents: one that begins with an empty one, one that ends with one, one that has a single."""
    tokens = torch.randint(8, 50, (3, 24), generator=torch.Generator().manual_seed(3))
    tokens[0, [0, 5, 6, 17]] = END
    tokens[1, [11, 23]] = END
    return tokens


def documents_of(row: torch.Tensor) -> list[torch.Tensor]:
    ends = [*((row == END).nonzero().flatten() + 1).tolist(), len(row)]
    return [row[a:b] for a, b in zip([0, *ends], ends, strict=False) if b > a]


@pytest.mark.parametrize("ops", ["fastllm", "torch"])
@pytest.mark.parametrize("preset", [GPTConfig.gpt2, GPTConfig.llama], ids=["gpt2", "llama"])
def test_packed_documents_are_worth_what_they_are_one_by_one(preset, ops):
    """Loss, logits and every gradient."""
    config = preset(vocab_size=50, context=24, layers=2, heads=4, kv_heads=2, width=32, document_token=END, ops=ops)
    torch.manual_seed(0)
    packed = GPT(config)
    alone = GPT(replace(config, document_token=None))
    alone.load_state_dict(packed.state_dict())
    tokens = packed_tokens()
    targets = torch.randint(50, tokens.shape, generator=torch.Generator().manual_seed(4))
    loss = packed(tokens, targets, reduction="sum")
    loss.backward()
    total = torch.zeros(())
    logits = []
    for row, wanted in zip(tokens, targets, strict=True):
        at = 0
        for document in documents_of(row):
            part = wanted[at : at + len(document)]
            total = total + alone(document[None], part[None], reduction="sum")
            logits.append(alone(document[None])[0])
            at += len(document)
    total.backward()
    torch.testing.assert_close(loss, total, rtol=1e-5, atol=0)
    torch.testing.assert_close(packed(tokens).flatten(0, 1), torch.cat(logits), rtol=1e-4, atol=1e-5)
    for (name, a), b in zip(packed.named_parameters(), alone.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-4, msg=name)


@pytest.mark.parametrize("ops", ["fastllm", "torch"])
def test_documents_found_outside_compile_into_one_graph(ops):
    config = GPTConfig.llama(vocab_size=50, context=24, layers=2, heads=4, width=32, document_token=END, ops=ops)
    torch.manual_seed(0)
    model = GPT(config)
    tokens = packed_tokens()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for rows in (tokens, tokens.flip(0), tokens.flip(1)):
        loss = compiled(rows, rows, documents=model.documents(rows))
        torch.testing.assert_close(loss, model(rows, rows))


def test_without_a_document_token_rows_are_whole():
    config = GPTConfig.llama(vocab_size=50, context=24, layers=2, heads=4, width=32)
    torch.manual_seed(0)
    model = GPT(config)
    masked = GPT(replace(config, document_token=END))
    masked.load_state_dict(model.state_dict())
    tokens = packed_tokens()
    assert not torch.allclose(model(tokens), masked(tokens))
    tokens[tokens == END] = 8
    torch.testing.assert_close(model(tokens), masked(tokens), rtol=1e-4, atol=1e-5)


def test_a_document_token_outside_the_vocabulary_is_an_error():
    with pytest.raises(ValueError, match="document_token must be a token, below vocab_size=50, got 50"):
        GPTConfig.llama(vocab_size=50, document_token=50)


@pytest.mark.parametrize("ops", ["fastllm", "torch"])
def test_generate_under_autocast(ops):
    torch.manual_seed(0)
    model = GPT(GPTConfig.llama(vocab_size=50, context=24, layers=2, heads=4, kv_heads=2, width=32, ops=ops))
    with torch.autocast("cpu", torch.bfloat16):
        assert model.generate(packed_tokens()[:, :5], 4, temperature=0).shape == (3, 9)


@pytest.mark.parametrize("ops", ["fastllm", "torch"])
@pytest.mark.parametrize("make", [GPTConfig.gpt2, GPTConfig.llama])
def test_every_module_with_parameters_is_called(make, ops):
    """Whoever gathers or watches parameters, FSDP2 for one, does so around the forward of the module that has them."""
    model, called = GPT(make(**SMALL, ops=ops)), set()
    for name, module in model.named_modules():
        if list(module.parameters(recurse=False)):
            module.register_forward_pre_hook(lambda module, args, name=name: called.add(name))
    tokens = torch.randint(61, (2, 9))
    last = {"embedding"} if model.head is None else {"head"}
    for targets in (tokens, None):
        called.clear()
        model(tokens, targets)
        assert called == {name for name, m in model.named_modules() if list(m.parameters(recurse=False))}
        assert last <= called


@pytest.mark.parametrize("make", [GPTConfig.gpt2, GPTConfig.llama])
def test_modules_that_were_exchanged(make):
    """Stock ones with the same weights give the same loss; an adapter's output is what the loss is of."""
    model = GPT(make(**SMALL))
    tokens = torch.randint(61, (2, 9))
    loss, logits = model(tokens, tokens), model(tokens)
    for name in ("embedding", "positions", "head"):
        module = getattr(model, name)
        if module is not None:
            stock = torch.nn.Linear(32, 61, bias=False) if name == "head" else torch.nn.Embedding(*module.weight.shape)
            stock.load_state_dict(module.state_dict())
            setattr(model, name, stock)
    assert torch.equal(model(tokens, tokens), loss)
    assert torch.equal(model(tokens), logits)
    if model.head is not None:

        class Doubled(torch.nn.Module):
            def __init__(self, base):
                super().__init__()
                self.base = base

            def forward(self, x):
                return 2 * self.base(x)

        model.head = Doubled(model.head)
        torch.testing.assert_close(model(tokens), 2 * logits)
        expected = torch.nn.functional.cross_entropy(2 * logits.flatten(0, 1), tokens.flatten())
        torch.testing.assert_close(model(tokens, tokens), expected)


@pytest.mark.parametrize("preset", [GPTConfig.gpt2, GPTConfig.llama], ids=["gpt2", "llama"])
def test_a_small_batch_is_learned_by_heart(preset):
    torch.manual_seed(0)
    model = GPT(preset(**SMALL))
    losses = losses_of_training(model, lambda step: (tokens()[:, :-1], tokens()[:, 1:]), 150)
    assert losses[-1] < 0.2 < 3 < losses[0]
    assert torch.equal(model.generate(tokens()[:, :4], 20, temperature=0), tokens())


@pytest.mark.parametrize("preset", [GPTConfig.gpt2, GPTConfig.llama], ids=["gpt2", "llama"])
def test_the_loss_falls_on_real_text(preset):
    windows = text_windows(256, 33)
    torch.manual_seed(0)
    model = GPT(preset(vocab_size=256, context=32, layers=2, heads=4, width=64))
    losses = losses_of_training(model, lambda step: (windows[step % 8 :: 8, :-1], windows[step % 8 :: 8, 1:]), 80)
    assert sum(losses[-5:]) / 5 < 3.3 < 5 < losses[0]
