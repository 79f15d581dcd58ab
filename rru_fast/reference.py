"""The paper's equations in plain autograd PyTorch: the oracle every other backend is held to.

Liu, Yuan, Zhou, Li, "Spatial and Temporal Mutual Promotion for Video-based Person Re-identification", AAAI 2019
(arXiv 1812.10305); equation numbers are the paper's. Written to be read, and to be right in float64.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Sequence
from functools import partial
from numbers import Integral, Real
from typing import Any, Literal, NamedTuple, cast

import torch
import torch.distributed
import torch.distributed.nn.functional
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed import GroupMember, ProcessGroup
from torch.distributed.nn.functional import all_reduce
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm
from torch.utils._pytree import _register_namedtuple

Attention = Literal["both", "spatial", "channel"]
Inputs = Literal["appearance+motion", "appearance", "raw"]
Metric = Literal["euclidean", "cosine"]
Reduction = Literal["mean", "none"]

FINITE = sys.float_info.max
SMALLEST = sys.float_info.min
# Hooks that make a layer's weight of others before each call, as torch.nn.utils hangs them there.
MAKES_WEIGHT = (BasePruningMethod, SpectralNorm, WeightNorm)

# Raised while torch.compile traces: it then runs the call as it is, or with fullgraph=True shows this.
OUTSIDE_GRAPHS = "process_group: got one inside torch.compile, wanted fullgraph=False: ranks talk outside of graphs"


class State(NamedTuple):
    """Where a video stands between two chunks: the last frame's maps and their refinement, both (B, C, H, W)."""

    x: Tensor
    s: Tensor


class Refined(NamedTuple):
    """What `refine` returns.

    features: S, (B, T, C, H, W).
    strips: S averaged over time and width, (B, C, H).
    state: what the video's next chunk starts from; `None` when batch statistics were used (training).
    """

    features: Tensor
    strips: Tensor
    state: State | None


for _returned in (State, Refined):  # so that torch.export can save a program that returns them
    _register_namedtuple(_returned, serialized_type_name=f"rru_fast.{_returned.__name__}")


def refine(
    x: Tensor,
    w: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w_s1: Tensor | None = None,
    w_s2: Tensor | None = None,
    w_c: Tensor | None = None,
    *,
    inputs: Inputs = "appearance+motion",
    running_mean: Tensor | None = None,
    running_var: Tensor | None = None,
    training: bool = False,
    momentum: float | Sequence[float] = 0.1,
    eps: float = 1e-3,
    bn_groups: int = 1,
    lengths: Tensor | None = None,
    state: State | None = None,
    process_group: ProcessGroup | None = None,
) -> Refined:
    """Eq. 1-5 and 9, frame by frame. Arguments as in `rru_fast.refine`."""
    if training and (lengths is not None or state is not None):
        raise ValueError("lengths, state: got them with batch statistics (training), wanted running ones (eval mode)")
    check_process_group(process_group, bn_groups)
    ranks = process_group if training and spans_ranks(process_group) else None
    if ranks is not None and torch.compiler.is_compiling():
        raise RuntimeError(OUTSIDE_GRAPHS)
    elements = sum(count_values(x, ranks)) if ranks is not None else 0
    if lengths is not None:
        lengths = lengths.to(x.device, torch.int64)

    def normalise(u: Tensor, momentum: float) -> Tensor:
        if not training:
            return F.batch_norm(u, running_mean, running_var, gamma, beta, False, momentum, eps)
        if ranks is not None:
            return _norm_over_ranks(u, running_mean, running_var, gamma, beta, momentum, eps, ranks, elements)
        # Like replicas under DataParallel: statistics of one's own each, buffers kept by the first.
        first, *others = u.chunk(bn_groups)
        parts = [F.batch_norm(first, running_mean, running_var, gamma, beta, True, momentum, eps)]
        parts += [F.batch_norm(u_g, None, None, gamma, beta, True, momentum, eps) for u_g in others]
        return torch.cat(parts) if others else parts[0]

    def gate(x_t: Tensor, s: Tensor, x_prev: Tensor, momentum: float) -> Tensor:
        if inputs == "raw":
            v = torch.cat((x_t, s), 1)
        elif inputs == "appearance":
            v = x_t - s
        else:
            v = torch.cat((x_t - s, x_t - x_prev), 1)
        y = F.relu(normalise(F.conv2d(v, w[:, :, None, None]), momentum))  # (B, D, H, W), eq. 1
        z: Tensor | None = None
        if w_s1 is not None and w_s2 is not None:  # eq. 2: (B, 1, H, W)
            z = F.linear(F.relu(F.linear(y.mean(1).flatten(1), w_s1)), w_s2).view(-1, 1, *y.shape[2:])
        if w_c is not None:  # eq. 3: (B, C, 1, 1)
            z_c = F.linear(y.mean((2, 3)), w_c)[:, :, None, None]
            z = z_c if z is None else z_c * z
        return torch.sigmoid(cast(Tensor, z))  # eq. 4

    # At t = 1 the past is X_1 itself, so S_1 = X_1 whatever the gate says; it runs for its running statistics.
    x_prev, s = state if state is not None else (x[:, 0], x[:, 0])
    alive: Tensor | None = None
    frames = x
    if lengths is not None:
        alive = torch.arange(x.shape[1], device=x.device) < lengths[:, None]  # (B, T)
        frames = x.masked_fill(~alive[:, :, None, None, None], 0)  # or NaN there would reach the gradients, as 0 * NaN
    refined = []
    for x_t, step in zip(frames.unbind(1), momenta(momentum, x.shape[1]), strict=True):
        z = gate(x_t, s, x_prev, step)
        s = s + z * (x_t - s)  # eq. 5
        x_prev = x_t
        refined.append(s)
    features = torch.stack(refined, 1)
    if alive is None or lengths is None:
        strips = features.mean((1, 4))  # eq. 9
        return Refined(features, strips, None if training else last_state(x, features, None))
    features = features.masked_fill(~alive[:, :, None, None, None], 0)
    strips = features.mean(4).sum(1) / lengths.to(x)[:, None, None]
    return Refined(features, strips, last_state(x, features, lengths))


