"""YAML as recipes use it: plain data, numbers as YAML 1.2 writes them (``2e-4``), nothing that can grow or hide.

PyYAML follows YAML 1.1, where ``2e-4`` is text and ``yes`` a boolean; a recipe means what its reader sees.
"""

from __future__ import annotations

import re
from typing import Any

import yaml

from parampara.errors import InvalidRequest

_FLOAT = re.compile(r"^[-+]?(\d+\.\d*([eE][-+]?\d+)?|\.\d+([eE][-+]?\d+)?|\d+[eE][-+]?\d+)$")
_BOOL = re.compile(r"^(true|True|TRUE|false|False|FALSE)$")


def read_yaml(text: str, *, param: str) -> Any:
    """Plain data from YAML text.

    Raises:
        InvalidRequest: not YAML, an anchor or alias (a few of them can stand for gigabytes), or a key given twice.
    """
    try:
        return yaml.load(text, Loader=_PlainLoader)
    except yaml.YAMLError as error:
        raise InvalidRequest(f"{param} is not valid YAML: {' '.join(str(error).split())[:500]}", param=param) from None
    except (RecursionError, ValueError) as error:
        reason = "it is nested too deeply" if isinstance(error, RecursionError) else str(error)[:200]
        raise InvalidRequest(f"{param} can not be read: {reason}.", param=param) from None


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


_REPLACED = ("tag:yaml.org,2002:float", "tag:yaml.org,2002:bool")
_PlainLoader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in resolvers if tag not in _REPLACED]
    for first, resolvers in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_PlainLoader.add_implicit_resolver(_REPLACED[0], _FLOAT, list("-+0123456789."))
_PlainLoader.add_implicit_resolver(_REPLACED[1], _BOOL, list("tTfF"))
