"""Parity suite at full size, on a GPU: `python3 -m pytest -m gpu tests/test_gpu.py`, or `make test-gpu`.

Needs torch, triton, numpy and pytest. Parts, for `-k`: oracle, references, full_size, graphed, batch_hard. Compiling
the kernels takes most of the time, on one core a test; with pytest-xdist, `make test-gpu` runs eight at once.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import rru_fast
from benchmarks.gpu.fragments import fragments
from rru_fast import backends, reference
from rru_fast.auto import choice, decisions
from rru_fast.testing import EXACT, assert_parity, gradients, poisoned_memory, relative_error
from tests import parity
from tests.parity import GROUPS, ODD_SHAPES, VARIANTS, Call, Case

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
]
CUDA = torch.device("cuda")
_, *BACKENDS = backends.serving(CUDA)
every_backend = pytest.mark.parametrize("backend", BACKENDS)
# The CUDA kernels have no float64; what they do not carry, another backend runs.
in_float64 = pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "cuda"])
PAPER = Case((20, 8, 2048, 8, 8), hidden=256, spatial_hidden=128)
LARGE = [
    PAPER,
    Case((20, 8, 2048, 8, 8), hidden=256, spatial_hidden=128, bn_groups=4),
    Case((20, 8, 2048, 8, 8), hidden=256, spatial_hidden=128, inputs="raw"),
    Case((1, 200, 2048, 8, 8), hidden=256, spatial_hidden=128, mode="eval"),
    Case((8, 4, 2048, 16, 8), hidden=256, spatial_hidden=128),
    Case((6, 20, 512, 8, 4), hidden=128, spatial_hidden=64, mode="ragged"),
]


def on_gpu(call: Call) -> Call:
    return call.map(lambda v: v.cuda())


def skip_unless_carried(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Skip a call that a backend leaves to another, of which there is a test."""
    call = {"dtype": str(dtype).removeprefix("torch."), "inputs": case.inputs}
    sizes = {"channels": case.shape[2], "positions": case.shape[3] * case.shape[4]}
    sizes |= {"hidden": case.hidden, "spatial_hidden": case.spatial_hidden}
    if backend not in backends.serving(CUDA, "refine", **call, **sizes):
        pytest.skip(f"{backend} leaves it to another backend")


@pytest.fixture(autouse=True)
def _exact() -> Iterator[None]:
    """Float32 as such in the reference's convolution too, which by default is in TF32: its error is the yardstick."""
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.set_float32_matmul_precision(before[0])
    torch.backends.cudnn.allow_tf32 = before[1]


@pytest.fixture
def tf32(_exact: None) -> None:
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.allow_tf32 = True


@in_float64
@pytest.mark.parametrize("case", [*VARIANTS, *GROUPS, *ODD_SHAPES], ids=str)
def test_float64_equals_the_oracle(case: Case, backend: str) -> None:
    call = parity.make_call(case)
    oracle = parity.run(case, call, "reference")
    with poisoned_memory():
        got = parity.run(case, on_gpu(call), backend)
    for name, wanted in oracle.items():
        assert relative_error(got[name].cpu(), wanted) <= EXACT, name


def assert_case_parity(
    case: Case, dtype: torch.dtype, backend: str, seeds: Iterable[int], rounding: float | None = None
) -> None:
    """Hold a case to twice the reference's error plus `rounding`, by default one of the dtype."""
    draws = []
    for seed in seeds:
        call = on_gpu(parity.make_call(case, dtype, seed))
        low = call.map(lambda v: v.to(dtype))
        draws.append(
            (parity.run(case, low, backend), parity.run(case, low, "reference"), parity.run(case, call, "reference"))
        )
    assert_parity(draws, rounding)


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", [*VARIANTS, *GROUPS, *ODD_SHAPES], ids=str)
def test_error_is_at_most_twice_the_references(case: Case, dtype: torch.dtype, backend: str) -> None:
    """Of fp32 tensors of a handful of elements by as much more as the GPU's approximate functions are off."""
    skip_unless_carried(case, dtype, backend)
    if dtype == torch.float32:
        assert_case_parity(case, dtype, backend, range(15), parity.APPROXIMATE)
    else:
        assert_case_parity(case, dtype, backend, range(5))


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("case", LARGE, ids=str)
def test_error_at_full_size(case: Case, dtype: torch.dtype, backend: str) -> None:
    skip_unless_carried(case, dtype, backend)
    assert_case_parity(case, dtype, backend, [parity.stable_seed(case, dtype, CUDA)])


