"""Export the network in eval mode as a program that runs without this code, by torch.export or as ONNX."""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from io import BytesIO
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor, nn

from training.engine import checkpoint
from training.engine.load_trained import flat, load_network, provenance
from training.engine.run_record import settings_of
from training.model.heads import LSTM
from training.model.network import Network
from training.model.operators import Ops
from training.model.weights import first_line
from training.runtime.atomic_files import check_output, write_output
from training.runtime.command import need
from training.runtime.device import choose_device
from training.runtime.errors import UserError
from training.runtime.terminal import progress, say

TOLERANCE = 1e-4  # between the exported network and the eager one, relative to an output's largest element
_LEAST = 3  # fewest frames if their number is free: torch.export may specialize for 0, 1 and 2
Program: TypeAlias = Callable[[Tensor], Mapping[str, Tensor]]


@dataclass
class Options:
    """Export the network in eval mode, from clips of frames to features, strips and identity logits.

    It takes float32 clips (B, T, 3, h, w) with any B, of frames resized and normalized as in training; the file says
    how. The reference RRU is a loop over the frames, which is unrolled, so T is fixed. T is free without an RRU, and
    with --ops fast, unless the head is an LSTM. The program is compared with the network before it is written.
    """

    checkpoint: Path
    """Folder of a run, or of one checkpoint."""
    output: Path
    """The file to write: .pt2 for torch.export, .onnx for ONNX."""
    frames: int | None = None
    """T, frames per clip; as in training if not given."""
    ops: Ops = "reference"
    """Plain PyTorch operators, or (fast, for .pt2 only) the library's, which need rru_fast imported before loading."""
    device: Literal["cpu", "cuda"] = "cpu"
    """Device that a .pt2 file is for; ONNX runs on any."""


class Evaluated(nn.Module):
    """A network in eval mode that returns its outputs by name.

    Args:
        network: set to eval mode.
    """

    def __init__(self, network: Network) -> None:
        super().__init__()
        self.network = network.eval()

    def forward(self, clips: Tensor) -> dict[str, Tensor]:
        """Map clips (B, T, 3, h, w) to "feature" (B, D), "logits" (B, identities) and, if any, "strips" (B, C, H)."""
        output = self.network(clips)
        strips = {} if output.strips is None else {"strips": output.strips}
        return {"feature": output.feature, "logits": output.logits, **strips}


def export_model(options: Options) -> float:
    """Export the network, compare it with the eager one on random frames, and write it.

    Returns:
        The largest difference, relative to an output's largest element.

    Raises:
        UserError: an option does not fit, the checkpoint cannot be used, a library is missing, the exported network's
            outputs differ, or the file cannot be written.
    """
    suffix = options.output.suffix
    if suffix not in (".pt2", ".onnx"):
        raise UserError(f"output: got {options.output}, wanted a name that ends in .pt2 or .onnx")
    onnx = suffix == ".onnx"
    if onnx and (options.ops, options.device) != ("reference", "cpu"):
        raise UserError(f"output: got .onnx with ops {options.ops} on {options.device}, wanted ops reference on cpu")
    if onnx:
        for library in ("onnx", "onnxscript", "onnxruntime"):
            need(library, "export")
    check_output(options.output, suffix)
    saved, device = checkpoint.load(options.checkpoint), choose_device(options.device)
    eager = Evaluated(load_network(saved, None, device))
    network = load_network(saved, options.ops, device)
    frames = settings_of(saved).recipe.batch.frames if options.frames is None else options.frames
    if frames < 1:
        raise UserError(f"frames: got {frames}, wanted at least 1")
    unrolled = network.rru is not None and options.ops == "reference"
    fixed = unrolled or isinstance(network.head, LSTM) or frames < _LEAST
    height, width = network.backbone.size
    about = {
        "input": f"clips: float32 (B, {frames if fixed else 'T'}, 3, {height}, {width})",
        "frames": "RGB, resized by Pillow's bicubic, scaled to [-1, 1]",
        "ops": options.ops,
        **provenance(saved, device),
    }
    try:
        sample = torch.rand(2, frames, 3, height, width, device=device)
    except RuntimeError as error:
        raise UserError(f"frames: got {frames}, wanted as many as memory holds ({first_line(error)})") from error
    free = {0: torch.export.Dim("clips", min=1)} | ({} if fixed else {1: torch.export.Dim("frames", min=_LEAST)})
    with warnings.catch_warnings(), progress("Exporting the network", None):
        warnings.simplefilter("ignore")  # about PyTorch's own code
        written, program = (_onnx if onnx else _export)(Evaluated(network), sample, free, flat(about))
    more = 0 if fixed else 2
    shapes = ((1, frames, *sample.shape[2:]), (3, frames + more, *sample.shape[2:]))
    with progress("Comparing it with the original", None):
        largest = max(difference(program, eager, sample.new_empty(shape)) for shape in shapes)
    if largest > TOLERANCE:
        raise UserError(
            f"{suffix}: off by {largest:.1e} of an output's largest element, wanted {TOLERANCE:.0e} at most"
        )
    write_output(options.output, written)
    size = f"{len(written) / 2**20:.1f} MiB"
    line = f"{options.output}: {about['input']}, ops {options.ops}, {size}; off by {largest:.1e} of the largest element"
    say(line)
    return largest


@torch.no_grad()
def difference(program: Program, eager: Program, clips: Tensor) -> float:
    """Compare two networks on random clips: the largest difference, relative to an output's largest element.

    Args:
        program: the exported network.
        eager: the original.
        clips: a tensor of the clips' shape; overwritten.

    Returns:
        The difference; infinite if an output of either is not finite.
    """
    clips.uniform_(-1, 1)
    found, wanted = program(clips), eager(clips)
    tiny = torch.finfo(clips.dtype).tiny  # an output may be all zeros
    errors = [(found[name] - of).abs().max() / of.abs().max().clamp(min=tiny) for name, of in wanted.items()]
    return float(torch.stack(errors).nan_to_num(nan=torch.inf, posinf=torch.inf).max())


def _export(network: Evaluated, sample: Tensor, free: dict[int, Any], about: dict[str, str]) -> tuple[bytes, Program]:
    """Export by torch.export; returns the file's content and the program loaded from it."""
    exported = torch.export.export(network, (sample,), dynamic_shapes={"clips": free}, strict=False)
    file = BytesIO()
    torch.export.save(exported, file, extra_files={"about.json": json.dumps(about)})
    return file.getvalue(), torch.export.load(file).module()


def _onnx(network: Evaluated, sample: Tensor, free: dict[int, Any], about: dict[str, str]) -> tuple[bytes, Program]:
    """Export to ONNX, weights included; returns the file's content and a function that runs it by onnxruntime."""
    names = list(network(sample))
    exported = torch.onnx.export(
        network,
        (sample,),
        dynamo=True,
        dynamic_shapes={"clips": free},
        input_names=["clips"],
        output_names=names,
        verbose=False,
    )
    assert exported is not None
    model = exported.model_proto
    need("onnx", "export").helper.set_model_props(model, about)
    written: bytes = model.SerializeToString()
    session = need("onnxruntime", "export").InferenceSession(written, providers=["CPUExecutionProvider"])

    def program(clips: Tensor) -> dict[str, Tensor]:
        outputs = session.run(names, {"clips": clips.numpy()})
        return {name: torch.from_numpy(output) for name, output in zip(names, outputs, strict=True)}

    return written, program
