"""fastllm.nn and GPT under FSDP2, sharded as a whole, by blocks and module by module, in two processes over gloo."""

from __future__ import annotations

import pytest
import torch
from ranks import run_ranks

pytestmark = pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without distributed")

SLOW = [pytest.param(case, marks=pytest.mark.slow) for case in ("more", "compiled")]


@pytest.mark.parametrize("case", ["eager", *SLOW])
def test_gradients_are_those_of_the_whole_model(case, tmp_path):
    run_ranks("distributed_models.py", case, tmp_path, timeout=240, ignore=True)
