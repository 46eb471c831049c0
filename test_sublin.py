"""Tests of sublin against slow twins in plain float64 NumPy.

Tests marked `core` are small enough to run interpreted, and are the ones to repeat with bounds checks:

    NUMBA_DISABLE_JIT=1 python -m pytest -m core
    NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=.boundscheck python -m pytest -m core
"""

import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time
import tracemalloc
import types
import warnings
from itertools import pairwise
from pathlib import Path

import numba
import numpy as np
import pytest
import scipy.sparse
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scipy.stats import kstest, multivariate_normal, norm
from sklearn.base import clone
from sklearn.datasets import load_breast_cancer, load_diabetes, load_digits, load_wine
from sklearn.exceptions import ConvergenceWarning, DataConversionWarning, NotFittedError
from sklearn.metrics import r2_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.multioutput import MultiOutputRegressor
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
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
    separability,
    shifted_ntk,
    smallest_ntk_eigenvalue,
    sparse_sign_sketch,
    srht_sketch,
)

HERE = Path(__file__).parent

pytestmark = pytest.mark.filterwarnings("ignore:relative residual")  # many fits stop early on purpose
core = pytest.mark.core

SEARCHES = ("dense", "scan", "tree", "lazy")
SOLVERS = ("cholesky", "sketch", "richardson", "cg", "gradient")
SKETCHES = (gaussian_sketch, srht_sketch, sparse_sign_sketch)

# ======================================================================================================================
# Slow twins
# ======================================================================================================================


def unit_rows(X):
    return X / np.linalg.norm(X, axis=1, keepdims=True)


def problem(n, d, seed=0):
    """Unit rows X (n, d) and targets y (n,)."""
    rng = np.random.default_rng(seed)
    return unit_rows(rng.standard_normal((n, d))), rng.standard_normal(n)


def dense_outputs(X, W, signs, shift):
    """f (n,) = m^(-1/2) sum_r a_r (<w_r, x> - b)_+."""
    return np.maximum(X @ W.T - shift, 0.0) @ signs / np.sqrt(len(W))


def dense_jacobian(X, active, signs):
    """J (n, m d) from the mask of active pairs (n, m)."""
    return np.einsum("ir,r,ik->irk", active, signs / np.sqrt(signs.size), X).reshape(len(X), -1)


def csr_of(active):
    """(indptr, indices) of a mask (n, m)."""
    return np.append(0, active.sum(axis=1).cumsum()), np.nonzero(active)[1]


def sparse_jacobian(X, active, signs):
    return SparseJacobian(X, signs, *csr_of(active))


def dense_training(X, y, W, signs, shift, steps, damping=0.0, gradient=False):
    """Gauss-Newton or gradient descent: yields (relative residual, W) for the start and after each step."""
    W, rate = W.copy(), None
    for step in range(steps + 1):
        residual = dense_outputs(X, W, signs, shift) - y
        yield np.linalg.norm(residual) / np.linalg.norm(y), W.copy()
        if step == steps:
            return
        J = dense_jacobian(X, X @ W.T >= shift, signs)
        G = J @ J.T + damping * np.eye(len(X))
        if gradient:
            rate = rate or 1.0 / np.linalg.eigvalsh(J @ J.T)[-1]
            g = rate * residual
        else:
            g = np.linalg.solve(G, residual)
        W -= (J.T @ g).reshape(W.shape)


def trainer(width=512, **options):
    """A trainer on data as they are, from seed 0, that takes pure steps."""
    options = {"normalize": None, "random_state": 0, "tol": 1e-9, "damping": 0.0, **options}
    return SublinearTrainer(width, **options)


def start(X, y, width, **options):
    """(W(0), signs, shift) of a network."""
    fitted = trainer(width, **{**options, "max_iter": 0}).fit(X, y)
    return fitted.weights(), fitted.signs_.astype(float), fitted.shift_


def assert_same_pairs(found, active):
    """CSR by point equals a mask (n, m), types and order included."""
    for array, expected in zip(found, csr_of(active), strict=True):
        assert array.dtype == np.int64
        np.testing.assert_array_equal(array, expected)


def residuals_of(fitted):
    return np.array([record["residual"] for record in fitted.history_])


# ======================================================================================================================
# Trees
# ======================================================================================================================

SIZES = (1, 2, 3, 7, 8, 9, 15, 16, 17, 255, 256, 257, 1023, 1024, 1025)


def integers(rng, *shape, dtype=float):
    """Small integers: many ties, and products without rounding."""
    return rng.integers(-2, 3, shape).astype(dtype)


def threshold(rng):
    return rng.choice([-np.inf, np.inf, rng.integers(-12, 13), rng.integers(-12, 13) + 0.5, rng.normal(0, 4)])


def height(trees):
    return len(trees._levels) - 1


class Touched:
    """Nodes touched since the last call."""

    def __init__(self, trees):
        self.trees, self.before = trees, trees.touched

    def __call__(self):
        count, self.before = self.trees.touched - self.before, self.trees.touched
        return count


def apply(operation, trees, W, rng):
    """One operation on the trees and on the twin W; checks the answer and the number of nodes touched."""
    n, m, touched = len(trees.X), len(W), Touched(trees)
    if operation == "query":
        i, tau = int(rng.integers(n)), threshold(rng)
        found = trees.query(i, tau)
        assert found.dtype == np.int64
        np.testing.assert_array_equal(found, np.flatnonzero((W @ trees.X[i] >= tau) & (tau < np.inf)))
        assert touched() <= sublin.FAN_OUT * height(trees) * max(1, found.size)
    elif operation == "query_all":
        tau = threshold(rng)
        active = (trees.X @ W.T >= tau) & (tau < np.inf)
        assert_same_pairs(trees.query_all(tau), active)
        assert touched() <= n * sublin.FAN_OUT * height(trees) * max(1, active.any(axis=0).sum())
    elif operation == "update":
        j, w = int(rng.integers(m)), integers(rng, W.shape[1])
        trees.update(j, w)
        W[j] = w
        assert touched() <= n * (1 + (sublin.FAN_OUT + 1) * (height(trees) - 1))
    else:
        js = rng.permutation(m)[: rng.integers(1, m + 1)]
        trees.update_many(js, W_new := integers(rng, js.size, W.shape[1]))
        W[js] = W_new
        assert touched() <= js.size * n * (1 + (sublin.FAN_OUT + 1) * (height(trees) - 1))


