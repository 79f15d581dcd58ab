"""Draw the table of an ablation as a plot."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import tyro
from matplotlib.figure import Figure

from training.runtime.errors import UserError
from training.show.ablation_plot import draw


@dataclass
class Options:
    """Draw rank-1 and mAP of an ablation's rows over the rate of occlusion."""

    output: Path
    """The PNG."""
    ablation: tyro.conf.Positional[Path] = Path(__file__).parents[1] / "ablation.json"
    """The ablation.json of `python -m training.ablation`."""


def show(options: Options) -> Figure:
    """Draw what the options say.

    Raises:
        UserError: the file cannot be read, or holds no ablation.
    """
    try:
        return draw(json.loads(options.ablation.read_text()))
    except (OSError, ValueError) as error:
        raise UserError(f"ablation: {options.ablation} cannot be read ({error})") from error
    except (KeyError, TypeError, IndexError, AttributeError) as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"ablation: {options.ablation} is not one that training.ablation wrote ({reason})") from error
