"""The paper's modules in plain PyTorch, with the parameter names of `rru_fast.modules`."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from rru_fast.checks import (
    FINITE,
    SMALLEST,
    check_both,
    check_clips,
    check_features,
    check_flags,
    check_gallery,
    check_integers,
    check_layer,
    check_loss,
    check_number,
    check_reference_backend,
    check_sizes,
    check_x,
)
from rru_fast.distributed import count_features, gather_rows, has_other_ranks
from rru_fast.reference.equations import batch_hard_triplet, hardest_distances, loss_of_gap, reduce, refine
from rru_fast.types import Attention, Inputs, Metric, Reduction, Refined, State

# Forward pre-hooks of torch.nn.utils that recompute a layer's weight before each call.
WEIGHT_HOOKS = (BasePruningMethod, SpectralNorm, WeightNorm)


def recompute_weights(layer: Any) -> None:
    """Run the hooks that recompute a layer's weights, since its forward, which would run them, is not called."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, WEIGHT_HOOKS):
            hook(layer, None)


def current_weight(layer: Any) -> Tensor:
    """Return the recomputed weight of a layer whose forward is not called."""
    recompute_weights(layer)
    return cast(Tensor, layer.weight)


def batch_norm_arguments(norm: Any, frames: int) -> dict[str, Any]:
    """Arguments of `refine` from the transition's BatchNorm or SyncBatchNorm, for a call with `frames` frames."""
    if not isinstance(norm, _BatchNorm):
        raise TypeError(f"transition_norm: got {type(norm).__name__}, wanted a BatchNorm2d or SyncBatchNorm")
    recompute_weights(norm)
    momentum: float | list[float] | None = norm.momentum
    if momentum is None:  # running statistics are the mean over all batches
        momentum = 0.0  # if not updated
        if norm.training and norm.num_batches_tracked is not None:
            before = int(norm.num_batches_tracked)
            momentum = [1 / (before + frame) for frame in range(1, frames + 1)]
    return {
        "gamma": norm.weight,
        "beta": norm.bias,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
        # As in nn.BatchNorm2d: a frozen norm in a training model uses its running statistics.
        "training": norm.training or norm.running_mean is None,
        "momentum": momentum,
        "eps": norm.eps,
        "process_group": _sync_group(norm),
    }


def _sync_group(norm: nn.Module) -> ProcessGroup | None:
    """Return the group over which a SyncBatchNorm would synchronize now; None for other norms and in eval mode."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and torch.distributed.is_initialized()):
        return None
    group: ProcessGroup | None = norm.process_group or torch.distributed.group.WORLD
    return group


def track_batches(norm: Any, frames: int) -> None:
    """Add one batch per frame to num_batches_tracked, as the batch norm's forward would."""
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(frames)


def gate_arguments(rru: RRU) -> dict[str, Any]:
    """Arguments of `refine` and `equations.gate` from an RRU: weights of its transition and attention, and `inputs`."""
    first, _, second = rru.spatial_attention if rru.attention != "channel" else (None, None, None)
    return {
        "w": current_weight(rru.transition).flatten(1),
        "w_s1": current_weight(first) if first is not None else None,
        "w_s2": current_weight(second) if second is not None else None,
        "w_c": current_weight(rru.channel_attention) if rru.attention != "spatial" else None,
        "inputs": rru.inputs,
    }