@core
@settings(deadline=None, max_examples=150, suppress_health_check=[HealthCheck.too_slow])
@given(
    m=st.sampled_from(SIZES),
    n=st.integers(1, 6),
    dtype=st.sampled_from(["float32", "float64"]),
    seed=st.integers(0, 2**32),
    operations=st.lists(st.sampled_from(["query", "query_all", "update", "update_many"]), max_size=12),
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
@pytest.mark.parametrize("m", SIZES)
def test_query_that_reports_nothing_touches_one_group_of_siblings(m):
    trees = MaxTrees(np.ones((1, 1)), np.ones((m, 1)))
    touched = Touched(trees)
    assert trees.query(0, 2.0).size == 0
    assert touched() <= sublin.FAN_OUT


@core
@pytest.mark.parametrize("m", SIZES)
def test_infinite_thresholds_report_all_or_nothing(m):
    trees = MaxTrees(np.ones((2, 1)), -np.ones((m, 1)))
    np.testing.assert_array_equal(trees.query(1, -np.inf), np.arange(m))
    assert trees.query(1, np.inf).size == 0
    assert_same_pairs(trees.query_all(-np.inf), np.ones((2, m), bool))
    assert_same_pairs(trees.query_all(np.inf), np.zeros((2, m), bool))


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
def test_trees_keep_their_own_copy_and_leave_inputs_alone():
    rng = np.random.default_rng(0)
    X, W, W_new, js = integers(rng, 3, 2), integers(rng, 9, 2), integers(rng, 3, 2), np.array([5, 0, 8])
    copies = [array.copy() for array in (X, W, W_new, js)]
    trees = MaxTrees(X, W)
    trees.update_many(js, W_new)
    trees.update(1, W_new[0])
    for array, copy in zip((X, W, W_new, js), copies, strict=True):
        np.testing.assert_array_equal(array, copy)
    X[:], W[:], W_new[:] = 7, 7, 7
    trees.check()


@core
def test_trees_take_read_only_arrays_and_lists():
    X, W = np.ones((2, 2)), np.ones((20, 2))
    X.setflags(write=False)
    W.setflags(write=False)
    np.testing.assert_array_equal(MaxTrees(X, W).query(0, 2.0), MaxTrees(X.tolist(), W.tolist()).query(0, 2.0))


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
def test_check_notices_a_corrupted_node(row, message):
    trees = MaxTrees(np.ones((2, 1)), np.ones((300, 1)))  # leaves 0-299, padding to 303, maxima 304-322, padding to 335
    trees.check()
    trees._rows[row, 1] = 5.0
    with pytest.raises(AssertionError, match=message):
        trees.check()


@core
def test_update_many_touches_no_more_than_single_updates():
    rng = np.random.default_rng(0)
    for m in SIZES:
        X, W = integers(rng, 3, 2), integers(rng, m, 2)
        for count in {1, m // 2 + 1, m}:
            js = rng.permutation(m)[:count]
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


# ======================================================================================================================
# Jacobian
# ======================================================================================================================


def network(n, d, m, shift, coincide=False, seed=0):
    """X, W, signs and the mask of active pairs (n, m)."""
    rng = np.random.default_rng(seed)
    X, W = unit_rows(rng.standard_normal((n, d))), rng.standard_normal((m, d))
    if coincide:
        X[n // 2 :] = X[: n - n // 2]
    return X, W, rng.choice([-1.0, 1.0], m), X @ W.T >= shift, shift


REGIMES = {
    "few active": network(5, 4, 40, 1.5),
    "more points than neurons": network(20, 3, 6, 0.5),
    "coinciding points": network(6, 4, 30, 1.0, coincide=True),
    "all active": network(5, 3, 12, -20.0),
    "none active": network(5, 3, 12, 20.0),
    "neurons on more than d points and on fewer": network(12, 2, 20, 0.8),
    "one of everything": network(1, 1, 1, -9.0),
}
regimes = pytest.mark.parametrize("regime", REGIMES)


@core
def test_regimes_are_what_they_say():
    active_on = REGIMES["neurons on more than d points and on fewer"][3].sum(axis=0)
    assert (active_on > 2).any() and ((active_on > 0) & (active_on <= 2)).any()
    assert REGIMES["all active"][3].all() and not REGIMES["none active"][3].any()


@core
@regimes
def test_products_with_the_jacobian_equal_those_of_the_dense_one(regime):
    X, W, signs, active, _ = REGIMES[regime]
    J, expected, rng = sparse_jacobian(X, active, signs), dense_jacobian(X, active, signs), np.random.default_rng(1)
    u, U = rng.standard_normal(W.size), rng.standard_normal((W.size, 3))
    v, V = rng.standard_normal(len(X)), rng.standard_normal((len(X), 3))
    assert J.shape == expected.shape and J.dtype == float
    np.testing.assert_allclose(J.matvec(u), expected @ u, atol=1e-13)
    np.testing.assert_allclose(J.matmat(U), expected @ U, atol=1e-13)
    np.testing.assert_allclose(J @ U.astype(int), expected @ U.astype(int), atol=1e-13)
    np.testing.assert_allclose(J.rmatvec(v), expected.T @ v, atol=1e-13)
    np.testing.assert_allclose(J.T @ V, expected.T @ V, atol=1e-13)
    np.testing.assert_allclose(J.H @ v[:, None], expected.T @ v[:, None], atol=1e-13)


@core
@regimes
def test_gram_and_csr_equal_those_of_the_dense_jacobian(regime):
    X, _, signs, active, _ = REGIMES[regime]
    J, expected, rng = sparse_jacobian(X, active, signs), dense_jacobian(X, active, signs), np.random.default_rng(1)
    v = rng.standard_normal(len(X))
    np.testing.assert_allclose(J.gram(), expected @ expected.T, atol=1e-13)
    np.testing.assert_allclose(J.gram_times(v), expected @ (expected.T @ v), atol=1e-13)
    csr = J.tocsr()
    assert isinstance(csr, scipy.sparse.csr_matrix) and csr.nnz == active.sum() * X.shape[1]
    assert csr.has_sorted_indices
    np.testing.assert_array_equal(csr.toarray() != 0, expected != 0)
    np.testing.assert_allclose(csr.toarray(), expected, atol=1e-15)


@core
@regimes
def test_jacobian_is_the_derivative_of_the_outputs_with_respect_to_the_weights(regime):
    X, W, signs, active, shift = REGIMES[regime]
    J = sparse_jacobian(X, active, signs).tocsr().toarray()
    h = 0.5 * np.abs(X @ W.T - shift).min()  # no neuron changes state, so outputs are linear and differences exact
    assert h > 1e-5
    for k in range(W.size):
        E = np.zeros(W.size)
        E[k] = h
        up, down = (dense_outputs(X, W + sign * E.reshape(W.shape), signs, shift) for sign in (1, -1))
        np.testing.assert_allclose((up - down) / (2 * h), J[:, k], atol=1e-8)


@core
def test_jacobian_takes_active_neurons_in_any_order():
    X, _, signs, active, _ = REGIMES["few active"]
    indptr, indices = csr_of(active)
    backwards = np.concatenate([indices[a:b][::-1] for a, b in pairwise(indptr)])
    np.testing.assert_array_equal(
        SparseJacobian(X, signs, indptr, backwards).tocsr().toarray(), dense_jacobian(X, active, signs)
    )


def test_gram_equals_the_dense_one_when_counted_in_many_bands():
    X, W, signs, active, _ = network(1100, 3, 50, 1.0)  # n^2 >> 18 is 4: more bands than threads
    expected = (X @ X.T) * (active.astype(float) @ active.T) / len(W)
    np.testing.assert_allclose(sparse_jacobian(X, active, signs).gram(), expected, atol=1e-12)


# ======================================================================================================================
# Sketches
# ======================================================================================================================


def distortion(J, sketched):
    """Largest | |S J^T x|^2 / |J^T x|^2 - 1 | over x."""
    L = np.linalg.cholesky(J.gram())
    whitened = np.linalg.solve(L, sketched.T)
    return np.abs(np.linalg.eigvalsh(whitened @ whitened.T) - 1).max()


def prescribed_size(sketch, n, d, eps, delta):
    """Size for a (1 +- eps) subspace embedding with probability 1 - delta, from the docstring of the sketch."""
    if sketch is gaussian_sketch:
        return int(np.ceil(((np.sqrt(n) + np.sqrt(2 * np.log(2 / delta))) / (np.sqrt(1 + eps) - 1)) ** 2))
    if sketch is srht_sketch:  # Kronecker signs come without a bound; four times the rows of independent ones are ample
        return int(np.ceil(4 * n * np.log(n / delta) ** 2 / eps**2))
    return 4 * int(np.ceil(max(d, 2 * n * (n + 1) / (eps**2 * delta) / 4)))


def coherent_jacobian(n, d, m):
    """Every point is active on one neuron, the same for all."""
    X, _ = problem(n, d)
    active = np.zeros((n, m), bool)
    active[:, m // 2] = True
    return sparse_jacobian(X, active, np.ones(m))


def spread_jacobian(n, d, m):
    X, _, signs, active, _ = network(n, d, m, 0.8)
    return sparse_jacobian(X, active, signs)


def one_hot_jacobian(d, m):
    """J^T sqrt(m) is the identity of order m d: its sketch is S / sqrt(m)."""
    return SparseJacobian(np.tile(np.eye(d), (m, 1)), np.ones(m), np.arange(m * d + 1), np.repeat(np.arange(m), d))


sketches = pytest.mark.parametrize("sketch", SKETCHES)


@core
@sketches
@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 13, 40])
@pytest.mark.parametrize("d, m", [(1, 5), (3, 6), (4, 1)])
def test_sketch_is_one_matrix_times_the_transposed_jacobian(sketch, size, d, m):
    X, _, signs, active, _ = network(5, d, m, 0.3)
    S = sketch(one_hot_jacobian(d, m), size, 7) * np.sqrt(m)
    sketched = sketch(sparse_jacobian(X, active, signs), size, 7)
    assert sketched.shape == (size, 5)
    np.testing.assert_allclose(sketched, S @ dense_jacobian(X, active, signs).T, atol=1e-13)


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


@core
@pytest.mark.parametrize("size", [1, 2, 3])
def test_columns_of_a_tiny_sparse_sign_sketch_have_length_one(size):
    S = sparse_sign_sketch(one_hot_jacobian(3, 6), size, 0) * np.sqrt(6)
    np.testing.assert_allclose((S**2).sum(axis=0), 1.0, rtol=1e-14)


def test_entries_of_a_gaussian_sketch_are_standard_normal():
    S = gaussian_sketch(one_hot_jacobian(7, 30), 200, 0) * np.sqrt(30 * 200)
    assert kstest(S.ravel(), "norm").pvalue > 1e-3
    products = (S.T @ S / 200)[np.triu_indices(S.shape[1], 1)]
    assert np.abs(products).max() < 6 / np.sqrt(200)  # columns independent: 21,945 products of deviation 1 / sqrt(200)


@core
@sketches
@pytest.mark.parametrize("size", [1, 3, 12])
def test_sketch_is_unbiased(sketch, size):
    X, _, signs, active, _ = network(3, 3, 8, 0.5)
    J = sparse_jacobian(X, active, signs)
    squares = np.array([S.T @ S for S in (sketch(J, size, seed) for seed in range(400))])
    standard_error = squares.std(axis=0) / np.sqrt(len(squares))
    assert (np.abs(squares.mean(axis=0) - J.gram()) <= 4.5 * standard_error + 1e-14).all()


@sketches
@pytest.mark.parametrize(
    "kind, n, d, m",
    [
        (spread_jacobian, 4, 5, 300),
        (spread_jacobian, 8, 3, 900),
        (coherent_jacobian, 4, 6, 300),
        (coherent_jacobian, 4, 700, 3),
    ],
)
def test_sketch_of_the_prescribed_size_is_a_subspace_embedding(sketch, kind, n, d, m):
    J = kind(n, d, m)
    eps, delta, seeds = 0.5, 0.1, 20
    size = prescribed_size(sketch, n, d, eps, delta)
    failures = sum(distortion(J, sketch(J, size, seed)) > eps for seed in range(seeds))
    assert failures <= delta * seeds


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
    X, _, signs, active, _ = REGIMES["none active"]
    np.testing.assert_array_equal(sketch(sparse_jacobian(X, active, signs), 9, 0), np.zeros((9, 5)))


# ======================================================================================================================
# Trainer: the same trajectory as a dense loop
# ======================================================================================================================

PROBLEMS = {  # data, then options of the trainer
    "plain": (problem(6, 5), {"width": 512}),
    "more neurons than a group of groups": (problem(4, 5), {"width": 1000, "alpha": 0.5}),
    "gaussian, odd width": (problem(6, 5), {"width": 301, "init": "gaussian"}),
    "more points than neurons": (problem(40, 4), {"width": 15, "init": "gaussian", "shift": 0.2, "damping": 0.1}),
    "everything active": (problem(4, 6), {"width": 64, "shift": -5.0}),
    "coinciding points": (
        (problem(3, 4)[0][[0, 1, 2, 0, 1]], np.arange(5.0)),
        {"width": 300, "shift": 0.5, "damping": 0.01},
    ),
    "more coordinates than points": (problem(4, 40), {"width": 300}),
    "opposite points": ((np.array([[1.0], [-1.0]]), np.array([1.0, 3.0])), {"width": 40, "shift": 0.5}),
    "few neurons": (problem(3, 4), {"width": 14, "shift": -1.0}),
    "two neurons": (problem(2, 3), {"width": 2, "shift": -4.0}),
    "one neuron": (problem(1, 3), {"width": 1, "init": "gaussian", "shift": -5.0}),
    "one point": (problem(1, 3), {"width": 200}),
}
problems = pytest.mark.parametrize("name", PROBLEMS)
searches = pytest.mark.parametrize("search", SEARCHES)
solvers = pytest.mark.parametrize("solver", SOLVERS)


def assert_retraces_the_dense_loop(X, y, fitted, rtol=1e-6, atol=1e-9):
    """Residual by residual while above atol, and the final weights."""
    W, signs, shift = start(X, y, fitted.width, shift=fitted.shift_, init=fitted.init)
    steps = fitted.n_iter_
    gradient = fitted.solver == "gradient"
    states = list(dense_training(X, y, W, signs, shift, steps, fitted.damping, gradient))
    expected = np.array([residual for residual, _ in states])
    np.testing.assert_allclose(residuals_of(fitted), expected, rtol=rtol, atol=atol)
    np.testing.assert_allclose(fitted.weights(), states[-1][1], rtol=rtol, atol=10 * rtol)


def assert_consistent(X, fitted):
    """Active sets and predictions, from the weights."""
    W, signs, shift = fitted.weights(), fitted.signs_, fitted.shift_
    assert_same_pairs(fitted.active_sets(), X @ W.T >= shift)
    new, _ = problem(7, X.shape[1], seed=9)
    for points in (X, new):
        expected = dense_outputs(points, W, signs, shift)
        np.testing.assert_allclose(fitted.predict(points), expected, rtol=1e-9, atol=1e-11)


@core
@problems
@searches
def test_gauss_newton_retraces_the_dense_loop(name, search):
    (X, y), options = PROBLEMS[name]
    fitted = trainer(search=search, max_iter=6, **options).fit(X, y)
    assert fitted.n_iter_ > 0
    assert_retraces_the_dense_loop(X, y, fitted)
    assert_consistent(X, fitted)


@core
@searches
@solvers
@pytest.mark.parametrize("damping", [0.0, 0.1])
def test_every_solver_retraces_the_dense_loop_when_its_tolerance_is_tight(search, solver, damping, monkeypatch):
    monkeypatch.setattr(sublin, "_regression_tolerance", lambda X, shift: 1e-12)
    (X, y), options = PROBLEMS["plain"]
    fitted = trainer(search=search, solver=solver, damping=damping, max_iter=5, **options).fit(X, y)
    assert_retraces_the_dense_loop(X, y, fitted)
    assert_consistent(X, fitted)


@problems
@solvers
def test_every_solver_handles_every_problem(name, solver, monkeypatch):
    monkeypatch.setattr(sublin, "_regression_tolerance", lambda X, shift: 1e-11)
    (X, y), options = PROBLEMS[name]
    # The Richardson iteration needs a sketch of small distortion; for few points 64 n rows miss it now and then.
    size = 2000 if solver == "richardson" else None
    fitted = trainer(solver=solver, sketch_size=size, max_iter=4, **options).fit(X, y)
    assert_retraces_the_dense_loop(X, y, fitted, rtol=1e-5)
    assert_consistent(X, fitted)


@core
@pytest.mark.parametrize("sketch", ["sparse", "srht", "gaussian"])
@pytest.mark.parametrize("solver", ["sketch", "richardson"])
@pytest.mark.parametrize("damping", [0.0, 0.05])
def test_sketched_solvers_meet_the_tolerance_of_algorithm_5_in_every_step(sketch, solver, damping):
    X, y = problem(4, 5)
    states = []
    fitted = trainer(128, solver=solver, sketch=sketch, shift=0.8, damping=damping, tol=1e-6, max_iter=4)
    fitted.set_params(callback=lambda record: states.append(fitted.weights())).fit(X, y)
    signs, shift = fitted.signs_, fitted.shift_
    tolerance = np.sqrt(np.linalg.eigvalsh(shifted_ntk(X, shift))[0] / len(X)) / 6
    for before, after in pairwise(states):
        residual = dense_outputs(X, before, signs, shift) - y
        J = dense_jacobian(X, X @ before.T >= shift, signs)
        g, *_ = np.linalg.lstsq(J.T, (before - after).ravel(), rcond=None)
        np.testing.assert_allclose(J.T @ g, (before - after).ravel(), atol=1e-8)
        error = J @ (J.T @ g) + damping * g - residual
        assert np.linalg.norm(error) <= 1.01 * tolerance * np.linalg.norm(residual)
    assert all(record["inner_iterations"] > 0 for record in fitted.history_[1:])


@searches
@pytest.mark.parametrize("solver", ["cholesky", "sketch", "richardson", "cg"])
def test_float64_reaches_1e_9(search, solver):
    X, y = problem(16, 8)
    fitted = trainer(4096, search=search, solver=solver).fit(X, y)
    assert fitted.converged_ and fitted.residual_ <= 1e-9
    np.testing.assert_allclose(fitted.predict(X), y, atol=1e-8)
    assert_consistent(X, fitted)


@searches
@pytest.mark.parametrize("solver", ["cholesky", "sketch", "richardson", "cg"])
def test_float32_reaches_1e_5(search, solver):
    X, y = problem(16, 8)
    fitted = trainer(4096, search=search, solver=solver, dtype="float32", tol=1e-5).fit(X, y)
    assert fitted.converged_ and fitted.residual_ <= 1e-5
    np.testing.assert_allclose(fitted.predict(X), y, atol=1e-4)


@core
@searches
def test_float32_follows_the_dense_float64_loop(search):
    (X, y), options = PROBLEMS["plain"]
    fitted = trainer(search=search, dtype="float32", tol=1e-5, **options).fit(X, y)
    assert_retraces_the_dense_loop(X, y, fitted, rtol=1e-4, atol=1e-5)


@searches
@pytest.mark.parametrize("init", ["antisymmetric", "gaussian"])
@pytest.mark.parametrize("width", [sublin.BLOCK, sublin.BLOCK + 6, 2 * sublin.BLOCK + 2])
def test_networks_of_several_blocks_retrace_the_dense_loop(search, init, width):
    X, y = problem(5, 4)
    fitted = trainer(width, search=search, init=init, shift=0.5, max_iter=4).fit(X, y)  # enough pairs for all threads
    assert fitted.residual_ < 1e-3
    assert_retraces_the_dense_loop(X, y, fitted)
    assert_consistent(X, fitted)


@pytest.mark.parametrize("search", SEARCHES)
def test_digits_train_to_1e_6(search):
    images, labels = load_digits(return_X_y=True)
    X, y = images[:120], np.where(labels[:120] % 2, 1.0, -1.0)
    fitted = SublinearTrainer(1 << 14, search=search, random_state=0).fit(X, y)
    assert fitted.converged_
    np.testing.assert_allclose(fitted.predict(X), y, atol=1e-4)


@core
@searches
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("offset", [-1e-12, 0.0, 1e-12])
def test_active_means_at_or_above_the_shift(search, dtype, offset):
    options = {"init": "gaussian", "search": search, "dtype": dtype, "max_iter": 0}
    products = start([[1.0]], [1.0], 16, init="gaussian")[0].ravel()  # a float32 number each
    shift = products[7] + offset
    fitted = trainer(16, shift=shift, **options).fit([[1.0]], [1.0])
    assert_same_pairs(fitted.active_sets(), products[None] >= shift)


# ======================================================================================================================
# Trainer: live pairs
# ======================================================================================================================


def lazy_states(X, y, width, **options):
    """A network trained by "lazy", checked after every step, and (weights, active sets) at the start and after each step."""
    states = []
    fitted = trainer(width, search="lazy", **options)

    def look(record):
        fitted.check()
        states.append((fitted.weights(), fitted.active_sets()))

    return fitted.set_params(callback=look).fit(X, y), states


def assert_takes_dense_steps(X, y, fitted, states):
    """Active sets are those of the weights, and each step is the dense one from where the last one led.

    Step by step, because rounding errors grow from step to step where training is far from converging.
    """
    signs, shift = fitted.signs_.astype(float), fitted.shift_
    for record, (W, active) in zip(fitted.history_, states, strict=True):
        assert_same_pairs(active, X @ W.T >= shift)
        expected = np.linalg.norm(dense_outputs(X, W, signs, shift) - y) / np.linalg.norm(y)
        assert record["residual"] == pytest.approx(expected, rel=1e-7, abs=1e-11)
    for (before, _), (after, _) in pairwise(states):
        _, (_, expected) = dense_training(X, y, before, signs, shift, 1, fitted.damping)
        np.testing.assert_allclose(after, expected, rtol=1e-6, atol=1e-8 * np.abs(y).max())


@core
@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
@given(
    n=st.integers(1, 24),
    d=st.integers(1, 12),
    pairs=st.integers(1, 150),
    shift=st.floats(-1.0, 2.0),
    scale=st.sampled_from([0.1, 1.0, 30.0]),
    damping=st.sampled_from([0.01, 0.3]),
    margin=st.sampled_from([1e-3, sublin.MARGIN]),
    init=st.sampled_from(["antisymmetric", "gaussian"]),
    seed=st.integers(0, 99),
)
def test_lazy_steps_are_dense_steps_in_every_regime(n, d, pairs, shift, scale, damping, margin, init, seed):
    X, y = problem(n, d, seed)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sublin, "MARGIN", margin)
        options = {"shift": shift, "damping": damping, "init": init, "random_state": seed, "max_iter": 4}
        fitted, states = lazy_states(X, scale * y, 2 * pairs, **options)
    assert_takes_dense_steps(X, scale * y, fitted, states)


@pytest.mark.parametrize(
    "n, d, width, scale, shift, widens",
    [
        (100, 4, 256, 1.0, 0.5, True),  # more points than neurons can tell apart
        (400, 3, 512, 1.0, 1.0, True),  # beyond 362 points X X^T is out of cache, and moves are made through vectors
        (24, 8, 1024, 300.0, 1.5, False),  # targets so far away that all products of live neurons are tracked
        (6, 4, 64, 1.0, -9.0, False),  # everything active
    ],
)
def test_margins_that_run_out_are_widened(n, d, width, scale, shift, widens):
    X, y = problem(n, d)
    fitted, states = lazy_states(X, scale * y, width, shift=shift, damping=0.01, max_iter=8)
    assert_takes_dense_steps(X, scale * y, fitted, states)
    assert (fitted._search.widened > 0) == widens


def test_widening_all_rows_again_and_again_finds_more_room(monkeypatch):
    monkeypatch.setattr(sublin, "MARGIN", 1e-3)
    X, y = problem(16, 8)
    fitted, states = lazy_states(X, y, 4096, shift=1.5)
    assert fitted.converged_ and fitted._search.widened > fitted.n_live_ / 2
    assert fitted._search._used < fitted._search._pairs.points.size
    assert_takes_dense_steps(X, y, fitted, states)


def test_later_steps_look_at_few_neurons():
    X, y = problem(16, 16)
    lazy, tree = (trainer(1 << 16, search=search).fit(X, y) for search in ("lazy", "tree"))
    first, *_, last = (record["looked_at"] for record in lazy.history_[1:])
    assert first > lazy.n_live_ / 4 and last < first / 100
    assert all(record["looked_at"] > lazy.n_live_ for record in tree.history_)
    np.testing.assert_allclose(residuals_of(lazy), residuals_of(tree), rtol=1e-6, atol=1e-11)


def test_rows_made_anew_reach_a_pair_that_moves_down_as_a_point_comes_in(monkeypatch):
    # Three copies of each point, apart by less than float32 products tell, and a margin that ends between two of them.
    monkeypatch.setattr(sublin, "MARGIN", 0.01)
    rng = np.random.default_rng(1)
    X = unit_rows(unit_rows(np.repeat(rng.normal(size=(20, 8)), 3, axis=0)) + 3e-8 * rng.normal(size=(60, 8)))
    X, y = X[rng.permutation(60)], rng.normal(size=60)
    options = {"shift": 0.9964949098489018, "damping": 1e-2, "random_state": 1, "max_iter": 6, "tol": 1e-12}
    lazy, dense = (trainer(2000, search=search, **options).fit(X, y) for search in ("lazy", "dense"))
    lazy.check()
    np.testing.assert_allclose(residuals_of(lazy), residuals_of(dense), rtol=1e-6)


@pytest.mark.parametrize("n, d, width, shift", [(12, 16, 1 << 14, 2.0), (12, 16, 1 << 16, 2.5), (4, 4, 1 << 14, 2.0)])
def test_of_neurons_active_on_one_point_only_those_that_flip_are_looked_at(n, d, width, shift):
    X, y = problem(n, d)
    begun, stepped = (trainer(width, shift=shift, max_iter=steps).fit(X, y) for steps in (0, 1))
    _, neurons = begun.active_sets()
    points = np.bincount(neurons, minlength=width)
    assert np.count_nonzero(points == 1) > 4 * np.count_nonzero(points > 1)
    record = stepped.history_[1]
    assert 0 < record["flips"] <= record["looked_at"] <= record["flips"] + np.count_nonzero(points > 1)
    stepped.check()


@pytest.mark.parametrize("margin", [0.05, sublin.MARGIN])
def test_live_pairs_have_the_same_bits_for_any_number_of_threads(margin, monkeypatch):
    monkeypatch.setattr(sublin, "MARGIN", margin)
    X, y = problem(40, 8)
    most, runs = numba.get_num_threads(), []
    for threads in (1, most):
        numba.set_num_threads(threads)
        try:
            runs.append(trainer(4 * sublin.BLOCK, shift=1.0).fit(X, y))
        finally:
            numba.set_num_threads(most)
    first, second = runs
    assert first._search.widened == second._search.widened and first._search.widened > 1000
    np.testing.assert_array_equal(residuals_of(first), residuals_of(second))
    np.testing.assert_array_equal(first.weights(), second.weights())


@core
@pytest.mark.parametrize("work", [0, 1 << 16, 1 << 26])
def test_shares_of_the_chunks_come_in_order_each_once(work):
    most = numba.get_num_threads()
    shares = sublin._over_chunks(lambda *share: share, work)
    assert [low for _, low, _ in shares] == [0, *(high for _, _, high in shares[:-1])] and shares[-1][2] == sublin.CHUNKS
    assert {thread for thread, _, _ in shares} <= set(range(most if work else 1))
    assert {thread for thread, _, _ in sublin._over_chunks(lambda *share: share, work, most=1)} == {0}


@core
@pytest.mark.parametrize("failing", [0, sublin.CHUNKS - 1])
def test_a_share_that_fails_says_so_and_leaves_the_threads_as_they_were(failing):
    def task(_, low, high):
        if low <= failing < high:
            raise MemoryError("of this share")

    before = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else None
    with pytest.raises(MemoryError, match="of this share"):
        sublin._over_chunks(task, 1 << 26)
    assert before is None or os.sched_getaffinity(0) == before
    assert len(sublin._over_chunks(lambda *share: share, 1 << 16)) == numba.get_num_threads()


def test_fits_in_several_threads_at_once_and_in_a_fork_have_the_bits_of_one_alone():
    code = (
        "import os, sys, threading\n"
        "import numpy as np\n"
        "from sublin import SublinearTrainer\n"
        "rng = np.random.default_rng(0)\n"
        "X, y = rng.standard_normal((64, 32)), rng.standard_normal(64)\n"
        "def fit(found=None):\n"
        "    fitted = SublinearTrainer(1 << 16, random_state=0, max_iter=3, tol=0.0).fit(X, y)\n"
        "    found = [] if found is None else found\n"
        "    found.append(fitted.loss_curve_)\n"
        "    return found[-1]\n"
        "alone, together = fit(), []\n"
        "threads = [threading.Thread(target=fit, args=(together,)) for _ in range(3)]\n"
        "for thread in threads: thread.start()\n"
        "for thread in threads: thread.join()\n"
        "assert together == [alone] * 3, 'in threads'\n"
        "if hasattr(os, 'fork'):\n"
        "    child = os.fork()\n"
        "    if child == 0:\n"
        "        os._exit(0 if fit() == alone else 1)\n"
        "    assert os.waitpid(child, 0)[1] == 0, 'in a fork'\n"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", code], cwd=HERE, check=True, timeout=120)


def test_a_fit_in_the_background_goes_on_when_the_main_thread_has_ended():
    code = (
        "import threading, time\n"
        "import numpy as np\n"
        "from sublin import SublinearTrainer\n"
        "rng, ended = np.random.default_rng(0), threading.Event()\n"
        "X, y = rng.standard_normal((64, 8)), rng.standard_normal(64)\n"
        "def fit():\n"
        "    slow = lambda record: ended.set() or time.sleep(0.5 * (record['iteration'] < 2))\n"
        "    net = SublinearTrainer(1 << 16, random_state=0, max_iter=3, tol=0.0, callback=slow).fit(X, y)\n"
        "    print(net.n_iter_)\n"
        "threading.Thread(target=fit).start()\n"
        "ended.wait()\n"
    )
    run = [sys.executable, "-W", "ignore", "-c", code]
    assert subprocess.run(run, cwd=HERE, check=True, timeout=120, capture_output=True, text=True).stdout == "3\n"


@core
@pytest.mark.parametrize("n, width, shift", [(1, 40, 0.5), (7, 130, 0.0), (40, 300, 1.0), (90, 64, -1.0)])
def test_shared_neurons_are_counted_alike_one_by_one_and_in_words(n, width, shift):
    X, y = problem(n, 4)
    search = trainer(width, shift=shift, max_iter=0).fit(X, y)._search
    sets = search.gathered()
    active = np.zeros((n, search.n_live), int)
    active[sets.points, np.repeat(sets.neurons, np.diff(sets.offsets))] = 1
    for low, high in ((0, search.n_live), (3, search.n_live - 1), (5, 5)):
        for squares in (0, 1 << 60):
            counts = np.zeros((n, n), np.int32)
            sublin._count_shared(search._pairs, low, high, squares, counts)
            shared = active[:, low:high] @ active[:, low:high].T
            np.testing.assert_array_equal(counts + counts.T - np.diag(np.diag(counts)), shared)


@core
def test_limits_are_rounded_down():
    sizes = np.geomspace(1e-300, 1e300, 1201)
    for x in (0.0, 1.0, *sizes, np.inf, -1.0, *-sizes, -np.inf):
        below = sublin._rounded_down(x)
        assert below <= x
        if x > -3e38:
            assert below >= min(x, 3e38) - 2.0**-22 * min(abs(x), 3e38) - 1e-44


def spoil_first(name, value):
    """Overwrites an entry of the first row with an active pair, or of its first pair, the most active one."""

    def spoil(search):
        pairs = search._pairs
        q = np.argmax(np.isfinite(pairs.certificates) & np.isfinite(pairs.rows["margin"]))
        row = pairs.rows[q]
        array, place = getattr(pairs, name, None), q
        if array is None:
            array = pairs.rows[name]
        elif name != "certificates":
            place = row["start"] if name == "products" else pairs.copies * row["start"] + row["twin"] * row["count"]
        array[place] = value(array[place])

    return spoil


@core
@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_first("certificates", lambda certificate: np.inf), "a pair can flip before its certificate ends"),
        (spoil_first("limit", lambda limit: limit + 3.0), "a pair can flip before its certificate ends"),
        (spoil_first("far_limit", lambda limit: limit + 3.0), "a pair can flip before its certificate ends"),
        (spoil_first("margin", lambda margin: np.inf), "a product within the margin is not tracked"),
        (spoil_first("reach", lambda reach: 0), "active"),
        (spoil_first("products", lambda product: product + 1e-6), "a tracked product is wrong"),
        (spoil_first("active", lambda active: not active), "active"),
        (spoil_first("base", lambda base: base + 1.0), "the residual is not that of the weights"),
        (lambda search: search._sum.__iadd__(1e-6), "the residual is not that of the weights"),
        (lambda search: search._pairs.rows["flipped"].fill(0), "a pair has flipped, and its neuron is not marked"),
        (lambda search: search.counts.__iadd__(1), "counts are not the active sets'"),
        (lambda search: setattr(search, "changing", 0), "the number of neurons that move is wrong"),
        (lambda search: search._ladder.append(sublin.Rung(np.inf, *np.zeros((2, 0), int))), "its neuron is on no list"),
        (
            lambda search: search._ladder.append(search._ladder[0]._replace(bounds=search._ladder[0].bounds + 1.0)),
            "a list has a certificate too large",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_check_notices_a_spoilt_state(spoil, message):
    X, y = problem(6, 8)
    fitted = trainer(400, shift=1.5, max_iter=2).fit(X, y)
    fitted.check()
    spoil(fitted._search)
    with pytest.raises(AssertionError, match=message):
        fitted.check()


@searches
def test_check_holds_for_every_search_and_notices_a_wrong_residual(search):
    X, y = problem(6, 8)
    fitted = trainer(400, shift=1.0, search=search, max_iter=2).fit(X, y)
    fitted.check()
    fitted.residual_ *= 1.001
    with pytest.raises(AssertionError, match="the residual is not that of the weights"):
        fitted.check()


@core
@pytest.mark.parametrize("size", [0, 1, 2, 3, 11, 57, 300])
@pytest.mark.parametrize("values", [3, 1 << 30])
def test_rows_are_sorted_in_descending_order_with_their_points(size, values):
    products = np.random.default_rng(size).integers(values, size=size + 2).astype(float)
    points = np.arange(size + 2, dtype=np.int32)
    before = products.copy()
    sublin._sort_descending(products, points, 1, size + 1)
    np.testing.assert_array_equal(products[1:-1], np.sort(before[1:-1])[::-1])
    np.testing.assert_array_equal(products, before[points])
    assert points[0] == 0 and points[-1] == size + 1


@pytest.mark.parametrize("init", ["antisymmetric", "gaussian"])
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


# ======================================================================================================================
# Trainer: starting weights, reproducibility
# ======================================================================================================================


@core
def test_starting_weights_depend_on_seed_and_width_alone():
    X, y = problem(4, 3)
    expected = start(X, y, 100)
    for search in SEARCHES:
        for solver in SOLVERS:
            for dtype in ("float32", "float64"):
                found = start(*problem(5, 3, seed=1), 100, search=search, solver=solver, dtype=dtype, shift=0.1)
                np.testing.assert_array_equal(found[0], expected[0])
                np.testing.assert_array_equal(found[1], expected[1])
    assert not np.array_equal(start(X, y, 100, random_state=1)[0], expected[0])


@core
@pytest.mark.parametrize("init", ["antisymmetric", "gaussian"])
def test_a_wider_network_extends_a_narrower_one(init):
    X, y = problem(4, 3)
    narrow, wide = (start(X, y, width, init=init) for width in (50, 80))
    np.testing.assert_array_equal(wide[0][:50], narrow[0])
    np.testing.assert_array_equal(wide[1][:50], narrow[1])


@core
@pytest.mark.parametrize("init", ["antisymmetric", "gaussian"])
def test_starting_weights_are_philox_keyed_by_seed_and_block_and_signs_a_stream_of_their_own(init):
    seed, width = 7, sublin.BLOCK + 6

    def philox(block, stream):
        key = np.array([seed, block], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, stream]))

    W, signs, _ = start(*problem(2, 3), width, init=init, random_state=seed)
    for block, count in ((0, sublin.BLOCK), (1, 6)):
        rows = slice(block * sublin.BLOCK, block * sublin.BLOCK + count)
        draws = count if init == "gaussian" else count // 2
        normals = philox(block, 0).standard_normal((draws, 3), dtype=np.float32)
        expected_signs = (
            [1, -1] * draws if init == "antisymmetric" else 2 * philox(block, 1).integers(0, 2, count, np.int8) - 1
        )
        np.testing.assert_array_equal(W[rows], np.repeat(normals, count // draws, axis=0))
        np.testing.assert_array_equal(signs[rows], expected_signs)


@core
def test_antisymmetric_start_is_pairs_of_opposite_sign_and_output_zero():
    X, y = problem(4, 3)
    W, signs, _ = start(X, y, 300)
    np.testing.assert_array_equal(W[::2], W[1::2])
    np.testing.assert_array_equal(signs, np.tile([1, -1], 150))
    fitted = trainer(300, max_iter=0).fit(X, y)
    np.testing.assert_allclose(fitted.predict(problem(9, 3, seed=4)[0]), 0.0, atol=1e-14)
    assert fitted.residual_ == 1.0


@pytest.mark.parametrize("init", ["antisymmetric", "gaussian"])
def test_starting_weights_are_standard_normal_and_signs_even(init):
    W, signs, _ = start(*problem(2, 3), 3 * sublin.BLOCK, init=init)
    assert kstest(W[::2].ravel(), "norm").pvalue > 1e-3
    assert set(signs) == {-1.0, 1.0} and abs(signs.mean()) < 4 / np.sqrt(signs.size)
    assert np.unique(W, axis=0).shape[0] == len(W) // (2 if init == "antisymmetric" else 1)
    assert abs(np.corrcoef(W[:, 0], signs)[0, 1]) < 4 / np.sqrt(signs.size)


@pytest.mark.parametrize("search", SEARCHES)
@pytest.mark.parametrize("solver", ["cholesky", "sketch"])
def test_any_number_of_threads_gives_the_same_bits(search, solver):
    X, y = problem(16, 8)
    most, runs = numba.get_num_threads(), []
    for threads in (1, most):
        numba.set_num_threads(threads)
        try:
            runs.append(trainer(sublin.BLOCK + 2, search=search, solver=solver, shift=0.5, max_iter=3).fit(X, y))
        finally:
            numba.set_num_threads(most)
    np.testing.assert_array_equal(residuals_of(runs[0]), residuals_of(runs[1]))
    np.testing.assert_array_equal(runs[0].weights(), runs[1].weights())


@core
@pytest.mark.parametrize(
    "state", [lambda: 3, lambda: np.int64(3), lambda: np.random.RandomState(3), lambda: np.random.default_rng(3)]
)
def test_same_random_state_gives_the_same_bits(state):
    X, y = problem(4, 3)
    first, second = (trainer(200, random_state=state(), max_iter=3).fit(X, y) for _ in range(2))
    np.testing.assert_array_equal(first.weights(), second.weights())
    np.testing.assert_array_equal(residuals_of(first), residuals_of(second))


@core
def test_a_generator_moves_on_and_none_is_new_every_time():
    X, y = problem(4, 3)
    for state in (np.random.default_rng(3), np.random.RandomState(3), None):
        first, second = (start(X, y, 20, random_state=state)[0] for _ in range(2))
        assert not np.array_equal(first, second)


@core
def test_random_state_may_be_numpys_global_one_as_in_scikit_learn():
    X, y = problem(4, 3)
    runs = []
    for _ in range(2):
        np.random.seed(3)  # noqa: NPY002
        runs.append(start(X, y, 20, random_state=np.random)[0])
    np.testing.assert_array_equal(*runs)


@core
@pytest.mark.parametrize("search", SEARCHES)
def test_fitting_again_starts_anew(search):
    X, y = problem(5, 4)
    again = trainer(200, search=search, max_iter=3).fit(*problem(7, 3, seed=2)).fit(X, y)
    once = trainer(200, search=search, max_iter=3).fit(X, y)
    np.testing.assert_array_equal(again.weights(), once.weights())
    assert len(again.history_) == len(once.history_)


# ======================================================================================================================
# Trainer: its record and its manners
# ======================================================================================================================

PHASES = {"seconds_query", "seconds_jacobian", "seconds_solve", "seconds_update"}
KEYS = {
    "iteration",
    "residual",
    "loss",
    "active",
    "changed",
    "looked_at",
    "flips",
    "inner_iterations",
    "damping",
    "rejected",
    "operations",
}
KEYS |= {"seconds"}


@core
@searches
@solvers
def test_history_is_complete_and_true(search, solver):
    (X, y), options = PROBLEMS["plain"]
    seen, masks = [], []
    fitted = trainer(search=search, solver=solver, max_iter=4, damping=0.01, **options)

    def watch(record):
        seen.append(record)
        masks.append(X @ fitted.weights().T >= fitted.shift_)

    fitted.set_params(callback=watch).fit(X, y)
    assert seen == fitted.history_
    assert [record["iteration"] for record in seen] == list(range(fitted.n_iter_ + 1))
    assert fitted.n_live_ == masks[0].any(axis=0).sum()
    assert fitted.residual_ == seen[-1]["residual"] and fitted.init_seconds_ > 0
    for record, before, after in zip(seen, [None, *masks[:-1]], masks, strict=True):
        assert set(record) == KEYS | PHASES
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
    watched.set_params(callback=lambda record: (watched.weights(), watched.predict(X), watched.active_sets())).fit(X, y)
    for key in KEYS - {"seconds"}:
        assert [record[key] for record in watched.history_] == [record[key] for record in fitted.history_]


def test_operations_of_a_step_are_bounded_by_changed_neurons_in_trees_and_by_all_of_them_otherwise():
    X, y = problem(4, 6)
    n, d, m = 4, 6, 1 << 16
    runs = {search: trainer(m, search=search).fit(X, y).history_ for search in SEARCHES}
    levels = int(np.ceil(np.log(m) / np.log(sublin.FAN_OUT)))
    for dense, scan, tree in zip(*(runs[search][1:] for search in ("dense", "scan", "tree")), strict=True):
        pairs = n * tree["changed"]
        nodes = (sublin.FAN_OUT + 1) * levels * (tree["changed"] + tree["flips"])
        assert tree["operations"] <= n * pairs + 2 * n * nodes
        assert n * m <= scan["operations"] <= n * (1.01 * m + pairs)
        assert n * m * d <= dense["operations"] <= n * m * (d + 1) + pairs * d
        assert tree["operations"] < scan["operations"] < dense["operations"]


def test_operations_of_trees_grow_slower_than_the_width():
    X, y = problem(4, 6)
    few, many = (trainer(m, search="tree", max_iter=2).fit(X, y).history_[1]["operations"] for m in (1 << 14, 1 << 18))
    assert many < 16**0.85 * few


@core
def test_max_iter_zero_leaves_the_start_in_silence():
    X, y = problem(4, 3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = trainer(100, max_iter=0).fit(X, y)
    assert fitted.n_iter_ == 0 and len(fitted.history_) == 1 and not fitted.converged_
    np.testing.assert_array_equal(fitted.weights(), fitted.weights().astype(np.float32))


@core
def test_stopping_short_of_the_tolerance_warns():
    with pytest.warns(ConvergenceWarning, match=r"after 1 steps is above tol=1e-09: it was still falling; raise max_iter"):
        fitted = trainer(512, max_iter=1).fit(*problem(6, 5))
    assert not fitted.converged_ and fitted.n_iter_ == 1


@core
def test_training_that_overflows_stops_and_warns(monkeypatch):
    monkeypatch.setattr(sublin, "_solve_cholesky", lambda J, residual, *_: (-1e250 * residual, 0, None))
    with np.errstate(over="ignore"), pytest.warns(ConvergenceWarning, match=r'(inf|nan) after 1 steps.*"auto"'):
        trainer(512).fit(*problem(6, 5))


@core
def test_training_stops_at_the_tolerance():
    X, y = problem(6, 5)
    fitted = trainer(512, tol=1e-3).fit(X, y)
    assert fitted.converged_ and fitted.history_[-2]["residual"] > 1e-3 >= fitted.residual_


@core
def test_verbose_prints_a_line_for_each_step(capsys):
    fitted = trainer(512, verbose=1, max_iter=2).fit(*problem(6, 5))
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(fitted.history_) == 3
    for record, line in zip(fitted.history_, lines, strict=True):
        assert f"residual {record['residual']:.2e}" in line
    trainer(512, max_iter=2).fit(*problem(6, 5))
    assert capsys.readouterr().out == ""


@core
def test_parameters_can_be_read_set_and_cloned():
    options = {"width": 100, "shift": 0.5, "search": "scan", "damping": 0.1, "random_state": 4}
    model = SublinearTrainer(**options)
    assert options.items() <= model.get_params().items()
    assert model.set_params(width=64, solver="cg") is model
    assert clone(model).get_params() == model.get_params()
    X, y = problem(4, 3)
    assert clone(model).fit(X, y).weights().shape == (64, 4)


@core
@searches
def test_parameters_set_after_fit_leave_the_fitted_network_alone(search):
    X, y = problem(4, 3)
    fitted = trainer(100, search=search, max_iter=2).fit(X, y)
    predicted, weights, signs = fitted.predict(X), fitted.weights(), fitted.signs_
    fitted.set_params(width=40, init="gaussian", search="dense", normalize="lift")
    np.testing.assert_array_equal(fitted.predict(X), predicted)
    np.testing.assert_array_equal(fitted.signs_, signs)
    np.testing.assert_array_equal(fitted.weights(), weights)


@core
@pytest.mark.parametrize("X_bad", [[[np.nan, 1.0]], [[3.0, 4.0]]], ids=["not finite", "zero once centred"])
def test_a_refused_fit_leaves_the_fitted_network_alone(X_bad):
    X, y = problem(4, 2)
    fitted = trainer(60, init="gaussian", shift=0.0, normalize="rows", random_state=None, max_iter=1).fit(X, y)
    predicted, signs = fitted.predict(X), fitted.signs_
    with pytest.raises(ValueError, match="X"):
        fitted.fit(X_bad, [1.0])
    np.testing.assert_array_equal(fitted.predict(X), predicted)
    np.testing.assert_array_equal(fitted.signs_, signs)


@core
def test_fit_returns_the_trainer_and_leaves_its_inputs_alone():
    X, y = problem(5, 4)
    for normalize in (None, "rows", "lift"):
        for array in (X, y):
            array.setflags(write=False)
        X_copy, y_copy = X.copy(), y.copy()
        model = trainer(200, normalize=normalize, max_iter=2, damping=1e-3)
        assert model.fit(X, y) is model
        model.predict(X)
        model.score(X, y)
        np.testing.assert_array_equal(X, X_copy)
        np.testing.assert_array_equal(y, y_copy)


@core
def test_fit_takes_lists_and_any_order_of_memory():
    X, y = problem(5, 4)
    expected = trainer(100, normalize="lift", max_iter=2).fit(X, y).weights()
    for X_same, y_same in ((X.tolist(), y.tolist()), (np.asfortranarray(X), np.repeat(y, 2)[::2])):
        found = trainer(100, normalize="lift", max_iter=2).fit(X_same, y_same).weights()
        np.testing.assert_array_equal(found, expected)


def test_predictions_do_not_depend_on_how_many_are_made_at_once():
    X, y = problem(6, 5)
    fitted = trainer(512, max_iter=1).fit(X, y)
    new, _ = problem(3000, 5, seed=1)
    expected = dense_outputs(new, fitted.weights(), fitted.signs_, fitted.shift_)
    np.testing.assert_allclose(fitted.predict(new), expected, rtol=1e-9, atol=1e-12)


@core
def test_unknown_parameters_are_refused_before_any_is_set():
    model = SublinearTrainer(100)
    with pytest.raises(ValueError, match="parameter must be one of"):
        model.set_params(width=64, depth=3)
    assert model.width == 100


@core
def test_score_is_the_coefficient_of_determination():
    X, y = problem(6, 5)
    fitted = trainer(512, max_iter=1).fit(X, y)
    new, targets = problem(8, 5, seed=1)
    assert fitted.score(new, targets) == pytest.approx(r2_score(targets, fitted.predict(new)))


# ======================================================================================================================
# Trainer: units of the data
# ======================================================================================================================


def scaled_by_hand(X, normalize, like):
    """Rows of length 1, with the mean, the deviation and the lift of the training points `like`."""
    X = (X - like.mean(axis=0)) / like.std(axis=0)
    if normalize == "lift":
        X = np.column_stack([X, np.full(len(X), sublin.LIFT * np.sqrt(like.shape[1]))])
    return unit_rows(X)


@core
@pytest.mark.parametrize("normalize", ["lift", "rows"])
@pytest.mark.parametrize("init", ["antisymmetric", "gaussian"])
@searches
def test_normalised_training_is_training_on_data_scaled_by_hand(normalize, init, search):
    rng = np.random.default_rng(0)
    X, y = 3 + 5 * rng.standard_normal((6, 4)), 100 + 20 * rng.standard_normal(6)
    fitted = trainer(512, normalize=normalize, init=init, search=search, tol=1e-8).fit(X, y)
    by_hand = trainer(512, init=init, search=search, tol=1e-8)
    by_hand.fit(scaled_by_hand(X, normalize, X), (y - y.mean()) / y.std())
    assert fitted.converged_
    np.testing.assert_allclose(residuals_of(fitted), residuals_of(by_hand), rtol=1e-6, atol=1e-9)
    new = rng.standard_normal((7, 4))
    expected = by_hand.predict(scaled_by_hand(new, normalize, X)) * y.std() + y.mean()
    np.testing.assert_allclose(fitted.predict(new), expected, rtol=1e-6)
    np.testing.assert_allclose(fitted.predict(X), y, rtol=1e-6)


@core
@pytest.mark.parametrize("normalize", ["lift", "rows"])
def test_constant_columns_are_harmless(normalize):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((6, 5)), rng.standard_normal(6)
    X[:, [1, 3]] = 7.1, 0.0
    fitted = trainer(1000, normalize=normalize, tol=1e-8).fit(X, y)
    np.testing.assert_allclose(fitted.predict(X), y, atol=1e-6)


@core
def test_lift_tells_parallel_rows_apart():
    X, y = np.array([[1.0], [2.0], [-1.0], [-2.0]]), np.array([1.0, -1.0, 2.0, 5.0])
    fitted = trainer(2000, normalize="lift", shift=0.5, tol=1e-8).fit(X, y)
    np.testing.assert_allclose(fitted.predict(X), y, atol=1e-6)


@core
@pytest.mark.parametrize("normalize", ["lift", "rows"])
@pytest.mark.parametrize("unit", [2.0**-10, 2.0**10])
def test_units_of_the_data_do_not_matter(normalize, unit):
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((6, 4)), rng.standard_normal(6)
    fitted = trainer(512, normalize=normalize, max_iter=3).fit(X, y)
    other = trainer(512, normalize=normalize, max_iter=3).fit(X * unit, y / unit)
    np.testing.assert_array_equal(residuals_of(other), residuals_of(fitted))
    np.testing.assert_array_equal(other.predict(X * unit) * unit, fitted.predict(X))


@core
@pytest.mark.parametrize("unit", [2.0**-600, 2.0**600])
def test_lift_takes_data_and_targets_whose_squares_overflow_or_vanish(unit):
    X, y = problem(6, 4)
    expected = trainer(512, normalize="lift", max_iter=3).fit(X, y)
    for x_unit, y_unit in ((unit, 1.0), (1.0, unit)):
        with np.errstate(over="raise", invalid="raise"):
            found = trainer(512, normalize="lift", max_iter=3).fit(X * x_unit, y * y_unit)
            np.testing.assert_allclose(residuals_of(found), residuals_of(expected), rtol=1e-9)
            np.testing.assert_allclose(found.predict(X * x_unit), expected.predict(X) * y_unit, rtol=1e-9)


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


# ======================================================================================================================
# Trainer: singular systems
# ======================================================================================================================


@core
@pytest.mark.parametrize("solver", ["cholesky", "sketch", "richardson"])
def test_coinciding_points_are_named(solver):
    X, y = problem(6, 5)
    X[4] = X[1]
    with pytest.raises(
        np.linalg.LinAlgError, match=r"singular: points 1 and 4 coincide \(1 such pairs\).*distinct points.*damping > 0"
    ):
        trainer(512, solver=solver).fit(X, y)


@core
@pytest.mark.parametrize("solver", ["cholesky", "sketch", "richardson", "cg"])
def test_points_without_active_neurons_are_named(solver):
    with pytest.raises(
        np.linalg.LinAlgError, match=r"6 of 6 points have no active neuron, the first is point 0; use a larger width"
    ):
        trainer(512, solver=solver, shift=30.0).fit(*problem(6, 5))


@core
@pytest.mark.parametrize("solver", ["cholesky", "sketch", "richardson"])
def test_too_few_active_neurons_are_counted(solver):
    with pytest.raises(
        np.linalg.LinAlgError, match=r"6 points share 2 active neurons of 2, too few.*smaller shift, or damping > 0"
    ):
        trainer(2, solver=solver, shift=-9.0).fit(*problem(6, 2))


@core
@pytest.mark.parametrize("solver", ["cholesky", "sketch", "richardson", "cg", "gradient"])
def test_damping_makes_singular_systems_trainable(solver):
    X, y = problem(6, 5)
    X[4], y[4] = X[1], y[1]
    fitted = trainer(512, solver=solver, damping=1e-3, max_iter=5).fit(X, y)
    assert residuals_of(fitted)[-1] < 0.9


@pytest.mark.parametrize("damping", [0.0, 0.01])
def test_an_earlier_factor_serves_while_few_pairs_flip(damping, monkeypatch):
    X, y = problem(16, 8)
    expected = trainer(4096, shift=1.0, damping=damping, max_iter=8).fit(X, y)
    assert all(record["inner_iterations"] == 0 for record in expected.history_)
    monkeypatch.setattr(sublin, "REUSE", 2)
    fitted = trainer(4096, shift=1.0, damping=damping, max_iter=8).fit(X, y)
    assert fitted.history_[1]["inner_iterations"] == 0 < fitted.history_[-1]["inner_iterations"] <= 10
    np.testing.assert_allclose(residuals_of(fitted), residuals_of(expected), rtol=1e-6, atol=1e-11)
    np.testing.assert_allclose(fitted.weights(), expected.weights(), atol=1e-9)
    monkeypatch.setattr(sublin, "STALE", 0)  # also where it does not serve, and is made anew
    fitted = trainer(4096, shift=1.0, damping=damping, max_iter=8).fit(X, y)
    np.testing.assert_allclose(residuals_of(fitted), residuals_of(expected), rtol=1e-6, atol=1e-11)


@core
def test_conjugate_gradients_that_cannot_converge_say_so():
    X, y = problem(12, 2)
    with pytest.raises(np.linalg.LinAlgError, match=r"conjugate gradients .*singular.*damping > 0"):
        trainer(4, shift=-9.0, init="gaussian", solver="cg").fit(X, y)


@core
def test_richardson_that_cannot_converge_says_so():
    X, y = problem(12, 8)
    with pytest.raises(np.linalg.LinAlgError, match=r"does not converge with sketch_size=14: .*larger sketch_size"):
        trainer(1024, solver="richardson", sketch_size=14, shift=0.5).fit(X, y)


# ======================================================================================================================
# Theory
# ======================================================================================================================


@core
def test_default_shift_is_that_of_theorem_g2():
    assert default_shift(65536) == pytest.approx(np.sqrt(0.48 * np.log(65536)))
    assert default_shift(65536) == pytest.approx(2.307243, abs=1e-6)
    assert default_shift(100, alpha=0.0) == pytest.approx(np.sqrt(0.5 * np.log(100)))
    assert default_shift(1) == 0.0
    for width in (2, 100, 10**6):
        for alpha in (0.0, 0.04, 0.9):
            assert norm.sf(default_shift(width, alpha)) <= width ** (-(1 - alpha) / 4)
    assert trainer(300, alpha=0.3, max_iter=0).fit(*problem(3, 3)).shift_ == default_shift(300, 0.3)


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
    assert separability([x, [1.0, 0.0], x]) == 0.0
    assert separability([x, [1.0, 0.0], -x]) == 0.0
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
    X, y = problem(5, 4)
    width, shift = 200_000, 0.9
    W, signs, _ = start(X, y, width, init="gaussian")
    active = (X @ W.T >= shift).astype(float)
    G = (X @ X.T) * (active @ active.T) / width
    H = shifted_ntk(X, shift)
    assert np.abs(G - H).max() < 5 * 0.5 / np.sqrt(width)  # a mean of indicators has a deviation of at most 1/2
    np.testing.assert_allclose(sparse_jacobian(X, active > 0, signs).gram(), G, atol=1e-13)


@core
@pytest.mark.parametrize("shift", [-0.8, 0.0, 1.5])
def test_smallest_ntk_eigenvalue_of_orthogonal_coinciding_and_close_points(shift):
    assert smallest_ntk_eigenvalue(np.eye(4), shift) == pytest.approx(norm.sf(shift), rel=1e-13)
    assert abs(smallest_ntk_eigenvalue(np.ones((3, 1)), shift)) < 1e-14
    close = np.array([[1.0, 0.0], [np.cos(0.1), np.sin(0.1)]])
    both = multivariate_normal.cdf([-shift, -shift], cov=[[1, np.cos(0.1)], [np.cos(0.1), 1]])
    assert smallest_ntk_eigenvalue(close, shift) == pytest.approx(norm.sf(shift) - np.cos(0.1) * both, abs=1e-6)


@core
def test_ntk_eigenvalue_bounds_are_those_of_theorem_2_13():
    low, high = ntk_eigenvalue_bounds(np.eye(5), 1.2)
    assert high == pytest.approx(np.exp(-0.72))
    assert low == pytest.approx(np.exp(-0.72) * np.sqrt(2) / 2500)
    assert ntk_eigenvalue_bounds([[1.0, 0.0], [-1.0, 0.0]], 0.0) == (0.0, 1.0)


# ======================================================================================================================
# Trainer: damping
# ======================================================================================================================

REAL = {
    "digits": lambda: (lambda X, labels: (X, np.where(labels % 2, 1.0, -1.0)))(*load_digits(return_X_y=True)),
    "diabetes": lambda: load_diabetes(return_X_y=True),
    "breast cancer": lambda: load_breast_cancer(return_X_y=True),
    "wine": lambda: load_wine(return_X_y=True),
}
# Hard for a pure step: targets that few neurons must fit, so that most steps overshoot.
HARD = {"shift": 1.2, "damping": "auto", "max_iter": 12}


def hard_problem(seed=0):
    X, _ = problem(14, 2, seed)
    return X, 300.0 * np.random.default_rng(seed + 1).standard_normal(14)


def never_rises(fitted):
    residuals = residuals_of(fitted)
    return bool(np.all(np.diff(residuals) <= 0)) and np.isfinite(residuals).all()


@pytest.mark.parametrize("name", REAL)
def test_real_data_are_fitted_with_a_residual_that_never_rises(name):
    X, y = REAL[name]()
    fitted = SublinearTrainer(1 << 14, shift=1.0, tol=1e-3, max_iter=100, random_state=0).fit(X, y)
    assert fitted.converged_ and never_rises(fitted)
    default = SublinearTrainer(1 << 14, max_iter=8, random_state=0).fit(X, y)
    assert never_rises(default) and default.residual_ < 0.6


@pytest.mark.parametrize("name", ["digits", "breast cancer", "wine"])
def test_real_data_without_centring_are_fitted_with_a_residual_that_never_rises(name):
    X, y = REAL[name]()
    X, y = unit_rows(X)[:300], (y - y.mean())[:300]
    assert never_rises(SublinearTrainer(1 << 12, normalize=None, max_iter=12, random_state=0).fit(X, y))


@core
@searches
@solvers
def test_adaptive_damping_never_lets_the_residual_rise(search, solver):
    X, y = hard_problem()
    size = 600 if solver == "richardson" else None
    fitted = trainer(300, search=search, solver=solver, sketch_size=size, **HARD).fit(X, y)
    assert never_rises(fitted) and fitted.n_iter_ > 1
    assert_consistent(X, fitted)
    fitted.check()


@core
@searches
def test_hard_problems_reject_steps_and_searches_take_the_same_ones(search):
    X, y = hard_problem()
    expected = trainer(300, search="dense", **HARD).fit(X, y)
    assert sum(record["rejected"] for record in expected.history_) > 0
    fitted = trainer(300, search=search, **HARD).fit(X, y)
    np.testing.assert_allclose(residuals_of(fitted), residuals_of(expected), rtol=1e-6)
    for key in ("rejected", "flips", "changed"):
        assert [record[key] for record in fitted.history_] == [record[key] for record in expected.history_]


@core
@searches
@pytest.mark.parametrize("width, shift, scale", [(300, 1.2, 300.0), (64, 0.0, 1.0), (400, 1.5, 0.1)])
def test_a_step_taken_back_leaves_every_bit_as_it_was(search, width, shift, scale):
    X, y = problem(12, 3)
    fitted = trainer(width, search=search, shift=shift, damping=0.1, max_iter=2).fit(X, y)
    found = fitted._search
    weights, active, outputs = fitted.weights(), fitted.active_sets(), found.outputs.copy()
    step = scale * np.random.default_rng(0).standard_normal(len(X))
    for _ in range(2):
        found.remember()
        assert found.advance(step, lambda phase: None) > 0
        assert not np.array_equal(fitted.weights(), weights)
        found.undo()
        np.testing.assert_array_equal(fitted.weights(), weights)
        np.testing.assert_array_equal(found.outputs, outputs)
        for array, expected in zip(fitted.active_sets(), active, strict=True):
            np.testing.assert_array_equal(array, expected)
        fitted.check()
    untouched = trainer(width, search=search, shift=shift, damping=0.1, max_iter=2).fit(X, y)
    for trained in (fitted, untouched):
        trained._search.advance(step, lambda phase: None)
    np.testing.assert_allclose(fitted.weights(), untouched.weights(), rtol=1e-12, atol=1e-12)


@settings(deadline=None, max_examples=40, suppress_health_check=[HealthCheck.too_slow])
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
        lazy, dense = (trainer(2 * width, search=search, **options).fit(X, 10.0**scale * y) for search in ("lazy", "dense"))
    lazy.check()
    assert never_rises(lazy) and never_rises(dense)
    # Where the Gram matrix is nearly singular, rounding decides whether a step is taken; then only the first ones agree.
    count = min(len(lazy.history_), len(dense.history_), 3)
    np.testing.assert_allclose(residuals_of(lazy)[:count], residuals_of(dense)[:count], rtol=1e-3, atol=1e-6)


@core
def test_damping_fades_so_that_convergence_stays_superlinear():
    X, y = problem(10, 8)
    pure, damped = (trainer(4096, damping=damping).fit(X, y) for damping in (0.0, "auto"))
    assert damped.converged_ and damped.n_iter_ <= pure.n_iter_ + 1
    exponents = np.log(residuals_of(damped)[2:]) / np.log(residuals_of(damped)[1:-1])
    assert exponents[-1] > 1.5


@core
@searches
def test_a_singular_gram_matrix_is_damped_not_refused(search):
    X, y = problem(6, 4)
    X[3], y[3] = X[2], y[2]
    with pytest.raises(np.linalg.LinAlgError, match=r"points 2 and 3 coincide"):
        trainer(2000, search=search, shift=0.5).fit(X, y)
    assert trainer(2000, search=search, shift=0.5, damping="auto", tol=1e-6).fit(X, y).converged_


@core
@pytest.mark.parametrize("damping", ["auto", 1e-3])
def test_coinciding_points_with_other_targets_bound_the_residual_and_are_named(damping):
    X, y = problem(8, 4)
    X[5] = X[1]
    bound = np.sqrt(2) * abs(y[5] - y[1]) / 2 / np.linalg.norm(y)
    message = rf"2 rows of X coincide with rows that have other targets, the first are 1 and 5.* below {bound:.3g}; merge"
    with pytest.warns(UserWarning, match=message):
        fitted = trainer(2000, shift=0.5, damping=damping, max_iter=40).fit(X, y)
    assert bound <= fitted.residual_ <= 1.01 * bound


@core
def test_coinciding_points_with_equal_targets_are_no_reason_to_warn():
    X, y = problem(8, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fitted = trainer(2000, shift=0.5, damping="auto", tol=1e-5).fit(np.vstack([X, X]), np.append(y, y))
    assert fitted.converged_


@core
@pytest.mark.parametrize(
    "options, message",
    [
        ({"shift": 3.0, "width": 64}, r"\d points have no active neuron \(the first is \d\).*lower shift, or raise width"),
        ({"max_iter": 1}, r"it was still falling; raise max_iter"),
        ({"shift": 0.0, "width": 8, "max_iter": 60}, r"it has stopped falling; lower shift or raise width"),
    ],
)
def test_warnings_say_which_knob_to_turn_and_in_which_direction(options, message):
    X, y = problem(12, 3)
    with pytest.warns(ConvergenceWarning, match=message):
        trainer(**{"damping": "auto", "width": 512, **options}).fit(X, y)


def test_warnings_need_no_scikit_learn():
    code = (
        "import sys, warnings, numpy as np, sublin\n"
        "warnings.simplefilter('error', sublin.ConvergenceWarning)\n"
        "try:\n"
        "    sublin.SublinearTrainer(64, max_iter=1).fit(np.eye(4), [1, 2, 3, 4])\n"
        "except sublin.ConvergenceWarning:\n"
        "    print('sklearn' in sys.modules)\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, check=True)
    assert run.stdout == "False\n"


# ======================================================================================================================
# Trainer: any finite data
# ======================================================================================================================


@core
@pytest.mark.parametrize("normalize", ["lift", "rows"])
@pytest.mark.parametrize("scale", [1e-300, 1e-9, 1e9, 1.7e308])
def test_units_and_offsets_of_the_data_do_not_matter(normalize, scale):
    rng = np.random.default_rng(0)
    X, y = rng.uniform(-1, 1, (8, 4)), rng.uniform(-1, 1, 8)
    plain = trainer(1000, normalize=normalize, tol=1e-8).fit(X, y)
    scaled = trainer(1000, normalize=normalize, tol=1e-8).fit(scale * X, scale * y)
    new = rng.uniform(-1, 1, (5, 4))
    assert scaled.converged_
    np.testing.assert_allclose(scaled.predict(scale * new) / scale, plain.predict(new), rtol=1e-6, atol=1e-9)


@core
def test_values_of_constant_columns_have_no_effect():
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((8, 3)), rng.standard_normal(8)
    constant = np.column_stack([X, np.full(8, 0.1), np.zeros(8), np.full(8, -1e300)])
    fitted, expected = trainer(500, normalize="lift").fit(constant, y), trainer(500, normalize="lift").fit(X, y)
    assert fitted.converged_ and expected.converged_
    moved = constant + np.array([0, 0, 0, 5, 7, 1e299])
    np.testing.assert_array_equal(fitted.predict(moved), fitted.predict(constant))


# ======================================================================================================================
# Trainer: scikit-learn's conventions
# ======================================================================================================================


@parametrize_with_checks([SublinearTrainer(1024, shift=0.5)])
def test_scikit_learn_accepts_the_trainer(estimator, check):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        check(estimator)


def test_the_trainer_works_in_pipelines_and_searches():
    X, y = load_diabetes(return_X_y=True)
    X, y = X[:80], y[:80]
    model = SublinearTrainer(512, shift=0.0, damping=1e-2, tol=1e-2, max_iter=5, random_state=0)
    scores = cross_val_score(make_pipeline(StandardScaler(), model), X, y, cv=3)
    assert scores.shape == (3,) and np.isfinite(scores).all()
    found = GridSearchCV(model, {"width": [128, 256], "shift": [0.0, 0.5]}, cv=2).fit(X, y)
    assert found.best_params_["width"] in (128, 256) and isinstance(found.best_estimator_, SublinearTrainer)
    many = MultiOutputRegressor(model).fit(X, np.column_stack([y, -y]))
    assert many.predict(X[:5]).shape == (5, 2)


class Frame:
    """As much of a data frame as the trainer looks at."""

    def __init__(self, values, columns):
        self.values, self.columns, self.shape = values, columns, values.shape

    def __array__(self, dtype=None, copy=None):
        return np.asarray(self.values, dtype)

    def __len__(self):
        return len(self.values)


@core
def test_features_are_counted_and_named():
    X, y = problem(6, 3)
    fitted = trainer(200, normalize="lift", max_iter=1).fit(Frame(X, ["a", "b", "c"]), y)
    assert fitted.n_features_in_ == 3 and list(fitted.feature_names_in_) == ["a", "b", "c"]
    np.testing.assert_array_equal(fitted.predict(Frame(X, ["a", "b", "c"])), fitted.predict(Frame(X, ["a", "b", "c"])))
    with pytest.raises(ValueError, match=r"(?s)should match.*unseen at fit time:\n- d\n.*now missing:\n- c\n"):
        fitted.predict(Frame(X, ["a", "b", "d"]))
    with pytest.raises(ValueError, match="must be in the same order"):
        fitted.predict(Frame(X, ["b", "a", "c"]))
    with pytest.warns(UserWarning, match="X does not have valid feature names"):
        fitted.predict(X)
    fitted.fit(X, y)
    assert not hasattr(fitted, "feature_names_in_")
    with pytest.warns(UserWarning, match="X has feature names, but"):
        fitted.predict(Frame(X, ["a", "b", "c"]))


@core
def test_a_column_of_targets_is_taken_with_a_warning():
    X, y = problem(6, 3)
    with pytest.warns(DataConversionWarning, match=r"column-vector y was passed.*pass y.ravel\(\)"):
        column = trainer(200, max_iter=2).fit(X, y[:, None])
    np.testing.assert_array_equal(column.predict(X), trainer(200, max_iter=2).fit(X, y).predict(X))


@core
def test_trainers_that_are_not_fitted_raise_what_scikit_learn_expects():
    with pytest.raises(NotFittedError, match="not fitted yet"):
        SublinearTrainer().predict(X5)


@core
def test_loss_curve_is_half_the_mean_squared_error():
    X, y = problem(8, 3)
    y, seen = 40.0 + 5.0 * y, []
    fitted = trainer(300, normalize="lift", max_iter=3)
    fitted.set_params(callback=lambda record: seen.append(0.5 * np.mean((fitted.predict(X) - y) ** 2))).fit(X, y)
    np.testing.assert_allclose(fitted.loss_curve_, seen, rtol=1e-6)


@core
def test_representation_names_what_is_not_default():
    assert repr(SublinearTrainer(64, solver="cg")) == "SublinearTrainer(width=64, solver='cg')"


@core
@searches
@pytest.mark.parametrize("init", ["antisymmetric", "gaussian"])
def test_warm_starts_go_on_from_the_last_weights(search, init):
    X, y = problem(10, 3)
    options = {"width": 200, "shift": 0.5, "search": search, "init": init, "damping": 0.05}
    whole = trainer(max_iter=6, **options).fit(X, y)
    parts = trainer(max_iter=3, warm_start=True, **options).fit(X, y).fit(X, y)
    np.testing.assert_allclose(parts.weights(), whole.weights(), rtol=1e-9, atol=1e-9)
    assert [record["iteration"] for record in parts.history_] == list(range(7))
    np.testing.assert_allclose(residuals_of(parts), residuals_of(whole), rtol=1e-9)
    parts.check()


@core
@searches
@pytest.mark.parametrize("init", ["antisymmetric", "gaussian"])
@pytest.mark.parametrize("before", SEARCHES)
def test_warm_starts_go_on_with_other_points_and_searches(search, init, before):
    X, y = problem(10, 3)
    more, targets = problem(16, 3, seed=5)
    options = {"width": 200, "shift": 0.8, "init": init, "damping": 0.05, "max_iter": 3, "warm_start": True}
    fitted = trainer(search=before, **options).fit(X, y)
    weights, signs = fitted.weights(), fitted.signs_
    fitted.set_params(search=search, max_iter=0).fit(more, targets)
    np.testing.assert_allclose(fitted.weights(), weights, atol=1e-12)
    np.testing.assert_array_equal(fitted.signs_, signs)
    fitted.check()
    fitted.set_params(max_iter=4).fit(more, targets)
    *_, (residual, expected) = dense_training(more, targets, weights, signs, fitted.shift_, 4, damping=0.05)
    assert fitted.residual_ == pytest.approx(residual, rel=1e-6)
    np.testing.assert_allclose(fitted.weights(), expected, atol=1e-8)
    np.testing.assert_allclose(fitted.predict(X), dense_outputs(X, expected, signs, fitted.shift_), atol=1e-8)
    fitted.check()


@core
@pytest.mark.parametrize("changed", [{"width": 64}, {"init": "gaussian"}, {"shift": 0.1}])
def test_warm_starts_refuse_another_network(changed):
    X, y = problem(6, 3)
    fitted = trainer(100, shift=0.5, warm_start=True, max_iter=1).fit(X, y)
    name = next(iter(changed))
    with pytest.raises(ValueError, match=rf"{name} must stay .* for warm_start=True.*, got .*; use warm_start=False"):
        fitted.set_params(**changed).fit(X, y)


# ======================================================================================================================
# Trainer: long runs
# ======================================================================================================================


@core
def test_a_callback_that_returns_true_stops_training():
    X, y = problem(6, 5)
    fitted = trainer(512, callback=lambda record: record["iteration"] == 2)
    with pytest.warns(ConvergenceWarning):
        fitted.fit(X, y)
    assert fitted.n_iter_ == 2 and len(fitted.history_) == 3
    fitted.check()


class Interrupted:
    """A method that is interrupted by SIGINT at its k-th call, once it has done its work, or before."""

    def __init__(self, method, k, early):
        self.method, self.left, self.early = method, k, early

    def __get__(self, instance, owner):
        def call(*arguments):
            self.left -= 1
            if self.left == 0 and self.early:
                os.kill(os.getpid(), signal.SIGINT)
            found = self.method(instance, *arguments)
            if self.left == 0 and not self.early:
                os.kill(os.getpid(), signal.SIGINT)
            return found

        return call


@core
@searches
@pytest.mark.parametrize("early", [True, False])
def test_an_interrupt_in_a_step_waits_for_its_end_and_goes_on_to_the_caller(search, early, monkeypatch):
    X, y = problem(8, 4)
    kind = sublin.SEARCHES[search]
    monkeypatch.setattr(kind, "advance", Interrupted(kind.advance, 2, early))
    fitted = trainer(400, search=search, damping="auto")
    handler = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        fitted.fit(X, y)
    assert signal.getsignal(signal.SIGINT) is handler
    assert fitted.n_iter_ == 2 and len(fitted.history_) == 3
    fitted.check()
    np.testing.assert_allclose(fitted.predict(X) - y, fitted._search.outputs - y, atol=1e-12)


@core
def test_an_interrupt_from_the_callback_leaves_the_trainer_usable():
    X, y = problem(8, 4)

    def interrupt(record):
        if record["iteration"] == 1:
            raise KeyboardInterrupt

    fitted = trainer(400, callback=interrupt)
    with pytest.raises(KeyboardInterrupt):
        fitted.fit(X, y)
    assert fitted.n_iter_ == 1
    fitted.check()
    fitted.set_params(callback=None, warm_start=True).fit(X, y)
    assert fitted.converged_


def test_interrupts_at_any_moment_of_a_run_leave_a_whole_network():
    code = (
        "import signal, sys, threading, time, os, numpy as np\n"
        "from sublin import SublinearTrainer\n"
        "rng = np.random.default_rng(0)\n"
        "X, y = rng.standard_normal((60, 8)), rng.standard_normal(60)\n"
        "for k in range(12):\n"
        "    net = SublinearTrainer(1 << 12, shift=1.0, tol=0.0, max_iter=10**6, random_state=0, damping=1e-3)\n"
        "    delay = rng.uniform(0, 0.08)\n"
        "    started = threading.Event()\n"
        "    net.callback = lambda record: started.set()\n"
        "    interrupt = lambda: (started.wait(), time.sleep(delay), os.kill(os.getpid(), signal.SIGINT))\n"
        "    threading.Thread(target=interrupt).start()\n"
        "    try:\n"
        "        net.fit(X, y)\n"
        "    except KeyboardInterrupt:\n"
        "        net.check()\n"
        "        assert len(net.history_) == net.n_iter_ + 1\n"
        "        print('whole')\n"
    )
    run = subprocess.run([sys.executable, "-c", code], cwd=HERE, capture_output=True, text=True, timeout=120)
    assert run.stdout.split() == ["whole"] * 12, run.stderr


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
    fitted = trainer(512, verbose=2, max_iter=2).fit(*problem(6, 5))
    assert bars[-1].n == 2 and bars[-1].total == 2 and not any(bar.open for bar in bars)
    assert bars[-1].residual == f"{fitted.residual_:.2e}"
    assert capsys.readouterr().out == ""
    monkeypatch.setitem(sys.modules, "tqdm", None)  # not installed
    trainer(512, verbose=2, max_iter=2).fit(*problem(6, 5))
    assert len(capsys.readouterr().out.splitlines()) == 3


@core
def test_drawing_neurons_reports_its_progress(monkeypatch, capsys):
    monkeypatch.setattr(sublin, "BLOCK", 64)
    monkeypatch.setattr(sublin.time, "perf_counter", iter(np.arange(0.0, 1e6, 2.0)).__next__)
    trainer(256, verbose=1, max_iter=0).fit(*problem(6, 5))
    lines = capsys.readouterr().out.splitlines()
    assert lines[:4] == [f"drawing neurons: {share:4.0%}" for share in (0.25, 0.5, 0.75, 1.0)]


# ======================================================================================================================
# Trainer: save and load
# ======================================================================================================================


@core
@searches
@pytest.mark.parametrize("init", ["antisymmetric", "gaussian"])
@pytest.mark.parametrize("normalize", ["lift", "rows", None])
def test_loaded_trainers_predict_to_the_bit_and_train_on(search, init, normalize, tmp_path, monkeypatch):
    X, y = problem(10, 3)
    new = problem(7, 3, seed=3)[0]
    options = {"width": 200, "shift": 0.5, "search": search, "init": init, "normalize": normalize, "damping": 0.05}
    fitted = trainer(max_iter=3, random_state=np.random.default_rng(0), callback=print, **options).fit(X, y)
    fitted.save(tmp_path / "net.npz")
    loaded = SublinearTrainer.load(tmp_path / "net.npz")
    np.testing.assert_array_equal(loaded.predict(new), fitted.predict(new))
    np.testing.assert_array_equal(loaded.weights(), fitted.weights())
    np.testing.assert_array_equal(loaded.signs_, fitted.signs_)
    for array, expected in zip(loaded.active_sets(), fitted.active_sets(), strict=True):
        np.testing.assert_array_equal(array, expected)
    assert loaded.history_ == fitted.history_ and loaded.get_params()["width"] == 200 and loaded.callback is None
    loaded.check()
    loaded.save(tmp_path / "again.npz")
    np.testing.assert_array_equal(SublinearTrainer.load(tmp_path / "again.npz").predict(new), fitted.predict(new))
    for trained in (loaded, fitted):
        trained.set_params(warm_start=True, max_iter=3, callback=None).fit(X, y)
    np.testing.assert_allclose(loaded.weights(), fitted.weights(), atol=1e-9)
    loaded.check()


@core
@searches
@pytest.mark.parametrize("init", ["antisymmetric", "gaussian"])
def test_predictions_after_loading_do_not_depend_on_numpys_generator(search, init, tmp_path, monkeypatch):
    X, y = problem(10, 3)
    fitted = trainer(200, search=search, init=init, max_iter=3, damping=0.05).fit(X, y)
    expected = fitted.predict(X)
    fitted.save(tmp_path / "net")

    def another_generator(seed, block, count, d, init):
        count = count // 2 if init == "antisymmetric" else count
        return np.full((count, d), 0.25, np.float32), np.ones(2 * count, np.int8)

    monkeypatch.setattr(sublin, "_starting_vectors", another_generator)
    loaded = SublinearTrainer.load(tmp_path / "net")
    np.testing.assert_array_equal(loaded.predict(X), expected)
    if init == "antisymmetric" and search != "dense":
        with pytest.raises(ValueError, match="NumPy's generator has changed since this network was saved"):
            loaded.weights()
    else:
        assert loaded.weights().shape == (200, 3)


@core
def test_saved_files_hold_no_more_than_live_neurons(tmp_path):
    X, y = problem(6, 3)
    fitted = trainer(20000, shift=2.5, max_iter=1, damping=1.0).fit(X, y)
    fitted.save(tmp_path / "net")
    assert (tmp_path / "net").stat().st_size < 8 * 3 * fitted.n_live_ + 20000


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Bytes of a saved trainer."""
    path = tmp_path_factory.mktemp("saved") / "net.npz"
    trainer(200, shift=0.5, max_iter=2, damping=0.05).fit(*problem(10, 3)).save(path)
    return path.read_bytes()


def refuses(path):
    with pytest.raises(
        ValueError, match=r"path must be a file written by SublinearTrainer.save, but .* is damaged or foreign"
    ):
        SublinearTrainer.load(path)


def test_truncated_files_are_refused(saved, tmp_path):
    for length in {0, 1, 100, *np.linspace(0, len(saved) - 1, 60).astype(int)}:
        (tmp_path / "net").write_bytes(saved[:length])
        refuses(tmp_path / "net")


def test_files_with_a_flipped_bit_are_refused_or_harmless(saved, tmp_path):
    X = problem(10, 3)[0]
    (tmp_path / "net").write_bytes(saved)
    expected, rng, refused = SublinearTrainer.load(tmp_path / "net").predict(X), np.random.default_rng(0), 0
    for place in rng.integers(len(saved) * 8, size=400):
        damaged = bytearray(saved)
        damaged[place // 8] ^= 1 << (place % 8)
        (tmp_path / "net").write_bytes(damaged)
        try:
            found = SublinearTrainer.load(tmp_path / "net").predict(X)
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


def test_foreign_files_are_refused_and_never_run(saved, tmp_path):
    path = tmp_path / "net"
    for content in (b"", b"hello", pickle.dumps(Trap()), saved[::-1]):
        path.write_bytes(content)
        refuses(path)
    np.save(tmp_path / "array.npy", np.ones(3))
    refuses(tmp_path / "array.npy")
    np.savez(tmp_path / "other.npz", X=np.ones(3))
    refuses(tmp_path / "other.npz")
    about = np.frombuffer(json.dumps({"format": sublin.FORMAT, "digest": "0"}).encode(), np.uint8)
    np.savez(tmp_path / "about.npz", about=about)
    refuses(tmp_path / "about.npz")
    np.savez(tmp_path / "trap.npz", about=np.array([Trap()], dtype=object))
    refuses(tmp_path / "trap.npz")


def test_missing_files_and_folders_raise_what_python_raises(tmp_path):
    with pytest.raises(FileNotFoundError):
        SublinearTrainer.load(tmp_path / "none")
    with pytest.raises(FileNotFoundError):
        trainer(64, max_iter=0).fit(X5, Y5).save(tmp_path / "none" / "net")
    with pytest.raises((AttributeError, NotFittedError), match="not fitted yet"):
        SublinearTrainer().save(tmp_path / "net")


def test_a_kill_at_any_moment_of_a_save_leaves_a_whole_file(tmp_path):
    code = (
        "import sys\n"
        "import numpy as np\n"
        "from sublin import SublinearTrainer\n"
        "rng = np.random.default_rng(0)\n"
        "net = SublinearTrainer(1 << 15, max_iter=1, shift=1.0, damping=1.0, random_state=0)\n"
        "net.fit(rng.standard_normal((20, 8)), rng.standard_normal(20))\n"
        "net.save(sys.argv[1] + '.first')\n"  # compiles what is not in the cache
        "print('ready', flush=True)\n"
        "while True:\n"
        "    net.save(sys.argv[1])\n"
    )
    path, rng, whole = tmp_path / "net.npz", np.random.default_rng(0), 0
    for _ in range(6):
        run = [sys.executable, "-W", "ignore", "-c", code, str(path)]
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
    fitted = trainer(64, max_iter=0).fit(X5, Y5)
    fitted.save(path)
    before = path.read_bytes()

    def full(*arguments, **arrays):
        raise OSError("no space left")

    monkeypatch.setattr(np, "savez", full)
    with pytest.raises(OSError, match="no space left"):
        fitted.save(path)
    assert path.read_bytes() == before and os.listdir(tmp_path) == ["net"]


# ======================================================================================================================
# Trainer: cases that have gone wrong
# ======================================================================================================================


@core
def test_rows_are_widened_by_what_is_counted_for_them():
    X, y = problem(12, 3)
    options = {"shift": 0.8, "damping": 0.05, "max_iter": 2, "warm_start": True}
    for scale in np.geomspace(0.1, 10, 8):
        fitted = trainer(600, **options).fit(X, y).fit(X[::-1], scale * y)
        assert fitted._search.n_live == fitted.n_live_
        fitted.check()


@core
def test_the_journal_has_room_for_a_flip_of_every_pair():
    fitted = trainer(2000, shift=0.0, damping="auto", max_iter=3, warm_start=True).fit([[1.0], [-1.0]], [1e3, -1e3])
    fitted.set_params(max_iter=1).fit([[1.0], [-1.0]], [-1e6, 1e6])
    assert fitted.history_[-1]["flips"] > fitted._search._used
    fitted.check()


@core
@pytest.mark.parametrize("n, d, width, shift", [(2, 2, 2000, 0.5), (4, 4, 4000, 1.0), (30, 3, 400, 0.5)])
def test_undo_restores_the_active_sets_after_long_steps(n, d, width, shift):
    for seed in range(90, 100):
        X, _ = problem(n, d, seed=seed)
        fitted = trainer(width, shift=shift, random_state=seed, max_iter=0).fit(X, np.full(n, 100.0))
        search, rng = fitted._search, np.random.default_rng(seed)
        search.advance(0.1 * rng.standard_normal(n), lambda phase: None)
        outputs, sets = search.outputs.copy(), search.active_sets()
        for _ in range(2):
            search.remember()
            search.advance(30 * rng.standard_normal(n), lambda phase: None)
            search.undo()
            for now, before in zip(search.active_sets(), sets, strict=True):
                np.testing.assert_array_equal(now, before)
            np.testing.assert_array_equal(search.outputs, outputs)
            fitted.residual_ = fitted._relative_residual()
            fitted.check()


def test_moves_beyond_float32_leave_lazy_steps_dense_steps():
    X, y = problem(12, 5)
    options = {"shift": 0.5, "damping": 0.05, "max_iter": 3}
    for scale in (1e-9, 1e40, 1e100):
        lazy, dense = (trainer(600, search=search, **options).fit(X, scale * y) for search in ("lazy", "dense"))
        residuals = [[step["residual"] for step in fitted.history_] for fitted in (lazy, dense)]
        np.testing.assert_allclose(*residuals, rtol=1e-6)


@core
def test_warm_starts_from_targets_of_zero_at_other_points():
    X, y = problem(12, 3)
    fitted = trainer(600, shift=0.8, damping="auto", warm_start=True).fit(X, y)
    Z, _ = problem(9, 3, seed=5)
    for scale in (0.0, 1e-30, 1e3):
        fitted.fit(Z, scale * np.ones(9)).fit(X, y).check()


@core
def test_flips_are_written_down_only_while_a_step_may_be_taken_back():
    X, y = problem(30, 5)
    fitted = trainer(400, shift=0.5, damping="auto", max_iter=2, warm_start=True, tol=0.0).fit(X, y)
    assert fitted._search._journal is None
    fitted.set_params(damping=0.01).fit(X, -y)
    assert fitted._search._journal is None
    fitted.check()


@core
def test_steps_with_coinciding_points_and_wide_rows_are_taken_back_to_the_bit():
    X, y = problem(30, 5)
    X[10:20] = X[:10]
    fitted = trainer(400, shift=0.5, damping=0.1, max_iter=1).fit(X, y)
    weights = fitted.weights()
    fitted._search.remember()
    fitted._search.advance(100.0 * y, lambda phase: None)
    assert fitted._search.widened > 0
    fitted._search.undo()
    np.testing.assert_array_equal(fitted.weights(), weights)
    fitted.check()


@core
@searches
def test_what_no_step_can_reduce_does_not_blow_up_the_dual_step(search):
    X, y = problem(20, 4)
    X[1], X[3] = X[0], X[2]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fitted = trainer(2000, search=search, shift=0.5, damping="auto", tol=0.0, max_iter=30).fit(X, y)
    bound = np.sqrt(((y[0] - y[1]) ** 2 + (y[2] - y[3]) ** 2) / 2) / np.linalg.norm(y)
    assert fitted.residual_ == pytest.approx(bound, rel=1e-6)
    fitted.check()


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
    fitted.set_params(init="gaussian", width=100, normalize="rows", shift=2.0).save(tmp_path / "net")
    np.testing.assert_array_equal(SublinearTrainer.load(tmp_path / "net").predict(X), expected)
    with pytest.raises(ValueError, match="search must be one of"):
        fitted.set_params(search="Lazy").save(tmp_path / "net")


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
def test_either_kind_of_convergence_warning_can_be_filtered():
    for category in (ConvergenceWarning, sublin.ConvergenceWarning):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", category)
            trainer(64, max_iter=1).fit(*problem(6, 3))


# ======================================================================================================================
# Bad input
# ======================================================================================================================

X5, Y5 = problem(5, 3)
NAN = np.array([[1.0, 0.0], [np.nan, 1.0]])


def fit(X=X5, y=Y5, **options):
    return lambda: SublinearTrainer(**{"width": 64, "random_state": 0, **options}).fit(X, y)


def fitted_trainer():
    return trainer(64, shift=0.0, max_iter=0).fit(X5, Y5)


def trees():
    return MaxTrees(np.ones((2, 3)), np.ones((20, 3)))


def jacobian():
    return SparseJacobian(X5, np.ones(4), np.arange(6), [0, 1, 2, 3, 0])


BAD_INPUT = [
    # X and y
    (fit(X=X5[0]), ValueError, r"X must have 2 dimension\(s\), got shape \(3,\). Reshape your data: pass X\[:, None\]"),
    (fit(X=X5[None]), ValueError, r"X must have 2 dimension\(s\), got shape \(1, 5, 3\)"),
    (fit(X=np.ones((0, 3)), y=[]), ValueError, r"X must not be empty, but has 0 sample\(s\) \(shape=\(0, 3\)\)"),
    (fit(X=np.ones((5, 0))), ValueError, r"X must not be empty, but has 0 feature\(s\) \(shape=\(5, 0\)\)"),
    (fit(X=NAN, y=[1, 2]), ValueError, r"X must be finite, but X\[1, 0\] is NaN; remove or impute"),
    (fit(X=[[1, np.inf]], y=[1]), ValueError, r"X must be finite, but X\[0, 1\] is inf"),
    (fit(X=[["a", "b"]], y=[1]), TypeError, r"X must be an array of numbers, got dtype <U1; encode it as numbers"),
    (
        fit(X=[[object()]], y=[1]),
        TypeError,
        r"X must be an array of numbers, but of its entries: float\(\) argument must be",
    ),
    (fit(X=None), TypeError, r"X must be an array of numbers, got None"),
    (fit(X=X5 + 0j), ValueError, r"Complex data not supported: X must be real; pass its real part"),
    (
        fit(X=scipy.sparse.csr_matrix(X5)),
        TypeError,
        r"X is a sparse matrix, which is not supported; pass X.toarray\(\)",
    ),
    (fit(X=[[1.0, 2.0], [3.0]], y=[1, 2]), ValueError, r"X must be an array, but its rows have different lengths"),
    (fit(y=Y5[:4]), ValueError, r"y must have 5 entries, one for each row of X, got 4"),
    (fit(y=np.ones((5, 2))), ValueError, r"y must have 1 dimension\(s\), got shape \(5, 2\)"),
    (fit(y=None), ValueError, r"fit requires y to be passed, but the target y is None"),
    (fit(y=[1, 2, np.nan, 4, 5]), ValueError, r"y must be finite, but y\[2\] is NaN"),
    (fit(y=["a"] * 5), TypeError, r"y must be an array of numbers, got dtype <U1"),
    (fit(y=Y5 * 1j), ValueError, r"Complex data not supported: y must be real"),
    (
        fit(X=X5 * [[1], [1], [2], [1], [1]], normalize=None),
        ValueError,
        r'rows of X must have length 1, but row 2 has length 2; pass X / np.linalg.norm.*normalize="rows" or "lift"',
    ),
    (
        fit(X=[[1.0, 2.0]], y=[1.0], normalize="rows"),
        ValueError,
        r'row 0 of X is zero once columns are centred.*"lift"',
    ),
    # options
    (fit(width=0), ValueError, r"width must be at least 1, got 0"),
    (fit(width=-4), ValueError, r"width must be at least 1, got -4"),
    (fit(width=2.5), TypeError, r"width must be an integer, got 2.5"),
    (fit(width=True), TypeError, r"width must be an integer, got True"),
    (fit(width="wide"), TypeError, r"width must be an integer, got 'wide'"),
    (fit(width=65), ValueError, r'init="antisymmetric" needs an even width, got 65; use it \+- 1, or init="gaussian"'),
    (fit(width=2**50), ValueError, r"width must be at most 1099511627776, got 1125899906842624"),
    (fit(width=2**50, shift=40.0), ValueError, r"width must be at most"),
    (fit(width=10**400), ValueError, r"width must be at most 1099511627776, got more than 2\^80"),
    (fit(width=2**40, shift=0.5), MemoryError, r"[\d,.]+ GiB, but [\d,.]+ GiB are available; use fewer neurons"),
    (fit(shift=10**400), ValueError, r"shift must be finite, got 1000"),
    (fit(X=[[10**400, 1], [2, 3]], y=[1, 2]), ValueError, r"X must be finite, but has an integer beyond all floats"),
    (fit(sketch_size=2**50, solver="sketch"), MemoryError, r"a sketch with sketch_size=1125899906842624 would need"),
    (
        fit(width=2**40, shift=0.5, search="lazy"),
        MemoryError,
        r"live pairs of 5 points and 1099511627776 neurons would need [\d,.]+ GiB",
    ),
    (fit(width=2**40, search="scan"), MemoryError, r"[\d,.]+ GiB, but"),
    (fit(width=2**40, search="dense"), MemoryError, r"32,768\.0 GiB, but"),
    (fit(width=2**70), ValueError, r"width must be at most"),
    (fit(search="fast"), ValueError, r"search must be one of 'dense', 'scan', 'tree', 'lazy', got 'fast'"),
    (fit(search=["tree"]), ValueError, r"search must be one of 'dense', 'scan', 'tree', 'lazy', got \['tree'\]"),
    (
        fit(solver="lu"),
        ValueError,
        r"solver must be one of 'cholesky', 'sketch', 'richardson', 'cg', 'gradient', got 'lu'",
    ),
    (fit(sketch="fft"), ValueError, r"sketch must be one of 'sparse', 'srht', 'gaussian', got 'fft'"),
    (fit(sketch_size=0), ValueError, r"sketch_size must be at least 1, got 0"),
    (fit(sketch_size=4, solver="sketch"), ValueError, r"sketch_size must be at least the number 5 of points, got 4"),
    (fit(sketch_size=4, solver="richardson"), ValueError, r"sketch_size must be at least the number 5 of points"),
    (fit(sketch_size=8.0), TypeError, r"sketch_size must be an integer, got 8.0"),
    (fit(init="zeros"), ValueError, r"init must be one of 'antisymmetric', 'gaussian', got 'zeros'"),
    (fit(dtype="float16"), ValueError, r"dtype must be one of 'float32', 'float64', got 'float16'"),
    (fit(normalize="columns"), ValueError, r"normalize must be one of 'lift', 'rows'.*, got 'columns'"),
    (fit(shift=np.nan), ValueError, r"shift must be finite, got nan"),
    (fit(shift="big"), TypeError, r"shift must be a number or \"auto\", got 'big'"),
    (fit(shift=np.ones(2)), TypeError, r"shift must be a number, got array"),
    (fit(alpha=1.0), ValueError, r"alpha must be a finite number in \[0, 1\), got 1.0"),
    (fit(alpha=-0.1), ValueError, r"alpha must be a finite number in \[0, 1\), got -0.1"),
    (fit(damping=-1), ValueError, r"damping must be a finite number in \[0, inf\), got -1"),
    (fit(damping=None), TypeError, r"damping must be a number, got None"),
    (fit(damping="automatic"), TypeError, r"damping must be a number or \"auto\", got 'automatic'"),
    (fit(damping=np.nan), ValueError, r"damping must be a finite number in \[0, inf\), got nan"),
    (fit(verbose=3), ValueError, r"verbose must be one of 0, 1, 2, got 3"),
    (fit(warm_start="yes"), ValueError, r"warm_start must be one of False, True, got 'yes'"),
    (fit(tol=np.nan), ValueError, r"tol must be a finite number in \[0, inf\), got nan"),
    (fit(tol="tight"), TypeError, r"tol must be a number, got 'tight'"),
    (fit(max_iter=-1), ValueError, r"max_iter must be at least 0, got -1"),
    (fit(max_iter=1.5), TypeError, r"max_iter must be an integer, got 1.5"),
    (fit(callback=3), TypeError, r"callback must be callable, got 3"),
    (fit(random_state=-1), ValueError, r"random_state must be at least 0, got -1"),
    (fit(random_state=2**64), ValueError, r"random_state must be below 2\^64, got 18446744073709551616"),
    (fit(random_state="seed"), TypeError, r"random_state must be an integer, got 'seed'"),
    (
        lambda: SublinearTrainer().set_params(depth=3),
        ValueError,
        r"parameter must be one of 'width', 'shift'.*, got 'depth'",
    ),
    # trained networks
    (lambda: SublinearTrainer().predict(X5), AttributeError, r"not fitted yet; call fit\(X, y\) first"),
    (lambda: SublinearTrainer().score(X5, Y5), AttributeError, r"not fitted yet"),
    (lambda: SublinearTrainer().weights(), AttributeError, r"not fitted yet"),
    (lambda: SublinearTrainer().active_sets(), AttributeError, r"not fitted yet"),
    (lambda: SublinearTrainer().signs_, AttributeError, r"not fitted yet"),
    (
        lambda: fitted_trainer().predict(X5[:, :2]),
        ValueError,
        r"X has 2 features, but SublinearTrainer is expecting 3 features as input",
    ),
    (lambda: fitted_trainer().predict(X5[0]), ValueError, r"X must have 2 dimension\(s\)"),
    (lambda: fitted_trainer().predict(2 * X5), ValueError, r"rows of X must have length 1, but row \d has length 2"),
    (lambda: fitted_trainer().score(X5, Y5[:4]), ValueError, r"y must have 5 entries, one for each row of X, got 4"),
    (lambda: fitted_trainer().score(X5, Y5[:1]), ValueError, r"y must have 5 entries, one for each row of X, got 1"),
    (lambda: fitted_trainer().score(X5, np.ones(5)), ValueError, r"y must not be constant, since R\^2"),
    # trees
    (lambda: MaxTrees(np.ones(3), np.ones((4, 3))), ValueError, r"X must have 2 dimension\(s\), got shape \(3,\)"),
    (lambda: MaxTrees(np.ones((2, 3)), NAN), ValueError, r"W must be finite, but W\[1, 0\] is NaN"),
    (lambda: MaxTrees(np.ones((2, 3)), np.ones((0, 3))), ValueError, r"W must not be empty"),
    (lambda: MaxTrees(np.ones((2, 3)), np.ones((4, 2))), ValueError, r"W has 2 columns and X has 3; they must agree"),
    (
        lambda: MaxTrees(np.ones((1 << 20, 1)), np.ones((1 << 20, 1))),
        MemoryError,
        r"MaxTrees of 1048576 points and 1048576 neurons would need 8,7\d\d\.\d GiB",
    ),
    (lambda: trees().query(2, 0.0), IndexError, r"i must be in 0..1, got 2"),
    (lambda: trees().query(-1, 0.0), IndexError, r"i must be in 0..1, got -1"),
    (lambda: trees().query(0.0, 0.0), TypeError, r"i must be an integer, got 0.0"),
    (lambda: trees().query(0, np.nan), ValueError, r"tau must be a number, possibly infinite, got nan"),
    (lambda: trees().query(0, "1"), ValueError, r"tau must be a number, possibly infinite, got '1'"),
    (lambda: trees().query(0, b"1"), ValueError, r"tau must be a number, possibly infinite, got b'1'"),
    (lambda: trees().query(0, None), ValueError, r"tau must be a number, possibly infinite, got None"),
    (lambda: trees().query(0, 1j), ValueError, r"tau must be a number, possibly infinite, got 1j"),
    (lambda: trees().query_all([0.0, 1.0]), ValueError, r"tau must be a number, possibly infinite"),
    (lambda: trees().update(20, np.ones(3)), IndexError, r"j must be in 0..19, got 20"),
    (lambda: trees().update(0, np.ones(2)), ValueError, r"w must have 3 entries, one for each column of X, got 2"),
    (lambda: trees().update(0, [1, 2, np.nan]), ValueError, r"w must be finite, but w\[2\] is NaN"),
    (lambda: trees().update_many([0, 20], np.ones((2, 3))), IndexError, r"js must be in 0..19, got 20"),
    (lambda: trees().update_many([-1], np.ones((1, 3))), IndexError, r"js must be in 0..19, got -1"),
    (lambda: trees().update_many([3, 5, 3], np.ones((3, 3))), ValueError, r"js must be distinct, but 3 occurs 2 times"),
    (lambda: trees().update_many([0.5], np.ones((1, 3))), TypeError, r"js must be a non-empty vector of integers"),
    (lambda: trees().update_many([], np.ones((0, 3))), TypeError, r"js must be a non-empty vector of integers"),
    (lambda: trees().update_many([1, 2], np.ones((3, 3))), ValueError, r"W_new must have 2 rows, one for each of js"),
    # Jacobian
    (lambda: SparseJacobian(X5[0], np.ones(4), [0], []), ValueError, r"X must have 2 dimension\(s\)"),
    (lambda: SparseJacobian(X5, np.ones((4, 1)), [0] * 6, []), ValueError, r"signs must have 1 dimension\(s\)"),
    (
        lambda: SparseJacobian(X5, np.ones(4), [0, 1], [0]),
        ValueError,
        r"indptr must rise from 0 to indices.size = 1 in 6 entries, one more than X has rows; got 2 entries",
    ),
    (
        lambda: SparseJacobian(X5, [1.0, -1.0, 0.5, 1.0], [0] * 6, []),
        ValueError,
        r"signs must be \+1 or -1, but signs\[2\] is 0.5",
    ),
    (lambda: SparseJacobian(X5, np.ones(4), [0, 2, 1, 2, 2, 2], [0, 1]), ValueError, r"indptr must rise from 0"),
    (
        lambda: SparseJacobian(X5, np.ones(4), np.array([0, 2, 1, 2, 2, 2], np.uint64), [0, 1]),
        ValueError,
        r"indptr must rise from 0",
    ),
    (lambda: SparseJacobian(X5, np.ones(4), [0, 1, 1, 1, 1, 1], [4]), IndexError, r"indices must be in 0..3, got 4..4"),
    (
        lambda: SparseJacobian(X5, np.ones(4), [0, 1, 1, 1, 1, 1], [-1]),
        IndexError,
        r"indices must be in 0..3, got -1..-1",
    ),
    (
        lambda: SparseJacobian(X5, np.ones(4), [0, 1, 1, 1, 1, 1], [1.5]),
        TypeError,
        r"indices must be a vector of integers",
    ),
    (
        lambda: SparseJacobian(X5, np.ones(4), [0, 2, 2, 2, 2, 2], [1, 1]),
        ValueError,
        r"indices must name a neuron at most once",
    ),
    (lambda: jacobian().matvec(np.ones(3)), ValueError, r"dimension mismatch"),
    (lambda: jacobian().matvec(np.ones(12) * 1j), ValueError, r"Complex data not supported: u must be real"),
    (lambda: jacobian().rmatvec(np.full(5, np.nan)), ValueError, r"v must be finite, but v\[0\] is NaN"),
    (lambda: jacobian().gram_times(np.ones(3)), ValueError, r"v must have 5 entries"),
    (lambda: jacobian().gram_times(np.ones((5, 2))), ValueError, r"v must have 1 dimension"),
    # sketches
    (lambda: sparse_sign_sketch(np.ones((5, 12)), 8, 0), TypeError, r"J must be a SparseJacobian, got ndarray"),
    (lambda: srht_sketch(jacobian().tocsr(), 8, 0), TypeError, r"J must be a SparseJacobian, got csr_matrix"),
    (lambda: gaussian_sketch(jacobian(), 0, 0), ValueError, r"size must be at least 1, got 0"),
    (lambda: sparse_sign_sketch(jacobian(), 8.5, 0), TypeError, r"size must be an integer, got 8.5"),
    # theory
    (lambda: default_shift(0), ValueError, r"width must be at least 1, got 0"),
    (lambda: default_shift(10, alpha=1.5), ValueError, r"alpha must be a finite number in \[0, 1\), got 1.5"),
    (lambda: separability([1.0, 2.0]), ValueError, r"X must have 2 dimension\(s\), got shape \(2,\)"),
    (lambda: separability(NAN), ValueError, r"X must be finite, but X\[1, 0\] is NaN"),
    (lambda: shifted_ntk(3 * X5, 0.5), ValueError, r"rows of X must have length 1, but row \d has length 3"),
    (lambda: shifted_ntk(X5, np.inf), ValueError, r"shift must be finite, got inf"),
    (lambda: shifted_ntk(X5, None), TypeError, r"shift must be a number, got None"),
    (lambda: smallest_ntk_eigenvalue(X5[0], 0.5), ValueError, r"X must have 2 dimension\(s\), got shape \(3,\)"),
    (lambda: smallest_ntk_eigenvalue(3 * X5, 0.5), ValueError, r"rows of X must have length 1, but row \d has length 3"),
    (lambda: smallest_ntk_eigenvalue(X5, "b"), TypeError, r"shift must be a number, got 'b'"),
    (lambda: ntk_eigenvalue_bounds(NAN, 0.5), ValueError, r"X must be finite, but X\[1, 0\] is NaN"),
    (lambda: ntk_eigenvalue_bounds(3 * X5, 0.5), ValueError, r"rows of X must have length 1, but row \d has length 3"),
    (lambda: ntk_eigenvalue_bounds(X5, -0.5), ValueError, r"shift must be a finite number in \[0, inf\), got -0.5"),
    (lambda: ntk_eigenvalue_bounds(X5, np.nan), ValueError, r"shift must be a finite number in \[0, inf\), got nan"),
    (lambda: ntk_eigenvalue_bounds(X5[:1], 0.5), ValueError, r"X must have at least 2 rows for a separability, got 1"),
]


@core
@pytest.mark.parametrize("call, error, message", BAD_INPUT, ids=[row[2][:40] for row in BAD_INPUT])
def test_bad_input_is_refused_by_name(call, error, message):
    with pytest.raises(error, match=message):
        call()


@core
def test_weights_that_do_not_fit_are_refused_before_they_are_allocated(monkeypatch):
    fitted = fitted_trainer()

    def full(what, needed):
        raise MemoryError(f"{what}: {needed} bytes")

    monkeypatch.setattr(sublin, "_check_memory", full)
    with pytest.raises(MemoryError, match=r"weights\(\) of 64 neurons in 3 dimensions: 1536 bytes"):
        fitted.weights()


@core
def test_weights_beyond_float32_do_not_enter_float32_trees():
    trees = MaxTrees(np.ones((2, 3), np.float32), np.ones((20, 3), np.float32))
    with pytest.raises(ValueError, match=r"W_new has entries beyond the range of float32, up to 1e\+300"):
        trees.update(0, [1e300, 0.0, 0.0])
    trees.check()


@core
def test_refused_updates_leave_the_trees_as_they_were():
    held = trees()
    for js, W_new in (([0, 20], np.ones((2, 3))), ([1, 1], np.zeros((2, 3))), ([1], [[np.nan] * 3])):
        with pytest.raises((ValueError, IndexError)):
            held.update_many(js, W_new)
    np.testing.assert_array_equal(held.W, np.ones((20, 3)))
    held.check()


# ======================================================================================================================
# Peers of the benchmark
# ======================================================================================================================


@pytest.fixture
def peers_problem():
    """A small problem whose held-out points are those of the training, so that predictions have residuals."""
    rng = np.random.default_rng(0)
    X, y = rng.standard_normal((6, 4)), rng.standard_normal(6) + 2.0
    return bench.Problem.of(X, y, X, y, width=64, shift=0.5, damping=1e-3)


def logged_residuals(train, steps):
    """The first residuals that a peer logs."""
    residuals = []

    def log(residual):
        residuals.append(residual)
        if len(residuals) == steps:
            raise bench.Enough

    with pytest.raises(bench.Enough):
        train(log)
    return residuals


def skip_without_torch(name):
    if name.startswith("torch"):
        pytest.importorskip("torch")


@pytest.mark.parametrize("name", bench.PEERS)
def test_a_peer_logs_the_residual_of_its_predictions(name, peers_problem):
    skip_without_torch(name)
    y = peers_problem.y
    for options in bench.PEERS[name].grid:
        train, predict = bench.PEERS[name].start(peers_problem, **options)
        residual = logged_residuals(train, 1 if name == "kernel" else 3)[-1]
        expected = np.linalg.norm(predict() - y) / np.linalg.norm(y - y.mean())
        np.testing.assert_allclose(residual, expected, rtol=1e-4, atol=1e-6)


def test_plain_numpy_takes_the_steps_of_the_trainer(peers_problem):
    train, _ = bench.numpy_peer(peers_problem, damping=1e-3, dtype="float64")
    trainer = SublinearTrainer(**{**peers_problem.options, "tol": 0.0, "max_iter": 3}, search="dense")
    with pytest.warns(RuntimeWarning, match="is above tol"):
        trainer.fit(peers_problem.X, peers_problem.y)
    expected = [record["residual"] for record in trainer.history_]
    np.testing.assert_allclose(logged_residuals(train, 4), expected, rtol=1e-8)


@pytest.mark.parametrize("method", ["adam", "lbfgs"])
def test_the_first_step_in_pytorch_is_that_in_numpy(method, peers_problem):
    pytest.importorskip("torch")
    X, y, W, signs = peers_problem.arrays(np.float64)
    products = X @ W.T - peers_problem.trainer.shift_
    error = np.maximum(products, 0) @ signs / 8.0 - y
    gradient = (error[:, None] * (products > 0) * signs / 8.0).T @ X
    if method == "adam":
        train, _ = bench.torch_adam(peers_problem, rate=0.5)
        W = W - 0.5 / 8.0 * gradient / (np.abs(gradient) + 1e-8)  # mean and variance of one gradient
    else:
        train, _ = bench.torch_lbfgs(peers_problem, step_size=0.5, line_search=None)
        W = W - 0.5 * min(1.0, 1.0 / np.abs(gradient).sum()) * gradient
    moved = np.maximum(X @ W.T - peers_problem.trainer.shift_, 0) @ signs / 8.0 - y
    expected = np.linalg.norm([error, moved], axis=1) / np.linalg.norm(y)
    np.testing.assert_allclose(logged_residuals(train, 2), expected, rtol=1e-5)


def test_kernel_regression_at_new_points():
    rng = np.random.default_rng(1)
    X, y, new = rng.standard_normal((8, 3)), rng.standard_normal(8), rng.standard_normal((5, 3))
    problem = bench.Problem.of(X, y, new, np.ones(5), width=64, shift=0.5, normalize="rows")
    train, predict = bench.kernel_peer(problem)
    logged_residuals(train, 1)
    rows = (np.concatenate([X, new]) - X.mean(axis=0)) / X.std(axis=0)
    rows /= np.linalg.norm(rows, axis=1, keepdims=True)
    kernel = shifted_ntk(rows, 0.5)
    expected = kernel[8:, :8] @ np.linalg.solve(kernel[:8, :8], y - y.mean()) + y.mean()
    np.testing.assert_allclose(predict(), expected, rtol=1e-8)


def test_time_to_a_target():
    seconds, residuals = [1.0, 2.0, 3.0, 4.0, 5.0], [1.0, 1e-2, 1e-3, 5e-3, 1e-4]
    assert bench.time_to(1e-3, seconds, residuals) == 3.0
    assert bench.time_to(0.5, seconds, residuals) == 2.0
    assert bench.time_to(1e-6, seconds, residuals) is None
    assert bench.time_to(1e-6, [1.0, 2.0], [1.0, np.nan]) is None


def made_up_peer(curves):
    """A peer that logs one of the given residual curves at once, then has no more to say."""
    grid = tuple({"k": k} for k in range(len(curves)))
    return bench.Peer("made up", lambda problem, k: (lambda log: [log(r) for r in curves[k]], None), grid, "", "")


@pytest.mark.parametrize(
    ("curves", "best"),
    [
        ([[1.0, 0.3], [1.0, 0.2], [1.0, np.nan]], 1),  # none reaches a target: the closest
        ([[1.0, 2e-3], [1.0, 9e-4], [1.0, np.inf]], 1),
        ([[1.0, 1e-4], [1.0, 0.5, 1e-7], [1.0, 1e-5]], 1),  # the last target counts first
    ],
)
def test_tuning_takes_the_entry_that_gets_there(curves, best, peers_problem):
    runs, options = bench.tune(made_up_peer(curves), peers_problem._replace(held_out_X=None), cap=1.0)
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
    ours = [{"seconds": [1.0, 2.0, 4.0], "residuals": [1.0, 1e-3, 1e-7], "accuracy": 0.75}] * 3
    theirs = [{"seconds": [1.0, 9.0, 30.0], "residuals": [1.0, 5e-4, 2e-4], "accuracy": 0.5}]
    data = {"targets": [1e-3, 1e-6], "cases": {"random": {"cap": 30.0, "runs": {"ours": ours, "torch adam": theirs}}}}
    data["summary"] = bench.peers_summary(data)
    table = bench.peers_table(data)
    assert "| sublin | 1 | 1 | 75.0 % |" in table
    assert "(float32) | 4.5 | not within 30 s (2e-04) | 50.0 % |" in table


# ======================================================================================================================
# The module as a whole
# ======================================================================================================================


def test_public_names_are_documented():
    for name in sublin.__all__:
        assert getattr(sublin, name).__doc__


def test_importing_takes_less_than_half_a_second_beyond_dependencies():
    program = (
        "import time, numpy, scipy.linalg, scipy.sparse.linalg, scipy.special, numba\n"
        "begin = time.perf_counter()\n"
        "import sublin\n"
        "print(time.perf_counter() - begin)"
    )
    run = [sys.executable, "-c", program]
    runs = [subprocess.run(run, cwd=HERE, capture_output=True, text=True, check=True) for _ in range(3)]
    assert min(float(run.stdout) for run in runs) < 0.5


def test_the_example_in_the_readme_prints_what_it_says():
    text = (HERE / "README.md").read_text()
    example = re.search(r"^```python\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    printed = re.search(r"^```text\n(.*?)^```", text[example.end() :], re.DOTALL | re.MULTILINE)
    run = subprocess.run([sys.executable, "-c", example[1]], cwd=HERE, capture_output=True, text=True, check=True)
    assert run.stdout == printed[1]


# ======================================================================================================================
# Claims of the paper: what bench.py measures, and its verdicts
# ======================================================================================================================

LINEAR = -50.0  # a threshold below all products: every neuron is active, and the network is linear in its weights
SILENT = 50.0  # one above all of them


def signed_problem(n, d, seed=0):
    return bench.random_unit_data(n, d, seed)


@core
def test_contraction_of_linear_and_of_silent_networks():
    X, y = signed_problem(3, 5)
    linear = bench.contraction(X, y, 64, 0, shift=LINEAR)
    assert (linear["steps"], linear["end"]) == (1, "converged")
    assert linear["ratios"][0] < 1e-9
    assert bench.halves(linear)
    silent = bench.contraction(X, y, 64, 0, shift=SILENT)
    assert silent == {"ratios": [], "steps": 0, "end": "singular"}
    assert not bench.halves(silent)


@core
def test_contraction_fails_where_points_outnumber_neurons():
    cell = bench.contraction(*signed_problem(40, 4), 24, 0)
    assert not bench.halves(cell)
    assert cell["end"] in ("stuck", "singular") or max(cell["ratios"]) > 0.5


@core
def test_needed_width_is_that_of_theorem_4_1():
    assert bench.needed_width(np.eye(2), 0.0) == pytest.approx((2 / 0.5) ** 4)
    assert bench.needed_width(np.eye(1), 0.0) == pytest.approx(4 * np.log(160))
    assert bench.needed_width(np.ones((2, 1)), 0.0) > 1e50


@core
def test_starting_activity_of_linear_and_of_silent_networks():
    X, _ = signed_problem(3, 5)
    every = {"shift": LINEAR, "mean": 64.0, "largest": 64, "sum": 192, "union": 64}
    assert bench.starting_activity(X, 64, 0, shift=LINEAR) == every
    none = {"shift": SILENT, "mean": 0.0, "largest": 0, "sum": 0, "union": 0}
    assert bench.starting_activity(X, 64, 0, shift=SILENT) == none


@core
def test_starting_activity_counts_what_products_reach():
    X, y = problem(4, 3)
    W, _, shift = start(X, y, 500, init="gaussian")
    active = X @ W.T >= shift
    found = bench.starting_activity(X, 500, 0)
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
    X, y = signed_problem(16, 8)
    assert bench.inner_iterations(X, y, 256, 0, "richardson", shift=0.5, sketch_size=16) is None


@core
def test_starting_gram_of_a_linear_network_is_its_kernel_and_of_few_neurons_singular():
    X, _ = signed_problem(3, 5)
    found = bench.starting_gram(X, 64, 0, shift=LINEAR)
    assert found["smallest"] == pytest.approx(np.linalg.eigvalsh(X @ X.T)[0])
    assert found["kernel"] == pytest.approx(found["smallest"])
    assert found["distance"] < 1e-12
    few = bench.starting_gram(signed_problem(20, 2)[0], 8, 0, shift=1.0)
    assert few["smallest"] < 0.75 * few["kernel"]


@core
def test_a_linear_network_is_kernel_regression_and_a_narrow_one_is_not():
    X, y = signed_problem(4, 8)
    assert bench.kernel_gap(X, y, 64, 0, LINEAR) < 1e-8
    assert bench.kernel_gap(X, y, 256, 0, 1.0) > 1e-3


@core
def test_starting_norms_are_those_of_the_weights():
    X, y = problem(4, 3)
    W, signs, shift = start(X, y, 300, init="gaussian")
    found = bench.starting_norms(X, 300, 0)
    assert found["weights"] == pytest.approx(np.linalg.norm(W, 2) / np.sqrt(300))
    assert found["output"] == pytest.approx(np.abs(dense_outputs(X, W, signs, shift)).max())
    assert found["output with max(z, b)"] == pytest.approx(np.abs(np.maximum(X @ W.T, shift) @ signs).max() / np.sqrt(300))
    J = dense_jacobian(X, X @ W.T >= shift, signs)
    assert found["jacobian"] == pytest.approx(np.linalg.norm(J, axis=1).max())


@core
def test_retracing_a_linear_network_finds_one_step_and_no_flips():
    X, y = signed_problem(3, 5)
    found = bench.retrace(X, y, 64, 0, shift=LINEAR)
    W, signs, shift = start(X, y, 64, init="gaussian", shift=LINEAR)
    g = np.linalg.solve(X @ X.T, dense_outputs(X, W, signs, shift) - y)
    assert found["move"] == pytest.approx(np.linalg.norm(g @ X) / 8, rel=1e-6)
    assert found["gram smallest"] == pytest.approx(np.linalg.eigvalsh(X @ X.T)[0])
    assert found["converged"]
    assert [found[key] for key in ("jacobian change", "gram change", "flipped / active", "flipped / all")] == [0.0] * 4


def test_retracing_follows_the_dense_loop():
    X, y = signed_problem(6, 4)
    found = bench.retrace(X, y, 256, 0, shift=1.0)
    W, signs, shift = start(X, y, 256, init="gaussian", shift=1.0)
    states = [W for residual, W in dense_training(X, y, W, signs, shift, 20)]
    jacobians = [dense_jacobian(X, X @ W.T >= shift, signs) for W in states]
    grams = [J @ J.T for J in jacobians]
    ever = np.any([(X @ W.T >= shift) != (X @ states[0].T >= shift) for W in states], axis=0)
    assert found["move"] == pytest.approx(max(np.linalg.norm(W - states[0], axis=1).max() for W in states), rel=1e-6)
    assert found["jacobian change"] == pytest.approx(max(np.linalg.norm(J - jacobians[0]) for J in jacobians))
    assert found["gram change"] == pytest.approx(max(np.linalg.norm(G - grams[0]) for G in grams))
    assert found["gram smallest"] == pytest.approx(min(np.linalg.eigvalsh(G)[0] for G in grams))
    assert found["flipped / all"] == ever.sum() / (6 * 256)
    assert found["gram change"] > found["kernel"] / 2  # far too narrow for Lemma 4.3


@core
def test_timed_runs_say_whether_they_reached_the_tolerance():
    X, y = signed_problem(3, 5)
    found = bench.timed_run(X, y, 64, 0, 1e-6, shift=LINEAR)
    assert (found["converged"], found["active"], found["steps"]) == (True, 1.0, 1)
    assert found["worst"] < 1e-6
    assert 0 < found["training"] < found["seconds"]
    assert bench.timed_run(X, y, 64, 0, 1e-6, shift=SILENT) == {"converged": False}


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


@core
@pytest.mark.parametrize("rho, expected", [(-1.0, 0.0), (0.0, 0.0), (1.0, norm.sf(0.5))])
def test_kernel_entry_of_opposite_orthogonal_and_coinciding_points(rho, expected):
    found = bench.kernel_entry(rho, 0.5, 1000, 0)
    assert found["closed"] == pytest.approx(expected, abs=1e-14)
    assert found["sampled"] == pytest.approx(expected, abs=0.08)


@core
def test_step_cost_is_the_mean_over_the_steps():
    X, y = signed_problem(3, 5)
    steps = bench.train("tree", X, y, 64, init="gaussian", shift=0.0).history_[1:]
    found = bench.step_cost(X, y, 64, 0, "tree", shift=0.0)
    assert found["operations"] == np.mean([step["operations"] for step in steps])


@core
def test_slopes_and_least_widths_of_known_samples():
    samples = [{"seed": seed, "width": 1 << k, "value": 3.0 * (1 << k) ** 0.7} for seed in (0, 1) for k in (4, 6, 8)]
    assert bench.slopes(samples, lambda sample: sample["value"], 16) == pytest.approx([0.7, 0.7])
    assert bench.least(samples, "width", lambda sample: sample["width"] > 20) == 64
    assert bench.least(samples, "width", lambda sample: True) == 16
    assert bench.least(samples, "width", lambda sample: sample["width"] < 100) is None
    assert bench.spread([3.0, 1.0, 2.0]) == "2 (1 to 3)"


@pytest.fixture(scope="module")
def measured():
    return {name: measure(True, range(2)) for name, measure in bench.PARTS.items()}


def scaled(key, power, factor=1.0):
    return lambda sample: {key: factor * sample["width"] ** power}


# judge, part, samples, words of the claim; what is put into all of the samples so that it holds, and so that it cannot
VERDICTS = [
    ("contraction", "contraction", "regime", "widths of the theorem", {"ratios": [0.5]}, {"ratios": [0.51]}),
    ("contraction", "contraction", "cells", "widths measured", {"ratios": [0.5]}, {"ratios": [0.1, 0.51]}),
    ("contraction", "contraction", "cells", "widths measured", {"end": "converged"}, {"end": "stuck"}),
    ("costs", "rest", "costs", "operations of a step", scaled("operations", 0.75), scaled("operations", 0.95)),
    ("costs", "rest", "costs", "seconds of a step", scaled("seconds", 0.75), scaled("seconds", 0.95)),
    ("sparsity", "sparsity", "counts", "at most 2 m^0.76", {"largest": 1}, scaled("largest", 1.0)),
    ("sparsity", "sparsity", "counts", "|Q_i| = O", scaled("mean", 0.7), scaled("mean", 0.99)),
    ("sparsity", "sparsity", "unions", "|K| is at most", {"union": 7, "sum": 7}, {"union": 8, "sum": 7}),
    ("sparsity", "sparsity", "unions", "sublinear in m", {"union": 1}, scaled("union", 1.0)),
    ("trees", "rest", "trees", "init touches", scaled("init", 1.0, 17.0), scaled("init", 1.0, 18.0)),
    ("trees", "rest", "trees", "an update touches", {"update": 16 * 35}, {"update": 16 * 53}),
    ("trees", "rest", "trees", "a query touches", {"query": 64, "reported": 2}, {"query": 97, "reported": 2}),
    ("sketches", "sketches", "distortions", "embeds, random", {"value": 0.1}, {"value": 0.11}),
    ("sketches", "sketches", "distortions", "embeds, coherent", {"value": 0.1}, {"value": 0.11}),
    ("sketches", "sketches", "counts", "conjugate gradients", {"value": 20, "log": 1.0}, {"value": 30, "log": 1.0}),
    ("sketches", "sketches", "counts", "the paper's iteration", {"value": 20, "log": 1.0}, {"value": 30, "log": 1.0}),
    ("ntk", "ntk", "grams", "H_dis", {"smallest": 0.75, "kernel": 1.0}, {"smallest": 0.74, "kernel": 1.0}),
    ("ntk", "ntk", "sandwich", "lambda lies between", {"low": 1e-9}, {"low": 1.0, "eigenvalue": 0.9, "high": 2.0}),
    ("ntk", "ntk", "sandwich", "lambda lies between", {"high": 9.0}, {"high": 1.0, "eigenvalue": 1.1}),
    ("ntk", "ntk", "grams", "Gram matrix tends", scaled("distance", -0.5), {"distance": 0.1}),
    ("ntk", "ntk", "gaps", "kernel regression", scaled("value", -0.1), scaled("value", 0.1)),
    ("norms", "rest", "norms", "|W(0)|", {"weights": 3.0}, {"weights": 3.1}),
    ("norms", "rest", "norms", "|J_i|", {"jacobian": 1.0}, {"jacobian": 1.1}),
    ("norms", "rest", "norms", "|f_0|", {"output": 3.0}, {"output": 3.1}),
    ("paths", "rest", "paths", "|G_t - G_0|", {"gram change": 1.0, "kernel": 2.0}, {"gram change": 1.1, "kernel": 2.0}),
    ("paths", "rest", "paths", "smallest eigenvalue", {"gram smallest": 1.0, "kernel": 2.0}, {"gram smallest": 0.0}),
    ("paths", "rest", "paths", "weights move", {"move": 1.0, "kernel": 0.01}, {"move": 1.0, "kernel": 2.0}),
    ("paths", "rest", "paths", "|J_t - J_0|", {"jacobian change": 1.0, "move": 1.0}, {"jacobian change": 6.0, "move": 1.0}),
    ("paths", "rest", "paths", "positions", {"flipped / active": 0.1}, {"flipped / active": 0.11}),
    ("descent", "rest", "descent", "number of steps", {"steps": 4}, lambda sample: {"steps": sample["n"]}),
    ("shift", "shift", "runs", "one b", {"converged": True, "steps": 3, "active": 0.1, "worst": 0.1}, {"converged": False}),
]


@pytest.mark.parametrize("judge, part, key, words, good, bad", VERDICTS, ids=[f"{row[0]}-{row[3]}" for row in VERDICTS])
def test_verdicts_follow_the_samples(measured, judge, part, key, words, good, bad):
    for change, expected in ((good, True), (bad, False)):
        samples = [{**sample, **(change(sample) if callable(change) else change)} for sample in measured[part][key]]
        found = {**measured, part: {**measured[part], key: samples}}
        verdicts = [bool(claim.holds) for claim in getattr(bench, f"judge_{judge}")(found) if words in claim.claim]
        assert verdicts
        assert set(verdicts) == {expected}


def test_the_race_is_won_where_the_least_median_is(measured):
    for winner, expected in (("lazy", True), ("dense", False)):
        cells = [
            {**cell, "converged": True, **{key: {n: [2.0, 1.0 if n == winner else 2.0] for n in cell[key]} for key in times}}
            for cell in measured["crossover"]["cells"]
            for times in [("seconds", "training")]
        ]
        found = {"crossover": {**measured["crossover"], "cells": cells}}
        assert {claim.holds for claim in bench.judge_crossover(found)} == {expected}
