"""Modules of other people's code that compute what an operator here computes, and the forward that each gets.

`accelerate` gives such a module a class derived from its own, with another forward: its parameters, their names, its
hooks and its settings stay, and what was an instance of its class still is. That a module has the parts of a kind
proves nothing, so a copy of it in float64, with random weights, is held to the new forward first, in outputs,
gradients and buffers. A new kind is a row of KINDS.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, wraps
from inspect import signature
from typing import Any

import torch
from torch import Generator, Tensor, nn
from torch.nn.utils.parametrize import is_parametrized

from rru_fast import functional
from rru_fast.checks import check_dense
from rru_fast.reference.modules import count_frames, norm_arguments, weight_of
from rru_fast.types import Refined

CLOSE = 1e-9  # of two results in float64, relative; sums in another order are within 1e-12


@dataclass(frozen=True)
class Kind:
    """What such a module has, and how it is computed here."""

    name: str
    replaced: tuple[str, ...]
    """Its submodules whose weights and settings the forward reads and which it does not call."""
    kept: tuple[str, ...]
    """Other attributes it uses as they are."""
    forward: Callable[..., Any]
    """In place of its own: takes the module and what its own takes, returns what its own returns."""
    examples: Callable[[Any, Generator], list[tuple[Tensor, ...]]]
    """Small inputs for such a module, in float64, which tell it from others with the same parts."""


class Foreign(nn.Module):
    """A module of somebody else's class whose forward is that of its kind; made by `fast_class`."""

    # Not `kind` and `backend`, which may be attributes of the module's own; all of the class: it may make others.
    _accelerated_kind: Kind
    _accelerated_from: type[nn.Module]
    _accelerated_backend = "auto"

    def __init_subclass__(cls) -> None:
        """Not theirs: who keeps a register of subclasses keeps those with their own forward."""

    def _choose_backend(self, backend: str) -> None:
        self._accelerated_backend = backend

    def __reduce_ex__(self, protocol: Any) -> Any:
        """As by its own class, which can be found by its name, and then this one."""
        reduced: Any = super().__reduce_ex__(protocol)
        original, kind = self._accelerated_from, self._accelerated_kind
        if type(self) is not fast_class(original, kind):  # type: ignore[arg-type]  # derived from it
            return reduced
        made_by, arguments, *state = reduced
        theirs = [original if each is type(self) else each for each in (made_by, *arguments)]
        return (_made_fast, (kind.name, self._accelerated_backend, *theirs), *state)

    def extra_repr(self) -> str:
        own = super().extra_repr()
        return f"{own}{', ' if own else ''}rru_fast backend={self._accelerated_backend!r}"


@cache
def fast_class(original: type[nn.Module], kind: Kind) -> type[Foreign]:
    """The class `original` with the forward of the kind."""
    names = {
        "_accelerated_kind": kind,
        "_accelerated_from": original,
        "forward": _named_alike(kind.forward, original.forward),
        "__module__": original.__module__,
        "__doc__": original.__doc__,
    }
    return type(original.__name__, (Foreign, original), {**names, "__qualname__": original.__qualname__})


def _made_fast(kind_name: str, backend: str, made_by: Callable[..., Any], *arguments: Any) -> Any:
    """What their class would have made of a copy, with the forward of the kind."""
    (kind,) = (kind for kind in KINDS if kind.name == kind_name)
    module = made_by(*arguments)
    if not isinstance(module, Foreign):
        # Their __setattr__ may need what the state brings only afterwards.
        object.__setattr__(module, "__class__", fast_class(type(module), kind))  # type: ignore[arg-type]
    vars(module)["_accelerated_backend"] = backend
    return module


def kind_of(module: nn.Module) -> Kind | None:
    """The first kind whose parts the module has: itself, and not by passing on what it wraps."""
    if isinstance(module, torch.jit.ScriptModule):  # whose forward is not Python's
        return None
    own = {*vars(module), *module._modules}
    return next((kind for kind in KINDS if own.issuperset(kind.replaced + kind.kept)), None)


def difference(module: nn.Module, kind: Kind) -> str | None:
    """In a line, why the module must not run the forward of the kind whose parts it has; None where it may."""
    try:
        why = _called(module, kind) or _hooked(module, kind)
        if why is None:
            fast_class(type(module), kind)  # type: ignore[arg-type]  # which its metaclass may refuse
            why = _measured(module, kind)
        return why
    except Exception as error:  # whatever it is, the module runs as before
        return f"it cannot be run as one ({type(error).__name__}: {str(error).strip().partition(chr(10))[0]})"


