"""benchmarks/gpu_run.py where it matters that something goes wrong: time-outs, crashes, kills. Its stages are rehearsed
by `gpu_run.py --rehearse`."""

from __future__ import annotations

import collections
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from fastllm.benchmarks import _jobs, _report_plugin, gpu_run, headline, report

_build, _workers = sys.modules["_build"], sys.modules["_workers"]  # as the script imports them

SCRIPT = Path(__file__).parent.parent / "benchmarks/gpu_run.py"
WORKER = f"""
import os, signal, subprocess, sys, time
sys.path.insert(0, {str(SCRIPT.parent)!r})
from _workers import serve

answers = os.dup(1)

def handle(job):
    print("what a job prints is no answer")
    if job["do"] == "sleep":
        child = subprocess.Popen(["sleep", "60"])
        if "file" in job:
            open(job["file"], "w").write(str(child.pid))
        time.sleep(job.get("seconds", 60))
    if job["do"] == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if job["do"] == "record":
        time.sleep(job["seconds"])
        return {{"launches": {{}}}}
    if job["do"] == "half":  # of an answer, and then an end or a stall
        os.write(answers, b'{{"ok": tr')
        time.sleep(job["seconds"])
        os._exit(3)
    if job["do"] == "babble":
        os.write(answers, b"no JSON\\n")
        time.sleep(60)
    if job["do"] == "damage":
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
    if job["do"] == "fail":
        raise ValueError("wrong " * 1000)
    return {{"pid": os.getpid()}}

serve(handle)
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_run, "start_build", lambda run: None)
    return gpu_run.Run(tmp_path / "out", 1.0)


@pytest.fixture
def start(run, tmp_path):
    file = tmp_path / "worker.py"
    file.write_text(WORKER)
    return lambda: gpu_run.Worker([sys.executable, str(file)], run.environment(), run.log)


def lines(run) -> list[dict]:
    return [json.loads(line) for line in run.results.read_text().splitlines()]


def alive(pid: int) -> bool:
    stat = Path(f"/proc/{pid}/stat")
    return stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z"


def test_a_crash_costs_its_own_job(run, start):
    outcome = gpu_run.Outcome()
    jobs = [{"do": word, "index": i} for i, word in enumerate(("ok", "crash", "ok", "damage", "fail", "ok"))]
    run.jobs(outcome, "smoke", jobs, start, 1, time.monotonic() + 30)
    found = lines(run)
    assert [line["ok"] for line in found] == [True, False, True, False, False, True]
    assert "SIGSEGV" in found[1]["error"]
    assert "illegal memory access" in found[3]["error"]
    assert found[4]["error"].startswith("ValueError: wrong wrong")
    assert len(found[4]["error"]) <= _workers.SHORT
    assert len({line["pid"] for line in found if line["ok"]}) == 3, "after a crash and a CUDA error, a fresh process"
    assert (outcome.jobs, outcome.answered, len(outcome.failed), outcome.note) == (6, 6, 3, "")
    assert "what a job prints" in run.log.read_text()


def test_half_an_answer_is_none_and_costs_its_own_job(run, start):
    jobs = [{"do": "half", "seconds": 0}, {"do": "half", "seconds": 60}, {"do": "babble"}, {"do": "ok"}]
    outcome, began = gpu_run.Outcome(), time.monotonic()
    run.jobs(outcome, "smoke", jobs, start, 1, began + 30, job_seconds=1.0)
    assert time.monotonic() - began < 20
    ended, stalled, babbled, fine = lines(run)
    assert ended["error"] == "its process ended: exit code 3 in the middle of an answer"
    assert stalled["error"] == "no answer in 1 s"
    assert babbled["error"] == "no answer but 'no JSON'"
    assert fine["ok"]
    assert (outcome.answered, len(outcome.failed), outcome.note) == (4, 3, "")


def test_what_raises_beside_a_job_is_told_and_stops_nothing(run, start):
    def no_process():
        raise OSError("no more processes")

    outcome = gpu_run.Outcome()
    run.jobs(outcome, "smoke", [{"do": "ok"}, {"do": "ok"}], no_process, 2, time.monotonic() + 30)
    assert [line["error"] for line in lines(run)] == ["OSError: no more processes"] * 2
    assert outcome.answered == 2

    def full(job, answer):
        raise OSError("no space left on device")

    tally = gpu_run.run_jobs([{"do": "ok"}, {"do": "ok"}], start, 1, time.monotonic() + 30, full)
    assert (tally.answered, tally.left) == (2, 0)
    assert tally.trouble == ["OSError: no space left on device"] * 2


def test_one_job_that_brings_two_fills_two_workers(start):
    pids = set()

    def done(job, answer):
        if job["do"] == "ok":
            return [{"do": "sleep", "seconds": 1}] * 2
        return pids.add(answer["pid"])

    gpu_run.run_jobs([{"do": "ok"}], start, 2, time.monotonic() + 30, done)
    assert len(pids) == 2


def test_a_process_that_cannot_be_killed_is_abandoned(start, monkeypatch):
    monkeypatch.setattr(_workers, "PATIENCE", 0.1)
    monkeypatch.setattr(_workers.os, "killpg", lambda pid, signal: None)
    began, processes = time.monotonic(), []

    def kept():
        worker = start()
        processes.append(worker.process)
        return worker

    tally = gpu_run.run_jobs([{"do": "sleep"}], kept, 1, began + 2, lambda job, answer: None)
    assert time.monotonic() - began < 10
    assert (tally.answered, tally.left) == (0, 1)
    assert tally.trouble == [f"process {processes[0].pid} did not end when it was killed: abandoned"]
    monkeypatch.undo()
    _workers.end_group(processes[0])


def test_an_answer_may_bring_further_jobs(start):
    answered = []

    def done(job, answer):
        answered.append(job["index"])
        return [{"do": "ok", "index": 10 * job["index"] + i} for i in (1, 2)] if job["index"] < 10 else None

    jobs = [{"do": "ok", "index": 1}, {"do": "ok", "index": 2}]
    tally = gpu_run.run_jobs(jobs, start, 2, time.monotonic() + 30, done)
    assert (tally.answered, tally.left, tally.trouble) == (6, 0, [])
    assert sorted(answered) == [1, 2, 11, 12, 21, 22]


def test_a_job_that_takes_too_long_is_ended(run, start):
    outcome = gpu_run.Outcome()
    run.jobs(outcome, "smoke", [{"do": "sleep"}, {"do": "ok"}], start, 1, time.monotonic() + 30, job_seconds=1.0)
    first, second = lines(run)
    assert first["error"] == "no answer in 1 s"
    assert second["ok"]


def test_a_stage_out_of_time_is_ended_with_all_it_started_and_the_next_goes_on(
    run, start, tmp_path, monkeypatch, capsys
):
    def hangs(run, outcome, deadline):
        file = str(tmp_path / "pid")
        jobs = [{"do": "ok"}, {"do": "sleep", "file": file}, {"do": "ok"}]
        run.jobs(outcome, "smoke", jobs, start, 1, deadline)

    def answers(run, outcome, deadline):
        run.jobs(outcome, "headline", [{"do": "ok"}], start, 1, deadline)

    def raises(run, outcome, deadline):
        raise RuntimeError("the stage itself")

    stages = {"facts": answers, "smoke": hangs, "headline": answers, "tuning": raises, "tests": answers}
    monkeypatch.setattr(gpu_run, "STAGES", stages)
    monkeypatch.setattr(gpu_run, "SHARES", dict.fromkeys(stages, 0.9) | {"smoke": 0.05})
    assert gpu_run.perform(run, ["smoke", "headline", "tuning"]) == 1
    assert run.outcomes["smoke"].note == "out of time after 1 of 3"
    assert run.outcomes["headline"].answered == 1
    assert not alive(int((tmp_path / "pid").read_text()))
    page = (run.out / "summary.txt").read_text()
    assert "1 of 3" in page
    assert "RuntimeError: the stage itself" in page
    assert page in capsys.readouterr().out
    assert len(list(run.out.iterdir())) <= 6
    assert all(path.is_file() for path in run.out.iterdir())


def test_no_stage_starts_without_time(run, monkeypatch):
    def slow(run, outcome, deadline):
        run.deadline = time.monotonic()

    monkeypatch.setattr(gpu_run, "STAGES", {"facts": slow, "smoke": slow})
    assert gpu_run.perform(run, ["facts", "smoke"]) == 0
    assert list(run.outcomes) == ["facts"]
    assert "smoke     not started: no time left" in (run.out / "summary.txt").read_text()


def test_results_survive_a_kill(tmp_path):
    worker, out = tmp_path / "worker.py", tmp_path / "out"
    worker.write_text(WORKER)
    program = f"""
