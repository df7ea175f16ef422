"""A training step of a transformers model, patched and not: forward, backward, AdamW (torch's fused one for all).

A GPT-2 and a Llama with 50,257 classes: on a GPU of GPT-2's smallest size, on a CPU of 6 layers of 384 channels.
Without dropout, so that the losses can be compared: patched within 1e-4 of unpatched over the first steps. Every
contender runs in a process of its own with the system's allocator as it is, for what a step costs in memory, and in
faulting it in, is part of what is asked here.

Bytes: parameters, gradients and both moments as AdamW moves them. Operations: 6 for each parameter in a product and
token, as Kaplan et al. (2020) count; attention is left out.
"""

from __future__ import annotations

import functools
import re
import warnings
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

import fastllm
from fastllm import ops
from fastllm.benchmarks._process import Worker
from fastllm.benchmarks.harness import COMPILED, Case, Ready, rival
from fastllm.testing import make

VOCABULARY = 50257
STEPS = 3  # on which the losses are compared


def gpt2(layers: int, heads: int, width: int) -> torch.nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    none = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return GPT2LMHeadModel(GPT2Config(n_layer=layers, n_head=heads, n_embd=width, **none))


def llama(layers: int, heads: int, width: int) -> torch.nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": layers, "num_attention_heads": heads, "num_key_value_heads": heads}
    sizes |= {"hidden_size": width, "intermediate_size": -(-8 * width // 3 // 64) * 64, "vocab_size": VOCABULARY}
    return LlamaForCausalLM(LlamaConfig(**sizes, tie_word_embeddings=True))


def liger() -> Callable:
    """Liger-Kernel's patch of one instance."""
    from liger_kernel.transformers import _apply_liger_kernel_to_instance

    return _apply_liger_kernel_to_instance


def _peak() -> int:
    """Bytes of memory that this process has held at most. (`getrusage` would tell its parent's, if that is larger.)"""
    status = Path("/proc/self/status").read_text()
    return 1024 * int(re.search(r"VmHWM:\s*(\d+)", status).group(1))  # type: ignore[union-attr]


def _work(
    pipe: Connection,
    name: str,
    build: Callable[[], torch.nn.Module],
    shape: tuple,
    device: str,
    bf16: bool,
    threads: int,
) -> None:
    """A contender's process: answers "clear" and "step" (with the loss), and "peak" with bytes."""
    warnings.simplefilter("ignore")
    if device == "cuda":
        warnings.simplefilter("error", fastllm.FallbackWarning)  # on stock PyTorch nothing of ours would be timed
    torch.set_num_threads(threads)
    try:
        ids = torch.randint(VOCABULARY, shape, generator=torch.Generator().manual_seed(0)).to(device)
        torch.manual_seed(0)
        model = build().to(device).train()
        optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, fused=True)
        if name == "fastllm":
            fastllm.patch(model)
        elif name == "Liger":
            liger()(model=model)
        call: Any = torch.compile(model, dynamic=False) if name == COMPILED else model
        while True:
            order = pipe.recv()
            if order == "clear":
                optimizer.zero_grad(set_to_none=True)
                pipe.send(None)
            elif order == "peak":
                pipe.send(torch.cuda.max_memory_allocated() if device == "cuda" else _peak())
            else:
                with torch.autocast(device, torch.bfloat16, enabled=bf16):
                    loss = call(input_ids=ids, labels=ids, use_cache=False).loss
                loss.backward()
                optimizer.step()
                pipe.send(float(loss.detach()))
    except EOFError:  # the benchmark is over
        pass
    except Exception as error:
        pipe.send(error)


def setup(
    build: Callable[[], torch.nn.Module], batch: int, length: int, device: str, bf16: bool
) -> dict[str, Callable[[], Ready] | str]:
    losses: dict[str, list[float]] = {}

    def ready(name: str) -> Ready:
        ask = Worker(_work, name, build, (batch, length), device, bf16, torch.get_num_threads()).ask
        losses[name] = [(ask("clear"), ask("step"))[1] for _ in range(STEPS)]
        return Ready(*(functools.partial(ask, order) for order in ("clear", "step", "peak")))

    checked = {name: ready(name) for name in ("fastllm", "eager")}
    tolerance = 2e-2 if bf16 else 1e-4
    for ours, theirs in zip(losses["fastllm"], losses["eager"], strict=True):
        if abs(ours - theirs) > tolerance:
            raise AssertionError(f"the patched model's losses are {losses['fastllm']}, the model's {losses['eager']}")
    found: dict[str, Callable[[], Ready] | str] = {name: lambda one=one: one for name, one in checked.items()}
    found[COMPILED] = functools.partial(ready, COMPILED)
    if device == "cuda":
        found["Liger"] = functools.partial(ready, "Liger") if callable(there := rival(liger)) else there
    return found


def case(
    name: str, build: Callable[[], torch.nn.Module], parameters: int, batch: int, length: int, device: str, target: str
) -> Case:
    bf16 = device == "cuda"
    return Case(
        op="patch",
        name=f"{name} {'bf16' if bf16 else 'fp32'} {batch}x{length} step",
        direction="forward+backward",
        args=lambda: (make((2, 8)), (8,), make((8,))),
        rivals={},
        bytes=28 * parameters,
        flops=6 * parameters * batch * length,
        products=torch.bfloat16 if bf16 else torch.float32,
        target=target,
        call=ops.rms_norm,  # for the name of the backend alone
        setup=functools.partial(setup, build, batch, length, device, bf16),
        rounds=(5, 9),
    )


def cases(device: str, quick: bool) -> list[Case]:
    try:
        import transformers  # noqa: F401
    except ImportError:
        return []
    if device == "cpu":
        layers, heads, width, parameters, batch, length = 6, 6, 384, 30_000_000, 4, 256
    else:
        layers, heads, width, parameters, batch, length = 12, 12, 768, 124_000_000, 16, 1024
    target = "1.15x eager" if device == "cpu" else "1x torch.compile"
    sizes = layers, heads, width
    found = [
        case(f"{name} {layers}x{width}", functools.partial(build, *sizes), parameters, batch, length, device, target)
        for name, build in (("GPT-2", gpt2), ("Llama", llama))
    ]
    return found[:1] if quick else found
