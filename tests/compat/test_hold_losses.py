"""The command that holds a checkout's losses to docs/losses.md."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

import rru_fast
from tests import hold_losses
from tests.helpers.checkouts import forget, load

LOSS = """
import absent
import torch
from absent.registry import LOSSES
from torch import nn
from torchreid.utils.distances import distances, registered

registered.append("TripletLoss")  # a registry that takes a name once
assert len(registered) == 1

@LOSSES.register_module()
class TripletLoss(nn.Module):
    def __init__(self, margin=0.3):
        super().__init__()
        self.ranking_loss = nn.MarginRankingLoss(margin=margin)

    def forward(self, inputs, targets):
        d, same = distances(inputs), targets[:, None] == targets
        hardest_positive = d.masked_fill(~same, 0).amax(1)
        hardest_negative = d.masked_fill(same, torch.inf).amin(1)
        return self.ranking_loss(hardest_negative, hardest_positive, torch.ones_like(hardest_negative))
"""
DISTANCES = """
registered = []

def distances(f):
    return (f[:, None] - f).square().sum(2).clamp(min=1e-12).sqrt()
"""
FILE = "torchreid/losses/hard_mine_triplet_loss.py"
TORCHREID = "KaiyangZhou/deep-person-reid"


def checkout(folder: Path, loss: str = LOSS) -> Path:
    """Write a checkout whose packages cannot be imported, since what they import is not installed or fails."""
    for name, text in {
        FILE: loss,
        "torchreid/__init__.py": "raise RuntimeError",
        "torchreid/losses/__init__.py": "raise RuntimeError",
        "torchreid/utils/__init__.py": "import absent\nraise RuntimeError",
        "torchreid/utils/distances.py": DISTANCES,
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text)
    return folder


@pytest.mark.parametrize(
    ("old", "new", "line"),
    [
        ("", "", f"{FILE} TripletLoss(margin=0.3)(f, y): swapped, margin 0.3; loss: "),
        ("amax(1)", "amax(1) + 1e-4", "NOT SWAPPED: accelerate: TripletLoss looks like "),
        ("margin=margin", "margin=2 * margin", "swapped, margin 0.6; loss: "),
        ("return self", "return (1 + 1e-9 * bool(targets[0] > 0)) * self", "swapped, margin 0.3; loss: 1.0e-09"),
        ("super().__init__()", "raise ValueError('no')", "ValueError: no"),
    ],
)
def test_a_checkout_is_held_to_the_page(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], old: str, new: str, line: str
) -> None:
    text = LOSS.replace(old, new) if old else LOSS
    status = hold_losses.main(["--repo", str(checkout(tmp_path, text)), "--name", TORCHREID])
    printed = capsys.readouterr().out
    assert printed.startswith(f"{tmp_path}: {TORCHREID}\n{'FAILED ' if old else ''}{FILE} ")
    assert line in printed
    assert status == bool(old)


def test_a_checkout_is_known_by_its_files_its_name_or_its_origin(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    repo = checkout(tmp_path / "mine")
    assert {TORCHREID, "hh23333/PVPM", "weleen/AGRL.pytorch"} <= set(hold_losses.known(repo))
    assert hold_losses.main(["--repo", str(repo)]) == 0  # AGRL's arguments do not fit
    first, second, *lines = capsys.readouterr().out.splitlines()
    assert {TORCHREID, "hh23333/PVPM"} <= set(first.partition(": ")[2].split(" or ")) and "AGRL" not in first
    assert second.startswith("by its losses not ") and "weleen/AGRL.pytorch" in second
    assert len(lines) == 1
    assert set(hold_losses.known(checkout(tmp_path / "PVPM"))) == {"hh23333/PVPM"}
    (repo / ".git").mkdir()
    (repo / ".git/config").write_text(f'[remote "origin"]\n\turl = git@github.com:{TORCHREID}.git\n')
    assert set(hold_losses.known(repo)) == {TORCHREID}
    with pytest.raises(SystemExit, match=r"^--repo: got .*, wanted a checkout of a repository in docs/losses\.md$"):
        hold_losses.main(["--repo", str(tmp_path)])


def test_every_import_of_a_checkout_is_anew_and_can_be_forgotten(tmp_path: Path) -> None:
    repo = checkout(tmp_path)
    assert load(repo, FILE).TripletLoss is not load(repo, FILE).TripletLoss
    forget(repo)
    assert not any(name.partition(".")[0] in ("torchreid", "absent") for name in sys.modules)


def test_the_batches_have_active_and_inactive_anchors() -> None:
    shares = []
    for features, labels in hold_losses.batches():
        losses = rru_fast.batch_hard_triplet(features, labels, reduction="none")
        shares.append(float((losses > 0).double().mean()))
    assert any(0 < share < 1 for share in shares) and 0 in shares and 1 in shares
