"""Protocols as their authors state them: one query after another, down the sorted gallery."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from training.evaluation.protocols import QueryGallery


def order_of(distance: Sequence[float], good: set[int], ties: str) -> list[int]:
    """Return the gallery's places, the nearest first."""
    key = {
        "stable": lambda place: (distance[place], place),
        "optimistic": lambda place: (distance[place], place not in good),
        "pessimistic": lambda place: (distance[place], place in good),
    }
    return sorted(range(len(distance)), key=key[ties])


def good_and_junk(labels: QueryGallery, query: int) -> tuple[set[int], set[int]]:
    """Return the gallery's places that are hits for a query, and those that are junk, by MARS's rules."""
    good, junk = set(), set()
    for place, (person, camera) in enumerate(zip(labels.gallery_people, labels.gallery_cameras, strict=True)):
        if person == labels.query_people[query]:
            (junk if camera == labels.query_cameras[query] else good).add(place)
        if person == -1:
            junk.add(place)
    return good - junk, junk


def mars(order: Sequence[int], good: set[int], junk: set[int]) -> tuple[float, int]:
    """MARS's average precision, by trapezoids, and the rank of the first hit."""
    area, recall_before, precision_before, hits, seen, first = 0.0, 0.0, 1.0, 0, 0, 0
    for place in order:
        if place in junk:
            continue
        seen += 1
        if place in good:
            hits += 1
            first = first or seen
        recall, precision = hits / len(good), hits / seen
        area += (recall - recall_before) * (precision_before + precision) / 2
        recall_before, precision_before = recall, precision
        if hits == len(good):
            break
    return area, first


def standard(order: Sequence[int], good: set[int], junk: set[int]) -> tuple[float, int]:
    """Average precision, the mean of the precision at each hit, and the rank of the first."""
    counted = [place for place in order if place not in junk]
    hits = [rank for rank, place in enumerate(counted, start=1) if place in good]
    return float(np.mean([found / rank for found, rank in enumerate(hits, start=1)])), hits[0]
