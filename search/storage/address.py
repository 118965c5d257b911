"""Where a study's record is, as a URL that may be written down: passwords stay in the environment."""

from __future__ import annotations

import os
import re
from urllib.parse import SplitResult, parse_qs, quote, urlsplit

from configuration import ConfigError
from search.errors import SpecError

VARIABLE = "TUNE_STORAGE"
KEY = "search.storage"
SCHEMES = ("postgresql", "postgres", "postgresql+psycopg")
_NAMED = re.compile(r"\$\{(\w+)\}")


def check(text: str | None) -> None:
    """Refuse a URL that cannot be used, or that has a password in it: a search space is no place for one.

    Raises:
        ConfigError: without the URL in it.
    """
    if text is None or _NAMED.fullmatch(text):
        return
    url = _split(text, KEY)
    options = [value for name, values in parse_qs(url.query).items() if "password" in name for value in values]
    if any(secret and not _NAMED.search(secret) for secret in (url.password, *options)):
        raise ConfigError(
            KEY,
            "has a password in it, which would be in files and reports; write ${NAME} for a variable of the "
            f"environment in its place, leave it to PGPASSWORD or ~/.pgpass, or give the whole URL as {VARIABLE}",
        )


def resolve(text: str | None) -> str | None:
    """Return the whole URL of a study's record: the spec's, or the environment's; None: the record is in its folder.

    Raises:
        SpecError: if it is none, or names a variable that is not set.
    """
    key = KEY if text is not None else VARIABLE
    text = text if text is not None else os.environ.get(VARIABLE)
    if not text:
        return None
    try:
        whole = _filled(text, key)
        _split(whole, key)
    except ConfigError as error:
        raise SpecError(str(error)) from error
    return f"postgresql+psycopg:{whole.partition(':')[2]}"


def shown(url: str) -> str:
    """Return a URL as it may be shown: without a user's name, a password or options."""
    parts = urlsplit(url)
    host = parts.hostname or parse_qs(parts.query).get("host", ["localhost"])[0]
    return f"postgresql://{host}{f':{parts.port}' if parts.port else ''}{parts.path}"


def _split(text: str, key: str) -> SplitResult:
    try:
        url = urlsplit(text)
        _ = url.port
    except ValueError:
        raise ConfigError(key, "not a URL; write postgresql://USER@HOST/DATABASE") from None
    if url.scheme.startswith("sqlite"):
        raise ConfigError(
            key,
            "sqlite is one file for one machine, which the study's own journal is too, and faster; leave this out, "
            "or write postgresql://USER@HOST/DATABASE for a cluster",
        )
    if url.scheme not in SCHEMES or "://" not in text:
        raise ConfigError(key, f"got {url.scheme or 'no'} URL; expected postgresql://USER@HOST/DATABASE")
    return url


def _filled(text: str, key: str) -> str:
    """Return a URL with the variables of the environment that it names in their places."""
    whole = _NAMED.fullmatch(text)

    def value(match: re.Match[str]) -> str:
        if match[1] not in os.environ:
            raise ConfigError(key, f"names the variable {match[1]}, which is not set; export it, or write the URL out")
        return os.environ[match[1]] if whole else quote(os.environ[match[1]], safe="")

    return _NAMED.sub(value, text)
