"""What stands in a connection string, told without DNS and without a server; nothing of it is ever quoted."""

from __future__ import annotations

import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Final

from pymongo.errors import ConfigurationError, InvalidURI, PyMongoError
from pymongo.uri_parser import parse_uri

from cdc.errors import CdcError, FatalError, TransientError

CERTIFICATES: Final = "check tlsCAFile and tlsCertificateKeyFile of the url, and until when the certificates are valid"

_UNREADABLE: Final = "the url of a MongoDB server cannot be read"

_NOT_OF_ONE_HOST: Final = frozenset({
    "replicaset", "directconnection", "loadbalanced", "srvservicename", "srvmaxhosts",
})  # fmt: skip


def parsed(url: str) -> dict[str, Any]:
    """What PyMongo takes an URL for, but for what DNS tells of a mongodb+srv one. Raises `FatalError`."""
    plain = _without_srv(url)
    with reading_url():
        try:
            found = parse_uri(plain, default_port=None, warn=True)
        except OSError:  # a file of its TLS options is missing: that is for who connects, and the others run on
            found = parse_uri(plain, default_port=None, validate=False)
    if plain != url and [port for _, port in found["nodelist"]] != [None]:
        raise FatalError(_UNREADABLE, hint="mongodb+srv:// takes one host, without a port: DNS tells the others")
    return found


def database_name(url: str) -> str | None:
    """The database in an URL's path, if there is one. Raises `FatalError` for an URL that cannot be read."""
    name: str | None = parsed(url)["database"]
    return name


@contextmanager
def reading_url() -> Iterator[None]:
    """Turn what PyMongo says of an URL into `CdcError`s."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of options that PyMongo does not know: `cdc check` tells them
            yield
    except OSError as exc:  # ssl.SSLError is one; both come before anything is sent
        named = f"{exc.filename}: " if exc.filename else ""
        raise FatalError(
            f"a file of the url's tls options cannot be used: {named}{exc.strerror}", hint=CERTIFICATES
        ) from exc
    except (PyMongoError, ValueError, TypeError) as exc:
        raise url_error(exc if isinstance(exc, InvalidURI | ConfigurationError) else InvalidURI()) from None


def url_error(error: InvalidURI | ConfigurationError) -> CdcError:
    """Sort by PyMongo's text, which may quote the url: a password with an unescaped character is where it stumbles."""
    text = str(error)
    if "DNS" in text or "SRV" in text or "resolution lifetime" in text:
        return TransientError("the url's host name could not be resolved by DNS (SRV)", hint="check host and DNS")
    if "Authentication" in text or "authentication" in text:
        return FatalError("the url asks for an authentication that cannot be had", hint="correct its authMechanism")
    if "certificate" in text:
        return FatalError("the certificate of the url's tlsCertificateKeyFile cannot be used", hint=CERTIFICATES)
    hint = "as in mongodb://user:password@host:27017/?replicaSet=rs0; special characters are written as %XX"
    return FatalError(_UNREADABLE, hint=hint)


def one_host(url: str, host: tuple[str, int]) -> str:
    """The URL with this host only, directly; what DNS says about a mongodb+srv one is written out."""
    scheme, _, rest = url.partition("://")
    netloc, _, rest = rest.partition("/")
    database, _, query = rest.partition("?")
    login = f"{user}@" if (user := netloc.rpartition("@")[0]) else ""
    options = [part for part in re.split("[&;]", query) if part.partition("=")[0].lower() not in _NOT_OF_ONE_HOST]
    names = {part.partition("=")[0].lower() for part in options}
    if scheme.endswith("+srv"):
        found = {name.lower(): value for name, value in parse_uri(url, validate=False, warn=False)["options"].items()}
        options += [f"authSource={found['authsource']}"] if "authsource" in found and "authsource" not in names else []
        options += [] if names & {"tls", "ssl"} else ["tls=true"]
    name = f"[{host[0]}]" if ":" in host[0] else host[0]
    options = [part for part in options if part]
    return f"mongodb://{login}{name}:{host[1]}/{database}?{'&'.join([*options, 'directConnection=true'])}"


def _without_srv(url: str) -> str:
    """So that reading an URL asks no DNS; the options that tell how to ask are none of what is left."""
    if not url.startswith("mongodb+srv://"):
        return url
    return re.sub(r"(?<=[?&;])srv\w+=[^&;]*[&;]?", "", url.replace("+srv", "", 1), flags=re.IGNORECASE)
