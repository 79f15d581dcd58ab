"""Argument checks of the public operators. Every message names the argument, what it got and what it wanted."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from numbers import Integral, Real
from typing import Any, get_args

import torch
from torch import Tensor, nn
from torch.distributed import GroupMember, ProcessGroup

from rru_fast.distributed import spans_ranks
from rru_fast.types import Inputs, Metric, Reduction, State

DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)
INPUTS = get_args(Inputs)
FINITE = sys.float_info.max
SMALLEST = sys.float_info.min


def check_dense(name: str, tensor: Any, meaning: str) -> None:
    """Raise TypeError unless `tensor` is a dense tensor."""
    if not isinstance(tensor, Tensor):
        raise TypeError(f"{name}: got {type(tensor).__name__}, wanted a tensor {meaning}")
    if tensor.is_nested:
        raise TypeError(f"{name}: got a nested tensor, wanted a dense tensor {meaning}")
    if tensor.layout != torch.strided:
        raise TypeError(f"{name}: got layout {tensor.layout}, wanted a dense tensor {meaning}")


def check_process_group(process_group: Any, bn_groups: int) -> None:
    """Raise unless `process_group` is None, or contains this rank and bn_groups is 1."""
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
        if type(size) is int and size >= 1:  # as almost always
            continue
        if not isinstance(size, Integral) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}: got {size!r}, wanted an integer of at least 1")


def check_number(name: str, value: Any, least: float, most: float, wanted: str) -> None:
    """Raise ValueError unless `value` is a number in [least, most]; NaN is not."""
    if type(value) is float and least <= value <= most:  # as almost always
        return
    try:
        number = float(value) if isinstance(value, Real) and not isinstance(value, bool) else math.nan
    except OverflowError:  # an integer beyond all floats
        number = math.inf
    if not least <= number <= most:
        raise ValueError(f"{name}: got {value!r}, wanted {wanted}")


def check_loss(margin: Any, metric: Any, reduction: Any) -> None:
    """Raise ValueError unless `margin` is a finite number or "soft", and `metric` and `reduction` are known."""
    if not (isinstance(margin, str) and margin == "soft"):
        check_number("margin", margin, -FINITE, FINITE, "a finite number or 'soft'")
    check_choice("metric", metric, get_args(Metric))
    check_choice("reduction", reduction, get_args(Reduction))


def check_flags(**flags: Any) -> None:
    """Raise TypeError unless every named value is True or False."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise TypeError(f"{name}: got {flag!r}, wanted True or False")


def check_layer(name: str, layer: Any, kind: type[nn.Module]) -> None:
    """Raise TypeError unless `layer` is a plain `kind` without bias: its weight is read, its forward not called."""
    own = None if "forward" in vars(layer) else type(layer).forward
    if own is not kind.forward or getattr(layer, "bias", None) is not None:
        got = type(layer).__name__
        wanted = f"a {kind.__name__}" + " without bias" * (kind is not nn.ReLU)
        raise TypeError(f"{name}: got {got}, wanted {wanted}: its weight is read, its forward not called")


def check_reference_backend(backend: Any) -> None:
    """Raise ValueError unless `backend` is one that the reference modules accept."""
    if backend not in ("auto", "reference"):
        raise ValueError(f"backend: got {backend!r}, wanted 'auto' or 'reference' (this is the reference module)")


def _shape(name: str, tensor: Any, wanted: tuple[int, ...], meaning: str) -> None:
    check_dense(name, tensor, meaning)
    if tuple(tensor.shape) != wanted:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {wanted} = {meaning}")


def _device(name: str, tensor: Tensor, like: Tensor, like_name: str) -> None:
    if tensor.device != like.device:
        raise ValueError(f"{name}: got device {tensor.device}, wanted {like.device} as {like_name}")


def check_choice(name: str, value: Any, choices: tuple[str, ...]) -> None:
    """Raise ValueError unless `value` is one of `choices`."""
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{name}: got {value!r}, wanted one of {', '.join(map(repr, choices))}")


