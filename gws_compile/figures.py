"""A figure of matplotlib, which is no dependency: it is imported where a picture is asked for."""

from __future__ import annotations

from typing import Any


def new_figure(width: float, height: float, *, what: str, extra: str) -> Any:
    """An empty figure that belongs to no window and no state of ``pyplot``.

    Args:
        width, height: in inches.
        what: is to be shown; begins the error.
        extra: of this package, which installs matplotlib.

    Returns:
        A ``matplotlib.figure.Figure``.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(f"{what} needs matplotlib: pip install 'gws-compile[{extra}]'") from None
    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure
