"""Autotuning, on calls whose durations the tests set."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from triton.runtime.errors import OutOfResources, PTXASError

from rru_fast import cache
from rru_fast.triton import _autotune
from rru_fast.triton._autotune import Candidates, LaunchConfig, autotune

CPU = torch.zeros(1)
DEFAULT: LaunchConfig = {"gate": {"BLOCK": 32}, "maps": {"BLOCK": 64}}
FASTER: LaunchConfig = DEFAULT | {"gate": {"BLOCK": 16}}


@pytest.fixture(autouse=True)
def _fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setenv("RRU_FAST_AUTOTUNE", "1")
    monkeypatch.setattr(_autotune, "_known", {})
    monkeypatch.setattr(_autotune, "_defaults", {})
    monkeypatch.setattr(_autotune, "SHIPPED", tmp_path / "tuned")
    _autotune._shipped.cache_clear()


def tune(
    monkeypatch: pytest.MonkeyPatch, seconds: Callable[[LaunchConfig], float], others: Any, sizes: tuple[Any, ...] = ()
) -> tuple[LaunchConfig, list[LaunchConfig]]:
    """Return the config found where a call takes `seconds(config)`, and the configs tried."""
    tried: list[LaunchConfig] = []

    def run(config: LaunchConfig) -> None:
        tried.append(config)
        seconds(config)

    monkeypatch.setattr(_autotune, "_wall_seconds", lambda _, config: seconds(config))
    return autotune("gate", sizes, CPU, lambda: Candidates(DEFAULT, others), run), tried


@pytest.mark.parametrize(("speedup", "wanted"), [(1.02, DEFAULT), (1.04, FASTER)])
def test_a_candidate_replaces_the_default_only_if_it_is_three_percent_faster(
    speedup: float, wanted: LaunchConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    found, _ = tune(monkeypatch, lambda c: 1 / speedup if c == FASTER else 1.0, {"gate": [{"BLOCK": 16}]})
    assert found == wanted


def test_without_tuning_a_config_that_was_tuned_before_serves_or_else_the_default(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    others = {"gate": [{"BLOCK": 16}]}
    assert tune(monkeypatch, lambda c: 1.0 if c == FASTER else 2.0, others)[0] == FASTER
    _autotune._known.clear()
    with _autotune.without_tuning():
        assert tune(monkeypatch, lambda c: 1.0, others) == (FASTER, [])
        assert tune(monkeypatch, lambda c: 1.0, others, sizes=(3,)) == (DEFAULT, [])
    assert tune(monkeypatch, lambda c: 1.0 if c == FASTER else 2.0, others, sizes=(4,))[0] == FASTER


def test_equal_candidates_are_tried_once(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"gate": [{"BLOCK": 32}, {"BLOCK": 16}, {"BLOCK": 16}], "maps": [{"BLOCK": 64}]}
    _, tried = tune(monkeypatch, lambda c: 1.0, others)
    assert tried == [DEFAULT, FASTER]


@pytest.mark.parametrize("error", [PTXASError("bad"), RuntimeError("PassManager::run failed\nmore"), KeyError("x")])
def test_a_candidate_that_does_not_compile_is_one_line_and_loses(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    def seconds(config: LaunchConfig) -> float:
        if config == FASTER:
            raise error
        return 0.5 if config["maps"]["BLOCK"] == 16 else 1.0

    others = {"gate": [{"BLOCK": 16}], "maps": [{"BLOCK": 16}]}
    with pytest.warns(UserWarning, match=r"got a config that fails here, \{'gate': \{'BLOCK': 16\}\}: ") as caught:
        found, _ = tune(monkeypatch, seconds, others)
    assert found == DEFAULT | {"maps": {"BLOCK": 16}}
    assert [str(warning.message).count("\n") for warning in caught] == [0]


@pytest.mark.parametrize("kind", ["shared memory", "memory"])
def test_a_candidate_that_needs_more_than_the_gpu_has_loses_without_a_word(
    kind: str, monkeypatch: pytest.MonkeyPatch, recwarn: pytest.WarningsRecorder
) -> None:
    def seconds(config: LaunchConfig) -> float:
        if config == FASTER and kind == "memory":
            raise torch.OutOfMemoryError("CUDA out of memory")
        if config == FASTER:
            raise RuntimeError("launch") from OutOfResources(300, 200, "shared memory")
        return 1.0

    found, _ = tune(monkeypatch, seconds, {"gate": [{"BLOCK": 16}]})
    assert found == DEFAULT
    assert len(recwarn) == 0


def test_a_default_that_fails_is_replaced_by_a_candidate_that_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(config: LaunchConfig) -> float:
        if config == DEFAULT:
            raise PTXASError("bad")
        return 1.0

    with pytest.warns(UserWarning, match="got a config that fails here, the default: PTXASError"):
        found, _ = tune(monkeypatch, seconds, {"gate": [{"BLOCK": 16}]})
    assert found == FASTER


def test_where_no_config_runs_the_defaults_error_is_raised(monkeypatch: pytest.MonkeyPatch) -> None:
    def seconds(config: LaunchConfig) -> float:
        raise RuntimeError("no C compiler" if config == DEFAULT else "another")

    with pytest.warns(UserWarning, match="the default: RuntimeError: no C"), pytest.raises(RuntimeError, match="no C"):
        tune(monkeypatch, seconds, {"gate": [{"BLOCK": 16}]})
    assert not _autotune._tuning.locked()


def test_while_another_thread_tunes_the_default_serves(monkeypatch: pytest.MonkeyPatch) -> None:
    with _autotune._tuning:
        found, tried = tune(monkeypatch, lambda c: 0.5 if c == FASTER else 1.0, {"gate": [{"BLOCK": 16}]})
    assert (found, tried) == (DEFAULT, [])
    assert tune(monkeypatch, lambda c: 0.5 if c == FASTER else 1.0, {"gate": [{"BLOCK": 16}]})[0] == FASTER


def test_a_result_on_disk_serves_the_next_process_until_a_kernel_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"gate": [{"BLOCK": 16}]}
    tune(monkeypatch, lambda c: 0.5 if c == FASTER else 1.0, others)
    monkeypatch.setattr(_autotune, "_known", {})
    assert tune(monkeypatch, lambda c: 1.0, others) == (FASTER, [])
    monkeypatch.setattr(_autotune, "_known", {})
    monkeypatch.setattr(_autotune, "_sources", lambda: "changed")
    found, tried = tune(monkeypatch, lambda c: 1.0, others)
    assert (found, len(tried)) == (DEFAULT, 2)


@pytest.mark.parametrize(
    "text",
    ["", '{"half', "[]", '{"another": {}}', '{KIND: {"gate": 5, "maps": 5}}', '{KIND: {"gate": {"BLOCK": 7}}}'],
)
def test_a_damaged_file_is_written_anew(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"gate": [{"BLOCK": 16}]}
    tune(monkeypatch, lambda c: 0.5 if c == FASTER else 1.0, others)
    (file,) = cache.folder("autotune").iterdir()
    whole = file.read_text()
    file.write_text(text.replace("KIND", json.dumps(*json.loads(whole))))
    monkeypatch.setattr(_autotune, "_known", {})
    tune(monkeypatch, lambda c: 0.5 if c == FASTER else 1.0, others)
    assert file.read_text() == whole


def test_every_candidate_of_every_operator_is_read_back(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import compile_report
    from rru_fast.triton import batch_hard, refine

    seen: list[tuple[str, Candidates]] = []

    def collect(op: str, sizes: Any, tensor: Any, candidates: Callable[[], Candidates], run: Any) -> LaunchConfig:
        seen.append((op, candidates()))
        return candidates().default

    for module in (refine, batch_hard):
        monkeypatch.setattr(module, "autotune", collect)
    monkeypatch.setattr("benchmarks.launches.recording.Recorder.autotune", lambda self, *arguments: collect(*arguments))
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        compile_report.launches(dtype, "default")
    assert {op for op, _ in seen} == {"refine", "refine_backward", "batch_hard"}
    for op, own in seen:
        for change in _autotune._changes(own):
            config = own.default | change
            cache.write_json(_autotune._path(op, "kind"), {"kind": config})
            assert _autotune._usable(cache.read_json(_autotune._path(op, "kind")), "kind", own) == config


class Clock:
    """Simulated GPU stream in place of torch.cuda: events, calls and waits in order."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now, self.waits = 0.0, 0
        clock = self

        class Event:
            def __init__(self, enable_timing: bool) -> None:
                assert enable_timing

            def record(self) -> None:
                self.at = clock.now

            def synchronize(self) -> None:
                pass

            def elapsed_time(self, end: Event) -> float:
                return end.at - self.at

        def wait(cycles: int) -> None:
            self.waits += 1
            self.now += cycles

        monkeypatch.setattr(torch.cuda, "Event", Event)
        monkeypatch.setattr(torch.cuda, "_sleep", wait)


