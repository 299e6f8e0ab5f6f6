"""The target of a URL."""

from __future__ import annotations

from urllib.parse import urlsplit

from hps_numba.cli._serve_load.connection import Access, Target
from hps_numba.errors import ConfigError

__all__ = ["check_url", "target_of"]

_SCHEMES = ("http", "https", "grpc", "grpcs")


def check_url(url: str) -> str:
    """The scheme of a URL.

    Raises:
        ConfigError: it is no URL of a server.
    """
    try:
        parts = urlsplit(url)
        good = parts.scheme in _SCHEMES and bool(parts.hostname) and parts.port != 0
    except ValueError:
        good = False
    if "@" in url:
        raise ConfigError("URL: expected http://HOST:PORT without a user or password: --header sends credentials")
    if not good or not url.isascii() or not url.isprintable() or " " in url:
        raise ConfigError(f"URL: expected http://HOST:PORT, https://, grpc:// or grpcs://, got {url!r}")
    return parts.scheme


def target_of(url: str, access: Access) -> Target:
    """A target that speaks the protocol of the URL's scheme.

    Raises:
        ConfigError: it is no URL of a server, or grpcio is missing.
    """
    scheme = check_url(url)
    if access.ca is not None and scheme not in ("https", "grpcs"):
        raise ConfigError(f"--ca: expected https:// or grpcs://, whose certificates it is for, got {url}")
    if access.ca is not None and not access.ca.is_file():
        raise ConfigError(f"--ca: expected a file with certificates, got {access.ca}")
    if scheme.startswith("grpc"):
        from hps_numba.cli._serve_load.grpc import GrpcTarget

        return GrpcTarget(url, access)
    from hps_numba.cli._serve_load.http import HttpTarget

    return HttpTarget(url, access)