def _norm_over_ranks(
    u: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    gamma: Tensor,
    beta: Tensor,
    momentum: float,
    eps: float,
    process_group: ProcessGroup,
    elements: int,
) -> Tensor:
    """F.batch_norm of u (B, D, H, W) in training, with the statistics of all ranks: `elements` values a channel."""
    if torch.compiler.is_compiling():  # by itself, where `refine` was left as it is: a graph's sum has another gradient
        raise RuntimeError(OUTSIDE_GRAPHS)
    total = partial(cast("Callable[..., Tensor]", all_reduce), group=process_group)
    wide = u.double()  # in which F.batch_norm sums on a CPU
    mean = total(wide.sum((0, 2, 3))) / elements
    centred = wide - mean[:, None, None]
    var = total(centred.square().sum((0, 2, 3))) / elements
    if running_mean is not None and running_var is not None:
        for running, step in ((running_mean, mean), (running_var, var * (elements / (elements - 1)))):
            running.mul_(1 - momentum).add_(step.detach().to(running), alpha=momentum)
    uhat = centred * (var[:, None, None] + eps).rsqrt()
    return (uhat * gamma[:, None, None] + beta[:, None, None]).to(u.dtype)


def last_state(x: Tensor, s: Tensor, lengths: Tensor | None) -> State:
    """Copies of each clip's last frame of x and of s, (B, T, C, H, W): the state that its next chunk starts from.

    Copies, so that the caller may reuse x's memory for the next chunk, and need not keep this one's.
    """
    if lengths is None:
        return State(x[:, -1].clone(), s[:, -1].clone())
    clip, last = torch.arange(x.shape[0], device=x.device), lengths - 1
    return State(x[clip, last], s[clip, last])


def strip_pool(s: Tensor) -> Tensor:
    """Eq. 9 alone: (B, T, C, H, W) averaged over time and width, (B, C, H)."""
    return s.mean((1, 4))


