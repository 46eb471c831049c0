"""Training two-layer networks in time sublinear in their width.

An implementation of

    [DHSWZ] Y. Deng, H. Hu, Z. Song, O. Weinstein, D. Zhuo, "Training Overparametrized Neural Networks in
            Sublinear Time", and of the methods it is compared with there.

The network is f(x) = m^(-1/2) sum_r a_r (<w_r, x> - b)_+ , a shifted ReLU whose threshold b grows with the width m, so
that few neurons are active on any point.  Training is Gauss-Newton: with J the Jacobian of f at the n training points,

    solve  (J J^T) g = f - y,    then    W <- W - J^T g.

Both halves touch active neurons only.  What remains is to *find* them without looking at every product <w_r, x_i>; the
paper does that with n search trees, one for each point, whose leaves are the products and whose inner nodes are maxima.

Notation (the paper's symbol, its name here, its shape)

    x_i     X         data points, of Euclidean length 1                                  (n, d)
    y       y         targets                                                             (n,)
    w_r     W         hidden weights, N(0, I_d) at the start                              (m, d)
    a_r     signs     output signs, +1 or -1, never trained                               (m,)
    m       width     number of neurons
    b       shift     threshold of the ReLU, sqrt(0.5 (1 - alpha) ln m) by default
    Q_i     active    neurons active on x_i: {r : <w_r, x_i> >= b}                        set
    act(r)  --        points on which neuron r is active: {i : r in Q_i}                  set
    K       neurons   neurons active on some point, which are those a step changes        set
    --      live      neurons active on some point at the start: all that ever change     set
    J       J         Jacobian; block (i, r) is m^(-1/2) a_r x_i^T if r in Q_i, else 0    (n, m d)
    G       gram      Gram matrix J J^T                                                   (n, n)
    g       step      Gauss-Newton dual step                                              (n,)
    S       --        sketching matrix, never formed                                      (size, m d)
    R       T^-1      triangular factor that makes S J^T R orthonormal                    (n, n)
    lambda  --        smallest eigenvalue of the shifted neural tangent kernel

Where the paper disagrees with itself we read: (z - b)_+ for the activation, m^(-1/2) in front of the sum, "active" as >= b,
m d columns in J, g = R z in Algorithm 5, and its tolerance relative to ||f - y||.

Further references

    [BPSW21] J. van den Brand, B. Peng, Z. Song, O. Weinstein, "Training (Overparametrized) Neural Networks in
             Near-Linear Time", ITCS 2021.
    [CGH+19] T. Cai et al., "Gram-Gauss-Newton Method", arXiv:1905.11675.
    [CW13]   K. Clarkson, D. Woodruff, "Low Rank Approximation and Regression in Input Sparsity Time", STOC 2013.
    [NN13]   J. Nelson, H. Nguyen, "OSNAP: Faster Numerical Linear Algebra Algorithms", FOCS 2013.
    [SYZ21]  Z. Song, S. Yang, R. Zhang, "Does Preprocessing Help Training Over-parameterized Neural Networks?", 2021.
    [ZMG19]  G. Zhang, J. Martens, R. Grosse, "Fast Convergence of Natural Gradient Descent for Over-Parameterized Neural
             Networks", NeurIPS 2019.
    [Tro11]  J. Tropp, "Improved Analysis of the Subsampled Randomized Hadamard Transform", 2011.

The sections follow the data: threads, problem, trees, active sets and Jacobian, sketches, solvers, kernel theory, input
checks, searches, trainer.
"""

import ctypes
import inspect
import math
import os
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.special
from numba import njit, prange
from scipy.sparse.linalg import LinearOperator, cg

__all__ = [
    "MaxTrees",
    "SparseJacobian",
    "SublinearTrainer",
    "default_shift",
    "gaussian_sketch",
    "separability",
    "shifted_ntk",
    "sparse_sign_sketch",
    "srht_sketch",
]

# Parallel loops run over this many chunks whatever the number of threads, and partial sums are added chunk by chunk, so
# that the same seed gives the same bits with any number of threads. (BLAS may differ where it is left its own threads:
# in solves with n > 1024 and in wide dense products.)
CHUNKS = 64

# Reassociation lets sums and counts use vector registers. Flags that assume away infinities and NaN would break the
# comparisons with padding and with infinite thresholds.
FAST = {"reassoc", "contract", "nsz", "arcp"}

# ======================================================================================================================
# Threads
# ======================================================================================================================


def _run(kernel, work, *arguments):
    """kernel(*arguments), on one thread if it touches fewer than 2^16 numbers.

    To start and join the threads takes as long as that, and a whole slice of the scheduler if another program holds a core.
    """
    threads = numba.get_num_threads()
    numba.set_num_threads(threads if work >= 1 << 16 else 1)
    try:
        return kernel(*arguments)
    finally:
        numba.set_num_threads(threads)


@cache
def _openblas_threads():
    """(getter, setter) of the number of threads, for each OpenBLAS in the wheels of NumPy and SciPy; else none."""
    controls = []
    for package, suffix in ((np, "64_"), (scipy, "")):
        for path in Path(package.__file__).parent.parent.glob(f"{package.__name__}.libs/*openblas*"):
            library = ctypes.CDLL(str(path))
            names = (f"scipy_openblas_get_num_threads{suffix}", f"scipy_openblas_set_num_threads{suffix}")
            if all(hasattr(library, name) for name in names):
                controls.append(tuple(getattr(library, name) for name in names))
    return controls


@contextmanager
def _serial_blas():
    """Keeps BLAS and LAPACK on one thread, in the whole process: not for calls that overlap in several threads.

    Their idle threads spin for some 25 ms after a call, on cores that the compiled loops then wait for: a QR factorisation
    of 512 x 64 and three small loops after it took 3.9 + 7.6 ms, and 0.7 + 1.3 ms on one thread (2 cores, means).
    """
    before = [(set_threads, get_threads()) for get_threads, set_threads in _openblas_threads()]
    for set_threads, _ in before:
        set_threads(1)
    try:
        yield
    finally:
        for set_threads, threads in before:
            set_threads(threads)


# ======================================================================================================================
# Problem
# ======================================================================================================================

# Neurons whose starting weights are drawn together. A block takes 2 MB at d = 32, which stays in cache until it is used.
BLOCK = 1 << 14


def default_shift(width, alpha=0.04):
    """Threshold b = sqrt(0.5 (1 - alpha) ln width) of Theorem G.2, for 0 <= alpha < 1.

    A neuron is then active on a point with probability at most width^(-(1 - alpha) / 4), so that alpha = 0.04 leaves at
    most width^0.76 of them on average (Corollary A.11). Theorem G.2 itself asks for alpha > 0.
    """
    width = _check_integer("width", width, 1)
    alpha = _check_real("alpha", alpha, 0.0, 1.0)
    return math.sqrt(0.5 * (1.0 - alpha) * math.log(width))


def separability(X):
    """Separability of the rows of X (n, d): the least of |x_i - x_j| and |x_i + x_j| over i != j (Definition 2.11).

    Zero means that two points coincide or are opposite, and infinity that there is one point only. Takes O(n^2 d)
    operations and O(n d) memory.
    """
    X = _check_matrix("X", X)
    least = np.inf
    for i in range(1, len(X)):
        # From differences, not from |x|^2 + |z|^2 - 2 <x, z>, whose rounding hides distances below 1e-8.
        least = min(least, *(np.linalg.norm(X[:i] + sign * X[i], axis=1).min() for sign in (-1.0, 1.0)))
    return float(least)


