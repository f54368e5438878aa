"""The Flower ClientApp: message in, message out, nothing else."""

from __future__ import annotations

from collections.abc import Callable

from flwr.app import Context, Message
from flwr.clientapp import ClientApp

from cotune.shared.adapter import Vector
from cotune.shared.plan import RoundPlan
from cotune.shared.update import Answer
from cotune.shared.wire import answer_to_records, plan_from_records

Answerer = Callable[[RoundPlan, Vector], Answer]


def client_app(answer: Answerer) -> ClientApp:
    """A ClientApp that hands every plan to `answer`, which must not raise, and carries its answer back."""
    app = ClientApp()

    @app.train()
    def train(message: Message, _context: Context) -> Message:  # pyright: ignore[reportUnusedFunction]
        plan, adapter = plan_from_records(message.content)
        return Message(answer_to_records(answer(plan, adapter)), reply_to=message)

    return app
