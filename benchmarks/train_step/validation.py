"""Validation of pipelines before they are timed: their batches and their step against the reference's."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from benchmarks.harness import measure
from benchmarks.harness.parity import format_error
from benchmarks.train_step import pipelines
from benchmarks.train_step.pipelines import REFERENCE, Pipeline, Run, Section
from benchmarks.train_step.runner import Runner, Step

NOT_HERE = "n/a"  # prefix of the reason why a pipeline cannot run on this machine
LEVELS = 2  # gray levels by which a resize on the device may differ from Pillow's
ROUNDING = 1e-3  # gray levels that float32 loses on the way to [-1, 1] and back
# Bounds of a step's relative error against the reference's in float64: of its loss, and of every weight's gradient and
# change by Euclidean norm. In float64 the order of sums remains; otherwise it is rounding, which depth multiplies.
EXACT = (1e-9, 1e-6)
WITHIN = {"off": (1e-4, 1e-2), "bfloat16": (5e-2, 3e-1)}
# Share of the largest gradient below which one is zero but for rounding in float64: a bias before a batch norm.
ZERO = 1e-9

Errors = tuple[float, float]  # of the loss and, at worst, of a weight


def filter_valid(run: Run) -> tuple[dict[str, Runner], dict[str, str]]:
    """Return the runners of pipelines that run and are right, and the reason for each that is left out, by name."""
    valid: dict[str, Runner] = {}
    refused: dict[str, str] = {}
    with full_precision():
        reference = Runner(Pipeline(), run)
        batches = reference.batches()
        runners, frames = {REFERENCE: reference}, {REFERENCE: 0.0}
        # All loaders start their workers before any network has trained: a forked worker keeps its parent's memory.
        for name, pipeline in pipelines.PIPELINES.items():
            if (reason := _not_here(pipeline, run)) is not None:
                refused[name] = f"{NOT_HERE}{reason}"
            elif name != REFERENCE:
                with _errors_into(refused, name):
                    runner = Runner(pipeline, run)
                    pairs = [*zip(runner.batches(), batches, strict=True)]
                    if any(a.clips != b.clips or not torch.equal(a.labels, b.labels) for a, b in pairs):
                        refused[name] = "wrong: its batches are of other clips, or have other labels"
                        continue
                    differences = [runner.gray_levels(a) - reference.gray_levels(b) for a, b in pairs]
                    frames[name] = max(float(difference.abs().max()) for difference in differences)
                    runners[name] = runner
        oracle = Runner(Pipeline(), run, torch.float64).step_on(batches[0])
        exact = {Pipeline(): (0.0, 0.0)}  # errors in float64
        for name, runner in runners.items():
            with _errors_into(refused, name):
                in_double = pipelines.PIPELINES[name].exact()
                if in_double not in exact:
                    exact[in_double] = _errors(Runner(in_double, run, torch.float64).step_on(batches[0]), oracle)
                rounded = _errors(runner.step_on(batches[0]), oracle)
                summary = _summary(frames[name], exact[in_double], rounded)
                if _within(pipelines.PIPELINES[name], frames[name], exact[in_double], rounded, run.section):
                    valid[name] = runner
                    print(f"parity: {name}, {summary}")
                else:
                    refused[name] = f"wrong: {summary}"
    for name, why in refused.items():
        print(f"{name} is left out: {why}")
    return valid, refused


def _not_here(pipeline: Pipeline, run: Run) -> str | None:
    """Return the reason why a pipeline is not tried on this machine or in this section, None if it is."""
    if pipeline.step.cuda_graph and run.device.type != "cuda":
        return f" on a {run.device.type.upper()}"
    if pipeline.step.amp != "off" and not measure.has_bfloat16(run.device):
        return ": this processor has no bfloat16"
    if pipeline.step.compile_backbone and not run.section.compiled:
        return ": compilation takes minutes"
    return None


@contextmanager
def _errors_into(refused: dict[str, str], name: str) -> Iterator[None]:
    """Store an exception as the reason why a pipeline is left out: the others can still be measured."""
    try:
        yield
    except Exception as error:
        refused[name] = f"does not run: {format_error(error)}"


def _summary(frames: float, exact: Errors, rounded: Errors) -> str:
    text = f"frames within {frames:.2g} gray levels"
    for title, (loss, weights) in (("in float64", exact), ("as timed", rounded)):
        text += f", {title} loss within {loss:.1e} and weights within {weights:.1e}"
    return text


def _within(pipeline: Pipeline, frames: float, exact: Errors, rounded: Errors, section: Section) -> bool:
    """Return True if a pipeline's frames and steps are within their bounds."""
    bounds = [(frames, LEVELS + ROUNDING if pipeline.resize == "device" else 0.0)]
    bounds += zip(exact, EXACT, strict=True)
    bounds += [*zip(rounded, WITHIN[pipeline.step.amp], strict=True)][: 1 + section.stable]
    return all(error <= bound for error, bound in bounds)


def _errors(step: Step, oracle: Step) -> Errors:
    """Return the relative errors of a step: of the loss, and of the worst gradient or change."""
    worst = 0.0
    for found, wanted in ((step.gradients, oracle.gradients), (step.changes, oracle.changes)):
        norms = {name: float(tensor.norm()) for name, tensor in wanted.items()}
        for name, norm in norms.items():
            if norm > ZERO * max(norms.values()):
                worst = max(worst, float((found[name] - wanted[name]).norm()) / norm)
    return abs(step.loss / oracle.loss - 1), worst


@contextmanager
def full_precision() -> Iterator[None]:
    """Disable TF32 inside; afterwards a GPU has it in convolutions, as by default, and in matmuls."""
    torch.set_float32_matmul_precision("highest")
    torch.backends.cudnn.allow_tf32 = False
    yield
    torch.backends.cudnn.allow_tf32 = True
    torch.set_float32_matmul_precision("high" if torch.cuda.is_available() else "highest")
