"""Arguments, outputs and gradients of the operators as every backend's kernels take and return them.

csrc/cpu/kernels.h has structures like these in C++. The dispatcher's schemas are made of them: a field added to
`RefineArguments` is an argument of the operator and of its backward.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from itertools import islice
from typing import Any

from torch import Tensor

SCHEMA_TYPES = {
    "Tensor": "Tensor",
    "Tensor | None": "Tensor?",
    "str": "str",
    "bool": "bool",
    "int": "int",
    "float": "float",
    "list[int]": "int[]",
}


def schema(*classes: type[Any]) -> str:
    """Return the fields of dataclasses as one list of arguments in torch.library's schema language."""
    return ", ".join(f"{SCHEMA_TYPES[str(f.type)]} {f.name}" for cls in classes for f in fields(cls))


def flatten(instance: Any) -> tuple[Any, ...]:
    """Return a dataclass's values in the order of its fields."""
    return tuple(getattr(instance, f.name) for f in fields(instance))  # vars() breaks torch.compile's graph


def unflatten(flat: Iterable[Any], *classes: type[Any]) -> tuple[Any, ...]:
    """Build dataclasses of a flat list of their values, one after another; leftover values are appended unchanged."""
    rest = iter(flat)
    return *[cls(*islice(rest, len(fields(cls)))) for cls in classes], *rest


def holds_tensor(field_type: Any) -> bool:
    """Return True if a field of this type holds a tensor or None."""
    return str(field_type).startswith("Tensor")


@dataclass(frozen=True)
class RefineArguments:
    """Arguments of `refine`, checked; shapes as in `rru_fast.refine`."""

    x: Tensor
    """(B, T, C, H, W)."""
    w: Tensor
    """(D, C) or (D, 2C)."""
    gamma: Tensor
    beta: Tensor
    w_s1: Tensor | None
    w_s2: Tensor | None
    w_c: Tensor | None
    running_mean: Tensor | None
    """(D,); read in eval mode only."""
    running_var: Tensor | None
    lengths: Tensor | None
    """(B,), int64, on x's device."""
    state_x: Tensor | None
    """(B, C, H, W), the frame before the first, with state_s."""
    state_s: Tensor | None
    inputs: str
    training: bool
    eps: float
    bn_groups: int
    process_group: str = ""
    """Name in torch.distributed of the ranks that share batch statistics; "" for this rank alone."""
    elements_per_rank: list[int] = field(default_factory=list)
    """Values per gate channel that each of these ranks contributes to a frame's statistics."""

    @property
    def steps(self) -> int:
        """N, the number of frames with a gate: all but the first, which has none without a state."""
        return self.x.shape[1] - (1 if self.state_s is None else 0)

    @property
    def groups(self) -> int:
        """Number of groups of clips that have batch statistics of their own; 1 in eval mode."""
        return self.bn_groups if self.training else 1

    def cast_to_weight_dtypes(self, **gradients: Tensor | None) -> dict[str, Tensor | None]:
        """Cast gradients of weights, by name, to the weights' dtypes."""
        weights = {name: getattr(self, name) for name in gradients}
        return {name: None if d is None else d.to(weights[name].dtype) for name, d in gradients.items()}


@dataclass(frozen=True)
class RefineSaved:
    """Tensors saved for the backward; in the arithmetic dtype, fp32 at least, but for the features."""

    features: Tensor
    """S (B, T, C, H, W), in x's dtype."""
    mean: Tensor
    """(T, groups, D), batch statistics; T = 0 in eval mode."""
    var: Tensor
    """(T, groups, D), biased."""
    u: Tensor
    """(N, B, D, P), in a layout private to the backend; N = 0 without `save`, as below."""
    z_s: Tensor
    """(N, B, P), eq. 2; N = 0 without spatial attention."""
    z_c: Tensor
    """(N, B, C), eq. 3; N = 0 without channel attention."""
    h: Tensor
    """(N, B, A), hidden units of the spatial attention; N = 0 without it."""


