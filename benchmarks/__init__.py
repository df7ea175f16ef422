"""Benchmarks of every op against what its user would otherwise run: `fastllm bench`.

A module named after an op declares its `cases(device, quick)`; `suite` finds it by that. `harness` measures, `report`
draws. Results that were measured live in `results/`.
"""
