"""What all models are tried with: batches with padding, and training that must help."""

from __future__ import annotations

import torch

from fastllm import data
from fastllm.optim import AdamW


def rows(low: int, high: int, lengths: list[int], pad: int, seed: int = 0) -> torch.Tensor:
    """(B, T) tokens from low to high, rows of these lengths, padded behind."""
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(low, high, (len(lengths), max(lengths)), generator=generator)
    return tokens.masked_fill(torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None], pad)


def away_from_initial_values(model: torch.nn.Module, scale: float = 0.1, seed: int = 0) -> torch.nn.Module:
    """At which norms' weights and biases say nothing. The sines that transformers' Marian has as a parameter stay."""
    torch.manual_seed(seed)
    sines = "embed_positions.weight" if type(model).__name__ == "MarianMTModel" else "\0"
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if not name.endswith(sines):
                parameter.add_(scale * torch.randn_like(parameter))
    return model


def same_gradients(a: torch.nn.Module, b: torch.nn.Module, rtol: float = 1e-4, atol: float = 1e-5) -> None:
    for (name, one), other in zip(a.named_parameters(), b.parameters(), strict=True):
        if one.grad is None:
            assert other.grad is None, name
            continue
        torch.testing.assert_close(one.grad, other.grad, rtol=rtol, atol=atol, msg=lambda t, name=name: f"{name}: {t}")


def losses_of_training(model: torch.nn.Module, batch, steps: int, lr: float = 3e-3) -> list[float]:
    """The losses of `batch(step)`, arguments of the model, over as many steps."""
    optimizer = AdamW(model.parameters(), lr=lr)
    losses = []
    model.train()
    for step in range(steps):
        loss = model(*batch(step))
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def text_windows(count: int, length: int) -> torch.Tensor:
    """(count, length) bytes of Python's own help texts."""
    text = data.topics_text().encode()[: count * length]
    return torch.tensor(list(text)).view(count, length)
