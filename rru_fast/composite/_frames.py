"""Maps frame by frame: reading X and S, and what their gradients bring to each frame."""

from __future__ import annotations

import torch
from torch import Tensor


def alive(lengths: Tensor, frames: int) -> Tensor:
    """(B, T, 1, 1), true where a clip has a frame."""
    return (torch.arange(frames, device=lengths.device) < lengths[:, None])[:, :, None, None]


class Frames:
    """X as (B, T, C, P), frame by frame in the arithmetic dtype, with the frame before the first at index -1."""

    def __init__(self, x: Tensor, before: Tensor | None, lengths: Tensor | None, dtype: torch.dtype) -> None:
        self.maps = x.flatten(3)
        if lengths is not None:  # padding may hold anything
            self.maps = self.maps.masked_fill(~alive(lengths, x.shape[1]), 0)
        self.before = None if before is None else before.flatten(2)
        self.dtype = dtype

    def __getitem__(self, t: int) -> Tensor:
        frame = self.before if t < 0 else self.maps[:, t]
        assert frame is not None
        return frame.to(self.dtype)

    def hoistable(self, inputs: str, t: int, out: Tensor) -> Tensor:
        """What `hoisted` multiplies at frame t: X_t for raw inputs, else the motion X_t - X_{t-1} in full precision."""
        if inputs == "raw":
            return out.copy_(self[t])
        return torch.sub(self[t], self[t - 1], out=out)


class Upstream:
    """What the outputs' gradients add to each frame's S, (B, C, P)."""

    def __init__(
        self,
        d_features: Tensor | None,
        d_strips: Tensor | None,
        lengths: Tensor | None,
        shape: torch.Size,
        dtype: torch.dtype,
    ) -> None:
        clips, frames, channels, height, width = shape
        self.padding = None if lengths is None else ~alive(lengths, frames)
        self.features = None if d_features is None else d_features.flatten(3)
        self.strips = None
        if d_strips is not None:
            count = frames if lengths is None else lengths[:, None, None].to(dtype)
            share = d_strips.to(dtype) / count / width
            self.strips = share[..., None].expand(-1, -1, -1, width).reshape(clips, channels, height * width)

    def add_to(self, g: Tensor, t: int) -> Tensor:
        """g += the gradient of frame t, in place."""
        parts = (None if self.features is None else self.features[:, t], self.strips)
        for part in parts:
            if part is not None:
                g += part if self.padding is None else part.masked_fill(self.padding[:, t], 0)
        return g
