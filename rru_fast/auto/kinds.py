"""Kinds of calls: calls of one kind share one decision.

A call is first looked up by its key, a tuple of what is at hand; only an unknown key is made into a kind.
"""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass, fields, replace
from typing import Any, ClassVar, Literal, TypeVar

import torch
from torch import Tensor

from rru_fast import cuda
from rru_fast.triton._launch import next_power_of_2

Layout = Literal["contiguous", "channels last", "strided"]
Key = tuple[Any, ...]
"""Device, strides and settings of precision, then all else that a kind is made of."""

_K = TypeVar("_K", bound="Kind")


@dataclass(frozen=True)
class Kind:
    """Properties of a call that decide which backend is the fastest. Sizes are exact until `rounded`."""

    op: ClassVar[str]
    rounded_sizes: ClassVar[tuple[str, ...]]
    """Sizes that vary from batch to batch: a kind's are powers of 2."""
    exact_sizes: ClassVar[tuple[str, ...]]

    dtype: str
    """Of the main input, such as "float32"."""
    gradients: bool
    """A backward may follow."""
    layout: Layout

    def rounded(self: _K) -> _K:
        """Return the kind of which this is a call: varying sizes rounded up to powers of 2."""
        sizes = {name: getattr(self, name) for name in self.rounded_sizes}
        sizes = {name: next_power_of_2(size) if size else 0 for name, size in sizes.items()}
        return replace(self, **sizes)  # type: ignore[arg-type]

    @property
    def sizes(self) -> tuple[int, ...]:
        """All sizes."""
        return tuple(getattr(self, name) for name in (*self.rounded_sizes, *self.exact_sizes))

    @property
    def category(self) -> tuple[Any, ...]:
        """All but the sizes that vary: kinds of one category run the same kernels."""
        return self.op, *(value for name, value in asdict(self).items() if name not in self.rounded_sizes)

    def is_carried(self, backend: str) -> bool:
        """Return True if a backend's own kernels run these calls, not those that it falls back to."""
        return backend != "cuda" or cuda.not_carried(self.op) is None

    def to_json(self) -> dict[str, Any]:
        """Return the kind as JSON values; `from_json` reads them."""
        return {"op": self.op, **asdict(self)}

    def __str__(self) -> str:
        return ", ".join(word for word in (self.op, *self._words()) if word)

    def _words(self) -> tuple[str, ...]:
        """Return the properties in words, "" for those that need none."""
        return ()

    def _shared_words(self) -> str:
        return self.layout if self.layout != "contiguous" else ""


@dataclass(frozen=True)
class RefineKind(Kind):
    """Calls of `refine`."""

    op = "refine"
    rounded_sizes = ("clips", "frames")
    exact_sizes = ("channels", "height", "width", "hidden", "spatial_hidden")

    weight_dtype: str
    precision: str
    """Of fp32 products, from `product_precision`."""
    training: bool
    inputs: str
    attention: str
    clips: int
    frames: int
    channels: int
    height: int
    width: int
    hidden: int
    spatial_hidden: int
    """A; 0 without spatial attention."""
    graphed: bool = False
    """Run as a CUDA graph of the module."""

    @classmethod
    def from_key(cls, key: Key) -> RefineKind:
        """Return the exact kind of a key made by `refine_key`."""
        device, stride, setting, dtype, shape, weight_dtype, w_shape, spatial_hidden, channel, *rest = key
        inputs, training, gradients, graphed = rest
        clips, frames, channels, height, width = shape
        return cls(
            dtype=dtype_name(dtype),
            gradients=gradients,
            layout=layout_of(shape, stride),
            weight_dtype=dtype_name(weight_dtype),
            precision=product_precision(device, dtype, setting),
            training=training,
            inputs=inputs,
            attention="channel" if spatial_hidden == 0 else "both" if channel else "spatial",
            clips=clips,
            frames=frames,
            channels=channels,
            height=height,
            width=width,
            hidden=w_shape[0],
            spatial_hidden=spatial_hidden,
            graphed=graphed,
        )

    def is_carried(self, backend: str) -> bool:
        """Return True if a backend's own kernels run these calls, not those that it falls back to."""
        sizes = self.channels, self.height * self.width, self.hidden, self.spatial_hidden
        call = self.op, self.dtype, self.inputs, self.training, self.precision
        return backend != "cuda" or cuda.not_carried(*call, *sizes) is None

    def _words(self) -> tuple[str, ...]:
        weights = f" with {self.weight_dtype} weights" if self.weight_dtype != self.dtype else ""
        return (
            "training" if self.training else "eval",
            "" if self.gradients else "no gradients",
            f"{self.dtype}{weights}" + (f" ({self.precision})" if self.precision else ""),
            " x ".join(map(str, (self.clips, self.frames, self.channels, self.height, self.width))),
            f"D {self.hidden}" + (f" A {self.spatial_hidden}" if self.spatial_hidden else ""),
            self.attention if self.attention != "both" else "",
            self.inputs if self.inputs != "appearance+motion" else "",
            self._shared_words(),
            "CUDA graph" if self.graphed else "",
        )


@dataclass(frozen=True)
class StripPoolKind(Kind):
    """Calls of `strip_pool`."""

    op = "strip_pool"
    rounded_sizes = ("clips", "frames")
    exact_sizes = ("channels", "height", "width")

    clips: int
    frames: int
    channels: int
    height: int
    width: int

    @classmethod
    def from_key(cls, key: Key) -> StripPoolKind:
        """Return the exact kind of a key made by `strip_pool_key`."""
        _, stride, _, dtype, shape, gradients = key
        return cls(dtype_name(dtype), gradients, layout_of(shape, stride), *shape)

    def _words(self) -> tuple[str, ...]:
        shape = " x ".join(map(str, (self.clips, self.frames, self.channels, self.height, self.width)))
        return "" if self.gradients else "no gradients", self.dtype, shape, self._shared_words()