def _floating(name: str, tensor: Any, dims: tuple[int, ...], meaning: str) -> None:
    check_dense(name, tensor, meaning)
    if tensor.dim() not in dims:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {meaning}")
    if tensor.dtype not in DTYPES:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, wanted float64, float32, float16 or bfloat16")
    if 0 in tensor.shape:
        raise ValueError(f"{name}: got shape {tuple(tensor.shape)}, wanted {meaning}, every size at least 1")


def _weight(name: str, tensor: Tensor, x: Tensor, wanted: tuple[int, ...], meaning: str) -> None:
    """Raise unless a parameter of `refine` fits x: its dtype, or also float32 if x is 16-bit (autocast)."""
    is_dense = isinstance(tensor, Tensor) and not tensor.is_nested and tensor.layout == torch.strided
    if is_dense and tensor.shape == wanted and tensor.dtype == x.dtype and tensor.device == x.device:  # almost always
        return
    _shape(name, tensor, wanted, meaning)
    _device(name, tensor, x, "x")
    fits = (x.dtype,) if x.dtype in (torch.float64, torch.float32) else (x.dtype, torch.float32)
    if tensor.dtype not in fits:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, wanted {' or '.join(map(str, fits))} with x of {x.dtype}")


def check_x(x: Any, channels: int | None = None, spatial: tuple[int, int] | None = None) -> None:
    """Raise unless x is (B, T, C, H, W) in a supported dtype, with the given channels and spatial size if not None."""
    check_dense("x", x, "(B, T, C, H, W)")
    if channels is not None and (x.dim() != 5 or x.shape[2] != channels or x.shape[1] < 1 or x.shape[0] < 1):
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (B, T, C={channels}, H, W), B and T at least 1")
    if spatial is not None and tuple(x.shape[3:]) != spatial:
        raise ValueError(f"x: got maps of {tuple(x.shape[3:])}, wanted spatial={spatial}")
    _floating("x", x, (5,), "(B, T, C, H, W)")


def check_clips(clips: int, bn_groups: int) -> None:
    """Raise ValueError unless the clips divide into `bn_groups` groups."""
    if clips % bn_groups:
        raise ValueError(f"x: got {clips} clips, wanted a multiple of bn_groups={bn_groups}")


def check_eval_only(training: bool, lengths: Tensor | None, state: State | None) -> None:
    """Raise ValueError if `lengths` or `state` are given with batch statistics."""
    if training and (lengths is not None or state is not None):
        given = "lengths" if lengths is not None else "state"
        raise ValueError(f"{given}: got it with batch statistics (training), wanted running ones (eval mode)")


