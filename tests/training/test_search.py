from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
import tyro
from PIL import Image

from training.export.features import Options as ExportOptions
from training.export.features import export_features
from training.retrieval.feature_file import open_features, write_features
from training.runtime.command import run_command
from training.search import Hit, Options, search


@pytest.fixture(scope="module")
def files(run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the features of the run's gallery and of its queries."""
    folder = tmp_path_factory.mktemp("features")
    for part in ("gallery", "query"):
        export_features(ExportOptions(checkpoint=run, output=folder / f"{part}.safetensors", part=part))
    return folder


def found(*arguments: str | Path) -> list[Hit]:
    return search(tyro.cli(Options, args=[*map(str, arguments), "--device", "cpu"]))


def test_each_query_has_the_galleries_best_by_cosine(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    gallery, query = files / "gallery.safetensors", files / "query.safetensors"
    one, other = (safetensors.torch.load_file(path)["features"].double() for path in (query, gallery))
    cosines = torch.nn.functional.normalize(one) @ torch.nn.functional.normalize(other).T
    best = cosines.topk(3)
    of, among = open_features(query), open_features(gallery)
    wanted = [
        (of.names[query], rank + 1, among.people[row], among.cameras[row], among.names[row])
        for query in range(of.rows)
        for rank, row in enumerate(best.indices[query].tolist())
    ]
    hits = found("--gallery", gallery, "--query", query, "--top", 3)
    assert [(hit.query, hit.rank, hit.person, hit.camera, hit.name) for hit in hits] == wanted
    np.testing.assert_allclose([hit.similarity for hit in hits], best.values.ravel(), rtol=0, atol=1e-12)
    shown = capsys.readouterr().out
    assert shown.startswith("exact, of 4 in ")
    assert sum(hits[0].name in line and f"{hits[0].similarity:.4f}" in line for line in shown.splitlines()) >= 1
    some = found("--gallery", gallery, "--query", query, "--top", 3, "--names", of.names[2], of.names[0])
    # Similarities of fewer queries come from a BLAS call of another size, which may round otherwise.
    assert some == [
        replace(hit, similarity=pytest.approx(hit.similarity, abs=1e-12)) for hit in (*hits[6:9], *hits[:3])
    ]
    everything = found("--gallery", gallery, "--query", query, "--top", 99)
    assert len(everything) == of.rows * among.rows


def test_frames_find_the_tracklet_they_are_of(run: Path, files: Path, small_data: Path, tmp_path: Path) -> None:
    query = open_features(files / "query.safetensors").names[1]
    frames = sorted((small_data / "i-LIDS-VID" / "sequences" / query).glob("*.png"))
    folder = tmp_path / "someone"
    folder.mkdir()
    for number, frame in enumerate(frames):  # 2 comes before 10, which it does not as text
        shutil.copy(frame, folder / f"frame{number}.PNG")
    (folder / "notes.txt").write_text("not a frame")
    (folder / "._frame0.png").write_text("neither is what a file system leaves")
    hits = found("--gallery", files / "query.safetensors", "--frames", folder, "--checkpoint", run, "--top", 2)
    assert (hits[0].query, hits[0].name) == ("someone", query)
    assert len(frames) > 10 and hits[0].similarity == pytest.approx(1, abs=1e-9)
    assert hits[1].similarity < 1 - 1e-9


def test_frames_stored_sideways_are_searched_upright(run: Path, files: Path, small_data: Path, tmp_path: Path) -> None:
    query = open_features(files / "query.safetensors").names[1]
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned clockwise
    for path in (small_data / "i-LIDS-VID" / "sequences" / query).glob("*.png"):
        with Image.open(path) as upright:
            upright.transpose(Image.Transpose.ROTATE_90).save(tmp_path / path.name, exif=exif)
    hits = found("--gallery", files / "query.safetensors", "--frames", tmp_path, "--checkpoint", run, "--top", 1)
    assert hits[0].name == query
    assert hits[0].similarity == pytest.approx(1, abs=1e-9)


def test_an_index_finds_the_same_and_tells_its_recall(files: Path, capsys: pytest.CaptureFixture[str]) -> None:
    asked = ("--gallery", files / "gallery.safetensors", "--query", files / "query.safetensors", "--top", 3)
    exact = found(*asked)
    capsys.readouterr()
    hits = found(*asked, "--index", "faiss")
    assert [(hit.query, hit.rank, hit.name) for hit in hits] == [(hit.query, hit.rank, hit.name) for hit in exact]
    shown = capsys.readouterr().out
    assert shown.startswith("building an index of 4 features: ")
    assert "\nrecall@3 1.000 against exact search, over 4 of 4 queries; index " in shown
    assert "faiss, of 4 in " in shown
    assert shown.splitlines()[-1] == f"index: {next(files.glob('gallery.safetensors.*.ivf'))}"
    found(*asked, "--index", "faiss")
    assert "index: " not in capsys.readouterr().out


def test_what_an_index_misses_counts_against_its_recall(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    rows = 4000  # 63 lists, 8 looked into: at random, an eighth of what is asked for is there
    for name, features in (("gallery", torch.randn(rows, 64)), ("query", torch.randn(150, 64))):
        count = len(features)
        write_features(
            tmp_path / name, features, [0] * count, [0] * count, [str(n) for n in range(count)], {"network": "one"}
        )
    asked = ("--gallery", tmp_path / "gallery", "--query", tmp_path / "query", "--top", 10)
    exact, hits = found(*asked), found(*asked, "--index", "faiss")
    shown = capsys.readouterr().out
    pairs = [{(hit.query, hit.name) for hit in of if int(hit.query) < 100} for of in (exact, hits)]
    recall = len(pairs[0] & pairs[1]) / 1000
    assert 0.1 < recall < 0.9
    assert f"recall@10 {recall:.3f} against exact search, over 100 of 150 queries" in shown


def test_features_of_another_network_are_refused_and_of_an_unknown_one_warned_of(files: Path, tmp_path: Path) -> None:
    known = open_features(files / "gallery.safetensors")
    features = torch.randn(2, known.width)
    for name, about in (("other", {"network": "f" * 64}), ("unknown", {})):
        write_features(tmp_path / name, features, [1, 2], [1, 1], ["a", "b"], about)
    with pytest.raises(ValueError, match=r"^query: got features of network f{12}, wanted those of the gallery's, /.*"):
        found("--gallery", known.path, "--query", tmp_path / "other")
    with pytest.warns(UserWarning, match="does not say which network"):
        found("--gallery", known.path, "--query", tmp_path / "unknown")
    write_features(tmp_path / "narrow", features[:, :3], [1, 2], [1, 1], ["a", "b"], known.about)
    with pytest.raises(ValueError, match=f"^query: got features of 3 numbers, wanted {known.width}, as the gallery's$"):
        found("--gallery", known.path, "--query", tmp_path / "narrow")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("", "query: got neither --query nor --frames, wanted --query, or --frames and --checkpoint"),
        ("--checkpoint RUN", "query: got --checkpoint without --frames, wanted --query, or --frames and --checkpoint"),
        ("--frames RUN", "frames: got --frames without --checkpoint, or with --query or --names, wanted just these"),
        ("--frames RUN --checkpoint RUN --names a", "frames: got --frames without --checkpoint, or with --query or"),
        ("--frames RUN --checkpoint RUN", "frames: got no image in RUN, wanted the frames of a tracklet"),
        ("--query FILE --names nobody", "names: got 'nobody', wanted some of FILE's, such as 'cam"),
        ("--query FILE --top 0", "top: got 0, wanted at least 1"),
        ("--query RUN/config.json", "RUN/config.json: not a readable file of features ("),
        ("--query FILE --gallery RUN/absent", "RUN/absent: not a readable file of features (No such file or directory"),
    ],
)
def test_bad_input_is_one_line(
    run: Path, files: Path, capsys: pytest.CaptureFixture[str], arguments: str, message: str
) -> None:
    def filled(text: str) -> str:
        return text.replace("RUN", str(run)).replace("FILE", str(files / "query.safetensors"))

    gallery = [] if "--gallery" in arguments else ["--gallery", str(files / "gallery.safetensors")]
    with pytest.raises(SystemExit, match="2"):
        run_command(lambda: found(*gallery, *filled(arguments).split()))
    error = capsys.readouterr().err
    assert error.startswith(f"error: {filled(message)}")
    assert error.count("\n") == 1


def test_names_and_paths_are_shown_as_they_are(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "a[bold].safetensors"
    write_features(path, torch.eye(2), [1, 2], [1, 1], ["[/red] a", "[b]"], {"network": "of one"})
    found("--gallery", path, "--query", path, "--top", 1)
    shown = capsys.readouterr().out
    assert shown.count("[/red] a") == 2 and shown.count("[b]") == 2
    assert "a[bold].safetensors" in shown.replace("\n", "")
