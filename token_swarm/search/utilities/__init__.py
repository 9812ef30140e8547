"""The utilities: likelihoods and choices from the score cache, and judgements of generated text.

Every one is a plain object with `evaluate`; `token_swarm.search.utility` says what that means. `registry` knows them by
name, those of other distributions included.
"""

from token_swarm.search.utilities.choices import MultipleChoice, Preference
from token_swarm.search.utilities.generation import (
    NUMBER,
    ExactMatch,
    Generate,
    GeneratedUtility,
    Generations,
    Regex,
    local_generate,
)
from token_swarm.search.utilities.harmonic import Harmonic, HarmonicScores
from token_swarm.search.utilities.judge import Judge, JudgeClient, JudgeSettings, JudgeUsage
from token_swarm.search.utilities.kind import CachedKind, Judging, Normalise, UtilityKind, WrittenKind
from token_swarm.search.utilities.likelihood import LogLikelihood, bits_per_byte
from token_swarm.search.utilities.prefixes import PrefixSharing
from token_swarm.search.utilities.registry import UTILITIES, Goal, utility_kind
from token_swarm.search.utilities.reward import Reward, RewardFunction, SequenceClassifier, load_function

__all__ = [
    "NUMBER",
    "UTILITIES",
    "CachedKind",
    "ExactMatch",
    "Generate",
    "GeneratedUtility",
    "Generations",
    "Goal",
    "Harmonic",
    "HarmonicScores",
    "Judge",
    "JudgeClient",
    "JudgeSettings",
    "JudgeUsage",
    "Judging",
    "LogLikelihood",
    "MultipleChoice",
    "Normalise",
    "Preference",
    "PrefixSharing",
    "Regex",
    "Reward",
    "RewardFunction",
    "SequenceClassifier",
    "UtilityKind",
    "WrittenKind",
    "bits_per_byte",
    "load_function",
    "local_generate",
    "utility_kind",
]
