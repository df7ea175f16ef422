"""What pytest-benchmark runs: one test for each case, each round of which times every contender once.

pytest-benchmark's own statistics are those of a whole round; the contenders' are in extra_info. `suite` starts pytest
on this file with a plugin that provides `case`, `device`, `seconds` and `progress`.
"""

from __future__ import annotations

from fastllm.benchmarks import harness


def test_case(benchmark, case, device, seconds, progress):
    progress.start(case)
    race = harness.Race(case, device, seconds)
    progress.checked(race)
    benchmark.group = case.op
    with harness.Disturbance() as others:
        benchmark.pedantic(race.round, rounds=race.rounds, warmup_rounds=harness.WARMUP_ROUNDS)
    benchmark.extra_info.update(race.result(others.share))
    race.close()
    progress.finished(benchmark.extra_info)
