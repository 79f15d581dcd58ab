"""Forward of a swapped batch-hard loss: its own signature and return value around the operator."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from rru_fast import functional
from rru_fast.compat import binding, watch
from rru_fast.distributed import world_size
from rru_fast.reference.equations import reduce
from rru_fast.types import Metric, Reduction

Kind = Literal["hinge", "soft", "shifted soft"]
Norm = Literal["none", "clamped", "added"]
KINDS: dict[Kind, Callable[[Tensor, float], Tensor]] = {  # loss of gap = D_pos - D_neg and margin
    "hinge": lambda gap, margin: F.relu(margin + gap),
    "soft": lambda gap, margin: -F.logsigmoid(-gap),  # softplus, which PyTorch rounds to gap above 20
    "shifted soft": lambda gap, margin: -F.logsigmoid(-margin - gap),
}
NORMS: dict[Norm, Callable[[Tensor], Tensor]] = {  # features (N, D) as their distances are taken
    "none": lambda features: features,
    "clamped": lambda features: _divide(features, _norms(features).clamp_min(1e-12)),  # as F.normalize
    "added": lambda features: _divide(features, _norms(features) + 1e-12),
}
# The operator's least Euclidean distance, up to rounding; other libraries have none.
AT_FLOOR = 1e-6 * (1 + 1e-6)
EXTRAS: dict[str, Callable[[Tensor, Tensor], Any]] = {  # further return values, of D_pos and D_neg
    "d_pos": lambda d_pos, d_neg: d_pos.clone(),  # the operator has saved them for its backward
    "d_neg": lambda d_pos, d_neg: d_neg.clone(),
    "precision": lambda d_pos, d_neg: (d_neg > d_pos).sum() / len(d_pos),
    "precision with ties": lambda d_pos, d_neg: (d_neg >= d_pos).sum() / len(d_pos),
    "count": lambda d_pos, d_neg: (d_neg > d_pos).sum(),
    "count with ties": lambda d_pos, d_neg: (d_neg >= d_pos).sum(),
    "float precision": lambda d_pos, d_neg: ((d_neg > d_pos).sum() / len(d_pos)).item(),
    "float precision with ties": lambda d_pos, d_neg: ((d_neg >= d_pos).sum() / len(d_pos)).item(),
    "int count": lambda d_pos, d_neg: (d_neg > d_pos).sum().item(),
    "int count with ties": lambda d_pos, d_neg: (d_neg >= d_pos).sum().item(),
}


def _norms(features: Tensor) -> Tensor:
    norms: Tensor = torch.linalg.vector_norm(features, dim=-1, keepdim=True)
    return norms


def _divide(features: Tensor, norms: Tensor) -> Tensor:
    """Return features / norms. A product with 1 / norms has the cheaper gradient, but overflows float16."""
    return features / norms if features.dtype == torch.float16 else features * norms.reciprocal()


class Formula(NamedTuple):
    """A batch-hard loss: of each anchor scale * kind(a D_pos - b D_neg, margin), reduced."""

    metric: Metric
    norm: Norm
    kind: Kind
    margin: float
    factors: tuple[float, float]
    """a and b."""
    scale: float
    reduction: Reduction
    returns: type[Any] | None
    """tuple or list; None for the loss alone."""
    extras: tuple[str, ...]
    """Names in EXTRAS of what is returned after the loss."""

    def __call__(self, features: Tensor, labels: Tensor, *, mask: Tensor | None, backend: str) -> Any:
        """Return what the loss returns for features (N, D) and integer labels (N,); `mask` selects anchors."""
        features = NORMS[self.norm](features)
        exact = self.kind == "hinge" or (self.kind == "soft" and features.dtype != torch.float64)
        by_operator = exact and self.factors == (1, 1) and mask is None
        loss, d_pos, d_neg = functional.batch_hard_triplet(
            features,
            labels,
            margin=self.margin if self.kind == "hinge" else "soft",
            metric=self.metric,
            reduction=self.reduction if by_operator else "none",
            return_distances=True,
            backend=backend,
        )
        if not by_operator:
            a, b = self.factors
            d_pos, d_neg = d_pos if a == 1 else a * d_pos, d_neg if b == 1 else b * d_neg
            if mask is not None:
                d_pos, d_neg = d_pos[mask], d_neg[mask]
            loss = reduce(KINDS[self.kind](d_pos - d_neg, self.margin), self.reduction)
        if self.scale != 1:
            loss = loss * self.scale
        if self.returns is None:
            return loss
        return self.returns((loss, *(EXTRAS[name](d_pos, d_neg) for name in self.extras)))


class Call(NamedTuple):
    """How a loss is called."""

    parameters: tuple[str, ...]
    """Names, in order."""
    features: tuple[str, ...]
    """Those that take the features; if several, the same tensor."""
    labels: tuple[str, ...]
    unused: tuple[str, ...]
    """Those whose value makes no difference."""
    others: dict[str, Any]
    """All others, and the value that each must have."""
    norm: Norm
    """What normalize_feature=True does, if it is one of `others` with False as its default; otherwise "none"."""
    mask: bool
    """Whether `mask`, one of `others`, is served with any value."""
    label_kinds: tuple[str, ...]
    """Which of "float", "bool" and "column", (N, 1), it takes like integers (N,)."""
    dtypes: dict[torch.dtype, torch.dtype]
    """Of the loss, by that of the features, where the two differ."""


class Form(NamedTuple):
    """How a loss is called, what it computes, and as long as what."""

    call: Call
    formula: Formula
    watches: watch.Watches
    """Attributes that must not change."""
    world_size: int | None
    """Number of ranks that must not change; None if it makes no difference."""


def forward(loss: Any, backend: str, form: Form, *args: Any, **kwargs: Any) -> Any:
    """Compute a swapped loss by the operator, or by its own forward where that may give something else, with a warning.

    An anchor without a negative has loss 0, where many originals raise; of equally hard partners the first gets the
    gradient that some originals share among them.
    """
    inputs, reason = _read(form.call, args, kwargs)
    if inputs is None:
        return binding.run_original(loss, reason, *args, **kwargs)
    name = watch.changed(form.watches)
    if name is not None:
        return binding.run_original(loss, f"its {name} is not what it was when it was swapped", *args, **kwargs)
    if form.world_size is not None and world_size() != form.world_size:
        reason = f"it calls torch.distributed, which now has {world_size()} ranks"
        return binding.run_original(loss, reason, *args, **kwargs)
    features, labels, normalized, mask = inputs
    dtype = form.call.dtypes.get(features.dtype)
    # fp32 at least, so that a narrow loss is not rounded before it is cast.
    wide = widened(features) if dtype is None else features.to(torch.promote_types(features.dtype, dtype))
    formula = form.formula._replace(norm=form.call.norm) if normalized else form.formula
    out = formula(wide, label_codes(labels, features), mask=mask, backend=backend)
    return out if dtype in (None, wide.dtype) else _cast(out, dtype)


def widened(features: Tensor) -> Tensor:
    """Return features in fp32 under autocast, which runs PyTorch's losses in it, otherwise unchanged."""
    narrow = features.dtype in (torch.float16, torch.bfloat16)
    return features.float() if narrow and torch.is_autocast_enabled(features.device.type) else features


