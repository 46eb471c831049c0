"""Training two-layer networks in time sublinear in their width.

An implementation of

    [DHSWZ] Y. Deng, H. Hu, Z. Song, O. Weinstein, D. Zhuo, "Training Overparametrized Neural
            Networks in Sublinear Time",

of the methods that the paper is compared with, and of a lazy search that goes past it.

The network is f(x) = m^(-1/2) sum_r a_r (<w_r, x> - b)_+, a shifted ReLU whose threshold b grows
with the width m, so that few neurons are active on any point. Training is Gauss-Newton: with J the
Jacobian of f at the n training points,

    solve  (J J^T) g = f - y,    then    W <- W - J^T g.

Both halves touch active neurons only. What remains is to *find* them without looking at every
product <w_r, x_i>. The paper does that with n search trees, one for each point, whose leaves are
the products and whose inner nodes are maxima.

Notation (the paper's symbol, its name here, its meaning, its shape)

    n, d    --        number of points, and of their coordinates
    x_i     X         data points, of Euclidean length 1                                (n, d)
    y       y         targets                                                           (n,)
    w_r     W         hidden weights, N(0, I_d) at the start                            (m, d)
    a_r     signs     output signs, +1 or -1, never trained                             (m,)
    m       width     number of neurons
    b       shift     threshold of the ReLU, sqrt(0.5 (1 - alpha) ln m) in the paper
    Q_i     active    neurons active on x_i: {r : <w_r, x_i> >= b}                      set
    act(r)  --        points on which neuron r is active: {i : r in Q_i}                set
    K       neurons   neurons active on some point, which are those a step changes      set
    --      pair      a neuron r and a point i; it is active if r is in Q_i
    --      flip      a pair that became active, or ceased to be, in a step: the neuron
                      wakes or falls asleep on the point. To fire is to be active
    --      live      neurons active on some point at the start, or held by an earlier  set
                      fit. No others ever change: they are dead
    --      clear     live neurons no pair of which can flip in all of training         set
    --      near      live neurons that are not clear                                   set
    --      lean      a lazy search that holds near neurons only; clear ones are
                      counted, and drawn again when somebody asks for them
    --      block     neurons that one rank, which is a process, holds together
    --      twins     neurons 2 k and 2 k + 1 of an antisymmetric start, which share a vector
    J       J         Jacobian; part (i, r) is m^(-1/2) a_r x_i^T if r in Q_i, else 0   (n, m d)
    G       gram      Gram matrix J J^T                                                 (n, n)
    C       counts    number of neurons active on both x_i and x_j; G is X X^T o C / m  (n, n)
    g       step      the dual step, which is solved for; weights then move by -J^T g   (n,)
    mu      damping   G + mu I is solved instead of G
    nu      --        `ridge` times the mean of G's diagonal when the points were first fitted;
                      (G + (nu + mu) I) g = f - y - nu s is solved
    --      residual  ||f - y|| / ||y||; system_residual, with a ridge, ||f - y - nu s|| / ||y||
    nnz     nnz       number of active pairs, the sum of |Q_i|
    s       sums      the sum of the dual steps g so far                                (n,)
    gamma   gamma     sum of g_i over the steps in which pair (r, i) was active         (live, n)
    S       --        sketching matrix, never formed                                    (size, m d)
    R       T^-1      triangular factor that makes S J^T R orthonormal                  (n, n)
    lambda  --        smallest eigenvalue of the shifted neural tangent kernel

Where the paper disagrees with itself we read: (z - b)_+ for the activation, m^(-1/2) in front of
the sum, "active" as >= b, m d columns in J, g = R z in Algorithm 5, and its tolerance relative to
||f - y||.

The module reads from top to bottom: one step in plain NumPy, the problem and its kernel, random
numbers, starting weights, trees, the Jacobian, sketches, solvers, sums in fixed point, trained
networks, searches, the lazy search, scaling, saving, the trainer; then what needs no mathematics:
checks of input, threads, ranks, versions and the place of machine code.

Within a major version a copy may rely on the names in __all__ and their arguments, on the files
that `save` writes being read by later versions, and on a seed giving the same bits with the same
versions of NumPy, SciPy and Numba on machines of one kind, whatever the number of threads and
ranks. All other names may change, whether or not they begin with an underscore.

Further references

    [BPSW21] J. van den Brand, B. Peng, Z. Song, O. Weinstein, "Training (Overparametrized) Neural
             Networks in Near-Linear Time", ITCS 2021.
    [CGH+19] T. Cai et al., "Gram-Gauss-Newton Method", arXiv:1905.11675.
    [CW13]   K. Clarkson, D. Woodruff, "Low Rank Approximation and Regression in Input Sparsity
             Time", STOC 2013.
    [NN13]   J. Nelson, H. Nguyen, "OSNAP: Faster Numerical Linear Algebra Algorithms", FOCS 2013.
    [SMDS11] J. Salmon, M. Moraes, R. Dror, D. Shaw, "Parallel Random Numbers: As Easy as 1, 2, 3",
             SC 2011.
    [SYZ21]  Z. Song, S. Yang, R. Zhang, "Does Preprocessing Help Training Over-parameterized
             Neural Networks?", 2021.
    [Tro11]  J. Tropp, "Improved Analysis of the Subsampled Randomized Hadamard Transform", 2011.
    [YF01]   N. Yamashita, M. Fukushima, "On the Rate of Convergence of the Levenberg-Marquardt
             Method", 2001.
    [ZMG19]  G. Zhang, J. Martens, R. Grosse, "Fast Convergence of Natural Gradient Descent for
             Over-Parameterized Neural Networks", NeurIPS 2019.
"""

import copy
import hashlib
import inspect
import json
import math
import os
import secrets
import signal
import stat
import sys
import threading
import time
import traceback
import warnings
import zlib
from collections import deque
from contextlib import contextmanager, nullcontext, suppress
from functools import cache, cached_property, partial, wraps
from itertools import islice, pairwise
from queue import SimpleQueue
from typing import NamedTuple

import numba
import numpy as np
import scipy.linalg
import scipy.sparse
import scipy.special
from numba import njit, types
from numba.core.caching import FunctionCache
from numba.core.dispatcher import Dispatcher
from numba.extending import intrinsic
from scipy.linalg.lapack import dpotrf, dpotrs
from scipy.sparse.linalg import LinearOperator, cg

__version__ = "1.0.0"

__all__ = [
    "ConvergenceWarning",
    "MaxTrees",
    "SparseJacobian",
    "SublinearTrainer",
    "default_shift",
    "gaussian_sketch",
    "ntk_eigenvalue_bounds",
    "reference",
    "separability",
    "shifted_ntk",
    "smallest_ntk_eigenvalue",
    "sparse_sign_sketch",
    "srht_sketch",
]

# Reassociation lets sums and counts use vector registers. Flags that assume away infinities and
# NaN would break the comparisons with padding and with infinite thresholds.
FAST = {"reassoc", "contract", "nsz", "arcp"}

# Sums over neurons are added up in this many chunks, whatever the number of threads, and the
# chunks in their order, so that a seed gives the same bits with any number of threads. Kernels that
# end in (low, high) do the items low, ..., high - 1 and are mostly run by _over_items; those that
# end in (edges, totals) are run by _sum_over_chunks, and row c of totals is for the items edges[c],
# ..., edges[c + 1] - 1. Both are at the end of the module.
CHUNKS = 64


def _quiet(public):
    """Decorates what users call: the caller's np.seterr, by which underflow may be an error,
    changes nothing in it."""

    @wraps(public)
    def called(*arguments, **options):
        with np.errstate(all="ignore"):
            return public(*arguments, **options)

    return called


# ==================================================================================================
# Reference: one Gauss-Newton step, dense
# ==================================================================================================


def reference(X, y, W, signs, shift, damping=0.0):
    """One Gauss-Newton step as the paper has it, in plain NumPy: what all else here must equal.

    X (n, d), rows of length 1; y (n,); W (m, d); signs (m,); shift and damping are numbers. Returns
    (f, G, g, W_next): outputs (n,) before the step, Gram matrix (n, n), dual step (n,) and weights
    (m, d) after it. Costs O(m n (n + d)) operations and about 2.3 n m numbers of memory, in the
    precision of X, which W and signs should have; g is solved for in float64. Nothing is checked,
    nothing is changed.
    """
    scale = X.dtype.type(len(W) ** -0.5)
    excess = X @ W.T  # (n, m)
    excess -= X.dtype.type(shift)
    active = (excess >= 0).astype(X.dtype)
    outputs = np.maximum(excess, 0, out=excess) @ signs * scale
    gram = (X @ X.T) * (active @ active.T) * scale**2
    system = gram.astype(float) + damping * np.eye(len(X))
    step = np.linalg.solve(system, (outputs - y).astype(float))
    # J^T g, whose row r is m^(-1/2) a_r times the sum of g_i x_i over the points r is active on
    active *= step.astype(X.dtype)[:, None]
    active *= signs * scale
    return outputs, gram, step, W - active.T @ X


# ==================================================================================================
# Problem: the threshold, the data, and the kernel of infinite width (Section 2)
# ==================================================================================================


def default_shift(width, alpha=0.04):
    """Threshold b = sqrt(0.5 (1 - alpha) ln width) of Theorem G.2, for 0 <= alpha < 1.

    A neuron is then active on a point with probability at most width^(-(1 - alpha) / 4), so that
    alpha = 0.04 leaves at most width^0.76 of them on average (Corollary A.11). Theorem G.2 itself
    asks for alpha > 0.
    """
    width = _check_integer("width", width, 1)
    alpha = _check_real("alpha", alpha, 0.0, 1.0)
    return math.sqrt(0.5 * (1.0 - alpha) * math.log(width))


@_quiet
def separability(X):
    """Separability of the rows of X (n, d): the least of |x_i - x_j| and |x_i + x_j| over i != j
    (Definition 2.11).

    Zero means that two points coincide or are opposite, and infinity that there is one point only.
    Takes O(n^2 d) operations and O(n d) memory.
    """
    X = _check_matrix("X", X)
    least = np.inf
    for i in range(1, len(X)):
        # From differences, since |x|^2 + |z|^2 - 2 <x, z> hides distances below 1e-8 in rounding.
        least = min(least, *(np.linalg.norm(X[:i] + a * X[i], axis=1).min() for a in (-1.0, 1.0)))
    return float(least)


@_quiet
def shifted_ntk(X, shift):
    """Shifted neural tangent kernel H (n, n) of Definition 2.10, the limit of G as m grows.

    H_ij = rho P(Z1 >= b, Z2 >= b), rho = <x_i, x_j>, for standard normal Z1 and Z2 of correlation
    rho; in closed form P = Phi(-b) - 2 T(b, sqrt((1 - rho) / (1 + rho))), T being Owen's function.
    Takes O(n^2 d) operations.

    X : (n, d), rows of length 1.  shift : the threshold b. Raises ValueError or TypeError.
    """
    X = _check_unit_rows(_check_matrix("X", X))
    shift = _check_real("shift", shift)
    X = X / np.linalg.norm(X, axis=1, keepdims=True)
    rho = X @ X.T
    # Rows that are equal, or opposite, up to a few rounding errors are so.
    rho = np.where(np.abs(rho) >= 1.0 - 8 * np.finfo(float).eps, np.sign(rho), rho)
    return rho * _both_fire(rho, shift)


def _both_fire(rho, shift):
    """P(Z1 >= b, Z2 >= b) for standard normal Z1 and Z2 of correlation rho."""
    with np.errstate(divide="ignore"):
        slope = np.sqrt((1.0 - rho) / (1.0 + rho))
    both = scipy.special.ndtr(-shift) - 2.0 * scipy.special.owens_t(shift, slope)
    return np.maximum(both, 0.0)


def smallest_ntk_eigenvalue(X, shift):
    """Smallest eigenvalue lambda of the shifted neural tangent kernel (Remark 2.8), a float.

    Zero in exact arithmetic if two rows coincide, and then a rounding error of either sign, up to
    about n 10^-16. Takes O(n^2 d + n^3) operations and O(n^2) memory.

    X : (n, d), rows of length 1.  shift : the threshold b. Raises ValueError or TypeError.
    """
    H = shifted_ntk(X, shift)
    return float(scipy.linalg.eigh(H, eigvals_only=True, subset_by_index=[0, 0])[0])


@_quiet
def ntk_eigenvalue_bounds(X, shift):
    """The interval (low, high) that Theorem 2.13 gives for lambda: exp(-b^2 / 2) delta / (100 n^2)
    and exp(-b^2 / 2), delta being the separability of the rows of X.

    The true lambda is never above P(Z >= b), the kernel's diagonal, which is at most half of
    `high`. Takes O(n^2 d) operations and O(n d) memory.

    X : (n, d), at least two rows of length 1.  shift : the threshold b >= 0. Raises ValueError or
    TypeError.
    """
    X = _check_unit_rows(_check_matrix("X", X))
    shift = _check_real("shift", shift, 0.0)
    if len(X) < 2:
        raise ValueError(
            "X must have at least 2 rows for a separability, got 1; "
            "a single point has lambda = P(Z >= shift)"
        )
    high = math.exp(-0.5 * shift * shift)
    return high * separability(X) / (100 * len(X) ** 2), high


def _kernel_from_table(XXt, table):
    """XXt times the table's function of sqrt(1 - XXt), by linear interpolation."""
    gaps = 1.0 - XXt
    places = np.sqrt(np.where(gaps > 2e-15, gaps, 0.0)) * ((table.size - 1) / math.sqrt(2.0))
    k = np.minimum(places.astype(int), table.size - 2)
    return XXt * (table[k] + (places - k) * np.diff(table)[k])


def _second_over_first(X, y, shift, width, regularisation):
    """Predicted length |J^T g| of the second Gauss-Newton step over that of the first. Where it is
    small training converges, since each step then only corrects the errors that flips in the step
    before have left.

    Outputs at the start count as 0; r is `regularisation`, (nu + mu) over P, and P = P(Z >= b).

    The first step solves (H + r P I) g = y. A neuron that fires on x_i fires on x_j with
    probability P(both) / P, and then moves <w, x_i> by m^(-1/2) g_j <x_i, x_j>, with its sign.
    These moves add up to a normal number s_i Z, s_i^2 = sum_j H_ij <x_i, x_j> g_j^2 / (m P). Of the
    m products on x_i, which have the density phi(b) at b, those cross b that are nearer than they
    move. A pair that crosses by t is wrong by t / sqrt(m), with either sign, which leaves an error
    e_i of variance phi(b) s_i^3 E|Z|^3 / 3. The squared lengths are near y^T g and
    e^T (H + r P I)^-1 e, of which the mean over a few e of random signs is taken. O(n^3).
    """
    n, XXt = len(X), X @ X.T
    # Owen's function for every entry would take longer than a step. P(both) is smooth in
    # sqrt(1 - rho).
    rho = np.maximum(1.0 - np.linspace(0.0, math.sqrt(2.0), 2049) ** 2, -1.0)
    H = _kernel_from_table(XXt, _both_fire(rho, shift))
    fires = scipy.special.ndtr(-shift)
    squares = np.multiply(XXt, H, out=XXt)
    H.ravel()[:: n + 1] += max(regularisation, 1e-7) * fires
    triangle, failed = dpotrf(H.T, lower=False, clean=False, overwrite_a=True)
    if failed:
        return np.inf
    step, _ = dpotrs(triangle, y, lower=False)
    moves = np.sqrt(np.maximum(squares @ step**2, 0.0) / (width * fires))
    density = math.exp(-0.5 * shift * shift) / math.sqrt(2.0 * math.pi)
    deviations = np.sqrt(density * 0.532 * moves**3)  # 0.532 is E|Z|^3 / 3
    errors = deviations[:, None] * np.random.default_rng(0).choice((-1.0, 1.0), (n, 32))
    mended, _ = dpotrs(triangle, errors, lower=False)
    return math.sqrt(max(np.sum(errors * mended) / 32.0, 0.0) / max(y @ step, 1e-300))


# shift="auto" wants that ratio to be at most RATIO. It is computed at the paper's b, from SAMPLED
# points at most, and carried over to others: on real data of all kinds its logarithm grows with b
# like GROWTH b^2, down to b = LOWEST, below which it hardly falls while neurons fire on ever more
# points. With the width it falls like m^(-3/4), by the formula.
RATIO, GROWTH, LOWEST, SAMPLED = 0.08, 0.42, 1.0, 1024


