"""Plots as SVG text."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import torch

from wantrain.density import Density
from wantrain.terms import NUM_TIMESTEPS

SIZE_PX = (720, 360)
LEFT_PX, RIGHT_PX, TOP_PX, BOTTOM_PX = 64, 702, 72, 300
NUM_BINS, NUM_POINTS = 60, 240
DRAWN, WANTED, INFERENCE, TICKS = "#b9c9dd", "#1f4e8c", "#d9730d", "#333333"


@dataclass(frozen=True, slots=True)
class Frame:
    """What the axes show: sigma from `low` to `high`, the density from 0 to `top`."""

    low: float
    high: float
    top: float

    def at(self, sigma: float, height: float) -> tuple[float, float]:
        """The place of a point in pixels."""
        return (LEFT_PX + (sigma - self.low) / (self.high - self.low) * (RIGHT_PX - LEFT_PX),
                BOTTOM_PX - height / self.top * (BOTTOM_PX - TOP_PX))


def density_svg(title: str, drawn: Sequence[float], density: Density, *, inference_shift: float,
                inference_sigmas: Sequence[float], boundary: float | None = None) -> str:
    """The SVG text of sigmas `drawn` in a simulation, as a histogram, over the wanted `density` and inference's.

    Inference's is uniform before `inference_shift`, in the same range; the sampler's own `inference_sigmas` are ticks.
    `boundary` is where one expert ends and the other begins. The densities are per unit of sigma.
    """
    inference = replace(density, name="uniform", shape=(), shift=inference_shift)
    edges = torch.linspace(*density.within, NUM_BINS + 1, dtype=torch.float64)
    bars = torch.histogram(torch.tensor(drawn, dtype=torch.float64), edges).hist / len(drawn) / edges.diff()
    curves = [_curve(one) for one in (density, inference)]
    frame = Frame(*_shown(density.within),
                  1.1 * max(float(bars.max()), *(height for curve in curves for _, height in curve)))
    ticks = [sigma for sigma in inference_sigmas if density.within[0] <= sigma <= density.within[1]]
    legend = ((DRAWN, 8, "", f"drawn: {len(drawn):,} in a simulation"), (WANTED, 2, "", f"wanted: {density}"),
              (TICKS, 1, "", f"{len(ticks)} of the sampler's {len(inference_sigmas)} sigmas"),
              (INFERENCE, 2, "6 4", f"inference: {inference}"))
    return "\n".join([
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {SIZE_PX[0]} {SIZE_PX[1]}" width="{SIZE_PX[0]}" '
        f'height="{SIZE_PX[1]}" font-family="sans-serif" font-size="12">',
        f"<title>{html.escape(title)}</title>",
        '<rect width="100%" height="100%" fill="white"/>',
        _text(LEFT_PX, 22, title, "start", 'font-size="15" font-weight="bold"'),
        *_legend(legend),
        *_axes(frame),
        *(_bar(*ends, height, frame) for ends, height in zip(pairwise(edges.tolist()), bars.tolist(), strict=True)),
        *(_line([(s, 0), (s, 0.06 * frame.top)], frame, TICKS, 1) for s in ticks),
        *(_line(curve, frame, colour, 2, dashes) for curve, colour, dashes in
          zip(curves, (WANTED, INFERENCE), ("", "6 4"), strict=True)),
        *(() if boundary is None else _boundary(boundary, frame)),
        "</svg>", ""])


def _shown(within: tuple[float, float]) -> tuple[float, float]:
    """The range of sigma on the axis: a little more than the draws', where there is more."""
    margin = 0.04 * (within[1] - within[0])
    return max(0.0, within[0] - margin), min(1.0, within[1] + margin)