@every_backend
@pytest.mark.parametrize("case", LARGE, ids=str)
@pytest.mark.usefixtures("tf32")
def test_error_at_full_size_in_tf32(case: Case, backend: str) -> None:
    skip_unless_carried(case, torch.float32, backend)
    assert_case_parity(case, torch.float32, backend, [parity.stable_seed(case, torch.float32, CUDA)])


@every_backend
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_runs_are_bitwise_equal_and_wait_for_no_host(dtype: torch.dtype, backend: str) -> None:
    call = on_gpu(parity.make_call(PAPER, dtype)).map(lambda v: v.to(dtype))
    first = parity.run(PAPER, call, backend)
    torch.cuda.set_sync_debug_mode("error")
    try:
        second = parity.run(PAPER, call, backend)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for name, value in first.items():
        assert torch.equal(second[name], value), name


@in_float64
@pytest.mark.parametrize("mode", ["train", "eval"])
def test_channels_last_maps_give_the_same(mode: str, backend: str) -> None:
    case = Case((4, 3, 256, 8, 8), hidden=64, spatial_hidden=32, mode=mode)
    call = on_gpu(parity.make_call(case))
    wanted = parity.run(case, call, backend)
    call.x = call.x.movedim(2, -1).contiguous().movedim(-1, 2)
    for name, value in parity.run(case, call, backend).items():
        assert relative_error(value, wanted[name]) <= EXACT, name


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs the CUDA kernels")
@pytest.mark.parametrize("mode", ["train", "eval"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_channels_last_maps_give_the_same_in_cuda(dtype: torch.dtype, mode: str) -> None:
    case = Case((4, 3, 256, 8, 8), hidden=64, spatial_hidden=32, mode=mode)
    call = on_gpu(parity.make_call(case, dtype)).map(lambda v: v.to(dtype))
    wanted = parity.run(case, call, "cuda")
    call.x = call.x.movedim(2, -1).contiguous().movedim(-1, 2)
    got = parity.run(case, call, "cuda")
    for name in ("features", "strips"):
        assert relative_error(got[name], wanted[name]) <= 2 * torch.finfo(dtype).eps, name


@pytest.mark.skipif("cuda" not in BACKENDS, reason="needs the CUDA kernels")
def test_fragments_and_pushes_of_cuda_are_as_documented() -> None:
    found = [finding for finding in fragments(CUDA) if "failed" in finding]
    assert found == []


@in_float64
def test_maps_of_more_than_31_bits(backend: str) -> None:
    rru = rru_fast.RRU(2048, (32, 32), hidden=64, attention="channel", backend=backend).cuda().bfloat16().eval()
    x = torch.randn(1, 1, 2048, 32, 32, device="cuda", dtype=torch.bfloat16).expand(-1, 1030, -1, -1, -1).contiguous()
    assert x.numel() > 2**31
    with torch.inference_mode():
        out = rru(x)
    assert torch.equal(out.features[:, -1], x[:, -1])  # nothing moves
    assert relative_error(out.strips, x[:, 0].mean(3)) <= 2 * torch.finfo(torch.bfloat16).eps


@every_backend
def test_memory_saved_at_the_papers_shape(backend: str) -> None:
    from benchmarks.harness import measure

    rru = rru_fast.RRU(2048, backend=backend).cuda()
    x = torch.rand(20, 8, 2048, 8, 8, device="cuda", requires_grad=True)
    assert measure.saved_bytes(lambda: rru(x)[:2], [x, *rru.parameters()]) <= 16 * 2**20


def graph_dtype(backend: str) -> tuple[torch.dtype, float]:
    """Return the dtype in which a graph is compared with plain calls, whose launches are the same, and the bound."""
    return (torch.float32, 0.0) if backend == "cuda" else (torch.float64, EXACT)


@every_backend
@pytest.mark.parametrize("attention", ["both", "channel"])
def test_graphed_training_equals_plain(attention: str, backend: str) -> None:
    dtype, bound = graph_dtype(backend)
    plain = rru_fast.RRU(64, (4, 4), hidden=32, attention=attention, backend=backend).cuda().to(dtype)
    graphed = rru_fast.RRU(64, (4, 4), hidden=32, attention=attention, backend=backend, cuda_graph=True)
    graphed.cuda().to(dtype)
    graphed.load_state_dict(plain.state_dict())
    for step in range(4):
        x = torch.randn(4, 5, 64, 4, 4, device="cuda", dtype=dtype)
        gradients = []
        for module in (plain, graphed):
            module.zero_grad()
            leaf = x.clone().requires_grad_()
            out = module(leaf)
            (out.features.square().sum() + out.strips.sum()).backward()
            gradients.append(leaf.grad)
            with torch.no_grad():
                for parameter in module.parameters():
                    parameter -= 0.01 * parameter.grad  # type: ignore[operator]
        assert relative_error(*gradients) <= bound, step  # type: ignore[arg-type]
    for name, wanted in plain.state_dict().items():
        assert relative_error(graphed.state_dict()[name], wanted) <= bound, name


@in_float64
def test_graphed_gradients_add_up_until_they_are_zeroed(backend: str) -> None:
    plain = rru_fast.RRU(64, (4, 4), hidden=32, backend=backend).cuda().double()
    graphed = rru_fast.RRU(64, (4, 4), hidden=32, backend=backend, cuda_graph=True).cuda().double()
    graphed.load_state_dict(plain.state_dict())
    leaves = [torch.randn(4, 5, 64, 4, 4, device="cuda", dtype=torch.float64).requires_grad_() for _ in range(2)]
    gradients = []
    for module in (plain, graphed):
        for leaf in leaves:
            leaf.grad = None
            module(leaf).features.square().sum().backward()
        gradients.append([*(p.grad for p in module.parameters()), *(leaf.grad for leaf in leaves)])
    for wanted, got in zip(*gradients, strict=True):
        assert relative_error(got, wanted) <= EXACT


@every_backend
def test_graphed_calls_check_lengths_before_they_move_them(backend: str) -> None:
    rru = rru_fast.RRU(64, (4, 4), hidden=32, backend=backend, cuda_graph=True).cuda().eval()
    x = torch.randn(2, 5, 64, 4, 4, device="cuda")
    with torch.no_grad():
        with pytest.raises(ValueError, match="lengths: got values from 1 to 6, wanted 1 to T=5"):
            rru(x, lengths=torch.tensor([1, 6]))
        with pytest.raises(TypeError, match="lengths: got list, wanted a tensor"):
            rru(x, lengths=[1, 2])
        ragged = rru(x, lengths=torch.tensor([1, 5]))
    assert (ragged.features[0, 1:] == 0).all() and (ragged.features[1] != 0).any()


@every_backend
def test_a_graphed_module_follows_the_precision_it_is_given(backend: str) -> None:
    plain = rru_fast.RRU(256, (4, 4), hidden=64, backend=backend).cuda().eval()
    graphed = rru_fast.RRU(256, (4, 4), hidden=64, backend=backend, cuda_graph=True).cuda().eval()
    graphed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 256, 4, 4, device="cuda")
    with torch.no_grad():
        for allowed in (False, True, False):
            torch.backends.cudnn.allow_tf32 = allowed
            assert relative_error(graphed(x).features, plain(x).features) <= 1e-6, allowed  # TF32 is 1e-4 off


@every_backend
def test_by_default_the_transition_is_multiplied_in_tf32_as_the_convolution_it_replaces(backend: str) -> None:
    torch.backends.cudnn.allow_tf32 = True  # matmuls stay in fp32
    call = on_gpu(parity.make_call(PAPER, torch.float32))
    low, oracle = call.map(lambda v: v.float()), parity.run(PAPER, call, "reference")
    ours, eager = parity.run(PAPER, low, backend), parity.run(PAPER, low, "reference")
    error = {name: (relative_error(ours[name], v), relative_error(eager[name], v)) for name, v in oracle.items()}
    assert 0.25 < error["features"][0] / error["features"][1] <= 2


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs the Triton kernels")
def test_tuned_calls_are_right_plain_and_graphed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RRU_FAST_AUTOTUNE", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr("rru_fast.triton._autotune._known", {})
    wanted = rru_fast.RRU(128, (4, 4), hidden=32, backend="composite").cuda()
    x = torch.randn(4, 3, 128, 4, 4, device="cuda")
    results = []
    for module in (
        wanted,
        rru_fast.RRU(128, (4, 4), hidden=32, backend="triton").cuda(),
        rru_fast.RRU(128, (4, 4), hidden=32, backend="triton", cuda_graph=True).cuda(),
    ):
        module.load_state_dict(wanted.state_dict())
        leaf = x.clone().requires_grad_()
        module(leaf).features.square().sum().backward()
        results.append([leaf.grad, *(parameter.grad for parameter in module.parameters())])
    for ours in results[1:]:
        assert max(relative_error(got, best) for got, best in zip(ours, results[0], strict=True)) <= 1e-5
    files = (tmp_path / "rru_fast/autotune").iterdir()
    assert {next(iter(json.loads(file.read_text()))).partition(" ")[0] for file in files} == {
        "refine",
        "refine_backward",
    }


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs the Triton kernels")
def test_three_products_of_tf32_are_at_least_ten_times_as_exact_as_one(monkeypatch: pytest.MonkeyPatch) -> None:
    call = on_gpu(parity.make_call(PAPER, torch.float32))
    oracle = parity.run(PAPER, call, "reference")
    errors = {}
    for precision in ("tf32", "tf32x3"):
        monkeypatch.setenv("RRU_FAST_FLOAT32", precision)
        got = parity.run(PAPER, call.map(lambda v: v.float()), "triton")
        errors[precision] = {name: relative_error(got[name], wanted) for name, wanted in oracle.items()}
    for name in ("features", "d_x", "d_w"):
        assert 10 * errors["tf32x3"][name] <= errors["tf32"][name], name


@every_backend
def test_a_graphed_backward_after_the_next_call_raises(backend: str) -> None:
    rru = rru_fast.RRU(64, (4, 4), hidden=32, backend=backend, cuda_graph=True).cuda()
    first, second = (rru(torch.randn(2, 3, 64, 4, 4, device="cuda")).features.sum() for _ in range(2))
    with pytest.raises(RuntimeError, match="cuda_graph: got the backward of a call after 1 later ones of its shape"):
        (first + second).backward()


@every_backend
def test_graphed_eval_in_chunks_equals_plain(backend: str) -> None:
    plain = rru_fast.RRU(64, (4, 4), hidden=32, backend=backend).cuda().eval()
    graphed = rru_fast.RRU(64, (4, 4), hidden=32, backend=backend, cuda_graph=True).cuda().eval()
    graphed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 12, 64, 4, 4, device="cuda")
    state, parts = None, []
    with torch.inference_mode():
        for chunk in x.split(3, 1):
            out = graphed(chunk, state=state)
            parts.append(out.features.clone())
            state = rru_fast.State(*(v.clone() for v in out.state))
        assert relative_error(torch.cat(parts, 1), plain(x).features) <= 1e-6


