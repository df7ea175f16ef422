from __future__ import annotations

from dropout_norm_suite import DropoutNormSuite


class TestDropoutAddLayerNorm(DropoutNormSuite):
    name, biased = "dropout_add_layer_norm", True
