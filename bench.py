"""Measures sublin and draws the figures in plots/.

    python bench.py               times the methods, at most 6 minutes on two cores
    python bench.py peers         other ways to train the network, at most 10 minutes
    python bench.py claims        measures every claim of the paper, at most 20 minutes
    python bench.py ... --quick       a small version of it, under a minute
    python bench.py ... --plot-only   draws the figures again from the JSON files

Every figure has a JSON beside it with the samples and the environment, and is drawn from it alone.
The methods are compared before they are timed; then they take turns, so that a change in the machine's speed meets all of
them alike. A figure of a step is the mean over the steps of a run, the median over runs.
"""

import argparse
import ctypes
import importlib.util
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import nullcontext, suppress
from functools import partial
from importlib.metadata import version
from itertools import pairwise, product
from math import erfc, sqrt
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numba
import numpy as np
import scipy.linalg

import sublin

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter

PLOTS = Path(__file__).resolve().parent / "plots"
# Steps of each timed run; the residual is at the rounding of float32 then. "lazy", whose steps differ, goes on to a residual
# of 1e-9, which takes 4 or 5.
STEPS = 4
CASES = ((64, 32, 1 << 20), (256, 64, 1 << 20), (1024, 64, 1 << 18))  # n, d, width that are compared with plain NumPy


class Method(NamedTuple):
    label: str
    search: str
    solver: str
    colour: str  # of Okabe and Ito's palette
    marker: str


