"""Pictures of what was measured: ``docs/price.png`` and ``docs/memory.png``.

    python -m benchmarks.pictures NAME

NAME is what `python -m benchmarks --out` was given. `auto` has no line among the prices: it is on that of the
engine that it chose.
"""

import argparse
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks.overhead import summary
from benchmarks.record import read

DOCS = Path(__file__).resolve().parent.parent / "docs"
# Okabe and Ito's palette; peers are dashed.
STYLE: dict[str, tuple[str, str]] = {
    "floor": ("#999999", ":"),
    "sequential": ("#0072B2", "-"),
    "batched": ("#56B4E9", "-"),
    "gramian": ("#009E73", "-"),
    "representation": ("#E69F00", "-"),
    "last block": ("#CC79A7", "-"),
    "every 10": ("#B8A800", "-"),
    "compiled": ("#000000", "-"),
    "torchjd vmap": ("#D55E00", "--"),
    "torchjd sequential": ("#D55E00", "-."),
    "torchjd autogram": ("#D55E00", ":"),
    "libmtl": ("#666666", "--"),
}
Series = dict[str, dict[int, float]]


def prices(results: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Median multiples of plain, by model, contender and T."""
    found: dict[str, Series] = {}
    for r in results:
        ran = r["engines"].get("auto")
        for name, (_, median, _) in summary(r["seconds"], "plain").items():
            if name == "auto" and ran not in r["seconds"]:
                name = ran
            if name in STYLE:
                found.setdefault(r["model"], {}).setdefault(name, {})[r["tasks"]] = median
    return found


def memories(results: Sequence[Mapping[str, Any]]) -> dict[str, Series]:
    """Multiples of the parameters, by model, contender and T."""
    found: dict[str, Series] = {}
    for r in results:
        for name, multiples in r["multiples"].items():
            # A log axis has no room for none at all.
            found.setdefault(r["model"], {}).setdefault(name, {})[r["tasks"]] = max(multiples, 0.05)
    return found


def apart(heights: Sequence[float], gap: float) -> list[float]:
    """Heights moved up as little as makes them lie ``gap`` apart, in their order."""
    placed = [0.0] * len(heights)
    last = -math.inf
    for n in sorted(range(len(heights)), key=heights.__getitem__):
        last = placed[n] = max(heights[n], last + gap)
    return placed


def draw(panels: Mapping[str, Series], label: str, path: Path) -> None:
    """One panel a model, one line a contender, with its name at its end."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    columns = min(3, len(panels))
    rows = math.ceil(len(panels) / columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 4.2 * rows), squeeze=False)
    for ax in axes.flat[len(panels) :]:
        ax.set_visible(False)
    for ax, (model, series) in zip(axes.flat, panels.items(), strict=False):
        panel(ax, model, series)
    for ax in axes[:, 0]:
        ax.set_ylabel(label)
    figure.tight_layout()
    path.parent.mkdir(exist_ok=True)
    figure.savefig(path, dpi=150)
    plt.close(figure)


def panel(ax: Any, model: str, series: Series) -> None:
    """Lines in the left two thirds, and their names."""
    names = [name for name in STYLE if name in series]
    ticks = sorted({T for points in series.values() for T in points})
    for name in names:
        points = sorted(series[name].items())
        color, dashes = STYLE[name]
        ax.plot(*zip(*points, strict=True), dashes, color=color, marker="o", markersize=3, linewidth=1.6)
    ax.set(xscale="log", yscale="log", title=model, xlabel="tasks")
    ax.set_xticks(ticks, [str(T) for T in ticks])
    spread = ticks[-1] / ticks[0] + 1
    ax.set_xlim(ticks[0] * 0.85, ticks[-1] * spread**0.75)
    for side in ("top", "right"):
        ax.spines[side].set_visible(False)
    ends = [(max(series[name]), series[name][max(series[name])]) for name in names]
    top = label(ax, names, ends, ticks[-1] * spread**0.08)
    low, high = ax.get_ylim()[0], max(ax.get_ylim()[1], top)
    ax.set_ylim(low, high)
    rounded = [m * 10.0**e for e in range(-2, 4) for m in (1, 2, 5) if low <= m * 10.0**e <= high]
    ax.set_yticks(rounded, [f"{y:g}" for y in rounded])
    ax.minorticks_off()


def label(ax: Any, names: Sequence[str], ends: Sequence[tuple[float, float]], x: float) -> float:
    """Names at the ends of lines, clear of each other; returns the height that they need."""
    low, high = (math.log(limit) for limit in ax.get_ylim())
    gap = 0.06 * (high - low)
    heights = apart([math.log(y) for _, y in ends], gap)
    for name, end, height in zip(names, ends, heights, strict=True):
        line = {"arrowstyle": "-", "color": STYLE[name][0], "linewidth": 0.5}
        at = (x, math.exp(height))
        ax.annotate(name, end, at, color=STYLE[name][0], fontsize=8, va="center", arrowprops=line)
    return math.exp(max(heights) + gap)


def pictures(name: str, folder: Path = DOCS) -> list[Path]:
    """Draws what there are results for; returns the files."""
    drawn = []
    for part, collect, label in (
        ("overhead", prices, "price of a step, multiples of plain"),
        ("memory", memories, "peak above plain, multiples of parameters"),
    ):
        if (content := read(f"{name}-{part}")) is not None and content["results"]:
            drawn.append(folder / ("price.png" if part == "overhead" else "memory.png"))
            draw(collect(content["results"]), label, drawn[-1])
    return drawn


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", metavar="NAME")
    name = parser.parse_args().name
    drawn = pictures(name)
    if not drawn:
        parser.error(f"there are no results {name}-overhead.json or {name}-memory.json in benchmarks/results")
    print(*(f"docs/{path.name}" for path in drawn))


if __name__ == "__main__":
    main()
