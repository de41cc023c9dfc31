"""Files that appear whole or not at all."""

import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def staged(path: Path) -> Iterator[Path]:
    """A stand-in for ``path`` in a temporary folder beside it; when the block ends well, what stands there moves into place.

    The folder is made first, so that a destination that cannot be written is found before the work and not after it.

    Raises:
        FileNotFoundError: the folder of ``path`` does not exist.
        IsADirectoryError: ``path`` is a folder.
        OSError: nothing can be created in the folder.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(f"`path` is {str(path)!r}, but the folder {str(path.parent)!r} does not exist: create it first.")
    if path.is_dir():
        raise IsADirectoryError(f"`path` is {str(path)!r}, a folder: give the name of a file.")
    try:
        # on the same file system, so that moving a file into place is one step
        folder = tempfile.TemporaryDirectory(prefix=f".{path.name}.", dir=path.parent)
    except OSError as error:
        reason = error.strerror or str(error)
        raise type(error)(
            f"`path` is {str(path)!r}, but nothing can be written there ({reason}): choose another folder."
        ) from error
    with folder:
        stand_in = Path(folder.name) / path.name
        yield stand_in
        beside = sorted(p for p in stand_in.parent.iterdir() if p != stand_in)
        # the file that refers to the others comes last
        for file in [*beside, stand_in]:
            file.replace(path.parent / file.name)
