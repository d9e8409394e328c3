"""A small Gaussian process: a Matérn kernel with one length scale for each input, in milliseconds for 300 points.

Rasmussen and Williams 2006, "Gaussian Processes for Machine Learning", chapters 2, 4 and 5. Optuna's own needs torch
and takes a second.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

_FITTED = 150  # points from which length scales are learned: the best half, and a sample of the others
_STEPS = {"maxiter": 20, "ftol": 1e-4}  # of L-BFGS: further ones change the third digit of a length scale
# Means and deviations of the priors of the logarithms, as of inputs in [0, 1] and outputs of variance 1.
_LENGTH, _LENGTH_WIDTH = -0.2, 1.0
_NOISE, _NOISE_WIDTH = math.log(1e-2), 1.5


@contextmanager
def one_thread() -> Iterator[None]:
    """Let the linear algebra of this process compute with one thread within the block.

    The matrices of a search are small, and trainings use all cores: threads that wait for each other there take ten
    times as long. It also makes results independent of the number of cores.
    """
    from threadpoolctl import threadpool_limits

    with threadpool_limits(1):
        yield


class GaussianProcess:
    """The posterior at inputs (n, dimensions) with outputs (n,); settings are those of fit."""

    def __init__(self, inputs: Floats, outputs: Floats, settings: Floats) -> None:
        from scipy.linalg import cho_solve

        self._lengths, noise = np.exp(settings[:-1]), math.exp(settings[-1])
        self._inputs, self._mean = inputs, float(outputs.mean())
        rest = outputs - self._mean
        covariance = _matern(inputs, inputs, self._lengths)
        covariance[np.diag_indices(len(outputs))] += noise
        self._factor = np.linalg.cholesky(covariance)
        self._weights = cho_solve((self._factor, True), rest)
        self._variance = max(float(rest @ self._weights) / len(outputs), 1e-12)

    def __call__(self, queries: Floats) -> tuple[Floats, Floats]:
        """(mean, standard deviation) at queries (m, dimensions), without noise; each (m,)."""
        from scipy.linalg import solve_triangular

        kernel = _matern(queries, self._inputs, self._lengths)
        half = solve_triangular(self._factor, kernel.T, lower=True)
        variance = np.maximum(1 - (half * half).sum(0), 1e-9) * self._variance
        return self._mean + kernel @ self._weights, np.sqrt(variance)


def fit(inputs: Floats, outputs: Floats) -> Floats:
    """The most probable logarithms of the length scales (dimensions,), and of the noise's share in the variance.

    The last answers are remembered: the same points give the same settings.
    """
    if len(outputs) > _FITTED:
        order = np.argsort(-outputs, kind="stable")
        best, others = order[: _FITTED // 2], order[_FITTED // 2 :]
        rows = np.concatenate([best, others[:: math.ceil(len(others) / (_FITTED // 2))]])
        inputs, outputs = inputs[rows], outputs[rows]
    return _fitted(inputs.tobytes(), outputs.tobytes(), inputs.shape)


@functools.lru_cache(maxsize=16)
def _fitted(inputs_bytes: bytes, outputs_bytes: bytes, shape: tuple[int, int]) -> Floats:
    from scipy.optimize import minimize

    inputs, outputs = np.frombuffer(inputs_bytes).reshape(shape), np.frombuffer(outputs_bytes)
    start = np.array([*np.full(inputs.shape[1], _LENGTH), _NOISE])
    bounds = [(math.log(0.05), math.log(20.0))] * inputs.shape[1] + [(math.log(1e-5), 0.0)]
    outputs = outputs - outputs.mean()
    found = minimize(_loss, start, (inputs, outputs), "L-BFGS-B", True, bounds=bounds, options=_STEPS)
    settings: Floats = found.x
    return settings


def expected_improvement(mean: Floats, deviation: Floats, best: float) -> Floats:
    """How much a normal variable exceeds `best` on average."""
    from scipy.special import ndtr

    lead = (mean - best) / deviation
    density = np.exp(-lead * lead / 2) / math.sqrt(2 * math.pi)
    improvement: Floats = deviation * (lead * ndtr(lead) + density)
    return improvement


def _matern(first: Floats, second: Floats, lengths: Floats) -> Floats:
    first, second = first / lengths, second / lengths
    squares = (first * first).sum(1)[:, None] + (second * second).sum(1) - 2 * first @ second.T
    distance = np.sqrt(5 * np.maximum(squares, 0))
    kernel: Floats = (1 + distance + distance * distance / 3) * np.exp(-distance)
    return kernel


def _loss(settings: Floats, inputs: Floats, outputs: Floats) -> tuple[float, Floats]:
    """The negative logarithm of the posterior density, up to a constant, and its gradient.

    The variance of the process is the most probable one (Rasmussen and Williams, section 5.4.1 with it maximised).
    """
    from scipy.linalg import solve_triangular

    count, lengths, noise = len(outputs), np.exp(settings[:-1]), math.exp(settings[-1])
    scaled = inputs / lengths
    norms = (scaled * scaled).sum(1)
    distance = np.sqrt(5 * np.maximum(norms[:, None] + norms - 2 * scaled @ scaled.T, 0))
    decay = np.exp(-distance)
    covariance = (1 + distance + distance * distance / 3) * decay
    covariance[np.diag_indices(count)] += noise
    try:
        factor = np.linalg.cholesky(covariance)
    except np.linalg.LinAlgError:
        return 1e10, np.zeros_like(settings)
    half = solve_triangular(factor, np.eye(count), lower=True)
    inverse = half.T @ half
    weights = inverse @ outputs
    variance = max(float(outputs @ weights) / count, 1e-12)
    loss = 0.5 * count * math.log(variance) + float(np.log(np.diag(factor)).sum())
    slope = 0.5 * (inverse - np.outer(weights, weights) / variance)  # by the covariance
    moved = slope * (5 / 3 * (1 + distance) * decay)
    gradient = np.empty_like(settings)
    gradient[:-1] = 2 * (moved.sum(1) @ (scaled * scaled)) - 2 * np.einsum("ij,ij->j", scaled, moved @ scaled)
    gradient[-1] = noise * np.trace(slope)
    away = settings - [*np.full(len(lengths), _LENGTH), _NOISE]
    width = np.array([*np.full(len(lengths), _LENGTH_WIDTH), _NOISE_WIDTH])
    return loss + float(0.5 * ((away / width) ** 2).sum()), gradient + away / width**2