def _starting_block(seed, block, count, d, init):
    """Starting weights (count, d) float32 and signs (count,) int8 of the neurons from block * BLOCK on.

    The generator is keyed by seed and block and keeps no other state, so any block can be made again, alone, on any
    thread. "antisymmetric" draws every vector once, for the two neurons 2k and 2k + 1 with signs +1 and -1.
    """

    def stream(number):
        key = np.array([seed, block], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, number]))

    if init == "antisymmetric":
        pairs = stream(0).standard_normal((count // 2, d), dtype=np.float32)
        return np.repeat(pairs, 2, axis=0), np.tile(np.array([1, -1], dtype=np.int8), count // 2)
    signs = 2 * stream(1).integers(0, 2, count, dtype=np.int8) - 1
    return stream(0).standard_normal((count, d), dtype=np.float32), signs


def _starting_blocks(seed, width, d, init, work):
    """Yields work(first neuron, weights, signs) block by block; threads draw and work on a few blocks ahead.

    Work is done with BLAS on one thread, so that the blocks share the cores evenly and the bits depend on nothing else.
    """

    def draw_and_work(first):
        return work(first, *_starting_block(seed, first // BLOCK, min(BLOCK, width - first), d, init))

    threads = numba.get_num_threads()
    with _serial_blas(), ThreadPoolExecutor(threads) as pool:
        ahead = deque()
        for first in range(0, width, BLOCK):
            ahead.append(pool.submit(draw_and_work, first))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        for done in ahead:
            yield done.result()


# ======================================================================================================================
# Trees (Algorithms 2-4, Theorem B.1)
# ======================================================================================================================
#
# The n trees have the same shape, so one array `rows` holds them all: a row is one node of every tree, and its entry i
# belongs to the tree of x_i. Level 0 holds the leaves, row r being (<w_r, x_1>, ..., <w_r, x_n>); row j of the next level
# is the elementwise maximum of rows FAN_OUT j, ..., FAN_OUT j + FAN_OUT - 1. Every level is padded with -inf to whole
# groups of FAN_OUT siblings, and the level that is a single group is the top one. With a fan-out of 2, m = 5, n = 2:
#
#     levels = (0, 6, 10, 12)
#     rows 10-11     [3 8]                   [7 1]                         first group looked at
#     rows  6-9      [2 8]       [3 1]       [7 1]       [--]              [--] is padding, -inf
#     rows  0-5      [2 0] [1 8] [3 1] [0 0] [7 1] [--]                    leaves: neurons 0 to 4
#
# Why this layout: at n = 64, d = 32, m = 2^20 (2 cores, medians) finding the active leaves, moving the changed ones and
# mending their ancestors took 26 ms with all trees in a row as here, and 35 ms with the 16 siblings of one tree in a cache
# line. Maxima are whole vectors here, and neurons come out in order; a query of a single tree pays for it by touching a
# cache line for every sibling. Fan-outs 8, 16 and 32 took 58, 57 and 69 ms in an earlier version with cache lines. A
# binary tree would hold 2 n m numbers instead of 1.07 n m.

FAN_OUT = 16


class ActiveSets(NamedTuple):
    """Active pairs by neuron: neuron neurons[q] is active on points[offsets[q]:offsets[q + 1]], both in ascending order.

    Neurons that are active on no point are left out, so `neurons` is the set K of the paper.
    """

    neurons: np.ndarray  # (|K|,) int64
    offsets: np.ndarray  # (|K| + 1,) int64
    points: np.ndarray  # (sum of |Q_i|,) int64


def _levels(leaves):
    """First row of each level, then the number of rows."""
    levels, groups = [0], leaves
    while groups > 1 or len(levels) == 1:
        groups = -(-groups // FAN_OUT)
        levels.append(levels[-1] + groups * FAN_OUT)
    return np.array(levels)


@njit(cache=True)
def _set_maximum(rows, first_child, parent):
    """rows[parent] = the maximum of the FAN_OUT rows from first_child on."""
    largest_row, children = rows[parent], rows[first_child : first_child + FAN_OUT]
    for i in range(largest_row.size):  # the loop over siblings inside, unrolled: half the time of the other order
        largest = children[0, i]
        for k in range(1, FAN_OUT):
            largest = children[k, i] if children[k, i] > largest else largest
        largest_row[i] = largest


@njit(parallel=True, cache=True)
def _mend(rows, first_child, first_parent, parents):
    """Mends the given parents of one level. O(n FAN_OUT) each."""
    for chunk in prange(CHUNKS):
        for q in range(parents.size * chunk // CHUNKS, parents.size * (chunk + 1) // CHUNKS):
            _set_maximum(rows, first_child + parents[q] * FAN_OUT, first_parent + parents[q])


@njit(cache=True)
def _parents(nodes):
    """Distinct parents of ascending nodes, and where the children of each start among the nodes."""
    parents = np.empty(nodes.size, np.int64)
    starts = np.empty(nodes.size + 1, np.int64)
    found = 0
    for q in range(nodes.size):
        parent = nodes[q] // FAN_OUT
        if found == 0 or parent != parents[found - 1]:
            parents[found] = parent
            starts[found] = q
            found += 1
    starts[found] = nodes.size
    return parents[:found].copy(), starts[: found + 1].copy()


def _mend_ancestors(rows, levels, nodes, level=0):
    """Mends every ancestor of the given nodes (ascending) of a level, once; returns how many tree nodes were touched."""
    touched = 0
    for first_child, first_parent in zip(levels[level:-2], levels[level + 1 : -1], strict=True):
        nodes, _ = _parents(nodes)
        work = nodes.size * (FAN_OUT + 1) * rows.shape[1]
        _run(_mend, work, rows, first_child, first_parent, nodes)
        touched += work
    return touched


@njit(parallel=True, cache=True, fastmath=FAST)
def _count_reaching(rows, first, groups, low, high, tau):
    """Number of points i in [low, high) with rows[r, i] >= tau, for every row r of the given groups of siblings."""
    counts = np.empty(groups.size * FAN_OUT, np.int64)
    one, zero = rows.dtype.type(1), rows.dtype.type(0)  # counted in the type of the rows, for full vectors
    for chunk in prange(CHUNKS):
        for q in range(groups.size * chunk // CHUNKS, groups.size * (chunk + 1) // CHUNKS):
            for k in range(FAN_OUT):
                row = rows[first + groups[q] * FAN_OUT + k, low:high]
                count = zero
                for i in range(row.size):
                    count += one if row[i] >= tau else zero
                counts[q * FAN_OUT + k] = np.int64(count)
    return counts


@njit(cache=True)
def _reaching(groups, counts):
    """Rows with a positive count, and the running sum of their counts."""
    rows = np.empty(counts.size + 1, np.int64)
    offsets = np.zeros(counts.size + 2, np.int64)
    found = 0
    for q in range(groups.size):
        for k in range(FAN_OUT):  # always written, kept if the count is positive: no branch to mispredict
            rows[found] = groups[q] * FAN_OUT + k
            offsets[found + 1] = offsets[found] + counts[q * FAN_OUT + k]
            found += counts[q * FAN_OUT + k] > 0
    return rows[:found].copy(), offsets[: found + 1].copy()


@njit(parallel=True, cache=True, fastmath=FAST)
def _report(rows, neurons, offsets, low, high, tau):
    """Points in [low, high) on which each neuron's leaf reaches tau, and the leaves' values there."""
    points = np.empty(offsets[-1], np.int64)
    values = np.empty(offsets[-1], rows.dtype)
    for chunk in prange(CHUNKS):
        for q in range(neurons.size * chunk // CHUNKS, neurons.size * (chunk + 1) // CHUNKS):
            row = rows[neurons[q], low:high]
            e, end = offsets[q], offsets[q + 1]
            i = 0
            if end - e == 1:  # most neurons fire once: a sum over the row finds the place with full vectors
                place = np.int32(0)
                for z in range(row.size):
                    place = np.int32(place + (np.int32(z) if row[z] >= tau else np.int32(0)))
                i = np.int64(place)
            while e < end:
                if row[i] >= tau:
                    points[e] = low + i
                    values[e] = row[i]
                    e += 1
                i += 1
    return points, values


def _least_at_or_above(tau, dtype):
    """The least finite number of a precision that is >= tau, so that comparing with it is comparing with tau itself.

    Finite, because padding is -inf and must never be reported. Infinite where tau is above all numbers.
    """
    with np.errstate(over="ignore"):
        least = np.maximum(dtype.type(tau), np.finfo(dtype).min)
        return np.nextafter(least, dtype.type(np.inf)) if float(least) < float(tau) else least


def _query(rows, levels, low, high, tau):
    """Algorithm 4 for the trees low, ..., high - 1 at once: descend from the top into every group that reaches tau.

    Returns the active sets, the products of the active pairs and the number of nodes touched, which for one tree is at
    most FAN_OUT times max(1, reported leaves) times (levels).  Given levels of height one it compares every leaf.
    """
    least = _least_at_or_above(tau, rows.dtype)
    reached = np.arange((levels[-1] - levels[-2]) // FAN_OUT)
    touched = 0
    for first in levels[-2::-1]:
        work = reached.size * FAN_OUT * (high - low)
        counts = _run(_count_reaching, work, rows, first, reached, low, high, least)
        reached, offsets = _reaching(reached, counts)
        touched += work
    points, values = _run(_report, reached.size * (high - low), rows, reached, offsets, low, high, least)
    return ActiveSets(reached, offsets, points), values, touched


@njit(cache=True)
def _by_point(active, n):
    """The same pairs by point: (indptr, indices), the neurons active on point i being indices[indptr[i]:indptr[i + 1]]."""
    indptr = np.zeros(n + 1, np.int64)
    for i in active.points:
        indptr[i + 1] += 1
    indptr = np.cumsum(indptr)
    free = indptr[:-1].copy()
    indices = np.empty(active.points.size, np.int64)
    for q in range(active.neurons.size):
        for e in range(active.offsets[q], active.offsets[q + 1]):
            i = active.points[e]
            indices[free[i]] = active.neurons[q]
            free[i] += 1
    return indptr, indices


class MaxTrees:
    """For each of n points, a tree of maxima over its products with m weight vectors (Theorem B.1).

    Parameters
    ----------
    X : (n, d) data points.
    W : (m, d) weight vectors, copied.

    Products are kept in float32 if X and W both are, else in float64. Building takes O(n m d); memory is
    (1 + 1/15) n m products, and W.

    Attributes
    ----------
    X, W : the points, and the weight vectors as they are now.
    touched : int, tree nodes read or written since the beginning; one product or maximum of one tree is one node.
    """

    def __init__(self, X, W):
        X, W = _check_matrix("X", X, keep_float32=True), _check_matrix("W", W, keep_float32=True)
        _check_columns("W", W, "X", X)
        dtype = np.result_type(X, W)
        self._levels = _levels(len(W))
        _check_memory(f"MaxTrees of {len(X)} points and {len(W)} neurons", len(X) * int(self._levels[-1]) * dtype.itemsize)
        self.X, self.W = X.astype(dtype), W.astype(dtype)
        self._rows = np.full((self._levels[-1], len(X)), -np.inf, dtype)
        np.matmul(self.W, self.X.T, out=self._rows[: len(W)])
        _mend_ancestors(self._rows, self._levels, np.arange(len(W)))
        self.touched = self._rows.size

    def query(self, i, tau):
        """Algorithm 4: ascending int64 indices j with <w_j, x_i> >= tau, k of them, in O((1 + k) log m)."""
        i = _check_index("i", i, len(self.X))
        active, _, touched = _query(self._rows, self._levels, i, i + 1, _check_threshold(tau))
        self.touched += touched
        return active.neurons

    def query_all(self, tau):
        """All n queries in one descent: (indptr, indices), the answer for x_i being indices[indptr[i]:indptr[i + 1]].

        A group of siblings is read for all points as soon as one of them reaches tau there: O(n (1 + |K|) log m) for
        the set K of reported neurons.
        """
        active, _, touched = _query(self._rows, self._levels, 0, len(self.X), _check_threshold(tau))
        self.touched += touched
        return _by_point(active, len(self.X))

    def update(self, j, w):
        """Algorithm 3: replaces w_j by w (d,) in O(n (d + log m))."""
        w = _check_vector("w", w, size=self.X.shape[1], reason="one for each column of X")
        self.update_many([_check_index("j", j, len(self.W))], w[None])

    def update_many(self, js, W_new):
        """Replaces the k weight vectors with the distinct indices js (k,) by the rows of W_new (k, d).

        Every ancestor is recomputed once: O(k n (d + log m)), less where paths meet.
        """
        js = _check_indices("js", js, len(self.W))
        W_new = _check_matrix("W_new", W_new, rows=js.size, reason="one for each of js")
        _check_columns("W_new", W_new, "X", self.X)
        W_new = _check_cast("W_new", W_new, self.W.dtype)
        order = np.argsort(js)
        js = js[order]
        self.W[js] = W_new[order]
        self._rows[js] = self.W[js] @ self.X.T
        self.touched += js.size * len(self.X) + _mend_ancestors(self._rows, self._levels, js)

    def check(self):
        """Asserts every invariant: leaves are products, inner nodes maxima of their children, padding -inf."""
        m, levels = len(self.W), self._levels
        tolerance = 4 * self.X.shape[1] * np.finfo(self.X.dtype).eps
        scale = np.linalg.norm(self.W, axis=1)[:, None] * np.linalg.norm(self.X, axis=1)
        leaves = self._rows[:m]
        assert np.all(np.abs(leaves - self.W @ self.X.T) <= tolerance * scale), "a leaf is not the product of its vectors"
        count = m
        for first, end, parents in zip(levels[:-1], levels[1:], [*levels[1:-1], None], strict=True):
            assert np.all(self._rows[first + count : end] == -np.inf), "padding is not -inf"
            if parents is not None:
                groups = self._rows[first:end].reshape(-1, FAN_OUT, len(self.X))
                count = len(groups)
                maxima = self._rows[parents : parents + count]
                assert np.array_equal(maxima, groups.max(axis=1)), "an inner node is not the maximum of its children"


# ======================================================================================================================
# Active sets and the sparse Jacobian (Definitions 2.6 and 2.7)
# ======================================================================================================================


def _grouped(neurons, points):
    """ActiveSets of pairs (neuron, point) in ascending order."""
    starts = np.flatnonzero(np.diff(neurons, prepend=-1))
    return ActiveSets(neurons[starts], np.append(starts, neurons.size), points)


def _by_neuron(indptr, indices):
    """ActiveSets of pairs given in CSR by point."""
    order = np.argsort(indices, kind="stable")
    return _grouped(indices[order], np.repeat(np.arange(indptr.size - 1), np.diff(indptr))[order])


@njit(cache=True)
def _flips(old, new):
    """Pairs in one of two active sets only: (neurons, points, +1 where the pair woke and -1 where it fell asleep)."""
    room = old.points.size + new.points.size
    neurons, points, signs = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)
    found = p = q = 0
    while p < old.neurons.size or q < new.neurons.size:
        in_old = p < old.neurons.size and (q == new.neurons.size or old.neurons[p] <= new.neurons[q])
        in_new = q < new.neurons.size and (p == old.neurons.size or new.neurons[q] <= old.neurons[p])
        neuron = old.neurons[p] if in_old else new.neurons[q]
        e, e_end = (old.offsets[p], old.offsets[p + 1]) if in_old else (0, 0)
        h, h_end = (new.offsets[q], new.offsets[q + 1]) if in_new else (0, 0)
        while e < e_end or h < h_end:
            if e < e_end and h < h_end and old.points[e] == new.points[h]:  # nearly all pairs
                e += 1
                h += 1
                continue
            woke = e == e_end or (h < h_end and new.points[h] < old.points[e])
            neurons[found] = neuron
            points[found] = new.points[h] if woke else old.points[e]
            signs[found] = 1 if woke else -1
            found += 1
            h += woke
            e += not woke
        p += in_old
        q += in_new
    return neurons[:found].copy(), points[:found].copy(), signs[:found].copy()


@njit(parallel=True, cache=True, fastmath=FAST)
def _outputs(active, signs, values, shift, n):
    """sum over r in Q_i of signs[r] (values[r, i] - shift), for every i, in CHUNKS partial sums; signs of active.neurons."""
    partial = np.zeros((CHUNKS, n))
    for chunk in prange(CHUNKS):
        sums = partial[chunk]
        for q in range(active.neurons.size * chunk // CHUNKS, active.neurons.size * (chunk + 1) // CHUNKS):
            for e in range(active.offsets[q], active.offsets[q + 1]):
                sums[active.points[e]] += signs[q] * (values[e] - shift)
    return partial


@njit(cache=True, fastmath=FAST)
def _dot(u, v):
    product = u.dtype.type(0)
    for k in range(u.size):
        product += u[k] * v[k]
    return product


@njit(cache=True, fastmath=FAST)
def _add_multiple(u, factor, v):
    """u += factor v."""
    for k in range(u.size):
        u[k] += factor * v[k]


@njit(parallel=True, cache=True, fastmath=FAST)
def _jacobian_times(X, active, signs, u):
    """J u sqrt(m) for u (m d,), in CHUNKS partial sums. O(nnz d), nnz being the number of active pairs."""
    d = X.shape[1]
    partial = np.zeros((CHUNKS, len(X)))
    for chunk in prange(CHUNKS):
        sums = partial[chunk]
        for q in range(active.neurons.size * chunk // CHUNKS, active.neurons.size * (chunk + 1) // CHUNKS):
            w = u[active.neurons[q] * d : (active.neurons[q] + 1) * d]
            for i in active.points[active.offsets[q] : active.offsets[q + 1]]:
                sums[i] += signs[q] * _dot(w, X[i])
    return partial


@njit(parallel=True, cache=True, fastmath=FAST)
def _jacobian_transpose_times(X, active, signs, v, out):
    """Adds J^T v sqrt(m) to out (m d,). O(nnz d)."""
    d = X.shape[1]
    for chunk in prange(CHUNKS):
        for q in range(active.neurons.size * chunk // CHUNKS, active.neurons.size * (chunk + 1) // CHUNKS):
            w = out[active.neurons[q] * d : (active.neurons[q] + 1) * d]
            for i in active.points[active.offsets[q] : active.offsets[q + 1]]:
                _add_multiple(w, signs[q] * v[i], X[i])


@njit(parallel=True, cache=True, fastmath=FAST)
def _gram_times(X, XXt, active, v):
    """G v m, in CHUNKS partial sums, neuron by neuron: k^2 operations through X X^T if it is active on k <= d points, as
    most are, and 2 k d through J (J^T v) otherwise."""
    d = X.shape[1]
    partial = np.zeros((CHUNKS, len(X)))
    for chunk in prange(CHUNKS):
        sums = partial[chunk]
        w = np.empty(d)
        for q in range(active.neurons.size * chunk // CHUNKS, active.neurons.size * (chunk + 1) // CHUNKS):
            first, end = active.offsets[q], active.offsets[q + 1]
            if end - first <= d:
                for e in range(first, end):
                    i, product = active.points[e], 0.0
                    for h in range(first, end):
                        product += XXt[i, active.points[h]] * v[active.points[h]]
                    sums[i] += product
            else:
                w[:] = 0.0
                for i in active.points[first:end]:
                    _add_multiple(w, v[i], X[i])
                for i in active.points[first:end]:
                    sums[i] += _dot(w, X[i])
    return partial


@njit(parallel=True, cache=True)
def _coactivity(active, n, bands):
    """C[i, j] = |Q_i n Q_j| for j <= i. O(n^2 + bands nnz + sum over r of |act(r)|^2).

    Each of the bands of rows is counted by one thread, which passes over all neurons for it, so no count is shared.
    """
    counts = np.zeros((n, n), np.int64)
    for band in prange(bands):
        low, high = int(n * np.sqrt(band / bands)), int(n * np.sqrt((band + 1) / bands))  # equal shares of the triangle
        for q in range(active.neurons.size):
            first, e, end = active.offsets[q], active.offsets[q], active.offsets[q + 1]
            while e < end and active.points[e] < low:
                e += 1
            while e < end and active.points[e] < high:
                row = counts[active.points[e]]
                for j in active.points[first : e + 1]:
                    row[j] += 1
                e += 1
    return counts


@njit(parallel=True, cache=True)
def _gram(XXt, counts, width):
    """(X X^T) o C / m, from the lower triangle of C."""
    gram = np.empty_like(XXt)
    for k in prange(len(XXt)):
        i = k // 2 if k % 2 == 0 else len(XXt) - 1 - k // 2  # short rows with long ones
        for j in range(i + 1):
            gram[i, j] = gram[j, i] = XXt[i, j] * counts[i, j] / width
    return gram


class SparseJacobian(LinearOperator):
    """Jacobian of the network at the points X, from its active sets alone: a SciPy LinearOperator of shape (n, m d).

    Block (i, r) is m^(-1/2) signs[r] x_i^T if neuron r is active on point i and zero otherwise (Definition 2.6). A
    product with J or J^T costs O(nnz d), nnz being the number of active pairs; nothing of size n m d is formed.

    Parameters
    ----------
    X : (n, d) data points.
    signs : (m,) output signs.
    indptr, indices : active sets in CSR by point; the neurons active on x_i are indices[indptr[i]:indptr[i + 1]].

    Attributes: X; width, the number m of neurons; active, the ActiveSets by neuron. Raises TypeError, ValueError or
    IndexError on bad input.
    """

    def __init__(self, X, signs, indptr, indices):
        X = _check_matrix("X", X).copy()  # X X^T is kept, so X must not change under it
        signs = _check_signs(signs)
        active = _by_neuron(*_check_csr(indptr, indices, len(X), signs.size))
        self._bind(X, X @ X.T, signs[active.neurons], signs.size, active)

    @classmethod
    def _of(cls, X, XXt, signs, width, active):
        """From clean arrays, with X X^T, the active sets by neuron and the signs of just those neurons."""
        J = cls.__new__(cls)
        J._bind(X, XXt, signs, width, active)
        return J

    def _bind(self, X, XXt, signs, width, active):
        super().__init__(np.dtype(float), (len(X), width * X.shape[1]))
        self.X, self.width, self.active = X, width, active
        self._XXt = XXt
        self._signs = signs  # of active.neurons, in their order

    def _matvec(self, u):
        u = _check_vector("u", np.ravel(u), size=self.shape[1], reason="m d of them")
        return _jacobian_times(self.X, self.active, self._signs, u).sum(axis=0) / np.sqrt(self.width)

    def _rmatvec(self, v):
        v = _check_vector("v", np.ravel(v), size=len(self.X), reason="one for each row of X")
        out = np.zeros(self.shape[1])
        _jacobian_transpose_times(self.X, self.active, self._signs, v / np.sqrt(self.width), out)
        return out

    def gram_times(self, v):
        """G v for v (n,), in at most O(nnz d) operations and O(n) memory."""
        v = _check_vector("v", v, size=len(self.X), reason="one for each row of X")
        sums = _run(_gram_times, 8 * self.active.points.size, self.X, self._XXt, self.active, v)
        return sums.sum(axis=0) / self.width

    def gram(self):
        """Gram matrix G = J J^T = (X X^T) o C / m (n, n), C_ij = |Q_i n Q_j|: O(n^2 + sum over r of |act(r)|^2).

        Beyond n = 700 the counts are made in n^2 / 2^18 bands, and every band passes over the active sets once more.
        """
        n = len(self.X)
        bands = max(numba.get_num_threads(), n * n >> 18)  # a band's counts stay in cache: 2 MB or less
        counts = _run(_coactivity, 8 * self.active.points.size, self.active, n, bands)
        return _run(_gram, n * n, self._XXt, counts, self.width)

    @cached_property
    def _slots(self):
        """Active sets in CSR by point, a neuron being named by its position in active.neurons."""
        return _by_point(self.active._replace(neurons=np.arange(self.active.neurons.size)), len(self.X))

    def tocsr(self):
        """J as a scipy.sparse.csr_matrix (n, m d) with nnz d stored entries."""
        d = self.X.shape[1]
        indptr, slots = self._slots
        columns = self.active.neurons[slots, None] * d + np.arange(d)
        data = self._signs[slots, None] / np.sqrt(self.width) * np.repeat(self.X, np.diff(indptr), axis=0)
        return scipy.sparse.csr_matrix((data.ravel(), columns.ravel(), indptr * d), shape=self.shape)


# ======================================================================================================================
# Sketches (Definition 2.1, Lemma 2.2)
# ======================================================================================================================
#
# S J^T is a sum over active pairs of m^(-1/2) a_r S (e_r (x) x_i), so only the columns of S that meet an active neuron are
# ever computed, each from a hash of its number. Every sketch is unbiased: E[(S J^T)^T (S J^T)] = G.

SPARSITY = 4  # nonzeros in a column of the sparse sign sketch; 4 to 8 are usual [NN13]


@njit(cache=True)
def _hash(key, counter):
    """Counter-based random uint64: the counter-th output of SplitMix64 started at key."""
    z = key + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(parallel=True, cache=True, fastmath=FAST)
def _gaussian_times(X, active, signs, key, size):
    """S J^T sqrt(m size) for a Gaussian S, each of whose rows is drawn by one thread, neuron by neuron (Box-Muller)."""
    d = X.shape[1]
    out = np.zeros((size, len(X)))
    for row in prange(size):
        row_key = _hash(key, np.uint64(row))
        normals = np.empty(d + 1)
        for q in range(active.neurons.size):
            block = _hash(row_key, np.uint64(active.neurons[q]))
            for k in range(0, d, 2):
                uniform = (np.float64(_hash(block, np.uint64(k)) >> np.uint64(11)) + 1.0) * 2.0**-53
                angle = np.float64(_hash(block, np.uint64(k + 1)) >> np.uint64(11)) * (2.0 * np.pi * 2.0**-53)
                radius = np.sqrt(-2.0 * np.log(uniform))
                normals[k] = radius * np.cos(angle)
                normals[k + 1] = radius * np.sin(angle)
            for i in active.points[active.offsets[q] : active.offsets[q + 1]]:
                out[row, i] += signs[q] * _dot(normals[:d], X[i])
    return out


@njit(parallel=True, cache=True)
def _hadamard_times(indptr, neurons, signs, rows):
    """sum over r in Q_i of signs (-1)^popcount(row & r), for every point i and row of a Hadamard matrix: (n, size)."""
    out = np.zeros((indptr.size - 1, rows.size))
    for i in prange(indptr.size - 1):
        for z in range(indptr[i], indptr[i + 1]):
            for s in range(rows.size):
                bits = rows[s] & neurons[z]
                for fold in (32, 16, 8, 4, 2, 1):
                    bits ^= bits >> fold
                out[i, s] += signs[z] * (1 - 2 * (bits & 1))
    return out


@njit(parallel=True, cache=True)
def _sparse_sign_times(X, indptr, slots, neurons, signs, key, size):
    """S J^T sqrt(m SPARSITY), transposed, for a sparse sign S; X carries the signs of the coordinates.

    Column i is a sum of shifted copies of x_i, so the signs are first added up by shift: O(nnz + n d min(size, |Q_i|)).
    """
    n, d = X.shape
    out = np.zeros((n, size))
    for i in prange(n):
        x, mine = X[i], slots[indptr[i] : indptr[i + 1]]
        my_neurons, my_signs = neurons[mine], signs[mine]
        for j in range(SPARSITY):
            low, high = size * j // SPARSITY, size * (j + 1) // SPARSITY
            if high == low:
                continue
            totals = np.zeros(high - low)
            for z in range(mine.size):
                bits = _hash(key, np.uint64(my_neurons[z] * SPARSITY + j))
                shift = np.int64(((bits >> np.uint64(32)) * np.uint64(high - low)) >> np.uint64(32))
                totals[shift] += my_signs[z] * (1.0 - 2.0 * np.float64(bits & np.uint64(1)))
            unwound = np.zeros(high - low + d)
            for shift in np.flatnonzero(totals):
                for k in range(d):
                    unwound[shift + k] += totals[shift] * x[k]
            for k in range(unwound.size):
                out[i, low + k % (high - low)] += unwound[k]
    return out


@njit(cache=True)
def _random_signs(key, counters):
    """A sign +1 or -1 for every counter."""
    signs = np.empty(counters.size)
    for q in range(counters.size):
        signs[q] = 1.0 - 2.0 * np.float64(_hash(key, np.uint64(counters[q])) & np.uint64(1))
    return signs


def _walsh_hadamard(A):
    """A H for the Hadamard matrix H (entries +1 and -1) of the order of A's columns, a power of two: O(log order) passes."""
    rows, order = A.shape
    half = 1
    while half < order:
        pairs = A.reshape(rows, -1, 2, half)
        A = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], axis=2)
        half *= 2
    return A.reshape(rows, order)


def _key(rng):
    return np.uint64(rng.integers(1 << 63))


def gaussian_sketch(J, size, rng):
    """S J^T (size, n) for S (size, m d) of independent N(0, 1 / size) entries.

    With size >= ((sqrt(n) + sqrt(2 ln(2 / delta))) / (sqrt(1 + eps) - 1))^2 it is a (1 +- eps) subspace embedding of the
    columns of J^T (Definition 2.1) with probability at least 1 - delta, whatever J (Davidson and Szarek, "Local operator
    theory, random matrices and Banach spaces", Theorem II.13). Costs |K| d size normal numbers, each drawn from a counter
    when it is needed, and O(nnz d size) operations: a reference, far too slow for wide networks.

    J : SparseJacobian.  size : int >= 1.  rng : numpy Generator, or a seed for one.
    """
    _check_jacobian(J)
    size, rng = _check_integer("size", size, 1), np.random.default_rng(rng)
    return _gaussian_times(J.X, J.active, J._signs, _key(rng), size) / np.sqrt(J.width * size)


def srht_sketch(J, size, rng):
    """S J^T (size, n) for a subsampled randomised Hadamard transform S = sqrt(N / size) P H D with Kronecker signs D.

    H is the normalised Hadamard matrix of order N >= m d, the product of one over neurons and one over coordinates; D
    is a diagonal of signs that factors likewise; P draws `size` rows, with replacement. An entry of H is a parity, so the
    neurons of a point cost O(|Q_i| size), and the coordinates one fast transform of x_i, with no factor d.

    For independent signs and N = poly(n), O(n ln(n / delta)^2 / eps^2) rows make it a (1 +- eps) subspace embedding with
    probability at least 1 - delta (Lemma 2.2, [Tro11]). No bound is claimed for Kronecker signs, which need more rows
    when n is small: n ln(n / 0.1)^2 / 0.25 of them missed eps = 0.5 in 9 % of the draws at n = 4, in 26 % at n = 2.

    J : SparseJacobian.  size : int >= 1.  rng : numpy Generator, or a seed for one.
    """
    _check_jacobian(J)
    size, rng = _check_integer("size", size, 1), np.random.default_rng(rng)
    d = J.X.shape[1]
    order = 1 << max(d - 1, 0).bit_length()
    coordinate_rows = rng.integers(order, size=size)
    neuron_rows = rng.integers(1 << max(J.width - 1, 0).bit_length(), size=size)
    coordinates = _walsh_hadamard(np.pad(J.X * (1 - 2 * rng.integers(2, size=d)), ((0, 0), (0, order - d))))
    indptr, slots = J._slots
    signs = J._signs * _random_signs(_key(rng), J.active.neurons)
    neurons = _hadamard_times(indptr, J.active.neurons[slots], signs[slots], neuron_rows)
    return (neurons * coordinates[:, coordinate_rows]).T / np.sqrt(J.width * size)


def sparse_sign_sketch(J, size, rng):
    """S J^T (size, n) for a sparse sign matrix S with SPARSITY = 4 nonzeros in each column, one in each quarter of its rows.

    Column (r, k), for neuron r and coordinate k, has its nonzeros in rows h_1(r) + k, ..., h_4(r) + k of the quarters,
    cyclically, with signs s_1(r) t(k), ..., s_4(r) t(k). A neuron thus adds four shifted copies of x_i, which are first
    added up by shift: O(nnz + n (size + d min(size, |Q_i|))) for nnz active pairs, without d for each of them.

    With size >= max(4 d, 2 n (n + 1) / (eps^2 delta)), a multiple of 4, it is a (1 +- eps) subspace embedding with
    probability at least 1 - delta, by the second moment as in [CW13] and [NN13]; the factor 2 is the price of signs t(k)
    that all neurons share. Below 4 d rows coordinates of one neuron collide, and no size in n alone is enough. A
    preconditioner needs far less than this bound: max(8 n, 4 d) is the trainer's choice.

    J : SparseJacobian.  size : int >= 1.  rng : numpy Generator, or a seed for one.
    """
    _check_jacobian(J)
    size, rng = _check_integer("size", size, 1), np.random.default_rng(rng)
    X = J.X * (1 - 2 * rng.integers(2, size=J.X.shape[1]))
    indptr, slots = J._slots
    sums = _sparse_sign_times(X, indptr, slots, J.active.neurons, J._signs, _key(rng), size)
    return sums.T / np.sqrt(J.width * min(size, SPARSITY))


SKETCHES = {"sparse": sparse_sign_sketch, "srht": srht_sketch, "gaussian": gaussian_sketch}


# ======================================================================================================================
# Solvers of (G + damping I) g = f - y (Algorithm 5, lines 25-35)
# ======================================================================================================================
#
# Each returns g and the number of inner iterations. `lap(phase)` books the time since the last lap.


def _solve_cholesky(J, residual, damping, lap):
    """Exactly, from the Gram matrix and its Cholesky factor [CGH+19]: O(n^3) after the Gram matrix."""
    G = J.gram()
    lap("seconds_jacobian")
    G[np.diag_indices_from(G)] += damping
    try:
        factor = scipy.linalg.cho_factor(G, lower=True, check_finite=False)
    except np.linalg.LinAlgError:
        raise _singular_error(J) from None
    pivots = np.diag(factor[0])
    if pivots.min() ** 2 <= pivots.size * np.finfo(float).eps * pivots.max() ** 2:
        raise _singular_error(J)
    step = scipy.linalg.cho_solve(factor, residual, check_finite=False)
    lap("seconds_solve")
    return step, 0


def _damped_gram(J, damping):
    def times(v):
        return J.gram_times(v) + damping * v

    return LinearOperator((len(J.X), len(J.X)), matvec=times, dtype=float)


def _conjugate_gradients(J, residual, damping, tolerance, preconditioner=None):
    """To ||G g - (f - y)|| <= tolerance ||f - y||, with `preconditioner` near the inverse of G."""
    iterations = 0

    def count(_):
        nonlocal iterations
        iterations += 1

    limit = 1000 + 20 * len(residual)
    step, failed = cg(_damped_gram(J, damping), residual, rtol=tolerance, maxiter=limit, M=preconditioner, callback=count)
    if failed:
        raise np.linalg.LinAlgError(
            f"conjugate gradients did not reach a relative residual of {tolerance:.1e} in {limit} iterations: the Gram "
            'matrix is singular or nearly so; use solver="cholesky" to learn more, a larger width, or damping > 0'
        )
    return step, iterations


def _solve_cg(J, residual, damping, tolerance, lap):
    """Conjugate gradients without a preconditioner: O(sqrt(kappa) log(kappa / tolerance)) products with G, of condition
    kappa."""
    _check_all_fire(J, damping)
    step, iterations = _conjugate_gradients(J, residual, damping, tolerance)
    lap("seconds_solve")
    return step, iterations


def _sketched_triangle(J, damping, sketch, size, rng):
    """Upper triangular T with T^T T near G + damping I, from a QR factorisation of the sketched J^T; R = T^-1."""
    sketched = sketch(J, size, rng)
    if damping > 0:
        sketched = np.vstack([sketched, np.sqrt(damping) * np.eye(len(J.X))])
    T = scipy.linalg.qr(sketched, mode="r", overwrite_a=True, check_finite=False)[0][: len(J.X)]
    pivots = np.abs(np.diag(T))
    if pivots.min() <= len(J.X) * np.finfo(float).eps * pivots.max():
        raise _singular_error(J, "or the sketch is too small: try a larger sketch_size")
    return T


def _solve_sketch(J, residual, damping, tolerance, sketch, size, rng, lap):
    """Conjugate gradients preconditioned by the sketch: O(log(kappa / tolerance)) products with G, of condition kappa
    (Corollary A.8)."""
    _check_all_fire(J, damping)
    T = _sketched_triangle(J, damping, sketch, size, rng)
    lap("seconds_jacobian")

    def inverse(v):
        return scipy.linalg.cho_solve((T, False), v, check_finite=False)

    preconditioner = LinearOperator(T.shape, matvec=inverse, dtype=float)
    step, iterations = _conjugate_gradients(J, residual, damping, tolerance, preconditioner)
    lap("seconds_solve")
    return step, iterations


def _solve_richardson(J, residual, damping, tolerance, sketch, size, rng, lap):
    """The paper's iteration, Algorithm 5, lines 31-35: z <- z - M^T (M z - R^T (f - y)) with M = R^T G R; g = R z.

    It converges where ||I - M^2|| < 1, hence needs a sketch good to about 0.3, several times larger than conjugate
    gradients do; for those who study it.
    """
    _check_all_fire(J, damping)
    T = _sketched_triangle(J, damping, sketch, size, rng)
    lap("seconds_jacobian")
    gram = _damped_gram(J, damping)

    def times_R(v, transposed=False):
        return scipy.linalg.solve_triangular(T, v, trans="T" if transposed else "N", check_finite=False)

    initial = best = size_of_error = np.linalg.norm(residual)
    z, step, error, iterations = np.zeros_like(residual), np.zeros_like(residual), -residual, 0
    while size_of_error > tolerance * initial:
        gradient = times_R(error, transposed=True)
        z -= times_R(gram @ times_R(gradient), transposed=True)
        step = times_R(z)
        error = gram @ step - residual
        size_of_error = np.linalg.norm(error)
        iterations += 1
        if size_of_error > 1e6 * initial or (iterations % 50 == 0 and size_of_error >= best):
            raise np.linalg.LinAlgError(
                f"the Richardson iteration does not converge with sketch_size={size}: M = R^T G R is too far from the "
                'identity; use a larger sketch_size (64 (n + 8) is usually enough) or solver="sketch"'
            )
        if iterations % 50 == 0:
            best = size_of_error
    lap("seconds_solve")
    return step, iterations


def _gradient_rate(J):
    """1 / ||G||, the step size of gradient descent: half of what would just fail to converge. Zero if G is."""
    last = len(J.X) - 1
    norm = scipy.linalg.eigh(J.gram(), eigvals_only=True, subset_by_index=[last, last])[0]
    return 1.0 / norm if norm > 0 else 0.0


def _check_all_fire(J, damping):
    if damping == 0 and np.bincount(J.active.points, minlength=len(J.X)).min() == 0:
        raise _singular_error(J)


def _singular_error(J, otherwise=""):
    """LinAlgError that says why the Gram matrix is singular and what to do; or `otherwise`, if that is not certain."""
    silent = np.flatnonzero(np.bincount(J.active.points, minlength=len(J.X)) == 0)
    twins = np.argwhere(np.tril(J._XXt, -1) > 1 - 1e-12)
    if silent.size:
        cause = f"{silent.size} of {len(J.X)} points have no active neuron, the first is point {silent[0]}"
        remedy = "a larger width or a smaller shift"
    elif twins.size:
        cause = f"points {twins[0, 1]} and {twins[0, 0]} coincide ({len(twins)} such pairs)"
        remedy = "distinct points"
    else:
        cause = f"{len(J.X)} points share {J.active.neurons.size} active neurons of {J.width}, too few to tell them apart"
        cause = f"{cause} ({otherwise})" if otherwise else cause
        remedy = "a larger width or a smaller shift"
    return np.linalg.LinAlgError(f"the Gram matrix is singular: {cause}; use {remedy}, or damping > 0 (try 1e-6)")


# ======================================================================================================================
# Kernel theory (Section 2.5)
# ======================================================================================================================


def shifted_ntk(X, shift):
    """Shifted neural tangent kernel H (n, n) of Definition 2.10, the limit of G as the width grows.

    H_ij = rho P(Z1 >= b, Z2 >= b), rho = <x_i, x_j>, for standard normal Z1 and Z2 of correlation rho; in closed form
    P = Phi(-b) - 2 T(b, sqrt((1 - rho) / (1 + rho))) with Owen's function T.

    X : (n, d), rows of length 1.  shift : the threshold b.
    """
    X = _check_unit_rows(_check_matrix("X", X))
    shift = _check_real("shift", shift)
    rho = np.clip(X @ X.T, -1.0, 1.0)
    np.fill_diagonal(rho, 1.0)
    with np.errstate(divide="ignore"):
        slope = np.sqrt((1.0 - rho) / (1.0 + rho))
    both = scipy.special.ndtr(-shift) - 2.0 * scipy.special.owens_t(shift, slope)
    return rho * np.maximum(both, 0.0)


def _regression_tolerance(X, shift):
    """Relative tolerance sqrt(lambda / n) / 6 of Algorithm 5, line 30, lambda the smallest eigenvalue of the shifted NTK.

    Rounding can leave lambda at or below zero (coinciding points), so it is held at n times the machine epsilon or more.
    """
    smallest = scipy.linalg.eigh(shifted_ntk(X, shift), eigvals_only=True, subset_by_index=[0, 0])[0]
    return np.sqrt(max(smallest / len(X), np.finfo(float).eps)) / 6.0


# ======================================================================================================================
# Input checks: the one place that raises on bad input
# ======================================================================================================================


def _check_real(name, value, low=-np.inf, below=np.inf):
    """A finite float with low <= value < below."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    if not np.isfinite(value) or not low <= value < below:
        allowed = "finite" if np.isinf(low) and np.isinf(below) else f"a finite number in [{low:g}, {below:g})"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return float(value)


def _check_integer(name, value, low):
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        raise TypeError(f"{name} must be an integer, got {value!r}; pass int({name})")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")
    return int(value)


def _check_choice(name, value, known):
    if not (isinstance(value, (str, type(None))) and value in known):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def _check_numbers(name, value, dimensions):
    """A finite, real array of that many dimensions, none of them empty."""
    if scipy.sparse.issparse(value):
        raise TypeError(f"{name} is a sparse matrix, which is not supported; pass {name}.toarray()")
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} must be an array, but its rows have different lengths") from None
    if array.dtype.kind == "c":
        raise TypeError(f"{name} must be real, got complex numbers; pass its real part")
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be an array of numbers, got dtype {array.dtype}; encode it as numbers (astype(float))")
    if array.ndim != dimensions:
        remedy = f"{name}.ravel()" if dimensions == 1 else f"{name}[:, None] for one column, {name}[None] for one row"
        raise ValueError(f"{name} must have {dimensions} dimension(s), got shape {array.shape}; pass {remedy}")
    if array.size == 0:
        raise ValueError(f"{name} must not be empty, got shape {array.shape}")
    if not np.isfinite(array).all():
        where = tuple(int(k) for k in np.argwhere(~np.isfinite(array))[0])
        raise ValueError(f"{name} must be finite, but {name}{list(where)} is {array[where]}; remove or impute such entries")
    return array


def _check_matrix(name, value, keep_float32=False, rows=None, reason=""):
    array = _check_numbers(name, value, 2)
    if rows is not None and len(array) != rows:
        raise ValueError(f"{name} must have {rows} rows, {reason}, got shape {array.shape}")
    return np.ascontiguousarray(array, dtype=np.float32 if keep_float32 and array.dtype == np.float32 else np.float64)


def _check_vector(name, value, size=None, reason="one for each row of X"):
    array = _check_numbers(name, value, 1)
    if size is not None and array.size != size:
        raise ValueError(f"{name} must have {size} entries, {reason}, got {array.size}")
    return array.astype(float)


def _check_signs(value):
    signs = _check_vector("signs", value)
    wrong = np.flatnonzero(np.abs(signs) != 1)
    if wrong.size:
        raise ValueError(f"signs must be +1 or -1, but signs[{wrong[0]}] is {signs[wrong[0]]:g}; move its size into W")
    return signs


def _check_cast(name, array, dtype):
    """The array in a precision that may be lower, still finite."""
    with np.errstate(over="ignore"):
        cast = array.astype(dtype)
    if not np.isfinite(cast).all():
        raise ValueError(f"{name} has entries beyond the range of {dtype}, up to {np.abs(array).max():g}; use float64 trees")
    return cast


def _check_columns(name, array, other_name, other):
    if array.shape[1] != other.shape[1]:
        raise ValueError(f"{name} has {array.shape[1]} columns and {other_name} has {other.shape[1]}; they must agree")


def _check_unit_rows(X):
    lengths = np.linalg.norm(X, axis=1)
    worst = np.argmax(np.abs(lengths - 1.0))
    if abs(lengths[worst] - 1.0) > 1e-6:
        raise ValueError(
            f"rows of X must have length 1, but row {worst} has length {lengths[worst]:.6g}; "
            'pass X / np.linalg.norm(X, axis=1, keepdims=True), or normalize="rows" or "lift" to SublinearTrainer'
        )
    return X


def _check_row_lengths(X):
    """Lengths (n, 1) of the rows of centred X, none of them zero."""
    lengths = np.linalg.norm(X, axis=1, keepdims=True)
    if not lengths.all():
        raise ValueError(
            f"row {np.argmin(lengths)} of X is zero once columns are centred, and has no direction; "
            'use normalize="lift", which gives it one'
        )
    return lengths


def _check_index(name, value, size):
    value = _check_integer(name, value, -np.inf)
    if not 0 <= value < size:
        raise IndexError(f"{name} must be in 0..{size - 1}, got {value}")
    return value


def _check_indices(name, value, size):
    indices = np.asarray(value)
    if indices.ndim != 1 or indices.size == 0 or indices.dtype.kind not in "iu":
        raise TypeError(f"{name} must be a non-empty vector of integers, got dtype {indices.dtype}, shape {indices.shape}")
    outside = indices[(indices < 0) | (indices >= size)]
    if outside.size:
        raise IndexError(f"{name} must be in 0..{size - 1}, got {outside[0]}")
    values, counts = np.unique(indices, return_counts=True)
    if values.size < indices.size:
        raise ValueError(f"{name} must be distinct, but {values[np.argmax(counts)]} occurs {counts.max()} times")
    return indices.astype(np.int64)


def _check_threshold(tau):
    """A number, possibly infinite."""
    if isinstance(tau, (bool, np.bool_)) or not isinstance(tau, (int, float, np.integer, np.floating)) or tau != tau:
        raise ValueError(f"tau must be a number, possibly infinite, got {tau!r}")
    return float(tau)


def _check_csr(indptr, indices, n, m):
    indptr, indices = np.asarray(indptr), np.asarray(indices)
    for name, array in (("indptr", indptr), ("indices", indices)):
        if array.ndim != 1 or (array.size and array.dtype.kind not in "iu"):
            raise TypeError(f"{name} must be a vector of integers, got dtype {array.dtype}, shape {array.shape}")
    if indptr.size != n + 1 or indptr[0] != 0 or indptr[-1] != indices.size or (indptr[1:] < indptr[:-1]).any():
        raise ValueError(
            f"indptr must rise from 0 to indices.size = {indices.size} in {n + 1} entries, one more than X has rows; "
            f"got {indptr.size} entries"
        )
    if indices.size and not 0 <= indices.min() <= indices.max() < m:
        raise IndexError(f"indices must be in 0..{m - 1}, got {indices.min()}..{indices.max()}")
    indptr, indices = indptr.astype(np.int64), indices.astype(np.int64)
    pairs = np.repeat(np.arange(n), np.diff(indptr)) * m + indices
    if np.unique(pairs).size < pairs.size:
        raise ValueError("indices must name a neuron at most once for each point")
    return indptr, indices


def _check_jacobian(J):
    if not isinstance(J, SparseJacobian):
        raise TypeError(f"J must be a SparseJacobian, got {type(J).__name__}")


def _check_memory(what, needed):
    """Refuses what cannot fit, before it is allocated."""
    try:
        with open("/proc/meminfo") as lines:
            available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else np.inf
    if needed > available:
        raise MemoryError(
            f"{what} would need {needed / 2**30:,.1f} GiB, but {available / 2**30:,.1f} GiB are available; use fewer "
            'neurons or points, or dtype="float32"'
        )


def _seed(random_state):
    """64-bit seed from what scikit-learn accepts: None, an integer, a RandomState; or a Generator."""
    if random_state is None:
        return int(np.random.SeedSequence().generate_state(1, np.uint64)[0])
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(1 << 31))
    if isinstance(random_state, np.random.Generator):
        return int(random_state.integers(1 << 63))
    if random_state is np.random:  # NumPy's own global state
        return _seed(np.random.mtrand._rand)
    seed = _check_integer("random_state", random_state, 0)
    if seed >= 1 << 64:
        raise ValueError(f"random_state must be below 2^64, got {seed}")
    return seed


# ======================================================================================================================
# Searches: where the active pairs are found, and the weights moved
# ======================================================================================================================
#
# A neuron that is active on no training point has no gradient, so it never moves and never wakes. The *live* neurons,
# active on some point at the start, are therefore the only ones that training changes.


@njit(parallel=True, cache=True, fastmath=FAST)
def _move_leaves(rows, active, scale, step, XXt, X, groups, starts, first_parent):
    """rows[r] += X dw_r, where dw_r = scale[r] * sum over i in act(r) of step[i] x_i is the move of neuron r.

    Through rows of X X^T, without d, if k = |act(r)| is small: k n operations against (k + n) d through dw_r. Rows of X
    are the shorter ones to read, hence d / 2: with n = 1797, d = 65 it takes 63 ms, 72 with d, 314 without a limit.
    Groups of siblings hold active.neurons[starts[p]:starts[p + 1]], and if first_parent > 0 their parents are mended
    while the group is in cache: 7 ms instead of 11 at n = 64, m = 2^20.
    """
    n, d = X.shape
    for chunk in prange(CHUNKS):
        move = np.empty(d, X.dtype)
        for p in range(groups.size * chunk // CHUNKS, groups.size * (chunk + 1) // CHUNKS):
            for q in range(starts[p], starts[p + 1]):
                leaf = rows[active.neurons[q]]
                points = active.points[active.offsets[q] : active.offsets[q + 1]]
                if 2 * points.size <= d:
                    for i in points:
                        _add_multiple(leaf, scale[q] * step[i], XXt[i])
                else:
                    move[:] = 0
                    for i in points:
                        _add_multiple(move, scale[q] * step[i], X[i])
                    for i in range(n):
                        leaf[i] += _dot(move, X[i])
            if first_parent > 0:
                _set_maximum(rows, groups[p] * FAN_OUT, first_parent + groups[p])


@njit(cache=True)
def _move_cost(offsets, n, d):
    """Multiply-adds of _move_leaves."""
    cost = 0
    for q in range(offsets.size - 1):
        k = offsets[q + 1] - offsets[q]
        cost += k * n if 2 * k <= d else (k + n) * d
    return cost


class _Search:
    """What the three searches share.

    A search names neurons by rows of its own, has their `signs` by row, and offers: active(), the active sets and the
    products of the active pairs; move(active, signs, step), which takes a step; flipped(...), told of what a step did;
    original(active), with the neurons' own numbers; trained_blocks() and fill(out), the weights. `operations` counts
    multiply-adds, comparisons and moves of products.
    """

    def __init__(self, X, XXt, shift, width, seed, init, dtype):
        self.X, self.shift, self.width, self.init = X, shift, width, init
        self.draw = partial(_starting_blocks, seed, width, X.shape[1], init)
        self.dtype = np.dtype(dtype)
        self.cast_X = X.astype(self.dtype)
        self.operations = 0
        self.least_active = _least_at_or_above(shift, self.dtype)
        self._allocate(XXt)
        self._start()

    def flipped(self, neurons, points, signs):
        """Told which pairs woke (+1) or fell asleep (-1) by the last step."""

    def take_operations(self):
        """Operations since the last call."""
        taken, self.operations = self.operations, 0
        return taken

    def outputs(self, active, signs, values):
        """f (n,) from the active pairs, the signs of the active neurons and the products of the pairs."""
        sums = _run(_outputs, 4 * values.size, active, signs, values, self.shift, len(self.X))
        return sums.sum(axis=0) / np.sqrt(self.width)


class _Dense(_Search):
    """X W^T anew in every step, by BLAS: O(m n d) [BPSW21, CGH+19]. Holds W."""

    def _allocate(self, XXt):
        _check_memory(f'search="dense" with {self.width} neurons', self.width * self.X.shape[1] * self.dtype.itemsize)
        self.W = np.empty((self.width, self.X.shape[1]), self.dtype)
        self.signs = np.empty(self.width)

    def _start(self):
        def keep(first, W, signs):
            self.W[first : first + len(W)] = W
            self.signs[first : first + len(W)] = signs

        for _ in self.draw(keep):
            pass

    def active(self):
        """The active sets, and the products of the active pairs."""
        found = []
        # BLAS on all cores where that pays: at n = d = 16 a step takes 43 ms with it and 34 ms without at m = 2^20, and
        # 8 and 1.6 ms at m = 2^14; at n = 64, d = 32, m = 2^20 it takes 183 and 200 ms.
        with nullcontext() if self.width * self.X.size >= 1 << 29 else _serial_blas():
            for first in range(0, self.width, BLOCK):
                products = self.W[first : first + BLOCK] @ self.cast_X.T
                pairs = np.flatnonzero(products >= self.least_active)  # of a flat mask: twice as fast as np.nonzero
                found.append((pairs + first * len(self.X), products.ravel()[pairs]))
        pairs, values = map(np.concatenate, zip(*found, strict=True))
        self.operations += self.width * len(self.X) * (self.X.shape[1] + 1)
        return _grouped(*np.divmod(pairs, len(self.X))), values

    def move(self, active, signs, step):
        """W <- W - J^T step."""
        data = np.repeat(signs, np.diff(active.offsets)) * step[active.points] / np.sqrt(self.width)
        shape = (active.neurons.size, len(self.X))
        coefficients = scipy.sparse.csr_matrix((data.astype(self.dtype), active.points, active.offsets), shape=shape)
        self.W[active.neurons] -= coefficients @ self.cast_X
        self.operations += active.points.size * self.X.shape[1]

    def original(self, active):
        return active

    def trained_blocks(self):
        """Yields (weights, signs) of the trained network block by block."""
        for first in range(0, self.width, BLOCK):
            yield self.W[first : first + BLOCK].astype(float), self.signs[first : first + BLOCK]

    def fill(self, out):
        out[:] = self.W


class _Scan(_Search):
    """All products, kept and moved, then compared with b: O(n m) and the moves. The strong baseline.

    Rows of products are laid out live neurons first, in ascending order, then the dead ones; `live` holds the live
    neurons' numbers. A step then moves, mends and reports in one stretch of memory: on two cores, n = 64, d = 32 and
    m = 2^20, "tree" takes about half the time it takes with neurons in their own order.

    The weights are not touched in training. They follow from gamma[r, i], the sum of step[i] over the steps in which
    neuron r was active on point i:  w_r = w_r(0) - m^(-1/2) a_r sum_i gamma[r, i] x_i. Since gamma grows with the
    running sum of the steps while the pair is active, only pairs that flip are written down, with that sum.
    """

    height = 1  # levels of the trees: a scan is a search in trees of leaves alone

    def _allocate(self, XXt):
        n = len(self.X)
        self._levels = _levels(self.width)[: self.height + 1]
        _check_memory(f"products of {n} points and {self.width} neurons", n * int(self._levels[-1]) * self.dtype.itemsize)
        self._rows = np.empty((self._levels[-1], n), self.dtype)
        self._rows[self.width :] = -np.inf
        self._XXt = XXt.astype(self.dtype)
        self._sum = np.zeros(n)
        self._flips = []

    def _start(self):
        def products_of(first, W, signs):
            products = W.astype(self.dtype, copy=False) @ self.cast_X.T
            fires = (products >= self.least_active).any(axis=1)
            live = np.flatnonzero(fires)
            return first + live, W[live], signs[live], products[live], products[~fires]

        found = []
        front, back = 0, self.width
        for *live, live_products, dead_products in self.draw(products_of):
            self._rows[front : front + len(live_products)] = live_products
            self._rows[back - len(dead_products) : back] = dead_products
            front, back = front + len(live_products), back - len(dead_products)
            found.append(live)
        self.live, self._weights, self.signs = map(np.concatenate, zip(*found, strict=True))
        self.signs = self.signs.astype(float)
        _mend_ancestors(self._rows, self._levels, np.arange(self.width))

    def active(self):
        """The active sets, neurons by row, and the products of the active pairs."""
        self._active, values, touched = _query(self._rows, self._levels, 0, len(self.X), self.shift)
        self.operations += touched
        return self._active, values

    def move(self, active, signs, step):
        """The products for W <- W - J^T step."""
        scale = (signs / -np.sqrt(self.width)).astype(self.dtype)
        groups, starts = _parents(active.neurons)
        first_parent = self._levels[1] if len(self._levels) > 2 else 0
        work = _move_cost(active.offsets, *self.X.shape)
        vectors = scale, step.astype(self.dtype), self._XXt, self.cast_X
        _run(_move_leaves, work, self._rows, active, *vectors, groups, starts, first_parent)
        self.operations += work
        if first_parent:
            self.operations += groups.size * (FAN_OUT + 1) * len(self.X)
            self.operations += _mend_ancestors(self._rows, self._levels, groups, level=1)
        self._sum += step

    def flipped(self, neurons, points, signs):
        if neurons.size:
            self._flips.append((neurons, points, -signs * self._sum[points]))

    def original(self, active):
        """The active sets with the neurons' own numbers."""
        return active._replace(neurons=self.live[active.neurons])

    def trained_live(self):
        """Weights of the live neurons now (n_live, d)."""
        active = self._active
        rows = np.repeat(active.neurons, np.diff(active.offsets))
        entries = [(rows, active.points, self._sum[active.points]), *self._flips]
        rows, points, gamma = map(np.concatenate, zip(*entries, strict=True))
        gamma = scipy.sparse.csr_matrix((gamma, (rows, points)), shape=(self.live.size, len(self.X)))
        return self._weights - (self.signs / np.sqrt(self.width))[:, None] * (gamma @ self.X)

    def trained_blocks(self):
        """Yields (weights, signs); antisymmetric dead neurons cancel on every input and are left out."""
        trained = self.trained_live()
        if self.init == "antisymmetric":
            for first in range(0, self.live.size, BLOCK):
                yield trained[first : first + BLOCK], self.signs[first : first + BLOCK]
            return

        def train(first, W, signs):
            W = W.astype(float)
            low, high = np.searchsorted(self.live, (first, first + len(W)))
            W[self.live[low:high] - first] = trained[low:high]
            return W, signs

        yield from self.draw(train)

    def fill(self, out):
        def keep(first, W, _):
            out[first : first + len(W)] = W

        for _ in self.draw(keep):
            pass
        out[self.live] = self.trained_live()


class _Tree(_Scan):
    """Search trees over the products: O(n |K| (min(k, d) + log m)) [DHSWZ]."""

    height = 64  # all the levels there are


SEARCHES = {"dense": _Dense, "scan": _Scan, "tree": _Tree}


# ======================================================================================================================
# Trainer (Algorithm 5)
# ======================================================================================================================

PHASES = ("seconds_query", "seconds_jacobian", "seconds_solve", "seconds_update")
SOLVERS = ("cholesky", "sketch", "richardson", "cg", "gradient")


class _Scales(NamedTuple):
    """How data become unit rows, and targets come to have mean 0 and variance 1."""

    x_mean: np.ndarray
    x_scale: float  # keeps squares of tiny and of huge entries in range
    lift: float  # the coordinate appended to every row; 0 for none
    y_mean: float
    y_scale: float
    normalize: bool

    @classmethod
    def of(cls, X, y, normalize):
        if normalize is None:
            return cls(np.zeros(X.shape[1]), 1.0, 0.0, 0.0, 1.0, False)
        x_mean, y_mean = X.mean(axis=0), y.mean()
        x_scale = np.abs(X - x_mean).max() or 1.0
        # The root mean square length of the rows, so that direction and length of a row weigh alike.
        lift = np.sqrt(np.mean(np.sum(((X - x_mean) / x_scale) ** 2, axis=1))) or 1.0 if normalize == "lift" else 0.0
        spread = np.abs(y - y_mean).max()
        constant = spread <= 8 * np.finfo(float).eps * np.abs(y).max()
        return cls(x_mean, x_scale, lift, y_mean, 0.0 if constant else spread * np.std((y - y_mean) / spread), True)

    def unit_rows(self, X):
        if not self.normalize:
            return _check_unit_rows(X.copy())
        X = (X - self.x_mean) / self.x_scale
        if self.lift:
            X = np.column_stack([X, np.full(len(X), self.lift)])
        return X / _check_row_lengths(X)

    def targets(self, y):
        """Targets to train on: zero where they are constant, whose deviations are rounding."""
        return (y - self.y_mean) / self.y_scale if self.y_scale else np.zeros_like(y)


class _Stopwatch:
    """Seconds by phase: lap(phase) books the time since the last lap."""

    def __init__(self):
        self.phases = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()

    def lap(self, phase):
        now = time.perf_counter()
        self.phases[phase] += now - self._last
        self._last = now


class SublinearTrainer:
    """Two-layer network with shifted ReLU, trained by Gauss-Newton steps on all points at once.

    Parameters
    ----------
    width : int, number m of neurons, which must be even with init="antisymmetric".
    shift : float or "auto", threshold b of the activation; "auto" is default_shift(width, alpha).
    alpha : float in [0, 1), for shift="auto".
    search : how active neurons are found; same network, same steps, other costs for each step.
        "tree"   search trees over stored products: the paper. O(n |K| (min(k, d) + log m)) for |K| changed neurons, each
                 active on k points.
        "scan"   stored products, all compared: O(n m + n |K| min(k, d)).
        "dense"  products anew: O(n m d).
    solver : how (G + damping I) g = f - y is solved.
        "cholesky"    exactly, from the Gram matrix.
        "sketch"      conjugate gradients preconditioned by a sketch of J^T: the paper, end to end.
        "richardson"  the same with the paper's own iteration, which needs a larger sketch.
        "cg"          conjugate gradients, no preconditioner.
        "gradient"    g = (f - y) / ||G_0||: gradient descent.
        "sketch", "richardson" and "cg" stop at the relative tolerance of Algorithm 5, sqrt(lambda / n) / 6, which takes
        the smallest eigenvalue of the kernel, O(n^3), once. Their steps differ between searches within that tolerance;
        those of the exact solvers do not.
    sketch : "sparse", "srht" or "gaussian".
    sketch_size : int >= n, rows of the sketch; None is max(8 n, 4 d), with 64 (n + 8) for "richardson".
    init : "antisymmetric", neurons in pairs (w, +1), (w, -1), so that f = 0 at the start; or "gaussian", independent
        signs as in the paper.
    damping : float >= 0; 0 is the paper's pure step. "gradient" has no use for it.
    normalize : how the rows of X get length 1. "lift" centres the columns, appends a constant coordinate, so that
        parallel rows stay apart, and scales the rows; "rows" centres and scales; None takes X and y as they are and
        requires rows of length 1. Unless None, targets are centred and scaled too, and `predict` undoes it.
    dtype : precision of the products that "dense", "scan" and "tree" compute or keep. "float32" halves their memory
        and stops near a residual of 1e-6; "float64" reaches 1e-9.
    tol : float, relative residual ||f - y|| / ||y|| at which training stops.
    max_iter : int, largest number of steps; 0 leaves the starting network.
    random_state : None, int, numpy RandomState or Generator. The starting weights depend on it, on
        init and on d alone; a wider network extends a narrower one.
    callback : called with each record of history_.
    verbose : 1 prints a line for each step.

    Attributes
    ----------
    history_ : a dict for the start (iteration 0) and for each step: iteration, residual (after it), active (mean |Q_i|
        after it), changed (|K|, neurons the step moved), flips (pairs that crossed the threshold), inner_iterations,
        damping, operations (multiply-adds, comparisons and moves of products), seconds, and seconds by phase:
        seconds_query, seconds_jacobian (Gram matrix or sketch), seconds_solve, seconds_update.
    residual_ (float), n_iter_ (int), converged_ (bool), shift_ (float), n_live_ (int, neurons active on some point at the
        start), init_seconds_ (float), signs_ (m,).

    Memory: "scan" and "tree" hold (1 + 1/15) n m products and the starting weights of live neurons, "dense" m d weights.
    Costs: fit takes O(n m d) once, then for each step the search as above and the solver, O(n^3) for "cholesky". It raises
    ValueError, TypeError or MemoryError on bad input, LinAlgError when the Gram matrix is singular and damping is zero.
    """

    def __init__(
        self,
        width=65536,
        *,
        shift="auto",
        alpha=0.04,
        search="tree",
        solver="cholesky",
        sketch="sparse",
        sketch_size=None,
        init="antisymmetric",
        damping=0.0,
        normalize="lift",
        dtype="float64",
        tol=1e-6,
        max_iter=50,
        random_state=None,
        callback=None,
        verbose=0,
    ):
        self.width = width
        self.shift = shift
        self.alpha = alpha
        self.search = search
        self.solver = solver
        self.sketch = sketch
        self.sketch_size = sketch_size
        self.init = init
        self.damping = damping
        self.normalize = normalize
        self.dtype = dtype
        self.tol = tol
        self.max_iter = max_iter
        self.random_state = random_state
        self.callback = callback
        self.verbose = verbose

    def get_params(self, deep=True):
        """Constructor arguments by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params):
        """Sets constructor arguments by name."""
        known = self.get_params()
        for name in params:
            _check_choice("parameter", name, known)
        for name, value in params.items():
            setattr(self, name, value)
        return self

    def fit(self, X, y):
        """Trains from new starting weights on X (n, d) and y (n,); neither is modified. Returns self."""
        shift, seed = self._check_options()
        X = _check_matrix("X", X)
        y = _check_vector("y", y, size=len(X))
        if self.sketch_size is not None and self.sketch_size < len(X) and self.solver in ("sketch", "richardson"):
            raise ValueError(f"sketch_size must be at least the number {len(X)} of points, got {self.sketch_size}")
        begin = time.perf_counter()
        scales = _Scales.of(X, y, self.normalize)
        X, y = scales.unit_rows(X), scales.targets(y)
        with _serial_blas():
            XXt = X @ X.T
        search = SEARCHES[self.search](X, XXt, shift, self.width, seed, self.init, self.dtype)
        # Nothing of this object has changed up to here, so that input that is refused leaves it as it was.
        self._X, self._scales, self._search, self.shift_, self.history_ = X, scales, search, shift, []
        self._prepare_solver(seed)
        self.init_seconds_ = time.perf_counter() - begin

        y_norm = np.linalg.norm(y) or 1.0
        stopwatch = _Stopwatch()
        outputs = self._find_active(stopwatch)
        self.n_live_ = self._active.neurons.size
        self._record(np.linalg.norm(outputs - y) / y_norm, 0, 0, 0, stopwatch)
        while self.residual_ > self.tol and self.n_iter_ < self.max_iter:
            stopwatch = _Stopwatch()
            J = SparseJacobian._of(self._X, XXt, self._signs, self.width, self._active)
            with _serial_blas() if len(X) <= 1024 else nullcontext():
                step, inner_iterations = self._solve(J, outputs - y, stopwatch.lap)
            self._search.move(self._active, self._signs, step)
            stopwatch.lap("seconds_update")
            before = self._active
            outputs = self._find_active(stopwatch)
            neurons, points, signs = _flips(before, self._active)
            self._search.flipped(neurons, points, signs)
            stopwatch.lap("seconds_query")
            residual = np.linalg.norm(outputs - y) / y_norm
            self._record(residual, before.neurons.size, neurons.size, inner_iterations, stopwatch)
            if not np.isfinite(residual):
                break
        if not self.converged_ and self.max_iter > 0:
            warnings.warn(
                f"relative residual {self.residual_:.2e} after {self.n_iter_} steps is above tol={self.tol:g}; use a larger "
                "width or a smaller shift (more active neurons), damping > 0, or a larger max_iter",
                RuntimeWarning,
                stacklevel=2,
            )
        return self

    def predict(self, X):
        """Outputs (k,) of the trained network at X (k, d), in the units of y.

        O(k d n_live) with init="antisymmetric", whose dead neurons cancel, and O(k d m) with search="dense" or "gaussian",
        which draws the starting weights again.
        """
        self._check_fitted()
        X = _check_matrix("X", X)
        if X.shape[1] != self._scales.x_mean.size:
            raise ValueError(f"X has {X.shape[1]} columns, but fit saw {self._scales.x_mean.size}; pass the same features")
        X = self._scales.unit_rows(X)
        outputs = np.zeros(len(X))
        for W, signs in self._search.trained_blocks():
            for first in range(0, len(X), 1024):  # 1024 x BLOCK products at a time, 128 MB
                rows = slice(first, first + 1024)
                outputs[rows] += np.maximum(X[rows] @ W.T - self.shift_, 0.0) @ signs
        return outputs / np.sqrt(self._search.width) * (self._scales.y_scale or 1.0) + self._scales.y_mean

    def score(self, X, y):
        """Coefficient of determination R^2 of predict(X) with respect to y."""
        predicted = self.predict(X)
        y = _check_vector("y", y, size=predicted.size)
        spread = np.sum((y - y.mean()) ** 2)
        if spread == 0:
            raise ValueError("y must not be constant, since R^2 compares with its variance")
        return float(1.0 - np.sum((y - predicted) ** 2) / spread)

    def weights(self):
        """Hidden weights now (m, d) float64; d counts the coordinate that normalize="lift" appends."""
        self._check_fitted()
        d = self._X.shape[1]
        width = self._search.width
        _check_memory(f"weights() of {width} neurons in {d} dimensions", width * d * 8)
        out = np.empty((width, d))
        self._search.fill(out)
        return out

    def active_sets(self):
        """Neurons active on each training point now: (indptr, indices), those of point i being
        indices[indptr[i]:indptr[i + 1]], ascending."""
        self._check_fitted()
        return _by_point(self._search.original(self._active), len(self._X))

    @property
    def signs_(self):
        """Output signs (m,)."""
        self._check_fitted()
        return np.concatenate(list(self._search.draw(lambda first, W, signs: signs)))

    def _check_options(self):
        """Raises on bad options; returns the threshold and the seed."""
        _check_integer("width", self.width, 1)
        for name, known in (
            ("search", SEARCHES),
            ("solver", SOLVERS),
            ("sketch", SKETCHES),
            ("init", ("antisymmetric", "gaussian")),
            ("dtype", ("float32", "float64")),
            ("normalize", ("lift", "rows", None)),
        ):
            _check_choice(name, getattr(self, name), known)
        if self.init == "antisymmetric" and self.width % 2:
            raise ValueError(f'init="antisymmetric" needs an even width, got {self.width}; use it +- 1, or init="gaussian"')
        if self.sketch_size is not None:
            _check_integer("sketch_size", self.sketch_size, 1)
        _check_real("damping", self.damping, 0.0)
        _check_real("tol", self.tol, 0.0)
        _check_integer("max_iter", self.max_iter, 0)
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be callable, got {self.callback!r}")
        default = default_shift(self.width, self.alpha)
        shift = default if isinstance(self.shift, str) and self.shift == "auto" else _check_real("shift", self.shift)
        return shift, _seed(self.random_state)

    def _check_fitted(self):
        if not hasattr(self, "history_"):
            raise AttributeError("this SublinearTrainer is not fitted yet; call fit(X, y) first")

    def _prepare_solver(self, seed):
        n = len(self._X)
        self._rate = None
        if self.solver in ("sketch", "richardson", "cg"):
            self._tolerance = _regression_tolerance(self._X, self.shift_)
        default = max(64 * (n + 8) if self.solver == "richardson" else 8 * n, 4 * self._X.shape[1])
        self._sketch_size = default if self.sketch_size is None else self.sketch_size
        self._rng = np.random.default_rng(seed)  # of the sketches

    def _find_active(self, stopwatch):
        """Finds the active sets of the network as it is now, and returns its outputs f (n,)."""
        self._active, values = self._search.active()
        self._signs = self._search.signs[self._active.neurons]
        outputs = self._search.outputs(self._active, self._signs, values)
        stopwatch.lap("seconds_query")
        return outputs

    def _solve(self, J, residual, lap):
        if self.solver == "cholesky":
            return _solve_cholesky(J, residual, self.damping, lap)
        if self.solver == "cg":
            return _solve_cg(J, residual, self.damping, self._tolerance, lap)
        if self.solver == "gradient":
            if self._rate is None:
                self._rate = _gradient_rate(J)
            lap("seconds_solve")
            return self._rate * residual, 0
        solve = _solve_sketch if self.solver == "sketch" else _solve_richardson
        return solve(J, residual, self.damping, self._tolerance, SKETCHES[self.sketch], self._sketch_size, self._rng, lap)

    def _record(self, residual, changed, flips, inner_iterations, stopwatch):
        self.n_iter_ = len(self.history_)
        self.residual_ = float(residual)
        self.converged_ = bool(self.residual_ <= self.tol)
        record = {
            "iteration": self.n_iter_,
            "residual": self.residual_,
            "active": self._active.points.size / len(self._X),
            "changed": changed,
            "flips": flips,
            "inner_iterations": inner_iterations,
            "damping": float(self.damping),
            "operations": self._search.take_operations(),
            "seconds": sum(stopwatch.phases.values()),
            **stopwatch.phases,
        }
        self.history_.append(record)
        if self.verbose:
            print(
                "{iteration:4d}  residual {residual:.2e}  changed {changed}  flips {flips}  {seconds:.3f} s".format(**record)
            )
        if self.callback is not None:
            self.callback(record)
