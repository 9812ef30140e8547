"""Oracles: the optimum of a likelihood, from its derivatives. The swarm is judged against them.

Both problems are concave: EM climbs a linear mixture's likelihood and bounds what is left, L-BFGS a log-linear one's.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from scipy.optimize import minimize

from token_swarm.errors import BadParameter
from token_swarm.particle import Mixture, Rule
from token_swarm.search.optimisers.space import Space
from token_swarm.search.run.subset import Subset
from token_swarm.search.utilities.likelihood import LogLikelihood
from token_swarm.search.utility import Array, Utility

_CHUNK = 4096  # positions whose laws are in float64 at a time: 4096 x 6 x 257 x 8 bytes are 50 MB


@dataclass(frozen=True)
class Optimum:
    """weights: [experts]; utility: nats per position; certificate: what better weights could still gain, in nats."""

    weights: Array
    utility: float
    certificate: float
    iterations: int


def em_linear(masses: npt.ArrayLike, *, tolerance: float = 1e-10, max_iterations: int = 20_000) -> Optimum:
    """The linear mixture with the greatest mean log-likelihood.

    masses: [experts, positions], what each expert gave the symbol that was there. EM for mixing proportions
    (Dempster, Laird, Rubin 1977, section 4.3): w_e <- w_e G_e with G_e = mean(m_e / mix). Concavity bounds what is
    left by L* - L <= max_e G_e - 1; EM ends when that is at most `tolerance`. Raises BadParameter when no expert gives
    some position a mass, or a mass is no finite number >= 0.
    """
    table = np.asarray(masses, dtype=np.float64)
    if table.ndim != 2 or not table.size or not np.isfinite(table).all() or (table < 0).any():
        raise BadParameter("masses", f"an array of shape {table.shape}", "[experts, positions] finite numbers >= 0")
    if not table.any(axis=0).all():
        raise BadParameter("masses", 0.0, "above 0 for at least one expert at every position")
    weights = np.full(len(table), 1 / len(table))
    for iteration in range(1, max_iterations + 1):
        mix = weights @ table
        gain = table @ (1 / mix) / table.shape[1]
        certificate = float(gain.max() - 1)
        if certificate <= tolerance or iteration == max_iterations:
            break
        weights = weights * gain
        weights /= weights.sum()
    return Optimum(weights, float(np.log(mix).mean()), max(certificate, 0.0), iteration)


def certificate_linear(masses: npt.ArrayLike, weights: Array) -> float:
    """At most this much, in nats per position, does any linear mixture do better than `weights`."""
    table = np.asarray(masses, dtype=np.float64)
    mix = (weights / weights.sum()) @ table
    return float((table @ (1 / mix) / table.shape[1]).max() - 1)


def lbfgs_log_linear(
    log_probs: npt.NDArray[np.floating], targets: npt.NDArray[np.integer], *, tolerance: float = 1e-9
) -> Optimum:
    """The log-linear mixture with the greatest mean log-likelihood, over all signed weights of all experts.

    log_probs: [positions, experts, symbols], each a log-law, -inf where 0; targets: [positions]. L = mean(w·l(target)
    - logsumexp_s w·l(s)) has the gradient mean(l(target) - E_s l(s)) (an exponential family). Ends at a gradient of
    `tolerance` or where L stands still in float64; the certificate is an estimate: g·(-H)^-1·g / 2, half the squared
    Newton decrement, which is what a quadratic of that curvature still has to gain. Raises BadParameter when an expert
    excludes a symbol that was there.
    """
    positions, experts, _ = log_probs.shape
    here = np.arange(positions)
    at_target = log_probs[here, :, targets].astype(np.float64)  # [positions, experts]
    excluding = [expert for expert, column in enumerate(at_target.T) if np.isinf(column).any()]
    if excluding:
        raise BadParameter(f"log_probs of expert {excluding[0]}", "-inf", "finite where the symbol was there")

    def derivatives(weights: Array, *, second: bool) -> tuple[float, Array, Array]:
        """Mean log-likelihood, its gradient [experts] and, if asked, the covariance of the log-laws, -Hessian."""
        total, slope, covariance = 0.0, np.zeros(experts), np.zeros((experts, experts))
        for low in range(0, positions, _CHUNK):
            laws = log_probs[low : low + _CHUNK].astype(np.float64)
            possible = np.asarray(np.isfinite(laws).all(axis=1))  # what one expert excludes is excluded
            laws = np.where(possible[:, None, :], laws, 0.0)
            joint = np.where(possible, weights @ laws, -np.inf)  # [positions, symbols]
            peak = joint.max(axis=1)
            mixed = np.exp(joint - peak[:, None])
            norm = mixed.sum(axis=1)
            mixed /= norm[:, None]
            chosen = at_target[low : low + _CHUNK]
            expected = (laws @ mixed[:, :, None])[:, :, 0]  # [positions, experts]
            total += float((chosen @ weights - peak - np.log(norm)).sum())
            slope += (chosen - expected).sum(axis=0)
            if second:
                laws *= np.sqrt(mixed)[:, None, :]
                covariance += (laws @ laws.transpose(0, 2, 1)).sum(axis=0) - expected.T @ expected
        return total / positions, slope / positions, covariance / positions

    def loss(weights: Array) -> tuple[float, Array]:
        value, slope, _ = derivatives(weights, second=False)
        return -value, -slope

    options = {"gtol": tolerance, "ftol": 0.0, "maxiter": 500, "maxcor": 2 * experts + 5}
    found = minimize(loss, np.full(experts, 1 / experts), jac=True, method="L-BFGS-B", options=options)
    weights = np.asarray(found.x, dtype=np.float64)
    value, slope, covariance = derivatives(weights, second=True)
    # Experts that are alike leave directions without curvature, and without a slope: the pseudo-inverse skips them.
    remaining = float(slope @ np.linalg.pinv(covariance, hermitian=True) @ slope) / 2
    return Optimum(weights, value, remaining, int(found.nit))


def likelihood_optimum(space: Space, utility: Utility) -> tuple[Mixture, Optimum] | None:
    """The best mixture of `space` by the oracle of its rule; None where no oracle knows the utility.

    Oracles know log-likelihoods of experts that are mixed byte by byte, without temperatures. Raises what they raise.
    """
    whole, passages = (utility.whole, utility.indices) if isinstance(utility, Subset) else (utility, None)
    if not isinstance(whole, LogLikelihood) or space.temperatures:
        return None
    if whole.cache.experts != space.experts or not whole.cache.bytewise:
        return None
    if not space.rule.has_kernel:
        return None  # what it does is not known here
    if space.rule is Rule.LINEAR:
        optimum = em_linear(whole.cache.masses(passages).numpy())
    else:
        optimum = lbfgs_log_linear(whole.cache.log_probs(passages).numpy(), whole.cache.targets(passages).numpy())
    return space.mixture(optimum.weights), optimum