def check_refine(
    x: Tensor,
    w: Tensor,
    gamma: Tensor,
    beta: Tensor,
    w_s1: Tensor | None,
    w_s2: Tensor | None,
    w_c: Tensor | None,
    *,
    inputs: str,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float | Sequence[float],
    eps: float,
    bn_groups: int,
    lengths: Tensor | None,
    state: State | None,
    process_group: ProcessGroup | None,
) -> None:
    """Raise ValueError or TypeError unless the arguments of `rru_fast.refine` fit."""
    check_x(x)
    check_choice("inputs", inputs, INPUTS)
    clips, _, channels, height, width = x.shape
    meaning = "(D, C)" if inputs == "appearance" else "(D, 2C)"
    check_dense("w", w, meaning)
    if w.dim() != 2 or w.shape[0] < 1:
        raise ValueError(f"w: got shape {tuple(w.shape)}, wanted {meaning}, D at least 1")
    d = w.shape[0]
    columns = channels if inputs == "appearance" else 2 * channels
    _weight("w", w, x, (d, columns), f"{meaning} for inputs={inputs!r}")
    _weight("gamma", gamma, x, (d,), "(D,)")
    _weight("beta", beta, x, (d,), "(D,)")
    if (w_s1 is None) != (w_s2 is None):
        raise ValueError("w_s1, w_s2: got one of them, wanted both (spatial attention) or neither")
    if w_s1 is None and w_c is None:
        raise ValueError("w_s1, w_s2, w_c: got none, wanted spatial attention, channel attention or both")
    if w_s1 is not None and w_s2 is not None:
        hidden = w_s1.shape[0] if isinstance(w_s1, Tensor) and w_s1.dim() == 2 else 1
        _weight("w_s1", w_s1, x, (hidden, height * width), "(A, P), P = H * W")
        _weight("w_s2", w_s2, x, (height * width, hidden), "(P, A), P = H * W")
    if w_c is not None:
        _weight("w_c", w_c, x, (channels, d), "(C, D)")
    check_both("running_mean", running_mean, "running_var", running_var)
    for name, buffer in (("running_mean", running_mean), ("running_var", running_var)):
        if buffer is not None:
            _weight(name, buffer, x, (d,), "(D,)")
            if buffer.requires_grad:
                raise ValueError(f"{name}: got a tensor that requires gradients, wanted a buffer that does not")
    if running_mean is not None and running_var is not None and running_var.dtype != running_mean.dtype:
        raise TypeError(f"running_var: got dtype {running_var.dtype}, wanted {running_mean.dtype} as running_mean")
    _check_momentum(momentum, x.shape[1])
    check_number("eps", eps, SMALLEST, FINITE, "a number above 0")
    check_sizes(bn_groups=bn_groups)
    check_process_group(process_group, bn_groups)
    check_flags(training=training)
    check_eval_only(training, lengths, state)
    if training:
        check_clips(clips, bn_groups)
        # The error of torch's BatchNorm. Several ranks have at least one value each.
        if clips // bn_groups * height * width == 1 and not spans_ranks(process_group):
            size = torch.Size((1, d, height, width))
            raise ValueError(f"Expected more than 1 value per channel when training, got input size {size}")
    elif running_mean is None:
        raise ValueError("running_mean, running_var: got None in eval mode, wanted both")
    if lengths is not None:
        _check_lengths(lengths, x)
    if state is not None:
        if not isinstance(state, tuple) or len(state) != 2:
            got = f"{len(state)} tensors" if isinstance(state, tuple) else type(state).__name__
            raise TypeError(f"state: got {got}, wanted the (x, s) of an earlier call's .state")
        for name, tensor in zip(("state.x", "state.s"), state, strict=True):
            _shape(name, tensor, (clips, channels, height, width), "(B, C, H, W)")
            _device(name, tensor, x, "x")
            if tensor.dtype != x.dtype:
                raise TypeError(f"{name}: got dtype {tensor.dtype}, wanted {x.dtype} as x")


def _check_momentum(momentum: float | Sequence[float], frames: int) -> None:
    steps = momentum if isinstance(momentum, list | tuple) else [momentum]
    if steps is momentum and len(steps) != frames:
        raise ValueError(f"momentum: got {len(steps)} numbers, wanted one, or one per frame of {frames}")
    for step in steps:
        check_number("momentum", step, 0, 1, "a number from 0 to 1")


def _check_lengths(lengths: Tensor, x: Tensor) -> None:
    _shape("lengths", lengths, (x.shape[0],), "(B,)")
    check_integers("lengths", lengths)
    if lengths.device.type != "cpu":
        _device("lengths", lengths, x, "x")
    # Reading the values would synchronize with a GPU, and break a graph of torch.compile.
    if lengths.device.type == "cpu" and not torch.compiler.is_compiling():
        values = lengths.to(torch.int64)
        shortest, longest = int(values.min()), int(values.max())
        if shortest < 1 or longest > x.shape[1]:
            raise ValueError(f"lengths: got values from {shortest} to {longest}, wanted 1 to T={x.shape[1]}")


def check_integers(name: str, tensor: Tensor) -> None:
    """Raise TypeError unless a tensor's dtype is one of integers."""
    if tensor.is_floating_point() or tensor.is_complex() or tensor.is_quantized or tensor.dtype == torch.bool:
        raise TypeError(f"{name}: got dtype {tensor.dtype}, wanted an integer dtype")


def is_vmapped(tensor: Tensor) -> bool:
    """Return True if vmap has wrapped the tensor."""
    return not torch.compiler.is_compiling() and torch._C._functorch.is_batchedtensor(tensor)


