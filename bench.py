"""Measures sublin and draws the figures in plots/.

    python bench.py               everything, at most 6 minutes on two cores
    python bench.py --quick       a small version of it, under a minute
    python bench.py --plot-only   draws the figures again from the JSON files

Every figure has a JSON beside it with the samples and the environment, and is drawn from it alone.
The four methods are compared before they are timed; then they take turns, so that a change in the machine's speed meets
all of them alike, and medians are reported.
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
from typing import NamedTuple

import matplotlib
import numba
import numpy as np

import sublin

matplotlib.use("Agg")
import matplotlib.pyplot as plt

PLOTS = Path(__file__).resolve().parent / "plots"
STEPS = 4  # steps of each timed run; the residual is at the rounding of float32 then


class Method(NamedTuple):
    label: str
    search: str
    solver: str
    colour: str  # of Okabe and Ito's palette
    marker: str


METHODS = {
    "dense": Method("dense", "dense", "cholesky", "#D55E00", "s"),
    "scan": Method("scan", "scan", "cholesky", "#E69F00", "^"),
    "tree": Method("tree", "tree", "cholesky", "#0072B2", "o"),
    "tree+sketch": Method("tree + sketch", "tree", "sketch", "#009E73", "D"),
}
PHASES = {  # label, colour
    "seconds_query": ("find active neurons, outputs", "#0072B2"),
    "seconds_jacobian": ("Gram matrix or sketch", "#E69F00"),
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
    search, solver = METHODS[method].search, METHODS[method].solver
    options = {"dtype": "float32", "normalize": None, "random_state": 0, "tol": 0.0, "max_iter": STEPS, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return sublin.SublinearTrainer(width, search=search, solver=solver, **options).fit(X, y)


def check_agreement(X, y, width, methods=tuple(METHODS), **options):
    """Refuses to time methods that do not take the same steps as dense Gauss-Newton in float64."""
    residuals = {
        name: np.array([record["residual"] for record in train(name, X, y, width, dtype="float64", **options).history_])
        for name in methods
    }
    for name, found in residuals.items():
        exact = METHODS[name].solver == "cholesky"
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


class NumpySteps:
    """Times the plain NumPy step, and its first matrix product alone, from the starting weights."""

    def __init__(self, X, y, width):
        start = train("dense", X, y, width, max_iter=0)
        self.W, self.signs = start.weights().astype(np.float32), start.signs_.astype(np.float32)
        self.X, self.y, self.shift = X.astype(np.float32), y.astype(np.float32), start.shift_
        self.products = np.empty((len(X), width), np.float32)

    def time(self, steps):
        samples = {"numpy": [], "matrix product": []}
        for _ in range(steps):
            begin = time.perf_counter()
            plain_numpy_step(self.X, self.y, self.W, self.signs, self.shift)
            middle = time.perf_counter()
            np.matmul(self.X, self.W.T, out=self.products)
            samples["numpy"].append({"seconds": middle - begin})
            samples["matrix product"].append({"seconds": time.perf_counter() - middle})
        return samples


def measure_steps(n, d, widths, repeats, progress, with_numpy=False):
    """For each width, the records of all steps of `repeats` runs of each method, the methods taking turns."""
    X, y = random_unit_data(n, d)
    cells = []
    for width in widths:
        cell = {"n": n, "d": d, "width": width, "methods": {}}
        plain = NumpySteps(X, y, width) if with_numpy else None
        for turn in range(repeats + 1):
            for name in METHODS:
                trainer = train(name, X, y, width)
                samples = cell["methods"].setdefault(name, {"init_seconds": [], "steps": []})
                if turn > 0:  # the first turn is a warm-up
                    samples["init_seconds"].append(trainer.init_seconds_)
                    samples["steps"] += trainer.history_[1:]
                del trainer
                progress.add(n * width, f"n = {n}, width = {width}: {name}")
            if plain:
                for name, samples in plain.time(STEPS).items():
                    if turn > 0:
                        cell["methods"].setdefault(name, {"steps": []})["steps"] += samples
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
    """Steps over the width at n = 16, and one wide case at n = 64; returns the content of scaling.json."""
    begin = time.perf_counter()
    widths = [1 << k for k in (range(10, 14) if quick else range(10, 21))]
    wide = 1 << (14 if quick else 20)
    repeats = 2 if quick else 4
    for width in (widths[0], widths[len(widths) // 2]):
        check_agreement(*random_unit_data(16, 16), width)
    check_agreement(*random_unit_data(64, 32), wide >> 4)
    progress = Progress((repeats + 1) * len(METHODS) * (16 * sum(widths) + 64 * wide))
    cells = measure_steps(16, 16, widths, repeats, progress)
    cells += measure_steps(64, 32, [wide], repeats, progress, with_numpy=True)
    data = {"environment": environment(), "steps_per_run": STEPS, "dtype": "float32", "cells": cells}
    if not quick:
        print("compile time ...", file=sys.stderr)
        data["compile_seconds"] = compile_seconds()
    return {**data, "summary": summary(data), "seconds": time.perf_counter() - begin}


def phases_of(scaling):
    """The seconds by phase of every step at n = 16: the content of phases.json."""
    cells = [
        {
            "width": cell["width"],
            "methods": {
                name: {"steps": [{phase: step[phase] for phase in PHASES} for step in samples["steps"]]}
                for name, samples in cell["methods"].items()
            },
        }
        for cell in scaling["cells"]
        if cell["n"] == 16
    ]
    return {"environment": scaling["environment"], "n": 16, "d": 16, "dtype": scaling["dtype"], "cells": cells}


def measure_digits(quick):
    """Residuals on scikit-learn's digits, odd against even, all 1797 points, for dense and tree."""
    from sklearn.datasets import load_digits

    begin = time.perf_counter()
    X, labels = load_digits(return_X_y=True)
    X, width, tol = (X[:300], 1 << 12, 1e-2) if quick else (X, 1 << 15, 1e-6)
    y = np.where(labels[: len(X)] % 2, 1.0, -1.0)
    runs = []
    turns = 1 if quick else 3
    check_agreement(X, y, width, ("dense", "tree"), normalize="lift", max_iter=2)
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
        "seconds": time.perf_counter() - begin,
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
    """Slopes and ratios of scaling.json, for the figures and the README."""
    sweep, wide = [cell for cell in data["cells"] if cell["n"] == 16], data["cells"][-1]
    fitted = [cell for cell in sweep if cell["width"] >= 1 << 14] or sweep
    slopes = {
        name: {
            key: slope([cell["width"] for cell in fitted], [median_over_steps(cell, name, key) for cell in fitted])
            for key in ("seconds", "operations")
        }
        | {"last doubling": np.log2(np.divide(*[median_over_steps(cell, name, "seconds") for cell in sweep[:-3:-1]]))}
        for name in METHODS
    }
    ratios = {}
    for cell in (sweep[-1], wide):
        milliseconds = {name: 1e3 * median_over_steps(cell, name, "seconds") for name in cell["methods"]}
        case = f"n = {cell['n']}, d = {cell['d']}, m = {cell['width']}"
        ratios[case] = {f"{name}, ms": value for name, value in milliseconds.items()}
        ratios[case] |= {f"dense / {name}": milliseconds["dense"] / value for name, value in milliseconds.items()}
    small = {
        cell["width"]: median_over_steps(cell, "dense", "seconds") / median_over_steps(cell, "tree", "seconds")
        for cell in sweep
    }
    return {"slopes": slopes, "ratios": ratios, "dense / tree at n = 16": small}


