"""Dropout, residual addition and LayerNorm (reference: fastllm/reference/dropout_add_layer_norm.py); the kernels are in
`_dropout_norm`."""

from __future__ import annotations

from fastllm.kernels import _dropout_norm


def dropout_add_layer_norm_fwd(outputs, x, residual, weight, bias, seed, p, eps) -> None:
    """`outputs`: y, sum (..., N), mean and rstd (...)."""
    y, total, mean, rstd = outputs
    _dropout_norm.fwd(y, total, mean, rstd, x, residual, weight, bias, seed, p, eps)


def dropout_add_layer_norm_bwd(outputs, dy, dsum, sum, mean, rstd, weight, seed, p) -> None:
    """`outputs`: the gradients of x and residual (..., N), of weight and bias (N,) or empty."""
    dx, dresidual, dweight, dbias = outputs
    _dropout_norm.bwd(dx, dresidual, dweight, dbias, dy, dsum, sum, mean, rstd, weight, seed, p)
