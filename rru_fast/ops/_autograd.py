"""Autograd of the operators in Python, where csrc/autograd.cpp, which has the same rules, has not been built."""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.library import Library


def differentiate(library: Library, name: str) -> None:
    """Register rru_fast::`name`_backward as the backward of rru_fast::`name`.

    The names in the two schemas say what it gets and returns. An argument d_<output> is the gradient of that output,
    None if it is not used; <output> and <input> are saved; <input>_sizes are the sizes of a tensor, which is not;
    `need` tells for each result whether it is needed. A result d_<input> is the gradient of that argument. Outputs
    without a d_<output> are not differentiable.
    """
    forward, backward = (getattr(torch.ops.rru_fast, op).default for op in (name, f"{name}_backward"))
    names, outputs = ([a.name for a in of] for of in (forward._schema.arguments, forward._schema.returns))
    wanted = [argument.name for argument in backward._schema.arguments]
    results = [names.index(result.name.removeprefix("d_")) for result in backward._schema.returns]
    upstream = [f"d_{output}" for output in outputs]
    saved = [key for key in wanted if key not in upstream and key != "need"]

    def setup(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
        values = dict(zip(names, inputs, strict=True))
        if values.get("save") is False:
            raise RuntimeError(
                f"rru_fast::{name}: got inputs that require gradients in a program that was exported under "
                "torch.no_grad(), wanted it called under torch.no_grad() too (save=False)"
            )
        values |= {f"{key}_sizes": value.shape for key, value in values.items() if isinstance(value, Tensor)}
        values |= zip(outputs, output if isinstance(output, tuple) else (output,), strict=True)
        tensors = [values[key] for key in saved if isinstance(values[key], Tensor)]
        ctx.save_for_backward(*tensors)
        ctx.tensors = [key for key in saved if isinstance(values[key], Tensor)]
        ctx.others = {key: values[key] for key in saved if not isinstance(values[key], Tensor)}
        ctx.mark_non_differentiable(*(values[key] for key in outputs if f"d_{key}" not in wanted))
        ctx.set_materialize_grads(False)

    def run_backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        found: list[Tensor | None] = [None] * len(names)
        if any(gradient is not None for gradient in gradients):
            values = ctx.others | dict(zip(ctx.tensors, ctx.saved_tensors, strict=True))
            values |= zip(upstream, gradients, strict=True)
            values["need"] = [ctx.needs_input_grad[index] for index in results]
            computed = backward(*(values[key] for key in wanted))
            for index, gradient in zip(results, computed if isinstance(computed, tuple) else (computed,), strict=True):
                found[index] = gradient if ctx.needs_input_grad[index] else None
        return tuple(found)

    def raise_second_order(ctx: Any, *gradients: Any) -> NoReturn:
        raise RuntimeError(
            f"rru_fast::{name}: got a backend whose second-order gradients are not implemented, "
            "wanted backend='reference'"
        )

    torch.library.register_autograd(forward, run_backward, setup_context=setup, lib=library)
    torch.library.register_autograd(backward, raise_second_order, lib=library)
