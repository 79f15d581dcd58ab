"""Third-party modules that compute one of the operators, and the fast forward that `accelerate` gives each."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from functools import partial
from inspect import signature
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rru_fast import functional
from rru_fast.checks import check_dense, check_x
from rru_fast.reference.modules import batch_norm_arguments, current_weight, track_batches
from rru_fast.types import Refined

BOUND = ("forward", "_replicate_for_data_parallel")
READ = {"reduce_dim_z", "s_atten_z", "c_atten_z", "ranking_loss"}  # submodules whose own forward is not called
HOOKS = ("_forward_pre_hooks", "_forward_hooks", "_backward_pre_hooks", "_backward_hooks")


class Replacement(NamedTuple):
    """A fast forward, for modules that have certain attributes and compute the same."""

    name: str
    attributes: set[str]
    forward: Callable[..., Any]  # (module, backend, *inputs), in place of the module's own forward(*inputs)
    examples: tuple[Callable[[Any], tuple[Tensor, ...]], ...]  # make float64 inputs that expose near misses


def find(module: nn.Module) -> Replacement | None:
    """Return the first replacement whose attributes the module has."""
    if isinstance(module, torch.jit.ScriptModule):  # its forward is not Python's
        return None
    own = vars(module).keys() | module._modules.keys()
    return next((replacement for replacement in REPLACEMENTS if own >= replacement.attributes), None)


def bind(module: nn.Module, forward: Callable[..., Any], backend: str) -> None:
    """Shadow the forward of the module's class, by a partial: pickle could not find a bound method again."""
    # nn.DataParallel copies vars(module) to its replicas, where forward would still be bound to `module`.
    bound = partial(forward, module, backend), partial(_replicate, module, forward, backend)
    vars(module).update(zip(BOUND, bound, strict=True))


def is_replaced(module: nn.Module) -> bool:
    """Return True if `module.forward` has been assigned since `bind`."""
    return not isinstance(vars(module).get("forward"), partial)


def _replicate(module: nn.Module, forward: Callable[..., Any], backend: str) -> nn.Module:
    replica: nn.Module = type(module)._replicate_for_data_parallel(module)  # type: ignore[no-untyped-call]
    bind(replica, forward, backend)
    return replica


def difference(module: nn.Module, replacement: Replacement) -> str | None:
    """Return in one line why the module must keep its forward; None if the replacement computes the same."""
    if "forward" in vars(module):
        return "its forward is not that of its class"
    for name, inner in module.named_modules():
        if name.split(".")[0] in READ and any(getattr(inner, hooks) for hooks in HOOKS):
            return f"{name} has hooks, which would no longer run"
    try:
        forwards = module.forward, partial(replacement.forward, module, "auto")
        takes, wanted = (list(signature(forward).parameters) for forward in forwards)
        if takes != wanted:
            return f"its forward takes {takes}, wanted {wanted}"
        for training, example in product((True, False), replacement.examples):
            own, fast = (_run_copy(module, training, example, forward) for forward in (None, replacement.forward))
            torch.testing.assert_close(fast, own, rtol=1e-9, atol=1e-12)  # sums in another order differ by 1e-14
    except Exception as error:  # whatever it is, the module keeps its forward
        return f"a float64 copy fails the comparison ({type(error).__name__}: {' '.join(str(error).split())})"
    return None


