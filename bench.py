"""Measures sublin and draws the figures in plots/.

    python bench.py               everything, at most 6 minutes on two cores
    python bench.py --quick       a small version of it, under a minute
    python bench.py --plot-only   draws the figures again from the JSON files

Every figure has a JSON of the same name beside it with all samples and the environment, and is drawn from it alone.
Methods are compared before anything is timed; then they take turns, so that a change in the machine's speed meets all
of them alike, and medians are reported.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from importlib.metadata import version
from pathlib import Path

import matplotlib
import numba
import numpy as np

import sublin

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PLOTS = Path(__file__).resolve().parent / "plots"
STEPS = 4  # steps of each timed run; the residual is at the rounding of float32 then

# label, search, solver, colour (Okabe and Ito's palette), marker
METHODS = {
    "dense": ("dense", "dense", "cholesky", "#D55E00", "s"),
    "scan": ("scan", "scan", "cholesky", "#E69F00", "^"),
    "tree": ("tree", "tree", "cholesky", "#0072B2", "o"),
    "tree+sketch": ("tree + sketch", "tree", "sketch", "#009E73", "D"),
}
PHASES = {  # label, colour
    "seconds_query": ("find active neurons, outputs", "#0072B2"),
    "seconds_jacobian": ("Gram matrix", "#E69F00"),
    "seconds_solve": ("solve", "#000000"),
    "seconds_update": ("move weights or products", "#CC79A7"),
}


# ----------------------------------------------------------------------------------------------------------------------
# Measuring
# ----------------------------------------------------------------------------------------------------------------------


class Progress:
    """A bar on stderr: done work over all work, in units the caller chooses."""

    def __init__(self, total):
        self.total, self.done, self.begin = total, 0.0, time.perf_counter()

    def add(self, amount, what):
        self.done += amount
        filled = round(30 * self.done / self.total)
        elapsed = time.perf_counter() - self.begin
        print(f"\r[{'#' * filled}{'.' * (30 - filled)}] {elapsed:4.0f} s  {what:<44}", end="", file=sys.stderr, flush=True)
        if self.done >= self.total * (1 - 1e-9):
            print(file=sys.stderr)


def environment():
    """Versions, processor, threads."""
    processor = platform.processor() or platform.machine()
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            processor = next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), processor)
    return {
        "python": platform.python_version(),
        **{name: version(name) for name in ("numpy", "scipy", "numba", "matplotlib", "scikit-learn")},
        "platform": platform.platform(),
        "processor": processor,
        "cores": os.cpu_count(),
        "numba threads": numba.get_num_threads(),
        "threading layer": numba.threading_layer(),
    }


def random_unit_data(n, d, seed=0):
    """Uniform points on the sphere, labels +1 and -1."""
    rng = np.random.default_rng(seed)
    X = rng.standard_normal((n, d))
    return X / np.linalg.norm(X, axis=1, keepdims=True), np.where(rng.random(n) < 0.5, -1.0, 1.0)


def train(method, X, y, width, **options):
    """A trained network of one of the METHODS, silent about not converging: the runs stop after a number of steps."""
    _, search, solver, _, _ = METHODS[method]
    options = {"dtype": "float32", "normalize": None, "random_state": 0, "tol": 0.0, "max_iter": STEPS, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return sublin.SublinearTrainer(width, search=search, solver=solver, **options).fit(X, y)


def check_agreement(X, y, width, methods):
    """Refuses to time methods that do not take the same steps as dense Gauss-Newton in float64."""
    residuals = {
        name: np.array([record["residual"] for record in train(name, X, y, width, dtype="float64").history_])
        for name in methods
    }
    for name, found in residuals.items():
        exact = METHODS[name][2] == "cholesky"
        expected = residuals["dense"]
        # The sketched solver stops early on purpose: its steps agree to its tolerance, not to rounding.
        close = np.isclose(found, expected, rtol=1e-6, atol=1e-9) if exact else found <= 2.0 * expected + 1e-3
        if not close.all():
            raise SystemExit(f"{name} and dense disagree at width {width}: residuals {found} and {expected}")


def plain_numpy_step(X, y, W, signs, shift):
    """One Gauss-Newton step as one would write it in NumPy, all dense, in float32; returns the new weights."""
    m = len(W)
    excess = X @ W.T
    excess -= np.float32(shift)
    np.maximum(excess, 0, out=excess)
    outputs = excess @ signs / np.sqrt(m)
    active = (excess > 0).astype(np.float32)
    gram = (X @ X.T) * (active @ active.T) / m
    step = np.linalg.solve(gram.astype(float), (outputs - y).astype(float)).astype(np.float32)
    active *= step[:, None]
    active *= signs / np.float32(np.sqrt(m))
    return W - active.T @ X


def time_numpy(X, y, width, repeats):
    """Seconds of the plain NumPy step, and of its first matrix product alone."""
    start = train("dense", X, y, width, max_iter=0)
    W, signs = start.weights().astype(np.float32), start.signs_.astype(np.float32)
    X, y, shift = X.astype(np.float32), y.astype(np.float32), start.shift_
    products = np.empty((len(X), width), np.float32)
    samples = {"numpy": [], "matrix product": []}
    for _ in range(repeats + 1):
        begin = time.perf_counter()
        plain_numpy_step(X, y, W, signs, shift)
        middle = time.perf_counter()
        np.matmul(X, W.T, out=products)
        samples["numpy"].append(middle - begin)
        samples["matrix product"].append(time.perf_counter() - middle)
    return {name: {"seconds": values[1:]} for name, values in samples.items()}  # the first is a warm-up


def measure_steps(n, d, widths, methods, repeats, progress):
    """For each width and method, the records of all steps of `repeats` runs, the methods taking turns."""
    X, y = random_unit_data(n, d)
    cells = []
    for width in widths:
        cell = {"n": n, "d": d, "width": width, "methods": {}}
        for turn in range(repeats + 1):
            for name in methods:
                trainer = train(name, X, y, width)
                steps = cell["methods"].setdefault(name, {"init_seconds": [], "steps": []})
                if turn > 0:  # the first turn is a warm-up
                    steps["init_seconds"].append(trainer.init_seconds_)
                    steps["steps"] += trainer.history_[1:]
                progress.add(n * width, f"n = {n}, width = {width}: {name}")
        cells.append(cell)
    return cells


def compile_seconds():
    """Seconds of a small first fit on an empty compile cache, and of the same fit again, in a new process."""
    code = (
        "import time, numpy as np, sublin, bench\n"
        "X, y = bench.random_unit_data(16, 8)\n"
        "for _ in range(2):\n"
        "    begin = time.perf_counter()\n"
        "    sublin.SublinearTrainer(1024, shift=1.0, random_state=0).fit(X, y)\n"
        "    print(time.perf_counter() - begin)\n"
    )
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "NUMBA_CACHE_DIR": folder}
        run = [sys.executable, "-c", code]
        out = subprocess.run(run, cwd=Path(__file__).parent, env=environ, check=True, capture_output=True, text=True)
    first, second = map(float, out.stdout.split())
    return {"first_fit": first, "second_fit": second}


def measure_scaling(quick):
    """Steps over the width at n = 16, and the headline cases; returns the content of scaling.json."""
    small = [1 << k for k in (range(10, 14) if quick else range(12, 21))]
    headline = 1 << (14 if quick else 20)
    repeats = 2 if quick else 4
    for width in small[:3]:
        check_agreement(*random_unit_data(16, 16), width, METHODS)
    check_agreement(*random_unit_data(64, 32), headline >> 4, METHODS)
    turns = (repeats + 1) * len(METHODS)
    progress = Progress(turns * (16 * sum(small) + 64 * headline) + 64 * headline)
    cells = measure_steps(16, 16, small, METHODS, repeats, progress)
    cells += measure_steps(64, 32, [headline], METHODS, repeats, progress)
    X, y = random_unit_data(64, 32)
    cells[-1]["methods"] |= time_numpy(X, y, headline, repeats)
    progress.add(64 * headline, "plain NumPy")
    data = {"environment": environment(), "steps_per_run": STEPS, "dtype": "float32", "cells": cells}
    if not quick:
        print("compile time ...", file=sys.stderr)
        data["compile_seconds"] = compile_seconds()
    return data


def measure_digits(quick):
    """Residuals on scikit-learn's digits, odd against even, all 1797 points, for dense and tree."""
    from sklearn.datasets import load_digits

    X, labels = load_digits(return_X_y=True)
    X, width, tol = (X[:300], 1 << 12, 1e-2) if quick else (X, 1 << 15, 1e-6)
    y = np.where(labels[: len(X)] % 2, 1.0, -1.0)
    runs = []
    turns = 1 if quick else 3
    progress = Progress(2 * turns)
    for _ in range(turns):
        for name in ("dense", "tree"):
            trainer = train(name, X, y, width, normalize="lift", dtype="float64", tol=tol, max_iter=50)
            runs.append({"method": name, "init_seconds": trainer.init_seconds_, "history": trainer.history_})
            progress.add(1, f"digits: {name}")
    residuals = [[record["residual"] for record in run["history"]] for run in runs]
    for found in residuals[1:]:
        if len(found) != len(residuals[0]) or not np.allclose(found, residuals[0], rtol=1e-4, atol=1e-9):
            raise SystemExit(f"dense and tree disagree on digits: {found} and {residuals[0]}")
    return {
        "environment": environment(),
        "n": len(X),
        "d": X.shape[1] + 1,
        "width": width,
        "shift": trainer.shift_,
        "n_live": trainer.n_live_,
        "dtype": "float64",
        "runs": runs,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Drawing
# ----------------------------------------------------------------------------------------------------------------------


def median_over_steps(cell, method, key):
    return float(np.median([step[key] for step in cell["methods"][method]["steps"]]))


def slope(widths, values):
    """Exponent p of the least-squares fit value = c width^p."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def summary(data):
    """Slopes and ratios, for the figures and the README; also printed."""
    cells = data["cells"]
    sweep = [cell for cell in cells if cell["n"] == 16]
    fitted = [cell for cell in sweep if cell["width"] >= 1 << 14] or sweep
    widths = [cell["width"] for cell in fitted]
    slopes = {
        name: {
            key: slope(widths, [median_over_steps(cell, name, key) for cell in fitted]) for key in ("seconds", "operations")
        }
        for name in METHODS
    }
    ratios = []
    for cell in (sweep[-1], cells[-1]):
        dense = median_over_steps(cell, "dense", "seconds")
        row = {"n": cell["n"], "d": cell["d"], "width": cell["width"], "dense_ms": 1e3 * dense}
        row |= {f"dense / {name}": dense / median_over_steps(cell, name, "seconds") for name in METHODS if name != "dense"}
        for name in ("numpy", "matrix product"):
            if name in cell["methods"]:
                row[f"{name} / tree"] = np.median(cell["methods"][name]["seconds"]) / median_over_steps(
                    cell, "tree", "seconds"
                )
                row[f"dense / {name}"] = dense / np.median(cell["methods"][name]["seconds"])
        ratios.append(row)
    return {"slopes": slopes, "fitted_from": widths[0], "ratios": ratios}


def style():
    plt.rcParams.update(
        {
            "figure.dpi": 100,
            "savefig.dpi": 150,
            "font.size": 12,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.color": "#dddddd",
            "axes.axisbelow": True,
            "legend.frameon": False,
        }
    )


def power_label(value):
    exponent = round(np.log2(value))
    return f"$2^{{{exponent}}}$" if value == 2**exponent else f"{value:g}"


def width_axis(axis, widths):
    axis.set_xscale("log", base=2)
    axis.set_xticks(widths[:: max(1, len(widths) // 5)])
    axis.set_xlabel("width m (neurons)")


def draw_scaling(data, path):
    """Cost of a step against width: seconds on the left, counted operations on the right."""
    sweep = [cell for cell in data["cells"] if cell["n"] == 16]
    widths = np.array([cell["width"] for cell in sweep])
    slopes = data["summary"]["slopes"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 5), layout="constrained")
    for axis, key, unit in zip(axes, ("seconds", "operations"), (1e3, 1.0), strict=True):
        for name, (label, _, _, colour, marker) in METHODS.items():
            if key == "operations" and name == "tree+sketch":
                continue  # the counts are of search and update, which are those of tree
            values = unit * np.array([median_over_steps(cell, name, key) for cell in sweep])
            legend = f"{label}, slope {slopes[name][key]:.2f}"
            axis.plot(widths, values, marker=marker, color=colour, label=legend, linewidth=2, markersize=6)
            for guided, power, dashes in (("dense", 1.0, "--"), ("tree", 0.76, ":")):
                if name == guided:
                    guide = values[-1] * (widths / widths[-1]) ** power
                    axis.plot(widths, guide, color="#777777", linestyle=dashes, linewidth=1.5, zorder=1)
        axis.plot([], [], color="#777777", linestyle="--", label="slope 1")
        axis.plot([], [], color="#777777", linestyle=":", label="slope 0.76, the paper's exponent")
        axis.set_yscale("log")
        axis.set_ylim(top=axis.get_ylim()[1] * 30)  # room for the legend
        width_axis(axis, widths)
        axis.legend(fontsize=10, ncols=2, loc="upper left")
    axes[0].set_ylabel("milliseconds a step (median)")
    axes[0].set_title("Time of a Gauss-Newton step")
    axes[1].set_ylabel("operations a step")
    axes[1].set_title("Operations to search and update, counted")
    first = sweep[0]
    figure.suptitle(f"n = {first['n']} random unit points in d = {first['d']}, products in float32", fontsize=12)
    figure.savefig(path)
    plt.close(figure)


def draw_phases(data, path):
    """Where a step's time goes: shares by phase, with the total above each bar."""
    sweep = [cell for cell in data["cells"] if cell["n"] == 16]
    names = list(METHODS)
    figure, axes = plt.subplots(1, len(names), figsize=(3.2 * len(names), 4.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        places = np.arange(len(sweep))
        parts = np.array([[median_over_steps(cell, name, phase) for phase in PHASES] for cell in sweep])
        totals = parts.sum(axis=1)
        bottom = np.zeros(len(sweep))
        for part, (label, colour) in zip((parts / totals[:, None]).T, PHASES.values(), strict=True):
            axis.bar(places, 100 * part, bottom=bottom, color=colour, label=label, width=0.8)
            bottom += 100 * part
        for place, total in zip(places, totals, strict=True):
            axis.text(place, 101, f"{1e3 * total:#.2g}".rstrip("."), ha="center", fontsize=8)
        axis.set_xticks(places[::2], [power_label(cell["width"]) for cell in sweep[::2]])
        axis.set_xlabel("width m")
        axis.set_title(METHODS[name][0], pad=16)
        axis.grid(False)
    axes[0].set_ylabel("share of a step's time (%)\nabove: milliseconds")
    handles, labels = axes[0].get_legend_handles_labels()
    labels = ["Gram matrix or sketch" if label == "Gram matrix" else label for label in labels]
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def draw_digits(data, path):
    """Residual on digits against iterations and against seconds, initialisation included."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for name in ("dense", "tree"):
        label, _, _, colour, marker = METHODS[name]
        runs = [run for run in data["runs"] if run["method"] == name]
        residuals = [record["residual"] for record in runs[0]["history"]]
        seconds = np.median(
            [run["init_seconds"] + np.cumsum([record["seconds"] for record in run["history"]]) for run in runs], axis=0
        )
        line = {"color": colour, "marker": marker, "label": label, "linewidth": 2, "markersize": 9 if name == "dense" else 5}
        axes[0].plot(range(len(residuals)), residuals, **line)
        axes[1].plot(seconds, residuals, **line)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("relative residual |f - y| / |y|")
    axes[0].set_xlabel("Gauss-Newton steps")
    axes[0].set_title("The same steps ...")
    axes[1].set_xlabel("seconds, initialisation included (median)")
    axes[1].set_title("... in other times")
    for axis in axes:
        axis.legend()
    figure.suptitle(f"Digits, odd against even: n = {data['n']}, width {power_label(data['width'])}, float64", fontsize=12)
    figure.savefig(path)
    plt.close(figure)


def write(name, data):
    PLOTS.mkdir(exist_ok=True)
    (PLOTS / f"{name}.json").write_text(json.dumps(data, indent=1))


def read(name):
    return json.loads((PLOTS / f"{name}.json").read_text())


def draw_all(suffix):
    style()
    scaling, digits = read("scaling" + suffix), read("digits" + suffix)
    draw_scaling(scaling, PLOTS / f"scaling{suffix}.png")
    draw_phases(scaling, PLOTS / f"phases{suffix}.png")
    draw_digits(digits, PLOTS / f"digits{suffix}.png")
    for name, found in scaling["summary"]["slopes"].items():
        print(f"{name:12s} slope of seconds {found['seconds']:.2f}, of operations {found['operations']:.2f}")
    for row in scaling["summary"]["ratios"]:
        print(
            "  ".join(f"{key} {value:.3g}" if isinstance(value, float) else f"{key} = {value}" for key, value in row.items())
        )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small version, to see that all works")
    parser.add_argument("--plot-only", action="store_true", help="draw the figures again from the JSON files")
    arguments = parser.parse_args()
    suffix = "-quick" if arguments.quick else ""  # never overwrites the real figures
    if not arguments.plot_only:
        begin = time.perf_counter()
        scaling = measure_scaling(arguments.quick)
        scaling["summary"] = summary(scaling)
        write("scaling" + suffix, scaling)
        write("digits" + suffix, measure_digits(arguments.quick))
        print(f"measured in {time.perf_counter() - begin:.0f} s", file=sys.stderr)
    draw_all(suffix)


if __name__ == "__main__":
    main()
