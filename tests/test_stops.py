"""SIGTERM and SIGINT: the step is finished and saved, and the resumed run has the bits of one that never stopped."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from forks import Forks
from test_checkpoint import UNTIMED

from fastllm.trainer import checkpoint
from fastllm.trainer.log import read_metrics
from fastllm.trainer.signals import stop_requests

HERE = Path(__file__).parent
ENVIRONMENT = {**os.environ, "PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"}
STEPS = 24
OPTIONS = (
    f"--steps {STEPS} --checkpoint-every 6 --eval-every 4 --keep 2 --batch-size 4 --accumulate 2 --context 12 "
    "--layers 1 --heads 2 --width 16 --dropout 0.1 --vocab-size 300 --ema 0.9 --skip-spikes 5 --device cpu"
)


@pytest.fixture(autouse=True, scope="module")
def interrupts():
    """SIGINT as on a terminal: behind a shell's & it is ignored, by all that is started there, too."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(scope="module")
def forks() -> Iterator[Forks]:
    with Forks() as found:
        yield found


def arguments(out: Path, *more: str) -> list[str]:
    text = out.parent / "text.txt"
    if not text.exists():
        text.write_text("".join(f"{n} squared is {n * n}, and {n} cubed is {n**3}.\n" for n in range(160)))
    return ["train", "--text", str(text), "--out", str(out), *OPTIONS.split(), *more]


