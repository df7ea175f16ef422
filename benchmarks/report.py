"""Draws results, and writes them into the README.

python -m fastllm.benchmarks.report runs/bench/cpu.json --out runs/bench    # a page with plots
python -m fastllm.benchmarks.report --readme README.md                      # from every file in results/
python -m fastllm.benchmarks.report --readme README.md --check              # exit code 1 if it is out of date
"""

from __future__ import annotations

import argparse
import base64
import html
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastllm._extras import require
from fastllm.benchmarks.harness import FORMAT, HOST_BOUND, MUCH, achieved, any_host_bound, label, mark, rates

RESULTS = Path(__file__).parent / "results"
BEGIN, END = "<!-- benchmarks:begin -->", "<!-- benchmarks:end -->"
COLORS = {"fastllm": "#1f5fbf", "eager": "#9aa3ad", "torch.compile": "#e08e2b", "Liger": "#3c9a5f"}
MORE_COLORS = (
    "#8a5fb0",
    "#c2556b",
    "#4aa3a8",
    "#7d6b4f",
    "#d6a3c9",
    "#a8c66c",
    "#5b7fa6",
    "#e0c04f",
    "#b0623a",
    "#2f5d50",
)


def load(path: Path) -> dict[str, Any]:
    """The results in a file.

    Raises:
        ValueError: for a file of another format.
    """
    data = json.loads(path.read_text())
    if data["format"] != FORMAT:
        raise ValueError(f"{path} has format {data['format']}, not {FORMAT}: measure anew")
    return data


def _contenders(data: dict[str, Any]) -> list[str]:
    """In the order of their first appearance, fastllm first."""
    return list(dict.fromkeys(name for result in data["results"] for name in result["contenders"]))


def _by_op(data: dict[str, Any]) -> dict[str, list[dict[str, Any]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for result in data["results"]:
        found.setdefault(result["op"], []).append(result)
    return found


def _machine(data: dict[str, Any]) -> str:
    machine = data["machine"]
    threads = "" if machine["device"] == "cuda" else f", {machine['threads']} threads"
    return f"{machine['name']}{threads}"


def _facts(data: dict[str, Any]) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in data["versions"].items())
    ceilings = data["ceilings"]
    matmul = ", ".join(
        f"{key.split('_')[1]} {value:.3g} TFLOP/s" for key, value in ceilings.items() if key.startswith("matmul_")
    )
    measured = f"copy {ceilings['copy_gb_s']:.4g} GB/s, matmul {matmul}"
    return f"{data['date']}; {versions}. Measured ceilings ({data.get('ceilings_are', 'medians')}): {measured}."


def _not_timed(data: dict[str, Any]) -> list[str]:
    """A line for each rival that is missing and each reason, with the ops that miss it."""
    found: dict[tuple[str, str], dict[str, None]] = {}
    for result in data["results"]:
        for name, reason in result["skipped"].items():
            found.setdefault((name, reason), {})[result["op"]] = None
    return [f"{name} is not timed in {', '.join(ops)}: {reason}" for (name, reason), ops in found.items()]


# Plots


def _bars(data: dict[str, Any], path: Path, *, speedup: bool) -> None:
    """One panel an op, one group of bars a case: fastllm's speed-up over each rival, or every contender's share of the
    ceiling that the case is measured by."""
    pyplot = require("matplotlib.pyplot", "bench")
    ops, names = _by_op(data), _contenders(data)
    more = iter(MORE_COLORS * len(names))
    colors = {name: COLORS[name] if name in COLORS else next(more) for name in names}
    if speedup:
        names = names[1:]
    most = {op: max(len(result["contenders"]) for result in results) - speedup for op, results in ops.items()}
    heights = [0.5 + len(results) * (0.25 + 0.22 * most[op]) for op, results in ops.items()]
    figure, axes = pyplot.subplots(len(ops), sharex=True, squeeze=False, height_ratios=heights, layout="constrained")
    figure.set_size_inches(9, sum(heights) + 1.4)
    ceiling = 1.0 if speedup else 100.0
    largest = ceiling
    for axis, (op, results) in zip(axes[:, 0], ops.items(), strict=True):
        for row, result in enumerate(results):
            present = [name for name in names if name in result["contenders"]]
            for i, name in enumerate(present):
                rate = rates(result, name, data["ceilings"])
                value = rate["speedup"] if speedup else 100 * rate["share"]
                y = row + (i - (len(present) - 1) / 2) * 0.8 / most[op]
                axis.barh(y, value, 0.74 / most[op], color=colors[name], zorder=2)
                text = f"{value:.2f}x" if speedup else ", ".join(achieved(data, result, name))
                largest = max(largest, value)
                box = {"fc": "white", "ec": "none", "pad": 0.4}
                at = {"xytext": (3, 0), "textcoords": "offset points"}
                axis.annotate(text, (value, y), **at, va="center", fontsize=8, zorder=4, bbox=box)
        axis.set_title(op, loc="left", fontsize=11, fontweight="bold")
        axis.set_yticks(range(len(results)), [result["case"] for result in results], fontsize=9)
        axis.set_ylim(len(results) - 0.45, -0.55)
        axis.axvline(ceiling, color="#333333", linestyle="--", linewidth=1, zorder=3)
        axis.grid(axis="x", color="#e3e6ea", zorder=0)
        axis.tick_params(length=0)
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    label = "speed-up of fastllm (dashed: as fast)" if speedup else "% of the measured ceiling, copy or matmul (dashed)"
    axes[-1, 0].set_xlabel(label)
    axes[-1, 0].set_xlim(0, (1.12 if speedup else 1.45) * largest)  # room for the labels
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[name]) for name in names]
    labels = [f"over {name}" if speedup else name for name in names]
    figure.legend(handles, labels, loc="outside upper right", ncols=min(4, len(names)), frameon=False)
    figure.suptitle(_machine(data), x=0.01, ha="left", fontsize=11)
    figure.savefig(path, dpi=130)
    pyplot.close(figure)


