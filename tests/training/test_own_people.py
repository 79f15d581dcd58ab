"""Six people in folders, through the commands of training/README."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from training.engine.options import make_options
from training.evaluate import Options as EvaluateOptions
from training.evaluate import evaluate
from training.export.features import Options as ExportOptions
from training.export.features import export_features
from training.export.network import Options as NetworkOptions
from training.export.network import export_network
from training.runtime.errors import UserError
from training.search import Options as SearchOptions
from training.search import search
from training.train import train

NAMES = ("anna", "bob", "cleo", "dan", "eve", "fay")


@pytest.fixture(scope="module")
def people(small_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("own") / "people"
    sequences = small_data / "i-LIDS-VID" / "sequences"
    for number, name in enumerate(NAMES, start=1):
        for camera in (1, 2):
            shutil.copytree(sequences / f"cam{camera}" / f"person{number:03d}", root / name / f"camera-{camera}")
    return root


@pytest.fixture(scope="module")
def own_run(people: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("own-run") / "run"
    short = {"epochs": 1, "batches": 2, "compare_ops": False, "pictures": False, "device": "cpu"}
    train(make_options(recipe="quick", dataset="folder", data_root=people, output=folder, **short))
    return folder


def test_six_people_train_evaluate_export_and_search(people: Path, own_run: Path, tmp_path: Path) -> None:
    result = evaluate(EvaluateOptions(checkpoint=own_run, device="cpu"))
    assert (result.ranking.protocol, result.ranking.queries, result.ranking.gallery) == ("mars-standard-ap", 6, 6)
    output = tmp_path / "gallery.safetensors"
    export_features(ExportOptions(checkpoint=own_run, output=output, part="all", device="cpu"))
    hits = search(
        SearchOptions(gallery=output, frames=people / "cleo" / "camera-2", checkpoint=own_run, top=12, device="cpu")
    )
    assert len(hits) == 12
    assert (hits[0].name, hits[0].person) == ("cleo/camera-2", 3)
    assert hits[0].similarity == pytest.approx(1, abs=1e-6)


def test_people_trained_on_are_known_by_name_whatever_is_added(
    own_run: Path, people: Path, tmp_path: Path, recwarn: pytest.WarningsRecorder
) -> None:
    def warned() -> list[str]:
        return [str(warning.message) for warning in recwarn if "trained on" in str(warning.message)]

    strangers, more = tmp_path / "strangers", tmp_path / "more"
    for name in NAMES[:3]:
        shutil.copytree(people / name, strangers / f"other-{name}")
    evaluate(EvaluateOptions(checkpoint=own_run, data_root=strangers, device="cpu"))
    assert warned() == [], "they have the same numbers, and other names"
    shutil.copytree(people, more)
    shutil.copytree(people / "eve", more / "aaron")
    shutil.copytree(people / "dan", more / "abe")
    evaluate(EvaluateOptions(checkpoint=own_run, data_root=more, device="cpu"))
    (line,) = warned()
    assert line.startswith("split 0: got ") and line.endswith("; if they are the same, they were not held out")
    with pytest.raises(UserError, match=r"^split 1: got \d people .* that were trained on, such as .*, wanted split 0"):
        evaluate(EvaluateOptions(checkpoint=own_run, split=1, device="cpu"))


def test_a_person_added_to_the_folder_is_noticed(people: Path, tmp_path: Path) -> None:
    root = tmp_path / "people"
    shutil.copytree(people, root)
    short = {"epochs": 1, "batches": 1, "compare_ops": False, "pictures": False, "device": "cpu"}
    train(make_options(recipe="quick", dataset="folder", data_root=root, output=tmp_path / "run", **short))
    evaluate(EvaluateOptions(checkpoint=tmp_path / "run", device="cpu"))
    for name in ("aaron", "abe"):
        shutil.copytree(people / "eve", root / name)
    with pytest.raises(UserError, match=r"^split 0: got \d people .* trained on, such as .* of the same people as in"):
        evaluate(EvaluateOptions(checkpoint=tmp_path / "run", device="cpu"))


def test_a_network_to_share_names_nobody(own_run: Path, tmp_path: Path) -> None:
    export_network(NetworkOptions(own_run, tmp_path / "net"))
    config = json.loads((tmp_path / "net" / "config.json").read_text())
    assert len(config["names"]) == 3
    assert not any(name in config["names"] or f'"{name}"' in json.dumps(config) for name in NAMES)


def test_nobody_to_train_on_is_one_line(people: Path, tmp_path: Path) -> None:
    for part, camera in (("query", "camera-1"), ("gallery", "camera-2")):
        shutil.copytree(people / "bob" / camera, tmp_path / "own" / part / "bob" / camera)
    with pytest.raises(UserError, match=r"(?i)train|people|identities") as raised:
        train(make_options(dataset="folder", data_root=tmp_path / "own", output=tmp_path / "run", pictures=False))
    assert "\n" not in str(raised.value)
