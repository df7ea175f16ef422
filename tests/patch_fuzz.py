"""Random models and random events: a patched model beside a twin that never is, compared after every event.

    python tests/patch_fuzz.py SEED             one sequence, with a line for each event
    python tests/patch_fuzz.py --count 2000     many; the failing seeds stand at the end

What is drawn depends on the seed and on the unpatched twin alone: a seed means the same sequence whatever fastllm does.
An event that the unpatched twin cannot bear is left out of both.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import functools
import io
import math
import pickle
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from patch_models import VOCABULARY, assert_same, tiny_of
from torch import Tensor, nn

from fastllm.patching import KINDS, PatchError, PatchReport, patch

try:
    import transformers
except ImportError:
    transformers = None
try:
    import accelerate
    import peft
except ImportError:
    accelerate = peft = None

CHANNELS = 16
QUICK = 100
"""Seeds below it stay clear of what takes long."""
ROUNDINGS = 2 * torch.finfo(torch.bfloat16).eps
"""Of its norm, by which what is computed in bfloat16 may miss more than twice what the unpatched twin misses."""
KINKED = 0.2
"""The same where there is a ReLU: one unit that a rounding switches off is a tenth of a gradient of so few."""


class RMS(nn.Module):
    """An RMSNorm of nobody's, whose weight may be what is added to one."""

    def __init__(self, offset: float):
        super().__init__()
        self.weight, self.offset, self.eps = nn.Parameter(torch.full((CHANNELS,), 1 - offset)), offset, 1e-5

    def forward(self, x: Tensor) -> Tensor:
        wide = x.float()
        wide = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return ((self.offset + self.weight.float()) * wide).to(x.dtype)


class StepwiseGELU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x.pow(3))))


NORMS: dict[str, Callable[[], nn.Module]] = {
    "LayerNorm": lambda: nn.LayerNorm(CHANNELS),
    "RMSNorm": lambda: nn.RMSNorm(CHANNELS, eps=1e-6),
    "weight": lambda: RMS(0.0),
    "1 + weight": lambda: RMS(1.0),
}
ACTIVATIONS: dict[str, type[nn.Module]] = {
    "SiLU": nn.SiLU, "GELU": nn.GELU, "stepwise GELU": StepwiseGELU, "ReLU": nn.ReLU, "Tanh": nn.Tanh
}  # fmt: skip


class Attention(nn.Module):
    def __init__(self, causal: bool):
        super().__init__()
        self.qkv, self.out, self.causal = nn.Linear(CHANNELS, 3 * CHANNELS), nn.Linear(CHANNELS, CHANNELS), causal

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, -1)).transpose(1, 2) for part in self.qkv(x).chunk(3, -1))
        if mask is not None and self.causal:
            mask = mask & torch.ones(x.shape[1], x.shape[1], dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(q, k, v, mask, is_causal=self.causal and mask is None)
        return self.out(y.transpose(1, 2).flatten(2))


class Gated(nn.Module):
    def __init__(self, activation: str):
        super().__init__()
        self.gate, self.up, self.down = (nn.Linear(a, b) for a, b in ((16, 24), (16, 24), (24, 16)))
        self.act = ACTIVATIONS[activation]()

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.act(self.gate(x)) * self.up(x))


class PreNorm(nn.Module):
    """A block of a decoder."""

    def __init__(self, norm: str, activation: str):
        super().__init__()
        self.norm1, self.attention, self.norm2, self.mlp = (
            NORMS[norm](),
            Attention(True),
            NORMS[norm](),
            Gated(activation),
        )

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(self.norm1(x), mask)
        return x + self.mlp(self.norm2(x))


class Output(nn.Module):
    """The end of a block of BERT."""

    def __init__(self, size: int, norm: str):
        super().__init__()
        self.dense, self.dropout, self.norm = nn.Linear(size, CHANNELS), nn.Dropout(0.0), NORMS[norm]()

    def forward(self, x: Tensor, residual: Tensor) -> Tensor:
        return self.norm(self.dropout(self.dense(x)) + residual)


class PostNorm(nn.Module):
    """A block of BERT."""

    def __init__(self, norm: str, activation: str):
        super().__init__()
        self.attention, self.attended = Attention(False), Output(CHANNELS, norm)
        self.wide, self.act, self.output = nn.Linear(CHANNELS, 24), ACTIVATIONS[activation](), Output(24, norm)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        x = self.attended(self.attention(x, mask), x)
        return self.output(self.act(self.wide(x)), x)


class Torchs(nn.Module):
    """torch's encoder layer."""

    def __init__(self, norm_first: bool, activation: str):
        super().__init__()
        made = ACTIVATIONS[activation]() if activation != "GELU" else "gelu"
        self.layer = nn.TransformerEncoderLayer(CHANNELS, 2, 24, 0.0, made, batch_first=True, norm_first=norm_first)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        return self.layer(x, src_key_padding_mask=None if mask is None else ~mask[:, 0, 0])


class Multihead(nn.Module):
    def __init__(self, norm: str, weights: bool):
        super().__init__()
        self.norm, self.weights = NORMS[norm](), weights
        self.attention = nn.MultiheadAttention(CHANNELS, 2, batch_first=True)

    def forward(self, x: Tensor, mask: Tensor | None) -> Tensor:
        y = self.norm(x)
        padding = None if mask is None else ~mask[:, 0, 0]
        return x + self.attention(y, y, y, key_padding_mask=padding, need_weights=self.weights)[0]


