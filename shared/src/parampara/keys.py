"""API keys: how they look, how they are hashed, and who may do what.

A key is ``pp_`` + 43 base62 characters (256 random bits) + 6 base62 characters of CRC-32 over the rest, so that a leak
scanner recognises one exactly and a mistyped one is refused without a query. Stored is only HMAC-SHA256(pepper, whole
key); 256 random bits need no slow hash.
"""

from __future__ import annotations

import hashlib
import hmac
import os
import secrets
import string
import zlib
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import select
from sqlalchemy.orm import Session

from parampara.db.models import ApiKey
from parampara.errors import Forbidden, Unauthorized
from parampara.settings import Settings
from parampara.storage import fsync_directory

PREFIX = "pp_"
SCOPES = ("admin", "jobs", "chat")
_ALPHABET = string.digits + string.ascii_letters
_SECRET_LENGTH = 43
_CHECK_LENGTH = 6


@dataclass(frozen=True)
class Principal:
    """Who sends a request."""

    key_id: str
    name: str
    scopes: frozenset[str]

    def require(self, scope: str) -> None:
        """``admin`` implies every other scope.

        Raises:
            Forbidden: the key lacks the scope.
        """
        if scope not in self.scopes and "admin" not in self.scopes:
            have = ", ".join(sorted(self.scopes)) or "none"
            raise Forbidden(f"This API key has the scopes [{have}]; this needs {scope!r}. Ask an administrator for a key with it.")


def new_key() -> str:
    body = PREFIX + "".join(secrets.choice(_ALPHABET) for _ in range(_SECRET_LENGTH))
    return body + _checksum(body)


def well_formed(key: str) -> bool:
    """Prefix, length and checksum are right; says nothing about whether the key exists."""
    body, check = key[:-_CHECK_LENGTH], key[-_CHECK_LENGTH:]
    return key.isascii() and key.startswith(PREFIX) and len(body) == len(PREFIX) + _SECRET_LENGTH and check == _checksum(body)


def hint(key: str) -> str:
    """First and last characters, to recognise a key in a list."""
    return f"{key[:7]}...{key[-4:]}"


def hash_key(pepper: bytes, key: str) -> str:
    return hmac.new(pepper, key.encode(), hashlib.sha256).hexdigest()


def read_pepper(settings: Settings) -> bytes:
    """The secret that keys are hashed under: ``PARAMPARA_KEY_PEPPER``, else ``<home>/key-pepper``, made at first use (0600)."""
    if given := settings.key_pepper.get_secret_value():
        return given.encode()
    path = settings.home.resolve() / "key-pepper"
    if not path.exists():
        write_secret(path, secrets.token_hex(32))
    return path.read_text(encoding="ascii").strip().encode()


def write_secret(path: Path, value: str) -> bool:
    """Create ``path`` with mode 0600 and ``value``, whole or not at all; False when it already existed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    fd = os.open(aside, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        with os.fdopen(fd, "w", encoding="ascii") as file:
            file.write(value + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(aside, path)  # unlike rename, a link never replaces what another process has just written
        except FileExistsError:
            return False
        fsync_directory(path.parent)
        return True
    finally:
        aside.unlink(missing_ok=True)


def bearer(authorization: str | None) -> str:
    """The key inside an ``Authorization`` header.

    Raises:
        Unauthorized: header missing or of another form.
    """
    scheme, _, key = (authorization or "").partition(" ")
    if scheme.lower() != "bearer" or not key.strip():
        raise Unauthorized("No API key given: send it as `Authorization: Bearer <key>`.", code="missing_api_key")
    return key.strip()


def lookup(session: Session, pepper: bytes, key: str) -> Principal | None:
    """The principal of a key that exists and is not revoked, else None."""
    if not well_formed(key):
        return None
    row = session.scalar(select(ApiKey).where(ApiKey.hash == hash_key(pepper, key), ApiKey.revoked_at.is_(None)))
    return None if row is None else Principal(key_id=row.id, name=row.name, scopes=frozenset(row.scopes))


def authenticate(session: Session, pepper: bytes, authorization: str | None) -> Principal:
    """Principal of an ``Authorization`` header.

    Raises:
        Unauthorized: no key, not a key, unknown or revoked.
    """
    principal = lookup(session, pepper, bearer(authorization))
    if principal is None:
        raise Unauthorized("This API key is not known here or was revoked. Check it, or ask an administrator for a new one.")
    return principal


def _checksum(body: str) -> str:
    number, digits = zlib.crc32(body.encode()), ""
    for _ in range(_CHECK_LENGTH):
        number, digit = divmod(number, len(_ALPHABET))
        digits += _ALPHABET[digit]
    return digits
