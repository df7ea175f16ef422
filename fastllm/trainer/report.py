"""`fastllm report`: training runs on one HTML page that needs nothing but a browser.

The page is whole without JavaScript, which only reads curves out under the mouse: which runs, which scale and which
theme are shown are matters of CSS.
"""

from __future__ import annotations

import argparse
import datetime
import itertools
import json
import math
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from html import escape
from pathlib import Path
from typing import Any

from fastllm._extras import require
from fastllm.trainer._charts import BUCKETS, SCRIPT, TITLES, Curve, chart, number, smooth, styles
from fastllm.trainer._files import reading, writing
from fastllm.trainer.checkpoint import list_checkpoints
from fastllm.trainer.log import read_metrics

MOST_CLASSES, MOST_STEPS, MOST_TEXT = 30, 20, 100_000

# What is in a run's folder


@dataclass
class _Run:
    path: Path
    name: str
    curves: dict[str, Curve] = field(default_factory=dict)
    config: dict[str, str] = field(default_factory=dict)
    samples: dict[int, str] = field(default_factory=dict)
    confusion: dict[str, Any] | None = None
    checkpoints: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)

    def read(self, path: Path, how: Callable[[Path], Any]) -> Any:
        """What `how` makes of a file; None, and a note, where it is missing or damaged."""
        try:
            with reading(path):
                return how(path)
        except FileNotFoundError:
            self.notes.append(f"there is no {path.name}")
        except (OSError, ValueError) as error:
            self.notes.append(" ".join(str(error).split()))
        return None


def _load(path: Path, name: str) -> _Run:
    run = _Run(path, name, checkpoints=list_checkpoints(path))
    files = [(re.fullmatch(r"step-(\d{1,15})\.txt", file.name), file) for file in path.glob("samples/*")]
    samples = {int(match[1]): file for match, file in files if match}
    known = ("metrics.csv", "config.yaml", "confusion.json")
    if not (run.checkpoints or samples or any((path / file).exists() for file in known)):
        raise ValueError(f"{path} is no run: it has no {', '.join(known)}, samples or checkpoints")
    _read_curves(run)
    if (path / "config.yaml").exists() or not run.checkpoints:
        config = run.read(path / "config.yaml", lambda p: _flat(_mapping(_yaml(p))))
    else:
        config = run.read(run.checkpoints[-1] / "config.json", lambda p: _flat(_mapping(_json(p))))
    run.config = config or {}
    texts = {step: run.read(samples[step], lambda p: p.read_text(encoding="utf-8")) for step in sorted(samples)}
    run.samples = {step: text for step, text in texts.items() if text is not None}
    if (path / "confusion.json").exists():
        run.confusion = run.read(path / "confusion.json", _confusion)
    return run


def _read_curves(run: _Run) -> None:
    rows = run.read(run.path / "metrics.csv", read_metrics)
    if rows is None:
        return
    if not (run.path / "metrics.csv").read_bytes().endswith(b"\n"):
        run.notes.append("metrics.csv ends within a line, which is left out")
    if not rows:
        run.notes.append("metrics.csv has no rows")
    for name in dict.fromkeys(name for row in rows for name in row if name != "step"):
        points = [(row["step"], row[name]) for row in rows if name in row]
        # Sums and differences of what is kept are finite, too.
        finite = [(s, v if abs(v) > 1e-300 else 0.0) for s, v in points if abs(s) < 1e15 and abs(v) < 1e300]
        if len(finite) < len(points):
            first = next(s for s, v in points if not (abs(s) < 1e15 and abs(v) < 1e300))
            run.notes.append(
                f"{name}: {len(points) - len(finite):,} of {len(points):,} values are not finite numbers, and left "
                f"out, the first at step {first:,.0f}"
            )
        if finite:
            finite.sort(key=lambda point: point[0])
            run.curves[name] = ([step for step, _ in finite], [value for _, value in finite])


def _yaml(path: Path) -> Any:
    return require("yaml", "train").safe_load(path.read_text(encoding="utf-8"))


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _mapping(value: Any) -> dict[Any, Any]:
    if not isinstance(value, dict):
        raise ValueError(f"expected names with values, found {type(value).__name__}")
    return value