class Language(nn.Module):
    """Embeddings, blocks, a norm and a head; a loss where there are labels."""

    def __init__(self, blocks: list[nn.Module], norm: str):
        super().__init__()
        self.embed, self.blocks = nn.Embedding(VOCABULARY, CHANNELS), nn.ModuleList(blocks)
        self.norm, self.head = NORMS[norm](), nn.Linear(CHANNELS, VOCABULARY, bias=False)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None,
        label_smoothing: float = 0.0,
    ) -> dict[str, Tensor]:  # fmt: skip
        x, mask = self.embed(input_ids), None
        if attention_mask is not None:
            mask = attention_mask.bool()[:, None, None]
        for block in self.blocks:
            x = block(x, mask)
        logits = self.head(self.norm(x))
        if labels is None:
            return {"logits": logits}
        loss = F.cross_entropy(logits.flatten(0, 1).float(), labels.flatten(), label_smoothing=label_smoothing)
        return {"loss": loss, "logits": logits}


BLOCKS: dict[str, Callable[[random.Random], nn.Module]] = {
    "pre-norm": lambda rng: PreNorm(rng.choice(list(NORMS)), rng.choice(list(ACTIVATIONS))),
    "post-norm": lambda rng: PostNorm(rng.choice(list(NORMS)), rng.choice(list(ACTIVATIONS))),
    "TransformerEncoderLayer": lambda rng: Torchs(rng.random() < 0.5, rng.choice(list(ACTIVATIONS))),
    "MultiheadAttention": lambda rng: Multihead(rng.choice(list(NORMS)), rng.random() < 0.3),
}
TYPES = (
    "llama", "gpt2", "bert", "t5", "bart", "qwen3", "gemma2", "gpt_neox", "mistral", "phi3", "olmo2", "roberta"
)  # fmt: skip
"""Of transformers."""


@dataclass(frozen=True)
class Recipe:
    """What a pair of twins is made by."""

    kind: str
    seed: int
    dtype: torch.dtype
    layers: int
    eager: bool  # its attention, where it is a model of transformers

    def make(self) -> nn.Module:
        if self.kind in BLOCKS:
            torch.default_generator.manual_seed(self.seed)
            rng = random.Random(self.seed)
            blocks = [BLOCKS[self.kind](rng) for _ in range(self.layers)]
            model: nn.Module = Language(blocks, rng.choice(list(NORMS)))
            with torch.no_grad():  # norms whose weights are all one would hide a swap
                for p in model.parameters():
                    p.add_(torch.randn_like(p) * 0.1)
        else:
            model = copy.deepcopy(_template(self.kind, self.layers))
            if self.eager:
                model.set_attn_implementation("eager")
        return model.to(self.dtype)

    def __str__(self) -> str:
        layers = f"{self.layers} layer{'s' * (self.layers > 1)}"
        words = (self.kind, layers, str(self.dtype).removeprefix("torch."), "eager attention" if self.eager else "")
        return ", ".join(word for word in words if word)


def draw_recipe(rng: random.Random) -> Recipe:
    own = transformers is None or rng.random() < 0.6
    kind = rng.choice(list(BLOCKS) if own else TYPES)
    dtype = torch.bfloat16 if rng.random() < 0.12 else torch.float32
    layers = 1 if rng.random() < 0.7 else 2
    return Recipe(kind, rng.randrange(1000), dtype, layers, not own and rng.random() < 0.25)


@functools.cache
def _template(kind: str, layers: int) -> nn.Module:
    model = tiny_of(kind)
    for path, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(part.isdigit() for part in path.split(".")):
            del module[layers:]
    return model


