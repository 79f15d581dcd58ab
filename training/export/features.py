"""Export the features of a split's tracklets to a file."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from training.engine.feature_extractor import FeatureExtractor
from training.engine.load_trained import UseOptions, flat, load_trained, provenance
from training.retrieval.feature_file import SUFFIX, write_features
from training.runtime.atomic_files import check_output
from training.runtime.terminal import say


@dataclass
class Options(UseOptions):
    """Write the features of a split's tracklets, with their people, cameras and names, as safetensors.

    Options that are not given are as in training.
    """

    checkpoint: Path
    """Folder of a run, or of one checkpoint."""
    output: Path
    """The file to write (.safetensors)."""
    part: Literal["gallery", "query", "train", "all", "probe"] = "gallery"
    """Tracklets to export: the gallery, the queries, those trained on, or all, each once; probe is an older name of
    query."""

    def __post_init__(self) -> None:
        if self.part == "probe":
            self.part = "query"


def export_features(options: Options) -> None:
    """Extract features, each over all frames of its tracklet, and write them.

    Raises:
        UserError: the checkpoint or the data cannot be used, a feature is not finite, or the file cannot be written.
    """
    check_output(options.output, SUFFIX)
    trained = load_trained(options.checkpoint, options)
    say(trained.split.description)
    tracklets = trained.split.part(options.part)
    device = next(trained.network.parameters()).device
    extractor = FeatureExtractor(trained.network, device=options.device, resize=trained.settings.source.resize)
    about = {
        "dataset": trained.dataset,
        "split": trained.number,
        "part": options.part,
        "protocol": trained.split.protocol,
        "data": trained.split.description,
        "ops": trained.ops,
        "resize": extractor.resize,
        **provenance(trained.saved, device),
    }
    features = extractor.extract(tracklets)
    people, cameras, names = zip(*((t.person, t.camera, t.name) for t in tracklets), strict=True)
    write_features(options.output, features, people, cameras, names, flat(about))
    say(f"{options.output}: {len(tracklets)} tracklets of {options.part}, features of {features.shape[1]} numbers")