class RRU(nn.Module):
    """Refining Recurrent Unit, eq. 1-5. Constructor and state_dict as in `rru_fast.RRU`."""

    def __init__(
        self,
        channels: int,
        spatial: tuple[int, int] = (8, 8),
        *,
        hidden: int = 256,
        spatial_hidden: int = 128,
        attention: Attention = "both",
        inputs: Inputs = "appearance+motion",
        bn_eps: float = 1e-3,
        bn_momentum: float = 0.1,
        bn_groups: int = 1,
        backend: str = "auto",
        cuda_graph: bool = False,
        device: torch.device | str | int | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(spatial, tuple | list) or len(spatial) != 2:
            raise ValueError(f"spatial: got {spatial!r}, wanted (H, W)")
        height, width = spatial
        check_sizes(channels=channels, hidden=hidden, spatial_hidden=spatial_hidden, bn_groups=bn_groups)
        check_sizes(**{"spatial[0]": height, "spatial[1]": width})
        check_number("bn_eps", bn_eps, SMALLEST, FINITE, "a number above 0")
        check_number("bn_momentum", bn_momentum, 0, 1, "a number from 0 to 1")
        if attention not in ("both", "spatial", "channel"):
            raise ValueError(f"attention: got {attention!r}, wanted 'both', 'spatial' or 'channel'")
        if inputs not in ("appearance+motion", "appearance", "raw"):
            raise ValueError(f"inputs: got {inputs!r}, wanted 'appearance+motion', 'appearance' or 'raw'")
        self._choose_backend(backend, cuda_graph)
        self.channels, self.spatial = channels, (height, width)
        self.attention, self.inputs, self.bn_groups = attention, inputs, bn_groups
        positions = height * width
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        columns = channels if inputs == "appearance" else 2 * channels
        self.transition = nn.Conv2d(columns, hidden, 1, bias=False, **made)
        self.transition_norm = nn.BatchNorm2d(hidden, eps=bn_eps, momentum=bn_momentum, **made)
        if attention != "channel":
            self.spatial_attention = nn.Sequential(
                nn.Linear(positions, spatial_hidden, bias=False, **made),
                nn.ReLU(),
                nn.Linear(spatial_hidden, positions, bias=False, **made),
            )
        if attention != "spatial":
            self.channel_attention = nn.Linear(hidden, channels, bias=False, **made)

    def _choose_backend(self, backend: str, cuda_graph: bool) -> None:
        check_reference_backend(backend)
        if cuda_graph is not False:
            raise ValueError(f"cuda_graph: got {cuda_graph!r}, wanted False (this is the reference module)")

    def _refine(self, x: Tensor, **arguments: object) -> Refined:
        return refine(x, **arguments)  # type: ignore[arg-type]

    def forward(self, x: Tensor, lengths: Tensor | None = None, state: State | None = None) -> Refined:
        """Refine x (B, T, C, H, W); `lengths` (B,) and `state` in eval mode only."""
        self._check(x)
        norm = batch_norm_arguments(self.transition_norm, x.shape[1])
        self._check_training(x, norm["training"])
        out = self._refine(x, **gate_arguments(self), bn_groups=self.bn_groups, lengths=lengths, state=state, **norm)
        track_batches(self.transition_norm, x.shape[1])
        return out

    def _check(self, x: Tensor) -> None:
        """Raise unless x has the module's channels and size, and its layers are of the types whose weights it reads."""
        check_x(x, self.channels, self.spatial if self.attention != "channel" else None)
        check_layer("transition", self.transition, nn.Conv2d)
        if self.attention != "channel":
            kinds = (nn.Linear, nn.ReLU, nn.Linear)
            for n, (layer, kind) in enumerate(zip(self.spatial_attention, kinds, strict=True)):
                check_layer(f"spatial_attention.{n}", layer, kind)
        if self.attention != "spatial":
            check_layer("channel_attention", self.channel_attention, nn.Linear)

    def _check_training(self, x: Tensor, training: bool) -> None:
        if training:
            check_clips(x.shape[0], self.bn_groups)
        if training and self.bn_groups > 1 and isinstance(self.transition_norm, nn.SyncBatchNorm):
            raise ValueError(f"transition_norm: got SyncBatchNorm, wanted BatchNorm2d with bn_groups={self.bn_groups}")

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, spatial={self.spatial}, attention={self.attention!r}, "
            f"inputs={self.inputs!r}, bn_groups={self.bn_groups}"
        )


