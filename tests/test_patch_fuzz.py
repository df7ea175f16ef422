"""Random models and random events: a patched model gives what its twin gives, whatever happens to both."""

from __future__ import annotations

import patch_fuzz
import pytest
import torch

CASES = 10


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def check(seeds: range) -> None:
    failed = [sequence for sequence in map(patch_fuzz.run, seeds) if sequence.failed]
    assert not failed, f"{len(failed)} of {len(seeds)} sequences failed:\n" + "\n".join(map(str, failed))


@pytest.mark.parametrize("case", range(CASES))
def test_a_patched_model_beside_its_twin(case):
    check(range(case, 100, CASES))