def digits_summary(data):
    """Steps, share of live neurons and time ratios of digits.json."""
    runs = {name: [run for run in data["runs"] if run["method"] == name] for name in ("dense", "tree")}
    parts = {
        name: {
            "init": np.median([run["init_seconds"] for run in found]),
            **{phase: np.median([sum(step[phase] for step in run["history"]) for run in found]) for phase in PHASES},
        }
        for name, found in runs.items()
    }
    totals = {name: sum(part.values()) for name, part in parts.items()}
    return {
        "steps": len(runs["tree"][0]["history"]) - 1,
        "live share": data["n_live"] / data["width"],
        "seconds": parts,
        "dense / tree": totals["dense"] / totals["tree"],
        "dense / tree, search and update": (parts["dense"]["seconds_query"] + parts["dense"]["seconds_update"])
        / (parts["tree"]["seconds_query"] + parts["tree"]["seconds_update"]),
    }


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
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.6), layout="constrained")
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
        axis.plot([], [], color="#777777", linestyle=":", label="slope 0.76, the paper")
        axis.set_yscale("log")
        width_axis(axis, widths)
        axis.legend(fontsize=10, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    axes[0].set_ylabel("milliseconds a step (median)")
    axes[0].set_title("Time of a Gauss-Newton step")
    axes[1].set_ylabel("operations a step, solver aside")
    axes[1].set_title("Operations to search and update, counted")
    first = sweep[0]
    figure.suptitle(f"n = {first['n']} random unit points in d = {first['d']}, products in float32", fontsize=12)
    figure.savefig(path)
    plt.close(figure)


def draw_phases(data, path):
    """Where a step's time goes: shares by phase, with the total above each bar."""
    sweep, names = data["cells"], list(METHODS)
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
            if place % 2 == 0:
                axis.text(place, 101, f"{1e3 * total:#.2g}".rstrip("."), ha="center", fontsize=10)
        axis.set_xticks(places[::2], [power_label(cell["width"]) for cell in sweep[::2]])
        axis.set_xlabel("width m")
        axis.set_title(METHODS[name][0], pad=16)
        axis.grid(False)
    axes[0].set_ylabel("share of a step's time (%)\nabove: milliseconds")
    handles, labels = axes[0].get_legend_handles_labels()
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
    axes[1].set_title("... in less time")
    axes[0].legend()
    figure.suptitle(f"Digits, odd against even: n = {data['n']}, width {power_label(data['width'])}, float64", fontsize=12)
    figure.savefig(path)
    plt.close(figure)


def write(name, data):
    PLOTS.mkdir(exist_ok=True)
    (PLOTS / f"{name}.json").write_text(json.dumps(data, indent=1, default=float))


def read(name):
    path = PLOTS / f"{name}.json"
    if not path.exists():
        raise SystemExit(f"{path} does not exist; run bench.py without --plot-only first")
    return json.loads(path.read_text())


def draw_all(suffix):
    """Draws every figure, and prints the numbers that the README quotes."""
    style()
    scaling, digits = read("scaling" + suffix), read("digits" + suffix)
    draw_scaling(scaling, PLOTS / f"scaling{suffix}.png")
    draw_phases(read("phases" + suffix), PLOTS / f"phases{suffix}.png")
    draw_digits(digits, PLOTS / f"digits{suffix}.png")
    for title, numbers in (("scaling", scaling["summary"]), ("digits", digits["summary"])):
        print(f"{title}: {json.dumps(numbers, indent=1, default=float)}")
    print(f"measured in {scaling['seconds'] + digits['seconds']:.0f} s; compile time {scaling.get('compile_seconds')}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="a small version, to see that all works")
    parser.add_argument("--plot-only", action="store_true", help="draw the figures again from the JSON files")
    arguments = parser.parse_args()
    suffix = "-quick" if arguments.quick else ""  # never overwrites the real figures
    if not arguments.plot_only:
        scaling = measure_scaling(arguments.quick)
        write("scaling" + suffix, scaling)
        write("phases" + suffix, phases_of(scaling))
        digits = measure_digits(arguments.quick)
        write("digits" + suffix, {**digits, "summary": digits_summary(digits)})
    draw_all(suffix)


if __name__ == "__main__":
    main()
