"""Batch-hard triplet losses of public repositories, as their training code makes and calls them."""

from __future__ import annotations

from collections.abc import Callable
from types import SimpleNamespace
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.implementations import loss_mmt as mmt
from benchmarks.implementations import loss_modules as modules
from benchmarks.implementations import loss_objects as objects


class Form(NamedTuple):
    """A loss, as it is made and called in training."""

    repositories: str
    """On GitHub, separated by commas; their margins may differ."""
    make: Callable[[], Any]
    call: Callable[[Any, Tensor, Tensor], Any]
    """Takes the loss, features (N, D) and labels (N,); returns the scalar that is differentiated."""


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
    "fast-reid v0.2": Form(
        "JDAI-CV/fast-reid, L1aoXingyu/reid_baseline", lambda: objects.FastReIDTripletLoss(FAST_REID), _whole
    ),
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
        "SlimShadys/Vehicle-ReID", lambda: modules.VehicleReIDTripletLossRPTM(1.0, False), _first
    ),
    "FIRe-CCReID": Form("QizaoWang/FIRe-CCReID", lambda: objects.FIReTripletLoss(margin=0.3), _whole),
    "CM-NAS": Form(
        "JDAI-CV/CM-NAS, Joey623/Visible-Infrared-Person-Re-Identification-Baseline",
        lambda: modules.CMNASTripletLoss(margin=0.4, feat_norm="no"),
        _pair,
    ),
    "CM-NAS, soft": Form("JDAI-CV/CM-NAS", lambda: modules.CMNASTripletLoss(margin=-1, feat_norm="no"), _pair),
    "CM-NAS, normalized": Form("JDAI-CV/CM-NAS", lambda: modules.CMNASTripletLoss(0.4, feat_norm="yes"), _pair),
    "AP3D": Form("guxinqian/AP3D", lambda: modules.AP3DTripletLoss(0.3, distance="cosine"), _whole),
    "AP3D, euclidean": Form(
        "guxinqian/AP3D, guxinqian/Simple-ReID", lambda: modules.AP3DTripletLoss(0.3, distance="euclidean"), _whole
    ),
    "Simple-ReID": Form("guxinqian/Simple-ReID", lambda: modules.SimpleReIDTripletLoss(0.3, distance="cosine"), _whole),
    "BiCnet-TKS": Form("blue-blue272/BiCnet-TKS, blue-blue272/VideoReID-TCLNet", modules.BiCnetTripletLoss, _whole),
    "Simple-CCReID": Form("guxinqian/Simple-CCReID", lambda: modules.SimpleCCReIDTripletLoss(margin=0.3), _whole),
    "AGRL": Form("weleen/AGRL.pytorch", lambda: modules.AGRLTripletLoss(margin=0.3, soft=True), _whole),
    "MGN-pytorch": Form(
        "seathiefwang/MGN-pytorch, michuanhaohao/AlignedReID", lambda: modules.MGNTripletLoss(1.2), _whole
    ),
    "LightMBN": Form("jixunbo/LightMBN", lambda: modules.LightMBNTripletLoss(0.3), _whole),
    "LightMBN, soft": Form("jixunbo/LightMBN", lambda: modules.LightMBNTripletLoss(0.0), _whole),
    "boxmot": Form(
        "mikel-brostrom/boxmot",
        lambda: modules.BoxmotTripletLoss(margin=0.3, soft_margin=True),
        lambda loss, f, y: loss(F.normalize(f), y),
    ),
    "mmtracking": Form(
        "open-mmlab/mmtracking, open-mmlab/mmdetection",
        lambda: modules.MMTrackingTripletLoss(margin=0.3, loss_weight=0.5),
        _whole,
    ),
    "Cross-Modal-Re-ID": Form(
        "mangye16/Cross-Modal-Re-ID-baseline", lambda: modules.CrossModalTripletLoss(32, margin=0.3), _first
    ),
    "open-reid": Form(
        "Cysu/open-reid, zhunzhong07/HHL, YifanSun-ReID/VPM-reid, zhangxinyu-xyz/PAST-ReID",
        lambda: modules.OpenReidTripletLoss(margin=0.5),
        _first,
    ),
    "DomainAdaptiveReID": Form(
        "lsongx/DomainAdaptiveReID, SHI-Labs/Self-Similarity-Grouping",
        lambda: modules.DomainAdaptiveTripletLoss(0.5, 8, False),
        lambda loss, f, y: loss(f, y, 0)[0],
    ),
    "M3L": Form("HeliosZhao/M3L", lambda: modules.M3LTripletLoss(0.3, 4, False), _whole),
    "MMT": Form("yxgeee/MMT", lambda: mmt.MMTTripletLoss(0.3), _first),
    "MMT, normalized": Form("yxgeee/MMT", lambda: mmt.MMTTripletLoss(0.3, normalize_feature=True), _first),
    "MMT, soft": Form("yxgeee/MMT, vimar-gu/ColorPromptReID", lambda: mmt.MMTSoftTripletLoss(margin=0.0), _pair),
    "IDM": Form("SikaStar/IDM", lambda: mmt.IDMTripletLoss(margin=0.3), _whole),
    "KRKC": Form("cly234/LReID-KRKC, zhoujiahuan1991/CVPR2024-DKP", lambda: mmt.KRKCTripletLoss(margin=0.3), _first),
    "Instruct-ReID": Form("hwz-zju/Instruct-ReID", lambda: mmt.InstructReIDTripletLoss(margin=0.3), _first),
}
