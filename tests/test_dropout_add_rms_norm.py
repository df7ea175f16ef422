from __future__ import annotations

from dropout_norm_suite import DropoutNormSuite


class TestDropoutAddRMSNorm(DropoutNormSuite):
    name, biased = "dropout_add_rms_norm", False
