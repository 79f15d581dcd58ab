"""Batch-hard triplet losses of public repositories that accelerate swaps, as their users construct and call them.

docs/losses.md shows them: `python -m tests.losses_page` rewrites it after a change. `python -m tests.hold_losses` holds
a checkout to them.
"""

from __future__ import annotations

from tests.helpers.loss_forms import Form

DISTANCES = "(loss, D_pos, D_neg)"
PRECISION = "(loss, precision)"
USL = "mangye16/ReID-Survey:Transformer-ReID-Survey/UnTransReID_USL_ReID/clustercontrast/models/triplet_loss.py"
TO_1D = (r"\.(max|min)\(\)\)", r".\1().view(1))")  # torch.cat takes no 0-dim tensors
SAME = "the same features twice, not two modalities"

SWAPPED = (
    # reid-strong-baseline and those built on it
    Form(
        "michuanhaohao/reid-strong-baseline, Syliz517/CLIP-ReID, AsuradaYuci/TF-CLIP, haochenheheda/NFormer, "
        "gwenzhang/HAT, damo-cv/UFDN-Reid, superlollipop123/Cross-directional-Center-Network-and-MSVR310, "
        "damo-cv/TransReID, heshuting555/TransReID, jackie840129/CF-AAN, TencentYoutuResearch/PersonRetrieval-IVT, "
        f"mangye16/ReID-Survey, {USL}, L1aoXingyu/reid_baseline:layers/triplet_loss.py",
        "TripletLoss(0.3)",
        "margin 0.3",
        returns=DISTANCES,
        stated="strong-baseline; CLIP-ReID; NFormer",
    ),
    Form(
        "michuanhaohao/reid-strong-baseline, damo-cv/TransReID, heshuting555/TransReID, tinyvision/SOLIDER-REID, "
        "heshuting555/AICITY2020_DMT_VehicleReID, AishahAADU/VID-Trans-ReID, 924973292/EDITOR, 924973292/TOP-ReID, "
        "mangye16/ReID-Survey",
        "TripletLoss()",
        "soft margin",
        returns=DISTANCES,
        stated="strong-baseline, soft; TransReID",
    ),
    Form("jackie840129/CF-AAN", "TripletLoss(None)", "soft margin", returns=DISTANCES, stated="CF-AAN"),
    Form("jackie840129/CF-AAN", "TripletLoss()", "margin -0.1", returns=DISTANCES, stated="CF-AAN"),
    Form(
        f"damo-cv/TransReID, {USL}",
        "TripletLoss(0.3, hard_factor=0.1)",
        "margin 0.3, of 1.1 D_pos and 0.9 D_neg",
        returns=DISTANCES,
        stated="TransReID, hard_factor",
    ),
    Form(
        "tinyvision/SOLIDER-REID",
        "TripletLoss()",
        "soft margin, normalized",
        "(f, y, normalize_feature=True)",
        DISTANCES,
        stated="SOLIDER-REID, normalized",
    ),
    Form(
        "mangye16/ReID-Survey",
        "TripletLoss(0.3)",
        "margin 0.3, normalized",
        "(f, y, normalize_feature=True)",
        DISTANCES,
        stated="strong-baseline, normalized",
    ),
    Form(
        "mangye16/ReID-Survey:video-reid-AWG/losses.py", "TripletLoss(0.3)", "margin 0.3", stated="ReID-Survey, video"
    ),
    Form(
        "TencentYoutuResearch/PersonRetrieval-IVT",
        "CosTripletLoss(0.3)",
        "margin 0.3, of 0.5 D_pos and 0.5 D_neg, cosine",
        returns=DISTANCES,
        stated="IVT",
    ),
    Form(
        "TencentYoutuResearch/PersonRetrieval-IVT",
        "CosTripletLoss()",
        "soft margin, of 0.5 D_pos and 0.5 D_neg, cosine",
        returns=DISTANCES,
        stated="IVT",
    ),
    Form(
        "mikwieczorek/centroids-reid",
        "TripletLoss(0.5, 'euclidean')",
        "margin 0.5",
        "(f, y, mask=y > 0)",
        DISTANCES,
        stated="centroids-reid",
    ),
    Form(
        "mikwieczorek/centroids-reid",
        "TripletLoss(0.5, 'cosine')",
        "margin 0.5, cosine",
        returns=DISTANCES,
        stated="centroids-reid, cosine",
    ),
    Form("SlimShadys/Vehicle-ReID", "TripletLoss(1.0, False)", "margin 1", returns=DISTANCES, stated="Vehicle-ReID"),
    Form(
        "SlimShadys/Vehicle-ReID",
        "TripletLossRPTM(1.0, False)",
        "margin 1",
        returns=DISTANCES,
        stated="Vehicle-ReID, RPTM",
    ),
    # torchreid, and others called with features and labels
    Form(
        "KaiyangZhou/deep-person-reid, hh23333/PVPM, VlSomers/bpbreid, QizaoWang/FIRe-CCReID, SikaStar/IDM, "
        "microsoft/Semantics-Aligned-Representation-Learning-for-Person-Re-identification, michuanhaohao/AlignedReID",
        "TripletLoss(margin=0.3)",
        "margin 0.3",
        stated="torchreid; FIRe-CCReID; IDM; MGN-pytorch",
    ),
    Form("jiyanggao/Video-Person-ReID", "TripletLoss(margin=0.3)", "margin 0.3", patch=TO_1D, stated="torchreid"),
    Form("PeixianChen/OAMN", "TripletLoss(0.5)", "margin 0.5", stated="torchreid"),
    Form("BravoLu/OpenVehicleReID", "TripletLoss()", "margin 1.2", stated="torchreid"),
    Form("seathiefwang/MGN-pytorch", "TripletLoss(1.2)", "margin 1.2", stated="MGN-pytorch"),
    Form("HeliosZhao/M3L", "TripletLoss(0.3, 4, False)", "margin 0.3", stated="M3L"),
    Form("jixunbo/LightMBN", "TripletLoss(0.3)", "margin 0.3", stated="LightMBN"),
    Form("jixunbo/LightMBN", "TripletLoss(0.0)", "soft margin", stated="LightMBN, soft"),
    Form("yolomax/person-reid-lib", "BatchHardTripletLoss(margin=0.4)", "margin 0.4", stated="person-reid-lib"),
    Form("weleen/AGRL.pytorch", "TripletLoss(margin=0.3, soft=True)", "soft margin", stated="AGRL"),
    Form("weleen/AGRL.pytorch", "TripletLoss(margin=0.3, soft=False)", "margin 0.3", stated="AGRL"),
    Form(
        "mikel-brostrom/boxmot",
        "TripletLoss(margin=0.3, soft_margin=False)",
        "margin 0.3",
        "(F.normalize(f), y)",
        stated="boxmot",
    ),
    Form(
        "mikel-brostrom/boxmot",
        "TripletLoss(margin=0.3, soft_margin=True)",
        "softplus(D_pos - D_neg + 0.3)",
        "(F.normalize(f), y)",
        stated="boxmot",
    ),
    Form(
        "open-mmlab/mmtracking, open-mmlab/mmdetection",
        "TripletLoss(margin=0.3, loss_weight=1.0)",
        "margin 0.3",
        stated="mmtracking",
    ),
    Form(
        "open-mmlab/mmtracking, open-mmlab/mmdetection",
        "TripletLoss(margin=0.3, loss_weight=0.5)",
        "margin 0.3, times 0.5",
        stated="mmtracking",
    ),
    Form(
        "guxinqian/AP3D, guxinqian/Simple-ReID",
        "TripletLoss(margin=0.3, distance='cosine')",
        "margin 0.3, cosine",
        stated="AP3D; Simple-ReID",
    ),
    Form(
        "guxinqian/AP3D, guxinqian/Simple-ReID",
        "TripletLoss(margin=0.3, distance='euclidean')",
        "margin 0.3",
        stated="AP3D, euclidean",
    ),
    Form(
        "blue-blue272/VideoReID-TCLNet",
        "TripletLoss(margin=0.4, distance='consine', use_gpu=True)",
        "margin 0.4, cosine",
        stated="BiCnet-TKS",
    ),
    Form(
        "blue-blue272/VideoReID-TCLNet",
        "TripletLoss(margin=0.4, distance='euclidean', use_gpu=False)",
        "margin 0.4",
        stated="BiCnet-TKS",
    ),
    Form("blue-blue272/BiCnet-TKS", "TripletLoss()", "margin 0.5, cosine", stated="BiCnet-TKS"),
    Form(
        "L1aoXingyu/reid_baseline:fastreid/modeling/losses/metric_loss.py",
        "TripletLoss(cfg)",
        "margin 0.3",
        has="self, embedding,",
        stated="fast-reid v0.2",
    ),
    Form(
        "mangye16/Cross-Modal-Re-ID-baseline",
        "OriTripletLoss(batch_size=32, margin=0.3)",
        "margin 0.3",
        returns="(loss, count)",
        stated="Cross-Modal-Re-ID",
    ),
    # open-reid, MMT and those built on them
    Form("Cysu/open-reid", "TripletLoss(margin=0.5)", "margin 0.5", returns=PRECISION, patch=TO_1D, stated="open-reid"),
    Form(
        "YifanSun-ReID/VPM-reID",
        "TripletLoss(margin=0.5)",
        "margin 0.5",
        returns=PRECISION,
        patch=(r"\[Var.* - mask", "[~mask"),
        stated="open-reid",
    ),
    Form(
        "zhangxinyu-xyz/PAST-ReID",
        "OnlineTripletLoss(margin=0.3)",
        "margin 0.3",
        returns=PRECISION,
        patch=TO_1D,
        stated="open-reid",
    ),
    Form(
        "zhunzhong07/HHL, hwz-zju/Instruct-ReID",
        "TripletLoss(margin=0.3)",
        "margin 0.3",
        returns=PRECISION,
        stated="open-reid; Instruct-ReID",
    ),
    Form("yxgeee/MMT", "TripletLoss(0.3)", "margin 0.3", returns=PRECISION, stated="MMT"),
    Form(
        "yxgeee/MMT",
        "TripletLoss(0.3, normalize_feature=True)",
        "margin 0.3, normalized",
        returns=PRECISION,
        stated="MMT, normalized",
    ),
    Form(
        "lsongx/DomainAdaptiveReID",
        "TripletLoss(0.5, 8, False)",
        "margin 0.5",
        "(f, y, 0)",
        PRECISION,
        patch=TO_1D,
        stated="DomainAdaptiveReID",
    ),
    Form(
        "SHI-Labs/Self-Similarity-Grouping",
        "TripletLoss(0.5, 4, use_semi=False)",
        "margin 0.5",
        "(f, y, 0)",
        PRECISION,
        stated="DomainAdaptiveReID",
    ),
    Form(
        "yxgeee/MMT, vimar-gu/ColorPromptReID",
        "SoftTripletLoss(margin=0.0)",
        "soft margin",
        "(f, f.flip(0), y)",
        stated="MMT, soft",
    ),
    # light-reid and HOReID
    Form(
        "wangguanan/light-reid",
        "TripletLoss(margin=0.35, metric='euclidean')",
        "margin 0.35",
        "(emb=f, label=y)",
        stated="light-reid",
    ),
    Form(
        "wangguanan/light-reid",
        "TripletLoss(margin='soft', metric='euclidean')",
        "soft margin",
        "(emb=f, label=y)",
        stated="light-reid, soft",
    ),
    Form(
        "wangguanan/light-reid",
        "TripletLoss(margin=0.3, metric='cosine')",
        "margin 0.3, cosine",
        "(emb=f, label=y)",
        stated="light-reid, cosine",
    ),
    Form(
        "wangguanan/light-reid",
        "TripletLoss(margin='soft', metric='cosine')",
        "soft margin, cosine",
        "(emb=f, label=y)",
        stated="light-reid, cosine",
    ),
    Form(
        "wangguanan/light-reid",
        "TripletLoss(margin=0.3, metric='euclidean', reduce=False)",
        "margin 0.3, per anchor",
        stated="light-reid, occluded",
    ),
    Form("wangguanan/HOReID", "TripletLoss(0.3, 'euclidean')", "margin 0.3", "(f, f, f, y, y, y)", stated="HOReID"),
    Form(
        "wangguanan/HOReID",
        "TripletLoss(0.3, 'cosine')",
        "margin 0.3, cosine",
        "(f, f, f, y, y, y)",
        stated="HOReID, cosine",
    ),
)

