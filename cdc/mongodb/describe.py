"""A change in Extended JSON, for people. Looked up by `cdc.kinds`."""

from __future__ import annotations

from typing import Any, Final

import bson
import msgspec
from bson.codec_options import CodecOptions, DatetimeConversion
from bson.json_util import CANONICAL_JSON_OPTIONS, RELAXED_JSON_OPTIONS, JSONOptions, dumps

from cdc.change import Batch, Change, Ddl, Delta, Image, Operation
from cdc.letter import Described
from cdc.mongodb.equality import id_only

_OPTIONS: Final[CodecOptions[dict[str, Any]]] = CodecOptions(
    unicode_decode_error_handler="backslashreplace", datetime_conversion=DatetimeConversion.DATETIME_MS
)


def describe(batch: Batch) -> Described:
    """The only change of a batch. Values keep their types, but for the key, which is for people."""
    change = batch.transactions[0].changes[0]
    key = None if change.key is None else msgspec.json.decode(_json(id_only(change.key), RELAXED_JSON_OPTIONS))
    members = b",".join(b'"%s":%s' % (name, _json(image)) for name, image in _images(change).items())
    return Described(operation=Operation(change.operation).name.lower(), key=key, change=msgspec.Raw(b"{%s}" % members))


def _images(change: Change) -> dict[bytes, Image]:
    found = {b"before": change.before, b"after": change.after}
    if isinstance(change.detail, Delta):
        found[b"delta"] = change.detail.description
    elif isinstance(change.detail, Ddl):
        found[b"ddl"] = change.detail.description
    return {name: image for name, image in found.items() if image is not None}


def _json(image: Image, options: JSONOptions = CANONICAL_JSON_OPTIONS) -> bytes:
    text = dumps(bson.decode(image, _OPTIONS), json_options=options, ensure_ascii=False)
    return text.encode("utf-8", "backslashreplace")