import time
from pathlib import Path
import sys
from fastllm.benchmarks import gpu_run
run = gpu_run.Run(Path({str(out)!r}), 1.0)
start = lambda: gpu_run.Worker([sys.executable, {str(worker)!r}], run.environment(), run.log)
jobs = [{{"do": "ok"}}, {{"do": "ok"}}, {{"do": "sleep", "seconds": 2}}]
run.jobs(gpu_run.Outcome(), "smoke", jobs, start, 1, time.monotonic() + 60)
"""
    process = subprocess.Popen([sys.executable, "-c", program], cwd=SCRIPT.parent.parent)
    results = out / "results.jsonl"
    for _ in range(200):
        if results.exists() and results.read_text().count("\n") == 2:
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert [json.loads(line)["ok"] for line in results.read_text().splitlines()] == [True, True]


def test_nothing_goes_on_without_a_gpu(run, monkeypatch):
    def none(run, outcome, deadline):
        outcome.failed.append("facts: RuntimeError: torch sees no GPU")
        run.no_gpu = True

    monkeypatch.setattr(gpu_run, "STAGES", {"facts": none, "smoke": none})
    assert gpu_run.perform(run, ["smoke"]) == 1
    assert list(run.outcomes) == ["facts"]
    page = (run.out / "summary.txt").read_text()
    assert "torch sees no GPU" in page
    assert "smoke     not started: torch sees no GPU" in page


def test_stages_by_name_and_number(capsys, tmp_path):
    assert gpu_run.choose_stages("headline,1") == ["facts", "headline"]
    assert gpu_run.choose_stages(",".join(gpu_run.STAGES)) == list(gpu_run.STAGES)
    assert list(gpu_run.SHARES) == list(gpu_run.STAGES)
    for wrong in ("8", "smokes", "0"):
        assert gpu_run.main(["--out", str(tmp_path / "none"), "--stages", f"1,{wrong}"]) == 2
        assert f"unknown stage '{wrong}'; known are 1 facts, 2 smoke" in capsys.readouterr().err
    assert not (tmp_path / "none").exists()


def test_the_users_pythonpath_is_kept(run, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/of/the/user")
    assert run.environment()["PYTHONPATH"].split(os.pathsep) == [
        str(gpu_run.ROOT),
        str(gpu_run.ROOT / "tests"),
        "/of/the/user",
    ]
    monkeypatch.delenv("PYTHONPATH")
    assert not run.environment()["PYTHONPATH"].endswith(os.pathsep)


def test_a_library_must_be_of_these_sources(tmp_path):
    library = tmp_path / "_C_cuda.so"
    assert _build.library_state(library) == "not built"
    library.write_bytes(b"\x7fELF" + os.urandom(99))
    assert _build.library_state(library) == "does not say which sources it was built from"
    digest = _build.source_digest().encode()
    library.write_bytes(b"\x7fELF\0fastllm-sources:" + digest + b"\0more")
    assert _build.library_state(library) == "matches"
    library.write_bytes(b"\x7fELF\0fastllm-sources:" + digest[::-1] + b"\0more")
    assert _build.library_state(library) == "was built from other sources"


def test_every_test_leaves_a_line_as_it_ends(run, monkeypatch):
    monkeypatch.setenv("FASTLLM_GPU_RUN_RESULTS", str(run.results))
    monkeypatch.delenv("PYTEST_XDIST_WORKER", raising=False)
    crash = SimpleNamespace(reprcrash=SimpleNamespace(message="assert 1 == 2"))
    for when, outcome in (("setup", "passed"), ("call", "passed"), ("call", "failed"), ("setup", "skipped")):
        report = SimpleNamespace(when=when, outcome=outcome, failed=outcome == "failed", longrepr=crash)
        report.nodeid, report.duration = "test_x", 0.1
        _report_plugin.pytest_runtest_logreport(report)
    assert [(line["outcome"], line.get("error")) for line in lines(run)] == [
        ("passed", None),
        ("failed", "assert 1 == 2"),
        ("skipped", None),
    ]


def test_compiling_ahead_leaves_most_of_the_stage(run, start, monkeypatch):
    monkeypatch.setattr(run, "worker", lambda script, **environment: start)
    began = time.monotonic()
    run.precompile(gpu_run.Outcome(), "smoke", [{"seconds": 0}, {"seconds": 60}], "every_op.py", began + 5)
    assert 1.5 < time.monotonic() - began < 4


@pytest.mark.parametrize(
    "said", ["Triton Error [CUDA]: out of resource", "CUBLAS_STATUS_EXECUTION_FAILED", "CUDA error"]
)
def test_errors_that_cost_the_process(said):
    assert _workers.damaged(f"RuntimeError: {said}")
    assert not _workers.damaged("RuntimeError: CUDA out of memory")


SETUP = """
import pathlib, sys, time
folder = pathlib.Path(sys.argv[sys.argv.index("--build-lib") + 1]) / "fastllm"
time.sleep(1)
folder.mkdir(parents=True)
(folder / "_C_cuda.so").write_text("new")
print("done")
"""


def test_a_build_outlives_the_stage_that_had_no_time_for_it(run, tmp_path, monkeypatch):
    monkeypatch.setattr(_build, "ROOT", tmp_path)
    (tmp_path / "setup.py").write_text(SETUP)
    (tmp_path / "fastllm").mkdir()
    library = tmp_path / "fastllm/_C_cuda.so"
    library.write_text("old")
    run.build = _build.Build(run.out / "build.log", run.environment(), True)
    smoke, headline = gpu_run.Outcome(), gpu_run.Outcome()
    assert not run.need_library(smoke, time.monotonic())
    assert smoke.note == "the build was not ready in time"
    assert library.read_text() == "old"
    assert run.need_library(headline, time.monotonic() + 30)
    assert (run.build.note, library.read_text()) == ("built", "new")
    assert (tmp_path / "fastllm/_C_cuda.before.so").read_text() == "old"
    assert not run.build.folder.exists()


@pytest.mark.parametrize("stage", ["smoke", "headline", "tuning", "tests", "sanitize", "autotuned"])
def test_every_stage_awaits_the_build(run, monkeypatch, stage):
    """What it does before is compile, and what needs no library."""
    asked = []
    run.build = SimpleNamespace(note="", wait=asked.append)
    run.calls = {"ok": True, "jobs": [], "start_seconds": 0.0}
    monkeypatch.setattr(gpu_run, "find_sanitizer", lambda: "there")
    monkeypatch.setattr(gpu_run, "run_jobs", lambda *args: _workers.Tally())
    outcome = gpu_run.Outcome()
    gpu_run.STAGES[stage](run, outcome, time.monotonic() + 10)
    assert len(asked) == 1
    assert outcome.note == "the build was not ready in time"


def test_what_was_measured_can_be_committed(run):
    committed = report.load(next((SCRIPT.parent / "results").glob("*.json")))
    committed.pop("ceilings_are", None)  # of an earlier way to measure them
    run.facts |= {key: committed[key] for key in ("format", "date", "machine", "versions")} | {"file": "a-gpu.json"}
    run.ceilings, run.measured, run.unmeasured = committed["ceilings"], committed["results"], committed["failed"]
    run.keep_benchmark()
    assert report.load(run.out / "a-gpu.json") == committed


def test_an_earlier_run_is_not_written_over(tmp_path, capsys):
    results = tmp_path / "results.jsonl"
    results.write_text("{}\n")
    assert gpu_run.main(["--out", str(tmp_path)]) == 2
    assert f"{results} is of an earlier run" in capsys.readouterr().err
    assert [path.read_text() for path in tmp_path.iterdir()] == ["{}\n"]


TESTS = """
import os, pathlib, pytest