def batch_hard_triplet(
    features: Tensor,
    labels: Tensor,
    *,
    margin: float | Literal["soft"] = 0.3,
    metric: Metric = "euclidean",
    reduction: Reduction = "mean",
    return_indices: bool = False,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Eq. 8, and eq. 10 when features are (G, N, D). Arguments as in `rru_fast.batch_hard_triplet`."""
    if metric == "cosine":
        f = F.normalize(features, dim=-1)
        d = 1 - f @ f.mT
    else:
        square = features.square().sum(-1)
        d2 = square.unsqueeze(-1) + square.unsqueeze(-2) - 2 * features @ features.mT
        d = d2.clamp(min=1e-12).sqrt()
    same = labels[:, None] == labels
    d_pos, positive = d.masked_fill(~same, float("-inf")).max(-1)
    d_neg, negative = d.masked_fill(same, float("inf")).min(-1)
    gap = d_pos - d_neg  # -inf without a negative: no loss
    loss = F.softplus(gap) if margin == "soft" else F.relu(float(margin) + gap)
    if reduction == "mean":
        loss = loss.mean()
    if not return_indices:
        return loss
    return loss, positive, negative.masked_fill(same.all(-1), -1)


def gather_batch(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The batch of all ranks in rank order, with gradient: features (..., N, D), labels (N,), N equal everywhere."""
    if not torch.distributed.is_initialized():
        return features, labels
    all_labels = [torch.empty_like(labels) for _ in range(torch.distributed.get_world_size())]
    torch.distributed.all_gather(all_labels, labels.contiguous())
    all_features = torch.distributed.nn.functional.all_gather(features.contiguous())  # type: ignore[no-untyped-call]
    for part in all_features:
        if part.requires_grad:  # what is sent back takes the gradient's strides for those of a plain tensor
            part.register_hook(Tensor.contiguous)
    return torch.cat(all_features, -2), torch.cat(all_labels)


def spans_ranks(process_group: ProcessGroup | None) -> bool:
    """Whether there is anybody else in the group to share statistics with."""
    return process_group is not None and process_group.size() > 1


def count_values(x: Tensor, process_group: ProcessGroup) -> list[int]:
    """How many values of a gate channel a frame has on every rank, B H W; all wait for each other here.

    Raises:
        ValueError: on every rank, where not all bring as many frames: their statistics would not belong together.
    """
    clips, frames, _, height, width = x.shape
    own = torch.tensor([clips * height * width, frames], device=x.device)
    everyone = [torch.empty_like(own) for _ in range(process_group.size())]
    torch.distributed.all_gather(everyone, own, group=process_group)
    counts, all_frames = torch.stack(everyone).t().tolist()
    if len(set(all_frames)) > 1:
        raise ValueError(f"x: got {all_frames} frames on the ranks of process_group, wanted as many on every rank")
    return cast("list[int]", counts)


def check_process_group(process_group: Any, bn_groups: int) -> None:
    """Raise unless the process group, if any, is one that this rank is in and whose clips are a single group."""
    if process_group is None:
        return
    if not isinstance(process_group, ProcessGroup):
        outside = isinstance(process_group, int) and process_group == GroupMember.NON_GROUP_MEMBER
        got = "one that this rank is not in" if outside else repr(process_group)
        raise TypeError(f"process_group: got {got}, wanted a torch.distributed.ProcessGroup of this rank's, or None")
    if bn_groups != 1:
        raise ValueError(f"bn_groups: got {bn_groups} with a process_group, wanted 1: statistics are of all clips")


def check_sizes(**sizes: Any) -> None:
    """Raise ValueError unless every named value is an integer of at least 1."""
    for name, size in sizes.items():
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}: got {size!r}, wanted an integer of at least 1")


def check_number(name: str, value: Any, least: float, most: float, wanted: str) -> None:
    """Raise ValueError unless the value is a number from `least` to `most`, both included; NaN is not."""
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if not least <= number <= most:
        raise ValueError(f"{name}: got {value!r}, wanted {wanted}")


def check_loss(margin: Any, metric: Any) -> None:
    """Raise ValueError unless the margin is a finite number or "soft", and the metric one there is."""
    if not (isinstance(margin, str) and margin == "soft"):
        check_number("margin", margin, -FINITE, FINITE, "a finite number or 'soft'")
    if not isinstance(metric, str) or metric not in ("euclidean", "cosine"):
        raise ValueError(f"metric: got {metric!r}, wanted one of 'euclidean', 'cosine'")


def _only_reference(backend: str) -> None:
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend: got {backend!r}, wanted 'auto' or 'reference' (this is the reference module)")


