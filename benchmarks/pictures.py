"""Pictures of results: bars per network, roofline, cost against tensor size."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")  # no window

import matplotlib.pyplot as plt
import numpy as np

from results import LIMITS, Result, Results, by_network, limit_of, totals

COLOURS = {
    "limit": "#999999",
    "fastbn-out": "#08519c",
    "fastbn-recycled": "#3182bd",
    "fastbn-fresh": "#9ecae1",
    "torch": "#e6550d",
    "torch-compiled": "#fdae6b",
    "onednn": "#756bb1",
    "onednn-blocked": "#bcbddc",
    "onnxruntime": "#c51b8a",
    "jax": "#31a354",
    "numba": "#a1d99b",
    "numpy": "#636363",
}
OPS = ("forward", "inference", "backward")


def save(figure: Any, path: Path) -> Path:
    figure.savefig(path, dpi=110, metadata={"Software": None})
    plt.close(figure)
    return path


def ordered(names: set[str]) -> list[str]:
    return [name for name in COLOURS if name in names]


def bars(results: Results, network: str, folder: Path) -> list[Path]:
    """One picture per activation: total milliseconds of each contender, panels by layout and op."""
    groups = {group: members for group, members in by_network(results).items() if group[0] == network}
    paths = []
    for dtype, activation, threads in sorted({group[3:] for group in groups}):
        layouts = [
            name for name in ("nchw", "nhwc") if any(g[2:] == (name, dtype, activation, threads) for g in groups)
        ]
        ops = [op for op in OPS if any(g[1] == op and g[3:] == (dtype, activation, threads) for g in groups)]
        if not ops:  # measured with a reader alone
            continue
        figure, axes = plt.subplots(
            len(layouts), len(ops), figsize=(4.2 * len(ops), 3.4 * len(layouts)), squeeze=False, layout="constrained"
        )
        for row, layout in enumerate(layouts):
            for column, op in enumerate(ops):
                axis = axes[row][column]
                axis.set_title(f"{op}, {layout.upper()}")
                members = groups.get((network, op, layout, dtype, activation, threads))
                if members:
                    draw_bars(axis, {name: float(np.median(s)) * 1e3 for name, s in totals(members).items()})
        what = "" if activation == "identity" else f" + {activation}"
        figure.suptitle(f"{network}{what}, {dtype}, {threads} threads: ms for all its normalizations")
        name = f"bars-{network}-{dtype}-{activation.replace('+', '_')}-t{threads}.png"
        paths.append(save(figure, folder / name))
    return paths


def draw_bars(axis: Any, milliseconds: dict[str, float]) -> None:
    names = ordered(set(milliseconds))[::-1]
    axis.barh(names, [milliseconds[name] for name in names], color=[COLOURS[name] for name in names])
    for position, name in enumerate(names):
        axis.text(milliseconds[name], position, f" {milliseconds[name]:,.0f}", va="center", fontsize=8)
    axis.set_xlim(0, 1.18 * max(milliseconds.values()))
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def of_one_kind(results: Results) -> list[Result]:
    """Without an activation, of the dtype and the number of threads that come first."""
    plain = [r for r in results.cases if r.case.activation == "identity" and not r.case.reader]
    return [r for r in plain if (r.case.dtype, r.case.threads) == (plain[0].case.dtype, plain[0].case.threads)]


def roofline(results: Results, folder: Path) -> Path | None:
    """GB/s of what must move: the limit as a line over the size of x, contenders as points, one panel per op."""
    measured = [r for r in of_one_kind(results) if limit_of(r.samples) is not None]
    panels = [(op, layout) for layout in ("nchw", "nhwc") for op in OPS]
    panels = [panel for panel in panels if any((r.case.op, r.case.layout) == panel for r in measured)]
    if not panels:
        return None
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    figure, axes = plt.subplots(rows, columns, figsize=(4.6 * columns, 3.6 * rows), squeeze=False, layout="constrained")
    for axis in axes.flat[len(panels) :]:
        axis.set_visible(False)
    for axis, (op, layout) in zip(axes.flat, panels, strict=False):
        members = sorted(
            (r for r in measured if (r.case.op, r.case.layout) == (op, layout)), key=lambda r: r.case.nbytes
        )
        sizes = [r.case.nbytes for r in members]
        axis.plot(sizes, [best_speed(r) for r in members], color=COLOURS["limit"], lw=2, label="limit")
        for name in ("fastbn-out", "torch", "onednn", "numba"):
            points = [(r.case.nbytes, r.speed(name)) for r in members if name in r.samples]
            if points:
                axis.plot(*zip(*points, strict=True), ".", color=COLOURS[name], label=name)
        axis.set(xscale="log", yscale="log", title=f"{op}, {layout.upper()}", xlabel="bytes of x", ylabel="GB/s")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    figure.suptitle("Bytes that must move per second")
    return save(figure, folder / "roofline.png")


def best_speed(result: Result) -> float:
    return max(result.speed(name) for name in LIMITS if name in result.samples)


def sizes(results: Results, folder: Path) -> Path | None:
    """Nanoseconds per value against the size of x, for the shapes of sizes.txt; one panel per op and layout."""
    measured = [r for r in of_one_kind(results) if r.case.shape.network == "sizes"]
    panels = [(op, layout) for layout in ("nchw", "nhwc") for op in OPS]
    panels = [panel for panel in panels if any((r.case.op, r.case.layout) == panel for r in measured)]
    if not panels:
        return None
    figure, axes = plt.subplots(1, len(panels), figsize=(4.6 * len(panels), 3.8), squeeze=False, layout="constrained")
    for axis, (op, layout) in zip(axes[0], panels, strict=True):
        members = sorted(
            (r for r in measured if (r.case.op, r.case.layout) == (op, layout)), key=lambda r: r.case.nbytes
        )
        for name in ordered({name for r in members for name in r.samples} | {"limit"}):
            points = []
            for r in members:
                rounds = limit_of(r.samples) if name == "limit" else r.samples.get(name)
                if rounds:
                    points.append((r.case.nbytes, float(np.median(rounds)) * 1e9 / r.case.shape.values))
            if points:
                axis.plot(*zip(*points, strict=True), "o-", ms=3, color=COLOURS[name], label=name)
        axis.set(xscale="log", yscale="log", title=f"{op}, {layout.upper()}")
        axis.set(xlabel="bytes of x", ylabel="nanoseconds per value")
        axis.grid(alpha=0.3)
        axis.legend(fontsize=7)
    return save(figure, folder / "sizes.png")


def draw_all(results: Results, folder: Path) -> list[Path]:
    """Bars for networks of several shapes, and the other two where their cases were measured."""
    networks = dict.fromkeys(result.case.shape.network for result in results.cases)
    paths = [path for network in networks if network != "sizes" for path in bars(results, network, folder)]
    return paths + [path for path in (roofline(results, folder), sizes(results, folder)) if path is not None]
