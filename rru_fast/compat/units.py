"""Third-party recurrent units, and the fast forward that `accelerate` gives each."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import partial
from inspect import signature
from itertools import product
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from rru_fast import functional
from rru_fast.checks import check_dense, check_layer, check_x
from rru_fast.compat import binding, watch
from rru_fast.reference.modules import batch_norm_arguments, current_weight, track_batches
from rru_fast.types import Refined

READ = {"reduce_dim_z", "s_atten_z", "c_atten_z"}  # submodules whose own forward is not called


class Replacement(NamedTuple):
    """A fast forward, for modules that have certain attributes and compute the same."""

    name: str
    attributes: set[str]
    forward: Callable[..., Any]  # (module, backend, *inputs), in place of the module's own forward(*inputs)


def find(module: object) -> Replacement | None:
    """Return the first replacement whose attributes the module has."""
    if not isinstance(module, nn.Module) or isinstance(module, torch.jit.ScriptModule):  # its forward is not Python's
        return None
    own = vars(module).keys() | module._modules.keys()
    return next((replacement for replacement in REPLACEMENTS if own >= replacement.attributes), None)


def bind(module: nn.Module, replacement: Replacement, backend: str) -> None:
    """Give the module the fast forward, as long as its attributes are what they are now."""
    binding.bind(module, _forward, backend, replacement.forward, watch.watch(module, unit=True))


def _forward(
    module: Any,
    backend: str,
    forward: Callable[..., Any],
    watches: watch.Watches,
    *inputs: Any,
    **keywords: Any,
) -> Any:
    name = watch.changed(watches)
    if name is not None:
        return binding.run_original(module, f"its {name} is not what it was when it was swapped", *inputs, **keywords)
    return forward(module, backend, *inputs, **keywords)


def difference(module: nn.Module, replacement: Replacement) -> str | None:
    """Return in one line why the module must keep its forward; None if the replacement computes the same."""
    if "forward" in vars(module):
        return "its forward is not that of its class"
    if type(module).__name__ == "RRUV2":
        return (
            "its attention has batch norms and leaky ReLUs, unlike rru_fast.RRU; as published RRUV2 cannot even be "
            "constructed: its super().__init__() lacks the argument input_size"
        )
    for name, inner in module.named_modules():
        if name.split(".")[0] in READ and any(getattr(inner, hooks) for hooks in watch.HOOKS):
            return f"{name} has hooks, which would no longer run"
    try:
        watch.watch(module, unit=True)
    except ValueError as error:
        return str(error)
    try:
        forwards = module.forward, partial(replacement.forward, module, "auto")
        takes, wanted = (list(signature(forward).parameters) for forward in forwards)
        if takes != wanted:
            return f"its forward takes {takes}, wanted {wanted}"
        for training in (True, False):
            own, fast = (_run_copy(module, training, forward) for forward in (None, replacement.forward))
            torch.testing.assert_close(fast, own, rtol=1e-9, atol=1e-12)  # sums in another order differ by 1e-14
    except Exception as error:  # whatever it is, the module keeps its forward
        return f"a float64 copy fails the comparison ({type(error).__name__}: {' '.join(str(error).split())})"
    return None


@torch.inference_mode(False)
@torch.enable_grad()
def _run_copy(module: nn.Module, training: bool, fast: Callable[..., Any] | None) -> Any:
    """Run a float64 copy with random weights, forward and backward, by its own or a fast forward."""
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        torch.default_generator.manual_seed(0)
        clone = copy.deepcopy(module).to_empty(device="cpu").double().requires_grad_().train(training)
        for inner, hooks in product(clone.modules(), watch.HOOKS):
            getattr(inner, hooks).clear()
        for weight in clone.parameters():
            nn.init.normal_(weight, std=weight[0].numel() ** -0.5 if weight.dim() else 1.0)
        for buffer in clone.buffers():
            buffer.copy_(torch.rand(buffer.shape) + 0.5)  # positive, for it may be a variance
        x, before = _clips(clone), dict(vars(clone))
        out = fast(clone, "auto", x) if fast else clone.forward(x)
        outputs = out if isinstance(out, tuple) else (out,)
        torch.autograd.backward(outputs, [torch.randn_like(output) for output in outputs])
        return {
            f"{type(out).__name__} returned": out,
            "attributes set": dict.fromkeys(k for k, v in vars(clone).items() if v is not before.get(k, clone)),
            "gradient of x": x.grad,
            "gradients": {name: weight.grad for name, weight in clone.named_parameters()},
            "buffers": dict(clone.named_buffers()),
        }


def _refined(unit: Any, backend: str, x: Tensor) -> Refined:
    """Run the recurrence of the authors' units on x (B, T, C, H, W), or on one clip (T, C, H, W)."""
    check_dense("x", x, "(B, T, C, H, W)")
    x = x[None] if x.dim() == 4 else x
    conv, norm = unit.reduce_dim_z.conv, unit.reduce_dim_z.bn
    first, relu, last = unit.s_atten_z
    check_layer("s_atten_z.1", relu, nn.ReLU)
    layers = {"reduce_dim_z.conv": conv, "s_atten_z.0": first, "s_atten_z.2": last, "c_atten_z.1": unit.c_atten_z[1]}
    for layer_name, layer in layers.items():
        check_layer(layer_name, layer, nn.Conv2d)
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


def _clips(unit: Any) -> Tensor:
    shape = (2, 3, unit.reduce_dim_z.conv.weight.shape[1] // 2, *unit.s_atten_z[0].weight.shape[2:])
    return torch.randn(shape, dtype=torch.float64, requires_grad=True)


UNIT = {"reduce_dim_z", "s_atten_z", "c_atten_z"}
REPLACEMENTS = (  # FuseNet has the attributes of RRU, too, so it comes first
    Replacement("person-reid-lib's FuseNet", UNIT | {"t_info", "pool"}, _fuse_net),
    Replacement("rru-reid's RRU", UNIT, _rru),
)
