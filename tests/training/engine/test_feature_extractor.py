from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import training
from tests.helpers.small_video import RATE, write_video
from training import FeatureExtractor
from training.data.tracklets import Tracklet
from training.engine.load_trained import UseOptions, load_trained
from training.evaluation.features import extract
from training.model.network import Network
from training.runtime.errors import UserError


@pytest.fixture(scope="module")
def extractor(run: Path) -> FeatureExtractor:
    return FeatureExtractor(run, device="cpu")


@pytest.fixture
def folder(small_data: Path) -> Path:
    """Frames of one person, 8 or more."""
    return small_data / "i-LIDS-VID" / "sequences" / "cam1" / "person003"


def test_a_feature_is_that_of_the_evaluation_of_length_one(extractor: FeatureExtractor, run: Path) -> None:
    trained = load_trained(run, UseOptions(device="cpu"))
    tracklets = trained.split.query
    wanted = torch.nn.functional.normalize(torch.from_numpy(extract(trained.network, tracklets))).float()
    got = extractor.batch([list(tracklet.frames) for tracklet in tracklets])
    assert (got.shape, got.dtype, got.device.type) == ((len(tracklets), extractor.features), torch.float32, "cpu")
    torch.testing.assert_close(got, wanted, rtol=0, atol=1e-6)
    torch.testing.assert_close(extractor(list(tracklets[1].frames)), got[1], rtol=0, atol=1e-6)


def test_frames_are_paths_arrays_images_or_a_folder(extractor: FeatureExtractor, folder: Path) -> None:
    paths = sorted(folder.glob("*.png"))
    images = [Image.open(path) for path in paths]
    arrays = [np.asarray(image.convert("RGB")) for image in images]
    wanted = extractor(paths)
    for frames in (list(map(str, paths)), images, arrays, np.stack(arrays), folder, str(folder), iter(paths)):
        assert torch.equal(extractor(frames), wanted)
    assert not torch.equal(extractor(arrays[::-1]), wanted), "the order of time counts"


def test_chunks_do_not_change_a_feature(run: Path, folder: Path) -> None:
    whole, cut = (FeatureExtractor(run, device="cpu", dtype=torch.float64, chunk=chunk)(folder) for chunk in (64, 3))
    torch.testing.assert_close(cut, whole, rtol=0, atol=1e-7)


@pytest.mark.parametrize(("dtype", "error"), [(torch.float64, 1e-5), (torch.bfloat16, 0.05)])
def test_the_dtype_is_the_networks(run: Path, folder: Path, dtype: torch.dtype, error: float) -> None:
    extractor = FeatureExtractor(run, device="cpu", dtype=dtype)
    assert {parameter.dtype for parameter in extractor.network.parameters()} == {dtype}
    torch.testing.assert_close(extractor(folder), FeatureExtractor(run, device="cpu")(folder), rtol=0, atol=error)


def test_boxes_in_a_video_are_frames_too(extractor: FeatureExtractor, tmp_path: Path) -> None:
    video = write_video(tmp_path / "people.mp4")
    rows = [list(map(float, line.split(",")[:6])) for line in (tmp_path / "gt.txt").read_text().splitlines()]
    tracks = extractor.tracks(video, tmp_path / "gt.txt")
    assert sorted(tracks) == [1, 2, 3, 5]
    one = extractor(video, boxes=[(frame, *sides) for frame, track, *sides in rows if track == 3])
    torch.testing.assert_close(tracks[3], one, rtol=0, atol=1e-6)
    assert RATE and float(one @ one) == pytest.approx(1, abs=1e-6)


def test_a_network_may_be_given_and_the_origin_of_one_is_known(
    extractor: FeatureExtractor, run: Path, folder: Path
) -> None:
    given = FeatureExtractor(Network.from_pretrained(extractor.about["checkpoint"]), device="cpu")
    assert torch.equal(given(folder), extractor(folder))
    assert given.about == {}
    assert len(extractor.about["network"]) == 64
    by_reference = FeatureExtractor(run, device="cpu", ops="reference")
    torch.testing.assert_close(by_reference(folder), extractor(folder), rtol=0, atol=1e-5)


def test_a_given_network_is_not_changed(extractor: FeatureExtractor) -> None:
    network = Network.from_pretrained(extractor.about["checkpoint"]).train()
    FeatureExtractor(network, device="cpu", dtype=torch.bfloat16)
    assert network.training and {parameter.dtype for parameter in network.parameters()} == {torch.float32}
    with pytest.raises(UserError, match=r"^ops: got 'reference' with a network, wanted None"):
        FeatureExtractor(network, ops="reference")


def test_an_image_counts_as_its_file_does(extractor: FeatureExtractor, folder: Path, tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    with Image.open(sorted(folder.glob("*.png"))[0]) as image:
        image.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "sideways.png", exif=exif)
        image.convert("P").save(tmp_path / "palette.png")
    for name in ("sideways.png", "palette.png"):
        assert torch.equal(extractor([Image.open(tmp_path / name)]), extractor([tmp_path / name]))
    with pytest.raises(UserError, match=r"^frame tracklet 0, frame 0: got an image of mode I;16, wanted one of 1, L,"):
        extractor([Image.new("I;16", (8, 8))])


