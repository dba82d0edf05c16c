"""The bytes that a step holds, as the corners of a drawing: what is alive while each kernel runs, stacked by use."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minifuse.passes.remat.simulate import CATEGORIES, Timeline

WIDTH, HEIGHT = 900, 220
COLUMNS = 600
COLOURS = dict(zip(CATEGORIES, ("#3b6ea5", "#7aa95c", "#c08a3e", "#b9b9c6"), strict=True))


@dataclass(frozen=True)
class Area:
    """One category's band: its colour, the most bytes that it holds, and its outline (`x,y x,y …`)."""

    category: str
    colour: str
    most: int
    points: str


@dataclass(frozen=True)
class Drawing:
    """A timeline in `width` by `height`: its bands, and where the forward ends and the peak is (in the drawing)."""

    areas: tuple[Area, ...]
    boundary: float
    peak: tuple[float, float]
    width: int = WIDTH
    height: int = HEIGHT


def draw(timeline: Timeline) -> Drawing | None:
    """The drawing of a timeline; None of one without a byte. Of a long one, each column is the highest of its steps."""
    if not timeline.peak:
        return None
    total = timeline.total
    columns = np.array_split(np.arange(len(total)), min(len(total), COLUMNS))
    shown = [int(c[total[c].argmax()]) for c in columns]
    held = np.array(timeline.held, dtype=np.int64)[:, shown]
    edges = np.linspace(0, WIDTH, len(shown) + 1)
    tops = np.vstack([np.zeros(len(shown)), held.cumsum(axis=0)])
    heights = HEIGHT * (1 - tops / timeline.peak)
    areas = []
    for k, category in enumerate(CATEGORIES):
        corners = [*outline(edges, heights[k + 1]), *reversed(outline(edges, heights[k]))]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
        areas.append(Area(category, COLOURS[category], int(held[k].max()), points))
    at = shown.index(int(total.argmax()))
    boundary = sum(len(c) and c[0] < timeline.forward for c in columns)
    return Drawing(tuple(areas), float(edges[boundary]), (float(edges[at : at + 2].mean()), 0.0))


def outline(edges: np.ndarray, heights: np.ndarray) -> list[tuple[float, float]]:
    """The corners of a line that is level over each column."""
    return [(x, y) for k, y in enumerate(heights.tolist()) for x in edges[k : k + 2].tolist()]