def _called(module: nn.Module, kind: Kind) -> str | None:
    theirs, ours = (signature(forward) for forward in (type(module).forward, kind.forward))
    taken, wanted = ([(p.kind, p.default) for p in each.parameters.values()] for each in (theirs, ours))
    if taken != wanted:
        return "its forward takes {}, wanted {}".format(*(str(each).partition(" -> ")[0] for each in (theirs, ours)))
    return None


def _named_alike(forward: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    """The forward under the names that the original's arguments have."""
    theirs, ours = ([*signature(each).parameters] for each in (original, forward))
    if theirs == ours:
        return forward
    names = dict(zip(theirs, ours, strict=True))

    @wraps(original)
    def renamed(self: Any, *arguments: Any, **named: Any) -> Any:
        return forward(self, *arguments, **{names.get(name, name): value for name, value in named.items()})

    return renamed


def _hooked(module: nn.Module, kind: Kind) -> str | None:
    if "forward" in vars(module):
        return "its forward is not that of its class"
    if is_parametrized(module):
        return "a parameter of its own is parametrized, which makes it another class"
    for part in kind.replaced:
        for name, inner in getattr(module, part).named_modules(prefix=part):
            if any(_hooks(inner)):
                return f"{name} has hooks, which would no longer run"
    return None


def _hooks(module: nn.Module) -> tuple[dict[int, Any], ...]:
    return module._forward_pre_hooks, module._forward_hooks, module._backward_pre_hooks, module._backward_hooks


@torch.inference_mode(False)
@torch.enable_grad()
def _measured(module: nn.Module, kind: Kind) -> str | None:
    for training in (True, False):
        for n, inputs in enumerate(kind.examples(module, Generator("cpu").manual_seed(0))):
            own, other = _stand_in(module, training), _stand_in(module, training)
            with torch.random.fork_rng(devices=[]):  # what it drops, it drops alike
                torch.default_generator.manual_seed(3)
                before = dict(vars(own))
                theirs = own.forward(*inputs)
                torch.default_generator.manual_seed(3)
                ours = kind.forward(other, *inputs)
            for name, value in vars(own).items():
                if name not in before or value is not before[name]:
                    return f"its forward sets {name!r}, which would no longer be set"
            if _described(theirs) != _described(ours):
                return f"it returns {_described(theirs)}, wanted {_described(ours)}"
            wanted, got = _outcome(own, theirs, inputs), _outcome(other, ours, inputs)
            for name, value in wanted.items():
                off = float((got[name] - value).norm() / value.norm().clamp(min=1e-9))
                if not off <= CLOSE:
                    mode = "training" if training else "eval"
                    return f"its {name} is off by {off:.1e} of its size (example {n}, {mode} mode)"
    return None


def _described(out: Any) -> str:
    """What a forward returned: of which types and shapes."""
    if isinstance(out, tuple):
        return f"{type(out).__name__} of {', '.join(map(_described, out))}"
    return f"{type(out).__name__} {tuple(out.shape) if isinstance(out, Tensor) else ''}".rstrip()


def _stand_in(module: nn.Module, training: bool) -> Any:
    """A copy of the module on the CPU, in float64 and without hooks, with random weights."""
    generator = Generator("cpu").manual_seed(1)
    stand_in: Any = copy.deepcopy(module)
    if any(v.is_meta for v in (*stand_in.parameters(), *stand_in.buffers())):
        stand_in.to_empty(device="cpu")
        for buffer in stand_in.buffers():
            buffer.zero_()
    stand_in.to("cpu", torch.float64).requires_grad_().train(training)
    for inner in stand_in.modules():
        for hooks in _hooks(inner):
            hooks.clear()
    with torch.no_grad():
        for weight in stand_in.parameters():
            fan_in = weight[0].numel() if weight.dim() > 1 else 1
            weight.copy_(_random(weight.shape, generator) / fan_in**0.5)
        for buffer in stand_in.buffers():
            if buffer.is_floating_point():  # one may be a variance
                buffer.copy_(_random(buffer.shape, generator).abs() + 0.5)
    stand_in._accelerated_backend = "auto"
    return stand_in


def _random(shape: Sequence[int], generator: Generator) -> Tensor:
    return torch.randn(shape, generator=generator, dtype=torch.float64, device="cpu")


def _outcome(module: nn.Module, out: Any, inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """What a call of the module left: outputs, gradients and buffers."""
    generator = Generator("cpu").manual_seed(2)
    outputs = out if isinstance(out, tuple) else (out,)
    leaves = {f"input {n}": v for n, v in enumerate(inputs) if v.requires_grad} | dict(module.named_parameters())
    upstream = [_random(v.shape, generator) for v in outputs]
    gradients = torch.autograd.grad(outputs, list(leaves.values()), upstream, allow_unused=True)
    found = {f"output {n}": v.detach() for n, v in enumerate(outputs)}
    for (name, leaf), gradient in zip(leaves.items(), gradients, strict=True):
        found[f"gradient of {name}"] = torch.zeros_like(leaf) if gradient is None else gradient
    return found | {f"buffer {name}": buffer.double() for name, buffer in module.named_buffers()}


def _refined(unit: Any, x: Tensor) -> Refined:
    """The recurrence of the authors' units: x (B, T, C, H, W), or one clip's (T, C, H, W)."""
    check_dense("x", x, "(B, T, C, H, W)")
    if x.dim() == 4:
        x = x[None]
    conv, norm = unit.reduce_dim_z.conv, unit.reduce_dim_z.bn
    first, _, last = unit.s_atten_z
    wanted = (conv.weight.shape[1] // 2, *first.weight.shape[2:])
    if x.dim() != 5 or tuple(x.shape[2:]) != wanted:
        raise ValueError(f"x: got shape {tuple(x.shape)}, wanted (B, T, {', '.join(map(str, wanted))})")
    # They feed the gate S - X_t where eq. 1 has X_t - S.
    appearance, motion = weight_of(conv).flatten(1).chunk(2, 1)
    out = functional.refine(
        x,
        torch.cat((-appearance, motion), 1),
        w_s1=weight_of(first).flatten(1),
        w_s2=weight_of(last).flatten(1),
        w_c=weight_of(unit.c_atten_z[1]).flatten(1),
        **norm_arguments(norm, x.shape[1]),
        backend=unit._accelerated_backend,
    )
    count_frames(norm, x.shape[1])
    return out


def _rru(self: Any, x: Tensor) -> Tensor:
    """rru-reid: x (B, T, C, H, W) to S (B, C, T, H, W), contiguous as theirs is."""
    return _refined(self, x).features.transpose(1, 2).contiguous()


def _fuse_net(self: Any, x: Tensor, is_training: bool = True) -> tuple[Tensor, Tensor]:
    """person-reid-lib: x (B, T, C, H, W) to the clips' features and strips (B, C, H); is_training is not used."""
    out = _refined(self, x)
    features = self.pool(self.t_info(out.features.transpose(1, 2)).mean(dim=2))
    return features.flatten(1), out.strips


def _maps(unit: Any, generator: Generator) -> list[tuple[Tensor, ...]]:
    channels = unit.reduce_dim_z.conv.weight.shape[1] // 2
    shape = (2, 3, channels, *unit.s_atten_z[0].weight.shape[2:])
    return [(_random(shape, generator).requires_grad_(),)]


def _triplet_loss(self: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    """Features (N, D) and labels (N,) to the loss; margin and reduction are the ranking loss's, as in theirs.

    An anchor without a negative has loss 0, where theirs raises; of equally hard partners the first gets the gradient,
    of which theirs gives each a share.
    """
    ranking = self.ranking_loss
    if torch.is_autocast_enabled(inputs.device.type):  # which gives theirs, and all of torch's losses, in float32
        inputs = inputs.to(torch.promote_types(inputs.dtype, torch.float32))
    loss = functional.batch_hard_triplet(
        inputs, targets, margin=ranking.margin, reduction=ranking.reduction, backend=self._accelerated_backend
    )
    assert isinstance(loss, Tensor)
    return loss


def _features(loss: Any, generator: Generator) -> list[tuple[Tensor, ...]]:
    """People who overlap, people of whom two stand apart, and people seen once, from themselves as far as the floor."""
    # Of few digits, so that a distance to oneself is the floor for large margins too.
    spread = 2.0 ** round(math.log2(0.2 * (abs(loss.margin) or 1)))
    points = (_random((12, 6), generator) * 4096).round() / 4096 * spread
    people = torch.arange(12, device="cpu") // 3
    apart = points + (people // 2 * people * 100)[:, None] * max(1.0, spread)
    cases = ((points, people), (apart, people), (points, torch.arange(12, device="cpu")))
    return [(features.clone().requires_grad_(), labels) for features, labels in cases]


UNIT = ("reduce_dim_z", "s_atten_z", "c_atten_z")
# The first that fits is taken: FuseNet has all that RRU has.
KINDS = (
    Kind("person-reid-lib's FuseNet", UNIT, ("t_info", "pool"), _fuse_net, _maps),
    Kind("rru-reid's RRU", UNIT, (), _rru, _maps),
    Kind("torchreid's TripletLoss", ("ranking_loss",), ("margin",), _triplet_loss, _features),
)
