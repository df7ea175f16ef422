from __future__ import annotations

import os

# Before torch starts its threads: by default they spin while they wait, which multiplies the time on a busy machine.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
if workers := int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "0")):
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // workers)))

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("gpu"):  # a test of a kernel must not pass on the reference
            item.add_marker(pytest.mark.filterwarnings("error::fastllm.backends.FallbackWarning"))
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="no NVIDIA GPU")
    for item in items:
        if item.get_closest_marker("gpu"):
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _warn_again(request: pytest.FixtureRequest) -> None:
    """A fallback that an earlier test was warned of is an error in every test of a GPU."""
    if request.node.get_closest_marker("gpu"):
        from fastllm import backends

        backends.warn_again()


@pytest.fixture
def called(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """The names of the ops that ran."""
    from fastllm import backends

    names: list[str] = []
    original = backends.Op.__call__

    def call(self, *args):
        names.append(self.name)
        return original(self, *args)

    monkeypatch.setattr(backends.Op, "__call__", call)
    return names
