"""The plots of a result, drawn with matplotlib as SVG."""

from __future__ import annotations

import io
import warnings
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TypeAlias

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from mii_serve.bench.statistics import percentile
from mii_serve.bench.values import Record

SIZE_INCHES = (6.4, 3.2)
"""Width and height of one plot."""
MAX_DOTS = 4000
"""More dots of one kind cover each other, and make the page slow."""

_Plot: TypeAlias = Callable[[Axes, Sequence[Record], Sequence[str]], None]


def to_svg(figure: Figure) -> str:
    """The figure as one `<svg>` element with its texts as text; the same figure gives the same bytes."""
    written = io.StringIO()
    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "mii_serve"}), warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # "Glyph missing": the reader's fonts count, not matplotlib's
        figure.savefig(written, format="svg", metadata={"Date": None, "Creator": None})
    svg = written.getvalue()
    return svg[svg.index("<svg") :]


def draw(records: Sequence[Record], target_s: float | None) -> Figure | None:
    """Every plot that has something to show, below each other; None if there are no records. `target_s` is the goodput's."""
    if not records:
        return None
    plots: list[_Plot] = [_per_second, _in_flight]
    ok = [record for record in records if record.is_ok]
    kinds = sorted({record.kind for record in ok})
    if ok:
        plots = [_distribution, _requests, *plots]
    if len(kinds) > 1:
        plots.append(_by_kind)
    width, height = SIZE_INCHES
    figure = Figure(figsize=(width, height * len(plots)), layout="constrained")
    with matplotlib.rc_context({"text.parse_math": False}):  # a "$" in the name of a kind is no formula
        _fill(figure, plots, records, kinds, target_s)
    return figure


def _fill(
    figure: Figure, plots: Sequence[_Plot], records: Sequence[Record], kinds: Sequence[str], target_s: float | None
) -> None:
    for plot, axes in zip(plots, figure.subplots(len(plots), squeeze=False).flat, strict=True):
        plot(axes, records, kinds)
        if plot is _distribution and target_s is not None:
            axes.axvline(target_s, color="#aa2222", linestyle="--", label=f"target {target_s:g} s")
        axes.grid(alpha=0.3)
        axes.set_ylim(bottom=0)
        if axes.get_legend_handles_labels()[1]:
            axes.legend(fontsize="small")


def _distribution(axes: Axes, records: Sequence[Record], kinds: Sequence[str]) -> None:
    """The curve of a kind with failed requests ends below 100 %."""
    for kind in kinds:
        totals = sorted(record.total_s for record in records if record.is_ok and record.kind == kind)
        count = sum(record.kind == kind for record in records)
        shares = [100 * rank / count for rank in range(len(totals) + 1)]
        axes.step([0.0, *totals], shares, where="post", label=kind)
    axes.set(title="Share answered by then", xlabel="seconds from the intended start", ylabel="% of all requests")


def _requests(axes: Axes, records: Sequence[Record], kinds: Sequence[str]) -> None:
    for kind in kinds:
        of_kind = [record for record in records if record.is_ok and record.kind == kind]
        shown = of_kind[:: -(-len(of_kind) // MAX_DOTS)]
        axes.plot([one.intended_s for one in shown], [one.total_s for one in shown], ".", label=kind)
    axes.set(title="Each request", xlabel="intended start, seconds into the load", ylabel="total, s")


def _per_second(axes: Axes, records: Sequence[Record], kinds: Sequence[str]) -> None:
    for is_ok, label in ((True, "successful"), (False, "refused or failed")):
        if ends := Counter(int(record.ended_s) for record in records if record.is_ok is is_ok):
            axes.bar([second + 0.5 for second in ends], list(ends.values()), 0.8, label=label, alpha=0.7)
    axes.set(title="Requests that ended in each second", xlabel="seconds into the load", ylabel="requests")


def _in_flight(axes: Axes, records: Sequence[Record], kinds: Sequence[str]) -> None:
    """A request counts from its intended start, whether or not it was sent."""
    changes = sorted([(record.intended_s, 1) for record in records] + [(record.ended_s, -1) for record in records])
    counts, count = [], 0
    for _, change in changes:
        count += change
        counts.append(count)
    axes.step([at_s for at_s, _ in changes], counts, where="post")
    axes.set(title="Requests due and not ended", xlabel="seconds into the load", ylabel="requests")


def _by_kind(axes: Axes, records: Sequence[Record], kinds: Sequence[str]) -> None:
    for percent in (50, 95):
        totals = ([record.total_s for record in records if record.is_ok and record.kind == kind] for kind in kinds)
        axes.plot(kinds, [percentile(values, percent) for values in totals], "o", label=f"p{percent}")
    axes.set(title="Total by kind", ylabel="seconds")
