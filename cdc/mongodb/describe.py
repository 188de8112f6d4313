"""A change in Extended JSON, for people. Looked up by `cdc.kinds`."""

from __future__ import annotations

from typing import Any, Final

import bson
import msgspec
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.json_util import CANONICAL_JSON_OPTIONS, dumps

from cdc.change import Batch, Change, Ddl, Delta, Image, Operation
from cdc.letter import Described
from cdc.mongodb.equality import id_only

_OPTIONS: Final[CodecOptions[dict[str, Any]]] = CodecOptions(
    unicode_decode_error_handler="backslashreplace", datetime_conversion=DatetimeConversion.DATETIME_MS
)


def describe(batch: Batch) -> Described:
    """The only change of a batch. Numbers keep their types."""
    change = batch.transactions[0].changes[0]
    key = None if change.key is None else msgspec.Raw(_json(id_only(change.key)))
    members = b",".join(b'"%s":%s' % (name, _json(image)) for name, image in _images(change).items())
    return Described(operation=Operation(change.operation).name.lower(), key=key, change=msgspec.Raw(b"{%s}" % members))


def _images(change: Change) -> dict[bytes, Image]:
    found = {b"before": change.before, b"after": change.after}
    if isinstance(change.detail, Delta):
        found[b"delta"] = change.detail.description
    elif isinstance(change.detail, Ddl):
        found[b"ddl"] = change.detail.description
    return {name: image for name, image in found.items() if image is not None}


def _json(image: Image) -> bytes:
    text = dumps(bson.decode(image, _OPTIONS), json_options=CANONICAL_JSON_OPTIONS, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")