PARTLY = (
    Form(
        "JDAI-CV/CM-NAS, Joey623/Visible-Infrared-Person-Re-Identification-Baseline",
        "TripletLoss(margin=0.4, feat_norm='no')",
        "margin 0.4",
        "(f, f, y)",
        only=SAME,
        stated="CM-NAS",
    ),
    Form(
        "JDAI-CV/CM-NAS",
        "TripletLoss(margin=-1, feat_norm='no')",
        "soft margin",
        "(f, f, y)",
        only=SAME,
        stated="CM-NAS, soft",
    ),
    Form(
        "JDAI-CV/CM-NAS",
        "TripletLoss(margin=0.4, feat_norm='yes')",
        "margin 0.4, normalized",
        "(f, f, y)",
        only=SAME,
        stated="CM-NAS, normalized",
    ),
    Form("TencentYoutuResearch/PersonRetrieval-IVT", "TripletLossVL()", "margin 0.3", "(f, f, y)", only=SAME),
    Form(
        "cly234/LReID-KRKC, zhoujiahuan1991/CVPR2024-DKP",
        "TripletLoss(margin=0.3)",
        "margin 0.3",
        returns=PRECISION,
        only="no third argument",
        stated="KRKC",
    ),
    Form(
        "guxinqian/Simple-CCReID",
        "TripletLoss(margin=0.3)",
        "margin 0.3, cosine",
        only="one rank; on several, `rru_fast.BatchHardTripletLoss(gather=True)` forms the batch from all",
        stated="Simple-CCReID",
    ),
)
