"""Export a trained network or its features: `python -m training.export features|network|model`."""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("train")

from typing import Annotated, TypeAlias

import tyro
from tyro.conf import subcommand

from training.export import features, model, network
from training.runtime.command import run_command

Options: TypeAlias = (
    Annotated[features.Options, subcommand("features")]
    | Annotated[network.Options, subcommand("network")]
    | Annotated[model.Options, subcommand("model")]
)


def main(options: features.Options | network.Options | model.Options) -> None:
    """Export features, the network or its program; errors are those of the three."""
    match options:
        case features.Options():
            features.export_features(options)
        case network.Options():
            network.export_network(options)
        case model.Options():
            model.export_model(options)


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options, prog="python -m training.export")))  # type: ignore[arg-type]
