"""Draw a picture: `python -m training.show features|ranking|cmc|ablation`."""

from __future__ import annotations

if __name__ == "__main__":
    from build_tools.extras import require

    require("train")

from typing import Annotated, TypeAlias

import tyro
from tyro.conf import subcommand

from training.runtime.atomic_files import check_output, write_output
from training.runtime.command import run_command
from training.runtime.terminal import progress, say
from training.show import ablation, cmc, features, ranking
from training.show.picture import png

Options: TypeAlias = (
    Annotated[features.Options, subcommand("features")]
    | Annotated[ranking.Options, subcommand("ranking")]
    | Annotated[cmc.Options, subcommand("cmc")]
    | Annotated[ablation.Options, subcommand("ablation")]
)


def main(options: features.Options | ranking.Options | cmc.Options | ablation.Options) -> None:
    """Draw a picture and write it to `options.output`.

    Raises:
        UserError: the options, the checkpoint or the data cannot be used, or the file cannot be written.
    """
    check_output(options.output, ".png", replace=True)
    match options:
        case features.Options():
            figure = features.show(options)
        case ranking.Options():
            figure = ranking.show(options)
        case cmc.Options():
            figure = cmc.show(options)
        case ablation.Options():
            figure = ablation.show(options)
    with progress("Drawing", None):
        content = png(figure)
    write_output(options.output, content)
    say(f"picture: {options.output}")


if __name__ == "__main__":
    run_command(lambda: main(tyro.cli(Options, prog="python -m training.show")))  # type: ignore[arg-type]
