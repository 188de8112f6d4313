"""Arithmetic of `$inc` and `$mul`, with the server's promotion of types: int32, int64, double, decimal."""

from __future__ import annotations

import decimal
import operator
import struct
from collections.abc import Callable
from typing import Any

from bson.decimal128 import Decimal128, create_decimal128_context

from . import raw
from .errors import CommandError
from .raw import DECIMAL, DOUBLE, INT32, INT64, Value


def add(one: Value, other: Value) -> Value:
    """The sum; `CommandError` 14 for what is no number."""
    return _compute(operator.add, "$inc", one, other)


def multiply(one: Value, other: Value) -> Value:
    """The product."""
    return _compute(operator.mul, "$mul", one, other)


def _compute(function: Callable[[Any, Any], Any], name: str, one: Value, other: Value) -> Value:
    kinds = {one[0], other[0]}
    if not kinds <= {INT32, INT64, DOUBLE, DECIMAL}:
        raise CommandError(14, f"Cannot apply {name} to a value of non-numeric type")
    if DECIMAL in kinds:
        with decimal.localcontext(create_decimal128_context()) as context:
            result = function(context.create_decimal(str(_number(one))), context.create_decimal(str(_number(other))))
        return DECIMAL, Decimal128(result).bid
    result = function(_number(one), _number(other))
    if DOUBLE in kinds:
        return DOUBLE, struct.pack("<d", result)
    if INT64 not in kinds and -(2**31) <= result < 2**31:
        return INT32, raw.pack_int32(result)
    if not -(2**63) <= result < 2**63:
        raise CommandError(2, f"Failed to apply {name} operations to current value: overflow")
    return INT64, raw.pack_int64(result)


def _number(value: Value) -> Any:
    if value[0] == DECIMAL:
        return Decimal128.from_bid(value[1]).to_decimal()
    if value[0] == DOUBLE:
        return struct.unpack("<d", value[1])[0]
    return int.from_bytes(value[1], "little", signed=True)
