"""geglu on every binding that is built. Triton kernels: test_interpreter.py."""

from __future__ import annotations

import functools

import pytest
import torch
from glu_suite import GluSuite
from torch.nn import functional as F

from fastllm import ops


class TestGEGLU(GluSuite):
    name = "geglu"
    variants = ({"approximate": "tanh"}, {"approximate": "none"})
    extra = (True,)

    def activation(self, approximate="tanh"):
        return functools.partial(F.gelu, approximate=approximate)

    def test_another_form_is_an_error(self):
        with pytest.raises(ValueError, match="approximate must be 'tanh' or 'none', got 'quick'"):
            ops.geglu(torch.randn(2, 4), approximate="quick")
