"""Tests of sublin, section by section in the order of the module, then of bench.py.

What a network computes is compared with `sublin.reference`, one dense Gauss-Newton step, and that,
in the first section, with the definition. Tests marked `core` are small enough to run interpreted,
and are the ones to repeat with bounds checks:

    NUMBA_DISABLE_JIT=1 python -m pytest -m core
    NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=.boundscheck python -m pytest -m core
"""

import copy
import json
import math
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import time
import tracemalloc
import types
import warnings
import zipfile
from contextlib import suppress
from itertools import count, pairwise, product
from pathlib import Path
from typing import NamedTuple

import joblib
import numba
import numpy as np
import pandas
import polars
import pytest
import scipy.sparse
import scipy.special
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import chi2, kstest, multivariate_normal, norm
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.ensemble import StackingRegressor, VotingRegressor
from sklearn.exceptions import (
    ConvergenceWarning,
    DataConversionWarning,
    NotFittedError,
    UndefinedMetricWarning,
)
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import SplineTransformer, StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks

import bench
import sublin
from sublin import (
    MaxTrees,
    SparseJacobian,
    SublinearTrainer,
    default_shift,
    gaussian_sketch,
    ntk_eigenvalue_bounds,
    reference,
    separability,
    shifted_ntk,
    smallest_ntk_eigenvalue,
    sparse_sign_sketch,
    srht_sketch,
)

HERE = Path(__file__).parent

BLAS = None
with suppress(ImportError):
    from threadpoolctl import ThreadpoolController

    BLAS = ThreadpoolController().select(user_api="blas")

# Many fits stop early, or cannot fit what they are given, on purpose.
pytestmark = pytest.mark.filterwarnings(
    "ignore:relative residual", "ignore:.* rows of X coincide with rows"
)
core = pytest.mark.core

# search="lazy" keeps rows or words, as it pays. Here it keeps rows, and "words" is the other way.
SEARCHES = ("dense", "scan", "tree", "lazy", "words")
SOLVERS = ("cholesky", "sketch", "richardson", "cg", "gradient")
searches = pytest.mark.parametrize("search", SEARCHES)
solvers = pytest.mark.parametrize("solver", SOLVERS)
inits = pytest.mark.parametrize("init", ["antisymmetric", "gaussian"])
thorough = settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])


@pytest.fixture(autouse=True)
def lazy_searches_keep_rows(request, monkeypatch):
    if request.node.get_closest_marker("as_it_pays") is None:
        monkeypatch.setattr(sublin, "_words_are_faster", lambda *_: False)
        monkeypatch.setitem(sublin.SEARCHES, "words", sublin._InWords)


# ==================================================================================================
# Problems, and what is known of them
# ==================================================================================================


def unit_rows(X):
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def problem(n, d, seed=0):
    """Unit rows X (n, d) and targets y (n,)."""
    rng = np.random.default_rng(seed)
    return unit_rows(rng.standard_normal((n, d))), rng.standard_normal(n)


class Net(NamedTuple):
    """A network, and the points that it is looked at."""

    X: np.ndarray
    W: np.ndarray
    signs: np.ndarray
    shift: float

    @classmethod
    def drawn(cls, n, d, m, shift, seed=0):
        rng = np.random.default_rng(seed + 1000)
        W, signs = rng.standard_normal((m, d)), rng.choice([-1.0, 1.0], m)
        return cls(problem(n, d, seed)[0], W, signs, shift)

    @classmethod
    def of(cls, trainer, X):
        """As a trainer has left it."""
        return cls(X, trainer.weights(), trainer.signs_.astype(float), trainer.shift_)

    @property
    def active(self):
        """Which neurons are active on which points (n, m)."""
        return self.X @ self.W.T >= self.shift

    @property
    def outputs(self):
        # With damping, since the Gram matrix of some is singular; outputs do not depend on it.
        return reference(self.X, np.zeros(len(self.X)), *self[1:], damping=1.0)[0]

    def residual(self, y):
        return np.linalg.norm(self.outputs - y) / np.linalg.norm(y)

    @property
    def jacobian(self):
        return SparseJacobian(self.X, self.signs, *csr_of(self.active))

    @property
    def dense_jacobian(self):
        """J (n, m d)."""
        scaled = self.signs / np.sqrt(self.signs.size)
        return np.einsum("ir,r,ik->irk", self.active, scaled, self.X).reshape(len(self.X), -1)

    def steps(self, y, count, damping=0.0, gradient=False):
        """This network and those after each of `count` steps of the reference, or of gradient
        descent at the rate 1 / ||G||."""
        rate = gradient and 1.0 / np.linalg.norm(self.dense_jacobian, 2) ** 2
        networks = [self]
        for _ in range(count):
            net = networks[-1]
            if gradient:
                W = net.W - rate * (net.dense_jacobian.T @ (net.outputs - y)).reshape(net.W.shape)
            else:
                *_, W = reference(net.X, y, *net[1:], damping)
            networks.append(net._replace(W=W))
        return networks


# ---- Invariants of a search, against its weights and all products


def against_all_products(search, active):
    """Asserts that these pairs are active. Weights, products beyond the threshold, and what
    rounding may change in them."""
    weights = search._weights(np.arange(search.live.size))
    excess = weights @ search.X.T - search.shift
    lengths = np.linalg.norm(weights, axis=1, keepdims=True)
    tolerance = np.broadcast_to(1e-9 * (1.0 + lengths), excess.shape)
    right = (active == (excess >= 0)) | (np.abs(excess) <= tolerance)
    assert np.all(right), "an active pair is missed or made up"
    return weights, excess, tolerance


def check_maxima(search):
    sublin._check_maxima(search._rows, search._levels)


def check_rows(search):
    """Asserts every invariant of the rows against the weights and all products."""
    rows, certificates, all_points, all_products = search._live_rows
    n, geometry, k = len(search.X), search._geometry, rows["active"]
    neuron = np.repeat(np.arange(search.live.size), rows["count"])
    offset = np.arange(neuron.size) - np.repeat(np.cumsum(rows["count"]), rows["count"])
    offset += rows["count"][neuron]
    place = offset + rows["start"][neuron]
    points = all_points[place]
    in_row, active = np.zeros((2, search.live.size, n), bool)
    in_row[neuron, points], active[neuron, points] = True, offset < k[neuron]
    assert in_row.sum() == neuron.size, "a point is in a row twice"

    _, excess, tolerance = against_all_products(search, active)
    looked = np.where(k > 0, rows["looked"], 0)
    moved = search._sums - search._moments.sums[looked]
    factors = -geometry.unit * rows["sign"][:, None] * moved * active
    stored = all_products[place] + (factors @ search.XXt)[neuron, points]
    error = np.abs(stored - search.shift - excess[neuron, points])
    assert np.all(error <= tolerance[neuron, points]), "a product of a row is wrong"
    travel, along = np.abs(factors).sum(axis=1), factors.sum(axis=1)
    margin = rows["margin"] - geometry.cross * travel
    outside = np.where(in_row, -np.inf, excess + margin[:, None])
    assert np.all(outside <= tolerance), "a product within the margin is not in the row"

    alone = search.start.ranks.size == 1
    assert not alone or search.n_live == search.live.size + search._left_out, "neurons are lost"
    counts = active.T.astype(int) @ active + search._clear_counts
    assert np.array_equal(search._own_counts, counts), "counts are wrong"
    moving = k > 0
    right = search.changing == moving.sum() + search._left_out
    assert right or not alone, "the number of neurons that move is wrong"
    # How much further a neuron can travel before it is looked at.
    left = k * (np.where(moving, certificates, 0.0) - search._moments.distance)
    ahead = np.maximum(rows["slack"] - np.where(k == 1, along, travel), left)
    back = np.maximum(rows["slack_against"] + along, left)
    ahead, back = (np.clip(way, 0.0, 1e30)[:, None] for way in (ahead, back))
    rate = active.astype(float) @ search.XXt  # <x_i, x_j> if i is the only active point
    towards = np.where(excess >= 0, -rate, rate)
    of_single = np.maximum(ahead * towards, -back * towards)
    of_travel = ahead * np.where(active, 1.0, geometry.cross)
    change = np.where((k == 1)[:, None], of_single, of_travel)
    safe = (change <= np.abs(excess) + tolerance) | ~moving[:, None]
    assert np.all(safe), "a pair can flip before its certificate ends"


def check_words(search):
    """Asserts every invariant of the words against the weights and all products."""
    packed, sets = search._packed, search.active_sets_of(np.arange(search.live.size))
    active = np.zeros((search.live.size, len(search.X)), bool)
    active[np.repeat(sets.neurons, np.diff(sets.offsets)), sets.points] = True
    weights, excess, tolerance = against_all_products(search, active)
    k = active.sum(axis=1)
    assert np.array_equal(packed.active, k), "the number of active points is wrong"
    assert np.array_equal(search._own_counts, active.T.astype(int) @ active), "counts are wrong"
    right = search.changing == np.count_nonzero(k)
    assert right or search.start.ranks.size > 1, "the number of neurons that move is wrong"
    moved = np.linalg.norm(weights - packed.weights, axis=1)
    left = np.maximum(packed.slack - moved, k * (packed.certificates - search._moments.distance))
    safe = left[:, None] <= np.abs(excess) + tolerance
    assert np.all(safe | (k == 0)[:, None]), "a pair can flip before its certificate ends"


INVARIANTS = {
    sublin._Dense: lambda search: None,  # the weights are all there is
    sublin._Scan: check_maxima,
    sublin._Tree: check_maxima,
    sublin._Lazy: check_rows,
    sublin._InWords: check_words,
}


def check(fitted):
    """Asserts that the network is that of its weights, and that its search can go on."""
    fitted.check()
    if fitted._search is not None:
        with np.errstate(invalid="ignore"):  # no pair times an infinite certificate
            INVARIANTS[type(fitted._search)](fitted._search)


def csr_of(active):
    """(indptr, indices) of a mask (n, m)."""
    return np.append(0, active.sum(axis=1).cumsum()), np.nonzero(active)[1]


def assert_same_pairs(found, active):
    """CSR by point equals a mask (n, m), types and order included."""
    for array, expected in zip(found, csr_of(active), strict=True):
        assert array.dtype == np.int64
        np.testing.assert_array_equal(array, expected)


def assert_all_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_array_equal(one, other)


def trainer(width=512, **options):
    """A trainer on data as they are, from seed 0, that takes pure steps at the paper's b."""
    pure = {"normalize": None, "tol": 1e-9, "damping": 0.0, "shift": "paper"}
    return SublinearTrainer(width, **{"random_state": 0, **pure, **options})


def start(X, y, width, **options):
    """The network before training."""
    return Net.of(trainer(width, **{**options, "max_iter": 0}).fit(X, y), X)


def values_of(fitted, key="residual"):
    """Of a key of history_, by step."""
    return np.array([record[key] for record in fitted.history_])


def with_threads(make):
    """What `make` returns with one thread, and with all there are."""
    most, found = numba.get_num_threads(), []
    for threads in (1, most):
        numba.set_num_threads(threads)
        try:
            found.append(make())
        finally:
            numba.set_num_threads(most)
    return found


def command(code, *arguments, ranks=None, warn="ignore"):
    """What runs some code in a new process, or on so many ranks."""
    python = [sys.executable, "-W", warn, "-c", code, *arguments]
    mpiexec = Path(sys.executable).with_name("mpiexec")
    return [mpiexec, "-n", str(ranks), *python] if ranks else python


def finished(run, folder=HERE, **environment):
    """The process of a command when it has ended."""
    options = {"cwd": folder, "capture_output": True, "text": True, "timeout": 240}
    return subprocess.run(run, env=os.environ | environment, **options)


def printed_by(code, *arguments, ranks=None, warn="ignore", **environment):
    """What new processes print, which must not fail."""
    done = finished(command(code, *arguments, ranks=ranks, warn=warn), **environment)
    assert done.returncode == 0, done.stderr[-5000:]
    return done.stdout


REGIMES = {
    "few active": Net.drawn(5, 4, 40, 1.5),
    "more points than neurons": Net.drawn(20, 3, 6, 0.5),
    "coinciding points": Net.drawn(6, 4, 30, 1.0)._replace(X=problem(3, 4)[0][[0, 1, 2, 0, 1, 2]]),
    "all active": Net.drawn(5, 3, 12, -20.0),
    "none active": Net.drawn(5, 3, 12, 20.0),
    "neurons on more than d points and on fewer": Net.drawn(12, 2, 20, 0.8),
    "one of everything": Net.drawn(1, 1, 1, -9.0),
}
regimes = pytest.mark.parametrize("net", REGIMES.values(), ids=REGIMES)


@core
def test_regimes_are_what_they_say():
    active_on = REGIMES["neurons on more than d points and on fewer"].active.sum(axis=0)
    assert (active_on > 2).any() and ((active_on > 0) & (active_on <= 2)).any()
    assert REGIMES["all active"].active.all() and not REGIMES["none active"].active.any()
    assert 0 < REGIMES["few active"].active.mean() < 0.2


# ==================================================================================================
# Reference: the definition
# ==================================================================================================


@core
@regimes
@pytest.mark.parametrize("damping", [0.0, 0.3])
def test_reference_is_the_definition_with_an_explicit_jacobian(net, damping):
    X, W, signs, shift = net
    y, (m, d) = np.arange(1.0, len(X) + 1), W.shape
    outputs, J = np.zeros(len(X)), np.zeros((len(X), m * d))
    for i, r in np.ndindex(len(X), m):
        z = sum(X[i, k] * W[r, k] for k in range(d))
        if z >= shift:
            outputs[i] += signs[r] * (z - shift) / np.sqrt(m)
            J[i, r * d : (r + 1) * d] = signs[r] * X[i] / np.sqrt(m)
    system = J @ J.T + damping * np.eye(len(X))
    if np.linalg.matrix_rank(system) < len(X):
        return  # what the reference returns then is no step
    f, G, g, W_next = reference(X, y, W, signs, shift, damping)
    np.testing.assert_allclose(f, outputs, atol=1e-13)
    np.testing.assert_allclose(G, J @ J.T, atol=1e-13)
    np.testing.assert_allclose(system @ g, outputs - y, atol=1e-9)
    np.testing.assert_allclose(W_next.ravel(), W.ravel() - J.T @ g, atol=1e-12 * np.abs(g).max())
    np.testing.assert_allclose(net.dense_jacobian, J, rtol=1e-15)


@core
@regimes
def test_the_jacobian_is_the_derivative_of_the_references_outputs(net):
    h = 0.5 * np.abs(net.X @ net.W.T - net.shift).min()  # up to there f is linear in the weights
    assert h > 1e-5
    for k in range(net.W.size):
        step = h * np.eye(1, net.W.size, k).reshape(net.W.shape)
        up, down = (net._replace(W=net.W + sign * step).outputs for sign in (1, -1))
        np.testing.assert_allclose((up - down) / (2 * h), net.dense_jacobian[:, k], atol=1e-8)


@core
def test_reference_keeps_float32_and_leaves_its_inputs_alone():
    X, W, signs, shift = Net.drawn(6, 5, 300, 0.5)
    y = np.arange(6.0)
    expected = reference(X, y, W, signs, shift, 0.1)
    single = [np.float32(array) for array in (X, y, W, signs)]
    copies = [array.copy() for array in single]
    found = reference(*single, shift, 0.1)
    assert_all_equal(single, copies)
    assert [array.dtype for array in found] == ["float32", "float32", "float64", "float32"]
    for one, other in zip(found, expected, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-3, atol=1e-4)


# ==================================================================================================
# Problem: the threshold, the data, and the kernel of infinite width
# ==================================================================================================


@core
def test_default_shift_is_that_of_theorem_g2():
    assert default_shift(65536) == pytest.approx(np.sqrt(0.48 * np.log(65536)))
    assert default_shift(65536) == pytest.approx(2.307243, abs=1e-6)
    assert default_shift(100, alpha=0.0) == pytest.approx(np.sqrt(0.5 * np.log(100)))
    assert default_shift(1) == 0.0
    for width, alpha in product((2, 100, 10**6), (0.0, 0.04, 0.9)):
        assert norm.sf(default_shift(width, alpha)) <= width ** (-(1 - alpha) / 4)
    net = start(*problem(3, 3), 300, shift="paper", alpha=0.3)
    assert net.shift == default_shift(300, 0.3)


def second_over_first(X, y, shift, width, regularisation):
    """sublin._second_over_first with the exact kernel, and the trace instead of random signs."""
    H, XXt, fires = shifted_ntk(X, shift), X @ X.T, norm.sf(shift)
    inverse = np.linalg.inv(H + regularisation * fires * np.eye(len(X)))
    deviations = np.sqrt((H * XXt) @ (inverse @ y) ** 2 / (width * fires))
    variances = norm.pdf(shift) * deviations**3 * (2 * np.sqrt(2 / np.pi)) / 3
    return np.sqrt(variances @ np.diag(inverse) / (y @ inverse @ y))


@core
@pytest.mark.parametrize("n, d, shift", [(5, 3, 0.0), (40, 6, 1.3), (30, 3, 2.2), (1, 4, 1.0)])
def test_the_predicted_second_step_is_that_of_the_formula(n, d, shift):
    X, y = problem(n, d)
    for width, regularisation in ((1000, 1e-3), (1 << 16, 0.1)):
        found = sublin._second_over_first(X, y, shift, width, regularisation)
        assert found == pytest.approx(
            second_over_first(X, y, shift, width, regularisation), rel=0.2
        )


def test_the_predicted_second_step_tells_which_fits_converge():
    """The flips of a first step, and the length of the second, of networks that are predicted to
    converge and of others."""
    ratios = []
    for X, y in (problem(30, 20), problem(60, 3)):
        fitted, seen = trainer(1 << 14, shift=1.5, damping="auto", tol=0, max_iter=2), []
        look = lambda record: seen.append(fitted.weights())  # noqa: B023, E731
        fitted.set_params(callback=look).fit(X, y)
        first, second = (np.linalg.norm(after - before) for before, after in pairwise(seen))
        ratios.append((sublin._second_over_first(X, y, 1.5, 1 << 14, 1e-3), second / first))
    (low, true_low), (high, true_high) = ratios
    assert low < sublin.RATIO < high and true_low < true_high


@core
def test_kernels_from_a_table_are_kernels():
    X, _ = problem(30, 3)
    X = np.concatenate([X, X[:2], -X[:1]])
    for shift in (-0.5, 0.0, 1.0, 2.5):
        u = np.linspace(0.0, np.sqrt(2.0), 2049)
        slope = np.sqrt(u**2 / np.maximum(2.0 - u**2, 1e-300))
        both = norm.sf(shift) - 2.0 * scipy.special.owens_t(shift, slope)
        H = sublin._kernel_from_table(X @ X.T, both)
        np.testing.assert_allclose(H, shifted_ntk(X, shift), atol=1e-3 if shift <= 0 else 1e-5)


