"""The optional packages that export needs: imported where they are used, missed with one message."""

import importlib


def require(*modules: str) -> None:
    """Import ``modules``, or say how to install them.

    Raises:
        ImportError: one of them is missing.

    >>> require("torch")
    """
    for module in modules:
        try:
            importlib.import_module(module)
        except ImportError as error:
            raise ImportError(f'`{module}` is missing: ONNX export needs `pip install "lightning-lq[export]"`.') from error