@pytest.mark.parametrize("number", range(3))
def test_gpu(number):
    pathlib.Path(__file__).with_name(f"pid{number}").write_text(str(os.getpid()))
    if number == 1:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")
"""


@pytest.mark.slow
def test_a_lost_gpu_costs_its_own_test_and_what_cannot_be_collected_is_told(run, tmp_path):
    pytest.importorskip("xdist")
    (tmp_path / "test_lost.py").write_text(TESTS)
    (tmp_path / "test_broken.py").write_text("import no_such_module")
    command = [sys.executable, "-m", "pytest", "-q", "-n", "1", "-p", "fastllm.benchmarks._report_plugin"]
    command += ["-c", os.devnull, "--rootdir", str(tmp_path), "--continue-on-collection-errors", str(tmp_path)]
    environment = run.environment(**{gpu_run.RESULTS: str(run.results)})
    subprocess.run(command, env=environment, check=False, capture_output=True, cwd=tmp_path)
    found = [(line["test"].partition(".py")[0], line["outcome"], line.get("error", "")) for line in lines(run)]
    assert [outcome for test, outcome, _ in found if test == "test_lost"].count("passed") == 2
    assert any("illegal memory access" in error for test, _, error in found if test == "test_lost")
    assert any("no_such_module" in error for test, _, error in found if test == "test_broken")
    pids = [(tmp_path / f"pid{number}").read_text() for number in range(3)]
    assert pids[0] == pids[1] != pids[2]


def test_the_kernels_of_the_training_step_are_compiled_ahead():
    pytest.importorskip("triton")
    cases = headline.cases("cuda")
    index = next(i for i, case in enumerate(cases) if case.op == "training_step")
    texts = _jobs.record({"do": "record", "index": index, "chip": ("cuda", 90)})["launches"]
    launches = [json.loads(text) for text in texts]
    kernels = {launch["kernel"].partition(":")[2] for launch in launches}
    assert {f"_attention_{kind}_hopper_kernel" for kind in ("fwd", "dkdv", "dq")} <= kernels
    assert "_cross_entropy_loss_kernel" in kernels
    dtypes = {launch["args"]["q"]["dtype"] for launch in launches if "_attention_fwd" in launch["kernel"]}
    assert dtypes == {"bfloat16"}


def test_every_op_over_rows_has_candidates_that_are_compiled_ahead():
    pytest.importorskip("triton")
    expected = {
        "cross_entropy": {"_cross_entropy_fwd_kernel": 9, "_cross_entropy_bwd_kernel": 9},
        "linear_cross_entropy": {"_cross_entropy_fwd_kernel": 9, "_cross_entropy_loss_kernel": 8},
        "swiglu": {"_glu_fwd_kernel": 6, "_glu_bwd_kernel": 6},
        "rotary": {"_rotary_kernel": 6},
        "dropout_add_rms_norm": {"_dropout_norm_fwd_kernel": 3, "_dropout_norm_bwd_kernel": 6},
    }
    for call in gpu_run.TUNED_ROWS:
        job = {"do": "record", "tune": call, "chip": ("cuda", 90)}
        texts = _jobs.record(json.loads(json.dumps(job)))["launches"]
        found = collections.Counter(json.loads(text)["kernel"].partition(":")[2] for text in texts)
        for kernel, candidates in expected[call["op"]].items():
            assert found[kernel] >= candidates, (call, found)
    assert {call["op"] for call in gpu_run.TUNED_ROWS} == expected.keys()