@dataclass(frozen=True)
class BatchHardKind(Kind):
    """Calls of `batch_hard_triplet`."""

    op = "batch_hard"
    rounded_sizes = ("groups", "anchors", "gallery")
    exact_sizes = ("columns",)

    precision: str
    """Of fp32 products, from `product_precision`."""
    metric: str
    groups: int
    anchors: int
    gallery: int
    """M; 0 without one."""
    columns: int
    """D."""

    @classmethod
    def from_key(cls, key: Key) -> BatchHardKind:
        """Return the exact kind of a key made by `batch_hard_key`."""
        device, stride, setting, dtype, shape, gallery_shape, metric, gradients = key
        return cls(
            dtype=dtype_name(dtype),
            gradients=gradients,
            layout="contiguous" if stride[-1] == 1 or shape[-1] == 1 else "strided",
            precision=product_precision(device, dtype, setting),
            metric=metric,
            groups=shape[0] if len(shape) == 3 else 1,
            anchors=shape[-2],
            gallery=0 if gallery_shape is None else gallery_shape[-2],
            columns=shape[-1],
        )

    def _words(self) -> tuple[str, ...]:
        groups = f"{self.groups} x " if self.groups > 1 else ""
        return (
            "" if self.gradients else "no gradients",
            self.dtype + (f" ({self.precision})" if self.precision else ""),
            f"{groups}{self.anchors} x {self.columns}" + (f" in {self.gallery}" if self.gallery else ""),
            self.metric if self.metric != "euclidean" else "",
            self._shared_words(),
        )


KINDS: dict[str, type[Any]] = {kind.op: kind for kind in (RefineKind, StripPoolKind, BatchHardKind)}


def refine_key(
    x: Tensor,
    w: Tensor,
    w_s1: Tensor | None,
    w_c: Tensor | None,
    inputs: str,
    training: bool,
    gradients: bool,
    graphed: bool = False,
) -> Key:
    """Return the key of a call of `refine`."""
    return (
        x.device,
        x.stride(),
        _setting("conv"),
        x.dtype,
        x.shape,
        w.dtype,
        w.shape,
        0 if w_s1 is None else w_s1.shape[0],
        w_c is not None,
        inputs,
        training,
        gradients,
        graphed,
    )


def strip_pool_key(
    device: torch.device, dtype: torch.dtype, shape: torch.Size, stride: tuple[int, ...] | None, gradients: bool
) -> Key:
    """Return the key of a call of `strip_pool` on s of this shape; stride None if it is not known."""
    return device, stride, None, dtype, shape, gradients


def batch_hard_key(features: Tensor, gallery: Tensor | None, metric: str, gradients: bool) -> Key:
    """Return the key of a call of `batch_hard_triplet`."""
    return (
        features.device,
        features.stride(),
        _setting("matmul"),
        features.dtype,
        features.shape,
        None if gallery is None else gallery.shape,
        metric,
        gradients,
    )


def across_passes(key: Key) -> Key:
    """Return the part of a key that a forward and its backward share: not strides and settings, which may change."""
    return key[0], *key[3:]


def from_json(values: Any) -> Kind:
    """Return the kind that `Kind.to_json` described.

    Raises:
        KeyError, TypeError: it did not.
    """
    rest = dict(values)
    kind: Kind = KINDS[rest.pop("op")](**rest)
    types = {"str": str, "bool": bool, "int": int, "Layout": str}
    for field in fields(kind):
        if type(getattr(kind, field.name)) is not types[str(field.type)]:
            raise TypeError(f"kind: got {field.name} {getattr(kind, field.name)!r}, wanted {field.type}")
    return kind


def _setting(op: str) -> str:
    """Return PyTorch's precision of fp32 products; `torch.backends.cudnn.conv.fp32_precision` takes 1 us."""
    return torch._C._get_fp32_precision_getter("cuda", op)  # type: ignore[attr-defined,no-any-return]


def product_precision(device: torch.device, dtype: torch.dtype, setting: str) -> str:
    """Precision of fp32 products on a GPU: "tf32" or "ieee", after a slash triton's if RRU_FAST_FLOAT32 asks for one.

    16-bit dtypes are multiplied in fp32 by composite, and so have one too. "" where there is no choice.
    """
    if dtype == torch.float64 or device.type != "cuda":
        return ""
    # Not part of a key, to save its time: Triton's kernels follow a change, the decision on a known call does not.
    asked = os.environ.get("RRU_FAST_FLOAT32")
    return ("tf32" if setting == "tf32" else "ieee") + (f"/{asked}" if asked else "")


def layout_of(shape: tuple[int, ...], stride: tuple[int, ...] | None) -> Layout:
    """Return the layout of maps (B, T, C, H, W)."""
    if stride is None:
        return "contiguous"
    expected = 1
    for size, step in zip(reversed(shape), reversed(stride), strict=True):
        if size != 1 and step != expected:
            return "channels last" if stride[2] == 1 else "strided"
        expected *= size
    return "contiguous"


def dtype_name(dtype: torch.dtype) -> str:
    """Return a dtype's name without "torch."."""
    return str(dtype).removeprefix("torch.")