@every_backend
def test_compiled_without_a_graph_break_equals_eager(backend: str) -> None:
    rru = rru_fast.RRU(64, (4, 4), hidden=32, backend=backend).cuda().eval()
    x = torch.rand(3, 4, 64, 4, 4, device="cuda")
    results = []
    for f in (rru, torch.compile(rru, fullgraph=True)):
        leaf = x.clone().requires_grad_()
        f(leaf).features.square().sum().backward()
        results.append(leaf.grad)
    assert relative_error(*results) <= 1e-6


@in_float64
@pytest.mark.parametrize("metric", ["euclidean", "cosine"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(8, 20, 2048), (1, 1000, 256), (3, 77, 65)], ids=str)
@pytest.mark.parametrize("against_gallery", [False, True], ids=["alone", "gallery"])
def test_batch_hard(
    against_gallery: bool, shape: tuple[int, int, int], dtype: torch.dtype, metric: str, backend: str
) -> None:
    groups, n, d = shape
    inputs = {"features": torch.randn(shape, device="cuda").to(dtype)}
    labels = torch.arange(n, device="cuda") // 4
    options: dict[str, Any] = {"margin": 0.4, "metric": metric, "return_distances": True}
    if against_gallery:
        inputs["gallery"] = torch.randn(groups, n // 2 + 3, d, device="cuda").to(dtype)
        # Every identity is in the gallery.
        options["gallery_labels"] = torch.arange(n // 2 + 3, device="cuda") % (n // 4 + 1)

    def run(inputs: dict[str, Tensor], backend: str) -> parity.Results:
        leaves = {name: v.detach().requires_grad_() for name, v in inputs.items()}
        outputs = list(rru_fast.batch_hard_triplet(labels=labels, backend=backend, **leaves, **options))
        found = gradients(outputs, [torch.ones_like(v) for v in outputs], leaves)
        return {"loss": outputs[0].detach(), **found}

    got, again = run(inputs, backend), run(inputs, backend)
    oracle = run({name: v.double() for name, v in inputs.items()}, "reference")
    assert all(torch.equal(value, again[name]) for name, value in got.items())
    if dtype == torch.float64:
        assert all(relative_error(got[name], wanted) <= EXACT for name, wanted in oracle.items())
    else:
        assert_parity([(got, run(inputs, "reference"), oracle)])


@in_float64
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_strip_pool(dtype: torch.dtype, backend: str) -> None:
    s = torch.randn(20, 8, 2048, 8, 8, device="cuda").to(dtype).requires_grad_()
    strips = rru_fast.strip_pool(s, backend=backend)
    upstream = torch.randn_like(strips)
    (gradient,) = torch.autograd.grad(strips, s, upstream)
    wanted = reference.strip_pool(s.detach().double())
    rounding = EXACT if dtype == torch.float64 else torch.finfo(dtype).eps
    assert relative_error(strips, wanted) <= rounding
    spread = (upstream.double() / 64)[:, None, :, :, None].expand(s.shape)
    assert relative_error(gradient, spread) <= rounding


@pytest.mark.skipif("triton" not in BACKENDS, reason="needs the Triton kernels")
def test_auto_measures_the_first_call_of_a_kind_and_keeps_what_it_decides(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(decisions, "folder", lambda: tmp_path)
    monkeypatch.delenv("RRU_FAST_CALIBRATE")
    s = torch.randn(20, 8, 2048, 8, 8, device="cuda")
    for _ in range(2):
        strips = rru_fast.strip_pool(s)
        assert relative_error(strips, reference.strip_pool(s.double())) <= torch.finfo(s.dtype).eps
    (entry,) = choice.entries(torch.device("cuda", 0))
    assert (entry.decision.lasts, entry.decision.error is not None) == (None, True), entry.decision
    assert len(list(tmp_path.glob("*.json"))) == 1
    assert sum(record.name == "rru_fast" for record in caplog.records) == 2