@dataclass(frozen=True)
class RefineOutputs:
    """Outputs of the operator: the two that users see, and those saved for the backward."""

    features: Tensor
    strips: Tensor
    """(B, C, H), in x's dtype."""
    mean: Tensor
    var: Tensor
    u: Tensor
    z_s: Tensor
    z_c: Tensor
    h: Tensor

    @property
    def saved(self) -> RefineSaved:
        """All but the strips."""
        return RefineSaved(**{name: value for name, value in vars(self).items() if name != "strips"})


@dataclass(frozen=True)
class RefineUpstream:
    """Gradients of the two outputs; None for one that is not used."""

    d_features: Tensor | None
    d_strips: Tensor | None


@dataclass(frozen=True)
class RefineNeed:
    """Gradients to compute; those of a state always are."""

    need_x: bool
    need_weights: bool


@dataclass(frozen=True)
class RefineGradients:
    """Gradients of the differentiable arguments; None where there is no such argument or it is not needed."""

    x: Tensor | None = None
    w: Tensor | None = None
    gamma: Tensor | None = None
    beta: Tensor | None = None
    w_s1: Tensor | None = None
    w_s2: Tensor | None = None
    w_c: Tensor | None = None
    state_x: Tensor | None = None
    state_s: Tensor | None = None


@dataclass(frozen=True)
class BatchHardArguments:
    """Arguments of `batch_hard_triplet`, checked."""

    features: Tensor
    """(G, N, D), the anchors; not normalized, also for "cosine"."""
    labels: Tensor
    """(N,), integers."""
    gallery: Tensor | None
    """(G, M, D) in features' dtype, among which partners are mined; None for the features themselves."""
    gallery_labels: Tensor | None
    """(M,), integers; with the gallery or not at all."""
    margin: float
    soft: bool
    """softplus in place of hinge; the margin is not read."""
    metric: str

    @property
    def candidates(self) -> Tensor:
        """The features among which partners are mined, (G, M, D)."""
        return self.features if self.gallery is None else self.gallery

    @property
    def candidate_labels(self) -> Tensor:
        """Labels of the candidates, (M,)."""
        return self.labels if self.gallery_labels is None else self.gallery_labels


@dataclass(frozen=True)
class BatchHardSaved:
    """Each anchor's partners, saved for the backward."""

    d_pos: Tensor
    """(G, N), distance to the hardest positive, fp32 at least; -inf without one, which takes a gallery."""
    d_neg: Tensor
    """(G, N), distance to the hardest negative; inf without one."""
    positive: Tensor
    """(G, N), int64, the hardest positive's index among the candidates; -1 without one."""
    negative: Tensor
    """(G, N), int64, the hardest negative's index; -1 without one."""


@dataclass(frozen=True)
class BatchHardOutputs:
    """Outputs of the kernels: the loss per anchor, (G, N), fp32 at least, and what is saved for the backward."""

    loss: Tensor
    d_pos: Tensor
    d_neg: Tensor
    positive: Tensor
    negative: Tensor

    @property
    def saved(self) -> BatchHardSaved:
        """All but the loss."""
        return BatchHardSaved(**{name: value for name, value in vars(self).items() if name != "loss"})


@dataclass(frozen=True)
class BatchHardUpstream:
    """Gradients of the loss and of the two distances, (G, N), any strides; None for one that is not used."""

    d_loss: Tensor | None
    d_d_pos: Tensor | None
    d_d_neg: Tensor | None


@dataclass(frozen=True)
class BatchHardNeed:
    """Gradients to compute."""

    features: bool
    gallery: bool


@dataclass(frozen=True)
class BatchHardGradients:
    """Gradients of the features, (G, N, D), and of the gallery, (G, M, D); None where not needed."""

    features: Tensor | None
    gallery: Tensor | None
