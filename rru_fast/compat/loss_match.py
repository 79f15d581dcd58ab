"""Find the options with which the operator computes what a third-party loss computes."""

from __future__ import annotations

import copy
import inspect
import math
import types
from collections.abc import Iterator
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from rru_fast import reference
from rru_fast.checks import DTYPES
from rru_fast.compat import binding, loss_examples, loss_form, watch
from rru_fast.compat.loss_examples import MADE_OF, Fill, NoMatch
from rru_fast.compat.loss_form import EXTRAS, KINDS, NORMS, Call, Form, Formula, Norm
from rru_fast.compat.user_code import functions_of, is_users
from rru_fast.reference.equations import reduce

OTHER_INTERFACES = {
    "pytorch_metric_learning": "rru_fast.contrib.pml has a loss and a miner for pytorch-metric-learning",
    "sentence_transformers": "rru_fast.contrib.sentence_transformers has sentence-transformers' batch-hard losses",
}
LABELS = {"label", "labels", "target", "targets", "y", "pids"}
Numbers = dict[str, list[float]]


def is_candidate(obj: Any) -> bool:
    """Return True for a module or a callable object that its class's name or its attributes call a triplet loss."""
    cls = binding.original_class(obj)
    own = cls.__module__.startswith("rru_fast.") or isinstance(obj, reference.BatchHardTripletLoss)
    if own or isinstance(obj, torch.jit.ScriptModule) or not is_users(cls):
        return False
    if not (hasattr(cls, "forward") or callable(obj)):
        return False
    names = vars(obj).keys() | vars(obj).get("_modules", {}).keys()
    name = cls.__name__.lower()
    return ("triplet" in name and "loss" in name) or "ranking_loss" in names


@torch.inference_mode(False)
@torch.enable_grad()
def find_form(obj: Any) -> Form:
    """Return how the operator computes the loss.

    Raises:
        NoMatch: it does not.
    """
    interface = OTHER_INTERFACES.get(binding.original_class(obj).__module__.partition(".")[0])
    if interface is not None:
        raise NoMatch(interface)
    _check_replaced(obj)
    try:
        watches = watch.watch(obj)
        loss = copy.deepcopy(obj)
        if binding.is_bound(loss):
            binding.unbind(loss)
        binding.bind(copy.deepcopy(loss), loss_form.forward)  # some classes refuse
    except ValueError as error:
        raise NoMatch(f"{error}; {MADE_OF}") from None
    except Exception as error:
        raise NoMatch(f"it cannot be copied or changed ({type(error).__name__}: {error}); {MADE_OF}") from None
    reasons = []
    for call, fill in _calls(loss):
        try:
            ranks = loss_examples.check_side_effects(loss, fill)
            return _match(loss, call, fill, _numbers(watches))._replace(watches=watches, world_size=ranks)
        except NoMatch as reason:
            reasons.append(str(reason))
    if len(reasons) == 1:
        raise NoMatch(reasons[0])
    first = f"; {reasons[0]}" if reasons else ""
    raise NoMatch(f"it takes {inspect.signature(binding.original_forward(loss))}, wanted features and labels{first}")


def _check_replaced(obj: Any) -> None:
    if "forward" in vars(obj) and not binding.is_bound(obj):
        raise NoMatch("its forward is not that of its class")
    if isinstance(obj, nn.Module):
        for name, inner in obj.named_modules():
            if name and any(getattr(inner, hooks) for hooks in watch.HOOKS):
                raise NoMatch(f"{name} has hooks, which would no longer run")