def test_the_network_of_the_repository_is_the_default(folder: Path) -> None:
    assert FeatureExtractor(device="cpu")(folder).shape == (64,)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"dtype": torch.int8}, "dtype: got torch.int8, wanted one of torch.float32,"),
        ({"chunk": 0}, "chunk: got 0, wanted at least 1 frame"),
        ({"chunk": 2.5}, "chunk: got 2.5, wanted at least 1 frame"),
        ({"ops": "slow"}, "ops: got 'slow', wanted one of None, fast, reference"),
        ({"resize": "no"}, "resize: got 'no', wanted one of None, device, pillow"),
        ({"device": "mps"}, "device: got 'mps', wanted one of auto, cpu, cuda"),
        ({"checkpoint": "nowhere"}, "nowhere: no checkpoint here"),
    ],
)
def test_a_wrong_argument_is_named(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        FeatureExtractor(**arguments)


ARRAY = np.zeros((8, 6, 3), np.uint8)


@pytest.mark.parametrize(
    ("frames", "message"),
    [
        ([], "frames: got none for tracklet 0, wanted at least one"),
        ([ARRAY, ARRAY[..., :1]], r"tracklet 0, frame 1: got shape \(8, 6, 1\) of uint8, wanted \(h, w, 3\) of uint8"),
        ([ARRAY.astype(np.float32)], r"tracklet 0, frame 0: got shape \(8, 6, 3\) of float32"),
        ([ARRAY[:0]], r"tracklet 0, frame 0: got shape \(0, 6, 3\)"),
        ([3], "tracklet 0, frame 0: got int, wanted a path, a Pillow image or an array"),
        (ARRAY, "frames: got one ndarray, wanted a list of images, or a folder"),
        (__file__, "frames: got the file .*, wanted a list of images, or a folder; a video needs boxes"),
        ("nowhere", "frames: nowhere: No such file or directory, wanted a folder of images"),
    ],
)
def test_frames_that_are_none_are_named(extractor: FeatureExtractor, frames: Any, message: str) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        extractor(frames)


@pytest.mark.parametrize(
    ("boxes", "message"),
    [
        ([], "boxes: got none, wanted boxes of people in "),
        ([(1, 2, 3, 4)], r"boxes: got \(1, 2, 3, 4\), wanted rows of frame"),
        ([(1.5, 2, 3, 4, 5)], r"boxes: got \(1.5, .*, wanted rows of frame"),
        ([(1, 2, 3, float("nan"), 5)], r"boxes: got .*nan.*, wanted rows of frame"),
        ([("a", 2, 3, 4, 5)], r"boxes: got \('a', .*, wanted rows of frame"),
        ([(1, 2, 3, -4, 5)], r"boxes: got \(1, 2, 3, -4, 5\), wanted rows of frame"),
        ([(1, 2, 3, 4, 5)] * 2, r"boxes: got \(1, 2, 3, 4, 5\), wanted rows of frame, .*, one per frame"),
        ((1, 2, 3, 4, 5), "boxes: got 1, wanted rows of frame"),
        ([(61, 1, 1, 9, 9)], "boxes: got frames 61 to 61, but .* has 60"),
        ([(0, 1, 1, 9, 9)], "boxes: got frames 0 to 0"),
        ([(1, 999, 1, 9, 9)], "boxes: .* of frame 1 is outside of the image"),
    ],
)
def test_boxes_that_are_none_are_named(extractor: FeatureExtractor, boxes: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=f"^{message}"):
        extractor(write_video(tmp_path / "people.mp4"), boxes=boxes)


def test_no_tracklet_and_a_zero_feature_are_refused(extractor: FeatureExtractor) -> None:
    with pytest.raises(UserError, match=r"^tracklets: got none"):
        extractor.batch([])
    with pytest.raises(UserError, match=r"^frames: got list with boxes, wanted the path of a video"):
        extractor([ARRAY], boxes=[(1, 1, 1, 2, 2)])
    network = Network.from_pretrained(extractor.about["checkpoint"])
    with torch.no_grad():
        for parameter in network.head.parameters():
            parameter.zero_()
    with pytest.raises(UserError, match=r"^tracklet 0: its feature is zero and has no direction"):
        FeatureExtractor(network, device="cpu")([ARRAY])


def test_extract_keeps_the_length(extractor: FeatureExtractor, folder: Path) -> None:
    tracklet = Tracklet(1, 1, sorted(folder.glob("*.png")), "one")
    features = extractor.extract([tracklet])
    assert features.dtype == np.float64
    assert abs(np.linalg.norm(features) - 1) > 1e-3


def test_training_has_nothing_else() -> None:
    with pytest.raises(AttributeError, match="module 'training' has no attribute 'Features'"):
        training.Features  # noqa: B018
