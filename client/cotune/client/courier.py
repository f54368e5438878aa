"""The Flower ClientApp: message in, message out, nothing else."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from cotune.shared.codec import Payload
from cotune.shared.errors import ConnectionFailed, CotuneError
from cotune.shared.plan import LedgerRequest, RoundPlan
from cotune.shared.update import Answer, SiteFailure
from cotune.shared.wire import answer_to_records, ledger_to_records, plan_from_records, query_from_records

Answerer = Callable[[RoundPlan, Payload], Answer]
LedgerReader = Callable[[LedgerRequest], bytes]


def client_app(answer: Answerer, read_ledger: LedgerReader) -> ClientApp:
    """A ClientApp that hands every plan to `answer`, which must not raise, and carries its answer back.

    A request for the site's ledger goes to `read_ledger`.
    """
    app = ClientApp()

    @app.train()
    def train(message: Message, _context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        try:
            plan, adapter = plan_from_records(message.content)
        except CotuneError as error:  # the coordinator knows whom it asked
            failure = SiteFailure(site="", code=error.code, message=error.message, exit_code=error.exit_code)
            return Message(answer_to_records(failure), reply_to=message)
        return Message(answer_to_records(answer(plan, adapter)), reply_to=message)

    @app.query()
    def query(message: Message, _context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        asked = query_from_records(message.content)
        if not isinstance(asked, LedgerRequest):
            raise ConnectionFailed("E-WIRE", "a simulated site is asked for its ledger alone")
        return Message(ledger_to_records(read_ledger(asked)), reply_to=message)

    return app
