"""Bars of the speed-ups, one picture per group."""

from __future__ import annotations

from pathlib import Path

from benchmarks.experiment import Row

__all__ = ["draw"]


def draw(rows: list[Row], folder: Path) -> list[Path]:
    """Write ``<group>.png`` for every group with a speed-up in it, and return the paths."""
    import matplotlib

    matplotlib.use("Agg")
    paths = []
    for group in dict.fromkeys(row.group for row in rows):
        mine = [row for row in rows if row.group == group and any(p.speedup for p in row.peers)]
        if mine:
            paths.append(folder / (group.replace("/", "-") + ".png"))
            _draw_group(group, mine, paths[-1])
    return paths


def _draw_group(group: str, rows: list[Row], path: Path) -> None:
    from matplotlib import pyplot

    names = list(dict.fromkeys(p.name for row in rows for p in row.peers if p.speedup))
    colors = dict(zip(names, pyplot.get_cmap("tab10").colors, strict=False))
    bars = [(row, peer) for row in rows for peer in row.peers if peer.speedup]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.28 * len(bars)), layout="constrained")
    ticks, labels = [], []
    height = 0.0
    for row in rows:
        mine = [peer for peer in row.peers if peer.speedup]
        for offset, peer in enumerate(mine):
            ratio = peer.speedup
            error = [[ratio.median - ratio.low], [ratio.high - ratio.median]]
            axes.barh(height + offset, ratio.median, 0.85, xerr=error, color=colors[peer.name], capsize=2)
            axes.text(ratio.high, height + offset, f"  {ratio.median:.2f}", va="center", fontsize=8)
        ticks.append(height + (len(mine) - 1) / 2)
        labels.append(f"{row.shape}\n{row.dtype}" if len(mine) > 1 else f"{row.shape} {row.dtype}")
        height += len(mine) + 0.6
    axes.set_yticks(ticks, labels, fontsize=8)
    axes.invert_yaxis()
    axes.axvline(1.0, color="black", linewidth=0.8)
    axes.margins(x=0.12)
    axes.set_xlabel("speed-up over the peer (median, 10th to 90th percentile)")
    axes.set_title(group)
    handles = [pyplot.Rectangle((0, 0), 1, 1, color=colors[name]) for name in names]
    axes.legend(handles, names, fontsize=8, loc="lower right")
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
