"""Access per frame to X and S, and to the gradients that reach each frame from the outputs."""

from __future__ import annotations

import torch
from torch import Tensor

from rru_fast.arguments import RefineUpstream


def length_mask(lengths: Tensor, frames: int) -> Tensor:
    """Return a mask (B, T, 1, 1), True where t < length."""
    return (torch.arange(frames, device=lengths.device) < lengths[:, None])[:, :, None, None]


class Frames:
    """X or S, (B, T, C, H, W), read as one frame (B, C, P) in the accumulation dtype; index -1 is the state's frame."""

    def __init__(self, x: Tensor, state: Tensor | None, lengths: Tensor | None, acc_dtype: torch.dtype) -> None:
        self.x = x.flatten(3)  # (B, T, C, P)
        if lengths is not None:  # padding may be NaN
            self.x = self.x.masked_fill(~length_mask(lengths, x.shape[1]), 0)
        self.state = None if state is None else state.flatten(2)
        self.acc_dtype = acc_dtype

    def __getitem__(self, t: int) -> Tensor:
        frame = self.state if t < 0 else self.x[:, t]
        assert frame is not None
        return frame.to(self.acc_dtype)

    def input_operand(self, inputs: str, t: int, out: Tensor) -> Tensor:
        """Write the operand of w_input at frame t: X_t for raw inputs, else X_t - X_{t-1}, subtracted unrounded."""
        if inputs == "raw":
            return out.copy_(self[t])
        return torch.sub(self[t], self[t - 1], out=out)


class UpstreamFrames:
    """Gradient that reaches each frame's S, (B, C, P), from features and strips."""

    def __init__(
        self, upstream: RefineUpstream, lengths: Tensor | None, shape: torch.Size, acc_dtype: torch.dtype
    ) -> None:
        clips, frames, channels, height, width = shape
        self.padding = None if lengths is None else ~length_mask(lengths, frames)
        self.d_features = None if upstream.d_features is None else upstream.d_features.flatten(3)
        self.d_strips: Tensor | None = None  # (B, C, P), the same for every frame
        if upstream.d_strips is not None:
            count = frames if lengths is None else lengths[:, None, None].to(acc_dtype)
            per_frame = upstream.d_strips.to(acc_dtype) / count / width
            self.d_strips = per_frame[..., None].expand(-1, -1, -1, width).reshape(clips, channels, height * width)

    def add_to(self, g: Tensor, t: int) -> Tensor:
        """Add the gradient of frame t to g in place."""
        parts = (None if self.d_features is None else self.d_features[:, t], self.d_strips)
        for part in parts:
            if part is not None:
                g += part if self.padding is None else part.masked_fill(self.padding[:, t], 0)
        return g
