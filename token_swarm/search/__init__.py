"""Learning a particle: optimisers that propose mixtures, and utilities that judge them on data.

Likelihoods are judged from a cache that is filled once per expert, generated text by running the ensemble.
"""

from typing import TYPE_CHECKING

from token_swarm.lazy import attach

if TYPE_CHECKING:
    from token_swarm.search.data import Dataset, Example, load_jsonl
    from token_swarm.search.evaluators import ProcessPoolEvaluator, SerialEvaluator
    from token_swarm.search.optimisers.registry import OPTIMISERS, make_optimiser
    from token_swarm.search.optimisers.space import Space
    from token_swarm.search.run.experts import LocalExperts
    from token_swarm.search.run.run import Result, Search, SearchConfig, Task
    from token_swarm.search.run.task import Preparation, evaluating
    from token_swarm.search.utilities import UTILITIES, Goal, Judging
    from token_swarm.search.utility import Scores, Utility

__all__ = [
    "OPTIMISERS",
    "UTILITIES",
    "Dataset",
    "Example",
    "Goal",
    "Judging",
    "LocalExperts",
    "Preparation",
    "ProcessPoolEvaluator",
    "Result",
    "Scores",
    "Search",
    "SearchConfig",
    "SerialEvaluator",
    "Space",
    "Task",
    "Utility",
    "evaluating",
    "load_jsonl",
    "make_optimiser",
]

__getattr__, __dir__ = attach(
    __name__,
    {
        "Dataset": "token_swarm.search.data",
        "Example": "token_swarm.search.data",
        "Goal": "token_swarm.search.utilities",
        "Judging": "token_swarm.search.utilities",
        "LocalExperts": "token_swarm.search.run.experts",
        "OPTIMISERS": "token_swarm.search.optimisers.registry",
        "Preparation": "token_swarm.search.run.task",
        "ProcessPoolEvaluator": "token_swarm.search.evaluators",
        "Result": "token_swarm.search.run.run",
        "Scores": "token_swarm.search.utility",
        "Search": "token_swarm.search.run.run",
        "SearchConfig": "token_swarm.search.run.run",
        "SerialEvaluator": "token_swarm.search.evaluators",
        "Space": "token_swarm.search.optimisers.space",
        "Task": "token_swarm.search.run.run",
        "UTILITIES": "token_swarm.search.utilities",
        "Utility": "token_swarm.search.utility",
        "evaluating": "token_swarm.search.run.task",
        "load_jsonl": "token_swarm.search.data",
        "make_optimiser": "token_swarm.search.optimisers.registry",
    },
)
