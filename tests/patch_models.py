"""Tiny models of every type that transformers registers, and what patching must leave as it was."""

from __future__ import annotations

import contextlib
import copy
import signal
import sys
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fastllm.patching import patch

VOCABULARY = 99
LENGTH = 12

# What sizes are called in configurations, and what they become.
SIZES = {
    "vocab_size": VOCABULARY, "hidden_size": 32, "d_model": 32, "n_embd": 32, "dim": 32, "embedding_size": 32,
    "num_hidden_layers": 2, "num_layers": 2, "n_layer": 2, "n_layers": 2, "encoder_layers": 2, "decoder_layers": 2,
    "num_decoder_layers": 2, "num_encoder_layers": 2, "num_attention_heads": 4, "n_head": 4, "n_heads": 4,
    "num_heads": 4, "encoder_attention_heads": 4, "decoder_attention_heads": 4, "num_key_value_heads": 2,
    "num_kv_heads": 2, "head_dim": 8, "d_kv": 8, "intermediate_size": 48, "ffn_dim": 48, "d_ff": 48, "n_inner": 48,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48, "hidden_dim": 48, "ffn_hidden_size": 48, "moe_intermediate_size": 24,
    "shared_expert_intermediate_size": 24, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_num_experts": 4, "q_lora_rank": 16, "kv_lora_rank": 16,
    "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8, "qk_head_dim": 16, "n_group": 1, "topk_group": 1,
    "max_position_embeddings": 64, "n_positions": 64, "sliding_window": 4, "attention_window": 4, "state_size": 8,
    "decoder_vocab_size": VOCABULARY, "first_k_dense_replace": 1, "rotary_dim": 8, "word_embed_proj_dim": 32,
    "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 8, "linear_num_value_heads": 4, "linear_num_key_heads": 2,
    "linear_key_head_dim": 8, "linear_value_head_dim": 8, "pretraining_tp": 1, "layerdrop": 0.0,
}  # fmt: skip
DROPOUTS = ("drop", "layerdrop")


class TooSlow(Exception):
    pass


@contextlib.contextmanager
def limit(seconds: int):
    """Raises TooSlow behind that many seconds."""

    def stop(*args: Any) -> None:
        raise TooSlow(f"took more than {seconds} s")

    before = signal.signal(signal.SIGALRM, stop)
    signal.alarm(seconds)
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, before)


# What an architecture may not bear to have set: left out, one after the other, until the model runs.
DOUBTFUL: tuple[tuple[str, ...], ...] = (
    (),
    ("head_dim",),
    ("num_key_value_heads", "num_kv_heads"),
    ("layer_types",),
    ("head_dim", "num_key_value_heads", "num_kv_heads", "layer_types", "sliding_window", "rotary_dim"),
)


def tiny_config(config_class: type, without: tuple[str, ...] = ()) -> Any:
    """The configuration's defaults with every size made small."""
    defaults = config_class()
    if getattr(defaults, "text_config", defaults) is not defaults:
        raise ValueError("a model of several modalities")

    def settable(name: str) -> bool:
        own = getattr(config_class, name, None)
        return name not in without and not (isinstance(own, property) and own.fset is None)

    small = {name: value for name, value in SIZES.items() if isinstance(getattr(defaults, name, None), (int, float))}
    for name in ("head_dim", "num_key_value_heads", "ffn_dim", "sliding_window"):  # often None
        if name in vars(defaults):
            small.setdefault(name, SIZES[name])
    if isinstance(getattr(defaults, "layer_types", None), list):
        kinds = list(dict.fromkeys(defaults.layer_types))
        small["num_hidden_layers"] = max(2, len(kinds))
        small["layer_types"] = (kinds * 2)[: small["num_hidden_layers"]]
    for name in vars(defaults):
        if any(part in name for part in DROPOUTS) and isinstance(getattr(defaults, name), float):
            small[name] = 0.0
        if name.endswith("_token_id") and isinstance(getattr(defaults, name), int):
            small[name] = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 3)
    for name in ("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"):
        small.setdefault(name, {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}.get(name, 1))
    return config_class(**{name: value for name, value in small.items() if settable(name)})


def tiny(model_class: type, config_class: type) -> nn.Module:
    """A small model that runs.

    Raises:
        Exception: the first attempt's, if none of them gives one.
    """
    first: Exception | None = None
    for without in DOUBTFUL:
        try:
            model = build(model_class, tiny_config(config_class, without))
            run(model, batch(model), train=True)
            return model
        except TooSlow:
            raise
        except Exception as error:
            first = first or error
    assert first is not None
    raise first


def build(model_class: type, config: Any) -> nn.Module:
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = model_class(config)
    if sum(p.numel() for p in model.parameters()) > 20_000_000:
        raise ValueError("stays large")
    torch.manual_seed(1)
    with torch.no_grad():  # norms whose weights are all one would hide a swap, heads that are zero everything
        for p in model.parameters():
            if p.dtype.is_floating_point:
                p.add_(torch.randn_like(p) * 0.02)
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model


