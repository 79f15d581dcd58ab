"""Times of a video as a player shows them."""

from __future__ import annotations


def clock(seconds: float) -> str:
    """Format a time from the beginning of a video, to a tenth of a second: 0:07.5, 12:30.0, 1:02:03.4."""
    tenths = max(0, round(10 * seconds))
    minutes, rest = divmod(tenths, 600)
    hours, minutes = divmod(minutes, 60)
    front = f"{hours}:{minutes:02d}" if hours else str(minutes)
    return f"{front}:{rest // 10:02d}.{rest % 10}"
