"""Batch-hard triplet losses of public repositories, as their training code makes and calls them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import rru_fast
from benchmarks.harness.parity import report_parity
from benchmarks.implementations import loss_mmt as mmt
from benchmarks.implementations import loss_modules as modules
from benchmarks.implementations import loss_objects as objects
from benchmarks.implementations.batch_hard import Loss, results
from rru_fast.compat import loss_examples
from rru_fast.testing import Error, compare

DRAWS = 5  # of features, whose median errors count where one draw exceeds its bound


class Form(NamedTuple):
    """A loss, as it is made and called in training."""

    repositories: str
    """On GitHub, separated by commas; their margins may differ."""
    make: Callable[[], Any]
    call: Callable[[Any, Tensor, Tensor], Any]
    """Takes the loss, features (N, D) and labels (N,); returns the scalar that is differentiated."""
    loops: bool = False
    """It mines anchor by anchor: a backward writes 2 N matrices of N x N."""


def _whole(loss: Any, f: Tensor, y: Tensor) -> Any:
    return loss(f, y)


def _first(loss: Any, f: Tensor, y: Tensor) -> Any:
    return loss(f, y)[0]


def _pair(loss: Any, f: Tensor, y: Tensor) -> Any:
    return loss(f, f, y)


def _triple(loss: Any, f: Tensor, y: Tensor) -> Any:
    return loss(f, f, f, y, y, y)


def _normalized(loss: Any, f: Tensor, y: Tensor) -> Any:
    return loss(f, y, normalize_feature=True)[0]


FAST_REID = SimpleNamespace(MARGIN=0.3, NORM_FEAT=False, SCALE=1.0, HARD_MINING=True)
FORMS: dict[str, Form] = {
    "torchreid": Form(
        "KaiyangZhou/deep-person-reid, VlSomers/bpbreid, hh23333/PVPM, BravoLu/OpenVehicleReID, PeixianChen/OAMN, "
        "microsoft/Semantics-Aligned-Representation-Learning-for-Person-Re-identification",
        lambda: modules.TorchreidTripletLoss(margin=0.3),
        _whole,
        loops=True,
    ),
    "person-reid-lib": Form("yolomax/person-reid-lib", lambda: modules.PersonReidLibTripletLoss(margin=0.4), _whole),
    "strong-baseline": Form(
        "michuanhaohao/reid-strong-baseline, L1aoXingyu/reid_baseline, mangye16/ReID-Survey, gwenzhang/HAT, "
        "superlollipop123/Cross-directional-Center-Network-and-MSVR310",
        lambda: objects.StrongBaselineTripletLoss(0.3),
        _first,
    ),
    "strong-baseline, soft": Form(
        "michuanhaohao/reid-strong-baseline, mangye16/ReID-Survey", objects.StrongBaselineTripletLoss, _first
    ),
    "strong-baseline, normalized": Form(
        "mangye16/ReID-Survey", lambda: objects.StrongBaselineTripletLoss(0.3), _normalized
    ),
    "ReID-Survey, video": Form("mangye16/ReID-Survey", lambda: objects.VideoAWGTripletLoss(0.3), _whole),
    "CF-AAN": Form("jackie840129/CF-AAN", lambda: objects.CFAANTripletLoss(None), _first),
    "TransReID": Form(
        "damo-cv/TransReID, heshuting555/TransReID, heshuting555/AICITY2020_DMT_VehicleReID, tinyvision/SOLIDER-REID, "
        "AishahAADU/VID-Trans-ReID, 924973292/EDITOR, 924973292/TOP-ReID",
        objects.TransReIDTripletLoss,
        _first,
    ),
    "CLIP-ReID": Form(
        "Syliz517/CLIP-ReID, AsuradaYuci/TF-CLIP, damo-cv/UFDN-Reid, TencentYoutuResearch/PersonRetrieval-IVT, "
        "mangye16/ReID-Survey",
        lambda: objects.TransReIDTripletLoss(0.3),
        _first,
    ),
    "TransReID, hard_factor": Form(
        "damo-cv/TransReID, mangye16/ReID-Survey", lambda: objects.TransReIDTripletLoss(0.3, hard_factor=0.1), _first
    ),
    "SOLIDER-REID, normalized": Form("tinyvision/SOLIDER-REID", objects.TransReIDTripletLoss, _normalized),
    "NFormer": Form("haochenheheda/NFormer", lambda: objects.NFormerTripletLoss(0.3), _first),
    "centroids-reid": Form(
        "mikwieczorek/centroids-reid",
        lambda: objects.CentroidsTripletLoss(0.5, "euclidean"),
        lambda loss, f, y: loss(f, y, mask=torch.arange(len(f), device=f.device) % 4 != 0)[0],
    ),
    "centroids-reid, cosine": Form(
        "mikwieczorek/centroids-reid", lambda: objects.CentroidsTripletLoss(0.5, "cosine"), _first
    ),
    "fast-reid v0.2": Form("L1aoXingyu/reid_baseline", lambda: objects.FastReIDTripletLoss(FAST_REID), _whole),
    "light-reid": Form(
        "wangguanan/light-reid",
        lambda: objects.LightReIDTripletLoss(margin=0.35, metric="euclidean"),
        lambda loss, f, y: loss(emb=f, label=y),
    ),
    "light-reid, soft": Form(
        "wangguanan/light-reid",
        lambda: objects.LightReIDTripletLoss(margin="soft", metric="euclidean"),
        lambda loss, f, y: loss(emb=f, label=y),
    ),
    "light-reid, cosine": Form(
        "wangguanan/light-reid",
        lambda: objects.LightReIDTripletLoss(margin=0.3, metric="cosine"),
        lambda loss, f, y: loss(emb=f, label=y),
    ),
    "light-reid, occluded": Form(
        "wangguanan/light-reid",
        lambda: objects.LightReIDTripletLoss(margin=0.3, metric="euclidean", reduce=False),
        lambda loss, f, y: loss(f, y).mean(),
    ),
    "HOReID": Form("wangguanan/HOReID", lambda: objects.HOReIDTripletLoss(0.3, "euclidean"), _triple),
    "HOReID, cosine": Form("wangguanan/HOReID", lambda: objects.HOReIDTripletLoss(0.3, "cosine"), _triple),
    "IVT": Form("TencentYoutuResearch/PersonRetrieval-IVT", lambda: objects.IVTCosTripletLoss(0.3), _first),
    "Vehicle-ReID": Form("SlimShadys/Vehicle-ReID", lambda: objects.VehicleReIDTripletLoss(1.0, False), _first),
    "Vehicle-ReID, RPTM": Form(
        "SlimShadys/Vehicle-ReID", lambda: modules.VehicleReIDTripletLossRPTM(1.0, False), _first, loops=True
    ),
    "FIRe-CCReID": Form("QizaoWang/FIRe-CCReID", lambda: objects.FIReTripletLoss(margin=0.3), _whole),
    "CM-NAS": Form(
        "JDAI-CV/CM-NAS, Joey623/Visible-Infrared-Person-Re-Identification-Baseline",
        lambda: modules.CMNASTripletLoss(margin=0.4, feat_norm="no"),
        _pair,
    ),
    "CM-NAS, soft": Form("JDAI-CV/CM-NAS", lambda: modules.CMNASTripletLoss(margin=-1, feat_norm="no"), _pair),
    "CM-NAS, normalized": Form("JDAI-CV/CM-NAS", lambda: modules.CMNASTripletLoss(0.4, feat_norm="yes"), _pair),
    "AP3D": Form(
        "guxinqian/AP3D",
        lambda: modules.AP3DTripletLoss(0.3, distance="cosine"),
        _whole,
        loops=True,
    ),
    "AP3D, euclidean": Form(
        "guxinqian/AP3D, guxinqian/Simple-ReID",
        lambda: modules.AP3DTripletLoss(0.3, distance="euclidean"),
        _whole,
        loops=True,
    ),
    "Simple-ReID": Form(
        "guxinqian/Simple-ReID", lambda: modules.SimpleReIDTripletLoss(0.3, distance="cosine"), _whole, loops=True
    ),
    "BiCnet-TKS": Form(
        "blue-blue272/BiCnet-TKS, blue-blue272/VideoReID-TCLNet", modules.BiCnetTripletLoss, _whole, loops=True
    ),
    "Simple-CCReID": Form("guxinqian/Simple-CCReID", lambda: modules.SimpleCCReIDTripletLoss(margin=0.3), _whole),
    "AGRL": Form(
        "weleen/AGRL.pytorch",
        lambda: modules.AGRLTripletLoss(margin=0.3, soft=True),
        _whole,
        loops=True,
    ),
    "MGN-pytorch": Form(
        "seathiefwang/MGN-pytorch, michuanhaohao/AlignedReID", lambda: modules.MGNTripletLoss(1.2), _whole, loops=True
    ),
    "LightMBN": Form(
        "jixunbo/LightMBN",
        lambda: modules.LightMBNTripletLoss(0.3),
        _whole,
        loops=True,
    ),
    "LightMBN, soft": Form(
        "jixunbo/LightMBN",
        lambda: modules.LightMBNTripletLoss(0.0),
        _whole,
        loops=True,
    ),
    "boxmot": Form(
        "mikel-brostrom/boxmot",
        lambda: modules.BoxmotTripletLoss(margin=0.3, soft_margin=True),
        lambda loss, f, y: loss(F.normalize(f), y),
        loops=True,
    ),
    "mmtracking": Form(
        "open-mmlab/mmtracking, open-mmlab/mmdetection",
        lambda: modules.MMTrackingTripletLoss(margin=0.3, loss_weight=0.5),
        _whole,
        loops=True,
    ),
    "Cross-Modal-Re-ID": Form(
        "mangye16/Cross-Modal-Re-ID-baseline", lambda: modules.CrossModalTripletLoss(32, margin=0.3), _first, loops=True
    ),
    "open-reid": Form(
        "Cysu/open-reid, zhunzhong07/HHL, YifanSun-ReID/VPM-reID, zhangxinyu-xyz/PAST-ReID",
        lambda: modules.OpenReidTripletLoss(margin=0.5),
        _first,
        loops=True,
    ),
    "DomainAdaptiveReID": Form(
        "lsongx/DomainAdaptiveReID, SHI-Labs/Self-Similarity-Grouping",
        lambda: modules.DomainAdaptiveTripletLoss(0.5, 8, False),
        lambda loss, f, y: loss(f, y, 0)[0],
        loops=True,
    ),
    "M3L": Form(
        "HeliosZhao/M3L",
        lambda: modules.M3LTripletLoss(0.3, 4, False),
        _whole,
        loops=True,
    ),
    "MMT": Form("yxgeee/MMT", lambda: mmt.MMTTripletLoss(0.3), _first),
    "MMT, normalized": Form("yxgeee/MMT", lambda: mmt.MMTTripletLoss(0.3, normalize_feature=True), _first),
    "MMT, soft": Form("yxgeee/MMT, vimar-gu/ColorPromptReID", lambda: mmt.MMTSoftTripletLoss(margin=0.0), _pair),
    "IDM": Form("SikaStar/IDM", lambda: mmt.IDMTripletLoss(margin=0.3), _whole),
    "KRKC": Form("cly234/LReID-KRKC, zhoujiahuan1991/CVPR2024-DKP", lambda: mmt.KRKCTripletLoss(margin=0.3), _first),
    "Instruct-ReID": Form("hwz-zju/Instruct-ReID", lambda: mmt.InstructReIDTripletLoss(margin=0.3), _first),
}


class Pair(NamedTuple):
    """A loss as it is called in training: by its own forward, in float64, and swapped."""

    eager: Loss
    oracle: Loss
    swapped: Loss


def pairs(backend: str) -> dict[str, Pair]:
    """Return a pair of each form.

    Raises:
        SystemExit: one is not swapped.
    """
    return {name: _pair_of(name, form, backend) for name, form in FORMS.items()}


def _pair_of(name: str, form: Form, backend: str) -> Pair:
    own, swapped = form.make(), form.make()
    with _swapped_or_exit(name):
        rru_fast.accelerate(swapped, backend=backend)
    # Casts to float32 are lifted in the oracle, which runs on the CPU.
    return Pair(
        partial(form.call, own), partial(form.call, partial(loss_examples.run, own)), partial(form.call, swapped)
    )


def check(title: str, pair: Pair, features: Tensor, labels: Tensor) -> None:
    """Hold the swapped loss to its own forward in float64.

    Raises:
        SystemExit: it is wrong, or runs its own forward.
    """
    draws = [_errors(title, pair, features, labels)]
    if any(error.got > error.allowed for error in draws[0].values()):  # the rounding of one scalar may be chance
        draws += [_errors(title, pair, torch.randn_like(features), labels) for _ in range(DRAWS - 1)]
    report_parity(title, draws)


def _errors(title: str, pair: Pair, features: Tensor, labels: Tensor) -> dict[str, Error]:
    with _swapped_or_exit(title):
        got = results(pair.swapped, features, labels)
    in_dtype = results(pair.eager, features, labels)
    oracle = results(pair.oracle, features.double().cpu(), labels.cpu())
    return compare(got, in_dtype, {name: value.to(features.device) for name, value in oracle.items()})


@contextmanager
def _swapped_or_exit(title: str) -> Iterator[None]:
    """End the command where accelerate warns that a loss is left alone, or that it runs its own forward."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="accelerate")
        try:
            yield
        except UserWarning as warning:
            raise SystemExit(f"parity: {title} is not swapped: {warning}; it is not measured") from None
