"""AdamW (Loshchilov and Hutter, 2019), with clipping, master weights, stochastic rounding and 8-bit moments.

    g <- g / grad_scale, and the gradient keeps that     p <- p (1 - lr wd)
    g <- +-g min(1, max_norm / (grad_norm + 1e-6))       m <- m + (1 - b1) (g - m)
    v <- b2 v + (1 - b2) g^2                             u = v, or with amsgrad the largest v so far
    p <- p - lr / (1 - b1^t) m / (sqrt(u) / sqrt(1 - b2^t) + eps)

Computed in float32, or in float64 for float64 parameters, in the order of torch's own kernels; what is stored is
rounded to its dtype. csrc/math/adamw.h says how the low-precision variants keep their bits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from fastllm.reference._philox import philox

BLOCK = 256  # elements of 8-bit moments that share a scale
SPARSE = "AdamW does not support sparse gradients; consider torch.optim.SparseAdam"


def adamw_norm(grads: list[Tensor]) -> Tensor:
    """sqrt(sum of all squares), 0-d float32 (float64 if a gradient is): infinite where a square is infinite there."""
    acc = torch.float64 if any(grad.dtype == torch.float64 for grad in grads) else torch.float32
    wide = [grad.to(torch.promote_types(grad.dtype, torch.float32)) for grad in grads]
    return torch.stack([grad.square().sum(dtype=torch.float64) for grad in wide]).sum().sqrt().to(acc)


def adamw_step(
    params: list[Tensor],
    grads: list[Tensor],
    exp_avgs: list[Tensor],
    exp_avg_sqs: list[Tensor],
    max_exp_avg_sqs: list[Tensor],
    steps: list[Tensor],
    masters: list[Tensor],
    exp_avg_scales: list[Tensor],
    exp_avg_sq_scales: list[Tensor],
    grad_norm: Tensor | None,
    grad_scale: Tensor | None,
    found_inf: Tensor | None,
    lr_tensor: Tensor | None,
    indices: list[int],
    lr: float,
    beta1: float,
    beta2: float,
    weight_decay: float,
    eps: float,
    max_norm: float,
    maximize: bool,
    stochastic: bool,
    seed: int,
) -> None:
    if found_inf is not None and found_inf:
        return
    if lr_tensor is not None:
        lr = lr_tensor.item()
    if any(grad.layout != torch.strided for grad in grads):
        raise RuntimeError(SPARSE)
    sign = -1.0 if maximize else 1.0
    for i, param in enumerate(params):
        acc = torch.promote_types(param.dtype, torch.float32)
        steps[i].add_(1)
        t = steps[i].item()
        grad = grads[i]
        if grad_scale is not None:
            grad.copy_(grad.to(acc) / grad_scale)
        layout = _Layout(param, exp_avgs[i])
        g = layout.flat(grad).to(acc)
        if grad_norm is not None:
            g = g * (max_norm / (grad_norm + 1e-6)).clamp(max=1.0)
        g = g * sign

        quantized = exp_avgs[i].dtype == torch.uint8
        if quantized:
            m = decode(layout.flat(exp_avgs[i]), exp_avg_scales[i], signed=True).to(acc)
            v = decode(layout.flat(exp_avg_sqs[i]), exp_avg_sq_scales[i], signed=False).to(acc)
        else:
            m, v = layout.flat(exp_avgs[i]).to(acc), layout.flat(exp_avg_sqs[i]).to(acc)
        master = masters[i] if masters and param.dtype in (torch.bfloat16, torch.float16) else None
        if master is None:
            p = layout.flat(param).to(acc)
        elif master.dtype == torch.int16:
            p = join(layout.flat(param), layout.flat(master))
        else:
            p = layout.flat(master)

        p = p * (1 - lr * weight_decay)
        m = torch.lerp(m, g, 1 - beta1)
        v = torch.addcmul(v * beta2, g, g, value=1 - beta2)
        u = v
        if max_exp_avg_sqs:
            u = torch.maximum(layout.flat(max_exp_avg_sqs[i]).to(acc), v)
            layout.write(max_exp_avg_sqs[i], u)
        # In double, since torch.sqrt on a CPU may be MKL's, which rounds one in 160 the wrong way.
        denominator = (u.double().sqrt().to(acc) / (1 - beta2**t) ** 0.5).add(eps)
        p = torch.addcdiv(p, m, denominator, value=-(lr / (1 - beta1**t)))

        if quantized:
            # An element whose second moment is infinite has stopped: its first would take the resolution of others.
            code, scale = encode(torch.where(v.isinf() & m.isfinite(), 0.0, m), signed=True)
            layout.write(exp_avgs[i], code)
            exp_avg_scales[i].copy_(scale)
            code, scale = encode(v, signed=False)
            layout.write(exp_avg_sqs[i], code)
            exp_avg_sq_scales[i].copy_(scale)
        else:
            layout.write(exp_avgs[i], m)
            layout.write(exp_avg_sqs[i], v)
        if master is not None:
            weight, remainder = split(p) if param.dtype == torch.bfloat16 else (p, p)
            layout.write(param, weight)
            layout.write(master, remainder if master.dtype == torch.int16 else p)
        elif stochastic and param.dtype in (torch.bfloat16, torch.float16):
            random = random_bits(p.numel(), seed, indices[i] if indices else i, int(t), p.device)
            layout.write(param, (round_bfloat16 if param.dtype == torch.bfloat16 else round_half)(p, random))
        else:
            layout.write(param, p)


class _Layout:
    """Tensors of one shape as vectors, in the order of memory of the first that is dense, else in that of indices."""

    def __init__(self, *tensors: Tensor):
        self.order = list(range(tensors[0].dim()))
        for x in tensors:
            order = sorted(range(x.dim()), key=lambda d, x=x: (x.stride(d), x.shape[d]), reverse=True)  # type: ignore[misc]
            if x.permute(order).is_contiguous():
                self.order = order
                break

    def flat(self, x: Tensor) -> Tensor:
        return x.permute(self.order).reshape(-1)

    def write(self, x: Tensor, values: Tensor) -> None:
        target = x.permute(self.order)
        target.copy_(values.view(target.shape))


# 16-bit weights


def join(weight: Tensor, remainder: Tensor) -> Tensor:
    """float32 from a bfloat16 weight and the signed 16 bits that rounding took away."""
    return ((weight.view(torch.int16).int() << 16) + remainder.int()).view(torch.float32)


def split(master: Tensor) -> tuple[Tensor, Tensor]:
    """float32 to bfloat16, to nearest with ties away from zero, and the signed 16 bits of difference."""
    bits = master.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    nan = master.isnan()
    weight = torch.where(nan, bits >> 16 | 0x40, (bits + 0x8000) >> 16)
    remainder = torch.where(nan, 0, bits & 0xFFFF)
    return weight.to(torch.int16).view(torch.bfloat16), remainder.to(torch.int16)


def random_bits(count: int, seed: int, parameter: int, step: int, device: torch.device) -> Tensor:
    """16 random bits an element, (count,): eight elements share a counter (element / 8, parameter, step)."""
    counter = torch.arange((count + 7) // 8, device=device)
    words = torch.stack(
        philox(
            torch.tensor(seed, device=device),
            counter,
            counter >> 32,
            torch.tensor(parameter, device=device),
            torch.tensor(step, device=device),
        ),
        -1,
    )
    return torch.stack([words & 0xFFFF, words >> 16], -1).flatten()[:count]


def round_bfloat16(x: Tensor, random: Tensor) -> Tensor:
    """Up with the probability of what is cut off."""
    bits = x.contiguous().view(torch.int32).long() & 0xFFFFFFFF
    finite = x.isfinite()
    rounded = torch.where(finite, (bits + random) >> 16, bits >> 16 | torch.where(x.isnan(), 0x40, 0))
    return rounded.to(torch.int16).view(torch.bfloat16)


def round_half(x: Tensor, random: Tensor) -> Tensor:
    """The same for float16; below 2^-14, where its last bit stays 2^-24, with what 16 bits can tell of the rest."""
    magnitude = x.contiguous().view(torch.int32).long() & 0x7FFFFFFF
    normal = (magnitude + (random >> 3) >> 13) - 0x1C000
    small = magnitude < 0x38800000
    subnormal = torch.where(small, x.abs() * 2.0**40, 0.0).long() + random >> 16
    half = torch.where(small, subnormal, normal).clamp(max=0x7C00)
    half = torch.where(x.isnan(), 0x7E00, half) | torch.where(torch.signbit(x), 0x8000, 0)
    return half.to(torch.int16).view(torch.float16)


# 8-bit moments


def _scales(k: Tensor, first: int) -> Tensor:
    """10^(i - 6) for magnitudes k of decade i, which start at first * 2^i."""
    scale = torch.full_like(k, 1e-6, dtype=torch.float32)
    for i in range(1, 7):
        scale = torch.where(k >= first << i, 10.0 ** (i - 6), scale)
    return scale


def decode(code: Tensor, scale: Tensor, signed: bool) -> Tensor:
    """(n,) float32 from (n,) uint8 and a float32 for each `BLOCK` of them, negative where some are not finite."""
    code = code.int()
    k = torch.where(code > 128, code - 128, code) if signed else code + 1
    bits = k.float().view(torch.int32)
    exponent = (bits >> 23) - 127
    fraction = (bits & 0x7FFFFF | 0x3F800000).view(torch.float32) - 1
    half_part = (126 - exponent << 23).view(torch.float32)
    value = _scales(k, 1 if signed else 2) * ((fraction + half_part) * 0.9 + 0.1)
    value = torch.where(code == 0, 0.0, value)
    if signed:
        value = torch.where(code > 128, -value, value)
    scale = scale.repeat_interleave(BLOCK)[: len(code)]
    size = torch.where(scale < 0, -scale, scale)
    one = torch.where(scale < 0, float("nan") if signed else float("inf"), size)
    return torch.where(code == (128 if signed else 255), one, value * size)


def encode(x: Tensor, signed: bool) -> tuple[Tensor, Tensor]:
    """(n,) uint8 and a float32 for each block of (n,) float32: the largest finite magnitude, negative (and -1 if that
    is 0) where some are not finite, which the code of the largest stands for then."""
    x = x.float()
    finite = torch.nn.functional.pad(x.isfinite(), (0, -len(x) % BLOCK), value=True).view(-1, BLOCK).all(1)
    magnitude = torch.where(x.isfinite(), x.abs(), 0.0)
    largest = torch.nn.functional.pad(magnitude, (0, -len(x) % BLOCK)).view(-1, BLOCK).amax(1)
    scale = torch.where(finite, largest, torch.where(largest > 0, -largest, -1.0))
    size = scale.abs().repeat_interleave(BLOCK)[: len(x)]
    y = torch.where(size == 0, 0.0, magnitude / size)
    first, top = (1, 128) if signed else (2, 256)
    multiplier, parts = torch.full_like(y, 1e6), torch.full_like(y, first)
    for i in range(1, 7):
        inside = y >= torch.tensor(10.0 ** (i - 7))
        multiplier = torch.where(inside, 10.0 ** (6 - i), multiplier)
        parts = torch.where(inside, float(first << i), parts)
    part = (y * multiplier - 0.1) * (1 / 0.9) * parts
    k = (torch.where(part > 0, part, 0.0) + parts).int().clamp(max=top - 1)
    one = torch.where(scale < 0, top - 1, top).repeat_interleave(BLOCK)[: len(x)].int()
    k = torch.where(y >= 1, one, k)
    if signed:
        code = torch.where(x < 0, torch.where(k == top, 255, k + 128), k)
        code = torch.where(y >= torch.tensor(1e-7), code, 0)
    else:
        code = torch.where(magnitude > 0, k - 1, 0)
    return torch.where(x.isfinite(), code, 128 if signed else 255).to(torch.uint8), scale
