"""Recipes as clients send them: a mapping, or the YAML text of a recipe file."""

from __future__ import annotations

from typing import Any

import yaml

from parampara.errors import InvalidRequest
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
        return parse_recipe(read_yaml(request.recipe_yaml))
    raise InvalidRequest(
        "The recipe is missing: give it as a mapping in recipe, or as text in recipe_yaml.",
        param="recipe",
        code="missing_required_parameter",
    )


def read_yaml(text: str) -> Any:
    """Plain data from YAML text.

    Raises:
        InvalidRequest: not YAML, an anchor or alias (a few of them can stand for gigabytes), or a key given twice.
    """
    try:
        data = yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as error:
        raise InvalidRequest(f"recipe_yaml is not valid YAML: {' '.join(str(error).split())[:500]}", param="recipe_yaml") from None
    except (RecursionError, ValueError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise InvalidRequest(f"recipe_yaml can not be read: {reason}.", param="recipe_yaml") from None
    if (fault := unstorable(data)) is not None:
        raise InvalidRequest(f"recipe_yaml: {fault}.", param="recipe_yaml")
    return data


class _PlainLoader(yaml.SafeLoader):
    def compose_node(self, parent: Any, index: Any) -> Any:
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent) or getattr(event, "anchor", None):
            raise yaml.constructor.ConstructorError(None, None, "anchors and aliases are not allowed in a recipe", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        seen = set[str]()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key has to be a plain word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value!r} is given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep=deep)
