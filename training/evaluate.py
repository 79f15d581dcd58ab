"""Evaluate a checkpoint: `python -m training.evaluate --checkpoint RUN`."""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("train")

import json
from dataclasses import dataclass
from pathlib import Path

import tyro

from training.engine.load_trained import UseOptions, load_trained, provenance
from training.engine.run_record import describe
from training.evaluation.protocols import ProtocolName
from training.evaluation.ranking import Rerank, Ties
from training.evaluation.result import Result, result_table
from training.evaluation.scoring import score
from training.runtime import distributed
from training.runtime.atomic_files import check_output, write_output
from training.runtime.command import run_command
from training.runtime.terminal import say


@dataclass
class Options(UseOptions):
    """Evaluate a checkpoint. Options that are not given are as in training."""

    checkpoint: Path
    """Folder of a run, or of one checkpoint."""
    protocol: ProtocolName | None = None
    """Protocol to rank by; the dataset's own if not given."""
    ties: Ties = "stable"
    """Order of equal distances: by place in the gallery, positives first, or positives last."""
    rerank: Rerank | None = None
    """Re-rank by k-reciprocal neighbors, by the paper's equations or as in its authors' published code."""
    output: Path | None = None
    """File to write the result to (.json), with the checkpoint's config and the environment."""


def evaluate(options: Options) -> Result:
    """Evaluate a trained network on a split, and show the table.

    Raises:
        UserError: the checkpoint or the data cannot be used, or the protocol does not fit the data.
    """
    if options.output:
        check_output(options.output, ".json")
    trained = load_trained(options.checkpoint, options)
    say(trained.split.description)
    settings = trained.settings
    ranking = score(
        trained.network,
        trained.split,
        protocol=options.protocol,
        ties=options.ties,
        rerank=options.rerank,
        resize=settings.source.resize,
    )
    made_by = {**describe(settings, trained.saved.config["environment"]["processes"]), "ops": trained.ops}
    result = Result(made_by, trained.epoch, ranking)
    say(result_table([result.record()]))
    if options.output:
        about = provenance(trained.saved, next(trained.network.parameters()).device)
        content = {**about, "data": trained.split.description, "result": result.record()}
        write_output(options.output, json.dumps(content, indent=2) + "\n")
        say(f"result: {options.output}")
    return result


if __name__ == "__main__":
    prog = "python -m training.evaluate"
    run_command(lambda: evaluate(tyro.cli(Options, prog=prog, console_outputs=distributed.is_main())), several=True)
