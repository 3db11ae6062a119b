"""Where the files of groups are looked for: what ships, `recipes/` of the working folder, the folders of the
environment variable WANTRAIN_RECIPES, the folder of a recipe that is given as a file, and that of --config-dir.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from wantrain.terms import UserError

RECIPES = "recipes"
VARIABLE = "WANTRAIN_RECIPES"
SCHEME = "recipes"
"""Of a folder of recipes in Hydra's search path."""


@dataclass(frozen=True, slots=True)
class Place:
    """A folder of groups, such as model/ and recipe/; or, where `is_flat`, one that holds recipes themselves."""

    folder: Path
    is_flat: bool = False

    def files(self, group: str) -> list[Path]:
        """The files of a group here."""
        inside = self.folder if self.is_flat else self.folder / group
        return sorted(inside.glob("*.yaml")) if group == "recipe" or not self.is_flat else []

    def groups(self) -> set[str]:
        """The groups that have files here."""
        return {"recipe"} if self.is_flat else {path.parent.name for path in self.folder.glob("*/*.yaml")}

    @property
    def url(self) -> str:
        """What Hydra's search path calls it."""
        return f"{SCHEME if self.is_flat else 'file'}://{self.folder.resolve()}"


def configs_folder() -> Path:
    """`configs/`: beside the package in a checkout, inside it in an installed wheel."""
    package = Path(__file__).parents[1]
    inside = package / "configs"
    return inside if inside.is_dir() else package.parent / "configs"


def own_places(config_dir: Path | None = None, given: Sequence[Path] = ()) -> list[Place]:
    """Where the user's own files are; `given` are recipes that a command line names as files."""
    folders = [Path(RECIPES)] if Path(RECIPES).is_dir() else []
    for name in filter(None, os.environ.get(VARIABLE, "").split(os.pathsep)):
        if not Path(name).expanduser().is_dir():
            raise UserError(f"{VARIABLE} names the folder {name}, which is not there", f"unset {VARIABLE}    or name "
                            "folders that hold recipes")
        folders.append(Path(name).expanduser())
    folders += [path.parent for path in given]
    flat = list({folder.resolve(): Place(folder, is_flat=True) for folder in folders
                 if folder.resolve() != (configs_folder() / "recipe").resolve()}.values())
    return [*([Place(config_dir)] if config_dir else []), *flat]
