"""Routes for parked changes: they hold rows, and what is done to them cannot be undone, so all are for admins."""

from __future__ import annotations

from typing import Annotated

import msgspec
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import Response
from starlette.routing import BaseRoute, Route

from cdc.api.operation import operation
from cdc.api.principal import PRINCIPAL
from cdc.api.requests import read_body, read_query
from cdc.api.responses import answer
from cdc.errors import DecodeError
from cdc.letter import DeadLetters, Letter, LetterId, LetterIdText, LetterPage, LetterQuery, Outcomes, UnknownLetter

_By = Annotated[str, msgspec.Meta(max_length=200, description="at most 200 characters")]
_Reason = Annotated[str, msgspec.Meta(min_length=1, max_length=1000, description="1 to 1000 characters: why")]


class RetryRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which parked changes to try now; null: all that do not wait behind another one.

    sink: only those of this sink. by: who wants it, beside whose token it is.
    """

    ids: tuple[LetterIdText, ...] | None
    sink: str = ""
    by: _By = ""


class DiscardRequest(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Which parked changes to give up, and why. by: who wants it, beside whose token it is."""

    ids: tuple[LetterIdText, ...]
    reason: _Reason
    by: _By = ""


class Letters:
    """Each route calls one method, in a thread: it may wait for a pipeline."""

    def __init__(self, dead_letters: DeadLetters) -> None:
        self._dead_letters = dead_letters

    def routes(self) -> list[BaseRoute]:
        """The routes of this group."""
        return [
            Route("/api/dead-letters", self.list),
            Route("/api/dead-letters/retry", self.retry, methods=["POST"]),
            Route("/api/dead-letters/discard", self.discard, methods=["POST"]),
            Route("/api/dead-letters/{id}", self.get),
        ]

    @operation("admin", {200: LetterPage}, query=LetterQuery, errors=(404,))
    async def list(self, request: Request) -> Response:
        """Parked changes, one page of them."""
        return answer(await run_in_threadpool(self._dead_letters.list, read_query(request, LetterQuery)))

    @operation("admin", {200: Letter}, errors=(404,))
    async def get(self, request: Request) -> Response:
        """One parked change, with its contents."""
        try:
            wanted = LetterId.parse(request.path_params["id"])
        except DecodeError as exc:
            raise UnknownLetter(str(exc), hint=exc.hint) from exc
        return answer(await run_in_threadpool(self._dead_letters.get, wanted))

    @operation("admin", {200: Outcomes}, body=RetryRequest, errors=(404, 409))
    async def retry(self, request: Request) -> Response:
        """Try parked changes now, as if they had never been tried; those behind them follow."""
        wanted = await read_body(request, RetryRequest)
        ids = None if wanted.ids is None else [LetterId.parse(each) for each in wanted.ids]
        who = _who(request, wanted.by)
        outcomes = await run_in_threadpool(self._dead_letters.retry, ids, who, sink=wanted.sink)
        return answer(Outcomes(tuple(outcomes)))

    @operation("admin", {200: Outcomes}, body=DiscardRequest, errors=(409,))
    async def discard(self, request: Request) -> Response:
        """Give parked changes up for good; those behind them are applied. The log tells who wanted it, and why."""
        wanted = await read_body(request, DiscardRequest)
        ids = [LetterId.parse(each) for each in wanted.ids]

        def discard() -> Outcomes:
            who = _who(request, wanted.by)
            return Outcomes(tuple(self._dead_letters.discard(ids, reason=wanted.reason, who=who)))

        return answer(await run_in_threadpool(discard))


def _who(request: Request, by: str) -> str:
    """The token's name; somebody who acts for others may add theirs."""
    name: str = request.scope[PRINCIPAL].name
    return f"{by} ({name})" if by else name
