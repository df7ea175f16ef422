"""The specification of every op in readable PyTorch: what kernels are tested against, and what runs without them."""
