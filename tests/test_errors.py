"""Errors of the library's argument checks: each call, and the exact message.

A message names the argument, what it got and what it wanted. The last test compares the tables with the sources: every
raise statement is listed here, or in ELSEWHERE with the file that tests it.
"""

from __future__ import annotations

import ast
import re
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn

import rru_fast
from rru_fast import backends, cuda_graphs, native, ops, reference
from rru_fast.arguments import RefineArguments, flatten
from rru_fast.compat import weights
from rru_fast.contrib import pml, sentence_transformers, strong_baseline
from rru_fast.testing import relative_error
from rru_fast.types import State
from tests.helpers import third_party
from tests.helpers.valid_args import A, B, C, D, H, T, W, arguments

USABLE = ", ".join(repr(name) for name, why in backends.BACKENDS.items() if why is None)
MISSING, WHY_MISSING = next((item for item in backends.BACKENDS.items() if item[1] is not None), ("", ""))
META = torch.device("meta")
OFFICIAL = {
    **dict.fromkeys(weights.NAMES, torch.zeros(4)),
    "reduce_dim_z.conv.weight": torch.zeros(4, 6, 1, 1),
    "reduce_dim_z.bn.num_batches_tracked": torch.tensor(0),
    "s_atten_z.0.weight": torch.zeros(5, 1, 2, 3),
    "s_atten_z.2.weight": torch.zeros(6, 5, 1, 1),
}
LAST = "c_atten_z.1.weight"  # the authors' name of the channel attention
Calls = dict[str, Callable[[], object]]
"""Calls by the error's type and message."""


def refine(**changes: Any) -> object:
    return rru_fast.refine(**arguments(**changes))


def train(**changes: Any) -> object:
    return refine(training=True, **changes)


def triplet(**changes: Any) -> object:
    good = {"features": torch.randn(4, 3), "labels": torch.tensor([0, 0, 1, 1])}
    return rru_fast.batch_hard_triplet(**{**good, **changes})


def mined_in(gallery: Any, **changes: Any) -> object:
    return triplet(**{"gallery": gallery, "gallery_labels": torch.arange(2), **changes})


def unit(**changes: Any) -> rru_fast.RRU:
    return rru_fast.RRU(**{"channels": C, "spatial": (H, W), **changes})


