"""The entry point: which verb runs, and how errors look."""

import logging
import os
import re
import sys
import warnings
from pathlib import Path
from typing import Any, cast

from lq.version import __version__

# What each verb calls; its config has the verb's name.
VERBS = {
    "run": "lq.cli.run.run",
    "recalibrate": "lq.cli.recalibrate.recalibrate",
    "verify": "lq.cli.verify.verify_run",
    "sensitivity": "lq.cli.sensitivity.find_sensitive",
}


class UserError(SystemExit):
    """An error that is explained in one message; the traceback adds nothing."""

    def __init__(self, error: BaseException) -> None:
        from hydra.errors import InstantiationException

        # hydra wraps what went wrong while it built an object, and names the place in the config
        wrapped = isinstance(error, InstantiationException) and error.__cause__ is not None
        cause = error.__cause__ if wrapped else error
        place = f"\n(in {str(error).splitlines()[-1].strip()})" if wrapped else ""
        super().__init__(f"lq: {type(cause).__name__}: {cause}{place}")


def main() -> None:
    """Run a verb, ``run`` if none is given, with Hydra's overrides behind it."""
    if "--version" in sys.argv:  # which Hydra would take for a question about itself
        print(f"lq {__version__}")
        return
    verb, at = "run", 1 + (sys.argv[1:2] in (["--help"], ["-h"]))
    if sys.argv[at : at + 1] and sys.argv[at].isidentifier():
        verb = sys.argv.pop(at)
    if verb not in VERBS:
        sys.exit(f"lq: there is no verb {verb!r}: choose among {', '.join(VERBS)}, or give overrides as key=value.")
    try:
        import hydra
    except ImportError as missing:
        sys.exit(f'lq: {missing.name} is not installed: pip install "lightning-lq[recipes,export]"')
    _options_last(sys.argv)
    _quote_paths(sys.argv)
    _check_folder(sys.argv)
    prepare_process()
    hydra.main(version_base="1.3", config_path="pkg://lq.conf", config_name=verb)(_job)()


def _check_folder(argv: list[str]) -> None:
    """Hydra makes the output folder itself, and shows a traceback where it cannot."""
    told = [arg.partition("=")[2] for arg in argv if arg.startswith(("hydra.run.dir=", "hydra.sweep.dir="))]
    folder = Path(told[-1] if told else ".").absolute()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        sys.exit(f"lq: the output folder {folder} cannot be written ({there} is in the way): set hydra.run.dir to another.")


def _options_last(argv: list[str]) -> None:
    """Hydra takes no overrides behind ``--config-dir FOLDER``: move it to the end."""
    for name in ("--config-dir", "-cd"):
        if name in argv[:-1]:
            at = argv.index(name)
            argv += [argv.pop(at), argv.pop(at)]


def _quote_paths(argv: list[str]) -> None:
    """Hydra takes a second ``=`` in quotes only, and Lightning's own names of checkpoints have one: ``epoch=1-step=30.ckpt``."""
    for i, arg in enumerate(argv):
        if re.fullmatch(r"[\w./@+~]+=[^=,'\"(){}\[\]$]*=[^,'\"(){}\[\]$]*", arg):
            key, _, value = arg.partition("=")
            argv[i] = f'{key}="{value}"'


def prepare_process() -> None:
    """What every process needs that runs a job; a sweep's launcher may have started it elsewhere."""
    _quiet()
    register_resolvers()
    # modules of the user's own, beside their configs
    if (here := str(Path.cwd())) not in sys.path:
        sys.path.insert(0, here)


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
    from hydra.utils import get_method
    from lightning.fabric.utilities.exceptions import MisconfigurationException
    from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

    prepare_process()
    verb = get_method(VERBS[str(HydraConfig.get().job.config_name)])
    explained = (ValueError, TypeError, OSError, ImportError, MisconfigurationException)
    try:
        return verb(cfg)
    except (*explained, InstantiationException, OmegaConfBaseException) as error:
        if isinstance(error, MissingMandatoryValue):
            error = ValueError(f"`{error.full_key}` is missing: give {error.full_key}=<value>.")
        # HYDRA_FULL_ERROR=1 shows where the error came from
        if os.environ.get("HYDRA_FULL_ERROR"):
            raise
        if HydraConfig.get().mode != RunMode.MULTIRUN:
            raise UserError(error) from error
        # the other jobs of a sweep go on; its table shows that this one failed
        print(UserError(error), file=sys.stderr)
        return None


def _quiet() -> None:
    """Keep out what libraries say to their developers, or to sell something."""
    os.environ.setdefault("WANDB_SILENT", "true")
    for name in ("lightning.pytorch", "lightning.fabric", "onnx_ir", "onnxscript"):
        logging.getLogger(name).setLevel(logging.WARNING)
    # what `schedule` says is meant
    overruled = "QATSchedule overrules .*"
    for message in (".*LeafSpec.*", ".*does not have many workers.*", ".*Checkpoint directory.*", overruled):
        warnings.filterwarnings("ignore", message=message)
