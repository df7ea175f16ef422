"""Dropout, residual addition and RMSNorm (reference: fastllm/reference/dropout_add_rms_norm.py); the kernels are in
`_dropout_norm`."""

from __future__ import annotations

from fastllm.kernels import _dropout_norm


def dropout_add_rms_norm_fwd(outputs, x, residual, weight, seed, p, eps) -> None:
    """`outputs`: y, sum (..., N) and rstd (...)."""
    y, total, rstd = outputs
    _dropout_norm.fwd(y, total, None, rstd, x, residual, weight, None, seed, p, eps)


def dropout_add_rms_norm_bwd(outputs, dy, dsum, sum, rstd, weight, seed, p) -> None:
    """`outputs`: the gradients of x and residual (..., N), of weight (N,) or empty."""
    dx, dresidual, dweight = outputs
    _dropout_norm.bwd(dx, dresidual, dweight, dweight[:0], dy, dsum, sum, None, rstd, weight, seed, p)
