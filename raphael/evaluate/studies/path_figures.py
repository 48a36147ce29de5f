"""Figures of the path analysis, as PNG. matplotlib's Figure, without pyplot: no window system, nothing global."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from raphael.evaluate.studies.path_classifier import one_hot

INK, SOFT, LINE, ACCENT, GROUND = "#211d18", "#6d655b", "#e6e0d6", "#ad4a28", "#faf8f4"
COLOURS = ["#2f5f8f", "#c9703a", "#4f8a62", "#8d5a91", "#c79a22", "#3f95a0", "#a94a5c", "#7b7467"]  # report.css
KIND_COLOURS = {"adjectives": COLOURS[0], "nouns": COLOURS[1], "verbs": COLOURS[2]}
DPI = 140


def confusion_chart(file: Path, confusion: np.ndarray, words: Sequence[str], kind: str) -> None:
    """(classes, classes) shares, rows sum to 1; words of like ways stand together, so that confusions form blocks."""
    from scipy.cluster.hierarchy import leaves_list, linkage

    likeness = (confusion + confusion.T) / 2
    order = leaves_list(linkage(1 - likeness[np.triu_indices(len(words), 1)], "average", optimal_ordering=True))
    side = 2.2 + 0.105 * len(words)
    figure = _figure(side, side)
    axes = figure.subplots(subplot_kw={"facecolor": GROUND})
    shown = axes.imshow(confusion[np.ix_(order, order)], vmin=0, vmax=1, cmap=_map(), interpolation="nearest")
    labels = [words[place] for place in order]
    axes.set_xticks(range(len(words)), labels, rotation=90, fontsize=5.5)
    axes.set_yticks(range(len(words)), labels, fontsize=5.5)
    axes.tick_params(length=0, pad=1)
    axes.spines[:].set_visible(False)
    axes.set_ylabel("the word")
    axes.set_xlabel("read from its path as")
    axes.set_title(f"{len(words)} {kind}, read {np.diag(confusion).mean():.1%} right", fontsize=10, loc="left")
    bar = figure.colorbar(shown, ax=axes, shrink=0.4, pad=0.01)
    bar.outline.set_visible(False)
    bar.ax.tick_params(labelsize=6, length=0)
    figure.savefig(file)


def word_map(file: Path, kinds: dict[str, tuple[Sequence[str], np.ndarray]], experts: int) -> dict[str, Any]:
    """Words in path space: the first two principal components of each word's mean one-hot path.

    kinds: {name: (words, paths (words * sentences, blocks), word by word)}. In this space the squared distance of two
    single paths is twice their Hamming distance. Returns {"explained": [2 shares], "words": {kind: {word: [x, y]}}};
    a word may be of two kinds (orange).
    """
    from sklearn.decomposition import PCA

    means, names, colours = [], [], []
    for kind, (words, paths) in kinds.items():
        rows = one_hot(paths, experts).reshape(len(words), -1, paths.shape[1] * experts)
        means.append(rows.mean(1))
        names += words
        colours += [KIND_COLOURS.get(kind, INK)] * len(words)
    flat = PCA(n_components=2, svd_solver="full")
    points = flat.fit_transform(np.concatenate(means).astype(np.float64))
    figure = _figure(9.2, 7.4)
    axes = figure.subplots(subplot_kw={"facecolor": GROUND})
    axes.scatter(*points.T, c=colours, s=9, linewidths=0, alpha=0.9)
    for name, (x, y), colour in zip(names, points, colours, strict=True):
        axes.annotate(name, (x, y), (2.5, 1.5), textcoords="offset points", fontsize=5.6, color=colour)
    axes.set_xlabel(f"first component ({flat.explained_variance_ratio_[0]:.0%} of the variance)", color=SOFT)
    axes.set_ylabel(f"second ({flat.explained_variance_ratio_[1]:.0%})", color=SOFT)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.spines[:].set_color(LINE)
    for kind in kinds:
        axes.scatter([], [], c=KIND_COLOURS.get(kind, INK), s=22, label=kind)
    axes.legend(frameon=False, loc="upper left", fontsize=8)
    figure.savefig(file)
    rows = iter(points.round(6).tolist())
    placed = {kind: {word: next(rows) for word in words} for kind, (words, _) in kinds.items()}
    return {"explained": [float(share) for share in flat.explained_variance_ratio_], "words": placed}


def accuracy_chart(file: Path, kinds: dict[str, Any]) -> None:
    """Trained gates beside every set of untrained ones, chance as a stroke; kinds: as in paths.json."""
    figure = _figure(6.2, 0.9 + 0.75 * len(kinds))
    axes = figure.subplots(subplot_kw={"facecolor": GROUND})
    for row, found in enumerate(kinds.values()):
        others = [part["accuracy"] for part in found["untrained"]]
        axes.plot([0, 1], [row, row], color=LINE, lw=1, zorder=0)
        rings = {"ms": 6, "mfc": "none", "mec": INK, "zorder": 3}  # above the trained dot, or one that is equal is lost
        axes.plot(others, [row] * len(others), "o", label="untrained gates" if not row else None, **rings)
        label = "trained" if not row else None
        axes.plot([found["trained"]["accuracy"]], [row], "o", ms=8, color=ACCENT, label=label)
        axes.plot([found["chance"]] * 2, [row - 0.2, row + 0.2], color=INK, lw=1.4, label="chance" if not row else None)
        axes.text(1.03, row, f"{found['trained']['accuracy']:.1%}", va="center", fontsize=10, color=ACCENT)
    axes.set_yticks(range(len(kinds)), [f"{found['words']} {kind}" for kind, found in kinds.items()])
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0", "25 %", "50 %", "75 %", "100 %"], color=SOFT, fontsize=8)
    axes.set_ylim(len(kinds) - 0.5, -0.5)
    axes.set_xlim(-0.02, 1.16)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    figure.legend(*axes.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False, fontsize=8)
    figure.savefig(file)


def time_route_chart(file: Path, times: dict[str, Any]) -> None:
    """Block by timestep, coloured by the time expert in charge (RAPHAEL, figure 9); noise at the left."""
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    table = np.asarray(times["experts"])[:, ::-1]
    experts = int(table.max()) + 1
    cmap = ListedColormap([COLOURS[expert % len(COLOURS)] for expert in range(experts)])
    figure = _figure(8.4, 1.2 + 0.26 * len(table))
    axes = figure.subplots(subplot_kw={"facecolor": GROUND})
    axes.imshow(table, aspect="auto", cmap=cmap, vmin=-0.5, vmax=experts - 0.5, interpolation="nearest")
    for edge in range(1, len(table)):
        axes.axhline(edge - 0.5, color="white", lw=2.5)
    axes.set_yticks(range(len(table)), [f"block {block + 1}" for block in range(len(table))], fontsize=8)
    places = np.linspace(0, table.shape[1] - 1, 5).round().astype(int)
    stamps = times["timesteps"][::-1]
    axes.set_xticks(places, [f"t = {stamps[place]}" for place in places], fontsize=8, color=SOFT)
    axes.tick_params(length=0)
    axes.spines[:].set_visible(False)
    axes.set_title("noise", fontsize=9, loc="left", color=SOFT)
    axes.set_title("image", fontsize=9, loc="right", color=SOFT)
    used = [Patch(color=cmap(expert), label=f"time expert {expert + 1}") for expert in sorted(set(table.flat))]
    figure.legend(handles=used, loc="outside lower center", ncols=len(used), frameon=False, fontsize=8)
    figure.savefig(file)


def _figure(width: float, height: float) -> Any:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=DPI, layout="constrained", facecolor=GROUND)


def _map() -> Any:
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("paths", [GROUND, "#e9b08f", "#ad4a28", "#3a1408"])
