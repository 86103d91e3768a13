"""The YAML recipes that come with the library."""

from __future__ import annotations

from pathlib import Path

__all__ = ["read_recipe", "recipe_folder", "recipe_lines", "recipe_names"]


def recipe_folder() -> Path:
    """Return the folder of the recipes: inside the installed package, or ``configs/`` of a source checkout."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "configs"
    return installed if installed.is_dir() else package.parent / "configs"


def recipe_names() -> list[str]:
    """Return the names of all recipes, e.g. ``"nmc"`` or ``"paper/nmc_cifar100"``."""
    folder = recipe_folder()
    files = sorted(folder.rglob("*.yaml"), key=lambda file: (len(file.relative_to(folder).parts), str(file)))
    return [file.relative_to(folder).with_suffix("").as_posix() for file in files]


def read_recipe(name: str) -> str:
    """Return the text of a recipe.

    Raises:
        KeyError: If there is none of that name; the message lists the nearest.
    """
    names = recipe_names()
    if name not in names:
        from clkit.errors import did_you_mean  # imports scikit-learn, for which the list of recipes should not wait

        raise KeyError(f"no recipe {name!r}{did_you_mean(name, names) or '; there are: ' + ', '.join(names)}")
    return (recipe_folder() / f"{name}.yaml").read_text(encoding="utf-8")


def recipe_lines() -> list[str]:
    """Return one line a recipe: its name and what it does (the first comment of the file)."""
    names = recipe_names()
    width = max(map(len, names), default=0)
    return [f"{name:<{width}}  {read_recipe(name).splitlines()[0].lstrip('# ')}" for name in names]
