"""The kernels library of Hugging Face: layers that a model declares by name get the forwards of fastllm's ops."""

import torch
from kernels import Mode, kernelize, use_kernel_forward_from_hub, use_kernel_mapping

from fastllm.compat.kernels import mapping


@use_kernel_forward_from_hub("RMSNorm")  # as models of transformers declare theirs
class Norm(torch.nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(width))
        self.variance_epsilon = 1e-6

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        scale = torch.rsqrt(hidden_states.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * hidden_states * scale


torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Embedding(256, 64), Norm(64), torch.nn.Linear(64, 256))
with use_kernel_mapping(mapping()):
    kernelize(model, mode=Mode.TRAINING | Mode.TORCH_COMPILE)
print(f"the norm runs {model[1].forward.__module__}.{model[1].forward.__qualname__}")

optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
tokens = torch.randint(256, (4, 33))
for step in range(10):
    loss = torch.nn.functional.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
    print(f"step {step} loss {loss.item():.4f}")
