"""Nested training state (optimizer, scheduler, RNG, scaler) as JSON plus safetensors: nothing in a checkpoint is a pickle.

A tree of dicts (any scalar keys), lists, tuples, scalars and tensors becomes a JSON tree in which each tensor is a name,
and a flat mapping of names to tensors. The round trip is exact: types, dtypes, bits and key order.
"""

from __future__ import annotations

import base64
from typing import Any

import torch


def split_tensors(tree: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """Return the JSON tree and its tensors (detached, contiguous, on the CPU).

    Raises:
        TypeError: the tree holds something that is not data.
    """
    tensors: dict[str, torch.Tensor] = {}
    return _encode(tree, tensors, "t"), tensors


def join_tensors(tree: Any, tensors: dict[str, torch.Tensor]) -> Any:
    """The inverse of :func:`split_tensors`."""
    if isinstance(tree, list):
        return [join_tensors(item, tensors) for item in tree]
    if not isinstance(tree, dict):
        return tree
    kind, value = tree["k"], tree["v"]
    if kind == "tensor":
        return tensors[value]
    if kind == "bytes":
        return base64.b64decode(value)
    if kind == "tuple":
        return tuple(join_tensors(item, tensors) for item in value)
    return {key: join_tensors(item, tensors) for key, item in value}


def _encode(tree: Any, tensors: dict[str, torch.Tensor], path: str) -> Any:
    if tree is None or isinstance(tree, (bool, int, float, str)):
        return tree
    if isinstance(tree, torch.Tensor):
        # a zero-dimensional or shared tensor gets storage of its own, as safetensors wants it
        tensors[path] = tree.detach().to("cpu").contiguous().clone()
        return {"k": "tensor", "v": path}
    if isinstance(tree, bytes):
        return {"k": "bytes", "v": base64.b64encode(tree).decode("ascii")}
    if isinstance(tree, list):
        return [_encode(item, tensors, f"{path}.{i}") for i, item in enumerate(tree)]
    if isinstance(tree, tuple):
        return {"k": "tuple", "v": [_encode(item, tensors, f"{path}.{i}") for i, item in enumerate(tree)]}
    if isinstance(tree, dict):
        if not all(key is None or isinstance(key, (str, int, float, bool)) for key in tree):
            raise TypeError(f"{path}: keys of training state are scalars.")
        return {"k": "dict", "v": [[key, _encode(item, tensors, f"{path}.{i}")] for i, (key, item) in enumerate(tree.items())]}
    raise TypeError(f"{path}: training state can not hold a {type(tree).__name__}.")