def unwrap_vmap(tensor: Tensor) -> Tensor:
    """Return the tensor that vmap has wrapped, whose requires_grad is reliable; any other unchanged."""
    while is_vmapped(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor


def is_transformed() -> bool:
    """Return True within a transform of torch.func, such as vmap, or of forward-mode AD."""
    if torch.compiler.is_compiling():
        return False
    return torch._C._functorch.peek_interpreter_stack() is not None or torch.autograd.forward_ad._current_level >= 0


def check_derivatives(name: str, *tensors: Tensor | None) -> None:
    """Raise RuntimeError under forward-mode AD and torch.func.grad, which closed-form backwards do not support."""
    if not is_transformed():
        return
    for tensor in tensors:
        if tensor is None:
            continue
        wrapped = torch._C._functorch.is_gradtrackingtensor(unwrap_vmap(tensor))
        dual = torch.autograd.forward_ad.unpack_dual(tensor)  # type: ignore[no-untyped-call]
        if wrapped or dual.tangent is not None:
            raise RuntimeError(
                f"{name}: got a backend whose forward-mode and torch.func derivatives are not implemented, "
                "wanted backend='reference'"
            )


def check_strip_pool(s: Tensor) -> None:
    """Raise ValueError or TypeError unless the argument of `rru_fast.strip_pool` fits."""
    _floating("s", s, (5,), "(B, T, C, H, W)")


def check_batch_hard_triplet(
    features: Tensor,
    labels: Tensor,
    gallery: Tensor | None,
    gallery_labels: Tensor | None,
    margin: Any,
    metric: str,
    reduction: str,
) -> None:
    """Raise ValueError or TypeError unless the arguments of `rru_fast.batch_hard_triplet` fit, flags aside."""
    _floating("features", features, (2, 3), "(N, D) or (G, N, D)")
    _labels("labels", labels, features, "features", "(N,), one per feature")
    check_both("gallery", gallery, "gallery_labels", gallery_labels)
    if gallery is not None and gallery_labels is not None:
        _floating("gallery", gallery, (2, 3), "(M, D) or (G, M, D)")
        check_gallery(gallery, features)
        _labels("gallery_labels", gallery_labels, gallery, "gallery", "(M,), one per feature of the gallery")
        if gallery_labels.dtype != labels.dtype and torch.uint64 in (labels.dtype, gallery_labels.dtype):
            raise TypeError(f"gallery_labels: got dtype {gallery_labels.dtype}, wanted {labels.dtype} as labels")
    check_loss(margin, metric, reduction)


def check_gallery(gallery: Tensor, features: Tensor) -> None:
    """Raise unless a gallery (..., M, D) has the groups, columns, dtype and device of features (..., N, D)."""
    wanted = (*features.shape[:-2], *gallery.shape[-2:-1], features.shape[-1])
    _shape("gallery", gallery, wanted, "(M, D) or (G, M, D) as features")
    if gallery.dtype != features.dtype:
        raise TypeError(f"gallery: got dtype {gallery.dtype}, wanted {features.dtype} as features")
    _device("gallery", gallery, features, "features")


def check_both(name: str, value: Any, other_name: str, other: Any) -> None:
    """Raise ValueError if one of two arguments is None and the other is not."""
    if (value is None) != (other is None):
        raise ValueError(f"{name}, {other_name}: got one of them, wanted both or neither")


def check_features(name: str, features: Any, labels_name: str, labels: Any, *, may_be_empty: bool) -> None:
    """Raise unless features are (N, D) or (G, N, D) with N labels, N at least 1 unless they may be empty."""
    n = "N" if name == "features" else "M"
    wanted = f"({n}, D) or (G, {n}, D)"
    check_dense(name, features, wanted)
    check_dense(labels_name, labels, f"({n},)")
    shape = tuple(features.shape)
    if features.dim() not in (2, 3) or 0 in ((*shape[:-2], shape[-1]) if may_be_empty else shape):
        raise ValueError(f"{name}: got shape {shape}, wanted {wanted}, every size at least 1")
    if labels.shape != features.shape[-2:-1]:
        got, size = tuple(labels.shape), shape[-2]
        raise ValueError(f"{labels_name}: got shape {got}, wanted ({size},) = ({n},), one per feature")


def _labels(name: str, labels: Tensor, features: Tensor, features_name: str, meaning: str) -> None:
    _shape(name, labels, (features.shape[-2],), meaning)
    check_integers(name, labels)
    _device(name, labels, features, features_name)
