"""Random models and random events: a patched model beside a twin that never is, compared after every event.

    python tests/patch_fuzz.py SEED             one sequence, with a line for each event
    python tests/patch_fuzz.py --count 2000     many; the failing seeds stand at the end

What is drawn depends on the seed and on the unpatched twin alone: a seed means the same sequence whatever fastllm does.
An event that the unpatched twin cannot bear is left out of both.
"""

from __future__ import annotations

import argparse
import copy
import functools
import random
import sys
import time
import warnings
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace

import torch
from patch_fuzz_events import EVENTS, Action, revert_all
from patch_fuzz_models import Recipe, draw_recipe
from patch_fuzz_sides import Difference, Result, Side, compare, observe
from torch import Tensor

try:
    import transformers
except ImportError:
    transformers = None

QUICK = 100
"""Seeds below it stay clear of what takes long."""


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
