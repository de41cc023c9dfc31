"""Which calibration method, with which options, is meant for which quantizer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from lq.descriptor import QuantDescriptor
from lq.functional.choose import AUTO, check_choice
from lq.functional.threshold import OPTIONS, Search

# A method for all quantizers; or for those whose short names match a pattern, where the last match wins, with options of its own
# if it is a mapping: {"*": "mse", "*.weight": {"method": "lp", "p": 3}}.
Method = str | Mapping[str, str | Mapping[str, Any]]


@dataclass(frozen=True)
class Choice:
    """A method and its options, sorted by their names; hashable, for quantizers with the same one are computed together."""

    method: str
    options: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, value: str | Mapping[str, Any], options: Mapping[str, Any]) -> "Choice":
        """What a value of :data:`Method` means where ``options`` are those for all.

        >>> Choice.of({"method": "lp", "p": 3}, {"p": 2, "stride": 4})
        Choice(method='lp', options=(('p', 3), ('stride', 4)))
        """
        own = {"method": value} if isinstance(value, str) else dict(value)
        if "method" not in own:
            raise ValueError(f"`method` has {own}, without a method: give it as {{'method': 'mse', ...}}.")
        return cls(own.pop("method"), tuple(sorted({**options, **own}.items())))

    def on_grid(self, desc: QuantDescriptor) -> "Choice":
        """The same for a quantizer whose grid ends elsewhere than at amax (:meth:`lq.QuantDescriptor.search_options`)."""
        return Choice.of(self.method, desc.search_options(dict(self.options)))


def choices_by_name(names: Iterable[str], method: Method, options: Mapping[str, Any]) -> dict[str, Choice]:
    """What is meant for each quantizer.

    Raises:
        ValueError: a pattern matches nothing, or no pattern a quantizer.

    >>> {n: c.method for n, c in choices_by_name(["stem.input", "head.input"], {"*": "mse", "head.*": "max"}, {}).items()}
    {'stem.input': 'mse', 'head.input': 'max'}
    """
    names = list(names)
    if isinstance(method, str):
        return dict.fromkeys(names, Choice.of(method, options))
    chosen: dict[str, Choice] = {}
    for pattern, value in method.items():
        matches = [name for name in names if fnmatchcase(name, pattern)]
        if not matches:
            raise ValueError(f"`method` has the pattern {pattern!r}, which matches no quantizer: known are {', '.join(names)}.")
        chosen |= dict.fromkeys(matches, Choice.of(value, options))
    if left := [name for name in names if name not in chosen]:
        raise ValueError(f"`method` says nothing about `{left[0]}` ({len(left)} quantizers): begin it with a pattern '*'.")
    return chosen


def check_options(method: Method, options: Mapping[str, Any], batches: int = 2) -> None:
    """Raise ``ValueError`` for a method or an option that does not exist, is out of range, or needs more than ``batches``."""
    for value in [method] if isinstance(method, str) else method.values():
        choice = Choice.of(value, options)
        check_choice(choice.method)
        if choice.method == AUTO and batches < 2:
            raise ValueError(f"`method` 'auto' holds batches out to measure on: it needs at least 2, not {batches}.")
        given = dict(choice.options)
        if unknown := sorted(set(given) - set(OPTIONS)):
            raise ValueError(f"Unknown calibration option {', '.join(map(repr, unknown))}: choose among {', '.join(OPTIONS)}.")
        Search(**given)
