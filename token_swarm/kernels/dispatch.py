"""Which implementation runs, chosen once: C++ on the CPU where it was built, Triton on CUDA, torch eager otherwise."""

from __future__ import annotations

import importlib
import importlib.util
import warnings
from collections.abc import Callable, Sequence
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from token_swarm.kernels import eager, native, reference
from token_swarm.kernels.union_map import UnionMap
from token_swarm.particle import Rule


@cache
def _on_cpu() -> ModuleType:
    if native.library() is not None:
        return native
    warnings.warn("the C++ kernels were not built: mixing runs in torch eager, several times slower", stacklevel=2)
    return eager


@cache
def _on_cuda() -> ModuleType:
    if importlib.util.find_spec("triton") is None:
        return eager
    return importlib.import_module("token_swarm.kernels.triton")


def _for(*tensors: Tensor) -> ModuleType:
    """The implementation for these inputs; float64 is the eager one's, the others work in float32."""
    if torch.float64 in [tensor.dtype for tensor in tensors]:
        return eager
    if tensors[0].device.type == "cuda":
        return _on_cuda()
    return _on_cpu() if native.takes(*tensors) else eager


def describe() -> dict[str, str]:
    """Implementation by device, for `token-swarm doctor`."""
    names = {native: "C++", eager: "torch eager"}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        chosen = {"cpu": names[_on_cpu()]}
    if _on_cpu() is native:
        cap = native.cap()
        held = f", held down by {native.CAP_VARIABLE}={cap}" if cap else ""
        chosen["cpu"] += f" ({native.instruction_set()}{held})"
    if torch.cuda.is_available():
        chosen["cuda"] = names.get(_on_cuda(), "Triton")
    return chosen


def mix(logits: Sequence[Tensor], weights: Tensor, temperatures: Tensor, rule: Rule, allowed: Tensor) -> Tensor:
    """Mix experts over one vocabulary; see `reference.mix`. float32 [rows, width], float64 when the logits are."""
    if not rule.has_kernel:
        return _by_definition(reference.mix, logits, weights, temperatures, rule, allowed)
    mixed: Tensor = _for(*logits).mix(logits, weights, temperatures, rule, allowed)
    return mixed


def mix_union(
    logits: Sequence[Tensor], weights: Tensor, temperatures: Tensor, rule: Rule, union: UnionMap, floor: float
) -> Tensor:
    """Mix experts over the union of vocabularies; see `reference.mix_union`. [rows, union.size], dtype as `mix`."""
    if not rule.has_kernel:
        return _by_definition(reference.mix_union, logits, weights, temperatures, rule, union, floor)
    mixed: Tensor = _for(*logits).mix_union(logits, weights, temperatures, rule, union, floor)
    return mixed


def _by_definition(function: Callable[..., Tensor], logits: Sequence[Tensor], *arguments: Any) -> Tensor:
    """A rule that no kernel knows: the definition in float64, on the CPU. Returned as the kernels would."""
    wide = torch.float64 in [table.dtype for table in logits]
    moved = [each.cpu() if isinstance(each, Tensor) else each for each in arguments]
    mixed = function([table.cpu() for table in logits], *moved)
    return mixed.to(logits[0].device, torch.float64 if wide else torch.float32)


def shape(probabilities: Tensor, temperature: Tensor, top_k: Tensor, top_p: Tensor, min_p: Tensor) -> Tensor:
    """Temperature, min-p, top-k and top-p; see `reference.shape`. Same shape and dtype as `probabilities`."""
    shaped: Tensor = _for(probabilities).shape(probabilities, temperature, top_k, top_p, min_p)
    return shaped


def choose(probabilities: Tensor, uniforms: Tensor, greedy: Tensor) -> tuple[Tensor, Tensor]:
    """One token a row; see `reference.choose`. (tokens int64 [rows], log-probabilities float64 [rows])."""
    chosen: tuple[Tensor, Tensor] = _for(probabilities).choose(probabilities, uniforms, greedy)
    return chosen


def sample(
    logits: Sequence[Tensor],
    weights: Tensor,
    temperatures: Tensor,
    rule: Rule,
    allowed: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    uniforms: Tensor,
) -> tuple[Tensor, Tensor]:
    """Straight from logits to tokens: `choose` of `shape` of `mix`, greedy where `temperature` is 0."""
    kernels = _for(*logits)
    if not rule.has_kernel:
        shaped = eager.shape(mix(logits, weights, temperatures, rule, allowed), temperature, top_k, top_p, min_p)
        return choose(shaped, uniforms, temperature == 0)
    if kernels not in (native, eager):
        chosen: tuple[Tensor, Tensor] = kernels.sample(
            logits, weights, temperatures, rule, allowed, temperature, top_k, top_p, min_p, uniforms
        )
        return chosen
    mixed = kernels.mix(logits, weights, temperatures, rule, allowed)
    # The mixture is ours alone, so that the C++ version may shape it where it is.
    shaped = getattr(kernels, "shape_", kernels.shape)(mixed, temperature, top_k, top_p, min_p)
    return choose(shaped, uniforms, temperature == 0)


def prefix_mass(probabilities: Tensor, order: Tensor | int, every: int = 1) -> tuple[Tensor, Tensor]:
    """Byte-sorted probabilities and their cumulative sums; see `reference.prefix_mass`."""
    sums: tuple[Tensor, Tensor] = _for(probabilities).prefix_mass(probabilities, order, every)
    return sums


def softmax_masses(logits: Tensor, temperatures: Tensor, order: Tensor | int, tokens: int) -> tuple[Tensor, Tensor]:
    """Both of a single expert, from its logits; see `reference.softmax_masses`. On a GPU in torch eager."""
    kernels = _for(logits)
    masses: tuple[Tensor, Tensor] = (kernels if kernels is native else eager).softmax_masses(
        logits, temperatures, order, tokens
    )
    return masses


def score_linear(masses: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Log-likelihood of items under linear particles; see `reference.score_linear`. float64 [particles, items]."""
    scores: Tensor = _for(masses).score_linear(masses, weights, offsets)
    return scores


def score_log_linear(log_probs: Tensor, targets: Tensor, weights: Tensor, offsets: Tensor) -> Tensor:
    """Log-likelihood of items under log-linear particles; see `reference.score_log_linear`. [particles, items]."""
    scores: Tensor = _for(log_probs).score_log_linear(log_probs, targets, weights, offsets)
    return scores


def score_byte_laws(log_probs: Tensor, targets: Tensor, weights: Tensor, offsets: Tensor, rule: Rule) -> Tensor:
    """Log-likelihood of items under any rule that mixes whole laws; see `reference.score_combined`."""
    if rule is Rule.LOG_LINEAR:
        return score_log_linear(log_probs, targets, weights, offsets)
    return reference.score_combined(log_probs, targets, weights, offsets, rule)