def _group_of(norm: nn.Module) -> ProcessGroup | None:
    """The group over which torch's SyncBatchNorm would synchronise now; None where it, or another norm, would not."""
    if not (isinstance(norm, nn.SyncBatchNorm) and norm.training and torch.distributed.is_initialized()):
        return None
    group: ProcessGroup | None = norm.process_group or torch.distributed.group.WORLD
    return group


def momenta(momentum: float | Sequence[float], frames: int) -> list[float]:
    """The momentum of each frame's step of the running statistics."""
    return [float(step) for step in momentum] if isinstance(momentum, Sequence) else [float(momentum)] * frames


def weight_of(layer: Any) -> Tensor:
    """The weight of a layer that is read and not called, made anew where the layer's own call would have made it."""
    for hook in layer._forward_pre_hooks.values():
        if isinstance(hook, MAKES_WEIGHT):
            hook(layer, None)
    return cast(Tensor, layer.weight)


def _check_layer(name: str, layer: Any, kind: type[nn.Module]) -> None:
    """Only that is read of a layer which its kind has."""
    own = None if "forward" in vars(layer) else type(layer).forward
    if own is not kind.forward or getattr(layer, "bias", None) is not None:
        got = type(layer).__name__
        wanted = f"a {kind.__name__}" + " without bias" * (kind is not nn.ReLU)
        raise TypeError(f"{name}: got {got}, wanted {wanted}: its weight is read, its forward not called")


def norm_arguments(norm: Any, frames: int) -> dict[str, Any]:
    """What `refine` takes of the transition's batch norm, which may be a SyncBatchNorm, for so many frames."""
    if not isinstance(norm, _BatchNorm):
        raise TypeError(f"transition_norm: got {type(norm).__name__}, wanted a BatchNorm2d or SyncBatchNorm")
    momentum: float | list[float] | None = norm.momentum
    if momentum is None:  # the running statistics are the mean of all batches there were
        momentum = 0.0  # where they stay as they are
        if norm.training and norm.num_batches_tracked is not None:
            before = int(norm.num_batches_tracked)
            momentum = [1 / (before + frame) for frame in range(1, frames + 1)]
    return {
        "gamma": norm.weight,
        "beta": norm.bias,
        "running_mean": norm.running_mean,
        "running_var": norm.running_var,
        # What BatchNorm itself goes by: a frozen norm in a training model uses its running statistics.
        "training": norm.training or norm.running_mean is None,
        "momentum": momentum,
        "eps": norm.eps,
        "process_group": _group_of(norm),
    }


def count_frames(norm: Any, frames: int) -> None:
    """Note that the batch norm has seen a batch a frame, as it does where it is called."""
    if norm.training and norm.num_batches_tracked is not None:
        norm.num_batches_tracked.add_(frames)