@torch.inference_mode(False)
@torch.enable_grad()
def _run_copy(module: nn.Module, training: bool, example: Callable[..., Any], fast: Callable[..., Any] | None) -> Any:
    """Run a float64 copy with random weights, forward and backward, by its own or a fast forward."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        clone = copy.deepcopy(module).to_empty(device="cpu").double().requires_grad_().train(training)
        for inner, hooks in product(clone.modules(), HOOKS):
            getattr(inner, hooks).clear()
        for weight in clone.parameters():
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5 if weight.dim() else 1.0)
        for buffer in clone.buffers():
            buffer.copy_(torch.rand(buffer.shape) + 0.5)  # positive, for it may be a variance
        inputs, before = example(clone), dict(vars(clone))
        out = fast(clone, "auto", *inputs) if fast else clone.forward(*inputs)
        outputs = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
        return {
            f"{type(out).__name__} returned": out,
            "attributes set": dict.fromkeys(k for k, v in vars(clone).items() if v is not before.get(k, clone)),
            "gradients of inputs": [tensor.grad for tensor in inputs],
            "gradients": {name: weight.grad for name, weight in clone.named_parameters()},
            "buffers": dict(clone.named_buffers()),
        }


def _refined(unit: Any, backend: str, x: Tensor) -> Refined:
    """Run the recurrence of the authors' units on x (B, T, C, H, W), or on one clip (T, C, H, W)."""
    check_dense("x", x, "(B, T, C, H, W)")
    x = x[None] if x.dim() == 4 else x
    conv, norm = unit.reduce_dim_z.conv, unit.reduce_dim_z.bn
    first, _, last = unit.s_atten_z
    check_x(x, conv.weight.shape[1] // 2, tuple(first.weight.shape[2:]))
    appearance, motion = current_weight(conv).flatten(1).chunk(2, 1)
    out = functional.refine(
        x,
        torch.cat((-appearance, motion), 1),  # their gate takes S - X_t, that of eq. 1 X_t - S
        w_s1=current_weight(first).flatten(1),
        w_s2=current_weight(last).flatten(1),
        w_c=current_weight(unit.c_atten_z[1]).flatten(1),
        **batch_norm_arguments(norm, x.shape[1]),
        backend=backend,
    )
    track_batches(norm, x.shape[1])
    return out


def _rru(unit: Any, backend: str, x: Tensor) -> Tensor:
    """Return S (B, C, T, H, W), contiguous."""
    return _refined(unit, backend, x).features.transpose(1, 2).contiguous()


def _fuse_net(unit: Any, backend: str, x: Tensor, is_training: bool = True) -> tuple[Tensor, Tensor]:
    """Return features and strips (B, C, H) of the clips; `is_training` is not used."""
    out = _refined(unit, backend, x)
    return unit.pool(unit.t_info(out.features.transpose(1, 2)).mean(dim=2)).flatten(1), out.strips


def _clips(unit: Any) -> tuple[Tensor, ...]:
    shape = (2, 3, unit.reduce_dim_z.conv.weight.shape[1] // 2, *unit.s_atten_z[0].weight.shape[2:])
    return (torch.randn(shape, dtype=torch.float64, requires_grad=True),)


def _triplet_loss(loss: Any, backend: str, inputs: Tensor, targets: Tensor) -> Tensor:
    """Return the loss of features (N, D) with labels (N,).

    An anchor without a negative has loss 0, where the original raises; of equally hard partners the first gets the
    gradient that the original shares among them.
    """
    margin, reduction = loss.ranking_loss.margin, loss.ranking_loss.reduction
    if torch.is_autocast_enabled(inputs.device.type):  # it runs PyTorch's losses in float32
        inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    return functional.batch_hard_triplet(inputs, targets, margin=margin, reduction=reduction, backend=backend)  # type: ignore[return-value]


def _features(per_label: int, loss: Any) -> tuple[Tensor, ...]:
    """Make features in the scale of the margin: even labels overlap, odd ones are far from all others.

    They have few digits, so that the distance from a feature to itself is exactly the floor.
    """
    labels = torch.arange(12) // per_label
    features = torch.randint(-4096, 4097, (12, 6)).double() / 4096 + (labels % 2 * labels * 100)[:, None]
    scale = 2.0 ** round(math.log2(0.2 * (abs(loss.margin) or 1)))
    return (features * scale).requires_grad_(), labels


UNIT = {"reduce_dim_z", "s_atten_z", "c_atten_z"}
LABELED = (partial(_features, 3), partial(_features, 1))
REPLACEMENTS = (  # FuseNet has the attributes of RRU, too, so it comes first
    Replacement("person-reid-lib's FuseNet", UNIT | {"t_info", "pool"}, _fuse_net, (_clips,)),
    Replacement("rru-reid's RRU", UNIT, _rru, (_clips,)),
    Replacement("torchreid's TripletLoss", {"margin", "ranking_loss"}, _triplet_loss, LABELED),
)