def clustered(n, d, spread, seed=0):
    """Points in five clusters, and targets that vary within them."""
    rng = np.random.default_rng(seed)
    X = np.repeat(rng.standard_normal((5, d)), n // 5, axis=0)
    return X + spread * rng.standard_normal(X.shape), rng.standard_normal(n // 5 * 5)


@pytest.mark.parametrize("width", [1 << 14, 1 << 16])
@pytest.mark.parametrize("n, d", [(16, 16), (64, 32), (256, 64)])
def test_random_data_get_the_papers_threshold_to_the_bit(n, d, width):
    for seed in range(3):
        X, y = problem(n, d, seed)
        for targets in (y, np.sign(y)):
            options = {"shift": "auto", "max_iter": 0, "random_state": seed}
            fitted = trainer(width, damping="auto", **options).fit(X, targets)
            assert fitted.shift_ == default_shift(width)


@pytest.mark.parametrize("kind", ["clusters", "parallel", "noise"])
def test_points_that_lie_close_together_get_a_lower_threshold_and_converge(kind):
    rng = np.random.default_rng(0)
    if kind == "clusters":
        X, y = clustered(60, 8, 0.3)
    elif kind == "parallel":
        X = np.outer(rng.uniform(1.0, 2.0, 50), rng.standard_normal(6))
        X, y = X + 0.5 * rng.standard_normal(X.shape), rng.standard_normal(50)
    else:
        X = rng.standard_normal((80, 5))
        y = X[:, 0] + rng.standard_normal(80)
    common = {"normalize": "lift", "damping": "auto", "tol": 1e-3, "max_iter": 40}
    lower = trainer(1 << 14, shift="auto", **common).fit(X, y)
    paper = trainer(1 << 14, shift="paper", **common).fit(X, y)
    assert sublin.LOWEST <= lower.shift_ < paper.shift_ == default_shift(1 << 14)
    assert lower.n_iter_ < paper.n_iter_ or lower.residual_ < 0.5 * paper.residual_


def test_the_threshold_falls_with_the_noise_and_rises_with_the_width_and_the_ridge():
    X, y = clustered(60, 4, 0.2)
    options = {"normalize": "lift", "damping": "auto", "max_iter": 0, "shift": "auto"}

    def taken(width=1 << 16, **more):
        return trainer(width, **{**options, **more}).fit(X, y).shift_

    assert taken(1 << 12) <= taken(1 << 16) <= taken(1 << 22) < taken(1 << 30)
    assert taken() < taken(ridge=1.0)
    assert taken(shift="paper") == default_shift(1 << 16) and taken(shift=0.3) == 0.3
    assert taken(4) == default_shift(4) < sublin.LOWEST  # is left as it is


def test_the_threshold_of_many_points_is_estimated_from_fewer(monkeypatch):
    X, y = clustered(700, 12, 1.0)
    rows = sublin._Scales.of(X, y, "lift")
    X, y = rows.unit_rows(X), rows.targets(y)
    expected = sublin._shift_for(X, y, 1 << 20, 2.5, 1e-3)
    monkeypatch.setattr(sublin, "SAMPLED", 350)
    found = sublin._shift_for(X, y, 1 << 20, 2.5, 1e-3)
    np.testing.assert_allclose(found, expected, rtol=0.25)


def test_fits_say_why_they_take_a_threshold_and_which_width_would_do(capsys):
    X, y = clustered(60, 4, 0.1)
    hopeless = SublinearTrainer(4096, random_state=0, verbose=1, max_iter=5)
    with pytest.warns(ConvergenceWarning, match=r"raise width from 4096 to 2\^\d+,.*ridge"):
        hopeless.fit(X, y)
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("shift 1: the second step") and "; at the paper's 2 it would" in said
    exponent = hopeless._log2_enough
    wide = trainer(1 << exponent, shift=1.0, damping="auto", normalize="lift", max_iter=0)
    rows = wide.fit(X, y)._X
    ratio = sublin._second_over_first(rows, wide._y, 1.0, 1 << exponent, sublin.DAMPING)
    assert 0.2 * sublin.RATIO < ratio < 3 * sublin.RATIO
    options = {"shift": "auto", "damping": "auto", "verbose": 1, "max_iter": 0}
    trainer(1 << 14, **options).fit(*problem(16, 16))
    said = capsys.readouterr().out.splitlines()[0]
    assert said.startswith("shift 2.16: the second step") and "paper" not in said


def test_a_warm_start_keeps_the_threshold_that_was_chosen():
    X, y = clustered(60, 4, 0.2)
    fitted = SublinearTrainer(4096, random_state=0, max_iter=1, warm_start=True).fit(X, y)
    shift = fitted.shift_
    fitted.fit(X[:30], -y[:30])
    assert fitted.shift_ == shift < default_shift(4096)
    with pytest.raises(ValueError, match="shift must stay"):
        fitted.set_params(shift="paper").fit(X, y)


@core
def test_separability_equals_brute_force():
    X, _ = problem(9, 3)
    pairs = [(i, j) for i in range(9) for j in range(i)]
    expected = min(np.linalg.norm(X[i] + sign * X[j]) for i, j in pairs for sign in (-1, 1))
    assert separability(X) == pytest.approx(expected, rel=1e-14)


@core
def test_separability_of_close_coinciding_opposite_and_single_points():
    x = np.array([0.6, 0.8])
    nearby = unit_rows([[0.6 + 1e-11, 0.8]])[0]
    assert separability([x, nearby]) == pytest.approx(np.linalg.norm(x - nearby), rel=1e-12)
    assert 0 < separability([x, nearby]) < 1e-11
    assert separability([x, [1.0, 0.0], x]) == separability([x, [1.0, 0.0], -x]) == 0.0
    assert separability([x]) == np.inf


@core
@pytest.mark.parametrize("shift", [-1.3, 0.0, 0.7, 2.0])
def test_shifted_ntk_equals_the_normal_probabilities_of_scipy(shift):
    X, _ = problem(5, 3)
    H = shifted_ntk(X, shift)
    for i in range(5):
        for j in range(i):
            rho = X[i] @ X[j]
            both = multivariate_normal.cdf([-shift, -shift], cov=[[1, rho], [rho, 1]])
            assert H[i, j] == pytest.approx(rho * both, abs=1e-7)
    np.testing.assert_allclose(np.diag(H), norm.sf(shift), rtol=1e-13)
    np.testing.assert_allclose(H, H.T, rtol=0, atol=1e-15)


@core
@pytest.mark.parametrize("shift", [-0.8, 0.0, 0.8])
def test_shifted_ntk_of_coinciding_opposite_and_orthogonal_points(shift):
    H = shifted_ntk(np.array([[1.0, 0.0], [1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]]), shift)
    alone = norm.sf(shift)
    opposite = max(0.0, norm.cdf(-shift) - norm.cdf(shift))  # P(shift <= Z <= -shift)
    np.testing.assert_allclose(H[0], [alone, alone, -opposite, 0.0], atol=1e-14)


def test_shifted_ntk_is_the_mean_gram_matrix_of_wide_networks():
    width = 200_000
    net = start(*problem(5, 4), width, init="gaussian", shift=0.9)
    G = reference(net.X, np.ones(5), *net[1:])[1]
    # A mean of indicators has a deviation of at most 1/2.
    assert np.abs(G - shifted_ntk(net.X, 0.9)).max() < 5 * 0.5 / np.sqrt(width)
    np.testing.assert_allclose(net.jacobian.gram(), G, atol=1e-13)


@core
@pytest.mark.parametrize("shift", [-0.8, 0.0, 1.5])
def test_smallest_ntk_eigenvalue_of_orthogonal_coinciding_and_close_points(shift):
    assert smallest_ntk_eigenvalue(np.eye(4), shift) == pytest.approx(norm.sf(shift), rel=1e-13)
    assert abs(smallest_ntk_eigenvalue(np.ones((3, 1)), shift)) < 1e-14
    rho = np.cos(0.1)
    both = multivariate_normal.cdf([-shift, -shift], cov=[[1, rho], [rho, 1]])
    found = smallest_ntk_eigenvalue(np.array([[1.0, 0.0], [rho, np.sin(0.1)]]), shift)
    assert found == pytest.approx(norm.sf(shift) - rho * both, abs=1e-6)


@core
@pytest.mark.parametrize("length", [1.0, 1.0 - 5e-7])
def test_smallest_ntk_eigenvalue_of_equal_rows_is_a_rounding_error_in_any_dimension(length):
    rng = np.random.default_rng(0)
    for d in (2, 3, 32, 1000):
        X = length * unit_rows(rng.standard_normal((6, d)))
        for twin in (X[:1], X[:1] * (1 + 1e-16 * rng.standard_normal(d))):
            assert abs(smallest_ntk_eigenvalue(np.vstack([X, twin]), 0.5)) < 1e-14


@core
def test_ntk_eigenvalue_bounds_are_those_of_theorem_2_13():
    low, high = ntk_eigenvalue_bounds(np.eye(5), 1.2)
    assert high == pytest.approx(np.exp(-0.72))
    assert low == pytest.approx(np.exp(-0.72) * np.sqrt(2) / 2500)
    assert ntk_eigenvalue_bounds([[1.0, 0.0], [-1.0, 0.0]], 0.0) == (0.0, 1.0)
    assert ntk_eigenvalue_bounds(np.eye(5), 1e200) == (0.0, 0.0)


# ==================================================================================================
# Random numbers
# ==================================================================================================


def philox(counter, key):
    """Philox4x32-10 in Python: four words, of counter (4,) and key (2,)."""
    counter, key, mask = list(counter), list(key), 0xFFFFFFFF
    for _ in range(10):
        one, other = counter[0] * 0xD2511F53, counter[2] * 0xCD9E8D57
        counter = [
            *((other >> 32) ^ counter[1] ^ key[0], other & mask),
            *((one >> 32) ^ counter[3] ^ key[1], one & mask),
        ]
        key = [(key[0] + 0x9E3779B9) & mask, (key[1] + 0xBB67AE85) & mask]
    return counter


def words_of(seed, block, stream, counts):
    """Words (4, counts) of a stream, from its beginning."""
    key, high = (seed & 0xFFFFFFFF, seed >> 32), (block & 0xFFFFFFFF, block >> 32)
    return np.array([philox((count, stream, *high), key) for count in range(counts)], np.uint32).T


def normals_of(seed, block, stream, size):
    """The first normals of a stream in float64, from the same words."""
    lanes, found = sublin.LANES, []
    groups = -(-size // (4 * lanes))
    words = words_of(seed, block, stream, lanes * groups).astype(float)
    more = words_of(seed, block, stream + sublin.TAILS, lanes * groups).astype(float)
    for group in range(groups):
        these = slice(group * lanes, (group + 1) * lanes)
        for half in (0, 2):
            radii, turns = words[half, these], words[half + 1, these].astype(int)
            u = (radii + ((turns & 255) + 0.5) / 256) / 2**32
            u = np.where(radii == 0, (more[half, these] + 0.5) / 2.0**64, u)
            quadrant, place = turns >> 30, ((turns >> 8) & 0x3FFFFF) + 0.5
            angle = np.pi / 2 * (quadrant + place / 2**22 - 0.5)
            found += [np.sqrt(-2 * np.log(u)) * f(angle) for f in (np.cos, np.sin)]
    return np.concatenate(found)[:size]


def uniforms_of(seed, block, stream, size):
    lanes, found = sublin.LANES, []
    groups = -(-size // (2 * lanes))
    words = words_of(seed, block, stream, lanes * groups).astype(np.uint64)
    for group in range(groups):
        for half in (0, 2):
            high, low = words[half : half + 2, group * lanes : (group + 1) * lanes]
            found.append(((high << np.uint64(20) | low >> np.uint64(12)) + 0.5) / 2.0**52)
    return np.concatenate(found)[:size]


@core
def test_words_are_the_published_ones_of_philox():
    """From the known-answer tests of Random123; counters wrap around into what names the stream."""
    known = {
        ((0, 0, 0, 0), (0, 0)): "6627e8d5 e169c58d bc57ac4c 9b00dbd8",
        ((0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344), (0xA4093822, 0x299F31D0)): (
            "d16cfe09 94fdcceb 5001e420 24126ea1"
        ),
        ((0xFFFFFFFF,) * 4, (0xFFFFFFFF,) * 2): "408f276d 41c83b0e a20bc7c6 6d5451fd",
    }
    words = np.empty((4, sublin.LANES), np.uint32)
    for (counter, key), expected in known.items():
        assert [f"{word:08x}" for word in philox(counter, key)] == expected.split()
        seed, block = (np.uint64(high << 32 | low) for low, high in (key, counter[2:]))
        stream, first = counter[1] & 0xFF, (counter[1] >> 8) << 32 | counter[0]
        sublin._words(seed, block, stream, first, words)
        assert [f"{word:08x}" for word in words[:, 0]] == expected.split()


@core
def test_numbers_of_a_stream_are_those_of_its_words_and_begin_alike():
    for seed, block in ((0, 0), (5, 3), (2**63 + 11, 2**40 + 1)):
        name = np.uint64(seed), np.uint64(block)
        expected = normals_of(seed, block, 2, 700), uniforms_of(seed, block, 2, 700)
        for size in (1, 255, 256, 257, 700):
            normals, uniforms = np.empty(size, np.float32), np.empty(size)
            sublin._normals(*name, 2, 0, normals)
            sublin._uniforms(*name, 2, uniforms)
            np.testing.assert_allclose(normals, expected[0][:size], rtol=2e-6, atol=2e-6)
            np.testing.assert_array_equal(uniforms, expected[1][:size])
    assert (
        len({normals_of(*name, 1)[0] for name in ((0, 0, 0), (1, 0, 0), (0, 1, 0), (0, 0, 1))}) == 4
    )


def test_normals_are_normal():
    """Moments, tails, lags and a fine chi-square over 2^25 of them."""
    size, blocks = 1 << 20, 32
    edges = norm.ppf(np.linspace(0, 1, 4097))
    cells, sums, lags, tails = np.zeros(4096), np.zeros(6), np.zeros(4), np.zeros(3)
    numbers = np.empty(size, np.float32)
    for block in range(blocks):
        sublin._normals(np.uint64(1), np.uint64(block), 0, 0, numbers)
        x = numbers.astype(float)
        cells += np.histogram(x, edges)[0]
        powers = np.cumprod(np.broadcast_to(x, (6, size)), axis=0)
        sums += powers.sum(axis=1)
        lags += [(x[:-k] * x[k:]).sum() for k in (1, 64, 128, 256)]
        tails += [(np.abs(x) > k).sum() for k in (3, 4, 5)]
    count = size * blocks
    assert chi2.sf(((cells - count / 4096) ** 2 / (count / 4096)).sum(), 4095) > 1e-4
    moments = np.array([0, 1, 0, 3, 0, 15])
    spread = np.sqrt(np.array([1, 2, 15, 96, 945, 10170]) / count)
    assert np.all(np.abs(sums / count - moments) < 4.5 * spread)
    assert np.all(np.abs(lags) < 4.5 * np.sqrt(count))
    expected = count * 2 * norm.sf([3, 4, 5])
    assert np.all(np.abs(tails - expected) < 4.5 * np.sqrt(expected) + 1)


def test_normals_go_beyond_what_their_first_words_reach():
    """Of a word of zeros the radius goes on in another stream, up to 9.5."""
    uniform, words = np.empty(sublin.LANES, np.float32), np.full((2, sublin.LANES), 0, np.uint32)
    assert sublin._uniform_radii(*words, uniform) == sublin.LANES
    assert np.all(uniform > 0)
    block, first, lane = 709798, 63 * sublin.LANES, 6  # of seed 0, stream 0: a word that is 0
    sublin._words(
        np.uint64(0), np.uint64(block), 0, first, both := np.empty((4, sublin.LANES), "u4")
    )
    assert both[0, lane] == 0
    normals = np.empty(2 * sublin.LANES, np.float32)
    sublin._normals(np.uint64(0), np.uint64(block), 0, first, normals)
    radius = np.hypot(normals[lane], normals[lane + sublin.LANES])
    sublin._words(np.uint64(0), np.uint64(block), sublin.TAILS, first, both)
    expected = np.sqrt(-2 * np.log((both[0, lane] + 0.5) / 2.0**64))
    assert radius == pytest.approx(expected, rel=1e-6) and radius > 6.66
    for u in (2.0**-65, 1e-12, 0.3, 0.7, 0.99999994):
        uniform[:] = u
        cosines, sines = np.empty((2, sublin.LANES), np.float32)
        turns = np.linspace(0, 2**32 - 1, sublin.LANES).astype(np.uint32)
        sublin._box_muller(uniform, turns, cosines, sines)
        radius = np.sqrt(-2 * np.log(np.float32(u).astype(float)))
        np.testing.assert_allclose(np.hypot(cosines, sines), radius, rtol=1e-6, atol=1e-7)
    assert np.sqrt(-2 * np.log(2.0**-65)) < sublin.LARGEST_NORMAL


# ==================================================================================================
# Starting weights
# ==================================================================================================


@core
@inits
def test_starting_weights_are_the_normals_of_seed_and_block_and_signs_a_stream_of_their_own(init):
    seed, width = 7, sublin.BLOCK + 6
    net = start(*problem(2, 3), width, init=init, random_state=seed, draw="all")
    for block, neurons in ((0, sublin.BLOCK), (1, 6)):
        rows = slice(block * sublin.BLOCK, block * sublin.BLOCK + neurons)
        draws = neurons if init == "gaussian" else neurons // 2
        normals = normals_of(seed, block, sublin.VECTORS, 3 * draws).reshape(-1, 3)
        signs = np.where(uniforms_of(seed, block, sublin.SIGNS, neurons) < 0.5, -1, 1)
        signs = [1, -1] * draws if init == "antisymmetric" else signs
        np.testing.assert_allclose(
            net.W[rows], np.repeat(normals, neurons // draws, axis=0), atol=1e-5
        )
        np.testing.assert_array_equal(net.signs[rows], signs)


@core
def test_starting_weights_depend_on_seed_and_width_alone():
    expected = start(*problem(4, 3), 100, draw="all")
    for search, solver, dtype in product(SEARCHES, SOLVERS, ("float32", "float64")):
        options = {"search": search, "solver": solver, "dtype": dtype, "shift": 0.1}
        options["draw"] = "all"
        found = start(*problem(5, 3, seed=1), 100, **options)
        assert_all_equal(found[1:3], expected[1:3])
    assert not np.array_equal(start(*problem(4, 3), 100, random_state=1).W, expected.W)


@core
@inits
def test_a_wider_network_extends_a_narrower_one(init):
    options = {"init": init, "draw": "all"}
    narrow, wide = (start(*problem(4, 3), width, **options) for width in (50, 80))
    assert_all_equal((wide.W[:50], wide.signs[:50]), narrow[1:3])


@core
def test_antisymmetric_start_is_pairs_of_opposite_sign_and_output_zero():
    X, y = problem(4, 3)
    fitted = trainer(300, max_iter=0).fit(X, y)
    net = Net.of(fitted, X)
    np.testing.assert_array_equal(net.W[::2], net.W[1::2])
    np.testing.assert_array_equal(net.signs, np.tile([1, -1], 150))
    np.testing.assert_allclose(fitted.predict(problem(9, 3, seed=4)[0]), 0.0, atol=1e-14)
    assert fitted.residual_ == 1.0


@core
@pytest.mark.parametrize(
    "state",
    [
        lambda: 3,
        lambda: np.int64(3),
        lambda: np.random.RandomState(3),
        lambda: np.random.default_rng(3),
        lambda: np.random.seed(3) or np.random,  # noqa: NPY002
    ],
)
def test_same_random_state_gives_the_same_bits(state):
    X, y = problem(4, 3)
    first, second = (trainer(200, random_state=state(), max_iter=3).fit(X, y) for _ in range(2))
    np.testing.assert_array_equal(first.weights(), second.weights())
    np.testing.assert_array_equal(values_of(first), values_of(second))


@core
def test_a_generator_moves_on_and_none_is_new_every_time():
    for state in (np.random.default_rng(3), np.random.RandomState(3), None):
        first, second = (start(*problem(4, 3), 20, random_state=state).W for _ in range(2))
        assert not np.array_equal(first, second)


# ---- Live pairs only -----------------------------------------------------------------------------


def law_of(X, shift, width, seed=0, stages=None):
    """A start whose live pairs are drawn alone."""
    law = sublin._Law(stages or (X,), shift)
    return sublin._Start(seed, width, X.shape[1], "antisymmetric", sublin._Ranks(), law)


def live_pairs(start, known=sublin.NOBODY):
    """Numbers of live pairs, their vectors and products with all points."""
    blocks = sublin._LiveBlocks(start, known)
    return tuple(map(np.concatenate, zip(*map(blocks.block, range(blocks.count)), strict=True)))


def statistics(vectors, X, shift):
    """Terms of sums over live vectors: how many, their active points, products, coordinates."""
    products = vectors @ X.T
    active = products >= shift
    count = active.sum(axis=1)
    live = count > 0
    some = [live, count, count == 1, count * count, *active.T, *(active * products).T]
    both = [active[:, i] & active[:, j] for i, j in ((0, 1 % len(X)), (0, len(X) - 1))]
    moments = [*(live[:, None] * vectors).T, *(live[:, None] * vectors**2).T]
    return np.array([np.asarray(row, float) for row in some + both + moments])


def distance_of_laws(X, shift, pairs):
    """The largest difference between sums over pairs drawn alone and over NumPy's normal vectors,
    in standard deviations."""
    vectors = live_pairs(law_of(X, shift, 2 * pairs))[1].astype(float)
    sampled = statistics(vectors, X, shift).sum(axis=1) / pairs
    rng, total, squares, draws = np.random.default_rng(1), 0.0, 0.0, 0
    for _ in range(16):
        terms = statistics(rng.standard_normal((1 << 17, X.shape[1])), X, shift)
        total, squares, draws = total + terms.sum(1), squares + (terms**2).sum(1), draws + (1 << 17)
    mean = total / draws
    variance = squares / draws - mean**2
    spread = np.sqrt(variance * (1 / pairs + 1 / draws)) + 1e-300
    return (np.abs(sampled - mean) / spread).max()


LAWS = {
    "random": (problem(8, 5)[0], 1.5, 1 << 20),
    "just below the highest rate": (problem(6, 3)[0], 1.34, 1 << 19),
    "one point": (problem(1, 4)[0], 1.0, 1 << 19),
    "more points than coordinates": (problem(30, 2)[0], 2.2, 1 << 20),
    "equal and opposite points": (np.vstack([P := problem(4, 3)[0], P[:2], -P[1:3]]), 1.7, 1 << 20),
    "near-parallel points": (unit_rows((Q := problem(7, 4)[0])[:1] + 0.1 * Q), 1.6, 1 << 20),
}


@pytest.mark.parametrize("X, shift, pairs", LAWS.values(), ids=LAWS)
def test_pairs_drawn_alone_have_the_law_of_those_among_all_that_fire(X, shift, pairs):
    assert law_of(X, shift, 2).law.rate <= sublin.HIGHEST_RATE
    assert distance_of_laws(X, shift, pairs) < 4.8


def test_wrong_laws_are_told_from_the_right_one():
    X, shift, pairs = LAWS["near-parallel points"]
    proposals = sublin._proposals

    def every(products, vectors, limits, *arguments):
        return limits - 1  # whatever fires first

    def last(products, vectors, limits, X, shift, rounding):  # count them all, take 1 in count^2
        count = (vectors @ X.T >= shift).sum(axis=1)
        taken = np.random.default_rng(0).random(len(vectors)) < 1 / np.maximum(count, 1) ** 2
        return np.where(taken, limits - 1, limits)

    def no_tail_test(seed, block, pairs, rate, tail, n, room):
        found, points, lengths = proposals(seed, block, pairs, rate, 1e-9, n, 2 * room)
        return found, points, np.sqrt(tail**2 + lengths**2)

    wrong_laws = ("_first_firing", every), ("_first_firing", last), ("_proposals", no_tail_test)
    for name, wrong in wrong_laws:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sublin, name, wrong)
            assert distance_of_laws(X, shift, pairs) > 6


@pytest.mark.parametrize("shift", [4.0, 8.0])
def test_far_thresholds_have_their_exact_tail(shift):
    """On far apart points live pairs are those of each; z beyond b has the tail's mean."""
    X, tail = np.vstack([np.eye(4), -np.eye(4)]), norm.sf(shift)
    width = 2 * int(40_000 / (8 * tail))
    pairs, vectors, products = live_pairs(law_of(X, shift, width))
    active = products >= shift
    expected = width / 2 * tail
    assert np.all(np.abs(active.sum(axis=0) - expected) < 4.5 * np.sqrt(expected))
    beyond = products[active] - shift
    mean = norm.pdf(shift) / tail - shift
    assert abs(beyond.mean() - mean) < 4.5 * mean / np.sqrt(beyond.size)
    assert kstest(norm.sf(products[active].astype(float)) / tail, "uniform").pvalue > 1e-4
    others = vectors[np.arange(len(vectors)), (products.argmax(axis=1) + 1) % 4]
    assert kstest(others, "norm").pvalue > 1e-4
    gaps = np.diff(pairs)
    assert pairs[0] >= 0 and gaps.min() > 0 and pairs[-1] < width / 2
    assert kstest(pairs / (width / 2), "uniform").pvalue > 1e-4


def test_the_number_of_live_pairs_is_binomial():
    X, shift, pairs = problem(5, 4)[0], 1.6, 2000
    counts = [live_pairs(law_of(X, shift, 2 * pairs, seed))[0].size for seed in range(1500)]
    rng = np.random.default_rng(0)
    p = np.mean(
        [(rng.standard_normal((1 << 16, 4)) @ X.T >= shift).any(1).mean() for _ in range(16)]
    )
    mean, variance = pairs * p, pairs * p * (1 - p)
    assert abs(np.mean(counts) - mean) < 4.5 * np.sqrt(variance / 1500) + 1.0
    assert abs(np.var(counts) / variance - 1) < 4.5 * np.sqrt(2 / 1500)


@core
def test_proposals_are_those_of_their_numbers():
    """Against the same in NumPy, from the same uniform numbers."""
    for rate, tail, n in ((0.3, 1.2, 5), (0.75, 0.4, 2), (0.01, 2.5, 7)):
        pairs, points, lengths = sublin._proposals(
            np.uint64(3), np.uint64(2), 500, rate, tail, n, 600
        )
        uniform = uniforms_of(3, 2, sublin.PROPOSALS, 2400).reshape(-1, 4)
        places = np.cumsum(1 + np.floor(np.log(uniform[:, 0]) / np.log1p(-rate))) - 1
        z = np.sqrt(tail**2 - 2 * np.log(uniform[:, 2]))
        kept = (places < 500) & (uniform[:, 3] * z <= tail)
        np.testing.assert_array_equal(pairs, places[kept])
        np.testing.assert_array_equal(points, (n * uniform[kept, 1]).astype(int))
        np.testing.assert_allclose(lengths, z[kept], rtol=1e-14)
        assert sublin._proposals(np.uint64(3), np.uint64(2), 500, rate, tail, n, 2) is None


@core
def test_bent_vectors_have_the_product_and_the_rest_as_it_was():
    rng = np.random.default_rng(0)
    for d in (1, 2, 7, 8, 9, 33):
        vectors = rng.standard_normal((20, d)).astype("f4")
        directions, before = unit_rows(rng.standard_normal((3, d))), vectors.astype(float)
        points, lengths = rng.integers(0, 3, 20), rng.uniform(2, 5, 20)
        sublin._bend(vectors, points, lengths, directions.astype("f4"))
        x = directions[points]
        expected = before + (lengths - (before * x).sum(1))[:, None] * x
        np.testing.assert_allclose(vectors, expected, rtol=1e-5, atol=1e-5)


@core
@pytest.mark.parametrize("shift", [0.0, 0.5, 1.3])
def test_the_first_point_that_a_vector_fires_on_is_decided_in_float64(shift):
    rng = np.random.default_rng(0)
    X, vectors = problem(9, 6)[0], rng.standard_normal((300, 6)).astype(np.float32)
    exact, limits = vectors.astype(float) @ X.T, rng.integers(0, 10, 300)
    rounding = sublin._float32_rounding(6)
    for noise in (0.0, 0.9 * rounding):
        products = (exact + noise * rng.uniform(-1, 1, exact.shape)).astype(np.float32)
        found = sublin._first_firing(products, vectors, limits, X, shift, rounding)
        fires = (exact >= shift) & (np.arange(9) < limits[:, None])
        expected = np.where(fires.any(axis=1), fires.argmax(axis=1), limits)
        np.testing.assert_array_equal(found, expected)
    least = exact[np.arange(300), 4]  # a product that equals the threshold fires
    for k in range(0, 300, 30):
        found = sublin._first_firing(
            exact[k : k + 1].astype("f4"), vectors[k : k + 1], np.array([9]), X, least[k], rounding
        )
        assert found[0] == np.argmax(exact[k] >= least[k])


def test_live_pairs_have_the_same_bits_in_any_order_and_number_of_threads():
    X, y = problem(12, 6)
    start = law_of(X, 2.0, 1 << 22)
    blocks = sublin._LiveBlocks(start, sublin.NOBODY)
    assert blocks.count > 8
    alone = [blocks.block(number) for number in reversed(range(blocks.count))][::-1]
    together = [b for _, some in blocks.groups(lambda *block: block, bool) for b in some]
    for one, other in zip(alone, together, strict=True):
        assert_all_equal(one, other)
    fits = with_threads(lambda: trainer(1 << 20, shift=2.0, tol=1e-9).fit(X, y))
    assert_all_equal(*([f.predict(X), values_of(f), f._search.live] for f in fits))
    narrow, wide = (live_pairs(law_of(X, 2.0, width)) for width in (1 << 18, 1 << 19))
    kept = wide[0] < 1 << 17
    assert_all_equal([array[kept] for array in wide[:2]], narrow[:2])


@core
@searches
def test_every_search_starts_from_the_same_weights_drawn_live(search):
    X, y = problem(6, 4)
    options = {"shift": 1.7, "draw": "live", "max_iter": 2, "damping": 1e-3}
    lazy = trainer(3000, **options).fit(X, y)
    assert lazy._search.start.law is not None and 0 < lazy.n_live_ < 1500
    other = trainer(3000, search=search, **options).fit(X, y)
    np.testing.assert_allclose(other.weights(), lazy.weights(), rtol=1e-9, atol=1e-9)
    np.testing.assert_allclose(values_of(other), values_of(lazy), rtol=1e-9)
    begun = [
        trainer(3000, **{**options, "max_iter": 0, "search": s}).fit(X, y) for s in ("lazy", search)
    ]
    np.testing.assert_array_equal(begun[0].weights(), begun[1].weights())
    np.testing.assert_array_equal(begun[1].signs_, np.tile([1, -1], 1500))
    np.testing.assert_array_equal(begun[0].weights()[::2], begun[0].weights()[1::2])
    check(other)


def test_completed_weights_are_normal_and_dead_where_they_should_be():
    X, y = problem(6, 4)
    fitted = trainer(1 << 17, shift=1.7, max_iter=0).fit(X, y)
    assert fitted._search.start.law is not None
    live = np.unique(fitted.active_sets()[1])
    W = fitted.weights()[::2]
    fires = np.flatnonzero((W @ X.T >= 1.7).any(axis=1))
    np.testing.assert_array_equal(np.sort(np.append(2 * fires, 2 * fires + 1)), live)
    for projection in (*W.T, *(W @ X.T).T):
        assert kstest(projection, "norm").pvalue > 1e-4


def test_draw_says_when_it_cannot_be_live_and_draws_all_where_that_is_faster():
    X, y = problem(6, 4)
    with pytest.raises(ValueError, match=r'draw="live" needs init="antisymmetric".*draw="all"'):
        trainer(64, init="gaussian", draw="live").fit(X, y)
    for shift in (-1e300, -1.0, 0.0, 0.3):
        expected, *found = (
            trainer(300, shift=shift, draw=draw, max_iter=0).fit(X, y).weights()
            for draw in ("all", "live", "auto")
        )
        assert_all_equal(found, [expected] * 2)


# ---- And points that come later


STAGES = {
    "new points": (lambda: (problem(4, 3)[0], problem(3, 3, seed=9)[0]), 1.6),
    "near the old ones": (lambda: (P := problem(4, 3)[0], unit_rows(P + 0.2)), 1.6),
    "so many that all are drawn again": (
        lambda: (problem(3, 3)[0], problem(25, 3, seed=9)[0]),
        1.5,
    ),
}


@pytest.mark.parametrize("points, shift", STAGES.values(), ids=STAGES)
def test_pairs_woken_by_later_points_have_their_law(points, shift):
    """Against normal vectors that are dead on the old points."""
    (old, new), pairs = points(), 1 << 18
    first = live_pairs(law_of(old, shift, 2 * pairs))[0]
    known = np.sort(np.concatenate([2 * first, 2 * first + 1]))
    start = law_of(old, shift, 2 * pairs, stages=(old, new))
    numbers, vectors, _ = live_pairs(start, known)
    assert np.intersect1d(numbers, first).size == 0
    assert not (vectors.astype(float) @ old.T >= shift).any()
    assert (vectors.astype(float) @ new.T >= shift).any(axis=1).all()
    found = statistics(vectors.astype(float), new, shift).sum(axis=1) / (pairs - first.size)
    rng = np.random.default_rng(2)
    W = rng.standard_normal((1 << 21, 3))
    dead = W[~(W @ old.T >= shift).any(axis=1)]
    terms = statistics(dead, new, shift)
    spread = terms.std(axis=1) * np.sqrt(1 / (pairs - first.size) + 1 / len(dead)) + 1e-300
    assert (np.abs(found - terms.mean(axis=1)) / spread).max() < 4.8


@core
@pytest.mark.parametrize("after", SEARCHES)
@pytest.mark.parametrize("seen", [False, True], ids=["not seen", "seen"])
def test_warm_starts_with_other_points_agree_with_weights_before_and_after(after, seen):
    (X, y), (other, targets) = problem(5, 3), problem(4, 3, seed=7)
    options = {"shift": 1.4, "damping": 1e-2, "max_iter": 3, "warm_start": True, "draw": "live"}
    fitted = trainer(2000, **options).fit(X, y)
    assert not fitted._search.start.law.seen
    before = fitted.weights() if seen else None
    assert fitted._search.start.law.seen == seen
    live = fitted._search.live.copy()
    held = fitted._search._weights(np.arange(live.size))
    check(fitted.set_params(search=after, max_iter=0).fit(other, targets))
    W = fitted.weights()
    np.testing.assert_allclose(W[live], held, rtol=1e-12)
    if seen:
        np.testing.assert_array_equal(W, before)
    new = np.setdiff1d(np.flatnonzero((W @ other.T >= 1.4).any(axis=1)), live)
    assert new.size > 0 and not (W[new] @ X.T >= 1.4).any()
    check(fitted.set_params(max_iter=4).fit(other, targets))
    np.testing.assert_array_equal(
        fitted.weights()[(W @ other.T < 1.4).all(axis=1)], W[(W @ other.T < 1.4).all(axis=1)]
    )
    check(fitted.set_params(search="lazy").fit(np.vstack([X, other]), np.append(y, targets)))


# ---- Lean: neurons that cannot flip are forgotten


def lean_and_full(X, y, width, monkeypatch, **options):
    """Two fits, without rows of clear neurons and with rows of all."""
    options = {"draw": "live", "tol": 1e-13, "max_iter": 5, **options}
    lean = trainer(width, **options).fit(X, y)
    with monkeypatch.context() as patch:
        patch.setattr(sublin._Lazy, "_lean_sieve", lambda search, *_: search._sieve)
        full = trainer(width, **options).fit(X, y)
    assert full._search.clear is None and full._search.live.size == full.n_live_
    return lean, full


def assert_same_network(lean, full, X):
    for key in ("flips", "changed", "active", "rejected"):
        np.testing.assert_array_equal(values_of(lean, key), values_of(full, key))
    np.testing.assert_allclose(values_of(lean), values_of(full), rtol=1e-6, atol=1e-13)
    assert lean.n_live_ == full.n_live_
    new = problem(40, X.shape[1], seed=77)[0]
    np.testing.assert_allclose(lean.predict(new), full.predict(new), rtol=1e-9, atol=1e-12)
    assert_all_equal(lean.active_sets(), full.active_sets())
    np.testing.assert_allclose(lean.weights(), full.weights(), rtol=1e-9, atol=1e-12)
    check(lean)


def test_what_would_take_too_much_memory_is_refused_before_it_is_drawn(monkeypatch):
    X, y = problem(3, 4)
    fitted = trainer(1 << 38, shift=6.0, max_iter=1).fit(X, 1e-7 * y)
    monkeypatch.setattr(sublin._Clear, "each", lambda *_: pytest.fail("drawn"))
    weights = r"weights\(\) of 274877906944 neurons in 4 dimensions "
    calls = (fitted.weights, weights), (fitted.check, ""), (lambda: fitted.signs_, "")
    for call, what in calls:
        with pytest.raises(MemoryError, match=what + "would need"):
            call()


@core
@pytest.mark.parametrize("kind", [np.uint32, np.int32, np.int64])
def test_widths_of_any_integer_type_count_alike(kind):
    X, y = problem(4, 3)
    options = {"shift": 1.3, "max_iter": 1, "damping": 1e-2}
    found, expected = (trainer(m, **options).fit(X, y) for m in (kind(1 << 12), 1 << 12))
    np.testing.assert_array_equal(found.predict(X), expected.predict(X))


def test_hundreds_of_later_fits_on_other_points_have_streams_of_their_own():
    options = {"shift": 1.6, "max_iter": 0, "warm_start": True, "draw": "live"}
    fitted = trainer(4000, **options).fit(*problem(2, 3))
    for seed in range(270):
        fitted.fit(*problem(1, 3, seed + 1))
    assert len(fitted._search.start.law.stages) > 260
    check(fitted)


def test_active_sets_of_networks_wider_than_an_integer_of_32_bits():
    X, y = problem(3, 4)
    fitted = trainer(1 << 38, shift=6.0, max_iter=2).fit(X, 1e-7 * y)
    assert fitted._search.clear is not None and fitted.n_live_ > 300
    indptr, indices = fitted.active_sets()
    assert indices.max() > 1 << 36 and indices.min() >= 0
    for i in range(3):
        own = indices[indptr[i] : indptr[i + 1]]
        assert np.all(np.diff(own) > 0)
    assert np.unique(indices).size == fitted._search.changing > 0.99 * fitted.n_live_
    counts = np.diff(indptr)
    np.testing.assert_array_equal(counts, np.diag(fitted._search.counts))


LEAN = {
    "small targets": (problem(6, 4), 0.02, 1.7, 4000),
    "more points than coordinates": (problem(9, 2), 0.003, 2.3, 30000),
    "opposite and equal points": (
        (np.vstack([P := problem(4, 3)[0], P[:1], -P[1:2]]), np.arange(6.0) % 3),
        0.01,
        1.8,
        9000,
    ),
    "one point": (problem(1, 3), 0.5, 1.0, 4000),
    "wide": (problem(8, 6), 0.2, 2.6, 1 << 22),
}


@pytest.mark.parametrize("data, scale, shift, width", LEAN.values(), ids=LEAN)
@pytest.mark.parametrize("damping", ["auto", 1e-2])
def test_networks_without_rows_of_clear_neurons_are_the_same(
    data, scale, shift, width, damping, monkeypatch
):
    X, y = data
    for solver in ("cholesky", "cg", "gradient"):
        options = {"shift": shift, "damping": damping, "solver": solver}
        lean, full = lean_and_full(X, scale * y, width, monkeypatch, **options)
        assert 0 < lean._search.live.size < lean.n_live_ / 2
        if solver != "cg":  # whose tolerance leaves steps open
            assert_same_network(lean, full, X)


@pytest.mark.parametrize("reach", [1e-3, 0.2, 0.7])
@pytest.mark.parametrize("damping", ["auto", 0.0, 1e-2])
def test_a_reach_that_is_exceeded_changes_nothing(reach, damping, monkeypatch):
    """The search begins again, with rows for more neurons, before it looks for flips."""
    begun = Broken(sublin._Lazy._begin_again, 0, None)
    monkeypatch.setattr(sublin._Lazy, "_begin_again", begun)
    monkeypatch.setattr(sublin, "REACH", reach)
    monkeypatch.setattr(sublin, "LEAST_REACH", 0.0)
    for seed in range(3):
        X, y = problem(6, 4, seed)
        options = {"shift": 1.5, "damping": damping, "random_state": seed}
        lean, full = lean_and_full(X, 0.1 * y, 20000, monkeypatch, **options)
        assert_same_network(lean, full, X)
    assert next(begun.calls) > 2


def test_without_that_check_flips_would_be_missed(monkeypatch):
    monkeypatch.setattr(sublin, "REACH", 0.01)
    monkeypatch.setattr(sublin, "LEAST_REACH", 0.0)
    monkeypatch.setattr(sublin._Lazy, "_begin_again", lambda search, pulled: None)
    X, y = problem(6, 4)
    lean, full = lean_and_full(X, y, 20000, monkeypatch, shift=1.5, damping=1e-2)
    assert lean._search.clear is not None
    assert values_of(lean, "flips").sum() < values_of(full, "flips").sum()
    with pytest.raises(AssertionError):
        check(lean)


@pytest.mark.parametrize("name", ["_begin", "_go_to", "_find_flips", "_lay_out", "_travel_to"])
@pytest.mark.parametrize("after", [False, True], ids=["before its work", "after it"])
def test_a_beginning_again_that_is_broken_off_changes_nothing(name, after, monkeypatch):
    monkeypatch.setattr(sublin, "REACH", 0.3)
    monkeypatch.setattr(sublin, "LEAST_REACH", 0.0)
    X, y = problem(6, 4)
    original = sublin._Lazy._begin_again
    for at in (1, 2, 3):
        fitted = trainer(20000, shift=1.5, damping=1e-2, draw="live", tol=1e-13, max_iter=6)
        broken = []

        def begin_again(search, pulled, at=at, broken=broken):
            broken.append(Broken(getattr(sublin._Lazy, name), at, TimeoutError(name), after))
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(sublin._Lazy, name, broken[0])
                original(search, pulled)

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sublin._Lazy, "_begin_again", begin_again)
            with suppress(TimeoutError):
                fitted.fit(X, 0.1 * y)
        assert broken
        assert_whole(fitted, X, 0.1 * y)


def test_lean_networks_are_saved_pickled_and_go_on_with_other_points(tmp_path):
    (X, y), (other, targets) = problem(6, 4), problem(5, 4, seed=9)
    options = {"shift": 1.7, "damping": 1e-2, "max_iter": 2, "draw": "live", "warm_start": True}
    fitted = trainer(4000, **options).fit(X, 0.02 * y)
    assert fitted._search.clear is not None
    fitted.save(tmp_path / "net")
    assert (tmp_path / "net").stat().st_size < 8 * 4 * fitted.n_live_ / 2 + 20_000
    twins = SublinearTrainer.load(tmp_path / "net"), pickle.loads(pickle.dumps(fitted))
    new = problem(7, 4, seed=5)[0]
    for twin in twins:
        np.testing.assert_array_equal(twin.predict(new), fitted.predict(new))
        assert_all_equal(twin.active_sets(), fitted.active_sets())
        check(twin)
        check(twin.fit(X, 0.02 * y))
    check(fitted.fit(X, 0.02 * y))
    np.testing.assert_allclose(twins[0].predict(new), fitted.predict(new), rtol=1e-6, atol=1e-9)
    for search in (*SEARCHES, "lazy"):
        check(fitted.set_params(search=search).fit(other, 0.02 * targets))
        check(fitted.fit(np.vstack([X, other]), 0.02 * np.append(y, targets)))


def test_solvers_that_ask_for_active_sets_get_rows_of_all_neurons():
    X, y = problem(6, 4)
    options = {"shift": 1.7, "damping": 1e-2, "max_iter": 3, "draw": "live"}
    fitted = trainer(4000, solver="sketch", **options).fit(X, 0.02 * y)
    assert fitted._search.clear is None
    fitted = trainer(4000, **options).fit(X, 0.02 * y)
    assert fitted._search.clear is not None
    check(fitted.set_params(warm_start=True, solver="sketch", tol=1e-12).fit(X, 0.02 * y))
    assert fitted._search.clear is None


def test_lean_networks_have_the_same_bits_for_any_number_of_threads():
    X, y = problem(8, 6)
    fits = with_threads(lambda: trainer(1 << 22, shift=2.6, max_iter=3).fit(X, 0.2 * y))
    assert fits[0]._search.clear is not None
    new = problem(7, 6, seed=5)[0]
    assert_all_equal(*([f.predict(new), values_of(f), f._search.live] for f in fits))


@core
@pytest.mark.parametrize("seen", [False, True], ids=["not seen", "seen"])
def test_networks_drawn_live_are_saved_and_go_on_alike(seen, tmp_path):
    (X, y), (other, targets) = problem(5, 3), problem(4, 3, seed=7)
    options = {"shift": 1.4, "damping": 1e-2, "max_iter": 2, "warm_start": True, "draw": "live"}
    fitted = trainer(2000, **options).fit(X, y).fit(other, targets)
    if seen:
        fitted.weights()
    fitted.save(tmp_path / "net")
    loaded = SublinearTrainer.load(tmp_path / "net")
    copied = pickle.loads(pickle.dumps(fitted))
    third = problem(6, 3, seed=11)
    for twin in (loaded, copied):
        check(twin.fit(*third))
    fitted.fit(*third)
    for twin in (loaded, copied):
        np.testing.assert_array_equal(twin.n_live_, fitted.n_live_)
        np.testing.assert_allclose(twin.predict(X), fitted.predict(X), rtol=1e-9)
        np.testing.assert_allclose(twin.weights(), fitted.weights(), rtol=1e-9, atol=1e-12)


@inits
def test_nothing_of_the_size_of_the_weights_is_held(init):
    X, y = problem(4, 32)
    trainer(1 << 12, init=init).fit(X, y).predict(X)  # compiles
    tracemalloc.start()
    try:
        trainer(1 << 19, init=init).fit(X, y).predict(X)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.6 * (1 << 19) * 32 * 4


def test_predictions_after_a_dense_fit_take_no_room_of_the_size_of_products():
    X, y = problem(4, 4)
    fitted = trainer(1 << 18, search="dense", draw="live", shift=3.0, max_iter=1).fit(X, y)
    points = problem(256, 4, seed=1)[0]
    tracemalloc.start()
    try:
        fitted.predict(points)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 0.4 * 256 * (1 << 18) * 8


# ==================================================================================================
# Trees
# ==================================================================================================

SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 255, 256, 257, 1023, 1024, 1025)
sizes = pytest.mark.parametrize("m", SIZES)


def integers(rng, *shape, dtype=float):
    """Small integers: many ties, and products without rounding."""
    return rng.integers(-2, 3, shape).astype(dtype)


def threshold(rng):
    whole = rng.integers(-12, 13)
    return rng.choice([-np.inf, np.inf, whole, whole + 0.5, rng.normal(0, 4)])


class Touched:
    """Nodes touched since the last call, and bounds on them."""

    def __init__(self, trees):
        self.trees, self.before = trees, trees.touched
        self.height = len(trees._levels) - 1
        self.of_query = sublin.FAN_OUT * self.height  # for each reported leaf, or for none at all
        self.of_update = len(trees.X) * (1 + (sublin.FAN_OUT + 1) * (self.height - 1))

    def __call__(self):
        found, self.before = self.trees.touched - self.before, self.trees.touched
        return found


def apply(operation, trees, W, rng):
    """One operation on the trees and on W; checks the answer and the number of nodes touched."""
    n, m, touched = len(trees.X), len(W), Touched(trees)
    if operation == "query":
        i, tau = int(rng.integers(n)), threshold(rng)
        found = trees.query(i, tau)
        assert found.dtype == np.int64
        expected = np.flatnonzero((W @ trees.X[i] >= tau) & (tau < np.inf))
        np.testing.assert_array_equal(found, expected)
        assert touched() <= touched.of_query * max(1, found.size)
    elif operation == "query_all":
        tau = threshold(rng)
        active = (trees.X @ W.T >= tau) & (tau < np.inf)
        assert_same_pairs(trees.query_all(tau), active)
        assert touched() <= n * touched.of_query * max(1, active.any(axis=0).sum())
    elif operation == "update":
        j, w = int(rng.integers(m)), integers(rng, W.shape[1])
        trees.update(j, w)
        W[j] = w
        assert touched() <= touched.of_update
    else:
        js = rng.permutation(m)[: rng.integers(1, m + 1)]
        trees.update_many(js, W_new := integers(rng, js.size, W.shape[1]))
        W[js] = W_new
        assert touched() <= js.size * touched.of_update


@core
@settings(thorough, max_examples=150)
@given(
    m=st.sampled_from(SIZES),
    n=st.integers(1, 6),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 2**32),
    operations=st.lists(
        st.sampled_from(["query", "query_all", "update", "update_many"]), max_size=12
    ),
)
def test_trees_answer_as_brute_force_after_random_operations(m, n, dtype, seed, operations):
    rng = np.random.default_rng(seed)
    X, W = integers(rng, n, 3, dtype=dtype), integers(rng, m, 3, dtype=dtype)
    trees = MaxTrees(X, W)
    assert trees._rows.dtype == dtype
    for operation in operations:
        apply(operation, trees, W, rng)
    np.testing.assert_array_equal(trees.W, W)
    trees.check()


@core
@sizes
def test_thresholds_report_all_or_nothing_and_nothing_touches_one_group_of_siblings(m):
    trees = MaxTrees(np.ones((2, 1)), -np.ones((m, 1)))
    np.testing.assert_array_equal(trees.query(1, -np.inf), np.arange(m))
    assert_same_pairs(trees.query_all(-np.inf), np.ones((2, m), bool))
    assert_same_pairs(trees.query_all(np.inf), np.zeros((2, m), bool))
    for tau in (-0.5, np.inf):
        touched = Touched(trees)
        assert trees.query(1, tau).size == 0 and touched() <= sublin.FAN_OUT


@core
def test_thresholds_beyond_float32_are_quiet_on_float32_trees():
    trees = MaxTrees(np.ones((2, 1), np.float32), np.ones((5, 1), np.float32))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert trees.query(0, 1e300).size == 0
        assert trees.query(0, -1e300).size == 5


@core
@pytest.mark.parametrize("direction", [-1, 1])
def test_threshold_between_two_float32_numbers_is_not_rounded(direction):
    w = np.float32(1.1)
    trees = MaxTrees(np.ones((1, 1), np.float32), np.full((3, 1), w, np.float32))
    tau = float(w) + direction * 1e-12
    assert trees.query(0, tau).size == (3 if direction < 0 else 0)


@core
def test_trees_hold_float32_only_if_points_and_weights_are():
    for x, w in (("float32", "float64"), ("float64", "float32"), ("int64", "float32")):
        trees = MaxTrees(np.ones((2, 3), x), np.ones((4, 3), w))
        assert trees._rows.dtype == trees.W.dtype == trees.X.dtype == np.float64


@core
def test_trees_agree_with_products_of_real_weights():
    rng = np.random.default_rng(1)
    X, W = rng.standard_normal((4, 5)), rng.standard_normal((300, 5))
    trees = MaxTrees(X, W)
    js = rng.permutation(300)[:40]
    W[js] = rng.standard_normal((40, 5))
    trees.update_many(js, W[js])
    trees.check()
    assert_same_pairs(trees.query_all(0.7), X @ W.T >= 0.7)


@core
def test_trees_keep_their_own_copy_and_take_lists_and_read_only_arrays():
    rng = np.random.default_rng(0)
    arrays = integers(rng, 3, 2), integers(rng, 9, 2), integers(rng, 3, 2), np.array([5, 0, 8])
    of_lists = MaxTrees(arrays[0].tolist(), arrays[1].tolist())
    for array in arrays:
        array.setflags(write=False)
    X, W, W_new, js = arrays
    trees = MaxTrees(X, W)
    assert_all_equal(trees.query_all(1.0), of_lists.query_all(1.0))
    trees.update_many(js, W_new)
    trees.update(1, W_new[0])
    for array in arrays:
        array.setflags(write=True)
        array[:] = 7
    trees.check()


@core
@pytest.mark.parametrize(
    "row, message",
    [
        (0, "a leaf is not the product"),
        (299, "a leaf is not the product"),
        (300, "padding is not -inf"),
        (303, "padding is not -inf"),
        (304, "an inner node is not the maximum"),
        (322, "an inner node is not the maximum"),
        (323, "padding is not -inf"),
        (335, "padding is not -inf"),
    ],
)
def test_check_of_trees_notices_a_corrupted_node(row, message):
    # Leaves are 0-299, padding goes to 303, maxima are 304-322, padding goes to 335.
    trees = MaxTrees(np.ones((2, 1)), np.ones((300, 1)))
    trees.check()
    trees._rows[row, 1] = 5.0
    with pytest.raises(AssertionError, match=message):
        trees.check()


@core
@sizes
def test_update_many_touches_no_more_than_single_updates(m):
    rng = np.random.default_rng(0)
    X, W = integers(rng, 3, 2), integers(rng, m, 2)
    for number in {1, m // 2 + 1, m}:
        js = rng.permutation(m)[:number]
        together, singly = MaxTrees(X, W), MaxTrees(X, W)
        touched_together, touched_singly = Touched(together), Touched(singly)
        together.update_many(js, W[js])
        for j in js:
            singly.update(int(j), W[j])
        assert touched_together() <= touched_singly()


@core
def test_memory_of_trees_is_within_a_fifth_of_the_products():
    for m in (1000, 1023, 1024, 1025, 4095, 4096, 4097, 10**5):
        trees = MaxTrees(np.ones((2, 1)), np.ones((m, 1)))
        assert trees._rows.size <= 1.2 * 2 * m


@core
@pytest.mark.parametrize("dtype, large", [("float64", np.nan), ("float32", 1e300)])
def test_refused_updates_leave_the_trees_as_they_were(dtype, large):
    held = MaxTrees(np.ones((2, 3), dtype), np.ones((20, 3), dtype))
    message = r"out of range|must be|W_new has entries beyond the range of float32, up to 1e\+300"
    for js, w in (([0, 20], [1.0] * 3), ([1, 1], [0.0] * 3), ([1], [large] * 3)):
        with pytest.raises((ValueError, IndexError), match=message):
            held.update_many(js, [w] * len(js))
    np.testing.assert_array_equal(held.W, np.ones((20, 3)))
    held.check()


# ==================================================================================================
# Jacobian
# ==================================================================================================


@core
@regimes
def test_products_with_the_jacobian_equal_those_of_the_dense_one(net):
    J, expected, rng = net.jacobian, net.dense_jacobian, np.random.default_rng(1)
    u, U = rng.standard_normal(net.W.size), rng.standard_normal((net.W.size, 3))
    v, V = rng.standard_normal(len(net.X)), rng.standard_normal((len(net.X), 3))
    assert J.shape == expected.shape and J.dtype == float
    for found, product_with in (
        (J.matvec(u), expected @ u),
        (J.matmat(U), expected @ U),
        (J @ U.astype(int), expected @ U.astype(int)),
        (J.rmatvec(v), expected.T @ v),
        (J.T @ V, expected.T @ V),
        (J.H @ v[:, None], expected.T @ v[:, None]),
        (J.gram_times(v), expected @ (expected.T @ v)),
        (J.gram(), expected @ expected.T),
        (J.active_counts(), net.active.sum(axis=1)),
    ):
        np.testing.assert_allclose(found, product_with, atol=1e-13)


@core
@regimes
def test_csr_of_the_jacobian_equals_the_dense_one(net):
    csr, expected = net.jacobian.tocsr(), net.dense_jacobian
    assert isinstance(csr, scipy.sparse.csr_matrix) and csr.has_sorted_indices
    assert csr.nnz == net.active.sum() * net.X.shape[1]
    np.testing.assert_array_equal(csr.toarray() != 0, expected != 0)
    np.testing.assert_allclose(csr.toarray(), expected, atol=1e-15)


@core
def test_jacobian_takes_active_neurons_in_any_order():
    net = REGIMES["few active"]
    indptr, indices = csr_of(net.active)
    backwards = np.concatenate([indices[a:b][::-1] for a, b in pairwise(indptr)])
    J = SparseJacobian(net.X, net.signs, indptr, backwards)
    np.testing.assert_array_equal(J.tocsr().toarray(), net.dense_jacobian)


@core
@pytest.mark.parametrize("net", [*REGIMES.values(), Net.drawn(90, 4, 150, -1.0)])
def test_shared_neurons_are_counted_alike_one_by_one_and_in_words(net, monkeypatch):
    sets, mask = net.jacobian.active, net.active[:, net.active.any(axis=0)].astype(int)
    for cost in (np.inf, 0.0):  # of a word
        monkeypatch.setattr(sublin, "WORD", cost)
        np.testing.assert_array_equal(sublin._coactivity(sets, len(net.X)), mask @ mask.T)


def test_gram_of_many_points_equals_the_dense_one_for_any_number_of_threads():
    for net in (Net.drawn(1100, 3, 50, 1.0), Net.drawn(300, 3, 3000, -2.0)):
        expected = reference(net.X, np.ones(len(net.X)), *net[1:], damping=1.0)[1]
        for found in with_threads(net.jacobian.gram):
            np.testing.assert_allclose(found, expected, atol=1e-12)


# ==================================================================================================
# Sketches
# ==================================================================================================

SKETCHES = (gaussian_sketch, srht_sketch, sparse_sign_sketch)
sketches = pytest.mark.parametrize("sketch", SKETCHES)


def prescribed_size(sketch, n, d, eps, delta):
    """Size for a (1 +- eps) subspace embedding with probability 1 - delta, from its docstring."""
    if sketch is gaussian_sketch:
        root = (np.sqrt(n) + np.sqrt(2 * np.log(2 / delta))) / (np.sqrt(1 + eps) - 1)
        return int(np.ceil(root**2))
    if sketch is srht_sketch:  # without a bound; four times the rows of independent signs are ample
        return int(np.ceil(4 * n * np.log(n / delta) ** 2 / eps**2))
    return 4 * int(np.ceil(max(d, 2 * n * (n + 1) / (eps**2 * delta) / 4)))


def coherent_jacobian(n, d, m):
    """Every point is active on one neuron, the same for all."""
    indices = np.full(n, m // 2)
    return SparseJacobian(problem(n, d)[0], np.ones(m), np.arange(n + 1), indices)


def spread_jacobian(n, d, m):
    return Net.drawn(n, d, m, 0.8).jacobian


def one_hot_jacobian(d, m):
    """J^T sqrt(m) is the identity of order m d: its sketch is S / sqrt(m)."""
    indices = np.repeat(np.arange(m), d)
    return SparseJacobian(np.tile(np.eye(d), (m, 1)), np.ones(m), np.arange(m * d + 1), indices)


@core
@sketches
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 13, 40])
@pytest.mark.parametrize("d, m", [(1, 5), (3, 6), (4, 1)])
def test_sketch_is_one_matrix_times_the_transposed_jacobian(sketch, size, d, m):
    net = Net.drawn(5, d, m, 0.3)
    S = sketch(one_hot_jacobian(d, m), size, 7) * np.sqrt(m)
    sketched = sketch(net.jacobian, size, 7)
    assert sketched.shape == (size, 5)
    np.testing.assert_allclose(sketched, S @ net.dense_jacobian.T, atol=1e-13)


@core
def test_entries_of_an_srht_are_signs():
    S = srht_sketch(one_hot_jacobian(3, 6), 9, 0) * np.sqrt(6 * 9)
    np.testing.assert_allclose(np.abs(S), 1.0, rtol=1e-14)


@core
def test_columns_of_a_sparse_sign_sketch_have_one_sign_in_each_quarter():
    d, m, size = 3, 6, 16
    S = sparse_sign_sketch(one_hot_jacobian(d, m), size, 0) * np.sqrt(m * 4)
    quarters = S.reshape(4, size // 4, m * d)
    np.testing.assert_allclose(np.abs(quarters).sum(axis=1), 1.0, rtol=1e-14)
    assert (np.count_nonzero(quarters, axis=1) == 1).all()
    for columns in S.T.reshape(m, d, size):
        np.testing.assert_allclose(columns @ columns.T, 4 * np.eye(d), atol=1e-13)
    for tiny in (1, 2, 3):  # fewer rows than quarters
        S = sparse_sign_sketch(one_hot_jacobian(d, m), tiny, 0) * np.sqrt(m)
        np.testing.assert_allclose((S**2).sum(axis=0), 1.0, rtol=1e-14)


def test_entries_of_a_gaussian_sketch_are_standard_normal():
    S = gaussian_sketch(one_hot_jacobian(7, 30), 200, 0) * np.sqrt(30 * 200)
    assert kstest(S.ravel(), "norm").pvalue > 1e-3
    products = (S.T @ S / 200)[np.triu_indices(S.shape[1], 1)]
    # Columns are independent: 21,945 products of deviation 1 / sqrt(200).
    assert np.abs(products).max() < 6 / np.sqrt(200)


@core
@sketches
@pytest.mark.parametrize("size", [1, 3, 12])
def test_sketch_is_unbiased(sketch, size):
    J = Net.drawn(3, 3, 8, 0.5).jacobian
    squares = np.array([S.T @ S for S in (sketch(J, size, seed) for seed in range(400))])
    standard_error = squares.std(axis=0) / np.sqrt(len(squares))
    assert (np.abs(squares.mean(axis=0) - J.gram()) <= 4.5 * standard_error + 1e-14).all()


@sketches
@pytest.mark.parametrize(
    "make, n, d, m",
    [
        (spread_jacobian, 4, 5, 300),
        (spread_jacobian, 8, 3, 900),
        (coherent_jacobian, 4, 6, 300),
        (coherent_jacobian, 4, 700, 3),
    ],
)
def test_sketch_of_the_prescribed_size_is_a_subspace_embedding(sketch, make, n, d, m):
    J, eps, delta, draws = make(n, d, m), 0.5, 0.1, 20
    size = prescribed_size(sketch, n, d, eps, delta)
    failures = sum(bench.distortion(J, sketch(J, size, seed)) > eps for seed in range(draws))
    assert failures <= delta * draws


@core
@sketches
def test_sketch_is_reproducible_and_takes_a_seed_or_a_generator(sketch):
    J = spread_jacobian(4, 3, 12)
    first = sketch(J, 20, 5)
    np.testing.assert_array_equal(sketch(J, 20, 5), first)
    rng = np.random.default_rng(5)
    np.testing.assert_array_equal(sketch(J, 20, rng), first)
    assert not np.array_equal(sketch(J, 20, rng), first)
    assert not np.array_equal(sketch(J, 20, 6), first)


@core
@sketches
def test_sketch_of_a_zero_jacobian_is_zero(sketch):
    np.testing.assert_array_equal(sketch(REGIMES["none active"].jacobian, 9, 0), np.zeros((9, 5)))


# ==================================================================================================
# Solvers
# ==================================================================================================

PROBLEMS = {  # data, then options of the trainer
    "plain": (problem(6, 5), {"width": 512}),
    "more neurons than a group of groups": (problem(4, 5), {"width": 1000, "alpha": 0.5}),
    "gaussian, odd width": (problem(6, 5), {"width": 301, "init": "gaussian"}),
    "more points than neurons": (
        problem(40, 4),
        {"width": 15, "init": "gaussian", "shift": 0.2, "damping": 0.1},
    ),
    "everything active": (problem(4, 6), {"width": 64, "shift": -5.0}),
    "coinciding points": (
        (problem(3, 4)[0][[0, 1, 2, 0, 1]], np.arange(5.0)),
        {"width": 300, "shift": 0.5, "damping": 0.01},
    ),
    "more coordinates than points": (problem(4, 40), {"width": 300}),
    "opposite points": (
        (np.array([[1.0], [-1.0]]), np.array([1.0, 3.0])),
        {"width": 40, "shift": 0.5},
    ),
    "few neurons": (problem(3, 4), {"width": 14, "shift": -1.0}),
    "two neurons": (problem(2, 3), {"width": 2, "shift": -4.0}),
    "one neuron": (problem(1, 3, seed=1), {"width": 1, "init": "gaussian", "shift": -5.0}),
    "one point": (problem(1, 3), {"width": 200}),
}
problems = pytest.mark.parametrize("name", PROBLEMS)


def assert_retraces_the_reference(X, y, fitted, rtol=1e-6, atol=1e-9):
    """Residual by residual while above atol, and the final weights."""
    net = start(X, y, fitted.width, shift=fitted.shift_, init=fitted.init)
    gradient = fitted.solver == "gradient"
    networks = net.steps(y, fitted.n_iter_, fitted.damping, gradient)
    expected = [net.residual(y) for net in networks]
    np.testing.assert_allclose(values_of(fitted), expected, rtol=rtol, atol=atol)
    np.testing.assert_allclose(fitted.weights(), networks[-1].W, rtol=rtol, atol=10 * rtol)


def assert_consistent(X, fitted):
    """Active sets and predictions, from the weights."""
    net = Net.of(fitted, X)
    assert_same_pairs(fitted.active_sets(), net.active)
    for points in (X, problem(7, X.shape[1], seed=9)[0]):
        expected = net._replace(X=points).outputs
        np.testing.assert_allclose(fitted.predict(points), expected, rtol=1e-9, atol=1e-11)


@core
@searches
@solvers
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_every_solver_retraces_the_reference_if_its_tolerance_is_tight(
    search, solver, damping, monkeypatch
):
    monkeypatch.setattr(sublin, "_regression_tolerance", lambda X, shift: 1e-12)
    (X, y), options = PROBLEMS["plain"]
    options = {"search": search, "solver": solver, "damping": damping, **options}
    fitted = trainer(max_iter=5, **options).fit(X, y)
    assert_retraces_the_reference(X, y, fitted)
    assert_consistent(X, fitted)


@problems
@solvers
def test_every_solver_handles_every_problem(name, solver, monkeypatch):
    monkeypatch.setattr(sublin, "_regression_tolerance", lambda X, shift: 1e-11)
    (X, y), options = PROBLEMS[name]
    # The Richardson iteration needs a small distortion, which 64 n rows of few points may miss.
    size = 2000 if solver == "richardson" else None
    fitted = trainer(solver=solver, sketch_size=size, max_iter=4, **options).fit(X, y)
    assert_retraces_the_reference(X, y, fitted, rtol=1e-5)
    assert_consistent(X, fitted)


@core
@pytest.mark.parametrize("sketch", sublin.SKETCHES)
@pytest.mark.parametrize("solver", ["sketch", "richardson"])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_sketched_solvers_meet_the_tolerance_of_algorithm_5_in_every_step(sketch, solver, damping):
    X, y = problem(4, 5)
    networks = []
    options = {"solver": solver, "sketch": sketch, "shift": 0.8, "damping": damping, "tol": 1e-6}
    size = 2000 if solver == "richardson" else None  # 4 points need more than n suggests
    fitted = trainer(128, max_iter=4, sketch_size=size, **options)
    fitted.set_params(callback=lambda record: networks.append(Net.of(fitted, X))).fit(X, y)
    tolerance = np.sqrt(np.linalg.eigvalsh(shifted_ntk(X, fitted.shift_))[0] / len(X)) / 6
    for before, after in pairwise(networks):
        residual, J = before.outputs - y, before.dense_jacobian
        move = (before.W - after.W).ravel()
        g, *_ = np.linalg.lstsq(J.T, move, rcond=None)
        np.testing.assert_allclose(J.T @ g, move, atol=1e-8)
        error = J @ (J.T @ g) + damping * g - residual
        assert np.linalg.norm(error) <= 1.01 * tolerance * np.linalg.norm(residual)
    assert (values_of(fitted, "inner_iterations")[1:] > 0).all()


def singular(message):
    """Expects a refusal of a singular system."""
    return pytest.raises(np.linalg.LinAlgError, match=message)


@core
@pytest.mark.parametrize("solver", ["cholesky", "sketch", "richardson", "cg"])
def test_points_without_active_neurons_are_named(solver):
    message = r"6 of 6 points have no active neuron, the first is point 0; use a larger width"
    with singular(message):
        trainer(512, solver=solver, shift=30.0).fit(*problem(6, 5))


@core
@pytest.mark.parametrize("solver", ["cholesky", "sketch", "richardson"])
def test_coinciding_points_are_named(solver):
    X, y = problem(6, 5)
    X[4] = X[1]
    message = r"singular: points 1 and 4 coincide \(1 such pairs\).*distinct points.*damping > 0"
    with singular(message):
        trainer(512, solver=solver).fit(X, y)


@core
@pytest.mark.parametrize("solver", ["cholesky", "sketch", "richardson"])
def test_too_few_active_neurons_are_counted(solver):
    message = r"6 points share 2 active neurons of 2, too few.*smaller shift, or damping > 0"
    with singular(message):
        trainer(2, solver=solver, shift=-9.0).fit(*problem(6, 2))


@core
def test_iterations_that_cannot_converge_say_so():
    X, y = problem(12, 2)
    with singular(r"conjugate gradients .*singular.*damping > 0"):
        trainer(4, shift=-9.0, init="gaussian", solver="cg").fit(X, y)
    X, y = problem(12, 8)
    with singular(r"does not converge with sketch_size=14: .*larger sketch_size"):
        trainer(1024, solver="richardson", sketch_size=14, shift=0.5).fit(X, y)


@pytest.mark.parametrize("solver", ["cg", "sketch"])
@pytest.mark.parametrize("n", [4, 20])
def test_conjugate_gradients_that_drift_away_from_the_true_residual_say_so(solver, n):
    """With points 1e-7 apart they believed in 1e-6 where 0.1 to 5 was true."""
    for seed in range(4):
        rng = np.random.default_rng(seed)
        X = rng.standard_normal((n // 2, 5))
        X = unit_rows(np.vstack([X, X + 1e-7 * rng.standard_normal(X.shape)]))
        model = trainer(4096, shift=0.5, solver=solver, max_iter=1)
        with pytest.raises(np.linalg.LinAlgError, match="did not reach a relative residual of"):
            model.fit(X, rng.standard_normal(n))


@core
def test_points_without_active_neurons_do_not_drown_the_others():
    """Their dual step grows like 1 / damping, and moves no weight; nor may it drown those of later
    steps in the sum of all, once the point has woken."""
    solve, woken = sublin._Cholesky.solve, 0

    def huge(solver, residual):
        step, inner_iterations = solve(solver, residual)
        return np.where(solver._J.active_counts() == 0, 1e200, step), inner_iterations

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sublin._Cholesky, "solve", huge)
        for seed, search in product(range(8), SEARCHES):
            X, y = problem(8, 3, seed)
            options = {"shift": 1.2, "damping": 0.02, "search": search, "random_state": seed}
            fitted = trainer(16, max_iter=0, **options).fit(X, 3 * y)
            silent = fitted._search.jacobian().active_counts() == 0
            check(fitted.set_params(warm_start=True, max_iter=6).fit(X, 3 * y))
            woken += (fitted._search.jacobian().active_counts()[silent] > 0).sum()
    assert woken > 4


@core
@solvers
def test_damping_makes_singular_systems_trainable(solver):
    X, y = problem(6, 5)
    X[4], y[4] = X[1], y[1]
    fitted = trainer(512, solver=solver, damping=1e-3, max_iter=5).fit(X, y)
    assert values_of(fitted)[-1] < 0.9


# ==================================================================================================
# Searches
# ==================================================================================================


@core
@problems
@searches
def test_every_search_retraces_the_reference(name, search):
    (X, y), options = PROBLEMS[name]
    fitted = trainer(search=search, max_iter=6, **options).fit(X, y)
    assert fitted.n_iter_ > 0
    assert_retraces_the_reference(X, y, fitted)
    assert_consistent(X, fitted)


@core
@searches
@inits
@pytest.mark.parametrize("width", [64, 70, 130])
def test_networks_of_several_blocks_retrace_the_reference(search, init, width, monkeypatch):
    monkeypatch.setattr(sublin, "BLOCK", 64)
    X, y = problem(5, 4)
    fitted = trainer(width, search=search, init=init, shift=0.1, damping=0.01, max_iter=4).fit(X, y)
    assert_retraces_the_reference(X, y, fitted)
    assert_consistent(X, fitted)
    check(fitted)


@searches
@pytest.mark.parametrize("solver", ["cholesky", "sketch", "richardson", "cg"])
@pytest.mark.parametrize("dtype, tol", [("float64", 1e-9), ("float32", 1e-5)])
def test_either_precision_reaches_its_tolerance(search, solver, dtype, tol):
    X, y = problem(16, 8)
    fitted = trainer(4096, search=search, solver=solver, dtype=dtype, tol=tol).fit(X, y)
    assert fitted.converged_ and fitted.residual_ <= tol
    np.testing.assert_allclose(fitted.predict(X), y, atol=10 * tol)
    if dtype == "float64":
        assert_consistent(X, fitted)
    elif solver == "cholesky":
        assert_retraces_the_reference(X, y, fitted, rtol=1e-4, atol=tol)


@core
@searches
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", [-1e-12, 0.0, 1e-12])
def test_active_means_at_or_above_the_shift(search, dtype, offset):
    options = {"init": "gaussian", "search": search, "dtype": dtype, "max_iter": 0}
    products = start([[1.0]], [1.0], 16, init="gaussian").W.ravel()  # a float32 number each
    shift = products[7] + offset
    fitted = trainer(16, shift=shift, **options).fit([[1.0]], [1.0])
    assert_same_pairs(fitted.active_sets(), products[None] >= shift)


@searches
@pytest.mark.parametrize("solver", ["cholesky", "sketch"])
def test_any_number_of_threads_gives_the_same_bits(search, solver, monkeypatch):
    monkeypatch.setattr(sublin, "_rows_in_cache", lambda n: 100)
    X, y = problem(60, 8)
    options = {"search": search, "solver": solver, "shift": 0.5, "max_iter": 3}
    one, all_of_them = with_threads(lambda: trainer(sublin.BLOCK + 2, **options).fit(X, y))
    for key in KEYS:
        np.testing.assert_array_equal(values_of(one, key), values_of(all_of_them, key))
    np.testing.assert_array_equal(one.weights(), all_of_them.weights())
    assert_consistent(X, one)


@core
@searches
def test_fitting_again_starts_anew(search):
    X, y = problem(5, 4)
    again = trainer(200, search=search, max_iter=3).fit(*problem(7, 3, seed=2)).fit(X, y)
    once = trainer(200, search=search, max_iter=3).fit(X, y)
    np.testing.assert_array_equal(again.weights(), once.weights())
    assert len(again.history_) == len(once.history_)


@core
@searches
def test_check_holds_for_every_search_and_notices_a_wrong_residual(search):
    fitted = trainer(400, shift=1.0, search=search, max_iter=2).fit(*problem(6, 8))
    check(fitted)
    fitted.residual_ *= 1.001
    with pytest.raises(AssertionError, match="the residual is not that of the weights"):
        check(fitted)


def test_operations_of_a_step_are_bounded_by_changed_neurons_in_trees_and_by_all_otherwise():
    X, y = problem(4, 6)
    n, d, m = 4, 6, 1 << 16
    runs = [trainer(m, search=search).fit(X, y).history_[1:] for search in SEARCHES[:3]]
    levels = int(np.ceil(np.log(m) / np.log(sublin.FAN_OUT)))
    for dense, scan, tree in zip(*runs, strict=True):
        pairs = n * tree["changed"]
        nodes = (sublin.FAN_OUT + 1) * levels * (tree["changed"] + tree["flips"])
        assert tree["operations"] <= n * pairs + 2 * n * nodes
        assert n * m <= scan["operations"] <= n * (1.01 * m + pairs)
        assert n * m * d <= dense["operations"] <= n * m * (d + 1) + pairs * d
        assert tree["operations"] < scan["operations"] < dense["operations"]


# ==================================================================================================
# A step is a transaction
# ==================================================================================================


def blas_threads():
    """How many threads each BLAS library has."""
    return BLAS and [library["num_threads"] for library in BLAS.info()]


def surroundings():
    """What training must leave alone."""
    cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    return cores, blas_threads(), signal.getsignal(signal.SIGINT)


def no_lap(phase):
    """For advance(), which books its time."""


STEPS = {  # (n, d, seed), (width, shift), scale of the step
    "long": ((12, 3, 0), (300, 1.2), 300.0),
    "everything moves": ((12, 3, 0), (64, 0.0), 1.0),
    "short": ((12, 3, 0), (400, 1.5), 0.1),
    "two points": ((2, 2, 90), (2000, 0.5), 30.0),
    "many points on few neurons": ((30, 3, 91), (400, 0.5), 30.0),
    "a million times as long": ((6, 8, 92), (400, 1.5), 1e6),
}


@core
@searches
@pytest.mark.parametrize("points, network, scale", STEPS.values(), ids=STEPS)
def test_a_step_taken_back_leaves_every_bit_as_it_was(search, points, network, scale):
    X, y = problem(*points)
    X[len(X) // 2] = X[0]  # which are taken back together
    options = {"search": search, "shift": network[1], "damping": 0.1, "max_iter": 2}
    fitted, untouched = (trainer(network[0], **options).fit(X, y) for _ in range(2))
    found, rng = fitted._search, np.random.default_rng(0)
    weights, active, outputs = fitted.weights(), fitted.active_sets(), found.outputs.copy()
    flips = 0
    for _ in range(3):
        step = scale * rng.standard_normal(len(X))
        mark = found.mark()
        flips += found.advance(step, no_lap)
        assert not np.array_equal(found.network().weights, weights[found.live])
        for _ in range(2):  # the second time changes nothing
            found.undo(mark)
            np.testing.assert_array_equal(found.network().weights, weights[found.live])
            np.testing.assert_array_equal(found.outputs, outputs)
            assert_all_equal(fitted.active_sets(), active)
            check(fitted)
    assert flips > 0
    step = rng.standard_normal(len(X))
    for trained in (fitted, untouched):
        trained._search.advance(step, no_lap)
    found, expected = (trained._search.network().weights for trained in (fitted, untouched))
    np.testing.assert_allclose(found, expected, rtol=1e-9, atol=1e-9)


class Broken:
    """A function whose call number `at` raises, before its work or after it."""

    def __init__(self, work, at, error, after=False):
        self.work, self.at, self.error, self.after = work, at, error, after
        self.calls = count(1)  # an iterator, since threads call

    def __call__(self, *arguments, **options):
        call = next(self.calls)
        if call == self.at and not self.after:
            raise self.error
        found = self.work(*arguments, **options)
        if call == self.at and self.after:
            raise self.error
        return found

    def __get__(self, instance, owner):
        return types.MethodType(self, instance)

    @property
    def broke(self):
        return next(self.calls) > self.at


def assert_whole(fitted, X, y, of_record=True):
    """The network is that of the last record, unless its targets are new, and goes on."""
    check(fitted)
    assert len(fitted.history_) == fitted.n_iter_ + 1
    assert fitted.history_[-1]["residual"] == fitted.residual_ or not of_record
    np.testing.assert_allclose(Net.of(fitted, X).residual(y), fitted.residual_, atol=1e-9)
    np.testing.assert_allclose(fitted.predict(X), Net.of(fitted, X).outputs, atol=1e-9)
    steps = fitted.n_iter_
    check(fitted.set_params(callback=None, warm_start=True, max_iter=2).fit(X, y))
    assert steps < fitted.n_iter_ == len(fitted.history_) - 1


def test_what_rounding_has_gathered_is_taken_back_with_the_step():
    X, y = problem(8, 3)
    fitted = trainer(200, shift=0.5, max_iter=1).fit(X, y)
    search = fitted._search
    before = search.rounding
    assert before > 0
    mark = search.mark()
    search.advance(0.1 * y, no_lap)
    search.settle()
    assert search.rounding == 0.0
    search.undo(mark)
    assert search.rounding == before


@searches
def test_steps_that_are_taken_back_never_run_out_of_moments(search, monkeypatch):
    monkeypatch.setattr(sublin, "MOMENTS", 1)
    X, y = problem(8, 3)
    fitted = trainer(200, search=search, shift=0.5, max_iter=1).fit(X, y)
    before = fitted._search.outputs.copy()
    for number in range(12):
        mark = fitted._search.mark()
        with pytest.MonkeyPatch.context() as patch, suppress(TimeoutError):
            if number % 2:
                kind = type(fitted._search)
                name = "_find_flips" if hasattr(kind, "_find_flips") else "find"
                patch.setattr(kind, name, Broken(getattr(kind, name), 1, TimeoutError(), True))
            fitted._search.advance(0.1 * y, no_lap)
        fitted._search.undo(mark)
        assert np.array_equal(fitted._search.outputs, before)
        check(fitted)


# Where a step is broken off, of a search and by name: `undo` while it is taken back, kernels in
# whatever thread runs them.
BREAKS = [
    *product(SEARCHES, ("mark", "advance", "settle", "undo", "jacobian", "take_tally")),
    *product(("dense", "scan", "tree"), ("find", "_add_outputs", "_flips_between")),
    *product(("scan", "tree"), ("_move_leaves", "_count_reaching", "_collect_leaves")),
    *product(["dense"], ("_find", "_move", "_grouped", "_map_in_threads")),
    *product(["tree"], ["_mend"]),
    *product(["lazy"], ("_look", "_look_once", "_go_to", "_add_active_outputs")),
    *product(["lazy"], ("_place_anew", "_unflip")),
    *product(
        ["words"],
        ("_find_flips", "_look_at", "_go_to", "_remember", "_activity_of", "_counts_after"),
    ),
    *product(["words"], ("_move_weights", "_pack", "_decide", "_flips_in_words")),
    *product(["words"], ("_count_common", "_transpose", "_add_outputs_in_words")),
]


@pytest.mark.parametrize("search, name", BREAKS)
@pytest.mark.parametrize("damping", ["auto", 0.1])
@pytest.mark.parametrize("after", [False, True], ids=["before its work", "after it"])
def test_whatever_breaks_a_step_off_leaves_the_network_at_the_last_whole_one(
    search, name, damping, after, monkeypatch
):
    """Many threads share the work here, however little, so that others are in theirs meanwhile."""
    in_threads, kind = sublin._in_threads, sublin.SEARCHES[search]
    many = lambda task, work, most=sublin.CHUNKS: in_threads(task, 1 << 26, most)  # noqa: E731
    monkeypatch.setattr(sublin, "_in_threads", many)
    monkeypatch.setattr(sublin, "MARGIN", 0.05)  # so that rows are made anew
    monkeypatch.setattr(sublin, "DOUBT", -1.0)  # so that outputs are
    monkeypatch.setattr(sublin, "_rows_in_cache", lambda n: 40)
    X, y = problem(14, 3)
    owner, caught = kind if hasattr(kind, name) else sublin, []
    for at, error in ((1, KeyboardInterrupt), (2, TimeoutError), (7, MemoryError)):
        thrown, broken = error(name), []

        def break_it(record, at=at, thrown=thrown, broken=broken):
            if record["iteration"] == 1:
                work = getattr(owner, name)
                broken.append(Broken(work, at, thrown, after))
                patch.setattr(owner, name, broken[0])

        options = {"search": search, "damping": damping, "shift": 0.5, "max_iter": 4, "tol": 1e-13}
        fitted = trainer(300, callback=break_it, **options)
        with pytest.MonkeyPatch.context() as patch:
            if name in ("undo", "_unflip"):  # a second exception, while the first is dealt with
                patch.setattr(kind, "settle", Broken(kind.settle, 1, ZeroDivisionError(), True))
            try:
                fitted.fit(X, 30 * y)
            except (error, ZeroDivisionError) as exception:
                caught.append(exception)
            assert (thrown in caught) == broken[0].broke
        assert_whole(fitted, X, 30 * y)
    assert isinstance(caught[0], KeyboardInterrupt)  # it does come to `name` at least once


class RaiseAtLine:
    """A trace function that raises at line number `left` that sublin runs; in no `with` line, whose
    end it would suppress, which no exception from outside can."""

    lines = Path(sublin.__file__).read_text().splitlines()

    def __init__(self, left):
        self.left, self.where = left, None

    def __call__(self, frame, event, argument):
        if frame.f_code.co_filename != sublin.__file__ or self.left <= 0:
            return None
        name, line = frame.f_code.co_name, frame.f_lineno
        held = name in ("_one_blas_thread", "_join") or self.lines[line - 1].split()[:1] == ["with"]
        if event == "line" and not held:
            self.left -= 1
            if self.left == 0:
                self.where = f"{name}, line {line}"
                raise TimeoutError(self.where)
        return self


def interrupted_fit(fitted, X, y, at, iteration=None, at_undo=None):
    """Fits until line number `at`, counted from the beginning or from an iteration's callback, and
    breaks off a second time, `at_undo` lines into taking the step back. Returns where it ended."""
    first, second = RaiseAtLine(at), RaiseAtLine(at_undo or 0)
    roll_back, before = SublinearTrainer._roll_back, blas_threads()

    def traced_roll_back(self):
        if first.where and second.left > 0:
            sys.settrace(second)
        roll_back(self)
        sys.settrace(None)

    begin = {iteration: lambda: sys.settrace(first)}
    fitted.callback = lambda record: begin.get(record["iteration"], bool)()
    begin.get(None, bool)()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SublinearTrainer, "_roll_back", traced_roll_back if at_undo else roll_back)
        try:
            fitted.fit(X, y)
        except TimeoutError as error:
            sys.settrace(None)
            assert str(error) == (second.where or first.where)
            assert blas_threads() == before, f"BLAS is not given back: {error}"
        finally:
            sys.settrace(None)
    fitted.callback = None
    return second.where or first.where


@searches
@pytest.mark.parametrize("damping", ["auto", 0.01])
def test_an_exception_at_any_line_of_a_step_leaves_the_network_at_the_last_whole_one(
    search, damping
):
    X, y = problem(8, 4)
    rng, at, seen = np.random.default_rng(0), 1, set()
    options = {"search": search, "damping": damping, "shift": 0.5, "max_iter": 3}
    while where := interrupted_fit(fitted := trainer(200, **options), X, y, at, iteration=1):
        assert_whole(fitted, X, y)
        at += rng.integers(1, 5)
        seen.add(where)
    assert at > 300 and len(seen) > 90
    second = set()
    for at, at_undo in zip(rng.integers(60, 400, 80), rng.integers(1, 60, 80), strict=True):
        fitted = trainer(200, **options)
        second.add(interrupted_fit(fitted, X, y, at, iteration=1, at_undo=at_undo))
        assert_whole(fitted, X, y)
    assert any("undo" in (where or "") for where in second)


@searches
def test_an_exception_at_any_line_of_a_beginning_leaves_no_network_or_a_whole_one(search):
    X, y = problem(8, 4)
    rng, at = np.random.default_rng(1), 1
    options = {"search": search, "shift": 0.5, "damping": 0.01, "max_iter": 1}
    where = True
    while where:
        new = trainer(200, **options)
        old = trainer(200, **options).fit(-X, 3 * y)
        warm = trainer(200, warm_start=True, **options).fit(X, y)
        where = interrupted_fit(new, X, y, at)
        if hasattr(new, "history_"):
            assert_whole(new, X, y)
        interrupted_fit(old, X, y, at)
        assert_whole(old, *((X, y) if np.array_equal(old._X, X) else (-X, 3 * y)))
        interrupted_fit(warm, X[::-1], -y, at)
        moved = not np.array_equal(warm._y, y)
        assert_whole(warm, *((X[::-1], -y, False) if moved else (X, y)))
        at += rng.integers(10, 30)


@core
@searches
def test_an_interrupt_takes_the_running_step_back_and_goes_on_to_the_caller(search):
    X, y = problem(8, 4)
    fitted = trainer(400, search=search)

    def interrupt(record):
        if record["iteration"] == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fitted.set_params(callback=interrupt).fit(X, y)
    assert fitted.n_iter_ == 1
    expected = trainer(400, search=search, max_iter=1).fit(X, y).weights()
    np.testing.assert_array_equal(fitted.weights(), expected)
    kind = sublin.SEARCHES[search]
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(kind, "advance", Broken(kind.advance, 1, KeyboardInterrupt(), after=True))
        fitted.set_params(callback=None, warm_start=True).fit(X, y)
    assert fitted.n_iter_ == 1
    np.testing.assert_array_equal(fitted.weights(), expected)
    assert fitted.fit(X, y).converged_


@core
def test_options_set_in_the_middle_of_a_step_stay(monkeypatch):
    fitted, advance = trainer(200, search="scan", callback=lambda _: None), sublin._Scan.advance

    def set_meanwhile(search, *arguments):
        fitted.callback = lambda record: record["iteration"] == 1
        return advance(search, *arguments)

    monkeypatch.setattr(sublin._Scan, "advance", set_meanwhile)
    assert fitted.fit(*problem(8, 4)).n_iter_ == 1


@pytest.mark.skipif(os.name == "nt", reason="no such signals")
@searches
def test_fits_broken_off_at_any_moment_leave_a_whole_network(search):
    """By alarms, by exceptions in callbacks, and by errors in threads that share the work."""
    code = """if True:
        import signal, sys, numpy as np
        import sublin
        from sublin import SublinearTrainer
        from test_sublin import Net, check, surroundings

        sublin._words_are_faster = lambda *_: False
        sublin.SEARCHES["words"] = sublin._InWords
        sublin.DOUBT = -1.0  # so that the first fit compiles all that others may need

        class Late(Exception):
            pass

        def late(number, frame):
            raise error

        def failing(task, work, most=sublin.CHUNKS):
            def share(thread, low, high):
                fails = injected and thread and injected.pop() == 0
                if fails:
                    raise error
                return task(thread, low, high)
            return in_threads(share, max(work, 1 << 24), most)

        in_threads, injected, broken = sublin._in_threads, [], dict.fromkeys(range(3), 0)
        sublin._in_threads = failing
        signal.signal(signal.SIGALRM, late)
        rng, before = np.random.default_rng(0), surroundings()
        X, y = rng.standard_normal((60, 8)), 30 * rng.standard_normal(60)
        options = {"search": sys.argv[1], "shift": 1.0, "tol": 0.0, "random_state": 0}
        SublinearTrainer(1 << 12, max_iter=3, **options).fit(X, y)  # compiles
        for run in range(60):
            damping, how = (1e-3, "auto", 0.1)[run // 3 % 3], run % 3
            error = (TimeoutError, KeyboardInterrupt, Late, MemoryError)[run // 9 % 4]("late")
            # Solved by steps along the gradient, it does not end before it is broken off.
            options["solver"] = ("gradient", "cholesky")[run // 18 % 2]
            net = SublinearTrainer(1 << 12, max_iter=10**6, damping=damping, **options)
            at = rng.integers(1, 8)

            def callback(record):
                if record["iteration"] == 0 and how == 0:
                    signal.setitimer(signal.ITIMER_REAL, rng.uniform(1e-4, 0.02))
                elif record["iteration"] == at and how == 1:
                    raise error
                elif record["iteration"] == 0 and how == 2:
                    injected.extend(range(rng.integers(1, 60)))  # so many shares are done before

            net.callback = callback
            try:
                net.fit(X, y)
            except type(error) as caught:
                assert caught is error
                broken[how] += 1
            finally:
                signal.setitimer(signal.ITIMER_REAL, 0)
                injected.clear()
            check(net)
            assert len(net.history_) == net.n_iter_ + 1
            assert net.history_[-1]["residual"] == net.residual_
            true = np.linalg.norm(net.predict(X) - y) / np.linalg.norm(y - y.mean())
            assert abs(true - net.residual_) < 1e-9, (true, net.residual_)
            assert surroundings() == before
        print(broken[0] > 8, broken[1] == 20, broken[2] > 8, broken)
    """
    assert printed_by(code, search).startswith("True True True")


@core
@searches
def test_training_has_no_side_effects_on_cores_and_threads_of_blas(search):
    pytest.importorskip("threadpoolctl")
    X, y = problem(20, 5)
    before, seen = surroundings(), []
    options = {"search": search, "init": "gaussian", "shift": 0.5, "damping": 0.01, "max_iter": 3}
    fitted = trainer(600, callback=lambda record: seen.append(surroundings()), **options).fit(X, y)
    fitted.predict(X), fitted.weights(), check(fitted)
    assert [*seen, surroundings()] == [before] * (len(seen) + 1) and len(seen) == 4
    # Also for as long as an exception lives, from whatever place it came.
    kind = sublin.SEARCHES[search]
    for owner, name, at in (
        (kind, "advance", 1),
        (sublin._Start, "block", 1),
        (sublin, "_mend_ancestors" if search in ("scan", "tree") else "_coactivity", 1),
        (np, "concatenate", 1),
        (sublin._Network, "_trained", 1),
        (np, "maximum", 3),
    ):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(owner, name, Broken(getattr(owner, name), at, MemoryError(name)))
            try:
                trainer(600, **options).fit(X, y).predict(X)
            except MemoryError as error:
                assert surroundings() == before, error
    assert surroundings() == before


# ==================================================================================================
# Lazy search
# ==================================================================================================


def count_rows_made_anew(monkeypatch):
    """A list of how many rows were made anew, to which every time adds a number."""
    counts, original = [], sublin._Lazy._place_anew

    def place_anew(search, short):
        counts.append(short.size)
        return original(search, short)

    monkeypatch.setattr(sublin._Lazy, "_place_anew", place_anew)
    return counts


def trained_and_seen(X, y, width, **options):
    """A trained network, checked after every step, and what it was at the start and after each
    step, with its active sets."""
    seen = []
    fitted = trainer(width, **options)

    def look(record):
        check(fitted)
        seen.append((Net.of(fitted, X), fitted.active_sets()))

    return fitted.set_params(callback=look).fit(X, y), seen


def assert_takes_steps_of_the_reference(y, fitted, seen):
    """Active sets are those of the weights, and each step is the reference's from where the last
    one led.

    Step by step, because rounding errors grow where training is far from converging.
    """
    for record, (net, active) in zip(fitted.history_, seen, strict=True):
        assert_same_pairs(active, net.active)
        assert record["residual"] == pytest.approx(net.residual(y), rel=1e-7, abs=1e-11)
    for (before, _), (after, _) in pairwise(seen):
        _, expected = before.steps(y, 1, fitted.damping)
        np.testing.assert_allclose(after.W, expected.W, rtol=1e-6, atol=1e-8 * np.abs(y).max())


@core
@pytest.mark.parametrize("search", ["lazy", "words"])
@settings(thorough, max_examples=60)
@given(
    n=st.integers(1, 24) | st.integers(25, 70),
    d=st.integers(1, 12),
    pairs=st.integers(1, 150),
    shift=st.floats(-1.0, 2.0),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    damping=st.sampled_from([0.01, 0.3]),
    margin=st.sampled_from([1e-3, sublin.MARGIN]),
    together=st.sampled_from([7, 4096]),
    moments=st.sampled_from([1, sublin.MOMENTS]),
    init=st.sampled_from(["antisymmetric", "gaussian"]),
    seed=st.integers(0, 99),
)
def test_steps_in_rows_and_in_words_are_those_of_the_reference_in_every_regime(
    search, n, d, pairs, shift, scale, damping, margin, together, moments, init, seed
):
    X, y = problem(n, d, seed)
    options = {"search": search, "shift": shift, "damping": damping, "init": init}
    options |= {"random_state": seed, "max_iter": 4}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sublin, "MARGIN", margin)  # of rows
        patch.setattr(sublin, "_rows_in_cache", lambda n: together)  # of words
        patch.setattr(sublin, "MOMENTS", moments)
        fitted, seen = trained_and_seen(X, scale * y, 2 * pairs, **options)
    assert_takes_steps_of_the_reference(scale * y, fitted, seen)


@pytest.mark.parametrize(
    "n, d, width, scale, shift, margin, anew",
    [
        # More points than neurons can tell apart.
        (100, 4, 256, 1.0, 0.5, sublin.MARGIN, True),
        # Beyond 362 points X X^T is out of cache, and moves are made through vectors.
        (400, 3, 512, 1.0, 1.0, sublin.MARGIN, True),
        # Targets so far away that all products of live neurons are in their rows.
        (24, 8, 1024, 300.0, 1.5, sublin.MARGIN, False),
        (6, 4, 64, 1.0, -9.0, sublin.MARGIN, False),  # everything active
        (16, 8, 4096, 1.0, 1.5, 1e-3, True),  # most rows, again and again
    ],
)
def test_rows_whose_margins_run_out_are_made_anew(
    n, d, width, scale, shift, margin, anew, monkeypatch
):
    monkeypatch.setattr(sublin, "MARGIN", margin)
    rows = count_rows_made_anew(monkeypatch)
    X, y = problem(n, d)
    options = {"shift": shift, "damping": 0.01, "max_iter": 8}
    fitted, seen = trained_and_seen(X, scale * y, width, **options)
    assert_takes_steps_of_the_reference(scale * y, fitted, seen)
    search = fitted._search
    assert (sum(rows) > 0) == anew
    if margin < 0.01:
        assert sum(rows) > search.n_live / 2
    assert search._used <= search._live_rows.points.size


def test_rows_made_anew_reach_a_pair_that_moves_down_as_a_point_comes_in(monkeypatch):
    # Three copies of each point, closer than float32 tells; a margin that ends between two of them.
    monkeypatch.setattr(sublin, "MARGIN", 0.01)
    rng = np.random.default_rng(1)
    X = np.repeat(rng.normal(size=(20, 8)), 3, axis=0)
    X = unit_rows(unit_rows(X) + 3e-8 * rng.normal(size=(60, 8)))
    X, y = X[rng.permutation(60)], rng.normal(size=60)
    options = {"shift": 0.9964949098489018, "damping": 1e-2, "random_state": 1, "max_iter": 6}
    lazy, dense = (
        trainer(2000, search=search, tol=1e-12, **options).fit(X, y) for search in ("lazy", "dense")
    )
    check(lazy)
    np.testing.assert_allclose(values_of(lazy), values_of(dense), rtol=1e-6)


@pytest.mark.parametrize("n, width", [pytest.param(6, 400, marks=core), (40, 300)])
def test_products_are_exact_after_very_long_moves_that_were_taken_back(n, width):
    """check() allows 1e-9, where moves of 1e6 that are added and taken away lose 1e-10 each."""
    X, y = problem(n, 4)
    fitted = trainer(width, shift=0.8, damping=0.05, max_iter=2).fit(X, y)
    search, rng = fitted._search, np.random.default_rng(0)
    for _ in range(60):
        mark = search.mark()
        search.advance(1e6 * rng.standard_normal(n), no_lap)
        search.undo(mark)
    check(fitted)
    check(fitted.set_params(warm_start=True, max_iter=5).fit(X, -y))


def test_targets_of_extreme_size_leave_lazy_steps_dense_steps():
    X, y = problem(12, 5)
    options = {"shift": 0.5, "damping": 0.05, "max_iter": 3}
    for scale, rtol in ((1e-9, 1e-5), (1e20, 1e-9), (1e29, 1e-9)):  # 1e-9 is lost in products
        lazy, dense = (
            trainer(600, search=search, **options).fit(X, scale * y) for search in ("lazy", "dense")
        )
        np.testing.assert_allclose(values_of(lazy), values_of(dense), rtol=rtol)


def test_later_steps_look_at_few_neurons():
    X, y = problem(16, 16)
    lazy, tree = (trainer(1 << 16, search=search).fit(X, y) for search in ("lazy", "tree"))
    first, *_, last = values_of(lazy, "looked_at")[1:]
    assert first > lazy.n_live_ / 4 and last < first / 100
    assert (values_of(tree, "looked_at") > lazy.n_live_).all()
    np.testing.assert_allclose(values_of(lazy), values_of(tree), rtol=1e-6, atol=1e-11)


@pytest.mark.parametrize("n, d, width", [(12, 16, 1 << 15), (4, 4, 1 << 14)])
def test_of_neurons_active_on_one_point_only_those_that_flip_are_looked_at(n, d, width):
    X, y = problem(n, d)
    begun, stepped = (trainer(width, shift=2.0, max_iter=steps).fit(X, y) for steps in (0, 1))
    points = np.bincount(begun.active_sets()[1], minlength=width)
    one, several = np.count_nonzero(points == 1), np.count_nonzero(points > 1)
    assert one > 4 * several
    record = stepped.history_[1]
    assert 0 < record["flips"] <= record["looked_at"] <= record["flips"] + several
    check(stepped)


@pytest.mark.parametrize("margin", [0.05, sublin.MARGIN])
def test_rows_made_anew_have_the_same_bits_for_any_number_of_threads(margin, monkeypatch):
    monkeypatch.setattr(sublin, "MARGIN", margin)
    rows = count_rows_made_anew(monkeypatch)
    X, y = problem(40, 8)
    one, many = with_threads(lambda: trainer(4 * sublin.BLOCK, shift=1.0).fit(X, y))
    half = len(rows) // 2
    assert rows[:half] == rows[half:] and sum(rows[:half]) > 1000
    np.testing.assert_array_equal(values_of(one), values_of(many))
    np.testing.assert_array_equal(one.weights(), many.weights())


@core
def test_every_pair_may_flip_in_one_step_and_again():
    X, options = [[1.0], [-1.0]], {"shift": 0.0, "damping": "auto", "warm_start": True}
    fitted = trainer(2000, max_iter=3, **options).fit(X, [1e3, -1e3])
    for sign in (-1.0, 1.0):
        fitted.set_params(max_iter=1).fit(X, [sign * 1e6, -sign * 1e6])
        assert fitted.history_[-1]["flips"] >= fitted._search.n_live
        check(fitted)


# --------------------------------------------------------------------------------------------------
# Lazy search in words
# --------------------------------------------------------------------------------------------------


def packed(active):
    """Words of a mask (k, n), by NumPy."""
    k, n = active.shape
    bits = np.zeros((k, -(-n // 64) * 64), np.uint8)
    bits[:, :n] = active
    return np.packbits(bits, axis=1, bitorder="little").view(np.uint64)


@core
@pytest.mark.parametrize("n", [1, 2, 63, 64, 65, 127, 128, 129, 200])
@pytest.mark.parametrize("m", [1, 63, 64, 65, 130])
def test_words_turned_by_point_count_what_points_share(n, m):
    rng = np.random.default_rng(n + m)
    active = rng.random((m, n)) < 0.4
    words = packed(active)
    by_point = np.zeros((n, -(-m // 64)), np.uint64)
    for group in range(by_point.shape[1]):
        sublin._transpose(words, n, by_point, group, group + 1)
    np.testing.assert_array_equal(by_point, packed(active.T))
    counts = rng.integers(0, 9, (n, n)).astype(np.int32)
    counts += counts.T
    expected = counts.copy()
    for times in (1, 2, -1):
        sublin._add_coactivity(by_point, counts, times)
        expected += times * (active.T.astype(np.int32) @ active)
    np.testing.assert_array_equal(counts, expected)


@core
@pytest.mark.parametrize("n", [1, 31, 32, 33, 64, 65, 150])
@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e6, 1e20, 1e200])
def test_pairs_within_rounding_of_the_threshold_are_decided_in_float64(n, scale):
    """Products of float32 are off by more than these are from the threshold."""
    rng = np.random.default_rng(n)
    X = unit_rows(rng.standard_normal((n, 7)))
    W = scale * rng.standard_normal((40, 7))
    shift = scale * 0.5
    for q in range(0, 40, 2):  # a product that is nearer than float32 tells, on either side
        i = q % n
        lack = shift * (1.0 + rng.choice([-1, 1]) * 1e-9) - W[q] @ X[i]
        W[q] += lack * X[i]
    geometry = sublin.Geometry.of(X, X @ X.T, shift, 40)
    with np.errstate(over="ignore", invalid="ignore"):
        products = W.astype(np.float32) @ X.astype(np.float32).T
    words, least = np.empty((40, -(-n // 64)), np.uint64), np.empty(40)
    (slack, certificates), k = np.empty((2, 40)), np.empty(40, np.int64)
    sublin._pack(products, min(shift, 3e38), words, least)
    sublin._decide(products, W, geometry, 7.0, least, words, k, slack, certificates)
    active = W @ X.T >= shift
    np.testing.assert_array_equal(words, packed(active))
    np.testing.assert_array_equal(k, active.sum(axis=1))
    expected = np.where(k > 0, 7.0 + slack / np.maximum(k, 1), np.inf)
    np.testing.assert_allclose(certificates, expected, rtol=1e-11)
    assert np.all(certificates <= expected)
    true = np.abs(W @ X.T - shift).min(axis=1)
    assert np.all(slack <= true * (1 + 1e-12) + 1e-15 * scale)
    assert np.all(slack >= 0.4 * true - 1e-4 * scale)


@pytest.mark.parametrize("shift", [-9.0, 0.0, 1.0, 2.0])
@pytest.mark.parametrize("kind", ["digits", "coinciding", "more points than neurons"])
def test_words_and_dense_flip_the_same_pairs_where_neurons_fire_on_many_points(kind, shift):
    X, y = load_digits(return_X_y=True)
    X, y, width = X[:300], y[:300].astype(float), 1024
    if kind == "coinciding":
        X, y = np.concatenate([X[:100]] * 3), np.concatenate([y[:100]] * 3)
    elif kind == "more points than neurons":
        width = 128
    common = {"normalize": "lift", "damping": "auto", "shift": shift, "tol": 1e-6}
    common["max_iter"] = 2 if shift == -9.0 else 8  # of a linear network the third step is rounding
    words, dense = (trainer(width, search=s, **common).fit(X, y) for s in ("words", "dense"))
    for key in ("flips", "active", "changed", "rejected"):
        np.testing.assert_array_equal(values_of(words, key), values_of(dense, key))
    np.testing.assert_allclose(values_of(words), values_of(dense), rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(words.weights(), dense.weights(), rtol=1e-6, atol=1e-7)
    check(words)


def test_fewer_neurons_are_looked_at_in_words_as_steps_shrink():
    X, y = load_digits(return_X_y=True)
    common = {"normalize": "lift", "damping": "auto", "shift": 1.0, "tol": 1e-9}
    fitted = trainer(4096, search="words", **common).fit(X[:400], y[:400])
    looked_at = values_of(fitted, "looked_at")[1:]
    assert looked_at[0] >= 4000 and looked_at[-1] < 0.2 * 4096
    assert np.all(np.diff(looked_at) <= 0)


def spoilt(name, value):
    """Overwrites what a row holds, or what its first pair does."""

    def spoil(search):
        rows, *others = search._live_rows
        certain = np.isfinite(search._live_rows.certificates) & (rows["active"] < rows["count"])
        q = np.flatnonzero(certain & (rows["margin"] < sublin.ENDURANCE / 2))[0]
        arrays = dict(zip(search._live_rows._fields[1:], others, strict=True))
        array = arrays.get(name, rows[name] if name in rows.dtype.names else None)
        place = q if name in (*rows.dtype.names, "certificates") else rows["start"][q]
        array[place] = value(array[place])

    return spoil


def point_twice(search):
    rows = search._live_rows.rows
    first = rows["start"][np.flatnonzero(rows["count"] > rows["active"])[0]]
    search._live_rows.points[first + 1] = search._live_rows.points[first]


LATE = "a pair can flip before its certificate ends"
MISSED = "an active pair is missed|active sets are not"
SPOILT = {  # what is done to a search, and what check() then says
    "lazy": [
        (spoilt("certificates", lambda certificate: np.inf), LATE),
        (spoilt("slack", lambda slack: 50.0), LATE),
        (point_twice, "a point is in a row twice"),
        (spoilt("margin", lambda margin: 50.0), "a product within the margin is not in the row"),
        (spoilt("products", lambda product: product + 1e-6), "a product of a row is wrong"),
        (spoilt("looked", lambda looked: looked + 1 if looked < 2 else 0), "a product of a row"),
        (spoilt("active", lambda active: active + 1), "active"),
        (spoilt("active", lambda active: active - 1), "active"),
        (lambda search: search.counts.__iadd__(1), "counts are wrong"),
        (lambda search: setattr(search, "changing", 0), "the number of neurons that move is wrong"),
        (lambda search: search._sums.__iadd__(1e-6), "a product of a row is wrong"),
        (lambda search: search._ledger.looks.clear(), "an active pair is missed or made up"),
    ],
    "words": [
        (lambda search: search._packed.certificates.fill(np.inf), LATE),
        (lambda search: search._packed.slack.fill(50.0), LATE),
        (lambda search: search._packed.active.__iadd__(1), "number of active points is wrong"),
        (lambda search: search._packed.words.fill(0), MISSED),
        (lambda search: search._packed.weights.__iadd__(0.1), MISSED),
        (lambda search: search._packed.looked.fill(0), f"{MISSED}|flip"),
    ],
    "tree": [
        (
            lambda search: search._rows.__setitem__((400, 0), 7.0),
            "an inner node is not the maximum of its children",
        ),
    ],
}


@core
@pytest.mark.parametrize(
    "search, spoil, message", [(search, *row) for search, rows in SPOILT.items() for row in rows]
)
def test_check_notices_a_spoilt_search(search, spoil, message):
    data, shift, damping = problem(6, 8), 1.5, 0.0
    if search == "words":
        data, shift, damping = problem(9, 4), 1.0, 0.01
    options = {"search": search, "shift": shift, "damping": damping, "max_iter": 2}
    fitted = trainer(400, **options).fit(*data)
    check(fitted)
    spoil(fitted._search)
    with pytest.raises(AssertionError, match=message):
        check(fitted)


@pytest.mark.as_it_pays
def test_lazy_keeps_rows_or_words_as_it_pays():
    for n, d, width, shift, kind in (
        (200, 10, 1 << 13, 1.0, sublin._InWords),  # many points for a neuron
        (6, 8, 1 << 10, "paper", sublin._InWords),  # a narrow network
        (6, 30, 1 << 16, "paper", sublin._Lazy),
        (64, 32, 1 << 16, "paper", sublin._Lazy),
    ):
        X, y = problem(n, d)
        options = {"shift": shift, "max_iter": 1, "tol": 0, "damping": "auto"}
        fitted = trainer(width, **options).fit(X, y)
        assert type(fitted._search) is kind
        assert fitted._search.start.law is None or kind is sublin._Lazy
        dense = trainer(width, search="dense", **options).fit(X, y)
        np.testing.assert_allclose(fitted.weights(), dense.weights(), rtol=1e-9, atol=1e-9)
        check(fitted)


@pytest.mark.as_it_pays
def test_live_pairs_can_be_drawn_for_words_too():
    X, y = problem(8, 10)
    options = {"draw": "live", "shift": 2.0, "damping": "auto", "max_iter": 3}
    words = trainer(4000, **options).fit(X, y)
    dense = trainer(4000, search="dense", **options).fit(X, y)
    assert type(words._search) is sublin._InWords and words._search.start.law is not None
    assert words.n_live_ < 4000
    np.testing.assert_allclose(words.weights(), dense.weights(), rtol=1e-9, atol=1e-9)
    words.set_params(warm_start=True).fit(np.concatenate([X, problem(5, 10, 1)[0]]), np.ones(13))
    check(words)


@pytest.mark.as_it_pays
def test_a_warm_start_changes_between_rows_and_words(monkeypatch):
    X, y = problem(12, 6)
    fitted = trainer(600, shift=1.0, damping="auto", warm_start=True, max_iter=2).fit(X, y)
    kinds = []
    for often in (False, True, False):
        monkeypatch.setattr(sublin, "_words_are_faster", lambda *_, often=often: often)
        before = fitted.weights()
        fitted.set_params(max_iter=0).fit(X, -y)
        np.testing.assert_allclose(fitted.weights(), before, rtol=1e-12, atol=1e-12)
        check(fitted.set_params(max_iter=2).fit(X, -y))
        kinds.append(type(fitted._search))
    assert kinds == [sublin._Lazy, sublin._InWords, sublin._Lazy]


# ==================================================================================================
# Ridge
# ==================================================================================================


def ridge_by_hand(net, y, ridge, steps, damping):
    """Networks and sums of dual steps, in plain NumPy."""
    unit = np.trace(reference(net.X, y, *net[1:], damping=1.0)[1]) / len(y)
    found, dual = [(net, np.zeros(len(y)))], np.zeros(len(y))
    for _ in range(steps):
        J = net.dense_jacobian
        system = J @ J.T + (ridge * unit + damping) * np.eye(len(y))
        g = np.linalg.solve(system, net.outputs - y - ridge * unit * dual)
        net = net._replace(W=net.W - (J.T @ g).reshape(net.W.shape))
        dual = dual + g
        found.append((net, dual))
    return found


@core
@searches
@inits
@pytest.mark.parametrize("ridge", [0.05, 1.0, 300.0])
def test_steps_with_a_ridge_are_those_of_plain_numpy(search, init, ridge):
    X, y = problem(9, 4)
    options = {"search": search, "init": init, "shift": 0.7, "damping": 0.01, "max_iter": 3}
    seen = []
    fitted = trainer(200, ridge=ridge, tol=0, **options)
    fitted.set_params(callback=lambda record: seen.append(fitted.weights())).fit(X, y)
    expected = ridge_by_hand(start(X, y, 200, **options), y, ridge, 3, 0.01)
    for W, record, (net, dual) in zip(seen, fitted.history_, expected, strict=True):
        np.testing.assert_allclose(W, net.W, rtol=1e-8, atol=1e-10)
        assert record["residual"] == pytest.approx(net.residual(y), rel=1e-9)
        error = net.outputs - y - ridge * fitted._mean_diagonal * dual
        relative = np.linalg.norm(error) / np.linalg.norm(y)
        assert record["system_residual"] == pytest.approx(relative, rel=1e-7, abs=1e-12)
    np.testing.assert_allclose(fitted._sums, expected[-1][1], rtol=1e-8, atol=1e-10)


@searches
@solvers
def test_where_nothing_flips_a_ridge_gives_kernel_ridge_regression(search, solver):
    """With the network's own kernel: for targets so small that no pair flips, f is linear."""
    X, y = problem(8, 6)
    y *= 1e-7
    options = {"search": search, "solver": solver, "shift": 0.5, "damping": "auto", "tol": 1e-9}
    max_iter = 4000 if solver == "gradient" else 60
    fitted = trainer(512, ridge=0.3, max_iter=max_iter, **options).fit(X, y)
    G = start(X, y, 512, search=search, shift=0.5).jacobian.gram()
    system = G + 0.3 * np.diag(G).mean() * np.eye(8)
    assert fitted.converged_ and fitted.history_[-1]["flips"] == 0
    expected = G @ np.linalg.solve(system, y)
    np.testing.assert_allclose(fitted.predict(X), expected, rtol=1e-6, atol=1e-7 * 1e-7)
    assert fitted.residual_ > 0.05  # which is not what is asked for


def test_a_ridge_of_nothing_changes_nothing_and_a_huge_one_leaves_the_start():
    X, y = problem(9, 4)
    plain = trainer(300, shift=0.7, damping="auto").fit(X, y)
    tiny = trainer(300, shift=0.7, damping="auto", ridge=1e-14).fit(X, y)
    np.testing.assert_allclose(tiny.predict(X), plain.predict(X), rtol=1e-8)
    for ridge in (1e6, 1e300):
        still = trainer(300, shift=0.7, damping="auto", ridge=ridge).fit(X, y)
        assert still.converged_ and np.abs(still.predict(X)).max() < 1e-5 and still.n_iter_ <= 2
        assert still.residual_ == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("name, steps", [("diabetes", 10), ("wine", 8), ("linnerud", 7)])
@pytest.mark.parametrize("damping", [0.0, "auto"])
def test_pure_steps_with_a_ridge_converge_on_noisy_tables(name, steps, damping):
    X, y = bench.table(name)
    options = {"shift": "paper", "normalize": "lift", "damping": damping, "tol": 1e-7}
    fitted = trainer(1 << 14, ridge=0.1, **options).fit(X, y)
    assert fitted.converged_ and fitted.n_iter_ <= steps + 1
    stuck = trainer(1 << 14, max_iter=steps + 1, **options).fit(X, y)
    assert stuck.residual_ > 1e-3  # without


@searches
def test_a_warm_start_goes_on_with_the_sum_of_dual_steps(search, tmp_path):
    X, y = problem(9, 4)
    options = {"search": search, "shift": 0.7, "damping": 0.01, "ridge": 0.5, "tol": 0}
    whole = trainer(300, max_iter=5, **options).fit(X, y)
    parts = trainer(300, max_iter=2, warm_start=True, **options).fit(X, y)
    parts.save(tmp_path / "net.npz")
    for other in (parts, pickle.loads(pickle.dumps(parts)), copy.deepcopy(parts)):
        other.set_params(max_iter=3).fit(X, y)
        np.testing.assert_allclose(other.weights(), whole.weights(), rtol=1e-8, atol=1e-10)
    loaded = SublinearTrainer.load(tmp_path / "net.npz").set_params(max_iter=3).fit(X, y)
    np.testing.assert_allclose(loaded.weights(), whole.weights(), rtol=1e-8, atol=1e-10)
    np.testing.assert_allclose(values_of(loaded), values_of(whole), rtol=1e-8, atol=1e-12)


def test_other_targets_keep_the_sum_of_dual_steps_and_other_points_do_not():
    X, y = problem(9, 4)
    y *= 1e-6  # nothing flips
    options = {"shift": 0.7, "damping": "auto", "ridge": 0.5, "warm_start": True}
    fitted = trainer(300, **options).fit(X, y).fit(X, 2.0 * y)
    fresh = trainer(300, **options).fit(X, 2.0 * y)
    np.testing.assert_allclose(fitted.predict(X), fresh.predict(X), rtol=1e-6, atol=1e-14)
    fitted.set_params(max_iter=0).fit(X[::-1][:6], y[:6])
    assert not fitted._sums.any() and fitted._sums.size == 6
    check(fitted)


def test_a_ridge_takes_points_that_coincide_or_have_no_neuron_in_its_stride():
    X, y = problem(8, 4)
    X, y = np.concatenate([X, X[:4]]), np.append(y, -y[:4])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = trainer(600, shift=0.7, damping="auto", ridge=0.1).fit(X, y)
    assert fitted.converged_ and fitted.residual_ > 0.1
    check(fitted)
    silent = trainer(30, shift=2.0, damping="auto", ridge=0.1, max_iter=100).fit(X, y)
    check(silent)
    counts = silent._search.jacobian().active_counts()
    assert (counts == 0).any() and silent.converged_ and not silent._sums[counts == 0].any()


@core
def test_a_step_taken_back_leaves_the_sum_of_dual_steps():
    X, y = problem(14, 3)
    options = {"shift": 0.5, "damping": "auto", "ridge": 1e-6, "warm_start": True}
    fitted = trainer(300, max_iter=25, **options).fit(X, 30 * y)
    assert values_of(fitted, "rejected").any()
    assert np.all(np.diff(values_of(fitted, "system_residual")) < 0)
    again = trainer(300, max_iter=1, **options).fit(X, 30 * y)
    dual = again._sums.copy()
    with pytest.MonkeyPatch.context() as patch:
        look = Broken(sublin._Lazy._find_flips, 1, TimeoutError())
        patch.setattr(sublin._Lazy, "_find_flips", look)
        with pytest.raises(TimeoutError):
            again.fit(X, 30 * y)
    np.testing.assert_array_equal(again._sums, dual)


@core
def test_warnings_name_ridge_unless_there_is_one():
    X, y = problem(20, 3)
    for ridge, names in ((0.0, True), (1e-9, False)):
        with pytest.warns(ConvergenceWarning) as told:
            trainer(60, shift=0.5, damping="auto", ridge=ridge, max_iter=3).fit(X, 30 * y)
        assert ("set ridge" in str(told[0].message)) == names


# ==================================================================================================
# Scaling
# ==================================================================================================

scalings = pytest.mark.parametrize("normalize", ["lift", "rows"])


def scaled_by_hand(X, normalize, like):
    """Rows of length 1, with the mean, the deviation and the lift of the training points `like`."""
    X = (X - like.mean(axis=0)) / like.std(axis=0)
    if normalize == "lift":
        X = np.column_stack([X, np.full(len(X), sublin.LIFT * np.sqrt(like.shape[1]))])
    return unit_rows(X)


@core
@scalings
@inits
@searches
def test_normalised_training_is_training_on_data_scaled_by_hand(normalize, init, search):
    rng = np.random.default_rng(0)
    X, y = 3 + 5 * rng.standard_normal((6, 4)), 100 + 20 * rng.standard_normal(6)
    options = {"init": init, "search": search, "tol": 1e-8}
    fitted = trainer(512, normalize=normalize, **options).fit(X, y)
    by_hand = trainer(512, **options)
    by_hand.fit(scaled_by_hand(X, normalize, X), (y - y.mean()) / y.std())
    assert fitted.converged_
    np.testing.assert_allclose(values_of(fitted), values_of(by_hand), rtol=1e-6, atol=1e-9)
    new = rng.standard_normal((7, 4))
    expected = by_hand.predict(scaled_by_hand(new, normalize, X)) * y.std() + y.mean()
    np.testing.assert_allclose(fitted.predict(new), expected, rtol=1e-6)
    np.testing.assert_allclose(fitted.predict(X), y, rtol=1e-6)


@core
@scalings
@pytest.mark.parametrize(
    "unit", [2.0**-10, 2.0**10, 1e-300, 1e-9, 1e9, 1.7e308, 2.0**-600, 2.0**600]
)
def test_units_of_the_data_do_not_matter(normalize, unit):
    rng = np.random.default_rng(0)
    X, y, new = rng.uniform(-1, 1, (8, 4)), rng.uniform(-1, 1, 8), rng.uniform(-1, 1, (5, 4))
    plain = trainer(1000, normalize=normalize, tol=1e-8).fit(X, y)
    for x_unit, y_unit in ((unit, 1.0), (1.0, unit), (unit, unit)):
        with np.errstate(over="raise" if unit < 1e200 else "warn", invalid="raise"):
            scaled = trainer(1000, normalize=normalize, tol=1e-8).fit(x_unit * X, y_unit * y)
            found = scaled.predict(x_unit * new) / y_unit
        assert scaled.converged_
        if 2.0**-10 <= unit <= 2.0**10 and np.log2(unit) % 1 == 0:
            np.testing.assert_array_equal(found, plain.predict(new))
            np.testing.assert_array_equal(values_of(scaled), values_of(plain))
        np.testing.assert_allclose(found, plain.predict(new), rtol=1e-6, atol=1e-9)


@core
@scalings
def test_values_of_constant_columns_have_no_effect(normalize):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((8, 3)), rng.standard_normal(8)
    constant = np.column_stack([X, np.full(8, 0.1), np.zeros(8), np.full(8, -1e300), 7.1 * y**0])
    fitted = trainer(1000, normalize=normalize, tol=1e-8).fit(constant, y)
    assert fitted.converged_
    np.testing.assert_allclose(fitted.predict(constant), y, atol=1e-6)
    moved = constant + np.array([0, 0, 0, 5, 7, 1e299, -1])
    np.testing.assert_array_equal(fitted.predict(moved), fitted.predict(constant))
    without = trainer(1000, normalize=normalize, tol=1e-8).fit(X, y)
    assert without.converged_


@core
def test_rows_that_are_the_mean_of_their_columns_up_to_rounding_have_no_direction():
    rng = np.random.default_rng(0)
    for offset in (1.0, 1e3, -1e6):
        X = rng.standard_normal((40, 3)) + offset * np.array([5.0, 7.0, 9.0])
        X[3] = np.delete(X, 3, axis=0).mean(axis=0)
        with pytest.raises(
            ValueError, match=r'row 3 of X is zero, up to rounding, once.*normalize="lift"'
        ):
            trainer(200, damping=1e-3, normalize="rows").fit(X, X[:, 0])
        check(trainer(200, damping=1e-3, normalize="lift", max_iter=1).fit(X, X[:, 0]))
        X[3, 0] += 1e-6 * abs(offset)
        check(trainer(200, damping=1e-3, normalize="rows", max_iter=1).fit(X, X[:, 0]))


@core
@pytest.mark.parametrize("size", [1e-200, 1e-40, 1e40, 1e308])
def test_targets_out_of_range_are_refused_where_they_are_not_scaled(size):
    X, y = problem(6, 3)
    y *= size / np.abs(y).max()
    with pytest.raises(ValueError, match=r"y has entries up to 1e.*out of the range.*\"lift\""):
        trainer(200).fit(X, y)
    fitted = trainer(200, normalize="lift", max_iter=2).fit(X, y)
    expected = trainer(200, normalize="lift", max_iter=2).fit(X, y / size)
    np.testing.assert_allclose(fitted.predict(X) / size, expected.predict(X), rtol=1e-9)
    if size > 1.0:
        with pytest.raises(ValueError, match=r"in the first fit's unit of .*, out of the range"):
            expected.set_params(warm_start=True).fit(X, y)


def extreme_draw(rng):
    """Data and options of extreme size, that is finite: X, other points, y, options."""
    sizes = [0, 1e-323, 1e-300, 1e-160, 1e-58, 1e-20, 1, 1e20, 1e58, 1e160, 1e300, 1e308]
    n, d = rng.integers(1, 12), rng.integers(1, 5)
    X = rng.standard_normal((n, d)) * rng.choice(sizes, size=d if rng.random() < 0.5 else 1)
    y = rng.standard_normal(n) * rng.choice(sizes) + rng.choice([0, 0, 1, 1e100, -1e200])
    new = np.vstack([X * rng.choice([1, 1e5, 0, 1e-100, 1e100]), X])
    X, new, y = (np.nan_to_num(array, posinf=1e308, neginf=-1e308) for array in (X, new, y))
    options = {
        **{"width": int(rng.choice([2, 64, 512])), "search": str(rng.choice(SEARCHES))},
        **{
            "solver": str(rng.choice(SOLVERS)),
            "normalize": (None, "rows", "lift")[rng.integers(3)],
        },
        **{"damping": ("auto", 0.0, 1e-3, 1e-300)[rng.integers(4)], "max_iter": 4},
        **{"shift": ("auto", 0.0, 1.0, -3.0, 1e-320, 1e300)[rng.integers(6)]},
        **{"dtype": ("float64", "float32")[rng.integers(2)], "tol": (1e-6, 0.0)[rng.integers(2)]},
        **{"init": ("gaussian", "antisymmetric")[rng.integers(2)]},
    }
    if options["normalize"] is None:
        X, new = (unit_rows(np.nan_to_num(rng.standard_normal(a.shape))) for a in (X, new))
    return X, new, y, options


def outcome(work):
    """What it returns, as arrays, or the error that refuses it."""
    try:
        return [np.asarray(found) for found in work()]
    except (ValueError, np.linalg.LinAlgError) as error:
        return [np.asarray(f"{type(error).__name__}: {error}")]


@pytest.mark.filterwarnings("ignore::RuntimeWarning")
@pytest.mark.parametrize("seed", range(8))
def test_numpys_error_state_changes_nothing(seed):
    rng = np.random.default_rng(seed)
    refused = 0
    for _ in range(25):
        X, new, y, options = extreme_draw(rng)

        def fit(X=X, new=new, y=y, options=options):
            fitted = trainer(**options).fit(X, y)
            check(fitted.set_params(warm_start=True).fit(X, y[::-1]))
            return fitted.predict(new), fitted.score(X, y), values_of(fitted), fitted.weights()

        def others(X=X, new=new):
            trees = MaxTrees(X, new)
            trees.update(0, new[-1])
            unit = unit_rows(np.where(np.abs(X) > 0, np.sign(X), 0.5))
            return trees.query_all(0.3)[1], trees.query(0, 1e-320), shifted_ntk(unit, 40.0)

        for work in (fit, others):
            expected = outcome(work)
            with np.errstate(all="raise"):
                assert_all_equal(outcome(work), expected)
            refused += len(expected) == 1
    assert refused < 25


@core
def test_lift_tells_parallel_rows_apart():
    X, y = np.array([[1.0], [2.0], [-1.0], [-2.0]]), np.array([1.0, -1.0, 2.0, 5.0])
    fitted = trainer(2000, normalize="lift", shift=0.5, tol=1e-8).fit(X, y)
    np.testing.assert_allclose(fitted.predict(X), y, atol=1e-6)


@core
@pytest.mark.parametrize("normalize", [None, "lift", "rows"])
@pytest.mark.parametrize("target", [0.0, 2.5])
def test_constant_targets_are_learned(normalize, target):
    X, _ = problem(5, 4)
    fitted = trainer(400, normalize=normalize).fit(X, np.full(5, target))
    assert fitted.converged_
    np.testing.assert_allclose(fitted.predict(X), target, atol=1e-8)


@core
def test_a_single_point_is_learned_in_every_scaling_that_can_hold_it():
    for normalize, X in ((None, [[0.6, 0.8]]), ("lift", [[3.0, 4.0]])):
        fitted = trainer(300, normalize=normalize).fit(X, [5.0])
        np.testing.assert_allclose(fitted.predict(X), 5.0)


@core
def test_predictions_are_finite_wherever_the_data_are():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((8, 4)), rng.standard_normal(8)
    X[:, 2] = 1e-300
    fitted = trainer(500, normalize="lift").fit(1e-3 * X, y)
    far = np.full((1, 4), 1e6)
    expected = fitted.predict(far)
    for scale in (1e50, 1e150, 1e200, 1e302):
        np.testing.assert_allclose(fitted.predict(scale * far), expected, rtol=1e-3)


@core
@pytest.mark.parametrize("damping", ["auto", 1e-3])
def test_coinciding_points_with_other_targets_bound_the_residual_and_are_named(damping):
    X, y = problem(8, 4)
    X[5] = X[1]
    bound = np.sqrt(2) * abs(y[5] - y[1]) / 2 / np.linalg.norm(y)
    message = "2 rows of X coincide with rows that have other targets, the first are 1 and 5"
    with pytest.warns(UserWarning, match=rf"{message}.* below {bound:.3g}; merge"):
        fitted = trainer(2000, shift=0.5, damping=damping, max_iter=40).fit(X, y)
    assert bound * (1 - 1e-12) <= fitted.residual_ <= 1.01 * bound


@core
def test_coinciding_points_with_equal_targets_are_no_reason_to_warn():
    X, y = problem(8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = trainer(2000, shift=0.5, damping="auto", tol=1e-5)
        assert fitted.fit(np.vstack([X, X]), np.append(y, y)).converged_


@core
@searches
def test_what_no_step_can_reduce_does_not_blow_up_the_dual_step(search):
    X, y = problem(20, 4)
    X[1], X[3] = X[0], X[2]
    options = {"search": search, "shift": 0.5, "damping": "auto", "tol": 0.0, "max_iter": 30}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = trainer(2000, **options).fit(X, y)
    bound = np.sqrt(((y[0] - y[1]) ** 2 + (y[2] - y[3]) ** 2) / 2) / np.linalg.norm(y)
    assert fitted.residual_ == pytest.approx(bound, rel=1e-6)
    check(fitted)


# ==================================================================================================
# Saving
# ==================================================================================================


@core
@searches
@inits
@pytest.mark.parametrize("normalize", ["lift", "rows", None])
def test_loaded_trainers_predict_to_the_bit_and_train_on(search, init, normalize, tmp_path):
    X, y = problem(10, 3)
    new = problem(7, 3, seed=3)[0]
    options = {"shift": 0.5, "search": search, "init": init, "normalize": normalize, "max_iter": 3}
    random = {"random_state": np.random.default_rng(0), "callback": print, "damping": 0.05}
    fitted = trainer(200, **options, **random).fit(X, y)
    fitted.save(tmp_path / "net.npz")
    loaded = SublinearTrainer.load(tmp_path / "net.npz")
    np.testing.assert_array_equal(loaded.predict(new), fitted.predict(new))
    np.testing.assert_array_equal(loaded.weights(), fitted.weights())
    np.testing.assert_array_equal(loaded.signs_, fitted.signs_)
    assert_all_equal(loaded.active_sets(), fitted.active_sets())
    assert loaded.history_ == fitted.history_ and loaded.callback is None
    assert options.items() <= loaded.get_params().items() and loaded.width == 200
    check(loaded)
    loaded.save(tmp_path / "again.npz")
    again = SublinearTrainer.load(tmp_path / "again.npz")
    np.testing.assert_array_equal(again.predict(new), fitted.predict(new))
    for trained in (loaded, fitted):
        trained.set_params(warm_start=True, max_iter=3, callback=None).fit(X, y)
    np.testing.assert_allclose(loaded.weights(), fitted.weights(), atol=1e-9)
    check(loaded)


@core
def test_saved_files_hold_no_more_than_live_neurons(tmp_path):
    fitted = trainer(20000, shift=2.5, max_iter=1, damping=1.0).fit(*problem(6, 3))
    fitted.save(tmp_path / "net")
    assert (tmp_path / "net").stat().st_size < 8 * 3 * fitted.n_live_ + 20000


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Bytes of a saved trainer."""
    path = tmp_path_factory.mktemp("saved") / "net.npz"
    trainer(200, shift=0.5, max_iter=2, damping=0.05).fit(*problem(10, 3)).save(path)
    return path.read_bytes()


@core
@pytest.mark.parametrize("version", [1, 4, 9])
def test_files_of_other_formats_are_refused_with_the_reason(saved, version, tmp_path):
    path = tmp_path / "net"
    path.write_bytes(saved)
    arrays = dict(np.load(path))
    about = json.loads(arrays["about"].tobytes())
    about["format"] = f"sublin network, version {version}"
    arrays["about"] = np.frombuffer(json.dumps(about).encode(), np.uint8)
    with open(path, "wb") as file:
        np.savez(file, **arrays)
    refuses(path, f"its format is 'sublin network, version {version}'")


def refuses(path, why=""):
    message = "path must be a file written by SublinearTrainer.save, but .* is damaged or foreign"
    with pytest.raises(ValueError, match=rf"{message}.*{why}"):
        SublinearTrainer.load(path)


@core
def test_files_whose_points_have_another_length_are_refused(saved, tmp_path):
    path = tmp_path / "net"
    path.write_bytes(saved)
    with np.load(path) as arrays:
        np.savez(tmp_path / "longer.npz", **{**arrays, "X": 3.0 * arrays["X"]})
    refuses(tmp_path / "longer.npz", "rows of X must have length 1")


def test_truncated_files_are_refused(saved, tmp_path):
    for length in {0, 1, 100, *np.linspace(0, len(saved) - 1, 60).astype(int)}:
        (tmp_path / "net").write_bytes(saved[:length])
        refuses(tmp_path / "net")


def test_files_with_a_flipped_bit_are_refused_or_harmless(saved, tmp_path):
    path, X, refused = tmp_path / "net", problem(10, 3)[0], 0
    path.write_bytes(saved)
    expected = SublinearTrainer.load(path).predict(X)
    for place in np.random.default_rng(0).integers(len(saved) * 8, size=400):
        damaged = bytearray(saved)
        damaged[place // 8] ^= 1 << (place % 8)
        path.write_bytes(damaged)
        try:
            found = SublinearTrainer.load(path).predict(X)
        except ValueError as error:
            assert "damaged or foreign" in str(error)
            refused += 1
        else:  # a date, say
            np.testing.assert_array_equal(found, expected)
    assert refused > 300


class Trap:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return os.abort, ()


@core
def test_foreign_files_are_refused_and_never_run(saved, tmp_path):
    path = tmp_path / "net.npz"
    for content in (b"", b"hello", pickle.dumps(Trap()), saved[::-1]):
        path.write_bytes(content)
        refuses(path)
    np.save(tmp_path / "array.npy", np.ones(3))
    refuses(tmp_path / "array.npy")
    about = np.frombuffer(json.dumps({"format": sublin.FORMAT}).encode(), np.uint8)
    ones, trap = np.ones(3), np.array([Trap()], dtype=object)
    for arrays in ({"X": ones}, {"about": about}, {"about": trap}, {"about": about, "X": trap}):
        np.savez(path, **arrays)
        refuses(path)


@core
def test_missing_files_and_folders_raise_what_python_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        SublinearTrainer.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        trainer(64, max_iter=0).fit(*problem(5, 3)).save(tmp_path / "none" / "net")
    with pytest.raises(NotFittedError, match="not fitted yet"):
        SublinearTrainer().save(tmp_path / "net")


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_file(tmp_path):
    code = """if True:
        import sys
        import numpy as np
        from sublin import SublinearTrainer

        rng = np.random.default_rng(0)
        net = SublinearTrainer(1 << 15, max_iter=1, shift=1.0, damping=1.0, random_state=0)
        net.fit(rng.standard_normal((20, 8)), rng.standard_normal(20))
        net.save(sys.argv[1] + ".first")  # compiles what is not in the cache
        print("ready", flush=True)
        while True:
            net.save(sys.argv[1])
    """
    path, rng, whole = tmp_path / "net.npz", np.random.default_rng(0), 0
    for _ in range(6):
        run = command(code, str(path))
        with subprocess.Popen(run, cwd=HERE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout.readline() == "ready\n"
            time.sleep(rng.uniform(0.02, 0.3))
            process.kill()
        if path.exists():
            assert SublinearTrainer.load(path).n_iter_ == 1
            whole += 1
    assert whole >= 4


@core
def test_a_save_that_fails_leaves_the_old_file_and_no_other(tmp_path, monkeypatch):
    path = tmp_path / "net"
    fitted = trainer(64, max_iter=0).fit(*problem(5, 3))
    fitted.save(path)
    before = path.read_bytes()
    monkeypatch.setattr(np, "savez", Broken(np.savez, 1, OSError("no space left"), after=True))
    with pytest.raises(OSError, match="no space left"):
        fitted.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["net"]


@core
@pytest.mark.skipif(os.name == "nt", reason="modes and links of Unix")
def test_saving_keeps_modes_follows_links_and_refuses_what_is_no_file(tmp_path):
    path, fitted = tmp_path / "net", trainer(64, max_iter=0).fit(*problem(5, 3))
    mode = lambda: path.stat().st_mode & 0o777  # noqa: E731
    for umask, expected in ((0o022, 0o644), (0o077, 0o600), (0o002, 0o664)):
        before = os.umask(umask)
        try:
            path.unlink(missing_ok=True)
            fitted.save(path)
            assert mode() == expected
        finally:
            os.umask(before)
    path.chmod(0o640)
    fitted.save(path)
    assert mode() == 0o640
    for target in (path, tmp_path / "folder" / "new"):  # which is not there before
        target.parent.mkdir(exist_ok=True)
        target.unlink(missing_ok=True)
        link = tmp_path / f"link to {target.name}"
        link.symlink_to(target)
        fitted.save(link)
        assert link.is_symlink() and not target.is_symlink()
        assert SublinearTrainer.load(target).n_iter_ == SublinearTrainer.load(link).n_iter_ == 0
    os.mkfifo(tmp_path / "pipe")  # which would wait for ever for somebody to read or write
    for place in ("/dev/null", tmp_path / "pipe", tmp_path / "folder"):
        for use in (fitted.save, SublinearTrainer.load):
            with pytest.raises(ValueError, match=f"{place}' is a folder, a device"):
                use(place)
    assert Path("/dev/null").is_char_device()
    assert sorted(os.listdir(tmp_path)) == ["folder", "link to net", "link to new", "net", "pipe"]


@searches
@inits
def test_pickles_hold_what_files_hold_and_predict_to_the_bit(search, init, tmp_path):
    X, y = problem(40, 6)
    fitted = trainer(1 << 12, search=search, init=init, normalize="lift", shift=1.0, max_iter=3)
    unfitted = pickle.loads(pickle.dumps(fitted))
    assert not hasattr(unfitted, "history_")
    np.testing.assert_array_equal(
        unfitted.fit(X, y).predict(X), fitted.set_params(callback=max).fit(X, y).predict(X)
    )
    fitted.save(tmp_path / "net")
    pickled = pickle.dumps(fitted)
    assert len(pickled) < 1.2 * (tmp_path / "net").stat().st_size + 10_000
    expected = fitted.predict(X), fitted.weights(), fitted.signs_, *fitted.active_sets()
    for twin in (pickle.loads(pickled), copy.deepcopy(fitted), copy.copy(fitted)):
        found = twin.predict(X), twin.weights(), twin.signs_, *twin.active_sets()
        assert_all_equal(found, expected)
        assert twin.history_ == fitted.history_ and twin.callback is max
        assert twin.__dict__.keys() == fitted.__dict__.keys()
        check(twin)
        again = twin.set_params(warm_start=True, callback=None).fit(X, -y)
        check(again)
        assert again.residual_ < 0.1
        assert_all_equal([fitted.predict(X)], expected[:1])  # which is another network


def test_a_trainer_that_joblib_maps_read_only_predicts_and_trains_on(tmp_path):
    X, y = problem(30, 5)
    for search in SEARCHES:
        fitted = trainer(1 << 12, search=search, shift=1.0, max_iter=2).fit(X, y)
        joblib.dump(fitted, tmp_path / "net")
        mapped = joblib.load(tmp_path / "net", mmap_mode="r")
        np.testing.assert_array_equal(mapped.predict(X), fitted.predict(X))
        for points in (X, X[:20]):
            check(mapped.set_params(warm_start=True).fit(points, y[: len(points)]))


def test_predictions_make_the_weights_once():
    X, y = problem(30, 5)
    for search in SEARCHES:
        fitted = trainer(1 << 10, search=search, shift=1.0, max_iter=2).fit(X, y)
        kind = sublin.SEARCHES[search]
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(kind, "_weights", made := Broken(kind._weights, 0, None))
            for _ in range(3):
                fitted.predict(X[:1])
            assert next(made.calls) == 2


@core
@searches
def test_networks_without_live_neurons_are_saved_and_loaded(search, tmp_path):
    X, y = problem(6, 3)
    fitted = trainer(64, shift=30.0, search=search, damping="auto", max_iter=1).fit(X, y)
    fitted.save(tmp_path / "net")
    np.testing.assert_array_equal(SublinearTrainer.load(tmp_path / "net").predict(X), np.zeros(6))


@core
def test_options_set_after_fit_do_not_change_what_is_saved(tmp_path):
    X, y = problem(10, 9)
    fitted = trainer(200, shift=0.5, max_iter=2, damping=0.1).fit(X, y)
    expected = fitted.predict(X)
    fitted.set_params(init="gaussian", width=100, normalize="rows", shift=2.0)
    fitted.save(tmp_path / "net")
    np.testing.assert_array_equal(SublinearTrainer.load(tmp_path / "net").predict(X), expected)
    with pytest.raises(ValueError, match="search must be one of"):
        fitted.set_params(search="Lazy").save(tmp_path / "net")


# ==================================================================================================
# Trainer
# ==================================================================================================

PHASES = {"seconds_query", "seconds_jacobian", "seconds_solve", "seconds_update"}
KEYS = {"iteration", "residual", "system_residual", "loss", "active", "changed", "looked_at"}
KEYS |= {"flips", "operations", "inner_iterations", "damping", "rejected"}


@core
@searches
@solvers
def test_history_is_complete_and_true(search, solver):
    (X, y), options = PROBLEMS["plain"]
    seen, masks = [], []
    fitted = trainer(search=search, solver=solver, max_iter=4, damping=0.01, **options)

    def watch(record):
        seen.append(record)
        masks.append(Net.of(fitted, X).active)

    fitted.set_params(callback=watch).fit(X, y)
    assert seen == fitted.history_
    assert [record["iteration"] for record in seen] == list(range(fitted.n_iter_ + 1))
    assert fitted.n_live_ == masks[0].any(axis=0).sum()
    assert fitted.residual_ == seen[-1]["residual"] and fitted.init_seconds_ > 0
    for record, before, after in zip(seen, [None, *masks[:-1]], masks, strict=True):
        assert set(record) == KEYS | PHASES | {"seconds"}
        assert record["seconds"] == pytest.approx(sum(record[phase] for phase in PHASES))
        assert record["active"] == after.sum() / len(X)
        assert record["changed"] == (0 if before is None else before.any(axis=0).sum())
        assert record["flips"] == (0 if before is None else (before != after).sum())
        assert record["damping"] == 0.01 and record["operations"] > 0


@searches
def test_a_callback_that_looks_at_the_network_changes_no_record(search):
    X, y = problem(6, 5)
    fitted = trainer(512, search=search, max_iter=4).fit(X, y)
    watched = trainer(512, search=search, max_iter=4)
    look = lambda record: (watched.weights(), watched.predict(X), watched.active_sets())  # noqa: E731
    watched.set_params(callback=look).fit(X, y)
    for key in KEYS:
        np.testing.assert_array_equal(values_of(watched, key), values_of(fitted, key))


@core
def test_loss_curve_is_half_the_mean_squared_error():
    X, y = problem(8, 3)
    y, seen = 40.0 + 5.0 * y, []
    fitted = trainer(300, normalize="lift", max_iter=3)
    loss = lambda record: seen.append(0.5 * np.mean((fitted.predict(X) - y) ** 2))  # noqa: E731
    fitted.set_params(callback=loss).fit(X, y)
    np.testing.assert_allclose(fitted.loss_curve_, seen, rtol=1e-6)


@core
def test_max_iter_zero_leaves_the_start_in_silence():
    X, y = problem(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = trainer(100, max_iter=0).fit(X, y)
    assert fitted.n_iter_ == 0 and len(fitted.history_) == 1 and not fitted.converged_
    np.testing.assert_array_equal(fitted.weights(), fitted.weights().astype(np.float32))


@core
def test_training_stops_at_the_tolerance():
    fitted = trainer(512, tol=1e-3).fit(*problem(6, 5))
    assert fitted.converged_ and fitted.history_[-2]["residual"] > 1e-3 >= fitted.residual_


@core
def test_a_callback_that_returns_true_stops_training():
    X, y = problem(6, 5)
    fitted = trainer(512, callback=lambda record: record["iteration"] == 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # the user has stopped it
        fitted.fit(X, y)
    assert fitted.n_iter_ == 2 and len(fitted.history_) == 3 and not fitted.converged_
    check(fitted)


@core
@pytest.mark.parametrize(
    "options, message",
    [
        ({"max_iter": 1}, r"1 steps is above tol=1e-09: it was still falling; raise max_iter"),
        ({"max_iter": 1, "damping": 0.0}, r"it was still falling; raise max_iter"),
        (
            {"shift": 3.0, "width": 64},
            r"\d points have no active neuron \(the first is \d\).*lower shift, or raise width",
        ),
        *(
            (
                {"shift": 0.0, "width": 8, "max_iter": most},
                r"it has stopped falling; lower shift or",
            )
            for most in (60, 5000)
        ),
    ],
)
def test_warnings_say_which_knob_to_turn_and_in_which_direction(options, message):
    with pytest.warns(ConvergenceWarning, match=message):
        fitted = trainer(**{"damping": "auto", "width": 512, **options}).fit(*problem(12, 3))
    assert not fitted.converged_ and fitted.n_iter_ <= options.get("max_iter", 50)


@core
def test_after_a_warm_start_the_warning_is_about_this_fit_alone():
    """Its residuals may be larger than those of other targets, without diverging."""
    X, y = problem(12, 3)
    fitted = trainer(600, shift=0.5, damping="auto", tol=1e-6).fit(X, y)
    assert fitted.converged_
    fitted.set_params(warm_start=True, max_iter=1, tol=1e-12)
    with pytest.warns(ConvergenceWarning, match="it was still falling; raise max_iter"):
        fitted.fit(X, 30 * y[::-1])


@core
def test_training_that_overflows_stops_and_warns(monkeypatch):
    far = lambda solver, residual: (-1e250 * residual, 0)  # noqa: E731
    monkeypatch.setattr(sublin._Cholesky, "solve", far)
    message = r'e\+248 after 1 steps.*"auto"'
    with np.errstate(over="ignore"), pytest.warns(ConvergenceWarning, match=message):
        trainer(512, shift="paper").fit(*problem(6, 5))


@core
def test_either_kind_of_convergence_warning_can_be_filtered():
    for category in (ConvergenceWarning, sublin.ConvergenceWarning):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", category)
            trainer(64, max_iter=1).fit(*problem(6, 3))


def test_warnings_need_no_scikit_learn():
    code = """if True:
        import sys, warnings, numpy as np, sublin
        warnings.simplefilter("error", sublin.ConvergenceWarning)
        try:
            sublin.SublinearTrainer(64, max_iter=1).fit(np.eye(4), [1, 2, 3, 4])
        except sublin.ConvergenceWarning:
            print("sklearn" in sys.modules)
    """
    assert printed_by(code, warn="default") == "False\n"


@core
@pytest.mark.parametrize("ridge", [0.0, 0.1])
def test_verbose_prints_a_line_for_each_step(ridge, capsys):
    fitted = trainer(512, ridge=ridge, verbose=1, max_iter=2).fit(*problem(6, 5))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(fitted.history_) == 3
    for record, line in zip(fitted.history_, lines, strict=True):
        assert f"residual {record['residual']:.2e}" in line
    assert (f"system_residual {record['system_residual']:.2e}" in line) == (ridge > 0)
    trainer(512, max_iter=2).fit(*problem(6, 5))
    assert capsys.readouterr().out == ""


@core
def test_verbose_shows_bars_where_tqdm_is_installed(monkeypatch, capsys):
    bars = []

    class Bar:
        def __init__(self, total, desc, unit):
            self.total, self.n, self.open = total, 0, True
            bars.append(self)

        def update(self, count):
            self.n += count

        def set_postfix(self, residual):
            self.residual = residual

        def close(self):
            self.open = False

    monkeypatch.setitem(sys.modules, "tqdm", types.SimpleNamespace(tqdm=Bar))
    fitted = trainer(512, shift="paper", verbose=2, max_iter=2).fit(*problem(6, 5))
    assert bars[-1].n == 2 and bars[-1].total == 2 and not any(bar.open for bar in bars)
    assert bars[-1].residual == f"{fitted.residual_:.2e}"
    assert capsys.readouterr().out == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)  # not installed
    trainer(512, shift="paper", verbose=2, max_iter=2).fit(*problem(6, 5))
    assert len(capsys.readouterr().out.splitlines()) == 3


@core
def test_drawing_neurons_reports_its_progress(monkeypatch, capsys):
    monkeypatch.setattr(sublin, "BLOCK", 64)
    clock = iter(np.arange(0.0, 1e6, 2.0)).__next__
    monkeypatch.setattr(sublin.time, "perf_counter", clock)
    width = 4 * 8 * numba.get_num_threads() * 64  # in four groups of blocks
    options = {"shift": "paper", "verbose": 1, "max_iter": 0, "draw": "all"}
    trainer(width, **options).fit(*problem(6, 5))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [f"drawing neurons: {share:4.0%}" for share in (0.25, 0.5, 0.75, 1.0)]


@core
@searches
def test_parameters_set_after_fit_leave_the_fitted_network_alone(search):
    X, y = problem(4, 3)
    fitted = trainer(100, search=search, max_iter=2).fit(X, y)
    expected = fitted.predict(X), fitted.weights(), fitted.signs_
    fitted.set_params(width=40, init="gaussian", search="dense", normalize="lift")
    assert_all_equal((fitted.predict(X), fitted.weights(), fitted.signs_), expected)


@core
@pytest.mark.parametrize(
    "X_bad", [[[np.nan, 1.0]], [[3.0, 4.0]]], ids=["not finite", "zero once centred"]
)
def test_a_refused_fit_leaves_the_fitted_network_alone(X_bad):
    X, y = problem(4, 2)
    options = {"init": "gaussian", "shift": 0.0, "normalize": "rows", "random_state": None}
    fitted = trainer(60, max_iter=1, **options).fit(X, y)
    predicted, signs = fitted.predict(X), fitted.signs_
    with pytest.raises(ValueError, match="X"):
        fitted.fit(X_bad, [1.0])
    assert_all_equal((fitted.predict(X), fitted.signs_), (predicted, signs))


@core
@pytest.mark.parametrize("normalize", [None, "rows", "lift"])
def test_fit_returns_the_trainer_and_leaves_its_inputs_alone(normalize):
    X, y = problem(5, 4)
    X_copy, y_copy = X.copy(), y.copy()
    for array in (X, y):
        array.setflags(write=False)
    model = trainer(200, normalize=normalize, max_iter=2, damping=1e-3)
    assert model.fit(X, y) is model
    model.predict(X)
    model.score(X, y)
    assert_all_equal((X, y), (X_copy, y_copy))


@core
def test_fit_takes_lists_and_any_order_of_memory():
    X, y = problem(5, 4)
    expected = trainer(100, normalize="lift", max_iter=2).fit(X, y).weights()
    strided = np.asfortranarray(X), np.repeat(y, 2)[::2]
    for X_same, y_same in ((X.tolist(), y.tolist()), strided):
        found = trainer(100, normalize="lift", max_iter=2).fit(X_same, y_same).weights()
        np.testing.assert_array_equal(found, expected)


def test_predictions_do_not_depend_on_how_many_are_made_at_once():
    X, y = problem(6, 5)
    fitted = trainer(512, max_iter=1).fit(X, y)
    new, _ = problem(3000, 5, seed=1)
    expected = Net.of(fitted, new[-7:]).outputs
    np.testing.assert_allclose(fitted.predict(new)[-7:], expected, rtol=1e-9, atol=1e-12)
    np.testing.assert_allclose(fitted.predict(new[-7:]), expected, rtol=1e-9, atol=1e-12)


@searches
@pytest.mark.parametrize("damping", ["auto", 0.0, 1e-3])
@pytest.mark.parametrize("tol", [0.0, 1e-17])
def test_tolerances_below_rounding_are_met_at_its_floor(search, damping, tol):
    X, y = problem(20, 5)
    options = {"search": search, "damping": damping, "tol": tol, "shift": 1.0, "max_iter": 500}
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for dtype, floor in (("float64", 1e-13), ("float32", 1e-5)):
            fitted = trainer(4096, dtype=dtype, **options).fit(X, y)
            assert fitted.converged_ is True and fitted.residual_ < floor
            assert fitted.n_iter_ < 200


def test_with_one_column_the_warning_says_what_helps_and_it_does():
    t = np.arange(60.0)[:, None]
    y = np.sin(t[:, 0] / 2)
    with pytest.warns(ConvergenceWarning, match=r"add columns to X, such as splines or sines"):
        SublinearTrainer(random_state=0).fit(t, y)
    splines = SplineTransformer(n_knots=15).fit_transform(t)
    sines = np.column_stack(
        [np.sin(2 * np.pi * k * t / 60 + p) for k in (1, 2, 4, 8) for p in (0, 2)]
    )
    for columns in (splines, sines):
        assert SublinearTrainer(random_state=0).fit(columns, y).converged_


@core
@pytest.mark.parametrize("y", [1e6, 1e-6, 1.0])
def test_check_compares_residuals_with_what_they_are_sums_of(y):
    X, targets = problem(12, 4)
    fitted = trainer(600, shift=0.5, damping="auto").fit(X, y * targets)
    for scale in (1e-12, 1.0, 1e6):
        check(fitted.set_params(warm_start=True, max_iter=0).fit(X, scale * y * targets))
    check(fitted.set_params(max_iter=50).fit(X, y * targets))
    fitted.residual_ += 1e-3
    with pytest.raises(AssertionError, match="residual is not that of the weights"):
        check(fitted)


@core
def test_score_is_r2_score():
    fitted = trainer(512, max_iter=1).fit(*problem(6, 5))
    new, targets = problem(8, 5, seed=1)
    weights = np.arange(8.0)
    for sample_weight in (None, weights, list(weights)):
        expected = r2_score(targets, fitted.predict(new), sample_weight=sample_weight)
        for y in (targets, targets[:, None], [[value] for value in targets]):
            assert fitted.score(new, y, sample_weight) == pytest.approx(expected)
    assert fitted.score(new, np.ones(8)) == r2_score(np.ones(8), fitted.predict(new)) == 0.0
    assert fitted.score(new, np.full(8, 0.1)) == 0.0
    assert trainer(8, normalize="lift").fit(new, np.full(8, 3.0)).score(new, np.full(8, 3.0)) == 1.0
    with pytest.warns(UndefinedMetricWarning, match="at least two"):
        assert np.isnan(fitted.score(new[:1], targets[:1]))
    with pytest.raises(
        ValueError, match="sample_weight must have 8 entries, one for each row of X"
    ):
        fitted.score(new, targets, sample_weight=[1.0])


# ---- Damping -------------------------------------------------------------------------------------

# Hard for a pure step: targets that few neurons must fit, so that most steps overshoot.
HARD = {"shift": 1.2, "damping": "auto", "max_iter": 12}


def hard_problem():
    X, y = problem(14, 2)
    return X, 300.0 * y


def never_rises(fitted):
    residuals = values_of(fitted)
    return bool(np.all(np.diff(residuals) <= 0)) and np.isfinite(residuals).all()


@core
@searches
@solvers
def test_adaptive_damping_never_lets_the_residual_rise(search, solver):
    X, y = hard_problem()
    size = 600 if solver == "richardson" else None
    options = {"search": search, "solver": solver, "sketch_size": size, **HARD}
    fitted = trainer(300, **options).fit(X, y)
    assert never_rises(fitted) and fitted.n_iter_ > 1
    assert_consistent(X, fitted)
    check(fitted)


@core
def test_hard_problems_reject_steps_and_searches_take_the_same_ones():
    fits = [trainer(300, search=search, **HARD).fit(*hard_problem()) for search in SEARCHES]
    assert values_of(fits[0], "rejected").sum() > 0
    for fitted in fits[1:]:
        np.testing.assert_allclose(values_of(fitted), values_of(fits[0]), rtol=1e-6)
        for key in ("rejected", "flips", "changed"):
            np.testing.assert_array_equal(values_of(fitted, key), values_of(fits[0], key))


@thorough
@given(
    n=st.integers(1, 30),
    d=st.integers(1, 6),
    width=st.integers(1, 200),
    shift=st.floats(-1, 2),
    scale=st.floats(-3, 3),
    seed=st.integers(0, 1000),
)
def test_lazy_and_dense_damp_alike_in_every_regime(n, d, width, shift, scale, seed):
    X, y = problem(n, d, seed)
    options = {"damping": "auto", "shift": shift, "max_iter": 6, "random_state": seed, "tol": 1e-6}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        lazy, dense = (
            trainer(2 * width, search=search, **options).fit(X, 10.0**scale * y)
            for search in ("lazy", "dense")
        )
    check(lazy)
    assert never_rises(lazy) and never_rises(dense)
    # Where the Gram matrix is nearly singular, rounding decides whether a step is taken; then only
    # the first ones agree.
    same = min(len(lazy.history_), len(dense.history_), 3)
    found, expected = values_of(lazy)[:same], values_of(dense)[:same]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-6)


@core
def test_damping_fades_so_that_convergence_stays_superlinear():
    X, y = problem(10, 8)
    pure, damped = (trainer(4096, damping=damping).fit(X, y) for damping in (0.0, "auto"))
    assert damped.converged_ and damped.n_iter_ <= pure.n_iter_ + 1
    exponents = np.log(values_of(damped)[2:]) / np.log(values_of(damped)[1:-1])
    assert exponents[-1] > 1.5


@core
@searches
def test_a_singular_gram_matrix_is_damped_not_refused(search):
    X, y = problem(6, 4)
    X[3], y[3] = X[2], y[2]
    with pytest.raises(np.linalg.LinAlgError, match=r"points 2 and 3 coincide"):
        trainer(2000, search=search, shift=0.5).fit(X, y)
    options = {"search": search, "shift": 0.5, "damping": "auto", "tol": 1e-6}
    assert trainer(2000, **options).fit(X, y).converged_


def odd_digits():
    X, labels = load_digits(return_X_y=True)
    return X, np.where(labels % 2, 1.0, -1.0)


REAL = {
    "digits": odd_digits,
    "diabetes": lambda: load_diabetes(return_X_y=True),
    "breast cancer": lambda: load_breast_cancer(return_X_y=True),
    "wine": lambda: load_wine(return_X_y=True),
}


@pytest.mark.parametrize("name", REAL)
def test_real_data_are_fitted_with_a_residual_that_never_rises(name):
    X, y = REAL[name]()
    options = {"shift": 1.0, "tol": 1e-3, "max_iter": 100, "random_state": 0}
    fitted = SublinearTrainer(1 << 14, **options).fit(X, y)
    assert fitted.converged_ and never_rises(fitted)
    default = SublinearTrainer(1 << 14, max_iter=8, random_state=0).fit(X, y)
    assert never_rises(default) and default.residual_ < 0.6


@pytest.mark.parametrize("name", ["digits", "breast cancer", "wine"])
def test_real_data_without_centring_are_fitted_with_a_residual_that_never_rises(name):
    X, y = REAL[name]()
    X, y = unit_rows(X)[:300], (y - y.mean())[:300]
    options = {"normalize": None, "max_iter": 12, "random_state": 0}
    assert never_rises(SublinearTrainer(1 << 12, **options).fit(X, y))


# ---- Warm starts ---------------------------------------------------------------------------------


@core
@searches
@inits
def test_warm_starts_go_on_from_the_last_weights(search, init):
    X, y = problem(10, 3)
    options = {"width": 200, "shift": 0.5, "search": search, "init": init, "damping": 0.05}
    whole = trainer(max_iter=6, **options).fit(X, y)
    parts = trainer(max_iter=3, warm_start=True, **options).fit(X, y).fit(X, y)
    np.testing.assert_allclose(parts.weights(), whole.weights(), rtol=1e-9, atol=1e-9)
    assert [record["iteration"] for record in parts.history_] == list(range(7))
    np.testing.assert_allclose(values_of(parts), values_of(whole), rtol=1e-9)
    check(parts)


@core
@searches
@inits
@pytest.mark.parametrize("before", SEARCHES)
def test_warm_starts_go_on_with_other_points_and_searches(search, init, before):
    X, y = problem(10, 3)
    more, targets = problem(16, 3, seed=5)
    options = {"shift": 0.8, "init": init, "damping": 0.05, "max_iter": 3, "warm_start": True}
    fitted = trainer(200, search=before, **options).fit(X, y)
    net = Net.of(fitted, more)
    fitted.set_params(search=search, max_iter=0).fit(more, targets)
    np.testing.assert_allclose(fitted.weights(), net.W, atol=1e-12)
    np.testing.assert_array_equal(fitted.signs_, net.signs)
    check(fitted)
    fitted.set_params(max_iter=4).fit(more, targets)
    *_, expected = net.steps(targets, 4, damping=0.05)
    assert fitted.residual_ == pytest.approx(expected.residual(targets), rel=1e-6)
    np.testing.assert_allclose(fitted.weights(), expected.W, atol=1e-8)
    np.testing.assert_allclose(fitted.predict(X), expected._replace(X=X).outputs, atol=1e-8)
    check(fitted)


@core
@pytest.mark.parametrize("scale", [0.0, 1e-30, 0.1, 0.4, 1.4, 5.0, 1e3])
@pytest.mark.parametrize("damping", [0.05, "auto"])
def test_warm_starts_go_on_with_targets_of_any_size_at_points_seen_and_unseen(scale, damping):
    X, y = problem(12, 3)
    options = {"shift": 0.8, "damping": damping, "max_iter": 5, "warm_start": True}
    fitted = trainer(600, **options).fit(X, y)
    for points, targets in ((X[::-1], scale * y), (problem(9, 3, seed=5)[0], scale * np.ones(9))):
        fitted.fit(points, targets)
        assert fitted._search.n_live == fitted.n_live_
        if scale > 1e-3:  # else b is too large beside the targets for what check() asks
            check(fitted)
        check(fitted.fit(X, y))


@core
@pytest.mark.parametrize(
    "changed", [{"width": 64}, {"init": "gaussian"}, {"shift": 0.1}, {"normalize": "rows"}]
)
def test_warm_starts_refuse_another_network(changed):
    X, y = problem(6, 3)
    fitted = trainer(100, shift=0.5, warm_start=True, max_iter=1).fit(X, y)
    (name,) = changed
    message = rf"{name} must stay .* for warm_start=True.*, got .*; use warm_start=False"
    with pytest.raises(ValueError, match=message):
        fitted.set_params(**changed).fit(X, y)


# ==================================================================================================
# Conventions of scikit-learn
# ==================================================================================================


@parametrize_with_checks([SublinearTrainer(1024, shift=0.5)])
def test_scikit_learn_accepts_the_trainer(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        check(estimator)


def test_the_trainer_works_in_pipelines_searches_and_ensembles():
    X, y = (array[:80] for array in load_diabetes(return_X_y=True))
    options = {"shift": 0.0, "damping": 1e-2, "tol": 1e-2, "max_iter": 5, "random_state": 0}
    model = SublinearTrainer(512, **options)
    scores = cross_val_score(make_pipeline(StandardScaler(), model), X, y, cv=3)
    assert scores.shape == (3,) and np.isfinite(scores).all()
    found = GridSearchCV(model, {"width": [128, 256], "shift": [0.0, 0.5]}, cv=2).fit(X, y)
    assert np.isfinite(found.cv_results_["mean_test_score"]).all()
    many = MultiOutputRegressor(model).fit(X, np.column_stack([y, -y]))
    assert many.predict(X[:5]).shape == (5, 2)
    stacked = StackingRegressor([("one", model), ("two", model)], cv=2).fit(X, y)
    assert np.isfinite(stacked.predict(X)).all()
    voted = VotingRegressor([("one", model), ("two", model)]).fit(X, y)
    np.testing.assert_allclose(voted.predict(X), model.fit(X, y).predict(X))


@core
def test_parameters_can_be_read_set_and_cloned():
    options = {"width": 100, "shift": 0.5, "search": "scan", "damping": 0.1, "random_state": 4}
    model = SublinearTrainer(**options)
    assert options.items() <= model.get_params().items()
    assert model.set_params(width=64, solver="cg") is model
    assert clone(model).get_params() == model.get_params()
    assert clone(model).fit(*problem(4, 3)).weights().shape[0] == 64
    with pytest.raises(ValueError, match="parameter must be one of"):
        model.set_params(width=32, depth=3)
    assert model.width == 64  # none is set if one is unknown
    assert repr(SublinearTrainer(64, solver="cg")) == "SublinearTrainer(width=64, solver='cg')"


@core
def test_features_are_counted_and_named():
    X, y = problem(6, 3)
    named = pandas.DataFrame(X, columns=["a", "b", "c"])
    fitted = trainer(200, normalize="lift", max_iter=1).fit(named, y)
    assert fitted.n_features_in_ == 3 and list(fitted.feature_names_in_) == ["a", "b", "c"]
    expected = fitted.predict(named)
    message = r"(?s)should match.*unseen at fit time:\n- d\n.*now missing:\n- c\n"
    with pytest.raises(ValueError, match=message):
        fitted.predict(pandas.DataFrame(X, columns=["a", "b", "d"]))
    with pytest.raises(ValueError, match="must be in the same order"):
        fitted.predict(pandas.DataFrame(X, columns=["b", "a", "c"]))
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        np.testing.assert_array_equal(fitted.predict(X), expected)
    fitted.fit(X, y)
    assert not hasattr(fitted, "feature_names_in_")
    with pytest.warns(UserWarning, match="X has feature names, but"):
        fitted.predict(named)


COLUMNS = {
    "array": lambda y: y[:, None],
    "list": lambda y: [[value] for value in y],
    "pandas": lambda y: pandas.DataFrame({"y": y}),
    "polars": lambda y: polars.DataFrame({"y": y}),
}


@core
@pytest.mark.parametrize("column", COLUMNS.values(), ids=COLUMNS)
def test_a_column_of_targets_is_taken_with_a_warning(column):
    X, y = problem(9, 3)
    message = r"column-vector y was passed.*\(9, 1\); pass np.ravel\(y\)"
    with pytest.warns(DataConversionWarning, match=message) as told:
        fitted = trainer(200, max_iter=2).fit(X, column(y))
    assert told[0].filename == __file__
    expected = trainer(200, max_iter=2).fit(X, y)
    np.testing.assert_array_equal(fitted.predict(X), expected.predict(X))
    assert fitted.score(X, column(y)) == expected.score(X, y)
    if column is COLUMNS["pandas"]:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DataConversionWarning)
            scores = cross_val_score(fitted, X, column(y), cv=3)
        np.testing.assert_array_equal(scores, cross_val_score(fitted, X, y, cv=3))
        assert np.isfinite(scores).all()


@core
def test_missing_values_are_refused_whatever_they_look_like():
    X, y = problem(6, 3)
    masked = np.ma.masked_array(X, mask=X == X[2, 1])
    frame = pandas.DataFrame(X).astype("Float64")
    frame.iloc[2, 1] = pandas.NA
    missing = X.copy()
    missing[2, 1] = np.nan
    table = polars.DataFrame(missing).with_columns(polars.all().fill_nan(None))
    for values in (frame, missing, table, missing.astype(object), frame.astype(object)):
        with pytest.raises(ValueError, match=r"X must be finite, but contains NaN at X\[2, 1\]"):
            trainer(64).fit(values, y)
    for values in (masked, list(masked), tuple(masked)):
        with pytest.raises(ValueError, match=r"X has masked entries.*filled"):
            trainer(64).fit(values, y)
    with pytest.raises(ValueError, match="y has masked entries"):
        trainer(64).fit(X, np.ma.masked_less(y, 0))
    column = pandas.Series(y, dtype="Float64").where(pandas.Series(y) != y[4])
    with pytest.raises(ValueError, match=r"y must be finite, but contains NaN at y\[4\]"):
        trainer(64).fit(X, column)
    with pytest.raises(ValueError, match="W has masked entries"):
        MaxTrees(X, masked)
    with pytest.raises(ValueError, match="js has masked entries"):
        MaxTrees(X, X).update_many(np.ma.masked_equal([1, 2], 2), X[:2])
    expected = trainer(64, shift=0.0, max_iter=1).fit(X, y).predict(X)
    for values in (np.ma.masked_array(X), pandas.DataFrame(X).astype("Float64"), list(X)):
        found = trainer(64, shift=0.0, max_iter=1).fit(values, y).predict(X)
        np.testing.assert_array_equal(found, expected)


@core
def test_what_is_no_array_yet_is_named_with_what_makes_it_one():
    X, y = problem(6, 3)
    with pytest.raises(TypeError, match=r"X must be .* an object LazyFrame; pass X.collect\(\)"):
        trainer(64).fit(polars.DataFrame(X).lazy(), y)
    with pytest.raises(TypeError, match=r"y must be .* an object LazyFrame; pass y.collect\(\)"):
        trainer(64).fit(X, polars.DataFrame({"y": y}).lazy())
    fitted = trainer(64, shift=0.0, max_iter=1).fit(X, y)
    with pytest.raises(TypeError, match=r"X must be .* an object LazyFrame; pass X.collect\(\)"):
        fitted.predict(polars.DataFrame(X).lazy())
    with pytest.raises(TypeError, match="X must be an array of numbers, got an object generator"):
        trainer(64).fit((row for row in X), y)


@searches
@pytest.mark.parametrize("normalize", [None, "rows", "lift"])
def test_arrays_mapped_read_only_train_and_train_on(search, normalize, tmp_path):
    X, y = problem(20, 3)
    for name, array in (("X", X), ("y", y)):
        np.save(tmp_path / f"{name}.npy", array)
    mapped = [np.load(tmp_path / f"{name}.npy", mmap_mode="r") for name in "Xy"]
    results = []
    for points, targets in ((X, y), mapped):
        options = {"search": search, "normalize": normalize, "shift": 0.5, "warm_start": True}
        fitted = trainer(400, damping=1e-3, max_iter=2, **options).fit(points, targets)
        check(fitted.fit(points, targets).fit(points[:12], targets[:12]).fit(points, targets))
        results.append(fitted.predict(points))
    assert_all_equal(results[1:], results[:1])


@core
def test_public_functions_take_arrays_that_cannot_be_written():
    rng = np.random.default_rng(0)
    arrays = [problem(6, 3)[0], rng.standard_normal((40, 3)), rng.choice([-1.0, 1.0], 40)]
    results = []
    for make in (lambda array: array, lambda array: array.astype(">f8")[::1]):
        X, W, signs = map(make, arrays)
        for array in (X, W, signs):
            array.setflags(write=False)
        indptr, indices = csr_of(X @ W.T >= 0.3)
        indptr.setflags(write=False), indices.setflags(write=False)
        J, trees = SparseJacobian(X, signs, indptr, indices), MaxTrees(X, W)
        trees.update_many(np.arange(6), X)
        kernel = shifted_ntk(X, 0.3), separability(X), smallest_ntk_eigenvalue(X, 0.3)
        results.append([J.gram(), J @ W.ravel(), J.T @ X[:, 0], *trees.query_all(0.2), *kernel])
        results[-1] += [sketch(J, 24, 0) for sketch in SKETCHES]
    assert_all_equal(*results)


# ==================================================================================================
# Checks of input
# ==================================================================================================

X5, Y5 = problem(5, 3)
NAN = np.array([[1.0, 0.0], [np.nan, 1.0]])
FEW = np.ones((4, 3))


def fit(X=X5, y=Y5, **options):
    return lambda: SublinearTrainer(**{"width": 64, "random_state": 0, **options}).fit(X, y)


def fitted(use):
    return lambda: use(trainer(64, shift=0.0, max_iter=0).fit(X5, Y5))


def unfitted(use):
    return lambda: use(SublinearTrainer())


def trees(use):
    return lambda: use(MaxTrees(np.ones((2, 3)), np.ones((20, 3))))


def jacobian(X=X5, signs=FEW[:, 0], indptr=(0, 1, 2, 3, 4, 5), indices=(0, 1, 2, 3, 0)):
    return SparseJacobian(X, signs, indptr, indices)


# Each refusal: what is called, how the message begins or goes on.
REFUSED = {
    ValueError: [
        (fit(X=X5[0]), r"X must have 2 dimension\(s\), got shape \(3,\). Reshape your data: pass"),
        (fit(X=X5[None]), r"X must have 2 dimension\(s\), got shape \(1, 5, 3\)"),
        (fit(X=X5[:0], y=[]), r"X must not be empty, but has 0 sample\(s\) \(shape=\(0, 3\)\)"),
        (fit(X=X5[:, :0]), r"X must not be empty, but has 0 feature\(s\) \(shape=\(5, 0\)\)"),
        (
            fit(X=NAN, y=[1, 2]),
            r"X must be finite, but contains NaN at X\[1, 0\]; remove or impute",
        ),
        (fit(X=[[1, np.inf]], y=[1]), r"X must be finite, but contains inf at X\[0, 1\]"),
        (fit(X=[[10**400, 1]], y=[1]), r"X must be finite, but has an integer beyond all floats"),
        (fit(X=X5 + 0j), r"Complex data not supported: X must be real; pass its real part"),
        (fit(X=[[1], [3, 2]], y=[1, 2]), r"X must be an array, but its rows have different length"),
        (fit(y=Y5[:4]), r"y must have 5 entries, one for each row of X, got 4"),
        (fit(y=np.ones((5, 2))), r"y must have 1 dimension\(s\), got shape \(5, 2\)"),
        (fit(y=None), r"fit requires y to be passed, but the target y is None"),
        (fit(y=[1, 2, np.nan, 4, 5]), r"y must be finite, but contains NaN at y\[2\]"),
        (fit(y=Y5 * 1j), r"Complex data not supported: y must be real"),
        (fit(X=2 * X5, normalize=None), r"rows of X must have length 1, but row \d has length 2; "),
        (fit(X=2 * X5, normalize=None), r'pass X / np.linalg.norm.*normalize="rows" or "lift"'),
        (
            fit(X=X5[:1], y=[1.0], normalize="rows"),
            r'row 0 of X is zero, up to rounding, once columns are.*"lift"',
        ),
        # options
        (fit(width=0), r"width must be at least 1, got 0"),
        (fit(width=65), r'"antisymmetric" needs an even width, got 65; use it \+- 1, or init="gau'),
        (
            fit(width=2**51, shift=40.0),
            r"width must be at most 1125899906842624, got 2251799813685248",
        ),
        (fit(width=10**400), r"width must be at most 1125899906842624, got more than 2\^80"),
        (fit(shift=10**400), r"shift must be finite, got an integer beyond all floats"),
        (fit(shift=np.nan), r"shift must be finite, got nan"),
        (fit(search="fast"), r"search must be one of 'dense', 'scan', 'tree', 'lazy', got 'fast'"),
        (fit(search=["tree"]), r"search must be one of 'dense'.*, got \['tree'\]"),
        (fit(solver="lu"), r"must be one of 'cholesky', 'sketch', 'richardson', 'cg', 'gradient',"),
        (fit(sketch="fft"), r"sketch must be one of 'sparse', 'srht', 'gaussian', got 'fft'"),
        (fit(sketch_size=0), r"sketch_size must be at least 1, got 0"),
        (fit(sketch_size=4, solver="sketch"), r"must be at least the number 5 of points, got 4"),
        (fit(sketch_size=4, solver="richardson"), r"sketch_size must be at least the number 5 of"),
        (fit(init="zeros"), r"init must be one of 'antisymmetric', 'gaussian', got 'zeros'"),
        (fit(dtype="float16"), r"dtype must be one of 'float32', 'float64', got 'float16'"),
        (fit(normalize="columns"), r"normalize must be one of 'lift', 'rows'.*, got 'columns'"),
        (fit(alpha=1.0), r"alpha must be a finite number in \[0, 1\), got 1.0"),
        (fit(alpha=-0.1), r"alpha must be a finite number in \[0, 1\), got -0.1"),
        (fit(damping=-1), r"damping must be a finite number in \[0, inf\), got -1"),
        (fit(damping=np.nan), r"damping must be a finite number in \[0, inf\), got nan"),
        (fit(verbose=3), r"verbose must be one of 0, 1, 2, got 3"),
        (fit(warm_start="yes"), r"warm_start must be one of False, True, got 'yes'"),
        (fit(tol=np.nan), r"tol must be a finite number in \[0, inf\), got nan"),
        (fit(max_iter=-1), r"max_iter must be at least 0, got -1"),
        (fit(random_state=-1), r"random_state must be at least 0, got -1"),
        (fit(random_state=2**64), r"random_state must be below 2\^64, got 18446744073709551616"),
        (unfitted(lambda net: net.set_params(depth=3)), r"parameter must be one of 'width', 'shi"),
        # trained networks
        (fitted(lambda net: net.predict(X5[:, :2])), r"X has 2 features, but .* expecting 3 feat"),
        (fitted(lambda net: net.predict(X5[0])), r"X must have 2 dimension\(s\)"),
        (fitted(lambda net: net.predict(2 * X5)), r"rows of X must have length 1, but row \d has"),
        (fitted(lambda net: net.score(X5, Y5[:4])), r"y must have 5 entries, one for each row of"),
        (fitted(lambda net: net.score(X5, Y5[:1])), r"y must have 5 entries, .* of X, got 1"),
        (fitted(lambda net: net.score(X5, np.eye(5))), r"y must have 1 dimension\(s\), got shape"),
        # trees
        (lambda: MaxTrees(FEW[0], FEW), r"X must have 2 dimension\(s\), got shape \(3,\)"),
        (lambda: MaxTrees(FEW, NAN), r"W must be finite, but contains NaN at W\[1, 0\]"),
        (lambda: MaxTrees(FEW, FEW[:0]), r"W must not be empty"),
        (lambda: MaxTrees(FEW, FEW[:, :2]), r"W has 2 columns and X has 3; they must agree"),
        (trees(lambda t: t.query(0, np.nan)), r"tau must be a number, possibly infinite, got nan"),
        (trees(lambda t: t.query(0, "1")), r"tau must be a number, possibly infinite, got '1'"),
        (trees(lambda t: t.query(0, b"1")), r"tau must be a number, possibly infinite, got b'1'"),
        (trees(lambda t: t.query(0, None)), r"tau must be a number, possibly infinite, got None"),
        (trees(lambda t: t.query(0, 1j)), r"tau must be a number, possibly infinite, got 1j"),
        (trees(lambda t: t.query_all([0.0])), r"tau must be a number, possibly infinite"),
        (trees(lambda t: t.update(0, FEW[0, :2])), r"w must have 3 entries, one for each column o"),
        (
            trees(lambda t: t.update(0, [1, 2, np.nan])),
            r"w must be finite, but contains NaN at w\[2\]",
        ),
        (trees(lambda t: t.update_many([3, 5, 3], FEW[:3])), r"js must be distinct, but 3 occurs "),
        (trees(lambda t: t.update_many([1, 2], FEW)), r"W_new must have 2 rows, one for each of j"),
        # Jacobian and sketches
        (lambda: jacobian(X=X5[0]), r"X must have 2 dimension\(s\)"),
        (lambda: jacobian(signs=FEW), r"signs must have 1 dimension\(s\)"),
        (lambda: jacobian(signs=[1.0, -1.0, 0.5, 1.0]), r"signs must be \+1 or -1, but signs\[2\]"),
        (lambda: jacobian(indptr=[0, 5]), r"from 0 to indices.size = 5 in 6 entries.*; got 2 entr"),
        (lambda: jacobian(indptr=[0, 2, 1, 3, 4, 5]), r"indptr must rise from 0"),
        (lambda: jacobian(indptr=np.uint64([0, 2, 1, 3, 4, 5])), r"indptr must rise from 0"),
        (lambda: jacobian(indptr=[0, 2, 2, 3, 4, 5], indices=[1, 1, 0, 0, 0]), r"at most once for"),
        (lambda: jacobian().matvec(FEW[0]), r"dimension mismatch"),
        (lambda: jacobian().matvec(np.ones(12) * 1j), r"Complex data not supported: u must be rea"),
        (
            lambda: jacobian().rmatvec(np.full(5, np.nan)),
            r"v must be finite, but contains NaN at v\[0\]",
        ),
        (lambda: jacobian().gram_times(FEW[0]), r"v must have 5 entries"),
        (lambda: jacobian().gram_times(X5), r"v must have 1 dimension"),
        (lambda: gaussian_sketch(jacobian(), 0, 0), r"size must be at least 1, got 0"),
        # theory
        (lambda: default_shift(0), r"width must be at least 1, got 0"),
        (lambda: default_shift(10, alpha=1.5), r"alpha must be a finite number in \[0, 1\), got 1"),
        (lambda: separability([1.0, 2.0]), r"X must have 2 dimension\(s\), got shape \(2,\)"),
        (lambda: separability(NAN), r"X must be finite, but contains NaN at X\[1, 0\]"),
        (lambda: shifted_ntk(3 * X5, 0.5), r"rows of X must have length 1, but row \d has length "),
        (lambda: shifted_ntk(X5, np.inf), r"shift must be finite, got inf"),
        (lambda: smallest_ntk_eigenvalue(X5[0], 0.5), r"X must have 2 dimension\(s\), got shape"),
        (lambda: smallest_ntk_eigenvalue(3 * X5, 0.5), r"rows of X must have length 1, but row \d"),
        (
            lambda: ntk_eigenvalue_bounds(NAN, 0.5),
            r"X must be finite, but contains NaN at X\[1, 0\]",
        ),
        (lambda: ntk_eigenvalue_bounds(3 * X5, 0.5), r"rows of X must have length 1, but row \d"),
        (lambda: ntk_eigenvalue_bounds(X5, -0.5), r"shift must be a finite number in \[0, inf\), "),
        (lambda: ntk_eigenvalue_bounds(X5, np.nan), r"shift must be .* in \[0, inf\), got nan"),
        (lambda: ntk_eigenvalue_bounds(X5[:1], 0.5), r"at least 2 rows for a separability, got 1"),
    ],
    TypeError: [
        (fit(X=[["a", "b"]], y=[1]), r"X must be an array of numbers, got dtype <U1; encode it as"),
        (fit(X=[[object()]], y=[1]), r"array of numbers, but of its entries: float\(\) argument m"),
        (fit(X=None), r"X must be an array of numbers, got None"),
        (fit(X=scipy.sparse.csr_matrix(X5)), r"X is a sparse matrix, .* not supported; pass X.toa"),
        (fit(y=["a"] * 5), r"y must be an array of numbers, got dtype <U1"),
        (fit(width=2.5), r"width must be an integer, got 2.5; pass int\(width\)"),
        (fit(width=True), r"width must be an integer, got True"),
        (fit(width="wide"), r"width must be an integer, got 'wide'"),
        (fit(sketch_size=8.0), r"sketch_size must be an integer, got 8.0"),
        (fit(shift="big"), r"shift must be a number or \"auto\" or \"paper\", got 'big'"),
        (fit(shift=np.ones(2)), r"shift must be a number, got array"),
        (fit(damping=None), r"damping must be a number, got None"),
        (fit(damping="automatic"), r"damping must be a number or \"auto\", got 'automatic'"),
        (fit(tol="tight"), r"tol must be a number, got 'tight'"),
        (fit(max_iter=1.5), r"max_iter must be an integer, got 1.5"),
        (fit(callback=3), r"callback must be callable, got 3"),
        (fit(random_state="seed"), r"random_state must be an integer, got 'seed'"),
        (trees(lambda t: t.query(0.0, 0.0)), r"i must be an integer, got 0.0"),
        (trees(lambda t: t.update_many([0.5], FEW[:1])), r"js must be a non-empty vector of integ"),
        (trees(lambda t: t.update_many([], FEW[:0])), r"js must be a non-empty vector of integers"),
        (lambda: jacobian(indices=[0, 1, 2, 3, 1.5]), r"indices must be a vector of integers"),
        (lambda: sparse_sign_sketch(FEW, 8, 0), r"J must be a SparseJacobian, got ndarray"),
        (lambda: srht_sketch(jacobian().tocsr(), 8, 0), r"J must be a SparseJacobian, got csr_mat"),
        (lambda: sparse_sign_sketch(jacobian(), 8.5, 0), r"size must be an integer, got 8.5"),
        (lambda: shifted_ntk(X5, None), r"shift must be a number, got None"),
        (lambda: smallest_ntk_eigenvalue(X5, "b"), r"shift must be a number, got 'b'"),
    ],
    IndexError: [
        (trees(lambda t: t.query(2, 0.0)), r"i must be in 0..1, got 2"),
        (trees(lambda t: t.query(-1, 0.0)), r"i must be in 0..1, got -1"),
        (trees(lambda t: t.update(20, FEW[0])), r"j must be in 0..19, got 20"),
        (trees(lambda t: t.update_many([0, 20], FEW[:2])), r"js must be in 0..19, got 20"),
        (trees(lambda t: t.update_many([-1], FEW[:1])), r"js must be in 0..19, got -1"),
        (lambda: jacobian(indices=[0, 1, 2, 3, 4]), r"indices must be in 0..3, got 0..4"),
        (lambda: jacobian(indices=[0, 1, 2, 3, -1]), r"indices must be in 0..3, got -1..3"),
    ],
    MemoryError: [
        (fit(width=2**40, shift=0.5), r"weights of \d+ neurons, most of which fire .* would ne"),
        (fit(width=2**40, shift=0.5), r"[\d,.]+ GiB, but [\d,.]+ GiB are available; use fewer neu"),
        (fit(width=2**40, search="scan"), r"[\d,.]+ GiB, but"),
        (fit(width=2**40, search="dense"), r"32,768\.0 GiB, but"),
        (fit(sketch_size=2**50, solver="sketch"), r"a sketch with sketch_size=1125899906842624 wo"),
        (
            lambda: MaxTrees(np.ones((1 << 20, 1)), np.ones((1 << 20, 1))),
            r"MaxTrees of 1048576 points and 1048576 neurons would need 8,7\d\d\.\d GiB",
        ),
    ],
    NotFittedError: [
        (unfitted(lambda net: net.predict(X5)), r"not fitted yet; call fit\(X, y\) first"),
        (unfitted(lambda net: net.score(X5, Y5)), r"not fitted yet"),
        (unfitted(lambda net: net.weights()), r"not fitted yet"),
        (unfitted(lambda net: net.active_sets()), r"not fitted yet"),
        (unfitted(lambda net: net.signs_), r"not fitted yet"),
        (unfitted(lambda net: net.loss_curve_), r"not fitted yet"),
    ],
}


@core
@pytest.mark.as_it_pays
@pytest.mark.parametrize(
    "error, call, message",
    [(error, *row) for error, rows in REFUSED.items() for row in rows],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_bad_input_is_refused_by_name(error, call, message):
    with pytest.raises(error, match=message):
        call()


# ==================================================================================================
# Threads
# ==================================================================================================


@core
@pytest.mark.parametrize("work", [0, 1 << 16, 1 << 26])
def test_shares_of_the_chunks_come_in_order_each_once(work):
    most = numba.get_num_threads()
    shares = sublin._in_threads(lambda *share: share, work)
    assert [low for _, low, _ in shares] == [0, *(high for _, _, high in shares[:-1])]
    assert shares[-1][2] == sublin.CHUNKS
    assert {thread for thread, _, _ in shares} <= set(range(most if work else 1))
    alone = sublin._in_threads(lambda *share: share, work, most=1)
    assert {thread for thread, _, _ in alone} == {0}


@core
@pytest.mark.parametrize("failing", [0, sublin.CHUNKS - 1])
@pytest.mark.parametrize("error", [MemoryError, IndexError])
def test_a_share_that_fails_says_so_when_no_other_is_running(failing, error):
    running = set()

    def task(thread, low, high):
        running.add(thread)
        time.sleep(0.002)
        running.discard(thread)
        if low <= failing < high:
            raise error("of this share")

    before = surroundings()
    with pytest.raises(error, match="of this share"):
        sublin._in_threads(task, 1 << 26)
    assert not running and surroundings() == before
    assert len(sublin._in_threads(lambda *share: share, 1 << 16)) == numba.get_num_threads()


@core
def test_blas_is_given_back_when_all_who_asked_are_done():
    pytest.importorskip("threadpoolctl")
    before = blas_threads()
    with sublin._one_blas_thread():
        with pytest.raises(KeyError), sublin._one_blas_thread():
            assert set(blas_threads()) == {1}
            raise KeyError
        assert set(blas_threads()) == {1}
    assert blas_threads() == before


def test_fits_in_several_threads_at_once_have_the_bits_of_one_alone():
    code = """if True:
        import threading
        import numpy as np
        from sublin import SublinearTrainer

        rng = np.random.default_rng(0)
        X, y = rng.standard_normal((64, 32)), rng.standard_normal(64)

        def fit(found):
            net = SublinearTrainer(1 << 16, random_state=0, max_iter=3, tol=0.0)
            found.append(net.fit(X, y).loss_curve_)
            return found[-1]

        alone, together = fit([]), []
        threads = [threading.Thread(target=fit, args=(together,)) for _ in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert together == [alone] * 3, "in threads"
    """
    printed_by(code)
    printed_by(code, NUMBA_THREADING_LAYER="workqueue")


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no forks")
def test_forks_compute_what_their_parent_does_with_every_method():
    code = """if True:
        import multiprocessing
        import numpy as np
        import sublin
        from sublin import MaxTrees, SublinearTrainer, smallest_ntk_eigenvalue, sparse_sign_sketch

        rng = np.random.default_rng(0)
        X, y = rng.standard_normal((64, 32)), rng.standard_normal(64)
        unit = X / np.linalg.norm(X, axis=1, keepdims=True)
        W = rng.standard_normal((1 << 14, 32))

        def result(method):
            if method == "trees":
                trees = MaxTrees(unit, W)
                trees.update_many(np.arange(100), W[100:200])
                return trees.query_all(2.0)[1].sum(), smallest_ntk_eigenvalue(unit, 1.0)
            search, solver = method
            options = {"search": search, "solver": solver, "max_iter": 2, "random_state": 0}
            net = SublinearTrainer(1 << 14, **options).fit(X, y)
            return net.residual_, net.predict(X).tolist(), net.active_sets()[1].sum()

        methods = [(search, "cholesky") for search in sublin.SEARCHES]
        methods += [("lazy", "sketch"), ("lazy", "cg"), ("tree", "gradient"), "trees"]
        alone = list(map(result, methods))
        with multiprocessing.get_context("fork").Pool(2) as pool:
            assert pool.map_async(result, methods).get(timeout=90) == alone
    """
    printed_by(code)


def test_a_fit_in_the_background_goes_on_when_the_main_thread_has_ended():
    code = """if True:
        import threading, time
        import numpy as np
        from sublin import SublinearTrainer

        rng, ended = np.random.default_rng(0), threading.Event()
        X, y = rng.standard_normal((64, 8)), rng.standard_normal(64)

        def slow(record):
            ended.set()
            time.sleep(0.5 * (record["iteration"] < 2))

        net = SublinearTrainer(1 << 16, random_state=0, max_iter=3, tol=0.0, callback=slow)
        threading.Thread(target=lambda: print(net.fit(X, y).n_iter_)).start()
        ended.wait()
    """
    assert printed_by(code) == "3\n"


# ==================================================================================================
# Ranks
# ==================================================================================================


SPREAD = {  # options of the trainer, and constants of the module
    "random": ({}, {}),
    "digits": ({"normalize": "lift", "shift": "auto"}, {}),
    "one block for many": ({}, {"BLOCK": sublin.BLOCK, "PROPOSED": sublin.PROPOSED}),
    "few live": ({"width": 2048, "shift": 3.4}, {"BLOCK": 256}),
    "lean": (
        {"width": 20000, "shift": 1.5, "damping": 1e-2, "draw": "live", "tol": 1e-13},
        {"REACH": 0.3, "LEAST_REACH": 0.0},
    ),
    "rejected": ({"width": 400}, {}),
    "streamed again": ({"damping": 0.1, "tol": 1e-12}, {"MOMENTS": 1, "MARGIN": 0.05}),
    "stopped": ({}, {}),
    "two blocks": ({"width": 128, "draw": "all", "init": "gaussian"}, {}),
    "gaussian": ({"init": "gaussian"}, {}),
    "ridge": ({"ridge": 0.1}, {}),
    "sketch": ({"solver": "sketch"}, {}),
    "seen": ({"draw": "live", "shift": 1.5}, {}),
}
IN_WORDS = ("random", "digits", "rejected", "streamed again", "two blocks", "gaussian", "ridge")
ON_RANKS = [kind for kind in SPREAD if kind != "digits"] + [f"{kind}, words" for kind in IN_WORDS]


def spread(name, comm, folder):
    """Fits and what follows, on the ranks of a communicator or alone: what all ranks must agree on,
    and one process too. Blocks are small, so that there are many."""
    (X, y), (others, targets) = problem(14, 3), problem(9, 3, seed=9)
    kind, _, words = name.partition(", ")
    own, constants = SPREAD[kind]
    options = {"width": 3000, "shift": 0.8, "damping": "auto", "tol": 1e-9, "max_iter": 8} | own
    seen = []
    if kind == "lean":
        (X, y), others = problem(6, 4), problem(9, 4, seed=9)[0]
        y = 0.1 * y
    elif kind == "rejected":
        y = 100.0 * y
    elif kind == "digits":
        X, y = load_digits(return_X_y=True)
        X, y, others, targets = X[:150], y[:150], X[150:160], y[150:160]
    told = {}

    def tell(when, fitted):
        keys = [key for key in fitted.history_[0] if "seconds" not in key]
        told[f"history {when}"] = np.array([values_of(fitted, key) for key in keys], float)
        told[f"predictions {when}"] = fitted.predict(others)
        told[f"active {when}"] = np.concatenate(fitted.active_sets())
        told[f"residual {when}"] = np.array([fitted.residual_, fitted.n_live_, fitted.n_iter_])
        told[f"signs {when}"] = fitted.signs_
        path = Path(folder) / "net.npz"
        fitted.save(path)
        with np.load(path) as file:
            told.update({f"{key} in the file {when}": file[key] for key in file if key != "about"})
            about = json.loads(file["about"].tobytes())
        history = [
            {key: value for key, value in record.items() if "seconds" not in key}
            for record in about.pop("history_")
        ]
        del about["init_seconds_"]
        told[f"about {when}"] = np.frombuffer(repr((about, history)).encode(), np.uint8)
        told[f"loaded {when}"] = SublinearTrainer.load(path).predict(others)
        if comm:
            comm.Barrier()  # before another is written
        return path

    def watch(record):
        seen.append(record["iteration"])
        told[f"in the callback {record['iteration']}"] = fitted.predict(others[:2])
        last = comm is None or comm.rank == comm.size - 1
        return last and name == "stopped" and record["iteration"] == 2

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sublin, "_words_are_faster", lambda *_: bool(words))
        begun = Broken(sublin._Lazy._begin_again, 0, None)
        patch.setattr(sublin._Lazy, "_begin_again", begun)
        for constant, value in ({"BLOCK": 64, "PROPOSED": 64} | constants).items():
            patch.setattr(sublin, constant, value)
        asks = {"callback": watch} if name in ("stopped", "random") else {}
        fitted = trainer(**options, comm=comm, **asks)
        fitted.fit(X, y)
        tell("at first", fitted)
        check(fitted)
        fitted.set_params(callback=None, warm_start=True, max_iter=2).fit(X, 1.1 * y)
        tell("with other targets", fitted)
        if name in ("seen", "gaussian, words", "random"):
            told["weights"] = fitted.weights()
        fitted.fit(others, targets)
        path = tell("on other points", fitted)
        check(fitted)
        again = SublinearTrainer.load(path).set_params(comm=comm).fit(X, y)
        tell("loaded, and on the first points again", again)
        told["its weights"] = again.weights()
        told["a copy's"] = copy.deepcopy(again).predict(X)
    held = fitted._search.live.size
    facts = {"rejected": values_of(fitted, "rejected").sum(), "held": held, "seen": len(seen)}
    facts["begun again"] = next(begun.calls) - 1
    return told, facts


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """What one process tells."""
    folder = tmp_path_factory.mktemp("alone")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return {name: spread(name, None, folder) for name in ON_RANKS}


def test_regimes_on_ranks_are_what_they_are_called(alone):
    facts = {name: facts for name, (_, facts) in alone.items()}
    assert facts["rejected"]["rejected"] > 0 and facts["rejected, words"]["rejected"] > 0
    assert facts["few live"]["held"] < 20
    assert facts["stopped"]["seen"] == 3 < facts["random"]["seen"]
    assert facts["lean"]["begun again"] > 0


@pytest.mark.parametrize("ranks, threads", [(1, 2), (2, 1), (3, 2), (5, 1)])
def test_any_number_of_ranks_gives_the_bits_of_one_process(ranks, threads, alone, tmp_path):
    code = """if True:
        import sys
        from pathlib import Path
        import numpy as np
        from mpi4py import MPI
        import test_sublin

        comm, folder = MPI.COMM_WORLD, Path(sys.argv[1])
        for number, name in enumerate(test_sublin.ON_RANKS):
            told, facts = test_sublin.spread(name, comm, folder)
            held = comm.gather(facts["held"])
            if comm.rank in (0, comm.size - 1):  # what ranks tell is the same on all
                np.savez(folder / f"{number} {comm.rank}.npz", **told)
            if comm.rank == 0:
                np.save(folder / f"{number} held.npy", held)
    """
    printed_by(code, str(tmp_path), ranks=ranks, NUMBA_NUM_THREADS=str(threads))
    for number, name in enumerate(ON_RANKS):
        for rank in {0, ranks - 1}:
            with np.load(tmp_path / f"{number} {rank}.npz") as told:
                assert set(told) == set(alone[name][0])
                for what, expected in alone[name][0].items():
                    assert told[what].tobytes() == expected.tobytes(), (name, what)
        held = np.load(tmp_path / f"{number} held.npy")
        assert held.sum() == alone[name][1]["held"]
        if name == "one block for many" or "two blocks" in name:
            assert (held > 0).sum() == min(ranks, 1 + ("two" in name))
        elif name == "few live":
            assert (held == 0).any() or ranks < 5
        else:
            assert (held > 0).all()


# What one rank does, and how the run ends: the exception on that rank and on the others, and words
# of the message.
REFUSES = "ValueError", "ValueError"
INTERRUPTED = *["KeyboardInterrupt"] * 2, "rank 1 was ended by KeyboardInterrupt"
FULL = "MemoryError", "RuntimeError", "by MemoryError: full"
ENOUGH = "LookupError", "RuntimeError", "rank 1 was ended by LookupError: enough"
DIFFERS = *REFUSES, "the network of the last fit must be the same"
ENDS = {
    "other X": ("X = X + (rank == 1)", *REFUSES, "X must be the same on all"),
    "X of another shape": ("X = X[: 40 + rank]; y = y[: 40 + rank]", *REFUSES, "X must"),
    "other y": ("y = y * (1 + rank)", *REFUSES, "y must be the same on all ranks"),
    "an infinite X": ("X[rank, 0] /= 1 - rank", *REFUSES, "X must be finite"),
    "other options": ("options['width'] += 2 * rank", *REFUSES, "width must be the same"),
    "other seeds": ("options['random_state'] = rank", *REFUSES, "random_state must be"),
    "a callback": ("options['callback'] = fails if rank else None", *ENOUGH),
    "no memory": ("breaks(sublin, '_look')", *FULL),
    "while drawing": ("breaks(sublin._LiveBlocks, 'block')", *FULL),
    "in the solver": ("breaks(sublin._Cholesky, 'solve')", *FULL),
    "in the last pass": ("sublin.DOUBT = -1.0; breaks(sublin, '_add_active_outputs')", *FULL),
    "the end of the step": ("breaks(net, '_tell')", *FULL),
    "other bits": ("differs()", *["RuntimeError"] * 2, "ranks have computed other bits"),
    "an interrupt": ("options['callback'] = interrupts if rank else None", *INTERRUPTED),
    "an interrupt while drawing": (
        "ahead(sublin._LiveBlocks, 'block', interrupts)",
        *INTERRUPTED,
    ),
    "another search": ("options['search'] = 'tree'", *REFUSES, 'use search="lazy" with'),
    "predictions": ("use = lambda: net.predict(X + rank)", *REFUSES, "X must be the s"),
    "a caught error in a callback": ("options['callback'] = catches", *FULL),
    "an error that a callback catches on the others": (
        "options['callback'] = fails if rank else catches",
        *ENOUGH,
    ),
    "predictions of another trainer in a callback": (
        "net = fitted(); options['callback'] = asks_another",
        *ENOUGH,
    ),
    "predictions on one rank": (
        "options['callback'] = predicts if rank else None",
        *["RuntimeError"] * 2,
        "or have made other calls",
    ),
    "going on": (
        "net.set_params(**options).fit(X, y); options['warm_start'] = bool(rank)",
        *REFUSES,
        "warm_start must be the same on all ranks",
    ),
    "other networks": (
        "net = alone(rank); options = {'comm': comm, 'warm_start': True}",
        *DIFFERS,
    ),
    "networks seen": (
        "net = alone(0, rank); options = {'comm': comm, 'warm_start': True}; X = X + 0.1",
        *DIFFERS,
    ),
    "a file": (
        "patch.setattr(sublin, '_write_whole', full_disk); use = lambda: net.save('nowhere')",
        *("OSError", "RuntimeError", "rank 0 was ended by OSError: disk"),
    ),
}


@pytest.mark.parametrize("ranks", [2, 3])
def test_what_ends_one_rank_ends_all_with_the_cause(ranks):
    """One run for all, since processes take seconds to begin. After each end all ranks go on."""
    code = """if True:
        import json, os, signal, time
        import numpy as np
        import pytest
        from mpi4py import MPI
        import sublin
        from test_sublin import ENDS

        comm = MPI.COMM_WORLD
        rank = int(comm.rank == 1)
        sublin._words_are_faster = lambda *_: False

        def fails(record):
            if record["iteration"] == 2:
                raise LookupError("enough")

        def interrupts(record):
            if record["iteration"] == 1:
                os.kill(os.getpid(), signal.SIGINT)

        def full_disk(*arguments):
            raise OSError("disk")

        for name, (does, *_) in ENDS.items():
            rng = np.random.default_rng(0)
            X, y = rng.standard_normal((64, 4)), rng.standard_normal(64)
            options = {"width": 1 << 16, "random_state": 0, "shift": 2.5, "max_iter": 6, "tol": 0}
            net = sublin.SublinearTrainer(comm=comm)
            with pytest.MonkeyPatch.context() as patch:

                def breaks(owner, name):
                    if rank:
                        patch.setattr(owner, name, broken)

                def catches(record):
                    if record["iteration"] != 2:
                        return
                    with pytest.MonkeyPatch.context() as inner:
                        if rank:
                            inner.setattr(sublin._Network, "outputs", broken)
                        try:
                            net.predict(X)
                        except RuntimeError:
                            pass

                def fitted():
                    global other
                    other = sublin.SublinearTrainer(1 << 14, comm=comm, max_iter=1, random_state=0)
                    other.fit(X, y)
                    return net

                def asks_another(record):
                    if rank:
                        fails(record)
                    other.predict(X)

                def predicts(record):
                    net.predict(X)

                def alone(seed, seen=False):
                    options = {"random_state": seed, "draw": "live", "shift": 2.5, "max_iter": 1}
                    net = sublin.SublinearTrainer(1 << 16, **options).fit(X, y)
                    if seen:
                        net.weights()
                    return net

                def broken(*arguments):
                    raise MemoryError("full")

                def ahead(owner, name, does):
                    work = getattr(owner, name)
                    def both(*arguments):
                        does({"iteration": 1})
                        return work(*arguments)
                    if rank:
                        patch.setattr(owner, name, both)

                def differs():
                    solve = sublin._Cholesky.solve
                    def other(*arguments):
                        step, inner = solve(*arguments)
                        return step * (1 + 1e-15 * rank), inner
                    patch.setattr(sublin._Cholesky, "solve", other)

                patch.setattr(sublin, "DOUBT", sublin.DOUBT)
                use = lambda: net.predict(X)
                begin, before = time.perf_counter(), signal.getsignal(signal.SIGINT)
                try:
                    exec(does)
                    net.set_params(**options).fit(X, y)
                    use()
                    found = "nothing"
                except BaseException as error:
                    found = f"{type(error).__name__}: {error}"
                assert time.perf_counter() - begin < 20
                assert signal.getsignal(signal.SIGINT) is before
            found = comm.gather(found)
            if comm.rank == 0:
                print(json.dumps([name, found]), flush=True)
            # The network is whole, and all ranks go on.
            net = sublin.SublinearTrainer(1 << 14, comm=comm, max_iter=1, random_state=0)
            net.fit(rng.standard_normal((20, 3)), rng.standard_normal(20)).check()
    """
    printed = printed_by(code, ranks=ranks, NUMBA_NUM_THREADS="1")
    ends = dict(map(json.loads, printed.splitlines()))
    assert list(ends) == list(ENDS)
    for name, (_, own, others, words) in ENDS.items():
        culprit = 0 if name == "a file" else 1
        for rank in range(ranks):
            expected = own if rank == culprit else others
            assert ends[name][rank].startswith(expected), (name, rank, ends[name])
        told = [text for rank, text in enumerate(ends[name]) if rank != culprit]
        assert all(words in text for text in told), (name, told)


@pytest.mark.parametrize("doubt, last", [("inf", 1), ("-inf", 2)])
def test_a_fit_sends_one_message_at_the_start_one_a_step_and_one_or_two_at_the_end(doubt, last):
    """Two where the last outputs come from a forward pass."""
    code = """if True:
        import json, sys
        from mpi4py import MPI
        import bench, sublin

        sublin.DOUBT = float(sys.argv[1])

        class Listed(bench.Counted):
            def Allreduce(self, sent, received):
                lengths.append(sent.size)
                return self.comm.Allreduce(sent, received)

        comm, lengths, n = Listed(MPI.COMM_WORLD), [], 12
        X, y = bench.random_unit_data(n, 5)
        net = sublin.SublinearTrainer(1 << 16, random_state=0, shift=2.0, comm=comm).fit(X, y)
        tried = sum(1 + record["rejected"] for record in net.history_[1:])
        if comm.rank == 0:
            print(json.dumps([lengths.count(n * n + 2 * n + 7), tried, max(lengths), n]))
    """
    printed = printed_by(code, doubt, ranks=2, NUMBA_NUM_THREADS="1")
    sent, tried, longest, n = json.loads(printed)
    assert tried >= 2 and sent == 1 + tried + last and longest == n * n + 2 * n + 7


def test_an_interrupt_of_one_process_ends_the_whole_run_with_the_cause(tmp_path):
    code = """if True:
        import os, sys, time
        from pathlib import Path
        import numpy as np
        from mpi4py import MPI
        from sublin import SublinearTrainer

        comm, rng = MPI.COMM_WORLD, np.random.default_rng(0)
        X, y = rng.standard_normal((64, 4)), rng.standard_normal(64)
        def slowly(record):
            time.sleep(0.05)
            if record["iteration"] == 3:
                (Path(sys.argv[1]) / str(comm.rank)).write_text(str(os.getpid()))
        options = {"random_state": 0, "max_iter": 10**6, "tol": 0.0, "damping": 1e4}
        SublinearTrainer(1 << 16, comm=comm, callback=slowly, **options).fit(X, y)
    """
    run = command(code, str(tmp_path), ranks=3)
    options = {"cwd": HERE, "stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    with subprocess.Popen(run, **options) as process:
        deadline = time.monotonic() + 60
        while len(list(tmp_path.iterdir())) < 3 and time.monotonic() < deadline:
            time.sleep(0.05)
        os.kill(int((tmp_path / "1").read_text()), signal.SIGINT)
        begin = time.perf_counter()
        output, _ = process.communicate(timeout=30)
        assert time.perf_counter() - begin < 10
    assert process.returncode != 0
    assert output.count("rank 1 was ended by KeyboardInterrupt") >= 2


def test_the_script_on_ranks_in_the_readme_runs_word_for_word(tmp_path):
    section = (HERE / "README.md").read_text("utf-8").partition("## Many processes")[2]
    script = re.search(r"^```python\n(.*?)^```", section, re.DOTALL | re.MULTILINE)[1]
    assert len([line for line in script.splitlines() if line]) == 6
    run = re.search(r"`(mpiexec [^`]*)`", section)[1]
    assert run == "mpiexec -n 2 python fit.py"
    shutil.copy(HERE / "sublin.py", tmp_path)
    (tmp_path / "fit.py").write_text(script)
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    done = finished(run.split(), tmp_path, PATH=path)
    assert done.returncode == 0 and done.stderr == "", done.stderr
    first, second = sorted(re.findall(r"rank \d of \d: residual \S{5}", done.stdout))
    assert first.startswith("rank 0 of 2") and second.startswith("rank 1 of 2")
    assert first[-5:] == second[-5:] and float(first[-5:]) < 1e-6


class Lonely:
    """A communicator of one process, of which nothing may be asked."""

    rank, size = 0, 1

    def Allreduce(self, *_):
        raise AssertionError

    Allgather = Allreduce


def test_a_communicator_of_one_rank_sends_nothing_and_other_things_are_none():
    X, y = problem(8, 4)
    for search in ("lazy", "tree"):
        fits = [trainer(comm=comm, search=search).fit(X, y) for comm in (None, Lonely())]
        assert_all_equal(*([f.predict(X), f.weights(), values_of(f)] for f in fits))
    with pytest.raises(TypeError, match="comm must be an mpi4py communicator, but int has no Allr"):
        trainer(comm=3).fit(X, y)


def test_neurons_that_are_spread_stay_with_their_ranks():
    class Two(Lonely):
        size = 2

    X, y = problem(8, 4)
    fitted = trainer(warm_start=True).fit(X, y)
    fitted._search.start = fitted._search.start._replace(ranks=sublin._Ranks(Two()))
    with pytest.raises(ValueError, match="comm must stay the same for warm_start=True to go on"):
        fitted.fit(X, y)


@given(st.lists(st.floats(-3.0, 3.0), min_size=1, max_size=60), st.integers(0, 40))
@thorough
def test_whole_numbers_add_up_to_the_sum_in_any_order(numbers, power):
    bound = 3.0 * 2.0**power
    ones, numbers = sublin._resolution(bound, 60), np.array(numbers) * 2.0**power
    forth, back = np.zeros((2, 2, 1), np.int64)
    for x in numbers:
        sublin._add_fixed(forth, 0, x, ones)
    for x in numbers[::-1]:
        back += sublin._to_fixed(np.array([x]), ones)
    assert np.array_equal(forth, back)
    error = abs(sublin._from_fixed(forth, ones)[0] - math.fsum(numbers))
    assert error <= 2.0**-52 * np.abs(numbers).sum() + 2.0**-70 * bound


# ==================================================================================================
# The module as a whole
# ==================================================================================================


def test_public_names_are_documented():
    for name in sublin.__all__:
        assert getattr(sublin, name).__doc__


def test_importing_takes_less_than_half_a_second_beyond_dependencies():
    code = """if True:
        import time, numpy, scipy.linalg, scipy.sparse.linalg, scipy.special, numba
        begin = time.perf_counter()
        import sublin
        print(time.perf_counter() - begin)
    """
    assert min(float(printed_by(code)) for _ in range(3)) < 0.5


FIT = """
import numpy as np
rng = np.random.default_rng(0)
X, y = rng.standard_normal((20, 4)), rng.standard_normal(20)
net = sublin.SublinearTrainer(1 << 10, shift=1.0, random_state=0, max_iter=3).fit(X, y)
print(net.predict(X).tobytes().hex())
"""
NO_PLACE = "machine code cannot be kept on disk"


def printed_without_a_place(code, folder, **environment):
    """What a process prints, and its warnings, where no folder of Numba's can be made."""
    (folder / "__pycache__").touch()  # a file, where a folder is wanted
    nowhere = {"HOME": "/dev/null", "XDG_CACHE_HOME": "/dev/null/cache", "NUMBA_CACHE_DIR": ""}
    run = command(code, warn="ignore:relative residual")
    done = finished(run, folder, **{"PYTHONDONTWRITEBYTECODE": "1", **nowhere, **environment})
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_without_a_place_for_machine_code_everything_works_and_one_warning_says_what_helps(
    tmp_path,
):
    module = HERE / "sublin.py"
    expected = printed_by("import sublin" + FIT)
    folder, zipped = tmp_path / "folder", tmp_path / "application.zip"
    folder.mkdir()
    shutil.copy(module, folder)
    with zipfile.ZipFile(zipped, "w") as file:
        file.write(module, "sublin.py")
    within = f"import sys; sys.path.insert(0, {str(zipped)!r}); import sublin"
    executed = "import types; sublin = types.ModuleType('sublin')"
    executed += f"; exec(open({str(module)!r}).read(), sublin.__dict__)"
    (tmp_path / "empty").mkdir()
    for code, where in (
        ("import sublin", folder),
        (within, tmp_path / "empty"),
        (executed, tmp_path / "empty"),
    ):
        printed, told = printed_without_a_place(code + FIT, where)
        assert printed == expected
        assert told.count(NO_PLACE) == 1 and "NUMBA_CACHE_DIR" in told
    place = {"NUMBA_CACHE_DIR": str(tmp_path / "place")}
    printed, told = printed_without_a_place("import sublin" + FIT, folder, **place)
    assert printed == expected and NO_PLACE not in told


def test_damaged_and_full_places_for_machine_code_are_compiled_anew(tmp_path):
    shutil.copy(HERE / "sublin.py", tmp_path)
    cache, code = tmp_path / "cache", "import sublin" + FIT

    def run(code):
        run = command(code, warn="ignore:relative residual")
        return finished(run, tmp_path, NUMBA_CACHE_DIR=str(cache))

    first = run(code)
    assert first.returncode == 0 and first.stderr == "", first.stderr
    files = sorted(cache.rglob("*.nb[ic]"))
    assert len(files) > 10
    for number, file in enumerate(files):  # emptied, cut short, or no pickle
        content = file.read_bytes()
        file.write_bytes((b"", content[: len(content) // 2], b"hello" + content)[number % 3])
    again = run(code)
    assert (again.returncode, again.stdout, again.stderr) == (0, first.stdout, "")
    assert sorted(cache.rglob("*.nb[ic]")) == files  # mended
    for file in files:
        file.unlink()
    full = "import resource, signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
    full += "resource.setrlimit(resource.RLIMIT_FSIZE, (100, 100))\n"
    done = run(full + code)
    assert (done.returncode, done.stdout) == (0, first.stdout), done.stderr
    assert done.stderr.count(NO_PLACE) == 1 and "File too large" in done.stderr


def test_an_alarm_while_machine_code_is_read_goes_to_the_caller(monkeypatch):
    function = sublin.numba.njit(lambda x: x + 1)
    place = sublin._MachineCode(sublin._dot.py_func)
    for name, call in (("load", place.load_overload), ("save", place.save_overload)):
        parent = f"{name}_overload"
        broken = Broken(getattr(sublin.FunctionCache, parent), 1, TimeoutError("alarm"))
        monkeypatch.setattr(sublin.FunctionCache, parent, broken)
        with pytest.raises(TimeoutError, match="alarm"):
            call(function, None)


@pytest.mark.parametrize(
    "package, least", [("numpy", "1.26"), ("scipy", "1.11"), ("numba", "0.59")]
)
def test_versions_that_lack_something_are_refused_in_one_line(package, least):
    version = {"numpy": "1.25.2", "scipy": "1.9.0rc1", "numba": "0.58.1"}[package]
    code = "import numba, numpy, scipy.special, scipy.sparse.linalg\n"
    code += f"{package}.__version__ = {version!r}\nimport sublin"
    done = finished(command(code))
    line = f"sublin needs {package} {least} or newer, but {version} is installed: pip install"
    assert done.returncode == 1 and f"ImportError: {line}" in done.stderr


def test_the_example_in_the_readme_prints_what_it_says():
    text = (HERE / "README.md").read_text("utf-8")
    example = re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    printed = re.search(r"^```text\n(.*?)^```", text[example.end() :], re.DOTALL | re.MULTILINE)
    assert printed_by(example[1], warn="default") == printed[1]


# ==================================================================================================
# The benchmark: peers
# ==================================================================================================


@pytest.fixture
def peers_problem():
    """The held-out points are those of the training, so that predictions have residuals."""
    X, y = problem(6, 4)
    return bench.Problem.of(3 * X, y + 2.0, 3 * X, y + 2.0, width=64, shift=0.5, damping=1e-3)


def logged_residuals(train, steps):
    """The first residuals that a peer logs."""
    residuals = []

    def log(residual, when=None):
        residuals.append(residual)
        if len(residuals) == steps:
            raise bench.Enough

    with pytest.raises(bench.Enough):
        train(log)
    return residuals


@pytest.mark.parametrize("name", bench.PEERS)
def test_a_peer_logs_the_residual_of_its_predictions(name, peers_problem):
    if name.startswith("torch"):
        pytest.importorskip("torch")
    y = peers_problem.y
    for options in bench.PEERS[name].grid:
        train, predict = bench.PEERS[name].start(peers_problem, **options)
        residual = logged_residuals(train, 1 if name == "kernel" else 3)[-1]
        expected = np.linalg.norm(predict() - y) / np.linalg.norm(y - y.mean())
        np.testing.assert_allclose(residual, expected, rtol=1e-4, atol=1e-6)


def test_plain_numpy_takes_the_steps_of_the_trainer(peers_problem):
    train, _ = bench.numpy_peer(peers_problem, damping=1e-3, dtype="float64")
    options = {**peers_problem.options, "tol": 0.0, "max_iter": 3, "search": "dense"}
    expected = values_of(SublinearTrainer(**options).fit(peers_problem.X, peers_problem.y))
    np.testing.assert_allclose(logged_residuals(train, 4), expected, rtol=1e-8)


@pytest.mark.parametrize("method", ["adam", "lbfgs"])
def test_the_first_step_in_pytorch_is_that_in_numpy(method, peers_problem):
    pytest.importorskip("torch")
    X, y, W, signs = peers_problem.arrays(np.float64)
    net = Net(X, W, signs, peers_problem.trainer.shift_)
    gradient = (net.dense_jacobian.T @ (net.outputs - y)).reshape(W.shape)
    if method == "adam":
        train, _ = bench.torch_adam(peers_problem, rate=0.5)
        move = 0.5 / 8.0 * gradient / (np.abs(gradient) + 1e-8)  # mean and variance of one gradient
    else:
        train, _ = bench.torch_lbfgs(peers_problem, step_size=0.5, line_search=None)
        move = 0.5 * min(1.0, 1.0 / np.abs(gradient).sum()) * gradient
    expected = [net.residual(y), net._replace(W=W - move).residual(y)]
    np.testing.assert_allclose(logged_residuals(train, 2), expected, rtol=1e-5)


def test_kernel_regression_at_new_points():
    (X, y), (new, _) = problem(8, 3), problem(5, 3, seed=1)
    options = {"width": 64, "shift": 0.5, "normalize": "rows"}
    train, predict = bench.kernel_peer(bench.Problem.of(X, y, new, np.ones(5), **options))
    logged_residuals(train, 1)
    kernel = shifted_ntk(scaled_by_hand(np.concatenate([X, new]), "rows", X), 0.5)
    expected = kernel[8:, :8] @ np.linalg.solve(kernel[:8, :8], y - y.mean()) + y.mean()
    np.testing.assert_allclose(predict(), expected, rtol=1e-8)


def test_time_to_a_target():
    run = {"seconds": [1.0, 2.0, 3.0, 4.0, 5.0], "residuals": [1.0, 1e-2, 1e-3, 5e-3, np.nan]}
    found = [bench.time_to(target, run) for target in (1e-3, 0.5, 1e-6)]
    assert found == [3.0, 2.0, np.inf]


@pytest.mark.parametrize(
    "curves, best",
    [
        ([[1.0, 0.3], [1.0, 0.2], [1.0, np.nan]], 1),  # none reaches a target: the closest
        ([[1.0, 2e-3], [1.0, 9e-4], [1.0, np.inf]], 1),
        ([[1.0, 1e-4], [1.0, 0.5, 1e-7], [1.0, 1e-5]], 1),  # the last target counts first
    ],
)
def test_tuning_takes_the_entry_that_gets_there(curves, best, peers_problem):
    def start(problem, k):
        return (lambda log: [log(residual) for residual in curves[k]]), None

    peer = bench.Peer("made up", start, tuple({"k": k} for k in range(len(curves))), "", "")
    runs, options = bench.tune(peer, peers_problem._replace(held_out_X=None), cap=1.0)
    assert len(runs) == len(curves)
    assert options == {"k": best}


def test_a_run_ends_at_the_last_target_and_at_its_cap():
    for cap, residuals in ((100.0, [1.0, 1e-6]), (100.0, [1.0, np.nan]), (0.0, [1.0])):
        curve = bench.Curve(cap)
        with pytest.raises(bench.Enough):
            for residual in [*residuals, 0.5]:
                curve.add(residual)
        np.testing.assert_array_equal(curve.residuals, residuals)


def test_the_table_of_peers_names_targets_that_were_missed():
    case = {"part": "run", "case": "random", "cap": 30.0}
    ours = {"peer": "ours", "to 1e-03": 2.0, "to 1e-06": 4.0, "residual": 1e-7, "accuracy": 0.75}
    theirs = {"to 1e-03": 9.0, "to 1e-06": None, "residual": 2e-4, "accuracy": 0.5}
    samples = [{**case, **ours}] * 3 + [{**case, "peer": "torch adam", **theirs}]
    assert bench.peer_result(samples, "random", "torch adam", 1e-3) == (9.0, 4.5)
    table = bench.peers_table(samples)
    assert "| sublin (float64) | 1.0 times | 1.0 times | 75.0 % |" in table
    assert "(float32) | 4.5 times | not within 30 s, best 2e-04 | 50.0 % |" in table


# ==================================================================================================
# The benchmark: claims of the paper
# ==================================================================================================

LINEAR = -50.0  # below all products: every neuron is active, the network linear in its weights
SILENT = 50.0  # above all of them


@core
def test_runs_of_linear_and_of_silent_networks():
    X, y = bench.random_unit_data(3, 5)
    linear = bench.timed_run(X, y, 64, 0, shift=LINEAR)
    assert (linear["end"], linear["steps"], linear["active"]) == ("converged", 1, 1.0)
    assert linear["worst"] < 1e-9 and bench.halves(linear)
    assert 0 < linear["training"] < linear["total"]
    silent = bench.timed_run(X, y, 64, 0, shift=SILENT)
    assert silent == {"end": "singular"} and not bench.halves(silent)


@core
def test_runs_fail_where_points_outnumber_neurons():
    run = bench.timed_run(*bench.random_unit_data(40, 4), 24, 0)
    assert not bench.halves(run)
    assert run["end"] in ("stuck", "singular") or run["worst"] > 0.5


@core
def test_costs_of_a_run_are_means_over_the_steps():
    X, y = bench.random_unit_data(3, 5)
    options = {"search": "tree", "init": "gaussian", "shift": 0.0}
    steps = bench.record_steps(bench.train(X, y, 64, **options))[1:]
    found = bench.timed_run(X, y, 64, 0, search="tree", shift=0.0)
    assert found["operations"] == np.mean([step["operations"] for step in steps])
    samples = [{**step, "run": run} for run in (1, 2, 3) for step in [{"step": 0}, *steps]]
    assert bench.step_mean(samples, "operations") == found["operations"]


@core
def test_needed_width_is_that_of_theorem_4_1():
    assert bench.needed_width(np.eye(2), 0.0) == pytest.approx((2 / 0.5) ** 4)
    assert bench.needed_width(np.eye(1), 0.0) == pytest.approx(4 * np.log(160))
    assert bench.needed_width(np.ones((2, 1)), 0.0) > 1e50


@core
def test_starting_activity_counts_what_products_reach():
    X, y = bench.random_unit_data(3, 5)
    for shift, each in ((LINEAR, 64), (SILENT, 0)):
        expected = {"mean": float(each), "largest": each, "sum": 3 * each, "union": each}
        found = bench.starting_activity(X, y, 64, 0, shift=shift)
        assert found == {"shift": shift, **expected}
    active = start(X, y, 500, init="gaussian").active
    found = bench.starting_activity(X, y, 500, 0)
    assert (found["largest"], found["sum"]) == (active.sum(axis=1).max(), active.sum())
    assert found["union"] == active.any(axis=0).sum()


@core
def test_tree_touches_of_one_and_two_levels():
    one, two = bench.tree_touches(3, 4, 16, 0), bench.tree_touches(3, 4, 256, 0)
    assert (one["init"], one["update"], one["query"], one["silent"]) == (3 * 16, 3, 16, 16)
    assert (two["init"], two["update"], two["silent"]) == (3 * (256 + 16), 3 * (1 + 17), 16)
    assert 16 <= two["query"] <= 16 * (1 + two["reported"])


@core
def test_distortion_of_an_isometry_and_of_twice_one():
    J = bench.coherent_jacobian(4)
    exact = J.tocsr().toarray().T
    assert bench.distortion(J, exact) < 1e-14
    assert bench.distortion(J, 2 * exact) == pytest.approx(3.0)
    assert bench.distortion(J, 0 * exact) == pytest.approx(1.0)


@core
def test_inner_iterations_of_a_single_point_and_of_a_sketch_that_is_too_small():
    assert bench.inner_iterations(np.eye(1), np.ones(1), 64, 0, "sketch", shift=0.0) == 1
    X, y = bench.random_unit_data(16, 8)
    found = bench.inner_iterations(X, y, 256, 0, "richardson", shift=0.5, sketch_size=16)
    assert found is None


@core
def test_starting_gram_of_a_linear_network_is_its_kernel_and_of_few_neurons_singular():
    X, y = bench.random_unit_data(3, 5)
    found = bench.starting_gram(X, y, 64, 0, shift=LINEAR)
    assert found["smallest"] == pytest.approx(np.linalg.eigvalsh(X @ X.T)[0])
    assert found["kernel"] == pytest.approx(found["smallest"])
    assert found["distance"] < 1e-12
    few = bench.starting_gram(*bench.random_unit_data(20, 2), 8, 0, shift=1.0)
    assert few["smallest"] < 0.75 * few["kernel"]


@core
def test_a_linear_network_is_kernel_regression_and_a_narrow_one_is_not():
    X, y = bench.random_unit_data(4, 8)
    assert bench.kernel_gap(X, y, 64, 0, LINEAR)["gap"] < 1e-8
    assert bench.kernel_gap(X, y, 256, 0, 1.0)["gap"] > 1e-3


@core
def test_starting_norms_are_those_of_the_weights():
    X, y = problem(4, 3)
    net = start(X, y, 300, init="gaussian")
    found = bench.starting_norms(X, y, 300, 0)
    other = np.maximum(X @ net.W.T, net.shift) @ net.signs / np.sqrt(300)
    assert found["weights"] == pytest.approx(np.linalg.norm(net.W, 2) / np.sqrt(300))
    assert found["output"] == pytest.approx(np.abs(net.outputs).max())
    assert found["output with max(z, b)"] == pytest.approx(np.abs(other).max())
    norms = np.linalg.norm(net.dense_jacobian, axis=1)
    assert found["jacobian"] == pytest.approx(norms.max())


@core
def test_retracing_a_linear_network_finds_one_step_and_no_flips():
    X, y = bench.random_unit_data(3, 5)
    found = bench.retrace(X, y, 64, 0, shift=LINEAR)
    g = np.linalg.solve(X @ X.T, start(X, y, 64, init="gaussian", shift=LINEAR).outputs - y)
    assert found["move"] == pytest.approx(np.linalg.norm(g @ X) / 8, rel=1e-6)
    assert found["gram smallest"] == pytest.approx(np.linalg.eigvalsh(X @ X.T)[0])
    assert found["converged"]
    for key in ("jacobian change", "gram change", "flipped / active", "flipped / all"):
        assert found[key] == 0.0


def test_retracing_follows_the_reference():
    X, y = bench.random_unit_data(6, 4)
    found = bench.retrace(X, y, 256, 0, shift=1.0)
    networks = start(X, y, 256, init="gaussian", shift=1.0).steps(y, 20)
    jacobians = np.array([net.dense_jacobian for net in networks])
    grams, masks = jacobians @ jacobians.mT, np.array([net.active for net in networks])
    moves = [np.linalg.norm(net.W - networks[0].W, axis=1).max() for net in networks]
    changes = (np.linalg.norm(some - some[0], axis=(1, 2)).max() for some in (jacobians, grams))
    expected = dict(zip(("jacobian change", "gram change"), changes, strict=True))
    expected["gram smallest"] = np.linalg.eigvalsh(grams)[:, 0].min()
    expected["flipped / all"] = np.any(masks != masks[0], axis=0).sum() / (6 * 256)
    for key, value in expected.items():
        assert found[key] == pytest.approx(value), key
    assert found["move"] == pytest.approx(max(moves), rel=1e-6)
    assert found["gram change"] > found["kernel"] / 2  # far too narrow for Lemma 4.3


@core
@pytest.mark.parametrize("delta", [1e-6, 0.5, 1.4])
def test_sandwich_of_points_of_known_distance(delta):
    x = unit_rows(np.arange(1.0, 6.0)[None])[0]
    beside = bench.beside(x, delta, np.random.default_rng(0))
    assert np.linalg.norm(beside) == pytest.approx(1.0)
    assert np.linalg.norm(beside - x) == pytest.approx(delta, rel=1e-6)
    found = bench.sandwich(2, 30, delta, 1.0, 0)
    assert found["low"] == pytest.approx(np.exp(-0.5) * delta / 400, rel=1e-6)
    assert found["low"] < found["eigenvalue"] < found["high"]


def test_methods_are_timed_if_they_agree():
    bench.check_agreement(16, 16, 2**12)


@pytest.mark.parametrize("name, wrong", [("scan", {"seed": 1}), ("tree+sketch", {"damping": 1.0})])
def test_methods_that_disagree_are_not_timed(name, wrong, monkeypatch):
    right, method = bench.train, bench.METHODS[name]

    def train(X, y, width, search, solver, **options):
        if (search, solver) == (method.search, method.solver):
            options |= wrong
        return right(X, y, width, search=search, solver=solver, **options)

    monkeypatch.setattr(bench, "train", train)
    with pytest.raises(SystemExit, match=re.escape(f"{name} and dense disagree at m = 4096")):
        bench.check_agreement(16, 16, 2**12)


@core
def test_slopes_and_least_widths_of_known_samples():
    samples = bench.grid(
        "powers",
        lambda seed, width: {"value": 3.0 * width**0.7},
        lambda case: case["width"] < 300,
        seed=(0, 1),
        width=(16, 64, 256, 1024),
    )
    assert bench.slopes(samples, lambda sample: sample["value"], 16) == pytest.approx([0.7, 0.7])
    assert bench.least(samples, "width", lambda sample: sample["width"] > 20) == 64
    assert bench.least(samples, "width", lambda sample: True) == 16
    assert bench.least(samples, "width", lambda sample: sample["width"] < 100) is None
    assert bench.spread([3.0, 1.0, 2.0]) == "2 (1 to 3)"


def growing(key, power, factor=1.0):
    return lambda sample: {key: factor * sample["width"] ** power}


def won_by(winner):
    def seconds(sample):
        found = 1.0 if sample["search"] == winner else 2.0
        return {"end": "converged", "total": found, "training": found}

    return seconds


RUN = {"end": "converged", "steps": 3, "active": 0.1, "worst": 0.5}
PATH = {"kernel": 2.0, "gram change": 1.0, "gram smallest": 1.0, "move": 1.0}

# Experiment, part of its samples, words of the claim; what is put into all samples of that part so
# that it holds, and so that it cannot.
VERDICTS = [
    ("contraction", "regime", "widths of the theorem", RUN, {**RUN, "worst": 0.51}),
    ("contraction", "cells", "widths measured", RUN, {**RUN, "worst": 0.51}),
    ("contraction", "cells", "widths measured", RUN, {**RUN, "end": "stuck"}),
    ("costs", "costs", "operations of a step", *(growing("operations", p) for p in (0.75, 0.95))),
    ("costs", "costs", "seconds of a step", *(growing("seconds", p) for p in (0.75, 0.95))),
    ("sparsity", "counts", "at most 2 m^0.76", {"largest": 1}, growing("largest", 1.0)),
    ("sparsity", "counts", "|Q_i| = O", growing("mean", 0.7), growing("mean", 0.99)),
    ("sparsity", "unions", "|K| is at most", {"union": 7, "sum": 7}, {"union": 8, "sum": 7}),
    ("sparsity", "unions", "sublinear in m", {"union": 1}, growing("union", 1.0)),
    ("trees", "trees", "init touches", growing("init", 1.0, 17.0), growing("init", 1.0, 18.0)),
    ("trees", "trees", "an update touches", {"update": 16 * 35}, {"update": 16 * 53}),
    ("trees", "trees", "a query", {"query": 64, "reported": 2}, {"query": 97, "reported": 2}),
    ("sketches", "embeddings", "embeds, random", {"distortion": 0.1}, {"distortion": 0.11}),
    ("sketches", "embeddings", "embeds, coherent", {"distortion": 0.1}, {"distortion": 0.11}),
    *(
        ("sketches", "counts", words, *({"iterations": k, "log": 1.0} for k in (20, 30)))
        for words in ("conjugate gradients", "the paper's iteration")
    ),
    ("ntk", "grams", "H_dis", *({"smallest": found, "kernel": 1.0} for found in (0.75, 0.74))),
    ("ntk", "sandwich", "between", {"low": 1e-9}, {"low": 1.0, "eigenvalue": 0.9, "high": 2.0}),
    ("ntk", "sandwich", "between", {"high": 9.0}, {"high": 1.0, "eigenvalue": 1.1}),
    ("ntk", "grams", "Gram matrix tends", growing("distance", -0.5), {"distance": 0.1}),
    ("ntk", "gaps", "kernel regression", growing("gap", -0.1), growing("gap", 0.1)),
    ("norms", "norms", "|W(0)|", {"weights": 3.0}, {"weights": 3.1}),
    ("norms", "norms", "|J_i|", {"jacobian": 1.0}, {"jacobian": 1.1}),
    ("norms", "norms", "|f_0|", {"output": 3.0}, {"output": 3.1}),
    ("paths", "paths", "|G_t - G_0|", PATH, {**PATH, "gram change": 1.1}),
    ("paths", "paths", "smallest eigenvalue", PATH, {**PATH, "gram smallest": 0.0}),
    ("paths", "paths", "weights move", {**PATH, "kernel": 0.01}, PATH),
    ("paths", "paths", "|J_t - J_0|", *({"jacobian change": x, "move": 1.0} for x in (1.0, 6.0))),
    ("paths", "paths", "positions", {"flipped / active": 0.1}, {"flipped / active": 0.11}),
    ("descent", "descent", "number of steps", {"steps": 4}, lambda s: {"steps": s["n"]}),
    ("shift", "runs", "one b", RUN, {"end": "stuck"}),
    ("data", "limit", "kernel ridge", *(growing("difference", p) for p in (-0.5, -0.2))),
    ("total", "fits", "the whole fit", *(growing("seconds", p) for p in (0.7, 0.9))),
    ("crossover", "races", "less time", won_by("lazy"), won_by("dense")),
]
MEASURED = {}  # samples of experiments, by name


@pytest.mark.parametrize(
    "name, part, words, good, bad", VERDICTS, ids=[f"{row[0]}-{row[2]}" for row in VERDICTS]
)
def test_verdicts_follow_the_samples(name, part, words, good, bad):
    (experiment,) = (some for some in bench.EXPERIMENTS if some.name == name)
    MEASURED[name] = MEASURED.get(name) or experiment.measure(True)
    for change, expected in ((good, True), (bad, False)):
        samples = [
            {**s, **(change(s) if callable(change) else change)} if s["part"] == part else s
            for s in MEASURED[name]
        ]
        verdicts = [claim.holds for claim in experiment.judge(samples) if words in claim.claim]
        assert verdicts
        assert {bool(holds) for holds in verdicts} == {expected}
        assert all(isinstance(holds, (bool, np.bool_)) for holds in verdicts)


def test_every_claim_has_a_verdict_that_is_tested():
    for claim in bench.all_claims():
        assert any(words in claim.claim for _, _, words, _, _ in VERDICTS), claim.claim


# ==================================================================================================
# The benchmark: what it writes
# ==================================================================================================


def test_readme_says_what_the_committed_measurements_say():
    text = (HERE / "README.md").read_text("utf-8")
    numbers = bench.readme_numbers()
    names = [mark[1] for mark in bench.MARK.finditer(text)]
    assert sorted(names) == sorted(numbers)  # every number is used once, and every mark filled
    assert text.count("<!--") == 2 * len(names)
    assert bench.filled(text, numbers) == text


def test_the_page_of_claims_says_what_the_committed_measurements_say():
    page = (HERE / "plots" / "claims.md").read_text("utf-8")
    assert page == bench.page_claims(bench.all_claims())


@pytest.mark.parametrize("experiment", [some for some in bench.EXPERIMENTS if some.page])
def test_the_page_of_an_experiment_says_what_its_committed_measurements_say(experiment):
    page = (HERE / "plots" / f"{experiment.name}.md").read_text("utf-8")
    assert page == experiment.page(bench.read(experiment.name)["samples"])


def test_readme_and_pages_show_every_committed_figure_and_link_to_what_exists():
    pages = [HERE / "README.md", *(HERE / "plots").glob("*.md")]
    links = [
        page.parent / link
        for page in pages
        for link in re.findall(r"\]\(([^):]+?)(?:#[^)]*)?\)", page.read_text("utf-8"))
    ]
    assert all(link.exists() for link in links)
    figures = {path for path in (HERE / "plots").glob("*.png") if "-quick" not in path.name}
    assert figures == {link for link in links if link.suffix == ".png"}


def test_marks_are_filled_by_name_and_others_stay():
    text = "lazy: <!-- a b -->41 times<!-- end -->, <!-- c -->\n\nold\n\n<!-- end -->."
    once = bench.filled(text, {"a b": "42 times", "d": "not there"})
    assert once == text.replace("41", "42")
    assert bench.filled(once, {"c": "\n\nnew\n\n"}) == once.replace("old", "new")
