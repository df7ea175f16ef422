"""The events of the fuzz: each looks at the unpatched twin, draws what is left open, and says what to do to both."""

from __future__ import annotations

import contextlib
import copy
import functools
import io
import pickle
import random
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from patch_fuzz_models import ACTIVATIONS, Language
from patch_fuzz_sides import Batch, Difference, Recorder, Result, Side, recorders
from patch_models import VOCABULARY
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


# What is hooked in the forward alone, another code would run where a checkpoint computes it again.
@event(weight=0.3, unless="compiled checkpointed")
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


@event(weight=1.0, unless="offloaded compiled watched")
def checkpointed(side: Side, rng: random.Random) -> tuple[str, Action] | None:
    if not getattr(side.core, "supports_gradient_checkpointing", False):
        return None

    def act(side: Side) -> None:
        side.core.gradient_checkpointing_enable({"use_reentrant": False})
        side.marks.add("checkpointed")

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