@dataclass
class Batch:
    """What both twins are given."""

    rows: int = 2
    length: int = 9
    padded: bool = False
    more: dict[str, Any] = field(default_factory=dict)  # what the loss is told

    def inputs(self, core: Any) -> dict[str, Any]:
        generator = torch.Generator().manual_seed(2)
        ids = torch.randint(10, VOCABULARY, (self.rows, self.length), generator=generator)
        labels = ids.roll(-1, 1)
        labels[:, -1] = -100
        inputs = {"input_ids": ids, "labels": labels, **self.more}
        if self.padded:
            mask = torch.ones_like(ids)
            mask[0, self.length // 2 :] = 0
            labels[mask == 0] = -100
            inputs["attention_mask"] = mask
        if getattr(getattr(core, "config", None), "is_encoder_decoder", False):
            inputs["decoder_input_ids"] = torch.randint(10, VOCABULARY, tuple(ids.shape), generator=generator)
        return inputs


@dataclass
class Side:
    """One of the twins."""

    root: Any  # what is called
    core: Any  # the model inside all that it was wrapped into
    patching: bool  # the other one keeps the books alone
    reports: list[PatchReport | None] = field(default_factory=list)  # of the patches that were not taken back
    foreign: int = 0  # of those, how many are older than the last time that somebody else replaced forwards
    stuck: bool = False  # what was patched is beyond every report
    marks: set[str] = field(default_factory=set)  # what happened to it that other events must know
    batch: Batch = field(default_factory=Batch)
    seen: list[Any] = field(default_factory=list)  # by the global hook

    @property
    def pristine(self) -> bool:
        """Whether it must be the unpatched twin to the last bit."""
        return not self.reports and not self.stuck

    def keep(self, logits: Tensor) -> Tensor:
        """Those of the tokens that are no padding: what hidden tokens attend to is nobody's business."""
        mask = self.batch.inputs(self.core).get("attention_mask")
        return logits.detach() if mask is None or mask.shape != logits.shape[:2] else logits[mask.bool()].detach()

    @property
    def low_precision(self) -> bool:
        short = any(p.dtype == torch.bfloat16 for p in self.root.parameters())
        return short or bool(self.marks & {"autocast", "prepared"})

    @contextlib.contextmanager
    def around(self) -> Iterator[None]:
        """Every forward."""
        handle = None
        if "watched" in self.marks:
            handle = nn.modules.module.register_module_forward_hook(self._watch)
        try:
            with torch.autocast("cpu", torch.bfloat16, enabled="autocast" in self.marks):
                yield
        finally:
            if handle is not None:
                handle.remove()

    def _watch(self, module: nn.Module, args: Any, output: Any) -> None:
        self.seen.append((type(module).__name__, _shape(output)))

    def call(self, **changes: Any) -> Any:
        torch.default_generator.manual_seed(3)  # torch.manual_seed looks for GPUs, which takes longer than the model
        with self.around():
            return self.root(**{k: v for k, v in (self.batch.inputs(self.core) | changes).items() if v is not None})


def _shape(output: Any) -> Any:
    """Of the first tensor of what a module gives, which is neither logits nor weights of attention."""
    if isinstance(output, dict):
        output = tuple(value for key, value in output.items() if key not in ("logits", "loss"))
    if isinstance(output, tuple):
        output = next((x for x in output if isinstance(x, Tensor)), None)
    return (tuple(output.shape), output.dtype) if isinstance(output, Tensor) else None


class Recorder:
    """A hook of a module, or one before it."""

    def __init__(self) -> None:
        self.seen: list[Any] = []

    def __call__(self, module: nn.Module, args: Any, output: Any = ()) -> None:
        self.seen.append(_shape(output) if output != () else _shape(args))


def recorders(root: nn.Module) -> dict[str, tuple[dict, Any]]:
    """Where they are: the hooks of a module, and the key of one of them."""
    found: dict[str, tuple[dict, Any]] = {}
    for path, module in root.named_modules():
        for when, hooks in (("before", module._forward_pre_hooks), ("behind", module._forward_hooks)):
            keys = [key for key, hook in hooks.items() if isinstance(hook, Recorder)]
            found |= {f"hook {i} {when} {path}": (hooks, key) for i, key in enumerate(keys)}
    return found


Result = dict[str, Any]
"""Tensors, which are the twin's to within rounding; all else is equal."""


def observe(side: Side) -> dict[str, Result]:
    """Evaluation and training, with all gradients."""
    found = {}
    for train in (False, True):
        side.root.train(train)
        side.seen.clear()
        for hooks, key in recorders(side.root).values():
            hooks[key].seen.clear()
        output = side.call()
        result: Result = {"loss": output["loss"].detach(), "keys": sorted(k for k in output if k != "logits")}
        logits = output.get("logits")
        if isinstance(logits, Tensor):
            result["logits"] = side.keep(logits)
        result |= {name: list(hooks[key].seen) for name, (hooks, key) in recorders(side.root).items()}
        result["global hook"] = list(side.seen)
        weights = {name: p for name, p in side.root.named_parameters() if p.requires_grad}
        if output["loss"].requires_grad and weights:
            grads = torch.autograd.grad(output["loss"], list(weights.values()), allow_unused=True)
            result |= {f"gradient of {n}": g for n, g in zip(weights, grads, strict=True) if g is not None}
        found["training" if train else "evaluation"] = result
    return found


class Difference(AssertionError):
    """The patched twin is not the other one."""


def compare(what: str, got: Result, wanted: Result, side: Side, truth: Callable[[], Result]) -> None:
    """Raises Difference."""
    lacking = wanted.keys() - got.keys()
    if what == "training" and not side.pristine:
        lacking -= {"logits"}
    if lacking or got.keys() - wanted.keys():
        raise Difference(f"{what}: missing {sorted(lacking)}, new {sorted(got.keys() - wanted.keys())}")
    tensors = {name: x for name, x in wanted.items() if isinstance(x, Tensor)}
    for name, x in wanted.items():
        y = got.get(name, x)
        if not isinstance(x, Tensor):
            if y != x:
                raise Difference(f"{what}: {name} is {_first_difference(y, x)}")
        elif (y.dtype, y.shape) != (x.dtype, x.shape):
            raise Difference(f"{what}: {name} is {y.dtype} {tuple(y.shape)}, not {x.dtype} {tuple(x.shape)}")
        elif side.pristine and not torch.equal(y, x):
            raise Difference(f"{what}: {name} differs by {float((y - x).abs().max()):.1e}, and nothing is patched")
    if side.pristine:
        return
    if side.low_precision:
        kinked = any(isinstance(m, nn.ReLU) for m in side.root.modules())
        _compare_errors(what, got, tensors, truth, KINKED if kinked else ROUNDINGS)
        return
    try:
        assert_same({n: got[n] for n in tensors if n in got}, tensors, truth)
    except AssertionError as error:
        raise Difference(f"{what}: {error}") from None


def _compare_errors(what: str, got: Result, wanted: Result, truth: Callable[[], Result], roundings: float) -> None:
    """Of bfloat16: the patched twin's distance from float64 is that of the other one, or a few roundings."""
    exact = truth()
    if any(not x.isfinite().all() for x in exact.values() if isinstance(x, Tensor)):
        exact, roundings = wanted, 6 * roundings  # rows that see nothing are NaN in float64
    sizes = [float(x.double().norm()) for name, x in wanted.items() if name not in ("loss", "logits")]
    for name, x in wanted.items():
        if name not in got or not x.numel():
            continue
        true = exact[name].double()
        errors = [float((y.double() - true).norm()) for y in (got[name], x)]
        size = float(true.norm()) if name in ("loss", "logits") else max(float(true.norm()), 0.1 * max(sizes))
        if not errors[0] <= 2 * errors[1] + roundings * size:
            raise Difference(f"{what}: {name}: errors {errors[0]:.1e}, unpatched {errors[1]:.1e}, of {size:.1e}")


def _first_difference(got: Any, wanted: Any) -> str:
    if isinstance(got, list) and isinstance(wanted, list):
        for i, (a, b) in enumerate(zip(got, wanted, strict=False)):
            if a != b:
                return f"at {i} {a}, not {b}"
        return f"of {len(got)} entries, not {len(wanted)}: {(got + wanted)[min(len(got), len(wanted)) :][:2]}"
    return f"{got}, not {wanted}"


Action = Callable[[Side], Result | None]
"""What happens to one of the twins, and what that gives."""


@dataclass(frozen=True)
class Event:
    draw: Callable[[Side, random.Random], tuple[str, Action] | None]
    weight: float
    unless: set[str]


EVENTS: dict[str, Event] = {}


def event(weight: float = 1.0, unless: str = "") -> Callable:
    """Registers a function that looks at the unpatched twin, draws what is left open, and returns that in words and
    what to do to each twin; or None where it is not possible. It is not asked while a mark of `unless` is set."""

    def register(draw: Callable) -> Callable:
        EVENTS[draw.__name__] = Event(draw, weight, {*unless.split()})
        return draw

    return register


def modules(side: Side, wanted: Callable[[str, nn.Module], bool]) -> list[str]:
    """Paths in what is called."""
    return [path for path, module in side.root.named_modules() if path and wanted(path, module)]


def is_norm(path: str, module: nn.Module) -> bool:
    own = list(module.parameters())
    return bool(own) and not list(module.children()) and all(p.dim() == 1 for p in own)


def is_linear(path: str, module: nn.Module) -> bool:
    weight = getattr(module, "weight", None)
    childless = not list(module.children()) and not isinstance(module, nn.Embedding)
    return childless and isinstance(weight, Tensor) and weight.dim() == 2


def is_activation(path: str, module: nn.Module) -> bool:
    return not module.state_dict() and not list(module.children()) and type(module).__name__.endswith(
        ("GELU", "GELUActivation", "SiLU", "SiLUActivation", "ReLU", "Tanh")
    )  # fmt: skip


def is_block(path: str, module: nn.Module) -> bool:
    return path.rpartition(".")[2].isdigit() and bool(list(module.children()))


def exchange(root: nn.Module, path: str, made: nn.Module) -> None:
    parent, _, name = path.rpartition(".")
    setattr(root.get_submodule(parent), name, made)


@functools.cache
def scaled(base: type[nn.Module], factor: float) -> type[nn.Module]:
    """A subclass whose output is a multiple, which pickle finds."""

    def forward(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
        return base.forward(self, *args, **kwargs) * factor

    name = f"Scaled{base.__name__}{str(factor).replace('.', '_')}_{len(globals())}"
    globals()[name] = type(name, (base,), {"forward": forward, "__module__": __name__})
    return globals()[name]


def remade(old: nn.Module, new_class: type[nn.Module]) -> nn.Module:
    """A new module of that class with the parameters and settings of the old one."""
    made = new_class.__new__(new_class)
    nn.Module.__init__(made)
    fresh = dict(vars(made))
    state = {k: v for k, v in vars(old).items() if k not in fresh and k not in ("forward", "_hf_hook", "_old_forward")}
    made.__dict__ |= state | {"_parameters": dict(old._parameters), "_buffers": dict(old._buffers)}
    made._modules.update(old._modules)
    return made.train(old.training)


class Calls(nn.Module):
    """Holds a module, and calls it."""

    def __init__(self, inner: nn.Module):
        super().__init__()
        self.inner = inner

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner(*args, **kwargs)


class Halved(Calls):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) / 2


class Replica(nn.Module):
    """As DistributedDataParallel holds its model."""

    def __init__(self, module: nn.Module):
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return self.module(*args, **kwargs)

    @contextlib.contextmanager
    def no_sync(self) -> Iterator[None]:
        yield


@event(weight=2)
def patched(side: Side, rng: random.Random) -> tuple[str, Action]:
    """Once more, perhaps; of some ops or modules, perhaps; what it is wrapped into or what is inside."""
    choice: dict[str, list[str]] = {}
    outer = rng.random() < 0.3
    if rng.random() < 0.4:
        paths = [path for path, _ in (side.root if outer else side.core).named_modules() if path]
        names = [rng.choice(KINDS), rng.choice(KINDS), rng.choice(paths) + "*"]
        choice = {rng.choice(["only", "exclude"]): rng.sample(names, rng.randint(1, 3))}
    verify = rng.random() < 0.8

    def act(side: Side) -> None:
        target = side.root if outer else side.core
        side.reports.append(_patch(target, verify=verify, **choice) if side.patching else None)

    words = [f"{name}={value}" for name, value in choice.items()] + ([] if verify else ["verify=False"])
    return ", ".join(["what it is wrapped into" if outer else "the model", *words]), act


def _patch(model: nn.Module, **choice: Any) -> PatchReport:
    """patch, which leaves all else as it was.

    Raises:
        Difference: if not.
    """

    def state() -> dict[str, Any]:
        return {
            "state_dict": {name: p.is_meta or id(p) for name, p in model.state_dict(keep_vars=True).items()},
            "requires_grad": [p.requires_grad for p in model.parameters()],
            "gradients": [p.grad is None for p in model.parameters()],
            "modes": [m.training for m in model.modules()],
            "random state": torch.get_rng_state().tolist(),
            "classes": [type(m) for m in model.modules()],
            "hooks": [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules()],
            "grad mode": torch.is_grad_enabled(),
            "autocast": torch.is_autocast_enabled("cpu"),
            "function modes": torch._C._len_torch_function_stack(),
            "default dtype": torch.get_default_dtype(),
            "warning filters": len(warnings.filters),
        }

    before = state()
    report = patch(model, **choice)
    changed = [name for name, value in state().items() if value != before[name]]
    if changed:
        raise Difference(f"patch changed {', '.join(changed)}")
    return report


@event(weight=2.5)
def reverted(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    if not side.reports:
        return None
    which = rng.randrange(len(side.reports))
    return f"patch {which + 1} of {len(side.reports)}", lambda side: _revert(side, which)


def _revert(side: Side, which: int) -> None:
    report, foreign = side.reports.pop(which), which < side.foreign
    side.foreign -= foreign
    if report is None:  # the unpatched twin's
        return
    try:
        report.revert()
    except PatchError:
        if not foreign:
            raise
        side.stuck = True


def revert_all(side: Side) -> None:
    while side.reports:
        _revert(side, len(side.reports) - 1)


@event()
def wrapped(side: Side, rng: random.Random) -> tuple[str, Action]:
    wrapper = rng.choice([Calls, Replica])

    def act(side: Side) -> None:
        side.root = wrapper(side.root)

    return wrapper.__name__, act


def heavy(side: Side, rng: random.Random) -> bool:
    """Whether to compile it takes too long: a small model takes seconds, one of transformers many."""
    own = isinstance(side.core, Language)
    if "slow" in side.marks:
        return not own and rng.random() > 0.05
    return not own or len(side.core.blocks) > 1 or rng.random() < 0.7


@event(weight=0.3, unless="compiled offloaded prepared")
def compiled(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    if heavy(side, rng):
        return None

    def act(side: Side) -> None:
        side.root = torch.compile(side.root, backend="eager")
        side.marks.add("compiled")

    return "all of it", act


@event(weight=0.25, unless="compiled offloaded prepared")
def layer_compiled(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    paths = modules(side, is_block)
    if heavy(side, rng) or not paths:
        return None
    path = rng.choice(paths)

    def act(side: Side) -> None:
        side.root.get_submodule(path).compile(backend="eager")
        side.marks.add("compiled")

    return path, act


def _suffixes(paths: list[str], rng: random.Random) -> list[str]:
    names = sorted({path.rpartition(".")[2] for path in paths})
    return rng.sample(names, min(len(names), rng.randint(1, 3)))


@event(weight=0.8, unless="adapted offloaded compiled")
def adapted(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    """LoRA."""
    if peft is None:
        return None
    whole = side.root is side.core and rng.random() < 0.6
    names = _suffixes([path for path, m in side.core.named_modules() if is_linear(path, m)], rng)

    def act(side: Side) -> None:
        config = peft.LoraConfig(r=4, target_modules=names, lora_dropout=0.0, init_lora_weights=False)
        if whole:
            side.root = peft.get_peft_model(side.root, config)
        else:
            peft.inject_adapter_in_model(config, side.core)
        side.marks.add("adapted")

    return f"LoRA of {names} by {'get_peft_model' if whole else 'inject_adapter_in_model'}", act


@event(weight=0.5, unless="adapted offloaded compiled")
def norms_tuned(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    if peft is None or side.root is not side.core:
        return None
    names = _suffixes([path for path, m in side.core.named_modules() if is_norm(path, m)], rng)

    def act(side: Side) -> None:
        side.root = peft.get_peft_model(side.root, peft.LNTuningConfig(target_modules=names))
        side.stuck |= bool(side.reports)  # peft copies norms, and copies of patched modules are patched
        side.marks.add("adapted")

    return f"LNTuning of {names}", act


@event(weight=0.6, unless="offloaded compiled prepared")
def offloaded(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    if accelerate is None:
        return None

    def act(side: Side) -> None:
        accelerate.cpu_offload(side.core, execution_device=torch.device("cpu"))
        side.marks.add("offloaded")
        side.foreign = len(side.reports)

    return "accelerate's cpu_offload", act


@event(weight=6.0)
def loaded(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    if "offloaded" not in side.marks:
        return None

    def act(side: Side) -> None:
        accelerate.hooks.remove_hook_from_submodules(side.core)
        side.marks.discard("offloaded")
        side.foreign = len(side.reports)

    return "accelerate's hooks removed", act


@event(weight=0.7, unless="offloaded compiled prepared")
def prepared(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    if accelerate is None:
        return None
    precision = rng.choice(["no", "bf16", "bf16"])

    def act(side: Side) -> None:
        accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)
        side.root = accelerate.Accelerator(cpu=True, mixed_precision=precision).prepare(side.root)
        if precision == "bf16":
            side.marks.add("prepared")
            side.foreign = len(side.reports)

    return f"Accelerator(mixed_precision={precision!r}).prepare", act


@event(weight=6.0)
def unprepared(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    if "prepared" not in side.marks:
        return None

    def act(side: Side) -> None:
        side.root = accelerate.utils.extract_model_from_parallel(side.root, keep_fp32_wrapper=False)
        side.marks.discard("prepared")
        side.foreign = len(side.reports)

    return "unwrap_model(keep_fp32_wrapper=False)", act


@event(weight=1.5, unless="offloaded")
def norm_exchanged(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    paths = modules(side, is_norm)
    if not paths:
        return None
    path, how = rng.choice(paths), rng.choice(["subclass", "scaled subclass", "LayerNorm", "RMSNorm", "Identity"])

    def act(side: Side) -> None:
        old = side.root.get_submodule(path)
        parameter = next(old.parameters())
        if how.endswith("subclass"):
            made = remade(old, scaled(type(old), 1.0 if how == "subclass" else 1.25))
        elif how == "Identity":
            made = nn.Identity()
        else:
            made = getattr(nn, how)(parameter.shape[0], eps=0.05).to(parameter.dtype)
            nn.init.uniform_(made.weight, 0.5, 1.5)
        exchange(side.root, path, made)

    return f"{path} by {how}", act


@event(weight=0.5, unless="offloaded")
def dropout_exchanged(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    paths = modules(side, lambda path, module: type(module) is nn.Dropout)
    if not paths:
        return None
    path = rng.choice(paths)
    return f"{path} by Identity", lambda side: exchange(side.root, path, nn.Identity())


@event(unless="offloaded")
def linear_exchanged(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    paths = modules(side, is_linear)
    if not paths:
        return None
    path, how = rng.choice(paths), rng.choice(["scaled subclass", "Calls", "Halved"])

    def act(side: Side) -> None:
        old = side.root.get_submodule(path)
        wrapper = {"Calls": Calls, "Halved": Halved}.get(how)
        exchange(side.root, path, wrapper(old) if wrapper else remade(old, scaled(type(old), 0.5)))

    return f"{path} by {how}", act


@event(weight=0.7, unless="offloaded")
def activation_exchanged(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    paths = modules(side, is_activation)
    if not paths:
        return None
    path, name = rng.choice(paths), rng.choice(list(ACTIVATIONS))
    return f"{path} by {name}", lambda side: exchange(side.root, path, ACTIVATIONS[name]())


@event(weight=0.7, unless="offloaded")
def cast(side: Side, rng: random.Random) -> tuple[str, Action]:
    name = rng.choice(["double", "bfloat16", "float"])

    def act(side: Side) -> None:
        getattr(side.root, name)()

    return name, act


@event(weight=0.3, unless="offloaded")
def moved(side: Side, rng: random.Random) -> tuple[str, Action]:
    def act(side: Side) -> None:
        side.root.to("cpu")

    return "to the CPU", act


def switched(mark: str, *words: str) -> tuple[str, Action]:
    def act(side: Side) -> None:
        side.marks ^= {mark}

    return " or ".join(words), act


@event()
def autocast(side: Side, rng: random.Random) -> tuple[str, Action]:
    return switched("autocast", "off" if "autocast" in side.marks else "on")


@event(weight=0.3, unless="compiled")
def watched(side: Side, rng: random.Random) -> tuple[str, Action]:
    return switched("watched", f"the global forward hook {'removed' if 'watched' in side.marks else 'registered'}")


@event(unless="compiled")
def hooked(side: Side, rng: random.Random) -> tuple[str, Action]:
    path = rng.choice(modules(side, lambda path, module: not isinstance(module, (nn.ModuleList, nn.ModuleDict))))
    before = rng.random() < 0.4

    def act(side: Side) -> None:
        module = side.root.get_submodule(path)
        (module.register_forward_pre_hook if before else module.register_forward_hook)(Recorder())

    return f"{'before ' if before else ''}{path}", act


@event(weight=1.0, unless="compiled")
def unhooked(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    if not recorders(side.root):
        return None

    def act(side: Side) -> None:
        for hooks, key in recorders(side.root).values():
            del hooks[key]

    return "all hooks removed", act


def ends(core: Any) -> tuple[nn.Module, nn.Module]:
    """Embeddings and head."""
    if isinstance(core, Language):
        return core.embed, core.head
    return core.get_input_embeddings(), core.get_output_embeddings()


@event(weight=0.5, unless="offloaded adapted compiled")
def resized(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    if isinstance(side.core, Language):
        return None
    size = VOCABULARY + rng.choice([0, 5, 8])

    def act(side: Side) -> None:
        side.core.resize_token_embeddings(size, mean_resizing=False)

    return f"embeddings to {size}", act


@event(weight=0.5, unless="offloaded adapted")
def tied(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    embedding, head = ends(side.core)
    weights = getattr(embedding, "weight", None), getattr(head, "weight", None)
    if None in weights or weights[0].shape != weights[1].shape:
        return None
    untie = weights[0] is weights[1]

    def act(side: Side) -> None:
        embedding, head = ends(side.core)
        head.weight = nn.Parameter(head.weight.detach().clone()) if untie else embedding.weight

    return "untied" if untie else "tied", act


@event(weight=0.7, unless="offloaded")
def frozen(side: Side, rng: random.Random) -> tuple[str, Action]:
    names = [name for name, _ in side.root.named_parameters()]
    names = sorted(rng.sample(names, rng.randint(0, len(names) - 1)))

    def act(side: Side) -> None:
        for name, p in side.root.named_parameters():
            p.requires_grad_(name not in names)

    return f"{len(names)} parameters, others not: {', '.join(names[:3])} ...", act


@event(weight=1.0, unless="offloaded compiled")
def checkpointed(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    if not getattr(side.core, "supports_gradient_checkpointing", False):
        return None

    def act(side: Side) -> None:
        side.core.gradient_checkpointing_enable({"use_reentrant": False})

    return "gradient checkpointing", act


def _copied(side: Side, pair: tuple[Any, Any]) -> None:
    """Goes on with a copy, of which no report knows."""
    side.root, side.core = pair
    side.stuck |= bool(side.reports)
    side.reports.clear()
    side.foreign = 0


@event(unless="compiled")
def deepcopied(side: Side, rng: random.Random) -> tuple[str, Action]:
    return "and on with the copy", lambda side: _copied(side, copy.deepcopy((side.root, side.core)))


@event(weight=0.7, unless="compiled offloaded")
def pickled(side: Side, rng: random.Random) -> tuple[str, Action]:
    def act(side: Side) -> None:
        _copied(side, pickle.loads(pickle.dumps((side.root, side.core))))

    return "and on with what was read", act


@event(weight=0.7, unless="offloaded")
def saved(side: Side, rng: random.Random) -> tuple[str, Action]:
    def act(side: Side) -> Result:
        file = io.BytesIO()
        torch.save(side.root.state_dict(), file)
        file.seek(0)
        state = torch.load(file)
        side.root.load_state_dict(state)
        return {"names": list(state)}

    return "state_dict, and loaded", act


@event(weight=2, unless="offloaded")
def stepped(side: Side, rng: random.Random) -> tuple[str, Action]:
    """A training step. The patched twin then gets the other's parameters, so that roundings do not add up."""

    def act(side: Side) -> Result:
        side.root.train()
        weights = {name: p for name, p in side.root.named_parameters() if p.requires_grad}
        optimizer = torch.optim.SGD(weights.values(), lr=0.1)
        side.call()["loss"].backward()
        grads = {f"p.grad of {name}": p.grad for name, p in weights.items() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        trained = {f"parameter {name}": p.detach().clone() for name, p in weights.items()}
        return grads | trained | {"parameters": list(weights)}

    return "SGD", act


@event(weight=1.5)
def fed(side: Side, rng: random.Random) -> tuple[str, Action]:
    """Other batches from now on."""
    batch = Batch(rng.choice([1, 2, 3]), rng.choice([2, 5, 9, 14]), rng.random() < 0.4)
    if rng.random() < 0.3:
        batch.more["label_smoothing"] = 0.2
    if not isinstance(side.core, Language) and rng.random() < 0.3:
        batch.more["num_items_in_batch"] = torch.tensor(7)

    def act(side: Side) -> None:
        side.batch = replace(batch)

    return str(batch), act


@event()
def evaluated(side: Side, rng: random.Random) -> tuple[str, Action]:
    """Without gradients and labels."""
    mode = rng.choice([torch.inference_mode, torch.no_grad])

    def act(side: Side) -> Result:
        side.root.eval()
        with mode():
            output = side.call(labels=None, num_items_in_batch=None, label_smoothing=None)
            return {"logits": side.keep(output["logits"]).clone()}

    return mode.__name__, act


@event(weight=2, unless="compiled")
def generated(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    if not hasattr(side.core, "generate") or not side.core.can_generate() or side.low_precision:
        return None

    def act(side: Side) -> Result:
        side.core.eval()
        inputs = side.batch.inputs(side.core)
        # Padded on the left: what follows would else be read off a hidden token.
        given = {k: v.flip(1) for k, v in inputs.items() if k in ("input_ids", "attention_mask")}
        return {"tokens": side.core.generate(**given, max_new_tokens=5, do_sample=False, pad_token_id=0).tolist()}

    return "5 tokens", act


@event(weight=3.0, unless="compiled")
def weights_asked_for(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    if "eager" not in side.marks:
        return None

    def act(side: Side) -> Result:
        side.root.eval()
        output = side.call(output_attentions=True)
        names = [name for name in output if name.endswith("attentions")]
        return {f"{name} {i}": x.detach() for name in names for i, x in enumerate(output[name])}

    return "output_attentions", act


@dataclass
class Sequence:
    """What became of a seed."""

    seed: int
    recipe: Recipe
    events: list[tuple[str, str]] = field(default_factory=list)  # that both twins went through: name, what exactly
    skipped: Counter[str] = field(default_factory=Counter)  # that the unpatched twin could not
    failed: str = ""

    def __str__(self) -> str:
        lines = [f"seed {self.seed}: {self.recipe}", *(f"  {name}: {what}" for name, what in self.events)]
        return "\n".join([*lines, f"  FAILED: {self.failed}"] if self.failed else lines)


class Impossible(Exception):
    """The unpatched twin gives numbers that are none."""


class Twins:
    """An unpatched model and what must be the same."""

    def __init__(self, recipe: Recipe, slow: bool):
        self.recipe, self.slow = recipe, slow
        self.done: list[tuple[Action, int]] = []  # with the seed of each
        self.plain, self.patched = self._make(False), self._make(True)
        self.first = observe(self._make(False))

    def _make(self, patching: bool) -> Side:
        model = self.recipe.make()
        marks = {name for name, is_set in (("eager", self.recipe.eager), ("slow", self.slow)) if is_set}
        return Side(model, model, patching, marks=marks)

    def expected(self, action: Action, seed: int) -> dict[str, Result]:
        """What the event and what follows gives of the unpatched twin.

        Raises:
            Exception: what that twin raises, which is then as it was before.
        """
        try:
            result = _act(self.plain, action, seed)
            found = ({} if result is None else {"event": result}) | observe(self.plain)
            for result in found.values():
                for x in result.values():
                    if isinstance(x, Tensor) and not x.isfinite().all():
                        raise Impossible
        except Exception:
            self.plain = self._again(self.done)
            raise
        self.done.append((action, seed))
        return found

    def check(self, wanted: dict[str, Result]) -> None:
        """The same event for the patched twin.

        Raises:
            Exception: whatever the unpatched one does not raise; Difference where it is not the same.
        """
        side, exact = self.patched, functools.cache(self._exact)
        result = _act(side, *self.done[-1])
        if result is not None:
            compare("event", result, wanted["event"], side, lambda: exact(True)["event"])
        self._compare_parameters(trained="parameters" in wanted.get("event", {}))
        for what, found in observe(side).items():
            compare(what, found, wanted[what], side, lambda what=what: exact(False)[what])
        self._compare_parameters(trained=False)
        if self.patched.pristine:
            self._compare_attributes()

    def _compare_parameters(self, trained: bool) -> None:
        """They are the same bits; those that were trained become so, lest roundings add up."""
        pairs = zip(self.patched.root.named_parameters(), self.plain.root.named_parameters(), strict=True)
        for (name, a), (other, b) in pairs:
            if name != other or a.is_meta != b.is_meta or a.requires_grad != b.requires_grad:
                raise Difference(f"parameter {name} is not {other} of the unpatched twin")
            if a.is_meta:
                continue
            if trained:
                a.detach().copy_(b)
            elif not torch.equal(a, b):
                raise Difference(f"parameter {name} has another value")

    def _exact(self, event: bool) -> dict[str, Result]:
        """The unpatched twin in float64: what the last event itself gave, or what followed."""
        if event:
            side = self._again(self.done[:-1])
        else:
            root, core = copy.deepcopy((self.plain.root, self.plain.core))
            side = replace(self.plain, root=root, core=core, seen=[], marks={*self.plain.marks})
        side.root.double()
        side.marks.discard("autocast")
        with torch.compiler.set_stance("force_eager"):
            return {"event": _act(side, *self.done[-1]) or {}} if event else observe(side)

    def _again(self, done: list[tuple[Action, int]]) -> Side:
        """The unpatched twin after these events."""
        side = self._make(False)
        for action, seed in done:
            _act(side, action, seed)
        return side

    def check_others(self) -> None:
        """Another model gives to the last bit what it gave before anything was patched."""
        other = self._make(False)
        for what, result in observe(other).items():
            compare(f"another model, {what}", result, self.first[what], other, dict)

    def _compare_attributes(self) -> None:
        pairs = zip(self.patched.root.named_modules(), self.plain.root.named_modules(), strict=True)
        for (path, a), (_, b) in pairs:
            # accelerate leaves a forward where there was none before.
            if odd := (vars(a).keys() ^ vars(b).keys()) - {"forward"}:
                raise Difference(f"attributes of {path or 'the model'}: {sorted(odd)}")
            forward = vars(a).get("forward")
            while forward is not None:
                if (getattr(getattr(forward, "func", forward), "__module__", None) or "").startswith("fastllm"):
                    raise Difference(f"the forward of {path or 'the model'} is still fastllm's")
                forward = getattr(forward, "__wrapped__", None)
            if type(a) is not type(b):
                raise Difference(f"{path or 'the model'} is a {type(a).__name__}, not a {type(b).__name__}")
        configs = [getattr(side.core, "config", None) for side in (self.patched, self.plain)]
        names = [getattr(config, "_attn_implementation", None) for config in configs]
        if names[0] != names[1]:
            raise Difference(f"the attention is {names[0]}, not {names[1]}")


def _act(side: Side, action: Action, seed: int) -> Result | None:
    torch.default_generator.manual_seed(seed)
    return action(side)


def _draw(side: Side, rng: random.Random, weights: dict[str, float]) -> tuple[str, str, Action]:
    while True:
        (name,) = rng.choices(list(weights), list(weights.values()))
        found = None if EVENTS[name].unless & side.marks else EVENTS[name].draw(side, rng)
        if found is not None:
            return name, *found


def run(seed: int, say: Callable[[str], None] = lambda line: None, without: Iterable[str] = ()) -> Sequence:
    """One sequence, until the end or the first difference; without some kinds of events it is another."""
    rng = random.Random(seed)
    sequence = Sequence(seed, draw_recipe(rng))
    say(str(sequence))
    twins = Twins(sequence.recipe, slow=seed >= QUICK)
    weights = {name: 0.0 if name in without else event.weight for name, event in EVENTS.items()}
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _run(twins, sequence, rng, weights, say)
    except Exception as error:
        sequence.failed = f"{type(error).__name__}: {error}"
        say(f"  FAILED: {sequence.failed}")
    finally:
        if "compiled" in twins.plain.marks:
            torch.compiler.reset()
    return sequence


def _run(twins: Twins, sequence: Sequence, rng: random.Random, weights: dict[str, float], say: Callable) -> None:
    count, late = rng.randint(4, 8), rng.randrange(4)
    for number in range(count + 1):
        if number == count:
            name, what, action = "reverted", "all patches", revert_all
        else:
            name, what, action = _draw(twins.plain, rng, {"patched": 1.0} if number == late else weights)
        try:
            wanted = twins.expected(action, rng.randrange(2**31))
        except Exception as error:
            say(f"  (not {name}: {what}: the unpatched twin raises {type(error).__name__}: {error})")
            sequence.skipped[name] += 1
            continue
        sequence.events.append((name, what))
        say(f"  {name}: {what}")
        twins.check(wanted)
    twins.check_others()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("seed", type=int, nargs="?", help="one sequence, with a line for each event")
    parser.add_argument("--count", type=int, default=100, help="how many sequences")
    parser.add_argument("--start", type=int, default=0, help="the first one's seed")
    parser.add_argument("--without", nargs="+", default=[], choices=EVENTS, help="kinds of events, to see behind them")
    args = parser.parse_args()
    torch.set_num_threads(1)
    if transformers is not None:
        transformers.utils.logging.set_verbosity_error()
    if args.seed is not None:
        return int(bool(run(args.seed, print, args.without).failed))
    started, ran, skipped, failed = time.monotonic(), Counter(), Counter(), []
    for done, seed in enumerate(range(args.start, args.start + args.count), 1):
        sequence = run(seed, without=args.without)
        ran.update(name for name, _ in sequence.events)
        skipped += sequence.skipped
        if sequence.failed:
            failed.append(sequence)
            print(sequence, flush=True)
        if done % 50 == 0:
            print(f"{done} sequences, {len(failed)} failed, {time.monotonic() - started:.0f} s", flush=True)
    print(f"{args.count} sequences, {sum(ran.values())} events, in {time.monotonic() - started:.0f} s")
    print("events (and how often the unpatched twin did not bear them):")
    print("\n".join(f"  {name}: {ran[name]} ({skipped[name]})" for name in EVENTS))
    print(f"{len(failed)} failed: {' '.join(str(s.seed) for s in failed)}" if failed else "none failed")
    return int(bool(failed))


if __name__ == "__main__":
    sys.exit(main())
