"""seqinfo.ini of a MOTChallenge sequence: length, frame rate, frame size and image folder."""

from __future__ import annotations

import re
from configparser import ConfigParser, SectionProxy
from configparser import Error as IniError
from dataclasses import dataclass
from math import inf
from pathlib import Path

from training.runtime.errors import UserError


@dataclass(frozen=True)
class SequenceInfo:
    """Contents of seqinfo.ini.

    Args:
        frame_rate: frames per second, if given.
        length: the number of frames.
        width: of a frame in pixels, if given.
        height: of a frame in pixels, if given.
        images: the name of the image folder.
    """

    frame_rate: float | None
    length: int
    width: int | None
    height: int | None
    images: str


def read_sequence_info(root: Path) -> SequenceInfo:
    """Read seqinfo.ini; only seqLength is required.

    Raises:
        UserError: it is missing, or a number in it is missing or malformed.
    """
    path = root / "seqinfo.ini"
    ini = ConfigParser(interpolation=None)
    try:
        ini.read_string(path.read_text(encoding="utf-8-sig"))
        info = ini["Sequence"]
    except OSError as error:
        raise UserError(f"{path}: {error.strerror}; wanted next to gt/gt.txt or gt.txt and img1/ or a video") from None
    except (IniError, KeyError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path}: {reason}; wanted [Sequence] with the number of frames, seqLength") from None
    length = _positive_int(path, info, "seqLength")
    if length is None:
        raise UserError(f"{path}: no seqLength; wanted [Sequence] with the number of frames, seqLength")
    width, height = _positive_int(path, info, "imWidth"), _positive_int(path, info, "imHeight")
    return SequenceInfo(_frame_rate(path, info), length, width, height, info.get("imDir", "img1"))


def _positive_int(path: Path, info: SectionProxy, key: str) -> int | None:
    """Parse a positive whole number; None if the key is absent."""
    text = info.get(key)
    if text is None:
        return None
    if not re.fullmatch("[0-9]{1,18}", text) or int(text) == 0:
        raise UserError(f"{path}: got {key} {text[:40]!r}, wanted a positive whole number")
    return int(text)


def _frame_rate(path: Path, info: SectionProxy) -> float | None:
    text = info.get("frameRate")
    if text is None:
        return None
    try:
        rate = float(text)
    except ValueError:
        rate = inf
    if not 0 < rate < inf:
        raise UserError(f"{path}: got frameRate {text[:40]!r}, wanted a positive finite number")
    return rate
