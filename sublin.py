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

    n, d    --        number of points, and of their coordinates (with the one that normalize="lift" appends)
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
    mu      damping   G + mu I is solved instead of G
    nnz     pairs     number of active pairs, the sum of |Q_i|
    gamma   --        sum of g_i over the steps in which neuron r was active on x_i       (live, n)
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

The sections follow the data: threads, input checks, problem, trees, active sets and Jacobian, sketches, solvers, kernel
theory, live pairs, searches, scaling, saving, trainer. Trees are the paper's way to find active neurons; live pairs go
past it.
"""

import ctypes
import hashlib
import inspect
import json
import math
import os
import signal
import sys
import tempfile
import threading
import time
import warnings
from collections import deque
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, cached_property, partial
from pathlib import Path
from typing import NamedTuple

import numba
import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.special
from numba import njit, prange, types
from numba.core import cgutils
from numba.extending import intrinsic
from scipy.linalg.lapack import dpotrf, dpotrs
from scipy.sparse.linalg import LinearOperator, cg

__all__ = [
    "ConvergenceWarning",
    "MaxTrees",
    "SparseJacobian",
    "SublinearTrainer",
    "default_shift",
    "gaussian_sketch",
    "ntk_eigenvalue_bounds",
    "separability",
    "shifted_ntk",
    "smallest_ntk_eigenvalue",
    "sparse_sign_sketch",
    "srht_sketch",
]

# Work is divided into this many chunks whatever the number of threads, and partial sums are added chunk by chunk, so
# that the same seed gives the same bits with any number of threads. (BLAS may differ where it is left its own threads:
# in solves with n > 1024 and in wide dense products.)
CHUNKS = 64

# Reassociation lets sums and counts use vector registers. Flags that assume away infinities and NaN would break the
# comparisons with padding and with infinite thresholds.
FAST = {"reassoc", "contract", "nsz", "arcp"}

# ======================================================================================================================
# Threads
# ======================================================================================================================


@contextmanager
def _interrupts():
    """Lets an interrupt in a compiled kernel, which may show as a SystemError, come out as what it is."""
    try:
        yield
    except SystemError as error:
        if isinstance(error.__cause__, KeyboardInterrupt):
            raise KeyboardInterrupt from None
        raise


def _run(kernel, work, *arguments):
    """kernel(*arguments), on one thread if it touches fewer than 2^16 numbers.

    To start and join the threads takes as long as that, and a whole slice of the scheduler if another program holds a core.
    """
    threads = numba.get_num_threads()
    numba.set_num_threads(threads if work >= 1 << 16 else 1)
    try:
        with _interrupts():
            return kernel(*arguments)
    finally:
        numba.set_num_threads(threads)


@cache
def _pool(process):
    """Threads that wait for work, of this `process`: a fork inherits the object without its threads."""
    return ThreadPoolExecutor(numba.config.NUMBA_NUM_THREADS)


def _places(threads):
    """CPUs for each thread: one of its own if there are as many of both, else all that are allowed. Empty if unknown.

    Linux may leave a thread that wakes on the CPU of the one that woke it, for several milliseconds with another CPU idle.
    """
    if threads == 1 or not hasattr(os, "sched_getaffinity"):
        return []
    allowed = os.sched_getaffinity(0)
    return [{cpu} for cpu in sorted(allowed)] if len(allowed) == threads else [allowed] * threads


def _stay_on(cpus):
    """Keeps this thread on some CPUs, if the system lets it."""
    with suppress(OSError):
        os.sched_setaffinity(0, cpus)


def _over_chunks(task, work, most=CHUNKS):
    """[task(thread, low, high), ...] for shares low, ..., high - 1 of the chunks, in their order: in `most` threads at most,
    numbered from 0, and in one if `work`, the numbers touched, is below 2^16.

    For kernels that let go of the interpreter: to compile those of a fit with prange takes more than twice as long. A thread
    takes the next share when it is done with one, since threads of a shared machine are not equally fast.
    """
    threads = min(most, numba.get_num_threads()) if work >= 1 << 16 else 1
    shares = min(CHUNKS, 8 * threads) if work >= 1 << 24 else threads
    places, left, done = _places(threads), iter(range(shares)), {}

    def serve(thread):
        if places:
            _stay_on(places[thread])
        for share in left:  # one iterator for all threads
            done[share] = task(thread, CHUNKS * share // shares, CHUNKS * (share + 1) // shares)

    others = []
    with suppress(RuntimeError):  # the interpreter ends, and starts no more threads: this one takes all the shares
        for thread in range(1, threads):
            others.append(_pool(os.getpid()).submit(serve, thread))
    try:
        with _interrupts():
            serve(0)
    finally:
        if places:
            _stay_on(set.union(*places))
        started = [other for other in others if not other.cancel()]
        wait(started)
    for other in started:
        other.result()
    return [done[share] for share in range(shares)]


def _chunk_edges(size):
    """Where the chunks of so many neurons begin, and the last one ends."""
    return size * np.arange(CHUNKS + 1) // CHUNKS


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


_serial = {"users": 0, "before": [], "lock": threading.Lock()}


@contextmanager
def _serial_blas():
    """Keeps BLAS and LAPACK on one thread, in the whole process, until all who have asked for it are done.

    Their idle threads spin for some 25 ms after a call, on cores that the compiled loops then wait for: a QR factorisation
    of 512 x 64 and three small loops after it took 3.9 + 7.6 ms, and 0.7 + 1.3 ms on one thread (2 cores, means); a step at
    n = 1024, m = 2^18 took 220 ms with G g on two threads, and 169 ms on one.
    """
    with _serial["lock"]:
        if _serial["users"] == 0:
            _serial["before"] = [(set_threads, get_threads()) for get_threads, set_threads in _openblas_threads()]
            for set_threads, _ in _serial["before"]:
                set_threads(1)
        _serial["users"] += 1
    try:
        yield
    finally:
        with _serial["lock"]:
            _serial["users"] -= 1
            if _serial["users"] == 0:
                for set_threads, threads in _serial["before"]:
                    set_threads(threads)


# ======================================================================================================================
# Input checks: the one place that refuses bad input (singular systems are refused by the solvers)
# ======================================================================================================================


def _check_real(name, value, low=-np.inf, below=np.inf):
    """A finite float with low <= value < below."""
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, float, np.integer, np.floating)):
        raise TypeError(f"{name} must be a number, got {value!r}")
    try:
        finite = math.isfinite(value)
    except OverflowError:  # an integer beyond all floats
        finite = False
    if not finite or not low <= value < below:
        allowed = "finite" if np.isinf(low) and np.isinf(below) else f"a finite number in [{low:g}, {below:g})"
        raise ValueError(f"{name} must be {allowed}, got {value!r}")
    return float(value)


def _check_auto(name, value, low=-np.inf):
    """A finite float, low or more, or "auto"."""
    if not isinstance(value, str):
        return _check_real(name, value, low)
    if value != "auto":
        raise TypeError(f'{name} must be a number or "auto", got {value!r}')
    return value


def _check_integer(name, value, low, high=None):
    if isinstance(value, (bool, np.bool_)) or not isinstance(value, (int, np.integer)):
        remedy = f"; pass int({name})" if isinstance(value, (float, np.floating)) else ""
        raise TypeError(f"{name} must be an integer, got {value!r}{remedy}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")
    if high is not None and value > high:
        raise ValueError(f"{name} must be at most {high}, got {value if value < 1 << 80 else 'more than 2^80'}")
    return int(value)


def _check_choice(name, value, known):
    if not (isinstance(value, (str, int, np.integer, np.bool_, type(None))) and value in known):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def _check_numbers(name, value, dimensions):
    """A finite, real array of that many dimensions, none of them empty."""
    if scipy.sparse.issparse(value):
        raise TypeError(f"{name} is a sparse matrix, which is not supported; pass {name}.toarray()")
    if value is None:
        raise TypeError(f"{name} must be an array of numbers, got None")
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} must be an array, but its rows have different lengths") from None
    if array.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: {name} must be real; pass its real part")
    if array.dtype.kind == "O":
        try:
            array = array.astype(float)
        except OverflowError:
            raise ValueError(f"{name} must be finite, but has an integer beyond all floats; scale it down") from None
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must be an array of numbers, but of its entries: {error}; encode it as numbers"
            ) from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be an array of numbers, got dtype {array.dtype}; encode it as numbers (astype(float))")
    if array.ndim != dimensions:
        remedy = ""
        if dimensions == 1 and array.size == len(np.atleast_1d(array)):
            remedy = f"; pass {name}.ravel()"
        elif dimensions == 2 and array.ndim == 1:
            remedy = f". Reshape your data: pass {name}[:, None] for one column, {name}[None] for one row"
        raise ValueError(f"{name} must have {dimensions} dimension(s), got shape {array.shape}{remedy}")
    if array.size == 0:
        lacking = "feature" if len(array) else "sample"
        raise ValueError(
            f"{name} must not be empty, but has 0 {lacking}(s) (shape={array.shape}) while a minimum of 1 is required."
        )
    if not np.isfinite(array).all():
        where = tuple(int(k) for k in np.argwhere(~np.isfinite(array))[0])
        what = "NaN" if np.isnan(array[where]) else f"{array[where]}"
        raise ValueError(f"{name} must be finite, but {name}{list(where)} is {what}; remove or impute such entries")
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


def _check_targets(value, size):
    """A vector; a single column counts as one, with a warning."""
    if value is None:
        raise ValueError("fit requires y to be passed, but the target y is None")
    if getattr(value, "ndim", 1) == 2 and np.shape(value)[1] == 1:
        warnings.warn(
            f"A column-vector y was passed when a 1d array was expected, got shape {np.shape(value)}; pass y.ravel()",
            _of_sklearn("DataConversionWarning", UserWarning),
            stacklevel=3,
        )
        value = np.ravel(value)
    return _check_vector("y", value, size=size)


def _feature_names(X):
    """Column names of a data frame, if they are strings; else None."""
    names = getattr(X, "columns", None)
    if names is None or not all(isinstance(name, str) for name in names):
        return None
    return np.asarray(names, dtype=object)


def _check_features(X, fitted):
    """X (k, n_features_in_) with the columns that the `fitted` trainer was fitted with, in their order."""
    names, expected = _feature_names(X), getattr(fitted, "feature_names_in_", None)
    if names is not None and expected is not None and list(names) != list(expected):
        differing = {
            "unseen at fit time": set(names) - set(expected),
            "seen at fit time, yet now missing": set(expected) - set(names),
        }
        lists = [f"Feature names {what}:\n- " + "\n- ".join(sorted(those)) for what, those in differing.items() if those]
        lists = lists or ["Feature names must be in the same order as they were in fit."]
        raise ValueError("\n".join(["The feature names should match those that were passed during fit.", *lists]) + "\n")
    for one, other in ((names, expected), (expected, names)):
        if one is None and other is not None:
            with_names = "X does not have valid feature names, but SublinearTrainer was fitted with feature names"
            without = "X has feature names, but SublinearTrainer was fitted without feature names"
            warnings.warn(with_names if names is None else without, UserWarning, stacklevel=3)
    X = _check_matrix("X", X)
    if X.shape[1] != fitted.n_features_in_:
        raise ValueError(
            f"X has {X.shape[1]} features, but SublinearTrainer is expecting {fitted.n_features_in_} features as input; "
            "pass the columns that fit saw"
        )
    return X


def _of_sklearn(name, otherwise):
    """An exception or warning of scikit-learn, whose users expect it, if scikit-learn is in use."""
    return getattr(sys.modules.get("sklearn.exceptions"), name, otherwise)


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


def _check_memory(what, needed, remedy="use fewer neurons or points"):
    """Refuses what cannot fit, before it is allocated."""
    try:
        with open("/proc/meminfo") as lines:
            available = next(1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux
        available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") if hasattr(os, "sysconf") else np.inf
    if needed > available:
        raise MemoryError(
            f"{what} would need {needed / 2**30:,.1f} GiB, but {available / 2**30:,.1f} GiB are available; {remedy}"
        )


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


def _starting_vectors(seed, block, count, d, init):
    """Starting vectors (float32) and signs (int8) of the `count` neurons from block * BLOCK on.

    The generator is keyed by seed and block and keeps no other state, so any block can be made again, alone, on any
    thread. "antisymmetric" draws every vector once, for the two neurons 2k and 2k + 1 with signs +1 and -1: half as many
    vectors as signs.
    """

    def stream(number):
        key = np.array([seed, block], dtype=np.uint64)
        return np.random.Generator(np.random.Philox(key=key, counter=[0, 0, 0, number]))

    if init == "antisymmetric":
        return stream(0).standard_normal((count // 2, d), dtype=np.float32), np.tile(np.array([1, -1], np.int8), count // 2)
    signs = 2 * stream(1).integers(0, 2, count, dtype=np.int8) - 1
    return stream(0).standard_normal((count, d), dtype=np.float32), signs


def _generator_probe(seed, d, init):
    """The first starting weights, by which a change of NumPy's generator is noticed."""
    return _starting_vectors(seed, 0, 2, d, init)[0].ravel()[:8]


