"""What becomes of results: tables in the terminal, the README and a page, in units that fit each op."""

from __future__ import annotations

import html
import json
import re
from pathlib import Path

import pytest

pytest.importorskip("pytest_benchmark")
from fastllm.benchmarks import harness, report, suite

ROOT = Path(__file__).parent.parent


def result(device: str = "cpu", name: str = "A CPU") -> dict:
    def figures(median: float) -> dict:
        return {"median_ms": median, "q1_ms": median, "q3_ms": median, "min_ms": median, "noise": 0.02}

    contenders = {"fastllm": figures(2.0), "eager": figures(7.0), "torch.compile": figures(3.0)}
    case = {"case": "fp32 4096x1024 forward", "direction": "forward", "backend": device, "target": "", "rounds": 20}
    case |= {"bytes": 20_000_000, "flops": 1_000_000, "products": None, "tokens": 0, "others": 0.0}
    return {
        "format": 2,
        "date": "2026-01-02",
        "machine": {"device": device, "cpu": "A CPU", "threads": 2, "name": name},
        "versions": {"torch": "2.13.0"},
        "ceilings": {"copy_gb_s": 20.0, "matmul_fp32_tflop_s": 0.5},
        "results": [
            {"op": "rms_norm", **case, "contenders": contenders, "skipped": {}},
            {"op": "layer_norm", **case, "contenders": {"fastllm": figures(2.0), "eager": figures(4.0)}, "skipped": {}},
        ],
        "failed": [],
    }


def mixed_result() -> dict:
    """A case of each unit, and a rival that two of them lack."""
    data = result("cuda", "A GPU")
    norm, products = data["results"]
    products |= {"op": "attention", "flops": 500_000_000, "products": "fp32"}
    step = {**norm, "op": "training_step", "flops": 250_000_000, "products": "fp32", "tokens": 64}
    for one in (norm, step):
        one["skipped"] = {"Liger": "no module 'liger_kernel' is installed"}
    products["skipped"] = {"SDPA efficient": "RuntimeError: No available kernel"}
    data["results"].append(step)
    return data


UNITS = [
    ("10 GB/s", "50% of copy"),
    ("0.25 TFLOP/s", "50% of fp32 matmul"),
    ("32,000 tokens/s", "25% of fp32 matmul"),
]


def test_every_unit_in_every_place(tmp_path, monkeypatch):
    data = mixed_result()
    assert [harness.achieved(data, r, "fastllm") for r in data["results"]] == UNITS
    rows = [line for line in suite.table(data).splitlines() if "fastllm (" in line]
    for row, (rate, share) in zip(rows, UNITS, strict=True):
        assert re.search(rf"{rate} +{share}$", row), row
    rows = [line for line in report.markdown(data).splitlines() if line.startswith("| `")]
    for row, (rate, share) in zip(rows, UNITS, strict=True):
        assert f"| {rate} ({share}) |" in row

    report.require("matplotlib", "bench").use("Agg")
    axes = report.require("matplotlib.axes", "bench").Axes
    drawn, annotate = [], axes.annotate
    monkeypatch.setattr(
        axes, "annotate", lambda self, text, at, **k: (drawn.append((text, at)), annotate(self, text, at, **k))
    )
    page = report.write(data, tmp_path).read_text()
    rows = re.findall(r'<tr class="fastllm">(.*?)</tr>', page)
    for row, (rate, share) in zip(rows, UNITS, strict=True):
        assert f"<td>{rate}</td><td>{share}</td>" in row
    bars = dict(drawn)
    for (rate, share), height in zip(UNITS, (50, 50, 25), strict=True):
        assert bars[f"{rate}, {share}"][0] == pytest.approx(height), "bars are shares"
    assert "(Chowdhery et al., 2022)" in page


def test_a_host_bound_contender_is_marked_in_every_place():
    data = result("cuda", "A GPU")
    texts = [lambda: suite.table(data), lambda: report.markdown(data), lambda: report._page(data, {})]
    assert not any("host-bound" in text() for text in texts)
    data["results"][0]["contenders"]["eager"]["host_bound"] = True
    for text in texts:
        assert harness.HOST_BOUND in html.unescape(text())
        assert text().count("(host-bound)") == 2, "the contender and the note"
    assert "| 3.50x (host-bound) | 1.50x |" in report.markdown(data)


def test_utilization_is_of_the_peak_in_the_data_sheet():
    """PaLM's MFU, where the GPU's peak is known; never of what the machine's product reaches."""
    data = mixed_result()
    data["ceilings"] = {"copy_gb_s": 2000.0, "matmul_bf16_tflop_s": 700.0}
    step = data["results"][-1] | {"flops": 989_400_000_000, "products": "bf16"}  # in 2 ms
    assert harness.achieved(data, step, "fastllm") == ("32,000 tokens/s", "71% of bf16 matmul")
    for gpu, more in (("NVIDIA H100 80GB HBM3", ", MFU 50%"), ("NVIDIA H200", ", MFU 50%"), ("NVIDIA A100", "")):
        data["machine"]["gpu"] = gpu
        assert harness.achieved(data, step, "fastllm")[0] == f"32,000 tokens/s{more}"