# The page

STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 62em; padding: 0 1em; color: #1c2430; }
table { border-collapse: collapse; width: 100%; margin: 1em 0; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: .25em .6em; border-bottom: 1px solid #e3e6ea; }
th:nth-child(-n+3), td:nth-child(-n+3) { text-align: left; }
tr.fastllm td { border-top: 2px solid #c9d0d8; font-weight: 600; }
img { max-width: 100%; } .failed { color: #b3261e; } footer, .facts { color: #5b6673; }
"""

FOOTER = """Medians of rounds in which the contenders took turns. GB/s counts the bytes that must move, TFLOP/s the
operations that must be done, whoever moves or does more. The ceilings, a large copy and large matrix products, were
timed in the same way in the same run. A training step's operations are 6 for each parameter and token, and those of
attention; MFU is their share of the peak in the GPU's data sheet (Chowdhery et al., 2022)."""


def _page(data: dict[str, Any], images: dict[str, bytes]) -> str:
    escape = html.escape
    rows = []
    for result in data["results"]:
        for name, figures in result["contenders"].items():
            rate, ours = rates(result, name, data["ceilings"]), name == "fastllm"
            cells = [
                result["op"] if ours else "",
                result["case"] if ours else "",
                label(result, name),
                f"{figures['median_ms']:.3f}",
                f"{figures['q1_ms']:.3f} to {figures['q3_ms']:.3f}",
                *achieved(data, result, name),
                "" if ours else f"{rate['speedup']:.2f}x",
            ]
            tag = '<tr class="fastllm">' if ours else "<tr>"
            rows.append(tag + "".join(f"<td>{escape(cell)}</td>" for cell in cells) + "</tr>")
    head = ("op", "case", "contender", "ms", "quartiles", "rate", "of ceiling", "fastllm's speed-up")
    notes = _not_timed(data) + [
        f"{r['op']}, {r['case']}: other processes took {r['others']:.0%} of the CPUs."
        for r in data["results"]
        if (r["others"] or 0) > MUCH
    ]
    if any_host_bound(data):
        notes.append(HOST_BOUND)
    failed = [f"{f['op']}, {f['case']}: not timed: {f['reason']}" for f in data["failed"]]
    pictures = []
    for title, png in images.items():
        source = f"data:image/png;base64,{base64.b64encode(png).decode()}"
        pictures.append(f'<h2>{escape(title)}</h2><img alt="{escape(title)}" src="{source}">')
    lines = [
        "<!doctype html>",
        f'<html lang="en"><head><meta charset="utf-8"><title>fastllm on {escape(_machine(data))}</title>',
        f"<style>{STYLE}</style></head><body>",
        f"<h1>fastllm on {escape(_machine(data))}</h1>",
        f'<p class="facts">{escape(_facts(data))}</p>',
        *(f'<p class="failed">{escape(line)}</p>' for line in failed),
        *pictures,
        "<h2>Figures</h2>",
        "<table><tr>" + "".join(f"<th>{escape(cell)}</th>" for cell in head) + "</tr>",
        *rows,
        "</table>",
        *(f"<p>{escape(line)}</p>" for line in notes),
        f"<footer>{FOOTER}</footer>",
        "</body></html>",
    ]
    return "\n".join(lines) + "\n"


def write(data: dict[str, Any], folder: Path) -> Path:
    """Writes speedup.png, ceiling.png and index.html, which holds both, and returns the last one's path.

    Raises:
        ImportError: without matplotlib; the message has the command that installs it.
    """
    require("matplotlib", "bench").use("Agg")
    folder.mkdir(parents=True, exist_ok=True)
    images = {}
    if data["results"]:
        for title, speedup in (("Speed-up", True), ("Share of the ceiling", False)):
            path = folder / f"{'speedup' if speedup else 'ceiling'}.png"
            _bars(data, path, speedup=speedup)
            images[title] = path.read_bytes()
    page = folder / "index.html"
    page.write_text(_page(data, images))
    return page


# The README


def markdown(data: dict[str, Any]) -> str:
    """A machine's results as a table: one line a case."""
    names = _contenders(data)[1:]
    head = ["op", "case", "fastllm, ms", "rate (of ceiling)", *(f"vs {name}" for name in names)]
    lines = [f"**{_machine(data)}**", "", f"| {' | '.join(head)} |", "|---|---|" + "---:|" * (len(head) - 2)]
    for result in data["results"]:
        figures, (rate, share) = result["contenders"]["fastllm"], achieved(data, result, "fastllm")
        cells = [f"`{result['op']}`", result["case"], f"{figures['median_ms']:.3f} ± {figures['noise']:.0%}"]
        cells[-1] += mark(figures)
        cells.append(f"{rate} ({share})")
        for name in names:
            if name in result["contenders"]:
                speedup = rates(result, name, data["ceilings"])["speedup"]
                cells.append(f"{speedup:.2f}x{mark(result['contenders'][name])}")
            else:
                cells.append("n/a")
        if (result["others"] or 0) > MUCH:
            cells[1] += " (disturbed)"
        lines.append(f"| {' | '.join(cells)} |")
    if any("(disturbed)" in line for line in lines):
        lines += ["", f"(disturbed): other processes took more than {MUCH:.0%} of the CPUs."]
    if any_host_bound(data):
        lines += ["", HOST_BOUND]
    for note in _not_timed(data):
        lines += ["", f"{note}."]
    return "\n".join([*lines, "", _facts(data)])


def readme_block(results: Path) -> str:
    """What stands between the markers: every measured machine, and what is not measured."""
    found = [load(path) for path in sorted(results.glob("*.json"))]
    found.sort(key=lambda data: data["machine"]["device"] != "cuda")
    parts = [markdown(data) for data in found]
    for device, name in (("cuda", "GPU"), ("cpu", "CPU")):
        if not any(data["machine"]["device"] == device for data in found):
            parts.append(f"{name}: not yet measured.")
    return "\n\n".join(parts)


def rewrite(text: str, block: str) -> str:
    """The text with `block` between the markers.

    Raises:
        ValueError: if the text does not have one of each marker, in order.
    """
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end or BEGIN in rest or END in after:
        raise ValueError(f"expected one {BEGIN} and one {END} after it")
    return f"{before}{BEGIN}\n{block}\n{END}{after}"


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command; returns 1 if `--check` finds the README out of date."""
    parser = argparse.ArgumentParser(prog="python -m fastllm.benchmarks.report", description="Draws benchmark results.")
    parser.add_argument("json", nargs="?", metavar="JSON", help="a file that `fastllm bench --json` wrote")
    parser.add_argument("--out", metavar="DIR", help="where the page of JSON goes")
    parser.add_argument(
        "--readme", metavar="FILE", help="rewrite the block between the markers from benchmarks/results"
    )
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if --readme would")
    args = parser.parse_args(argv)
    if bool(args.json) != bool(args.out) or not (args.json or args.readme):
        parser.error("give JSON with --out, or --readme")
    if args.json:
        print(write(load(Path(args.json)), Path(args.out)))
    if args.readme:
        path = Path(args.readme)
        before = path.read_text()
        after = rewrite(before, readme_block(RESULTS))
        if args.check and after != before:
            print(f"{path} is out of date: run python -m fastllm.benchmarks.report --readme {path}", file=sys.stderr)
            return 1
        if not args.check:
            path.write_text(after)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
