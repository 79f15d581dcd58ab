"""rru_fast::refine, eq. 1-5 and 9 in one operator.

Functional: it changes nothing and returns the batch statistics, from which the caller updates its running ones. The
tensors saved for its backward are outputs too, so that a graph that holds the operator shows all that is saved.
"""

from __future__ import annotations

from dataclasses import fields, replace
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
    holds_tensor,
    schema,
    unflatten,
)
from rru_fast.composite import refine as composite
from rru_fast.cpu import refine as cpu
from rru_fast.ops._registration import choose, forbid_second_order, kernels, without_autocast

KERNELS = kernels("refine", composite, cpu)
DIFFERENTIABLE = tuple(field.name for field in fields(RefineGradients))
TENSORS = tuple(field.name for field in fields(RefineArguments) if holds_tensor(field.type))
BACKWARD = (RefineUpstream, RefineSaved, RefineArguments, RefineNeed)
OPTIONS = tuple(field.name for field in fields(RefineArguments) if not holds_tensor(field.type))


@torch.library.custom_op(
    "rru_fast::refine",
    mutates_args=(),
    schema=f"({schema(RefineArguments)}, bool save, str backend) -> ({schema(RefineOutputs)})",
)
def refine(*arguments: Any) -> tuple[Tensor, ...]:
    """Run the forward of `RefineArguments`; with `save`, also return what the backward needs: see `RefineSaved`."""
    args, save, backend = unflatten(arguments, RefineArguments)
    with without_autocast(args.x):
        outputs = choose(KERNELS, backend, args.x.device).forward(args, save)
    return flatten(outputs)


@refine.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
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


@torch.library.custom_op(
    "rru_fast::refine_backward",
    mutates_args=(),
    schema=f"({schema(*BACKWARD)}, str backend) -> ({', '.join(f'Tensor d_{name}' for name in DIFFERENTIABLE)})",
)
def refine_backward(*arguments: Any) -> tuple[Tensor, ...]:
    """Return `RefineGradients`, with an empty tensor in place of None."""
    upstream, saved, args, need, backend = unflatten(arguments, *BACKWARD)
    with without_autocast(args.x):
        gradients = choose(KERNELS, backend, args.x.device).backward(upstream, saved, args, need)
    return tuple(args.x.new_empty(0) if gradient is None else gradient for gradient in flatten(gradients))


@refine_backward.register_fake
def _(*arguments: Any) -> tuple[Tensor, ...]:
    _upstream, _saved, args, need, _backend = unflatten(arguments, *BACKWARD)
    needed = dict.fromkeys(DIFFERENTIABLE, need.need_weights) | {"x": need.need_x, "state_x": True, "state_s": True}
    tensors = {name: getattr(args, name) for name in DIFFERENTIABLE}
    return tuple(
        tensor.new_empty(tensor.shape) if needed[name] and tensor is not None else args.x.new_empty(0)
        for name, tensor in tensors.items()
    )


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    args, save, ctx.backend = unflatten(inputs, RefineArguments)
    if not save:
        raise RuntimeError(
            "rru_fast::refine: got inputs that require gradients in a program that was exported under torch.no_grad(), "
            "wanted it called under torch.no_grad() too (save=False)"
        )
    outputs = RefineOutputs(*output)
    if args.training:  # running statistics are not read, and the caller is about to change them
        args = replace(args, running_mean=None, running_var=None)
    ctx.save_for_backward(*flatten(outputs.saved), *(getattr(args, name) for name in TENSORS))
    ctx.options = {name: getattr(args, name) for name in OPTIONS}
    ctx.mark_non_differentiable(outputs.mean, outputs.var, outputs.u, outputs.z_s, outputs.z_c, outputs.h)
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, d_features: Tensor | None, d_strips: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    arguments = [field.name for field in fields(RefineArguments)]
    needed = dict(zip([*arguments, "save", "backend"], ctx.needs_input_grad, strict=True))
    gradients: dict[str, Tensor | None] = dict.fromkeys(needed)
    if d_features is not None or d_strips is not None:
        saved, *tensors = unflatten(ctx.saved_tensors, RefineSaved)
        args = RefineArguments(**dict(zip(TENSORS, tensors, strict=True)), **ctx.options)
        weights = set(DIFFERENTIABLE) - {"x", "state_x", "state_s"}
        need = RefineNeed(needed["x"], any(needed[name] for name in weights))
        results = refine_backward(d_features, d_strips, *flatten(saved), *flatten(args), *flatten(need), ctx.backend)
        gradients.update({name: g for name, g in zip(DIFFERENTIABLE, results, strict=True) if needed[name]})
    return tuple(gradients.values())


refine.register_autograd(_backward, setup_context=_setup)
forbid_second_order(refine_backward, "rru_fast.refine")