def _calls(loss: Any) -> Iterator[tuple[Call, Fill]]:
    """Yield the ways in which the loss's parameters may stand for features and labels."""
    _self, *parameters = inspect.signature(binding.original_forward(loss)).parameters.values()
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    required = [p.name for p in positional if p.default is p.empty]
    if len(positional) < 2 or any(p.kind is p.KEYWORD_ONLY and p.default is p.empty for p in parameters):
        return
    defaults = {p.name: p.default for p in parameters if p.default is not p.empty}
    names = tuple(p.name for p in positional)

    def call(features: tuple[str, ...], labels: tuple[str, ...], unused: tuple[str, ...] = ()) -> Call:
        others = {name: value for name, value in defaults.items() if name not in (*features, *labels)}
        return Call(names, features, labels, unused, others, "none", False, (), {})

    first, second, *rest = names
    if len(required) <= 2 and first in LABELS:
        yield call((second,), (first,)), lambda f, y, n: (y, f)
    elif len(required) <= 2:
        yield call((first,), (second,)), lambda f, y, n: (f, y)
    elif len(required) == 3:
        yield call((first,), (rest[0],), (second,)), lambda f, y, n: (f, f.detach().flip(0) + n, y)
        yield call((first, second), (rest[0],)), lambda f, y, n: (f, f, y)
        yield (
            call((first,), (second,), (rest[0],)),
            lambda f, y, n: (f, y, (None, 40 * n, f.detach() + n, 10**n)[n % 4]),
        )
    elif len(required) % 2 == 0:
        half = len(required) // 2
        yield call(tuple(required[:half]), tuple(required[half:])), lambda f, y, n: (f,) * half + (y,) * half


def _numbers(watches: watch.Watches) -> Numbers:
    """Return the numbers among the attributes, not among globals, by name."""
    found: Numbers = {}
    of_objects = [seen for seen in watches if not isinstance(seen.owner, types.ModuleType)]
    for name, value in ((name, value) for seen in of_objects for name, value in seen.values.items()):
        for number in _plain_numbers(value):
            found.setdefault(name, []).append(number)
    return found


def _plain_numbers(value: Any) -> Iterator[float]:
    """Yield the numbers that a value is, or that a container holds."""
    if isinstance(value, dict | tuple):
        for inner in value.values() if isinstance(value, dict) else value:
            yield from _plain_numbers(inner)
    elif isinstance(value, int | float) and not isinstance(value, bool) and -1e9 < value < 1e9:
        yield float(value)


def _scale(margin: float) -> float:
    """Return a power of 2 as the features' scale, at which anchors are both active and inactive."""
    return 2.0 ** round(math.log2(0.2 * min(max(abs(margin), 1e-6), 1e9)))


def _match(loss: Any, call: Call, fill: Fill, numbers: Numbers) -> Form:
    """Return the form of the first formula that equals the loss on all examples."""
    in_code = (constant for function in functions_of(loss) for constant in function.__code__.co_consts)
    margins = sorted({0.0}.union(*numbers.values(), *map(_plain_numbers, in_code)))
    scales = sorted(set(map(_scale, (1.0, *(m for group in numbers.values() for m in group if m)))))
    features, labels = loss_examples.features(3, scales[0])
    out = loss_examples.run(loss, *fill(features, labels, 0))
    returned = list(out) if isinstance(out, tuple | list) else [out]
    found: NoMatch | None = None
    if returned and isinstance(returned[0], Tensor) and type(out) in (Tensor, tuple, list):
        kind = type(out) if isinstance(out, tuple | list) else None
        for formula in _formulas(features.detach(), labels, kind, returned, margins, numbers):
            try:
                loss_examples.verify(loss, fill, formula, sorted({*scales, _scale(formula.margin or 1.0)}))
            except NoMatch as reason:
                found = found or reason
                continue
            return Form(_with_options(loss, call, fill, formula, scales[0]), formula, (), None)
    raise found or NoMatch(
        f"it returns {loss_examples.describe(out)}, which is no batch-hard loss of Euclidean or cosine distances, soft "
        f"or with a margin of {', '.join(f'{m:g}' for m in margins)}; {MADE_OF}"
    )


