"""What an option means beyond its value: declared beside it, and read by all that compares or names runs."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import MISSING, Field, field, fields


def option(
    default: object,
    *,
    free_on_resume: bool = False,
    names_run_in: tuple[str, ...] = ("grid", "figure"),
    methods: tuple[str, ...] | None = None,
    only_with: tuple[str, tuple[object, ...]] | None = None,
) -> Field:
    """Declare an option of a dataclass.

    Args:
        default: Its default.
        free_on_resume: It may be another when a run is resumed, for it does not change what the run computes.
        names_run_in: Where it tells two runs apart: in a ``grid``, as it decides what is computed; in a ``figure``, as
            it decides what is drawn. Neither where it says where things lie.
        methods: The methods in which it has an effect; None for all.
        only_with: Another option by its full name, and the values of that one with which this one has an effect.
    """
    meaning = {
        "free_on_resume": free_on_resume,
        "names_run_in": names_run_in,
        "methods": methods,
        "only_with": only_with,
    }
    return field(default=default, metadata=meaning)


def walk_options(kind: type, prefix: str = "") -> Iterator[tuple[str, Field]]:
    """Every option of a dataclass and of its sections, by its full name, such as ``train.epochs``."""
    for each in fields(kind):
        if each.default_factory is MISSING:
            yield prefix + each.name, each
        else:
            yield from walk_options(each.default_factory, f"{prefix}{each.name}.")


def free_on_resume(kind: type) -> set[str]:
    """The full names of the options that may be others when a run is resumed."""
    return {name for name, each in walk_options(kind) if each.metadata.get("free_on_resume", False)}


def unnamed(kind: type, where: str) -> set[str]:
    """The full names of the options that do not tell two runs apart in a ``grid`` or a ``figure``."""
    return {name for name, each in walk_options(kind) if where not in each.metadata.get("names_run_in", (where,))}


def flatten(config: dict[str, object], prefix: str = "") -> dict[str, object]:
    """Options and their values by their full names; what has no options below it stays as it is."""
    flat: dict[str, object] = {}
    for name, value in config.items():
        flat |= flatten(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
    return flat
