"""rru_fast::refine, eq. 1-5 and 9 in one operator.

Functional: it changes nothing and returns the batch statistics, from which the caller keeps its running ones. What
its backward needs beside X and S is among its outputs, so a graph that sees the operator sees all that is saved.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from rru_fast.composite import refine as composite
from rru_fast.ops._registration import choose, forbid_second_order, kernels, without_autocast

KERNELS = kernels("refine", composite)

_ARGUMENTS = (
    "Tensor x, Tensor w, Tensor gamma, Tensor beta, Tensor? w_s1, Tensor? w_s2, Tensor? w_c, "
    "Tensor? running_mean, Tensor? running_var, Tensor? lengths, Tensor? state_x, Tensor? state_s, "
    "str inputs, bool training, float eps, int bn_groups, str process_group, int[] counts, bool save, str backend"
)
_SAVED = "Tensor mean, Tensor var, Tensor u, Tensor z_s, Tensor z_c, Tensor h"


class Arguments(NamedTuple):
    """The operator's arguments in the order of its schema; shapes as in `rru_fast.refine`."""

    x: Tensor
    w: Tensor
    gamma: Tensor
    beta: Tensor
    w_s1: Tensor | None
    w_s2: Tensor | None
    w_c: Tensor | None
    running_mean: Tensor | None
    running_var: Tensor | None
    lengths: Tensor | None
    state_x: Tensor | None
    state_s: Tensor | None
    inputs: str
    training: bool
    eps: float
    bn_groups: int
    process_group: str  # its name in torch.distributed, "" for none
    counts: list[int]  # how many values of a gate channel each of its ranks brings
    save: bool  # whether a backward will come
    backend: str


DIFFERENTIABLE = ("x", "w", "gamma", "beta", "w_s1", "w_s2", "w_c", "state_x", "state_s")


@torch.library.custom_op(
    "rru_fast::refine", mutates_args=(), schema=f"({_ARGUMENTS}) -> (Tensor features, Tensor strips, {_SAVED})"
)
def refine(*arguments: Any) -> tuple[Tensor, ...]:
    """features (B, T, C, H, W) and strips (B, C, H) in x's dtype; the rest in float32 at least, N steps of recurrence.

    mean, var (T, groups, D): batch statistics, var biased; T = 0 in eval mode. u (N, B, D, P), z_s (N, B, P),
    z_c (N, B, C), h (N, B, A): kept for the backward, u in an order of the backend's own; N = 0 unless `save`, and
    where the variant has none.
    """
    *before, backend = arguments
    with without_autocast(arguments[0]):
        outputs: tuple[Tensor, ...] = choose(KERNELS, backend, arguments[0].device).forward(*before)
    return outputs


@refine.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    a = Arguments(*arguments)
    clips, frames, channels, height, width = a.x.shape
    d, hidden = a.w.shape[0], 0 if a.w_s1 is None else a.w_s1.shape[0]
    dtype = torch.promote_types(a.x.dtype, torch.float32)
    steps = (frames if a.state_s is not None else frames - 1) if a.save else 0

    def empty(*shape: int) -> Tensor:
        return a.x.new_empty(shape, dtype=dtype)

    return (
        a.x.new_empty(a.x.shape),
        a.x.new_empty(clips, channels, height),
        empty(frames if a.training else 0, a.bn_groups, d),
        empty(frames if a.training else 0, a.bn_groups, d),
        empty(steps, clips, d, height * width),
        empty(steps if a.w_s2 is not None else 0, clips, height * width),
        empty(steps if a.w_c is not None else 0, clips, channels),
        empty(steps if a.w_s1 is not None else 0, clips, hidden),
    )


@torch.library.custom_op(
    "rru_fast::refine_backward",
    mutates_args=(),
    schema=f"(Tensor? d_features, Tensor? d_strips, bool need_x, bool need_weights, Tensor features, {_SAVED}, "
    f"{_ARGUMENTS}) -> ({', '.join(f'Tensor d_{name}' for name in DIFFERENTIABLE)})",
)
def refine_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Gradients of DIFFERENTIABLE; empty where there is no such argument or it is not needed."""
    *before, _save, backend = arguments
    x = Arguments(*arguments[-len(Arguments._fields) :]).x
    with without_autocast(x):
        gradients = choose(KERNELS, backend, x.device).backward(*before)
    return tuple(x.new_empty(0) if gradient is None else gradient for gradient in gradients)


@refine_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    need_x, need_weights = arguments[2:4]
    a = Arguments(*arguments[-len(Arguments._fields) :])
    needed = (need_x, *[need_weights] * 6, True, True)
    tensors = [getattr(a, name) for name in DIFFERENTIABLE]
    return tuple(
        tensor.new_empty(tensor.shape) if need and tensor is not None else a.x.new_empty(0)
        for need, tensor in zip(needed, tensors, strict=True)
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    a = Arguments(*inputs)
    if not a.save:
        raise RuntimeError(
            "rru_fast::refine: got inputs that require gradients in a program that was exported under torch.no_grad(), "
            "wanted it called under torch.no_grad() too (save=False)"
        )
    # In training the running statistics are not read, and the caller is about to change them.
    running = (None, None) if a.training else (a.running_mean, a.running_var)
    features, _strips, *saved = output
    # Slices of the plain tuple: torch.compile, where it falls back around us, takes a NamedTuple's for empty.
    ctx.save_for_backward(features, *saved, *inputs[:7], *running, *inputs[9:12])
    ctx.options = tuple(inputs[12:])
    ctx.mark_non_differentiable(*saved)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_features: Tensor | None, d_strips: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    needed = dict(zip(Arguments._fields, ctx.needs_input_grad, strict=True))
    gradients: dict[str, Tensor | None] = dict.fromkeys(Arguments._fields)
    if d_features is not None or d_strips is not None:
        need_weights = any(needed[name] for name in DIFFERENTIABLE[1:7])
        results = refine_backward(d_features, d_strips, needed["x"], need_weights, *ctx.saved_tensors, *ctx.options)
        gradients.update({name: g for name, g in zip(DIFFERENTIABLE, results, strict=True) if needed[name]})
    return tuple(gradients.values())


refine.register_autograd(_backward, setup_context=_setup)
forbid_second_order(refine_backward, "rru_fast.refine")
