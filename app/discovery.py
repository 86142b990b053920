"""How plugs are found: every file of the packages is read, and its plug is put into the catalog.

One file in a package of ``Settings.plugin_packages`` is one plug. Its module level holds a pydantic spec and a
function, so reading it costs no torch; the GPU stack is imported inside the function.
"""

import importlib
import pkgutil
from collections.abc import Iterable
from dataclasses import replace
from types import ModuleType
from typing import Any

from app.catalog import Catalog, CatalogError, Grader, MergeMethod, Operation, Recipe, Tracker
from app.engines import Engine
from app.grading import typed

Plug = Recipe | Grader | Operation | Tracker | MergeMethod | Engine
PLUG_NAMES: dict[str, Any] = {
    "recipe": Recipe,
    "grader": Grader,
    "operation": Operation,
    "tracker": Tracker,
    "merge": MergeMethod,
    "engine": Engine,
}


def discover(packages: Iterable[str]) -> Catalog:
    """Imports every module of the packages and collects its plug.

    Raises CatalogError for a file without a plug and for two plugs of the same name.
    """
    catalog = Catalog()
    for package in packages:
        for module in _modules(package):
            name, plug = _plug(module)
            shelf: dict[str, Any] = getattr(catalog, name + "s")
            if plug.name in shelf:
                raise CatalogError(f"{module.__name__}: a {name} named {plug.name!r} is already plugged in")
            shelf[plug.name] = plug
    _type_graders(catalog)
    return catalog


def _type_graders(catalog: Catalog) -> None:
    """Every place in a spec that takes graders takes exactly those that are plugged in.

    A grader that is made of others takes those that are not.
    """
    simple = {name: plug.spec for name, plug in catalog.graders.items()}
    whole = {name: typed(spec, simple) for name, spec in simple.items()}
    simple = {name: spec for name, spec in simple.items() if whole[name] is spec}
    shelves: list[dict[str, Any]] = [catalog.graders, catalog.recipes, catalog.operations]
    choices = simple
    for shelf in shelves:
        for name, plug in shelf.items():
            shelf[name] = replace(plug, spec=typed(plug.spec, choices))
        choices = {name: plug.spec for name, plug in catalog.graders.items()}


def _modules(package: str) -> Iterable[ModuleType]:
    try:
        root = importlib.import_module(package)
    except ImportError as error:
        raise CatalogError(f"plug-in package {package!r} cannot be imported: {error}") from error
    for info in sorted(pkgutil.iter_modules(root.__path__), key=lambda info: info.name):
        if info.name.startswith("_"):
            continue
        try:
            yield importlib.import_module(f"{package}.{info.name}")
        except Exception as error:
            raise CatalogError(f"{package}.{info.name} cannot be imported: {error!r}") from error


def _plug(module: ModuleType) -> tuple[str, Plug]:
    for name, kind in PLUG_NAMES.items():
        plug: Any = getattr(module, name, None)
        if isinstance(plug, kind):
            return name, plug
    raise CatalogError(
        f"{module.__file__}: no plug; end the file with recipe = Recipe(…), grader = …, operation = …, tracker = …,"
        " merge = … or engine = …"
    )
