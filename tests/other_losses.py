"""Triplet losses of public repositories that accelerate leaves alone: what gives the same, or why nothing does."""

from __future__ import annotations

from tests.helpers.loss_forms import Form

OP = "rru_fast.batch_hard_triplet"
TWICE = f"_, p, n = {OP}(f, y, metric='cosine', return_distances=True); F.softplus(2 * (p - n)).mean()"
ANCHORS = (
    f"_, p, n = {OP}(f, y, return_indices=True); z = (f - f[p].detach()).norm(dim=1) - (f - f[n].detach()).norm(dim=1)"
)
PML = "KevinMusgrave/pytorch-metric-learning"
OURS = "rru_fast.contrib.pml.BatchHardTripletLoss"
SENTENCES = "UKPLab/sentence-transformers"
OF_SENTENCES = "rru_fast.contrib.sentence_transformers"

ELSEWHERE = (
    Form(
        "JDAI-CV/fast-reid, L1aoXingyu/reid_baseline, DengpanFu/LUPerson",
        "triplet_loss",
        call="(f, y, 0.3, False, True)",
        instead=f"{OP}(f, y, margin=0.3)",
        why="a function",
    ),
    Form(
        "JDAI-CV/fast-reid, L1aoXingyu/reid_baseline, DengpanFu/LUPerson",
        "triplet_loss",
        call="(f, y, 0.0, False, True)",
        instead=f"{OP}(f, y, margin='soft')",
        why="a function",
    ),
    Form(
        "JDAI-CV/fast-reid, L1aoXingyu/reid_baseline",
        "triplet_loss",
        call="(f, y, 0.3, True, True)",
        instead=f"2 * {OP}(f, y, margin=0.15, metric='cosine')",
        why="a function",
    ),
    Form(
        "JDAI-CV/fast-reid, L1aoXingyu/reid_baseline",
        "triplet_loss",
        call="(f, y, 0.0, True, True)",
        instead=TWICE,
        why="a function",
    ),
    Form(
        "DengpanFu/LUPerson",
        "triplet_loss",
        call="(f, y, 0.3, True, True)",
        instead=f"{OP}(F.normalize(f), y, margin=0.3)",
        why="a function",
    ),
    Form(
        "L1aoXingyu/reid_baseline:fastreid/modeling/losses/metric_loss.py",
        "TripletLoss(cfg)",
        call="(None, f, y)['loss_triplet']",
        instead=f"{OP}(f, y, margin=0.3)",
        why="returns a dict",
        has="global_features",
    ),
    Form(
        "huanghoujing/AlignedReID-Re-Production-Pytorch",
        "global_loss",
        call="(load('aligned_reid/model/TripletLoss.py').TripletLoss(margin=0.3), f, y, normalize_feature=True)[0]",
        instead=f"{OP}(F.normalize(f), y, margin=0.3)",
        why="a function",
    ),
    Form(
        "huanghoujing/person-reid-triplet-loss-baseline",
        "global_loss",
        call="(load('tri_loss/model/TripletLoss.py').TripletLoss(margin=0.3), f, y, normalize_feature=False)[0]",
        instead=f"{OP}(f, y, margin=0.3)",
        why="a function",
    ),
    Form(
        "NegatioN/OnlineMiningTripletLoss",
        "batch_hard_triplet_loss",
        call="(y, f, margin=0.3)",
        instead=f"{OP}(f, y, margin=0.3)",
        why="a function",
    ),
    Form(
        SENTENCES,
        "BatchHardTripletLoss(model)",
        call="([{'f': f}], y)",
        instead=OF_SENTENCES + ".BatchHardTripletLoss(model)([{'f': f}], y)",
        why="takes a model, whose embeddings are f",
    ),
    Form(
        SENTENCES,
        "BatchHardTripletLoss(model, BatchHardTripletLossDistanceFunction.cosine_distance, 0.5)",
        call="([{'f': f}], y)",
        instead=OF_SENTENCES
        + ".BatchHardTripletLoss(model, BatchHardTripletLossDistanceFunction.cosine_distance, 0.5)([{'f': f}], y)",
        why="takes a model, whose embeddings are f",
    ),
    Form(
        SENTENCES,
        "BatchHardSoftMarginTripletLoss(model)",
        call="([{'f': f}], y)",
        instead=OF_SENTENCES + ".BatchHardSoftMarginTripletLoss(model)([{'f': f}], y)",
        why="takes a model, whose embeddings are f",
    ),
    Form(
        "seathiefwang/MGN-pytorch, michuanhaohao/AlignedReID",
        "TripletLoss(margin=0.3, mutual_flag=True)",
        call="(f, y)[0]",
        instead=f"{OP}(f, y, margin=0.3)",
        why="returns the matrix of distances",
    ),
    Form(
        "seathiefwang/MGN-pytorch",
        "TripletSemihardLoss('cpu', margin=0.3)",
        instead=f"{OP}(f, y, margin=0.3)",
        why="squares of distances are at least 1e-16",
    ),
    Form(
        "Dmmm1997/FSRA",
        "TripletLoss(0.3)",
        instead=f"{OP}(f, y, margin=0.3)",
        why="squares of distances are at least 1e-6",
    ),
    Form(
        "CHENGY12/DMML",
        "TripletLoss(margin=0.4)",
        instead=f"{OP}(f, y, margin=0.4)",
        why="distances are sqrt(d^2 + 1e-12)",
        patch=(r"~\(negative_mask\.data\)", "(1 - negative_mask.data)"),
    ),
    Form(
        "CHENGY12/DMML",
        "TripletLoss(margin='soft')",
        instead=f"{OP}(f, y, margin='soft')",
        why="distances are sqrt(d^2 + 1e-12)",
        patch=(r"~\(negative_mask\.data\)", "(1 - negative_mask.data)"),
    ),
    Form(
        "flysnowtiger/GRL",
        "TripletLoss('soft', True)",
        instead=f"{OP}(f, y, margin='soft', reduction='none')",
        why="an anchor is no positive of its own",
    ),
    Form(
        "flysnowtiger/GRL",
        "TripletLoss(0.3, True)",
        instead=f"{OP}(f, y, margin=0.3, reduction='none')",
        why="an anchor is no positive of its own",
    ),
    Form(
        "emdata-ailab/PhD-Learning",
        "TripletLoss(margin=0.3)",
        call="(f, y)[0]",
        instead=f"{OP}(F.normalize(f), y, margin=0.3)",
        why="returns lists of indices",
        patch=(r"import torch\n", "import torch\nimport torch.nn.functional as F\n"),
    ),
    Form(
        "VITA-Group/ABD-Net",
        "TripletLoss(4, dict(margin=0.3, label_smooth=False, lambda_xent=1, lambda_htri=0.1), False)",
        call=".apply_loss(f, y)",
        instead=f"{OP}(f, y, margin=0.3)",
        why="a method; its forward adds a cross-entropy",
    ),
    Form(
        "VlSomers/bpbreid:torchreid/losses/part_averaged_triplet_loss.py",
        "PartAveragedTripletLoss(margin=0.3, writer=writer)",
        call="(f[:, None], y, parts_visibility=None)[0]",
        instead=f"{OP}(f, y, margin=0.3)",
        why="features of parts; served for one part",
    ),
    Form(
        "VlSomers/bpbreid:torchreid/losses/part_averaged_triplet_loss.py",
        "PartAveragedTripletLoss(margin=0.0, writer=writer)",
        call="(f[:, None], y, parts_visibility=None)[0]",
        instead=f"{OP}(f, y, margin='soft')",
        why="features of parts; served for one part",
    ),
    Form(
        "VlSomers/bpbreid:torchreid/losses/part_individual_triplet_loss.py",
        "PartIndividualTripletLoss(margin=0.3, writer=writer)",
        call="(torch.stack((f, f.flip(0)), 1), y, parts_visibility=None)[0]",
        instead=f"{OP}(torch.stack((f, f.flip(0))), y, margin=0.3)",
        why="features of parts, the operator's groups",
    ),
    Form(
        "AbnerHqC/GaitSet",
        "TripletLoss(12, 'hard', 0.2)",
        call="(f[None], y[None])[1].mean()",
        instead=f"{OP}(f, y, margin=0.2)",
        why="features of parts; returns batch-all losses too",
        patch=(r"\.byte\(\)", ".bool()"),
    ),
    Form(
        "zhangxinyu-xyz/PAST-ReID:reid/loss/triplet_loss.py",
        "CTLTripletLoss(Namespace(dist_type='cosine', **vars(args)), name='triL_CTL', tri_sampler_type='CTL_RTL')",
        call="(y, {'feat_list': [f]})['loss']",
        instead=f"{OP}(f, y, margin=0.3, metric='cosine')",
        why="takes and returns dicts",
    ),
    Form(
        "zhangxinyu-xyz/PAST-ReID:reid/loss/triplet_loss.py",
        "CTLTripletLoss(Namespace(dist_type='euclidean', **vars(args)), name='triL_CTL', tri_sampler_type='CTL_RTL')",
        call="(y, {'feat_list': [f]})['loss']",
        instead=f"{OP}(f, y, margin=0.3)",
        why="takes and returns dicts",
    ),
    Form(
        "open-mmlab/OpenUnReID",
        "TripletLoss(margin=0.3, triplet_key='pooling')",
        call="({'pooling': f}, y)",
        instead=f"{ANCHORS}; F.relu(0.3 + z).mean()",
        why="takes a dict; gradients of anchors alone",
    ),
    Form(
        "open-mmlab/OpenUnReID",
        "SoftmaxTripletLoss(margin=0.0, triplet_key='pooling')",
        call="({'pooling': f}, y)",
        instead=f"{ANCHORS}; F.softplus(z).mean()",
        why="takes a dict; gradients of anchors alone",
    ),
    Form(
        "cly234/LReID-KRKC",
        "SoftTripletLoss(margin=0.3)",
        call="(f, f, y)",
        instead=f"_, p, n = {OP}(f, y, return_distances=True); (F.softplus(p - n) - 0.3 * (p - n)).mean()",
        why="another function of the two distances",
    ),
    Form(
        PML,
        "TripletMarginLoss(margin=0.3)",
        call="(f, y, BatchHardMiner()(f, y))",
        instead=f"{OURS}(margin=0.3)(f, y)",
        why="a miner and a loss",
    ),
    Form(
        PML,
        "TripletMarginLoss(margin=0.3, smooth_loss=True)",
        call="(f, y, BatchHardMiner()(f, y))",
        instead=f"{OURS}(margin=0.3, smooth_loss=True)(f, y)",
        why="a miner and a loss",
    ),
    Form(
        PML,
        "TripletMarginLoss(margin=0.3, distance=CosineSimilarity(), reducer=MeanReducer())",
        call="(f, y, BatchHardMiner(distance=CosineSimilarity())(f, y))",
        instead=f"{OURS}(margin=0.3, distance=CosineSimilarity(), reducer=MeanReducer())(f, y)",
        why="a miner and a loss",
    ),
)