def _formulas(
    features: Tensor,
    labels: Tensor,
    kind_of_tuple: type[Any] | None,
    returned: list[Any],
    margins: list[float],
    numbers: Numbers,
) -> Iterator[Formula]:
    """Yield the formulas that give what the loss returned for these features."""
    loss, *extras = returned
    scales = sorted({1.0, *(value for group in numbers.values() for value in group if value)}, key=lambda v: v != 1)
    factors = [(1.0, 1.0), *((1 + h, 1 - h) for h in numbers.get("hard_factor", []) if h)]
    for norm, metric in (("none", "euclidean"), ("none", "cosine"), ("clamped", "euclidean"), ("added", "euclidean")):
        options: dict[str, Any] = {"metric": metric, "return_distances": True}
        _, farthest, nearest = reference.batch_hard_triplet(NORMS[norm](features), labels, **options)  # type: ignore[index]
        for a, b in factors + [(0.5, 0.5), (2.0, 2.0)] * (metric == "cosine"):
            d_pos, d_neg = a * farthest, b * nearest
            names = list(product(*(_names_of(extra, d_pos, d_neg) for extra in extras)))
            kinds = [(kind, margin) for kind, margin in product(KINDS, margins) if kind != "soft" or margin == 0]
            for (kind, margin), scale, reduction in product(kinds, scales, ("mean", "sum", "none")):
                value = scale * reduce(KINDS[kind](d_pos - d_neg, margin), reduction)  # type: ignore[arg-type]
                if loss_examples.close(value, loss.detach()):
                    parts = (metric, norm, kind, margin, (a, b), scale, reduction, kind_of_tuple)
                    yield from (Formula(*parts, chosen) for chosen in names)  # type: ignore[arg-type]


def _names_of(extra: Any, d_pos: Tensor, d_neg: Tensor) -> list[str]:
    """Return which further return values it may be."""
    own = extra.detach() if isinstance(extra, Tensor) else extra
    return [name for name, make in EXTRAS.items() if loss_examples.is_equal(make(d_pos, d_neg), own)]


def _with_options(loss: Any, call: Call, fill: Fill, formula: Formula, scale: float) -> Call:
    """Find which flags and kinds of labels the loss takes as the form would, and whether it widens 16-bit features."""
    integers, halves, mask = torch.arange(12) // 3, torch.arange(12) // 6, torch.arange(12) % 5 != 0

    def agrees(
        labels: Tensor, codes: Tensor, own: dict[str, Any], norm: Norm = formula.norm, mask: Tensor | None = None
    ) -> bool:
        scales = (scale,) if norm == "none" else (scale, loss_examples.TINY)
        try:
            for features, _ in (loss_examples.features(3, size) for size in scales):
                out = loss_examples.run(loss, *fill(features, labels, 0), **own)
                fast = formula._replace(norm=norm)(features, codes, mask=mask, backend="auto")
                loss_examples.compare(out, fast, loss_examples.Example(features, codes))
        except Exception:  # then its own forward runs
            return False
        return True

    kinds = {
        "float": (integers + 0.5, integers),
        "bool": (halves.bool(), halves),
        "column": (integers[:, None], integers),
    }
    norms: list[Norm] = ["clamped", "added"] if call.others.get("normalize_feature", True) is False else []
    return call._replace(
        label_kinds=tuple(name for name, labels in kinds.items() if agrees(*labels, {})),
        norm=next((n for n in norms if agrees(integers, integers, {"normalize_feature": True}, n)), "none"),
        mask="mask" in call.others and agrees(integers, integers, {"mask": mask}, mask=mask),
        dtypes=dict(_dtypes(loss, fill)),
    )


def _dtypes(loss: Any, fill: Fill) -> Iterator[tuple[torch.dtype, torch.dtype]]:
    """Yield the dtypes of features and of the loss where the two differ."""
    features, labels = loss_examples.features(3)
    for dtype in DTYPES:
        try:
            out = loss_examples.call(loss, *fill(features.detach().to(dtype), labels, 0))
        except Exception:  # not for this dtype on a CPU
            continue
        made = (out[0] if isinstance(out, tuple | list) else out).dtype
        if made != dtype:
            yield dtype, made