def _cast(out: Any, dtype: Any) -> Any:
    if isinstance(out, tuple | list):
        return type(out)(_cast(value, dtype) for value in out)
    return out.to(dtype) if isinstance(out, Tensor) and out.is_floating_point() else out


def _read(call: Call, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...] | None, str]:
    """Return (features, labels, normalize_feature, mask) of a call, or None and why the operator does not serve it."""
    values = dict(zip(call.parameters, args, strict=False))
    values.update(kwargs)
    if len(values) != len(args) + len(kwargs):
        return None, "it is called with more arguments than it takes"
    found = []
    for names in (call.features, call.labels):
        if names[0] not in values:
            return None, f"it is called without {names[0]}"
        first = values.pop(names[0])
        found.append(first)
        for name in names[1:]:
            if values.pop(name, None) is not first:
                return None, f"it is called with a {name} that is not its {names[0]}"
    features, labels = found
    for name in call.unused:
        values.pop(name, None)
    normalized = call.norm != "none" and bool(values.pop("normalize_feature", False))
    mask = values.pop("mask", None) if call.mask else None
    for name, value in values.items():
        if name not in call.others or not watch.is_same(value, call.others[name]):
            return None, f"it is called with {name}"
    if not isinstance(features, Tensor) or features.dim() != 2 or not features.is_floating_point():
        return None, f"its {call.features[0]} are not of shape (N, D)"
    kind = _label_kind(labels, len(features))
    if kind and kind not in call.label_kinds:
        return None, f"its {call.labels[0]} are {kind}"
    return (features, labels, normalized, mask), ""


def _label_kind(labels: Any, n: int) -> str:
    """Return "" for integers (N,), "float", "bool" or "column", or for others what they are."""
    if not isinstance(labels, Tensor) or labels.is_complex():
        return f"a {type(labels).__name__}"
    if labels.dim() == 2 and labels.shape == (n, 1) and not labels.is_floating_point() and labels.dtype != torch.bool:
        return "column"
    if labels.dim() != 1 or len(labels) != n:
        return f"of shape {tuple(labels.shape)}"
    return "float" if labels.is_floating_point() else "bool" if labels.dtype == torch.bool else ""


def label_codes(labels: Tensor, features: Tensor) -> Tensor:
    """Return integers (N,), equal where labels are, on the features' device."""
    labels = labels.flatten().to(features.device)
    if labels.is_floating_point():
        bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[labels.element_size()]
        return (labels + 0.0).view(bits)  # -0.0 + 0.0 is 0.0
    return labels.to(torch.uint8) if labels.dtype == torch.bool else labels