def _shift_for(X, y, width, highest, regularisation):
    """(b, ratio at `highest`, ratio at b), ratios as _second_over_first predicts them. b is the
    largest from LOWEST to `highest` whose ratio is at most RATIO; LOWEST if there is none; and
    `highest` if that is below LOWEST."""
    if len(X) <= SAMPLED:
        ratio = _second_over_first(X, y, highest, width, regularisation)
    else:  # the ratio grows like a power of n, from 0 to 1, that two samples tell
        some, ratios = np.random.default_rng(0).permutation(len(X))[:SAMPLED], []
        for few in (some[: SAMPLED // 2], some):
            part = y[few] * math.sqrt(np.mean(y**2) / (np.mean(y[few] ** 2) or 1.0))
            ratios.append(_second_over_first(X[few], part, highest, width, regularisation))
        half, ratio = ratios
        if 0.0 < half < ratio < np.inf:
            ratio *= (len(X) / SAMPLED) ** min(math.log2(ratio / half), 1.0)
    if highest <= LOWEST or ratio <= RATIO:
        return highest, ratio, ratio
    shift = math.sqrt(max(highest**2 - math.log(ratio / RATIO) / GROWTH, LOWEST**2))
    return shift, ratio, ratio * math.exp(GROWTH * (shift**2 - highest**2))


def _regression_tolerance(X, shift):
    """Relative tolerance sqrt(lambda / n) / 6 of Algorithm 5, line 30. Rounding can leave lambda at
    or below zero where points coincide."""
    eigenvalue = smallest_ntk_eigenvalue(X, shift)
    return np.sqrt(max(eigenvalue / len(X), np.finfo(float).eps)) / 6.0


# ==================================================================================================
# Random numbers, each of which can be made again from its name
# ==================================================================================================
#
# A stream of numbers is named by a seed, the number of a block, and what the numbers are for, one
# of the constants below. Philox [SMDS11] turns that and a counter into four words of 32 bits,
# without any state, so that threads and machines can make any part of any stream, in any order, to
# the same bits.

LANES = 64  # counters that are turned into words side by side, in vector registers

# There are 64 bits of seed, 64 of block, 8 of stream and 56 of counter. Blocks are of BLOCK neurons
# for VECTORS, SIGNS and DEAD_VECTORS, of block_size for the others. The highest 24 bits of the
# block are the stage: which of the fits that brought new points this is (see Live twins only). The
# highest 24 of the counter are the attempt, where numbers are drawn until they fit.

VECTORS = 0  # starting vectors, if all are drawn
SIGNS = 1  # output signs, with init="gaussian"
PROPOSALS, LIVE_VECTORS = 2, 3  # which twins are proposed, and their vectors
AGAIN = 4  # vectors of twins whose proposal contradicts what is known
DEAD_VECTORS = 5  # vectors of neurons that fire nowhere
TAILS = 128  # the words of stream + TAILS extend those of a stream where 32 bits end

# No normal number from here is larger in size: sqrt(-2 ln 2^-65).
LARGEST_NORMAL = 9.5


@njit(nogil=True)
def _words(seed, block, stream, first, words):
    """Philox4x32-10 of the counters first, ..., first + LANES - 1: words (4, LANES) uint32."""
    mask, half = np.uint32(0xFFFFFFFF), np.uint64(32)
    for lane in range(LANES):
        counter = np.uint64(first) + np.uint64(lane)
        a, b = np.uint32(counter), np.uint32(stream) | np.uint32(counter >> half) << np.uint32(8)
        c, d = np.uint32(block), np.uint32(block >> half)
        key, other_key = np.uint32(seed), np.uint32(seed >> half)
        for _ in range(10):
            one, other = np.uint64(a) * np.uint64(0xD2511F53), np.uint64(c) * np.uint64(0xCD9E8D57)
            a, b = np.uint32(other >> half) ^ np.uint32(b) ^ key, np.uint32(other) & mask
            c, d = np.uint32(one >> half) ^ np.uint32(d) ^ other_key, np.uint32(one) & mask
            key, other_key = np.uint32(key + 0x9E3779B9), np.uint32(other_key + 0xBB67AE85)
        words[0, lane], words[1, lane], words[2, lane], words[3, lane] = a, b, c, d


@njit(inline="always")
def _minus_2_log(u):
    """-2 ln u for a positive float32 u < 1, to a few rounding errors: u is 2^k times a number f
    near 1, and ln f = 2 artanh((f - 1) / (f + 1)) a short series."""
    one, bits = np.float32(1), np.float32(u).view(np.uint32)
    k = np.float32(np.int32(bits >> np.uint32(23)) - np.int32(127))
    f = np.uint32((bits & np.uint32(0x7FFFFF)) | np.uint32(0x3F800000)).view(np.float32)
    above = f > np.float32(1.4142135)
    f *= np.float32(0.5) if above else one
    k += one if above else np.float32(0)
    z = (f - one) / (f + one)
    zz = z * z
    series = np.float32(1 / 5) + zz * (np.float32(1 / 7) + zz * np.float32(1 / 9))
    series = one + zz * (np.float32(1 / 3) + zz * series)
    return np.float32(-2) * (np.float32(2) * z * series + k * np.float32(0.6931471805599453))


@njit(nogil=True, error_model="numpy")
def _uniform_radii(high, low, uniform):
    """uniform[lane] = a number in (0, 1) of 40 bits, 32 of `high` and the lowest 8 of `low`;
    returns in how many lanes `high` is 0."""
    half, zeros = np.float32(0.5), np.uint32(0)
    for lane in range(LANES):
        last = (np.float32(np.int32(low[lane] & np.uint32(255))) + half) * np.float32(1 / 256)
        uniform[lane] = (np.float32(high[lane]) + last) * np.float32(0.99999994 / 2**32)
        zeros += np.uint32(1) if high[lane] == 0 else np.uint32(0)
    return zeros


@njit(nogil=True, error_model="numpy")
def _box_muller(uniform, turns, cosines, sines):
    """Two normal numbers for each lane: a radius sqrt(-2 ln u), u being uniform, times the cosine
    and the sine of an angle, of which `turns` has 24 bits: the quadrant, and the place in it."""
    one, half = np.float32(1), np.float32(0.5)
    for lane in range(LANES):
        radius, angle = np.sqrt(_minus_2_log(uniform[lane])), np.uint32(turns[lane] >> np.uint32(8))
        quadrant = np.uint32(angle >> np.uint32(22))
        x = np.float32(np.int32(angle & np.uint32(0x3FFFFF))) + half
        x = (x * np.float32(1 / 2**22) - half) * np.float32(np.pi / 2)  # from -pi / 4 to pi / 4
        xx = x * x
        sine = np.float32(1 / 120) - xx * np.float32(1 / 5040)
        sine = x * (one + xx * (np.float32(-1 / 6) + xx * sine))
        cosine = np.float32(1 / 24) + xx * (np.float32(-1 / 720) + xx * np.float32(1 / 40320))
        cosine = one + xx * (np.float32(-1 / 2) + xx * cosine)
        odd = (quadrant & np.uint32(1)) == np.uint32(1)
        across, up = sine if odd else cosine, cosine if odd else sine
        turned = one - np.float32(np.int32((quadrant + np.uint32(1)) & np.uint32(2)))
        raised = one - np.float32(np.int32(quadrant & np.uint32(2)))
        cosines[lane] = radius * (np.float32(across) * turned)
        sines[lane] = radius * (np.float32(up) * raised)


@njit(nogil=True)
def _normals(seed, block, stream, first, out):
    """Fills out, float32, with standard normal numbers of a stream, from number 4 `first` on;
    `first` is a multiple of LANES."""
    words, more = np.empty((4, LANES), np.uint32), np.empty((4, LANES), np.uint32)
    uniform, last = np.empty(LANES, np.float32), np.empty(4 * LANES, np.float32)
    for low in range(0, out.size, 4 * LANES):
        whole = low + 4 * LANES <= out.size
        some = out[low : low + 4 * LANES] if whole else last
        _words(seed, block, stream, first + low // 4, words)
        for half in range(0, 4, 2):
            if _uniform_radii(words[half], words[half + 1], uniform):
                # Once in 2^26 times. Without it no number would be larger than 7.6.
                _words(seed, block, stream + TAILS, first + low // 4, more)
                for lane in np.flatnonzero(words[half] == 0):
                    uniform[lane] = (np.float32(more[half, lane]) + 0.5) / 2.0**64
            numbers = some[half * LANES : (half + 2) * LANES]
            _box_muller(uniform, words[half + 1], numbers[:LANES], numbers[LANES:])
        if not whole:
            out[low:] = last[: out.size - low]


@njit(nogil=True)
def _uniforms(seed, block, stream, out):
    """Fills out, float64, with the first uniform numbers of a stream, which are in (0, 1)."""
    words = np.empty((4, LANES), np.uint32)
    for low in range(0, out.size, 2 * LANES):
        _words(seed, block, stream, low // 2, words)
        for e in range(min(2 * LANES, out.size - low)):
            half, lane = 2 * (e // LANES), e % LANES
            bits = np.uint64(words[half, lane]) << np.uint64(32) | np.uint64(words[half + 1, lane])
            out[low + e] = (np.float64(bits >> np.uint64(12)) + 0.5) / 2.0**52


# ==================================================================================================
# Starting weights
# ==================================================================================================

# Vectors are drawn for BLOCK neurons together, 2 MB at d = 32, which stay in cache until used. A
# block, which one rank holds and in which live twins are drawn, is one or several of these: see
# block_size. _Start.block, signs, groups and blocks go by BLOCK neurons, _LiveBlocks by blocks.
BLOCK = 1 << 14


def _normal_vectors(name, stream, shape, attempt=0):
    """Normal vectors, float32, of a stream; `name` is the pair (seed, number of the block)."""
    vectors = np.empty(shape, np.float32)
    _normals(*name, stream, attempt << 32, vectors.ravel())
    return vectors


@njit(nogil=True)
def _float32_rounding(d):
    """No product of a starting vector with a point, in float32, is further than this from what it
    is in float64. Half of it would do for vectors as long as LARGEST_NORMAL sqrt(d)."""
    return (d + 4) * 2.0**-23 * LARGEST_NORMAL * math.sqrt(d)


def _longest(vectors):
    """At least as large as the length of any of the vectors (k, d)."""
    entries = max(vectors.max(initial=0.0), -vectors.min(initial=0.0))
    return float(entries) * math.sqrt(vectors.shape[1])


def _in_order(numbers, *arrays):
    """Numbers of neurons, ascending, and arrays with an entry for each, in that order."""
    order = np.argsort(numbers)
    return [array[order] for array in (numbers, *arrays)]


def _stretches(parts, size):
    """Slices of a list, each of entries with the same number in `parts`, `size` long at most."""
    ends = np.flatnonzero(np.diff(parts)) + 1
    wholes = pairwise([0, *ends.tolist(), parts.size])
    lows = ((low, end) for first, end in wholes for low in range(first, end, size))
    return [slice(low, min(low + size, end)) for low, end in lows]


def _to_nobody(share):
    """A report that nobody reads."""


class _Start(NamedTuple):
    """The weights before training, which are drawn again whenever they are asked for.

    With init="antisymmetric" the neurons 2 k and 2 k + 1 share a vector and have signs +1 and -1,
    so that f = 0 at the start: they are twins. Without a law every vector is drawn from N(0, I). A
    law is the points on which vectors were tested; under it live twins are drawn first, from
    N(0, I) given that they fire on one of these points (see Live twins only), and dead ones, given
    that they fire on none, where somebody asks for them.
    """

    seed: int
    width: int
    d: int
    init: str
    ranks: "_Ranks"  # the processes that share the neurons
    law: "_Law | None" = None

    @property
    def copies(self):
        """How many neurons share a vector."""
        return 2 if self.init == "antisymmetric" else 1

    @property
    def block_size(self):
        """How many neurons make a block; block k is that of the rank k mod the number of ranks."""
        return BLOCK if self.law is None else 2 * self.law.twins(self.width)

    @property
    def draws_live(self):
        """Whether live twins are drawn without the others."""
        return self.law is not None and not self.law.seen

    @property
    def longest(self):
        """At least as large as the length of any of these vectors."""
        return 4.0 * LARGEST_NORMAL * math.sqrt(self.d)  # of a live one: see _bend

    @property
    def own_width(self):
        """How many of the neurons are this rank's, or nearly."""
        blocks = self.ranks.own_blocks(-(-self.width // self.block_size))
        return min(len(blocks) * self.block_size, self.width)

    def owns(self, neurons):
        """Which of some neurons are this rank's."""
        return neurons // self.block_size % self.ranks.size == self.ranks.rank

    def signs(self, number):
        """Signs (int8) of the neurons from number * BLOCK on."""
        count = min(BLOCK, self.width - number * BLOCK)
        if self.init == "antisymmetric":
            return np.tile(np.array([1, -1], np.int8), count // 2)
        uniform = np.empty(count)
        _uniforms(np.uint64(self.seed), np.uint64(number), SIGNS, uniform)
        return np.where(uniform < 0.5, np.int8(-1), np.int8(1))

    def all_signs(self):
        """Signs of all neurons (m,) int8."""
        _check_memory(f"signs of {self.width} neurons", 2 * self.width)
        return np.concatenate([self.signs(number) for number in range(-(-self.width // BLOCK))])

    def block(self, number, live):
        """Vectors (float32) and signs of the BLOCK neurons from number * BLOCK on. Under a law
        these are dead neurons: vectors of those in `live`, the ascending numbers of this rank's
        live neurons, are zeros."""
        first, signs = number * BLOCK, self.signs(number)
        name, shape = (np.uint64(self.seed), np.uint64(number)), (signs.size // self.copies, self.d)
        if self.law is None:
            return _normal_vectors(name, VECTORS, shape), signs
        low, high = np.searchsorted(live, (first, first + signs.size))
        vectors, left, attempt = np.zeros(shape, np.float32), np.ones(shape[0], bool), 0
        left[(live[low:high] - first) // 2] = False
        while left.any():  # normal numbers until they fire nowhere
            vectors[left] = _normal_vectors(name, DEAD_VECTORS, shape, attempt)[left]
            _, firsts = self.law.first_firing(vectors[left])
            left[left] = firsts < len(self.law.points)
            attempt += 1
        return vectors, signs

    def groups(self, work, live, report=_to_nobody):
        """work(first neuron, vectors, signs) of every BLOCK of this rank's neurons, in groups as
        _in_groups yields them."""
        count = -(-self.width // BLOCK)
        own = (k for k in range(count) if self.owns(k * BLOCK))

        def of_block(number):
            return work(number * BLOCK, *self.block(number, live))

        return _in_groups(of_block, own, count / self.ranks.size, BLOCK * self.d, report)

    def blocks(self, work, live, report=_to_nobody):
        """The same one by one, with a row of weights for each neuron, also where two share
        one."""

        def of_each(first, vectors, signs):
            return work(first, np.repeat(vectors, self.copies, axis=0), signs)

        return _one_by_one(self.groups(of_each, live, report))

    def shown(self):
        """This start once somebody has seen weights of dead neurons. Under a law these are fixed
        from then on: a fit on other points may wake them, but not draw them anew."""
        return self._replace(law=self.law._replace(seen=True))


def _one_by_one(groups):
    """What groups, as _in_groups yields them, have of each block."""
    return (block for _, blocks in groups for block in blocks)


def _in_groups(of_block, blocks, count, size, report):
    """Yields (share done, [of_block(k), ...]) for groups of the blocks k, made by threads. `count`
    is how many there are, or nearly, for the share that is done, which `report` is told; `size` is
    how many numbers a block has.

    BLAS is held to one thread, so that blocks share the cores evenly and bits do not vary.
    """
    blocks, done = iter(blocks), 0
    while some := list(islice(blocks, 8 * numba.get_num_threads())):
        with _one_blas_thread():
            made = _map_in_threads(of_block, some, len(some) * size)
        done += len(some)
        _raise_interrupt()
        yield min(done / count, 1.0), made
        report(min(done / count, 1.0))


# --------------------------------------------------------------------------------------------------
# Live twins only
# --------------------------------------------------------------------------------------------------
#
# Of antisymmetric twins only those matter whose vector fires on some training point: the others
# cancel, and never move. Twins are live independently of others, and the vector of live ones has
# the law of N(0, I) given max_i <w, x_i> >= b. It is drawn without the others:
#
#     twins get a *proposal* with probability rate = n phi(b) / b, a little above n P(Z >= b);
#     the gaps between those that do are geometric;
#     a proposal is a uniform point x_i and z = sqrt(b^2 + 2 E), E exponential, which is refused
#     with probability 1 - b / z: a normal number beyond b (Marsaglia's tail);
#     its vector is w = g + (z - <g, x_i>) x_i, g ~ N(0, I), whose product with x_i is z;
#     it is the twins' vector, and they are live, if x_i is the *first* point that w fires on.
#
# Every live vector can come from each of the points that it fires on, with its own density; the
# last line lets one of them count. So n proposals of probability P(Z >= b) each add up to the
# probability that max_i <w, x_i> >= b, and to the law. O(rate m n d), nothing of size m.
#
# In float32 the products of w are off by rounding. So z begins a little below b, and whether w
# fires is decided by its products in float64, after rounding.
#
# Points that a later fit adds are treated alike, given what is known: twins not known to be live
# fire on no point seen before. Proposals are made for the points seen and the new ones, in this
# order. Twins whose first point is new are newly live; where the first point is not new, the
# proposal contradicts what is known, and normal numbers are drawn until they do not.

# Live twins are drawn in blocks of about so many proposals.
PROPOSED = 1 << 13

NOBODY = np.zeros(0, np.int64)

# Where the rate is higher all twins are drawn: proposals take as long as they, and more.
HIGHEST_RATE = 0.75


class _Law(NamedTuple):
    """The points on which starting vectors were tested, in the order of the fits that brought them,
    and the threshold."""

    stages: tuple  # of (n_s, d) arrays
    shift: float
    # Whether weights of dead neurons were shown: then no points are added any more.
    seen: bool = False

    @property
    def points(self):
        return np.concatenate(self.stages)

    @property
    def tail(self):
        """Where normal numbers of proposals begin: a vector bent to a smaller product with a point
        does not fire on it. One rounding is for bending, one for the product."""
        return self.shift - 2.0 * _float32_rounding(self.stages[0].shape[1])

    @property
    def rate(self):
        """Proposals for twins, n phi(t) / t for the tail t: a probability where it is below 1."""
        t = self.tail
        if t <= 0:
            return math.inf
        return len(self.points) * math.exp(-0.5 * t * t) / (t * math.sqrt(2.0 * math.pi))

    def twins(self, width):
        """How many twins a block has, a multiple of BLOCK / 2."""
        proposed = int(min(PROPOSED / max(self.rate, 1e-300), width // 2))
        return BLOCK // 2 * max(1, proposed // (BLOCK // 2))

    def first_firing(self, vectors, limits=None):
        """The products (k, n), float32, of vectors (k, d) with all points; and for each vector the
        first point below limits[k], n without limits, on which it fires, or limits[k] if it fires
        on none."""
        X, shift = self.points, self.shift
        products = vectors @ X.T.astype(np.float32)
        limits = np.full(len(vectors), len(X)) if limits is None else limits
        rounding = _float32_rounding(X.shape[1])
        return products, _first_firing(products, vectors, limits, X, shift, rounding)

    def with_points(self, X):
        """This law after a fit on points X, of which those not seen before are added."""
        seen = {row.tobytes() for row in self.points}
        new = np.array([row.tobytes() not in seen for row in X])
        return self._replace(stages=(*self.stages, X[new])) if new.any() else self


@njit(nogil=True, fastmath=FAST)
def _first_firing(products, vectors, limits, X, shift, rounding):
    """For each vector the first of the points 0, ..., limits[k] - 1 on which it fires, or limits[k]
    if there is none. Its float32 products may be off by `rounding`; it is decided in float64."""
    first = limits.copy()
    least, sure = np.float32(shift - rounding), np.float32(shift + rounding)
    w, one, zero = np.empty(X.shape[1]), np.float32(1), np.float32(0)
    for k in range(len(products)):
        row, last, near = products[k, : limits[k]], limits[k] - 1, zero
        for i in range(last):
            near += one if row[i] >= least else zero
        if near == zero and last >= 0 and row[last] >= sure:
            first[k] = last  # as for most proposals
        elif near > zero or (last >= 0 and row[last] >= least):
            w[:] = vectors[k]
            for i in range(row.size):
                if row[i] >= least and (row[i] >= sure or _dot(w, X[i]) >= shift):
                    first[k] = i
                    break
    return first


@njit(nogil=True, error_model="numpy")
def _proposals(seed, block, twins, rate, tail, n, room):
    """Proposals for the twins 0, ..., twins - 1 of a block, of probability `rate` each: (twins,
    points, products with them), the products being normal numbers beyond `tail`. None if there are
    more than `room`."""
    found, points, lengths = np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room)
    uniform = np.empty((room, 4))
    _uniforms(seed, block, PROPOSALS, uniform.ravel())
    place, k, scale = -1.0, 0, 1.0 / np.log1p(-rate)
    for p in range(room):
        place += 1.0 + np.floor(np.log(uniform[p, 0]) * scale)
        if place >= twins:
            return found[:k], points[:k], lengths[:k]
        length = np.sqrt(tail * tail - 2.0 * np.log(uniform[p, 2]))
        if uniform[p, 3] * length <= tail:
            found[k], points[k], lengths[k] = np.int64(place), np.int64(uniform[p, 1] * n), length
            k += 1
    return None


@njit(nogil=True)  # no fastmath: vectors are the same on every machine
def _bend(vectors, points, lengths, X):
    """Gives vector k the product lengths[k] with the unit vector X[points[k]], in float32."""
    for k in range(len(vectors)):
        i, product = points[k], np.float32(0)
        for z in range(X.shape[1]):
            product += vectors[k, z] * X[i, z]
        lack = np.float32(lengths[k] - product)
        for z in range(X.shape[1]):
            vectors[k, z] += lack * X[i, z]


@njit(nogil=True)
def _move_up(kept, vectors, products):
    """Moves the rows that are kept to the front; returns how many they are."""
    count = 0
    for k in range(kept.size):
        if kept[k]:
            if count < k:
                vectors[count], products[count] = vectors[k], products[k]
            count += 1
    return count


class _LiveBlocks:
    """The twins that fire on points of the law's last stage and on none before, block by block.
    `known`: ascending numbers of the live neurons of earlier stages, in which both twins occur."""

    def __init__(self, start, known):
        law = start.law
        self._start, self._law, self._known = start, law, known[::2] // 2
        self._old = sum(map(len, law.stages[:-1]))  # points that the known twins were tested on
        self._X32 = law.points.astype(np.float32)
        self._tail, self._rate, self._size = law.tail, law.rate, law.twins(start.width)
        self.count = -(-start.width // (2 * self._size))

    def block(self, number):
        """Twins (k,), ascending, their vectors (k, d), and the products of these with all points
        (k, n) in float32."""
        first = number * self._size
        size = min(self._size, self._start.width // 2 - first)
        stage = len(self._law.stages) - 1
        name = np.uint64(self._start.seed), np.uint64(number | stage << 40)
        low, high = np.searchsorted(self._known, (first, first + size))
        known = self._known[low:high] - first
        if self._rate > HIGHEST_RATE:  # in a later stage only: all that are not known, drawn again
            n, d = self._X32.shape
            live = NOBODY, np.zeros((0, d), np.float32), np.zeros((0, n), np.float32)
            again = np.setdiff1d(np.arange(size), known)
        else:
            live, again = self._proposed(name, size, known)
        if again.size:
            both = zip(live, self._woken(name, again), strict=True)
            live = _in_order(*map(np.concatenate, both))
        twins, vectors, products = live
        return first + twins, vectors, products

    def _proposed(self, name, size, known):
        """Of the twins 0, ..., size - 1 of a block those that a proposal makes live, as block() has
        them; and those whose proposal contradicts what is known."""
        expected, (n, d) = size * self._rate, self._X32.shape
        room, proposals = int(expected + 8 * np.sqrt(expected) + 64), None
        while proposals is None:
            proposals = _proposals(*name, size, self._rate, self._tail, n, room)
            room *= 2
        unknown = ~np.isin(proposals[0], known)
        twins, owners, lengths = (array[unknown] for array in proposals)
        vectors = _normal_vectors(name, LIVE_VECTORS, (twins.size, d))
        _bend(vectors, owners, lengths, self._X32)
        products, firsts = self._law.first_firing(vectors, owners + 1)
        again = twins[(firsts == owners) & (owners < self._old)]
        is_live = (firsts == owners) & (owners >= self._old)
        count = _move_up(is_live, vectors, products)
        return (twins[is_live], vectors[:count], products[:count]), again

    def _woken(self, name, twins):
        """Of twins that get normal numbers until they fire on no old point, those that fire on a
        new one, with vectors and products."""
        woken, attempt, (n, d) = [], 0, self._X32.shape
        while twins.size:
            vectors = _normal_vectors(name, AGAIN, (twins.size, d), attempt)
            products, firsts = self._law.first_firing(vectors)
            found = (firsts >= self._old) & (firsts < n)
            woken.append((twins[found], vectors[found], products[found]))
            twins, attempt = twins[firsts < self._old], attempt + 1
        return map(np.concatenate, zip(*woken, strict=True))

    def groups(self, work, report):
        """work(twins, vectors, products) of every block of this rank, in groups as _in_groups
        yields them."""
        blocks, size = self._start.ranks.own_blocks(self.count), PROPOSED * self._start.d
        return _in_groups(lambda k: work(*self.block(k)), blocks, len(blocks), size, report)


def _seed(random_state):
    """64-bit seed from what scikit-learn accepts, or from a Generator."""
    if random_state is None or isinstance(random_state, np.random.Generator):
        return int(np.random.default_rng(random_state).integers(1 << 63))
    if random_state is np.random:  # NumPy's own global state
        random_state = np.random.mtrand._rand
    if isinstance(random_state, np.random.RandomState):
        return int(random_state.randint(1 << 31))
    seed = _check_integer("random_state", random_state, 0)
    if seed >= 1 << 64:
        raise ValueError(f"random_state must be below 2^64, got {seed}")
    return seed


# ==================================================================================================
# Trees (Algorithms 2-4, Theorem B.1)
# ==================================================================================================
#
# The n trees have the same shape, so one array `rows` holds them all: a row is one node of every
# tree, and its entry i belongs to the tree of x_i. Level 0 holds the leaves, row r being
# (<w_r, x_1>, ..., <w_r, x_n>); row j of the next level is the elementwise maximum of rows
# FAN_OUT j, ..., FAN_OUT j + FAN_OUT - 1. Every level is padded with -inf to whole groups of
# FAN_OUT siblings, and the level that is a single group is the top one. With a fan-out of 2,
# m = 5 and n = 2:
#
#     levels = (0, 6, 10, 12)
#     rows 10-11     [3 8]                   [7 1]              the group looked at first
#     rows  6-9      [2 8]       [3 1]       [7 1]       [--]   [--] is padding, -inf
#     rows  0-5      [2 0] [1 8] [3 1] [0 0] [7 1] [--]         leaves: neurons 0 to 4
#
# With all trees in a row, maxima and comparisons are whole vectors and neurons come out in order; a
# query of a single tree pays for it by touching a cache line for every sibling. A binary tree would
# hold 2 n m numbers, with 16 children a node it is 1.07 n m.

FAN_OUT = 16


class ActiveSets(NamedTuple):
    """Active pairs by neuron: neuron neurons[q] is active on points[offsets[q]:offsets[q + 1]],
    both in ascending order.

    Neurons that are active on no point are left out, so `neurons` is the set K of the paper.
    """

    neurons: np.ndarray  # (|K|,) int64
    offsets: np.ndarray  # (|K| + 1,) int64
    points: np.ndarray  # (nnz,) int64


def _levels(leaves):
    """First row of each level, then the number of rows."""
    levels, groups = [0], leaves
    while groups > 1 or len(levels) == 1:
        groups = -(-groups // FAN_OUT)
        levels.append(levels[-1] + groups * FAN_OUT)
    return np.array(levels)


@njit(nogil=True)
def _set_maximum(rows, first_child, parent):
    """rows[parent] = the maximum of the FAN_OUT rows from first_child on."""
    largest_row, children = rows[parent], rows[first_child : first_child + FAN_OUT]
    for i in range(largest_row.size):  # the loop over siblings inside is unrolled
        largest = children[0, i]
        for k in range(1, FAN_OUT):
            largest = children[k, i] if children[k, i] > largest else largest
        largest_row[i] = largest


@njit(nogil=True)
def _mend(rows, first_child, first_parent, parents, low, high):
    """Recomputes the maxima of the parents low, ..., high - 1 of those given, of one level.
    O(n FAN_OUT) each."""
    for q in range(low, high):
        _set_maximum(rows, first_child + parents[q] * FAN_OUT, first_parent + parents[q])


def _parents(nodes):
    """Distinct parents of ascending nodes, and where the children of each start among them."""
    parents = nodes // FAN_OUT
    starts = np.flatnonzero(np.diff(parents, prepend=-1))
    return parents[starts], np.append(starts, nodes.size)


def _mend_ancestors(rows, levels, nodes, level=0):
    """Mends every ancestor of the given nodes (ascending) of a level, once; returns how many tree
    nodes were touched."""
    touched = 0
    for first_child, first_parent in zip(levels[level:-2], levels[level + 1 : -1], strict=True):
        nodes, _ = _parents(nodes)
        work = nodes.size * (FAN_OUT + 1) * rows.shape[1]
        _over_items(_mend, nodes.size, work, rows, first_child, first_parent, nodes)
        touched += work
    return touched


@njit(nogil=True, fastmath=FAST)
def _count_reaching(rows, first, groups, tau, counts, low, high):
    """counts of the points i with rows[r, i] >= tau, for every row r of the groups of siblings
    low, ..., high - 1 of those given."""
    one, zero = rows.dtype.type(1), rows.dtype.type(0)  # of the rows' type, for full vectors
    for q in range(low, high):
        for k in range(FAN_OUT):
            row, count = rows[first + groups[q] * FAN_OUT + k], zero
            for i in range(row.size):
                count += one if row[i] >= tau else zero
            counts[q * FAN_OUT + k] = np.int64(count)


@njit(nogil=True, fastmath=FAST)
def _collect_leaves(rows, neurons, offsets, tau, points, values, low, high):
    """Points on which the leaves of the neurons low, ..., high - 1 of those given reach tau, and
    the leaves' values there."""
    for q in range(low, high):
        row, e, i = rows[neurons[q]], offsets[q], 0
        while e < offsets[q + 1]:
            if row[i] >= tau:
                points[e], values[e] = i, row[i]
                e += 1
            i += 1


def _least_at_or_above(tau, dtype):
    """The least number of a precision that is >= tau and above -inf, so that comparing with it is
    comparing with tau; inf if tau is above all finite ones.

    Not -inf, because padding is -inf and must never be reported.
    """
    with np.errstate(over="ignore"):
        least = np.maximum(dtype.type(tau), np.finfo(dtype).min)
        return np.nextafter(least, dtype.type(np.inf)) if float(least) < float(tau) else least


def _query(rows, levels, tau):
    """Algorithm 4 for all trees at once, or those of some columns of `rows`: descend from the top
    into every group that reaches tau.

    Returns the active sets; the products of the active pairs; the number of nodes touched, for one
    tree at most FAN_OUT x levels x max(1, leaves reported); and the number of leaf rows compared,
    with padding. Given levels of height one it compares every leaf.
    """
    tau, n = _least_at_or_above(tau, rows.dtype), rows.shape[1]
    groups = np.arange((levels[-1] - levels[-2]) // FAN_OUT)
    touched = 0
    for first in levels[-2::-1]:
        counts = np.empty(groups.size * FAN_OUT, np.int64)
        where = rows, first, groups, tau, counts
        _over_items(_count_reaching, groups.size, counts.size * n, *where)
        touched += counts.size * n
        reached = np.flatnonzero(counts)
        groups = groups[reached // FAN_OUT] * FAN_OUT + reached % FAN_OUT
    neurons, offsets = groups, np.append(0, np.cumsum(counts[reached]))
    points, values = np.empty(offsets[-1], np.int64), np.empty(offsets[-1], rows.dtype)
    where = rows, neurons, offsets, tau, points, values
    _over_items(_collect_leaves, neurons.size, neurons.size * n, *where)
    return ActiveSets(neurons, offsets, points), values, touched, counts.size


def _transposed(indptr, indices, columns):
    """The transpose, in CSR too, of a matrix of so many columns in CSR whose entries are 0 or 1."""
    ones = np.ones(indices.size, bool)
    by_column = scipy.sparse.csr_matrix((ones, indices, indptr), (indptr.size - 1, columns)).tocsc()
    return by_column.indptr.astype(np.int64), by_column.indices.astype(np.int64)


def _by_point(active, n):
    """The pairs of ActiveSets by point: (indptr, indices), the neurons active on point i being
    indices[indptr[i]:indptr[i + 1]]."""
    indptr, slots = _transposed(active.offsets, active.points, n)
    return indptr, active.neurons[slots]


class MaxTrees:
    """For each of n points, a tree of maxima over its products with m weight vectors (Theorem B.1).

    Parameters
    ----------
    X : (n, d) data points.
    W : (m, d) weight vectors, copied.

    Products are kept in float32 if X and W both are, else in float64. Building takes O(n m d);
    memory is (1 + 1/15) n m products, and W. Raises ValueError, TypeError, IndexError or
    MemoryError on bad input.

    Attributes
    ----------
    X, W : the points, and the weight vectors as they are now.
    touched : int, tree nodes read or written since the beginning; one product or maximum of one
        tree is one node.
    """

    @_quiet
    def __init__(self, X, W):
        X = _check_matrix("X", X, keep_float32=True)
        W = _check_matrix("W", W, keep_float32=True)
        if W.shape[1] != X.shape[1]:
            raise ValueError(f"W has {W.shape[1]} columns and X has {X.shape[1]}; they must agree")
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

    @_quiet
    def query(self, i, tau):
        """Algorithm 4: ascending int64 indices j with <w_j, x_i> >= tau, k of them, in
        O((1 + k) log m)."""
        i = _check_index("i", i, len(self.X))
        column = self._rows[:, i : i + 1]
        active, _, touched, _ = _query(column, self._levels, _check_threshold(tau))
        self.touched += touched
        return active.neurons

    @_quiet
    def query_all(self, tau):
        """All n queries in one descent: (indptr, indices), the answer for x_i being
        indices[indptr[i]:indptr[i + 1]].

        A group of siblings is read for all points as soon as one of them reaches tau there:
        O(n (1 + |K|) log m) for the set K of reported neurons.
        """
        active, _, touched, _ = _query(self._rows, self._levels, _check_threshold(tau))
        self.touched += touched
        return _by_point(active, len(self.X))

    def update(self, j, w):
        """Algorithm 3: replaces w_j by w (d,) in O(n (d + log m))."""
        w = _check_vector("w", w, size=self.X.shape[1], reason="one for each column of X")
        self.update_many([_check_index("j", j, len(self.W))], w[None])

    @_quiet
    def update_many(self, js, W_new):
        """Replaces the k weight vectors with the distinct indices js (k,) by the rows of W_new
        (k, d).

        Every ancestor is recomputed once: O(k n (d + log m)), less where paths meet.
        """
        js = _check_indices("js", js, len(self.W))
        W_new, d = _check_matrix("W_new", W_new), self.W.shape[1]
        if W_new.shape != (js.size, d):
            raise ValueError(
                f"W_new must have {js.size} rows, one for each of js, and {d} columns, as X has; "
                f"got shape {W_new.shape}"
            )
        cast = W_new.astype(self.W.dtype)
        if not np.isfinite(cast).all():
            raise ValueError(
                f"W_new has entries beyond the range of {cast.dtype}, up to "
                f"{np.abs(W_new).max():g}; use float64 trees"
            )
        order = np.argsort(js)
        js = js[order]
        self.W[js] = cast[order]
        self._rows[js] = self.W[js] @ self.X.T
        mended = _mend_ancestors(self._rows, self._levels, js)
        self.touched += js.size * len(self.X) + mended

    @_quiet
    def check(self):
        """Asserts every invariant: leaves are products, inner nodes maxima of their children,
        padding -inf."""
        m, levels = len(self.W), self._levels
        tolerance = 4 * self.X.shape[1] * np.finfo(self.X.dtype).eps
        scale = np.linalg.norm(self.W, axis=1)[:, None] * np.linalg.norm(self.X, axis=1)
        error = np.abs(self._rows[:m] - self.W @ self.X.T)
        assert np.all(error <= tolerance * scale), "a leaf is not the product of its vectors"
        nodes = [m, *(np.diff(levels)[:-1] // FAN_OUT)]  # of each level, padding aside
        for first, count, end in zip(levels[:-1], nodes, levels[1:], strict=True):
            assert np.all(self._rows[first + count : end] == -np.inf), "padding is not -inf"
        _check_maxima(self._rows, levels)


def _check_maxima(rows, levels):
    """Asserts that inner nodes are maxima of their children."""
    for first, end in pairwise(levels[:-1]):
        maxima = rows[first:end].reshape(-1, FAN_OUT, rows.shape[1]).max(axis=1)
        found = rows[end : end + len(maxima)]
        assert np.array_equal(found, maxima), "an inner node is not the maximum of its children"


# ==================================================================================================
# Active sets and the sparse Jacobian (Definitions 2.6 and 2.7)
# ==================================================================================================


def _grouped(neurons, points):
    """ActiveSets of pairs (neuron, point) in ascending order."""
    starts = np.flatnonzero(np.diff(neurons, prepend=-1))
    return ActiveSets(neurons[starts], np.append(starts, neurons.size), points)


def _by_neuron(indptr, indices, m):
    """ActiveSets of m neurons, from pairs in CSR by point."""
    offsets, points = _transposed(indptr, indices, m)
    neurons = np.flatnonzero(np.diff(offsets))
    return ActiveSets(neurons, np.append(offsets[neurons], offsets[-1]), points)


@njit(nogil=True, fastmath=FAST)
def _dot(u, v):
    product = u.dtype.type(0)
    for k in range(u.size):
        product += u[k] * v[k]
    return product


@njit(nogil=True, fastmath=FAST)
def _add_multiple(u, factor, v):
    """u += factor v."""
    for k in range(u.size):
        u[k] += factor * v[k]


# Cost of an entry of X X^T, in multiply-adds of whole vectors: of entries that are read one after
# the other, and of entries here and there.
IN_ORDER, SCATTERED = 2.0, 16.0


@njit(inline="always")
def _through_gram(k, count, d, entry):
    """Whether it is cheaper to move `count` products of a weight vector, which moves by a
    combination of k points, through X X^T, k x count entries of cost `entry` (IN_ORDER or
    SCATTERED), than through the move itself, (k + count) d operations."""
    return entry * k * count <= (k + count) * d


@njit(nogil=True, fastmath=FAST)
def _add_outputs(active, signs, values, shift, edges, totals):
    """Adds signs[r] (values[r, i] - shift) over r in Q_i to totals[chunk, i]."""
    for chunk in range(edges.size - 1):
        for q in range(edges[chunk], edges[chunk + 1]):
            for e in range(active.offsets[q], active.offsets[q + 1]):
                totals[chunk, active.points[e]] += signs[q] * (values[e] - shift)


@njit(nogil=True, fastmath=FAST)
def _add_jacobian_times(X, active, signs, u, edges, totals):
    """Adds J u sqrt(m) to totals, u (m d,). O(nnz d)."""
    d = X.shape[1]
    for chunk in range(edges.size - 1):
        for q in range(edges[chunk], edges[chunk + 1]):
            w = u[active.neurons[q] * d : (active.neurons[q] + 1) * d]
            for e in range(active.offsets[q], active.offsets[q + 1]):
                totals[chunk, active.points[e]] += signs[q] * _dot(w, X[active.points[e]])


@njit(nogil=True, fastmath=FAST)
def _jacobian_transpose_times(X, active, signs, v, out, low, high):
    """Adds J^T v sqrt(m) to out (m d,), for the neurons low, ..., high - 1 of K. O(nnz d)."""
    d = X.shape[1]
    for q in range(low, high):
        w = out[active.neurons[q] * d : (active.neurons[q] + 1) * d]
        for e in range(active.offsets[q], active.offsets[q + 1]):
            _add_multiple(w, signs[q] * v[active.points[e]], X[active.points[e]])


@njit(nogil=True, fastmath=FAST)
def _add_gram_times(X, XXt, active, v, edges, totals):
    """Adds G v m to totals, neuron by neuron: k^2 operations through X X^T if it is active on
    k <= 2 d / SCATTERED points, and 2 k d through J (J^T v) otherwise."""
    d = X.shape[1]
    w = np.empty(d)
    for chunk in range(edges.size - 1):
        for q in range(edges[chunk], edges[chunk + 1]):
            first, end = active.offsets[q], active.offsets[q + 1]
            if _through_gram(end - first, end - first, d, SCATTERED):
                for e in range(first, end):
                    i, product = active.points[e], 0.0
                    for h in range(first, end):
                        product += XXt[i, active.points[h]] * v[active.points[h]]
                    totals[chunk, i] += product
            else:
                w[:] = 0.0
                for e in range(first, end):
                    _add_multiple(w, v[active.points[e]], X[active.points[e]])
                for e in range(first, end):
                    totals[chunk, active.points[e]] += _dot(w, X[active.points[e]])


@intrinsic
def _population(typing_context, word):
    """How many bits of a uint64 are set, by one instruction."""

    def generate(context, builder, signature, arguments):
        return builder.ctpop(arguments[0])

    return types.uint64(types.uint64), generate


if numba.config.DISABLE_JIT:

    def _population(word):
        return int(word).bit_count()


@njit(nogil=True)
def _count_pairwise(active, counts, low, high):
    """Adds to counts[i, j], j <= i, the neurons low, ..., high - 1 of K that i and j share."""
    for q in range(low, high):
        for e in range(active.offsets[q], active.offsets[q + 1]):
            i = active.points[e]
            for f in range(active.offsets[q], e + 1):
                j = active.points[f]
                counts[max(i, j), min(i, j)] += 1


@njit(nogil=True)
def _pack_by_point(active, words, low, high):
    """Sets bit q of words[i], 64 bits a word, where the q-th neuron of K is active on i: of the
    words low, ..., high - 1 of every point."""
    for q in range(64 * low, min(64 * high, active.neurons.size)):
        for e in range(active.offsets[q], active.offsets[q + 1]):
            words[active.points[e], q // 64] |= np.uint64(1) << np.uint64(q % 64)


@njit(nogil=True)
def _count_common(words, times, counts, low, high):
    """Adds `times` C of these words, by point, to counts: entries (i, j) and (j, i) with j <= i,
    low <= i < high."""
    for i in range(low, high):
        for j in range(i + 1):
            shared = np.uint64(0)
            for z in range(words.shape[1]):
                shared += _population(words[i, z] & words[j, z])
            counts[i, j] += times * np.int32(shared)
            if j < i:
                counts[j, i] += times * np.int32(shared)


def _add_coactivity(words, counts, times=1):
    """Adds `times` C of these words, (n, k) with 64 neurons each, to counts (n, n). O(n^2 k)."""
    shares = np.sqrt(np.arange(CHUNKS + 1) / CHUNKS)  # of equal work
    edges = np.ceil(len(words) * shares).astype(int)

    def of_share(_, low, high):
        _count_common(words, np.int32(times), counts, edges[low], edges[high])

    _in_threads(of_share, words.size * len(words) // 16)


# Cost of the common bits of two words, over the cost of counting one neuron for two points.
WORD = 0.04


def _coactivity(active, n):
    """C (n, n), C_ij = |Q_i and Q_j|: O(n^2 + sum over r of |act(r)|^2), or O(n^2 |K| / 64) where
    that is less. The points of a neuron may be in any order."""
    size = active.neurons.size
    edges, squares = _edges(size), float(np.sum(np.diff(active.offsets).astype(float) ** 2))
    if squares < WORD * n * n * size / 64:
        of_threads = _counts_of_threads(n)

        def of_share(thread, low, high):
            _count_pairwise(active, of_threads[thread], edges[low], edges[high])

        _in_threads(of_share, squares, len(of_threads))
        counts = of_threads.sum(axis=0, dtype=np.int32)
        counts += np.tril(counts, -1).T
        return counts
    counts, words = np.zeros((n, n), np.int32), np.zeros((n, -(-size // 64)), np.uint64)
    _over_items(partial(_pack_by_point, active, words), words.shape[1], active.points.size)
    _add_coactivity(words, counts)
    return counts


def _gram(XXt, counts, width):
    """G (n, n), with no other matrix of that size beside it."""
    gram = XXt * counts
    gram /= width
    return gram


def _counts_of_threads(n):
    """Zeros (threads, n, n): one for each thread, of which so few that they take 256 MB at most, if
    there is more than one."""
    threads = max(1, min(numba.get_num_threads(), (1 << 26) // n**2))
    return np.zeros((threads, n, n), np.int32)


class SparseJacobian(LinearOperator):
    """Jacobian of the network at the points X, from its active sets alone: a SciPy LinearOperator
    of shape (n, m d).

    Part (i, r) is m^(-1/2) signs[r] x_i^T if neuron r is active on point i and zero otherwise
    (Definition 2.6). A product with J costs O(nnz d), one with J^T O(nnz d + m d); nothing of size
    n m d is formed.

    Parameters
    ----------
    X : (n, d) data points.
    signs : (m,) output signs.
    indptr, indices : active sets in CSR by point; the neurons active on x_i are
        indices[indptr[i]:indptr[i + 1]].

    Attributes: X; width, the number m of neurons; active, the ActiveSets by neuron. Raises
    TypeError, ValueError or IndexError on bad input.
    """

    @_quiet
    def __init__(self, X, signs, indptr, indices):
        X = _check_matrix("X", X).copy()  # X X^T is kept, so X must not change under it
        signs = _check_vector("signs", signs)
        wrong = np.flatnonzero(np.abs(signs) != 1)
        if wrong.size:
            raise ValueError(
                f"signs must be +1 or -1, but signs[{wrong[0]}] is {signs[wrong[0]]:g}; "
                "move its size into W"
            )
        active = _by_neuron(*_check_csr(indptr, indices, len(X), signs.size), signs.size)
        self._bind(X, X @ X.T, signs.size)
        self.active, self._signs = active, signs[active.neurons]

    @classmethod
    def _of(cls, search):
        """That of a search, as it stands until its next step. Neurons are named by their places in
        search.live, which permutes the blocks of J and leaves G as it is."""
        J = cls.__new__(cls)
        J._bind(search.X, search.XXt, search.width)
        J.active, J._signs = search.active, search.signs[search.active.neurons]
        return J

    def _bind(self, X, XXt, width):
        super().__init__(np.dtype(float), (len(X), width * X.shape[1]))
        self.X, self._XXt, self.width = X, XXt, width

    @_quiet
    def _matvec(self, u):
        u = _check_vector("u", np.ravel(u), size=self.shape[1], reason="m d of them")
        sums = self._sum_by_point(_add_jacobian_times, self.X, self.active, self._signs, u)
        return sums / np.sqrt(self.width)

    @_quiet
    def _rmatvec(self, v):
        v = _check_vector("v", np.ravel(v), size=len(self.X), reason="one for each row of X")
        out = np.zeros(self.shape[1])
        work = self.active.points.size * self.X.shape[1]
        where = self.X, self.active, self._signs, v / np.sqrt(self.width), out
        _over_items(_jacobian_transpose_times, self.active.neurons.size, work, *where)
        return out

    @_quiet
    def gram_times(self, v):
        """G v for v (n,), in at most O(nnz d) operations and O(n) memory."""
        v = _check_vector("v", v, size=len(self.X), reason="one for each row of X")
        sums = self._sum_by_point(_add_gram_times, self.X, self._XXt, self.active, v)
        return sums / self.width

    def _sum_by_point(self, kernel, *arguments):
        work = 8 * self.active.points.size
        like = np.zeros(len(self.X))
        return _sum_over_chunks(kernel, self.active.neurons.size, like, work, *arguments)

    def gram(self):
        """Gram matrix G = J J^T = (X X^T) o C / m (n, n), C_ij = |Q_i and Q_j|, without d:
        O(n^2 + sum over r of |act(r)|^2), or O(n^2 |K| / 64) where that is less."""
        return _gram(self._XXt, _coactivity(self.active, len(self.X)), self.width)

    @property
    def size_of_K(self):
        """|K|, how many neurons are active on some point."""
        return self.active.neurons.size

    def active_counts(self):
        """|Q_i| for every point (n,)."""
        return np.bincount(self.active.points, minlength=len(self.X))

    @cached_property
    def _slots(self):
        """Active sets in CSR by point, a neuron being named by its place in active.neurons."""
        return _transposed(self.active.offsets, self.active.points, len(self.X))

    def tocsr(self):
        """J as a scipy.sparse.csr_matrix (n, m d) with nnz d stored entries."""
        d = self.X.shape[1]
        indptr, slots = self._slots
        columns = self.active.neurons[slots, None] * d + np.arange(d)
        rows = np.repeat(self.X, np.diff(indptr), axis=0)
        data = self._signs[slots, None] / np.sqrt(self.width) * rows
        entries = data.ravel(), columns.ravel(), indptr * d
        return scipy.sparse.csr_matrix(entries, shape=self.shape)


# ==================================================================================================
# Sketches (Definition 2.1, Lemma 2.2)
# ==================================================================================================
#
# S J^T is a sum over active pairs of m^(-1/2) a_r S kron(e_r, x_i), so only the columns of S that
# meet an active neuron are ever computed, from hashes of the neuron's number and from signs that
# all neurons share. Every sketch is unbiased: E[(S J^T)^T (S J^T)] = G.

SPARSITY = 4  # nonzeros in a column of the sparse sign sketch; 4 to 8 are usual [NN13]


@njit(nogil=True)
def _hash(key, counter):
    """Counter-based random uint64: the counter-th output of SplitMix64 started at key."""
    z = key + (counter + np.uint64(1)) * np.uint64(0x9E3779B97F4A7C15)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


@njit(nogil=True)
def _hashed_normals(key, normals):
    """Fills `normals`, of even size, with standard normal numbers (Box and Muller)."""
    for k in range(0, normals.size, 2):
        uniform = (np.float64(_hash(key, np.uint64(k)) >> np.uint64(11)) + 1.0) * 2.0**-53
        turn = np.float64(_hash(key, np.uint64(k + 1)) >> np.uint64(11)) * 2.0**-53
        radius, angle = np.sqrt(-2.0 * np.log(uniform)), 2.0 * np.pi * turn
        normals[k], normals[k + 1] = radius * np.cos(angle), radius * np.sin(angle)


@njit(nogil=True, fastmath=FAST)
def _gaussian_times(X, active, signs, key, out, low, high):
    """Rows low, ..., high - 1 of S J^T sqrt(m size) for a Gaussian S, drawn neuron by neuron."""
    d = X.shape[1]
    normals = np.empty(d + d % 2)
    for row in range(low, high):
        row_key = _hash(key, np.uint64(row))
        for q in range(active.neurons.size):
            _hashed_normals(_hash(row_key, np.uint64(active.neurons[q])), normals)
            for i in active.points[active.offsets[q] : active.offsets[q + 1]]:
                out[row, i] += signs[q] * _dot(normals[:d], X[i])


@njit(nogil=True)
def _hadamard_times(indptr, slots, neurons, signs, key, rows, out, low, high):
    """out[i, s] = sum over r in Q_i of signs[r] h(r) (-1)^popcount(rows[s] & r) with hashed signs
    h, rows of a Hadamard matrix, for the points low, ..., high - 1."""
    for i in range(low, high):
        for q in slots[indptr[i] : indptr[i + 1]]:
            sign = -signs[q] if _hash(key, np.uint64(neurons[q])) & np.uint64(1) else signs[q]
            for s in range(rows.size):
                parity = _population(np.uint64(rows[s] & neurons[q])) & np.uint64(1)
                out[i, s] += -sign if parity else sign


@njit(nogil=True)
def _sparse_sign_times(X, indptr, slots, neurons, signs, key, out, low, high):
    """Rows low, ..., high - 1 of the transpose of S J^T sqrt(m SPARSITY) for a sparse sign S; X
    carries the signs of the coordinates.

    Row i is a sum of copies of x_i moved by hashed offsets, so signs are first added up by offset:
    O(nnz + n d min(size, |Q_i|)).
    """
    d, size = X.shape[1], out.shape[1]
    for i in range(low, high):
        for j in range(SPARSITY):
            first, length = size * j // SPARSITY, size * (j + 1) // SPARSITY - size * j // SPARSITY
            if length == 0:
                continue
            totals = np.zeros(length)
            for q in slots[indptr[i] : indptr[i + 1]]:
                bits = _hash(key, np.uint64(neurons[q] * SPARSITY + j))
                offset = np.int64(((bits >> np.uint64(32)) * np.uint64(length)) >> np.uint64(32))
                totals[offset] += -signs[q] if bits & np.uint64(1) else signs[q]
            unwound = np.zeros(length + d)
            for offset in np.flatnonzero(totals):
                for k in range(d):
                    unwound[offset + k] += totals[offset] * X[i, k]
            for k in range(unwound.size):
                out[i, first + k % length] += unwound[k]


def _walsh_hadamard(A):
    """A H for the Hadamard matrix H (entries +1 and -1) of the order of A's columns, a power of
    two: O(log order) passes over A."""
    rows, order = A.shape
    half = 1
    while half < order:
        pairs = A.reshape(rows, -1, 2, half)
        left, right = pairs[:, :, 0], pairs[:, :, 1]
        A = np.stack([left + right, left - right], axis=2)
        half *= 2
    return A.reshape(rows, order)


def _check_sketch(J, size, rng):
    """The size and the generator."""
    if not isinstance(J, SparseJacobian):
        raise TypeError(f"J must be a SparseJacobian, got {type(J).__name__}")
    return _check_integer("size", size, 1), np.random.default_rng(rng)


@_quiet
def gaussian_sketch(J, size, rng):
    """S J^T (size, n) for S (size, m d) of independent N(0, 1 / size) entries.

    With size >= ((sqrt(n) + sqrt(2 ln(2 / delta))) / (sqrt(1 + eps) - 1))^2 it is a (1 +- eps)
    subspace embedding of the columns of J^T (Definition 2.1) with probability at least 1 - delta,
    whatever J (Davidson and Szarek, "Local operator theory, random matrices and Banach spaces",
    Theorem II.13). Costs |K| d size normal numbers, each drawn from a counter when it is needed,
    and O(nnz d size) operations: a reference, far too slow for wide networks.

    J : SparseJacobian.  size : int >= 1.  rng : numpy Generator, or a seed for one. Raises
    TypeError or ValueError on bad input.
    """
    size, rng = _check_sketch(J, size, rng)
    out = np.zeros((size, len(J.X)))
    work = J.active.neurons.size * size * J.X.shape[1]
    key = rng.integers(1 << 63, dtype=np.uint64)
    _over_items(_gaussian_times, size, work, J.X, J.active, J._signs, key, out)
    return out / np.sqrt(J.width * size)


@_quiet
def srht_sketch(J, size, rng):
    """S J^T (size, n) for a subsampled randomised Hadamard transform S = sqrt(N / size) P H D with
    Kronecker signs D.

    H is the normalised Hadamard matrix of order N >= m d, the product of one over neurons and one
    over coordinates; D is a diagonal of signs that factors likewise; P draws `size` rows, with
    replacement. An entry of H is a parity, so the neurons of a point cost O(|Q_i| size), and the
    coordinates one fast transform of x_i, with no factor d.

    For independent signs and N = poly(n), O(n ln(n / delta)^2 / eps^2) rows make it a (1 +- eps)
    subspace embedding with probability at least 1 - delta (Lemma 2.2, [Tro11]). No bound is claimed
    for Kronecker signs, which need more rows when n is small: n ln(n / 0.1)^2 / 0.25 of them missed
    eps = 0.5 in 9 % of the draws at n = 4, in 26 % at n = 2.

    J : SparseJacobian.  size : int >= 1.  rng : numpy Generator, or a seed for one. Raises
    TypeError or ValueError on bad input.
    """
    size, rng = _check_sketch(J, size, rng)
    n, d = J.X.shape
    order = 1 << max(d - 1, 0).bit_length()
    coordinate_rows = rng.integers(order, size=size)
    neuron_rows = rng.integers(1 << max(J.width - 1, 0).bit_length(), size=size)
    signed_X = J.X * (1 - 2 * rng.integers(2, size=d))
    coordinates = _walsh_hadamard(np.pad(signed_X, ((0, 0), (0, order - d))))
    key, neurons = rng.integers(1 << 63, dtype=np.uint64), np.zeros((n, size))
    where = *J._slots, J.active.neurons, J._signs, key, neuron_rows, neurons
    _over_items(_hadamard_times, n, J.active.points.size * size, *where)
    return (neurons * coordinates[:, coordinate_rows]).T / np.sqrt(J.width * size)


@_quiet
def sparse_sign_sketch(J, size, rng):
    """S J^T (size, n) for a sparse sign matrix S with SPARSITY = 4 nonzeros in each column, one in
    each quarter of its rows.

    Column (r, k), for neuron r and coordinate k, has its nonzeros in rows h_1(r) + k, ...,
    h_4(r) + k of the quarters, cyclically, with signs s_1(r) t(k), ..., s_4(r) t(k). A neuron thus
    adds four copies of x_i at hashed offsets, first added up by offset:
    O(nnz + n (size + d min(size, |Q_i|))), without d for each active pair.

    With size >= max(4 d, 2 n (n + 1) / (eps^2 delta)), a multiple of 4, it is a (1 +- eps) subspace
    embedding with probability at least 1 - delta, by the second moment as in [CW13] and [NN13]; the
    factor 2 is the price of signs t(k) that all neurons share. Below 4 d rows coordinates of one
    neuron collide, and no size in n alone is enough. A preconditioner needs far less than this
    bound: max(8 n, 4 d) is the trainer's choice.

    J : SparseJacobian.  size : int >= 1.  rng : numpy Generator, or a seed for one. Raises
    TypeError or ValueError on bad input.
    """
    size, rng = _check_sketch(J, size, rng)
    n, d = J.X.shape
    X = J.X * (1 - 2 * rng.integers(2, size=d))
    key, out = rng.integers(1 << 63, dtype=np.uint64), np.zeros((n, size))
    where = X, *J._slots, J.active.neurons, J._signs, key, out
    _over_items(_sparse_sign_times, n, J.active.points.size * SPARSITY * 4, *where)
    return out.T / np.sqrt(J.width * min(size, SPARSITY))


SKETCHES = {"sparse": sparse_sign_sketch, "srht": srht_sketch, "gaussian": gaussian_sketch}


# ==================================================================================================
# Solvers of (G + mu I) g = f - y (Algorithm 5, lines 25-35)
# ==================================================================================================
#
# A solver is made for one training, from a problem's points and threshold, and keeps what outlives
# a step: a tolerance, a generator, a rate. In each step prepare(J, nu, mu) makes what the system is
# solved from, the Gram matrix or a sketch, and solve(right_side) returns g and the number of inner
# iterations. Singular systems raise LinAlgError.


def _singular_error(J, otherwise=""):
    """LinAlgError that says why the Gram matrix is singular and what to do; `otherwise` is added
    where a sketch may be to blame."""
    silent = np.flatnonzero(J.active_counts() == 0)
    equal = np.argwhere(np.tril(J._XXt, -1) > 1 - 1e-12)
    remedy = "a larger width or a smaller shift"
    if silent.size:
        cause = f"{silent.size} of {len(J.X)} points have no active neuron, the first is point "
        cause += f"{silent[0]}"
    elif equal.size:
        cause = f"points {equal[0, 1]} and {equal[0, 0]} coincide ({len(equal)} such pairs)"
        remedy = "distinct points"
    else:
        cause = f"{len(J.X)} points share {J.size_of_K} active neurons of {J.width}, too few to "
        cause += f"tell them apart{otherwise}"
    return np.linalg.LinAlgError(
        f"the Gram matrix is singular: {cause}; use {remedy}, or damping > 0 (try 1e-6)"
    )


# The name of cg's relative tolerance, which is another in SciPy 1.11.
RTOL = "rtol" if "rtol" in inspect.signature(cg).parameters else "tol"


class _Solver:
    """What solvers share."""

    sketches = False  # whether it needs all active sets, which a lean search would draw again
    one_thread = 1024  # BLAS keeps to one thread if there are at most so many points

    def __init__(self, X, shift):
        """Nothing is kept from step to step, unless a solver says so."""

    def promise(self, J, right_side, step, nu, mu):
        """The residual after a step if the network were linear in its weights: that before it less
        (G + nu I) g, which is mu g as (G + (nu + mu) I) g = residual."""
        return mu * step


class _Cholesky(_Solver):
    """Exact, from the Gram matrix and its Cholesky factor [CGH+19, ZMG19]: O(n^3) after the Gram
    matrix."""

    # A factor for fewer takes so short that threads of BLAS, which are in the way of ours for a
    # while after each call, would cost more than they gain.
    one_thread = 4096

    def prepare(self, J, nu, mu):
        self._J, self._system = J, J.gram().copy()  # which a lazy search keeps
        self._system.ravel()[:: len(J.X) + 1] += nu + mu

    def solve(self, right_side):
        # Overwrites the system, which prepare() makes anew.
        triangle, failed = dpotrf(self._system.T, lower=False, clean=False, overwrite_a=True)
        pivots = triangle.diagonal()
        least = pivots.size * np.finfo(float).eps * pivots.max() ** 2
        if failed or pivots.min() ** 2 <= least:
            raise _singular_error(self._J)
        step, _ = dpotrs(triangle, right_side, lower=False)
        return step, 0


class _ConjugateGradients(_Solver):
    """Conjugate gradients without a preconditioner, to the relative tolerance of Algorithm 5:
    O(sqrt(kappa) log(kappa / tolerance)) products with G, of condition kappa."""

    _preconditioner = None  # a LinearOperator near the inverse of the system

    def __init__(self, X, shift):
        self._tolerance = _regression_tolerance(X, shift)

    def prepare(self, J, nu, mu):
        if nu + mu == 0 and J.active_counts().min() == 0:
            raise _singular_error(J)

        def times(v):
            if not np.isfinite(v).all():
                raise np.linalg.LinAlgError(
                    "conjugate gradients broke down, since the Gram matrix is singular; use "
                    "distinct points, a larger width, or damping > 0"
                )
            return J.gram_times(v) + (nu + mu) * v

        self._system = LinearOperator((len(J.X), len(J.X)), matvec=times, dtype=float)

    def solve(self, right_side):
        iterations, tolerance = 0, self._tolerance

        def count(_):
            nonlocal iterations
            iterations += 1

        options = {RTOL: tolerance, "atol": 0.0, "maxiter": 1000 + 20 * len(right_side)}
        options |= {"M": self._preconditioner, "callback": count}
        step, failed = cg(self._system, right_side, **options)
        # What conjugate gradients think the residual is drifts away from the true one.
        error, size = np.linalg.norm(self._system @ step - right_side), np.linalg.norm(right_side)
        if failed or error > max(2.0 * tolerance, 1e-10) * size:
            raise np.linalg.LinAlgError(
                f"conjugate gradients did not reach a relative residual of {tolerance:.1e}, but "
                f"{error / size:.1e} in {iterations} iterations: the Gram matrix is singular or "
                'nearly so; use solver="cholesky" to learn more, a larger width, or damping > 0'
            )
        return step, iterations


class _Sketch(_ConjugateGradients):
    """Conjugate gradients preconditioned by a sketch: O(log(kappa / tolerance)) products with G, of
    condition kappa (Corollary A.8)."""

    sketches = True

    def __init__(self, X, shift, sketch, size, seed):
        super().__init__(X, shift)
        self._sketch, self._rng = sketch, np.random.default_rng(seed)
        self._size = self._default_size(*X.shape) if size is None else size

    def _default_size(self, n, d):
        return max(8 * n, 4 * d)

    def prepare(self, J, nu, mu):
        """Upper triangular T with T^T T near G + (nu + mu) I, from a QR factorisation of the
        sketched J^T; R = T^-1."""
        super().prepare(J, nu, mu)
        sketched = self._sketch(J, self._size, self._rng)
        if nu + mu > 0:
            sketched = np.vstack([sketched, np.sqrt(nu + mu) * np.eye(len(J.X))])
        T = scipy.linalg.qr(sketched, mode="r", overwrite_a=True, check_finite=False)[0]
        self._T = T[: len(J.X)]
        pivots = np.abs(np.diag(self._T))
        if pivots.min() <= len(J.X) * np.finfo(float).eps * pivots.max():
            raise _singular_error(J, " (or the sketch is too small: try a larger sketch_size)")
        inverse = partial(scipy.linalg.cho_solve, (self._T, False), check_finite=False)
        self._preconditioner = LinearOperator(self._system.shape, matvec=inverse, dtype=float)


class _Richardson(_Sketch):
    """The paper's iteration, Algorithm 5, lines 31-35: z <- z - M^T (M z - R^T (f - y)) with
    M = R^T G R; g = R z.

    It converges where ||I - M^2|| < 1, hence needs a sketch good to about 0.3, several times larger
    than conjugate gradients do; for those who study it.
    """

    def _default_size(self, n, d):
        return max(64 * (n + 8), 4 * d)

    def _times_R(self, v, trans="N"):
        return scipy.linalg.solve_triangular(self._T, v, trans=trans, check_finite=False)

    def solve(self, right_side):
        initial = earlier = size_of_error = np.linalg.norm(right_side)
        z, step, error, iterations = *np.zeros((2, right_side.size)), -right_side, 0
        while size_of_error > self._tolerance * initial:
            gradient = self._times_R(error, trans="T")
            z -= self._times_R(self._system @ self._times_R(gradient), trans="T")
            step = self._times_R(z)
            error = self._system @ step - right_side
            size_of_error = np.linalg.norm(error)
            iterations += 1
            stalls = iterations % 50 == 0 and size_of_error >= earlier
            if size_of_error > 1e6 * initial or stalls:
                raise np.linalg.LinAlgError(
                    f"the Richardson iteration does not converge with sketch_size={self._size}: "
                    "M = R^T G R is too far from the identity; use a larger sketch_size "
                    '(64 (n + 8) is usually enough) or solver="sketch"'
                )
            earlier = size_of_error if iterations % 50 == 0 else earlier
        return step, iterations


class _Gradient(_Solver):
    """Gradient descent [SYZ21]: g = rate (f - y), the rate being 1 / ||G_0||, half of what would
    just fail to converge, or zero if G_0 is; G_0 is G + nu I at the first step. If `damped`,
    the rate is divided by 1 + rate mu; mu has no effect otherwise."""

    def __init__(self, X, shift, damped):
        self._rate, self._damped = None, damped

    def prepare(self, J, nu, mu):
        if self._rate is None:
            last = len(J.X) - 1
            norm = scipy.linalg.eigh(J.gram(), eigvals_only=True, subset_by_index=[last, last])[0]
            norm += nu
            self._rate = 1.0 / norm if norm > 0 else 0.0
        self._step_size = self._rate / (1.0 + self._rate * mu * self._damped)

    def solve(self, right_side):
        return self._step_size * right_side, 0

    def promise(self, J, right_side, step, nu, mu):
        return right_side - J.gram_times(step) - nu * step


SOLVERS = {
    "cholesky": _Cholesky,
    "sketch": _Sketch,
    "richardson": _Richardson,
    "cg": _ConjugateGradients,
    "gradient": _Gradient,
}


# ==================================================================================================
# Sums over neurons in fixed point
# ==================================================================================================
#
# A floating-point sum depends on the order of its terms. Where neurons are spread over processes
# that order varies, so the lazy search and predictions add in fixed point, in one process too: a
# number x becomes two integers, the whole part of x times `resolution`, and its fraction times
# FINER. Integers add to the same bits in any order. `resolution` is a power of two, as large as a
# bound on the sum of the first integers allows; the second ones have room for 2^33 terms.

FINER = 2.0**30


def _resolution(bound, width):
    """The resolution for a sum over `width` neurons of at most `bound` each. There is room for
    twice the sum, as a pair may flip again in a step when its row is made anew. 0 if the bound is
    infinite."""
    if not bound < np.inf:
        return 0.0
    return math.ldexp(1.0, 60 - math.frexp(bound)[1] - int(width).bit_length())


@njit(inline="always")
def _add_fixed(fixed, i, x, resolution):
    """Adds x to entry i of sums (2, n) int64."""
    whole = np.int64(x * resolution)
    fixed[0, i] += whole
    fixed[1, i] += np.int64((x * resolution - np.float64(whole)) * FINER)


def _to_fixed(numbers, resolution):
    """Numbers (n,) as such sums (2, n)."""
    whole = np.trunc(numbers * resolution)
    return np.stack([whole, np.trunc((numbers * resolution - whole) * FINER)]).astype(np.int64)


def _from_fixed(fixed, resolution):
    """The numbers (n,), which are nan if there was no bound."""
    return (fixed[0] + fixed[1] / FINER) / (resolution or np.nan)


# ==================================================================================================
# Networks, as training leaves them
# ==================================================================================================


# Neurons that ranks send at a time where they are dealt out anew.
DEALT = 1 << 19


class _Network(NamedTuple):
    """A trained network, for predictions: weights of this rank's live neurons, and how others are
    drawn."""

    start: _Start
    shift: float
    live: np.ndarray  # (k,) numbers of this rank's live neurons, ascending
    signs: np.ndarray  # (k,) theirs
    weights: np.ndarray  # (k, d) theirs
    clear: "_Clear | None" = None  # live neurons that are not held

    @property
    def longest(self):
        """At least as large as the length of any of this rank's weight vectors."""
        longest = max(self.start.longest, _longest(self.weights))
        return longest + (0.0 if self.clear is None else self.clear.pulled)

    def outputs(self, X):
        """f (k,) at the rows of X (k, d), of length 1, from all ranks. Antisymmetric dead neurons
        cancel on every input, and are left out."""
        ranks, width = self.start.ranks, self.start.width
        (longest,) = ranks.gather([self.longest])
        resolution = _resolution(longest.max() + abs(self.shift), width)
        parts = [X[low : low + 256] for low in range(0, len(X), 256)]  # 32 MB of products each

        def of_block(W, signs):  # what these neurons add to sqrt(m) f
            W = W.astype(float, copy=False)
            with np.errstate(all="ignore"):  # in this thread
                added = [np.maximum(x @ W.T - self.shift, 0.0) @ signs for x in parts]
                return _to_fixed(np.concatenate(added), resolution)

        if self.start.init == "antisymmetric" or self.live.size == width:
            held = _stretches(self.live // self.start.block_size, BLOCK)

            def of_held(some):
                return of_block(self.weights[some], self.signs[some])

            groups = _in_groups(of_held, held, len(held), X.size, _to_nobody)
        else:
            groups = self.start.groups(lambda *block: of_block(*self._trained(*block)), self.live)
        sums = sum(_one_by_one(groups), np.zeros((2, len(X)), np.int64))
        if self.clear is not None:
            sums = sum(self.clear.each(lambda _, W, signs, *__: of_block(W, signs)), sums)
        (sums,) = ranks.sum(sums)
        return _from_fixed(sums, resolution) / np.sqrt(width)

    def with_clear_held(self):
        """This network with all live neurons held."""
        if self.clear is None:
            return self
        size = self.live.size + self.clear.count
        _check_memory(f"weights of {size} live neurons", 24 * size * self.start.d)
        held = zip((self.live, self.weights, self.signs), self.clear.held(), strict=True)
        live, weights, signs = _in_order(*map(np.concatenate, held))
        return self._replace(live=live, signs=signs, weights=weights, clear=None)

    def dealt(self, keep):
        """(numbers, weights, signs) of the neurons that all ranks hold for which keep(numbers), a
        mask, is true; and the greatest `longest`. All ranks call it, each with a keep of its own.
        DEALT neurons are sent at a time, so that no rank need hold them all."""
        ranks, found = self.start.ranks, []
        sizes, longest = ranks.gather([self.live.size], [self.longest])
        size = max(1, DEALT // ranks.size)
        for low in range(0, sizes.max() + 1, size):  # one part at least
            held = self.live, self.weights, self.signs
            part = ranks.gather(*(array[low : low + size] for array in held))
            kept = keep(part[0])
            found.append([array[kept] for array in part])
        return *_in_order(*map(np.concatenate, zip(*found, strict=True))), longest.max()

    def of_all_ranks(self, kept=True):
        """This network with the live neurons of all ranks, as one process has it; or with none, for
        a rank that only takes part."""
        ranks = self.start.ranks
        if ranks.size == 1:
            return self
        live, weights, signs, _ = self.dealt(lambda neurons: np.full(neurons.size, kept))
        start, clear = self.start._replace(ranks=_Ranks()), self.clear
        if clear is not None:
            (counts,) = ranks.gather([clear.count])
            sieve = clear.sieve._replace(start=start)
            clear = clear._replace(count=int(counts.sum()), sieve=sieve)
        return _Network(start, self.shift, live, signs, weights, clear)

    def _trained(self, first, W, signs):
        """A block of starting weights, with the trained ones in their places; and its signs."""
        low, high = np.searchsorted(self.live, (first, first + len(W)))
        W = W.astype(float)
        W[self.live[low:high] - first] = self.weights[low:high]
        return W, signs

    def all_weights(self):
        """Weights of all neurons (m, d) float64."""
        width, d = self.start.width, self.start.d
        _check_memory(f"weights() of {width} neurons in {d} dimensions", width * d * 8)
        network = self.with_clear_held()
        out, first = np.empty((width, d)), 0
        for W, _ in self.start.blocks(network._trained, network.live):
            out[first : first + len(W)] = W
            first += len(W)
        return out

    def active_sets(self, X):
        """ActiveSets at the training points X (n, d), with the neurons' own numbers. Only live
        neurons are looked at, so for other points it would miss some."""
        network = self.with_clear_held()
        found = [(NOBODY, NOBODY)]
        for low in range(0, network.live.size, BLOCK):
            some = slice(low, low + BLOCK)
            neurons, points = np.nonzero(network.weights[some] @ X.T >= self.shift)
            found.append((network.live[some][neurons], points))
        return _grouped(*map(np.concatenate, zip(*found, strict=True)))


# ==================================================================================================
# Searches: where the active pairs are found, and the weights moved
# ==================================================================================================
#
# A search begins at a network (_begin) and goes on by steps: jacobian() is J as it stands, and
# advance(step, lap) moves the weights and finds what is active then; lap(phase) books seconds.
# settle() makes outputs come from a forward pass, active_sets() are ActiveSets with the neurons'
# own numbers, and check_memory(X, width, dtype) refuses, beforehand, what cannot fit.
#
# A step is a transaction: undo(mark), with what mark() gave before it, takes it back. Weights are
# then as they were to the bit, and so are outputs and active sets, but for pairs within rounding of
# b in a lazy search. undo() may be called when advance() was broken off at any moment, for whatever
# reason, and again when undo() itself was. There is one mark at a time, the last.


class _Held(NamedTuple):
    """This rank's neurons whose weights a search is given. They are those that an earlier fit held,
    moved or not: its live ones, or all m after search="dense". Live twins that are drawn for the
    search beforehand are added."""

    numbers: np.ndarray  # (k,) ascending
    weights: np.ndarray  # (k, d)
    signs: np.ndarray  # (k,)
    # At least as large as the length of any of an earlier fit, on any rank; 0 if there was none.
    longest: float

    @property
    def goes_on(self):
        """Whether there was an earlier fit, even one that holds no neurons."""
        return self.longest > 0

    @classmethod
    def of(cls, network, start):
        """This rank's share, for a search from `start`, of the neurons that a network holds."""
        network, ranks = network.with_clear_held(), network.start.ranks
        if ranks.size == start.ranks.size == 1:
            return cls(network.live, network.weights, network.signs, network.longest)
        return cls(*network.dealt(start.owns))


def _with_live_twins(held, start, report):
    """`held` and the live twins of a law that are not known yet."""

    def of_block(twins, vectors, _):
        numbers = (2 * twins[:, None] + [0, 1]).ravel()
        return numbers, np.repeat(vectors, 2, axis=0), np.tile([1.0, -1.0], twins.size)

    groups = _LiveBlocks(start, held.numbers).groups(of_block, report)
    parts = zip(held[:3], *_one_by_one(groups), strict=True)
    return _Held(*_in_order(*map(np.concatenate, parts)), held.longest)


class _Search:
    """The network at the training points, and one step of it.

    Attributes: outputs f (n,); nnz, the number of active pairs; changing, the number |K| of neurons
    that the next step moves; flips, how many pairs have flipped so far; n_live, how many neurons
    were active on some point when the search began or, except with "dense", were held by an earlier
    fit; rounding, an estimate of the Euclidean length of the error of outputs; operations, how many
    multiply-adds, comparisons and moves of products; looked_at, how many neurons whose products
    were read: all of these of all ranks. live and signs are the numbers and the signs of this
    rank's neurons whose weights are held, live ones, or all with "dense". In active.neurons a
    neuron is named by its place in `live`.

    Arguments: X (n, d), unit rows; y (n,) targets; `start`, a _Start; shift, b; `held`, a _Held;
    may_wake, whether neurons that are not held may be live, which are then drawn; may_be_lean,
    whether clear neurons may be left out; dtype, of products that are computed or kept; `report`,
    told the share that is drawn. Subclasses offer _begin(y, held, may_wake, report), which finds
    what is active at the start, and _weights(places), weights of some of the neurons `live`.
    """

    def __init__(self, X, y, start, shift, held, may_wake, may_be_lean, dtype, report):
        self.X, self.shift, self.start, self.width = X, shift, start, start.width
        _check_memory(f"Gram matrices of {len(X)} points", 40 * len(X) ** 2, "use fewer points")
        with _one_blas_thread():
            self.XXt = X @ X.T
        self.dtype = dtype
        self.operations = self.looked_at = self.flips = 0
        self.may_be_lean = may_be_lean
        self._begin(y, held, may_wake, report)

    @property
    def mean_diagonal(self):
        """Mean of G's diagonal, whose entries are |Q_i| / m."""
        return self.nnz / (len(self.X) * self.width)

    def take_tally(self):
        """Operations and neurons looked at since the last call."""
        taken = self.operations, self.looked_at
        self.operations = self.looked_at = 0
        return taken

    def network(self):
        """The network as it is now."""
        if self._network_of[0] is not self.outputs:
            clear = self.clear
            if clear is not None:
                what = f"weights of {self.live.size} neurons near the threshold"
                _check_memory(what, 24 * self.live.size * self.X.shape[1])
            order = np.argsort(self.live)
            held = self.live[order], self.signs[order], self._weights(order)
            network = _Network(self.start, self.shift, *held, clear)
            self._network_of = self.outputs, network
        return self._network_of[1]

    clear = None  # a _Clear where live neurons are not all held

    _network_of = None, None  # the outputs, which every step replaces, and their network


class _ForwardPass(_Search):
    """Searches whose active sets and outputs come from a forward pass after every step.

    They offer _find(), the active sets and the products of the active pairs, and _move(step).
    """

    rounding = 0.0  # outputs come from a forward pass in every step, and gather none

    def find(self):
        """Finds the active sets and the outputs anew."""
        active, values = self._find()
        signs = self.signs[active.neurons]
        where = active, signs, values, self.shift
        size, like = active.neurons.size, np.zeros(len(self.X))
        sums = _sum_over_chunks(_add_outputs, size, like, 4 * values.size, *where)
        self.active, self.outputs = active, sums / np.sqrt(self.width)

    nnz = property(lambda self: self.active.points.size)
    changing = property(lambda self: self.active.neurons.size)

    def jacobian(self):
        return SparseJacobian._of(self)

    def mark(self):
        return {"active": self.active, "outputs": self.outputs, "flips": self.flips}

    def advance(self, step, lap):
        """W <- W - J^T step, and all that follows from it; returns the number of flips."""
        before = self.active
        self._move(step)
        lap("seconds_update")
        self.find()
        flips = np.empty(before.points.size + self.active.points.size, FLIP)
        flips = flips[: _flips_between(_keys(before), _keys(self.active), flips)].copy()
        self._note(flips)
        self.flips += flips.size
        lap("seconds_query")
        return flips.size

    def undo(self, mark):
        self.active, self.outputs, self.flips = mark["active"], mark["outputs"], mark["flips"]

    def settle(self):
        """Makes sure that `outputs` come from a forward pass: they do."""

    def active_sets(self):
        return self.active._replace(neurons=self.live[self.active.neurons])

    def _note(self, flips):
        """Told which pairs have flipped."""


# A pair that flipped: sign is +1 where it woke, -1 where it fell asleep.
FLIP = np.dtype([("neuron", np.int32), ("point", np.int32), ("sign", np.int32)])


def _keys(active):
    """Active pairs as ascending numbers; neurons are below 2^31, as places in `live` are."""
    return np.repeat(active.neurons, np.diff(active.offsets)) << 32 | active.points


@njit(nogil=True)
def _flips_between(was, now, flips):
    """Writes the pairs that are in one of two ascending arrays only; returns their number."""
    found = p = q = 0
    while p < was.size or q < now.size:
        old = was[p] if p < was.size else np.iinfo(np.int64).max
        new = now[q] if q < now.size else np.iinfo(np.int64).max
        if old != new:
            pair = min(old, new)
            flips[found]["neuron"], flips[found]["point"] = pair >> 32, pair & 0xFFFFFFFF
            flips[found]["sign"] = 1 if new < old else -1
            found += 1
        p += old <= new
        q += new <= old
    return found


NARROWER = 'use fewer neurons or points, or dtype="float32"'


class _Dense(_ForwardPass):
    """X W^T anew in every step, by BLAS: O(m n d) [BPSW21, CGH+19]. Holds W."""

    @staticmethod
    def check_memory(X, width, dtype):
        what = f'search="dense" with {width} neurons'
        _check_memory(what, width * X.shape[1] * dtype.itemsize, NARROWER)

    def _begin(self, y, held, may_wake, report):
        d = self.X.shape[1]
        self._cast_X = self.X.astype(self.dtype)
        self._W = np.empty((self.width, d), self.dtype)
        self.signs, self.live = np.empty(self.width), np.arange(self.width)

        def keep(first, W, signs):
            self._W[first : first + len(W)] = W
            self.signs[first : first + len(W)] = signs

        for _ in self.start.blocks(keep, held.numbers, report):
            pass
        self._W[held.numbers] = held.weights
        self.find()
        self.n_live = self.changing

    def _find(self):
        least_active, n = _least_at_or_above(self.shift, self.dtype), len(self.X)

        def pairs_of(first):
            products = self._W[first : first + BLOCK] @ self._cast_X.T
            pairs = np.flatnonzero(products >= least_active)  # twice as fast as np.nonzero
            return pairs + first * n, products.ravel()[pairs]

        with _one_blas_thread():
            starts = range(0, self.width, BLOCK)
            found = _map_in_threads(pairs_of, starts, self.width * self.X.size)
        pairs, values = map(np.concatenate, zip(*found, strict=True))
        self.operations += self.width * n * (self.X.shape[1] + 1)
        self.looked_at += self.width
        return _grouped(*np.divmod(pairs, n)), values

    def _move(self, step):
        active, n = self.active, len(self.X)
        signs = np.repeat(self.signs[active.neurons], np.diff(active.offsets))
        factors = (signs * step[active.points] / np.sqrt(self.width)).astype(self.dtype)
        pairs = factors, active.points, active.offsets
        coefficients = scipy.sparse.csr_matrix(pairs, shape=(active.neurons.size, n))
        self._W[active.neurons] -= coefficients @ self._cast_X
        self.operations += active.points.size * self.X.shape[1]

    def mark(self):
        return {**super().mark(), "W": self._W[self.active.neurons]}

    def undo(self, mark):
        super().undo(mark)
        self._W[self.active.neurons] = mark["W"]

    def _weights(self, rows):
        return self._W[rows]


def _ranges(starts, ends):
    """The numbers starts[z], ..., ends[z] - 1 for all z, and z for each of them: (z, numbers)."""
    sizes = ends - starts
    places = np.repeat(np.arange(sizes.size), sizes)
    return places, np.arange(places.size) + np.repeat(ends - np.cumsum(sizes), sizes)


class _Ledger:
    """What training has done to the weights, of which only the starting ones are stored:

        w_r = w_r(0) - m^(-1/2) a_r sum_i gamma[r, i] x_i,

    gamma[r, i] being the sum of g_i over the steps in which neuron r was active on point i. While
    a pair is active its gamma grows like s_i, the sum of all g_i. So only flips are written down,
    with s at that moment: -s_i where a pair woke, +s_i where it fell asleep.
    """

    def __init__(self):
        # For every look for flips, in the order of time, pieces of its flips, and s then. A piece
        # is None, or FLIPs in the order of their neurons, and an array of one number, how many they
        # are: 0 until the kernel has written all of them.
        self.looks = []

    def gamma(self, neurons, offsets, points, sums):
        """gamma (neurons.size, n) as a CSR matrix, for some of the live neurons, which are active
        on points[offsets[z]:offsets[z + 1]], now that s is `sums`."""
        shape = neurons.size, sums.size
        active = scipy.sparse.csr_matrix((sums[points], points, offsets), shape=shape)
        active.sort_indices()  # so that sums do not depend on the order of a row
        entries = [(np.zeros(0, int), np.zeros(0, int), np.zeros(0))]
        for pieces, then in self.looks:
            for flips, _ in filter(None, pieces):
                ends = np.searchsorted(flips["neuron"], [neurons, neurons + 1])
                places, these = _ranges(*ends)
                flips = flips[these]
                entries.append((places, flips["point"], -flips["sign"] * then[flips["point"]]))
        places, points, gamma = map(np.concatenate, zip(*entries, strict=True))
        return active + scipy.sparse.csr_matrix((gamma, (places, points)), shape=shape)


@njit(nogil=True, fastmath=FAST)
def _move_leaves(rows, active, scale, step, XXt, X, groups, starts, first_parent, low, high):
    """rows[r] += X dw_r, where r = active.neurons[q] and dw_r = scale[q] * sum over i in act(r) of
    step[i] x_i is the move of neuron r, for the groups low, ..., high - 1 of siblings.

    Group p holds active.neurons[starts[p]:starts[p + 1]]. Its parent is mended while it is in cache
    if first_parent, the first row of the parents' level, is not 0.
    """
    n, d = X.shape
    move = np.empty(d, X.dtype)
    for p in range(low, high):
        for q in range(starts[p], starts[p + 1]):
            leaf = rows[active.neurons[q]]
            points = active.points[active.offsets[q] : active.offsets[q + 1]]
            if _through_gram(points.size, n, d, IN_ORDER):
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


@njit(nogil=True)
def _move_cost(offsets, n, d):
    """Multiply-adds of _move_leaves."""
    cost = 0
    for q in range(offsets.size - 1):
        k = offsets[q + 1] - offsets[q]
        cost += k * n if _through_gram(k, n, d, IN_ORDER) else (k + n) * d
    return cost


class _Scan(_ForwardPass):
    """All products, kept and moved, then compared with b: O(n m) and the moves. The baseline.

    Rows of products are laid out live neurons first, in ascending order, then the dead ones, so
    that a step moves, mends and reports in one stretch of memory.
    """

    height = 1  # levels of the trees: a scan is a search in trees of leaves alone

    @classmethod
    def check_memory(cls, X, width, dtype):
        what = f"products of {len(X)} points and {width} neurons"
        rows = int(_levels(width)[: cls.height + 1][-1])
        _check_memory(what, len(X) * rows * dtype.itemsize, NARROWER)

    def _begin(self, y, held, may_wake, report):
        n = len(self.X)
        self._levels = _levels(self.width)[: self.height + 1]
        self._cast_X, self._cast_XXt = self.X.astype(self.dtype), self.XXt.astype(self.dtype)
        self._rows = np.empty((self._levels[-1], n), self.dtype)
        self._rows[self.width :] = -np.inf
        self._sums, self._ledger = np.zeros(n), _Ledger()
        found, front, back = [], 0, self.width
        blocks = self.start.blocks(partial(self._products, held), held.numbers, report)
        for *live, live_products, dead_products in blocks:
            self._rows[front : front + len(live_products)] = live_products
            self._rows[back - len(dead_products) : back] = dead_products
            front, back = front + len(live_products), back - len(dead_products)
            found.append(live)
        self.live, self._vectors, self.signs = map(np.concatenate, zip(*found, strict=True))
        self.n_live = self.live.size
        _mend_ancestors(self._rows, self._levels, np.arange(self.width))
        self.find()

    def _products(self, held, first, W, signs):
        """Of a block: numbers, weights, signs and products of live neurons; products of others."""
        low, high = np.searchsorted(held.numbers, (first, first + len(W)))
        here = held.numbers[low:high] - first
        if here.size:
            W = W.astype(float)
            W[here] = held.weights[low:high]
        products = W.astype(self.dtype, copy=False) @ self._cast_X.T
        fires = (products >= _least_at_or_above(self.shift, self.dtype)).any(axis=1)
        fires[here] = True
        live = np.flatnonzero(fires)
        return first + live, W[live], signs[live].astype(float), products[live], products[~fires]

    def _find(self):
        active, values, touched, compared = _query(self._rows, self._levels, self.shift)
        self.operations += touched
        self.looked_at += min(compared, self.width)  # padding aside
        return active, values

    def _move(self, step):
        active, (n, d) = self.active, self.X.shape
        groups, starts = _parents(active.neurons)
        first_parent = self._levels[1] if len(self._levels) > 2 else 0
        scale = (self.signs[active.neurons] / -np.sqrt(self.width)).astype(self.dtype)
        vectors = scale, step.astype(self.dtype), self._cast_XXt, self._cast_X
        work = _move_cost(active.offsets, n, d)
        where = self._rows, active, *vectors, groups, starts, first_parent
        _over_items(_move_leaves, groups.size, work, *where)
        self.operations += work
        if first_parent:
            self.operations += groups.size * (FAN_OUT + 1) * n
            self.operations += _mend_ancestors(self._rows, self._levels, groups, level=1)
        self._sums = self._sums + step

    def mark(self):
        return {**super().mark(), "sums": self._sums, "looks": len(self._ledger.looks)}

    def undo(self, mark):
        super().undo(mark)
        self._sums = mark["sums"]
        del self._ledger.looks[mark["looks"] :]
        # Products of neurons that have moved, some of them or all, come from the weights again;
        # those of all live neurons are made for it.
        moved = self.active.neurons
        weights = self._weights(moved).astype(self.dtype)
        with _one_blas_thread():
            self._rows[moved] = weights @ self._cast_X.T
        _mend_ancestors(self._rows, self._levels, moved)

    def _note(self, flips):
        self._ledger.looks.append(([(flips, np.array([flips.size]))], self._sums))

    def _weights(self, rows):
        """Weights (k, d) of the live neurons at `rows`. Those of all live neurons are made first,
        since the ledger is read for all of them at once."""
        everybody, offsets = np.arange(self.n_live), np.zeros(self.n_live + 1, np.int64)
        offsets[self.active.neurons + 1] = np.diff(self.active.offsets)
        pairs = np.cumsum(offsets), self.active.points, self._sums
        moves = self._ledger.gamma(everybody, *pairs) @ self.X
        return (self._vectors - (self.signs / np.sqrt(self.width))[:, None] * moves)[rows]


class _Tree(_Scan):
    """Search trees over the products: O(n |K| (min(k, d) + log m)) for neurons active on k points
    each [DHSWZ]."""

    height = 64  # more levels than there can be: all are kept


# ==================================================================================================
# Lazy search: look only where a pair may have flipped
# ==================================================================================================
#
# A neuron that is active on no training point has no gradient, so it never moves and never wakes.
# Kept are the *live* ones, active on some point at the start (after a warm start all that have ever
# been). Each has a *row*: its pairs whose products were at least b - margin when the row was made,
# with these products. The margin is the row's own.
#
# As long as act(r) stays the same, a neuron moves from one moment t to another by
#
#     w_r(t') - w_r(t) = -m^(-1/2) a_r sum over i in act(r) of (s_i(t') - s_i(t)) x_i,
#
# s being the sum of the dual steps. With its *travel* L = m^(-1/2) sum over i in act(r) of
# |s_i(t') - s_i(t)| and `cross` the largest |<x_i, x_j>| over i != j,
#
#     no product of an active pair has moved by more than L, and no other by more than cross L. (*)
#
# To *look* at a neuron is to move the products of its row to where they are now, to flip the pairs
# that have crossed b, and to find its *slack*: the travel below which, by (*), no pair can flip.
# The slack is the least of product - b over active pairs, (b - product) / cross over the others in
# the row, and margin / cross. The margin shrinks by cross L as the neuron moves, or by the length
# of the move if that is less.
#
# The travel need not be computed in every step: in each it grows by at most |act(r)| max_i |g_i| /
# sqrt(m). With D the sum of max_i |g_i| / sqrt(m) over the steps, D + slack / |act(r)| is a
# *certificate*: until D has come that far no pair of the neuron can flip. A neuron whose
# certificate ran out gets another one if its travel is still below its slack, and is looked at
# otherwise. For example, with b = 2, cross = 0.5 and a margin of 1,
#
#                      active       not active         not in the row
#     points           3     1   |  0     2            4 5 6 7
#     products         2.6   2.1 |  1.8   1.2          below 2 - 1
#     slack            the least of 2.1 - 2, (2 - 1.8) / 0.5 and 1 / 0.5, which is 0.1
#     certificate      D + 0.1 / 2
#
# A step takes D to the certificate or beyond. If the neuron has travelled 0.08 by then, it gets a
# new certificate, (D now) + (0.1 - 0.08) / 2. If the step was large, and it has travelled 0.6, it
# is looked at. Two pairs have crossed b, and change places:
#
#     points           3     0   |  1     2            4 5 6 7
#     products         2.5   2.1 |  1.9   1.3          below 2 - 1 + 0.5 x 0.6: the margin is 0.7
#
# A neuron active on one point x_i only, as most are if n is small, is known better. It moves along
# x_i, and each product by <x_i, x_j> times as much; so it has a slack for either direction, and
# they tell when a pair of its row will flip, not when one may.
#
# Where the margin is used up, a pair outside the row may have flipped: the row is made anew, from
# the weights, with a wider margin. That never happens to most rows.
#
# Call |s_i| / sqrt(m) the *pull* of point i: its share of the travel of neurons active on it since
# the start. A neuron is *clear* if, with reach[i] a bound on the pull in all of training, no pair
# of it can cross b, by (*): its active products are above b by more than its travel can become, the
# sum of reach over act(r), and all others below by more than cross times that. In wide networks
# most neurons are. A clear neuron needs no row: it is added to the counts |Q_i and Q_j|, which give
# its outputs, and forgotten, and drawn again where somebody asks for its weights. Before the flips
# of a step are looked for |s_i| / sqrt(m) is compared with reach[i]; if it has come further, the
# search begins again with a wider reach, and takes the same steps.

# Margins at the start are MARGIN times the movement of products that is expected in training or, in
# a lean search, what a clear neuron needs. Those of rows made anew are WIDER times as wide as what
# the row has held.
MARGIN, WIDER = 1.7, 1.25

# reach[i] is REACH times the pull of point i that the expected Gram matrix predicts, plus
# LEAST_REACH times the mean of these predictions. A live neuron that is not clear is *near*. Clear
# ones are left out if at most half of the live neurons of the first block are near; such a search
# is *lean*.
REACH, LEAST_REACH = 1.3, 0.1

# Rows are also made anew when they have travelled so far that rounding might be seen: ROUNDING
# times the travel is taken from the margin, and a row that holds all n pairs, which needs no margin
# otherwise, gets ENDURANCE.
ENDURANCE, ROUNDING = 1e4, 0.01

# Slacks and certificates are multiplied by this, so that rounding, that in |x_i| = 1 included,
# never makes them too large. Twice does no harm.
CAUTION = 1.0 - 1e-12

# A *moment* is the state of the weights after a step, or after undo(). There is room for so many at
# first; it is doubled when they run out.
MOMENTS = 64

# What is not compiled needs this kind of array for row.start to work; compiled code takes the plain
# kind faster.
RECORDS = np.recarray if numba.config.DISABLE_JIT else np.ndarray

# What is held of a live neuron. Its pairs are start, ..., start + count - 1, the first `active` of
# them active; their products are those of the moment `looked`.
ROW = np.dtype(
    [
        ("start", np.int64),
        ("slack", np.float64),  # of the travel; of a neuron active on one point: along x_i
        ("slack_against", np.float64),  # of a neuron active on one point: against x_i; else inf
        ("margin", np.float64),  # products not in the row are further below b than this
        ("count", np.int32),
        ("active", np.int32),
        ("looked", np.int32),
        ("sign", np.int32),  # a_r
    ]
)


class LiveRows(NamedTuple):
    """The rows of this rank's live neurons, but for clear ones that are left out; their pairs."""

    rows: np.ndarray  # (k,) ROW
    # (k,) the D at which the neuron must be seen to; inf if no pair of it can flip.
    certificates: np.ndarray
    points: np.ndarray  # (room,) uint32, which Numba need not wrap around as it does signed ones
    products: np.ndarray  # (room,)


class Geometry(NamedTuple):
    """The points and the threshold."""

    X: np.ndarray  # (n, d)
    XXt: np.ndarray  # (n, n)
    cross: float  # largest |<x_i, x_j>| over i != j, and more than 0
    shift: float
    unit: float  # m^(-1/2)

    @classmethod
    def of(cls, X, XXt, shift, width):
        below = (np.abs(row[:i]).max(initial=0.0) for i, row in enumerate(XXt))
        return cls(
            X=X,
            XXt=XXt,
            cross=max(max(below), 1e-12),
            shift=shift,
            unit=width**-0.5,
        )


class Moments(NamedTuple):
    """Sums s of the dual steps at the moments 0, 1, ..., of which `now` is the last."""

    now: int
    sums: np.ndarray  # (room, n)
    distance: float  # D now
    longest: float  # no weight vector of any neuron is longer now


@njit(inline="always")
def _travel(points, first, k, pace, sums, then, here, factors):
    """factors[a] = how far the neuron has moved along the a-th point it is active on; returns their
    sum and the travel, the sum of their sizes."""
    along = travel = 0.0
    for a in range(k):
        i = points[first + a]
        factors[a] = pace * (sums[here, i] - sums[then, i])
        along += factors[a]
        travel += abs(factors[a])
    return along, travel


@njit(inline="always")
def _length(points, first, k, factors, XXt):
    """Length of the move, sqrt(factors^T X X^T factors)."""
    square = 0.0
    for a in range(k):
        for b in range(k):
            square += factors[a] * factors[b] * XXt[points[first + a], points[first + b]]
    return np.sqrt(max(square, 0.0))


@njit(inline="always")
def _combine(points, first, k, factors, X, w):
    """w = sum over a < k of factors[a] x_i, i the a-th point of the row."""
    for z in range(w.size):
        w[z] = 0.0
    end = k - k % 4
    for a in range(0, end, 4):  # four points for each time that w is read and written
        i0, i1 = points[first + a], points[first + a + 1]
        i2, i3 = points[first + a + 2], points[first + a + 3]
        f0, f1, f2, f3 = factors[a], factors[a + 1], factors[a + 2], factors[a + 3]
        for z in range(w.size):
            w[z] += f0 * X[i0, z] + f1 * X[i1, z] + f2 * X[i2, z] + f3 * X[i3, z]
    for a in range(end, k):
        i = points[first + a]
        for z in range(w.size):
            w[z] += factors[a] * X[i, z]


@njit(inline="always")
def _move_through_weights(points, products, first, count, X, w):
    """products[e] += <x_i, w> for all pairs e of the row, i being their points."""
    d, end = X.shape[1], first + count - count % 4
    for e in range(first, end, 4):  # four sums that do not wait for each other
        i0, i1, i2, i3 = points[e], points[e + 1], points[e + 2], points[e + 3]
        p0 = p1 = p2 = p3 = 0.0
        for z in range(d):
            p0 += w[z] * X[i0, z]
            p1 += w[z] * X[i1, z]
            p2 += w[z] * X[i2, z]
            p3 += w[z] * X[i3, z]
        products[e] += p0
        products[e + 1] += p1
        products[e + 2] += p2
        products[e + 3] += p3
    for e in range(end, first + count):
        for z in range(d):
            products[e] += w[z] * X[points[e], z]


@njit(inline="always")
def _move_through_gram(points, products, first, count, k, factors, XXt):
    """The same through rows of X X^T."""
    for e in range(first, first + count):
        move, j = 0.0, points[e]
        for a in range(k):
            move += factors[a] * XXt[j, points[first + a]]
        products[e] += move


@njit(inline="always")
def _swap(points, products, e, f):
    points[e], points[f] = points[f], points[e]
    products[e], products[f] = products[f], products[e]


@njit(inline="always")
def _flip(points, products, first, size, k, pace, shift, q, flips, found, outputs, resolution):
    """Flips the pairs of a row that have crossed b, writes them down and adds what they change to
    the outputs, in which an active pair has -pace (product - b), pace being -a_r / sqrt(m); returns
    how many pairs are active now, and how many flips are written."""
    e, end = first, first + k
    while e < first + k:
        excess = products[e] - shift
        if excess >= 0.0:
            e += 1
            continue
        _add_fixed(outputs, points[e], pace * excess, resolution)
        flips[found]["neuron"], flips[found]["point"], flips[found]["sign"] = q, points[e], -1
        found, k = found + 1, k - 1
        _swap(points, products, e, first + k)
    for e in range(end, first + size):
        excess = products[e] - shift
        if excess >= 0.0:
            _add_fixed(outputs, points[e], -pace * excess, resolution)
            flips[found]["neuron"], flips[found]["point"], flips[found]["sign"] = q, points[e], 1
            _swap(points, products, e, first + k)
            found, k = found + 1, k + 1
    return k, found


@njit(inline="always")
def _slack_of_single(points, products, first, size, margin, XXt, cross, shift):
    """How far a neuron active on one point x_i can move along it, and how far against it, before a
    pair flips."""
    i = points[first]
    along = against = margin / cross
    for e in range(first, first + size):
        rate, excess = XXt[i, points[e]], products[e] - shift
        way = abs(excess) / max(abs(rate), 1e-300)
        nears = (excess < 0.0) == (rate > 0.0)  # asleep and rising, or active and falling
        along = min(along, way if nears else np.inf)
        against = min(against, np.inf if nears else way)
    return along, against


@njit(inline="always")
def _slack_of_travel(products, first, k, size, margin, cross, shift):
    """The travel below which no pair of a neuron can flip, by (*)."""
    above, below = np.inf, margin
    for e in range(first, first + k):
        above = min(above, products[e] - shift)
    for e in range(first + k, first + size):
        below = min(below, shift - products[e])
    return min(above, below / cross)


@njit(inline="always")
def _certificate(distance, slack, k):
    """D up to which a neuron active on k points, with so much slack now, cannot flip."""
    return (distance + slack / k * CAUTION) * CAUTION


@njit(inline="always")
def _certify(points, products, row, XXt, cross, shift, distance):
    """Finds the slack of a row that has been looked at; returns the certificate."""
    if row.active == 0:
        return np.inf
    first, k, size, margin = row.start, row.active, row.count, row.margin
    if k == 1:
        along, against = _slack_of_single(points, products, first, size, margin, XXt, cross, shift)
    else:
        along = _slack_of_travel(products, first, k, size, margin, cross, shift)
        against = np.inf
    row.slack, row.slack_against = along * CAUTION, against * CAUTION
    return _certificate(distance, min(along, against), k)


# What the looks add up: neurons looked at, operations, flips, the change of the number of neurons
# active on some point; and rows whose margins are used up.
LOOKED_AT, OPERATIONS, FLIPS, CHANGING, SHORT = range(5)


@njit(inline="always")
def _count_flips(points, first, k, flips, begun, found, counts):
    """Adds to counts what the flips begun, ..., found - 1, those of one neuron, change of C,
    C_ij = |Q_i and Q_j|, before it is made symmetric.

    With a the points that the neuron is active on now, 0 and 1, and f its flips, +1 and -1, its
    share of C is a a^T, and was (a - f) (a - f)^T. The difference f a^T + a f^T - f f^T is the
    symmetric part of 2 f a^T - f f^T.
    """
    for z in range(begun, found):
        j, sign = flips[z]["point"], flips[z]["sign"]
        for e in range(first, first + k):
            counts[j, points[e]] += 2 * sign
        for y in range(begun, z):
            counts[j, flips[y]["point"]] -= 2 * sign * flips[y]["sign"]
        counts[j, j] -= 1


@njit(nogil=True, fastmath=FAST, error_model="numpy")
def _look(live, geometry, moments, resolution, edges, outputs, tally, flips, count, counts):
    """Of the neurons of the chunks (edges[c], ..., edges[c + 1] - 1 are those of chunk c) whose
    certificates ran out, each gets a new one if slack is left, and is looked at otherwise.

    Writes the flips, and their number into count[0]. Adds to outputs[c], in fixed point, what
    they change of f - G g, the outputs if none had flipped, to counts what they change of C, and
    to tally[c] what LOOKED_AT, ..., SHORT name.
    """
    # Arrays are taken out of the tuples once, as each time their references would be counted.
    rows, certificates, points, products = live
    X, XXt, cross, shift, unit = geometry
    now, sums, distance, _ = moments
    d, found = X.shape[1], 0
    factors, w = np.empty(len(X)), np.empty(d)
    for chunk in range(edges.size - 1):
        total = outputs[chunk]
        for q in range(edges[chunk], edges[chunk + 1]):
            if certificates[q] > distance:
                continue
            row = rows[q]
            pace = -unit * row.sign
            first, size, k = row.start, row.count, row.active
            along, travel = _travel(points, first, k, pace, sums, row.looked, now, factors)
            left = row.slack - travel
            if k == 1:
                left = min(row.slack - along, row.slack_against + along)
            if left > 0.0:
                certificates[q] = _certificate(distance, left, k)
                continue
            if _through_gram(k, size, d, SCATTERED):
                _move_through_gram(points, products, first, size, k, factors, XXt)
                length = _length(points, first, k, factors, XXt)
                tally[chunk, OPERATIONS] += k * (size + k)
            else:
                _combine(points, first, k, factors, X, w)
                _move_through_weights(points, products, first, size, X, w)
                length = np.sqrt(_dot(w, w))
                tally[chunk, OPERATIONS] += (k + size) * d
            row.margin -= min(cross * travel, length) + ROUNDING * travel
            row.looked = now
            tally[chunk, LOOKED_AT] += 1
            if row.margin < 0.0:  # looked at once more when it is made anew
                certificates[q] = row.slack = row.slack_against = -np.inf
                tally[chunk, SHORT] += 1
                continue
            begun = found
            k, found = _flip(
                points, products, first, size, k, pace, shift, q, flips, found, total, resolution
            )
            _count_flips(points, first, k, flips, begun, found, counts)
            tally[chunk, FLIPS] += found - begun
            tally[chunk, CHANGING] += int(k > 0) - int(row.active > 0)
            tally[chunk, OPERATIONS] += size + (found - begun) * k
            row.active = k
            certificates[q] = _certify(points, products, row, XXt, cross, shift, distance)
    count[0] = found


@njit(nogil=True)
def _unflip(live, flips, count):
    """Takes back the first count[0] flips, the last one first, and voids their neurons' slack and
    certificates."""
    rows, certificates, points, products = live
    for z in range(count[0] - 1, -1, -1):
        q, j, woke = flips[z]["neuron"], flips[z]["point"], flips[z]["sign"] == 1
        row, e = rows[q], 0
        while points[row.start + e] != j and e < row.count - 1:
            e += 1
        row.active -= woke  # the last active pair, or the first that is not, changes places
        _swap(points, products, row.start + e, row.start + row.active)
        row.active += not woke
        certificates[q] = row.slack = row.slack_against = -np.inf
    count[0] = 0


@njit(nogil=True, fastmath=FAST, error_model="numpy")
def _add_active_outputs(live, geometry, moments, resolution, edges, outputs):
    """Adds to outputs[chunk], in fixed point, the outputs of the neurons edges[chunk], ...,
    edges[chunk + 1] - 1."""
    rows, _, points, products = live
    X, XXt, _, shift, unit = geometry
    now, sums, _, _ = moments
    d = X.shape[1]
    factors, w, moved = np.empty(len(X)), np.empty(d), np.empty(len(X))
    for chunk in range(edges.size - 1):
        total = outputs[chunk]
        for q in range(edges[chunk], edges[chunk + 1]):
            row = rows[q]
            first, k, pace = row.start, row.active, -unit * row.sign
            _travel(points, first, k, pace, sums, row.looked, now, factors)
            for a in range(k):
                moved[a] = products[first + a]
            if _through_gram(k, k, d, SCATTERED):
                for a in range(k):
                    for b in range(k):
                        moved[a] += factors[b] * XXt[points[first + a], points[first + b]]
            else:
                _combine(points, first, k, factors, X, w)
                for a in range(k):
                    moved[a] += _dot(w, X[points[first + a]])
            for a in range(k):
                _add_fixed(total, points[first + a], -pace * (moved[a] - shift), resolution)


@njit(nogil=True)
def _active_pairs(live, chosen):
    """Active pairs of some neurons, named by their places there: (offsets, points)."""
    offsets = np.zeros(chosen.size + 1, np.int64)
    for z in range(chosen.size):
        offsets[z + 1] = offsets[z] + live.rows[chosen[z]].active
    points = np.empty(offsets[-1], np.int64)
    for z in range(chosen.size):
        first = live.rows[chosen[z]].start
        for a in range(offsets[z + 1] - offsets[z]):
            points[offsets[z] + a] = live.points[first + a]
    return offsets, points


@njit(nogil=True, fastmath=FAST)
def _thresholds(products, least_active, pull, cross, lowered_shift, sifts):
    """For each row of products (k, n): the least product to keep, and how many are kept. If none
    reaches least_active none is kept, and the first is undefined; otherwise it is
    lowered_shift - margin.

    Each active point i is reckoned to pull the weights by pull[i]. The margin is cross times the
    sum of these. Unless clear neurons are told from others, `sifts`, it is at most the root of the
    sum of their squares, the length of the move if points were orthogonal.
    """
    kept = np.zeros(len(products), np.int64)
    thresholds = np.empty(len(products), np.float32)
    one, zero = np.float32(1), np.float32(0)  # counted in the products' type, for full vectors
    more = np.float32(1.0001)  # than the rounding of the sum
    for r in range(len(products)):
        row = products[r]
        straight = square = count = zero
        for i in range(row.size):
            count += one if row[i] >= least_active else zero
            pulled = pull[i] if row[i] >= least_active else zero
            straight += pulled
            square += pulled * pulled
        if count > zero:
            margin = cross * straight * more if sifts else min(cross * straight, np.sqrt(square))
            least, count = lowered_shift - margin, zero
            for i in range(row.size):
                count += one if row[i] >= least else zero
            thresholds[r], kept[r] = least, np.int64(count)
    return thresholds, kept


@njit(inline="always")
def _is_clear(points, exact, first, k, end, pull, cross, shift):
    """Whether none of the pairs first, ..., end - 1, of which k are active, can cross b while no
    point pulls more than `pull`."""
    above, below, travel = np.inf, np.inf, 0.0
    for e in range(first, first + k):
        above, travel = min(above, exact[e] - shift), travel + pull[points[e]]
    for e in range(first + k, end):
        below = min(below, shift - exact[e])
    return above > travel and below > cross * travel


@njit(inline="always")
def _collect(products, r, threshold, points, exact, first):
    """Writes the points whose products with vector r reach the threshold, and these products;
    returns where they end."""
    end = first
    for i in range(products.shape[1]):
        if products[r, i] >= threshold:
            points[end], exact[end] = i, products[r, i]
            end += 1
    return end


@njit(inline="always")
def _decide_row(points, exact, first, end, w, X, shift):
    """Replaces products by those in float64, the active ones first; returns how many these are."""
    k = 0
    for e in range(first, end):
        exact[e] = _dot(w, X[points[e]])
        if exact[e] >= shift:
            _swap(points, exact, e, first + k)
            k += 1
    return k


# Which live neurons get rows: all; near ones, clear ones being counted; or clear ones only.
ALL, NEAR, CLEAR = range(3)


@njit(inline="always")
def _copy_for_twin(rows, certificates, points, exact, q):
    """Row q + 1 like row q, its pairs behind those of q; returns where they end."""
    rows[q + 1], certificates[q + 1] = rows[q], certificates[q]
    first, size = rows[q].start, rows[q].count
    rows[q + 1].start = first + size
    for e in range(first, first + size):
        points[e + size], exact[e + size] = points[e], exact[e]
    return first + 2 * size


@njit(nogil=True, fastmath=FAST)
def _fill_rows(
    rows, chosen, room, products, vectors, geometry, thresholds, copies, pull, wanted, counts
):
    """Makes rows of the chosen vectors that fire, each that of `copies` neurons. Products in
    float32 only bring candidates, the points where they reach thresholds[z]; which of these are
    active is decided in float64. `room` is an upper bound on the pairs; `rows`, zeros, are filled.

    wanted=ALL makes a row of each. NEAR makes rows of near ones; clear ones are added to counts
    (n, n). CLEAR makes rows of the active pairs of clear ones.

    Returns: places among the chosen of those with rows (k,); rows and certificates (copies k,);
    points and products of all pairs, active ones of a row first; how many neurons were counted.
    """
    X, XXt, cross, shift, _ = geometry
    certificates, live = np.empty(rows.size), np.empty(chosen.size, np.int64)
    points, exact, w = np.empty(room, np.uint32), np.empty(room), np.empty(X.shape[1])
    found = first = left_out = 0  # `first` is where the next row begins
    rounding = _float32_rounding(X.shape[1])
    for z in range(chosen.size):
        end, clear = _collect(products, chosen[z], thresholds[z], points, exact, first), False
        k = end - first
        # Most clear neurons are told without float64: all candidates are active, by enough, and all
        # other products are below b - margin, where the margin is what a clear one needs.
        if wanted == NEAR:
            clear = _is_clear(points, exact, first, k, end, pull, cross, shift + rounding)
        if not clear:
            w[:] = vectors[chosen[z]]
            k = _decide_row(points, exact, first, end, w, X, shift)
            if k == 0:
                continue
            clear = wanted != ALL
            clear &= _is_clear(points, exact, first, k, end, pull, cross, shift)
        if clear and wanted == NEAR:
            left_out += copies
            for e in range(first, first + k):
                for f in range(first, first + k):
                    counts[points[e], points[f]] += copies
        if clear != (wanted == CLEAR):
            continue
        q, live[found], found = copies * found, z, found + 1
        row = rows[q]
        row.start, row.count, row.active = first, k if clear else end - first, k
        margin = max(0.0, shift - rounding - thresholds[z])
        row.margin = ENDURANCE if row.count == len(X) else margin
        certificates[q] = _certify(points, exact, row, XXt, cross, shift, 0.0)
        first += row.count
        if copies == 2:
            first = _copy_for_twin(rows, certificates, points, exact, q)
    some, used = slice(copies * found), slice(first)
    return live[:found], rows[some], certificates[some], points[used], exact[used], left_out


class _LiveStart(NamedTuple):
    """Live neurons of a stretch of starting vectors: seven arrays, and what was left out."""

    vectors: np.ndarray  # (k, d), of one or two neurons each
    live: np.ndarray  # (neurons,) their own numbers
    signs: np.ndarray  # (neurons,)
    rows: np.ndarray  # (neurons,) ROW, starts within the stretch
    certificates: np.ndarray  # (neurons,)
    points: np.ndarray = np.zeros(0, np.uint32)
    products: np.ndarray = np.zeros(0)
    left_out: int = 0  # clear neurons that have no row
    counts: np.ndarray | int = 0  # (n, n), of these


ARRAYS = 7


def _join_and_clear(arrays):
    """The arrays of a list, which is emptied, in one."""
    joined = np.concatenate(arrays)
    arrays.clear()
    return joined


def _not_held(held, first, vectors, signs):
    """Of the vectors of a block those whose neurons are not among the numbers `held`: the numbers
    of their first neurons, vectors, and signs (k, copies)."""
    copies = signs.size // len(vectors)
    numbers, signs = first + copies * np.arange(len(vectors)), signs.reshape(-1, copies)
    still = ~np.isin(numbers, held)  # of twins both are held, or neither
    if still.all():
        return numbers, vectors, signs
    return numbers[still], vectors[still], signs[still]


def _rows_in_cache(n):
    """How many rows of products with n points, in float32, take 2 MB."""
    return max(64, (1 << 19) // n)


class _Sieve(NamedTuple):
    """What tells live neurons from others, and clear ones from those near the threshold."""

    start: _Start
    geometry: Geometry
    # (n,) float32, the greatest pull reckoned with: MARGIN times the expected one, or reach.
    pull: np.ndarray
    wanted: int  # ALL, NEAR or CLEAR

    def of_block(self, held, *block):
        """The live neurons of a block that are not held, as a list of _LiveStarts."""
        return self._sift(*_not_held(held, *block))

    def of_twins(self, twins, vectors, products):
        """The same, of twins that are live on some of the points seen so far."""
        signs = np.broadcast_to(np.array([1, -1], np.int8), (twins.size, 2))
        # Products are with the law's points: those of this fit, in their order, in its first stage.
        in_order = len(self.start.law.stages) == 1
        return self._sift(2 * twins, vectors, signs, products if in_order else None)

    def _limits(self):
        """The least product in float32 that may be active, and what margins are taken from."""
        # A neuron may be active from b - rounding on, and what is above b - 2 rounding - margin in
        # float32 covers b - rounding - margin in float64.
        rounding, largest = _float32_rounding(self.start.d), np.finfo(np.float32).max
        lowered = self.geometry.shift - np.array([1, 2]) * rounding
        return np.clip(lowered, -largest, largest).astype(np.float32)

    def _sift(self, numbers, vectors, signs, all_products=None):
        """Those of some vectors that fire; `numbers` are those of the first neurons of each vector,
        `signs` (k, copies) those of all."""
        X, copies, sifts = self.geometry.X, self.start.copies, self.wanted != ALL
        least_active, lowered_shift = self._limits()
        limits = least_active, self.pull, np.float32(self.geometry.cross), lowered_shift, sifts
        pull, X32, n = self.pull.astype(float), X.astype(np.float32), len(X)
        stretch, found = _rows_in_cache(n), []
        for low in range(0, len(vectors), stretch):
            some = vectors[low : low + stretch]
            products = some @ X32.T if all_products is None else all_products[low : low + stretch]
            thresholds, kept = _thresholds(products, *limits)
            chosen, room = np.flatnonzero(kept), copies * int(kept.sum())
            rows = np.zeros(copies * chosen.size, ROW).view(RECORDS)
            counts = np.zeros((n, n) if sifts else (1, 1), int)
            where = products, some, self.geometry, thresholds[chosen].astype(float)
            rules = copies, pull, self.wanted, counts
            live, *arrays, left_out = _fill_rows(rows, chosen, room, *where, *rules)
            chosen = chosen[live]
            own = (numbers[low + chosen][:, None] + np.arange(copies)).ravel()
            names = some[chosen], own, signs[low + chosen].ravel()
            arrays = (array.copy() for array in arrays)  # without the room that is not used
            found.append(_LiveStart(*names, *arrays, left_out, counts if sifts else 0))
        return found


class _Clear(NamedTuple):
    """Clear neurons of this rank, as training has moved them: their active sets are those of the
    start."""

    count: int
    sieve: _Sieve  # that lets the others through
    sums: np.ndarray  # (n,) s now

    def each(self, work):
        """work(numbers, weights, signs, offsets, points) for groups of them: their weights, and the
        points that each is active on."""
        geometry = self.sieve.geometry

        def of_block(*block):
            found = []
            for part in self.sieve._replace(wanted=CLEAR).of_twins(*block):
                offsets = np.append(part.rows["start"], part.points.size)
                pairs = self.sums[part.points], part.points, offsets
                shape = part.live.size, self.sums.size
                gamma = scipy.sparse.csr_matrix(pairs, shape=shape)
                gamma.sort_indices()
                moves = (-geometry.unit * part.signs)[:, None] * (gamma @ geometry.X)
                weights = np.repeat(part.vectors, 2, axis=0) + moves
                found.append(work(part.live, weights, part.signs, offsets, part.points))
            return found

        groups = _LiveBlocks(self.sieve.start, NOBODY).groups(of_block, _to_nobody)
        return (found for block in _one_by_one(groups) for found in block)

    @property
    def pulled(self):
        """None of them has moved further than this."""
        return self.sieve.geometry.unit * np.abs(self.sums).sum()

    def held(self):
        """Their numbers, weights and signs."""
        nobody = NOBODY, np.zeros((0, self.sieve.start.d)), np.zeros(0)
        parts = self.each(lambda numbers, weights, signs, *_: (numbers, weights, signs))
        return map(np.concatenate, zip(nobody, *parts, strict=True))

    def with_active_sets(self, others):
        """Their ActiveSets, and those of others, together."""

        def pairs_of(numbers, weights, signs, offsets, points):
            return np.repeat(numbers, np.diff(offsets)), points.astype(np.int64)

        theirs = np.repeat(others.neurons, np.diff(others.offsets)), others.points
        pairs = zip(theirs, *self.each(pairs_of), strict=True)
        neurons, points = map(np.concatenate, pairs)
        order = np.lexsort((points, neurons))
        return _grouped(neurons[order], points[order])


class _CountedJacobian(SparseJacobian):
    """The Jacobian of a lazy search as it stands until its next step: its Gram matrix is known, and
    the active sets are only gathered if asked for."""

    def __init__(self, search):
        self._bind(search.X, search.XXt, search.width)
        self._search = search

    @cached_property
    def _active_and_signs(self):
        return self._search.active_sets_and_signs()

    active = property(lambda self: self._active_and_signs[0])
    _signs = property(lambda self: self._active_and_signs[1])
    size_of_K = property(lambda self: self._search.changing)

    def active_counts(self):
        return np.diag(self._search.counts)

    def gram_times(self, v):
        with _one_blas_thread():
            return self._search.gram @ v

    def gram(self):
        return self._search.gram


class _ByCounts(_Search):
    """Searches that keep C, and leave neurons where they were until they have to be looked at.

    Each rank holds its own neurons and their counts, `_own_counts`; `counts` are those of all
    ranks, the same array where there is one. Subclasses offer _find_flips(), which looks at own
    neurons, replaces _own_counts and returns what their flips add to f, in fixed point, and a tally
    (neurons looked at, operations, flips, by how many more neurons move); _own_outputs(), what own
    neurons add to f, in fixed point; and active_sets_of(order).

    The outputs follow from the Gram matrix, f <- f - G g, and from the flips; `rounding` is
    an estimate of what that has added up to. Where it matters when training ends, they are computed
    anew.
    """

    # What a step replaces as a whole.
    REPLACED = "outputs", "rounding", "counts", "_own_counts", "changing", "flips", "_moments"

    rounding = 0.0
    _left_out, _clear_counts = 0, 0  # clear neurons of this rank without rows, and their counts

    def _set_out(self, held):
        """Sets the geometry, the block size, and D, s and the moments at their beginning."""
        longest, self._block_size = max(self.start.longest, held.longest), self.start.block_size
        self._geometry = Geometry.of(self.X, self.XXt, self.shift, self.width)
        self._moments = Moments(0, np.zeros((MOMENTS, len(self.X))), 0.0, longest)

    def _state(self):
        return {name: getattr(self, name) for name in self.REPLACED}

    def _add_up(self, held, changing, looked_at, operations):
        """Counts and outputs at the start, from those of all ranks' neurons."""
        cancel = self.start.init == "antisymmetric" and not held.goes_on
        own_outputs = self._no_outputs if cancel else self._own_outputs()
        n_live = self.live.size + self._left_out
        tally = np.array([n_live, changing, looked_at, operations])
        outputs, self.counts, tally = self.start.ranks.sum(own_outputs, self._own_counts, tally)
        self.n_live, self.changing, looked_at, operations = map(int, tally)
        self.outputs = _from_fixed(outputs, self._resolution_now)
        self.looked_at += looked_at
        self.operations += operations

    @property
    def _resolution_now(self):
        """That of sums of outputs."""
        largest = self._moments.longest + abs(self.shift)
        return _resolution(largest * self._geometry.unit, self.width)

    @property
    def _no_outputs(self):
        return np.zeros((2, len(self.X)), np.int64)

    @property
    def nnz(self):
        return int(np.trace(self.counts, dtype=np.int64))

    @property
    def gram(self):
        """G (n, n)."""
        if self._gram_of[0] is not self.counts:
            self._gram_of = None, None  # makes room
            self._gram_of = self.counts, _gram(self.XXt, self.counts, self.width)
        return self._gram_of[1]

    _gram_of = None, None  # the counts, and the Gram matrix that was made from them

    def jacobian(self):
        return _CountedJacobian(self)

    @property
    def _sums(self):
        """s now."""
        return self._moments.sums[self._moments.now]

    def _go_to(self, sums):
        """Makes `sums` the s of a new moment, and adds to D."""
        now, all_sums, distance, longest = self._moments
        if now + 1 == len(all_sums):
            all_sums = np.concatenate([all_sums, np.zeros_like(all_sums)])
        all_sums[now + 1] = sums
        moves = np.abs(sums - self._sums) * self._geometry.unit
        # D is rounded up, and certificates down
        distance = np.nextafter(distance + moves.max(), np.inf)
        self._moments = Moments(now + 1, all_sums, distance, longest + moves.sum())

    def _travel_to(self, sums):
        """Moves the neurons, looks where a pair may have flipped, and adds up over all ranks what
        that changes."""
        self._go_to(sums)
        own_outputs, tally = self._find_flips()
        found = own_outputs, self._own_counts, tally
        # All ranks solve for themselves, and must have come to the same.
        alike = self._sums.tobytes() + self.outputs.tobytes()
        outputs, counts, tally = self.start.ranks.sum(*found, alike=alike)
        looked_at, operations, flips, changing = map(int, tally)
        if flips:
            self.outputs = self.outputs + _from_fixed(outputs, self._resolution_now)
            self.counts = counts
        self.looked_at += looked_at
        self.operations += operations
        self.flips += flips
        self.changing += changing

    def settle(self):
        """Makes sure that `outputs` come from a forward pass."""
        clear_counts = np.broadcast_to(self._clear_counts, self.counts.shape)
        outputs, clear_counts = self.start.ranks.sum(self._own_outputs(), clear_counts)
        self.outputs, self.rounding = _from_fixed(outputs, self._resolution_now), 0.0
        if clear_counts.any():  # which cancelled at the start, and have not flipped since
            with _one_blas_thread():
                linear = _gram(self.XXt, clear_counts, self.width) @ self._sums
            self.outputs = self.outputs - linear

    def _follow(self, step):
        """The outputs after a step, but for flips. No entry of G is larger in size than the largest
        on its diagonal, which bounds the rounding."""
        with _one_blas_thread():
            self.outputs = self.outputs - self.gram @ step
        self.operations += step.size**2
        largest = np.diag(self.counts).max() / self.width
        size = np.abs(self.outputs).max() + largest * np.abs(step).sum()
        self.rounding += np.finfo(float).eps * math.sqrt(step.size) * size

    def advance(self, step, lap):
        """W <- W - J^T step, and all that follows from it; returns the number of flips."""
        before, sums = self.flips, self._sums + step
        self._follow(step)
        lap("seconds_update")
        self._travel_to(sums)
        lap("seconds_query")
        return self.flips - before

    def _batches(self, neurons, size):
        """Slices of a list of neurons, each of one block, on one side of the _seam between neurons
        that were held at the start and others, and `size` long at most. A product of matrices has
        the same bits on any rank only if the same neurons are in it."""
        parts = 2 * (self.live[neurons] // self._block_size) + (neurons >= self._seam)
        return _stretches(parts, size)

    def active_sets_and_signs(self):
        """ActiveSets of the neurons of all ranks, with their own numbers; and their signs."""
        order = np.argsort(self.live)
        active, signs = self.active_sets_of(order), self.signs[order]
        signs = signs[active.neurons]
        active = active._replace(neurons=self.live[order[active.neurons]])
        if self.clear is not None:
            active = self.clear.with_active_sets(active)
            signs = 1.0 - 2.0 * (active.neurons % 2)
        if self.start.ranks.size == 1:
            return active, signs
        held = active.neurons, np.diff(active.offsets), signs, active.points
        neurons, sizes, signs, points = self.start.ranks.gather(*held)
        ends = np.cumsum(sizes)
        neurons, starts, ends, signs = _in_order(neurons, ends - sizes, ends, signs)
        _, places = _ranges(starts, ends)
        offsets = np.append(0, np.cumsum(ends - starts))
        return ActiveSets(neurons, offsets, points[places]), signs

    def active_sets(self):
        return self.active_sets_and_signs()[0]


class _Lazy(_ByCounts):
    """Looks at the neurons that may have a flip, and at no others.

    Beside what a step replaces as a whole, rows change one by one: undo() takes back their flips,
    which the ledger has, and goes back to the earlier sum of steps, as if by another step.
    """

    @staticmethod
    def check_memory(X, width, dtype):
        """What it needs is known once the first blocks are drawn."""

    def _begin(self, y, held, may_wake, report, reach=None):
        self._set_out(held)
        self._ledger = _Ledger()
        # Training ends about where every active product has moved by |y_i| / (Phi(-b) sqrt(m)), so
        # that dw_r is a sum of vectors of about that length, one for each active point.
        output_per_move = max(scipy.special.ndtr(-self.shift), 1e-30) * np.sqrt(self.width)
        largest = np.finfo(np.float32).max
        pull = np.minimum(MARGIN * np.abs(y) / output_per_move, largest).astype(np.float32)
        self._sieve = _Sieve(self.start, self._geometry, pull, ALL)
        self._begun, self._path = None if held.goes_on else (y, held, may_wake), []
        if not may_wake:
            groups = ()
        elif self.start.draws_live:
            live_blocks = _LiveBlocks(self.start, held.numbers)
            if self.may_be_lean and not held.goes_on:
                self._sieve = self._lean_sieve(live_blocks, y, reach)
            groups = live_blocks.groups(self._sieve.of_twins, report)
        else:
            work = partial(self._sieve.of_block, held.numbers)
            groups = self.start.groups(work, held.numbers, report)
        self._margin = np.sqrt(np.mean(pull.astype(float) ** 2))  # a typical one
        self._lay_out(groups, held)
        everybody = np.arange(self.live.size)
        active = ActiveSets(everybody, *_active_pairs(self._live_rows, everybody))
        self._own_counts = _coactivity(active, len(self.X)) + self._clear_counts
        changing = np.count_nonzero(self._live_rows.rows["active"]) + self._left_out
        self._add_up(held, changing, self.live.size + self._left_out, self._used)

    def _lean_sieve(self, live_blocks, y, reach):
        """A sieve that lets near neurons through only, if at most half of the live ones are."""
        if reach is None:
            with _one_blas_thread():
                H = shifted_ntk(self.X, self.shift) + 1e-12 * np.eye(len(y))
                pulled = np.abs(scipy.linalg.solve(H, y, assume_a="sym")) * self._geometry.unit
            reach = REACH * pulled + LEAST_REACH * pulled.mean()
        if not np.isfinite(reach).all():
            return self._sieve
        reach = np.nextafter(reach.astype(np.float32), np.float32(np.inf))
        sieve = self._sieve._replace(pull=reach, wanted=NEAR)
        with _one_blas_thread():
            first = sieve.of_twins(*live_blocks.block(0))
        near, left_out = sum(p.live.size for p in first), sum(p.left_out for p in first)
        return sieve if near <= left_out > 0 else self._sieve

    def _lay_out(self, groups, held):
        """All rows in one stretch of memory; those of neurons that were held come last."""
        self._left_out = self._clear_counts = self._used = room = 0
        parts, size = [], held.numbers.size
        for done, blocks in groups:
            for part in (part for block in blocks for part in block):
                part.rows["start"] += self._used
                self._used += part.points.size
                self._left_out += part.left_out
                self._clear_counts = self._clear_counts + part.counts
                parts.append(part[:ARRAYS])
                room += sum(array.nbytes for array in part[:ARRAYS])
            # To join them takes twice their room, of which this much is taken already.
            _check_memory("rows of live neurons", (2.0 / done - 1.0) * room)
        blocks = part = None  # so that what is joined is freed
        nothing = np.zeros(size, ROW), np.zeros(size)  # to be looked at in the first step
        last = _LiveStart(held.weights, held.numbers, held.signs, *nothing)
        columns = [list(column) for column in zip(*parts, last[:ARRAYS], strict=True)]
        parts.clear()
        joined = _map_in_threads(_join_and_clear, columns, room)
        self._vectors, self.live, self.signs, rows, *others = joined
        self._seam = self.live.size - size  # the first of those that were held at the start
        rows["sign"] = self.signs
        self._live_rows = LiveRows(rows.view(RECORDS), *others)
        held_ones = np.arange(self._seam, self.live.size)
        for neurons, products in self._all_products(held_ones):
            margins = np.full(neurons.size, self._margin)
            self._place(neurons, products, products >= self.shift, margins)

    def _place(self, neurons, products, active, margins):
        """Writes rows of some neurons behind all others: active pairs first, then those whose
        products are >= b - margin; products and active are (k, n)."""
        n, rows = len(self.X), self._live_rows.rows[neurons]
        kept = active | (products >= (self.shift - margins)[:, None])
        places, points = np.nonzero(kept)
        order = np.lexsort((~active[places, points], places))
        room = slice(self._used, self._used + order.size)
        self._reserve(room.stop)
        self._used = room.stop
        self._live_rows.points[room] = points[order]
        self._live_rows.products[room] = products[places[order], points[order]]
        rows["count"], rows["active"] = kept.sum(axis=1), active.sum(axis=1)
        rows["start"] = room.start + np.cumsum(rows["count"]) - rows["count"]
        rows["margin"] = np.where(rows["count"] == n, ENDURANCE, margins)
        rows["looked"] = self._moments.now
        self._live_rows.rows[neurons] = rows  # all at once

    def _reserve(self, room):
        """Makes room for so many pairs."""
        if room > self._live_rows.points.size:
            more = room + room // 2 - self._live_rows.points.size
            longer = (
                np.append(array, np.empty(more, array.dtype)) for array in self._live_rows[2:]
            )
            self._live_rows = LiveRows(*self._live_rows[:2], *longer)

    def mark(self):
        looks, steps = len(self._ledger.looks), len(self._path)
        self._mark = {"state": self._state(), "looks": looks, "steps": steps}
        return self._mark

    def advance(self, step, lap):
        sums = self._sums + step
        pulled, reach = np.abs(sums) * self._geometry.unit, self._sieve.pull.astype(float)
        too_far = pulled > reach * CAUTION
        if self._is_lean and too_far.any():
            self._begin_again(np.where(too_far, 2.0 * pulled, reach))
        if self._is_lean:
            self._path = [*self._path, sums]
        return super().advance(step, lap)

    def undo(self, mark):
        mark, looks = self._mark, self._ledger.looks  # _begin_again may have replaced the mark
        self._path = self._path[: mark["steps"]]
        while len(looks) > mark["looks"]:
            pieces, _ = looks[-1]
            for piece in filter(None, pieces):
                _unflip(self._live_rows, *piece)
            looks.pop()
        before = mark["state"]["_moments"]
        sums = before.sums[before.now]
        if not np.array_equal(self._sums, sums):
            self._go_to(sums)
        vars(self).update(
            {**mark["state"], "_moments": self._moments._replace(longest=before.longest)}
        )

    def _begin_again(self, reach):
        """With a wider reach, and the same steps, on all ranks at once. Only which neurons have
        rows changes."""
        again = copy.copy(self)
        again.start = self._sieve.start  # whose dead neurons nobody had seen
        again._begin(*self._begun, _to_nobody, reach=reach)
        for sums in self._path:
            again._travel_to(sums)
        again._path = self._path
        own = {"_own_counts": again._own_counts, "_moments": again._moments}
        state = {**self._mark["state"], **own}
        again._mark = {**self._mark, "state": state, "looks": len(again._ledger.looks)}
        # One call, which no interrupt divides.
        vars(self).update({**vars(again), **state, "start": self.start})

    def _find_flips(self):
        """Looks where a pair may have flipped, and where a row was too short for that once more."""
        outputs, tally, short = self._look_once()
        if short:
            # All at -inf have just been looked at: those that still are had too small a margin.
            operations = self._place_anew(np.flatnonzero(self._live_rows.certificates == -np.inf))
            more, again, _ = self._look_once()
            outputs, tally = outputs + more, tally + again
            tally[OPERATIONS] += operations
        tally[OPERATIONS] += self.live.size  # certificates that were compared
        return outputs, tally

    def _look_once(self):
        """Looks at the neurons whose certificates ran out and whose slack is used up. Returns what
        their flips add to the outputs; neurons looked at, operations, flips and the change of how
        many move; and how many rows are too short."""
        n, edges, resolution = len(self.X), _edges(self.live.size), self._resolution_now
        outputs, tally = np.zeros((CHUNKS, 2, n), np.int64), np.zeros((CHUNKS, 5), np.int64)
        partial_counts = _counts_of_threads(n)
        pieces = [None] * CHUNKS
        self._ledger.looks.append((pieces, self._sums))

        def of_share(thread, low, high):
            flips, count = np.empty(self._used, FLIP), np.zeros(1, np.int64)  # one a pair at most
            pieces[low] = flips, count  # from now on undo() knows of them
            where = (
                self._live_rows,
                self._geometry,
                self._moments,
                resolution,
                edges[low : high + 1],
            )
            found = flips, count, partial_counts[thread]
            _look(*where, outputs[low:high], tally[low:high], *found)
            flips.resize(count[0], refcheck=False)  # gives back the room that was not needed

        _in_threads(of_share, 8 * self._used, len(partial_counts))
        tally = tally.sum(axis=0)
        if tally[FLIPS]:
            change = partial_counts.sum(axis=0, dtype=np.int32)
            self._own_counts = self._own_counts + (change + change.T) // 2
        return outputs.sum(axis=0), tally[:SHORT], tally[SHORT]

    def _place_anew(self, short):
        """Makes rows anew that have used up their margins; returns the operations."""
        for neurons, products in self._all_products(short):
            rows = self._live_rows.rows[neurons]
            ends = np.cumsum(rows["count"])
            _, pairs = _ranges(rows["start"], rows["start"] + rows["count"])
            least = np.minimum.reduceat(self._live_rows.products[pairs], ends - rows["count"])
            margins = np.maximum(self._margin, WIDER * (self.shift - least))
            offsets, points = _active_pairs(self._live_rows, neurons)
            active = np.zeros(products.shape, bool)
            active[np.repeat(np.arange(neurons.size), np.diff(offsets)), points] = True
            self._place(neurons, products, active, margins)
        return short.size * self.X.size

    def _all_products(self, neurons):
        """Yields parts of a list of neurons and their products (k, n) as they are now, from their
        weights: some 2^22 products at a time."""
        n = len(self.X)
        batches = self._batches(neurons, max(1, (1 << 22) // n))
        starts = np.array([batch.start for batch in batches], int)
        # Of the batches whose weights are made together.
        edges = np.flatnonzero(np.diff(starts * n >> 22, prepend=-1, append=-1))
        for low, high in pairwise(edges):
            part = neurons[batches[low].start : batches[high - 1].stop]
            weights, products = self._weights(part), []
            with _one_blas_thread():
                for batch in batches[low:high]:
                    own = slice(batch.start - starts[low], batch.stop - starts[low])
                    products.append(weights[own] @ self.X.T)
            yield part, np.concatenate(products)

    def _own_outputs(self):
        """From the products of active pairs."""
        where = self._live_rows, self._geometry, self._moments, self._resolution_now
        size, work = self.live.size, 4 * self._used
        return _sum_over_chunks(_add_active_outputs, size, self._no_outputs, work, *where)

    def active_sets_of(self, order):
        """The active sets of some neurons, named by where they stand in `order`."""
        # Pairs by neuron are put in order by point, and by neuron again: that sorts their points.
        by_neuron = ActiveSets(np.arange(order.size), *_active_pairs(self._live_rows, order))
        return _by_neuron(*_by_point(by_neuron, len(self.X)), order.size)

    @property
    def clear(self):
        """The clear neurons that have no rows; None if all have."""
        return _Clear(self._left_out, self._sieve, self._sums.copy()) if self._is_lean else None

    @property
    def _is_lean(self):
        return self._sieve.wanted == NEAR

    def _weights(self, neurons):
        # Vectors of neurons that were drawn are shared by twins; others have one each.
        drawn = np.minimum(neurons, self._seam)
        start = self._vectors[drawn // self.start.copies + (neurons - drawn)].astype(float)
        pairs = _active_pairs(self._live_rows, neurons)
        gamma = self._ledger.gamma(neurons, *pairs, self._sums)
        return start - (self.signs[neurons] / np.sqrt(self.width))[:, None] * (gamma @ self.X)


# --------------------------------------------------------------------------------------------------
# Lazy search in words: where neurons fire on many points
# --------------------------------------------------------------------------------------------------
#
# Where neurons fire on many points, or are few (_words_are_faster), a row would hold many pairs,
# and to move its products one by one takes longer than to multiply matrices. There activity is kept
# in words, of 64 points each, and the weights of a neuron as they were when it was last moved;
# products are made where they are needed and forgotten. The slack is the least |product - b| over
# *all* points, and since no product moves by more than w_r does (|x_i| is 1), one inequality is
# left,
#
#     no pair of r can flip before |w_r(t') - w_r(t)| reaches its slack,
#
# and three tests of it, each dearer than the one before, spare the products, O(n d): a certificate
# as above, O(1); the travel, which is at least |w_r(t') - w_r(t)|, O(k) for k active points; and
# the length itself, O(k d), which is what moving the weights takes.


class Packed(NamedTuple):
    """What is held of live neurons whose activity is in words."""

    weights: np.ndarray  # (n_live, d) at the moment `looked`
    words: np.ndarray  # (n_live, n / 64) uint64; bit i % 64 of word i // 64 is set if r is in Q_i
    active: np.ndarray  # (n_live,) int64, points that the neuron is active on
    slack: np.ndarray  # (n_live,) length of a move from the weights below which no pair can flip
    certificates: np.ndarray  # (n_live,) D up to which none can
    looked: np.ndarray  # (n_live,) int64, the moment that weights are of


@njit(inline="always")
def _first_bit(word):
    """The place of the lowest bit that is set."""
    return np.int64(_population(~word & (word - np.uint64(1))))


@njit(inline="always")
def _points_of(words, points):
    """Writes the points of a neuron's words; returns how many they are."""
    k = 0
    for z in range(words.size):
        word = words[z]
        while word != np.uint64(0):
            points[k] = 64 * z + _first_bit(word)
            word &= word - np.uint64(1)
            k += 1
    return k


@njit(nogil=True, fastmath=FAST, error_model="numpy")
def _move_weights(packed, signs, geometry, moments, neurons):
    """Moves weights to the present, except where the travel alone leaves slack. Returns the neurons
    whose slack is used up even by the length of the move, and operations; the others get new
    certificates."""
    weights, words, _, slack, certificates, looked = packed
    X, unit, (now, sums, distance, _) = geometry.X, geometry.unit, moments
    points, factors, move = np.empty(len(X), np.uint32), np.empty(len(X)), np.empty(X.shape[1])
    used_up, found, operations = np.empty(neurons.size, np.int64), 0, 0
    for q in neurons:
        k = _points_of(words[q], points)
        _, travel = _travel(points, 0, k, -unit * signs[q], sums, looked[q], now, factors)
        left = slack[q] - travel
        if left <= 0.0:
            _combine(points, 0, k, factors, X, move)
            _add_multiple(weights[q], 1.0, move)
            left = slack[q] - np.sqrt(_dot(move, move))
            slack[q], looked[q] = left, now
            operations += k * X.shape[1]
        if left > 0.0:
            certificates[q] = _certificate(distance, left, k)
        else:
            used_up[found], found = q, found + 1
    return used_up[:found], operations


@njit(nogil=True, error_model="numpy")
def _pack(products, shift, words, least):
    """Writes which of the products (k, n) float32 reach the threshold to words, and to least how
    far from it the nearest of each row is."""
    n, threshold, zero = products.shape[1], np.float32(shift), np.uint32(0)
    for q in range(len(products)):
        row, nearest = products[q], np.uint32(0x7F800000)  # infinity
        for z in range(words.shape[1]):
            word = np.uint64(0)
            for half in range(2):  # 32 bits fill vector registers
                first, bits = 64 * z + 32 * half, zero
                for e in range(min(32, n - first)):
                    excess = np.float32(row[first + e] - threshold)
                    bits |= np.uint32(1) << np.uint32(e) if excess >= np.float32(0) else zero
                    # Floats that are not negative are ordered like their bits.
                    nearest = min(nearest, np.float32(abs(excess)).view(np.uint32))
                word |= np.uint64(bits) << np.uint64(32 * half)
            words[q, z] = word
        least[q] = np.uint32(nearest).view(np.float32)


@njit(nogil=True, fastmath=FAST, error_model="numpy")
def _decide(products, weights, geometry, distance, least, words, active, slack, certificates):
    """Decides the pairs again that _pack has decided within rounding, from products in float64;
    fills the other arrays as Packed has them."""
    X, shift = geometry.X, geometry.shift
    n, d = X.shape
    for q in range(len(products)):
        w = weights[q]
        length = np.sqrt(_dot(w, w))
        rounding = (d + 4) * 2.0**-23 * (length + abs(shift))
        if not rounding < 1e30:
            rounding = np.inf  # where float32 overflows, every pair is decided in float64
        nearest = least[q] - rounding
        if not least[q] > 2.0 * rounding:
            nearest = np.inf
            for i in range(n):
                excess = np.float64(abs(products[q, i] - np.float32(shift)))
                if excess > 2.0 * rounding:
                    nearest = min(nearest, excess - rounding)
                    continue
                excess = _dot(w, X[i]) - shift
                nearest = min(nearest, abs(excess))
                bit = np.uint64(1) << np.uint64(i % 64)
                words[q, i // 64] &= ~bit
                words[q, i // 64] |= bit if excess >= 0.0 else np.uint64(0)
        count = np.uint64(0)
        for z in range(words.shape[1]):
            count += _population(words[q, z])
        active[q], slack[q] = np.int64(count), nearest * CAUTION
        certificates[q] = _certificate(distance, slack[q], active[q]) if active[q] else np.inf


@njit(nogil=True, fastmath=FAST, error_model="numpy")
def _flips_in_words(was, now, weights, scales, geometry, resolution):
    """How many pairs are active in one of `was` and `now` only, and what they add to the outputs,
    in fixed point (2, n)."""
    X, shift, found = geometry.X, geometry.shift, 0
    sums = np.zeros((2, len(X)), np.int64)
    for q in range(len(was)):
        for z in range(was.shape[1]):
            flipped = was[q, z] ^ now[q, z]
            while flipped != np.uint64(0):
                bit = flipped & ~(flipped - np.uint64(1))
                i = 64 * z + _first_bit(flipped)
                excess = _dot(weights[q], X[i]) - shift
                _add_fixed(
                    sums, i, scales[q] * (excess if now[q, z] & bit else -excess), resolution
                )
                flipped ^= bit
                found += 1
    return found, sums


@njit(nogil=True)
def _transpose(words, n, out, low, high):
    """Words by point, columns low, ..., high - 1 of out (n, neurons / 64), from those by neuron."""
    tile = np.empty(64, np.uint64)
    for z in range(words.shape[1]):
        for group in range(low, high):
            for e in range(64):
                q = 64 * group + e
                tile[e] = words[q, z] if q < len(words) else np.uint64(0)
            _transpose_tile(tile)
            for e in range(min(64, n - 64 * z)):
                out[64 * z + e, group] = tile[e]


@njit(inline="always")
def _transpose_tile(tile):
    """Transposes 64 words of 64 bits: swaps halves of the tile, halves of these, and so on."""
    size, mask = 32, np.uint64(0xFFFFFFFF)
    while size > 0:
        e, bits = 0, np.uint64(size)
        while e < 64:
            swapped = ((tile[e] >> bits) ^ tile[e + size]) & mask
            tile[e + size] ^= swapped
            tile[e] ^= swapped << bits
            e = (e + size + 1) & ~size
        size //= 2
        mask ^= mask << np.uint64(size)


@njit(nogil=True, fastmath=FAST, error_model="numpy")
def _add_outputs_in_words(packed, signs, geometry, moments, resolution, edges, outputs):
    """Adds to outputs[chunk], in fixed point, the outputs of the neurons edges[chunk], ...,
    edges[chunk + 1] - 1."""
    X, shift, unit = geometry.X, geometry.shift, geometry.unit
    n, d = X.shape
    points, factors, excess, w = np.empty(n, np.uint32), np.empty(n), np.empty(n), np.empty(d)
    for chunk in range(edges.size - 1):
        total = outputs[chunk]
        for q in range(edges[chunk], edges[chunk + 1]):
            k = _points_of(packed.words[q], points)
            scale, then = unit * signs[q], packed.looked[q]
            _travel(points, 0, k, -scale, moments.sums, then, moments.now, factors)
            _combine(points, 0, k, factors, X, w)
            _add_multiple(w, 1.0, packed.weights[q])
            excess[:k] = -shift
            _move_through_weights(points, excess, 0, k, X, w)
            for a in range(k):
                _add_fixed(total, points[a], scale * excess[a], resolution)


class _InWords(_ByCounts):
    """The lazy search where neurons fire on many points.

    A step keeps what it overwrites: undo() puts it back.
    """

    @staticmethod
    def check_memory(X, width, dtype):
        """Most neurons are live, and a step may overwrite all of them."""
        what = f"weights of {width} neurons, most of which fire on some point"
        _check_memory(what, width * (16 * X.shape[1] + len(X) // 4), "use fewer neurons")

    def _begin(self, y, held, may_wake, report):
        n, d = self.X.shape
        self._set_out(held)
        self._X32, self._log = self.X.astype(np.float32), []
        if may_wake and self.start.draws_live:
            held, may_wake = _with_live_twins(held, self.start, report), False
        self.live, self._seam = held.numbers, held.numbers.size  # all are before the seam
        # An empty one first, so that there is something to join.
        blocks = [slice(0), *self._batches(np.arange(self.live.size), self.width)]
        with _one_blas_thread():
            found = [
                self._live_of(*(array[some] for array in held[:3]), keep_all=True)
                for some in blocks
            ]
        if may_wake:
            work = partial(self._of_block, held.numbers)
            found += _one_by_one(self.start.groups(work, held.numbers, report))
        self.live, self.signs, *arrays = map(np.concatenate, zip(*found, strict=True))
        self._packed = Packed(*arrays, looked=np.zeros(self.live.size, np.int64))
        self._own_counts = np.zeros((n, n), np.int32)
        copies = 1 if held.goes_on else self.start.copies  # twins begin alike
        _add_coactivity(
            self._words_by_point(self._packed.words[::copies]), self._own_counts, copies
        )
        changing = np.count_nonzero(self._packed.active)
        self._add_up(held, changing, 0, 0)
        looked_at = self.width if may_wake else self.n_live
        self.looked_at += looked_at
        self.operations += looked_at * n * (d + 1)

    def _of_block(self, held, *block):
        return self._live_of(*_not_held(held, *block), keep_all=False)

    def _live_of(self, numbers, weights, signs, keep_all):
        """Of neurons whose vectors are `weights`, numbers[k] being the first that has vector k and
        signs (k,) or (k, copies): numbers, signs and what Packed holds of the live ones, or of
        all if `keep_all`."""
        weights = weights.astype(float)
        size, copies = len(weights), signs.size // max(len(weights), 1)
        together = _rows_in_cache(len(self.X))
        parts = [
            self._activity_of(weights[low : low + together]) for low in range(0, size + 1, together)
        ]
        words, active, *others = map(np.concatenate, zip(*parts, strict=True))
        live = np.ones(size, bool) if keep_all else active > 0
        numbers = (numbers[live][:, None] + np.arange(copies)).ravel()
        arrays = weights, words, active, *others
        twice = (np.repeat(array[live], copies, axis=0) for array in arrays)
        return numbers, signs[live].ravel().astype(float), *twice

    def _activity_of(self, weights):
        """Words, active, slack and certificates, as Packed has them, of neurons with weights
        (k, d)."""
        with np.errstate(all="ignore"):  # in this thread; what overflows is decided in float64
            products = weights.astype(np.float32) @ self._X32.T
        size, n = products.shape
        words, active = np.empty((size, -(-n // 64)), np.uint64), np.empty(size, np.int64)
        least, slack, certificates = np.empty((3, size))
        _pack(products, self.shift, words, least)
        found = words, active, slack, certificates
        _decide(products, weights, self._geometry, self._moments.distance, least, *found)
        return found

    def _words_by_point(self, words):
        out = np.zeros((len(self.X), -(-len(words) // 64)), np.uint64)
        _over_items(partial(_transpose, words, len(self.X), out), out.shape[1], words.size)
        return out

    def mark(self):
        self._log = []  # (neurons, what Packed held of them), in the order of time
        return {**self._state(), "_log": self._log}

    def undo(self, mark):
        for neurons, held in reversed(mark["_log"]):
            for array, before in zip(self._packed, held, strict=True):
                array[neurons] = before
        vars(self).update(mark)

    def _remember(self, neurons):
        """Before something of these neurons is overwritten."""
        self._log.append((neurons, Packed(*(array[neurons] for array in self._packed))))

    def _find_flips(self):
        """Looks at the neurons whose certificates ran out and whose slack is used up."""
        late = np.flatnonzero(self._packed.certificates <= self._moments.distance)
        parts = [late[some] for some in self._batches(late, _rows_in_cache(len(self.X)))]
        with _one_blas_thread():
            found = _map_in_threads(self._look_at, parts, late.size * len(self.X) * 4)
        tally = np.array([0, self.live.size, 0, 0])
        if not found:
            return self._no_outputs, tally
        outputs, tallies, was, now = zip(*found, strict=True)
        tally += sum(tallies)
        if tally[FLIPS]:
            self._own_counts = self._counts_after(was, now)
        return sum(outputs), tally

    def _look_at(self, neurons):
        """What the flips of some neurons add to the outputs; how many neurons had to be looked at,
        operations, flips and the change of how many move; the words before and now of those that
        have flips."""
        packed, signs = self._packed, self.signs
        self._remember(neurons)
        where = self._geometry, self._moments
        neurons, operations = _move_weights(packed, signs, *where, neurons)
        weights, was = packed.weights[neurons], packed.words[neurons]
        now, active, slack, certificates = self._activity_of(weights)
        packed.words[neurons], packed.active[neurons] = now, active
        packed.slack[neurons], packed.certificates[neurons] = slack, certificates
        scales = signs[neurons] * self._geometry.unit
        where = weights, scales, self._geometry, self._resolution_now
        flips, outputs = _flips_in_words(was, now, *where)
        flipped = (was != now).any(axis=1)
        was, now = was[flipped], now[flipped]
        changing = np.count_nonzero(now.any(axis=1)) - np.count_nonzero(was.any(axis=1))
        operations += neurons.size * self.X.size
        return outputs, np.array([neurons.size, operations, flips, changing]), was, now

    def _counts_after(self, was, now):
        """C after words of some neurons have changed: from these, or from all words if they are
        most."""
        if 2 * sum(map(len, was)) > self.live.size:
            counts = np.zeros_like(self._own_counts)
            _add_coactivity(self._words_by_point(self._packed.words), counts)
        else:
            counts = self._own_counts.copy()
            _add_coactivity(self._words_by_point(np.concatenate(was)), counts, -1)
            _add_coactivity(self._words_by_point(np.concatenate(now)), counts)
        return counts

    def _own_outputs(self):
        where = self._packed, self.signs, self._geometry, self._moments, self._resolution_now
        size, work = self.live.size, self._packed.words.size * 16
        return _sum_over_chunks(_add_outputs_in_words, size, self._no_outputs, work, *where)

    def active_sets_of(self, order):
        """The active sets of some neurons, named by where they stand in `order`."""
        bits = np.unpackbits(self._packed.words[order].view(np.uint8), axis=1, bitorder="little")
        return _grouped(*np.nonzero(bits[:, : len(self.X)]))

    def _weights(self, neurons):
        packed = Packed(*(array[neurons] for array in self._packed))
        packed.slack[:] = -np.inf
        where = self._geometry, self._moments, np.arange(neurons.size)
        _move_weights(packed, self.signs[neurons], *where)
        return packed.weights


SEARCHES = {"dense": _Dense, "scan": _Scan, "tree": _Tree, "lazy": _Lazy}

# Rows or words: words are faster where n^(1/3) d^(-1/2) P(Z >= b) is at least OFTEN, or the network
# is narrow. Measured for n from 16 to 1024, d from 16 to 64 and widths to 2^18 at the paper's b.
OFTEN, NARROW = 0.01, 1 << 12


def _words_are_faster(n, d, width, shift):
    """Whether the lazy search is expected to be faster with activity in words than with rows;
    draw="auto" then draws all neurons, as most are live or there are few."""
    often = np.cbrt(n) / math.sqrt(d) * scipy.special.ndtr(-shift) >= OFTEN
    return width <= NARROW or bool(often)


def _search_class(search, X, width, shift):
    if search == "lazy" and _words_are_faster(*X.shape, width, shift):
        return _InWords
    return SEARCHES[search]


# ==================================================================================================
# Scaling: how any finite data become unit rows
# ==================================================================================================

# The coordinate that normalize="lift" appends, over the root mean square length of the rows: on
# real data, smaller ones leave points too close together, and larger ones take many more steps.
LIFT = 0.5


class _Standard(NamedTuple):
    """Columns to mean 0 and variance 1: divided by `unit`, their largest entry, which keeps squares
    in range, then centred and divided by `deviation`, which is infinite for constant columns."""

    unit: np.ndarray
    mean: np.ndarray
    deviation: np.ndarray

    @classmethod
    def of(cls, A):
        unit = np.abs(A).max(axis=0)
        unit = np.where(unit > 0, unit, 1.0)
        mean, deviation = (A / unit).mean(axis=0), (A / unit).std(axis=0)
        constant = deviation <= 8 * np.finfo(float).eps
        return cls(unit, mean, np.where(constant, np.inf, deviation))

    def __call__(self, A, factors=1.0):
        """A (k, columns) standardised, each row multiplied by its factor, (k, 1) as from
        shrinking(), which keeps huge rows finite. What is appended to a row must be, too."""
        with np.errstate(over="ignore", invalid="ignore"):
            columns = (A * factors / self.unit - self.mean * factors) / self.deviation
        return np.where(np.isinf(self.deviation), 0.0, columns)

    @property
    def rounding(self):
        """How long rounding alone may make a row of zeros."""
        return 8 * np.finfo(float).eps * np.linalg.norm(self.mean / self.deviation)

    def shrinking(self, A):
        """A factor for each row (k, 1) that keeps squares in range; 1 unless the row is out of all
        proportion."""
        with np.errstate(divide="ignore"):
            size = np.log2(np.abs(A)) - np.log2(self.unit)
        largest = np.where(np.isinf(self.deviation), -np.inf, size).max(axis=1, keepdims=True)
        return np.exp2(np.minimum(0.0, 400.0 - largest))

    @property
    def scale(self):
        return np.where(np.isinf(self.deviation), 1.0, self.deviation)

    def inverse(self, A):
        return (A * self.scale + self.mean) * self.unit


class _Scales(NamedTuple):
    """How data become unit rows, and targets come to have mean 0 and variance 1; None leaves them
    as they are."""

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
            lengths = np.linalg.norm(_check_unit_rows(X), axis=1, keepdims=True)
            return X / np.where(np.abs(lengths - 1.0) < 1e-15, 1.0, lengths)
        factors = self.x.shrinking(X)
        X = self.x(X, factors)
        if self.lift:
            X = np.column_stack([X, self.lift * factors])
        lengths = np.linalg.norm(X, axis=1, keepdims=True)
        short = np.flatnonzero(lengths <= (0.0 if self.lift else self.x.rounding * factors))
        if short.size:
            raise ValueError(
                f"row {short[0]} of X is zero, up to rounding, once columns are centred, and has "
                'no direction; use normalize="lift", which gives it one'
            )
        return X / lengths

    def targets(self, y):
        scaled = y if self.y is None else self.y(y)
        size = np.abs(scaled).max()
        if size > 0 and not 1e-30 <= size <= 1e30:
            unit = "" if self.y is None else f" in the first fit's unit of {self.y_unit:.3g}"
            raise ValueError(
                f"y has entries up to {size:.3g}{unit}, out of the range from 1e-30 to 1e30; scale "
                'them, or begin anew with normalize="lift" and warm_start=False, which scales them'
            )
        return scaled

    def outputs(self, f):
        """In the units of the targets."""
        return f if self.y is None else self.y.inverse(f)

    @property
    def y_unit(self):
        return 1.0 if self.y is None else float(self.y.scale * self.y.unit)


def _unreachable(X, y):
    """The part of y, (n,), that no function of X can fit: deviations from means over equal rows."""
    rows = np.round(X, 12) + 0.0
    _, group, sizes = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
    group = group.ravel()
    deviations = y - (np.bincount(group, y) / sizes)[group]
    deviations[np.abs(deviations) <= 1e-12 * np.abs(y).max()] = 0.0
    return deviations


def _warn_of_coinciding_rows(X, y, unreachable):
    first = np.flatnonzero(unreachable)[0]
    alike = (np.round(X, 12) == np.round(X[first], 12)).all(axis=1)
    second = np.flatnonzero(alike & (y != y[first]))[0]
    least = np.linalg.norm(unreachable) / np.linalg.norm(y)
    warnings.warn(
        f"{np.count_nonzero(unreachable)} rows of X coincide with rows that have other targets, "
        f"the first are {first} and {second}: no network brings the relative residual below "
        f"{least:.3g}; merge such rows, or set tol above that. If they differ in what you passed, "
        "entries that dwarf all others hide it: clip or transform their columns",
        UserWarning,
        stacklevel=6,
    )


# ==================================================================================================
# Saving
# ==================================================================================================

FORMAT = "sublin network, version 5"
SAVED = (
    *("history_", "residual_", "n_iter_", "converged_"),
    *("shift_", "n_live_", "init_seconds_", "n_features_in_"),
)


def _saved(trainer, network):
    """What a file holds of a trainer, of whose network one process has all: arrays by name."""
    start, scales = network.start, trainer._scales
    arrays = {
        "X": trainer._X,
        "y": trainer._y,
        "sums": trainer._sums,
        "live": network.live,
        "signs": network.signs.astype(np.int8),
        "weights": network.weights.astype(float),
    }
    if scales.normalize is not None:
        arrays |= {"x_standard": np.array(scales.x), "y_standard": np.array(scales.y)}
    if network.clear is not None:
        arrays |= {"clear_pull": network.clear.sieve.pull, "clear_sums": network.clear.sums}
        arrays["clear_count"] = np.array(network.clear.count)
    if start.law is not None:
        arrays["law_points"] = start.law.points
        arrays["law_stages"] = np.cumsum([len(stage) for stage in start.law.stages])
        arrays["law_seen"] = np.array(start.law.seen)
    drawn = {"random_state": start.seed, "width": start.width, "init": start.init}
    about = {
        "format": FORMAT,
        "mean_diagonal": trainer._mean_diagonal,
        "params": {**trainer.get_params(), **drawn, "callback": None, "comm": None},
        "lift": scales.lift,
        "normalize": scales.normalize,
        "feature_names": list(getattr(trainer, "feature_names_in_", [])),
        **{name: getattr(trainer, name) for name in SAVED},
    }
    text = json.dumps(about, default=lambda number: number.item())
    return {**arrays, "about": np.frombuffer(text.encode(), np.uint8)}


def _write_whole(path, arrays):
    """Writes an npz beside `path` and renames it, so that there is either the old file or the new
    one at any moment."""
    path = _check_regular_file(os.path.realpath(os.fsdecode(path)))  # of a link, what it leads to
    old = os.path.exists(path)
    if old:
        open(path, "r+b").close()  # raises what Python raises if it may not be written
    beside = os.path.join(os.path.dirname(path), f".sublin-{secrets.token_hex(8)}")
    try:
        with open(beside, "xb") as file:
            if old:
                os.chmod(beside, stat.S_IMODE(os.stat(path).st_mode))
            np.savez(file, **arrays)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with suppress(FileNotFoundError):
            os.unlink(beside)
        raise


def _check_regular_file(path):
    """The path, unless something else is there than a file, which reading might wait for."""
    if os.path.lexists(path) and not os.path.isfile(path):
        raise ValueError(
            f"path must be that of a file, but {os.fsdecode(path)!r} is a folder, a device, a pipe "
            "or a link that leads nowhere; give another"
        )
    return path


def _restored(kind, arrays):
    """A trainer of class `kind` from what a file holds."""
    about = json.loads(arrays["about"].tobytes())
    if about["format"] != FORMAT:
        raise ValueError(f"its format is {about['format']!r}, not {FORMAT!r}")
    trainer, shift = kind(**about["params"]), about["shift_"]
    trainer._check_options()
    X = _check_unit_rows(_check_matrix("X", arrays["X"]))
    y = _check_vector("y", arrays["y"], size=len(X))
    x_standard, y_standard = (
        _Standard(*arrays[name]) if name in arrays else None
        for name in ("x_standard", "y_standard")
    )
    scales = _Scales(x_standard, y_standard, about["lift"], about["normalize"])
    start = _Start(trainer.random_state, trainer.width, X.shape[1], trainer.init, _Ranks())
    if "law_points" in arrays:
        points = _check_unit_rows(_check_matrix("law_points", arrays["law_points"]))
        stages = tuple(np.split(points, arrays["law_stages"][:-1]))
        start = start._replace(law=_Law(stages, shift, bool(arrays["law_seen"])))
    live, signs, weights = arrays["live"], arrays["signs"], arrays["weights"]
    fits = weights.shape == (*live.shape, X.shape[1]) and signs.shape == live.shape
    if not (fits and np.isfinite(weights).all() and (np.abs(signs) == 1).all()):
        raise ValueError("its arrays do not fit together")
    live = _check_indices("live", live, trainer.width) if live.size else NOBODY
    live, signs, weights = _in_order(live, signs.astype(float), weights)
    clear = None
    if "clear_sums" in arrays:
        pull, sums = arrays["clear_pull"], _check_vector("sums", arrays["clear_sums"], size=len(X))
        with _one_blas_thread():
            geometry = Geometry.of(X, X @ X.T, shift, start.width)
        clear = _Clear(int(arrays["clear_count"]), _Sieve(start, geometry, pull, NEAR), sums)
    vars(trainer).update(
        {name: about[name] for name in SAVED},
        **{"_X": X, "_y": y, "_unreachable": _unreachable(X, y), "_scales": scales},
        _sums=_check_vector("sums", arrays["sums"], size=len(X)),
        _mean_diagonal=about["mean_diagonal"],
        _network=_Network(start, shift, live, signs, weights, clear),
        _search=None,
    )
    if about["feature_names"]:
        trainer.feature_names_in_ = np.asarray(about["feature_names"], dtype=object)
    return trainer


# ==================================================================================================
# Trainer (Algorithm 5)
# ==================================================================================================


class ConvergenceWarning(RuntimeWarning):
    """Training ended above its tolerance; the message says why and what to change."""


class _Stopwatch:
    """Seconds by phase: lap(phase) books the time since the last lap."""

    def __init__(self):
        phases = "seconds_query", "seconds_jacobian", "seconds_solve", "seconds_update"
        self.phases, self._last = dict.fromkeys(phases, 0.0), time.perf_counter()

    def lap(self, phase):
        now = time.perf_counter()
        self.phases[phase] += now - self._last
        self._last = now


# When training ends, outputs are computed anew if the rounding they have gathered may exceed this
# share of the residual.
DOUBT = 1e-3

# "auto" starts with mu = DAMPING times the mean of G's diagonal times the relative residual.
DAMPING = 1e-3
TRIALS = 24  # steps tried in an iteration, with four times the damping each time, before it ends


class _Damping:
    """mu in (G + mu I) g = f - y: a number, or "auto", Levenberg-Marquardt.

    "auto" takes mu in proportion to the residual, which keeps convergence superlinear [YF01], and
    the factor of proportion from the gain ratio: the decrease of ||f - y||^2 over the one that the
    linear model f - G g promised. Its bounds are 0.3 and 0.05, since with the usual 0.75 and 0.25
    real data take many times as many steps.
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
        if not self.adaptive:
            return
        decrease = max(1.0 - (promised / before) ** 2, np.finfo(float).tiny)
        gain = (1.0 - (after / before) ** 2) / decrease
        if gain > 0.3:
            self._factor = max(self._factor / 4.0, 1e-7)
        elif gain < 0.05:
            self._factor *= 2.0


class _Progress:
    """What a fit tells while it runs, to the callback, and by lines (verbose=1) or bars (verbose=2,
    where tqdm is installed)."""

    def __init__(self, verbose, max_iter, ranks):
        self.ranks, self.verbose, self._tqdm = ranks, verbose if ranks.rank == 0 else 0, None
        self.any_callback = False  # whether any rank has one
        self.over = False  # whether the fit has ended
        self.error_state = np.geterr()  # of the caller, for the callback
        if self.verbose == 2:
            with suppress(ImportError):
                from tqdm import tqdm

                self._tqdm = tqdm
        self._bar, self._max_iter, self._last = None, max_iter, time.perf_counter()

    def drawn(self, share):
        """Told the share of neurons drawn: shown about once a second."""
        now = time.perf_counter()
        due = now - self._last > 1.0 or (self._bar is not None and share == 1.0)
        if self.verbose and due:
            self._last = now
            if self._tqdm is None:
                print(f"drawing neurons: {share:4.0%}")
            else:
                self._bar = self._bar or self._tqdm(total=100, desc="drawing neurons", unit="%")
                self._bar.update(int(100 * share) - self._bar.n)

    def tell(self, text):
        if self.verbose:
            (print if self._tqdm is None else self._tqdm.write)(text)

    def step(self, record):
        if self.verbose and self._tqdm is None:
            text = "{iteration:4d}  residual {residual:.2e}"
            if record["system_residual"] != record["residual"]:
                text += "  system_residual {system_residual:.2e}"
            text += "  damping {damping:.1e}  rejected {rejected}  changed {changed}"
            print((text + "  flips {flips}  {seconds:.3f} s").format(**record))
        elif self.verbose:
            if record["iteration"] == 0 or self._bar is None:
                self.close()
                total, desc = self._max_iter, "Gauss-Newton steps"
                self._bar = self._tqdm(total=total, desc=desc, unit="step")
            self._bar.set_postfix(residual=f"{record['residual']:.2e}")
            self._bar.update(record["iteration"] > 0)

    def close(self):
        if self._bar is not None:
            self._bar.close()
            self._bar = None


class _Unfinished(NamedTuple):
    """A step that has begun."""

    mark: dict  # of the search
    progress: _Progress  # of the fit


class SublinearTrainer:
    """Two-layer network with shifted ReLU, trained by Gauss-Newton steps on all points at once.

    Parameters
    ----------
    width : int, number m of neurons, even with init="antisymmetric".
    shift : float, "auto" or "paper", threshold b of the activation. "paper" is
        default_shift(width, alpha); "auto" lowers that, to 1 at the least, until the second step is
        predicted to be at most 0.08 times as long as the first, O(min(n, 1024)^3). shift_ says what
        was taken; a warm start keeps it.
    alpha : float in [0, 1), for "auto" and "paper".
    search : how active neurons are found; same network, same steps, other costs for each step. For
        given seed, X, width and shift the starting weights are the same for every search.
        "lazy"   products of live neurons near or above the threshold, and for each neuron a
                 certificate, until which nobody looks at them. About O(n |K|) for a first step,
                 then less as steps get smaller. Where neurons fire on many points, or there are
                 few, activity in words instead, and O(n d) for a look.
        "tree"   search trees over stored products: the paper. O(n |K| (min(k, d) + log m)) for |K|
                 changed neurons, each active on k points.
        "scan"   stored products, all compared: O(n m + n |K| min(k, d)).
        "dense"  products anew: O(n m d).
    solver : how the system for g is solved, (G + mu I) g = f - y without a ridge.
        "cholesky"    exactly, from the Gram matrix.
        "sketch"      conjugate gradients preconditioned by the paper's sketch of J^T.
        "richardson"  the paper's iteration and sketch, which must be larger then.
        "cg"          conjugate gradients, no preconditioner.
        "gradient"    g = (f - y) / ||G_0||: gradient descent. damping="auto" shortens the steps
                      where the residual would rise; a number has no effect.
        "sketch", "richardson" and "cg" stop at the relative tolerance of Algorithm 5,
        sqrt(lambda / n) / 6, which takes O(n^3) once; to it, steps of all searches agree.
    sketch : "sparse", "srht" or "gaussian".
    sketch_size : int >= n, rows of the sketch; None is max(8 n, 4 d), with 64 (n + 8) for
        "richardson".
    draw : "all" draws every neuron, from random_state alone. "live" draws no twins,
        the neurons 2 k and 2 k + 1 of an antisymmetric start, that fire on no point, until somebody
        asks for them, which is the same network in law; it is "all" where more than three of four
        twins would be drawn anyway. "auto" is "live" where that is faster.
    init : "antisymmetric", neurons in twins (w, +1), (w, -1), so that f = 0 at the start; or
        "gaussian", independent signs as in the paper.
    damping : float >= 0, 0 being the paper's pure step; or "auto", Levenberg-Marquardt: a step that
        would raise the residual (with a ridge, system_residual) is taken back and tried again with
        more damping, which fades as the linear model proves right.
    ridge : float >= 0; above 0 targets are fitted up to noise. Training then tends to where
        f - y = nu s, s being the sum of the dual steps and nu = ridge times the mean of
        G's diagonal at the start: where no pair flips that is kernel ridge regression with the
        network's own kernel. Each step solves (G + (nu + mu) I) g = f - y - nu s. 0.1 to 1 suit
        most noisy tables. A warm start on the same X goes on with s; on other points s begins at 0,
        so that nu holds the network where it is.
    normalize : how the rows of X get length 1. "lift" gives columns mean 0 and variance 1, appends
        a constant coordinate, so that parallel rows stay apart, and scales the rows; "rows" does
        the same without the coordinate; None takes X and y as they are; rows must have length 1, to
        1e-6. Constant columns have no effect. Unless None, targets get mean 0 and variance 1 too,
        and `predict` undoes it.
    dtype : precision of the products that "dense", "scan" and "tree" compute or keep. "float32"
        halves their memory and stops near a residual of 1e-6; "float64" reaches 1e-9. "lazy" always
        decides in float64.
    tol : float, relative residual ||f - y - nu s|| / ||y|| at which training stops. One below
        1e-12 (1e-6 in float32, unless search="lazy"), 0 among them, counts as that once a step no
        longer lowers the residual.
    max_iter : int, largest number of steps; 0 leaves the starting network.
    random_state : None, int, numpy RandomState or Generator. With draw="all" the starting weights
        depend on it, on init and on d alone, and a wider network extends a narrower one.
    warm_start : bool; if True, fit goes on from the weights that the last fit, or load, has left.
    callback : called with each record of history_; training stops if it returns True.
    verbose : 1 prints a line for each step, 2 shows bars where tqdm is installed.
    comm : None, or an mpi4py communicator (anything with its Allreduce, Allgather, rank and size),
        whose ranks share the neurons in blocks of 2^14 or more, block k being on rank k mod size.
        Needs search="lazy". All ranks pass the same X, y and options, but for callback and verbose;
        on machines of one kind they get the network of one process, to the bit, and the same
        attributes, but for seconds.
        *Collective* are fit, predict, score, weights, active_sets, check and save, and to pickle or
        copy a trainer: all ranks make these calls in the same order, in callbacks too, and a call
        that some ranks do not make waits for ever. All else is local, and so is everything with a
        network from load or pickle until fit has spread it.
        An error or an interrupt on one rank ends the call on all at the next message. The others
        raise ValueError, TypeError or KeyboardInterrupt if it was that, else RuntimeError, and name
        the rank and the cause. Only rank 0 prints, and warns of how training ended. If the callback
        of any rank returns True, training stops on all.
        Each rank sends 8 (n^2 + 2 n + 7) bytes at the start, for each step tried, once or twice at
        the end, and for each record if any rank has a callback; all of them again where the search
        begins again with a wider reach. "sketch" and "richardson" send all active pairs in every
        step; weights, save, pickle and a warm start on other points all that is held of live
        neurons.

    Attributes
    ----------
    history_ : a dict for the start (iteration 0) and for each step: iteration, residual (after it),
        system_residual (||f - y - nu s|| / ||y||, the same without ridge), loss (half the mean
        squared error, in the units of y squared), active (mean |Q_i| after it), changed (|K|,
        neurons the step moved), looked_at (neurons whose products it read), flips (pairs that
        crossed the threshold), inner_iterations, damping, rejected (dampings tried in vain
        before it: the step was taken back, or the system was singular),
        operations (multiply-adds, comparisons and moves of products), seconds, and of these
        seconds_jacobian (Gram matrix or sketch), seconds_solve, seconds_update (moving weights or
        products) and seconds_query (finding what is active, and taking back rejected steps).
        The start has no seconds: they are init_seconds_.
    loss_curve_ : list of the losses.
    residual_ (float), ||f - y|| / ||y||, n_iter_ (int), converged_ (bool), whether the system's
        residual is at most tol, shift_ (float), n_live_ (int, neurons active on some point when the
        search began and, except with "dense", all that an earlier fit held), init_seconds_ (float),
        signs_ (m,) int8.

    Memory: "lazy" holds for each live neuron its starting weights, which twins share, 72 bytes
    more, and 12 for each pair near the threshold, or, in words, 8 d + n / 8 bytes, and twice that
    in a step; nothing of size m. Where at most half of the live neurons are near the threshold it
    holds these only. "scan" holds n m products and "tree" (1 + 1/15) n m, both with the starting
    weights of live neurons; "dense" holds m d weights, and in a step those that change twice. All
    but "dense" add for each step tried 8 n bytes ("lazy" up to 40 n) and, unless in words, 12 for
    each flip.
    Costs: fit takes O(n m d) once, or O(n d) for each live neuron with draw="live"; then for each
    step the search as above and the solver, O(n^3) for "cholesky". It raises ValueError, TypeError
    or MemoryError on bad input, LinAlgError when the Gram matrix is singular and damping and ridge
    are zero.
    """

    _unfinished = None  # an _Unfinished, while a step has begun that is not in history_
    _log2_enough = None  # see _choose_shift

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
        draw="auto",
        damping="auto",
        ridge=0.0,
        normalize="lift",
        dtype="float64",
        tol=1e-6,
        max_iter=50,
        random_state=None,
        warm_start=False,
        callback=None,
        verbose=0,
        comm=None,
    ):
        vars(self).update((name, value) for name, value in locals().items() if name != "self")

    def fit(self, X, y):
        """Collective. Trains on X (n, d) and y (n,), neither of which is modified. Returns self.

        Starts from new weights unless warm_start is True. Whatever ends it early, an interrupt or
        any other exception, leaves the network at the last whole step, ready for use, and goes on
        to the caller.
        """
        ranks = self._ranks
        progress = _Progress(self.verbose, self.max_iter, ranks)
        with np.errstate(all="ignore"), ranks.together():
            self._fit(X, y, progress)
        return self

    @property
    def _ranks(self):
        """The processes that `comm` names."""
        return _Ranks.of(self.comm)

    def _fit(self, X, y, progress):
        self._check_options()
        ranks, shift = progress.ranks, self._highest_shift
        goes_on = self.warm_start and hasattr(self, "history_")
        given, X = X, _check_features(X, self) if goes_on else _check_matrix("X", X)
        y = _check_targets(y, len(X))
        if SOLVERS[self.solver].sketches and self.sketch_size is not None:
            size, n = self.sketch_size, len(X)
            if size < n:
                raise ValueError(
                    f"sketch_size must be at least the number {n} of points, got {size}"
                )
            _check_memory(f"a sketch with sketch_size={size}", 16 * size * n, "use a smaller one")
        seed = None if goes_on else _seed(self.random_state)
        seed, progress.any_callback = self._agree(X, y, seed, ranks)
        # The longest message: outputs in fixed point, counts, and a tally of four numbers.
        ranks.lengthen(2 * len(X) + len(X) ** 2 + 4)
        try:
            self._roll_back()
            draft = self._draft()
            if goes_on:
                draft._go_on(X, y, shift, progress)
            else:
                draft._begin(X, y, shift, _feature_names(given), seed, progress)
            self._adopt(draft)
            first, at_first = len(self.history_), self._system_residual
            stopped = (not goes_on and self._tell(progress)) or self._train(progress)
        except SystemError as error:  # what an exception in a compiled kernel may show as
            while isinstance(error, SystemError) and error.__cause__ is not None:
                error = error.__cause__
            raise error from None
        finally:
            progress.over = True
            _release_blas()
            self._roll_back()
            progress.close()
        if not (self.converged_ or stopped) and self.max_iter > 0 and ranks.rank == 0:
            later = (record["system_residual"] for record in self.history_[first:])
            self._warn([at_first, *later])

    def _draft(self):
        """A copy, on which a fit works until _adopt() takes it over, so that an exception, which
        may come at any moment, leaves this trainer as it was."""
        draft = object.__new__(type(self))
        vars(draft).update(vars(self))
        return draft

    def _adopt(self, draft):
        """Takes over the network of a draft, all at once. Options, whose names neither begin nor
        end with an underscore, stay: a signal handler may have set them since."""

        def part(trainer, of_network):
            named = vars(trainer).items()
            return {k: value for k, value in named if ("_" in (k[0], k[-1])) == of_network}

        self.__dict__ = {**part(self, False), **part(draft, True)}

    def _agree(self, X, y, seed, ranks):
        """Makes sure that all ranks fit the same. Returns the seed, rank 0's if it is drawn, and
        whether any rank has a callback."""
        if ranks.size == 1:
            return seed, self.callback is not None
        # First what makes other things differ.
        same = {"X": X, "y": y, "warm_start": self.warm_start, **self.get_params()}
        for name in ("comm", "callback", "verbose"):
            del same[name]
        same["random_state"] = None if self.random_state is None else seed
        last = ()
        if seed is None:  # a network that goes on
            start = self._start
            last = self.n_iter_, self.residual_, self.shift_, start.seed, self._X, self._sums
            last += () if start.law is None else (start.law.seen, start.law.points)
        same["the network of the last fit"] = last
        ranks.agree(same)
        seeds, given = ranks.gather(np.array([seed or 0], np.uint64), [self.callback is not None])
        return int(seeds[0]), bool(given.any())

    def _begin(self, X, y, shift, names, seed, progress):
        """Becomes a new network."""
        begin, self.n_features_in_ = time.perf_counter(), X.shape[1]
        vars(self).pop("feature_names_in_", None)
        if names is not None:
            self.feature_names_in_ = names
        self._scales = _Scales.of(X, y, self.normalize)
        self._take(X, y)
        n, d = self._X.shape
        self.shift_, self._log2_enough = self._choose_shift(shift, progress)
        law = None
        in_words = self.draw == "auto" and _words_are_faster(n, d, self.width, self.shift_)
        if self.draw != "all" and self.init == "antisymmetric" and not in_words:
            law = _Law((self._X,), self.shift_)
            law = law if law.rate <= HIGHEST_RATE else None
        start = _Start(seed, int(self.width), d, self.init, progress.ranks, law)
        held = _Held(NOBODY, np.zeros((0, d), np.float32), np.zeros(0), 0.0)
        self._begin_search(start, held, True, progress)
        self._sums, self._mean_diagonal = np.zeros(n), self._search.mean_diagonal
        self._measure()
        self.history_, damping = [], 0.0 if self.damping == "auto" else float(self.damping)
        told = dict.fromkeys(("changed", "flips", "inner_iterations", "rejected"), 0)
        self._record(_Stopwatch(), damping=damping, **told)
        self.init_seconds_ = time.perf_counter() - begin

    def _go_on(self, X, y, shift, progress):
        """Keeps the weights, perhaps with other points, targets or methods."""
        begin, scales, search = time.perf_counter(), self._scales, self._search
        start, ranks, X_before = self._start, progress.ranks, self._X
        for name, now, before in (
            ("width", self.width, start.width),
            ("init", self.init, start.init),
            ("shift", self.shift_ if self.shift == "auto" else shift, self.shift_),
            ("normalize", self.normalize, scales.normalize),
        ):
            if now != before:
                raise ValueError(
                    f"{name} must stay {before!r} for warm_start=True to go on with the network, "
                    f"got {now!r}; use warm_start=False to begin anew"
                )
        if start.ranks.size > 1 and start.ranks.comm is not ranks.comm:
            raise ValueError(
                "comm must stay the same for warm_start=True to go on with neurons that are spread "
                "over its ranks; save the network, and load it before you set another"
            )
        self._take(X, y)
        same_points = np.array_equal(self._X, X_before)
        same_search = (
            same_points
            and type(search) is _search_class(self.search, self._X, self.width, self.shift_)
            and search.dtype == self.dtype
            and start.ranks.comm is ranks.comm
            and (search.clear is None or not SOLVERS[self.solver].sketches)
        )
        if not same_search:
            may_wake, start = True, start._replace(ranks=ranks)
            if start.law is not None:
                law = start.law.with_points(self._X)
                may_wake = law is not start.law
                start = start if start.law.seen else start._replace(law=law)
            held = _Held.of(self._trained_network(), start)
            self._begin_search(start, held, may_wake, progress)
        if not same_points:
            self._sums, self._mean_diagonal = np.zeros(len(y)), self._search.mean_diagonal
            self._log2_enough = None
        self._measure()
        self.init_seconds_ = time.perf_counter() - begin

    def _take(self, X, y):
        """The points and targets of a fit."""
        self._X, self._y = self._scales.unit_rows(X), self._scales.targets(y)
        self._unreachable = _unreachable(self._X, self._y)
        if self._unreachable.any() and not self.ridge:
            _warn_of_coinciding_rows(self._X, self._y, self._unreachable)

    def _choose_shift(self, highest, progress):
        """The threshold that shift="auto" takes, or `highest`, which is what shift is otherwise;
        and where none is low enough, the power of 2 of a width at which one is."""
        if self.shift != "auto":
            return highest, None
        damping = DAMPING
        if self.damping != "auto":
            damping = self.damping / max(scipy.special.ndtr(-highest), 1e-300)
        y = self._y - self._unreachable
        with _one_blas_thread():
            shift, at_highest, ratio = _shift_for(
                self._X, y, self.width, highest, self.ridge + damping
            )
        text = f"shift {shift:.3g}: the second step is predicted to be {ratio:.2g} times as long "
        text += "as the first"
        if shift < highest:
            text += f"; at the paper's {highest:.3g} it would be {at_highest:.2g} times"
        progress.tell(text)
        if not 1.01 * RATIO < ratio < np.inf:
            return shift, None
        return shift, math.ceil(math.log2(self.width) + 4 / 3 * math.log2(ratio / RATIO))

    def _begin_search(self, start, held, may_wake, progress):
        """A search at the network of which some neurons are held; `may_wake` is whether others may
        be live, which must be drawn then."""
        X, dtype = self._X, np.dtype(self.dtype)
        kind = _search_class(self.search, X, start.width, self.shift_)
        kind.check_memory(X, start.own_width, dtype)
        if self.search != "lazy" and start.law is not None:  # dead neurons, too, are held, and seen
            if may_wake and start.draws_live:
                held = _with_live_twins(held, start, progress.drawn)
            start = start.shown()
        may_be_lean, targets = not SOLVERS[self.solver].sketches, self._y - self._unreachable
        how = may_wake, may_be_lean, dtype, progress.drawn
        self._search = kind(X, targets, start, self.shift_, held, *how)
        self._network, self.n_live_ = None, self._search.n_live

    def _train(self, progress):
        """Steps until the residual is at most tol, or at the floor of rounding, or max_iter of
        them. True if a callback has ended it."""
        with _one_blas_thread():
            solver, damping = self._new_solver(), _Damping(self.damping)
        last, rounding = self.n_iter_ + self.max_iter, self._floor()
        while not self.converged_ and self.n_iter_ < last and np.isfinite(self._system_residual):
            before = self._system_residual
            stepped = self._step(solver, damping, progress, self.n_iter_ + 1 == last)
            if stepped and self._tell(progress):
                return True
            # Nothing is gained where no step lowers the residual, or none can be made; pure steps
            # may raise it for a while, unless rounding is all that is left of it.
            gained = stepped and self._system_residual <= (1.0 - 1e-10) * before
            final = not stepped or damping.adaptive or self._system_residual <= rounding
            if not gained and final:
                break
        self.converged_ = bool(self._system_residual <= max(self.tol, rounding))
        return False

    @property
    def _nu(self):
        """nu, as ridge has it."""
        return self.ridge * self._mean_diagonal

    def _measure(self):
        """Sets what follows from the outputs and s: residual_; _right_side, f - (y - u) - nu s
        (n,), u being the part of y that no step can fit, `_unreachable`; _system_residual, which is
        residual_, u included, without a ridge, and ||_right_side|| / ||y|| with one; converged_."""
        outputs, y, nu = self._search.outputs, self._y, self._nu
        self.residual_ = self._system_residual = _relative(outputs - y, y)
        self._right_side = outputs - (y - self._unreachable)
        if nu > 0:
            self._right_side -= nu * self._sums
            # A point without active neurons is met by a s_i that moves no weight, and is left out.
            self._right_side[self._search.jacobian().active_counts() == 0] = 0.0
            self._system_residual = _relative(self._right_side, y)
        self.converged_ = self._system_residual <= self.tol

    def _floor(self):
        """The relative residual below which all is rounding, whatever tol."""
        return 1e-6 if self.dtype == "float32" and self.search != "lazy" else 1e-12

    def _new_solver(self):
        kind, problem = SOLVERS[self.solver], (self._X, self.shift_)
        if kind.sketches:
            seed = self._search.start.seed
            return kind(*problem, SKETCHES[self.sketch], self.sketch_size, seed)
        if kind is _Gradient:
            return kind(*problem, self.damping == "auto")
        return kind(*problem)

    def _step(self, solver, damping, progress, is_last):
        """One step and its record; False if it is not finite, or if no damping makes the residual
        fall."""
        search, stopwatch, before = self._search, _Stopwatch(), self._system_residual
        # g leaves out the part of f - y that no step can reduce: it would blow g up as mu falls,
        # without moving a weight.
        J, nu, right_side = search.jacobian(), self._nu, self._right_side
        for rejected in range(TRIALS):
            mu = damping.value(search.mean_diagonal, before)
            try:
                # With more points, threads of BLAS gain more than they lose.
                few = len(right_side) <= solver.one_thread
                with _one_blas_thread() if few else nullcontext():
                    solver.prepare(J, nu, mu)
                    stopwatch.lap("seconds_jacobian")
                    step, inner_iterations = solver.solve(right_side)
                    stopwatch.lap("seconds_solve")
            except np.linalg.LinAlgError:
                if not damping.adaptive:
                    raise
                damping.reject()
                continue
            if not np.isfinite(step).all():
                return False
            promised = solver.promise(J, right_side, step, nu, mu)
            promised = promised if nu else promised - self._unreachable
            # Points without active neurons move no weight, but their g_i can be as large as 1 / mu,
            # which would drown the others in sums.
            step = np.where(J.active_counts() > 0, step, 0.0)
            trial = self._draft()
            trial._sums = self._sums + step
            changed, self._unfinished = search.changing, _Unfinished(search.mark(), progress)
            flips = search.advance(step, stopwatch.lap)
            trial._measure()
            doubtful = search.rounding > DOUBT * trial._system_residual * _norm(self._y)
            if (trial.converged_ or is_last) and doubtful:
                search.settle()
                stopwatch.lap("seconds_query")
                trial._measure()
            after = trial._system_residual
            if after < before or not damping.adaptive:
                damping.accept(before, after, np.linalg.norm(promised) / _norm(self._y))
                told = {"changed": changed, "flips": flips, "rejected": rejected}
                told |= {"inner_iterations": inner_iterations, "damping": float(mu)}
                trial._record(stopwatch, **told)
                self._adopt(trial)  # now the step is done, and there is no mark any more
                return True
            self._roll_back()
            stopwatch.lap("seconds_query")
            damping.reject()
        return False

    def _record(self, stopwatch, **told):
        """Adds a record to history_, after a step or at the start."""
        search, n = self._search, len(self._y)
        operations, looked_at = search.take_tally()
        unit = _norm(self._y) * self._scales.y_unit / np.sqrt(2 * n)
        record = {
            "iteration": len(self.history_),
            "residual": self.residual_,
            "system_residual": self._system_residual,
            "loss": float(np.square(self.residual_ * unit)),
            "active": search.nnz / n,
            "looked_at": looked_at,
            **told,
            "operations": operations,
            "seconds": sum(stopwatch.phases.values()),
            **stopwatch.phases,
        }
        self.n_iter_, self.history_ = len(self.history_), [*self.history_, record]

    def _roll_back(self):
        """Takes back a step that has begun and is not in history_."""
        if self._unfinished is not None:
            self._search.undo(self._unfinished.mark)
            self._unfinished = None

    def _tell(self, progress):
        """Shows the last record; True if the callback of any rank asks to stop."""
        progress.step(self.history_[-1])
        with np.errstate(**progress.error_state):
            answer = self.callback(self.history_[-1]) if self.callback else None
        if not progress.any_callback:
            return False
        stops = isinstance(answer, (bool, np.bool_)) and bool(answer)
        (stopping,) = progress.ranks.sum(np.array([stops]))
        return bool(stopping[0])

    def _warn(self, residuals):
        of = "of the system with a ridge " if self.ridge else ""
        warnings.warn(
            f"relative residual {of}{self._system_residual:.2e} after {self.n_iter_} steps is "
            f"above tol={self.tol:g}: {self._remedy(residuals)}",
            _convergence_warning(_of_sklearn("ConvergenceWarning", ConvergenceWarning)),
            stacklevel=4,
        )

    def _remedy(self, residuals):
        """Why training has ended above tol, and what to change; `residuals` are those at the
        beginning of the fit and after each of its steps."""
        counts, (n, m) = self._search.jacobian().active_counts(), (len(self._X), self.width)
        silent, last, reached = np.flatnonzero(counts == 0), residuals[-6:], self._system_residual
        noisy = "" if self.ridge else "; for noisy targets set ridge (try 0.1)"
        wider = "lower shift or raise width"
        if self._log2_enough is not None:
            wider = f"raise width from {m} to 2^{self._log2_enough}, where steps are predicted to "
            wider += "shrink"
        if not np.isfinite(reached) or last[-1] > 1.5 * min(last):
            return (
                f'training with damping={self.damping} diverges; set damping="auto", or use a '
                f"larger width or a smaller shift{noisy}"
            )
        least = np.linalg.norm(self._unreachable) / _norm(self._y)
        if reached <= 1.01 * least and not self.ridge:
            return (
                f"it cannot fall below {least:.2e} since points coincide; raise tol above that, or "
                "merge them"
            )
        if silent.size and not self.ridge:
            return (
                f"{silent.size} of {n} points have no active neuron (the first is {silent[0]}), so "
                "their outputs cannot move; lower shift, or raise width"
            )
        if counts.mean() > 0.95 * m:
            linear = "nearly all neurons are active on all points, which makes the network linear"
            return f"{linear}; raise shift"
        if reached <= 10.0 * self._floor() * np.sqrt(n) / _norm(self._y):
            finer = ', or use dtype="float64"' if self._floor() > 1e-12 else ""
            return f"rounding hides what is left of targets so small; scale y{finer}"
        slowed = self.damping not in ("auto", 0) and self.solver != "gradient"
        if slowed and len(last) > 1 and last[-1] > 0.8 * last[-2]:
            return f'steps are short with damping={self.damping:g}; lower it, or use "auto"'
        if len(residuals) > self.max_iter and last[-1] < 0.99 * last[0]:
            return f"it was still falling; raise max_iter, or, for faster steps, {wider}{noisy}"
        if self.n_features_in_ <= 2:
            return (
                "it has all but stopped falling: as functions of so few columns, networks are "
                "smooth. For targets that vary quickly add columns to X, such as splines or sines "
                f"of these (scikit-learn's SplineTransformer); for others raise width{noisy}"
            )
        return f"it has stopped falling; {wider}, for more active neurons{noisy}"

    @_quiet
    def predict(self, X):
        """Collective. Outputs (k,) of the trained network at X (k, d), in the units of y.

        O(k d n_live), shared by all ranks, with init="antisymmetric", whose dead neurons cancel;
        O(k d m) otherwise, and with search="dense". init="gaussian" draws the weights of dead
        neurons again, and a very wide network those of live ones that it does not hold, O(n d)
        each.
        """
        with self._at_whole_step() as ranks:
            X = self._scales.unit_rows(_check_features(X, self))
            ranks.agree({"X": X})
            ranks.lengthen(2 * len(X))
            return self._scales.outputs(self._trained_network().outputs(X))

    @_quiet
    def score(self, X, y, sample_weight=None):
        """Coefficient of determination R^2 of predict(X) with respect to y, points weighted by
        sample_weight (k,) if given. Collective.

        Of constant y it is 1.0 if all predictions are right, else 0.0; of a single point nan, with
        a warning.
        """
        predicted = self.predict(X)
        y = _check_targets(y, predicted.size, warn=False)
        if sample_weight is not None:
            sample_weight = _check_vector("sample_weight", sample_weight, size=y.size)
            if sample_weight.sum() == 0:
                raise ValueError("sample_weight must not sum to zero; give some point a weight")
        if y.size < 2:
            warning = _of_sklearn("UndefinedMetricWarning", UserWarning)
            message = "R^2 is not defined for a single point; pass at least two"
            warnings.warn(message, warning, stacklevel=3)
            return float("nan")
        mean, unit = partial(np.average, weights=sample_weight), np.abs(y).max() or 1.0
        y, predicted = y / unit, predicted / unit  # so that squares stay in range
        error, spread = mean((y - predicted) ** 2), mean((y - mean(y)) ** 2)
        if spread == 0 or (y == y[0]).all():
            return float(error == 0)
        return float(1.0 - error / spread)

    @_quiet
    def weights(self):
        """Hidden weights now (m, d) float64, on every rank; d counts the coordinate that
        normalize="lift" appends. Collective.

        Once it has shown dead neurons they are fixed: a later fit on other points may wake them,
        but not draw them anew. Raises MemoryError if the weights do not fit.
        """
        with self._at_whole_step():
            network = self._trained_network()
            weights = network.of_all_ranks().all_weights()
        if network.start.draws_live:
            network = network._replace(start=network.start.shown())
            if self._search is None:
                self._network = network
            else:
                self._search.start = network.start
                self._search._network_of = self._search.outputs, network
        return weights

    @property
    def signs_(self):
        """Output signs (m,). Local."""
        self._check_fitted()
        return self._start.all_signs()

    @_quiet
    def active_sets(self):
        """Neurons active on each training point now, those of all ranks: (indptr, indices), those
        of point i being indices[indptr[i]:indptr[i + 1]], ascending. Collective."""
        with self._at_whole_step():
            if self._search is None:
                active = self._network.active_sets(self._X)
            else:
                active = self._search.active_sets()
        return _by_point(active, len(self._X))

    def _at_whole_step(self):
        """What is done in this context is done by all ranks, on the network as the last whole step
        has left it."""
        self._check_fitted()
        return self._start.ranks.together()

    @property
    def _start(self):
        """The starting weights of the network, which know the ranks that share it."""
        return self._network.start if self._search is None else self._search.start

    def _trained_network(self):
        return self._network if self._search is None else self._search.network()

    @_quiet
    def _check_fitted(self):
        """Raises unless there is a network, and takes back what there is of a step."""
        if not hasattr(self, "history_"):
            error = _of_sklearn("NotFittedError", AttributeError)
            raise error("this SublinearTrainer is not fitted yet; call fit(X, y) first")
        if self._unfinished is not None and not self._unfinished.progress.over:
            raise RuntimeError(
                "fit is in the middle of a step, so that there is no network to read; read it in "
                "the callback, which is called between steps"
            )
        self._roll_back()

    @property
    def loss_curve_(self):
        """The losses of history_, as MLPRegressor has them."""
        self._check_fitted()
        return [record["loss"] for record in self.history_]

    @_quiet
    def check(self):
        """Asserts that active sets and residual are those of the weights. Collective.

        Makes the weights: m d numbers, O(n m d). A product within rounding of the threshold may
        count as either.
        """
        with self._at_whole_step():
            W, signs = self._trained_network().of_all_ranks().all_weights(), self.signs_
        (indptr, neurons), X, shift = self.active_sets(), self._X, self.shift_
        active = scipy.sparse.csr_array(
            (np.ones(neurons.size, bool), neurons, indptr), (len(X), len(W))
        )
        active, tolerance = active.tocsc(), 1e-4 if self._floor() > 1e-12 else 1e-9
        outputs, sizes = np.zeros(len(X)), np.zeros(len(X))  # of sums, and of what they add up
        for first in range(0, len(W), BLOCK):
            block = slice(first, first + BLOCK)
            excess = X @ W[block].T - shift
            scales = 1.0 + abs(shift) + np.linalg.norm(W[block], axis=1)
            right = active[:, block].toarray() == (excess >= 0)
            doubtful = np.abs(excess) <= tolerance * scales
            assert (right | doubtful).all(), "active sets are not those of the weights"
            outputs += np.maximum(excess, 0.0) @ signs[block]
            sizes += (excess >= 0) @ scales
        residual = _relative(outputs / np.sqrt(len(W)) - self._y, self._y)
        size = np.linalg.norm(sizes / np.sqrt(len(W))) / _norm(self._y)
        tolerance *= 10 * (1.0 + residual) + 1e-3 * size
        error = abs(residual - self.residual_)
        assert error <= tolerance, "the residual is not that of the weights"

    @_quiet
    def save(self, path):
        """Writes the trained network to the file `path`, an npz without pickled objects.
        Collective: rank 0 writes one file, the same, but for seconds, as one process writes.

        It holds the weights of the neurons that the search holds, live ones or, with
        search="dense", all; others are drawn again, from the seed. Further the training points,
        options and history. A kill at any moment leaves the old file or the new one, whole. The
        callback and comm are not saved; of random_state, the seed is.
        """
        with self._at_whole_step() as ranks:
            self._check_options()  # which may have been set since, and load will check them
            network = self._trained_network().of_all_ranks(kept=ranks.rank == 0)
            if ranks.rank == 0:
                _write_whole(path, _saved(self, network))
            ranks.sum()  # others wait here while rank 0 writes

    @classmethod
    def load(cls, path):
        """The trainer that `save` has written to the file `path`: it predicts the same to the bit,
        and fit with warm_start=True goes on with it. No code of the file is run. Raises ValueError
        if it is damaged or foreign.

        Local: each rank that calls it gets the whole network, with comm=None. Once all of them have
        set comm, fit with warm_start=True spreads it over any number of ranks.
        """
        with open(_check_regular_file(os.fspath(path)), "rb") as file:
            try:
                loaded = np.load(file, allow_pickle=False)
                return _restored(cls, {name: loaded[name] for name in loaded.files})
            except MemoryError:
                raise
            except Exception as error:  # what a damaged archive raises is of many kinds
                raise ValueError(
                    "path must be a file written by SublinearTrainer.save, but "
                    f"{os.fspath(path)!r} is damaged or foreign ({type(error).__name__}: {error}); "
                    "save the trainer again"
                ) from None

    @_quiet
    def __getstate__(self):
        """Collective. What pickle and copy take: the network, which predicts the same to the bit,
        and all options; not the search, which is made again where training goes on. What is spread
        over ranks is copied whole; comm is None then."""
        if not hasattr(self, "history_"):
            return vars(self)
        with self._at_whole_step():
            network = self._trained_network().of_all_ranks()
        return {**vars(self), "_network": network, "_search": None, "comm": None}

    def get_params(self, deep=True):
        """Constructor arguments by name."""
        return {name: getattr(self, name) for name in inspect.signature(type(self)).parameters}

    def set_params(self, **params):
        """Sets constructor arguments by name."""
        known = self.get_params()
        for name in params:
            _check_choice("parameter", name, known)
        vars(self).update(params)
        return self

    def __repr__(self):
        defaults = inspect.signature(type(self)).parameters
        params = self.get_params().items()
        changed = [f"{name}={value!r}" for name, value in params if value != defaults[name].default]
        return f"SublinearTrainer({', '.join(changed)})"

    _estimator_type = "regressor"  # what scikit-learn asks before version 1.6

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

    def _check_options(self):
        """Raises on bad options."""
        _check_integer("width", self.width, 1, 1 << 50)
        for name, known in (
            ("search", SEARCHES),
            ("solver", SOLVERS),
            ("sketch", SKETCHES),
            ("init", ("antisymmetric", "gaussian")),
            ("draw", ("auto", "live", "all")),
            ("dtype", ("float32", "float64")),
            ("normalize", ("lift", "rows", None)),
            ("verbose", (0, 1, 2)),
            ("warm_start", (False, True)),
        ):
            _check_choice(name, getattr(self, name), known)
        if self.init == "antisymmetric" and self.width % 2:
            raise ValueError(
                f'init="antisymmetric" needs an even width, got {self.width}; use it +- 1, or '
                'init="gaussian"'
            )
        if self.draw == "live" and self.init != "antisymmetric":
            raise ValueError(
                'draw="live" needs init="antisymmetric", since other dead neurons matter to '
                'predictions; use draw="all"'
            )
        if self.sketch_size is not None:
            _check_integer("sketch_size", self.sketch_size, 1)
        _check_real("damping", self.damping, 0.0, words=["auto"])
        _check_real("ridge", self.ridge, 0.0)
        _check_real("tol", self.tol, 0.0)
        _check_integer("max_iter", self.max_iter, 0)
        if self.callback is not None and not callable(self.callback):
            raise TypeError(f"callback must be callable, got {self.callback!r}")
        if self._ranks.size > 1 and self.search != "lazy":
            raise ValueError(
                f'search="{self.search}" keeps to one process; use search="lazy" with a comm of '
                f"{self._ranks.size} ranks"
            )
        default_shift(self.width, self.alpha)  # which checks alpha
        _check_real("shift", self.shift, words=["auto", "paper"])

    @property
    def _highest_shift(self):
        """The threshold that is asked for, from which shift="auto" goes down."""
        paper = default_shift(self.width, self.alpha)
        return paper if self.shift in ("auto", "paper") else float(self.shift)


def _norm(y):
    """Euclidean length of y, or 1 if it is zero. Scaled by a power of two, which changes no bit, so
    that squares stay in range."""
    with np.errstate(under="ignore"):
        _, exponent = np.frexp(np.abs(y).max())
        return np.ldexp(np.linalg.norm(np.ldexp(y, -exponent)), exponent) or 1.0


def _relative(error, y):
    return float(_norm(error) / _norm(y)) if error.any() else 0.0


@cache
def _convergence_warning(theirs):
    """ConvergenceWarning that is scikit-learn's too, so that filters of either work."""
    return type("ConvergenceWarning", tuple(dict.fromkeys((ConvergenceWarning, theirs))), {})


# ==================================================================================================
# Checks of input that several places share, or that are long
# ==================================================================================================


def _is_number(value):
    return isinstance(value, (int, float, np.integer, np.floating)) and not isinstance(value, bool)


def _check_real(name, value, low=-np.inf, below=np.inf, words=()):
    """A finite float with low <= value < below, or one of some words."""
    if isinstance(value, str) and value in words:
        return value
    if not _is_number(value):
        known = "".join(f' or "{word}"' for word in words if isinstance(value, str))
        raise TypeError(f"{name} must be a number{known}, got {value!r}")
    try:
        finite, got = math.isfinite(value), repr(value)
    except OverflowError:
        finite, got = False, "an integer beyond all floats"
    if not finite or not low <= value < below:
        everywhere = np.isinf(low) and np.isinf(below)
        allowed = "finite" if everywhere else f"a finite number in [{low:g}, {below:g})"
        raise ValueError(f"{name} must be {allowed}, got {got}")
    return float(value)


def _check_integer(name, value, low, high=None):
    if isinstance(value, bool) or not isinstance(value, (int, np.integer)):
        remedy = f"; pass int({name})" if isinstance(value, (float, np.floating)) else ""
        raise TypeError(f"{name} must be an integer, got {value!r}{remedy}")
    if value < low:
        raise ValueError(f"{name} must be at least {low}, got {value!r}")
    if high is not None and value > high:
        got = value if value < 1 << 80 else "more than 2^80"
        raise ValueError(f"{name} must be at most {high}, got {got}")
    return int(value)


def _check_choice(name, value, known):
    if not (isinstance(value, (str, int, np.integer, np.bool_, type(None))) and value in known):
        raise ValueError(f"{name} must be one of {', '.join(map(repr, known))}, got {value!r}")
    return value


def _as_array(name, value):
    """An array of real numbers, of any shape, finite or not, nothing masked or missing."""
    if scipy.sparse.issparse(value):
        raise TypeError(f"{name} is a sparse matrix, which is not supported; pass {name}.toarray()")
    parts = value if isinstance(value, (list, tuple)) else [value]
    if any(np.ma.is_masked(part) for part in parts if isinstance(part, np.ma.MaskedArray)):
        raise ValueError(
            f"{name} has masked entries, which are missing values; remove their rows, or impute "
            f"them, for example by {name}.filled(...)"
        )
    try:
        array = np.asarray(value)
    except ValueError:
        raise ValueError(f"{name} must be an array, but its rows have different lengths") from None
    if array.dtype.kind == "c":
        raise ValueError(f"Complex data not supported: {name} must be real; pass its real part")
    got = f"dtype {array.dtype}; encode it as numbers (astype(float))"
    if array.dtype.kind == "O" and array.ndim == 0:
        remedy = f"; pass {name}.collect()" if hasattr(value, "collect") else ""
        got = "None" if value is None else f"an object {type(value).__name__}{remedy}"
    elif array.dtype.kind == "O":
        # Pandas' NA is no number, not even a missing one.
        entries = (np.nan if type(entry).__name__ == "NAType" else entry for entry in array.flat)
        try:
            array = np.fromiter(entries, object, array.size).reshape(array.shape).astype(float)
        except OverflowError:
            raise ValueError(
                f"{name} must be finite, but has an integer beyond all floats; scale it down"
            ) from None
        except (TypeError, ValueError) as error:
            raise TypeError(
                f"{name} must be an array of numbers, but of its entries: {error}; "
                "encode it as numbers"
            ) from None
    if array.dtype.kind not in "fiub":
        raise TypeError(f"{name} must be an array of numbers, got {got}")
    return array.astype(float) if array.dtype.kind == "f" and array.itemsize > 8 else array


def _check_numbers(name, value, dimensions):
    """A finite, real array of that many dimensions, none of them empty."""
    array = _as_array(name, value)
    if array.ndim != dimensions:
        remedy = f"; pass one column, or np.ravel({name})"
        if dimensions == 2:
            remedy = f". Reshape your data: pass {name}.reshape(len({name}), -1), or {name}[None] "
            remedy += "for one row"
        raise ValueError(
            f"{name} must have {dimensions} dimension(s), got shape {array.shape}{remedy}"
        )
    if array.size == 0:
        lacking = "feature" if len(array) else "sample"
        raise ValueError(
            f"{name} must not be empty, but has 0 {lacking}(s) (shape={array.shape}) while a "
            "minimum of 1 is required."
        )
    if not np.isfinite(array).all():
        where = tuple(int(k) for k in np.argwhere(~np.isfinite(array))[0])
        what = "NaN" if np.isnan(array[where]) else f"{array[where]}"
        raise ValueError(
            f"{name} must be finite, but contains {what} at {name}{list(where)}; "
            "remove or impute such entries"
        )
    return array


def _check_matrix(name, value, keep_float32=False):
    array = _check_numbers(name, value, 2)
    kept = keep_float32 and array.dtype == np.float32
    return np.ascontiguousarray(array, dtype=np.float32 if kept else np.float64)


def _check_vector(name, value, size=None, reason="one for each row of X"):
    array = _check_numbers(name, value, 1)
    if size is not None and array.size != size:
        raise ValueError(f"{name} must have {size} entries, {reason}, got {array.size}")
    return array.astype(float)


def _check_targets(value, size, warn=True):
    """A vector; a single column counts as one, with a warning."""
    if value is None:
        raise ValueError("fit requires y to be passed, but the target y is None")
    y = _as_array("y", value)
    if y.ndim == 2 and y.shape[1] == 1:
        if warn:
            warnings.warn(
                "A column-vector y was passed when a 1d array was expected, got shape "
                f"{y.shape}; pass np.ravel(y)",
                _of_sklearn("DataConversionWarning", UserWarning),
                stacklevel=4,
            )
        y = y.ravel()
    return _check_vector("y", y, size=size)


def _feature_names(X):
    """Column names of a data frame, if they are strings; else None."""
    names = getattr(X, "columns", None)
    if names is None or not all(isinstance(name, str) for name in names):
        return None
    return np.asarray(names, dtype=object)


def _check_features(X, fitted):
    """X (k, n_features_in_) with the columns that the `fitted` trainer has seen, in their order."""
    array = _check_matrix("X", X)
    names, expected = _feature_names(X), getattr(fitted, "feature_names_in_", None)
    if names is not None and expected is not None and list(names) != list(expected):
        text = "The feature names should match those that were passed during fit.\n"
        for what, those in (
            ("unseen at fit time", set(names) - set(expected)),
            ("seen at fit time, yet now missing", set(expected) - set(names)),
        ):
            if those:
                text += "\n- ".join([f"Feature names {what}:", *sorted(those)]) + "\n"
        if set(names) == set(expected):
            text += "Feature names must be in the same order as they were in fit.\n"
        raise ValueError(text)
    if (names is None) != (expected is None):
        has, how = ("has", "without") if expected is None else ("does not have valid", "with")
        warnings.warn(
            f"X {has} feature names, but SublinearTrainer was fitted {how} feature names",
            UserWarning,
            stacklevel=4,
        )
    if array.shape[1] != fitted.n_features_in_:
        raise ValueError(
            f"X has {array.shape[1]} features, but SublinearTrainer is expecting "
            f"{fitted.n_features_in_} features as input; pass the columns that fit saw"
        )
    return array


def _of_sklearn(name, otherwise):
    """An exception or warning of scikit-learn, whose users expect it, if scikit-learn is in use."""
    return getattr(sys.modules.get("sklearn.exceptions"), name, otherwise)


def _check_unit_rows(X):
    lengths = np.linalg.norm(X, axis=1)
    worst = np.argmax(np.abs(lengths - 1.0))
    if abs(lengths[worst] - 1.0) > 1e-6:
        raise ValueError(
            f"rows of X must have length 1, but row {worst} has length {lengths[worst]:.6g}; "
            "pass X / np.linalg.norm(X, axis=1, keepdims=True), or "
            'normalize="rows" or "lift" to SublinearTrainer'
        )
    return X


def _check_index(name, value, size):
    value = _check_integer(name, value, -np.inf)
    if not 0 <= value < size:
        raise IndexError(f"{name} must be in 0..{size - 1}, got {value}")
    return value


def _check_integers(name, value, least=0):
    """A vector of so many integers at least."""
    array = _as_array(name, value)
    if array.ndim != 1 or array.size < least or (array.size and array.dtype.kind not in "iu"):
        raise TypeError(
            f"{name} must be a {'non-empty ' if least else ''}vector of integers, got dtype "
            f"{array.dtype}, shape {array.shape}"
        )
    return array.astype(np.int64)


def _check_indices(name, value, size):
    indices = _check_integers(name, value, least=1)
    outside = indices[(indices < 0) | (indices >= size)]
    if outside.size:
        raise IndexError(f"{name} must be in 0..{size - 1}, got {outside[0]}")
    values, counts = np.unique(indices, return_counts=True)
    if values.size < indices.size:
        raise ValueError(
            f"{name} must be distinct, but {values[np.argmax(counts)]} occurs {counts.max()} times"
        )
    return indices


def _check_threshold(tau):
    """A number, possibly infinite."""
    if not _is_number(tau) or math.isnan(tau):
        raise ValueError(f"tau must be a number, possibly infinite, got {tau!r}")
    return float(tau)


def _check_csr(indptr, indices, n, m):
    indptr, indices = _check_integers("indptr", indptr), _check_integers("indices", indices)
    rises = indptr.size == n + 1 and indptr[0] == 0 and (np.diff(indptr) >= 0).all()
    if not rises or indptr[-1] != indices.size:
        raise ValueError(
            f"indptr must rise from 0 to indices.size = {indices.size} in {n + 1} entries, one "
            f"more than X has rows; got {indptr.size} entries"
        )
    if indices.size and not 0 <= indices.min() <= indices.max() < m:
        raise IndexError(f"indices must be in 0..{m - 1}, got {indices.min()}..{indices.max()}")
    pairs = np.repeat(np.arange(n), np.diff(indptr)) * m + indices
    if np.unique(pairs).size < pairs.size:
        raise ValueError("indices must name a neuron at most once for each point")
    return indptr, indices


def _check_memory(what, needed, remedy="use fewer neurons or points"):
    """Refuses what cannot fit, before it is allocated."""
    try:
        with open("/proc/meminfo") as lines:
            found = (line for line in lines if line.startswith("MemAvailable"))
            available = 1024 * int(next(found).split()[1])
    except (OSError, StopIteration):  # not Linux
        sizes = "SC_PAGE_SIZE", "SC_PHYS_PAGES"
        available = math.prod(map(os.sysconf, sizes)) if hasattr(os, "sysconf") else np.inf
    if needed > available:
        raise MemoryError(
            f"{what} would need {needed / 2**30:,.1f} GiB, but {available / 2**30:,.1f} GiB are "
            f"available; {remedy}"
        )


# ==================================================================================================
# Threads: one way to run work side by side
# ==================================================================================================


@cache
def _helpers(process):
    """A queue of functions that threads call, one for each process: a fork inherits the queue, but
    not the threads. Not a ThreadPoolExecutor, whose locks an interrupt can leave locked."""
    tasks = SimpleQueue()

    def call_tasks():
        while True:
            tasks.get()()

    for _ in range(numba.config.NUMBA_NUM_THREADS):
        threading.Thread(target=call_tasks, daemon=True).start()
    return tasks


def _join(locks):
    """Waits until all of the locks have been let go, even where an interrupt ends the waiting."""
    try:
        for lock in locks:
            with lock:
                pass
    except BaseException:
        _join(locks)
        raise


def _in_threads(task, work, most=CHUNKS):
    """[task(thread, low, high), ...] in order: the CHUNKS are divided into shares, and a task is
    given the chunks low, ..., high - 1 of one.

    Runs on this thread alone if `work`, the numbers touched, is below 2^16, since to wake others
    takes as long as that; else on as many as numba.get_num_threads() says, `most` at most, numbered
    from 0. A thread takes the next share when it is done with one, since threads of a shared
    machine are not equally fast. Compiled tasks must be nogil. When this returns or raises, no task
    is running: a helper that works holds its lock, for which _join waits, and one that begins only
    later finds nothing left to take.
    """
    threads = min(most, numba.get_num_threads()) if work >= 1 << 16 else 1
    shares = min(CHUNKS, 8 * threads) if work >= 1 << 24 else threads
    left, done, failures = deque(range(shares)), [None] * shares, []
    busy = [threading.Lock() for _ in range(threads)]

    def serve(thread):
        with busy[thread]:
            try:
                while left:
                    try:
                        share = left.popleft()
                    except IndexError:  # another thread has taken the last one
                        break
                    edges = CHUNKS * share // shares, CHUNKS * (share + 1) // shares
                    done[share] = task(thread, *edges)
            except BaseException as failure:
                left.clear()
                failures.append(failure)

    try:
        with suppress(RuntimeError):  # where the interpreter ends, and starts no more threads
            for thread in range(1, threads):
                _helpers(os.getpid()).put(partial(serve, thread))
        serve(0)
    finally:
        left.clear()
        _join(busy[1:])
    if failures:
        raise failures[0]
    return done


def _edges(size):
    """Where the chunks of so many items begin, and the last one ends."""
    return size * np.arange(CHUNKS + 1) // CHUNKS


def _over_items(kernel, size, work, *arguments):
    """kernel(*arguments, low, high) for shares of so many items."""
    edges = _edges(size)
    _in_threads(lambda _, low, high: kernel(*arguments, edges[low], edges[high]), work)


def _map_in_threads(task, items, work):
    """[task(item) for item in items]."""
    edges = _edges(len(items))

    def of_share(_, low, high):
        return [task(item) for item in items[edges[low] : edges[high]]]

    return [found for share in _in_threads(of_share, work) for found in share]


def _sum_over_chunks(kernel, size, like, work, *arguments):
    """The sum over chunks of what kernel(*arguments, edges, totals) adds to totals, which are zeros
    (CHUNKS, ...), of shape and type `like` for each chunk; chunk c has the items edges[c], ...,
    edges[c + 1] - 1 of so many."""
    edges, totals = _edges(size), np.zeros((CHUNKS, *like.shape), like.dtype)

    def of_share(_, low, high):
        kernel(*arguments, edges[low : high + 1], totals[low:high])

    _in_threads(of_share, work)
    return totals.sum(axis=0)


# Who wants BLAS on one thread, and the numbers of threads before.
_blas = {"users": set(), "before": (), "lock": threading.Lock()}


@cache
def _blas_libraries():
    """Controllers of the BLAS libraries of the process; none where threadpoolctl is missing."""
    try:
        from threadpoolctl import ThreadpoolController
    except ImportError:
        return []
    return ThreadpoolController().select(user_api="blas").lib_controllers


def _release_blas(*users):
    """Gives BLAS its threads back if nobody else wants one only. Without arguments for all users in
    this thread, which an interrupt in the middle of `with` can have left behind."""
    with _blas["lock"]:
        mine = users or [user for user in _blas["users"] if user[0] == threading.get_ident()]
        _blas["users"].difference_update(mine)
        if not _blas["users"]:
            for library, threads in _blas["before"]:
                library.set_num_threads(threads)
            _blas["before"] = ()


@contextmanager
def _one_blas_thread():
    """Keeps BLAS and LAPACK on one thread, in the whole process, until all who asked are done.

    Their idle threads spin for some 25 ms after a call, on cores that our own threads wait for.
    """
    user = threading.get_ident(), object()
    try:
        with _blas["lock"]:
            _blas["users"].add(user)
            if not _blas["before"]:
                _blas["before"] = [(some, some.num_threads) for some in _blas_libraries()]
                for library in _blas_libraries():
                    library.set_num_threads(1)
        yield
    finally:
        try:
            _release_blas(user)
        except BaseException:  # an interrupt: once more
            _release_blas(user)
            raise


# ==================================================================================================
# Ranks: processes that share the neurons of one network
# ==================================================================================================

# Numbers at the head of a message: how many ranks have failed, and the sums of a checksum of what
# must be alike and of its square, from which every rank sees whether all have sent the same.
HEAD = 3

_interrupts = {"noted": False}


def _raise_interrupt():
    """Raises the interrupt that has been noted, if any, see _Ranks."""
    if _interrupts["noted"]:
        _interrupts["noted"] = False
        raise KeyboardInterrupt


@contextmanager
def _interrupts_noted():
    """Notes interrupts by SIGINT, for _raise_interrupt. A handler of the caller's is left alone: it
    may raise in the middle of a message."""
    in_main = threading.current_thread() is threading.main_thread()
    usual = in_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler
    try:
        _interrupts["noted"] = False
        if usual:
            signal.signal(signal.SIGINT, lambda *_: _interrupts.update(noted=True))
        yield
    finally:
        if usual:
            signal.signal(signal.SIGINT, signal.default_int_handler)
    _raise_interrupt()  # one that came during the last message


_ranks_of = {}  # by the id of their communicator, which they hold


class _Ranks:
    """The processes of a communicator, this one's number among them being `rank`. Without one there
    is this process only, and nothing is sent.

    What they do together is in stretches, see together(), in which all send the same messages.
    Every message is, or follows, a sum of integers, HEAD and then others, of a length that all
    know. A rank that fails sends a 1 in the first place in place of its next message, so that
    nobody waits for it, and then its error as text. SIGINT is noted, and raised before the next
    message, or between blocks that are drawn.
    """

    def __init__(self, comm=None):
        self.comm = comm
        self.rank, self.size = (0, 1) if comm is None else (comm.rank, comm.size)
        self._buffers = None  # of the next message, (2, its length); None outside of stretches
        self._told = None  # the error that all ranks have been told of in this stretch

    @classmethod
    def of(cls, comm):
        """Those of a communicator: the same object for all trainers, so that one may be used in a
        callback of another."""
        for name in ("Allreduce", "Allgather", "rank", "size"):
            if comm is not None and not hasattr(comm, name):
                raise TypeError(
                    f"comm must be an mpi4py communicator, but {type(comm).__name__} has no "
                    f"{name}; pass MPI.COMM_WORLD, or None for one process"
                )
        if comm is None or comm.size == 1:
            return cls()
        return _ranks_of.setdefault(id(comm), cls(comm))

    def own_blocks(self, count):
        """Which of `count` blocks are this rank's."""
        return range(self.rank, count, self.size)

    @contextmanager
    def together(self):
        """A stretch that all ranks enter and leave: what ends it on one rank ends it on all. One
        may be within another, as predict in a callback of fit: it begins with a message of the
        outer one, for a rank that has failed before, and what ends it may be caught."""
        if self.size == 1:
            yield self
            return
        outer = self._buffers
        if outer is not None:
            self.sum(alike=b"a stretch within another")
        try:
            self._buffers = np.zeros((2, HEAD), np.int64)
            with nullcontext() if outer is not None else _interrupts_noted():
                try:
                    yield self
                    self.sum()  # all have come to the end
                except BaseException as error:
                    if self._told is None:
                        self._confess(error)
                    raise
        finally:
            self._buffers, self._told = outer, None

    def lengthen(self, numbers):
        """From now on messages have room for so many numbers."""
        if self.size == 1:
            return
        _check_memory("messages between ranks", 48 * numbers, "use fewer points")
        buffers = np.zeros((2, HEAD + numbers), np.int64)
        self.sum()  # a rank that has no room for them tells here
        self._buffers = buffers

    def sum(self, *arrays, alike=b""):
        """Sums of arrays of integers over all ranks; in one process the arrays themselves. `alike`
        are bytes that must be the same on all."""
        if self.size == 1:
            return arrays
        if self._told is not None:
            raise self._told
        _raise_interrupt()
        ends = HEAD + np.cumsum([0, *(array.size for array in arrays)])
        head, *parts, rest = np.split(self._buffers, ends, axis=1)
        checksum = zlib.crc32(alike) >> 8
        head[0], rest[0] = (0, checksum, checksum**2), 0
        for part, array in zip(parts, arrays, strict=True):
            part[0] = array.ravel()
        self.comm.Allreduce(*self._buffers)
        failed, sum_of_them, sum_of_squares = head[1].tolist()
        if failed:
            self._told = self._error_of_others()
        elif self.size * sum_of_squares != sum_of_them**2:
            self._told = RuntimeError(
                "ranks have computed other bits, or have made other calls; run all on machines of "
                "one kind, with the same versions of NumPy and SciPy and as many threads of BLAS, "
                "and let callbacks of all ranks make the same collective calls"
            )
        if self._told is not None:
            raise self._told
        both = zip(parts, arrays, strict=True)
        return tuple(part[1].reshape(array.shape).copy() for part, array in both)

    def gather(self, *arrays):
        """The arrays of all ranks, joined along the first axis in the order of ranks. Their lengths
        may differ. Every rank gets them all."""
        arrays = [np.asarray(array) for array in arrays]
        return arrays if self.size == 1 else list(map(self._gathered, arrays))

    def _gathered(self, array):
        self.sum(alike=repr((array.dtype, array.shape[1:])).encode())
        lengths = np.empty(self.size, np.int64)
        self.comm.Allgather(np.array([len(array)]), lengths)
        shape = self.size, lengths.max(), *array.shape[1:]
        _check_memory("what all ranks hold", 2 * math.prod(shape) * array.itemsize)
        own, every = np.zeros(shape[1:], array.dtype), np.empty(shape, array.dtype)
        own[: len(array)] = array
        self.sum()  # a rank that has no room for them tells here
        self.comm.Allgather(own, every)
        return np.concatenate([part[:size] for part, size in zip(every, lengths, strict=True)])

    def agree(self, values):
        """Raises ValueError on all ranks unless the values, by name, are the same on all: arrays,
        what repr tells apart, or tuples of these."""
        if self.size == 1:
            return

        def digest(value):
            found = hashlib.blake2b(digest_size=8)
            for part in value if isinstance(value, tuple) else (value,):
                if isinstance(part, np.ndarray):
                    found.update(np.ascontiguousarray(part))
                    part = part.shape
                found.update(repr(part).encode())
            return int.from_bytes(found.digest(), "little")

        (every,) = self.gather(np.array([[digest(value) for value in values.values()]], np.uint64))
        for name, digests in zip(values, every.T, strict=True):
            others = np.flatnonzero(digests != digests[0])
            if others.size:
                self._told = ValueError(
                    f"{name} must be the same on all ranks, but rank {others[0]} has another than "
                    f"rank 0; pass all of them the same"
                )
                raise self._told  # which all ranks find for themselves

    def _confess(self, error):
        """Tells the other ranks that this one has failed."""
        self._buffers[0] = 0
        self._buffers[0, 0] = 1
        self.comm.Allreduce(*self._buffers)
        self._texts("".join(traceback.format_exception_only(error)).strip())
        self._told = error

    def _texts(self, text):
        """What every rank has to tell of its error; nothing where there is none."""
        own = np.array([text.encode(errors="replace")], "S1000")  # of which so many bytes
        every = np.zeros(self.size, own.dtype)
        self.comm.Allgather(own.view(np.uint8), every.view(np.uint8))
        return [told.decode(errors="ignore") for told in every.tolist()]

    def _error_of_others(self):
        """The error to raise on this rank because others have failed."""
        texts = self._texts("")
        rank = next(rank for rank, text in enumerate(texts) if text)
        kinds = {kind.__name__: kind for kind in (ValueError, TypeError, KeyboardInterrupt)}
        kind = kinds.get(texts[rank].partition(":")[0], RuntimeError)
        return kind(f"rank {rank} was ended by {texts[rank]}")


# ==================================================================================================
# Where this runs: versions, and a place for machine code
# ==================================================================================================


def _require_versions():
    for module, least in ((np, "1.26"), (scipy, "1.11"), (numba, "0.59")):
        has, needs = ([int(k) for k in v.split(".")[:2]] for v in (module.__version__, least))
        if has < needs:
            raise ImportError(
                f"sublin needs {module.__name__} {least} or newer, but {module.__version__} is "
                f"installed: pip install --upgrade {module.__name__}"
            )


@cache
def _warn_of_compiling(reason):
    warnings.warn(
        f"machine code cannot be kept on disk ({reason}), so that new processes compile anew, for "
        "some seconds; set NUMBA_CACHE_DIR in the environment to a folder that can be written",
        RuntimeWarning,
        stacklevel=2,
    )


def _raise_unless_numbas(error):
    """Raises an exception again that does not come from the reading and writing of machine code,
    but from a signal handler of the caller, say."""
    theirs = {"numba", "llvmlite", *sys.stdlib_module_names}
    for frame, _ in traceback.walk_tb(error.__traceback__.tb_next):
        if frame.f_globals.get("__name__", "").split(".")[0] not in theirs:
            raise error


class _MachineCode(FunctionCache):
    """A function's machine code on disk, as Numba keeps it; but what cannot be read is compiled
    again, and what cannot be written is not kept."""

    def load_overload(self, *signature):
        try:
            return super().load_overload(*signature)
        except Exception as error:  # damaged files raise errors of many kinds
            _raise_unless_numbas(error)
            with suppress(OSError):
                self.flush()

    def save_overload(self, *compiled):
        try:
            super().save_overload(*compiled)
        except Exception as error:
            _raise_unless_numbas(error)
            _warn_of_compiling(getattr(error, "strerror", None) or repr(error))


def _keep_machine_code():
    """Of every kernel with nogil=True; inlined ones are part of others."""
    for kernel in list(globals().values()):
        if isinstance(kernel, Dispatcher) and "nogil" in kernel.targetoptions:
            try:
                kernel._cache = _MachineCode(kernel.py_func)
            except RuntimeError:  # from a zipped application, from exec, or nothing can be written
                _warn_of_compiling("there is no folder for it")
                return


_require_versions()
_keep_machine_code()
