"""What the command line composes, for tests that call what is behind it."""

from pathlib import Path

from hydra import compose, initialize_config_module
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from lq.cli.main import register_resolvers


def config(verb: str, folder: Path, *overrides: str) -> DictConfig:
    """The config of ``lq <verb> <overrides>`` with a folder for what comes out."""
    register_resolvers()
    with initialize_config_module("lq.conf", version_base="1.3"):
        cfg = compose(verb, [f"output_dir={folder}", "hydra.job.num=0", *overrides], return_hydra_config=True)
        HydraConfig.instance().set_config(cfg)
        OmegaConf.set_struct(cfg, False)
        del cfg["hydra"]
        return cfg
