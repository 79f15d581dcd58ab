"""Hold the losses of a repository's checkout, as they are there, to what accelerate makes of them.

`python -m tests.hold_losses --repo PATH` imports the files that tests/known_losses.py and tests/other_losses.py name,
constructs every known form, and prints how it is served and the largest relative error of outputs and gradients in
float64. It runs the checkout's code. Exit status 1: a loss differs, or is not served as docs/losses.md says.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import io
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

import rru_fast
from rru_fast.compat import binding
from rru_fast.compat.loss_examples import InFloat64
from rru_fast.testing import EXACT, relative_error
from tests.helpers.checkouts import forget, load
from tests.helpers.loss_forms import NAMES, Form
from tests.known_losses import PARTLY, SWAPPED
from tests.other_losses import ELSEWHERE, OTHERS

ORDER = 1e-12  # relative error of one arithmetic in another order
BATCHES = [
    (layout, spread, scale) for layout in ((4, 3), (3, 4), (6, 2)) for spread in (0, 1, 3) for scale in (0.1, 0.3, 1, 5)
]


class Line(NamedTuple):
    """Result of one form."""

    text: str
    failed: bool
    ran: bool = True


# Comparing ------------------------------------------------------------------------------------------------------------


def batches() -> Iterator[tuple[Tensor, Tensor]]:
    """Yield features (12, 6) and labels (12,): identities that overlap and that are apart, small and large."""
    generator = torch.Generator().manual_seed(0)
    for (identities, each), spread, scale in BATCHES:
        labels = torch.arange(identities).repeat_interleave(each)
        centers = torch.randn(identities, 6, dtype=torch.float64, generator=generator)
        noise = torch.randn(len(labels), 6, dtype=torch.float64, generator=generator)
        order = torch.randperm(len(labels), generator=generator)
        yield ((noise + spread * centers[labels]) * scale)[order], labels[order]


def results(function: Callable[[Tensor, Tensor], Any], features: Tensor, labels: Tensor) -> list[Tensor]:
    """Return the outputs, a number as a tensor, and the gradient of the features."""
    features = features.clone().requires_grad_()
    with InFloat64():
        out = function(features, labels)
    outputs = list(out) if isinstance(out, tuple | list) else [out]
    weighed = [v for v in outputs if isinstance(v, Tensor) and v.requires_grad]
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(v.shape, dtype=torch.float64, generator=generator) for v in weighed]
    (gradient,) = torch.autograd.grad(weighed, features, weights)
    return [*(torch.as_tensor(v).detach() for v in outputs), gradient]


def error(own: Callable[[Tensor, Tensor], Any], other: Callable[[Tensor, Tensor], Any]) -> float:
    """Return the largest relative error of outputs and gradients over all batches."""
    worst = 0.0
    for features, labels in batches():
        wanted, got = results(own, features, labels), results(other, features, labels)
        if len(wanted) != len(got):
            return float("inf")
        for g, w in zip(got, wanted, strict=True):
            if g.shape != w.shape:
                return float("inf")
            if g.dtype != w.dtype:  # a ratio of counts, whose float32 InFloat64 lifts in one of the two
                g, w = g.float(), w.float()
            worst = max(worst, relative_error(g, w))
    return worst


def caller(expression: str, names: dict[str, Any]) -> Callable[[Tensor, Tensor], Any]:
    """Return a function of f and y that runs statements, separated by semicolons, and returns the last expression."""
    *statements, last = expression.split("; ")

    def call(f: Tensor, y: Tensor) -> Any:
        local = {**names, "f": f, "y": y}
        for statement in statements:
            exec(statement, local)
        return eval(last, local)

    return call


def hold(form: Form, repo: Path, file: str) -> Line:
    """Construct, accelerate and compare one form."""
    title = f"{file} {form.make}{form.call}{' (mended for torch 2.11)' if form.patch[0] else ''}: "
    try:
        module = load(repo, file, form.patch)
        names = {**vars(module), **NAMES, "torch": torch, "F": F, "rru_fast": rru_fast, "load": partial(load, repo)}
        loss = eval(form.make, names)
        original = caller(f"loss{form.call}", {**names, "loss": copy.deepcopy(loss)})
        if form not in OTHERS:
            results(original, *next(batches()))
    except Exception as problem:
        return Line(title + _line(problem), True, False)
    try:
        return _compare(form, title, loss, original, names)
    except Exception as problem:
        return Line(title + _line(problem), True)


def _compare(form: Form, title: str, loss: Any, original: Callable[..., Any], names: dict[str, Any]) -> Line:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        rru_fast.accelerate(loss)
    swapped = not isinstance(loss, types.FunctionType) and binding.is_bound(loss)
    state = "SWAPPED" if swapped else "a function" if isinstance(loss, types.FunctionType) else "left alone"
    if form in OTHERS:
        return Line(f"{title}{state}, {form.why}", swapped)
    if form.instead:
        found = error(original, caller(form.instead, names))
        return Line(f"{title}{state}; {form.instead}: {found:.1e}", swapped or not found <= EXACT)
    if not swapped:
        reason = next((str(w.message) for w in caught if str(w.message).startswith("accelerate")), "")
        return Line(f"{title}NOT SWAPPED: {reason}", True)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "accelerate: .* runs its own forward")
        found = error(original, caller(f"loss{form.call}", {**names, "loss": loss}))
    options, returns = describe(loss, form)
    failed = not found <= ORDER or (options, returns) != (form.options, form.returns)
    return Line(f"{title}swapped, {options}; {returns}: {found:.1e}", failed)


def _line(problem: Exception) -> str:
    return f"{type(problem).__name__}: {' '.join(str(problem).split())[:300]}"


def describe(loss: Any, form: Form) -> tuple[str, str]:
    """Return what a swapped loss computes in the form's call, and its return value."""
    formula = binding.bound(loss).args[2].formula
    margin = f"{formula.margin:g}"
    kinds = {"hinge": f"margin {margin}", "soft": "soft margin", "shifted soft": f"softplus(D_pos - D_neg + {margin})"}
    a, b = formula.factors
    options = [kinds[formula.kind]]
    options += [f"of {a:g} D_pos and {b:g} D_neg"] if (a, b) != (1, 1) else []
    options += ["cosine"] if formula.metric == "cosine" else []
    options += ["normalized"] if formula.norm != "none" or "normalize_feature=True" in form.call else []
    options += [f"times {formula.scale:g}"] if formula.scale != 1 else []
    options += ["per anchor"] if formula.reduction == "none" else []
    extras = [re.sub(r"^d_", "D_", re.sub(r"^(float|int) | with ties$", "", name)) for name in formula.extras]
    return ", ".join(options), f"({', '.join(['loss', *extras])})" if extras else "loss"