class RRU(nn.Module):
    """The Refining Recurrent Unit, eq. 1-5; constructor and state_dict as `rru_fast.RRU`, which documents them."""

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
        self.transition = nn.Conv2d(channels if inputs == "appearance" else 2 * channels, hidden, 1, bias=False)
        self.transition_norm = nn.BatchNorm2d(hidden, eps=bn_eps, momentum=bn_momentum)
        if attention != "channel":
            self.spatial_attention = nn.Sequential(
                nn.Linear(positions, spatial_hidden, bias=False),
                nn.ReLU(),
                nn.Linear(spatial_hidden, positions, bias=False),
            )
        if attention != "spatial":
            self.channel_attention = nn.Linear(hidden, channels, bias=False)

    def _choose_backend(self, backend: str, cuda_graph: bool) -> None:
        _only_reference(backend)
        if cuda_graph is not False:
            raise ValueError(f"cuda_graph: got {cuda_graph!r}, wanted False (this is the reference module)")

    def _refine(self, x: Tensor, **arguments: object) -> Refined:
        return refine(x, **arguments)  # type: ignore[arg-type]

    def forward(self, x: Tensor, lengths: Tensor | None = None, state: State | None = None) -> Refined:
        """x (B, T, C, H, W) to `Refined`; `lengths` (B,) and `state` in eval mode only."""
        self._check(x)
        norm = norm_arguments(self.transition_norm, x.shape[1])
        self._check_training(x, norm["training"])
        spatial = self.spatial_attention if self.attention != "channel" else None
        out = self._refine(
            x,
            w=weight_of(self.transition).flatten(1),
            w_s1=weight_of(spatial[0]) if spatial is not None else None,
            w_s2=weight_of(spatial[2]) if spatial is not None else None,
            w_c=weight_of(self.channel_attention) if self.attention != "spatial" else None,
            inputs=self.inputs,
            bn_groups=self.bn_groups,
            lengths=lengths,
            state=state,
            **norm,
        )
        count_frames(self.transition_norm, x.shape[1])
        return out

    def _check(self, x: Tensor) -> None:
        """What the module knows beyond its weights' shapes, and that it still has the layers it reads."""
        if not isinstance(x, Tensor):
            raise TypeError(f"x: got {type(x).__name__}, wanted a tensor (B, T, C, H, W)")
        if x.dim() != 5 or x.shape[2] != self.channels or x.shape[1] < 1 or x.shape[0] < 1:
            raise ValueError(
                f"x: got shape {tuple(x.shape)}, wanted (B, T, C={self.channels}, H, W), B and T at least 1"
            )
        if self.attention != "channel" and tuple(x.shape[3:]) != self.spatial:
            raise ValueError(f"x: got maps of {tuple(x.shape[3:])}, wanted spatial={self.spatial}")
        _check_layer("transition", self.transition, nn.Conv2d)
        if self.attention != "channel":
            for n, kind in enumerate((nn.Linear, nn.ReLU, nn.Linear)):
                _check_layer(f"spatial_attention.{n}", self.spatial_attention[n], kind)
        if self.attention != "spatial":
            _check_layer("channel_attention", self.channel_attention, nn.Linear)

    def _check_training(self, x: Tensor, training: bool) -> None:
        if training and x.shape[0] % self.bn_groups:
            raise ValueError(f"x: got {x.shape[0]} clips, wanted a multiple of bn_groups={self.bn_groups}")
        if training and self.bn_groups > 1 and isinstance(self.transition_norm, nn.SyncBatchNorm):
            raise ValueError(f"transition_norm: got SyncBatchNorm, wanted BatchNorm2d with bn_groups={self.bn_groups}")

    def extra_repr(self) -> str:
        return (
            f"{self.channels}, spatial={self.spatial}, attention={self.attention!r}, "
            f"inputs={self.inputs!r}, bn_groups={self.bn_groups}"
        )


class BatchHardTripletLoss(nn.Module):
    """Batch-hard triplet loss, eq. 8 and 10; constructor as `rru_fast.BatchHardTripletLoss`, which documents it."""

    def __init__(
        self,
        margin: float | Literal["soft"] = 0.3,
        metric: Metric = "euclidean",
        gather: bool = False,
        backend: str = "auto",
    ) -> None:
        super().__init__()
        check_loss(margin, metric)
        if not isinstance(gather, bool):
            raise TypeError(f"gather: got {gather!r}, wanted True or False")
        self._choose_backend(backend)
        self.margin, self.metric, self.gather = margin, metric, gather

    def _choose_backend(self, backend: str) -> None:
        _only_reference(backend)

    def _loss(self, features: Tensor, labels: Tensor) -> Tensor:
        return cast(Tensor, batch_hard_triplet(features, labels, margin=self.margin, metric=self.metric))

    def forward(self, features: Tensor, labels: Tensor) -> Tensor:
        """features (N, D) or (G, N, D), labels (N,), to the scalar mean over anchors (and groups)."""
        for name, tensor, wanted in (("features", features, "(N, D) or (G, N, D)"), ("labels", labels, "(N,)")):
            if not isinstance(tensor, Tensor):
                raise TypeError(f"{name}: got {type(tensor).__name__}, wanted a tensor {wanted}")
        if features.dim() not in (2, 3) or 0 in features.shape:
            got = tuple(features.shape)
            raise ValueError(f"features: got shape {got}, wanted (N, D) or (G, N, D), every size at least 1")
        if labels.shape != features.shape[-2:-1]:
            got, n = tuple(labels.shape), tuple(features.shape[-2:-1])
            raise ValueError(f"labels: got shape {got}, wanted {n} = (N,), one a feature")
        if self.gather:
            features, labels = gather_batch(features, labels)
        return self._loss(features, labels)

    def extra_repr(self) -> str:
        return f"margin={self.margin!r}, metric={self.metric!r}, gather={self.gather}"
