from __future__ import annotations

from pathlib import Path

import pytest

from training.data import DATASETS, load_split
from training.data.ilids_vid import load
from training.errors import UserError


def test_a_dataset_is_read_by_the_module_of_its_name(ilids: Path) -> None:
    assert load_split("ilids-vid", ilids, 1) == load(ilids, 1)


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