# Finding --------------------------------------------------------------------------------------------------------------


def has(repo: Path, form: Form, file: str) -> bool:
    """Return True if the checkout's file has the form's class or function."""
    if not file or not (repo / file).is_file():
        return False
    text = (repo / file).read_text(errors="replace")
    return form.has in text and re.search(rf"^(class|def) {form.name}\b", text, re.MULTILINE) is not None


def known(repo: Path, name: str | None = None) -> dict[str, list[tuple[str, Form]]]:
    """Return (file, form) of the known forms that a checkout may have, by owner/name of the repositories it may be.

    Args:
        repo: the checkout's folder.
        name: owner/name; by default those that the origin's address or the folder's name has, or else all whose
            files are there.
    """
    found: dict[str, list[tuple[str, Form]]] = {}
    for form in (*SWAPPED, *PARTLY, *ELSEWHERE, *OTHERS):
        for repository, file in form.places():
            if has(repo, form, file):
                found.setdefault(repository, []).append((file, form))
    config = repo / ".git/config"
    title = f"{repo.name.replace('+', '/')} {config.read_text() if config.is_file() else ''}"
    chosen = [name] if name else [r for r in found if r in title] or [r for r in found if r.endswith(f"/{repo.name}")]
    return {r: forms for r, forms in found.items() if not chosen or r in chosen}


def main(argv: list[str] | None = None) -> int:
    """Print a line per form; returns the exit status."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--repo", type=Path, required=True, help="folder of a checkout")
    parser.add_argument("--name", help="owner/name, if the folder's name and the origin's address do not have it")
    args = parser.parse_args(argv)
    repo = args.repo.resolve()
    forms = known(repo, args.name)
    if not forms:
        sys.exit(f"--repo: got {args.repo}, wanted a checkout of a repository in docs/losses.md")
    lines: dict[str, dict[tuple[str, ...], Line]] = {}
    # Some losses gather over all ranks.
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        done: dict[tuple[str, ...], Line] = {}
        for repository, held in forms.items():
            for file, form in held:
                key = (file, form.make, form.call, form.options)
                if key not in done:
                    with contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
                        warnings.simplefilter("ignore")
                        done[key] = hold(form, repo, file)
                lines.setdefault(repository, {})[key] = done[key]
    finally:
        torch.distributed.destroy_process_group()
        forget(repo)
    # It is none whose forms do not fit, or do not even run, if there is another.
    fitting = (
        [r for r, held in lines.items() if not any(line.failed for line in held.values())]
        or [r for r, held in lines.items() if all(line.ran for line in held.values())]
        or list(lines)
    )
    print(f"{args.repo}: {' or '.join(fitting)}")  # noqa: T201
    if others := [r for r in lines if r not in fitting]:
        print(f"by its losses not {' nor '.join(others)}; --name holds it to one of them")  # noqa: T201
    results = list({key: line for r in fitting for key, line in lines[r].items()}.values())
    for line in results:
        print(f"{'FAILED ' if line.failed else ''}{line.text}")  # noqa: T201
    return int(any(line.failed for line in results))


if __name__ == "__main__":
    sys.exit(main())
