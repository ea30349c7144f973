"""How the experiments draw: one width, one font size, an accent colour for DEEP-GRPO and greys for everything else.

A figure is 8 inches wide and is saved with 200 dots per inch, so that its text is legible when a page shows it 800
pixels wide. Its title is a sentence with the message.
"""
import numpy as np

from trainer.plot import plt  # it chooses a backend that needs no screen

ACCENT, INK, GREY, LIGHT = "#c8102e", "#262626", "#6e6e6e", "#b4b4b4"
GREY_TO_ACCENT = plt.matplotlib.colors.LinearSegmentedColormap.from_list("", [GREY, "white", ACCENT])
plt.rcParams.update({
    "font.size": 10, "axes.titlesize": 11, "axes.titlelocation": "left", "axes.titleweight": "bold",
    "axes.spines.top": False, "axes.spines.right": False, "axes.edgecolor": GREY, "xtick.color": INK,
    "ytick.color": INK, "figure.titlesize": 12, "figure.titleweight": "bold"})


def new_figure(height, mosaic="a", **options):
    """(figure, name -> axis), as wide as all figures are. mosaic and options: those of plt.subplot_mosaic."""
    figure, axes = plt.subplot_mosaic(mosaic, figsize=(8, height), layout="constrained", **options)
    figure.get_layout_engine().set(w_pad=0.12, h_pad=0.08)
    return figure, axes


def save_figure(figure, path):
    """Write the PNG and close the figure."""
    figure.savefig(path, dpi=200)
    plt.close(figure)


def plot_accuracies(axis, curves, end) -> list[np.ndarray]:
    """The mean over seeds of every curve, in percent, from x = 0 to `end`, with its seeds behind it, named at its end.

    curves: (name, colour, line style, [(x, y) of every seed]). Returns the means at 61 places from 0 to the end.
    """
    grid, means = np.linspace(0, end, 61), []
    for name, colour, style, seeds in curves:
        for x, y in seeds:
            axis.plot(x, y, color=colour, alpha=0.25, linewidth=0.8)
        means.append(np.mean([np.interp(grid, x, y) for x, y in seeds], axis=0))
        axis.plot(grid, means[-1], style, color=colour, linewidth=2.5, label=name)
    height = np.inf
    for mean, (name, colour, *_) in sorted(zip(means, curves), key=lambda pair: -pair[0][-1]):
        height = min(mean[-1], height - 8)           # names are kept apart from one another
        axis.annotate(name, (end, height), (6, 0), textcoords="offset points", va="center", color=colour,
                      annotation_clip=False)
    axis.set(xlim=(0, end), ylim=(0, 102), ylabel="greedy accuracy on\nheld-out questions (%)")
    return means


def plot_forest(axis, rows, columns=()):
    """A row per (label, mean, half width of the interval, colour, texts), from the top; a line at zero.

    texts: what stands at the right margin of the row, in one column per heading of `columns`.
    """
    def at_the_right(column, y, text, **style):
        axis.annotate(text, (1, y), (70 * (column + 1), 0), axis.get_yaxis_transform(), "offset points", ha="right",
                      annotation_clip=False, **style)

    for y, (_, mean, width, colour, texts) in enumerate(rows):
        axis.errorbar(mean, y, xerr=width if 0 < width < float("inf") else None, fmt="o", color=colour, markersize=7,
                      linewidth=2.2)
        for column, text in enumerate(texts):
            at_the_right(column, y, text, va="center")
    for column, heading in enumerate(columns):
        at_the_right(column, -0.7, heading, va="bottom", color=GREY, fontsize=9)
    low, high = axis.get_xlim()                      # room for the two words, on both sides of the line
    axis.set_xlim(min(low, 0.2 * (low - high)), max(high, 0.2 * (high - low)))
    axis.annotate("behind \u2190    \u2192 ahead", (0, -0.7), ha="center", va="bottom", color=GREY, fontsize=9)
    axis.axvline(0, color=INK, linewidth=1, zorder=0)
    axis.set(yticks=range(len(rows)), yticklabels=[row[0] for row in rows], ylim=(len(rows) - 0.4, -0.7))
    axis.tick_params(axis="y", length=0)
    axis.spines["left"].set_visible(False)
    axis.grid(axis="x", color=LIGHT, linewidth=0.5, alpha=0.6)
    for label, row in zip(axis.get_yticklabels(), rows):
        label.set_color(row[3])