def _starting_blocks(seed, width, d, init, work):
    """Yields work(first neuron, vectors, signs) block by block; threads draw and work on a few blocks ahead.

    Work is done with BLAS on one thread, so that the blocks share the cores evenly and the bits depend on nothing else.
    """

    def draw_and_work(first):
        return work(first, *_starting_vectors(seed, first // BLOCK, min(BLOCK, width - first), d, init))

    threads = numba.get_num_threads()
    places = _places(threads)

    def pin():
        if places:
            _stay_on(places.pop())

    with _serial_blas(), ThreadPoolExecutor(threads, initializer=pin) as pool:
        ahead = deque()
        for first in range(0, width, BLOCK):
            ahead.append(pool.submit(draw_and_work, first))
            if len(ahead) > 2 * threads:
                yield ahead.popleft().result()
        for done in ahead:
            yield done.result()


def _stored_blocks(vectors, signs, work):
    """_starting_blocks from weights that are at hand, a vector for each neuron."""
    for first in range(0, signs.size, BLOCK):
        yield work(first, vectors[first : first + BLOCK], signs[first : first + BLOCK])


def _refuse_to_draw(work):
    raise ValueError(
        "the weights of neurons that never fired cannot be drawn again: NumPy's generator has changed since this network "
        "was saved; predict does not need them, but weights, signs_ and fit with other points do"
    )


def _for_each_neuron(work):
    """The same work, given a row of weights for each neuron also where two share a vector."""
    return lambda first, vectors, signs: work(first, np.repeat(vectors, signs.size // len(vectors), axis=0), signs)


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

    Returns the active sets, the products of the active pairs, the number of nodes touched, which for one tree is at
    most FAN_OUT times max(1, reported leaves) times (levels), and that of neurons whose leaves were.  Given levels of
    height one it compares every leaf.
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
    return ActiveSets(reached, offsets, points), values, touched, counts.size


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
        _check_memory(
            f"MaxTrees of {len(X)} points and {len(W)} neurons",
            len(X) * int(self._levels[-1]) * dtype.itemsize,
            "use fewer points or neurons, or float32 arrays",
        )
        self.X, self.W = X.astype(dtype), W.astype(dtype)
        self._rows = np.full((self._levels[-1], len(X)), -np.inf, dtype)
        np.matmul(self.W, self.X.T, out=self._rows[: len(W)])
        _mend_ancestors(self._rows, self._levels, np.arange(len(W)))
        self.touched = self._rows.size

    def query(self, i, tau):
        """Algorithm 4: ascending int64 indices j with <w_j, x_i> >= tau, k of them, in O((1 + k) log m)."""
        i = _check_index("i", i, len(self.X))
        active, _, touched, _ = _query(self._rows, self._levels, i, i + 1, _check_threshold(tau))
        self.touched += touched
        return active.neurons

    def query_all(self, tau):
        """All n queries in one descent: (indptr, indices), the answer for x_i being indices[indptr[i]:indptr[i + 1]].

        A group of siblings is read for all points as soon as one of them reaches tau there: O(n (1 + |K|) log m) for
        the set K of reported neurons.
        """
        active, _, touched, _ = _query(self._rows, self._levels, 0, len(self.X), _check_threshold(tau))
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


def _by_neuron(indptr, indices, m):
    """ActiveSets of m neurons, from pairs in CSR by point."""
    offsets, points = _by_point(ActiveSets(np.arange(indptr.size - 1), indptr, indices), m)
    neurons = np.flatnonzero(np.diff(offsets))
    return ActiveSets(neurons, np.append(offsets[neurons], offsets[-1]), points)


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
    """C[i, j] = |Q_i & Q_j| for j <= i. O(n^2 + bands nnz + sum over r of |act(r)|^2).

    Each of the bands of rows is counted by one thread, which passes over all neurons for it, so no count is shared.
    """
    counts = np.zeros((n, n), np.int32)
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


TILE = 256


def _gram(XXt, counts, width):
    """(X X^T) o C / m, where C[i, j] is the sum of the `counts[:, i, j]` and, if i and j differ, the `counts[:, j, i]`."""
    gram = np.empty_like(XXt)

    def fill(_, low, high):
        for first in range(len(XXt) * low // CHUNKS, len(XXt) * high // CHUNKS, TILE):
            rows = slice(first, min(first + TILE, len(XXt) * high // CHUNKS))
            shared = counts[:, rows].sum(axis=0, dtype=np.int32)
            shared += counts[:, :, rows].sum(axis=0, dtype=np.int32).T
            np.einsum("ii->i", shared[:, rows])[:] //= 2
            np.multiply(XXt[rows], shared, out=gram[rows])
            gram[rows] /= width

    _over_chunks(fill, counts.size)
    return gram


def _coactivity_of(active, n):
    bands = max(numba.get_num_threads(), n * n >> 19)  # a band's counts stay in cache: 2 MB or less
    return _run(_coactivity, 8 * active.points.size, active, n, bands)


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
        active = _by_neuron(*_check_csr(indptr, indices, len(X), signs.size), signs.size)
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
        """Gram matrix G = J J^T = (X X^T) o C / m (n, n), C_ij = |Q_i & Q_j|: O(n^2 + sum over r of |act(r)|^2).

        Beyond n = 1000 the counts are made in n^2 / 2^19 bands, and every band passes over the active sets once more.
        """
        counts = _coactivity_of(self.active, len(self.X))
        return _gram(self._XXt, counts[None], self.width)

    def active_counts(self):
        """|Q_i| for every point (n,)."""
        return np.bincount(self.active.points, minlength=len(self.X))

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


def _singular_error(J, otherwise=""):
    """LinAlgError that says why the Gram matrix is singular and what to do; or `otherwise`, if that is not certain."""
    silent = np.flatnonzero(J.active_counts() == 0)
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


def _check_all_fire(J, damping):
    if damping == 0 and J.active_counts().min() == 0:
        raise _singular_error(J)


def _damped_gram(J, damping):
    def times(v):
        if not np.isfinite(v).all():
            raise np.linalg.LinAlgError(
                "conjugate gradients broke down, since the Gram matrix is singular; use distinct points, a larger width, or "
                "damping > 0"
            )
        return J.gram_times(v) + damping * v

    return LinearOperator((len(J.X), len(J.X)), matvec=times, dtype=float)


def _conjugate_gradients(G, residual, tolerance, limit, preconditioner=None):
    """To ||G g - (f - y)|| <= tolerance ||f - y||, with `preconditioner` near the inverse of G; and the iterations."""
    iterations = 0

    def count(_):
        nonlocal iterations
        iterations += 1

    step, failed = cg(G, residual, rtol=tolerance, maxiter=limit, M=preconditioner, callback=count)
    if failed:
        raise np.linalg.LinAlgError(
            f"conjugate gradients did not reach a relative residual of {tolerance:.1e} in {limit} iterations: the Gram "
            'matrix is singular or nearly so; use solver="cholesky" to learn more, a larger width, or damping > 0'
        )
    return step, iterations


# From so many points on, the factor of an earlier Gram matrix is a preconditioner for as long as at most 1 / STALE of the
# active pairs have flipped since. At n = 4096, m = 2^16 (2 cores) that takes 8 iterations and 165 ms instead of 300 to 350
# with 4 % of them flipped, and 6 and 115 ms with 0.1 %. With 39 % it takes more than 10, as slow as a new factor, and so
# do 5 at n = 2048.
REUSE, STALE = 4096, 20


def _solve_cholesky(J, residual, damping, lap, earlier=None):
    """Exactly, from the Gram matrix and its Cholesky factor [CGH+19]: O(n^3) after the Gram matrix, or O(n^2) for each
    iteration if the factor of an `earlier` one is near. Returns the factor too."""
    G = J.gram()
    lap("seconds_jacobian")
    if damping > 0:
        G = G + damping * np.eye(len(G))
    if earlier is not None:
        inverse = LinearOperator(G.shape, matvec=partial(scipy.linalg.cho_solve, earlier, check_finite=False), dtype=float)
        with suppress(np.linalg.LinAlgError):  # raised if it is too far away
            step, iterations = _conjugate_gradients(G, residual, 1e-13, 10, inverse)
            lap("seconds_solve")
            return step, iterations, earlier
    triangle, failed = dpotrf(G.T, lower=True, clean=False)  # in LAPACK's order
    pivots = triangle.diagonal()
    if failed or pivots.min() ** 2 <= pivots.size * np.finfo(float).eps * pivots.max() ** 2:
        raise _singular_error(J)
    step, _ = dpotrs(triangle, residual, lower=True)
    lap("seconds_solve")
    return step, 0, (triangle, True)


def _solve_cg(J, residual, damping, tolerance, lap):
    """Conjugate gradients without a preconditioner: O(sqrt(kappa) log(kappa / tolerance)) products with G, of condition
    kappa."""
    _check_all_fire(J, damping)
    step, iterations = _conjugate_gradients(_damped_gram(J, damping), residual, tolerance, 1000 + 20 * len(residual))
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
    limit = 1000 + 20 * len(residual)
    step, iterations = _conjugate_gradients(_damped_gram(J, damping), residual, tolerance, limit, preconditioner)
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


def smallest_ntk_eigenvalue(X, shift):
    """Smallest eigenvalue lambda of the shifted neural tangent kernel (Remark 2.8), a float without unit.

    Zero in exact arithmetic if two rows coincide, and then a rounding error of either sign, up to about n 10^-16. Takes
    O(n^2 d + n^3) operations and O(n^2) memory.

    X : (n, d), rows of length 1.  shift : the threshold b, of either sign. Raises ValueError or TypeError on bad input.
    """
    return float(scipy.linalg.eigh(shifted_ntk(X, shift), eigvals_only=True, subset_by_index=[0, 0])[0])


def ntk_eigenvalue_bounds(X, shift):
    """The interval (low, high) that Theorem 2.13 gives for lambda: exp(-b^2 / 2) delta / (100 n^2) and exp(-b^2 / 2).

    delta is the separability of the rows of X. The true lambda is never above P(Z >= b), the kernel's diagonal, which is
    at most half of `high`. Takes O(n^2 d) operations and O(n d) memory.

    X : (n, d), at least two rows of length 1.  shift : the threshold b >= 0. Raises ValueError or TypeError on bad input.
    """
    X = _check_unit_rows(_check_matrix("X", X))
    shift = _check_real("shift", shift, 0.0)
    if len(X) < 2:
        raise ValueError("X must have at least 2 rows for a separability, got 1; a single point has lambda = P(Z >= shift)")
    high = math.exp(-0.5 * shift**2)
    return high * separability(X) / (100 * len(X) ** 2), high


def _regression_tolerance(X, shift):
    """Relative tolerance sqrt(lambda / n) / 6 of Algorithm 5, line 30, lambda the smallest eigenvalue of the shifted NTK.

    Rounding can leave lambda at or below zero (coinciding points), so it is held at n times the machine epsilon or more.
    """
    return np.sqrt(max(smallest_ntk_eigenvalue(X, shift) / len(X), np.finfo(float).eps)) / 6.0


# ======================================================================================================================
# Live pairs: the state of search="lazy"
# ======================================================================================================================
#
# A neuron that is active on no training point has no gradient, so it never moves and never wakes. Kept are the *live* ones,
# active on some point at the start (after a warm start all that have ever been): their starting weights, and of their
# starting products those *tracked*, >= b - margin, in descending order. Weights and products at any time follow from these
# and from the pairs that have ever been active, which are among the first `reach` of a row,
#
#     w_r = w_r(0) + dw_r,    dw_r = -m^(-1/2) a_r sum_i gamma[r, i] x_i,    <w_r, x_j> = <w_r(0), x_j> + <dw_r, x_j>.
#
# No product has moved by more than |dw_r|, or a bound on it, so a look at a neuron need not go further down its row than
# that below b. The two neurons of an antisymmetric pair, *twins*, share a row of starting products, and move by opposites
# until one of them flips.
#
# Nor need a neuron be looked at in every step. Let A_i be the sum of |g_i| / sqrt(m) over the steps, the *path* of point i,
# D that of |g|_inf / sqrt(m), the *distance* of all, and cross_i the largest |<x_i, x_j>| over j != i. From one look to the
# next act(r) is the same, so active products move by no more than the sum of A_i over act(r) grows, and the others by no
# more than that of A_i cross_i grows. Each of these sums has a *limit*, the *slack* away, and below both no pair flips. A
# look puts the first one's limit ahead by the least excess of an active product over b, or by what inactive ones within
# `reach` allow, if that is less; and the second one's by the least shortfall of a product beyond. If only the first has
# reached its limit, the next look need not read beyond `reach`.
#
# More is known of a *single* neuron, active on one point x_i only, as most are if n is small: it moves along x_i, as
# far as s = -m^(-1/2) a_r (the sum of g_i over all steps) does, and its product with x_j by <x_i, x_j> times that. Its
# limits are of s and of -s, its slacks how far it can move along x_i and against it before a pair flips, not before one may,
# and a look always reads on: at n = 64, m = 2^20 the first step looks at 108,000 instead of 162,000 neurons.
#
# Since the sums grow by at most |act(r)| times what D does, a neuron need not even be thought of before D reaches a certain
# value, its *certificate*. A step *checks* the neurons whose certificates ran out, and *looks at* those of them where a
# limit is reached.

# Margins are MARGIN times the movement expected of products by the end of training. Means over the steps of a run with 1.2,
# 1.4, 1.6: 4.7, 2.4, 2.3 ms at n = 64, m = 2^20; with 1.35, 1.45, 1.6: 146, 109, 98 ms at n = 1024, m = 2^18, where
# initialisation takes 1.0, 1.2, 1.4 s. Below 1.4 rows are made anew by the thousand.
MARGIN = 1.6

# Rows that are made anew get a margin WIDER times as wide as is needed: 200 of them take 5 ms with 1.25 and 13 ms with 2 at
# n = 1024, m = 2^18, and where rows run out again and again, 1.25 costs no more.
WIDER = 1.25

# A look reads on to AHEAD times the bound on |dw_r| below b, so that the next few need not read beyond `reach`. Looks in the
# third step at n = 1024, m = 2^18, and those of them that read on: 126,000 and 98,000 with 1.0, 88,000 and 15,000 with 1.03
# to 1.3.
AHEAD = 1.05

# For two points, a word of 64 neurons takes 0.12 ns; one shared neuron, counted by itself, 3 ns: the ratio of the two.
WORD = 0.12 / 3.0

# The part of a slack that is relied upon, as rows of X may be longer than 1 by 1e-6.
LESS = 1.0 - 3e-6

GAPS = (1750, 701, 301, 132, 57, 23, 10, 4, 1)  # of M. Ciura, "Best increments for the average case of Shellsort", 2001


# Numba counts negative indices from the end, which takes three instructions an index, unless it knows that there are none:
# points are unsigned, and where it pays, places in memory go through this mask, which changes none of them. On one thread
# the looks of a first step take 7.9 instead of 9.1 ms at n = 64, m = 2^20, and 0.87 of the time at n = 1024, m = 2^18.
NOT_NEGATIVE = 2**62 - 1

# What is not compiled needs this kind of array for row.start to work; compiled code takes the plain kind faster.
RECORDS = np.recarray if numba.config.DISABLE_JIT else np.ndarray


# A live neuron. Its pairs are start, ..., start + count - 1, which it shares with its twin until one of them is widened. A
# record of 32 bytes is half a cache line.
LIVE_ROW = np.dtype(
    [
        ("start", np.int64),
        ("limit", np.float32),  # of the sum of A_i over act(r); of s if it is single
        ("far_limit", np.float32),  # of that of A_i cross_i; of -s if it is single
        ("margin", np.float32),  # starting products that are not tracked are further below b than this
        ("count", np.int32),
        ("reach", np.int32),  # pairs that have ever been active are among so many first ones
        ("sign", np.int8),  # a_r
        ("flipped", np.int8),  # 1 if a pair of it has ever flipped, else 0
        ("twin", np.int16),  # 1 for the second of two twins, else 0
    ]
)


class LivePairs(NamedTuple):
    """Tracked pairs by live neuron, starting products descending.

    gamma is not kept, as it grows in every step; `base` is, which changes only when a pair flips: gamma = base + (the sum of
    g_i over all steps if the pair is active, else 0). This and whether a pair is active are each twin's own: those of a
    row's pairs begin in base and active at copies * start + twin * count, the neuron's `own` place.
    """

    rows: np.ndarray  # (n_live,) LIVE_ROW
    certificates: np.ndarray  # (n_live,) inf if no pair can flip any more; -inf, with limits of -inf, for a look in any case
    points: np.ndarray  # (room,) uint32
    products: np.ndarray  # (room,) at the start
    base: np.ndarray  # (copies * room,)
    active: np.ndarray  # (copies * room,) bool
    copies: int  # neurons that are drawn with the same weights: 2 if antisymmetric, else 1


class PointData(NamedTuple):
    """The points and the threshold."""

    X: np.ndarray  # (n, d)
    X32: np.ndarray  # (n, d) float32
    XXt: np.ndarray  # (n, n)
    cross: np.ndarray  # (n,) largest |<x_i, x_j>| over j != i, and more than 0
    largest_cross: float
    shift: float
    unit: float  # m^(-1/2)
    gather: float  # cost of an entry of X X^T out of order, in multiply-adds of rows of X


class Rung(NamedTuple):
    """A list of neurons that holds all whose certificates end at `horizon` or before."""

    horizon: float
    neurons: np.ndarray  # (k,) uint32
    bounds: np.ndarray  # (k,) lower bounds of their certificates, in one stretch of memory


# What the looks add up, chunk by chunk: neurons looked at, flips, neurons that came to be active on some point less those
# that ceased to, neurons whose margin is too small, operations.
LOOKED_AT, FLIPS, WOKEN, SHORT, OPERATIONS = range(5)

# A pair that a step flipped, with its `base` before.
FLIP = np.dtype([("earlier", np.float64), ("neuron", np.int32), ("point", np.int32)])

# A *note* holds what a step does to one neuron: its flips, and the points on which it stays active. Notes are counted
# together when they hold so many times n of the one or the other: a look with 3 flips at n = 1024 takes 2.4 us with 7 n
# flips and 2.0 us with 64 n; points that stay are four times as many there.
NOTED, STAYED = 64, 256


class Scratch(NamedTuple):
    """What _look writes, one for each thread."""

    moved_by: np.ndarray  # (n + 1,) uint32, points with a gamma that is not zero
    factors: np.ndarray  # (n + 1,) by which they have moved the weights
    w: np.ndarray  # (d,) dw_r
    direction: np.ndarray  # (d,) float32, dw_r / |dw_r|
    moves: np.ndarray  # (n,) of products
    excess: np.ndarray  # (n,) of products over b
    candidates: np.ndarray  # (n + 1,) uint32, from `reach` on: pairs beyond it that may have woken, by where they stand
    noted: np.ndarray  # ((NOTED + 1) n, 3) int32, flips that are not counted yet: point, +1 or -1, number of the note
    stayed: np.ndarray  # ((STAYED + 1) n,) uint32, points on which their neurons stay active
    note_ends: np.ndarray  # (2, (NOTED + 1) n + 1) int32, where each note ends in those two, after 0

    @classmethod
    def of(cls, n, d):
        return cls(
            moved_by=np.empty(n + 1, np.uint32),
            factors=np.empty(n + 1),
            w=np.empty(d),
            direction=np.empty(d, np.float32),
            moves=np.empty(n),
            excess=np.empty(n),
            candidates=np.empty(n + 1, np.uint32),
            noted=np.empty(((NOTED + 1) * n, 3), np.int32),
            stayed=np.empty((STAYED + 1) * n, np.uint32),
            note_ends=np.zeros((2, (NOTED + 1) * n + 1), np.int32),
        )


@njit(cache=True)
def _rounded_down(x):
    """A float32 number that is not above x, and not inf."""
    x = min(x, 3e38)
    return np.float32(x - abs(x) * 2.0**-23 - 2.0**-148)


@njit(cache=True, nogil=True, fastmath=FAST)
def _thresholds(products, least_active, pull, cross, lowered_shift):
    """For each row: how many products reach least_active; if any, the least product to track, lowered_shift - margin; and
    how many reach that."""
    active, tracked = np.zeros(len(products), np.int64), np.zeros(len(products), np.int64)
    thresholds = np.empty(len(products), np.float32)
    one, zero = np.float32(1), np.float32(0)  # counted in the type of the products, for full vectors
    for r in range(len(products)):
        row = products[r]
        straight = square = count = zero
        for i in range(row.size):
            count += one if row[i] >= least_active else zero
            pulled = pull[i] if row[i] >= least_active else zero
            straight += pulled
            square += pulled * pulled
        active[r] = np.int64(count)
        if count > zero:
            least, count = lowered_shift - min(cross * straight, np.sqrt(square)), zero
            for i in range(row.size):
                count += one if row[i] >= least else zero
            thresholds[r], tracked[r] = least, np.int64(count)
    return active, thresholds, tracked


@njit(cache=True, nogil=True)
def _sort_descending(products, points, first, end):
    """Sorts pairs by product, and equal ones by point.

    By Shell's method, which for the short rows that most are is insertion.
    """
    for gap in GAPS:
        for z in range(first + gap, end):
            product, point, e = products[z], points[z], z
            while e >= first + gap and (
                products[e - gap] < product or (products[e - gap] == product and points[e - gap] > point)
            ):
                products[e], points[e] = products[e - gap], points[e - gap]
                e -= gap
            products[e], points[e] = product, point


@njit(cache=True, nogil=True, fastmath=FAST)
def _live_rows(rows, room, orders, products, vectors, X, shift, thresholds, rounding):
    """Rows of tracked pairs, of the vectors that fire: (vectors, sizes, margins, points, float64 products).

    Candidates come from float32 products, which are wrong by `rounding` at most, and are taken in an order of the points:
    that of the row, or the only one there is.
    """
    n, d = X.shape
    sizes, live, margins = np.empty(rows.size, np.int32), np.empty(rows.size, np.int64), np.empty(rows.size, np.float32)
    points, exact = np.empty(room, np.uint32), np.empty(room)
    w = np.empty(d)
    found = free = 0
    for place in range(rows.size):
        r, order = rows[place], orders[min(place, len(orders) - 1)]
        for z in range(d):  # not w[:] = ..., whose error messages take longer to compile than the rest
            w[z] = vectors[r, z]
        end = free
        for j in order:
            if products[r, j] >= thresholds[r]:
                points[end], exact[end] = j, _dot(w, X[j])
                end += 1
        _sort_descending(exact, points, free, end)
        if exact[free] >= shift:
            live[found], sizes[found] = r, end - free
            margin = max(0.0, shift - rounding - np.float64(thresholds[r]))
            margins[found] = np.inf if end - free == n else _rounded_down(margin)
            found, free = found + 1, end
    return live[:found], sizes[:found], margins[:found], points[:free], exact[:free]


@njit(cache=True, nogil=True)
def _run_out(certificates, rung, edges, distance, horizon, soon, due, due_ends):
    """Of the neurons edges[0], ..., edges[-1] - 1 of a rung, into `soon` go those whose bounds are at most `horizon`, packed
    from edges[0] on; returns their end. Into `due` go, chunk by chunk up to due_ends, those whose certificates ran out.
    """
    found = edges[0]
    for chunk in range(edges.size - 1):
        first, last = found, edges[chunk]
        for z in range(edges[chunk], edges[chunk + 1]):  # always written, kept if it counts: no branch to mispredict
            soon[found] = rung.neurons[z]
            found += rung.bounds[z] <= horizon
        for z in range(first, found):
            due[last] = soon[z]
            last += certificates[soon[z]] <= distance
        due_ends[chunk] = last
    return found


@njit(cache=True, nogil=True)
def _still_soon(certificates, neurons, horizon, soon, bounds):
    """Writes those of the neurons whose certificates are at most `horizon`, and these certificates; returns both. `soon` may
    be `neurons`."""
    found = 0
    for q in neurons:
        soon[found], bounds[found] = q, certificates[q]
        found += bounds[found] <= horizon
    return soon[:found], bounds[:found]


@njit(cache=True, nogil=True)
def _count_flips(counts, flips, stayed, note_ends, notes):
    """Updates the numbers |Q_i & Q_j| of neurons that two points share by a batch of flips.

    Note z is of one neuron: flips note_ends[0, z], ..., note_ends[0, z + 1] - 1 and, of stayed, what is between those of
    note_ends[1], the points on which it was active and still is. flips are rows (point, +1 or -1, note). A change is counted
    once, at [i, j] or [j, i], in the row of the point that flipped; flips of one point are taken together, so that its row
    is in cache: 70 instead of 550 ns a flip on digits, where a neuron is active on 150 of 1797 points.
    """
    firsts = np.zeros(len(counts) + 1, np.int64)
    order = np.empty(note_ends[0, notes], np.int32)
    for z in range(order.size):
        firsts[flips[z, 0] + 1] += 1
    for i in range(1, len(counts)):
        firsts[i + 1] += firsts[i]
    for z in range(order.size):
        j = flips[z, 0]
        order[firsts[j]] = z
        firsts[j] += 1
    for z in order:
        j, sign, note = flips[z]
        for s in range(note_ends[1, note], note_ends[1, note + 1]):
            counts[j, stayed[s]] += sign
        for u in range(note_ends[0, note], z + 1):
            counts[j, flips[u, 0]] += (sign + flips[u, 1]) >> 1  # two that flip in opposite directions share nothing


@intrinsic
def _population(typing_context, word):
    """How many bits of a uint64 are set."""
    return types.uint64(types.uint64), lambda context, builder, signature, arguments: builder.ctpop(arguments[0])


@intrinsic(prefer_literal=True)
def _prefetch(typing_context, array, index, lines):
    """Asks for so many `lines` of 64 bytes, a literal, to be in cache soon: those from array[index] on."""

    def generate(context, builder, signature, arguments):
        address = context.make_array(array)(context, builder, arguments[0]).data
        address = builder.bitcast(builder.gep(address, [arguments[1]]), cgutils.voidptr_t)
        options = [cgutils.int32_t(option) for option in (0, 3, 1)]  # to read, into every level, of the data cache
        kind = cgutils.ir.FunctionType(cgutils.ir.VoidType(), [cgutils.voidptr_t, *(option.type for option in options)])
        prefetch = cgutils.get_or_insert_function(builder.module, kind, "llvm.prefetch.p0")
        for line in range(lines.literal_value):
            builder.call(prefetch, [cgutils.pointer_add(builder, address, 64 * line), *options])
        return context.get_dummy_value()

    return types.void(array, types.intp, lines), generate


if numba.config.DISABLE_JIT:

    def _population(word):
        return int(word).bit_count()

    def _prefetch(array, index, lines):
        """Nothing to ask for."""


@njit(cache=True, fastmath=FAST)
def _combine(factors, rows, count, X, w):
    """w = sum over a < count of factors[a] X[rows[a]]; returns its length."""
    d = X.shape[1]
    w[:] = 0.0
    for a in range(0, count - 3, 4):  # four rows to each pass over w
        f0, f1, f2, f3 = factors[a], factors[a + 1], factors[a + 2], factors[a + 3]
        i0, i1, i2, i3 = rows[a], rows[a + 1], rows[a + 2], rows[a + 3]
        for z in range(d):
            w[z] += f0 * X[i0, z] + f1 * X[i1, z] + f2 * X[i2, z] + f3 * X[i3, z]
    for a in range(count - count % 4, count):
        factor, i = factors[a], rows[a]
        for z in range(d):
            w[z] += factor * X[i, z]
    square = 0.0
    for z in range(d):
        square += w[z] * w[z]
    return np.sqrt(square)


@njit(cache=True, fastmath=FAST)
def _products(X, w, points, first, count, factor, out):
    """out[e] = factor <X[points[first + e]], w> for e < count."""
    d = X.shape[1]
    for e in range(0, count - 3, 4):  # four sums that do not wait for each other: 360 instead of 640 ns for 46 rows, d = 64
        i0, i1, i2, i3 = points[first + e], points[first + e + 1], points[first + e + 2], points[first + e + 3]
        p0 = p1 = p2 = p3 = w.dtype.type(0)
        for z in range(d):
            p0 += w[z] * X[i0, z]
            p1 += w[z] * X[i1, z]
            p2 += w[z] * X[i2, z]
            p3 += w[z] * X[i3, z]
        out[e], out[e + 1], out[e + 2], out[e + 3] = factor * p0, factor * p1, factor * p2, factor * p3
    for e in range(count - count % 4, count):
        product, i = w.dtype.type(0), points[first + e]
        for z in range(d):
            product += w[z] * X[i, z]
        out[e] = factor * product


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _certificate(distance, slack, far_slack, k, inverse):
    """Up to which distance neither slack can be used up, with k active pairs and `inverse` 1 / the largest cross_i; rounded
    down, however large the distance so far. Of a single neuron, k = 1, both slacks are what D bounds."""
    return (distance + min(slack, far_slack if k == 1 else far_slack * inverse) / k) * (1.0 - 1e-15)


@njit(cache=True, fastmath=FAST, error_model="numpy")
def _ways(excess, tolerance, XXt, i, points, first, stop, beyond):
    """How far a single neuron can move along x_i, and how far against it, before a pair flips; or a little less.

    Of its first `stop` pairs excess[e] is how far the product is above b, known to the tolerance; none of the others flips
    before `beyond`, either way.
    """
    along = against = beyond
    for e in range(stop):
        product = XXt[i, points[first + e]]  # the way is inf if it is 0
        way = (abs(excess[e]) - tolerance) / abs(product)
        ahead = (excess[e] < 0.0) == (product > 0.0)  # asleep and rising, or active and falling
        along, against = min(along, way if ahead else np.inf), min(against, np.inf if ahead else way)
    return max(0.0, along) * LESS, max(0.0, against) * LESS


@njit(cache=True, nogil=True, fastmath=FAST)
def _begin(pairs, edges, data, outputs):
    """Finds the active pairs, limits and certificates of the neurons edges[chunk], ..., edges[chunk + 1] - 1, which have not
    moved, and their outputs f. Returns how many are active on some point, and the sum of |act(r)|^2."""
    rows, certificates, points, products, base, active, copies = pairs
    inverse = 1.0 / data.largest_cross
    excess = np.empty(len(data.X))
    woken = squares = 0
    for chunk in range(edges.size - 1):
        for q in range(edges[chunk], edges[chunk + 1]):
            row = rows[q]
            first, size, k = row.start, row.count, 0
            own = copies * first + row.twin * size
            while k < size and products[first + k] >= data.shift:
                outputs[chunk, points[first + k]] += data.unit * row.sign * (products[first + k] - data.shift)
                active[own + k], base[own + k] = True, 0.0  # zero already, but not yet in memory that is taken
                k += 1
            row.reach = k
            woken += k > 0
            squares += k * k
            if k == 1:
                for e in range(size):
                    excess[e] = products[first + e] - data.shift
                i = points[first]
                slack, far_slack = _ways(excess, 0.0, data.XXt, i, points, first, size, row.margin / data.cross[i])
            else:
                slack = (products[first + k - 1] - data.shift) * LESS if k > 0 else np.inf
                far_slack = (data.shift - products[first + k] if k < size else row.margin) * LESS
            certificates[q] = _certificate(0.0, slack, far_slack, k, inverse) if k > 0 else np.inf
            row.limit, row.far_limit = _rounded_down(slack), _rounded_down(far_slack)
    return woken, squares


@njit(cache=True, nogil=True)
def _count_shared(pairs, low, high, squares, counts):
    """Adds to the counts of |Q_i & Q_j| those of the neurons low, ..., high - 1, as _begin leaves them: active on all pairs
    within `reach`. `squares` is what it gave for them.

    Neuron by neuron, or in words of 64 neurons, a bit for each, if that is faster: on digits, where each is active on 290 of
    1797 points, 0.05 instead of 2.1 s on one thread.
    """
    rows, points = pairs.rows, pairs.points
    n, words = len(counts), (high - low + 63) // 64
    if WORD * n * n * words > squares:  # each for half of them
        for q in range(low, high):
            first = rows[q].start
            for e in range(first, first + rows[q].reach):
                for f in range(first, e + 1):
                    counts[points[e], points[f]] += 1
        return
    bits = np.zeros((n, words), np.uint64)
    for q in range(low, high):
        for e in range(rows[q].start, rows[q].start + rows[q].reach):
            bits[points[e], (q - low) // 64] |= np.uint64(1) << np.uint64((q - low) % 64)
    for i in range(n):
        for j in range(i + 1):
            shared = np.uint64(0)
            for z in range(words):
                shared += _population(bits[i, z] & bits[j, z])
            counts[i, j] += np.int32(shared)


@njit(cache=True, nogil=True, fastmath=FAST, error_model="numpy")
def _look(pairs, due, edges, due_ends, distance, sums, path, data, counts, outputs, tally, scratch, journal):
    """Checks the neurons due[edges[chunk]:due_ends[chunk]] of every chunk and, where a limit is reached, reads their rows:
    finds the flips, adds what they change to the `counts` of |Q_i & Q_j| and to the outputs f of the chunk. Sets new limits
    and certificates.

    Flips are written to the journal, unless its size is 0; returns how many were.
    """
    # Arrays are taken out of the tuple once, and rows are indexed, not sliced: references to arrays are counted by atomic
    # operations (145 instead of 43 ns a row, when threads waited for each other's).
    rows, certificates, points, products, base, active, copies = pairs
    X, X32, XXt, cross, largest_cross, shift, unit, gather = data
    n, d = X.shape
    moved_by, factors, w, direction, moves, excess, candidates, noted, stayed, note_ends = scratch
    inverse = 1.0 / largest_cross
    notes = entries = 0
    for chunk in range(edges.size - 1):
        looked_at = flips = woken = shorts = operations = c = end = stop = last_reach = 0
        through_X, length, looked_into = False, np.inf, -1
        for place in range(edges[chunk], due_ends[chunk]):
            q = due[place]
            # Rows are asked for early enough to name, four places on, what else to ask for: a step like the second, at
            # m = 2^22, takes 6.3 ms with this and 8.1 without, and as long with 16 and 8 places. To ask for more of
            # long rows than their first lines takes 0.94 of the time at n = 1024, m = 2^18. Written out here and in
            # _add_outputs: a function that is given the arrays takes 1.07 to 1.11 times as long at n = 64.
            if place + 8 < due_ends[chunk]:
                _prefetch(rows, due[place + 8], 1)
                soon = rows[due[place + 4]]
                own = copies * soon.start + soon.twin * soon.count
                _prefetch(points, soon.start, 1)
                _prefetch(products, soon.start, 1)
                _prefetch(base, own, 1)
                _prefetch(active, own, 1)
                if soon.count > 8:
                    _prefetch(points, soon.start + 16, 3)
                    _prefetch(products, soon.start + 8, 7)
                    _prefetch(base, own + 8, 1)
            row = rows[q]
            first, size, reach, scale = row.start & NOT_NEGATIVE, row.count, row.reach, -unit * row.sign
            own = (copies * first + row.twin * size) & NOT_NEGATIVE
            # Whether its twin has just been looked at, and has moved by the opposite.
            mirrored, last_c, last_end = first == looked_into and reach == last_reach, c, end
            k, c, bound, gone, gone_far, along = 0, 0, 0.0, 0.0, 0.0, 0.0
            for e in range(reach):  # always written, kept if it counts: no branch to mispredict
                j = points[first + e]
                total = sums[j] if active[own + e] else 0.0
                gamma = base[own + e] + total
                factor, passed = scale * gamma, path[j] if active[own + e] else 0.0
                mirrored &= (moved_by[c] == j) & (factors[c] == -factor)
                moved_by[c], factors[c] = j, factor
                bound += abs(factor) * cross[j]
                c += gamma != 0.0
                k += active[own + e]
                gone += passed
                gone_far += passed * cross[j]
                along += scale * total
            if k == 1:
                gone, gone_far = along, -along
            slack, far_slack = row.limit - gone, row.far_limit - gone_far
            if slack > 0.0 and far_slack > 0.0:
                certificates[q] = _certificate(distance, slack, far_slack, k, inverse)
                looked_into = -1
                continue
            looked_at += 1
            reads_on = far_slack <= 0.0 or k == 1
            end = size if reads_on else reach
            if mirrored and c == last_c and end == last_end:
                for z in range(d):
                    w[z] = -w[z]
                for e in range(stop):
                    moves[e] = -moves[e]
                bound = min(bound, length)
            else:
                through_X, length = gather * c * end > (c + end) * d, np.inf
                if through_X:
                    length = (1.0 + 2e-6) * _combine(factors, moved_by, c, X, w)
                    for z in range(d):
                        direction[z] = w[z] / max(length, 1e-300)
                bound, stop, high = min(bound, length), reach, end
                while stop < high:  # bisection
                    middle = (stop + high) // 2
                    if products[first + middle] >= shift - AHEAD * bound:
                        stop = middle + 1
                    else:
                        high = middle
                if through_X:
                    _products(X32, direction, points, first, stop, length, moves)
                    operations += (c + stop) * d
                else:
                    for e in range(stop):
                        move, j = 0.0, points[first + e]
                        for a in range(c):
                            move += factors[a] * XXt[j, moved_by[a]]
                        moves[e] = move
                    operations += c * stop
            looked_into, last_reach = first, reach
            operations += stop
            tolerance = (d + 4) * 2.0**-24 * length if through_X else 0.0
            for e in range(stop):
                excess[e] = products[first + e] - shift + moves[e]
            far_excess, found = -np.inf, reach
            for e in range(reach, stop):
                far_excess = max(far_excess, excess[e])
            if reads_on:
                # None of the products from `stop` on has moved by more than `bound`; negative if one that is not tracked may
                # be active.
                far_slack = (shift - products[first + stop] if stop < size else row.margin) - bound
            is_short = far_slack < 0.0
            if far_excess >= -tolerance:  # awake, or within rounding of it
                far_excess = -np.inf
                for e in range(reach, stop):
                    clear = excess[e] < -tolerance
                    far_excess = max(far_excess, excess[e] if clear else -np.inf)
                    candidates[found] = e
                    found += not clear
            slack, gone, gone_far, still, turned, kept = np.inf, 0.0, 0.0, 0, note_ends[0, notes], note_ends[1, notes]
            i = np.uint32(0)  # a point it is active on, the only one if it is single
            for s in range(found):
                e = s if s < reach else candidates[s]
                j, above, was_active = points[first + e], excess[e], active[own + e]
                if through_X and ((above >= 0.0) != was_active or not abs(above) > tolerance):  # decided in float64
                    above = products[first + e] - shift
                    for z in range(d):
                        above += w[z] * X[j, z]
                    excess[e] = above  # for _ways
                is_active = above >= 0.0
                if is_active != was_active:  # the outputs are f - G g, as if the pair had not flipped
                    outputs[chunk, j] -= scale * abs(above)
                    if journal.size:
                        flip = journal[entries]
                        flip.neuron, flip.point, flip.earlier = q, j, base[own + e]
                        entries += 1
                    base[own + e] += sums[j] if was_active else -sums[j]
                    active[own + e] = is_active
                    noted[turned, 0], noted[turned, 1], noted[turned, 2] = j, 1 if is_active else -1, notes
                    turned += 1
                    row.reach = max(row.reach, e + 1)
                    row.flipped = 1
                stayed[kept] = j
                kept += is_active and was_active
                still += is_active
                i = j if is_active else i
                gone += path[j] if is_active else 0.0
                gone_far += path[j] * cross[j] if is_active else 0.0
                slack = min(slack, above - tolerance if is_active else -(above + tolerance) * inverse)
                far_excess = max(far_excess, above if e >= reach and not is_active else -np.inf)
            new, stays = turned - note_ends[0, notes], kept - note_ends[1, notes]
            if new > 0:
                woken += int(still > 0) - int(k > 0)
                flips += new
                operations += new * stays
                if new == 1 and stays == 0:  # no other point shares the neuron: counted here, and not noted
                    j, sign, _ = noted[turned - 1]
                    counts[j, j] += sign
                else:
                    notes += 1
                    note_ends[0, notes], note_ends[1, notes] = turned, kept
                    if turned >= NOTED * n or kept >= STAYED * n:
                        _count_flips(counts, noted, stayed, note_ends, notes)
                        notes = 0
            if is_short:
                certificates[q] = row.limit = row.far_limit = -np.inf
                row.margin = max(row.margin, bound)  # what was needed, for _widen to make wider
                shorts += 1
            elif still > 0:
                if still == 1:
                    gone, gone_far = scale * sums[i], -scale * sums[i]
                    slack, far_slack = _ways(excess, tolerance, XXt, i, points, first, stop, far_slack / cross[i])
                else:
                    slack = max(0.0, slack) * LESS
                    far_slack = max(0.0, min(far_slack, -far_excess - tolerance)) * LESS
                certificates[q] = _certificate(distance, slack, far_slack, still, inverse)
                row.limit, row.far_limit = _rounded_down(gone + slack), _rounded_down(gone_far + far_slack)
            else:
                certificates[q] = np.inf
        tally[chunk, LOOKED_AT] += looked_at
        tally[chunk, FLIPS] += flips
        tally[chunk, WOKEN] += woken
        tally[chunk, SHORT] += shorts
        tally[chunk, OPERATIONS] += operations
    _count_flips(counts, noted, stayed, note_ends, notes)
    return entries


@njit(cache=True)
def _take_back(pairs, journal):
    """Undoes the flips of a journal, the last one first, and voids the certificates of their neurons."""
    rows, certificates, points, _, base, active, copies = pairs
    for z in range(journal.size - 1, -1, -1):
        flip = journal[z]
        row = rows[flip.neuron]
        own, e = copies * row.start + row.twin * row.count, 0
        while points[row.start + e] != flip.point:
            e += 1
        active[own + e], base[own + e] = not active[own + e], flip.earlier
        certificates[flip.neuron] = row.limit = row.far_limit = -np.inf


@njit(cache=True, nogil=True)
def _widen_rows(pairs, short, tracked, weights, X, margins, starts, low, high):
    """Makes the rows of the neurons short[low:high] anew, from `starts` on, with wider margins, of the points `tracked`
    (len(short), n). Starting products are those of _live_rows to the bit."""
    rows, _, points, products, base, active, copies = pairs
    n = len(X)
    old_base, old_active = np.zeros(n), np.zeros(n, np.bool_)
    for z in range(low, high):
        row = rows[short[z]]
        own = copies * row.start + row.twin * row.count
        for e in range(row.reach):
            j = points[row.start + e]
            old_base[j], old_active[j] = base[own + e], active[own + e]
        row.start, row.margin = starts[z], margins[z]
        end = row.start
        for j in range(n):
            if tracked[z, j]:
                points[end], products[end] = j, _dot(weights[z], X[j])
                end += 1
        _sort_descending(products, points, row.start, end)
        row.count = end - row.start
        own = copies * row.start + row.twin * row.count
        for e in range(row.count):
            j = points[row.start + e]
            base[own + e], active[own + e] = old_base[j], old_active[j]
            if old_active[j] or old_base[j] != 0.0:  # further on if a point that float32 products had missed comes before
                row.reach = max(row.reach, e + 1)
            old_base[j], old_active[j] = 0.0, False
        if row.count == n:
            row.margin = np.inf


@njit(cache=True, nogil=True, fastmath=FAST)
def _add_outputs(pairs, edges, data, outputs):
    """Adds to outputs[chunk] what the neurons edges[chunk], ..., edges[chunk + 1] - 1 add to f with `base` for gamma, less
    what they added at the start: nothing where no pair has flipped.

    f is what it was at the start, and this, and -G sum for the rest of gamma, the sum of g over all steps of active pairs.
    """
    rows, _, points, products, base, active, copies = pairs
    X, _, XXt, _, _, shift, unit, gather = data
    n, d = X.shape
    moved_by, factors, w = np.empty(n + 1, np.uint32), np.empty(n + 1), np.empty(d)
    firing, excess, moves = np.empty(n + 1, np.uint32), np.empty(n + 1), np.empty(n)
    for chunk in range(edges.size - 1):
        for q in range(edges[chunk], edges[chunk + 1]):
            row = rows[q]
            if not row.flipped:
                continue
            # 24 instead of 34 ms at n = 1024, m = 2^18. Where rows are short, what is read next is near, and in cache.
            if row.count > 8 and q + 4 < edges[chunk + 1]:
                soon = rows[q + 4]
                own = copies * soon.start + soon.twin * soon.count
                _prefetch(points, soon.start, 1)
                _prefetch(products, soon.start, 2)
                _prefetch(base, own, 2)
                _prefetch(active, own, 1)
            first, own = row.start & NOT_NEGATIVE, (copies * row.start + row.twin * row.count) & NOT_NEGATIVE
            k, c, scale = 0, 0, -unit * row.sign
            for e in range(row.reach):
                moved_by[c], factors[c] = points[first + e], scale * base[own + e]
                c += base[own + e] != 0.0
                above = products[first + e] - shift
                firing[k], excess[k] = points[first + e], above
                k += active[own + e]
                outputs[chunk, points[first + e]] += scale * max(above, 0.0)  # less what it added at the start
            if gather * c * k > (c + k) * d:
                _combine(factors, moved_by, c, X, w)
                _products(X, w, firing, 0, k, 1.0, moves)
                for h in range(k):
                    excess[h] += moves[h]
            else:
                for h in range(k):
                    for a in range(c):
                        excess[h] += factors[a] * XXt[firing[h], moved_by[a]]
            for h in range(k):
                outputs[chunk, firing[h]] -= scale * excess[h]


@njit(cache=True, nogil=True, fastmath=FAST)
def _moves(pairs, neurons, sums, X, unit):
    """dw of some neurons (len(neurons), d)."""
    rows, _, points, _, base, active, copies = pairs
    dW = np.zeros((neurons.size, X.shape[1]))
    for z in range(neurons.size):
        row = rows[neurons[z]]
        own = copies * row.start + row.twin * row.count
        for e in range(row.reach):
            j = points[row.start + e]
            gamma = base[own + e] + (sums[j] if active[own + e] else 0.0)
            if gamma != 0.0:
                for c in range(X.shape[1]):
                    dW[z, c] += row.sign * -unit * gamma * X[j, c]
    return dW


@njit(cache=True)
def _active_pairs(pairs, order):
    """Active pairs of the neurons `order`, each named by where it stands there: (indptr, points), not sorted by point."""
    indptr = np.zeros(order.size + 1, np.int64)
    points = np.empty(pairs.rows["reach"].sum() + 1, np.int64)
    free = 0
    for z in range(order.size):
        row = pairs.rows[order[z]]
        own = pairs.copies * row.start + row.twin * row.count
        for e in range(row.reach):
            points[free] = pairs.points[row.start + e]
            free += pairs.active[own + e]
        indptr[z + 1] = free
    return indptr, points[:free].copy()


class _CountedJacobian(SparseJacobian):
    """The Jacobian of live pairs as they are now, until the next step: its Gram matrix is known, and the active sets are
    only gathered if asked for."""

    def __init__(self, search):
        LinearOperator.__init__(self, np.dtype(float), (len(search.X), search.width * search.X.shape[1]))
        self.X, self.width, self._XXt, self._search = search.X, search.width, search.XXt, search

    @cached_property
    def active(self):
        return self._search.gathered()

    @cached_property
    def _signs(self):
        return self._search.signs[self.active.neurons]

    def active_counts(self):
        return np.einsum("tii->i", self._search.counts)

    def gram_times(self, v):
        return self._search.gram @ v

    def gram(self):
        return self._search.gram


# ======================================================================================================================
# Searches: where the active pairs are found, and the weights moved
# ======================================================================================================================


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


WIDEST = 1 << 40  # drawing so many takes days
NARROWER = 'use fewer neurons or points, or dtype="float32"'


class _Network:
    """The weights of a network: those of live neurons, and how the others are drawn.

    Attributes: live, the live neurons' own numbers, block by block; signs of them, in the same order; draw, which makes the
    starting weights as _starting_blocks does. Weights come from _trained(), which gives those of the live neurons that it
    is then called with, an array of places in `live`.
    """

    def __init__(self, X, shift, width, init, draw, live, signs, weights):
        self.X, self.shift, self.width, self.init, self.draw = X, shift, width, init, draw
        self.live, self.signs, self._weights = live, signs, weights
        self.n_live = live.size

    def _trained(self):
        return lambda rows: self._weights[rows]

    def active_sets(self):
        """The active sets with the neurons' own numbers."""
        order = np.argsort(self.live)
        firing = np.flatnonzero(self._weights[order] @ self.X.T >= self.shift)
        neurons, points = np.divmod(firing, len(self.X))
        return _grouped(self.live[order[neurons]], points)

    def check(self):
        """The weights are all there is."""

    def trained_blocks(self):
        """Yields (weights, signs) of the trained network; antisymmetric dead neurons cancel on every input, and are left
        out."""
        trained = self._trained()
        if self.init == "antisymmetric" or self.live.size == self.width:
            for first in range(0, self.live.size, BLOCK):
                rows = np.arange(first, min(first + BLOCK, self.live.size))
                yield trained(rows), self.signs[rows]
            return
        rows_of = self._rows_by_block()

        def train(first, W, signs):
            W, rows = W.astype(float), rows_of(first)
            W[self.live[rows] - first] = trained(rows)
            return W, signs

        yield from self.draw(train)

    def fill(self, out):
        """Writes the weights of all neurons (m, d)."""
        trained, rows_of = self._trained(), self._rows_by_block()
        if self.live.size == self.width:
            out[self.live] = trained(np.arange(self.width))
            return

        def train(first, W, _):
            out[first : first + len(W)] = W
            out[self.live[rows_of(first)]] = trained(rows_of(first))

        for _ in self.draw(_for_each_neuron(train)):
            pass

    def all_signs(self):
        """Signs of all neurons (m,)."""
        if self.live.size == self.width:
            return self.signs[np.argsort(self.live)].astype(np.int8)
        return np.concatenate(list(self.draw(lambda first, W, signs: signs)))

    def _rows_by_block(self):
        """A function that gives the places of a block's live neurons, called with its first neuron."""
        order = np.argsort(self.live // BLOCK, kind="stable")
        edges = np.searchsorted(self.live[order] // BLOCK, np.arange(-(-self.width // BLOCK) + 1))
        return lambda first: order[edges[first // BLOCK] : edges[first // BLOCK + 1]]


class _Search(_Network):
    """What the searches share: the network at the training points, and one step of it.

    Attributes: outputs f (n,); nnz, the number of active pairs; changing, the number |K| of neurons that the next step
    moves. `operations` counts multiply-adds, comparisons and moves of products, `looked_at` the neurons whose products the
    last step read.

    A search names neurons by rows of its own. "dense", "scan" and "tree" offer _find(), the active sets and the products
    of the active pairs; _held, the array whose rows _move(step) changes; _note_flips(...), told what a step did.
    """

    def __init__(self, X, XXt, y, shift, width, init, draw, dtype, moved, report):
        """`moved` neurons (numbers, weights) have weights that are not those drawn; `report` is told the share of neurons
        that is drawn."""
        self.X, self.XXt, self.shift, self.width, self.init, self.draw = X, XXt, shift, width, init, draw
        self.dtype = np.dtype(dtype)
        self.cast_X = X.astype(self.dtype)
        self.operations = self.looked_at = 0
        self.least_active = _least_at_or_above(shift, self.dtype)
        self._allocate()
        self._start(y, lambda work: self._reported(draw(work), report), *moved)

    def _reported(self, blocks, report):
        for k, block in enumerate(blocks):
            yield block
            report(min(1.0, (k + 1) * BLOCK / self.width))

    def take_counts(self):
        """Operations and neurons looked at since the last call."""
        taken = self.operations, self.looked_at
        self.operations = self.looked_at = 0
        return taken

    def find(self):
        """Finds the active sets and the outputs anew."""
        active, values = self._find()
        self._adopt(active)
        sums = _run(_outputs, 4 * values.size, self.active, self._active_signs, values, self.shift, len(self.X))
        self.outputs = sums.sum(axis=0) / np.sqrt(self.width)

    def _adopt(self, active):
        self.active = active
        self.nnz, self.changing = active.points.size, active.neurons.size
        self._active_signs = self.signs[active.neurons]

    def jacobian(self):
        return SparseJacobian._of(self.X, self.XXt, self._active_signs, self.width, self.active)

    def advance(self, step, lap):
        """W <- W - J^T step, and all that follows from it; returns the number of flips."""
        before = self.active
        self._move(step)
        lap("seconds_update")
        self.find()
        neurons, points, signs = _flips(before, self.active)
        self._note_flips(neurons, points, signs)
        lap("seconds_query")
        return neurons.size

    def remember(self):
        """Keeps what undo() needs after the next advance()."""
        self._before = self.active, self.outputs, self._held[self.active.neurons]

    def undo(self):
        """Takes the last step back, to the same bits."""
        active, self.outputs, rows = self._before
        self._adopt(active)
        self._held[active.neurons] = rows

    def settle(self):
        """Makes sure that `outputs` come from a forward pass."""

    def _note_flips(self, neurons, points, signs):
        """Told which pairs woke (+1) or fell asleep (-1) by the last step."""


class _Dense(_Search):
    """X W^T anew in every step, by BLAS: O(m n d) [BPSW21, CGH+19]. Holds W."""

    def _allocate(self):
        _check_memory(
            f'search="dense" with {self.width} neurons', self.width * self.X.shape[1] * self.dtype.itemsize, NARROWER
        )
        self.W = self._held = np.empty((self.width, self.X.shape[1]), self.dtype)
        self.signs, self.live = np.empty(self.width), np.arange(self.width)

    def _start(self, y, draw, moved, weights, _):
        def keep(first, W, signs):
            self.W[first : first + len(W)] = W
            self.signs[first : first + len(W)] = signs

        for _ in draw(_for_each_neuron(keep)):
            pass
        self.W[moved] = weights
        self.find()
        self.n_live = self.changing

    def _find(self):
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
        self.looked_at += self.width
        return _grouped(*np.divmod(pairs, len(self.X))), values

    def _move(self, step):
        active = self.active
        data = np.repeat(self._active_signs, np.diff(active.offsets)) * step[active.points] / np.sqrt(self.width)
        shape = (active.neurons.size, len(self.X))
        coefficients = scipy.sparse.csr_matrix((data.astype(self.dtype), active.points, active.offsets), shape=shape)
        self.W[active.neurons] -= coefficients @ self.cast_X
        self.operations += active.points.size * self.X.shape[1]

    def active_sets(self):
        return self.active

    def trained_blocks(self):
        for first in range(0, self.width, BLOCK):
            yield self.W[first : first + BLOCK].astype(float), self.signs[first : first + BLOCK]

    def _trained(self):
        return lambda rows: self.W[rows].astype(float)

    def fill(self, out):
        out[:] = self.W


class _Scan(_Search):
    """All products, kept and moved, then compared with b: O(n m) and the moves. The strong baseline.

    Rows of products are laid out live neurons first, in ascending order, then the dead ones. A step then moves, mends
    and reports in one stretch of memory: on two cores, n = 64, d = 32 and m = 2^20, "tree" takes about half the time it
    takes with neurons in their own order.

    The weights are not touched in training. They follow from gamma[r, i], the sum of step[i] over the steps in which
    neuron r was active on point i:  w_r = w_r(0) - m^(-1/2) a_r sum_i gamma[r, i] x_i. Since gamma grows with the
    running sum of the steps while the pair is active, only pairs that flip are written down, with that sum.
    """

    height = 1  # levels of the trees: a scan is a search in trees of leaves alone

    def _allocate(self):
        n = len(self.X)
        self._levels = _levels(self.width)[: self.height + 1]
        _check_memory(
            f"products of {n} points and {self.width} neurons", n * int(self._levels[-1]) * self.dtype.itemsize, NARROWER
        )
        self._rows = self._held = np.empty((self._levels[-1], n), self.dtype)
        self._rows[self.width :] = -np.inf
        self._XXt = self.XXt.astype(self.dtype)
        self._sum = np.zeros(n)
        self._flips = []

    def _start(self, y, draw, moved, weights, _):
        def products_of(first, W, signs):
            low, high = np.searchsorted(moved, (first, first + len(W)))
            if high > low:
                W = W.astype(float)
                W[moved[low:high] - first] = weights[low:high]
            products = W.astype(self.dtype, copy=False) @ self.cast_X.T
            fires = (products >= self.least_active).any(axis=1)
            fires[moved[low:high] - first] = True
            live = np.flatnonzero(fires)
            return first + live, W[live], signs[live], products[live], products[~fires]

        found = []
        front, back = 0, self.width
        for *live, live_products, dead_products in draw(_for_each_neuron(products_of)):
            self._rows[front : front + len(live_products)] = live_products
            self._rows[back - len(dead_products) : back] = dead_products
            front, back = front + len(live_products), back - len(dead_products)
            found.append(live)
        self.live, self._weights, self.signs = map(np.concatenate, zip(*found, strict=True))
        self.n_live, self.signs = self.live.size, self.signs.astype(float)
        _mend_ancestors(self._rows, self._levels, np.arange(self.width))
        self.find()

    def _find(self):
        active, values, touched, compared = _query(self._rows, self._levels, 0, len(self.X), self.shift)
        self.operations += touched
        self.looked_at += min(compared, self.width)  # padding aside
        return active, values

    def _move(self, step):
        scale = (self._active_signs / -np.sqrt(self.width)).astype(self.dtype)
        groups, starts = _parents(self.active.neurons)
        first_parent = self._levels[1] if len(self._levels) > 2 else 0
        work = _move_cost(self.active.offsets, *self.X.shape)
        vectors = scale, step.astype(self.dtype), self._XXt, self.cast_X
        _run(_move_leaves, work, self._rows, self.active, *vectors, groups, starts, first_parent)
        self.operations += work
        if first_parent:
            self.operations += groups.size * (FAN_OUT + 1) * len(self.X)
            self.operations += _mend_ancestors(self._rows, self._levels, groups, level=1)
        self._sum += step

    def remember(self):
        super().remember()
        self._ledger_before = self._sum.copy(), len(self._flips)

    def undo(self):
        super().undo()
        self._sum, flips = self._ledger_before
        del self._flips[flips:]
        _mend_ancestors(self._rows, self._levels, self.active.neurons)

    def _note_flips(self, neurons, points, signs):
        if neurons.size:
            self._flips.append((neurons, points, -signs * self._sum[points]))

    def _trained(self):
        rows = np.repeat(self.active.neurons, np.diff(self.active.offsets))
        entries = [(rows, self.active.points, self._sum[self.active.points]), *self._flips]
        rows, points, gamma = map(np.concatenate, zip(*entries, strict=True))
        gamma = scipy.sparse.csr_matrix((gamma, (rows, points)), shape=(self.live.size, len(self.X)))
        scale = (self.signs / np.sqrt(self.width))[:, None]
        return lambda rows: self._weights[rows] - scale[rows] * (gamma[rows] @ self.X)

    def active_sets(self):
        return self.active._replace(neurons=self.live[self.active.neurons])

    def check(self):
        """Asserts that inner nodes are maxima of their children."""
        for first, end, parents in zip(self._levels[:-2], self._levels[1:-1], self._levels[1:-1], strict=True):
            maxima = self._rows[first:end].reshape(-1, FAN_OUT, len(self.X)).max(axis=1)
            assert np.array_equal(self._rows[parents : parents + len(maxima)], maxima), "an inner node is not the maximum"


class _Tree(_Scan):
    """Search trees over the products: O(n |K| (min(k, d) + log m)) [DHSWZ]."""

    height = 64  # all the levels there are


class _Lazy(_Search):
    """Live pairs with certificates: a step looks at neurons that may have crossed the threshold, and at no others.

    Certificates are looked up through `ladder`, a stack of lists of neurons, each inside the one before it. A list holds
    every neuron whose certificate ends at its `horizon` or before, so a step looks at the innermost list that reaches as
    far as the step goes. Steps shrink, and so do the lists: a step leaves lists for a next one as long as itself and for one
    16 times shorter, where they at least halve.

    The outputs follow from the Gram matrix, f <- f - G g, and from the flips; before training ends they are computed anew,
    from those at the start and the neurons that have flipped.
    """

    def _allocate(self):
        n = len(self.X)
        expected = n * self.width * scipy.special.ndtr(-self.shift)  # active pairs at the start; more are tracked
        self._copies = 2 if self.init == "antisymmetric" else 1
        # For pairs, and for neurons beside their weights.
        needed = (12 / self._copies + 9) * expected + 88 * min(self.width, expected)
        _check_memory(f"live pairs of {n} points and {self.width} neurons", needed)
        cross = np.maximum(np.abs(self.XXt - np.diag(np.diag(self.XXt))).max(axis=1), 1e-12)
        self._data = PointData(
            X=self.X,
            X32=self.X.astype(np.float32),
            XXt=self.XXt,
            cross=cross,
            largest_cross=cross.max(),
            shift=self.shift,
            unit=1.0 / np.sqrt(self.width),
            # Whether X X^T stays in a second-level cache of 1 MB. At n = 1024, m = 2^18 a run takes 1.02 times as long with
            # 64, and 1.5 times with 6.
            gather=4.0 if n <= 362 else 16.0,
        )
        self._sum, self._path = np.zeros(n), np.zeros(n)
        self._distance = 0.0
        self.widened = 0  # rows made anew in training, for those who look inside
        self._journal = None  # flips of a step that is to be remembered, in pieces, while it is taken

    def _start(self, y, draw, moved, weights, moved_signs):
        n, d = self.X.shape
        # Training ends about where every active product has moved by |y_i| / (Phi(-b) sqrt(m)), and so dw_r is a sum of
        # vectors of about that length, one for each active point.
        output_per_move = max(scipy.special.ndtr(-self.shift), 1e-30) * np.sqrt(self.width)
        pull = np.minimum(MARGIN * np.abs(y) / output_per_move, np.finfo(np.float32).max).astype(np.float32)
        found = [arrays for block in draw(self._rows_of(pull, moved)) for arrays in block]
        self._lay_out(found, moved, weights, moved_signs)
        if moved.size:
            # A typical margin, once _widen has made it wider.
            self._pairs.rows["margin"][self._n_drawn :] = np.sqrt(np.mean(pull.astype(float) ** 2)) / WIDER
        self._widen(np.arange(self._n_drawn, self.n_live, dtype=np.uint32))
        self._ladder = [Rung(np.inf, np.arange(self.n_live, dtype=np.uint32), self._pairs.certificates)]
        # One for each thread, to be added up; more than one only if they take no more than 256 MB.
        self.counts = np.zeros((max(1, min(numba.get_num_threads(), (1 << 26) // n**2)), n, n), np.int32)
        # For the lists that a pass makes; written here, as the first use of new memory costs 0.7 ns a byte.
        self._soon, self._bounds = np.full((2, self.n_live), 0, np.uint32), np.full((2, self.n_live), 0.0)
        self._due = np.full(self.n_live, 0, np.uint32)
        self._scratch = [Scratch.of(n, d) for _ in self.counts]
        edges, outputs = _chunk_edges(self.n_live), np.zeros((CHUNKS, n))

        def begin(thread, low, high):
            woken, squares = _begin(self._pairs, edges[low : high + 1], self._data, outputs[low:high])
            _count_shared(self._pairs, edges[low], edges[high], squares, self.counts[thread])
            return woken

        self.changing = sum(_over_chunks(begin, 4 * self._used, len(self.counts)))
        self._starting_outputs = outputs.sum(axis=0)
        self.outputs = self._starting_outputs.copy()
        self.looked_at += self.n_live
        self.operations += self._copies * self._used

    def _rows_of(self, pull, moved):
        """A function that gives the live neurons of a block that have not moved, and their rows. Margins follow from how far
        each point is expected to `pull` the weights of neurons active on it."""
        n, d = self.X.shape
        copies = self._copies
        # No float32 product is further from the float64 one than this; a normal number is below 8.3 (NumPy's ziggurat).
        rounding = (d + 4) * np.finfo(np.float32).eps * 8.3 * np.sqrt(d)
        largest = np.finfo(np.float32).max
        least_active, lowered_shift = np.float32(np.clip(self.shift - np.array([1, 2]) * rounding, -largest, largest))
        cross = np.float32(self._data.largest_cross)
        piece = max(64, (1 << 19) // n)  # vectors whose products are made together, 2 MB of them

        def rows_of(first, vectors, signs):
            found = []
            for low in range(0, len(vectors), piece):
                some = vectors[low : low + piece]
                products = some @ self._data.X32.T
                active, thresholds, tracked = _thresholds(products, least_active, pull, cross, lowered_shift)
                numbers = first + copies * (low + np.arange(len(some)))
                if moved.size:  # of twins both have moved, or neither
                    active[np.isin(numbers, moved)] = 0
                rows = np.flatnonzero(active)
                # Rows of equal length together: loops of an expected length are faster by a third.
                rows = rows[np.lexsort((active[rows], tracked[rows]))]
                room = int(tracked[rows].sum())
                # Rows of many points are sorted faster if they nearly are already: digits take 0.6 instead of 0.8 s.
                orders = np.argsort(-products[rows]) if 4 * room > n * rows.size else np.arange(n)[None]
                made = products, some, self.X, self.shift, thresholds, rounding
                live, *arrays = _live_rows(rows, room, orders, *made)
                numbers = (numbers[live][:, None] + np.arange(copies)).ravel()
                found.append((some[live], numbers, signs[numbers - first], *arrays))
            return found

        return rows_of

    def _lay_out(self, found, moved, weights, moved_signs):
        """The rows found in one stretch of memory, then room for those of neurons whose weights are given."""
        copies = self._copies
        vectors, live, signs, sizes, margins, points, products = zip(*found, strict=True)
        self._vectors = np.concatenate([*vectors, weights])  # in float32, as long as none has moved
        self.live, self.signs = np.concatenate([*live, moved]), np.concatenate([*signs, moved_signs]).astype(float)
        self.n_live = self.live.size
        sizes, self._used = np.concatenate(sizes), sum(map(len, points))
        self._n_drawn = copies * sizes.size
        rows = np.zeros(self.n_live, LIVE_ROW).view(RECORDS)
        rows["sign"] = self.signs
        drawn = rows[: self._n_drawn].reshape(-1, copies)
        drawn["start"], drawn["count"] = (np.cumsum(sizes, dtype=np.int64) - sizes)[:, None], sizes[:, None]
        drawn["margin"], drawn["twin"] = np.concatenate(margins)[:, None], np.arange(copies)
        room = self._used + self._used // 2  # memory that is not written is not taken
        self._pairs = LivePairs(
            rows=rows,
            certificates=np.empty(self.n_live),
            points=np.empty(room, np.uint32),
            products=np.empty(room),
            base=np.zeros(copies * room),
            active=np.zeros(copies * room, bool),
            copies=copies,
        )
        np.concatenate(points, out=self._pairs.points[: self._used])
        np.concatenate(products, out=self._pairs.products[: self._used])

    @property
    def nnz(self):
        return int(np.einsum("tii->", self.counts, dtype=np.int64))

    @cached_property
    def gram(self):
        """G (n, n)."""
        return _gram(self.XXt, self.counts, self.width)

    def jacobian(self):
        return _CountedJacobian(self)

    def advance(self, step, lap):
        with _serial_blas():
            self.outputs = self.outputs - self.gram @ step  # not in place: remember() holds the old ones
        self.operations += step.size**2
        del self.gram
        self._sum += step
        self._travel(step)
        lap("seconds_update")
        flips = self._pass()
        self._taken, self._journal = self._journal, None
        lap("seconds_query")
        return flips

    def _travel(self, step):
        """Lengthens the path of each point and the distance of all by those of a step."""
        moves = np.abs(step) / np.sqrt(self.width)
        self._path += moves
        self._last_move = moves.max()
        self._distance += self._last_move
        while self._ladder[-1].horizon < self._distance:
            self._ladder.pop()

    def remember(self):
        self._before = self.outputs, self.gram, self._sum.copy(), self.counts.copy(), self.changing
        self._journal = []

    def undo(self):
        # The way back is a path like any other: the certificates of neurons with no flip hold.
        _, _, sums, _, _ = self._before
        self._travel(self._sum - sums)
        for piece in reversed(self._taken):
            _take_back(self._pairs, piece)
        del self._ladder[1:]  # whose lists lack those that have lost their certificates
        self.outputs, self.gram, self._sum, self.counts, self.changing = self._before
        if self._pass():  # a pair within rounding of b has flipped
            del self.gram

    def _pass(self):
        """Checks the neurons whose certificates ran out, and looks at those that have reached a limit; returns the number of
        flips."""
        last = self._ladder[-1]
        # For a next step that is as long as the last one, and for one that is much shorter.
        horizons = [min(last.horizon, self._distance + share * self._last_move) for share in (1.0, 1.0 / 16.0)]
        lists, flips, shorts = self._look_among(last, horizons)
        if shorts:
            short = np.concatenate([neurons[bounds == -np.inf] for neurons, bounds in lists[0]])
        for horizon, parts in zip(horizons, lists, strict=True):
            if sum(len(neurons) for neurons, _ in parts) < self._ladder[-1].neurons.size // 2:
                self._ladder.append(Rung(horizon, *map(np.concatenate, zip(*parts, strict=True))))
        if shorts:
            self._widen(short)
            self.widened += short.size
            flips += self._look_among(Rung(np.inf, short, np.full(short.size, -np.inf)), [np.inf])[1]
        return flips

    def _look_among(self, rung, horizons):
        """Checks and looks at neurons of a rung.

        Returns for each of the descending horizons, in parts, the neurons whose certificates end there or before, and their
        certificates; then the number of flips, and that of neurons whose margins are too small.
        """
        size, n = rung.neurons.size, len(self.X)
        edges = _chunk_edges(size)
        outputs, tallies = np.zeros((CHUNKS, n)), np.zeros((CHUNKS, 5), np.int64)
        soon, due = self._soon[0], self._due
        # A pair flips once at most; memory that is not written is not taken.
        room = 0 if self._journal is None else self._copies * self._used

        def walk(thread, low, high):
            mine, ends = edges[low : high + 1], np.empty(high - low, np.int64)
            end = _run_out(self._pairs.certificates, rung, mine, self._distance, horizons[0], soon, due, ends)
            journal = np.empty(room, FLIP).view(RECORDS)
            state = self._distance, self._sum, self._path, self._data, self.counts[thread], outputs[low:high]
            entries = _look(self._pairs, due, mine, ends, *state, tallies[low:high], self._scratch[thread], journal)
            lists, part = [], slice(mine[0], end)
            neurons = soon[part]
            for horizon, places, bounds in zip(horizons, self._soon, self._bounds, strict=False):
                lists.append(_still_soon(self._pairs.certificates, neurons, horizon, places[part], bounds[part]))
                neurons, _ = lists[-1]
            return lists, journal[:entries].copy()

        work = 8 * size * self._used // max(1, self.n_live)
        lists, journals = zip(*_over_chunks(walk, work, len(self.counts)), strict=True)
        if self._journal is not None:
            self._journal += journals
        self.outputs += outputs.sum(axis=0)
        looked_at, flips, woken, shorts, operations = map(int, tallies.sum(axis=0))
        self.looked_at += looked_at
        self.operations += operations + size
        self.changing += woken
        return list(zip(*lists, strict=True)), flips, shorts

    def _widen(self, short):
        """Makes the rows anew whose margins are too small, with margins wider than is needed now."""
        batch = max(1, (1 << 20) // len(self.X))
        for low in range(0, short.size, batch):
            self._widen_batch(short[low : low + batch])

    def _widen_batch(self, short):
        rows, weights = self._pairs.rows[short], self._starting_weights(short)
        margins = (WIDER * rows["margin"]).astype(float)  # float32 numbers, as they are kept
        with _serial_blas():
            tracked = weights @ self.X.T >= (self.shift - margins)[:, None]
        ends = self._used + np.cumsum(np.count_nonzero(tracked, axis=1))
        starts, self._used = np.append(self._used, ends[:-1]), int(ends[-1])
        self._reserve(self._used)
        edges = _chunk_edges(short.size)

        def widen(_, low, high):
            _widen_rows(self._pairs, short, tracked, weights, self.X, margins, starts, edges[low], edges[high])

        _over_chunks(widen, tracked.size)
        self.operations += tracked.size * self.X.shape[1]

    def _reserve(self, room):
        """Makes room for so many pairs."""
        pairs = self._pairs
        if room > pairs.points.size:
            more = room + room // 2 - pairs.points.size

            def longer(array, copies=1):
                return np.concatenate([array, np.empty(copies * more, array.dtype)])

            self._pairs = pairs._replace(
                points=longer(pairs.points),
                products=longer(pairs.products),
                base=longer(pairs.base, pairs.copies),
                active=longer(pairs.active, pairs.copies),
            )

    def settle(self):
        edges = _chunk_edges(self.n_live)
        outputs = np.zeros((CHUNKS, len(self.X)))

        def add(_, low, high):
            _add_outputs(self._pairs, edges[low : high + 1], self._data, outputs[low:high])

        _over_chunks(add, 4 * self._used)
        with _serial_blas():
            self.outputs = self._starting_outputs + outputs.sum(axis=0) - self.gram @ self._sum

    def gathered(self, order=None):
        """The active sets, neurons by row or by where their rows stand in `order`."""
        order = np.arange(self.n_live) if order is None else order
        by_neuron = ActiveSets(np.arange(order.size), *_active_pairs(self._pairs, order))
        return _by_neuron(*_by_point(by_neuron, len(self.X)), order.size)

    def active_sets(self):
        order = np.argsort(self.live)
        active = self.gathered(order)
        return active._replace(neurons=self.live[order[active.neurons]])

    def _starting_weights(self, rows):
        drawn = np.minimum(rows, self._n_drawn)  # whose vectors are shared; each of the others has one of its own
        return self._vectors[drawn // self._copies + (rows - drawn)].astype(float)

    def _trained(self):
        def trained(rows):
            return self._starting_weights(rows) + _moves(self._pairs, rows, self._sum, self.X, self._data.unit)

        return trained

    def check(self):
        """Asserts every invariant of the live pairs against the weights and all products of live neurons."""
        pairs, n = self._pairs, len(self.X)
        rows = pairs.rows
        start = self._starting_weights(np.arange(self.n_live)) @ self.X.T
        moves = _moves(pairs, np.arange(self.n_live), self._sum, self.X, self._data.unit)
        products = start + moves @ self.X.T
        tolerance = 1e-9 * (1.0 + np.abs(products))
        neuron = np.repeat(np.arange(self.n_live), rows["count"])
        rank = np.arange(neuron.size) - np.repeat(np.cumsum(rows["count"]) - rows["count"], rows["count"])
        place = rank + rows["start"][neuron]
        own = rank + (pairs.copies * rows["start"] + rows["twin"] * rows["count"])[neuron]
        points = pairs.points[place]
        tracked, active, near = np.zeros((3, self.n_live, n), bool)
        tracked[neuron, points], active[neuron, points] = True, pairs.active[own]
        near[neuron, points] = rank < rows["reach"][neuron]
        assert tracked.sum() == neuron.size, "a point is tracked twice"
        excess = products - self.shift
        assert np.all((active == (excess >= 0)) | (np.abs(excess) <= tolerance)), "an active pair is missed or made up"
        error = np.abs(pairs.products[place] - start[neuron, points])
        assert np.all(error <= tolerance[neuron, points]), "a tracked product is wrong"
        ascends = np.diff(pairs.products[place], prepend=0.0) > 0
        assert not np.any(ascends & (rank > 0)), "tracked products are not in descending order"
        below = self.shift - rows["margin"][:, None]
        assert np.all(tracked | (start <= below + tolerance)), "a product within the margin is not tracked"
        began, base = pairs.products[place] >= self.shift, pairs.base[own]
        touched = began | pairs.active[own] | (base != 0.0)
        assert np.all(rank[touched] < rows["reach"][neuron[touched]]), "a pair was active beyond the reach of its row"
        flipped = (began != pairs.active[own]) | (base != 0.0)
        assert np.all(rows["flipped"][neuron[flipped]] == 1), "a pair has flipped, and its neuron is not marked"
        counts = self.counts.sum(axis=0)
        coactive = counts + counts.T - np.diag(np.diag(counts))
        assert np.array_equal(coactive, active.T.astype(int) @ active), "counts are not the active sets'"
        moving = active.any(axis=1)
        assert self.changing == moving.sum(), "the number of neurons that move is wrong"
        firing, excess, tolerance, near, rows = (array[moving] for array in (active, excess, tolerance, near, rows))
        single, scale = firing.sum(axis=1) == 1, -self._data.unit * rows["sign"]
        gone = np.where(single, scale * (firing @ self._sum), firing @ self._path)
        gone_far = np.where(single, -gone, firing @ (self._path * self._data.cross))
        left, cross = firing.sum(axis=1) * (pairs.certificates[moving] - self._distance), self._data.largest_cross
        slack = np.maximum(rows["limit"] - gone, left)[:, None]
        far_slack = np.maximum(rows["far_limit"] - gone_far, np.where(single, left, cross * left))[:, None]
        # How small the excess of an active pair can become before its neuron is looked at, and how large that of another.
        up, down = (np.clip(way, 0.0, 1e30) * (firing @ self.XXt) for way in (slack, far_slack))
        away = np.where(near, np.minimum(cross * slack, far_slack), far_slack)
        low = np.where(single[:, None], np.minimum(excess + up, excess - down), excess - slack)
        high = np.where(single[:, None], np.maximum(excess + up, excess - down), excess + away)
        safe = np.where(firing, low >= -tolerance, high <= tolerance)
        assert np.all(safe), "a pair can flip before its certificate ends"
        certified = np.where(moving, pairs.certificates, np.inf)
        assert np.all(certified >= self._distance * (1.0 - 2e-15)), "a certificate is late"
        for horizon, neurons, bounds in self._ladder:
            assert np.all(bounds <= pairs.certificates[neurons]), "a list has a certificate too large"
            outside = np.ones(self.n_live, bool)
            outside[neurons] = False
            assert np.all(certified[outside] > horizon), "a certificate is late: its neuron is on no list"


SEARCHES = {"dense": _Dense, "scan": _Scan, "tree": _Tree, "lazy": _Lazy}


# ======================================================================================================================
# Scaling: how any finite data become unit rows
# ======================================================================================================================

# The coordinate that normalize="lift" appends, over the root mean square length of the rows. Steps to 1e-3 with shift=1.0 at
# width 2^14, for 1, 1/2, 1/4: diabetes more than 100, 23, 19; breast cancer 47, 6, 4. Without columns of variance 1, breast
# cancer and wine stop falling at 0.2 to 0.4.
LIFT = 0.5


class _Standard(NamedTuple):
    """Columns to mean 0 and variance 1: divided by `unit`, their largest entry, which keeps squares in range, then centred
    and divided by `deviation`, which is infinite for constant columns."""

    unit: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, A):
        unit = np.abs(A).max(axis=0)
        unit = np.where(unit > 0, unit, 1.0)
        mean = (A / unit).mean(axis=0)
        deviation = (A / unit).std(axis=0)
        return cls(unit, mean, np.where(deviation > 8 * np.finfo(float).eps, deviation, np.inf))

    def __call__(self, A, factors=1.0):
        """Of A times the `factors` of its rows, which are to be applied to 1 as well."""
        with np.errstate(over="ignore", invalid="ignore"):
            columns = (A * factors / self.unit - self.mean * factors) / self.deviation
        return np.where(np.isinf(self.deviation), 0.0, columns)

    def shrinking(self, A):
        """A factor for each row (k, 1) that keeps squares in range; 1 unless the row is out of all proportion."""
        with np.errstate(divide="ignore"):
            size = np.log2(np.abs(A)) - np.log2(self.unit)
        largest = np.where(np.isinf(self.deviation), -np.inf, size).max(axis=1, keepdims=True)
        return np.exp2(np.minimum(0.0, 400.0 - largest))

    def inverse(self, A):
        return (A * np.where(np.isinf(self.deviation), 1.0, self.deviation) + self.mean) * self.unit


class _Scales(NamedTuple):
    """How data become unit rows, and targets come to have mean 0 and variance 1; None leaves them as they are."""

    x: _Standard | None
    y: _Standard | None
    lift: float  # the coordinate appended to every row; 0 for none
    normalize: str | None  # the option of the trainer

    @classmethod
    def of(cls, X, y, normalize):
        if normalize is None:
            return cls(None, None, 0.0, None)
        x = _Standard.of(X)
        length = np.sqrt(np.mean(np.sum(x(X) ** 2, axis=1))) or 1.0
        return cls(x, _Standard.of(y), LIFT * length if normalize == "lift" else 0.0, normalize)

    def unit_rows(self, X):
        if self.x is None:
            return _check_unit_rows(X.copy())
        factors = self.x.shrinking(X)
        X = self.x(X, factors)
        if self.lift:
            X = np.column_stack([X, self.lift * factors])
        return X / _check_row_lengths(X)

    def targets(self, y):
        return y if self.y is None else self.y(y)

    def outputs(self, f):
        """In the units of the targets."""
        return f if self.y is None else self.y.inverse(f)

    @property
    def y_unit(self):
        return 1.0 if self.y is None else float(self.y.inverse(1.0) - self.y.inverse(0.0))


def _unreachable(X, y):
    """The part of y, (n,), that no function of X can fit, its deviations from the means over equal rows; warns if any."""
    _, group, sizes = np.unique(np.round(X, 12) + 0.0, axis=0, return_inverse=True, return_counts=True)
    group = group.ravel()
    deviations = y - (np.bincount(group, y) / sizes)[group]
    deviations[np.abs(deviations) <= 1e-12 * np.abs(y).max()] = 0.0
    if not deviations.any():
        return deviations
    least = np.linalg.norm(deviations) / np.linalg.norm(y)
    first = int(np.flatnonzero(deviations)[0])
    second = int(np.flatnonzero((group == group[first]) & (y != y[first]))[0])
    warnings.warn(
        f"{np.count_nonzero(deviations)} rows of X coincide with rows that have other targets, the first are {first} and "
        f"{second}: no network brings the relative residual below {least:.3g}; merge such rows, or set tol above that",
        UserWarning,
        stacklevel=4,
    )
    return deviations


# ======================================================================================================================
# Saving
# ======================================================================================================================

FORMAT = "sublin network, version 1"
SAVED = ("history_", "residual_", "n_iter_", "converged_", "shift_", "n_live_", "init_seconds_", "n_features_in_")


def _digest(arrays):
    """SHA-256 of named arrays."""
    digest = hashlib.sha256()
    for name in sorted(arrays):
        array = np.ascontiguousarray(arrays[name])
        digest.update(f"{name} {array.dtype.str} {array.shape} ".encode())
        digest.update(array.view(np.uint8).data if array.size else b"")
    return digest.hexdigest()


def _write_whole(path, arrays):
    """Writes an npz beside `path` and renames it, so that there is either the old file or the new one at any moment."""
    path = os.path.abspath(path)
    with tempfile.NamedTemporaryFile(dir=os.path.dirname(path), prefix=os.path.basename(path) + ".", delete=False) as file:
        try:
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, path)
        except BaseException:
            os.unlink(file.name)
            raise


# ======================================================================================================================
# Trainer (Algorithm 5)
# ======================================================================================================================

PHASES = ("seconds_query", "seconds_jacobian", "seconds_solve", "seconds_update")
SOLVERS = ("cholesky", "sketch", "richardson", "cg", "gradient")


class ConvergenceWarning(RuntimeWarning):
    """Training ended above its tolerance; the message says why and what to change."""


def _convergence_warning():
    """ConvergenceWarning, which is scikit-learn's too if that is in use, so that filters of either work."""
    classes = dict.fromkeys((ConvergenceWarning, _of_sklearn("ConvergenceWarning", ConvergenceWarning)))
    return type("ConvergenceWarning", tuple(classes), {})


class _Stopwatch:
    """Seconds by phase: lap(phase) books the time since the last lap."""

    def __init__(self):
        self.phases = dict.fromkeys(PHASES, 0.0)
        self._last = time.perf_counter()

    def lap(self, phase):
        now = time.perf_counter()
        self.phases[phase] += now - self._last
        self._last = now


# "auto" starts with mu = DAMPING times the mean of G's diagonal.
DAMPING = 1e-3
TRIALS = 24  # steps tried in an iteration, with four times the damping each time, before training ends


class _Damping:
    """mu in (G + mu I) g = f - y: a number, or "auto", Levenberg-Marquardt.

    "auto" takes mu in proportion to the residual, which keeps convergence superlinear (N. Yamashita, M. Fukushima, "On the
    rate of convergence of the Levenberg-Marquardt method", 2001), and the factor of proportion from the gain ratio: the
    decrease of ||f - y||^2 over the one that the linear model f - G g promised.
    """

    def __init__(self, damping):
        self.adaptive = isinstance(damping, str)
        self._factor = DAMPING if self.adaptive else damping

    def value(self, diagonal, residual):
        """mu, for the mean of G's diagonal and the relative residual."""
        return self._factor * diagonal * residual if self.adaptive else self._factor

    def reject(self):
        self._factor = max(4.0 * self._factor, 1e-6)

    def accept(self, before, after, promised):
        """Told the residuals before and after the step, and after it in the linear model."""
        gain = (1.0 - (after / before) ** 2) / max(1.0 - (promised / before) ** 2, np.finfo(float).tiny)
        # Bold bounds: with the usual 0.75 and 0.25 diabetes at width 2^14, lift 1, is at 0.2 after 100 steps, with these at
        # 0.02; if every step that gains lowers mu, at 0.05, with two steps in three taken back.
        if gain > 0.3:
            self._factor = max(self._factor / 4.0, 1e-7)
        elif gain < 0.05:
            self._factor *= 2.0


@contextmanager
def _uninterrupted():
    """Makes an interrupt (Ctrl-C) wait until the block ends, so that what the block changes is changed as a whole."""
    handler = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(handler):
        yield
        return
    waiting = []
    signal.signal(signal.SIGINT, lambda *event: waiting.append(event))
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)
    if waiting:
        handler(*waiting[0])


class _Progress:
    """What fit tells while it runs: nothing, lines (verbose=1), or bars (verbose=2, where tqdm is installed)."""

    def __init__(self, verbose, max_iter):
        self.verbose, self._tqdm = verbose, None
        if verbose == 2:
            with suppress(ImportError):
                from tqdm import tqdm

                self._tqdm = tqdm
        self._bar, self._max_iter, self._last = None, max_iter, time.perf_counter()

    def drawn(self, share):
        """Told the share of neurons drawn: shown about once a second."""
        now = time.perf_counter()
        if self.verbose and (now - self._last > 1.0 or (self._bar is not None and share == 1.0)):
            self._last = now
            if self._tqdm is None:
                print(f"drawing neurons: {share:4.0%}")
            else:
                self._bar = self._bar or self._tqdm(total=100, desc="drawing neurons", unit="%")
                self._bar.update(int(100 * share) - self._bar.n)

    def step(self, record):
        if self.verbose and self._tqdm is None:
            print(
                "{iteration:4d}  residual {residual:.2e}  damping {damping:.1e}  rejected {rejected}  changed {changed}  "
                "flips {flips}  {seconds:.3f} s".format(**record)
            )
        elif self.verbose:
            if record["iteration"] == 0 or self._bar is None:
                self.close()
                self._bar = self._tqdm(total=self._max_iter, desc="Gauss-Newton steps", unit="step")
            self._bar.set_postfix(residual=f"{record['residual']:.2e}")
            self._bar.update(record["iteration"] > 0)

    def close(self):
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class SublinearTrainer:
    """Two-layer network with shifted ReLU, trained by Gauss-Newton steps on all points at once.

    Parameters
    ----------
    width : int, number m of neurons, which must be even with init="antisymmetric".
    shift : float or "auto", threshold b of the activation; "auto" is default_shift(width, alpha).
    alpha : float in [0, 1), for shift="auto".
    search : how active neurons are found; same network, same steps, other costs for each step.
        "lazy"   products of live neurons near or above the threshold, and a certificate for each neuron: only those
                 looked at that may have crossed. About O(n |K|) for a first step, then the fewer the smaller the steps.
        "tree"   search trees over stored products: the paper. O(n |K| (min(k, d) + log m)) for |K| changed neurons, each
                 active on k points.
        "scan"   stored products, all compared: O(n m + n |K| min(k, d)).
        "dense"  products anew: O(n m d).
    solver : how (G + damping I) g = f - y is solved.
        "cholesky"    exactly, from the Gram matrix.
        "sketch"      conjugate gradients preconditioned by a sketch of J^T: the paper, end to end.
        "richardson"  the same with the paper's own iteration, which needs a larger sketch.
        "cg"          conjugate gradients, no preconditioner.
        "gradient"    g = (f - y) / ||G_0||: gradient descent. damping="auto" shortens the steps where the residual would
                      rise; a number has no effect.
        "sketch", "richardson" and "cg" stop at the relative tolerance of Algorithm 5, sqrt(lambda / n) / 6, which takes
        the smallest eigenvalue of the kernel, O(n^3), once. Their steps differ between searches within that tolerance;
        those of the exact solvers do not.
    sketch : "sparse", "srht" or "gaussian".
    sketch_size : int >= n, rows of the sketch; None is max(8 n, 4 d), with 64 (n + 8) for "richardson".
    init : "antisymmetric", neurons in pairs (w, +1), (w, -1), so that f = 0 at the start; or "gaussian", independent
        signs as in the paper.
    damping : float >= 0, 0 being the paper's pure step; or "auto", Levenberg-Marquardt: the residual never rises, for a step
        that would raise it is taken back and tried again with more damping, which fades as the linear model proves right.
    normalize : how the rows of X get length 1. "lift" gives columns mean 0 and variance 1, appends a constant coordinate, so
        that parallel rows stay apart, and scales the rows; "rows" does the same without the coordinate; None takes X and y
        as they are and requires rows of length 1. Constant columns have no effect. Unless None, targets get mean 0 and
        variance 1 too, and `predict` undoes it.
    dtype : precision of the products that "dense", "scan" and "tree" compute or keep. "float32" halves their memory
        and stops near a residual of 1e-6; "float64" reaches 1e-9. "lazy" always keeps its few pairs in float64.
    tol : float, relative residual ||f - y|| / ||y|| at which training stops. A wide network fits noise too: for noisy
        targets stop early, with a larger tol, or use more damping.
    max_iter : int, largest number of steps; 0 leaves the starting network.
    random_state : None, int, numpy RandomState or Generator. The starting weights depend on it, on
        init and on d alone; a wider network extends a narrower one.
    warm_start : bool; if True, fit goes on from the weights that the last fit, or load, has left.
    callback : called with each record of history_; training stops if it returns True.
    verbose : 1 prints a line for each step, 2 shows bars where tqdm is installed.

    Attributes
    ----------
    history_ : a dict for the start (iteration 0) and for each step: iteration, residual (after it), loss (half the mean
        squared error, in the units of y squared), active (mean |Q_i| after it), changed (|K|, neurons the step moved),
        looked_at (neurons whose products it read, again if their margins were widened), flips (pairs that crossed the
        threshold), inner_iterations, damping, rejected (steps taken back before it), operations (multiply-adds,
        comparisons and moves of products), seconds, and seconds by phase: seconds_query, seconds_jacobian (Gram matrix or
        sketch), seconds_solve, seconds_update. The start has no seconds: they are init_seconds_.
    loss_curve_ : list of the losses.
    residual_ (float), n_iter_ (int), converged_ (bool), shift_ (float), n_live_ (int, neurons active on some point at the
        start), init_seconds_ (float), signs_ (m,).

    Memory: "lazy" holds the starting weights of live neurons, 88 bytes more for each, and 15 for each pair near the
    threshold, a few times sum |Q_i|; nothing of size m. "scan" and "tree" hold (1 + 1/15) n m products and the starting
    weights of live neurons, "dense" m d weights.
    Costs: fit takes O(n m d) once, then for each step the search as above and the solver, O(n^3) for "cholesky". It raises
    ValueError, TypeError or MemoryError on bad input, LinAlgError when the Gram matrix is singular and damping is zero.
    """

    def __init__(
        self,
        width=65536,
        *,
        shift="auto",
        alpha=0.04,
        search="lazy",
        solver="cholesky",
        sketch="sparse",
        sketch_size=None,
        init="antisymmetric",
        damping="auto",
        normalize="lift",
        dtype="float64",
        tol=1e-6,
        max_iter=50,
        random_state=None,
        warm_start=False,
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
        self.warm_start = warm_start
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

    def __repr__(self):
        defaults = inspect.signature(type(self)).parameters
        changed = {name: value for name, value in self.get_params().items() if value != defaults[name].default}
        return f"SublinearTrainer({', '.join(f'{name}={value!r}' for name, value in changed.items())})"

    def __sklearn_tags__(self):
        """What scikit-learn asks of its estimators; called by it only."""
        from sklearn.utils import RegressorTags, Tags, TargetTags

        return Tags(
            estimator_type="regressor",
            target_tags=TargetTags(required=True),
            transformer_tags=None,
            classifier_tags=None,
            regressor_tags=RegressorTags(),
        )

    def fit(self, X, y):
        """Trains on X (n, d) and y (n,), neither of which is modified. Returns self.

        Starts from new weights unless warm_start is True. An interrupt (Ctrl-C) in training leaves the network at the last
        whole step, ready for use, and goes on to the caller.
        """
        shift = self._check_options()
        names = _feature_names(X)
        goes_on = self.warm_start and hasattr(self, "history_")
        X = _check_features(X, self) if goes_on else _check_matrix("X", X)
        y = _check_targets(y, len(X))
        if self.sketch_size is not None and self.solver in ("sketch", "richardson"):
            if self.sketch_size < len(X):
                raise ValueError(f"sketch_size must be at least the number {len(X)} of points, got {self.sketch_size}")
            _check_memory(
                f"a sketch with sketch_size={self.sketch_size}", 16 * self.sketch_size * len(X), "use a smaller one"
            )
        progress = _Progress(self.verbose, self.max_iter)
        try:
            if goes_on:
                self._go_on(X, y, shift, progress)
                stopped = False
            else:
                self._begin(X, y, shift, names, progress)
                stopped = self._tell(progress)
            if not stopped:
                self._train(progress)
        finally:
            progress.close()
        if not self.converged_ and self.max_iter > 0:
            self._warn()
        return self

    def _begin(self, X, y, shift, names, progress):
        """A new network."""
        begin, seed = time.perf_counter(), _seed(self.random_state)
        scales, n_features = _Scales.of(X, y, self.normalize), X.shape[1]
        X = scales.unit_rows(X)
        draw = partial(_starting_blocks, seed, self.width, X.shape[1], self.init)
        none_moved = np.zeros(0, np.int64), np.zeros((0, X.shape[1]), np.float32), np.zeros(0)
        y = scales.targets(y)
        unreachable = _unreachable(X, y)
        search = self._new_search(X, y, shift, draw, none_moved, progress)
        # Nothing of this object has changed up to here, so that input that is refused leaves it as it was.
        with _uninterrupted():
            self._adopt(X, y, search, unreachable, begin)
            self._scales, self._drawn_with, self.shift_, self.history_ = scales, seed, shift, []
            self.n_features_in_ = n_features
            vars(self).pop("feature_names_in_", None)
            if names is not None:
                self.feature_names_in_ = names
            damping = self.damping if isinstance(self.damping, (int, float)) else 0.0
            self._record(self._relative_residual(), _Stopwatch(), damping=damping)

    def _go_on(self, X, y, shift, progress):
        """The weights as they are, perhaps other points, targets or methods."""
        begin = time.perf_counter()
        network = self._search
        for name, now, before in (
            ("width", self.width, network.width),
            ("init", self.init, network.init),
            ("shift", shift, network.shift),
            ("normalize", self.normalize, self._scales.normalize),
        ):
            if now != before:
                raise ValueError(
                    f"{name} must stay {before!r} for warm_start=True to go on with the network, got {now!r}; "
                    "use warm_start=False to begin anew"
                )
        X, y = self._scales.unit_rows(X), self._scales.targets(y)
        unreachable = _unreachable(X, y)
        if not (type(network) is SEARCHES[self.search] and network.dtype == self.dtype and np.array_equal(X, self._X)):
            rows = np.argsort(network.live)
            moved = network.live[rows], network._trained()(rows), network.signs[rows]
            network = self._new_search(X, y, shift, network.draw, moved, progress)
        with _uninterrupted():
            self._adopt(X, y, network, unreachable, begin)
            self._reached(self._relative_residual())

    def _new_search(self, X, y, shift, draw, moved, progress):
        _check_memory(f"Gram matrices of {len(X)} points", 24 * len(X) ** 2, "use fewer points")
        with _serial_blas():
            XXt = X @ X.T
        return SEARCHES[self.search](X, XXt, y, shift, self.width, self.init, draw, self.dtype, moved, progress.drawn)

    def _adopt(self, X, y, search, unreachable, begin):
        self._X, self._y, self._search, self._unreachable = X, y, search, unreachable
        self._y_norm = np.linalg.norm(y) or 1.0
        self.n_live_, self.init_seconds_ = search.n_live, time.perf_counter() - begin

    def _train(self, progress):
        """Steps until the residual is at most tol, or max_iter of them."""
        self._prepare_solver()
        damping, stopped, last = _Damping(self.damping), False, self.n_iter_ + self.max_iter
        while not (stopped or self.converged_ or self.n_iter_ >= last) and np.isfinite(self.residual_):
            before = self.residual_
            if not self._step(damping, self.n_iter_ + 1 == last):
                break
            # An adaptive step that gains next to nothing is the last: the residual has reached its floor.
            stopped = self._tell(progress) or (damping.adaptive and self.residual_ > (1.0 - 1e-10) * before)

    def _step(self, damping, is_last):
        """One step and its record; False if no damping makes the residual fall."""
        search, stopwatch, n = self._search, _Stopwatch(), len(self._X)
        before, J = self.residual_, search.jacobian()
        # What no step can reduce is left out of g, which it would blow up as mu falls, without moving any weight.
        residual = search.outputs - (self._y - self._unreachable)
        for rejected in range(TRIALS):
            mu = damping.value(search.nnz / (n * search.width), before)
            try:
                with _serial_blas() if n <= 1024 else nullcontext():
                    step, inner_iterations = self._solve(J, residual, mu, stopwatch.lap)
            except np.linalg.LinAlgError:
                if not damping.adaptive:
                    raise
                damping.reject()
                continue
            remainder = residual - J.gram_times(step) if self.solver == "gradient" else mu * step
            with _uninterrupted():
                changed = search.changing
                if damping.adaptive:
                    search.remember()
                flips = search.advance(step, stopwatch.lap)
                after = self._relative_residual()
                if after <= self.tol or is_last:
                    search.settle()
                    stopwatch.lap("seconds_query")
                    after = self._relative_residual()
                if after < before or not damping.adaptive:
                    self._flips_since_factor += flips
                    if damping.adaptive:
                        damping.accept(before, after, np.linalg.norm(remainder - self._unreachable) / self._y_norm)
                    self._record(after, stopwatch, changed, flips, inner_iterations, mu, rejected)
                    return True
                search.undo()
                stopwatch.lap("seconds_query")
            damping.reject()
        return False

    def _relative_residual(self):
        return np.linalg.norm(self._search.outputs - self._y) / self._y_norm

    def _warn(self):
        """Says why training has ended above tol, and what to change."""
        silent = np.flatnonzero(self._search.jacobian().active_counts() == 0)
        last = [record["residual"] for record in self.history_[-6:]]
        floor = np.linalg.norm(self._unreachable) / self._y_norm
        if not np.isfinite(self.residual_) or last[-1] > 1.5 * min(last):
            remedy = 'the pure step diverges; set damping="auto", or use a larger width or a smaller shift'
        elif self.residual_ <= 1.01 * floor:
            remedy = f"it cannot fall below {floor:.2e} since points coincide; raise tol above that, or merge them"
        elif silent.size:
            remedy = (
                f"{silent.size} of {len(self._X)} points have no active neuron (the first is {silent[0]}), so their outputs "
                "cannot move; lower shift, or raise width"
            )
        elif len(self.history_) > 1 and last[-1] < 0.99 * last[0]:
            remedy = "it was still falling; raise max_iter, or, for faster steps, lower shift or raise width"
        else:
            remedy = "it has stopped falling; lower shift or raise width, for more active neurons"
        warnings.warn(
            f"relative residual {self.residual_:.2e} after {self.n_iter_} steps is above tol={self.tol:g}: {remedy}",
            _convergence_warning(),
            stacklevel=3,
        )

    @property
    def loss_curve_(self):
        """The losses of history_, as MLPRegressor has them."""
        self._check_fitted()
        return [record["loss"] for record in self.history_]

    def predict(self, X):
        """Outputs (k,) of the trained network at X (k, d), in the units of y.

        O(k d n_live) with init="antisymmetric", whose dead neurons cancel; O(k d m) otherwise, and with search="dense".
        init="gaussian" draws the weights of dead neurons again.
        """
        self._check_fitted()
        X = self._scales.unit_rows(_check_features(X, self))
        outputs = np.zeros(len(X))
        for W, signs in self._search.trained_blocks():
            for first in range(0, len(X), 1024):  # 1024 x BLOCK products at a time, 128 MB
                rows = slice(first, first + 1024)
                outputs[rows] += np.maximum(X[rows] @ W.T - self.shift_, 0.0) @ signs
        return self._scales.outputs(outputs / np.sqrt(self._search.width))

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
        return _by_point(self._search.active_sets(), len(self._X))

    def check(self):
        """Asserts that active sets and residual are those of the weights, and every invariant of the search.

        Makes the weights: m d numbers, O(n m d). A product within rounding of the threshold may count as either.
        """
        W, signs, X, shift = self.weights(), self.signs_, self._X, self.shift_
        active = self._search.active_sets()
        single = self.dtype == "float32" and self.search != "lazy"
        tolerance = 1e-4 if single else 1e-9
        outputs = np.zeros(len(X))
        for first in range(0, len(W), BLOCK):
            excess = W[first : first + BLOCK] @ X.T - shift
            found = np.zeros(excess.shape, bool)
            low, high = np.searchsorted(active.neurons, (first, first + BLOCK))
            offsets = active.offsets[low : high + 1]
            rows = np.repeat(active.neurons[low:high] - first, np.diff(offsets))
            found[rows, active.points[offsets[0] : offsets[-1]]] = True
            doubtful = np.abs(excess) <= tolerance * (1.0 + np.abs(shift))
            assert np.all((found == (excess >= 0)) | doubtful), "active sets are not those of the weights"
            outputs += signs[first : first + BLOCK] @ np.maximum(excess, 0.0)
        outputs /= np.sqrt(len(W))
        residual = np.linalg.norm(outputs - self._y) / self._y_norm
        assert abs(residual - self.residual_) <= 10 * tolerance, "the residual is not that of the weights"
        self._search.check()

    @property
    def signs_(self):
        """Output signs (m,)."""
        self._check_fitted()
        return self._search.all_signs()

    def _check_options(self):
        """Raises on bad options; returns the threshold."""
        _check_integer("width", self.width, 1, WIDEST)
        for name, known in (
            ("search", SEARCHES),
            ("solver", SOLVERS),
            ("sketch", SKETCHES),
            ("init", ("antisymmetric", "gaussian")),
            ("dtype", ("float32", "float64")),
            ("normalize", ("lift", "rows", None)),
            ("verbose", (0, 1, 2)),
            ("warm_start", (False, True)),
        ):
            _check_choice(name, getattr(self, name), known)
        if self.init == "antisymmetric" and self.width % 2:
            raise ValueError(f'init="antisymmetric" needs an even width, got {self.width}; use it +- 1, or init="gaussian"')
        if self.sketch_size is not None:
            _check_integer("sketch_size", self.sketch_size, 1)
        _check_auto("damping", self.damping, 0.0)
        _check_real("tol", self.tol, 0.0)
        _check_integer("max_iter", self.max_iter, 0)
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be callable, got {self.callback!r}")
        default, shift = default_shift(self.width, self.alpha), _check_auto("shift", self.shift)
        return default if shift == "auto" else shift

    def _check_fitted(self):
        if not hasattr(self, "history_"):
            error = _of_sklearn("NotFittedError", AttributeError)
            raise error("this SublinearTrainer is not fitted yet; call fit(X, y) first")

    def _prepare_solver(self):
        n = len(self._X)
        self._rate = self._factor = None
        self._flips_since_factor = 0  # pairs since the Gram matrix was factored
        if self.solver in ("sketch", "richardson", "cg"):
            self._tolerance = _regression_tolerance(self._X, self.shift_)
        default = max(64 * (n + 8) if self.solver == "richardson" else 8 * n, 4 * self._X.shape[1])
        self._sketch_size = default if self.sketch_size is None else self.sketch_size
        self._rng = np.random.default_rng(self._drawn_with)  # of the sketches

    def _solve(self, J, residual, damping, lap):
        if self.solver == "cholesky":
            near = len(residual) >= REUSE and STALE * self._flips_since_factor <= self._search.nnz
            *solved, factor = _solve_cholesky(J, residual, damping, lap, self._factor if near else None)
            if factor is not self._factor:
                self._factor, self._flips_since_factor = factor if len(residual) >= REUSE else None, 0
            return solved
        if self.solver == "cg":
            return _solve_cg(J, residual, damping, self._tolerance, lap)
        if self.solver == "gradient":
            if self._rate is None:
                self._rate = _gradient_rate(J)
            lap("seconds_solve")
            shrink = 1.0 + self._rate * damping if self.damping == "auto" else 1.0
            return self._rate / shrink * residual, 0
        solve = _solve_sketch if self.solver == "sketch" else _solve_richardson
        return solve(J, residual, damping, self._tolerance, SKETCHES[self.sketch], self._sketch_size, self._rng, lap)

    def _record(self, residual, stopwatch, changed=0, flips=0, inner_iterations=0, damping=0.0, rejected=0):
        self.n_iter_ = len(self.history_)
        self._reached(residual)
        operations, looked_at = self._search.take_counts()
        with np.errstate(over="ignore"):
            loss = float(np.square(self.residual_ * self._y_norm * self._scales.y_unit / np.sqrt(2 * len(self._X))))
        self.history_.append(
            {
                "iteration": self.n_iter_,
                "residual": self.residual_,
                "loss": loss,
                "active": self._search.nnz / len(self._X),
                "changed": changed,
                "looked_at": looked_at,
                "flips": flips,
                "inner_iterations": inner_iterations,
                "damping": float(damping),
                "rejected": rejected,
                "operations": operations,
                "seconds": sum(stopwatch.phases.values()),
                **stopwatch.phases,
            }
        )

    def _reached(self, residual):
        self.residual_ = float(residual)
        self.converged_ = bool(self.residual_ <= self.tol)

    def _tell(self, progress):
        """Shows the last record; True if the callback asks to stop."""
        progress.step(self.history_[-1])
        answer = self.callback(self.history_[-1]) if self.callback else None
        return isinstance(answer, (bool, np.bool_)) and bool(answer)

    def save(self, path):
        """Writes the trained network to the file `path`, an npz without pickled objects.

        It holds the weights of live neurons (n_live, d), and those of all (m, d) with init="gaussian" or search="dense"; the
        training points, options and history. A kill at any moment leaves the old file or the new one, whole. A callback is
        not saved, and of random_state its seed.
        """
        self._check_fitted()
        self._check_options()  # which may have been set since, and load will check them
        network, d = self._search, self._X.shape[1]
        rows = np.arange(network.live.size)
        arrays = {
            "X": self._X,
            "y": self._y,
            "unreachable": self._unreachable,
            "live": network.live,
            "signs": network.signs.astype(np.int8),
            "weights": network._trained()(rows),
            "probe": _generator_probe(self._drawn_with, d, network.init),
        }
        for name, standard in (("x", self._scales.x), ("y", self._scales.y)):
            if standard is not None:
                arrays |= {f"{name}_{key}": np.asarray(value) for key, value in standard._asdict().items()}
        if network.init == "gaussian" and network.live.size < network.width:
            _check_memory(f"the starting weights of {network.width} neurons", network.width * d * 4)
            blocks = zip(*network.draw(lambda first, W, signs: (W, signs)), strict=True)
            arrays["starting_weights"], arrays["starting_signs"] = map(np.concatenate, blocks)
        drawn = {"random_state": self._drawn_with, "width": network.width, "init": network.init}
        params = {**self.get_params(), **drawn, "callback": None}
        about = {
            "format": FORMAT,
            "digest": _digest(arrays),
            "params": params,
            "lift": self._scales.lift,
            "normalize": self._scales.normalize,
            "feature_names": list(getattr(self, "feature_names_in_", [])),
            **{name: getattr(self, name) for name in SAVED},
        }
        text = json.dumps(about, default=lambda number: number.item())
        _write_whole(path, {**arrays, "about": np.frombuffer(text.encode(), np.uint8)})

    @classmethod
    def load(cls, path):
        """The trainer that `save` has written to the file `path`: it predicts the same to the bit, and fit with
        warm_start=True goes on with it. No code of the file is run. Raises ValueError if it is damaged or foreign."""
        with open(path, "rb") as file:
            try:
                loaded = np.load(file, allow_pickle=False)
                arrays = {name: loaded[name] for name in loaded.files}
                about = json.loads(arrays.pop("about").tobytes())
                if about["format"] != FORMAT or about["digest"] != _digest(arrays):
                    raise ValueError("its contents are not what was written")
                return cls._from_saved(about, arrays)
            except Exception as error:  # what a damaged archive raises is of many kinds
                raise ValueError(
                    f"path must be a file written by SublinearTrainer.save, but {os.fspath(path)!r} is damaged or foreign "
                    f"({type(error).__name__}: {error}); save the trainer again"
                ) from None

    @classmethod
    def _from_saved(cls, about, arrays):
        trainer = cls(**about["params"])
        trainer._check_options()
        trainer._drawn_with = trainer.random_state
        for name in SAVED:
            setattr(trainer, name, about[name])
        if about["feature_names"]:
            trainer.feature_names_in_ = np.asarray(about["feature_names"], dtype=object)
        x, y = (
            _Standard(*(arrays[f"{name}_{key}"] for key in _Standard._fields)) if f"{name}_unit" in arrays else None
            for name in "xy"
        )
        trainer._scales = _Scales(x, y, about["lift"], about["normalize"])
        X, live, weights = _check_matrix("X", arrays["X"]), arrays["live"], arrays["weights"]
        draw = partial(_starting_blocks, trainer._drawn_with, trainer.width, X.shape[1], trainer.init)
        if "starting_weights" in arrays:
            draw = partial(_stored_blocks, arrays["starting_weights"], arrays["starting_signs"])
        elif not np.array_equal(arrays["probe"], _generator_probe(trainer._drawn_with, X.shape[1], trainer.init)):
            draw = _refuse_to_draw
        signs = _check_signs(arrays["signs"]) if live.size else np.zeros(0)
        fits = live.shape == signs.shape and weights.shape == (live.size, X.shape[1]) and np.isfinite(weights).all()
        if "starting_weights" in arrays:
            starting = arrays["starting_weights"]
            fits &= starting.shape == (trainer.width, X.shape[1]) and np.isfinite(starting).all()
            fits &= _check_signs(arrays["starting_signs"]).size == trainer.width
        if not fits:
            raise ValueError("its arrays do not fit together")
        live = _check_indices("live", live, trainer.width) if live.size else np.zeros(0, np.int64)
        trainer._unreachable = arrays["unreachable"]
        trainer._X, trainer._y = X, _check_vector("y", arrays["y"], size=len(X))
        trainer._y_norm = np.linalg.norm(trainer._y) or 1.0
        trainer._search = _Network(X, trainer.shift_, trainer.width, trainer.init, draw, live, signs, weights)
        return trainer
