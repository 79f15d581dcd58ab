from __future__ import annotations

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from tests.helpers import forked
from tests.helpers.small_people import short_walks
from training.ablation import PLACE, PLOT, RESULTS, ROWS, Options, ablate, cells
from training.runtime.errors import UserError

BEGIN, END = f"<!-- {PLACE} -->", f"<!-- /{PLACE} -->"
TWO = ("Baseline", "Baseline+RRU+STIM+Lv+Lp")


def options(*more: str | Path) -> list[str]:
    """Two rows at one rate, from one seed, one epoch of one batch."""
    small = ("--occlusion", 0.5, "--seeds", 1, "--epochs", 1, "--batches", 1, "--people", 8)
    return ["--rows", *TWO, *map(str, (*small, *more))]


def start(output: Path, *more: str | Path, workers: str = "fork") -> forked.Forked:
    """The command on short walks; its workers are forked where the claim is not about them, as spawning takes long."""
    return forked.Forked(begin, workers, options("--output", output, *more))


def begin(workers: str, arguments: list[str]) -> None:
    patch, of_workers = pytest.MonkeyPatch(), multiprocessing.get_context(workers)
    short_walks(patch)
    patch.setattr(multiprocessing, "get_context", lambda kind: of_workers)
    forked.main_of("training.ablation", arguments)


def trained(output: Path) -> dict[Path, int]:
    """When each run's network was written last."""
    return {path.relative_to(output): path.stat().st_mtime_ns for path in output.rglob("model.safetensors")}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, forked.Ended]:
    """An ablation, and how its process ended."""
    folder = tmp_path_factory.mktemp("ablation")
    (folder / "page").mkdir()
    (folder / "page" / "README.md").write_text(f"# Page\n\n{BEGIN}\n{END}\n")
    return folder / "output", start(folder / "output", "--readme", folder / "page" / "README.md").end()


def test_an_ablation_ends_with_a_table_results_and_a_plot(done: tuple[Path, Any]) -> None:
    output, ended = done
    assert ended.status == 0, ended.err
    ablation = json.loads((output / RESULTS).read_text())
    assert [(r["row"], r["occlusion"], r["seed"], r["epoch"], r["probes"]) for r in ablation["runs"]] == [
        (row, 0.5, 0, 1, 4) for row in TWO
    ]
    assert ablation["environments"][0]["threads"] == 1
    for record in ablation["runs"]:
        assert f"| {record['row']} | {100 * record['rank-1']:.1f} | {100 * record['mAP']:.1f} |" in ended.out
    with Image.open(output / PLOT) as picture:
        picture.verify()


def test_the_page_gets_the_table_and_what_it_is_made_of(done: tuple[Path, Any]) -> None:
    output, ended = done
    page = output.parent / "page"
    table, said = ended.out[ended.out.index("*`python") :].split("\nplot: ")
    assert said.splitlines() == [
        str(output / PLOT),
        f"results: {output / RESULTS}",
        f"page: {page / 'README.md'}, with {RESULTS} and {PLOT} in its folder",
    ]
    table = table.strip()
    picture = f"![rank-1 and mAP by the rate of occlusion]({PLOT})"
    assert (page / "README.md").read_text() == f"# Page\n\n{BEGIN}\n{picture}\n\n{table}\n{END}\n"
    for name in (RESULTS, PLOT):
        assert (page / name).read_bytes() == (output / name).read_bytes()


def test_the_command_in_the_table_makes_it(done: tuple[Path, Any]) -> None:
    command = json.loads((done[0] / RESULTS).read_text())["command"]
    assert sorted(command.split()[3:]) == sorted(options())


@pytest.fixture
def begun(done: tuple[Path, Any], tmp_path: Path) -> Path:
    """An output that has its people, and no run."""
    (tmp_path / "output" / "occlusion-0.5").mkdir(parents=True)
    (tmp_path / "output" / "occlusion-0.5" / "data").symlink_to(done[0] / "occlusion-0.5" / "data")
    return tmp_path / "output"


