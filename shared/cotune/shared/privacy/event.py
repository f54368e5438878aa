"""What was released: the only thing a ledger holds. Epsilon is computed from events, never stored in their place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cotune.shared.errors import PrivacyError


@dataclass(frozen=True, kw_only=True)
class DpSgdEvent:
    """`steps` releases of a Poisson-sampled Gaussian sum (Abadi et al. 2016, section 3.1).

    Neighbours: one record added or removed (its row in the data set). Each step includes every record
    independently with `sampling_probability`, sums their clipped gradients (sensitivity = the clipping norm)
    and adds Gaussian noise of standard deviation `noise_multiplier` times the clipping norm.
    """

    sampling_probability: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        if not 0 < self.sampling_probability <= 1:
            raise PrivacyError("E-EVENT", f"expected 0 < sampling_probability <= 1, got {self.sampling_probability}")
        if not 0 < self.noise_multiplier < float("inf"):
            raise PrivacyError("E-EVENT", f"expected a finite noise_multiplier > 0, got {self.noise_multiplier}")
        if self.steps < 0:
            raise PrivacyError("E-EVENT", f"expected steps >= 0, got {self.steps}")

    def to_dict(self) -> dict[str, Any]:
        """The event as JSON."""
        return {"kind": "dp-sgd", **asdict(self)}


@dataclass(frozen=True)
class NonPrivateEvent:
    """A release without any guarantee; makes every epsilon infinite."""

    def to_dict(self) -> dict[str, Any]:
        """The event as JSON."""
        return {"kind": "non-private"}


Event = DpSgdEvent | NonPrivateEvent


def event_from_dict(data: dict[str, Any]) -> Event:
    """Read an event back.

    Raises:
        PrivacyError: The kind is unknown or fields do not match: such a ledger cannot be priced.
    """
    fields = {key: value for key, value in data.items() if key != "kind"}
    match data.get("kind"):
        case "dp-sgd" if fields.keys() == {"sampling_probability", "noise_multiplier", "steps"}:
            return DpSgdEvent(**fields)
        case "non-private" if not fields:
            return NonPrivateEvent()
        case kind:
            raise PrivacyError("E-EVENT", f"cannot price an event of kind {kind!r} with fields {sorted(fields)}")
