"""Tests of sublin against slow twins in plain float64 NumPy.

Tests marked `core` are small enough to run interpreted, and are the ones to repeat with bounds checks:

    NUMBA_DISABLE_JIT=1 python -m pytest -m core
    NUMBA_BOUNDSCHECK=1 NUMBA_CACHE_DIR=.boundscheck python -m pytest -m core
"""

import re
import subprocess
import sys
import tracemalloc
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
from sklearn.datasets import load_digits
from sklearn.metrics import r2_score

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
    """A trainer on data as they are, from seed 0."""
    options = {"normalize": None, "random_state": 0, "tol": 1e-9, **options}
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


def spoil_first(name, value):
    """Overwrites an entry of the first row with an active pair, or of its first pair, the most active one."""

    def spoil(search):
        pairs = search._pairs
        q = np.argmax(np.isfinite(pairs.certificates))
        array, place = (pairs.rows[name], q) if name in pairs.rows.dtype.names else (getattr(pairs, name), q)
        if array.size != len(pairs.rows):
            place = pairs.rows["start"][q]
        array[place] = value(array[place])

    return spoil


@core
@pytest.mark.parametrize(
    "spoil, message",
    [
        (spoil_first("certificates", lambda certificate: np.inf), "a pair can flip before its certificate ends"),
        (spoil_first("limit", lambda limit: limit + 3.0), "a pair can flip before its certificate ends"),
        (spoil_first("margin", lambda margin: np.inf), "a product within the margin is not tracked"),
        (spoil_first("reach", lambda reach: 0), "active"),
        (spoil_first("products", lambda product: product + 1e-6), "a tracked product is wrong"),
        (spoil_first("active", lambda active: not active), "active"),
        (spoil_first("base", lambda base: base + 1.0), "the residual is not that of the weights"),
        (lambda search: search._sum.__iadd__(1e-6), "the residual is not that of the weights"),
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
KEYS = {"iteration", "residual", "active", "changed", "looked_at", "flips", "inner_iterations", "damping", "operations"}
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
    with pytest.warns(RuntimeWarning, match=r"after 1 steps is above tol=1e-09; use a larger width or a smaller shift"):
        fitted = trainer(512, max_iter=1).fit(*problem(6, 5))
    assert not fitted.converged_ and fitted.n_iter_ == 1


@core
def test_training_that_overflows_stops_and_warns(monkeypatch):
    monkeypatch.setattr(sublin, "_solve_cholesky", lambda J, residual, *_: (-1e250 * residual, 0, None))
    with np.errstate(over="ignore"), pytest.warns(RuntimeWarning, match=r"relative residual (inf|nan) after 1 steps"):
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
    """Rows of length 1, with the centre and the lift of the training points `like`."""
    centred = X - like.mean(axis=0)
    if normalize == "lift":
        lift = np.sqrt(((like - like.mean(axis=0)) ** 2).sum(axis=1).mean())
        centred = np.column_stack([centred, np.full(len(X), lift)])
    return unit_rows(centred)


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
    X, y = problem(6, 5)
    X[4] = X[1]
    with pytest.raises(np.linalg.LinAlgError, match=r"conjugate gradients did not reach .*singular.*damping > 0"):
        trainer(512, solver="cg").fit(X, y)


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
    (fit(X=X5[0]), ValueError, r"X must have 2 dimension\(s\), got shape \(3,\); pass X\[:, None\]"),
    (fit(X=X5[None]), ValueError, r"X must have 2 dimension\(s\), got shape \(1, 5, 3\)"),
    (fit(X=np.ones((0, 3)), y=[]), ValueError, r"X must not be empty, got shape \(0, 3\)"),
    (fit(X=np.ones((5, 0))), ValueError, r"X must not be empty, got shape \(5, 0\)"),
    (fit(X=NAN, y=[1, 2]), ValueError, r"X must be finite, but X\[1, 0\] is nan; remove or impute"),
    (fit(X=[[1, np.inf]], y=[1]), ValueError, r"X must be finite, but X\[0, 1\] is inf"),
    (fit(X=[["a", "b"]], y=[1]), TypeError, r"X must be an array of numbers, got dtype <U1; encode it as numbers"),
    (fit(X=[[object()]], y=[1]), TypeError, r"X must be an array of numbers, got dtype object"),
    (fit(X=None), TypeError, r"X must be an array of numbers, got dtype object"),
    (fit(X=X5 + 0j), TypeError, r"X must be real, got complex numbers"),
    (
        fit(X=scipy.sparse.csr_matrix(X5)),
        TypeError,
        r"X is a sparse matrix, which is not supported; pass X.toarray\(\)",
    ),
    (fit(X=[[1.0, 2.0], [3.0]], y=[1, 2]), ValueError, r"X must be an array, but its rows have different lengths"),
    (fit(y=Y5[:4]), ValueError, r"y must have 5 entries, one for each row of X, got 4"),
    (fit(y=Y5[:, None]), ValueError, r"y must have 1 dimension\(s\), got shape \(5, 1\)"),
    (fit(y=[1, 2, np.nan, 4, 5]), ValueError, r"y must be finite, but y\[2\] is nan"),
    (fit(y=["a"] * 5), TypeError, r"y must be an array of numbers, got dtype <U1"),
    (fit(y=Y5 * 1j), TypeError, r"y must be real, got complex numbers"),
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
    (fit(width=2**50), MemoryError, r"[\d,.]+ GiB, but [\d,.]+ GiB are available; use fewer neurons"),
    (
        fit(width=2**50, search="lazy"),
        MemoryError,
        r"live pairs of 5 points and 1125899906842624 neurons would need [\d,.]+ GiB",
    ),
    (fit(width=2**50, search="scan"), MemoryError, r"[\d,.]+ GiB, but"),
    (fit(width=2**50, search="dense"), MemoryError, r"33,554,432\.0 GiB, but"),
    (fit(width=2**70), MemoryError, r"[\d,.]+ GiB, but"),
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
    (fit(shift="big"), TypeError, r"shift must be a number, got 'big'"),
    (fit(shift=np.ones(2)), TypeError, r"shift must be a number, got array"),
    (fit(alpha=1.0), ValueError, r"alpha must be a finite number in \[0, 1\), got 1.0"),
    (fit(alpha=-0.1), ValueError, r"alpha must be a finite number in \[0, 1\), got -0.1"),
    (fit(damping=-1), ValueError, r"damping must be a finite number in \[0, inf\), got -1"),
    (fit(damping=None), TypeError, r"damping must be a number, got None"),
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
    (lambda: fitted_trainer().predict(X5[:, :2]), ValueError, r"X has 2 columns, but fit saw 3"),
    (lambda: fitted_trainer().predict(X5[0]), ValueError, r"X must have 2 dimension\(s\)"),
    (lambda: fitted_trainer().predict(2 * X5), ValueError, r"rows of X must have length 1, but row \d has length 2"),
    (lambda: fitted_trainer().score(X5, Y5[:4]), ValueError, r"y must have 5 entries, one for each row of X, got 4"),
    (lambda: fitted_trainer().score(X5, Y5[:1]), ValueError, r"y must have 5 entries, one for each row of X, got 1"),
    (lambda: fitted_trainer().score(X5, np.ones(5)), ValueError, r"y must not be constant, since R\^2"),
    # trees
    (lambda: MaxTrees(np.ones(3), np.ones((4, 3))), ValueError, r"X must have 2 dimension\(s\), got shape \(3,\)"),
    (lambda: MaxTrees(np.ones((2, 3)), NAN), ValueError, r"W must be finite, but W\[1, 0\] is nan"),
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
    (lambda: trees().update(0, [1, 2, np.nan]), ValueError, r"w must be finite, but w\[2\] is nan"),
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
    (lambda: jacobian().matvec(np.ones(12) * 1j), TypeError, r"u must be real, got complex numbers"),
    (lambda: jacobian().rmatvec(np.full(5, np.nan)), ValueError, r"v must be finite, but v\[0\] is nan"),
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
    (lambda: separability(NAN), ValueError, r"X must be finite, but X\[1, 0\] is nan"),
    (lambda: shifted_ntk(3 * X5, 0.5), ValueError, r"rows of X must have length 1, but row \d has length 3"),
    (lambda: shifted_ntk(X5, np.inf), ValueError, r"shift must be finite, got inf"),
    (lambda: shifted_ntk(X5, None), TypeError, r"shift must be a number, got None"),
    (lambda: smallest_ntk_eigenvalue(X5[0], 0.5), ValueError, r"X must have 2 dimension\(s\), got shape \(3,\)"),
    (lambda: smallest_ntk_eigenvalue(3 * X5, 0.5), ValueError, r"rows of X must have length 1, but row \d has length 3"),
    (lambda: smallest_ntk_eigenvalue(X5, "b"), TypeError, r"shift must be a number, got 'b'"),
    (lambda: ntk_eigenvalue_bounds(NAN, 0.5), ValueError, r"X must be finite, but X\[1, 0\] is nan"),
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
