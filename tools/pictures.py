"""Pictures of a comparison: how runs learn, what density does, what the texts are like. Used by compare_stages.py.

Colours of Okabe and Ito, which colour-blind people can tell apart; each run has its own marker and its name beside
it, too. Each picture is 8 inches wide: at 800 pixels its letters are as large as the text around it.
"""

from pathlib import Path

import measures

COLORS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
MARKS = "osD^vPX<>*d"
REAL, CHANCE = "#000000", "#777777"
SIZES = {"font.size": 11, "axes.labelsize": 11, "axes.titlesize": 11, "xtick.labelsize": 10, "ytick.labelsize": 10}


def style(number: int) -> dict:
    """The colour and the mark of a run."""
    return dict(color=COLORS[number % len(COLORS)], marker=MARKS[number % len(MARKS)])


def plain_numbers(axis):
    """Label an axis with logarithmic steps 0.1, 0.3, 1, 3 and so on instead of powers of ten."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
    axis.set_major_locator(LogLocator(subs=(1, 3)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
    axis.set_minor_formatter(NullFormatter())


def spread(values: list[float], least: float, bounds: tuple[float, float]) -> list[float]:
    """Heights for labels, near the values but at least this far from each other. Example:
    >>> [round(height, 2) for height in spread([1.0, 1.1, 3.0], 0.5, (0, 4))]
    [0.8, 1.3, 3.0]
    """
    groups = [[value] for value in sorted(values)]
    middles = [group[0] for group in groups]
    i = 0
    while i < len(groups) - 1:
        apart = least * (len(groups[i]) + len(groups[i + 1])) / 2
        if middles[i + 1] - middles[i] >= apart - 1e-9:
            i += 1
            continue
        groups[i] += groups.pop(i + 1)
        middles[i] = sum(groups[i]) / len(groups[i])
        middles.pop(i + 1)
        i = max(0, i - 1)
    placed = [middle + least * (k - (len(group) - 1) / 2) for middle, group in zip(middles, groups) for k in range(len(group))]
    shift = max(0.0, bounds[0] - placed[0]) if placed else 0.0
    order = sorted(range(len(values)), key=values.__getitem__)
    heights = [0.0] * len(values)
    for place, i in zip(placed, order):
        heights[i] = place + shift
    return heights


def learning_curves(path: Path, runs: list, yards: list):
    """Bits per character of the validation text against the characters read so far; the yardsticks as lines."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 5.2), layout="constrained")
    axes = figure.add_subplot(xlabel="characters read in training, millions (logarithmic)", xscale="log",
                              ylabel="bits per character of the validation text")
    shown = [run for run in runs if len(run.curve) > 1]
    labels = []
    for number, run in enumerate(runs):
        if run in shown:
            x, y = zip(*((chars / 1e6, bits) for chars, bits in run.curve if chars))
            axes.plot(x, y, markersize=5, linewidth=1.5, **style(number))
            labels.append((min(y), run.name, style(number)["color"], x[-1], y[-1]))
    if not labels:
        return
    top = max(y for run in shown for _, y in run.curve[1:])
    top = min(top, 1.75 * min(label[0] for label in labels))  # a model that has memorized goes far above
    low = min([label[0] for label in labels] + [yard.values["val_bpc"] for yard in yards]) - 0.08
    axes.set_ylim(low, top)
    for yard in yards:
        bits = yard.values["val_bpc"]
        axes.axhline(bits, color=CHANCE, linestyle=":", linewidth=1.2)
        axes.annotate(yard.name, (0.01, bits), xycoords=("axes fraction", "data"), va="bottom", fontsize=9, color="#555555")
    ends = [min(label[4], top) for label in labels]
    heights = spread(ends, (top - low) / 24, (low, top))
    for (best, name, color, x, _), end, height in zip(labels, ends, heights):
        axes.annotate(f"{name} {best:.3f}", (x, end), (1.02, height), textcoords=("axes fraction", "data"), va="center",
                      fontsize=10, color=color, annotation_clip=False,
                      arrowprops=dict(arrowstyle="-", color=color, linewidth=0.6, alpha=0.6))
    plain_numbers(axes.xaxis)
    axes.set_title("Which learns most from one text? Beside each name: its best", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def densities(path: Path, runs: list):
    """Bits per character against how often an entry is seen: a point for each vocabulary."""
    from matplotlib.figure import Figure
    figure = Figure(figsize=(8, 4.6), layout="constrained")
    axes = figure.add_subplot(xlabel="density: times that an entry is seen in a pass over the text (logarithmic)", xscale="log",
                              ylabel="bits per character of the validation text")
    points = [(number, run) for number, run in enumerate(runs) if run.values["val_bpc"] is not None and not run.last]
    for number, run in points:
        x, y = run.values["tokens_per_vocab_entry"], run.values["val_bpc"]
        axes.plot(x, y, markersize=9, linestyle="", markerfacecolor="none" if run.stage == "hf" else None, **style(number))
    bits = [run.values["val_bpc"] for _, run in points]
    least = (max(bits) - min(bits) or 1) / 16
    for (number, run), height in zip(points, spread(bits, least, (min(bits), max(bits)))):
        x, y = run.values["tokens_per_vocab_entry"], run.values["val_bpc"]
        axes.annotate(f"{run.name}, {run.values['vocab_size']:,}", (x, y), (x * 1.15, height), va="center", fontsize=10,
                      color=style(number)["color"])
    axes.set_xlim(right=max(run.values["tokens_per_vocab_entry"] for _, run in points) * 6)
    axes.margins(y=0.12)
    plain_numbers(axes.xaxis)
    axes.set_title("Do entries that are seen often make a better guess? (name, entries; hollow: had read before)", loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def intervals(path: Path, runs: list, texts: list):
    """Rhymes, real words and repeated lines with their intervals, each beside the real text's and chance."""
    from matplotlib.figure import Figure
    rows, real = [*runs, *texts], texts[0]
    figure = Figure(figsize=(8, 1.5 + 0.33 * len(rows)), layout="constrained")
    names = [name for name in ("rhyming", "assonance", "real", "repeated") if name in real.draws]
    every = figure.subplots(1, len(names), sharey=True)
    titles = dict(rhyming="rhyming lines", assonance="with an assonance", real="real words", repeated="lines repeated")
    every[0].set_yticks(range(len(rows)), [run.name for run in rows])
    every[0].invert_yaxis()
    for axes, name in zip(every, names):
        axes.axvspan(*measures.interval(real.draws[name]), color=REAL, alpha=0.12, linewidth=0)
        for place, run in enumerate(rows):
            low, high = measures.interval(run.draws[name])
            color = style(place)["color"] if run in runs else REAL if run is real else CHANCE
            axes.plot([low, high], [place, place], color=color, linewidth=2.5, solid_capstyle="butt")
            axes.plot(run.values[name], place, marker="o", markersize=5, color=color)
            by_chance = run.values.get(f"{name}_chance")
            if by_chance is not None and run.stage:
                axes.plot(by_chance, place, marker="|", markersize=9, color=CHANCE, linestyle="")
        axes.set_title(titles[name])
        axes.set_xlabel("%")
        axes.grid(axis="y", color="#dddddd", linewidth=0.5)
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
    figure.supxlabel("lines: 95 % intervals; grey band: the validation text; grey strokes: a run's own lines shuffled",
                     fontsize=9)
    figure.savefig(path, dpi=150)


def draw(out: Path, runs: list, texts: list, yards: list):
    """Write curves.png, density.png and texts.png to a folder."""
    import matplotlib
    with matplotlib.rc_context(SIZES):
        learning_curves(out / "curves.png", runs, yards)
        densities(out / "density.png", runs)
        intervals(out / "texts.png", runs, texts)
