from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path

import pytest

from training.data.datasets.mot import load
from training.data.tracklets import Tracklet
from training.runtime.errors import UserError

Write = Callable[..., Path]


def tracks(tracklets: tuple[Tracklet, ...]) -> list[str]:
    """Return the tracks of tracklets, without when they were seen."""
    return [tracklet.name.partition("@")[0] for tracklet in tracklets]


def frame_numbers(tracklet: Tracklet) -> list[int]:
    """Return the numbers of the frames that a tracklet of the written sequence was cut out of."""
    return [int(frame[0, 0, 2]) for frame in tracklet.frames]  # type: ignore[index]


def test_without_identities_a_track_ends_as_its_own_gallery(mot: Write) -> None:
    split = load(mot({2: range(11, 51), 5: range(1, 18), 9: range(1, 19)}), 0)
    assert [t.person for t in split.train] == [2, 9]
    assert split.query == split.train
    assert frame_numbers(split.query[0]) == list(range(11, 29))
    assert frame_numbers(split.gallery[0]) == list(range(33, 51))
    assert [(t.person, t.camera) for t in split.query + split.gallery] == [(2, 1), (9, 1), (2, 2), (9, 2)]
    assert "1 tracks dropped" in split.description


IDENTITIES = "track,person\n7,Ann\n1,Ann\n3,Ann\n2,Bob\n5,Bob\n"
VISITS = {7: range(1, 11), 1: range(12, 25), 3: range(40, 50), 2: range(1, 12), 5: range(20, 24), 4: range(30, 40)}


def test_with_identities_later_visits_are_searched_by_the_earliest(mot: Write) -> None:
    split = load(mot(VISITS, identities=IDENTITIES), 0)
    assert tracks(split.train) == ["track2", "track7", "track4"]
    assert tracks(split.query) == ["track7"], "Bob's return, of 4 frames, is too short"
    assert tracks(split.gallery) == ["track1", "track3"]
    assert {t.camera for t in split.train} == {1}
    assert {t.camera for t in split.gallery} == {2}
    assert {t.person for t in split.query} == {t.person for t in split.gallery}
    assert "1 tracks under 8 frames dropped" in split.description
    assert "never trained on" in split.description


def test_a_name_says_when_the_tracklet_was_seen(mot: Write) -> None:
    root = mot({2: range(11, 51), 9: range(1, 19)})
    split = load(root, 0)
    assert [t.name for t in split.query] == ["track2@0:01.4-0:03.9", "track9@0:00.0-0:01.0"]
    assert [t.name for t in split.gallery] == ["track2@0:04.6-0:07.0", "track9@0:01.4-0:02.4"]
    assert len({t.name for t in split.part("all")}) == 4
    (root / "seqinfo.ini").write_text("[Sequence]\nseqLength=60\n")
    assert [t.name for t in load(root, 0).query] == ["track2@11-28", "track9@1-8"]


def test_the_gallery_holds_nothing_trained_on(mot: Write) -> None:
    split = load(mot(VISITS, identities=IDENTITIES), 0)
    assert not {t.name for t in split.gallery} & {t.name for t in split.train}


@pytest.mark.parametrize(("begin", "fits"), [(14, True), (13, False)])
def test_visits_may_overlap_by_a_second_and_no_more(mot: Write, begin: int, fits: bool) -> None:
    root = mot({1: range(1, 21), 2: range(begin, 41)}, identities="track,person\n1,Ann\n2,Ann\n")
    if fits:
        assert tracks(load(root, 0).gallery) == ["track2"]
    else:
        with pytest.raises(UserError, match="person Ann: tracks 1 and 2 overlap by 8 frames, wanted at most 7"):
            load(root, 0)


def test_a_visit_within_a_longer_one_is_refused_after_a_short_one_too(mot: Write) -> None:
    tracks = {1: range(1, 60), 2: range(1, 60), 3: range(55, 60), 4: range(30, 40)}
    root = mot(tracks, identities="track,person\n1,Ann\n4,Ann\n")
    with pytest.raises(UserError, match="tracks 1 and 4 overlap by 10 frames"):
        load(root, 0)


