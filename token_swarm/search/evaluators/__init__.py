"""Evaluators: where a utility runs. The results are the same in this process, in several, and on a Ray cluster."""

from token_swarm.search.evaluators.pool import ProcessPoolEvaluator
from token_swarm.search.evaluators.ray import RayEvaluator
from token_swarm.search.evaluators.remade import Remade
from token_swarm.search.evaluators.serial import SerialEvaluator
from token_swarm.search.evaluators.watched import WatchedEvaluator

__all__ = ["ProcessPoolEvaluator", "RayEvaluator", "Remade", "SerialEvaluator", "WatchedEvaluator"]
