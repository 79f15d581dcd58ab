"""A synthetic dataset in the iLIDS-VID layout: rendered people walking past two cameras, reproducible from a seed."""

from __future__ import annotations

import json
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from scipy.io import savemat

from training.data.datasets import ilids_vid
from training.data.rendering.person import Person
from training.data.rendering.walk import CAMERAS, render_walk
from training.data.tracklets import Split
from training.runtime.errors import UserError
from training.runtime.terminal import track

DEFAULT_ROOT = Path("data/synthetic")
PEOPLE, SEED = 60, 0
SPLITS = 10
SHORTEST, LONGEST = 16, 40  # frames per tracklet
RENDERER = 1  # version of the pictures: raise it with every change, so that a folder rendered before is refused
MANIFEST = "synthetic.json"


def load(root: Path, split: int) -> Split:
    """Read one split of the default set, rendered first where `root` does not exist.

    Args:
        root: the dataset's folder.
        split: 0 to 9.

    Raises:
        UserError: `root` holds something else, or there is no such split.
    """
    generate(root)
    loaded = ilids_vid.load(root, split, check_counts=False)
    return replace(loaded, description=f"synthetic, {PEOPLE} rendered people (seed {SEED}); {loaded.description}")


def generate(
    root: Path = DEFAULT_ROOT,
    people: int = PEOPLE,
    seed: int = SEED,
    occlusion: float | None = None,
    blur: float | None = None,
) -> Path:
    """Render a dataset in the iLIDS-VID layout, atomically; one that is there already is not rendered again.

    Args:
        root: the folder to make.
        people: number of people, at least 2; each split holds out half of them.
        seed: not negative; the same seed gives the same bytes, and the same person whatever the number of people.
        occlusion: expected share of a tracklet's frames in which an occluder (of a passer-by, the trunk) reaches into
            the middle 20 of the 64 columns, where the person is, 0 to 1; if not given, seven tracklets in ten are
            crossed once, which makes it a fifth.
        blur: expected share of a tracklet's frames that are blurred by 5 pixels along the motion, 0 to 1; if not
            given, 0.05 in one half of the tracklets and 0.35 in the other.

    Returns:
        The folder, absolute.

    Raises:
        UserError: `root` holds something else, or an argument is out of range.
    """
    if people < 2:
        raise UserError(f"people: got {people}, wanted at least 2")
    if seed < 0:
        raise UserError(f"seed: got {seed}, wanted 0 or more")
    rates = {name: rate for name, rate in (("occlusion", occlusion), ("blur", blur)) if rate is not None}
    for name, rate in rates.items():
        check_rate(name, rate)
    root = root.absolute()
    manifest = {"people": people, "seed": seed, "renderer": RENDERER, **rates}
    if _exists(root, manifest):
        return root
    try:
        root.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(prefix=f"{root.name}.", dir=root.parent) as temp:
            rendered = Path(temp) / root.name
            _write(rendered, people, seed, occlusion, blur)
            (rendered / MANIFEST).write_text(json.dumps(manifest) + "\n")
            rendered.rename(root)
    except OSError as error:
        if not _exists(root, manifest):  # if it does, another process was quicker
            raise UserError(f"{root}: cannot be made ({error})") from None
    return root


def check_rate(name: str, rate: float) -> None:
    """Raise a UserError unless 0 <= rate <= 1."""
    if not 0 <= rate <= 1:
        raise UserError(f"{name}: got {rate}, wanted a share of frames, 0 to 1")


def _exists(root: Path, manifest: dict[str, float]) -> bool:
    """Return True if `root` holds the set that `manifest` describes; raise if it holds something else."""
    try:
        found = json.loads((root / MANIFEST).read_text())
    except (OSError, ValueError):
        if not root.exists() or (root.is_dir() and not any(root.iterdir())):
            return False
        raise UserError(f"{root}: exists, and has no readable {MANIFEST}; wanted a new folder to render to") from None
    if found != manifest:
        raise UserError(
            f"{root}: holds a synthetic set of {found}, wanted {manifest}; "
            "choose another folder, or read this one by --dataset ilids-vid --no-check-counts"
        )
    return True


def _write(root: Path, people: int, seed: int, occlusion: float | None, blur: float | None) -> None:
    (root / ilids_vid.SPLITS).parent.mkdir(parents=True)
    rows = [np.random.default_rng((seed, 0, row)).permutation(people) + 1 for row in range(SPLITS)]
    matlab = BytesIO()
    savemat(matlab, {"ls_set": np.stack(rows)})  # type: ignore[arg-type]  # files are fine, the stubs say no
    header = b"MATLAB 5.0 MAT-file".ljust(116)  # scipy's has the time of day in this free text
    (root / ilids_vid.SPLITS).write_bytes(header + matlab.getvalue()[len(header) :])
    for number in track(range(1, people + 1), "Rendering people", people):
        person = Person.sample(np.random.default_rng((seed, number)))
        for camera_number, camera in enumerate(CAMERAS, start=1):
            rng = np.random.default_rng((seed, number, camera_number))
            name = f"cam{camera_number}/person{number:03d}"
            folder = root / ilids_vid.SEQUENCES / name
            folder.mkdir(parents=True)
            frames = int(rng.integers(SHORTEST, LONGEST + 1))
            walk = render_walk(person, camera, frames, rng, occlusion, blur)
            for t, image in enumerate(walk, start=1):
                image.save(folder / f"{name.replace('/', '_')}_{t:05d}.png", compress_level=1)