def test_nobody_coming_back_is_refused(mot: Write) -> None:
    with pytest.raises(UserError, match="nobody comes back"):
        load(mot({1: range(1, 21), 2: range(1, 21)}, identities="track,person\n1,Ann\n2,Bob\n"), 0)


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("x,1,1,1,9,9,1", "wanted frame,track"),
        ("1,1,1,1,9", "wanted frame,track"),
        ("1.5,1,1,1,9,9,1", "wanted finite numbers"),
        ("1,1,nan,1,9,9,1", "wanted finite numbers"),
        ("0,1,1,1,9,9,1", "wanted 1 to 60"),
        ("61,1,1,1,9,9,1", "wanted 1 to 60"),
        ("1,1,1,1,0,9,1", "wanted a positive size"),
        ("5,1,1,1,9,9,1", "track 1 has a box in frame 5 already"),
    ],
)
def test_a_malformed_line_is_named_with_its_number(mot: Write, line: str, wanted: str) -> None:
    root = mot({1: range(5, 25)})
    path = root / "gt/gt.txt"
    path.write_text(path.read_text() + "\n" + line + "\n")
    with pytest.raises(UserError, match=rf"{re.escape(str(path))}, line 22: .*{wanted}"):
        load(root, 0)


@pytest.mark.parametrize(
    ("csv", "wanted"),
    [
        ("1,Ann\n", "wanted track,person"),
        ("track,person\none,Ann\n", "line 2: got 'one','Ann'"),
        ("track,person\n1\n", "line 2: got '1',''"),
        ("track,person\n1,Ann\n8,Ann\n", "line 3: no track 8"),
        ("track,person\n" + "1" * 5000 + ",Ann\n", "line 2: got '1111"),
        ("track,person\n\u0661,Ann\n", "line 2: got '\u0661','Ann'"),
        ("track,person\n1_0,Ann\n", "line 2: got '1_0','Ann'"),
        (f"track,person\n{2**63},Ann\n", f"line 2: got '{2**63}','Ann'"),
        ('track,person\n1,"Ann\n', "wanted track,person"),
        ("track,person\n1," + "x" * 200_000, "line 2: field larger than"),
        ("track,person\n1,Ann\n1,Bob\n", "line 3: track 1 is person Ann already"),
    ],
)
def test_malformed_identities_are_named(mot: Write, csv: str, wanted: str) -> None:
    with pytest.raises(UserError, match=re.escape(wanted)):
        load(mot({1: range(1, 21)}, identities=csv), 0)


def test_a_frame_rate_is_wanted_only_where_identities_are_given(mot: Write) -> None:
    root = mot({1: range(1, 61), 2: range(1, 21)})
    with_rate = load(root, 0)
    (root / "seqinfo.ini").write_text("[Sequence]\nseqLength=60\n")
    assert load(root, 0).description == with_rate.description
    (root / "identities.csv").write_text("track,person\n1,Ann\n")
    (root / "img1/000001.png").unlink()  # the error comes before any frame is read
    with pytest.raises(UserError, match=r"\A.*seqinfo\.ini: no frameRate, wanted the frames per second, .*csv .*\Z"):
        load(root, 0)


def test_only_split_zero_is_there(mot: Write) -> None:
    with pytest.raises(UserError, match="got 1, wanted 0"):
        load(mot({1: range(1, 21)}), 1)


@pytest.mark.shared
def test_seven_of_the_ten_people_of_pets_return(shared_dir: Path) -> None:
    split = load(shared_dir / "data" / "pets09-s2l1", 0)
    assert len(split.train) == 10
    assert tracks(split.query) == ["track9", "track15", "track19", "track11", "track12", "track13", "track10"]
    assert [t.person for t in split.gallery] == [1, 2, 2, 2, 3, 4, 5, 6, 9]
    assert sum(len(t.frames) for t in split.train + split.gallery) == 4476
