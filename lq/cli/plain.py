"""Objects of configs, with plain values in them."""

from typing import Any

import hydra.utils
from omegaconf import DictConfig


def instantiate(config: DictConfig, **options: Any) -> Any:
    """What a config describes, as Hydra does it, but with lists and dictionaries of Python's own.

    Modules keep their arguments as hyperparameters in checkpoints, from which ``weights_only=True`` loads none of OmegaConf's.

    >>> type(instantiate(DictConfig({"mean": [0.5, 0.5]}))["mean"])
    <class 'list'>
    """
    return hydra.utils.instantiate(config, **options, _convert_="all")