def batch(model: nn.Module, padded: bool = False) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(2)
    ids = torch.randint(10, VOCABULARY, (2, LENGTH), generator=generator)
    labels = ids.clone()
    inputs = {"input_ids": ids, "labels": labels}
    if padded:
        mask = torch.ones_like(ids)
        mask[0, 9:] = 0
        ids[0, 9:] = 0
        labels[0, 9:] = -100
        inputs["attention_mask"] = mask
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = torch.randint(10, VOCABULARY, (2, LENGTH), generator=generator)
    return inputs


def run(model: nn.Module, inputs: dict[str, Tensor], train: bool) -> dict[str, Tensor]:
    """Loss, logits of the places that are no padding, and every gradient."""
    model.train(train)
    torch.manual_seed(3)
    output = model(**inputs)
    found = {"loss": output.loss.detach()}
    logits = output.get("logits")
    if isinstance(logits, Tensor):
        mask = inputs.get("attention_mask")
        keep = mask is not None and not model.config.is_encoder_decoder and logits.shape[:2] == mask.shape
        found["logits"] = logits[mask.bool()].detach() if keep else logits.detach()
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    grads = torch.autograd.grad(output.loss, list(named.values()), allow_unused=True)
    return found | {name: grad for name, grad in zip(named, grads, strict=True) if grad is not None}


def assert_same(
    got: dict[str, Tensor],
    expected: dict[str, Tensor],
    truth: Callable[[], dict[str, Tensor]] | None = None,
    tolerance: float = 2e-4,
) -> None:
    """Each tensor to within `tolerance` of its largest element, or of a hundredth of the largest gradient. Where it
    misses that, it must be nearer to the float64 `truth` than twice what was expected is."""
    grads = [float(x.abs().max()) for name, x in expected.items() if name not in ("loss", "logits") and x.numel()]
    scale = max(grads, default=0.0)
    exact: dict[str, Tensor] = {}
    for name, wanted in expected.items():
        if name == "logits" and name not in got:
            continue  # a training step gives none
        assert name in got, f"{name} is missing"
        if not wanted.numel():
            continue
        largest = float(wanted.abs().max())
        if name not in ("loss", "logits"):
            largest = max(largest, 1e-2 * scale)
        worst = float((got[name] - wanted).abs().max())
        if worst <= tolerance * max(largest, 1e-6):
            continue
        message = f"{name}: {worst:.1e} where the largest is {largest:.1e}"
        assert truth is not None, message
        exact = exact or truth()
        errors = [float((x[name].double() - exact[name]).abs().max()) for x in (got, expected)]
        assert errors[0] <= 2 * errors[1], f"{message}; errors {errors[0]:.1e}, unpatched {errors[1]:.1e}"


def registries() -> dict[str, dict[type, type]]:
    """transformers' own lists of language models: {task: {configuration: model}}."""
    from transformers.models.auto import modeling_auto as auto

    return {
        "causal": auto.MODEL_FOR_CAUSAL_LM_MAPPING,
        "masked": auto.MODEL_FOR_MASKED_LM_MAPPING,
        "seq2seq": auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING,
    }


def _classes_of(name: str) -> tuple[type, type]:
    """Model and configuration of a type, by transformers' name of it; of several tasks the last one's."""
    from transformers import AutoConfig

    config_class = type(AutoConfig.for_model(name))
    for mapping in reversed(registries().values()):
        if config_class in mapping:
            return _first(mapping[config_class]), config_class
    raise ValueError(f"no language model of type {name}")


def model_of(name: str) -> nn.Module:
    """A small model of a type."""
    model_class, config_class = _classes_of(name)
    return build(model_class, tiny_config(config_class))


def tiny_of(name: str) -> nn.Module:
    """As `model_of`, but what the type does not bear is left at its default."""
    return tiny(*_classes_of(name))


def _first(models: Any) -> type:
    return models[0] if isinstance(models, tuple) else models


@dataclass
class Result:
    """What became of one type."""

    task: str
    name: str
    replaced: dict[str, int] = field(default_factory=dict)  # modules by op
    left: list[str] = field(default_factory=list)
    unbuilt: str = ""
    failed: str = ""


def sweep(step: int = 1, seconds: int = 8) -> list[Result]:
    """Every type in `registries`, or one in `step`: built, run, patched, run, reverted, run; so in bfloat16.

    What takes longer than `seconds` to build and run is not built.
    """
    results: list[Result] = []
    seen: set[type] = set()
    for task, mapping in registries().items():
        for config_class in mapping:
            model_class = _first(mapping[config_class])
            if model_class in seen:
                continue
            seen.add(model_class)
            if len(seen) % step:
                continue
            result = Result(task, config_class.model_type)
            _check(result, model_class, config_class, seconds)
            outcome = f"FAILED: {result.failed}" if result.failed else "not built" if result.unbuilt else "the same"
            print(f"{len(seen)} {task} {result.name}: {outcome}", flush=True)
            results.append(result)
    return results


