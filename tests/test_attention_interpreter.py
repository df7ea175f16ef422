"""Every Triton attention kernel in Triton's interpreter, on the CPU, against the reference in float64.

TRITON_INTERPRET must be set before Triton is imported, and holds for the whole process: run by the rest of the suite,
this file starts itself again, in processes that have half of the cases each.
"""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton")

if not INSIDE:

    @pytest.mark.parametrize("shard", [0, 1])
    @pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
    def test_kernels_in_the_interpreter(which, shard):
        more = {
            "TRITON_INTERPRET": "1",
            "FASTLLM_BACKEND": "triton",
            "FASTLLM_SHARD": str(shard),
            "OMP_NUM_THREADS": "1",
        }
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
        result = subprocess.run(
            [*command, "-m", which, __file__], env={**os.environ, **more}, capture_output=True, text=True
        )
        assert result.returncode == 0, result.stdout
        assert " passed" in result.stdout


SHARD = int(os.environ.get("FASTLLM_SHARD", "-1"))
inside = pytest.mark.skipif(not INSIDE, reason="run by test_kernels_in_the_interpreter")


def shared_out(cases: list) -> list:
    return [case for i, case in enumerate(cases) if INSIDE and SHARD in (-1, i % 2)]


if INSIDE:
    from attention_suite import FEATURES, PAIRS, check, check_kvcache, check_varlen, cumulative, eager_attention

    import fastllm
    from fastllm import ops
    from fastllm.testing import poisoned_allocations

    DTYPES = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]
    SIZES = [(1, 16), (2, 40), (63, 64), (65, 80), (127, 128), (130, 40), (130, 64), (65, 128)]

    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    @pytest.mark.parametrize(("rows", "size"), shared_out(SIZES))
    def test_sizes(rows, size, dtype):
        check(("causal",), shape=(1, 2 if rows < 100 else 1, rows, rows), size=size, dtype=dtype)

    @pytest.mark.parametrize("feature", shared_out(list(FEATURES)))
    @pytest.mark.parametrize("dtype", DTYPES, ids=str)
    def test_features_alone(feature, dtype):
        check((feature,), shape=(2, 2, 33, 18) if dtype == torch.float16 else (1, 2, 37, 53), dtype=dtype)

    @pytest.mark.slow
    @pytest.mark.parametrize("pair", shared_out(PAIRS), ids="-".join)
    def test_features_in_pairs(pair):
        check(pair, shape=(1, 2 if "gqa" in pair else 1, 37, 41))

    @pytest.mark.slow
    @pytest.mark.parametrize("case", shared_out([
        {"shape": (1, 1, 70, 33), "names": ("causal", "bottom_right")},  # rows without keys
        {"shape": (1, 1, 33, 70), "names": ("causal", "bottom_right")},
        {"shape": (1, 1, 70, 33), "names": ("causal", "bottom_right", "sinks")},
        {"shape": (1, 1, 1, 130), "names": ()},
        {"shape": (1, 1, 130, 1), "names": ("causal",)},
        {"shape": (1, 1, 100, 100), "window_size": (0, 0)},
        {"shape": (1, 1, 100, 100), "window_size": (40, 0)},
        {"shape": (1, 1, 100, 100), "window_size": (-1, 7)},
        {"shape": (1, 1, 100, 40), "window_size": (5, 3)},
        {"shape": (1, 1, 40, 100), "window_size": (5, 3), "names": ("bottom_right",)},
        {"shape": (1, 2, 40, 40), "value_size": 40},
        {"shape": (1, 2, 40, 40), "size": 40, "value_size": 16},
        {"shape": (2, 2, 40, 40), "bshd": True},
        {"shape": (2, 2, 40, 40), "layout": "strided"},
        {"shape": (2, 2, 40, 40), "layout": "expanded", "grad_layout": "scalar"},
        {"shape": (1, 6, 20, 20), "names": ("gqa", "causal", "dropout")},
        {"shape": (1, 2, 40, 40), "dropout_p": 1.0},
        {"shape": (1, 1, 20, 20), "size": 160},
        {"shape": (1, 1, 20, 20), "size": 256, "names": ("causal",)},
        {"shape": (1, 2, 40, 40), "names": ("causal", "window", "float_mask", "softcap", "sinks", "alibi", "dropout")},
    ]), ids=str)  # fmt: skip
    def test_corners(case):
        check(case.pop("names", ()), **case)

    @pytest.mark.parametrize("names", shared_out([
        ("gqa", "causal"), ("window",), ("dropout", "gqa"), ("softcap", "alibi"),
        *(pytest.param(names, marks=pytest.mark.slow) for names in (
            (), ("causal",), ("sinks", "causal"), ("window", "causal", "softcap", "sinks", "alibi", "dropout", "gqa"),
        )),
    ]), ids=str)  # fmt: skip
    def test_varlen(names):
        check_varlen((5, 0, 70, 33), (50, 4, 0, 33), names)
        check_varlen((1, 40, 17), None, names, dtype=torch.float16)

    @pytest.fixture
    def specialised(monkeypatch) -> list[str]:
        """Hopper's kernels, in small tiles, for every call; gives the names of what is launched."""
        from fastllm.kernels import _attention_config, _utils, attention

        launched, launch = [], _utils.launch

        def listen(kernel, *args, **kwargs):
            launched.append(kernel.fn.__name__.strip("_").removesuffix("_kernel"))
            launch(kernel, *args, **kwargs)

        small = {"fwd": (32, 16), "dkdv": (16, 32), "dq": (32, 16)}
        tiles = {kind: [_attention_config._c(*blocks, 1, 1, True)] for kind, blocks in small.items()}
        monkeypatch.setattr(_utils, "launch", listen)
        monkeypatch.setattr(attention, "unsuited", lambda chip, args: None)
        monkeypatch.setattr(attention, "SPECIALISED", tiles)
        return launched

    HOPPER = {"attention_fwd_hopper", "attention_delta", "attention_dkdv_hopper", "attention_dq_hopper"}

    @pytest.mark.parametrize("case", shared_out([
        {"names": ("causal", "gqa"), "shape": (1, 4, 70, 70)},
        {"names": ("window", "gqa"), "shape": (1, 4, 33, 65)},
        {"names": ("causal", "bottom_right"), "shape": (1, 1, 70, 33)},  # rows without keys
        {"names": ("causal", "sinks"), "shape": (2, 2, 37, 37)},
        {"shape": (1, 1, 33, 70), "window_size": (5, 3)},
        {"shape": (1, 2, 40, 40), "size": 128, "bshd": True},
    ]), ids=str)  # fmt: skip
    def test_specialised_kernels(specialised, case):
        case = {"size": 64, **case}
        check(case.pop("names", ()), dtype=torch.float16, **case)
        assert set(specialised) == HOPPER

    @pytest.mark.parametrize("names", shared_out([("gqa", "causal"), ("window", "gqa", "sinks")]), ids=str)
    def test_specialised_kernels_of_packed_sequences(specialised, names):
        check_varlen((5, 0, 70, 33), (50, 4, 0, 33), names, size=64, dtype=torch.float16)
        assert set(specialised) == {*HOPPER, "packed_tiles"}

    @pytest.mark.parametrize("case", shared_out([
        {"shape": (1, 1, 20, 20), "size": 512, "names": ("causal",)},
        {"shape": (1, 2, 17, 33), "size": 300, "value_size": 512, "names": ("gqa", "softcap")},
    ]), ids=str)  # fmt: skip
    def test_wide_heads(case):
        check(case.pop("names"), **case)

    @pytest.mark.parametrize("case", shared_out([
        {"lengths": (1, 50, 99)},
        {"lengths": (0, 5, 100), "size": 40},
        {"lengths": (5, 60), "size": 512},
        {"lengths": (40, 50, 60), "rows": 3, "new": 3, "names": ("causal",)},
        {"lengths": (0, 50, 60), "rows": 5, "new": 5, "names": ("causal", "sinks")},
        {"lengths": (30, 90), "names": ("window", "alibi")},
        {"lengths": (30, 90), "rows": 2, "names": ("softcap", "sinks"), "bshd": True},
        {"lengths": (700, 3), "capacity": 800, "kv_heads": 4, "dtype": torch.float16},
        {"lengths": (20, 7), "rows": 9, "heads": 8, "kv_heads": 1, "names": ("causal", "window")},
    ]), ids=str)  # fmt: skip
    def test_kvcache(case):
        case = dict(case)
        check_kvcache(case.pop("lengths"), case.pop("names", ()), **case)

    if SHARD in (-1, 0):

        def test_offsets_beyond_2_to_the_31():
            """Strides take the last batch, head and row there; pages that are never touched cost no memory."""
            far = 2**31 + 1024
            storage = torch.empty(3 * far, dtype=torch.float16)
            for strides in ((far, 2048, 16, 1), (2048, far, 16, 1), (4096, 2048, far // 32 * 16, 1)):
                rows = 4 if strides[2] > 16 else 20
                shape = (2, 2, rows, 16)
                if sum((n - 1) * s for n, s in zip(shape, strides, strict=True)) >= storage.numel():
                    continue
                dense = [torch.randn(shape).half() for _ in range(3)]
                results = []
                for apart in (False, True):
                    tensors = [x.clone() for x in dense]
                    if apart:
                        for n, x in enumerate(dense):
                            tensors[n] = storage.as_strided(shape, strides, 100_000 * n).copy_(x)
                    tensors = [x.requires_grad_() for x in tensors]
                    out = ops.attention(*tensors, is_causal=True)
                    results.append((out, *torch.autograd.grad(out, tensors, dense[0])))
                assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

        def test_every_element_is_written_and_the_same_every_time():
            cu_q, cu_k = cumulative((5, 40)), cumulative((30, 9))
            runs = []
            with poisoned_allocations():
                for _ in range(2):
                    torch.manual_seed(0)
                    q, k, v = (torch.randn(1, 2, 50, 40, requires_grad=True) for _ in range(3))
                    out, lse = ops.attention(q, k, v, is_causal=True, return_lse=True, dropout_p=0.1)
                    runs.append([out, lse, *torch.autograd.grad(out.square().sum(), (q, k, v))])
                    q, k, v = (torch.randn(50, 2, 16, requires_grad=True) for _ in range(3))  # 5 and 11 rows behind
                    out, lse = ops.attention_varlen(q, k, v, cu_q, cu_k, 40, 30, return_lse=True)
                    assert not out[45:].any()
                    runs[-1] += [out, *torch.autograd.grad(out.square().sum(), (q, k, v))]
            for first, second in zip(*runs, strict=True):
                assert not first.isnan().any()
                assert torch.equal(first, second)

        def test_fully_masked_rows():
            q, k, v = (torch.randn(1, 1, 20, 16, requires_grad=True) for _ in range(3))
            mask = torch.ones(20, 20, dtype=torch.bool)
            mask[3] = False
            for given in (mask, torch.zeros(20, 20).masked_fill(~mask, -torch.inf)):
                out, lse = ops.attention(q, k, v, given, return_lse=True)
                dq, dk, dv = torch.autograd.grad(out.sum(), (q, k, v))
                assert not out[0, 0, 3].any()
                assert lse[0, 0, 3] == -torch.inf
                assert not dq[0, 0, 3].any()
                assert not any(x.isnan().any() for x in (out, dq, dk, dv))

        def test_a_sink_of_minus_infinity_is_none():
            q, k, v = (torch.randn(1, 2, 20, 16, requires_grad=True) for _ in range(3))
            sinks = torch.tensor([-torch.inf, 0.5], requires_grad=True)
            mask = torch.ones(20, 20, dtype=torch.bool)
            mask[3] = False
            out, lse = ops.attention(q, k, v, mask, sinks=sinks, return_lse=True)
            grads = torch.autograd.grad(out.square().sum(), (q, k, v, sinks))
            assert lse[0, 0, 3] == -torch.inf
            assert not any(x.isnan().any() for x in (out, lse, *grads))
            assert grads[3][0] == 0

        @pytest.mark.parametrize("kernels", ["specialised", "others"])
        def test_what_other_sequences_hold_stays_there(kernels, request):
            """NaN in the sequence before and in the rows behind the last, in everything that a call reads."""
            if kernels == "specialised":
                request.getfixturevalue("specialised")
            *tensors, dout = (torch.randn(60, 2, 64, dtype=torch.float16) for _ in range(4))
            cu = cumulative((17, 23))
            results = []
            for poisoned in (False, True):
                q, k, v, d = (x.clone() for x in (*tensors, dout))
                for x in (q, k, v, d):
                    if poisoned:
                        x[:17] = x[40:] = torch.nan
                leaves = [x.requires_grad_() for x in (q, k, v)]
                out = ops.attention_varlen(*leaves, cu, cu, 23, 23, is_causal=True)
                results.append([x[17:40] for x in (out, *torch.autograd.grad(out, leaves, d))])
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

        @pytest.mark.parametrize("logit", [100.0, -100.0])
        def test_large_sinks(logit):
            q, k, v = (torch.randn(37, 2, 16, requires_grad=True) for _ in range(3))
            sinks = torch.tensor([logit, 0.5], requires_grad=True)
            cu = cumulative((20, 17))
            dense = [x.unsqueeze(0).transpose(1, 2) for x in (q, k, v)]
            found = []
            for backend in ("triton", "reference"):
                with fastllm.use_backend(backend):
                    out = ops.attention_varlen(q, k, v, cu, cu, 20, 20, sinks=sinks)
                    found.append(torch.autograd.grad(out.square().sum(), sinks)[0])
                    found.append(torch.autograd.grad(ops.attention(*dense, sinks=sinks).square().sum(), sinks)[0])
            torch.testing.assert_close(found[0], found[2])
            torch.testing.assert_close(found[1], found[3])

        def test_the_table_of_packed_sequences():
            from fastllm.kernels.attention import Packed

            cu_q, cu_k = cumulative((5, 0, 70, 33)), cumulative((50, 4, 0, 33))
            packed = Packed(cu_q, cu_k)
            table = packed.tiles(120, 90, 32, False)
            assert table.tolist() == [
                [0, 0, 0, 0, 5, 50], [3, 1, 75, 54, 33, 33], [3, 0, 75, 54, 33, 33], [2, 2, 5, 54, 70, 0],
                [2, 1, 5, 54, 70, 0], [2, 0, 5, 54, 70, 0], [4, 0, 108, 87, 12, 0], [0] * 6,
            ]  # fmt: skip
            keys = packed.tiles(120, 90, 32, True)
            assert keys[:3].tolist() == [[3, 1, 75, 54, 33, 33], [3, 0, 75, 54, 33, 33], [0, 1, 0, 0, 5, 50]]
            assert packed.tiles(120, 90, 32, False) is table

        def test_packed_sequences_that_move_within_their_memory():
            """What no version counter tells, as a compiler's reuse of a buffer and a broadcast."""
            q, k, v = (torch.randn(40, 2, 16) for _ in range(3))
            cu = cumulative((17, 23))
            ops.attention_varlen(q, k, v, cu, cu, 23, 23)
            cu.data.copy_(cumulative((30, 10)))
            found, fresh = (ops.attention_varlen(q, k, v, c, c, 30, 30) for c in (cu, cu.clone()))
            assert torch.equal(found, fresh)

        def test_no_sequences():
            q, k, v = (torch.randn(3, 2, 16, requires_grad=True) for _ in range(3))
            cu = torch.zeros(1, dtype=torch.int32)
            out = ops.attention_varlen(q, k, v, cu, cu, 0, 0, alibi_slopes=torch.ones(0, 2))
            assert not any(x.any() for x in (out, *torch.autograd.grad(out.sum(), (q, k, v))))

        def test_lengths_outside_the_cache_read_nothing_outside_it():
            from fastllm.kernels import attention_kvcache as kernels

            q, cache = torch.randn(3, 2, 1, 16), torch.randn(3, 2, 40, 16)
            results = []
            for lengths in ([-5, 99, 7], [0, 40, 7]):
                out, lse = torch.empty_like(q), torch.empty(3, 2, 1)
                scores = kernels.Scores(0.0, 0.25, -1, 0, 0.0, True)
                kernels.attention_kvcache_fwd(out, lse, q, cache, cache, torch.tensor(lengths), None, None, scores)
                results.append((out, lse))
            assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))

        def test_either_switch_of_float32_precision():
            """torch refuses to read the old one once the new one was used."""
            from fastllm.kernels import _utils

            matmul, before = torch.backends.cuda.matmul, torch.backends.cuda.matmul.fp32_precision
            try:
                for value, expected in (("tf32", "tf32"), ("ieee", "ieee")):
                    matmul.fp32_precision = value
                    assert _utils.precision(torch.float32) == expected
                    assert _utils.precision(torch.float16) == "ieee"
                    q = torch.randn(1, 1, 4, 16)
                    torch.testing.assert_close(ops.attention(q, q, q), eager_attention(q, q, q))
            finally:
                matmul.fp32_precision = before
            for allowed in (True, False):
                matmul.allow_tf32 = allowed
                assert _utils.precision(torch.float32) == ("tf32" if allowed else "ieee")

        def test_what_the_kernels_refuse():
            q = torch.randn(1, 1, 4, 16)
            mask = torch.zeros(4, 4, requires_grad=True)
            for args, kwargs, reason in (
                ((q.bfloat16(),) * 3, {}, "interpreter multiplies bfloat16"),
                ((q.double(),) * 3, {}, "got float64"),
                ((q, q, q, mask), {}, "attn_mask requires grad"),
                ((q, q, q), {"scale": -1.0}, "scale must be positive"),
                ((torch.randn(1, 1, 4, 520),) * 3, {}, "head sizes go to 512, got 520"),
            ):
                with pytest.raises(fastllm.BackendUnavailable, match=reason):
                    ops.attention(*args, **kwargs)

        def test_autotune_keeps_the_fastest(monkeypatch, tmp_path):
            from fastllm.kernels import _utils

            monkeypatch.setenv("FASTLLM_AUTOTUNE", "1")
            monkeypatch.setenv("FASTLLM_CACHE", str(tmp_path))
            monkeypatch.setattr(_utils, "_tuned", None)
            seconds = iter((3.0, 1.0, 2.0))
            monkeypatch.setattr(_utils, "_milliseconds", lambda run, config: next(seconds))
            configs = [_utils.Config({"BLOCK_M": n}) for n in (16, 32, 64)]
            assert _utils.choose(("a", 1), configs[0], configs[1:], lambda config: None) == configs[1]
            monkeypatch.setattr(_utils, "_tuned", None)  # another process: read from the file, not timed again
            assert _utils.choose(("a", 1), configs[0], configs[1:], lambda config: None) == configs[1]
            monkeypatch.setenv("FASTLLM_AUTOTUNE", "0")
            assert _utils.choose(("a", 1), configs[0], configs[1:], lambda config: None) == configs[0]
