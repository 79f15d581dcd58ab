from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.helpers.small_sets import write_mars
from training.data import DATASETS, load_split
from training.data.datasets import ilids_vid, prid_2011
from training.runtime.errors import UserError


def test_a_dataset_is_read_by_the_module_of_its_name(ilids: Path) -> None:
    assert load_split("ilids-vid", ilids, 1, check_counts=False) == ilids_vid.load(ilids, 1, check_counts=False)


def test_who_counts_in_prid_reaches_its_reader(prid: Path) -> None:
    official = load_split("prid-2011", prid, 1, prid="official-27", check_counts=False)
    assert official == prid_2011.load(prid, 1, prid="official-27", check_counts=False)
    assert load_split("prid-2011", prid, 1, check_counts=False).train != official.train


def test_mars_is_read_too(mars: Path) -> None:
    assert load_split("mars", mars, 0, check_counts=False).protocol == "mars-official"


def test_a_sequence_is_read_whatever_is_asked_of_the_other_datasets(mot: Callable[..., Path]) -> None:
    root = mot({1: range(1, 41)})
    asked = load_split("mot", root, 0, prid="official-27", check_counts=False)
    assert asked.description == load_split("mot", root, 0).description


def test_counts_are_checked_unless_turned_off(ilids: Path) -> None:
    with pytest.raises(UserError, match=r"got 4 person folders .* wanted 300; .* --no-check-counts"):
        load_split("ilids-vid", ilids, 1)


def test_an_unknown_dataset_is_refused_with_those_there_are() -> None:
    with pytest.raises(UserError, match=f"got 'cifar', wanted one of {', '.join(DATASETS)}"):
        load_split("cifar", None, 0)


@pytest.mark.parametrize("dataset", sorted(set(DATASETS) - {"synthetic"}))
def test_only_the_synthetic_set_has_a_default_place(dataset: str) -> None:
    with pytest.raises(UserError, match=f"{dataset}: got no data root"):
        load_split(dataset, None, 0)


@pytest.mark.parametrize("dataset", sorted(set(DATASETS) - {"synthetic"}))
def test_a_root_that_is_not_there_is_named(dataset: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=rf"{tmp_path / 'absent'}.*(not found|No such file)"):
        load_split(dataset, tmp_path / "absent", 0)


def test_a_folder_that_cannot_be_read_is_one_line(tmp_path: Path) -> None:
    root = write_mars(tmp_path / "mars", name_lists=False)
    shutil.rmtree(root / "bbox_train" / "0001")
    (root / "bbox_train" / "0001").write_text("where a folder should be")
    with pytest.raises(UserError, match=r"\Adataset mars: .*0001.*; wanted a data root that can be read\Z"):
        load_split("mars", root, 0, check_counts=False)
