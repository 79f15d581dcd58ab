"""How a loss of a public repository is constructed and called, and where it is."""

from __future__ import annotations

import re
from collections.abc import Iterator
from types import SimpleNamespace as Namespace
from typing import NamedTuple

from torch import nn


class Form(NamedTuple):
    """A loss as one or more repositories construct and call it."""

    repositories: str
    """owner/name, separated by commas; with :file if it is not that of FILES."""
    make: str
    """Expression in the names of the file and NAMES."""
    options: str = ""
    """What the swapped loss computes, as `tests.hold_losses` describes it."""
    call: str = "(f, y)"
    """Follows the loss in a call with features f (N, D) and integer labels y (N,)."""
    returns: str = "loss"
    only: str = ""
    """Which of its users' calls the operator serves; all if empty. `call` is one of them."""
    instead: str = ""
    """Statements and an expression that give `call` where accelerate leaves the loss alone."""
    why: str = ""
    """What keeps accelerate from it."""
    patch: tuple[str, str] = ("", "")
    """Regular expression in the file and its replacement, without which the loss fails on torch 2.11."""
    has: str = ""
    """Text that the file must have: its version."""
    stated: str = ""
    """Names in FORMS of benchmarks/implementations/losses.py, separated by semicolons."""

    def places(self) -> Iterator[tuple[str, str]]:
        """Yield owner/name and the file there, "" for a package that is no checkout."""
        for place in self.repositories.split(", "):
            repository, _, file = place.partition(":")
            yield repository, file or FILES.get(repository, "")

    @property
    def name(self) -> str:
        """Name of the class or function in the file."""
        return re.split(r"[^\w]", self.make)[0]


class Embeds(nn.Module):
    """Model of sentence-transformers whose embeddings are its input's."""

    def forward(self, batch):  # type: ignore[no-untyped-def]
        return {"sentence_embedding": batch["f"]}


class Counters:
    """Logger of bpbreid."""

    def __getattr__(self, name):  # type: ignore[no-untyped-def]
        if name.startswith("__"):
            raise AttributeError(name)
        return lambda *_args, **_kwargs: None


_TRI = Namespace(MARGIN=0.3, NORM_FEAT=False, SCALE=1.0, HARD_MINING=True, USE_COSINE_DIST=False)
NAMES = {
    "model": Embeds(),
    "writer": Counters(),
    "cfg": Namespace(MODEL=Namespace(LOSSES=Namespace(TRI=_TRI))),
    "args": Namespace(margin=0.3, hard_type="tri_hard", norm_by_num_of_effective_triplets=False),
    "Namespace": Namespace,
}

_PLACES = {
    "layers/triplet_loss.py": (
        "michuanhaohao/reid-strong-baseline, 924973292/EDITOR, 924973292/TOP-ReID, haochenheheda/NFormer, "
        "gwenzhang/HAT, jackie840129/CF-AAN, superlollipop123/Cross-directional-Center-Network-and-MSVR310, "
        "damo-cv/UFDN-Reid"
    ),
    "loss/triplet_loss.py": (
        "damo-cv/TransReID, heshuting555/TransReID, Syliz517/CLIP-ReID, tinyvision/SOLIDER-REID, AsuradaYuci/TF-CLIP, "
        "AishahAADU/VID-Trans-ReID, heshuting555/AICITY2020_DMT_VehicleReID, TencentYoutuResearch/PersonRetrieval-IVT"
    ),
    "losses/triplet_loss.py": (
        "mikwieczorek/centroids-reid, Dmmm1997/FSRA, guxinqian/Simple-ReID, guxinqian/Simple-CCReID, JDAI-CV/CM-NAS, "
        "Joey623/Visible-Infrared-Person-Re-Identification-Baseline, QizaoWang/FIRe-CCReID"
    ),
    "torchreid/losses/hard_mine_triplet_loss.py": (
        "KaiyangZhou/deep-person-reid, hh23333/PVPM, weleen/AGRL.pytorch, VlSomers/bpbreid, VITA-Group/ABD-Net, "
        "microsoft/Semantics-Aligned-Representation-Learning-for-Person-Re-identification, emdata-ailab/PhD-Learning"
    ),
    "reid/loss/triplet.py": (
        "Cysu/open-reid, cly234/LReID-KRKC, zhoujiahuan1991/CVPR2024-DKP, HeliosZhao/M3L, flysnowtiger/GRL, "
        "PeixianChen/OAMN, lsongx/DomainAdaptiveReID, vimar-gu/ColorPromptReID, zhunzhong07/HHL, hustvl/mancs, "
        "hwz-zju/Instruct-ReID, SHI-Labs/Self-Similarity-Grouping, yuminsuh/part_bilinear_reid, "
        "YifanSun-ReID/VPM-reID, zhangxinyu-xyz/PAST-ReID"
    ),
    "reid/losses/triplet_loss.py": "SlimShadys/Vehicle-ReID",
    "loss/triplet.py": "seathiefwang/MGN-pytorch, jixunbo/LightMBN, BravoLu/OpenVehicleReID, CHENGY12/DMML",
    "tools/losses.py": "guxinqian/AP3D, blue-blue272/VideoReID-TCLNet",
    "tools/loss.py": "wangguanan/HOReID",
    "losses.py": "blue-blue272/BiCnet-TKS, jiyanggao/Video-Person-ReID, adambielski/siamese-triplet",
    "loss.py": "mangye16/Cross-Modal-Re-ID-baseline",
    "modeling/layer/triplet_loss.py": "mangye16/ReID-Survey",
    "util/losses.py": "michuanhaohao/AlignedReID",
    "aligned_reid/model/loss.py": "huanghoujing/AlignedReID-Re-Production-Pytorch",
    "tri_loss/model/loss.py": "huanghoujing/person-reid-triplet-loss-baseline",
    "lightreid/losses/triplet_loss_with_batchhard.py": "wangguanan/light-reid",
    "fastreid/modeling/losses/triplet_loss.py": "L1aoXingyu/reid_baseline, JDAI-CV/fast-reid",
    "fast-reid/fastreid/modeling/losses/triplet_loss.py": "DengpanFu/LUPerson",
    "boxmot/reid/training/losses.py": "mikel-brostrom/boxmot",
    "mmtrack/models/losses/triplet_loss.py": "open-mmlab/mmtracking",
    "mmdet/models/losses/triplet_loss.py": "open-mmlab/mmdetection",
    "openunreid/models/losses/triplet.py": "open-mmlab/OpenUnReID",
    "mmt/loss/triplet.py": "yxgeee/MMT",
    "idm/loss/triplet.py": "SikaStar/IDM",
    "lib/network/loss_factory/triplet.py": "yolomax/person-reid-lib",
    "model/network/triplet.py": "AbnerHqC/GaitSet",
    "online_triplet_loss/losses.py": "NegatioN/OnlineMiningTripletLoss",
}
FILES = {repository: file for file, repositories in _PLACES.items() for repository in repositories.split(", ")}
"""The file of a repository's loss."""
