"""The entry point: which verb runs, and how errors look."""

import logging
import os
import sys
import warnings
from typing import Any, cast

VERBS = ("run",)


class UserError(SystemExit):
    """An error that is explained in one message; the traceback adds nothing."""

    def __init__(self, error: BaseException) -> None:
        # hydra wraps what went wrong while it built an object, and names the place in the config
        cause = error.__cause__ or error
        place = "" if cause is error else f"\n(in {str(error).splitlines()[-1].strip()})"
        super().__init__(f"lq: {type(cause).__name__}: {cause}{place}")


def main() -> None:
    """Run a verb, ``run`` if none is given, with Hydra's overrides behind it."""
    verb = "run"
    if len(sys.argv) > 1 and sys.argv[1].isidentifier():
        verb = sys.argv.pop(1)
    if verb not in VERBS:
        sys.exit(f"lq: there is no verb {verb!r}: choose among {', '.join(VERBS)}, or give overrides as key=value.")
    try:
        import hydra
    except ImportError as missing:
        sys.exit(f'lq: {missing.name} is not installed: pip install "lightning-lq[recipes,export]"')
    _quiet()
    register_resolvers()
    hydra.main(version_base="1.3", config_path="pkg://lq.conf", config_name=verb)(_job)()


def register_resolvers() -> None:
    """What the configs use beyond OmegaConf's own: ``${concat:${list},${list}}``."""
    from omegaconf import ListConfig, OmegaConf

    def concat(*lists: ListConfig) -> list[Any]:
        return [item for part in lists for item in cast(list[Any], OmegaConf.to_container(part, resolve=True))]

    OmegaConf.register_new_resolver("concat", concat, replace=True)


def _job(cfg: Any) -> Any:
    from hydra.core.hydra_config import HydraConfig
    from hydra.errors import InstantiationException
    from hydra.types import RunMode
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import OmegaConfBaseException

    from lq.cli.run import run

    try:
        return run(cfg)
    except (ValueError, TypeError, OSError, MisconfigurationException, InstantiationException, OmegaConfBaseException) as error:
        # a sweep reports failed jobs itself; HYDRA_FULL_ERROR=1 shows where the error came from
        if HydraConfig.get().mode == RunMode.MULTIRUN or os.environ.get("HYDRA_FULL_ERROR"):
            raise
        raise UserError(error) from error


def _quiet() -> None:
    """Keep out what libraries say to their developers, to sell something, or of what the recipe means to do."""
    os.environ.setdefault("WANDB_SILENT", "true")
    for name in ("lightning.pytorch", "lightning.fabric", "onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.WARNING)
    for message in (".*LeafSpec.*", ".*does not have many workers.*", ".*Checkpoint directory.*", ".*QATSchedule overrules.*"):
        warnings.filterwarnings("ignore", message=message)
