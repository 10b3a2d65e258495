"""What every model of the schemas shares."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

Dtype = Literal["float32", "float16", "bfloat16"]


class Strict(BaseModel):
    """Refuses unknown keys. Recipes are also validated in strict mode, where ``"3"`` is not a number."""

    model_config = ConfigDict(extra="forbid", protected_namespaces=())
