"""What "auto" runs where nothing has been measured, and the record of what has run."""

from __future__ import annotations

import pytest
import torch

import rru_fast
from rru_fast import backends, native

needs_kernels = pytest.mark.skipif(native.missing() is not None, reason="the C++ kernels are not built")


def ran_at(
    clips: int, channels: int, spatial: tuple[int, int], hidden: int, *, training: bool, dtype: torch.dtype
) -> list[str]:
    """Return the backends that a call of `refine` and its backward run."""
    unit = rru_fast.RRU(channels, spatial, hidden=hidden, spatial_hidden=2, dtype=dtype).train(training)
    backends.forget_runs()
    out = unit(torch.zeros(clips, 2, channels, *spatial, dtype=dtype))
    out.features.sum().backward()
    return backends.ran()["refine"]


# Clips, channels, spatial size, hidden, training, dtype; B C D is the work of one position.
NARROW = [
    (64, 256, (1, 1), 64, True, torch.float32),
    (64, 256, (1, 1), 64, False, torch.float32),
    (64, 256, (1, 1), 64, False, torch.bfloat16),
    (64, 256, (3, 1), 64, False, torch.float64),
    (1, 2048, (3, 1), 256, False, torch.float32),
    (64, 256, (5, 3), 64, False, torch.float32),
    (64, 512, (5, 3), 128, True, torch.float16),
]
WIDE = [
    (32, 256, (1, 1), 64, True, torch.float32),  # half the work
    (64, 256, (5, 3), 64, True, torch.float32),
    (64, 256, (8, 4), 64, False, torch.float32),
    (64, 512, (8, 4), 128, True, torch.float32),
    (64, 256, (4, 2), 64, False, torch.float64),
    (1, 2048, (4, 1), 256, False, torch.float32),
    (2, 2048, (5, 3), 256, False, torch.float32),
]


@needs_kernels
@pytest.mark.parametrize("call", [*NARROW, *WIDE], ids=str)
def test_on_a_cpu_composite_runs_narrow_maps_of_many_clips_and_the_kernels_all_else(call: tuple[object, ...]) -> None:
    *sizes, training, dtype = call
    found = ran_at(*sizes, training=training, dtype=dtype)  # type: ignore[arg-type]
    assert found == (["composite"] if call in NARROW else ["cpu"])


@needs_kernels
def test_a_compiled_program_follows_the_same_rule() -> None:
    unit = rru_fast.RRU(256, (1, 1), hidden=64, spatial_hidden=2)
    compiled = torch.compile(unit, backend="aot_eager", fullgraph=True)
    for clips, wanted in ((64, ["composite"]), (8, ["cpu"])):
        x = torch.randn(clips, 2, 256, 1, 1)
        backends.forget_runs()
        compiled(x).features.sum().backward()
        assert backends.ran() == {"refine": wanted}


def test_the_record_names_every_backend_that_has_run_each_operator() -> None:
    s, features = torch.randn(1, 2, 3, 2, 2), torch.randn(4, 3)
    backends.forget_runs()
    assert backends.ran() == {}
    for backend in ("composite", "reference", "auto"):
        rru_fast.strip_pool(s, backend=backend)
    default = backends.choose("auto", s.device)
    assert backends.ran() == {"strip_pool": ["reference", "composite", *([default] if default == "cpu" else [])]}
    rru_fast.BatchHardTripletLoss()(features, torch.arange(4) // 2)
    rru_fast.RRU(3, (2, 2), hidden=2, spatial_hidden=2, backend="reference")(s)
    assert backends.ran() | {"strip_pool": []} == {"refine": ["reference"], "strip_pool": [], "batch_hard": [default]}
    backends.forget_runs()
    assert backends.ran() == {}