@pytest.fixture(scope="module")
def straight(forks, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("straight") / "run"
    log = out.parent / "log"
    assert forks.run("forks:command", arguments(out), log=log) == [0], log.read_text()
    return out


def assert_same_end(straight: Path, out: Path) -> None:
    for name in ("model.safetensors", "ema.safetensors", "state.safetensors", "state.json", "tokenizer.json"):
        files = [run / f"checkpoint-{STEPS}" / name for run in (straight, out)]
        assert files[0].read_bytes() == files[1].read_bytes(), name
    rows = [[{**row, **UNTIMED} for row in read_metrics(run / "metrics.csv")] for run in (straight, out)]
    assert rows[0] == rows[1]
    assert len(rows[0]) == STEPS


def lines(path: Path) -> int:
    return path.read_bytes().count(b"\n") if path.exists() else 0


# Code that sends a signal to its own process at a moment that a test could hardly meet from outside.
BEHIND = """
import os, signal
from fastllm.trainer import {module} as module
original = {place}
def stopped(*args, **kwargs):
    if {when}:
        os.kill(os.getpid(), signal.{name})
    {rest}
    return original(*args, **kwargs)
{place} = stopped
"""


def sending(name: str, place: str, when: str, rest: str = "pass") -> str:
    module = place.split(".")[0]
    return BEHIND.format(module=module, place=place.replace(module, "module", 1), when=when, name=name, rest=rest)


STEP = "trainer.Trainer._begin_step"


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
@pytest.mark.parametrize("step", [0, 4, 7, 11, 17])  # validations are due behind 7 and 11, checkpoints behind 11 and 17
def test_stopped_and_resumed(name, step, straight, forks, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    before = sending(name, STEP, f"args[0].step == {step}")
    assert forks.run("forks:command", arguments(out), before, log=log) == [0], log.read_text()
    path = out / f"checkpoint-{step + 1}"
    said = log.read_text()
    assert f"{name}: finishing the step and saving; once more stops at once" in said
    assert said.endswith(f"stopped by {name}: {path}; --resume goes on\n")
    assert checkpoint.find_checkpoint(out) == path
    checkpoint.verify(path)
    assert forks.run("forks:command", [*arguments(out), "--resume"], log=log) == [0], log.read_text()
    assert_same_end(straight, out)


def test_from_outside(straight, forks, tmp_path):
    """Again and again, wherever the run happens to be."""
    out, log = tmp_path / "run", tmp_path / "log"
    slow = "import time\n" + sending("SIGTERM", STEP, "False", "time.sleep(0.01)")
    for attempt in range(4):
        before = lines(out / "metrics.csv")
        (child,) = forks.start("forks:command", arguments(out, "--resume", "auto"), slow, log=log)
        while lines(out / "metrics.csv") < before + 2:
            time.sleep(0.001)
        time.sleep(0.005 * attempt)
        os.kill(child, signal.SIGTERM if attempt % 2 else signal.SIGINT)
        assert forks.wait([child]) == [0], log.read_text()
        assert log.read_text().count("--resume goes on") == attempt + 1
        checkpoint.verify(checkpoint.find_checkpoint(out))
    assert forks.run("forks:command", arguments(out, "--resume"), log=log) == [0], log.read_text()
    assert_same_end(straight, out)


@pytest.mark.parametrize("who", ["True", "__import__('torch').distributed.get_rank() == 1"])
@pytest.mark.parametrize("parallel", ["ddp", pytest.param("fsdp", marks=pytest.mark.slow)])
def test_two_ranks(parallel, who, forks, tmp_path):
    """All ranks stop behind the same step, whichever of them were asked to."""
    out, alone, log = tmp_path / "run", tmp_path / "straight", tmp_path / "log"
    more = ("--parallel", parallel)
    assert forks.run("forks:command", arguments(alone, *more), log=log, ranks=2) == [0, 0], log.read_text()
    before = sending("SIGTERM", STEP, f"args[0].step == 7 and {who}")
    assert forks.run("forks:command", arguments(out, *more), before, log=log, ranks=2) == [0, 0], log.read_text()
    by = "SIGTERM" if who == "True" else "another rank"
    assert f"stopped by {by}: {out / 'checkpoint-9'}; --resume goes on\n" in log.read_text()
    checkpoint.verify(out / "checkpoint-9")
    assert forks.run("forks:command", arguments(out, "--resume"), log=log, ranks=2) == [0, 0], log.read_text()
    assert_same_end(alone, out)


def test_while_a_checkpoint_is_written(straight, forks, tmp_path):
    """Its thread ends its work; the checkpoint of the step that is being taken comes behind it."""
    out, log = tmp_path / "run", tmp_path / "log"
    before = "import time\n" + sending("SIGTERM", "checkpoint._write", "args[2]['step'] == 6", "time.sleep(0.3)")
    assert forks.run("forks:command", arguments(out), before, log=log) == [0], log.read_text()
    found = checkpoint.list_checkpoints(out)
    assert found[0].name == "checkpoint-6"
    assert len(found) == 2
    for path in found:
        checkpoint.verify(path)
    assert not list(out.glob(".checkpoint*"))
    assert forks.run("forks:command", arguments(out, "--resume"), log=log) == [0], log.read_text()
    assert_same_end(straight, out)


def test_while_the_last_checkpoint_is_written(straight, forks, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    before = "import time\n" + sending("SIGTERM", "checkpoint._write", f"args[2]['step'] == {STEPS}", "time.sleep(0.2)")
    assert forks.run("forks:command", arguments(out), before, log=log) == [0], log.read_text()
    assert_same_end(straight, out)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_while_it_validates(name, straight, forks, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    assert forks.run("forks:command", arguments(out), sending(name, "trainer.evaluate", "True"), log=log) == [0], (
        log.read_text()
    )
    assert checkpoint.find_checkpoint(out).name == "checkpoint-5"
    assert forks.run("forks:command", arguments(out, "--resume"), log=log) == [0], log.read_text()
    assert_same_end(straight, out)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_in_the_last_step(name, straight, forks, tmp_path):
    """Then the run is at its end, and not stopped."""
    out, log = tmp_path / "run", tmp_path / "log"
    before = sending(name, STEP, f"args[0].step == {STEPS - 1}")
    assert forks.run("forks:command", arguments(out), before, log=log) == [0], log.read_text()
    assert "--resume goes on" not in log.read_text()
    assert_same_end(straight, out)


def test_a_second_interrupt_stops_at_once(forks, tmp_path):
    """Even while a checkpoint is written; what there is of it is no obstacle, and no checkpoint."""
    out, log = tmp_path / "run", tmp_path / "log"
    twice = "os.kill(os.getpid(), signal.SIGINT) or time.sleep(0.5) or os.kill(os.getpid(), signal.SIGINT)"
    before = "import os, signal, time\n" + sending("SIGINT", "checkpoint._write", "False", f"{twice}; time.sleep(60)")
    # Not a fork, since those do not wait for threads at their end.
    code = "import sys, forks; sys.exit(forks.command(sys.argv[2:], sys.argv[1]))"
    started = time.monotonic()
    result = subprocess.run(
        [sys.executable, "-c", code, before, *arguments(out)], env=ENVIRONMENT, capture_output=True, text=True
    )
    assert time.monotonic() - started < 30
    assert result.returncode == 130, result.stderr
    assert result.stderr.endswith("fastllm: interrupted\n")
    assert result.stderr.count("finishing the step") == 1
    assert not checkpoint.list_checkpoints(out)
    assert forks.run("forks:command", arguments(out, "--resume", "auto"), log=log) == [0], log.read_text()
    assert not list(out.glob(".checkpoint*"))


def test_a_second_sigterm_stops_at_once(forks, tmp_path):
    out, log = tmp_path / "run", tmp_path / "log"
    twice = "os.kill(os.getpid(), signal.SIGTERM); time.sleep(0.1); os.kill(os.getpid(), signal.SIGTERM)"
    before = "import time\n" + sending("SIGTERM", STEP, "False", twice)
    assert forks.run("forks:command", arguments(out), before, log=log) == [-signal.SIGTERM], log.read_text()


def test_requests():
    with stop_requests() as asked:
        assert not asked
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert asked == ["SIGTERM", "SIGINT"]
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    assert signal.getsignal(signal.SIGINT) == signal.default_int_handler


SIZE = 200_000


def write_much() -> int:
    """Is asked to stop in the midst of writing to stderr, a pipe that is read later on."""
    reading, writing = os.pipe()
    os.dup2(writing, 2)
    os.close(writing)
    heard: list[bytes] = []

    def ask() -> None:
        time.sleep(0.2)  # the pipe is full by then
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.2)
        while b"".join(heard).count(b"x") < SIZE:
            heard.append(os.read(reading, 1 << 16))

    with stop_requests() as asked:
        thread = threading.Thread(target=ask, daemon=True)
        thread.start()
        sys.stderr.write("x" * SIZE)
        sys.stderr.flush()
        thread.join(10)
        return 0 if asked == ["SIGTERM"] and b"SIGTERM: finishing the step" in b"".join(heard) else 1


def test_a_signal_in_the_midst_of_the_progress_bar(forks, tmp_path):
    """Python's own stream refuses a handler that writes while it is being written to."""
    assert forks.run("test_stops:write_much", log=tmp_path / "log") == [0]


def test_a_command_of_its_own(straight, tmp_path):
    """Without any of the forks above."""
    out = tmp_path / "run"
    command = [sys.executable, "-m", "fastllm", *arguments(out, "--steps", "100000", "--checkpoint-every", "0")]
    process = subprocess.Popen(command, env=ENVIRONMENT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not (out / "metrics.csv").exists():
        assert process.poll() is None
        time.sleep(0.01)
    time.sleep(0.2)
    process.send_signal(signal.SIGINT)
    said, heard = process.communicate(timeout=60)
    assert process.returncode == 0, heard
    assert "SIGINT: finishing the step" in heard
    (path,) = checkpoint.list_checkpoints(out)
    assert said.endswith(f"stopped by SIGINT: {path}; --resume goes on\n")
    checkpoint.verify(path)
    assert len(read_metrics(out / "metrics.csv")) == checkpoint.step_of(path)
