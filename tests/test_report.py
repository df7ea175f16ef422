"""The page that `fastllm report` makes of runs."""

from __future__ import annotations

import json
import math
import random
import re
import xml.etree.ElementTree as ElementTree
from html.parser import HTMLParser
from pathlib import Path

import pytest

from fastllm import cli
from fastllm.trainer._charts import smooth, thin
from fastllm.trainer.log import COLUMNS
from fastllm.trainer.report import make_report

pytest.importorskip("yaml")
LABELS = ["体育", "财经", "房产", "家居", "教育", "科技", "时尚", "时政", "游戏", "娱乐"]


def write_metrics(folder: Path, rows: list[dict[str, float]], columns=COLUMNS) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [",".join(columns), *(",".join(str(row.get(name, "")) for name in columns) for row in rows)]
    (folder / "metrics.csv").write_text("\n".join(lines) + "\n", encoding="utf-8")


def rows_of(steps: int, seed: int = 0, peak: float = 1e-3) -> list[dict[str, float]]:
    """A run's: a loss that falls with noise and jumps at step 0.6 * steps."""
    noise = random.Random(seed)
    rows = []
    for step in range(1, steps + 1):
        loss = 2 + seed / 5 + 8 * math.exp(-step / (0.05 * steps)) + 0.15 * noise.gauss(0, 1)
        spike = 6 * math.exp(-((step - 0.6 * steps) ** 2) / 20) if seed == 1 else 0
        row = {
            "step": step,
            "loss": loss + spike,
            "learning_rate": peak * min(step / (0.1 * steps), 0.55 + 0.45 * math.cos(math.pi * step / steps)),
            "grad_norm": 0.4 * math.exp(0.3 * noise.gauss(0, 1)) + 5 * spike + 4 / step,
            "tokens_per_second": 1.2e6 * (1 + seed / 10) * (1 - 0.02 * abs(noise.gauss(0, 1))),
            "mfu": 0.41 * (1 - 0.02 * abs(noise.gauss(0, 1))),
            "data_wait": 2e-4 * abs(noise.gauss(0, 1)),
        }
        if step % max(1, steps // 20) == 0:
            row |= {"validation_loss": loss + 0.1, "accuracy": 0.9 * (1 - math.exp(-3 * step / steps))}
        rows.append(row)
    return rows


def write_run(folder: Path, steps: int = 2000, seed: int = 0) -> Path:
    lr = 1e-3 * (1 + seed)
    write_metrics(folder, rows_of(steps, seed, lr))
    config = f"train: {{batch_size: 16, accumulate: 2, lr: {lr}}}\nmodel: {{context: 128}}\ndata: {{text: [a.txt]}}\n"
    (folder / "config.yaml").write_text(config, encoding="utf-8")
    (folder / "samples").mkdir()
    for step in (0, steps // 2, steps):
        text = f"<b>Once</b> upon a time & step {step}\n从前有座山\n"
        (folder / f"samples/step-{step}.txt").write_text(text, encoding="utf-8")
        (folder / f"checkpoint-{step}").mkdir()
    noise = random.Random(seed)
    counts = [[noise.randrange(400, 900) if i == j else noise.randrange(40) for j in range(10)] for i in range(10)]
    confusion = {"step": steps, "labels": LABELS, "counts": counts}
    (folder / "confusion.json").write_text(json.dumps(confusion), encoding="utf-8")
    return folder


class Page(HTMLParser):
    """What a browser would make of it: tags in order, the text of cells by row, all text."""

    def __init__(self, path: Path):
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.tags, self.open, self.rows, self.text = [], [], [], ""
        self.feed(self.source)
        assert not self.open, "tags that are not closed"

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag not in ("meta", "input"):
            self.open.append(tag)
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data
        if self.open and self.open[-1] in ("td", "th"):
            self.rows[-1][-1] += data

    def row(self, *start: str) -> list[str]:
        (found,) = (row for row in self.rows if tuple(row[: len(start)]) == start)
        return found


def report(*runs: Path) -> Page:
    return Page(make_report(runs, runs[0].parent / "out/report.html"))


@pytest.fixture(scope="module")
def two(tmp_path_factory) -> Page:
    folder = tmp_path_factory.mktemp("runs")
    return report(write_run(folder / "a"), write_run(folder / "b", seed=1))


def test_every_column_has_a_chart_of_every_run(two):
    titles = re.findall("<figcaption>(.*?)</figcaption>", two.source)
    assert titles[:3] == ["Loss", "Validation loss", "Accuracy"]
    assert len(titles) == len(COLUMNS) - 2  # but for the step, and for skipped, which these runs have not
    for svg in re.findall("<svg viewBox.*?</svg>", two.source, re.S):
        root = ElementTree.fromstring(svg)
        for r in (0, 1):
            drawn = [path.get("d") for path in root.iter("path") if path.get("class") == f"r{r} line"]
            assert drawn
            assert all(re.fullmatch(r"M\d+ \d+l(-?\d+ ?)+", d.replace("-", " -").replace("l -", "l-")) for d in drawn)
        assert root[0].tag == "title"
        assert "a: " in root.find("desc").text
        assert "b: " in root.find("desc").text
        for text in root.iter("text"):
            assert 0 <= float(text.get("x")) <= 480
            assert 0 <= float(text.get("y")) <= 240


def test_axes_have_round_numbers(two):
    texts = re.findall("<text.*?>(.*?)</text>", two.source)
    assert {"0", "500", "1000", "2000", "0.001", "1.2M", "1.3M", "10"} <= set(texts)


def test_it_needs_nothing_else(two):
    assert not re.search(r"https?://|@import|url\(", two.source)
    assert not any({"src", "href"} & set(attributes) for _, attributes in two.tags)


def test_summary(two):
    rows = rows_of(2000, 1, 2e-3)
    cells = two.row("b", "2,000")
    low = min((row["validation_loss"], row["step"]) for row in rows if "validation_loss" in row)
    assert cells[3] == f"{low[0]:.4g} (step {low[1]:,})"
    assert cells[4].endswith("(step 2,000)")
    speeds = sorted(row["tokens_per_second"] for row in rows)
    assert cells[7] == f"{(speeds[999] + speeds[1000]) / 2:,.0f}"
    assert cells[9] == f"{16 * 2 * 128 * 2000:,}"
    assert cells[10] == f"0:00:{sum(4096 / speed for speed in speeds):02.0f}"
    assert two.row("a", "Loss")[2] == "2,000"
    assert two.row("a", "Validation loss")[2] == "20"


def test_only_settings_that_differ_are_in_the_first_table(two):
    settings = [row for row in two.rows if row[0].startswith(("train.", "model.", "data."))]
    assert settings[0] == ["train.lr", "0.001", "0.002"]
    assert settings[1] == ["train.batch_size", "16", "16"]
    assert ["data.text", '["a.txt"]', '["a.txt"]'] in settings


def test_checkpoints(two):
    assert two.row("a", "checkpoint-0")[2:] == ["0", "-"]
    best = [row[1] for row in two.rows if row[-1].endswith("★ best")]
    losses = {row["step"]: row.get("validation_loss") for row in rows_of(2000)}
    assert best[0] == ("checkpoint-1000" if losses[1000] < losses[2000] else "checkpoint-2000")
    assert len(best) == 2


def test_samples_are_escaped(two):
    assert "<b>Once</b> upon a time & step 1000\n从前有座山" in two.text
    assert "b" not in [tag for tag, _ in two.tags]


def test_of_many_samples_some_are_shown(tmp_path):
    run = write_run(tmp_path / "run", steps=100)
    for step in range(0, 101, 4):
        (run / f"samples/step-{step}.txt").write_text(f"sample {step}." + "x" * 10_000, encoding="utf-8")
    page = report(run)
    assert "Of 20 of 27 steps." in page.text  # 26, and step 50
    assert "sample 0." in page.text
    assert "sample 100." in page.text
    assert f"{10_000 + len('sample 100.') - 5_000:,} more characters are in the file." in page.text
    assert page.text.count("x" * 4_900) == 20


def write_confusion(folder: Path, labels, counts) -> Path:
    write_metrics(folder, rows_of(3))
    (folder / "confusion.json").write_text(json.dumps({"step": 7, "labels": labels, "counts": counts}), "utf-8")
    return folder


def test_confusion(tmp_path):
    page = report(write_confusion(tmp_path / "run", ["猫", "<i>", "none"], [[3, 1, 0], [2, 4, 0], [0, 0, 0]]))
    assert "Accuracy 0.700 of 10, macro F1 0.697." in page.text
    matrix, each = (index for index, row in enumerate(page.rows) if "猫" in row[0])
    assert page.rows[matrix : matrix + 3] == [["猫", "3", "1", "0"], ["<i>", "2", "4", "0"], ["none", "0", "0", "0"]]
    assert page.rows[each] == ["猫", "0.600", "0.750", "0.667", "4"]
    assert page.rows[each + 1] == ["<i>", "0.800", "0.667", "0.727", "6"]
    assert page.rows[each + 2] == ["none", "-", "-", "-", "0"]


def test_of_many_classes_the_errors_are_listed(tmp_path):
    counts = [[9 if i == j else 5 * (i == 30 and j == 2) for j in range(31)] for i in range(31)]
    page = report(write_confusion(tmp_path / "run", [f"c{i}" for i in range(31)], counts))
    assert page.row("c30", "c2") == ["c30", "c2", "5"]
    assert not any(attributes.get("class") == "matrix" for _, attributes in page.tags)


def test_thin_keeps_what_stands_out():
    steps = list(range(1, 10_001))
    values = [math.sin(step / 500) for step in steps]
    values[7_654], values[321] = 40.0, -40.0
    kept = thin(steps, values)
    assert {0, 321, 7_654, 9_999} <= set(kept)
    assert kept == sorted(kept)
    assert len(kept) <= 402
    assert thin(steps[:400], values) == list(range(400))
    assert thin([5.0] * 500, values) == [0, 321, 499]  # all at one step, of which 40.0 is not among


def test_smooth():
    assert smooth([3.0] * 777) == pytest.approx([3.0] * 777)
    assert smooth([1.0, 5.0, 2.0]) == [1.0, 5.0, 2.0]
    ramp = smooth([float(i) for i in range(1000)])
    assert ramp[0] == 0
    assert ramp[-1] == pytest.approx(999 - 9.5, abs=0.01)  # weights of 2 / 21 lag by (1 - 2 / 21) / (2 / 21) steps


def test_names_of_files_and_columns_are_text(tmp_path):
    name = "<script>alert('1')<"  # a name may not have a slash
    write_metrics(tmp_path / name, [{"step": 1, "<u>&": 2.0}], ("step", "<u>&"))
    (tmp_path / name / "config.yaml").write_text("'</script><u>': '<u>'", encoding="utf-8")
    confusion = {"step": "<u>", "labels": ["<u>"], "counts": [[1]]}
    (tmp_path / name / "confusion.json").write_text(json.dumps(confusion), encoding="utf-8")
    (tmp_path / name / "samples").mkdir()
    (tmp_path / name / "samples/step-1.txt").write_text("</pre><u>", encoding="utf-8")
    page = report(tmp_path / name)
    assert [tag for tag, _ in page.tags].count("script") == 2  # our own
    assert "u" not in [tag for tag, _ in page.tags]
    assert name in page.text
    assert "<u>& by step" in page.text


def test_values_that_are_no_numbers_are_left_out_and_said(tmp_path):
    rows = rows_of(10)
    for step, value in ((4, math.nan), (5, math.inf), (6, -math.inf), (7, 1e305), (8, 1e-320)):
        rows[step - 1]["loss"] = value
    write_metrics(tmp_path / "run", rows)
    page = report(tmp_path / "run")
    assert "run: loss: 4 of 10 values are not finite numbers, and left out, the first at step 4" in page.text
    assert not re.search(r"\b(nan|inf)\b", page.source, re.I)
    assert page.row("run", "Loss")[4] == "0 (step 8)"


@pytest.mark.parametrize("value", [0.0, -3.0, 1e-200, 5e299, 1e12])
def test_curves_of_one_value(value, tmp_path):
    write_metrics(tmp_path / "one", [{"step": 7, "loss": value, "mfu": 0.5}])
    write_metrics(tmp_path / "flat", [{"step": step, "loss": value} for step in range(500)])
    for runs in (["one"], ["flat"], ["one", "flat"]):
        page = report(*(tmp_path / run for run in runs))
        assert all(-1 < float(d) < 4801 for d in re.findall(r'd="M(\d+) \d+[hl]', page.source))
        assert "nan" not in page.source


DAMAGES = {
    "metrics.csv": [b"step,loss\n1,2\nx,3\n", b"\xff\xfe\n", b"a,b\n1,2\n", b"step,loss\n1,2,3\n", b"\0"],
    "config.yaml": [b"a: [", b"[1]", b"\xff", b"", b"&a {b: *a}", b"!!python/object:os.system {}"],
    "confusion.json": [
        *(b"no json", b"[1]", b"{}", b"", b"[" * 100_000, b"\xff"),
        b'{"labels": [], "counts": []}',
        b'{"labels": ["a", "b"], "counts": [[1, 2]]}',
        b'{"labels": ["a"], "counts": [[-1]]}',
        b'{"labels": ["a"], "counts": [[0.5]]}',
        b'{"labels": ["a"], "counts": [7]}',
        b'{"labels": 3, "counts": [[1]]}',
    ],
    "samples/step-50.txt": [b"\xff"],
}


@pytest.mark.parametrize("file", DAMAGES)
def test_a_damaged_file_is_said(file, tmp_path):
    run = write_run(tmp_path / "run", steps=100)
    for content in [*DAMAGES[file], None]:
        (run / file).unlink()
        if content is None:
            (run / file).mkdir()
        else:
            (run / file).write_bytes(content)
        page = report(run)
        notes = re.findall('<li class="failed">(.*?)</li>', page.source, re.S)
        assert any(file in note for note in notes), content
        assert "Checkpoints" in page.text, "the rest is there"


def test_missing_files_are_said(tmp_path):
    run = write_run(tmp_path / "run", steps=100)
    with open(run / "metrics.csv", "a", encoding="utf-8") as file:
        file.write("101,0.")
    assert "metrics.csv ends within a line, which is left out" in report(run).text
    (run / "metrics.csv").write_text("step,loss\n", encoding="utf-8")
    assert "metrics.csv has no rows" in report(run).text
    (run / "metrics.csv").unlink()
    (run / "config.yaml").unlink()
    (run / "checkpoint-100/config.json").write_text('{"train": {"lr": 0.5}}', encoding="utf-8")
    page = report(run)
    assert "there is no metrics.csv" in page.text
    assert page.row("train.lr") == ["train.lr", "0.5"], "a checkpoint's, where the run has none"
    assert "Curves" not in page.text


def test_no_run(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file").write_text("", encoding="utf-8")
    for runs, error, message in (
        ([], ValueError, "at least one run"),
        (["empty"], ValueError, "empty is no run: it has no metrics.csv"),
        (["file"], NotADirectoryError, "file"),
        (["nowhere"], FileNotFoundError, "nowhere"),
        (["run", "empty/../run"], ValueError, "run is given twice"),
    ):
        write_metrics(tmp_path / "run", rows_of(2))
        with pytest.raises(error, match=message):
            make_report([tmp_path / run for run in runs], tmp_path / "report.html")
    assert not (tmp_path / "report.html").exists()


def test_runs_of_one_name_are_told_apart(tmp_path, monkeypatch, capsys):
    for parent in ("x", "y"):
        write_metrics(tmp_path / parent / "run", rows_of(2))
    monkeypatch.chdir(tmp_path)
    assert cli.main(["report", "x/run", "y/run", "--out", "page.html"]) == 0
    assert capsys.readouterr().out == "page.html\n"
    assert "Training runs: x/run, y/run" in Page(tmp_path / "page.html").text


def test_ten_long_runs_are_under_a_megabyte(tmp_path):
    for seed in range(10):
        write_metrics(tmp_path / str(seed), rows_of(10_000, seed))
    path = make_report([tmp_path / str(seed) for seed in range(10)], tmp_path / "report.html")
    assert path.stat().st_size < 1_000_000
    assert len(set(re.findall(r"\.r\d { stroke: .*?}.*?}", path.read_text(encoding="utf-8")))) == 10
