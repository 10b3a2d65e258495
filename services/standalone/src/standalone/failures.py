"""Faults of settings and of files, in words: what the command line shows instead of a traceback."""

from __future__ import annotations

import errno
import re
from typing import Any

from pydantic import ValidationError
from pydantic_settings import SettingsError

from parampara.settings import Settings

_SECRET = re.compile(r"PEPPER|KEY|PASSWORD|URL")
_HINTS = {
    errno.EACCES: "it belongs to another account, or its mode forbids it; change its owner, or set PARAMPARA_HOME to another folder",
    errno.EPERM: "it belongs to another account; change its owner, or set PARAMPARA_HOME to another folder",
    errno.ENOSPC: "the disk is full; free some space, or set PARAMPARA_HOME to a folder on another disk",
    errno.EROFS: "the disk is read-only; set PARAMPARA_HOME to a folder on another one",
}


def of_settings(error: ValidationError | SettingsError) -> str | None:
    """Variable, value and limit of each setting at fault; None when ``error`` is not about :class:`Settings`."""
    if isinstance(error, SettingsError):
        field = re.search(r'field "(\w+)"', str(error))
        name = f"PARAMPARA_{field[1].upper()}" if field else "A PARAMPARA_ setting"
        return f"{name} is not valid JSON: {error.__cause__ or error}"
    if error.title != Settings.__name__:
        return None
    return "\n".join(_setting(fault["loc"], fault["msg"], fault["input"]) for fault in error.errors(include_url=False))


def of_files(error: OSError) -> str:
    """What could not be done with which file, and the way out where there is one."""
    hint = _HINTS.get(error.errno or 0)
    told = f"{error.strerror or error}"
    return (f"{told}: {error.filename}" if error.filename else told) + (f" ({hint})" if hint else "")


def _setting(place: tuple[int | str, ...], rule: str, value: Any) -> str:
    name = "PARAMPARA_" + "__".join(str(part).upper() for part in place)
    rule = rule.removeprefix("Value error, ")
    if isinstance(value, dict):  # a rule about several settings of one section; it names them
        return f"{name}__...: {rule}"
    return f"{name}: {rule}" if _SECRET.search(name) else f"{name} is {value!r}: {rule}"