METHODS = {
    "lazy": Method("lazy", "lazy", "cholesky", "#000000", "*"),
    "dense": Method("dense", "dense", "cholesky", "#D55E00", "s"),
    "scan": Method("scan", "scan", "cholesky", "#E69F00", "^"),
    "tree": Method("tree", "tree", "cholesky", "#0072B2", "o"),
    "tree+sketch": Method("tree + sketch", "tree", "sketch", "#009E73", "D"),
}
DIGITS = ("dense", "tree", "lazy")  # methods on digits, that drawn on top last
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
    stop = {"tol": 1e-9, "max_iter": 30} if search == "lazy" else {"tol": 0.0, "max_iter": STEPS}
    options = {"dtype": "float32", "damping": 0.0, "normalize": None, "random_state": 0, **stop, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sublin.SublinearTrainer(width, search=search, solver=solver, **options).fit(X, y)


def check_agreement(X, y, width, methods=tuple(METHODS), **options):
    """Refuses to time methods that do not take the same steps as dense Gauss-Newton in float64."""
    options = {"tol": 0.0, "max_iter": STEPS, **options}
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


def plain_numpy_outputs(X, W, signs, shift):
    """Outputs (n,) of the network as one would write them in NumPy, all dense, and the hidden layer (n, m) behind them."""
    hidden = X @ W.T
    hidden -= X.dtype.type(shift)
    np.maximum(hidden, 0, out=hidden)
    return hidden @ signs / np.sqrt(len(W)), hidden


def plain_numpy_step(X, y, W, signs, outputs, hidden, damping=0.0):
    """One Gauss-Newton step from there, the solve in float64; returns the new weights."""
    m = len(W)
    active = (hidden > 0).astype(X.dtype)
    gram = (X @ X.T) * (active @ active.T) / m
    gram[np.diag_indices_from(gram)] += X.dtype.type(damping)
    step = np.linalg.solve(gram.astype(float), (outputs - y).astype(float)).astype(X.dtype)
    active *= step[:, None]
    active *= signs / X.dtype.type(np.sqrt(m))
    return W - active.T @ X


def numpy_seconds(X, y, width):
    """Seconds of the plain NumPy step, and of its first matrix product alone, from the starting weights."""
    start = train("dense", X, y, width, max_iter=0)
    W, signs, shift = start.weights().astype(np.float32), start.signs_.astype(np.float32), start.shift_
    X, y = X.astype(np.float32), y.astype(np.float32)
    products = X @ W.T  # in memory that is used again
    for _ in range(2):  # the second counts: in a loop of steps, large arrays are in memory that was used before
        begin = time.perf_counter()
        outputs, hidden = plain_numpy_outputs(X, W, signs, shift)
        plain_numpy_step(X, y, W, signs, outputs, hidden)
        middle = time.perf_counter()
    np.matmul(X, W.T, out=products)
    return {"numpy": middle - begin, "matrix product": time.perf_counter() - middle}


def measure_steps(cells, repeats, progress, with_numpy=False):
    """`repeats` runs of each method of the cells (n, d, width, methods): seconds of initialisation, records of all steps.

    A turn runs through all cells, so that the runs of one are minutes apart: what else the machine does for some seconds
    spoils one of them, and not the median.
    """
    found = [{"n": n, "d": d, "width": width, "methods": {name: [] for name in methods}} for n, d, width, methods in cells]
    for turn, ((n, d, width, methods), cell) in product(range(repeats + 1), zip(cells, found, strict=True)):
        runs, (X, y) = cell["methods"], random_unit_data(n, d)
        for name in methods:
            time.sleep(0.05)  # until the idle threads of the method before no longer spin on the cores
            trainer = train(name, X, y, width)
            if turn > 0:  # the first turn is a warm-up
                runs[name].append({"init_seconds": trainer.init_seconds_, "steps": trainer.history_[1:]})
            residual = trainer.residual_
            if name == "lazy" and not residual <= 1e-9:
                raise SystemExit(f"lazy stopped at a residual of {residual} at n = {n}, width {width}")
            del trainer
            progress.add(n * d * width, f"n = {n}, width = {width}: {name}")
        if with_numpy:
            if turn > 0:
                for name, seconds in numpy_seconds(X, y, width).items():
                    runs.setdefault(name, []).append({"steps": [{"seconds": seconds}]})
            progress.add(2 * n * d * width, f"n = {n}, width = {width}: plain NumPy")
    return found


def compile_seconds():
    """Seconds to import sublin and fit a small problem in a new process: on an empty compile cache, and with a warm one."""
    code = (
        "import time\n"
        "begin = time.perf_counter()\n"
        "import sublin\n"
        "imported = time.perf_counter()\n"
        "import numpy as np\n"
        "X, y = np.random.default_rng(0).standard_normal((16, 8)), np.arange(16.0)\n"
        "sublin.SublinearTrainer(1024, shift=1.0, random_state=0).fit(X, y)\n"
        "print(imported - begin, time.perf_counter() - begin)\n"
    )
    found = []
    with tempfile.TemporaryDirectory() as folder:
        environ = {**os.environ, "NUMBA_CACHE_DIR": folder}
        for _ in range(2):
            run = [sys.executable, "-W", "ignore", "-c", code]
            out = subprocess.run(run, cwd=Path(__file__).parent, env=environ, check=True, capture_output=True, text=True)
            found.append(list(map(float, out.stdout.split())))
    return {"empty_cache": found[0][1], "warm_cache": found[1][1], "import_alone": found[1][0]}


def drawing_seconds(d, width, repeats=3):
    """Seconds to draw the starting weights and do nothing with them, and to initialise "lazy" at n = 64, in turns."""
    X, y = random_unit_data(64, d)
    found = {"draw": [], "init": []}
    for _ in range(repeats):
        begin = time.perf_counter()
        for _ in sublin._starting_blocks(0, width, d, "antisymmetric", lambda *block: None):
            pass
        found["draw"].append(time.perf_counter() - begin)
        found["init"].append(train("lazy", X, y, width, max_iter=0).init_seconds_)
    return {"d": d, "width": width, **found}


def peak_memory(n, d, width):
    """Peak resident memory, in GiB, of a process that imports sublin, and of one that trains "lazy" to 1e-9 too (Linux)."""
    if not os.path.exists("/proc/self/status"):
        return None
    # VmHWM, since getrusage counts the parent's memory too, which a child shares until it runs its own program.
    code = (
        "import bench\n"
        "if {width}:\n"
        "    trainer = bench.train('lazy', *bench.random_unit_data({n}, {d}), {width})\n"
        "    assert trainer.converged_\n"
        "lines = open('/proc/self/status').read().splitlines()\n"
        "print(next(int(line.split()[1]) for line in lines if line.startswith('VmHWM')) / 2**20)\n"
    )
    found = []
    for trained in (0, width):
        run = [sys.executable, "-c", code.format(n=n, d=d, width=trained)]
        found.append(
            float(subprocess.run(run, cwd=Path(__file__).parent, check=True, capture_output=True, text=True).stdout)
        )
    return {"n": n, "d": d, "width": width, "import_gib": found[0], "train_gib": found[1]}


def measure_scaling(quick):
    """Steps over the width at n = 64, and the CASES; returns the content of scaling.json."""
    begin = time.perf_counter()
    n, d = (16, 16) if quick else (64, 32)
    widths = [1 << k for k in (range(10, 15) if quick else range(11, 25))]
    cases = [(16, 16, 1 << 14)] if quick else CASES
    repeats = 2 if quick else 3

    def methods_at(width):
        return [name for name in METHODS if name == "lazy" or width <= 1 << (13 if quick else 20)]

    for width in (widths[2], widths[len(widths) // 2]):
        check_agreement(*random_unit_data(n, d), width)
    work = sum(n * d * width * len(methods_at(width)) for width in widths) + sum(4 * n * d * width for n, d, width in cases)
    progress = Progress((repeats + 1) * work)
    sweep = measure_steps([(n, d, width, methods_at(width)) for width in widths], repeats, progress)
    compared = measure_steps([(*case, ("lazy", "dense")) for case in cases], repeats, progress, with_numpy=True)
    data = {"environment": environment(), "dtype": "float32", "sweep": sweep, "cases": compared}
    data["drawing"] = drawing_seconds(32, 1 << (14 if quick else 22))
    if not quick:
        print("memory, compile time ...", file=sys.stderr)
        data["memory"] = peak_memory(64, 32, 1 << 24)
        data["compile_seconds"] = compile_seconds()
    return {**data, "summary": summary(data), "seconds": time.perf_counter() - begin}


def phases_of(scaling):
    """The seconds by phase of every step of the sweep: the content of phases.json."""
    sweep = [
        {
            **cell,
            "methods": {
                name: [{"steps": [{phase: step[phase] for phase in PHASES} for step in run["steps"]]} for run in runs]
                for name, runs in cell["methods"].items()
            },
        }
        for cell in scaling["sweep"]
        if len(cell["methods"]) == len(METHODS)
    ]
    return {"environment": scaling["environment"], "dtype": scaling["dtype"], "sweep": sweep}


def measure_work(quick):
    """What each step of "lazy" reads: the content of work.json."""
    n, d, width = (16, 16, 1 << 14) if quick else (64, 32, 1 << 22)
    X, y = random_unit_data(n, d)
    runs = [train("lazy", X, y, width) for _ in range(4)][1:]
    return {
        "environment": environment(),
        "n": n,
        "d": d,
        "width": width,
        "n_live": runs[0].n_live_,
        "history": runs[0].history_,
        "seconds": [[record["seconds"] for record in run.history_] for run in runs],
    }


def measure_digits(quick):
    """Residuals on scikit-learn's digits, odd against even, all 1797 points, for dense, tree and lazy."""
    from sklearn.datasets import load_digits

    begin = time.perf_counter()
    X, labels = load_digits(return_X_y=True)
    X, width, tol = (X[:300], 1 << 12, 1e-2) if quick else (X, 1 << 15, 1e-6)
    y = np.where(labels[: len(X)] % 2, 1.0, -1.0)
    runs = []
    turns = 1 if quick else 3
    check_agreement(X, y, width, DIGITS, normalize="lift", max_iter=2)
    progress = Progress(len(DIGITS) * turns)
    for _ in range(turns):
        for name in DIGITS:
            trainer = train(name, X, y, width, normalize="lift", dtype="float64", tol=tol, max_iter=50)
            runs.append({"method": name, "init_seconds": trainer.init_seconds_, "history": trainer.history_})
            progress.add(1, f"digits: {name}")
    residuals = [[record["residual"] for record in run["history"]] for run in runs]
    for found in residuals[1:]:
        if len(found) != len(residuals[0]) or not np.allclose(found, residuals[0], rtol=1e-4, atol=1e-9):
            raise SystemExit(f"the methods disagree on digits: {found} and {residuals[0]}")
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
# Peers
# ----------------------------------------------------------------------------------------------------------------------

TARGETS = (1e-3, 1e-6)  # relative residuals


class Problem(NamedTuple):
    """Data for every peer: as the trainer takes them, and as the unit rows and scaled targets that it trains on."""

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
        """Unit rows (n, d), targets (n,), starting weights (m, d) and output signs (m,) in a precision."""
        rows, targets = self.trainer._X, self.trainer._scales.targets(self.y)
        return tuple(np.array(array, dtype) for array in (rows, targets, self.W, self.trainer.signs_))

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

    def add(self, residual):
        self.seconds.append(time.perf_counter() - self.begin)
        self.residuals.append(float(residual))
        if residual <= TARGETS[-1] or not np.isfinite(residual) or self.seconds[-1] > self.cap:
            raise Enough


def time_to(target, seconds, residuals):
    """Seconds to the first residual that is at the target or below; None if there is none."""
    return next((second for second, residual in zip(seconds, residuals, strict=True) if residual <= target), None)


# A peer is a function of the problem and of what is tuned. It returns two more: train(log), which calls log with the
# relative residual whenever the method itself has computed it, so that nothing is computed for the curve alone; and
# predict(), outputs at the held-out rows in the units of y.


def sublin_peer(search, problem):
    """SublinearTrainer on the data as they are: scaling and drawing the weights count."""
    trainer = sublin.SublinearTrainer(search=search, **problem.options)

    def train(log):
        trainer.set_params(callback=lambda record: log(record["residual"])).fit(problem.X, problem.y)

    return train, lambda: trainer.predict(problem.held_out_X)


def numpy_peer(problem, damping, serial=False, dtype="float32"):
    """Dense Gauss-Newton in plain NumPy. `serial` keeps its BLAS on one thread, which is better off on busy cores."""
    X, y, W, signs = problem.arrays(dtype)
    shift = problem.trainer.shift_

    def train(log):
        nonlocal W
        with sublin._serial_blas() if serial else nullcontext():
            while True:
                outputs, hidden = plain_numpy_outputs(X, W, signs, shift)
                log(np.linalg.norm(outputs - y) / np.linalg.norm(y))
                W = plain_numpy_step(X, y, W, signs, outputs, hidden, damping)

    return train, lambda: problem.unscaled(plain_numpy_outputs(problem.held_out_rows(dtype), W, signs, shift)[0])


def sklearn_peer(problem, solver, target_scale=1.0, rate=1.0, dtype="float32"):
    """MLPRegressor of the same width. It has a ReLU without threshold, trains both layers, and draws its own weights.

    Targets may be scaled up because its "lbfgs" stops once the loss, half the mean square, falls by less than 2e-9.
    """
    from sklearn.neural_network import MLPRegressor

    X, y, W, _ = problem.arrays(dtype)
    y *= np.dtype(dtype).type(target_scale)

    class Logged(MLPRegressor):
        def _backprop(self, *arguments):
            found = super()._backprop(*arguments)
            self.log(np.sqrt(2 * len(y) * found[0]) / np.linalg.norm(y))
            return found

    endless = {"tol": 0.0, "max_iter": 1 << 30, "max_fun": 1 << 30, "n_iter_no_change": 1 << 30, "warm_start": True}
    batch = {"alpha": 0.0, "batch_size": len(X), "shuffle": False, "random_state": 0}
    model = Logged(hidden_layer_sizes=(len(W),), solver=solver, learning_rate_init=rate / len(W) ** 0.5, **endless, **batch)

    def train(log):
        model.log = log
        while True:  # "lbfgs" that stopped goes on from where it was
            model.fit(X, y)

    return train, lambda: problem.unscaled(model.predict(problem.held_out_rows(dtype)) / target_scale)


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
    return torch_peer(problem, lambda optim, weights: optim.Adam(weights, lr=rate / len(problem.W) ** 0.5))


def torch_lbfgs(problem, step_size, line_search):
    def make(optim, weights):
        # Without tolerances, which would end every call of step() early; its memory outlives the calls.
        endless = {"tolerance_grad": 0.0, "tolerance_change": 0.0}
        return optim.LBFGS(weights, lr=step_size, line_search_fn=line_search, **endless)

    return torch_peer(problem, make)


def kernel_peer(problem):
    """Kernel regression with the limit of the Gram matrix: what an infinitely wide network would come to."""
    X, y, _, _ = problem.arrays(float)
    dual = None

    def train(log):
        nonlocal dual
        kernel = sublin.shifted_ntk(X, problem.trainer.shift_)
        dual = scipy.linalg.solve(kernel, y, assume_a="pos")
        log(np.linalg.norm(kernel @ dual - y) / np.linalg.norm(y))

    def predict():
        both = sublin.shifted_ntk(np.concatenate([X, problem.held_out_rows()]), problem.trainer.shift_)
        return problem.unscaled(both[len(X) :, : len(X)] @ dual)

    return train, predict


class Peer(NamedTuple):
    label: str
    start: Callable
    grid: tuple  # keyword arguments of `start` to choose from
    colour: str  # of Okabe and Ito's palette
    marker: str


# Adam moves every weight by the step size at most, whatever m is, and the outputs by sqrt(m) times as much; hence rates in
# units of m^(-1/2), which are tuned at one width and serve at another.
RATES = tuple({"rate": rate} for rate in (0.25, 0.5, 1.0, 2.0, 4.0))
PEERS = {
    "ours": Peer("sublin", partial(sublin_peer, "lazy"), ({},), "#000000", "*"),
    "dense": Peer('sublin, search="dense" (float64)', partial(sublin_peer, "dense"), ({},), "#D55E00", "s"),
    "numpy": Peer(
        "plain NumPy, dense Gauss-Newton (float32)",
        numpy_peer,
        tuple({"damping": damping, "serial": serial} for damping in (0.0, 1e-4) for serial in (False, True)),
        "#E69F00",
        "^",
    ),
    "torch lbfgs": Peer(
        "PyTorch, LBFGS (float32)",
        torch_lbfgs,
        tuple({"step_size": size, "line_search": search} for size in (0.5, 1.0) for search in (None, "strong_wolfe")),
        "#CC79A7",
        "D",
    ),
    "torch adam": Peer("PyTorch, full-batch Adam (float32)", torch_adam, RATES, "#009E73", ""),
    "sklearn lbfgs": Peer(
        "MLPRegressor, lbfgs (float64) ¹",
        partial(sklearn_peer, solver="lbfgs"),
        ({"target_scale": 1.0}, {"target_scale": 100.0}),
        "#0072B2",
        "o",
    ),
    "sklearn adam": Peer(
        "MLPRegressor, full-batch Adam (float32) ¹", partial(sklearn_peer, solver="adam"), RATES, "#56B4E9", ""
    ),
    "kernel": Peer("kernel regression, infinite width (float64)", kernel_peer, ({},), "#777777", "P"),
}
PEERS_NOTE = "¹ same width, its own ReLU without threshold and starting weights, both layers trained"


def keep_freed_memory():
    """Has glibc reuse what was freed rather than give it back, and pay for new pages in every step of the dense methods.

    At n = 64, d = 32, m = 2^18, where an array of products takes 64 MB, a step of Adam then takes 0.3 s instead of 1.1 s.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt:
        mallopt(-4, 0)  # M_MMAP_MAX
        mallopt(-1, (1 << 31) - 1)  # M_TRIM_THRESHOLD


def has_torch():
    return importlib.util.find_spec("torch") is not None


def run_peer(peer, problem, options, cap):
    """Seconds and residuals of a run, and the share of held-out signs that it gets right in the end."""
    train, predict = peer.start(problem, **options)
    curve = Curve(cap)
    with suppress(Enough), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        train(curve.add)
    found = {"options": options, "seconds": curve.seconds, "residuals": curve.residuals}
    if problem.held_out_X is not None:
        found["accuracy"] = float(np.mean(np.sign(predict()) == problem.held_out_y))
    return found


def reached(run, target):
    """Seconds of a run to the target, infinite if it did not get there."""
    seconds = time_to(target, run["seconds"], run["residuals"])
    return np.inf if seconds is None else seconds


def tune(peer, problem, cap):
    """A short run for each entry of the grid; the best is first at the last target, or at the one before, or closest.

    No run goes on for longer than another took to the last target. It is the warm-up as well.
    """
    runs = []
    for options in peer.grid:
        runs.append(run_peer(peer, problem, options, min([cap, *(reached(run, TARGETS[-1]) for run in runs)])))
    best = min(runs, key=lambda run: (*(reached(run, target) for target in TARGETS[::-1]), np.nanmin(run["residuals"])))
    return runs, best["options"]


def measure_case(problem, rates, cap, tune_cap, progress):
    """Tunes and runs every peer, with a run of ours after each. `rates` holds those already tuned, and receives new ones."""
    runs, tuning = {}, {}
    for name, peer in PEERS.items():
        if name.startswith("torch") and not has_torch():
            continue
        options = rates.get(name)
        if options is None:
            tuning[name], options = tune(peer, problem, tune_cap)
        if peer.grid is RATES:
            rates[name] = options
        runs[name] = []
        while len(runs[name]) < 3 and sum(run["seconds"][-1] for run in runs[name]) < cap / 4:
            runs[name].append(run_peer(peer, problem, options, cap))
        runs["ours"].append(run_peer(PEERS["ours"], problem, {}, cap))
        progress.add(1, f"n = {len(problem.X)}, width = {len(problem.W)}: {name}")
    n, d = problem.trainer._X.shape
    size = {"n": n, "d": d, "width": len(problem.W), "shift": problem.trainer.shift_, "damping": problem.trainer.damping}
    return {**size, "cap": cap, "tune_cap": tune_cap, "runs": runs, "tuning": tuning}


def digits_split(rows=None):
    """Digits, odd against even, in random order: X and y of the first 80 %, X and y of the rest."""
    from sklearn.datasets import load_digits

    X, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(X))[:rows]
    X, y = X[order], np.where(labels[order] % 2, 1.0, -1.0)
    train = 4 * len(X) // 5
    return X[:train], y[:train], X[train:], y[train:]


def measure_peers(quick):
    """Random data at two widths, and digits: the content of peers.json."""
    begin = time.perf_counter()
    keep_freed_memory()
    n, d, widths, digits_width = (16, 16, (1 << 10, 1 << 11), 1 << 10) if quick else (64, 32, (1 << 16, 1 << 18), 1 << 14)
    limits = {"cap": 0.3, "tune_cap": 0.1} if quick else {"cap": 20.0, "tune_cap": 3.0}
    progress = Progress(len([name for name in PEERS if has_torch() or not name.startswith("torch")]) * (len(widths) + 1))
    random, digits = random_unit_data(n, d), digits_split(300 if quick else None)
    rates, cases = {}, {}
    for width in widths:
        problem = Problem.of(*random, width=width, normalize=None, damping=0.0)
        cases[f"random, m = 2^{int(np.log2(width))}"] = measure_case(problem, rates, **limits, progress=progress)
    problem = Problem.of(*digits, width=digits_width, shift=1.0, normalize="lift")
    cases[f"digits, m = 2^{int(np.log2(digits_width))}"] = measure_case(problem, {}, **limits, progress=progress)
    versions = {"torch": None}
    if has_torch():
        import torch

        versions = {"torch": torch.__version__, "torch threads": torch.get_num_threads()}
    return {
        "environment": {**environment(), **versions},
        "targets": TARGETS,
        "grids": {name: peer.grid for name, peer in PEERS.items()},
        "notes": [
            "seconds are those at which a method had computed the residual, at trial points of line searches too",
            "compiling and warming up are left out; malloc keeps freed memory, which spares the dense methods most",
            "ours and dense draw their starting weights in that time; all others but MLPRegressor are given them before",
            "rates of Adam are in units of m^(-1/2), tuned at the smaller width of the random data and used at both",
            PEERS_NOTE,
        ],
        "cases": cases,
        "seconds": time.perf_counter() - begin,
    }


# ----------------------------------------------------------------------------------------------------------------------
# Drawing
# ----------------------------------------------------------------------------------------------------------------------


def step_of(cell, method, key="seconds"):
    """Mean over the steps of a run, the median over runs."""
    return float(np.median([np.mean([step[key] for step in run["steps"]]) for run in cell["methods"][method]]))


def slope(widths, values):
    """Exponent p of the least-squares fit value = c width^p."""
    return float(np.polyfit(np.log(widths), np.log(values), 1)[0])


def cells_with(sweep, method, least=0):
    return [cell for cell in sweep if method in cell["methods"] and cell["width"] >= least]


def summary(data):
    """Slopes, ratios and bounds of scaling.json, for the figures and the README."""
    slopes = {}
    for name in METHODS:
        cells = cells_with(data["sweep"], name, least=1 << 14) or cells_with(data["sweep"], name)
        slopes[name] = {
            key: slope([cell["width"] for cell in cells], [step_of(cell, name, key) for cell in cells])
            for key in ("seconds", "operations")
        }
    cases = {}
    for cell in data["cases"]:
        milliseconds = {name: 1e3 * step_of(cell, name) for name in cell["methods"]}
        cases[f"n = {cell['n']}, d = {cell['d']}, m = {cell['width']}"] = {
            **{f"{name}, ms": value for name, value in milliseconds.items()},
            **{f"{name} / lazy": milliseconds[name] / milliseconds["lazy"] for name in milliseconds},
        }
    compared = [cell for cell in data["sweep"] if len(cell["methods"]) == len(METHODS)]
    drawing = data["drawing"]
    return {
        "slopes": slopes,
        "cases": cases,
        **{
            f"dense / {name}": {cell["width"]: step_of(cell, "dense") / step_of(cell, name) for cell in compared}
            for name in METHODS
        },
        "init / draw": np.median(drawing["init"]) / np.median(drawing["draw"]),
    }


def digits_summary(data):
    """Steps, share of live neurons and time ratios of digits.json."""
    runs = {name: [run for run in data["runs"] if run["method"] == name] for name in DIGITS}
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
        **{f"dense / {name}": totals["dense"] / totals[name] for name in DIGITS},
    }


def work_summary(data):
    """Seconds and shares of live neurons looked at, by step, of work.json."""
    seconds = np.median(data["seconds"], axis=0)[1:]
    return {
        "seconds": list(seconds),
        "third / first": seconds[2] / seconds[0],
        "looked at / live": [record["looked_at"] / data["n_live"] for record in data["history"]],
    }


def finite(number):
    """The number, or None, which JSON has a word for, if it is infinite or NaN."""
    return float(number) if np.isfinite(number) else None


def peers_summary(data):
    """Median seconds to each target and their ratio to ours, best residual, and held-out accuracy, of peers.json."""
    found = {}
    for case, content in data["cases"].items():
        medians = {
            name: np.median([[reached(run, target) for target in data["targets"]] for run in runs], axis=0)
            for name, runs in content["runs"].items()
        }
        ours = np.where(np.isfinite(medians["ours"]), medians["ours"], np.nan)
        found[case] = {
            name: {
                "seconds": [finite(seconds) for seconds in medians[name]],
                "ratios": [finite(ratio) for ratio in medians[name] / ours],
                "residual": min(np.nanmin(run["residuals"]) for run in runs),
                "accuracy": runs[0].get("accuracy"),
            }
            for name, runs in content["runs"].items()
        }
    return found


def peers_table(data):
    """The summary as a Markdown table: time of a peer over ours."""
    cases = data["summary"]
    goals = [(case, k) for case in cases for k in range(len(data["targets"]))]
    header = ["time / ours", *(f"{case}: {data['targets'][k]:.0e}" for case, k in goals), "held-out accuracy"]
    lines = [header, ["---"] * len(header)]

    def cell(name, case, k):
        found, cap = cases[case][name], data["cases"][case]["cap"]
        if found["seconds"][k] is None:
            return f"not within {cap:g} s ({found['residual']:.0e})"
        return "ours did not" if found["ratios"][k] is None else f"{found['ratios'][k]:.2g}"

    for name in next(iter(cases.values())):
        accuracies = [case[name]["accuracy"] for case in cases.values() if case[name]["accuracy"] is not None]
        row = [PEERS[name].label, *(cell(name, case, k) for case, k in goals)]
        lines.append([*row, *(f"{100 * accuracy:.1f} %" for accuracy in accuracies)])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + f"\n\n{PEERS_NOTE}"


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
    slopes = data["summary"]["slopes"]
    figure, axes = plt.subplots(1, 2, figsize=(11, 5.8), layout="constrained")
    for axis, key, unit in zip(axes, ("seconds", "operations"), (1e3, 1.0), strict=True):
        for name, (label, _, _, colour, marker) in METHODS.items():
            if key == "operations" and name == "tree+sketch":
                continue  # the counts are of search and update, which are those of tree
            cells = cells_with(data["sweep"], name)
            widths = np.array([cell["width"] for cell in cells])
            values = unit * np.array([step_of(cell, name, key) for cell in cells])
            legend = f"{label}, slope {slopes[name][key]:.2f}"
            axis.plot(widths, values, marker=marker, color=colour, label=legend, linewidth=2, markersize=7)
            for guided, power, dashes in (("dense", 1.0, "--"), ("lazy", 0.76, ":")):
                if name == guided:
                    guide = values[-1] * (widths / widths[-1]) ** power
                    axis.plot(widths, guide, color="#777777", linestyle=dashes, linewidth=1.5, zorder=1)
        axis.plot([], [], color="#777777", linestyle="--", label="slope 1")
        axis.plot([], [], color="#777777", linestyle=":", label="slope 0.76, the paper")
        axis.set_yscale("log")
        width_axis(axis, [cell["width"] for cell in data["sweep"]])
        axis.legend(fontsize=10, ncols=2, loc="upper center", bbox_to_anchor=(0.5, -0.15))
    axes[0].set_ylabel("milliseconds a step")
    axes[0].set_title("Time of a Gauss-Newton step")
    axes[1].set_ylabel("operations a step, solver aside")
    axes[1].set_title("Operations to search and update, counted")
    first = data["sweep"][0]
    figure.suptitle(
        f"n = {first['n']} random unit points in d = {first['d']}; slopes fitted from m = $2^{{14}}$", fontsize=12
    )
    figure.savefig(path)
    plt.close(figure)


def draw_phases(data, path):
    """Where a step's time goes: shares by phase, with the total above each bar."""
    sweep, names = data["sweep"], list(METHODS)
    figure, axes = plt.subplots(1, len(names), figsize=(2.8 * len(names), 4.6), sharey=True, layout="constrained")
    for axis, name in zip(axes, names, strict=True):
        places = np.arange(len(sweep))
        parts = np.array([[step_of(cell, name, phase) for phase in PHASES] for cell in sweep])
        totals = parts.sum(axis=1)
        bottom = np.zeros(len(sweep))
        for part, (label, colour) in zip((parts / totals[:, None]).T, PHASES.values(), strict=True):
            axis.bar(places, 100 * part, bottom=bottom, color=colour, label=label, width=0.8)
            bottom += 100 * part
        for place, total in zip(places, totals, strict=True):
            if place % 2 == 0:
                label = f"{1e3 * total:.0f}" if total >= 1e-2 else f"{1e3 * total:.1f}"
                axis.text(place, 101, label, ha="center", fontsize=10)
        axis.set_xticks(places[::2], [power_label(cell["width"]) for cell in sweep[::2]])
        axis.set_xlabel("width m")
        axis.set_title(METHODS[name].label, pad=16)
        axis.grid(False)
    axes[0].set_ylabel("share of a step's time (%)\nabove: milliseconds")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=4, fontsize=10)
    figure.savefig(path)
    plt.close(figure)


def draw_work(data, path):
    """Neurons that each step of the searches reads, on one axis that spans all of them and a handful."""
    figure, axis = plt.subplots(figsize=(8, 5), layout="constrained")
    steps = data["history"][1:]
    places = [record["iteration"] for record in steps]
    axis.plot(
        places, [data["width"]] * len(steps), color=METHODS["dense"].colour, marker="s", label="dense, scan: all neurons"
    )
    moved = [record["changed"] for record in steps]
    axis.plot(places, moved, color=METHODS["tree"].colour, marker="o", label="tree: those that move (and their siblings)")
    looked_at, flips = ([max(record[key], 0.8) for record in steps] for key in ("looked_at", "flips"))
    axis.plot(places, looked_at, color="#000000", marker="*", markersize=12, label="lazy: those that may have flipped")
    axis.plot(places, flips, color="#777777", linestyle=":", marker=".", label="pairs (neuron, point) that did flip")
    for record, place in zip(steps, looked_at, strict=True):
        share = 100 * record["looked_at"] / data["n_live"]
        text = f"{record['looked_at']:,}" if share < 0.1 else f"{share:.2g} % of live neurons"
        white = {"facecolor": "white", "edgecolor": "none", "pad": 1}
        place = record["iteration"], place
        axis.annotate(text, place, textcoords="offset points", xytext=(12, -3), fontsize=10, bbox=white)
    axis.set_yscale("log")
    axis.set_xticks(places)
    axis.set_xlim(0.8, places[-1] + 0.9)
    axis.set_xlabel("Gauss-Newton step")
    axis.set_ylabel("neurons whose products are read")
    axis.set_title(f"n = {data['n']}, d = {data['d']}, width {power_label(data['width'])}", fontsize=12)
    axis.legend(fontsize=10, loc="upper center", bbox_to_anchor=(0.5, -0.13), ncols=2)
    figure.savefig(path)
    plt.close(figure)


def draw_digits(data, path):
    """Residual on digits against iterations and against seconds, initialisation included."""
    figure, axes = plt.subplots(1, 2, figsize=(11, 4.4), layout="constrained", sharey=True)
    for name, size in zip(DIGITS, (11, 8, 5), strict=True):
        label, _, _, colour, marker = METHODS[name]
        runs = [run for run in data["runs"] if run["method"] == name]
        residuals = [record["residual"] for record in runs[0]["history"]]
        seconds = np.median(
            [run["init_seconds"] + np.cumsum([record["seconds"] for record in run["history"]]) for run in runs], axis=0
        )
        line = {"color": colour, "marker": marker, "label": label, "linewidth": 2, "markersize": size}
        axes[0].plot(range(len(residuals)), residuals, **line)
        axes[1].plot(seconds, residuals, **line)
    axes[0].set_yscale("log")
    axes[0].set_ylabel("relative residual |f - y| / |y|")
    axes[0].set_xlabel("Gauss-Newton steps")
    axes[0].set_title("The same steps")
    axes[1].set_xlabel("seconds, initialisation included (median)")
    axes[1].set_title("Their time")
    axes[0].legend()
    figure.suptitle(f"Digits, odd against even: n = {data['n']}, width {power_label(data['width'])}, float64", fontsize=12)
    figure.savefig(path)
    plt.close(figure)


def draw_peers(data, path):
    """Residual against seconds: the widest random network, and digits."""
    floor = 3e-8  # some end at rounding, where there is nothing to compare
    figure, axes = plt.subplots(1, 2, figsize=(11, 6.4), layout="constrained", sharey=True)
    for axis, case in zip(axes, list(data["cases"])[1:], strict=True):
        content = data["cases"][case]
        for name, runs in content["runs"].items():
            label, _, _, colour, marker = PEERS[name]
            run = sorted(runs, key=lambda run: run["seconds"][-1])[len(runs) // 2]
            residuals = np.maximum(run["residuals"], floor)
            size = 13 if name in ("ours", "kernel") else 6
            apart = max(1, len(residuals) // 12)
            line = {"color": colour, "marker": marker, "markersize": size, "markevery": apart, "linewidth": 2}
            axis.plot(run["seconds"], residuals, label=label, **line)
        for target in data["targets"]:
            axis.axhline(target, color="#777777", linestyle=":", linewidth=1.5, zorder=1)
        axis.set_xscale("log")
        axis.set_yscale("log")
        axis.set_xlabel("seconds")
        axis.set_title(f"{case.split(',')[0]}: n = {content['n']}, m = {power_label(content['width'])}")
    axes[0].set_ylim(floor / 2, 3.0)
    axes[0].set_ylabel(f"relative residual |f - y| / |y|, or {floor:.0e} if less")
    handles, labels = axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=2, fontsize=11)
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


def measure_all(suffix):
    """Writes the JSON of every figure of the scaling."""
    quick = bool(suffix)
    scaling = measure_scaling(quick)
    write("scaling" + suffix, scaling)
    write("phases" + suffix, phases_of(scaling))
    work = measure_work(quick)
    write("work" + suffix, {**work, "summary": work_summary(work)})
    digits = measure_digits(quick)
    write("digits" + suffix, {**digits, "summary": digits_summary(digits)})


def draw_all(suffix):
    """Draws every figure, and prints the numbers that the README quotes."""
    style()
    found = {name: read(name + suffix) for name in ("scaling", "phases", "work", "digits")}
    for name, draw in (("scaling", draw_scaling), ("phases", draw_phases), ("work", draw_work), ("digits", draw_digits)):
        draw(found[name], PLOTS / f"{name}{suffix}.png")
    for name in ("scaling", "work", "digits"):
        print(f"{name}: {json.dumps(found[name]['summary'], indent=1, default=float)}")
    scaling = found["scaling"]
    print(f"memory: {scaling.get('memory')}, compile time: {scaling.get('compile_seconds')}")
    print(f"measured in {scaling['seconds'] + found['digits']['seconds']:.0f} s")


def write_peers(suffix):
    """Writes the JSON of the peers."""
    peers = measure_peers(bool(suffix))
    write("peers" + suffix, {**peers, "summary": peers_summary(peers)})


def report_peers(suffix):
    """Draws the figure of the peers, and prints the table that the README quotes."""
    style()
    found = read("peers" + suffix)
    draw_peers(found, PLOTS / f"peers{suffix}.png")
    print(peers_table(found))
    if found["environment"]["torch"] is None:
        print("PyTorch is not installed, and its rows are left out")
    print(f"measured in {found['seconds']:.0f} s")


# ----------------------------------------------------------------------------------------------------------------------
# Claims: measuring functions, one case each
# ----------------------------------------------------------------------------------------------------------------------

SEEDS = 5
TURNS = 3  # of the methods that race over n and m
FAILURE = 0.1  # rho, the probability of failure that theorems ask for where they do not fix it
POWER = 0.76  # (3 + alpha) / 4 at the default alpha = 0.04


def normal_tail(shift):
    """P(Z >= shift) for a standard normal Z."""
    return 0.5 * erfc(shift / sqrt(2))


def paper_run(X, y, width, seed, **options):
    """A network as the paper has it: independent signs, unit rows, undamped steps; silent about not converging."""
    options = {"init": "gaussian", "damping": 0.0, "normalize": None, "tol": 1e-9, "max_iter": 20, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return sublin.SublinearTrainer(width, random_state=seed, **options).fit(X, y)


def starting_jacobian(X, width, seed, **options):
    """The Jacobian at the start, and the threshold."""
    run = paper_run(X, np.zeros(len(X)), width, seed, max_iter=0, **options)
    return sublin.SparseJacobian(X, run.signs_, *run.active_sets()), run.shift_


def contraction(X, y, width, seed, **options):
    """Ratios of the residuals of successive steps to 1e-9, 20 at most, and the `end`: converged, stuck or singular."""
    residuals, end = [], "singular"
    with suppress(np.linalg.LinAlgError):
        run = paper_run(X, y, width, seed, callback=lambda record: residuals.append(record["residual"]), **options)
        end = "converged" if run.converged_ else "stuck"
    ratios = [later / earlier for earlier, later in pairwise(residuals)]
    return {"ratios": ratios, "steps": len(ratios), "end": end}


def halves(cell):
    """Whether every step of a contraction at least halved the residual, up to convergence."""
    return cell["end"] == "converged" and max(cell["ratios"]) <= 0.5


def needed_width(X, shift):
    """Width that Theorem 4.1 asks for, its constant taken as 1: max(n^4 / lambda^4, n^2 d log(16 n / rho) / lambda^2)."""
    n, d = X.shape
    smallest = max(sublin.smallest_ntk_eigenvalue(X, shift), np.finfo(float).tiny ** 0.25)
    return max((n / smallest) ** 4, (n / smallest) ** 2 * d * np.log(16 * n / FAILURE))


def step_cost(X, y, width, seed, method, **options):
    """Means over the steps of a run: operations of search and update, seconds, and seconds by phase."""
    steps = train(method, X, y, width, random_state=seed, init="gaussian", **options).history_[1:]
    return {key: float(np.mean([step[key] for step in steps])) for key in ("operations", "seconds", *PHASES)}


def starting_activity(X, width, seed, **options):
    """Active neurons at the start: mean and largest |Q_i|, their sum, and the size of the union K."""
    run = paper_run(X, np.zeros(len(X)), width, seed, max_iter=0, **options)
    counts = np.diff(run.active_sets()[0])
    return {
        "shift": run.shift_,
        "mean": float(counts.mean()),
        "largest": int(counts.max()),
        "sum": int(counts.sum()),
        "union": run.n_live_,
    }


def tree_touches(n, d, width, seed):
    """Tree nodes that init, one update, one query at the default threshold and one that reports nothing touch."""
    X, _ = random_unit_data(n, d, seed)
    rng = np.random.default_rng([seed, 1])  # not the stream that made X
    trees = sublin.MaxTrees(X, rng.standard_normal((width, d)))
    touched = [trees.touched]
    trees.update(width // 2, rng.standard_normal(d))
    touched.append(trees.touched)
    reported = trees.query(0, sublin.default_shift(width)).size
    touched.append(trees.touched)
    trees.query(0, np.inf)
    touched.append(trees.touched)
    update, query, silent = (int(later - earlier) for earlier, later in pairwise(touched))
    return {"init": int(touched[0]), "update": update, "query": query, "reported": reported, "silent": silent}


def coherent_jacobian(n):
    """One neuron and one coordinate for each point: J^T has n nonzero entries, each of leverage one."""
    return sublin.SparseJacobian(np.eye(n), np.ones(n), np.arange(n + 1), np.arange(n))


def distortion(J, sketched):
    """Least eps for which the sketch is a (1 +- eps) subspace embedding: max over x of | |S J^T x|^2 / |J^T x|^2 - 1 |."""
    L = np.linalg.cholesky(J.gram())
    whitened = np.linalg.solve(L, sketched.T)
    return float(np.abs(np.linalg.eigvalsh(whitened @ whitened.T) - 1).max())


def inner_iterations(X, y, width, seed, solver, **options):
    """Iterations of a sketched solver in the first step, None if it does not converge."""
    try:
        return paper_run(X, y, width, seed, solver=solver, max_iter=1, **options).history_[1]["inner_iterations"]
    except np.linalg.LinAlgError:
        return None


def starting_gram(X, width, seed, **options):
    """Smallest eigenvalue of the Gram matrix at the start, that of the kernel, and their relative distance."""
    J, shift = starting_jacobian(X, width, seed, **options)
    G, H = J.gram(), sublin.shifted_ntk(X, shift)
    return {
        "shift": shift,
        "smallest": float(np.linalg.eigvalsh(G)[0]),
        "kernel": sublin.smallest_ntk_eigenvalue(X, shift),
        "distance": float(np.linalg.norm(G - H) / np.linalg.norm(H)),
    }


def kernel_gap(X, y, width, seed, shift):
    """Relative distance of the trained network from kernel regression, on as many new points; f = 0 at the start."""
    new, _ = random_unit_data(*X.shape, seed + 1000)
    run = paper_run(X, y, width, seed, shift=shift, init="antisymmetric")
    H = sublin.shifted_ntk(np.vstack([X, new]), shift)
    n = len(X)
    expected = H[n:, :n] @ np.linalg.solve(H[:n, :n], y)
    return float(np.linalg.norm(run.predict(new) - expected) / np.linalg.norm(expected))


def starting_norms(X, width, seed):
    """Of Lemma 4.2: |W(0)| / sqrt(m) in the spectral norm, max |f_0|, max |J_i|; and max |f_0| with max(z, b) for phi."""
    run = paper_run(X, np.zeros(len(X)), width, seed, max_iter=0)
    W, signs = run.weights(), run.signs_
    outputs = run.predict(X)
    constant = run.shift_ * signs.sum(dtype=float) / np.sqrt(width)
    return {
        "weights": float(np.sqrt(np.linalg.eigvalsh(W.T @ W)[-1] / width)),
        "output": float(np.abs(outputs).max()),
        "output with max(z, b)": float(np.abs(outputs + constant).max()),
        "jacobian": float(np.sqrt(np.diff(run.active_sets()[0]).max() / width)),
    }


def retrace(X, y, width, seed, **options):
    """How far weights, Jacobian and Gram matrix go from their start in training: the worst over the steps.

    The network is trained anew up to each step, which is exact, since steps are reproducible.
    """

    def state(steps):
        run = paper_run(X, y, width, seed, max_iter=steps, **options)
        indptr, neurons = run.active_sets()
        pairs = np.repeat(np.arange(len(X)), np.diff(indptr)) * width + neurons
        return run, run.weights(), pairs, sublin.SparseJacobian(X, run.signs_, indptr, neurons).gram()

    run, W_0, pairs_0, G_0 = state(0)
    found, flipped = [], np.empty(0, np.int64)
    with suppress(np.linalg.LinAlgError):
        while not run.converged_ and len(found) < 20:
            run, W, pairs, G = state(len(found) + 1)
            flips = np.setxor1d(pairs, pairs_0, assume_unique=True)
            flipped = np.union1d(flipped, flips)
            move, jacobian_change = np.linalg.norm(W - W_0, axis=1).max(), np.sqrt(flips.size / width)
            found.append((move, jacobian_change, np.linalg.norm(G - G_0), -np.linalg.eigvalsh(G)[0]))
    move, jacobian_change, gram_change, smallest = np.max(found, axis=0) if found else [np.nan] * 4
    return {
        "shift": run.shift_,
        "kernel": sublin.smallest_ntk_eigenvalue(X, run.shift_),
        "converged": run.converged_,
        "move": float(move),
        "jacobian change": float(jacobian_change),
        "gram change": float(gram_change),
        "gram smallest": -float(smallest),
        "flipped / active": flipped.size / max(pairs_0.size, 1),
        "flipped / all": flipped.size / (len(X) * width),
    }


def timed_run(X, y, width, seed, tol, **options):
    """A run to the tolerance: share of active pairs at the start, steps, worst ratio of residuals, seconds with and without
    initialisation; nothing but that it did not converge where the Gram matrix is singular."""
    try:
        run = paper_run(X, y, width, seed, tol=tol, **options)
    except np.linalg.LinAlgError:
        return {"converged": False}
    steps = run.history_[1:]
    training = sum(step["seconds"] for step in steps)
    ratios = [later["residual"] / earlier["residual"] for earlier, later in pairwise(run.history_)]
    return {
        "converged": run.converged_,
        "active": run.history_[0]["active"] / width,
        "steps": len(steps),
        "worst": max(ratios, default=0.0),
        "seconds": run.init_seconds_ + training,
        "training": training,
    }


def beside(x, delta, rng):
    """A point of the sphere at distance delta from x."""
    direction = rng.standard_normal(x.size)
    direction -= (direction @ x) * x
    angle = 2 * np.arcsin(delta / 2)
    return np.cos(angle) * x + np.sin(angle) * direction / np.linalg.norm(direction)


def sandwich(n, d, delta, shift, seed):
    """lambda of n points of separability delta or less, two of them that far apart, and the bounds of Theorem 2.13."""
    X, _ = random_unit_data(n, d, seed)
    X[1] = beside(X[0], delta, np.random.default_rng([seed, 1]))  # not the stream that made X
    low, high = sublin.ntk_eigenvalue_bounds(X, shift)
    return {"low": low, "eigenvalue": sublin.smallest_ntk_eigenvalue(X, shift), "high": high}


def kernel_entry(rho, shift, samples, seed):
    """H_12 of two points of inner product rho: in closed form, and as the mean over that many neurons."""
    x, z = np.array([1.0, 0.0]), np.array([rho, np.sqrt(max(0.0, 1.0 - rho**2))])
    W = np.random.default_rng(seed).standard_normal((samples, 2))
    both = np.mean((W @ x >= shift) & (W @ z >= shift))
    return {"closed": float(sublin.shifted_ntk([x, z], shift)[0, 1]), "sampled": float(rho * both)}


# ----------------------------------------------------------------------------------------------------------------------
# Claims: all cases
# ----------------------------------------------------------------------------------------------------------------------


def grid(measure, **values):
    """One dict for every combination of the values: the combination, and what `measure` returns for it."""
    found = []
    for combination in product(*values.values()):
        case = dict(zip(values, combination, strict=True))
        measured = measure(**case)
        found.append({**case, **(measured if isinstance(measured, dict) else {"value": measured})})
    return found


def powers(first, last, step=2):
    return [1 << k for k in range(first, last + 1, step)]


def grid_of_map(measure, quick, **values):
    """The grid over points and widths, without cases of more than 2^26 products, which take too long."""
    counts, widths = ((4, 16), powers(8, 12)) if quick else ((4, 16, 64, 256, 1024), powers(8, 20))
    kept = {n: [width for width in widths if n * width <= 1 << 26] for n in counts}
    return [cell for n in counts for cell in grid(measure, n=[n], width=kept[n], **values)]


def measure_sparsity(quick, seeds):
    def activity(n, width, seed, alpha=0.04):
        return starting_activity(random_unit_data(n, 32, seed)[0], width, seed, alpha=alpha)

    widths = powers(8, 12) if quick else powers(10, 18)
    alphas = (0.04, 0.5) if quick else (0.0, 0.04, 0.25, 0.5, 0.9)
    counts = (2, 8, 32) if quick else (2, 8, 32, 128, 512)
    return {
        "counts": grid(activity, n=[16], width=widths, seed=seeds, alpha=alphas),
        "unions": grid(activity, n=counts, width=widths if quick else powers(10, 18, 4), seed=seeds),
    }


def measure_contraction(quick, seeds):
    def cell(n, d, width, seed):
        return contraction(*random_unit_data(n, d, seed), width, seed)

    def in_regime(n, d, seed):
        X, y = random_unit_data(n, d, seed)
        width = int(np.ceil(needed_width(X, 0.0)))
        return {"width": width, **contraction(X, y, width, seed, shift=0.0)} if width <= 1 << 21 else {"width": width}

    widths = powers(8, 12) if quick else powers(8, 18)
    counts = (4, 16) if quick else (4, 64, 1024)
    needed = {n: needed_width(random_unit_data(n, 32)[0], sublin.default_shift(1 << 18)) for n in counts}
    return {
        "cells": grid_of_map(cell, quick, d=[32], seed=seeds),
        "dimensions": grid(cell, n=[16 if quick else 64], d=(8, 128), width=widths, seed=seeds),
        "needed": {str(n): value for n, value in needed.items()},
        "regime": grid(in_regime, n=(2, 4) if quick else (2, 4, 8), d=[32], seed=seeds),
    }


def measure_ntk(quick, seeds):
    def gram(n, width, seed, shift):
        return starting_gram(random_unit_data(n, 16, seed)[0], width, seed, shift=shift)

    def gap(n, width, seed, shift):
        return kernel_gap(*random_unit_data(n, 16, seed), width, seed, shift)

    widths = powers(10, 12) if quick else powers(8, 18)
    deltas, shifts = ((0.01, 1.0), np.arange(0.0, 5, 2)) if quick else ((0.001, 0.01, 0.1, 1.0), np.arange(0.0, 5.1, 0.5))
    samples = 10**4 if quick else 10**6
    return {
        "entries": grid(kernel_entry, rho=np.linspace(-1, 1, 9), shift=(0.0, 1.0, 2.0), samples=[samples], seed=[0]),
        "grams": grid(gram, n=[32], width=widths, seed=seeds, shift=(0.0, 1.0, 2.0)),
        "default": grid(gram, n=[32], width=widths, seed=seeds, shift=["auto"]),
        "gaps": grid(gap, n=[32], width=powers(11, 13) if quick else powers(12, 18), seed=seeds, shift=[1.0]),
        "sandwich": grid(sandwich, n=[16], d=[8], delta=deltas, shift=shifts, seed=seeds),
    }


def measure_sketches(quick, seeds):
    n = 8 if quick else 16
    X, _ = random_unit_data(n, 16)
    data = {"random": starting_jacobian(X, 1 << 10, 0, shift=1.5)[0], "coherent": coherent_jacobian(n)}

    def sketched(kind, sketch, ratio, seed):
        return distortion(data[kind], sublin.SKETCHES[sketch](data[kind], ratio * n, seed))

    m = 1 << (12 if quick else 16)

    def inner(n, solver, sketch, ratio, seed):
        """At a sketch of ratio * n rows, or the default size."""
        X, y = random_unit_data(n, 32, seed)
        size = ratio and ratio * n
        bound = np.log(n / sublin.smallest_ntk_eigenvalue(X, sublin.default_shift(m)))
        return {"log": bound, "value": inner_iterations(X, y, m, seed, solver, sketch=sketch, sketch_size=size)}

    points, solvers = 16 if quick else 64, ("sketch", "richardson")
    sizes = (2, 8, 32) if quick else (1, 2, 4, 8, 16, 32, 64, 128)
    return {
        "n": n,
        "distortions": grid(
            sketched,
            kind=data,
            sketch=sublin.SKETCHES,
            ratio=powers(1, 7) if quick else powers(1, 10, 1),
            seed=seeds,
        ),
        "inner": grid(inner, n=[points], solver=solvers, sketch=["sparse"], ratio=sizes, seed=seeds),
        "counts": grid(
            inner, n=(4, 16) if quick else (4, 16, 64, 256), solver=solvers, sketch=["sparse"], ratio=[None], seed=seeds
        ),
    }


def measure_shift(quick, seeds):
    n, d, width = (16, 16, 1 << 12) if quick else (64, 32, 1 << 16)

    def timed(seed, shift, init, search):
        return timed_run(*random_unit_data(n, d, seed), width, seed, 1e-6, shift=shift, init=init, search=search)

    default = sublin.default_shift(width)
    shifts = (*((0.0, 1.0, 3.0) if quick else np.arange(0.0, 4.1, 0.5)), default)
    timed(0, 1.0, "gaussian", "tree")  # compiles
    both = grid(timed, seed=seeds, shift=shifts, init=["gaussian"], search=("dense", "tree", "lazy"))
    lazy = grid(timed, seed=seeds, shift=shifts, init=["antisymmetric"], search=["lazy"])
    return {"n": n, "d": d, "width": width, "default": default, "runs": both + lazy}


def measure_crossover(quick, seeds):
    """Seconds to a residual of 1e-5 in float32, methods taking turns, until one does not get there."""
    searches = ("lazy", "tree", "scan", "dense")

    def turns(n, width):
        X, y = random_unit_data(n, 32)
        found = {"seconds": {search: [] for search in searches}, "training": {search: [] for search in searches}}
        for turn in seeds[:TURNS]:
            for search in searches:
                run = timed_run(X, y, width, turn, 1e-5, search=search, dtype="float32")
                if not run["converged"]:
                    return {**found, "converged": False}
                for key in found:
                    found[key][search].append(run[key])
        return {**found, "converged": True}

    turns(4, 1 << 12)  # compiles
    return {"d": 32, "tolerance": 1e-5, "cells": grid_of_map(turns, quick)}


def measure_rest(quick, seeds):
    """The samples of claims without a figure."""

    def cost(width, seed, method):
        return step_cost(*random_unit_data(32, 32, seed), width, seed, method)

    def touches(n, width, seed):
        return tree_touches(n, 8, width, seed)

    def norms(width, seed):
        return starting_norms(random_unit_data(32, 32, seed)[0], width, seed)

    def path(n, width, seed, threshold):
        return retrace(*random_unit_data(n, 32, seed), width, seed, shift=threshold)

    def descent(n, seed, solver):
        X, y = random_unit_data(n, 32, seed)
        return timed_run(X, y, 1 << 12, seed, 1e-3, solver=solver, shift=1.0, max_iter=3000)

    train("tree", *random_unit_data(8, 8), 1 << 12, init="gaussian")  # compiles
    return {
        "costs": grid(cost, seed=seeds, width=powers(10, 14) if quick else powers(12, 20), method=("tree", "lazy")),
        "trees": grid(touches, n=[16], width=powers(8, 12) if quick else powers(8, 18), seed=seeds),
        "norms": grid(norms, width=powers(8, 12) if quick else powers(8, 18), seed=seeds),
        "paths": grid(path, n=[32], width=powers(10, 12) if quick else powers(10, 18), seed=seeds, threshold=(1.0, "auto")),
        "descent": grid(descent, n=(4, 8) if quick else (4, 16, 64), seed=seeds, solver=("gradient", "cholesky")),
    }


PARTS = {
    "sparsity": measure_sparsity,
    "contraction": measure_contraction,
    "ntk": measure_ntk,
    "sketches": measure_sketches,
    "shift": measure_shift,
    "crossover": measure_crossover,
    "rest": measure_rest,
}


def measure_claims(suffix):
    """Writes a JSON for every figure and claims.json, with the table."""
    quick = bool(suffix)
    seeds = range(2) if quick else range(SEEDS)
    found, seconds = {}, {}
    for name, measure in PARTS.items():
        begin = time.perf_counter()
        print(f"{name} ...", end=" ", file=sys.stderr, flush=True)
        found[name] = measure(quick, seeds)
        seconds[name] = time.perf_counter() - begin
        print(f"{seconds[name]:.0f} s", file=sys.stderr)
        if name != "rest":
            write(name + suffix, {"environment": environment(), **found[name]})
    claims = [{**claim._asdict(), "holds": bool(claim.holds)} for judge in JUDGES for claim in judge(found)]
    write("claims" + suffix, {"environment": environment(), "seconds": seconds, "claims": claims, "samples": found["rest"]})


# ----------------------------------------------------------------------------------------------------------------------
# Claims: verdicts
# ----------------------------------------------------------------------------------------------------------------------


class Claim(NamedTuple):
    claim: str
    where: str  # in the paper
    predicts: str  # with the constant that was checked
    measured: str  # medians and ranges over seeds and cases
    holds: bool
    comment: str


def spread(values):
    """The median and the range of some numbers, "none" of no numbers."""
    if len(values) == 0:
        return "none"
    return f"{np.median(values):.3g} ({np.min(values):.3g} to {np.max(values):.3g})"


def where(samples, **values):
    """The samples with these values."""
    return [sample for sample in samples if all(sample[key] == value for key, value in values.items())]


def distinct(samples, key):
    """Values of a key in the order in which they first appear."""
    return list(dict.fromkeys(sample[key] for sample in samples))


def slopes(samples, value, least=0):
    """For each seed, the exponent of a value in the width, from `least` on."""
    found = []
    for seed in distinct(samples, "seed"):
        mine = [sample for sample in where(samples, seed=seed) if sample["width"] >= least]
        found.append(slope([sample["width"] for sample in mine], [value(sample) for sample in mine]))
    return found


def least(samples, key, good):
    """Least value of a key from which on all samples are good, None if those of the greatest are not."""
    bad = [sample[key] for sample in samples if not good(sample)]
    beyond = [sample[key] for sample in samples if not bad or sample[key] > max(bad)]
    return min(beyond, default=None)


def power_text(width):
    return "none" if width is None else f"2^{np.log2(width):.0f}"


def reach_text(width):
    return "holds at no width" if width is None else f"holds from m = {power_text(width)} on"


def listed(values):
    """Least widths by case, as text."""
    return ", ".join(f"{power_text(width)} at {case}" for case, width in values.items())


def judge_contraction(found):
    data = found["contraction"]
    reached = [cell for cell in data["regime"] if "ratios" in cell]
    worst = [max(cell["ratios"], default=np.inf) for cell in reached]
    needed = ", ".join(f"10^{np.log10(width):.0f} for n = {n}" for n, width in data["needed"].items())
    yield Claim(
        "each step at least halves the residual, at the widths of the theorem",
        "Theorems 1.1, 4.1",
        "ratio at most 0.5 for m = max(n^4 / lambda^4, n^2 d log(16 n / rho) / lambda^2)",
        f"worst ratio {spread(worst)} at b = 0, n = {distinct(reached, 'n')}",
        all(map(halves, reached)),
        f"out of reach at the default b: with that of m = 2^18 already, {needed}",
    )
    cells = data["cells"]
    first = {f"n = {n}": least(where(cells, n=n), "width", halves) for n in distinct(cells, "n")}
    d_first = {f"d = {d}": least(where(data["dimensions"], d=d), "width", halves) for d in distinct(data["dimensions"], "d")}
    good = [max(cell["ratios"]) for cell in cells if halves(cell)]
    ends = ", ".join(f"{sum(cell['end'] == end for cell in cells)} {end}" for end in ("converged", "stuck", "singular"))
    yield Claim(
        "each step at least halves the residual, at the widths measured",
        "Theorems 1.1, 4.1",
        "ratio at most 0.5 in every step of every run",
        f"{len(good)} of {len(cells)} runs ({ends}); in those, worst ratio {spread(good)}, "
        f"steps to 1e-9 {spread([cell['steps'] for cell in cells if halves(cell)])}",
        len(good) == len(cells),
        f"all runs do from m = {listed(first)} on (d = 32), {listed(d_first)} at n = {data['dimensions'][0]['n']}",
    )


def judge_costs(found):
    for method in ("tree", "lazy"):
        samples = where(found["rest"]["costs"], method=method)
        middle = sorted(distinct(samples, "width"))[1]

        def per_log(sample):
            return sample["operations"] / np.log(sample["width"])

        exponents = slopes(samples, per_log, middle)
        plain = slopes(samples, lambda sample: sample["operations"], middle)
        yield Claim(
            f"operations of a step grow like m^0.76 log m, {method}",
            "Theorems 5.1, F.1",
            "exponent of operations / log m at most 0.76",
            f"{spread(exponents)}; without the division {spread(plain)}",
            bool(np.median(exponents) <= POWER),
            f"search and update, n = d = 32, from m = {power_text(middle)}",
        )
        seconds = slopes(samples, lambda sample: sample["seconds"], middle)
        phases = {
            PHASES[phase][0]: np.median(slopes(samples, lambda sample, phase=phase: sample[phase], middle))
            for phase in PHASES
        }
        yield Claim(
            f"seconds of a step grow no faster, {method}",
            "Theorems 5.1, F.1",
            "exponent of seconds at most 0.76 + 1 / log m",
            spread(seconds),
            bool(np.median(seconds) <= POWER + 1 / np.log(samples[-1]["width"])),
            "by phase: " + ", ".join(f"{phase} {exponent:.2f}" for phase, exponent in phases.items()),
        )


def judge_sparsity(found):
    counts, unions = found["sparsity"]["counts"], found["sparsity"]["unions"]
    default = where(counts, alpha=0.04)
    widest = max(distinct(default, "width"))
    largest = [sample["largest"] / sample["width"] ** POWER for sample in default]
    exact = [sample["mean"] / (sample["width"] * normal_tail(sample["shift"])) for sample in default]
    yield Claim(
        "at most 2 m^0.76 neurons are active on a point",
        "Corollary A.11",
        "max |Q_i| / m^0.76 at most 2",
        spread(largest),
        max(largest) <= 2,
        f"the exact mean is m P(Z >= b): measured / exact {spread(exact)}; at m = {power_text(widest)} J has "
        f"{100 * np.median([sample['mean'] / widest for sample in where(default, width=widest)]):.2g} % nonzeros",
    )
    exponents, constants, fits = {}, [], True
    for alpha in distinct(counts, "alpha"):
        samples = where(counts, alpha=alpha)
        exponents[alpha] = np.median(slopes(samples, lambda sample: sample["mean"]))
        constants += [sample["largest"] / sample["width"] ** ((3 + alpha) / 4) for sample in samples]
        fits &= bool(exponents[alpha] <= (3 + alpha) / 4)
    yield Claim(
        "|Q_i| = O(m^((3 + alpha) / 4))",
        "Lemma A.10, Theorem G.2",
        "exponent at most (3 + alpha) / 4, constant 1",
        f"max |Q_i| / m^((3 + alpha) / 4): {spread(constants)}",
        fits and max(constants) <= 1,
        "exponents: " + ", ".join(f"alpha {alpha}: {exponent:.3f}" for alpha, exponent in exponents.items()),
    )
    yield Claim(
        "|K| is at most the sum of |Q_i|",
        "Section 3, Algorithm 5 line 38",
        "ratio at most 1",
        spread([sample["union"] / sample["sum"] for sample in unions]),
        all(sample["union"] <= sample["sum"] for sample in unions),
        "points share neurons, the more the more points there are",
    )
    shares = {
        n: np.median([sample["union"] / sample["width"] for sample in where(unions, n=n, width=unions[-1]["width"])])
        for n in distinct(unions, "n")
    }
    few = [sample["union"] / sample["width"] for sample in unions if sample["n"] <= sample["width"] ** (1 - POWER)]
    yield Claim(
        "a step changes |K| = O(n m^0.76) neurons, sublinear in m",
        "Algorithm 5 line 39, Lemma F.4",
        "|K| at most n m^0.76; at most half of m for n up to m^0.24",
        f"|K| / m {spread(few)} for n up to m^0.24",
        all(sample["union"] <= sample["n"] * sample["width"] ** POWER for sample in unions) and max(few) <= 0.5,
        f"at m = {power_text(unions[-1]['width'])} the share of m is "
        + ", ".join(f"{share:.2f} at n = {n}" for n, share in shares.items()),
    )


def judge_trees(found):
    samples, fan_out = found["rest"]["trees"], sublin.FAN_OUT
    n = samples[0]["n"]

    def height(sample):
        return max(1, int(np.ceil(np.log(sample["width"]) / np.log(fan_out) - 1e-9)))

    init = [sample["init"] / (n * sample["width"]) for sample in samples]
    yield Claim(
        "init touches O(n m) nodes",
        "Theorem B.1, Lemma B.2",
        f"at most {fan_out} / {fan_out - 1} n m and one group of {fan_out} a level",
        f"nodes / (n m): {spread(init)}",
        all(
            sample["init"] <= n * (sample["width"] * fan_out / (fan_out - 1) + fan_out * height(sample))
            for sample in samples
        ),
        f"fan-out {fan_out}; a binary tree has 2 n m nodes",
    )
    update = [sample["update"] / (n * np.log2(sample["width"])) for sample in samples]
    yield Claim(
        "an update touches O(n log m) nodes",
        "Theorem B.1, Lemma B.3",
        f"at most n (1 + {fan_out + 1} log_{fan_out} m)",
        f"nodes / (n log2 m): {spread(update)}",
        all(sample["update"] <= n * (1 + (fan_out + 1) * height(sample)) for sample in samples),
        "all siblings on the path are read; n d multiplications for the leaf come on top",
    )
    query = [sample["query"] / (sample["reported"] * np.log2(sample["width"])) for sample in samples if sample["reported"]]
    yield Claim(
        "a query touches O(k log m) nodes for k answers",
        "Theorem B.1, Lemma B.4",
        f"at most {fan_out} max(1, k) log_{fan_out} m",
        f"nodes / (k log2 m): {spread(query)}",
        all(sample["query"] <= fan_out * max(1, sample["reported"]) * height(sample) for sample in samples),
        f"with k = 0 it touches {max(sample['silent'] for sample in samples)} nodes, where the bound as written is 0",
    )


def judge_sketches(found):
    data = found["sketches"]
    n = data["n"]
    limit = n * np.log(n / FAILURE) ** 2 / 0.1**2
    for kind, comment in (
        ("random", "random unit data, b = 1.5"),
        ("coherent", "J^T has n nonzeros, each of leverage one: the sparse sketch is exact where none of them meet"),
    ):
        samples = where(data["distortions"], kind=kind)
        needed = {
            sketch: least(where(samples, sketch=sketch), "ratio", lambda sample: sample["value"] <= 0.1)
            for sketch in distinct(samples, "sketch")
        }
        widest = [sample["value"] for sample in samples if sample["ratio"] == max(distinct(samples, "ratio"))]
        text = ", ".join(
            f"{sketch} {'more than were tried' if ratio is None else ratio}" for sketch, ratio in needed.items()
        )
        yield Claim(
            f"a sketch of O(n polylog(n) / eps^2) rows embeds, {kind} data",
            "Definition 2.1, Lemma 2.2",
            f"distortion at most 0.1 from {limit / n:.0f} n = n log(n / 0.1)^2 / eps^2 rows on",
            f"rows / n for 0.1 in all runs: {text}; distortion at {max(distinct(samples, 'ratio'))} n {spread(widest)}",
            all(ratio is not None and ratio * n <= limit for ratio in needed.values()),
            comment + f", n = {n}",
        )
    for solver, label in (("sketch", "conjugate gradients"), ("richardson", "the paper's iteration")):
        counts, inner = where(data["counts"], solver=solver), where(data["inner"], solver=solver)
        found_counts = [sample for sample in counts if sample["value"] is not None]
        limits = [(np.log(6) + sample["log"]) / np.log(1 / 0.9) for sample in found_counts]
        works = least(inner, "ratio", lambda sample: sample["value"] is not None)
        by_size = {
            ratio: np.median([sample["value"] for sample in where(inner, ratio=ratio)])
            for ratio in distinct(inner, "ratio")
            if works and ratio >= works
        }
        yield Claim(
            f"O(log(n / lambda)) inner iterations, {label}",
            "Lemmas A.6, A.7, E.4",
            "at most log(6 n / lambda) / log(1 / 0.9), the rate of Lemma A.6",
            f"iterations {spread([sample['value'] for sample in found_counts])}, over log(n / lambda): "
            f"{spread([sample['value'] / sample['log'] for sample in found_counts])}",
            len(found_counts) == len(counts)
            and all(sample["value"] <= limit for sample, limit in zip(found_counts, limits, strict=True)),
            f"default sizes, n = {distinct(counts, 'n')}; at n = {inner[0]['n']} it converges from {works} n rows on: "
            + ", ".join(f"{count:.0f} at {ratio} n" for ratio, count in by_size.items()),
        )


def judge_ntk(found):
    data = found["ntk"]
    n = data["grams"][0]["n"]
    everything = data["grams"] + data["default"]
    wide = [sample for sample in everything if sample["width"] >= n * np.log(n / FAILURE) / sample["kernel"]]
    shares = [sample["smallest"] / sample["kernel"] for sample in wide]
    first = {
        f"b = {shift}": least(
            where(data["grams"], shift=shift), "width", lambda sample: sample["smallest"] >= 0.75 * sample["kernel"]
        )
        for shift in distinct(data["grams"], "shift")
    }
    yield Claim(
        "the smallest eigenvalue of H_dis is at least 3/4 lambda",
        "Lemma 2.12",
        "ratio at least 0.75 for m at least n log(n / 0.1) / lambda",
        f"ratio {spread(shares)}",
        min(shares) >= 0.75,
        f"n = {n}, d = 16; all runs reach 0.75 from m = {listed(first)} on",
    )
    sandwich = data["sandwich"]
    yield Claim(
        "lambda lies between exp(-b^2/2) delta / (100 n^2) and exp(-b^2/2)",
        "Theorem 2.13",
        "low <= lambda <= high",
        f"lambda / low {spread([sample['eigenvalue'] / sample['low'] for sample in sandwich])}, "
        f"lambda / high {spread([sample['eigenvalue'] / sample['high'] for sample in sandwich])}",
        all(sample["low"] <= sample["eigenvalue"] <= sample["high"] for sample in sandwich),
        f"delta {sandwich[0]['delta']:g} to {sandwich[-1]['delta']:g}, b 0 to {sandwich[-1]['shift']:g}; "
        "lambda / low is how far the lower bound is from sharp",
    )
    exponents = slopes(where(data["grams"], shift=1.0), lambda sample: sample["distance"])
    yield Claim(
        "the Gram matrix tends to the kernel",
        "Section 2.3, Equation (3)",
        "relative distance falls like m^(-1/2): exponent -0.6 to -0.4",
        f"exponent {spread(exponents)}",
        bool(-0.6 <= np.median(exponents) <= -0.4),
        f"b = 1; at m = {power_text(data['grams'][-1]['width'])} the distance is "
        + spread([s["distance"] for s in where(data["grams"], shift=1.0, width=data["grams"][-1]["width"])]),
    )
    gaps = data["gaps"]
    yield Claim(
        "the trained network tends to kernel regression",
        "not in the paper; follows from Lemma 4.3",
        "relative distance on new points falls with m",
        f"exponent {spread(slopes(gaps, lambda sample: sample['value']))}",
        bool(np.median(slopes(gaps, lambda sample: sample["value"])) < 0),
        f"b = 1; at m = {power_text(gaps[-1]['width'])} it is "
        + spread([sample["value"] for sample in where(gaps, width=gaps[-1]["width"])]),
    )


def judge_norms(found):
    samples = found["rest"]["norms"]
    for key, label, limit, comment in (
        ("weights", "|W(0)| = O(sqrt(m))", 3.0, "the proof's constant 3; the ratio tends to 1"),
        ("jacobian", "max |J_i| = O(1)", 1.0, "it is sqrt(|Q_i| / m), which falls with m"),
        (
            "output",
            "max |f_0| = O(1)",
            3.0,
            "with max(z, b) for phi, as in Definition 2.3, it is {}, growing like sqrt(log m)",
        ),
    ):
        values = [sample[key] for sample in samples]
        yield Claim(
            label,
            "Lemmas 4.2, D.1",
            f"at most {limit:g}{' sqrt(m)' if key == 'weights' else ''}",
            f"{spread(values)}; exponent in m {np.median(slopes(samples, lambda sample, key=key: sample[key])):.2f}",
            max(values) <= limit,
            comment.format(spread([sample["output with max(z, b)"] for sample in samples])),
        )


def judge_paths(found):
    for threshold, label in ((1.0, "b = 1"), ("auto", "default b")):
        samples = where(found["rest"]["paths"], threshold=threshold, converged=True)
        yield from judge_path(samples, samples[0]["n"], label)


def judge_bound(claim, where_in_paper, samples):
    """A claim of a value below a bound, with the rates of both in m over the wider half of the widths."""
    widths = sorted(distinct(samples, "width"))
    middle = widths[(len(widths) - 1) // 2]
    ratios = [sample["value"] / sample["bound"] for sample in samples]
    value, bound = (spread(slopes(samples, lambda sample, key=key: sample[key], middle)) for key in ("value", "bound"))
    return Claim(
        claim,
        where_in_paper,
        "at most that, constant 1",
        f"ratio to the bound {spread(ratios)}",
        max(ratios) <= 1,
        f"exponent in m, from {power_text(middle)} on: {value}; that of the bound: {bound}",
    )


def judge_path(samples, n, label):
    changes = [sample["gram change"] / sample["kernel"] for sample in samples]
    reach = least(samples, "width", lambda sample: sample["gram change"] <= sample["kernel"] / 2)
    widest = samples[-1]["width"]
    yield Claim(
        f"|G_t - G_0|_F at most lambda / 2 along training, {label}",
        "Lemma 4.3",
        "ratio to lambda at most 0.5",
        spread(changes),
        max(changes) <= 0.5,
        f"n = d = {n}; {reach_text(reach)}; at m = {power_text(widest)} it is "
        + spread([sample["gram change"] / sample["kernel"] for sample in where(samples, width=widest)]),
    )
    smallest = [sample["gram smallest"] / sample["kernel"] for sample in samples]
    reach = least(samples, "width", lambda sample: sample["gram smallest"] >= sample["kernel"] / 2)
    yield Claim(
        f"the smallest eigenvalue of G_t stays above lambda / 2, {label}",
        "Lemma 4.3",
        "ratio to lambda at least 0.5",
        spread(smallest),
        min(smallest) >= 0.5,
        f"n = d = {n}; {reach_text(reach)}",
    )
    yield judge_bound(
        f"weights move by at most R_0 / sqrt(m), R_0 = n / lambda, {label}",
        "Lemma E.3",
        [{**sample, "value": sample["move"], "bound": n / sample["kernel"] / sample["width"] ** 0.5} for sample in samples],
    )
    # R_0 as measured, sqrt(m) times the largest move, is the least for which the lemma applies.
    bounds = [np.sqrt(n * sample["move"]) for sample in samples]
    yield judge_bound(
        f"|J_t - J_0|_F at most sqrt(n R_0) m^(-1/4), {label}",
        "Lemma 4.4",
        [{**sample, "value": sample["jacobian change"], "bound": at} for sample, at in zip(samples, bounds, strict=True)],
    )
    yield Claim(
        f"the positions of nonzeros do not change much, {label}",
        "Section 3",
        "at most 10 % as many flips as active pairs, at the greatest width",
        f"pairs that ever flip / active {spread([s['flipped / active'] for s in where(samples, width=widest)])}, "
        f"/ all {spread([s['flipped / all'] for s in where(samples, width=widest)])}",
        max(sample["flipped / active"] for sample in where(samples, width=widest)) <= 0.1,
        "at m = "
        + ", ".join(
            f"{power_text(w)}: {np.median([s['flipped / active'] for s in where(samples, width=w)]):.3f}"
            for w in distinct(samples, "width")
        ),
    )


def judge_descent(found):
    samples = found["rest"]["descent"]

    def middle(solver, key):
        return {n: np.median([sample[key] for sample in where(samples, n=n, solver=solver)]) for n in distinct(samples, "n")}

    newton, descent = middle("cholesky", "steps"), middle("gradient", "steps")
    faster = np.array([*middle("gradient", "training").values()]) / [*middle("cholesky", "training").values()]
    yield Claim(
        "the number of steps does not depend on n, unlike gradient descent's",
        "Introduction",
        "at most one more step from the fewest to the most points",
        ", ".join(f"n = {n}: {newton[n]:.0f} steps, gradient descent {descent[n]:.0f}" for n in newton),
        max(newton.values()) - min(newton.values()) <= 1,
        f"to a residual of 1e-3, b = 1, m = {power_text(1 << 12)}, both lazy; gradient descent takes "
        + ", ".join(f"{factor:.2g}" for factor in faster)
        + " times as long",
    )


def judge_shift(found):
    data = found["shift"]
    lazy = where(data["runs"], search="lazy")
    runs = where(lazy, shift=data["default"])
    bad = min((run["shift"] for run in lazy if not run["converged"] or run["worst"] > 0.5), default=np.inf)
    halved = max((shift for shift in distinct(lazy, "shift") if shift < bad), default=np.nan)
    yield Claim(
        "one b gives both sparse activity and fast convergence",
        "Section 3",
        "all runs reach 1e-6 at the default b, with both initialisations",
        "; ".join(
            f"{init}: steps {spread([run['steps'] for run in runs if run['init'] == init and run['converged']])}"
            for init in distinct(runs, "init")
        ),
        all(run["converged"] for run in runs),
        f"share of active pairs {spread([run['active'] for run in runs if run['converged']])}; n = {data['n']}, "
        f"m = {power_text(data['width'])}, where every step halves the residual up to b = {halved:.2g} of those tried",
    )


def fastest(cell, key):
    """The method with the least median time, and the medians."""
    times = {name: float(np.median(seconds)) for name, seconds in cell[key].items()}
    return min(times, key=times.get), times


def judge_crossover(found):
    cells = where(found["crossover"]["cells"], converged=True)
    counts = distinct(cells, "n")
    for key, label in (("seconds", "in total, initialisation included"), ("training", "in the steps alone")):
        best = {(cell["n"], cell["width"]): fastest(cell, key) for cell in cells}
        widest = [max(width for n, width in best if n == count) for count in counts]
        top = [(n, width, *best[n, width]) for n, width in zip(counts, widest, strict=True)]
        dense = [f"n = {n}, m = {power_text(width)}" for (n, width), (name, _) in best.items() if name == "dense"]
        yield Claim(
            f"less time than methods that pay m n d in each step, {label}",
            "Theorem 1.1, Remark 1.2",
            "lazy or tree is the fastest at the greatest width, for every n",
            ", ".join(
                f"n = {n}, m = {power_text(width)}: {name}, dense takes {times['dense'] / times[name]:.2f} times as long"
                for n, width, name, times in top
            ),
            all(name in ("lazy", "tree") for _, _, name, _ in top),
            f"to a residual of 1e-5 in float32; dense wins at {'; '.join(dense) or 'no size'}",
        )


JUDGES = (
    judge_contraction,
    judge_costs,
    judge_sparsity,
    judge_trees,
    judge_sketches,
    judge_ntk,
    judge_norms,
    judge_paths,
    judge_descent,
    judge_shift,
    judge_crossover,
)


def print_claims(claims):
    """The table of claims as text."""
    for claim in claims:
        print(f"[{'holds' if claim['holds'] else 'FAILS'}] {claim['claim']} ({claim['where']})")
        for key in ("predicts", "measured", "comment"):
            if claim[key]:
                print(f"        {key}: {claim[key]}")
    print(f"{sum(claim['holds'] for claim in claims)} of {len(claims)} claims hold")


# ----------------------------------------------------------------------------------------------------------------------
# Claims: drawing
# ----------------------------------------------------------------------------------------------------------------------

OKABE_ITO = ("#000000", "#0072B2", "#D55E00", "#009E73", "#E69F00", "#CC79A7", "#56B4E9")
MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def medians(samples, x, y):
    """Abscissas in ascending order; median, least and greatest ordinate over seeds at each. None counts as absent."""
    xs = sorted(distinct(samples, x))
    values = [[sample[y] for sample in where(samples, **{x: at}) if sample.get(y) is not None] for at in xs]
    kept = [(at, *np.percentile(found, (50, 0, 100))) for at, found in zip(xs, values, strict=True) if found]
    return np.array(kept).reshape(-1, 4).T


def line_with_range(axis, samples, x, y, place, label, band=True, **options):
    """Medians as a line in the colour of that place in the palette, ranges over seeds as a band."""
    at, middle, low, high = medians(samples, x, y)
    line = {"color": OKABE_ITO[place], "marker": MARKERS[place], "linewidth": 2, "markersize": 6, "label": label, **options}
    axis.plot(at, middle, **line)
    if band:
        axis.fill_between(at, low, high, color=line["color"], alpha=0.15, linewidth=0)


def below(axis, ncols=2):
    """Legend under the axis."""
    axis.legend(fontsize=10, ncols=ncols, loc="upper center", bbox_to_anchor=(0.5, -0.17))


def save(figure, path):
    figure.savefig(path)
    plt.close(figure)


def draw_sparsity(data, path):
    """Active neurons of a point against width, and the share of all neurons that a step moves."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.4), layout="constrained")
    counts = data["counts"]
    widths = np.array(sorted(distinct(counts, "width")))
    for place, alpha in enumerate(distinct(counts, "alpha")):
        line_with_range(left, where(counts, alpha=alpha), "width", "mean", place, f"α = {alpha:g}", linestyle="none")
        exact = [width * normal_tail(sublin.default_shift(int(width), alpha)) for width in widths]
        left.plot(widths, exact, color=OKABE_ITO[place], linewidth=1.5)
        left.plot(widths, widths ** ((3 + alpha) / 4), color=OKABE_ITO[place], linestyle=":", linewidth=1.5)
    left.plot([], [], color="#777777", label="exact, m P(Z ≥ b)")
    left.plot([], [], color="#777777", linestyle=":", label="bound, m$^{(3+α)/4}$")
    width_axis(left, list(widths))
    left.set_yscale("log")
    left.set_ylabel("active neurons of a point, mean |Q$_i$|")
    left.set_title("Each point fires few neurons ...")
    below(left, 3)
    unions = [
        {**sample, "x": sample["n"] / sample["width"] ** (1 - POWER), "share": sample["union"] / sample["width"]}
        for sample in data["unions"]
    ]
    for place, width in enumerate(distinct(unions, "width")):
        line_with_range(right, where(unions, width=width), "x", "share", place, f"m = {power_label(width)}")
    x = np.geomspace(min(s["x"] for s in unions), max(s["x"] for s in unions), 50)
    right.plot(x, np.minimum(x, 1), color="#777777", linestyle=":", linewidth=1.5, label="bound, n m$^{-0.24}$")
    right.set_xscale("log")
    right.set_yscale("log")
    right.set_xlabel("points, in units of m$^{0.24}$")
    right.set_ylabel("share of neurons that a step moves, |K| / m")
    right.set_title("... many points fire many")
    below(right)
    save(figure, path)


def heat(axis, cells, value, text, title, marked=lambda shown: False, **options):
    """A map over n and m of value(cells), written out in each cell, with a frame where it is `marked`; None is left grey."""
    counts, widths = sorted(distinct(cells, "n")), sorted(distinct(cells, "width"))
    table = np.full((len(counts), len(widths)), np.nan)
    for row, n in enumerate(counts):
        for column, width in enumerate(widths):
            there = where(cells, n=n, width=width)
            found = value(there) if there else None
            if found is not None:
                table[row, column] = found
    axis.set_facecolor("#dddddd")
    image = axis.imshow(table, origin="lower", aspect="auto", cmap="cividis", **options)
    for row, column in np.ndindex(*table.shape):
        shown = table[row, column]
        dark = np.isfinite(shown) and image.norm(shown) < 0.5
        axis.text(
            column,
            row,
            text(shown) if np.isfinite(shown) else "",
            ha="center",
            va="center",
            fontsize=12,
            color="white" if dark else "black",
        )
        if np.isfinite(shown) and marked(shown):
            frame = {"fill": False, "edgecolor": OKABE_ITO[2], "linewidth": 3}
            axis.add_patch(plt.Rectangle((column - 0.45, row - 0.45), 0.9, 0.9, **frame))
    map_axes(axis, counts, widths)
    axis.set_title(title)


def map_axes(axis, counts, widths):
    axis.set_xticks(range(len(widths)), [power_label(width) for width in widths])
    axis.set_yticks(range(len(counts)), counts)
    axis.set_xlabel("width m (neurons)")
    axis.set_ylabel("points n")
    axis.grid(False)


def draw_contraction(data, path):
    """Steps to 1e-9, and the worst ratio of successive residuals, over n and m."""

    def steps(cells):
        return np.median([cell["steps"] for cell in cells]) if all(cell["end"] == "converged" for cell in cells) else None

    def worst(cells):
        return None if any(cell["end"] == "singular" for cell in cells) else max(max(cell["ratios"]) for cell in cells)

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.8), layout="constrained")
    heat(left, data["cells"], steps, lambda shown: f"{shown:.3g}", "Steps to a residual of 1e-9 (median)", vmin=2, vmax=12)
    title = "Worst ratio of successive residuals"
    look = {"marked": lambda shown: shown > 0.5, "vmin": 0, "vmax": 1}
    heat(right, data["cells"], worst, lambda shown: f"{shown:.2f}" if shown < 10 else ">10", title, **look)
    count = len(distinct(data["cells"], "seed"))
    figure.suptitle(
        f"Random unit data, d = 32, default b, {count} seeds. Frame: above 0.5. Grey: not in every run, or not measured",
        fontsize=12,
    )
    save(figure, path)


def draw_ntk(data, path):
    """The kernel: its closed form, how the network tends to it, its smallest eigenvalue."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 5.4), layout="constrained")
    rho = np.linspace(-1, 1, 101)
    for place, shift in enumerate(distinct(data["entries"], "shift")):
        entries = where(data["entries"], shift=shift)
        curve = [kernel_entry(value, shift, 1, 0)["closed"] for value in rho]
        axes[0].plot(rho, curve, color=OKABE_ITO[place], linewidth=2, label=f"b = {shift:g}")
        points = [entry["rho"] for entry in entries], [entry["sampled"] for entry in entries]
        axes[0].plot(*points, color=OKABE_ITO[place], marker=MARKERS[place], linestyle="none")
        line_with_range(
            axes[1], where(data["grams"], shift=shift), "width", "distance", place, f"Gram matrix, b = {shift:g}"
        )
    axes[0].plot([], [], color="#777777", marker="o", linestyle="none", label="sampled neurons")
    axes[0].set_xlabel("inner product of two points, ρ")
    axes[0].set_ylabel("kernel entry H$_{ij}$")
    axes[0].set_title("Closed form")
    place = len(distinct(data["entries"], "shift"))
    line_with_range(axes[1], data["gaps"], "width", "value", place, "prediction, b = 1", linestyle="--")
    widths = np.array(sorted(distinct(data["grams"], "width")))
    axes[1].plot(widths, widths**-0.5, color="#777777", linestyle=":", label="m$^{-1/2}$")
    width_axis(axes[1], list(widths))
    axes[1].set_yscale("log")
    axes[1].set_ylabel("relative distance")
    axes[1].set_title("Network to kernel")
    for place, delta in enumerate(distinct(data["sandwich"], "delta")):
        samples = where(data["sandwich"], delta=delta)
        line_with_range(axes[2], samples, "shift", "eigenvalue", place, f"λ, δ = {delta:g}")
        at, low, *_ = medians(samples, "shift", "low")
        axes[2].plot(at, low, color=OKABE_ITO[place], linestyle=":", linewidth=1.5)
    at, high, *_ = medians(data["sandwich"], "shift", "high")
    axes[2].plot(at, high, color="#777777", linewidth=1.5, label="upper bound")
    axes[2].plot([], [], color="#777777", linestyle=":", label="lower bounds")
    axes[2].set_yscale("log")
    axes[2].set_xlabel("threshold b")
    axes[2].set_ylabel("smallest eigenvalue λ")
    axes[2].set_title("Between the bounds of Theorem 2.13")
    for axis in axes:
        below(axis)
    save(figure, path)


def draw_sketches(data, path):
    """Distortion against rows of the sketch, and the inner iterations that follow from it."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 5.4), layout="constrained")
    for place, sketch in enumerate(distinct(data["distortions"], "sketch")):
        for kind, look in (("random", {"linestyle": "-"}), ("coherent", {"linestyle": "--", "band": False})):
            samples = [{**s, "value": max(s["value"], 1e-2)} for s in where(data["distortions"], sketch=sketch, kind=kind)]
            line_with_range(left, samples, "ratio", "value", place, f"{sketch}, {kind} data", **look)
    left.axhline(0.1, color="#777777", linestyle=":", label="the paper asks for 0.1")
    left.set_yscale("log")
    left.set_ylabel("distortion ε (less than 0.01 drawn there)")
    left.set_title(f"How well sketches embed, n = {data['n']}")
    labels = {"sketch": "conjugate gradients", "richardson": "the paper's iteration"}
    for place, (solver, label) in enumerate(labels.items(), start=3):
        line_with_range(right, where(data["inner"], solver=solver), "ratio", "value", place, label)
    right.axhline(data["inner"][0]["log"], color="#777777", linestyle=":", label="log(n / λ)")
    right.set_yscale("log", base=2)
    right.yaxis.set_major_formatter("{x:g}")
    right.set_ylabel("inner iterations of the first step")
    right.set_title(f"What the solvers need, n = {data['inner'][0]['n']}")
    for axis in (left, right):
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("rows of the sketch, in units of n")
        below(axis)
    save(figure, path)


def draw_shift(data, path):
    """Time, steps and active share over the threshold."""
    figure, axes = plt.subplots(1, 3, figsize=(14, 5.2), layout="constrained")
    converged = where(data["runs"], converged=True)
    gaussian = where(converged, init="gaussian")
    for search in ("dense", "tree", "lazy"):
        method = METHODS[search]
        look = {"color": method.colour, "marker": method.marker}
        samples = [{**run, "milliseconds": 1e3 * run["seconds"]} for run in where(gaussian, search=search)]
        line_with_range(axes[0], samples, "shift", "milliseconds", 0, method.label, **look)
    for place, init in enumerate(distinct(converged, "init")):
        look = {"markersize": 11 - 5 * place, "linewidth": 5 - 3 * place}  # the second is drawn over the first
        line_with_range(
            axes[1], where(converged, init=init, search="lazy"), "shift", "steps", place, f"{init} start", **look
        )
    line_with_range(axes[2], where(gaussian, search="lazy"), "shift", "active", 0, "measured")
    last = max(distinct(converged, "shift"))
    failed = [shift for shift in distinct(data["runs"], "shift") if shift > last]
    shifts = np.linspace(0, max([last, *failed]), 50)
    axes[2].plot(shifts, [normal_tail(shift) for shift in shifts], color=OKABE_ITO[2], label="exact, P(Z ≥ b)")
    axes[0].set_ylabel("milliseconds to 1e-6, initialisation included")
    axes[1].set_ylabel("Gauss-Newton steps to 1e-6")
    axes[2].set_ylabel("share of pairs that are active")
    for axis, title in zip(axes, ("Time", "Steps", "Activity"), strict=True):
        axis.axvline(data["default"], color="#777777", linestyle=":", label="default b")
        if failed:
            axis.axvspan((last + min(failed)) / 2, max(failed), color="#dddddd", label="no run converges")
        axis.set_xlabel("threshold b")
        axis.set_title(title)
        below(axis)
    axes[0].set_yscale("log")
    axes[0].yaxis.set_major_formatter("{x:g}")
    axes[0].yaxis.set_major_locator(LogLocator(subs=(1, 2, 3, 5)))
    axes[0].yaxis.set_minor_formatter(NullFormatter())
    axes[1].yaxis.set_major_locator(MaxNLocator(integer=True))
    axes[2].set_yscale("log")
    figure.suptitle(f"n = {data['n']}, d = {data['d']}, width {power_label(data['width'])}", fontsize=12)
    save(figure, path)


def times_as_long(ratio):
    return f"{ratio:.0f}" if ratio >= 10 else f"{ratio:.2f}"


def draw_winners(axis, cells, key):
    """A map of the fastest method, and how many times as long the next one and dense take."""
    counts, widths = sorted(distinct(cells, "n")), sorted(distinct(cells, "width"))
    colours = {"lazy": "#999999", **{name: METHODS[name].colour for name in ("tree", "scan", "dense")}}
    for cell in cells:
        column, row = widths.index(cell["width"]), counts.index(cell["n"])
        label = "does not\nconverge"
        if cell["converged"]:
            name, times = fastest(cell, key)
            ratios = sorted(seconds / times[name] for seconds in times.values())
            label = f"{METHODS[name].label}\nnext ×{times_as_long(ratios[1])}"
            label += f"\ndense ×{times_as_long(times['dense'] / times[name])}" if name != "dense" else ""
            axis.add_patch(plt.Rectangle((column - 0.48, row - 0.46), 0.96, 0.92, color=colours[name], alpha=0.45))
        axis.text(column, row, label, ha="center", va="center", fontsize=9)
    map_axes(axis, counts, widths)
    axis.set_xlim(-0.5, len(widths) - 0.5)
    axis.set_ylim(-0.5, len(counts) - 0.5)


def draw_crossover(data, path):
    """The fastest method over n and m, with and without initialisation."""
    figure, axes = plt.subplots(1, 2, figsize=(14, 5.4), layout="constrained")
    for axis, key, title in zip(axes, ("seconds", "training"), ("Initialisation and steps", "Steps alone"), strict=True):
        draw_winners(axis, data["cells"], key)
        axis.set_title(title)
    text = f"Fastest to a residual of {data['tolerance']:g}, float32, random unit data, d = {data['d']}"
    figure.suptitle(f"{text}; ×: times as long. Blank: not measured", fontsize=12)
    save(figure, path)


FIGURES = {
    "sparsity": draw_sparsity,
    "contraction": draw_contraction,
    "ntk": draw_ntk,
    "sketches": draw_sketches,
    "shift": draw_shift,
    "crossover": draw_crossover,
}


def draw_claims(suffix):
    """Draws every figure of the claims, and prints their table."""
    style()
    for name, draw in FIGURES.items():
        draw(read(name + suffix), PLOTS / f"{name}{suffix}.png")
    found = read("claims" + suffix)
    print_claims(found["claims"])
    print(f"measured in {sum(found['seconds'].values()):.0f} s: {json.dumps(found['seconds'])}")


# ----------------------------------------------------------------------------------------------------------------------
# Command line
# ----------------------------------------------------------------------------------------------------------------------

WHAT = {
    "scaling": (measure_all, draw_all),
    "peers": (write_peers, report_peers),
    "claims": (measure_claims, draw_claims),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=WHAT, default="scaling", help="what to measure")
    parser.add_argument("--quick", action="store_true", help="a small version, to see that all works")
    parser.add_argument("--plot-only", action="store_true", help="draw the figures again from the JSON files")
    arguments = parser.parse_args()
    measure, draw = WHAT[arguments.what]
    suffix = "-quick" if arguments.quick else ""  # never overwrites the real figures
    if not arguments.plot_only:
        measure(suffix)
    draw(suffix)


if __name__ == "__main__":
    main()