def test_missing_rivals_are_named_in_every_place(tmp_path):
    data = mixed_result()
    lines = [
        "Liger is not timed in rms_norm, training_step: no module 'liger_kernel' is installed",
        "SDPA efficient is not timed in attention: RuntimeError: No available kernel",
    ]
    page = html.unescape(report.write(data, tmp_path).read_text())
    markdown, table = report.markdown(data), suite.table(data)
    for line in lines:
        assert f"\n{line}.\n" in markdown
        assert f"<p>{line}</p>" in page
    assert table.count("Liger") == 2
    assert table.count("not timed: no module 'liger_kernel' is installed") == 2


def test_results_of_another_format(tmp_path):
    path = tmp_path / "old.json"
    path.write_text(json.dumps(result() | {"format": 1}))
    with pytest.raises(ValueError, match="has format 1, not 2: measure anew"):
        report.main([str(path), "--out", str(tmp_path)])


def test_readme_block(tmp_path, monkeypatch, capsys):
    results = tmp_path / "results"
    results.mkdir()
    monkeypatch.setattr(report, "RESULTS", results)
    readme = tmp_path / "README.md"
    readme.write_text(f"before\n{report.BEGIN}\nold\n{report.END}\nafter\n")
    check, write = ["--readme", str(readme), "--check"], ["--readme", str(readme)]

    assert report.main(check) == 1
    assert "is out of date: run python -m fastllm.benchmarks.report" in capsys.readouterr().err
    assert "old" in readme.read_text(), "--check writes nothing"
    assert report.main(write) == 0
    assert readme.read_text() == (
        f"before\n{report.BEGIN}\nGPU: not yet measured.\n\nCPU: not yet measured.\n{report.END}\nafter\n"
    )
    assert report.main(check) == 0

    (results / "a-cpu.json").write_text(json.dumps(result()))
    assert report.main(check) == 1
    assert report.main(write) == 0
    text = readme.read_text()
    assert "| op | case | fastllm, ms | rate (of ceiling) | vs eager | vs torch.compile |" in text
    assert "| `rms_norm` | fp32 4096x1024 forward | 2.000 ± 2% | 10 GB/s (50% of copy) | 3.50x | 1.50x |" in text
    assert "| `layer_norm` | fp32 4096x1024 forward | 2.000 ± 2% | 10 GB/s (50% of copy) | 2.00x | n/a |" in text
    assert "2026-01-02; torch 2.13.0. Measured ceilings (medians): copy 20 GB/s, matmul fp32 0.5 TFLOP/s." in text
    assert "GPU: not yet measured." in text
    assert text.startswith("before\n")
    assert text.endswith("\nafter\n")

    assert "disturbed" not in text

    disturbed = result()
    disturbed["results"][1]["others"] = 0.4
    (results / "a-cpu.json").write_text(json.dumps(disturbed))
    assert report.main(write) == 0
    text = readme.read_text()
    assert "| `layer_norm` | fp32 4096x1024 forward (disturbed) | 2.000" in text
    assert "| `rms_norm` | fp32 4096x1024 forward | 2.000" in text
    assert "(disturbed): other processes took more than 5% of the CPUs." in text

    (results / "z-gpu.json").write_text(json.dumps(result("cuda", "A GPU")))
    assert report.main(write) == 0
    text = readme.read_text()
    assert text.index("**A GPU**") < text.index("**A CPU, 2 threads**")
    assert "not yet measured" not in text
    assert report.main(check) == 0


@pytest.mark.parametrize("text", ["", report.BEGIN, report.END + report.BEGIN, 2 * (report.BEGIN + report.END)])
def test_readme_without_its_markers(text):
    with pytest.raises(ValueError, match="expected one <!-- benchmarks:begin -->"):
        report.rewrite(text, "block")


def test_the_readme_is_up_to_date():
    assert report.main(["--readme", str(ROOT / "README.md"), "--check"]) == 0


def test_report_of_a_file(tmp_path):
    path = tmp_path / "result.json"
    data = result()
    data["results"][0]["contenders"]["a rival without a colour"] = data["results"][0]["contenders"]["eager"]
    data["failed"] = [{"op": "rms_norm", "case": "bf16 <1>", "reason": "1 < 2"}]
    path.write_text(json.dumps(data))
    assert report.main([str(path), "--out", str(tmp_path / "page")]) == 0
    page = (tmp_path / "page" / "index.html").read_text()
    assert "a rival without a colour" in page
    assert "bf16 &lt;1&gt;: not timed: 1 &lt; 2" in page
    with pytest.raises(SystemExit):
        report.main([str(path)])