@pytest.mark.parametrize(("speedup", "wanted"), [(0.5, False), (1.02, False), (1.04, True)])
def test_on_a_gpu_calls_are_timed_by_events_behind_a_wait(
    speedup: float, wanted: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    clock = Clock(monkeypatch)

    def run(config: LaunchConfig) -> None:
        clock.now += 1 / speedup if config == FASTER else 1.0

    assert _autotune._faster(run, FASTER, DEFAULT, on_gpu=True) is wanted
    assert clock.waits == _autotune.ROUNDS


def test_nothing_is_tuned_while_a_graph_is_captured(monkeypatch: pytest.MonkeyPatch) -> None:
    class OnGpu:
        is_cuda = True

    monkeypatch.setenv("RRU_FAST_AUTOTUNE", "")
    for capturing in (True, False):
        monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda capturing=capturing: capturing)
        assert _autotune.enabled(OnGpu()) is not capturing  # type: ignore[arg-type]


def test_configs_that_are_shipped_for_a_card_are_its_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = {"gate": [{"BLOCK": 16}]}
    tune(monkeypatch, lambda c: 0.5 if c == FASTER else 1.0, others)
    entries = [json.loads(file.read_text()) for file in cache.folder("autotune").iterdir()]
    (tmp_path / "tuned").mkdir()
    (tmp_path / "tuned" / "card.json").write_text(json.dumps(entries))
    _autotune._shipped.cache_clear()
    monkeypatch.setattr(_autotune, "_known", {})
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "empty"))
    assert tune(monkeypatch, lambda c: 1.0, others) == (FASTER, [])
    monkeypatch.setattr(_autotune, "_known", {})
    monkeypatch.setenv("RRU_FAST_AUTOTUNE", "0")
    assert tune(monkeypatch, lambda c: 1.0, others) == (FASTER, [])
    assert tune(monkeypatch, lambda c: 1.0, others, sizes=(1,)) == (DEFAULT, [])


def test_parallel_processes_lose_no_result_of_one_another(tmp_path: Path) -> None:
    code = (
        "import sys, torch; from rru_fast.triton._autotune import Candidates, autotune\n"
        "for n in range(25):\n"
        "    autotune('gate', (sys.argv[1], n), torch.zeros(1), lambda: Candidates({'gate': {'B': n}}, {}), id)"
    )
    processes = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", "-c", code, str(number)],
            env=os.environ | {"PYTHONPATH": str(Path(__file__).resolve().parents[1])},
        )
        for number in range(3)
    ]
    assert [process.wait() for process in processes] == [0, 0, 0]
    files = list(cache.folder("autotune").iterdir())
    assert len(files) == 75
    configs = [config for file in files for config in json.loads(file.read_text()).values()]
    assert {config["gate"]["B"] for config in configs} == set(range(25))
