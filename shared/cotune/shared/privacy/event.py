"""What was released: the only thing a ledger holds. Epsilon is computed from events, never stored in their place."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from cotune.shared.errors import PrivacyError


@dataclass(frozen=True, kw_only=True)
class DpSgdEvent:
    """`steps` releases of a Poisson-sampled Gaussian sum (Abadi et al. 2016, section 3.1).

    Neighbours: one unit (a record, or a person with all their records) added or removed. Each step includes
    every unit independently with `sampling_probability`, sums their clipped gradients (sensitivity = the
    clipping norm) and adds Gaussian noise of standard deviation `noise_multiplier` times the clipping norm.
    With probability 1 it is a plain Gaussian release.
    """

    sampling_probability: float
    noise_multiplier: float
    steps: int

    def __post_init__(self) -> None:
        _check(self.sampling_probability, self.noise_multiplier, self.steps)

    def to_dict(self) -> dict[str, Any]:
        """The event as JSON."""
        return {"kind": "dp-sgd", **asdict(self)}


@dataclass(frozen=True, kw_only=True)
class TruncatedDpSgdEvent:
    """As `DpSgdEvent`, but of a Poisson sample of which at most `max_batch_size` units are kept, at random.

    Neighbours: one of `population` units replaced by nothing at all ("zero-out"): the number of units is
    public. A cap makes each unit's chance depend on how many others were drawn, so it is priced with the
    population (Chua et al. 2025, arXiv 2508.15089).
    """

    sampling_probability: float
    noise_multiplier: float
    steps: int
    max_batch_size: int
    population: int

    def __post_init__(self) -> None:
        _check(self.sampling_probability, self.noise_multiplier, self.steps)
        if not 1 <= self.max_batch_size <= self.population:
            raise PrivacyError(
                "E-EVENT",
                f"expected 1 <= max_batch_size <= population, got {self.max_batch_size} of {self.population}",
            )

    def to_dict(self) -> dict[str, Any]:
        """The event as JSON."""
        return {"kind": "dp-sgd-truncated", **asdict(self)}


@dataclass(frozen=True)
class NonPrivateEvent:
    """A release without any guarantee; makes every epsilon infinite."""

    def to_dict(self) -> dict[str, Any]:
        """The event as JSON."""
        return {"kind": "non-private"}


PrivateEvent = DpSgdEvent | TruncatedDpSgdEvent
Event = PrivateEvent | NonPrivateEvent
_FIELDS = {"sampling_probability", "noise_multiplier", "steps"}


def event_from_dict(data: dict[str, Any]) -> Event:
    """Read an event back.

    Raises:
        PrivacyError: The kind is unknown or fields do not match: such a ledger cannot be priced.
    """
    fields = {key: value for key, value in data.items() if key != "kind"}
    match data.get("kind"):
        case "dp-sgd" if fields.keys() == _FIELDS:
            return DpSgdEvent(**fields)
        case "dp-sgd-truncated" if fields.keys() == {*_FIELDS, "max_batch_size", "population"}:
            return TruncatedDpSgdEvent(**fields)
        case "non-private" if not fields:
            return NonPrivateEvent()
        case kind:
            raise PrivacyError("E-EVENT", f"cannot price an event of kind {kind!r} with fields {sorted(fields)}")


def _check(sampling_probability: float, noise_multiplier: float, steps: int) -> None:
    if not 0 < sampling_probability <= 1:
        raise PrivacyError("E-EVENT", f"expected 0 < sampling_probability <= 1, got {sampling_probability}")
    if not 0 < noise_multiplier < float("inf"):
        raise PrivacyError("E-EVENT", f"expected a finite noise_multiplier > 0, got {noise_multiplier}")
    if steps < 0:
        raise PrivacyError("E-EVENT", f"expected steps >= 0, got {steps}")
