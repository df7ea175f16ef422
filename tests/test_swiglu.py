"""swiglu on every binding that is built. Triton kernels: test_interpreter.py."""

from __future__ import annotations

from glu_suite import GluSuite
from torch.nn import functional as F


class TestSwiGLU(GluSuite):
    name = "swiglu"
    variants = ({},)
    extra = ()

    def activation(self):
        return F.silu
