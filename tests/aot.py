"""Compiles Triton kernels for chips that are not there, and reads what the compiler made of them.

`record` runs a launcher on tensors of the meta device and takes down what it would have launched, so that what is
compiled is what is shipped: the same configuration table, the same arguments, specialised as the JIT would.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import machine_code
import torch
import triton
from triton.backends.compiler import GPUTarget

from fastllm.ops._attention import FLOAT32_WIDE
from fastllm.precompile import Launch, aligned, recorded

TARGETS = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "sm_120": GPUTarget("cuda", 120, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}
SHARED_LIMIT = {"sm_80": 166_912, "sm_90": 232_448, "sm_100": 232_448, "sm_120": 101_376, "gfx942": 65_536}
TYPES = {
    torch.float32: "*fp32", torch.bfloat16: "*bf16", torch.float16: "*fp16", torch.uint8: "*u8",
    torch.int32: "*i32", torch.int64: "*i64",
}  # fmt: skip


@dataclass
class Resources:
    registers: int
    spills: int  # bytes of stack frame and spills, on AMD the number of spilled registers
    shared: int
    matrix: str  # the matrix instructions that were found
    loop_spills: int = 0  # loads and stores of spills in the main loop
    copies: bool = False  # whether the copy engine (TMA) reads tiles
    regrouped: bool = False  # whether warps hand registers to each other, as specialised ones do


def record(target: str, run: Callable[[], None]) -> list[Launch]:
    """What `run` would launch on `target`."""
    with recorded((TARGETS[target].backend, TARGETS[target].arch)) as launches:
        run()
    return launches


def source(launch: Launch) -> triton.compiler.ASTSource:
    signature, constants, attributes = {}, {}, {}
    values = {**launch.args, **launch.config.blocks}
    for position, parameter in enumerate(launch.kernel.params):
        name, value = parameter.name, values[parameter.name]
        one = isinstance(value, int) and value == 1 and not parameter.do_not_specialize
        if parameter.is_constexpr or value is None or one:
            signature[name], constants[name] = "constexpr", value
        elif isinstance(value, torch.Tensor):
            signature[name] = TYPES[value.dtype]
            if aligned(value):
                attributes[position,] = [["tt.divisibility", 16]]
        elif parameter.do_not_specialize:
            signature[name] = "i32"
        elif isinstance(value, int):
            signature[name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0:
                attributes[position,] = [["tt.divisibility", 16]]
        else:
            signature[name] = "fp32"
    return triton.compiler.ASTSource(launch.kernel, signature, constants, attributes)


def compiled_for(launch: Launch, target: str) -> triton.compiler.CompiledKernel:
    options = {"num_warps": launch.config.warps, "num_stages": launch.config.stages, "enable_fp_fusion": launch.fusion}
    return triton.compile(source(launch), target=TARGETS[target], options=options)


def machine_code_of(compiled: triton.compiler.CompiledKernel, target: str) -> machine_code.Kernel:
    """That of a chip of NVIDIA's."""
    with cubin(compiled.asm["cubin"]) as path:
        (kernel,) = machine_code.read(path, target).values()
    return kernel


def compile(launch: Launch, target: str) -> Resources:
    compiled = compiled_for(launch, target)
    if target.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        spills = sum(int(n) for n in re.findall(r"\.[vs]gpr_spill_count:\s*(\d+)", text))
        registers = max(int(n) for n in re.findall(r"\.vgpr_count:\s*(\d+)", text))
        return Resources(registers, spills, compiled.metadata.shared, "MFMA" if "v_mfma_" in text else "")
    kernel = machine_code_of(compiled, target)
    matrix = [name for name in ("HGMMA", "UTCHMMA", "HMMA") if kernel.has(name)]
    spills = kernel.main_loop().count("STL", "LDL") if matrix else 0
    shared = compiled.metadata.shared
    return Resources(kernel.registers, kernel.stack, shared, " ".join(matrix), spills, kernel.has("UTMALDG"),
                     kernel.has("USETMAXREG"))  # fmt: skip


@contextlib.contextmanager
def cubin(data: bytes) -> Iterator[str]:
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(data)
        file.flush()
        yield file.name


# What is compiled: every entry of the tables, by running the launchers on every kind of argument that selects one.

SIZES = (64, 128, 256, 512)
VARIANTS: dict[str, dict] = {
    "causal": {},
    "window": {"left": 512},
    "varlen": {"varlen": True},
    "mask": {"mask": True, "right": -1},
    "softcap": {"softcap": 30.0},
    "alibi": {"alibi": True},
    "dropout": {"dropout": 0.1},
    "sinks": {"sinks": True},
    "odd": {"odd": True},
    "float32": {"dtype": torch.float32},
}


