"""Fail points: `failCommand` and `failGetMoreAfterCursorCheckout`, with the modes and data that servers document."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from typing import Any

from .errors import CommandError

KNOWN = frozenset(("failCommand", "failGetMoreAfterCursorCheckout"))


@dataclass(slots=True)
class FailPoint:
    """One fail point that is on."""

    data: dict[str, Any]
    times: int | None = None
    skip: int = 0
    probability: float = 1.0
    entered: int = 0

    def enters(self) -> bool:
        """Whether it acts this time; counts."""
        if self.skip > 0:
            self.skip -= 1
            return False
        if self.times == 0 or (self.probability < 1 and random.random() >= self.probability):
            return False
        if self.times is not None:
            self.times -= 1
        self.entered += 1
        return True


@dataclass(slots=True)
class FailPoints:
    """Those that are on, by name, and how often each has acted."""

    active: dict[str, FailPoint] = field(default_factory=dict)
    counts: dict[str, int] = field(default_factory=dict)

    def configure(self, name: str, mode: Any, data: dict[str, Any]) -> int:
        """Switch one; returns how often it has acted so far. `CommandError` for what a server refuses."""
        if name not in KNOWN:
            raise CommandError(2, f"{name} not found")
        previous = self.active.pop(name, None)
        self.counts[name] = self.counts.get(name, 0) + (previous.entered if previous else 0)
        if mode != "off":
            self.active[name] = _parse(mode, data)
        return self.counts[name]

    def hit(self, command: str, app_name: str) -> dict[str, Any] | None:
        """The data of `failCommand`, if it concerns this command."""
        point = self.active.get("failCommand")
        if point is None or command not in point.data.get("failCommands", []):
            return None
        wanted = point.data.get("appName")
        if wanted is not None and wanted != app_name:
            return None
        return point.data if point.enters() else None

    def hit_get_more(self) -> dict[str, Any] | None:
        """The data of `failGetMoreAfterCursorCheckout`."""
        point = self.active.get("failGetMoreAfterCursorCheckout")
        return point.data if point is not None and point.enters() else None


def _parse(mode: Any, data: dict[str, Any]) -> FailPoint:
    if mode == "alwaysOn":
        return FailPoint(data)
    if isinstance(mode, dict) and len(mode) == 1:
        name, value = next(iter(mode.items()))
        if name == "times":
            return FailPoint(data, times=int(value))
        if name == "skip":
            return FailPoint(data, skip=int(value))
        if name == "activationProbability":
            return FailPoint(data, probability=float(value))
    raise CommandError(9, f"unknown mode of a fail point: {mode}")
