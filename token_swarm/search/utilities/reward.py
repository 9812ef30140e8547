"""Rewards: a number for each generated text, from a model that classifies texts or from any function."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import torch

from token_swarm.errors import BadParameter
from token_swarm.search.data import PromptExample
from token_swarm.search.utilities.generation import GeneratedUtility, Generations
from token_swarm.search.utilities.kind import Judging, WrittenKind

RewardFunction: TypeAlias = Callable[[str, str], float]
"""(prompt, text) -> a finite number; higher is better."""


class Reward(GeneratedUtility[PromptExample]):
    """What `function` says of prompt and text."""

    def __init__(self, examples: Sequence[PromptExample], generations: Generations, function: RewardFunction) -> None:
        super().__init__("reward", examples, generations)
        self._function = function

    def judge(self, example: PromptExample, text: str) -> float:
        """The reward. Raises ValueError when it is not a finite number."""
        reward = float(self._function(example.prompt, text))
        if not math.isfinite(reward):
            raise ValueError(f"reward: {reward} for {text[:60]!r}; it must be a finite number")
        return reward


def load_function(reference: str) -> RewardFunction:
    """The function that `module:function` names. Raises BadParameter when there is none."""
    module, _, name = reference.partition(":")
    if not module or not name:
        raise BadParameter("reward", reference, "module:function, or the directory or hub id of a classifier")
    try:
        function: Any = importlib.import_module(module)
        for part in name.split("."):
            function = getattr(function, part)
    except (ImportError, AttributeError) as error:
        raise BadParameter("reward", reference, f"a function that can be imported ({error})") from error
    if not callable(function):
        raise BadParameter("reward", reference, f"a function, not {type(function).__name__}")
    reward: RewardFunction = function
    return reward


class SequenceClassifier:
    """A Hugging Face sequence classifier as a reward: it reads prompt and text as one.

    A model with one output gives that output, as reward models do; one with several gives the log-probability of
    `label`, a name or an index of its configuration.
    """

    def __init__(self, model: str | Path, label: str | int | None = None, *, device: str = "cpu") -> None:
        """Load `model`, a directory or hub id. Raises BadParameter for a label it does not have, OSError."""
        from transformers import AutoModelForSequenceClassification, AutoTokenizer

        self._tokenizer = AutoTokenizer.from_pretrained(model)
        self._model = AutoModelForSequenceClassification.from_pretrained(model).to(device).eval()
        self._device = device
        config = self._model.config
        names: dict[int, str] = config.id2label
        self._label = 0
        if config.num_labels > 1:
            known: dict[str | int | None, int] = {index: index for index in names}
            known.update({name: index for index, name in names.items()})
            if label not in known:
                raise BadParameter("label", label, f"one of {', '.join(names.values())}")
            self._label = known[label]
        self._outputs: int = config.num_labels

    @torch.inference_mode()
    def __call__(self, prompt: str, text: str) -> float:
        """The reward of `text` after `prompt`; what is too long for the model loses its beginning."""
        limit = min(self._tokenizer.model_max_length, self._model.config.max_position_embeddings)
        tokens = self._tokenizer(prompt + text)["input_ids"][-limit:]
        logits = self._model(torch.tensor([tokens], device=self._device)).logits[0].float()
        return float(logits[0] if self._outputs == 1 else torch.log_softmax(logits, -1)[self._label])


def _is_function(judging: Judging) -> bool:
    """Whether the reward is module:function, not a model."""
    return judging.reward is None or (":" in judging.reward and not Path(judging.reward).exists())


def _make(examples: Sequence[PromptExample], texts: Generations, judging: Judging) -> Reward:
    """Raises BadParameter for a reward that is missing or is no function."""
    if judging.reward is None:
        raise BadParameter("reward", None, "module:function, or the directory or hub id of a sequence classifier")
    is_function = _is_function(judging)
    return Reward(examples, texts, load_function(judging.reward) if is_function else SequenceClassifier(judging.reward))


KIND = WrittenKind(PromptExample, _make, light=_is_function)
