"""The look that all figures share, and how they are written: as PNG files, or into a page."""

from __future__ import annotations

import io
import re
from collections.abc import Callable
from typing import Any, ParamSpec

import matplotlib.cm
import matplotlib.colors
import numpy as np
from etils import epath
from matplotlib.figure import Figure

from spvit_jax import atomic
from spvit_jax.errors import writing

P = ParamSpec("P")

# Lines and letters, which in a page take the colour of its text.
INK = "#22262b"
SEQUENTIAL = "viridis"
DIVERGING = "RdBu_r"
_RC: dict[Any, Any] = {
    "axes.edgecolor": INK,
    "axes.labelcolor": INK,
    "axes.labelsize": 9,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlesize": 10,
    "figure.constrained_layout.use": True,
    "font.family": "sans-serif",
    "legend.fontsize": 8,
    "legend.frameon": False,
    "lines.linewidth": 1.4,
    "svg.fonttype": "none",  # text stays text
    "text.color": INK,
    "xtick.color": INK,
    "xtick.labelsize": 8,
    "ytick.color": INK,
    "ytick.labelsize": 8,
}


def styled(draw: Callable[P, Figure]) -> Callable[P, Figure]:
    """Makes a function draw in the style of all figures; a decorator."""

    def drawn(*args: P.args, **kwargs: P.kwargs) -> Figure:
        with matplotlib.rc_context(_RC):
            return draw(*args, **kwargs)

    drawn.__doc__ = draw.__doc__
    return drawn


def write_png(figure: Figure, path: epath.Path, *, dpi: int = 144) -> None:
    """Writes a figure as a PNG file; raises a `WriteError` if it cannot be written."""
    with matplotlib.rc_context(_RC), writing(path), atomic.replacing(path) as temporary:
        figure.savefig(temporary, format="png", dpi=dpi)


def inline_svg(figure: Figure, name: str) -> str:
    """Returns a figure as an SVG element for HTML, whose letters have the colour of the page's.

    Args:
      figure: figure to draw.
      name: name of the figure, the same in no other figure of the page: the ids of its parts
        begin with it.
    """
    file = io.StringIO()
    with matplotlib.rc_context(_RC | {"svg.hashsalt": name}):
        figure.savefig(file, format="svg", transparent=True, metadata={"Date": None})
    text = file.getvalue()
    svg = text[text.index("<svg") :].replace(INK, "currentColor")
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.DOTALL)
    svg = re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", svg)
    # As wide as it was drawn, or as the page lets it be.
    size = f'style="width:{figure.get_figwidth():.2f}in"'
    return re.sub(r'width="[\d.]+pt" height="[\d.]+pt"', size, svg, count=1)


def colours(values: np.ndarray, name: str, least: float, most: float) -> np.ndarray:
    """Returns the colours uint8 [..., 3] of values on a scale from `least` to `most`."""
    scaled = (values - least) / (most - least) if most > least else np.zeros_like(values)
    return matplotlib.colormaps[name](np.clip(scaled, 0, 1), bytes=True)[..., :3]


def mappable(name: str, least: float, most: float) -> matplotlib.cm.ScalarMappable:
    """Returns the scale from `least` to `most` in a colour map, for a colour bar."""
    return matplotlib.cm.ScalarMappable(matplotlib.colors.Normalize(least, most), name)
