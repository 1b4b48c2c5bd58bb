"""The recipes that come with the package: ``lib-lightning recipe list`` and ``lib-lightning recipe copy``.

A recipe is a configuration of a training (YAML), or a program, which may be a folder of modules; it is copied with all
modules of recipes that it names, so that ``recipes.modular_addition.ModularAddition`` can be imported from the working
directory.
"""

from __future__ import annotations

import ast
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import lib_lightning
from lib_lightning.errors import LIBError, MissingFileError, did_you_mean

_PACKAGE = Path(lib_lightning.__file__).parent
# Names of modules and files: recipes.mlp.MLP, recipes/mlp.py.
_REFERENCE = re.compile(r"\brecipes[./]([a-z0-9_]+(?:[./][a-z0-9_]+)*)")


@dataclass(frozen=True)
class Recipe:
    """A recipe.

    Attributes:
        name: Its name, ``"modular_addition"``.
        file: Its file, below the folder of recipes.
        summary: Its first sentence.
    """

    name: str
    file: Path
    summary: str

    @property
    def command(self) -> str:
        """The command that runs it in the folder that it was copied into."""
        if self.file.suffix == ".yaml":
            return f"lib-lightning fit --config recipes/{self.file.name}"
        return f"python -m recipes.{self.name}"


def recipes_folder() -> Path:
    """The folder of recipes: in an installed package, or beside it in a clone of the repository.

    Returns:
        Its path.

    Raises:
        MissingFileError: If neither exists.
    """
    folders = (_PACKAGE / "_recipes", _PACKAGE.parent / "recipes")
    for folder in folders:
        if (folder / "modular_addition.yaml").is_file():
            return folder
    raise MissingFileError(f"There are no recipes in {folders[0]}: this installation is not complete.")


def list_recipes() -> list[Recipe]:
    """All recipes: configurations first, then programs.

    Returns:
        The recipes.

    Example:
        >>> [recipe.command for recipe in list_recipes() if recipe.name == "digits_mlp"]
        ['lib-lightning fit --config recipes/digits_mlp.yaml']
    """
    folder = recipes_folder()
    found = [Recipe(file.stem, file, _first_sentence(_comment(file))) for file in sorted(folder.glob("*.yaml"))]
    names = {recipe.name for recipe in found}
    programs = {file.stem: file for file in folder.glob("*.py") if file.stem not in names}
    programs |= {file.parent.name: file for file in folder.glob("*/__main__.py")}
    for name, file in sorted(programs.items()):
        if "__main__" in (text := file.read_text(encoding="utf-8")):
            found.append(Recipe(name, file, _first_sentence(ast.get_docstring(ast.parse(text)) or "")))
    return found


def copy_recipe(name: str, folder: Path, replace: bool = False) -> Recipe:
    """Copy a recipe, and what it needs, into ``recipes/`` in a folder.

    Args:
        name: Name of the recipe.
        folder: The folder in which it will be run.
        replace: Whether to replace files that are there and have another content.

    Returns:
        The recipe.

    Raises:
        LIBError: If there is no such recipe, or a file with another content is in the way.
    """
    recipes = {recipe.name: recipe for recipe in list_recipes()}
    if name not in recipes:
        raise LIBError(
            f"There is no recipe '{name}'.{did_you_mean(name, tuple(recipes))} See lib-lightning recipe list."
        )
    recipe, source = recipes[name], recipes_folder()
    copies = {file: folder / "recipes" / file.relative_to(source) for file in _needed(recipe.file)}
    changed = [copy for file, copy in copies.items() if copy.exists() and copy.read_bytes() != file.read_bytes()]
    if changed and not replace:
        raise LIBError(f"{changed[0]} exists with another content. Use --replace, or another folder.")
    for file, copy in copies.items():
        if not copy.exists() or copy in changed:
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)
    return recipe


def _needed(file: Path) -> list[Path]:
    """A file of the recipes, and all that it names, directly or not."""
    needed = set(file.parent.glob("*.py")) if file.stem == "__main__" else {file}
    pending = list(needed)
    while pending:
        for other in _named_in(pending.pop()):
            if other not in needed:
                needed.add(other)
                pending.append(other)
    return sorted(needed)


def _named_in(file: Path) -> Iterator[Path]:
    folder = recipes_folder()
    for reference in _REFERENCE.findall(file.read_text(encoding="utf-8")):
        parts = re.split("[./]", reference)
        # The last parts may be names in a module, or the ending of a file's name.
        for length in range(len(parts), 0, -1):
            stem = folder.joinpath(*parts[:length])
            found = [path for ending in (".py", ".yaml") if (path := stem.with_name(stem.name + ending)).is_file()]
            yield from found
            if found:
                break


def _comment(file: Path) -> str:
    """The comment at the beginning of a YAML file."""
    lines = []
    for line in file.read_text(encoding="utf-8").splitlines():
        if not line.startswith("#"):
            break
        lines.append(line.removeprefix("#").strip())
    return "\n".join(lines)


def _first_sentence(text: str) -> str:
    paragraph = " ".join(text.strip().split("\n\n")[0].split())
    # The end of a sentence is followed by a capital letter or nothing; "arXiv 2405.10928" and "e.g." are no ends.
    return re.split(r"(?<=[.?])\s(?=[A-Z])|:$", paragraph)[0].rstrip(".:")
