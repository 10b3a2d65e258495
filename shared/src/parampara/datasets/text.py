"""Cleaning of text that came from outside: strict UTF-8, NFC, no control, bidi or invisible characters."""

from __future__ import annotations

import re
import unicodedata
from pathlib import Path

from parampara.errors import InvalidData

# C0 and C1 controls but tab and newline; soft hyphen; zero-width space, LRM, RLM; bidi embeddings and isolates; word joiner
# and invisible operators; BOM; annotation anchors; tag characters; lone surrogates; noncharacters. ZWJ and ZWNJ stay:
# Indic scripts need them.
_UNWANTED = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u00ad\u061c\u180e\u200b\u200e\u200f\u202a-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    "\ud800-\udfff\ufffe\uffff\U000e0000-\U000e007f]"
)
_LINE_ENDS = re.compile("\r\n?|[\x0b\x0c\x85\u2028\u2029]")


def clean_text(text: str) -> str:
    """NFC text with ``\\n`` line ends and without characters that a reader can not see but a model would learn."""
    return unicodedata.normalize("NFC", _UNWANTED.sub("", _LINE_ENDS.sub("\n", text)))


def decode_utf8(data: bytes, *, name: str) -> str:
    """Decode strictly.

    Raises:
        InvalidData: names the byte offset and what to do.
    """
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InvalidData(
            f"{name}: not UTF-8 (byte 0x{data[error.start]:02x} at offset {error.start}); save the file as UTF-8.", param=name
        ) from None


def checked_size(path: Path, *, name: str, limit: int) -> int:
    """Size of a regular file in bytes.

    Raises:
        InvalidData: missing, not a file, 0 bytes, or above ``limit`` bytes.
    """
    if not path.is_file():
        raise InvalidData(f"{name}: no such file.", param=name)
    size = path.stat().st_size
    if size == 0:
        raise InvalidData(f"{name}: the file is empty (0 bytes).", param=name)
    if size > limit:
        raise InvalidData(f"{name}: {size} bytes, above the limit of {limit}; split it.", param=name)
    return size