class BatchHardTripletLoss(nn.Module):
    """Batch-hard triplet loss, eq. 8 and 10. Constructor as in `rru_fast.BatchHardTripletLoss`."""

    def __init__(
        self,
        margin: float | Literal["soft"] = 0.3,
        metric: Metric = "euclidean",
        gather: bool = False,
        backend: str = "auto",
        *,
        reduction: Reduction = "mean",
        return_distances: bool = False,
    ) -> None:
        super().__init__()
        check_loss(margin, metric, reduction)
        check_flags(gather=gather, return_distances=return_distances)
        self._choose_backend(backend)
        self.margin, self.metric, self.gather = margin, metric, gather
        self.reduction, self.return_distances = reduction, return_distances

    def _choose_backend(self, backend: str) -> None:
        check_reference_backend(backend)

    def _loss(self, features: Tensor, labels: Tensor, **options: Any) -> Tensor | tuple[Tensor, ...]:
        return batch_hard_triplet(features, labels, **options)

    def _distances(self, *batch: Tensor) -> tuple[Tensor, Tensor]:
        return hardest_distances(*batch, metric=self.metric)

    def forward(
        self,
        features: Tensor,
        labels: Tensor,
        gallery: Tensor | None = None,
        gallery_labels: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, ...]:
        """Return the loss of features (N, D) or (G, N, D) with labels (N,), and the distances if asked for.

        Positives and negatives are mined in the gallery, (M, D) or (G, M, D) with labels (M,), if there is one.
        """
        gather = self.gather and has_other_ranks()
        check_features("features", features, "labels", labels, may_be_empty=gather)
        check_both("gallery", gallery, "gallery_labels", gallery_labels)
        if gallery is not None:
            check_features("gallery", gallery, "gallery_labels", gallery_labels, may_be_empty=gather)
        if gather:
            return self._gathered(features, labels, gallery, gallery_labels)
        if gallery is not None:
            check_gallery(gallery, features)
        return self._loss(
            features,
            labels,
            gallery=gallery,
            gallery_labels=gallery_labels,
            margin=self.margin,
            metric=self.metric,
            reduction=self.reduction,
            return_distances=self.return_distances,
        )

    def _gathered(
        self, features: Tensor, labels: Tensor, gallery: Tensor | None, gallery_labels: Tensor | None
    ) -> Tensor | tuple[Tensor, ...]:
        """Return the loss of the features of all ranks: each rank mines for its own, then all share the distances."""
        counts, gallery_counts = count_features(features, labels, gallery, gallery_labels)
        if gallery is None or gallery_labels is None:
            gallery, gallery_labels = features, labels
        check_gallery(gallery, features)
        check_integers("labels", labels)
        check_integers("gallery_labels", gallery_labels)
        gallery = gather_rows(gallery, gallery_counts, -2)
        labels, gallery_labels = labels.long(), gather_rows(gallery_labels.long(), gallery_counts, -1)
        count = features.shape[-2]
        if count == 0:  # take part, with the arguments' errors and in the backward, by an anchor that is dropped
            features, labels = torch.cat((features, gallery[..., :1, :]), -2), gallery_labels[:1]
        own = torch.stack(self._distances(features, labels, gallery, gallery_labels))[..., :count]  # (2, ..., N)
        d_pos, d_neg = gather_rows(own, counts, -1)
        loss = reduce(loss_of_gap(d_pos - d_neg, self.margin), self.reduction)
        loss, d_pos, d_neg = (value.to(features.dtype) for value in (loss, d_pos, d_neg))
        return (loss, d_pos, d_neg) if self.return_distances else loss

    def extra_repr(self) -> str:
        shown = f"margin={self.margin!r}, metric={self.metric!r}, gather={self.gather}"
        shown += f", reduction={self.reduction!r}" if self.reduction != "mean" else ""
        return shown + ", return_distances=True" * self.return_distances
