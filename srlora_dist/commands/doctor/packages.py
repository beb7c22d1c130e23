"""Whether the installed packages are of the versions that this one asks for."""

from __future__ import annotations

import platform
from collections.abc import Iterator
from importlib import metadata

from packaging.requirements import Requirement

from srlora_dist.commands.doctor.found import Found

NAME = "srlora-dist"
FOR_WORK_ON_IT = ("dev",)
"""Extras that no user misses."""


def check_packages() -> Iterator[Found]:
    """Compare each with the range in the metadata of this package; one that is optional is only a warning."""
    try:
        wanted = metadata.distribution(NAME)
    except metadata.PackageNotFoundError:
        yield Found("warning", f"{NAME} is not installed, so its versions are not checked", "pip install .")
        return
    fine = [f"python {platform.python_version()}", f"{NAME} {wanted.version}"]
    for line in dict.fromkeys(wanted.requires or ()):
        requirement = Requirement(line)
        extra = _extra(requirement)
        if extra in FOR_WORK_ON_IT or requirement.name == NAME:  # an extra of extras
            continue
        try:
            version = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            version = None
        if version is not None and requirement.specifier.contains(version, prereleases=True):
            fine.append(f"{requirement.name} {version}")
            continue
        yield Found(
            "warning" if extra else "failed",
            f"{requirement.name} is {version or 'not installed'}, asked for is {requirement.specifier or 'any'}"
            + (f", for the extra {extra}" if extra else ""),
            f"pip install '{NAME}[{extra}]'" if extra else f"pip install '{requirement.name}{requirement.specifier}'",
        )
    yield Found("ok", ", ".join(dict.fromkeys(fine)))


def _extra(requirement: Requirement) -> str:
    """The extra that a requirement belongs to; empty for one that everybody needs."""
    text = str(requirement.marker or "")
    return text.partition("extra ==")[2].strip(" \"')") if "extra ==" in text else ""
