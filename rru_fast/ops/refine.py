"""rru_fast::refine, eq. 1-5 and 9 in one operator.

Functional: it changes nothing and returns the batch statistics, from which the caller updates its running ones. The
tensors saved for its backward are outputs too, so that a graph that holds the operator shows all that is saved.
"""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from rru_fast.arguments import (
    RefineArguments,
    RefineGradients,
    RefineNeed,
    RefineOutputs,
    RefineSaved,
    RefineUpstream,
    flatten,
    schema,
    unflatten,
)
from rru_fast.auto.kinds import refine_key
from rru_fast.composite import refine as composite
from rru_fast.ops._registration import Kernels, choose, kernels, register, without_autocast

KERNELS = kernels("refine", composite)
DIFFERENTIABLE = tuple(field.name for field in fields(RefineGradients))
BACKWARD = (RefineUpstream, RefineSaved, RefineArguments)


def _forward(*arguments: Any) -> tuple[Tensor, ...]:
    args, save, backend = unflatten(arguments, RefineArguments)
    with without_autocast(args.x):
        outputs = _choose(backend, args, save).forward(args, save)
    return flatten(outputs)


def _choose(backend: str, args: RefineArguments, gradients: bool) -> Kernels:
    return choose(
        "refine",
        KERNELS,
        backend,
        args.x.device,
        lambda: refine_key(args.x, args.w, args.w_s1, args.w_c, args.inputs, args.training, gradients),
    )


def _backward(*arguments: Any) -> tuple[Tensor, ...]:
    upstream, saved, args, need, backend = unflatten(arguments, *BACKWARD)
    with without_autocast(args.x):
        gradients = _choose(backend, args, True).backward(upstream, saved, args, _need(need))
    return tuple(args.x.new_empty(0) if gradient is None else gradient for gradient in flatten(gradients))


def _need(need: list[bool]) -> RefineNeed:
    """Return the need of any parameter as that of all: their gradients are computed together."""
    of = dict(zip(DIFFERENTIABLE, need, strict=True))
    return RefineNeed(of["x"], any(of[name] for name in set(of) - {"x", "state_x", "state_s"}))


def _fake(*arguments: Any) -> tuple[Tensor, ...]:
    args: RefineArguments
    args, save, _backend = unflatten(arguments, RefineArguments)
    clips, frames, channels, height, width = args.x.shape
    d, num_attn = args.w.shape[0], 0 if args.w_s1 is None else args.w_s1.shape[0]
    dtype = torch.promote_types(args.x.dtype, torch.float32)
    steps = args.steps if save else 0
    statistics = (frames if args.training else 0, args.bn_groups, d)

    def empty(*shape: int) -> Tensor:
        return args.x.new_empty(shape, dtype=dtype)

    outputs = RefineOutputs(
        features=args.x.new_empty(args.x.shape),
        strips=args.x.new_empty(clips, channels, height),
        mean=empty(*statistics),
        var=empty(*statistics),
        u=empty(steps, clips, d, height * width),
        z_s=empty(steps if args.w_s1 is not None else 0, clips, height * width),
        z_c=empty(steps if args.w_c is not None else 0, clips, channels),
        h=empty(steps if args.w_s1 is not None else 0, clips, num_attn),
    )
    return flatten(outputs)


def _fake_backward(*arguments: Any) -> tuple[Tensor, ...]:
    _upstream, _saved, args, flags, _backend = unflatten(arguments, *BACKWARD)
    need = _need(flags)
    needed = dict.fromkeys(DIFFERENTIABLE, need.need_weights) | {"x": need.need_x, "state_x": True, "state_s": True}
    tensors = {name: getattr(args, name) for name in DIFFERENTIABLE}
    return tuple(
        tensor.new_empty(tensor.shape) if needed[name] and tensor is not None else args.x.new_empty(0)
        for name, tensor in tensors.items()
    )


refine, refine_backward = register(
    "refine",
    f"({schema(RefineArguments)}, bool save, str backend) -> ({schema(RefineOutputs)})",
    f"({schema(*BACKWARD)}, bool[] need, str backend) -> ({', '.join(f'Tensor d_{name}' for name in DIFFERENTIABLE)})",
    (_forward, _backward, _fake, _fake_backward),
)
