from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import tyro

from training.engine.checkpoint import last
from training.engine.load_trained import UseOptions, load_trained
from training.evaluation.features import extract
from training.export.__main__ import Options as AnyOptions
from training.export.__main__ import main
from training.export.features import Options, export_features
from training.retrieval.feature_file import open_features
from training.runtime.command import run_command
from training.runtime.errors import UserError


@pytest.mark.parametrize("part", ["gallery", "query", "train"])
def test_a_file_holds_the_features_of_a_part_with_who_they_are_of(run: Path, tmp_path: Path, part: str) -> None:
    output = tmp_path / "new" / "file.safetensors"
    options = tyro.cli(AnyOptions, args=["features", *f"--checkpoint {run} --output {output} --part {part}".split()])
    main(options)
    trained = load_trained(run, UseOptions())
    tracklets = getattr(trained.split, part)
    file = open_features(output)
    assert (file.rows, file.names) == (len(tracklets), [tracklet.name for tracklet in tracklets])
    assert file.people == [tracklet.person for tracklet in tracklets]
    assert file.cameras == [tracklet.camera for tracklet in tracklets]
    features = safetensors.torch.load_file(output)["features"].numpy()
    np.testing.assert_array_equal(features, extract(trained.network, tracklets).astype(np.float32))
    assert file.about["checkpoint"] == str(last(run).resolve())
    assert json.loads(file.about["config"]) == json.loads((last(run) / "config.json").read_text())
    assert (file.about["dataset"], file.about["split"], file.about["part"]) == ("ilids-vid", "0", part)


def test_the_older_name_of_the_queries_means_them() -> None:
    args = ["features", "--checkpoint", "run", "--output", "file", "--part", "probe"]
    assert tyro.cli(AnyOptions, args=args).part == "query"  # type: ignore[union-attr]


def test_frames_are_resized_as_they_were_in_training(run: Path, tmp_path: Path) -> None:
    config = json.loads((last(run) / "config.json").read_text())
    other = tmp_path / "by_pillow"
    other.mkdir()
    for name in ("model.safetensors", "training.pt"):
        (other / name).symlink_to(last(run) / name)
    (other / "config.json").write_text(json.dumps({**config, "settings": {**config["settings"], "resize": "pillow"}}))
    export_features(Options(checkpoint=other, output=tmp_path / "file.safetensors"))
    trained = load_trained(run, UseOptions())
    features = safetensors.torch.load_file(tmp_path / "file.safetensors")["features"].numpy()
    by_pillow, by_device = (extract(trained.network, trained.split.gallery, resize=by) for by in ("pillow", "device"))
    np.testing.assert_array_equal(features, by_pillow.astype(np.float32))
    assert not np.array_equal(by_pillow, by_device)


def test_nothing_is_written_over(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "file.safetensors"
    path.write_text("mine")
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: export_features(Options(checkpoint=run, output=path)))
    assert capsys.readouterr().err == f"error: output: {path} is there already, wanted a new file\n"
    assert path.read_text() == "mine"
    with pytest.raises(UserError, match=r"wanted a name that ends in \.safetensors$"):
        export_features(Options(checkpoint=run, output=tmp_path / "file.pt"))
