"""What the values of options must be, and one check for all of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import get_args, get_type_hints

MOST, MOST_COUNT = 1e6, 10**9
"""Upper limits of numbers and counts: more than any training takes, so that a typing error ends in a message."""

# NaN compares as False with everything, so it is outside of each of these.
COUNT = (lambda value: 1 <= value <= MOST_COUNT, f"1 to {MOST_COUNT}")
COUNT_OR_NONE = (lambda value: 0 <= value <= MOST_COUNT, f"0 to {MOST_COUNT}")
POSITIVE = (lambda value: 0 < value <= MOST, f"a positive number up to {MOST:g}")
BELOW_ONE = (lambda value: 0 <= value < 1, "a share in [0, 1)")


def require(section: str, options: object, rules: dict[str, tuple[Callable[[object], bool], str]]) -> None:
    """Raise for the first option that is out of its range, or none of the words that its type allows.

    Args:
        section: Stands in front of an option's name, ``train.`` for example.
        options: The dataclass.
        rules: For some of its options what must hold, and what to choose instead; ``null`` is always allowed.
    """
    words = {name: get_args(kind) for name, kind in get_type_hints(type(options)).items()}
    for name, allowed in words.items():
        if isinstance(allowed[0] if allowed else None, str) and getattr(options, name) not in allowed:
            raise ValueError(f"{section}{name} is {getattr(options, name)!r}: choose one of {', '.join(allowed)}")
    for name, (holds, remedy) in rules.items():
        value = getattr(options, name)
        if value is not None and not holds(value):
            raise ValueError(f"{section}{name} is {value!r}: choose {remedy}")


def expand_home(options: object, *names: str) -> None:
    """Replace a leading ``~/``: a shell leaves it in ``--output_dir=~/runs``, and no shell sees a YAML file."""
    for name in names:
        value = getattr(options, name)
        if value is not None and str(value).startswith("~/"):
            setattr(options, name, str(Path(value).expanduser()))