def _check(result: Result, model_class: type, config_class: type, seconds: int) -> Result:
    try:
        with limit(seconds):
            model = tiny(model_class, config_class)
            inputs = [batch(model), batch(model, padded=True)]
            before = [run(model, b, train) for b in inputs for train in (False, True)]
    except Exception as error:
        result.unbuilt = f"{type(error).__name__}: {error}"
        return result
    turns = [(b, train) for b in inputs for train in (False, True)]
    reports = []

    def double(inputs: dict[str, Tensor], train: bool) -> dict[str, Tensor]:
        """The unpatched model in float64. (A copy of a patched one is patched.)"""
        reports.pop().revert()
        exact = run(copy.deepcopy(model).double(), inputs, train)
        reports.append(patch(model))
        return exact

    try:
        reports.append(patch(model))
        result.replaced = dict(Counter(str(entry.now) for entry in reports[0].replaced))
        result.left = sorted({f"{entry.was}: {entry.reason}" for entry in reports[0].left})
        for (b, train), expected in zip(turns, before, strict=True):
            assert_same(run(model, b, train), expected, lambda b=b, train=train: double(b, train))
        reports.pop().revert()
        for (b, train), expected in zip(turns, before, strict=True):
            again = run(model, b, train)
            assert all(torch.equal(again[key], expected[key]) for key in expected), "not as before after revert()"
        check_short(model, turns, before)
    except Exception as error:
        result.failed = f"{type(error).__name__}: {error}"
    return result


def check_short(model: nn.Module, turns: list[tuple[dict[str, Tensor], bool]], exact: list[dict[str, Tensor]]) -> None:
    """In bfloat16, and under autocast to it, the patched model has the dtypes of the unpatched one, and loss and logits
    with little more than its error against float32; and what float32 refuses is refused.

    Raises:
        AssertionError: if not.
    """
    short = copy.deepcopy(model).to(torch.bfloat16)
    for kind, tried, autocast in (("bfloat16", short, False), ("autocast", copy.deepcopy(model), True)):

        def results(model: nn.Module = tried, autocast: bool = autocast) -> list[dict[str, Tensor]]:
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                return [run(model, b, train) for b, train in turns]

        try:
            stock = results()
        except Exception:  # some models mix dtypes by themselves
            continue
        refused = {entry.path for entry in patch(copy.deepcopy(model)).left}
        left = {entry.path for entry in patch(tried).left}
        assert refused <= left, f"{kind}: {refused - left} refused in float32 alone"
        for ours, theirs, true in zip(results(), stock, exact, strict=True):
            for name in ("loss", "logits"):
                if name not in ours:
                    continue
                assert ours[name].dtype == theirs[name].dtype, f"{kind}: {name} {ours[name].dtype}"
                size = float(true[name].norm())
                errors = [float((x[name].float() - true[name]).norm()) for x in (ours, theirs)]
                bound = 3 * errors[1] + 2e-2 * size
                assert errors[0] <= bound, f"{kind}: {name} misses by {errors[0]:.1e}, unpatched {errors[1]:.1e}"


def _short(text: str, length: int = 110) -> str:
    text = " ".join(text.split()).replace("|", "/")
    return text if len(text) <= length else text[: length - 3] + "..."


def table(results: list[Result]) -> str:
    """docs/models.md."""
    import transformers

    built = [r for r in results if not r.unbuilt]
    lines = [
        "# Models",
        "",
        "What `fastllm.patch` replaces in each language model that transformers registers, found by running it: a",
        "small model of each type with random weights. Loss, logits and every gradient, with and without padding, in",
        "training and in evaluation, are those of the unpatched model, and bit for bit so after `revert()`.",
        "",
        "In bfloat16 and under autocast to it, dtypes are the same, the error is little more than the unpatched",
        "model's, and what is refused in float32 is refused.",
        "",
        f"From `make models` with transformers {transformers.__version__} and torch",
        f"{torch.__version__.split('+')[0]}, on a CPU: {len(built)} types were built, and in"
        f" {sum(bool(r.replaced) for r in built)} of them something was replaced. The",
        f"{len(results) - len(built)} others stand at the end, with what kept them from being made small.",
        "",
        "| type | replaced (modules) | left |",
        "|---|---|---|",
    ]
    for r in sorted(built, key=lambda r: (r.task, r.name)):
        replaced = ", ".join(f"{op} ({n})" for op, n in sorted(r.replaced.items()))
        left = "; ".join(_short(reason) for reason in r.left)
        lines.append(f"| {r.task}: {r.name} | {replaced} | {'FAILED: ' + _short(r.failed) if r.failed else left} |")
    lines += ["", "## Not built", "", "| type | reason |", "|---|---|"]
    for r in sorted((r for r in results if r.unbuilt), key=lambda r: (r.task, r.name)):
        lines.append(f"| {r.task}: {r.name} | {_short(r.unbuilt)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    from transformers.utils import logging

    logging.set_verbosity_error()
    warnings.simplefilter("ignore")
    results = sweep(seconds=30)
    Path(sys.argv[1]).write_text(table(results))
    if failed := [f"{r.task} {r.name}: {r.failed}" for r in results if r.failed]:
        sys.exit("\n".join(failed))
