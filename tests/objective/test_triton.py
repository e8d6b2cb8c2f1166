"""The Triton kernels: their cases under the interpreter and on a GPU, and that they compile for one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

triton = pytest.importorskip("triton")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402
from triton.runtime.jit import mangle_type  # noqa: E402

from avatarl import AvataRLConfig, linear_avatarl_loss  # noqa: E402
from avatarl.objective.fused import triton_kernels  # noqa: E402

CASES = Path(__file__).parent / "triton_cases.py"
compiles = pytest.mark.skipif(triton.knobs.runtime.interpret, reason="TRITON_INTERPRET is set")
on_a_gpu = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]


@pytest.mark.parametrize(
    "interpret",
    [pytest.param("1", marks=pytest.mark.slow), pytest.param("0", marks=on_a_gpu)],
    ids=["interpreted", "on a GPU"],
)
def test_cases(interpret):
    command = [sys.executable, "-m", "pytest", "--noconftest", "-p", "no:cacheprovider", "-q", str(CASES)]
    environment = {**os.environ, "TRITON_INTERPRET": interpret, "OMP_NUM_THREADS": "1"}
    run = subprocess.run(command, env=environment, capture_output=True, text=True, cwd=CASES.parents[2])
    assert run.returncode == 0, run.stdout[-20_000:] + run.stderr[-5000:]
    assert " passed" in run.stdout


def random_inputs(positions, vocabulary, device="cpu", dtype=torch.bfloat16):
    generator = torch.Generator().manual_seed(0)

    def normal(*shape):
        return torch.randn(*shape, generator=generator).to(device, dtype)

    targets = torch.randint(vocabulary, (positions,), generator=generator).to(device)
    heads = normal(positions, 64).requires_grad_(), normal(vocabulary, 64).requires_grad_()
    return *heads, normal(positions, 32), normal(vocabulary, 32), targets


@compiles
def test_a_cpu_needs_the_interpreter():
    with pytest.raises(ValueError, match="impl='triton' needs a CUDA device, or TRITON_INTERPRET=1"):
        linear_avatarl_loss(*random_inputs(3, 31), AvataRLConfig.article(top_k=4), impl="triton")


@compiles
@pytest.mark.filterwarnings("ignore:TRITON_DEFAULT_FP_FUSION")
def test_kernels_compile_for_a_gpu(monkeypatch, tmp_path):
    """To machine code for compute capability 9.0, with the arguments of real calls; nothing is run."""
    compiled = []

    def compile_only(kernel, *args, grid, warmup, num_warps, **constants):
        arguments = {**dict(zip(kernel.arg_names, args, strict=False)), **constants}
        signature, values = {}, {}
        for i, (name, value) in enumerate(arguments.items()):
            if value is None or kernel.params[i].is_constexpr:
                signature[name], values[(i,)] = "constexpr", value
            else:
                signature[name] = tuple(map(mangle_type, value)) if isinstance(value, tuple) else mangle_type(value)
        assert list(arguments) == kernel.arg_names
        target = GPUTarget("cuda", 90, 32)
        found = triton.compile(ASTSource(kernel, signature, values), target=target, options={"num_warps": num_warps})
        assert found.asm["cubin"]
        compiled.append(kernel.__name__)

    monkeypatch.setattr(triton.knobs.cache, "dir", str(tmp_path))
    monkeypatch.setattr(triton.JITFunction, "run", compile_only)
    monkeypatch.setattr(triton_kernels.TritonKernels, "check_device", lambda *_: None)
    kernels = triton_kernels.TritonKernels()
    logits, narrow = torch.zeros(3, 50_257), torch.zeros(3, 50_257, dtype=torch.bfloat16)
    targets = torch.zeros(3, dtype=torch.int64)
    numbers, *_ = kernels.statistics(narrow, 1.3)
    kernels.gradient_(narrow, 1.3, numbers, numbers, None)
    kernels.gradient_(logits, 1.0, numbers, numbers, numbers)
    kernels.judge(narrow, [narrow, logits], targets, AvataRLConfig.article(top_k=64))
    kernels.judge(narrow, [narrow, logits], targets, AvataRLConfig.released(critic_weight=(0.3, 0)))
    kernels.judge(logits, [narrow], targets, AvataRLConfig.article(pool="arithmetic"))
    kernels.judge(logits, [], targets, AvataRLConfig.article(critic_weight=0, threshold="none"))
    assert {name: compiled.count(name) for name in compiled} == {"_read_rows": 10, "_write_gradient": 2, "_pay": 4}


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("config", [AvataRLConfig.article(), AvataRLConfig.article(pool="arithmetic")])
def test_the_same_as_chunked_at_a_real_vocabulary(config):
    """Ties among bfloat16 logits may fall either way, so a few positions may have other actions."""
    results = []
    for impl in ("chunked", "triton"):
        hidden, weight, *others = random_inputs(500, 50_257, "cuda")
        loss, metrics = linear_avatarl_loss(hidden, weight, *others, config, impl=impl)
        results.append((loss, metrics, torch.autograd.grad(loss, (hidden, weight))))
    (expected, expected_metrics, expected_gradients), (found, metrics, gradients) = results
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    for name, value in expected_metrics.items():
        assert metrics[name].item() == pytest.approx(value.item(), rel=1e-2, abs=1e-5), name
    for one, other in zip(gradients, expected_gradients, strict=True):
        assert (one.float() - other.float()).norm() <= 1e-2 * other.float().norm()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_offsets_beyond_32_bits():
    """Three rows, 2^30 elements apart and more: the last begins beyond 2^31."""
    vocabulary, stride = 5000, 2**30 + 16
    logits = torch.empty(2 * stride + vocabulary, device="cuda", dtype=torch.bfloat16)
    logits = logits.as_strided((3, vocabulary), (stride, 1))
    logits.copy_(torch.randn(3, vocabulary))
    near, kernels = logits.clone(), triton_kernels.TritonKernels()
    statistics, expected = kernels.statistics(logits, 1.0), kernels.statistics(near, 1.0)
    assert all(torch.equal(one, other) for one, other in zip(statistics, expected, strict=True))
    judge = (torch.zeros(3, dtype=torch.int64, device="cuda"), AvataRLConfig.article())
    for one, other in zip(kernels.judge(logits, [logits], *judge), kernels.judge(near, [near], *judge), strict=True):
        assert not isinstance(one, torch.Tensor) or torch.equal(one, other)
    found = [kernels.gradient_(x, 1.0, *expected[:2], None) for x in (logits, near)]
    assert torch.equal(*found)
