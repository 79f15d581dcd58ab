from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import tyro
from PIL import Image

from training.engine.options import make_options
from training.runtime.command import run_command
from training.show.__main__ import Options, main
from training.train import train


@pytest.fixture(scope="module")
def runs(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two runs of one step, with an RRU and without."""
    folder = tmp_path_factory.mktemp("runs")
    small = {"people": 4, "batches": 1, "epochs": 1, "compare_ops": False, "device": "cpu", "check_counts": False}
    for name, row in (("whole", None), ("baseline", "Baseline")):
        where: dict[str, Any] = {"dataset": "ilids-vid", "data_root": small_data, "output": folder / name}
        train(make_options(row=row, pictures=False, **where, **small))
    return folder


def show(*arguments: str | Path) -> None:
    options = tyro.cli(Options, args=[str(argument) for argument in arguments])  # type: ignore[call-overload]
    run_command(lambda: main(options))


def test_every_picture_is_a_png_that_opens(runs: Path, tmp_path: Path) -> None:
    for number, arguments in enumerate(
        (
            ("features", "--checkpoint", runs / "whole", "--queries", "2", "--frames", "3"),
            ("features", "--checkpoint", runs / "whole", "--tracklet", "cam2/person001"),
            ("ranking", "--checkpoint", runs / "whole", "--queries", "2", "--top", "2"),
            ("ranking", "--checkpoint", runs / "whole", "--probes", "1", "--top", "2"),  # an older name
            ("cmc", runs / "whole", runs / "baseline", "--device", "cpu"),
            ("ablation",),
        )
    ):
        path = tmp_path / f"{number}.png"
        show(*arguments, "--output", path)
        with Image.open(path) as picture:
            picture.load()
            assert picture.format == "PNG"
            assert min(picture.size) > 200


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("features --checkpoint RUNS/whole --tracklet nobody", "tracklet: got 'nobody', wanted the name of a tracklet"),
        ("features --checkpoint RUNS/whole --tracklet a --queries 1", "tracklet: got 'a' with queries 1, wanted one"),
        ("features --checkpoint RUNS/whole --queries 5", "queries: got 5, wanted 1 to 4"),
        ("features --checkpoint RUNS/whole --frames 1", "frames: got 1, wanted at least 2"),
        ("features --checkpoint RUNS/baseline", "checkpoint: got a network without an RRU, wanted one"),
        ("features --checkpoint RUNS", "RUNS: no checkpoint here"),
        (
            "features --checkpoint RUNS --output RUNS/out.jpg",
            "output: got RUNS/out.jpg, wanted a name that ends in .png",
        ),
        ("ranking --checkpoint RUNS/whole --queries nobody", "queries: got 'nobody', wanted the name of a tracklet"),
        ("ranking --checkpoint RUNS/whole --queries 0", "queries: got 0, wanted at least 1"),
        ("ranking --checkpoint RUNS/whole --top 0", "top: got 0, wanted at least 1"),
        ("cmc", "runs: got 0, wanted 1 to 7"),
        ("cmc RUNS/whole RUNS/absent", "RUNS/absent: no checkpoint here"),
        ("ablation RUNS/absent.json", "ablation: RUNS/absent.json cannot be read"),
        ("ablation RUNS/whole/config.json", "ablation: RUNS/whole/config.json is not one that training.ablation wrote"),
    ],
)
def test_bad_input_is_one_line_and_no_picture(
    runs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    output = [] if "--output" in arguments else ["--output", tmp_path / "picture.png"]
    with pytest.raises(SystemExit, match="2"):
        show(*arguments.replace("RUNS", str(runs)).split(), *output)
    error = capsys.readouterr().err
    assert error.startswith(f"error: {message.replace('RUNS', str(runs))}")
    assert error.count("\n") == 1
    assert list(tmp_path.iterdir()) == []


def test_a_file_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "picture.png.new").mkdir()
    with pytest.raises(SystemExit, match="2"):
        show("ablation", "--output", tmp_path / "picture.png")
    assert capsys.readouterr().err.startswith("error: output: [Errno 21] Is a directory")
