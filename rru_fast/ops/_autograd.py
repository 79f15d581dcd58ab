"""What every operator's registration shares."""

from __future__ import annotations

from typing import Any, NoReturn

from torch.library import CustomOpDef  # type: ignore[attr-defined]


def forbid_second_order(op: CustomOpDef, name: str) -> None:
    """Make differentiating the backward operator `op` an error that says so and names the way out."""

    def raise_second_order(ctx: Any, *grads: Any) -> NoReturn:
        raise RuntimeError(f"{name}: second-order gradients are not implemented, backend='reference' has them")

    op.register_autograd(raise_second_order)