def test_killed_it_leaves_no_worker_and_started_again_it_ends_with_the_same_figures(
    done: tuple[Path, Any], begun: Path
) -> None:
    running = start(begun, "--jobs", "1", workers="spawn")
    running.wait_for(lambda: "\n1/2" in running.out())
    workers = Path(f"/proc/{running.pid}/task/{running.pid}/children").read_text().split()
    os.kill(running.pid, signal.SIGKILL)
    assert running.end().status == -signal.SIGKILL
    deadline = time.monotonic() + 60
    while any(Path(f"/proc/{worker}").exists() for worker in workers) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert workers and not any(Path(f"/proc/{worker}").exists() for worker in workers)
    before = trained(begun)
    assert not (begun / RESULTS).exists()
    assert start(begun, "--jobs", "1").end().status == 0
    assert json.loads((begun / RESULTS).read_text())["runs"] == json.loads((done[0] / RESULTS).read_text())["runs"]
    first = next(path for path in before if TWO[0] in path.parts)
    assert trained(begun)[first] == before[first]


def test_interrupted_it_says_how_to_continue(begun: Path) -> None:
    running = start(begun, "--jobs", "1", workers="spawn")
    running.wait_for(lambda: list(begun.rglob("*.log")))
    os.kill(running.pid, signal.SIGINT)
    assert running.end()[::2] == (130, f"interrupted; the same command continues in {begun}\n")


@pytest.mark.exhaustive  # so is the run that was done before the kill, in the test of one
def test_what_is_done_is_not_trained_again(done: tuple[Path, Any]) -> None:
    before, results = trained(done[0]), (done[0] / RESULTS).read_bytes()
    assert start(done[0], workers="spawn").end().status == 0
    assert trained(done[0]) == before
    assert (done[0] / RESULTS).read_bytes() == results


def test_a_seed_decides_weights_order_and_split_and_all_rates_and_rows_share_it() -> None:
    options = Options()
    planned = cells(options)
    assert len(planned) == len(set(planned)) == 3 * 3 * 7
    for cell in planned:
        settings = cell.run_options(options).settings
        assert settings.split == settings.recipe.seed == cell.seed
        assert settings.recipe.model.backbone == "tiny"
    assert len({cell.folder(options.output) for cell in planned}) == len(planned)


def test_rows_and_rates_come_in_order_however_they_are_given() -> None:
    planned = cells(Options(occlusion=(0.8, 0.0, 0.8), rows=ROWS[::-1], seeds=1))
    assert [(cell.occlusion, cell.row) for cell in planned] == [(rate, row) for rate in (0.0, 0.8) for row in ROWS]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"occlusion": (0.0, 1.5)}, r"occlusion: got 1\.5, wanted a share of frames, 0 to 1"),
        ({"occlusion": ()}, "occlusion: got none, wanted at least one"),
        ({"rows": ()}, "rows: got none, wanted at least one"),
        ({"blur": -0.1}, r"blur: got -0\.1, wanted a share of frames, 0 to 1"),
        ({"seeds": 11}, "seeds: got 11, wanted 1 to 10"),
        ({"jobs": 0}, "jobs: got 0, wanted at least 1"),
        ({"people": 3}, "people: got 3, wanted at least 4"),
        ({"epochs": 0}, "epochs: got 0, wanted at least 1"),
        ({"readme": Path("absent.md")}, r"readme: absent\.md cannot be read"),
    ],
)
def test_bad_options_are_refused_before_anything_is_made(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        ablate(Options(output=tmp_path / "output", **change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("more", "message"),
    [(("--occlusion", "2"), "occlusion: got 2.0, wanted"), (("--people", "9"), "holds a synthetic set of")],
)
def test_bad_input_ends_the_command_in_one_line(done: tuple[Path, Any], more: tuple[str, str], message: str) -> None:
    ended = start(done[0], *more).end()
    assert ended.status == 2
    assert ended.err.startswith("error: ") and message in ended.err
    assert ended.err.count("\n") == 1


def test_what_a_worker_finds_wrong_ends_the_command_in_one_line(begun: Path) -> None:
    (begun / "occlusion-0.5" / TWO[0]).touch()  # where its runs' folders should be
    ended = start(begun, "--jobs", "1").end()
    assert ended.status == 2
    assert ended.err.startswith("error: ")
    assert ended.err.count("\n") == 1
