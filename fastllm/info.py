"""What runs on this machine, and why: `fastllm info`."""

from __future__ import annotations

import importlib.metadata
import json as json_module
import platform
import warnings
from pathlib import Path
from typing import Any

import torch

import fastllm
from fastllm import _ext, ops
from fastllm.backends import aligned


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        for line in cpuinfo.read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _gpus() -> list[dict[str, Any]]:
    if not torch.cuda.is_available():
        return []
    properties = [torch.cuda.get_device_properties(index) for index in range(torch.cuda.device_count())]
    return [
        {"name": gpu.name, "capability": f"{gpu.major}.{gpu.minor}", "memory_gib": round(gpu.total_memory / 2**30, 1)}
        for gpu in properties
    ]


def _backends(device: str) -> dict[str, list[dict[str, Any]]]:
    """For each op, every step of it with every backend: what `explain` says of a float32 call."""
    from fastllm.testing import sample

    report = {}
    for name in ops.__all__:
        args, kwargs = sample(name, device, torch.float32)
        report[name] = [
            {"step": line.op, "backend": line.backend, "chosen": line.chosen, "reason": line.reason}
            for line in fastllm.explain(name, *args, **kwargs)
        ]
    return report


def collect() -> dict[str, Any]:
    """Everything `fastllm info` prints, as what `json.dumps` takes."""
    gpus = _gpus()
    devices = ["cpu", "cuda"] if gpus else ["cpu"]
    return {
        "versions": {
            "fastllm": fastllm.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "triton": _version("triton"),
        },
        "cpu": {
            "name": _cpu_name(),
            "threads": torch.get_num_threads(),
            "kernels": _ext.C.cpu_capability() if _ext.C else None,
        },
        "gpus": gpus,
        "extensions": {key.lower(): status for key, status in _ext.STATUS.items()},
        "build": _ext.C.build_info() if _ext.C else None,
        "backends": {device: _backends(device) for device in devices},
    }


def _format(report: dict[str, Any]) -> str:
    versions, cpu, build = report["versions"], report["cpu"], report["build"]
    lines = [
        "versions    " + ", ".join(f"{name} {version or 'not installed'}" for name, version in versions.items()),
        f"cpu         {cpu['name']}, {cpu['threads']} threads, kernels for {cpu['kernels'] or 'none'}",
    ]
    lines += [
        f"gpu         {gpu['name']}, compute capability {gpu['capability']}, {gpu['memory_gib']} GiB"
        for gpu in report["gpus"]
    ] or ["gpu         none that torch can use"]
    lines += [f"{key + ' ops':<12}{status}" for key, status in report["extensions"].items()]
    if build:
        lines.append(
            f"built       by {build['compiler']} for {', '.join(build['cpu_kernels'])}, with torch {build['torch']}, "
            f"for torch >= {build['torch_target_version']}"
        )
        if build["cuda_compiler"]:
            archs = ", ".join(f"sm_{arch}" for arch in build["cuda_archs"].split(";"))
            lines.append(f"            by {build['cuda_compiler']} for {archs}")
    for device, table in report["backends"].items():
        lines += ["", f"on {device}, float32:"]
        rows = aligned(
            [
                (line["step"], line["backend"], "runs" if line["chosen"] else line["reason"] or "could run too")
                for candidates in table.values()
                for line in candidates
            ]
        )
        for name, candidates in table.items():
            lines.append(f"  {name}")
            lines += [f"    {rows.pop(0)}" for _ in candidates]
    return "\n".join(lines)


def main(json: bool = False) -> int:
    """Prints versions, devices, what was built, and the backend of each op on each device; as one JSON object if so
    asked."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the report says it all
        report = collect()
    print(json_module.dumps(report, indent=2) if json else _format(report))
    return 0
