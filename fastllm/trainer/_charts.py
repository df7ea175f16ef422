"""Curves as inline SVG, for `fastllm report`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from html import escape

TITLES = {
    "loss": "Loss",
    "validation_loss": "Validation loss",
    "accuracy": "Accuracy",
    "learning_rate": "Learning rate",
    "grad_norm": "Gradient norm",
    "tokens_per_second": "Tokens a second",
    "mfu": "MFU",
    "data_wait": "Wait for data",
}
SMOOTHED = {"loss", "grad_norm", "tokens_per_second", "mfu", "data_wait"}
LOGARITHMIC = {"loss", "validation_loss", "grad_norm"}
COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Of Okabe and Ito (2008), without black and yellow."""
DASHES = ("none", "7 3", "2 3", "10 3 2 3", "14 4")
WIDTH, HEIGHT = 480, 240
LEFT, RIGHT, TOP, BOTTOM = 62, WIDTH - 16, 10, HEIGHT - 24
BUCKETS = 200

Curve = tuple[list[float], list[float]]
"""Steps, ascending, and values."""


def thin(steps: Sequence[float], values: Sequence[float], buckets: int = BUCKETS) -> list[int]:
    """Indices of the points to draw: both ends, and the lowest and highest of each of `buckets` ranges of steps.

    Whatever stands out of a long curve is still there at its step. A short one is kept whole.
    """
    if len(steps) <= 2 * buckets:
        return list(range(len(steps)))
    width = (steps[-1] - steps[0]) / buckets or 1.0
    kept = {0, len(steps) - 1}
    for _, group in itertools.groupby(range(len(steps)), key=lambda i: (steps[i] - steps[0]) // width):
        indices = list(group)
        kept |= {min(indices, key=values.__getitem__), max(indices, key=values.__getitem__)}
    return sorted(kept)


def smooth(values: Sequence[float]) -> list[float]:
    """The exponential moving average over a fiftieth of the curve, each value's weights summing to 1."""
    keep = 1 - 2 / (max(1, len(values) // 50) + 1)
    total = weight = 0.0
    result = []
    for value in values:
        total, weight = keep * total + (1 - keep) * value, keep * weight + (1 - keep)
        result.append(total / weight)
    return result


def _ticks(low: float, high: float, count: int) -> list[float]:
    power = 10.0 ** math.floor(math.log10((high - low) / count))
    step = next(m * power for m in (1, 2, 5, 10, 20) if m * power * count >= high - low)
    return [n * step for n in range(math.ceil(low / step), math.floor(high / step) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    powers = range(math.floor(math.log10(low)), math.floor(math.log10(high)) + 1)
    for multiples in ((1, 2, 3, 4, 5, 6, 8), (1, 2, 5), (1, 3), (1,)):
        found = [m * 10.0**p for p in powers for m in multiples if low <= m * 10.0**p <= high]
        if len(found) <= 7:
            break
    found = found[:: len(found) // 8 + 1]
    return found if len(found) > 2 else _ticks(low, high, 4)


def _labels(ticks: Sequence[float]) -> list[str]:
    largest = max(map(abs, ticks), default=0.0)
    units = ((1e9, "G"), (1e6, "M"), (1e3, "k"))
    size, unit = next((pair for pair in units if max(pair[0], 1e4) <= largest < 1e13), (1.0, ""))
    return [f"{tick / size:.6g}{unit}" if tick else "0" for tick in ticks]


def number(value: float | None) -> str:
    """For people to read."""
    if value is None:
        return "-"
    return f"{value:,.0f}" if 1e4 <= abs(value) < 1e15 else f"{value:.4g}"


def _path(points: Iterable[tuple[float, float]]) -> str:
    tenths = [(round(10 * x), round(10 * y)) for x, y in points]  # short to write; the group they are in is scaled
    moves = " ".join(f"{x - x0} {y - y0}" for (x0, y0), (x, y) in itertools.pairwise(tenths))
    return f"M{tenths[0][0]} {tenths[0][1]}l{moves or '0 0'}".replace(" -", "-")


def _axes(curves: Iterable[Curve], first: float, last: float, log: bool) -> tuple[str, Callable, Callable]:
    """The grid of a chart, and where a step and a value are in it."""
    values = [value for _, values in curves for value in values]
    forward, back = (math.log10, lambda y: 10.0 ** min(max(y, -307.0), 307.0)) if log else (float, float)
    low, high = forward(min(values)), forward(max(values))
    margin = 0.04 * (high - low)
    if high - low <= 1e-9 * max(abs(low), abs(high)):  # one value, in the middle
        margin = 0.3 if log else 0.05 * abs(high) or 1.0
    low, high = low - margin, high + margin

    def x(step: float) -> float:
        return LEFT + (step - first) / (last - first) * (RIGHT - LEFT)

    def y(value: float) -> float:
        return BOTTOM - (forward(value) - low) / (high - low) * (BOTTOM - TOP)

    ticks = _log_ticks(back(low), back(high)) if log else _ticks(low, high, 5)
    steps = [step for step in _ticks(first, last, 5) if step == int(step)]
    lines = "".join(f"M{LEFT} {y(tick):.1f}H{RIGHT}" for tick in ticks)
    texts = [
        f'<text x="{LEFT - 6}" y="{y(t) + 4:.1f}">{label}</text>'
        for t, label in zip(ticks, _labels(ticks), strict=True)
    ]
    texts += [
        f'<text class="step" x="{x(step):.1f}" y="{HEIGHT - 6}">{label}</text>'
        for step, label in zip(steps, _labels(steps), strict=True)
    ]
    return f'<path class="grid" d="{lines}M{LEFT} {BOTTOM}H{RIGHT}"/>{"".join(texts)}', x, y


def chart(name: str, curves: dict[int, Curve], runs: Sequence[str], first: float, last: float) -> tuple[str, str]:
    """A figure of one column, and its points for the read-out.

    Args:
        name: of the column.
        curves: those of the runs that have the column, by their numbers.
        runs: names of all.
        first, last: steps at the ends of the axis.

    Returns:
        (HTML, JSON): the latter has a run's steps, values and, if there are any, averages, or null for no curve.
    """
    averages = {r: smooth(values) for r, (_, values) in curves.items() if name in SMOOTHED and len(values) >= 100}
    kept = {r: thin(*curve) for r, curve in curves.items()}
    scales = [False, True] if name in LOGARITHMIC and all(min(v) > 0 for _, v in curves.values()) else [False]
    groups = []
    for log in scales:
        grid, x, y = _axes(curves.values(), first, last, log)
        faint = bold = ""
        for r, (steps, values) in curves.items():
            path = _path((x(steps[i]), y(values[i])) for i in kept[r])
            if r in averages:
                faint += f'<path class="r{r} raw" d="{path}"/>'
                path = _path((x(steps[i]), y(averages[r][i])) for i in thin(steps, averages[r]))
            bold += f'<path class="r{r} line" d="{path}"/>'
            if len(steps) <= 40:
                dots = "".join(
                    f"M{10 * x(step):.0f} {10 * y(value):.0f}h0" for step, value in zip(steps, values, strict=True)
                )
                bold += f'<path class="r{r} dot" d="{dots}"/>'
        kind = "" if len(scales) == 1 else f' class="{"log" if log else "linear"}"'
        groups.append(f'<g{kind}>{grid}<g transform="scale(.1)">{faint}{bold}</g></g>')
    said, points = [], []
    for r, run in enumerate(runs):
        if r not in curves:
            points.append("null")
            continue
        steps, values = curves[r]
        ends = f"{number(values[0])} at step {steps[0]:,.0f}, {number(values[-1])} at step {steps[-1]:,.0f}"
        said.append(f"{run}: {ends}, lowest {number(min(values))}, highest {number(max(values))}")
        columns = [[f"{steps[i]:.0f}" for i in kept[r]], [f"{values[i]:.5g}" for i in kept[r]]]
        if r in averages:
            columns.append([f"{averages[r][i]:.4g}" for i in kept[r]])
        points.append(f"[{','.join('[' + ','.join(column) + ']' for column in columns)}]")
    title = escape(TITLES.get(name, name))
    figure = (
        f'<figure><figcaption>{title}</figcaption><svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" '
        f'data-from="{first}" data-to="{last}"><title>{title} by step</title><desc>{escape("; ".join(said))}</desc>'
        f'{"".join(groups)}<path class="cursor" d=""/></svg><div class="tip" hidden></div></figure>'
    )
    return figure, f"[{','.join(points)}]"


def styles(runs: int) -> str:
    """CSS by which runs are told apart, and hidden."""
    return "".join(
        f".r{r} {{ stroke: {COLORS[r % len(COLORS)]}; }} .r{r}.line {{ stroke-dasharray: {DASHES[r % len(DASHES)]}; }} "
        f":root:has(#run{r}:not(:checked)) figure .r{r} {{ display: none; }}\n"
        for r in range(runs)
    )


SCRIPT = f"""
const points = JSON.parse(document.getElementById("points")?.textContent ?? "[]");
const labels = [...document.querySelectorAll(".legend > label:has(span)")];
document.querySelectorAll("figure").forEach((figure, number) => {{
  const svg = figure.querySelector("svg"), tip = figure.querySelector(".tip"), cursor = figure.querySelector(".cursor");
  const from = +svg.dataset.from, to = +svg.dataset.to;
  svg.addEventListener("pointermove", event => {{
    const box = svg.getBoundingClientRect(), x = (event.clientX - box.left) / box.width * {WIDTH};
    const step = from + (x - {LEFT}) / {RIGHT - LEFT} * (to - from);
    tip.replaceChildren();
    points[number].forEach((curve, run) => {{
      if (!curve || !labels[run].querySelector("input").checked) return;
      const [steps, values, smooth] = curve;
      let i = 0;
      steps.forEach((other, j) => {{ if (Math.abs(other - step) < Math.abs(steps[i] - step)) i = j; }});
      const line = document.createElement("div"), name = labels[run].querySelector("span").textContent;
      const average = smooth ? ` (smoothed ${{smooth[i].toLocaleString("en", {{maximumSignificantDigits: 4}})}})` : "";
      const value = values[i].toLocaleString("en", {{maximumSignificantDigits: 5}});
      line.append(labels[run].querySelector("svg").cloneNode(true), ` ${{name}}: ${{value}}${{average}}`);
      line.append(` at step ${{steps[i].toLocaleString("en")}}`);
      tip.append(line);
    }});
    const at = Math.min(Math.max(x, {LEFT}), {RIGHT});
    cursor.setAttribute("d", `M${{at}} {TOP}V{BOTTOM}`);
    tip.hidden = false;
    Object.assign(tip.style, x > {WIDTH / 2} ? {{left: "12%", right: "auto"}} : {{left: "auto", right: "3%"}});
  }});
  svg.addEventListener("pointerleave", () => {{ tip.hidden = true; cursor.setAttribute("d", ""); }});
}});
"""
