"""A small call of every op, forward and backward: what tests of all ops on a GPU, and the sanitizer, run.

`python tests/every_op.py cuda` runs them once, in every dtype; `make sanitize` does so under compute-sanitizer.
"""

from __future__ import annotations

import sys
from collections.abc import Callable

import torch
from torch import Tensor

from fastllm import ops
from fastllm.testing import outputs_of, sample

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NO_BACKWARD = ("adamw", "attention_kvcache")


def runner(op: str, device: str, dtype: torch.dtype) -> Callable[[], list[Tensor]]:
    """Returns a call that gives the outputs of `op` and every gradient; for adamw, what it wrote. Twice the same."""
    args, kwargs = sample(op, device, dtype)
    function = getattr(ops, op)
    if op == "adamw":
        lists = [x for x in args if isinstance(x, (list, tuple))]
        before = [[t.clone() for t in tensors] for tensors in lists]

        def step() -> list[Tensor]:
            for tensors, values in zip(lists, before, strict=True):
                for tensor, value in zip(tensors, values, strict=True):
                    tensor.copy_(value)
            function(*args, **kwargs)
            return [t.clone() for tensors in lists for t in tensors]

        return step
    given = args[:2] if op == "rotary" else (*args, *kwargs.values())  # its tables get no gradient
    leaves = [x for x in given if isinstance(x, Tensor) and x.is_floating_point()]
    if op not in NO_BACKWARD:
        for leaf in leaves:
            leaf.requires_grad_()

    def run() -> list[Tensor]:
        torch.manual_seed(0)
        outputs = [out for out in outputs_of(function(*args, **kwargs)) if isinstance(out, Tensor)]
        wanted = [out for out in outputs if out.requires_grad]
        cotangents = [torch.ones_like(out) for out in wanted]
        grads = torch.autograd.grad(wanted, leaves, cotangents, allow_unused=True) if wanted else ()
        return [*(out.detach() for out in outputs), *(grad for grad in grads if grad is not None)]

    return run


def main(device: str) -> None:
    for op in ops.__all__:
        for dtype in DTYPES:
            runner(op, device, dtype)()
    if device != "cpu":
        torch.cuda.synchronize()
    print(f"{len(ops.__all__)} ops in {len(DTYPES)} dtypes")


if __name__ == "__main__":
    main(sys.argv[1])
