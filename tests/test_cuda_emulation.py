"""The emulation itself: it must find what it is there to find."""

from __future__ import annotations

import subprocess
from pathlib import Path

import bindings
import pytest

pytestmark = bindings.needs_compiler

HERE = Path(__file__).parent / "cuda_emulation"
KERNELS = """
#include "cuda_runtime.h"
#include <cstdio>
#include <exception>

__global__ void missing_barrier(int* out) {
  __shared__ int shared[64];
  shared[threadIdx.x] = threadIdx.x + 64 * blockIdx.x;
  BARRIER
  out[blockIdx.x * 64 + threadIdx.x] = shared[63 - threadIdx.x];
}

__global__ void divergent_barrier(int*) {
  if (threadIdx.x < 32) {
    __syncthreads();
  }
}

__global__ void divergent_shuffle(int*) {
  if (threadIdx.x % 2 == 0) {
    __shfl_xor_sync(0xffffffffu, 1.0f, 2);
  }
}

__global__ void butterfly(int* out) {
  float value = threadIdx.x;
  for (int mask = 16; mask > 0; mask /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, mask);
  }
  out[blockIdx.x * 64 + threadIdx.x] = static_cast<int>(value);
}

extern "C" void emulation_set_order(int);

int main() {
  for (int order = 0; order < 3; ++order) {
    emulation_set_order(order);
    int out[128] = {};
    try {
      fastllm::launch_shared(KERNEL, dim3(2), dim3(64), 0, nullptr, static_cast<int*>(out));
    } catch (const std::exception& error) {
      std::printf("%s\\n", error.what());
      continue;
    }
    for (int i : {0, 40, 63, 64, 127}) {
      std::printf("%d ", out[i]);
    }
    std::printf("\\n");
  }
}
"""


def run(tmp_path: Path, kernel: str, barrier: str = "__syncthreads();") -> list[str]:
    source, program = tmp_path / "kernels.cpp", tmp_path / "program"
    source.write_text(KERNELS.replace("BARRIER", barrier).replace("KERNEL", kernel))
    command = [bindings.CXX, "-std=c++17", f"-I{HERE}", source, HERE / "emulation.cpp", "-o", program]
    subprocess.run(command, check=True)
    return subprocess.run([program], check=True, capture_output=True, text=True).stdout.splitlines()


def test_barrier_and_blocks(tmp_path):
    assert run(tmp_path, "missing_barrier") == ["63 23 0 127 64 "] * 3


def test_a_missing_barrier_changes_the_result_with_the_order(tmp_path):
    assert len(set(run(tmp_path, "missing_barrier", barrier=""))) > 1


def test_shuffle(tmp_path):
    assert (
        run(tmp_path, "butterfly")
        == [f"{sum(range(32))} {sum(range(32, 64))} {sum(range(32, 64))} {sum(range(32))} {sum(range(32, 64))} "] * 3
    )


@pytest.mark.parametrize("kernel", ["divergent_barrier", "divergent_shuffle"])
def test_divergence_is_an_error(tmp_path, kernel):
    lines = run(tmp_path, kernel)
    assert len(lines) == 3
    assert all("deadlock" in line for line in lines)