def _flat(config: dict[Any, Any], prefix: str = "") -> dict[str, str]:
    """{"train": {"lr": 1}} as {"train.lr": "1"}."""
    flat = {}
    for key, value in config.items():
        if isinstance(value, dict):
            flat.update(_flat(value, f"{prefix}{key}."))
        else:
            flat[f"{prefix}{key}"] = json.dumps(value, default=str, ensure_ascii=False)
    return flat


def _confusion(path: Path) -> dict[str, Any]:
    found = _mapping(_json(path))
    labels, counts = [str(label) for label in found["labels"]], found["counts"]
    if not labels or [len(row) for row in counts] != [len(labels)] * len(labels):
        raise ValueError(f"counts are not {len(labels)} rows of {len(labels)}")
    for count in itertools.chain(*counts):
        if type(count) is not int or not 0 <= count < 10**15:
            raise ValueError(f"{count!r} is no count")
    return {"step": found.get("step"), "labels": labels, "counts": counts}


# The page


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Cells are text of any origin."""
    body = (
        f'<tr><th scope="row">{escape(str(row[0]))}</th>'
        + "".join(f"<td>{escape(str(cell))}</td>" for cell in row[1:])
        + "</tr>"
        for row in rows
    )
    columns = "".join(f'<th scope="col">{escape(name)}</th>' for name in head)
    return f'<div class="wide"><table><tr>{columns}</tr>\n' + "\n".join(body) + "</table></div>"


def _fold(summary: str, content: str, *, opened: bool = False) -> str:
    return f"<details{' open' * opened}><summary>{escape(summary)}</summary>{content}</details>"


def _curves(runs: Sequence[_Run]) -> str:
    found = {name: None for run in runs for name in run.curves}
    names = [*(name for name in TITLES if name in found), *(name for name in found if name not in TITLES)]
    steps = [step for run in runs for curve in run.curves.values() for step in (curve[0][0], curve[0][-1])]
    if not steps:
        return ""
    labels, first, last = [run.name for run in runs], min(steps), max(steps)
    first, last = (0.0 if 0 < first < 0.02 * last else first, last) if first < last else (first - 1, last + 1)
    charts = [
        chart(name, {r: run.curves[name] for r, run in enumerate(runs) if name in run.curves}, labels, first, last)
        for name in names
    ]
    data = f"[{','.join(points for _, points in charts)}]"
    return (
        f'<h2>Curves</h2><div class="charts">{"".join(figure for figure, _ in charts)}</div>'
        f'<script type="application/json" id="points">{data}</script>'
    )


def _legend(runs: Sequence[_Run]) -> str:
    entries = "".join(
        f'<label><input type="checkbox" id="run{r}" checked> <svg width="34" height="8" aria-hidden="true">'
        f'<path class="r{r} line" d="M0 4h34"/></svg> <span>{escape(run.name)}</span></label>\n'
        for r, run in enumerate(runs)
    )
    themes = "".join(
        f'<label><input type="radio" name="theme" id="{theme}"{" checked" * (theme == "auto")}> {theme}</label>'
        for theme in ("auto", "light", "dark")
    )
    log = '<label><input type="checkbox" id="log"> logarithmic losses and norms</label>'
    themes = f'<span class="theme" role="radiogroup" aria-label="theme">{themes}</span>'
    return f'<form class="legend">{entries}{log}{themes}</form>'


def _extreme(curve: Curve | None, pick: Callable) -> str:
    """The lowest or highest value, for `pick` min or max, and its step."""
    if curve is None:
        return "-"
    value, step = pick(zip(curve[1], curve[0], strict=True))
    return f"{number(value)} (step {step:,.0f})"


def _quartiles(values: Sequence[float]) -> list[str]:
    found = statistics.quantiles(values, method="inclusive") if len(values) > 1 else [*values] * 3
    return [number(value) for value in found] or ["-"] * 3


def _summary(runs: Sequence[_Run]) -> str:
    head = [
        "run",
        "last step",
        "loss at the end, smoothed",
        "lowest validation loss",
        "highest accuracy",
        "MFU, median",
    ]
    head += [
        "tokens/s, lower quartile",
        "tokens/s, median",
        "tokens/s, upper quartile",
        "tokens, about",
        "time in steps, about",
    ]
    rows, numbers = [], []
    for run in runs:
        curves = run.curves
        speeds = curves.get("tokens_per_second", ([], []))[1]
        sizes = [run.config.get(key, "") for key in ("train.batch_size", "train.accumulate", "model.context")]
        tokens = math.prod(map(int, sizes)) if all(size.isdigit() and len(size) < 10 for size in sizes) else 0
        seconds = sum(tokens / speed for speed in speeds) if speeds and min(speeds) > 0 else 0.0
        counted = 0 < seconds < 1e12
        rows.append(
            (
                run.name,
                f"{max(steps[-1] for steps, _ in curves.values()):,.0f}" if curves else "-",
                number(smooth(curves["loss"][1])[-1]) if "loss" in curves else "-",
                _extreme(curves.get("validation_loss"), min),
                _extreme(curves.get("accuracy"), max),
                f"{statistics.median(curves['mfu'][1]):.1%}" if "mfu" in curves else "-",
                *_quartiles(speeds),
                f"{tokens * len(speeds):,}" if counted else "-",
                datetime.timedelta(seconds=round(seconds)) if counted else "-",
            )
        )
        for name, curve in curves.items():
            values = curve[1]
            row = [run.name, TITLES.get(name, name), f"{len(values):,}", number(values[-1])]
            numbers.append([*row, _extreme(curve, min), _extreme(curve, max), *_quartiles(values)])
    every = ["run", "column", "values", "last", "lowest", "highest", "lower quartile", "median", "upper quartile"]
    return f"<h2>Summary</h2>{_table(head, rows)}{_fold('All numbers', _table(every, numbers))}"


def _configs(runs: Sequence[_Run]) -> str:
    runs = [run for run in runs if run.config]
    if not runs:
        return ""
    rows = [
        [key, *(run.config.get(key, "-") for run in runs)]
        for key in dict.fromkeys(key for run in runs for key in run.config)
    ]
    head = ["setting", *(run.name for run in runs)]
    differing = [row for row in rows if len(set(row[1:])) > 1]
    said = _table(head, differing) if differing else "<p>No setting differs.</p>" * (len(runs) > 1)
    return f'<h2>Settings</h2><div class="settings">{said}{_fold("All settings", _table(head, rows))}</div>'


def _checkpoints(runs: Sequence[_Run]) -> str:
    rows = []
    for run in runs:
        losses = dict(zip(*run.curves.get("validation_loss", ([], [])), strict=True))
        steps = {path.name: int(path.name.rpartition("-")[2]) for path in run.checkpoints}
        best = min((losses[step] for step in steps.values() if step in losses), default=None)
        for name, step in steps.items():
            loss = losses.get(step)
            mark = " ★ best" if loss is not None and loss == best else ""
            rows.append((run.name, name, f"{step:,}", number(loss) + mark))
    return f"<h2>Checkpoints</h2>{_table(('run', 'checkpoint', 'step', 'validation loss'), rows)}" if rows else ""


def _matrix(run: _Run) -> str:
    assert run.confusion is not None
    labels, counts = run.confusion["labels"], run.confusion["counts"]
    true, predicted = [sum(row) for row in counts], [sum(column) for column in zip(*counts, strict=True)]
    right, total = [counts[i][i] for i in range(len(labels))], sum(true)

    def share(part: float, whole: float) -> str:
        return f"{part / whole:.3f}" if whole else "-"

    each = [
        (label, share(hit, p), share(hit, t), share(2 * hit, p + t), f"{t:,}")
        for label, hit, p, t in zip(labels, right, predicted, true, strict=True)
    ]
    scores = [2 * hit / (p + t) for hit, p, t in zip(right, predicted, true, strict=True) if p + t]
    macro = share(sum(scores), len(scores))
    step = "" if run.confusion["step"] is None else f", step {run.confusion['step']}"
    parts = [f"<h3>{escape(run.name + step)}</h3>"]
    parts.append(f"<p>Accuracy {share(sum(right), total)} of {total:,}, macro F1 {macro}.</p>")
    if len(labels) <= MOST_CLASSES:
        head = "".join(f'<th scope="col">{escape(label)}</th>' for label in labels)
        body = ""
        for label, row, t in zip(labels, counts, true, strict=True):
            cells = "".join(f'<td style="--s:{n / t:.2f}">{n:,}</td>' if n else "<td>0</td>" for n in row)
            body += f'<tr><th scope="row">{escape(label)}</th>{cells}</tr>\n'
        corner = '<th scope="col">true ↓ predicted →</th>'
        parts.append(f'<div class="wide"><table class="matrix"><tr>{corner}{head}</tr>\n{body}</table></div>')
    else:
        wrong = [(n, i, j) for i, row in enumerate(counts) for j, n in enumerate(row) if n and i != j]
        most = [(labels[i], labels[j], f"{n:,}") for n, i, j in sorted(wrong, reverse=True)[:MOST_CLASSES]]
        parts.append(
            f"<p>A matrix of {len(labels)} classes is not shown; the {len(most)} most frequent errors are:</p>"
        )
        parts.append(_table(("true", "predicted", "count"), most))
    parts.append(_table(("class", "precision", "recall", "F1", "count"), each))
    return f'{"".join(parts[:2])}<div class="pair">{"".join(parts[2:])}</div>'


def _samples(runs: Sequence[_Run]) -> str:
    steps = sorted({step for run in runs for step in run.samples})
    if not steps:
        return ""
    shown = sorted({steps[round(i * (len(steps) - 1) / (MOST_STEPS - 1))] for i in range(MOST_STEPS)})  # all, if few
    texts = [(step, run.name, run.samples[step]) for step in shown for run in runs if step in run.samples]
    most = MOST_TEXT // len(texts)
    parts = ["<h2>Samples</h2>"]
    if len(shown) < len(steps):
        parts.append(f"<p>Of {len(shown)} of {len(steps)} steps.</p>")
    for step, group in itertools.groupby(texts, key=lambda text: text[0]):
        content = ""
        for _, name, text in group:
            cut = f"<p>{len(text) - most:,} more characters are in the file.</p>" if len(text) > most else ""
            content += f"<h3>{escape(name)}</h3><pre>{escape(text[:most])}</pre>{cut}"
        parts.append(_fold(f"step {step:,}", content, opened=step == shown[-1]))
    return "".join(parts)


LIGHT = "--ink:#1c2430;--soft:#5b6673;--line:#e3e6ea;--ground:#fff;--mark:#8ec1ea;--bad:#b3261e;color-scheme:light"
DARK = "--ink:#e4e8ee;--soft:#9aa5b3;--line:#2c3440;--ground:#14181f;--mark:#1f6fae;--bad:#ff8a80;color-scheme:dark"
STYLE = f"""
:root {{ {LIGHT} }}
@media (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
:root:has(#light:checked) {{ {LIGHT} }}
:root:has(#dark:checked) {{ {DARK} }}
body {{ font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 72em; padding: 0 1em; color: var(--ink);
  background: var(--ground); }}
h1, h3, .legend span, li {{ overflow-wrap: anywhere; }}
table {{ border-collapse: collapse; margin: .6em 0; font-variant-numeric: tabular-nums; }}
th, td {{ font-size: 14px; text-align: right; padding: .25em .6em; border-bottom: 1px solid var(--line);
  vertical-align: top; }}
td {{ white-space: nowrap; }}
tr > :first-child {{ text-align: left; min-width: 7em; }} th {{ word-break: keep-all; }}
th, .settings td {{ max-width: 24em; white-space: normal; overflow-wrap: break-word; }}
.wide {{ overflow-x: auto; }} .pair {{ display: flex; flex-wrap: wrap; gap: 0 3em; }}
.matrix td {{ background: color-mix(in srgb, var(--mark) calc(var(--s, 0) * 100%), transparent); }}
pre {{ white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--line);
  padding-left: .8em; margin: 0; }}
summary {{ cursor: pointer; }}
.failed {{ color: var(--bad); }} footer {{ color: var(--soft); margin-top: 2em; }}
.legend {{ position: sticky; top: 0; z-index: 2; display: flex; flex-wrap: wrap; gap: .2em 1.2em; padding: .5em 0;
  background: var(--ground); border-bottom: 1px solid var(--line); max-height: 30vh; overflow-y: auto; }}
.theme {{ margin-left: auto; }} .theme label {{ margin-left: .6em; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 28em), 1fr)); gap: 1em 2em; }}
figure {{ margin: 0; position: relative; }} figcaption {{ font-weight: 600; }}
figure svg {{ width: 100%; display: block; touch-action: pan-y; }}
svg text {{ font-size: 11px; fill: var(--soft); text-anchor: end; }} svg text.step {{ text-anchor: middle; }}
path {{ fill: none; vector-effect: non-scaling-stroke; stroke-linejoin: round; }}
.grid {{ stroke: var(--line); }} .cursor {{ stroke: var(--soft); }}
.line {{ stroke-width: 2; }} .raw {{ stroke-width: 1; opacity: .35; }}
.dot {{ stroke-width: 6; stroke-linecap: round; }}
.tip {{ position: absolute; top: 2.4em; max-width: 60%; padding: .2em .6em; font-size: 13px; pointer-events: none;
  background: var(--ground); border: 1px solid var(--line); border-radius: 4px; overflow-wrap: anywhere; }}