# Called triplet losses, but not batch-hard ones of one set of features.
OTHERS = (
    Form("SHI-Labs/Self-Similarity-Grouping", "TripletLoss(0.5, 4)", why="all positive pairs"),
    Form("lsongx/DomainAdaptiveReID", "TripletLoss(0.5, 4)", why="all positive pairs"),
    Form("hustvl/mancs", "TripletLoss(margin=0.5, num_instances=4)", why="all positive pairs, negatives drawn"),
    Form("yuminsuh/part_bilinear_reid", "TripletLoss(margin=0.2)", why="all triplets, squared distances"),
    Form("QizaoWang/FIRe-CCReID", "TripletLoss(margin=0.3, mining_method='batch_soft')", why="weighted mining"),
    Form(
        "cly234/LReID-KRKC, zhoujiahuan1991/CVPR2024-DKP",
        "TripletLoss(margin=0.3, mid_hard=True)",
        why="second hardest",
    ),
    Form(
        "zhoujiahuan1991/CVPR2024-DKP:reid/loss/loss_uncertrainty.py", "TripletLoss_set()", why="samples against means"
    ),
    Form("zhoujiahuan1991/CVPR2024-DKP", "PlasticityLoss(0.1, 'cosine')", why="similarities of three sets"),
    Form("yxgeee/MMT", "SoftTripletLoss(margin=None)", why="targets of a second model"),
    Form("SikaStar/IDM:idm/loss/triplet_xbm.py", "TripletLossXBM(margin=0.3)", why="candidates from a memory"),
    Form("flysnowtiger/GRL:reid/loss/triplet_oim.py", "TripletLoss_OIM('soft', True)", why="candidates from a memory"),
    Form(
        "hwz-zju/Instruct-ReID:reid/loss/adaptive_triplet.py", "TripletLoss(margin=0.3)", why="margins of a third input"
    ),
    Form("Dmmm1997/FSRA", "Tripletloss(margin=0.3)", why="across the halves of a batch"),
    Form("michuanhaohao/AlignedReID", "TripletLossAlignedReID(margin=0.3)", why="a local loss of aligned parts too"),
    Form(
        "huanghoujing/AlignedReID-Re-Production-Pytorch:aligned_reid/model/TripletLoss.py",
        "TripletLoss(margin=0.3)",
        why="of distances, not features",
    ),
    Form(
        "emdata-ailab/PhD-Learning:torchreid/losses/hard_mine_phd_loss.py",
        "PhdLoss(k_ap=1, k_an=2)",
        why="ranks of sets",
    ),
    Form("adambielski/siamese-triplet", "OnlineTripletLoss(1.0, None)", why="all positive pairs, squared distances"),
)
