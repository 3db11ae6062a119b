"""The versions that wantrain was tested with, and the two ends of what it allows.

    python -m tools.bounds constraints                    writes launch/constraints.txt from this environment
    python -m tools.bounds lowest FOLDER [PYTEST WORDS]   makes FOLDER, an environment of the lowest versions that
                                                          pyproject.toml allows, and runs the default tier in it
    python -m tools.bounds newest FOLDER [PYTEST WORDS]   the same with the newest versions

The lowest are those of what wantrain itself asks for; what these ask for in turn is the newest that they allow. By
hand, before a release; docs/maintaining.md has what came out. A folder that is there is used as it is.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from packaging.version import Version

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ROOT / "launch" / "constraints.txt"
FREE = ("certifi",)
"""Certificates: the newest are the right ones."""


def asked() -> list[Requirement]:
    """What pyproject.toml asks for here, all that tests use."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    found = {Requirement(line) for line in (*project["dependencies"], *project["optional-dependencies"]["dev"])}
    return sorted((one for one in found if one.marker is None or one.marker.evaluate()), key=str)


def lowest(one: Requirement) -> str:
    """The requirement with its lower bound as the version. Raises StopIteration where it has none."""
    return f"{one.name}=={next(bound.version for bound in one.specifier if bound.operator in ('>=', '=='))}"


def installed(todo: list[Requirement]) -> Iterator[tuple[str, Version]]:
    """(name, version) of what is installed of the requirements, and of what these require in turn."""
    seen = set[tuple[str, frozenset[str]]]()
    while todo:
        one = todo.pop()
        key = canonicalize_name(one.name), frozenset(one.extras)
        if key in seen:
            continue
        seen.add(key)
        try:
            found = distribution(one.name)
        except PackageNotFoundError:
            continue
        yield key[0], Version(found.version)
        further = [Requirement(line) for line in found.requires or ()]
        todo += [other for other in further if other.marker is None
                 or any(other.marker.evaluate({"extra": extra}) for extra in ("", *one.extras))]


def constraints() -> str:
    """A line for each package; without a build's own ending, such as torch's +cpu, so that any build will do."""
    lines = sorted({f"{name}=={version.public}" for name, version in installed(asked()) if name not in FREE})
    return "\n".join(["# What wantrain was tested with, Python 3.11 on Linux: pip install -c launch/constraints.txt .",
                      "# Written by python -m tools.bounds constraints", *lines, ""])


def make(kind: str, folder: Path) -> None:
    """An environment of one end of what is allowed."""
    wanted = [lowest(one) for one in asked() if one.specifier] if kind == "lowest" else [str(one) for one in asked()]
    subprocess.run([sys.executable, "-m", "venv", folder], check=True)
    pip = [folder / "bin" / "pip", "install", "--quiet"]
    subprocess.run([*pip, *wanted], check=True)
    subprocess.run([*pip, "--no-deps", "--editable", ROOT], check=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=("constraints", "lowest", "newest"))
    parser.add_argument("folder", nargs="?", type=Path)
    given, words = parser.parse_known_args()
    if given.what == "constraints":
        CONSTRAINTS.write_text(constraints())
        return 0
    if given.folder is None:
        parser.error(f"{given.what} needs the FOLDER of its environment")
    if not given.folder.exists():
        make(given.what, given.folder)
    return subprocess.run([given.folder.resolve() / "bin" / "python", "-m", "pytest", *words], cwd=ROOT,
                          check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