.tip svg {{ display: inline-block; width: 24px; height: 8px; }}
.log, :root:has(#log:checked) .linear {{ display: none; }} :root:has(#log:checked) .log {{ display: inline; }}
"""

FOOTER = f"""Colours are those of Okabe and Ito (2008), which colour-blind people can tell apart; line styles differ,
too. Faint lines are what was logged, bold ones its exponential moving average over a fiftieth of the curve. Of a curve
of more than {2 * BUCKETS} points both ends are drawn, and the lowest and the highest point of each of {BUCKETS} ranges
of steps. Tokens are batch_size * accumulate * context a step, as on one device; time is that of steps alone, without
validation and checkpoints."""


def _page(runs: Sequence[_Run]) -> str:
    title = f"Training runs: {', '.join(run.name for run in runs)}"
    said: dict[str, list[str]] = {}
    for run in runs:
        for note in run.notes:
            said.setdefault(note, []).append(run.name)
    lines = [f"{', '.join(names)}: {note}" for note, names in said.items()]
    notes = "".join(f'<li class="failed">{escape(line)}</li>' for line in lines)
    matrices = "".join(_matrix(run) for run in runs if run.confusion)
    return "\n".join(
        (
            '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">',
            f'<meta name="viewport" content="width=device-width, initial-scale=1"><title>{escape(title)}</title>',
            f"<style>{STYLE}{styles(len(runs))}</style></head><body>",
            "<h1>Training runs</h1>",
            f"<ul>{notes}</ul>" if notes else "",
            _legend(runs),
            _curves(runs),
            _summary(runs),
            _configs(runs),
            _checkpoints(runs),
            f"<h2>Confusion</h2>{matrices}" if matrices else "",
            _samples(runs),
            f"<footer>{FOOTER}</footer>",
            f"<script>{SCRIPT}</script></body></html>\n",
        )
    )


def make_report(runs: Sequence[Path], out: Path) -> Path:
    """Writes one HTML page of several runs to `out`, in place of what is there, and returns its path.

    What is missing or damaged in a run's folder is said on the page.

    Args:
        runs: their folders, as `Trainer` fills them.
        out: file; its folder is made where there is none.

    Raises:
        ImportError: without PyYAML.
        OSError: for a folder that cannot be read, and for what the disk says of `out`.
        ValueError: for no run, for a folder that has nothing of one, and for one that is given twice.
    """
    if not runs:
        raise ValueError("a report needs at least one run")
    paths = [Path(run).resolve() for run in runs]
    for given, path in zip(runs, paths, strict=True):
        if paths.count(path) > 1:
            raise ValueError(f"{given} is given twice")
        next(path.iterdir(), None)  # an error where it is no folder
    names = [path.name for path in paths]
    found = [
        _load(path, name if names.count(name) == 1 else str(given))
        for given, path, name in zip(runs, paths, names, strict=True)
    ]
    text = _page(found)
    with writing(out):
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(text, encoding="utf-8", errors="backslashreplace")
    return out


def add_parser(commands: Any) -> None:
    """Adds `report` to the subparsers of a command line."""
    parser: argparse.ArgumentParser = commands.add_parser("report", help="curves and figures of runs as an HTML page")
    parser.add_argument("runs", nargs="+", metavar="RUN", help="the folder of a run (--out of fastllm train)")
    parser.add_argument("--out", default="report.html", metavar="FILE", help="default %(default)s")


def run(args: argparse.Namespace) -> int:
    """Runs the command of `add_parser`."""
    for name, value in (("RUN", "" if "" in args.runs else " "), ("--out", args.out)):
        if not value:
            raise ValueError(f"{name} must not be empty")
    print(make_report([Path(path) for path in args.runs], Path(args.out)))
    return 0
