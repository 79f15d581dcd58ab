"""The network that comes with the repository, against what its README says of it."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import numpy as np
import pytest

from training.data.datasets.mot_sequence import Track, read_sequence
from training.data.tracklets import Tracklet
from training.engine.checkpoint import load
from training.engine.feature_extractor import PRETRAINED, FeatureExtractor, unit_features
from training.engine.options import make_options
from training.engine.run_record import settings_of
from training.evaluate import Options, evaluate
from training.runtime.fields import differing

README = (PRETRAINED / "README.md").read_text()


def test_it_is_small_and_of_the_command_in_its_readme() -> None:
    assert sum(path.stat().st_size for path in PRETRAINED.iterdir()) < 2.1e6
    saved = load(PRETRAINED)
    (words,) = re.findall(r"training\.train (--recipe .*?) --output", README)
    names = [word.removeprefix("--").replace("-", "_") for word in words.split()[::2]]
    values = [int(word) if word.isdecimal() else word for word in words.split()[1::2]]
    wanted = make_options(**dict(zip(names, values, strict=True))).settings
    ignored = {"compare_ops"}
    assert differing(wanted, settings_of(saved)).keys() <= ignored
    assert saved.epoch == 20


@pytest.mark.exhaustive
def test_it_ranks_rendered_people_as_its_readme_says(tmp_path: Path) -> None:
    (rank1, mean_ap, chance) = map(float, re.findall(r"rank-1 ([\d.]+), mAP\s+([\d.]+), chance (\d+\.\d)", README)[0])
    ranking = evaluate(Options(checkpoint=PRETRAINED, data_root=tmp_path / "synthetic", device="cpu")).ranking
    assert 100 * ranking.chance == pytest.approx(chance, abs=0.05)
    # One of the 30 queries is 3.3: rounding may turn a near tie.
    assert 100 * ranking.cmc[1] == pytest.approx(rank1, abs=3.4)
    assert 100 * ranking.mean_ap == pytest.approx(mean_ap, abs=2)


@pytest.mark.shared
def test_it_finds_people_of_pets_as_its_readme_says(shared_dir: Path) -> None:
    folder = shared_dir / "data" / "pets09-s2l1"
    with (folder / "identities.csv").open(newline="") as file:
        person = {int(row["track"]): row["person"] for row in csv.DictReader(file)}
    tracks = sorted(read_sequence(folder).tracks, key=lambda track: track.frame_numbers[0])
    features = FeatureExtractor(device="cpu").extract(
        [Tracklet(track.number, 1, track.crops, str(track.number)) for track in tracks]
    )
    units = unit_features(features, [str(track.number) for track in tracks])
    ranks = {}
    for query, track in enumerate(tracks):
        who = person[track.number]
        again = [n for n, other in enumerate(tracks) if n > query and person[other.number] == who]
        if who in ranks or not again:
            continue
        apart = [n for n, other in enumerate(tracks) if n != query and not together(track, other)]
        order = [apart[place] for place in np.argsort(-units[apart] @ units[query])]
        ranks[who] = min(order.index(visit) + 1 for visit in again)
    assert len(ranks) == 7
    assert sum(rank == 1 for rank in ranks.values()) == 5
    assert sorted(ranks.values())[-2:] == [2, 6]


def together(one: Track, other: Track) -> bool:
    """Return True if two tracks share more than a second of the video."""
    return len({*one.frame_numbers} & {*other.frame_numbers}) > 10
