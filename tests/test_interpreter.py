"""The Triton kernels of the losses and of pointwise ops in Triton's interpreter, on the CPU, against the references.

As in test_attention_interpreter.py, the rest of the suite starts this file in a process of its own. Not in bfloat16:
the interpreter cuts what should be rounded to it.
"""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch

INSIDE = os.environ.get("TRITON_INTERPRET") == "1"
pytest.importorskip("triton")

if not INSIDE:

    @pytest.mark.parametrize("which", ["not slow", pytest.param("slow", marks=pytest.mark.slow)])
    def test_kernels_in_the_interpreter(which):
        command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "-W", "ignore"]
        result = subprocess.run(
            [*command, "-m", which, __file__],
            env={**os.environ, "TRITON_INTERPRET": "1", "FASTLLM_BACKEND": "triton", "OMP_NUM_THREADS": "1"},
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stdout
        assert "skipped" not in result.stdout

else:
    import bindings
    import dropout_norm_suite
    import test_cross_entropy
    import test_dropout_add_layer_norm
    import test_dropout_add_rms_norm
    import test_geglu
    import test_gelu
    import test_linear_cross_entropy as linear
    import test_rotary
    import test_swiglu

    import fastllm
    from fastllm import ops
    from fastllm.testing import LAYOUTS, make, poisoned_allocations

    DTYPES = [torch.float32, torch.float16]
    FEW = [torch.float32, pytest.param(torch.float16, marks=pytest.mark.slow)]

    @pytest.mark.parametrize("options", test_cross_entropy.OPTIONS, ids=str)
    @pytest.mark.parametrize("dtype", FEW, ids=str)
    def test_cross_entropy_options(options, dtype):
        for reduction in ("mean", "sum", "none"):
            test_cross_entropy.check((7, 133), dtype, reduction=reduction, **options)

    @pytest.mark.parametrize("classes", [1, 2, 127, 1025, 32000, pytest.param(50257, marks=pytest.mark.slow)])
    def test_cross_entropy_class_counts(classes):
        for dtype in (torch.float32, torch.float16):
            test_cross_entropy.check((3, classes), dtype, label_smoothing=0.1)

    @pytest.mark.parametrize("scale", [1e4, 1e-4])
    def test_cross_entropy_huge_and_tiny_logits(scale):
        test_cross_entropy.check((4, 133), scale=scale, softcap=30.0)
        test_cross_entropy.check((4, 133), torch.float16, scale=scale)
        test_cross_entropy.check((4, 1500), offset=scale, label_smoothing=0.1, reduction="none")

    @pytest.mark.parametrize("masked", [-1e4, -1e9, torch.finfo(torch.float32).min, -torch.inf])
    def test_cross_entropy_masked_classes(masked):
        test_cross_entropy.check_masked(masked)
        test_cross_entropy.test_an_ignored_row_may_hold_anything_under_a_softcap("triton")

    @pytest.mark.parametrize("layout", ["transposed", "sliced", "strided", "misaligned"])
    def test_cross_entropy_layouts(layout):
        test_cross_entropy.check((5, 133), layout=layout)

    def test_cross_entropy_elsewhere():
        x = torch.randn(4, 133, requires_grad=True)
        y = torch.tensor([3, -100, 132, 0])
        with poisoned_allocations():
            wanted = torch.autograd.grad(ops.cross_entropy(x, y, label_smoothing=0.1, softcap=3.0), x)[0]
            logits = x * 1
            loss = ops.cross_entropy(logits, y, label_smoothing=0.1, softcap=3.0, inplace=True)
            (grad,) = torch.autograd.grad(loss, logits)
        assert torch.equal(grad, wanted)
        assert grad.data_ptr() == logits.data_ptr()
        assert not grad[1].any()

    def test_cross_entropy_far_rows():
        """Strides take the last row past 2^31 elements; pages that are never touched cost no memory."""
        far = 2**31 + 1024
        storage = torch.empty(far + 64, dtype=torch.float16)
        dense = torch.randn(2, 64).half()
        apart = storage.as_strided((2, 64), (far, 1)).copy_(dense)
        y = torch.tensor([5, 60])
        grads = []
        for x in (dense, apart):
            x.requires_grad_()
            loss = ops.cross_entropy(x, y, reduction="none")
            grads.append((loss, *torch.autograd.grad(loss.sum(), x)))
        assert all(torch.equal(a, b) for a, b in zip(*grads, strict=True))

    @pytest.mark.parametrize(
        "suite",
        [test_swiglu.TestSwiGLU(), pytest.param(test_geglu.TestGEGLU(), marks=pytest.mark.slow)],
        ids=lambda suite: suite.name,
    )
    def test_gated_activations(suite):
        for kwargs in suite.variants:
            for dtype in DTYPES:
                for n in (1, 127, 129, 2049):
                    suite.check(make((3, n), dtype), make((3, n), dtype, seed=1), **kwargs)
                    suite.check(make((2, 2, 2 * n), dtype), **kwargs)
            for layout in LAYOUTS:
                suite.check(*(make((2, 3, 33), seed=i, layout=layout) for i in range(2)), **kwargs)
                suite.check(*(make((2, 3, 33), seed=i) for i in range(2)), grad_layout=layout, **kwargs)
            suite.check(make((3, 133)) * 30, make((3, 133), seed=1), **kwargs)
        suite.test_every_element_is_written()

    @pytest.mark.parametrize("form", ["none", pytest.param("tanh", marks=pytest.mark.slow)])
    def test_gelu_of_input_and_bias(form):
        for dtype in DTYPES:
            for n in (1, 127, 2049):
                test_gelu.check(make((3, n), dtype), make((n,), torch.float16, seed=1), forms=(form,))
            test_gelu.check(make((2, 2, 129), dtype), forms=(form,))
        test_gelu.check(make((90, 8)), make((8,), seed=1), forms=(form,))  # more rows than programs
        for layout in LAYOUTS:
            test_gelu.check(make((2, 3, 33), layout=layout), make((33,), seed=1, layout=layout), forms=(form,))
            test_gelu.check(make((2, 3, 33)), make((33,), seed=1), grad_layout=layout, forms=(form,))
        test_gelu.check(make((3, 133)) * 30, make((133,), seed=1), forms=(form,))
        with poisoned_allocations():
            test_gelu.check(make((3, 133)), make((133,), seed=1), forms=(form,))
        test_gelu.test_gradients_only_where_asked_for()
        test_gelu.test_empty(torch.float32)

    DROPOUT_NORMS = [
        test_dropout_add_layer_norm.TestDropoutAddLayerNorm(),
        test_dropout_add_rms_norm.TestDropoutAddRMSNorm(),
    ]

    @pytest.mark.slow
    @pytest.mark.parametrize("suite", DROPOUT_NORMS, ids=lambda suite: suite.name)
    def test_norms_behind_dropout_in_every_dtype(suite):
        for dtype, parameters in itertools.product(DTYPES, (*DTYPES, None)):
            for shape in ((2, 3, 33), (5, 128), (3, 129), (2, 1000), (9, 1)):
                suite.check(suite.args(shape, dtype, parameters))

    @pytest.mark.parametrize(
        "suite",
        [pytest.param(DROPOUT_NORMS[0], marks=pytest.mark.slow), DROPOUT_NORMS[1]],
        ids=lambda suite: suite.name,
    )
    def test_norms_behind_dropout(suite):
        for dtype, parameters in zip(DTYPES, (torch.float16, None), strict=True):
            suite.check(suite.args((3, 129), dtype, parameters))
        for layout in LAYOUTS:
            suite.check(suite.args((3, 5, 64), layout=layout), grad_layout="contiguous")
            suite.check(suite.args((3, 5, 64)), grad_layout=layout)
        suite.check(suite.args((2, 8192)))
        suite.check(suite.args((40, 8)))  # more rows than programs
        suite.test_gradients_only_where_asked_for()
        suite.test_no_gradient_of_the_norm_where_only_the_sum_was_used()
        suite.test_everything_dropped("triton")
        for shape in ((0, 8), (3, 0)):
            suite.test_empty(f"cpu-{bindings.ISAS[0]}", shape)
        for layout in ("contiguous", "strided"):
            x = make((5, 1001), layout=layout).abs() + 1
            total = suite.op(x, torch.zeros_like(x), (1001,))[1]
            assert torch.equal(total, x * dropout_norm_suite.factors(x))
        with pytest.raises(fastllm.BackendUnavailable, match="rows of up to 8,192 elements, got 8,193"):
            suite.op(*suite.args((2, 8193)))

    @pytest.mark.parametrize("bshd", [False, pytest.param(True, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("interleaved", [False, pytest.param(True, marks=pytest.mark.slow)])
    @pytest.mark.parametrize("dtype", FEW, ids=str)
    def test_rotary_everywhere(dtype, interleaved, bshd):
        for size, half in ((2, 1), (32, 16), (72, 36), (80, 10), (33, 16)):
            test_rotary.check((2, 5, 3, size), 3, half, dtype, bshd, interleaved=interleaved)
        for layout in ("transposed", "strided", "expanded"):
            test_rotary.check(layout=layout, bshd=bshd, interleaved=interleaved)
        test_rotary.test_positions(interleaved)
        test_rotary.test_every_element_is_written()

    def test_rotary_in_place():
        cos, sin = test_rotary.tables(9, 13)
        for dtype in DTYPES:
            q, k = make((2, 4, 9, 32), dtype), make((2, 9, 2, 32), dtype, seed=1).transpose(1, 2)
            wanted = ops.rotary(q, k, cos, sin)
            found = ops.rotary(q, k, cos, sin, inplace=True)
            assert found[0].data_ptr() == q.data_ptr()
            assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))

    @pytest.mark.parametrize("reduction", ["mean", "none"])
    def test_linear_cross_entropy(reduction):
        for dtype in (torch.float32, torch.float16):
            linear.check(*linear.draw(dtype=dtype), reduction=reduction, chunk_size=7, label_smoothing=0.1)

    @pytest.mark.parametrize("stats", [0, 1])
    @pytest.mark.parametrize(
        "options",
        [*(pytest.param(o, marks=pytest.mark.slow) for o in linear.OPTIONS[:-1]), linear.OPTIONS[-1]],
        ids=str,
    )
    def test_loss_and_gradient_of_a_row_by_one_kernel_and_by_two(options, stats, monkeypatch):
        from fastllm.kernels import cross_entropy
        from fastllm.kernels._utils import Config

        blocks = {"REPEAT": 2, "WARPS": 1, "STATS": stats}
        monkeypatch.setattr(cross_entropy, "loss_config", lambda *args: Config(blocks, 1, 1))
        linear.check(*linear.draw(classes=301), chunk_size=9, **options)
        linear.test_an_ignored_row_may_hold_anything()

    @pytest.mark.parametrize(("stride", "stride_d"), [(133, 133), (134, 135), (133, 144), (136, 144)])
    def test_rows_that_start_anywhere_are_written_and_their_neighbours_are_not(stride, stride_d):
        from fastllm.kernels import cross_entropy

        for classes in (1, 3, 7, 8, 9, 131, 133):
            memory = torch.randn(7 * stride).half()
            logits = memory.as_strided((6, classes), (stride, 1), 3)
            target = torch.arange(6) % classes
            stats = torch.empty(3, 6)
            cross_entropy.cross_entropy_fwd(*stats, None, logits, target, 0.0)
            torch.testing.assert_close(stats[0] + stats[1], logits.float().logsumexp(1))
            torch.testing.assert_close(stats[0] + stats[2], logits.float().gather(1, target[:, None])[:, 0])
            out = torch.full((7 * stride_d,), 7.0).half()
            grad = out.as_strided((6, classes), (stride_d, 1), 5)
            one = torch.ones(6)
            cross_entropy.cross_entropy_bwd(grad, one, -one, None, logits, target, stats[0], stats[1], 0.0)
            wanted = logits.float().softmax(1) - torch.nn.functional.one_hot(target, classes)
            torch.testing.assert_close(grad.float(), wanted, rtol=2e-3, atol=1e-4)
            grad.fill_(7.0)
            assert out.eq(7.0).all()
