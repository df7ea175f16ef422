"""attention against SDPA's backends, FlexAttention and the formula: causal or not, windows, grouped heads."""

from __future__ import annotations

import functools

import torch

from fastllm.benchmarks import _attention
from fastllm.benchmarks.harness import Case, Direction, dtype_name

TOKENS = 16384  # a batch


def case(
    device: str, rows: int, size: int, causal: bool, direction: Direction, *, batch: int | None = None, heads: int = 16,
    kv_heads: int | None = None, left: int = -1, dtype: torch.dtype = torch.bfloat16, target: str = "",
) -> Case:  # fmt: skip
    batch, kv_heads = batch or max(1, TOKENS // rows), kv_heads or heads
    pairs = rows * rows // 2 if causal else rows * rows
    if left >= 0:
        pairs = rows * (left + 1) - left * (left + 1) // 2
    kind = f"window {left}" if left >= 0 else "causal" if causal else "full"
    grouped = "" if kv_heads == heads else f" {heads}:{kv_heads} heads"
    shape = (batch, heads, kv_heads, rows, size, dtype, device)
    small = (1, heads, kv_heads, min(rows, 1024), size, dtype, device)
    read = batch * rows * size * dtype.itemsize * (2 * heads + 2 * kv_heads)
    return Case(
        op="attention",
        name=f"{dtype_name(dtype)} B{batch} S{rows} D{size}{grouped} {kind} {direction}",
        direction=direction,
        args=functools.partial(_attention.dense, *shape),
        check=functools.partial(_attention.dense, *small),
        rivals=_attention.rivals(device, left, causal),
        bytes=read * {"forward": 1, "backward": 2, "forward+backward": 3}[direction],
        flops=_attention.flops(batch * pairs, heads, size, direction),
        products=dtype,
        target=target,
        slow=(_attention.FLEX_AUTOTUNED,),
        kwargs={"is_causal": causal, "window_size": (left, -1), "enable_gqa": True},
    )


def cases(device: str, quick: bool) -> list[Case]:
    if device == "cpu":
        options = {"dtype": torch.float32, "batch": 1, "heads": 8}
        main = case("cpu", 1024, 64, True, "forward+backward", target="1x SDPA", **options)
        if quick:
            return [main]
        return [
            main,
            case("cpu", 1024, 64, True, "forward", target="1x SDPA", **options),
            case("cpu", 2048, 64, True, "forward+backward", left=256, target="faster than SDPA", **options),
        ]
    goals: dict[Direction, str] = {
        "forward": "450 TFLOP/s, 1x FlexAttention", "backward": "330 TFLOP/s, 1x SDPA flash",
    }  # fmt: skip
    found = [case(device, 8192, 128, True, direction, target=goal) for direction, goal in goals.items()]
    if quick:
        return found
    for direction in goals:
        found += [case(device, 8192, size, True, direction) for size in (64, 256)]
        found += [case(device, rows, 128, True, direction) for rows in (512, 2048, 32768)]
        found.append(case(device, 8192, 128, False, direction))
        found.append(case(device, 8192, 128, True, direction, kv_heads=2))
        found.append(case(device, 8192, 128, True, direction, left=1024))
    return found