@contextmanager
def group_of_one() -> Iterator[dist.ProcessGroup]:
    """A process group of this process alone."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        assert dist.group.WORLD is not None
        yield dist.group.WORLD
    finally:
        dist.destroy_process_group()


def groups_of_ranks() -> None:
    with group_of_one() as process_group:
        train(bn_groups=2, process_group=process_group)


def groups_with_sync_norm() -> None:
    module = unit(bn_groups=2)
    module.transition_norm = nn.SyncBatchNorm(256)  # type: ignore[assignment]
    module(torch.randn(B, T, C, H, W))


class Adapted(nn.Linear):
    def forward(self, input: torch.Tensor) -> torch.Tensor:
        return super().forward(input) + 1


def with_layers(**layers: nn.Module) -> object:
    module = unit()
    for name, layer in layers.items():
        setattr(module, name, layer)
    return module(torch.randn(B, T, C, H, W))


def maps_of_another_size() -> object:
    model = rru_fast.accelerate(third_party.RRU(C, size=2, hidden=D, spatial_hidden=A))
    return model(torch.randn(B, T, C, 1, 4))


def second_order() -> None:
    s = torch.randn(B, T, C, H, W, requires_grad=True)
    (gradient,) = torch.autograd.grad(rru_fast.strip_pool(s).square().sum(), s, create_graph=True)
    gradient.sum().backward()


def forward_mode() -> None:
    s = torch.randn(B, T, C, H, W)
    torch.func.jvp(rru_fast.strip_pool, (s,), (s,))


def backward_without_save() -> None:
    given = arguments(w=torch.randn(D, 2 * C, requires_grad=True)) | dict.fromkeys(("lengths", "state_x", "state_s"))
    args = RefineArguments(**given, inputs="appearance+motion", training=False, eps=1e-3, bn_groups=1)
    ops.refine.refine(*flatten(args), False, "composite")


def late_backward() -> None:
    calls = [1]
    (out,) = cuda_graphs.expire_on_replay(calls, (torch.ones(2, requires_grad=True),))
    calls[0] = 3
    out.sum().backward()


OF_REFINE: Calls = {
    "TypeError: x: got list, wanted a tensor (B, T, C, H, W)": lambda: refine(x=[[1.0]]),
    "TypeError: x: got layout torch.sparse_coo, wanted a dense tensor (B, T, C, H, W)": lambda: refine(
        x=torch.randn(B, T, C, H, W).to_sparse()
    ),
    "ValueError: x: got shape (2, 3, 4, 3), wanted (B, T, C, H, W)": lambda: refine(x=torch.randn(B, T, C, H)),
    "TypeError: x: got dtype torch.int64, wanted float64, float32, float16 or bfloat16": lambda: refine(
        x=torch.ones(B, T, C, H, W, dtype=torch.int64)
    ),
    "ValueError: x: got shape (2, 0, 4, 3, 2), wanted (B, T, C, H, W), every size at least 1": lambda: refine(
        x=torch.randn(B, 0, C, H, W)
    ),
    "ValueError: inputs: got 'motion', wanted one of 'appearance+motion', 'appearance', 'raw'": lambda: refine(
        inputs="motion"
    ),
    "ValueError: w: got shape (5, 8, 1, 1), wanted (D, 2C), D at least 1": lambda: refine(
        w=torch.randn(D, 2 * C, 1, 1)
    ),
    "TypeError: w: got NoneType, wanted a tensor (D, C)": lambda: refine(w=None, inputs="appearance"),
    "ValueError: w: got shape (0, 8), wanted (D, 2C), D at least 1": lambda: refine(w=torch.randn(0, 2 * C)),
    "ValueError: w: got shape (5, 4), wanted (5, 8) = (D, 2C) for inputs='appearance+motion'": lambda: refine(
        w=torch.randn(D, C)
    ),
    "TypeError: w: got layout torch.sparse_coo, wanted a dense tensor (D, 2C)": lambda: refine(
        w=torch.randn(D, 2 * C).to_sparse(), inputs="raw"
    ),
    "TypeError: w: got dtype torch.float64, wanted torch.float32 with x of torch.float32": lambda: refine(
        w=torch.randn(D, 2 * C).double()
    ),
    "ValueError: gamma: got shape (6,), wanted (5,) = (D,)": lambda: refine(gamma=torch.ones(D + 1)),
    "TypeError: beta: got NoneType, wanted a tensor (D,)": lambda: refine(beta=None),
    "ValueError: w_s1: got shape (3, 5), wanted (3, 6) = (A, P), P = H * W": lambda: refine(w_s1=torch.randn(A, 5)),
    "ValueError: w_s2: got shape (3, 6), wanted (6, 3) = (P, A), P = H * W": lambda: refine(w_s2=torch.randn(A, 6)),
    "ValueError: w_s1, w_s2: got one of them, wanted both (spatial attention) or neither": lambda: refine(w_s2=None),
    "ValueError: w_s1, w_s2, w_c: got none, wanted spatial attention, channel attention or both": lambda: refine(
        w_s1=None, w_s2=None, w_c=None
    ),
    "ValueError: w_c: got shape (5, 4), wanted (4, 5) = (C, D)": lambda: refine(w_c=torch.randn(D, C)),
    "ValueError: w_c: got device meta, wanted cpu as x": lambda: refine(w_c=torch.randn(C, D, device=META)),
    "ValueError: running_mean, running_var: got one of them, wanted both or neither": lambda: refine(running_var=None),
    "ValueError: running_mean, running_var: got None in eval mode, wanted both": lambda: refine(
        running_mean=None, running_var=None
    ),
    "ValueError: running_mean: got a tensor that requires gradients, wanted a buffer that does not": lambda: refine(
        running_mean=torch.zeros(D, requires_grad=True)
    ),
    "ValueError: momentum: got None, wanted a number from 0 to 1": lambda: refine(momentum=None),
    "ValueError: momentum: got 2, wanted a number from 0 to 1": lambda: refine(momentum=[0.1, 2, 0.1]),
    "ValueError: momentum: got 2 numbers, wanted one, or one per frame of 3": lambda: refine(momentum=[0.1, 0.2]),
    "ValueError: eps: got nan, wanted a number above 0": lambda: refine(eps=float("nan")),
    "ValueError: eps: got 0.0, wanted a number above 0": lambda: refine(eps=0.0),
    "ValueError: bn_groups: got 0, wanted an integer of at least 1": lambda: refine(bn_groups=0),
    "ValueError: bn_groups: got 2 with a process_group, wanted 1: statistics are of all clips": groups_of_ranks,
    "TypeError: process_group: got 'world', wanted a torch.distributed.ProcessGroup of this rank's, or None": (
        lambda: refine(process_group="world")
    ),
    "TypeError: process_group: got one that this rank is not in, wanted a torch.distributed.ProcessGroup of this "
    "rank's, or None": lambda: refine(process_group=dist.GroupMember.NON_GROUP_MEMBER),
    "TypeError: training: got 'no', wanted True or False": lambda: refine(training="no"),
    "ValueError: lengths: got it with batch statistics (training), wanted running ones (eval mode)": lambda: train(
        lengths=torch.tensor([1, 2])
    ),
    "ValueError: state: got it with batch statistics (training), wanted running ones (eval mode)": lambda: train(
        state=State(torch.zeros(B, C, H, W), torch.zeros(B, C, H, W))
    ),
    "ValueError: x: got 2 clips, wanted a multiple of bn_groups=3": lambda: train(bn_groups=3),
    # The exact message of torch's BatchNorm.
    "ValueError: Expected more than 1 value per channel when training, got input size torch.Size([1, 5, 1, 1])": (
        lambda: train(x=torch.randn(1, T, C, 1, 1), w_s1=torch.randn(A, 1), w_s2=torch.randn(1, A))
    ),
    "ValueError: lengths: got shape (1,), wanted (2,) = (B,)": lambda: refine(lengths=torch.tensor([1])),
    "TypeError: lengths: got dtype torch.float32, wanted an integer dtype": lambda: refine(lengths=torch.ones(2)),
    "ValueError: lengths: got device meta, wanted cpu as x": lambda: refine(lengths=torch.ones(2, device=META).long()),
    "ValueError: lengths: got values from 0 to 4, wanted 1 to T=3": lambda: refine(lengths=torch.tensor([0, 4])),
    "TypeError: state: got Tensor, wanted the (x, s) of an earlier call's .state": lambda: refine(state=torch.zeros(2)),
    "TypeError: state.x: got NoneType, wanted a tensor (B, C, H, W)": lambda: refine(state=(None, None)),
    "ValueError: state.s: got shape (2, 4, 2, 3), wanted (2, 4, 3, 2) = (B, C, H, W)": lambda: refine(
        state=State(torch.zeros(B, C, H, W), torch.zeros(B, C, W, H))
    ),
    "TypeError: running_var: got dtype torch.float32, wanted torch.float16 as running_mean": lambda: refine(
        **{name: v.half() for name, v in arguments().items() if name != "running_var"}
    ),
    "TypeError: state.s: got dtype torch.float64, wanted torch.float32 as x": lambda: refine(
        state=State(torch.zeros(B, C, H, W), torch.zeros(B, C, H, W).double())
    ),
}

OF_OTHERS: Calls = {
    "ValueError: s: got shape (2, 3), wanted (B, T, C, H, W)": lambda: rru_fast.strip_pool(torch.zeros(2, 3)),
    "ValueError: got: got shape (2, 1), wanted (2,)": lambda: relative_error(torch.zeros(2, 1), torch.zeros(2)),
    "ValueError: features: got shape (4,), wanted (N, D) or (G, N, D)": lambda: triplet(features=torch.randn(4)),
    "ValueError: labels: got shape (5,), wanted (4,) = (N,), one per feature": lambda: triplet(labels=torch.arange(5)),
    "TypeError: labels: got list, wanted a tensor (N,), one per feature": lambda: triplet(labels=[0, 0, 1, 1]),
    "TypeError: labels: got dtype torch.bool, wanted an integer dtype": lambda: triplet(labels=torch.ones(4) > 0),
    "ValueError: labels: got device meta, wanted cpu as features": lambda: triplet(labels=torch.arange(4, device=META)),
    "ValueError: margin: got nan, wanted a finite number or 'soft'": lambda: triplet(margin=float("nan")),
    "ValueError: margin: got 'hard', wanted a finite number or 'soft'": lambda: triplet(margin="hard"),
    "ValueError: margin: got True, wanted a finite number or 'soft'": lambda: triplet(margin=True),
    "ValueError: metric: got 'manhattan', wanted one of 'euclidean', 'cosine'": lambda: triplet(metric="manhattan"),
    "ValueError: reduction: got 'max', wanted one of 'mean', 'sum', 'none'": lambda: triplet(reduction="max"),
    f"ValueError: backend: got 'fast', wanted 'auto' or one of {USABLE}": lambda: refine(backend="fast"),
    f"ValueError: backend: got ['auto'], wanted 'auto' or one of {USABLE}": lambda: refine(backend=["auto"]),
    **(
        {
            f"ValueError: backend: got {MISSING!r}, wanted 'auto' or one of {USABLE}: {WHY_MISSING}": lambda: triplet(
                backend=MISSING
            )
        }
        if MISSING
        else {}
    ),
    "ValueError: backend: got 'reference' for an operator's kernels in Python, wanted one of "
    + ", ".join(map(repr, ops.strip_pool.KERNELS)): lambda: ops.strip_pool.strip_pool(
        torch.randn(B, T, C, H, W), "reference"
    ),
    "RuntimeError: rru_fast::strip_pool: got a backend whose second-order gradients are not implemented, wanted "
    "backend='reference'": second_order,
    "RuntimeError: rru_fast.strip_pool: got a backend whose forward-mode and torch.func derivatives are not "
    "implemented, wanted backend='reference'": forward_mode,
    "RuntimeError: rru_fast::refine: got inputs that require gradients in a program that was exported under "
    "torch.no_grad(), wanted it called under torch.no_grad() too (save=False)": backward_without_save,
    "TypeError: s: got a nested tensor, wanted a dense tensor (B, T, C, H, W)": lambda: rru_fast.strip_pool(
        torch.nested.nested_tensor([torch.randn(3, 4, 2, 2), torch.randn(2, 4, 2, 2)])
    ),
    "TypeError: return_indices: got 'x', wanted True or False": lambda: triplet(return_indices="x"),
    "TypeError: return_distances: got 1, wanted True or False": lambda: triplet(return_distances=1),
    "ValueError: distance: got str with p=None, power=None, wanted LpDistance or CosineSimilarity with p=2, power=1": (
        lambda: pml.BatchHardTripletLoss(distance="cosine")
    ),
    "ValueError: margin: got 'soft', wanted a finite number": lambda: pml.BatchHardTripletLoss(margin="soft"),
    "TypeError: smooth_loss: got 1, wanted True or False": lambda: pml.BatchHardTripletLoss(smooth_loss=1),
    f"ValueError: backend: got 'gpu', wanted 'auto' or one of {USABLE}": lambda: pml.BatchHardTripletLoss(
        backend="gpu"
    ),
    "TypeError: model: got None, wanted an nn.Module, a loss, or an object, function, list or dict that holds them": (
        lambda: rru_fast.accelerate(None)
    ),
    "TypeError: model: got 3, wanted an nn.Module, a loss, or an object, function, list or dict that holds them": (
        lambda: rru_fast.restore(3)
    ),
}
OF_GALLERY: Calls = {
    "ValueError: gallery, gallery_labels: got one of them, wanted both or neither": lambda: triplet(
        gallery=torch.randn(2, 3)
    ),
    "TypeError: gallery: got list, wanted a tensor (M, D) or (G, M, D)": lambda: mined_in([[1.0]]),
    "ValueError: gallery: got shape (0, 3), wanted (M, D) or (G, M, D), every size at least 1": lambda: mined_in(
        torch.randn(0, 3)
    ),
    "ValueError: gallery: got shape (2, 4), wanted (2, 3) = (M, D) or (G, M, D) as features": lambda: mined_in(
        torch.randn(2, 4)
    ),
    "ValueError: gallery: got shape (1, 2, 3), wanted (2, 3) = (M, D) or (G, M, D) as features": lambda: mined_in(
        torch.randn(1, 2, 3)
    ),
    "ValueError: gallery: got shape (1, 2, 3), wanted (4, 2, 3) = (M, D) or (G, M, D) as features": lambda: mined_in(
        torch.randn(1, 2, 3), features=torch.randn(4, 4, 3)
    ),
    "TypeError: gallery: got dtype torch.float64, wanted torch.float32 as features": lambda: mined_in(
        torch.randn(2, 3).double()
    ),
    "ValueError: gallery: got device meta, wanted cpu as features": lambda: mined_in(torch.empty(2, 3, device=META)),
    "ValueError: gallery_labels: got shape (4,), wanted (2,) = (M,), one per feature of the gallery": (
        lambda: mined_in(torch.randn(2, 3), gallery_labels=torch.arange(4))
    ),
    "TypeError: gallery_labels: got dtype torch.float32, wanted an integer dtype": (
        lambda: mined_in(torch.randn(2, 3), gallery_labels=torch.ones(2))
    ),
    "ValueError: gallery_labels: got device meta, wanted cpu as gallery": lambda: mined_in(
        torch.randn(2, 3), gallery_labels=torch.arange(2, device=META)
    ),
    "TypeError: gallery_labels: got dtype torch.uint64, wanted torch.int64 as labels": lambda: mined_in(
        torch.randn(2, 3), gallery_labels=torch.arange(2).to(torch.uint64)
    ),
    "ValueError: gallery_labels: got shape (3,), wanted (2,) = (M,), one per feature": lambda: (
        rru_fast.BatchHardTripletLoss()(torch.randn(4, 3), torch.arange(4), torch.randn(2, 3), torch.arange(3))
    ),
}
OF_CONTRIB: Calls = {
    "ValueError: margin: got nan, wanted a finite number or None": lambda: strong_baseline.TripletLoss(float("nan")),
    "ValueError: hard_factor: got '0', wanted a finite number": lambda: strong_baseline.TripletLoss(0.3, "0"),  # type: ignore[arg-type]
    "ValueError: global_feat: got shape (2, 3, 4), wanted (N, D)": lambda: strong_baseline.TripletLoss()(
        torch.randn(2, 3, 4), torch.arange(2)
    ),
    "ValueError: labels: got shape (5,), wanted (4,) or (4, 1), one per feature": lambda: strong_baseline.TripletLoss()(
        torch.randn(4, 3), torch.arange(5)
    ),
    "ValueError: distance_metric: got 'cosine', wanted BatchHardTripletLossDistanceFunction's eucledian_distance or "
    "cosine_distance": lambda: sentence_transformers.BatchHardTripletLoss(None, "cosine"),
    "ValueError: margin: got inf, wanted a finite number": (
        lambda: sentence_transformers.BatchHardTripletLoss(None, margin=float("inf"))
    ),
    f"ValueError: backend: got 'mps', wanted 'auto' or one of {USABLE}": (
        lambda: sentence_transformers.BatchHardSoftMarginTripletLoss(None, backend="mps")
    ),
    "ValueError: embeddings: got shape (2, 3, 4), wanted (N, D)": (
        lambda: sentence_transformers.BatchHardTripletLoss(None).batch_hard_triplet_loss(
            torch.arange(3), torch.randn(2, 3, 4)
        )
    ),
    "ValueError: labels: got shape (5,), wanted (4,) = (N,), one per feature": (
        lambda: sentence_transformers.BatchHardTripletLoss(None).batch_hard_triplet_loss(
            torch.arange(5), torch.randn(4, 3)
        )
    ),
}
OF_CPU_KERNELS: Calls = {
    "ValueError: backend: got 'cpu' with tensors on meta, wanted 'auto', or tensors on the CPU": (
        lambda: rru_fast.strip_pool(torch.empty(1, 1, 1, 1, 1, device=META), backend="cpu")
    ),
}
OF_MODULES: Calls = {
    "ValueError: spatial: got 8, wanted (H, W)": lambda: unit(spatial=8),
    "ValueError: spatial[1]: got 0, wanted an integer of at least 1": lambda: unit(spatial=(8, 0)),
    "ValueError: channels: got 0, wanted an integer of at least 1": lambda: unit(channels=0),
    "ValueError: hidden: got True, wanted an integer of at least 1": lambda: unit(hidden=True),
    "ValueError: spatial_hidden: got 2.5, wanted an integer of at least 1": lambda: unit(spatial_hidden=2.5),
    "ValueError: bn_groups: got -1, wanted an integer of at least 1": lambda: unit(bn_groups=-1),
    "ValueError: bn_eps: got -1.0, wanted a number above 0": lambda: unit(bn_eps=-1.0),
    "ValueError: bn_momentum: got 2, wanted a number from 0 to 1": lambda: unit(bn_momentum=2),
    "ValueError: attention: got 'none', wanted 'both', 'spatial' or 'channel'": lambda: unit(attention="none"),
    "ValueError: inputs: got 'both', wanted 'appearance+motion', 'appearance' or 'raw'": lambda: unit(inputs="both"),
    "ValueError: cuda_graph: got 1, wanted True or False": lambda: unit(cuda_graph=1),
    "ValueError: cuda_graph: got True with backend='cpu', wanted 'auto', 'composite', 'triton' or 'cuda'": lambda: unit(
        cuda_graph=True, backend="cpu"
    ),
    "ValueError: cuda_graph: got True with tensors on cpu, wanted tensors on a GPU": lambda: unit(cuda_graph=True)(
        torch.randn(B, T, C, H, W)
    ),
    "RuntimeError: cuda_graph: got the backward of a call after 2 later ones of its shape, wanted it before the next "
    "call, which overwrites what the backward reads": late_backward,
    "ValueError: backend: got 'cpu', wanted 'auto' or 'reference' (this is the reference module)": (
        lambda: reference.RRU(4, backend="cpu")
    ),
    "ValueError: cuda_graph: got True, wanted False (this is the reference module)": lambda: reference.RRU(
        4, cuda_graph=True
    ),
    "TypeError: x: got list, wanted a tensor (B, T, C, H, W)": lambda: unit()([1.0]),
    "ValueError: x: got shape (2, 3, 5, 3, 2), wanted (B, T, C=4, H, W), B and T at least 1": lambda: unit()(
        torch.randn(2, 3, 5, 3, 2)
    ),
    "ValueError: x: got maps of (2, 3), wanted spatial=(3, 2)": lambda: unit()(torch.randn(2, 3, 4, 2, 3)),
    "ValueError: x: got 3 clips, wanted a multiple of bn_groups=2": lambda: unit(bn_groups=2)(
        torch.randn(3, 3, 4, 3, 2)
    ),
    "ValueError: transition_norm: got SyncBatchNorm, wanted BatchNorm2d with bn_groups=2": groups_with_sync_norm,
    "ValueError: lengths: got it with batch statistics (training), wanted running ones (eval mode)": (
        lambda: reference.RRU(4, (3, 2))(torch.randn(2, 3, 4, 3, 2), lengths=torch.tensor([1, 2]))
    ),
    "TypeError: transition_norm: got GroupNorm, wanted a BatchNorm2d or SyncBatchNorm": lambda: with_layers(
        transition_norm=nn.GroupNorm(1, 256)
    ),
    "TypeError: transition: got Conv2d, wanted a Conv2d without bias: its weight is read, its forward not called": (
        lambda: with_layers(transition=nn.Conv2d(2 * C, 256, 1))
    ),
    "TypeError: channel_attention: got Adapted, wanted a Linear without bias: its weight is read, its forward not "
    "called": lambda: with_layers(channel_attention=Adapted(256, C, bias=False)),
    "TypeError: spatial_attention.1: got GELU, wanted a ReLU: its weight is read, its forward not called": lambda: (
        with_layers(spatial_attention=nn.Sequential(nn.Linear(6, 3, False), nn.GELU(), nn.Linear(3, 6, False)))
    ),
    "TypeError: gather: got 'no', wanted True or False": lambda: rru_fast.BatchHardTripletLoss(gather="no"),  # type: ignore[arg-type]
    "ValueError: margin: got inf, wanted a finite number or 'soft'": lambda: rru_fast.BatchHardTripletLoss(
        margin=float("inf")
    ),
    "ValueError: labels: got shape (1,), wanted (6,) = (N,), one per feature": lambda: rru_fast.BatchHardTripletLoss()(
        torch.randn(6, 4), torch.zeros(1, dtype=torch.int64)
    ),
    "TypeError: labels: got list, wanted a tensor (N,)": lambda: reference.BatchHardTripletLoss()(
        torch.randn(2, 3),
        [0, 1],  # type: ignore[arg-type]
    ),
    "ValueError: features: got shape (3,), wanted (N, D) or (G, N, D), every size at least 1": (
        lambda: reference.BatchHardTripletLoss()(torch.randn(3), torch.arange(3))
    ),
}
OF_OFFICIAL_WEIGHTS: Calls = {
    "TypeError: state_dict: got list, wanted a mapping of names to tensors": lambda: rru_fast.from_official([]),
    f"TypeError: state_dict[{LAST!r}]: got int, wanted a tensor": lambda: rru_fast.from_official({**OFFICIAL, LAST: 3}),
    "ValueError: x: got maps of (1, 4), wanted spatial=(2, 2)": maps_of_another_size,
    "ValueError: state_dict: got no 'reduce_dim_z.conv.weight', wanted the weights of an RRU of rru-reid or "
    "person-reid-lib": lambda: rru_fast.from_official({}),
    "ValueError: state_dict: got 2 RRUs, under ['a.', 'b.'], wanted one": lambda: rru_fast.from_official(
        {f"{name}.reduce_dim_z.conv.weight": torch.zeros(1) for name in "ab"}
    ),
    "ValueError: state_dict: got no 'reduce_dim_z.bn.weight', wanted the weights of an RRU of rru-reid or "
    "person-reid-lib": lambda: rru_fast.from_official({"reduce_dim_z.conv.weight": torch.zeros(4, 6, 1, 1)}),
    "ValueError: reduce_dim_z.conv.weight: got shape (1,), wanted (D, 2C, 1, 1)": lambda: rru_fast.from_official(
        dict.fromkeys(weights.NAMES, torch.zeros(1))
    ),
    "ValueError: c_atten_z.1.weight: got shape (3, 2, 1, 1), wanted (C, D, 1, 1)": lambda: rru_fast.from_official(
        {**OFFICIAL, LAST: torch.zeros(3, 2, 1, 1)}
    ),
    "ValueError: reduce_dim_z.bn.bias: got shape (9,), wanted (D,)": lambda: rru_fast.from_official(
        {**OFFICIAL, "reduce_dim_z.bn.bias": torch.zeros(9)}
    ),
}

NO_OPERATOR = (
    'RuntimeError: function: got a call that reached no operator of rru_fast with backend="auto", '
    "wanted one that does, outside of torch.compile"
)
OF_CALIBRATE: Calls = {
    "ValueError: function: got int, wanted a module or another callable": lambda: rru_fast.calibrate(3),
    "ValueError: seconds: got 0, wanted a number above 0": lambda: rru_fast.calibrate(print, seconds=0),
    NO_OPERATOR: lambda: rru_fast.calibrate(torch.zeros, 1),
}

ERRORS = [
    *OF_CALIBRATE.items(),
    *OF_REFINE.items(),
    *OF_OTHERS.items(),
    *OF_GALLERY.items(),
    *OF_MODULES.items(),
    *OF_OFFICIAL_WEIGHTS.items(),
    *OF_CONTRIB.items(),
]
ERRORS += [] if native.missing() else OF_CPU_KERNELS.items()
# Raise statements that a single process without a GPU does not reach, by a part of their text.
ELSEWHERE = (
    {
        "RuntimeError(GRAPH_BREAK_ERROR)": "tests/ops/test_refine_sync.py: several ranks",
        "on the ranks{where}": "tests/ops/test_refine_sync.py, tests/test_gather.py: several ranks",
        "got none on any rank": "tests/test_gather.py: several ranks",
        "got one on some of the ranks": "tests/test_gather.py: several ranks",
        "over several ranks": "tests/ops/test_refine_sync.py: several ranks",
        "got the same for every call of vmap": "tests/test_works_with_func.py: a transform",
        "runs no CUDA graphs": "tests/compat/test_accelerate.py: third-party modules",
        "NoMatch(": "tests/compat/test_third_party.py: the reason of a warning",
        "_LeftAlone(": "tests/compat/test_third_party.py: the reason of a warning",
        "whose contents may change": "tests/compat/test_third_party.py: the reason of a warning",
        "whose variables may change": "tests/compat/test_watch.py: the reason of a warning",
        "to compare at every call": "tests/compat/test_watch.py: the reason of a warning",
        "that accelerate made": "tests/compat/test_accelerate.py: a sharded model",
        "with another forward": "tests/compat/test_accelerate.py: a wrapped forward",
        "results: got none": "tests/test_testing.py: results that lack a tensor",
        "draws: got none": "tests/test_testing.py: no draws",
        "got relative error": "tests/test_testing.py: an AssertionError, as tests raise",
        "RRU_FAST_FLOAT32": "tests/test_triton.py: the Triton kernels",
        "RRU_FAST_AUTOTUNE": "tests/test_triton.py: the Triton kernels",
        "RRU_FAST_CUDA_EMULATE": "tests/cuda/test_backend.py: a variable of the environment",
        "RRU_FAST_CALIBRATE": "tests/auto/test_choice.py: a variable of the environment",
        "decision: got": "tests/auto/test_decisions.py: a damaged file",
        "kind: got": "tests/auto/test_decisions.py: a damaged file",
        "only the CPU and CUDA": "tests/auto/test_command.py: the command's",
        "raise error": "tests/auto/test_choice.py: another error of a kernel",
        "BackendError(": "tests/auto/test_calibrate.py: the reason of a decision",
        "--device: got": "tests/auto/test_command.py: the command's",
        "ArgumentTypeError(": "tests/auto/test_command.py: the command's",
        "_failure(": "tests/test_launch.py: a kernel that Triton refuses",
        "failures[0][0]": "tests/test_autotune.py: a kernel that Triton refuses with every config",
        "got no pytorch-metric-learning": "tests/contrib/test_pml.py: without it",
        "got no sentence-transformers": "tests/contrib/test_sentence_transformers.py: without it",
        "_UnusableError(": "tests/test_native.py: the reason that show_config prints",
    }
    | ({} if MISSING else {"BACKENDS[backend]": "where one is missing"})
    | (
        dict.fromkeys(("with tensors on {device}", "with backend={backend!r}"), "needs the C++ kernels")
        if native.missing()
        else dict.fromkeys(
            ("whose second-order gradients", "in a program that was exported"),
            "tests/test_works_with_graphs.py: without the C++ kernels, which have the same",
        )
    )
)


@pytest.mark.parametrize(("expected", "call"), ERRORS, ids=[expected.partition(": ")[2][:60] for expected, _ in ERRORS])
def test_an_error_names_the_argument_what_it_got_and_what_it_wanted(expected: str, call: Callable[[], object]) -> None:
    kind, _, message = expected.partition(": ")
    with pytest.raises((ValueError, TypeError, RuntimeError)) as caught:
        call()
    assert (type(caught.value).__name__, str(caught.value)) == (kind, message)
    assert re.fullmatch(r"[\w.:, \['\]]+: got .+, wanted .+", message) or message.startswith(
        "Expected more than 1 value"
    )


def raised_at(call: Callable[[], object]) -> tuple[str, int]:
    """File and line of the library where the call's error was raised; "" and 0 if that was in C++."""
    try:
        call()
    except (ValueError, TypeError, RuntimeError) as error:
        frames = traceback.extract_tb(error.__traceback__)
    places = [(frame.filename, frame.lineno) for frame in frames if Path(frame.filename).is_relative_to(LIBRARY)]
    file, line = places[-1] if places else ("", 0)
    assert line is not None
    return file, line


LIBRARY = Path(rru_fast.__file__).parent


def test_every_error_of_the_library_is_listed() -> None:
    seen = {raised_at(call) for _, call in ERRORS}
    unlisted, excused = [], set()
    for path in sorted(LIBRARY.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Raise) or node.exc is None:
                continue
            text = ast.unparse(node)
            why = {mark for mark in ELSEWHERE if mark in text}
            excused |= why
            if not why and not any((str(path), line) in seen for line in range(node.lineno, node.end_lineno + 1)):
                unlisted.append(f"{path.relative_to(LIBRARY)}:{node.lineno}: {text}")
    assert unlisted == []
    assert excused == ELSEWHERE.keys()
