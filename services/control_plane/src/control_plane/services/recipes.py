"""Recipes as clients send them: a mapping, or the YAML text of a recipe file."""

from __future__ import annotations

from typing import Any

from parampara.errors import InvalidRequest
from parampara.plain_yaml import read_yaml
from parampara.schemas.api import RunCreate, unstorable
from parampara.schemas.recipe import Recipe, parse_recipe


def from_request(request: RunCreate) -> Recipe:
    """The validated recipe of a request.

    Raises:
        InvalidRequest: none or both forms given, not YAML, or not a recipe; names the path of the key at fault.
    """
    if request.recipe is not None and request.recipe_yaml is not None:
        raise InvalidRequest("Give either recipe or recipe_yaml, not both.", param="recipe_yaml")
    if request.recipe is not None:
        return parse_recipe(request.recipe)
    if request.recipe_yaml is not None:
        return parse_recipe(_storable_yaml(request.recipe_yaml))
    raise InvalidRequest(
        "The recipe is missing: give it as a mapping in recipe, or as text in recipe_yaml.",
        param="recipe",
        code="missing_required_parameter",
    )


def _storable_yaml(text: str) -> Any:
    data = read_yaml(text, param="recipe_yaml")
    if (fault := unstorable(data)) is not None:
        raise InvalidRequest(f"recipe_yaml: {fault}.", param="recipe_yaml")
    return data