def _curve(density: Density) -> list[tuple[float, float]]:
    """(sigma, draws per unit of sigma): means over short pieces, as a density may be infinite at a point."""
    edges = torch.linspace(*density.within, NUM_POINTS + 1, dtype=torch.float64)
    heights = density.cdf(edges).diff() / edges.diff()
    return list(zip(((edges[1:] + edges[:-1]) / 2).tolist(), heights.tolist(), strict=True))


def _line(points: Sequence[tuple[float, float]], frame: Frame, colour: str, width: float, dashes: str = "") -> str:
    path = " ".join("{:.1f},{:.1f}".format(*frame.at(*point)) for point in points)
    return (f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}" '
            f'stroke-dasharray="{dashes}"/>')


def _bar(low: float, high: float, height: float, frame: Frame) -> str:
    (left, upper), (right, lower) = frame.at(low, height), frame.at(high, 0)
    return (f'<rect x="{left:.2f}" y="{upper:.1f}" width="{right - left:.2f}" height="{lower - upper:.1f}" '
            f'fill="{DRAWN}"/>')


def _text(x: float, y: float, text: str, anchor: str = "middle", more: str = "") -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {more}>{html.escape(text)}</text>'


def _legend(entries: Sequence[tuple[str, float, str, str]]) -> list[str]:
    """Two rows of two: (colour, line width, dashes, text)."""
    made = []
    for i, (colour, width, dashes, text) in enumerate(entries):
        x, y = LEFT_PX + i % 2 * 290, 42 + i // 2 * 17
        made += [f'<path d="M{x} {y - 4}h24" stroke="{colour}" stroke-width="{width}" stroke-dasharray="{dashes}"/>',
                 _text(x + 30, y, text, "start")]
    return made


def _axes(frame: Frame) -> list[str]:
    """The frame, sigma with the timestep beneath it, and the density."""
    made = [f'<rect x="{LEFT_PX}" y="{TOP_PX}" width="{RIGHT_PX - LEFT_PX}" height="{BOTTOM_PX - TOP_PX}" '
            'fill="none" stroke="#888888"/>',
            _text((LEFT_PX + RIGHT_PX) / 2, BOTTOM_PX + 50,
                  f"sigma, and beneath it timestep = {NUM_TIMESTEPS} * sigma"),
            _text(0, 0, "draws per unit of sigma",
                  more=f'transform="translate(16 {(TOP_PX + BOTTOM_PX) / 2}) rotate(-90)"')]
    for sigma in _round_numbers(frame.low, frame.high):
        x, _ = frame.at(sigma, 0)
        made += [f'<path d="M{x:.1f} {BOTTOM_PX}v4" stroke="#888888"/>', _text(x, BOTTOM_PX + 17, f"{sigma:g}"),
                 _text(x, BOTTOM_PX + 31, f"{sigma * NUM_TIMESTEPS:g}", more='fill="#666666"')]
    for height in _round_numbers(0, frame.top):
        _, y = frame.at(0, height)
        made += [f'<path d="M{LEFT_PX} {y:.1f}h-4" stroke="#888888"/>', _text(LEFT_PX - 8, y + 4, f"{height:g}", "end")]
    return made


def _round_numbers(low: float, high: float) -> list[float]:
    """Five to ten round numbers in [low, high]."""
    unit = 10 ** math.floor(math.log10((high - low) / 5))
    step = next(unit * factor for factor in (5, 2, 1) if (high - low) / (unit * factor) >= 5)
    return [round(k * step, 10) for k in range(math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9) + 1)]


def _boundary(boundary: float, frame: Frame) -> list[str]:
    """A line where the experts meet, where that is in sight."""
    if not frame.low <= boundary <= frame.high:
        return []
    x, y = frame.at(boundary, frame.top)
    left = x > (LEFT_PX + RIGHT_PX) / 2
    return [_line([(boundary, 0), (boundary, frame.top)], frame, "#a00000", 1, "2 3"),
            _text(x - 5 if left else x + 5, y + 14, f"boundary {boundary:g}", "end" if left else "start",
                  'fill="#a00000"')]
