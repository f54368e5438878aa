"""Message in, message out, nothing else: what every courier does, and the Flower ClientApp that does it."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp

from cotune.shared.codec import Payload
from cotune.shared.errors import ConnectionFailed, CotuneError
from cotune.shared.plan import ClaimRequest, LedgerRequest, RoundPlan
from cotune.shared.update import Answer, SiteFailure
from cotune.shared.wire import (
    answer_to_records,
    ledger_to_records,
    plan_from_records,
    query_from_records,
    signature_to_records,
)

Answerer = Callable[[RoundPlan, Payload], Answer]
LedgerReader = Callable[[LedgerRequest], bytes]
Signer = Callable[[ClaimRequest], str]


def client_app(answer: Answerer, read_ledger: LedgerReader, sign_claim: Signer) -> ClientApp:
    """A ClientApp that hands every plan to `answer` and carries its answer back; raising means that there is none.

    A request for the site's ledger goes to `read_ledger`, one for its signature of a claim to `sign_claim`.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, _context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        return Message(trained(message.content, answer), reply_to=message)

    @app.query()
    def query(message: Message, _context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        asked = query_from_records(message.content)
        if isinstance(asked, ClaimRequest):
            return Message(signed(asked, sign_claim), reply_to=message)
        if not isinstance(asked, LedgerRequest):
            raise ConnectionFailed("E-WIRE", "a simulated site is not asked whether it takes part")
        return Message(ledger_to_records(read_ledger(asked)), reply_to=message)

    return app


def signed(request: ClaimRequest, sign_claim: Signer) -> RecordDict:
    """The site's signature, or why it does not sign."""
    try:
        return signature_to_records(sign_claim(request))
    except CotuneError as error:
        return refused(error)


def trained(records: RecordDict, answer: Answerer) -> RecordDict:
    """The answer to a plan, which is a failure with a name if the records are none."""
    try:
        plan, adapter = plan_from_records(records)
    except CotuneError as error:
        return refused(error)
    return answer_to_records(answer(plan, adapter))


def refused(error: CotuneError) -> RecordDict:
    """An error that was met before anybody was asked, as an answer; the coordinator knows whom it asked."""
    failure = SiteFailure(site="", code=error.code, message=error.message, exit_code=error.exit_code)
    return answer_to_records(failure)
