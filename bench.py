"""Measures sublin and draws the figures in plots/.

    python bench.py               everything, at most 6 minutes on two cores
    python bench.py --quick       a small version of it, under a minute
    python bench.py --plot-only   draws the figures again from the JSON files
    python bench.py peers         other ways to train the network, at most 12 minutes; takes both options too

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
from pathlib import Path
from typing import NamedTuple

import matplotlib
import numba
import numpy as np
import scipy.linalg

import sublin

matplotlib.use("Agg")
import matplotlib.pyplot as plt

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
    options = {"dtype": "float32", "normalize": None, "random_state": 0, **stop, **options}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
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


class NumpySteps:
    """Times the plain NumPy step, and its first matrix product alone, from the starting weights."""

    def __init__(self, X, y, width):
        start = train("dense", X, y, width, max_iter=0)
        self.W, self.signs = start.weights().astype(np.float32), start.signs_.astype(np.float32)
        self.X, self.y, self.shift = X.astype(np.float32), y.astype(np.float32), start.shift_
        self.products = np.empty((len(X), width), np.float32)

    def time(self):
        begin = time.perf_counter()
        outputs, hidden = plain_numpy_outputs(self.X, self.W, self.signs, self.shift)
        plain_numpy_step(self.X, self.y, self.W, self.signs, outputs, hidden)
        middle = time.perf_counter()
        np.matmul(self.X, self.W.T, out=self.products)
        return {"numpy": middle - begin, "matrix product": time.perf_counter() - middle}


def measure_steps(n, d, width, methods, repeats, progress, with_numpy=False):
    """`repeats` runs of each method, taking turns: seconds of initialisation, and the records of all steps."""
    X, y = random_unit_data(n, d)
    plain = NumpySteps(X, y, width) if with_numpy else None
    runs = {name: [] for name in methods}
    for turn in range(repeats + 1):
        for name in methods:
            trainer = train(name, X, y, width)
            if turn > 0:  # the first turn is a warm-up
                runs[name].append({"init_seconds": trainer.init_seconds_, "steps": trainer.history_[1:]})
            residual = trainer.residual_
            if name == "lazy" and not residual <= 1e-9:
                raise SystemExit(f"lazy stopped at a residual of {residual} at n = {n}, width {width}")
            del trainer
            progress.add(n * d * width, f"n = {n}, width = {width}: {name}")
        if plain:
            for name, seconds in plain.time().items():
                if turn > 0:
                    runs.setdefault(name, []).append({"steps": [{"seconds": seconds}]})
            progress.add(2 * n * d * width, f"n = {n}, width = {width}: plain NumPy")
    return {"n": n, "d": d, "width": width, "methods": runs}


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
    sweep = [measure_steps(n, d, width, methods_at(width), repeats, progress) for width in widths]
    compared = [measure_steps(*case, ("lazy", "dense"), repeats, progress, with_numpy=True) for case in cases]
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
# Damping of the trainer on digits, searches "lazy" and "dense" alike; plain NumPy has its own, tuned.
DIGITS_DAMPING = 1e-4


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
        scales = self.trainer._scales
        return np.asarray(outputs, float) * scales.y_scale + scales.y_mean


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
    size = {"n": n, "d": d, "width": len(problem.W), "shift": problem.trainer.shift_, "damping": problem.options["damping"]}
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
    limits = {"cap": 0.3, "tune_cap": 0.1} if quick else {"cap": 30.0, "tune_cap": 5.0}
    progress = Progress(len([name for name in PEERS if has_torch() or not name.startswith("torch")]) * (len(widths) + 1))
    random, digits = random_unit_data(n, d), digits_split(300 if quick else None)
    rates, cases = {}, {}
    for width in widths:
        problem = Problem.of(*random, width=width, normalize=None, damping=0.0)
        cases[f"random, m = 2^{int(np.log2(width))}"] = measure_case(problem, rates, **limits, progress=progress)
    problem = Problem.of(*digits, width=digits_width, shift=1.0, normalize="lift", damping=DIGITS_DAMPING)
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
                axis.text(place, 101, f"{1e3 * total:#.2g}".rstrip("."), ha="center", fontsize=10)
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
        text = f"{record['looked_at']:,}" if share < 0.1 else f"{share:.3g} % of live neurons"
        axis.annotate(text, (record["iteration"], place), textcoords="offset points", xytext=(8, 6), fontsize=10)
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
    axes[0].set_title("The same steps ...")
    axes[1].set_xlabel("seconds, initialisation included (median)")
    axes[1].set_title("... in less time")
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


def report_peers(suffix):
    """Draws the figure of the peers, and prints the table that the README quotes."""
    style()
    found = read("peers" + suffix)
    draw_peers(found, PLOTS / f"peers{suffix}.png")
    print(peers_table(found))
    if found["environment"]["torch"] is None:
        print("PyTorch is not installed, and its rows are left out")
    print(f"measured in {found['seconds']:.0f} s")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=("scaling", "peers"), default="scaling", help="what to measure")
    parser.add_argument("--quick", action="store_true", help="a small version, to see that all works")
    parser.add_argument("--plot-only", action="store_true", help="draw the figures again from the JSON files")
    arguments = parser.parse_args()
    suffix = "-quick" if arguments.quick else ""  # never overwrites the real figures
    if arguments.what == "peers":
        if not arguments.plot_only:
            peers = measure_peers(arguments.quick)
            write("peers" + suffix, {**peers, "summary": peers_summary(peers)})
        report_peers(suffix)
        return
    if not arguments.plot_only:
        scaling = measure_scaling(arguments.quick)
        write("scaling" + suffix, scaling)
        write("phases" + suffix, phases_of(scaling))
        work = measure_work(arguments.quick)
        write("work" + suffix, {**work, "summary": work_summary(work)})
        digits = measure_digits(arguments.quick)
        write("digits" + suffix, {**digits, "summary": digits_summary(digits)})
    draw_all(suffix)


if __name__ == "__main__":
    main()
