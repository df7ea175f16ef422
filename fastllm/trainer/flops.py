"""What a chip computes at most, for the share of it that training reaches (MFU)."""

from __future__ import annotations

import re

import torch

# Tera-operations a second, dense: 16 bits on tensor cores with sums in float32, TF32, float32 without tensor cores.
_PEAKS = {
    "B200": (2250, 1100, 75),
    "H200 NVL": (835, 417, 60),
    "H200": (989, 494, 67),
    "H100 NVL": (835, 417, 60),
    "H100 PCIe": (756, 378, 51),
    "H100": (989, 494, 67),
    "A100": (312, 156, 19.5),
    "L40S": (362, 183, 91.6),
    "L4": (121, 60, 30.3),
    "RTX 5090": (209, 104.8, 104.8),
    "RTX 4090": (165, 82.6, 82.6),
    "V100": (125, None, 15.7),  # float16 alone
}


def peak_flops(device: torch.device, dtype: torch.dtype) -> tuple[float, str] | None:
    """The most floating-point operations a second that a GPU does in matrix products, without sparsity.

    Figures are those of NVIDIA's data sheets: B200 (HGX), H200, H100, A100, L40S, L4, V100, and of the architecture
    papers "Ada" (RTX 4090) and "RTX Blackwell" (RTX 5090), by the name that torch reports.

    Args:
        dtype: of the products: float16, bfloat16, or float32, which is TF32 where torch is allowed that.

    Returns:
        The number, and what it is of, as "H100, TF32"; None for a CPU, a chip that is not in the table, and a part of
        one (MIG).
    """
    if device.type != "cuda" or dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return None
    found = torch.cuda.get_device_name(device)
    name = next((name for name in _PEAKS if re.search(rf"\b{name}\b", found)), None)
    if name is None or "MIG" in found or (name == "V100" and dtype == torch.bfloat16):
        return None
    half, tf32, single = _PEAKS[name]
    kind, peak = str(dtype).removeprefix("torch."), single if dtype == torch.float32 else half
    if dtype == torch.float32 and tf32 is not None and torch.get_float32_matmul_precision() != "highest":
        kind, peak = "TF32", tf32
    return peak * 1e12, f"{name}, {kind}"