def _empty(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _gradient(out: torch.Tensor) -> torch.Tensor:
    """Where the gradient of an output lies."""
    return out


def training(
    size: int, dtype=torch.bfloat16, left=-1, right=0, mask=False, softcap=0.0, alibi=False, dropout=0.0, sinks=False,
    varlen=False, odd=False, rows=4096, keys=4096, kv_heads=4,
) -> None:  # fmt: skip
    """Forward and backward of (B, S, H, D) views with grouped heads. `sinks` comes with a gradient of lse; `odd`: head
    sizes below a power of two, the value's another than the key's."""
    from fastllm.kernels import attention

    batch, heads = (1 if varlen else 2), 16

    def draw(rows: int, heads: int, size: int) -> torch.Tensor:
        return _empty(batch, rows, heads, size, dtype=dtype).transpose(1, 2)

    value_size = size - 8 if odd else size
    size = size - 24 if odd else size
    q, out = draw(rows, heads, size), draw(rows, heads, value_size)
    k, v = draw(keys, kv_heads, size), draw(keys, kv_heads, value_size)
    lse, sink = _empty(batch, heads, rows, dtype=torch.float32), _empty(heads) if sinks else None
    rest = (
        _empty(batch, 1, rows, keys, dtype=dtype).expand(batch, heads, rows, keys) if mask else None,
        sink,
        _empty(batch, heads, dtype=torch.float32) if alibi else None,
        _empty(1, dtype=torch.int64) if dropout else None,
        attention.Scores(dropout, 0.1, left, right, softcap, varlen),
        attention.Packed(_empty(9, dtype=torch.int32), _empty(9, dtype=torch.int32)) if varlen else None,
    )
    attention.attention_fwd(out, lse, q, k, v, *rest)
    dsinks, dlse = (None, None) if sink is None else (torch.empty_like(sink), lse)
    attention.attention_bwd(q, k, v, dsinks, _gradient(out), dlse, q, k, v, out, lse, *rest)


def decoding(size: int, group: int, dtype=torch.bfloat16) -> None:
    from fastllm.kernels import attention, attention_kvcache

    q, out = (_empty(4, 1, 2 * group, size, dtype=dtype).transpose(1, 2) for _ in range(2))
    cache = _empty(4, 8192, 2, size, dtype=dtype).transpose(1, 2)
    lse, lengths = _empty(4, 2 * group, 1, dtype=torch.float32), _empty(4, dtype=torch.int32)
    scores = attention.Scores(0.0, 0.1, -1, 0, 0.0, True)
    attention_kvcache.attention_kvcache_fwd(out, lse, q, cache, cache, lengths, None, None, scores)


def jobs(target: str, everything: bool) -> Iterator[tuple[str, str, int, Launch]]:
    """(target, variant, head size, launch). Without `everything`: head size 128 of each chip, and more of Hopper."""

    seen: set[str] = set()

    def new(launch: Launch) -> bool:
        """Whether none of the same text came before it, as of small kernels that do not know the head size."""
        text = launch.text()
        return not (text in seen or seen.add(text))

    def wanted(variant: str, size: int) -> bool:
        if target == "sm_90":
            return variant == "causal" or (size == 128 and variant in ("varlen", "mask", "dropout", "decode"))
        return size == 128 and variant in ("causal", "decode")

    def refused(variant: str, size: int) -> bool:
        return "float32" in variant and size > 256 and SHARED_LIMIT[target] < FLOAT32_WIDE

    for variant, arguments in VARIANTS.items():
        for size in SIZES:
            if (everything or wanted(variant, size)) and not refused(variant, size):
                for launch in record(target, lambda size=size, arguments=arguments: training(size, **arguments)):
                    if (variant in ("causal", "sinks") or "delta" not in launch.kernel.__name__) and new(launch):
                        yield target, variant, size, launch
    for size in SIZES:
        for variant, group, dtype in (
            ("decode", 4, torch.bfloat16),
            ("decode many", 64, torch.bfloat16),
            ("decode float32", 4, torch.float32),
        ):
            if (everything or wanted(variant, size)) and not refused(variant, size):
                for launch in record(target, lambda size=size, group=group, dtype=dtype: decoding(size, group, dtype)):
                    if ("combine" not in launch.kernel.__name__ or (variant, size) == ("decode", 128)) and new(launch):
                        yield target, variant, size, launch


def main(shard: int, shards: int, everything: bool) -> None:
    """Prints a line of JSON for each launch of this shard."""
    found = [job for target in TARGETS for job in jobs(target, everything)]
    for target, variant, size, launch in found[shard::shards]:
        row = {
            "target": target,
            "kernel": launch.kernel.__name__.strip("_").removesuffix("_kernel"),
            "variant": variant,
            "size": size,
            "config": str(launch.config),
            "warps": launch.config.warps,
            "pass": {(True, False): "dk", (False, True): "dv"}.get(
                (launch.args.get("GRAD_K"), launch.args.get("GRAD_V")), ""
            ),
        }  # fmt: skip
        print(json.dumps(row | asdict(compile(launch, target))), flush=True)


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3] == "all")
