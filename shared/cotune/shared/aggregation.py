"""The rules by which low-rank updates are joined, as far as sites must know them: what is trained, and when.

    y = W x + s B A x        s = alpha / r, the same for all sites; A [r, in], B [out, r]

The average of the products is not the product of the averages. What each rule does about it is in the server's
module of the same name; this table is what both sides agree on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from cotune.shared.adapter import Layout

RuleName = Literal[
    "ffa",
    "product_svd",
    "alternating_rounds",
    "alternating_steps",
    "fedavg_ab",
    "fedex",
    "flora_stack",
    "fed_sb",
    "fedsa",
]
Factor = Literal["A", "B", "core"]
A, B, CORE, OFFSET_A, OFFSET_B = ".lora_A.", ".lora_B.", ".lora_core.", ".offset_A.", ".offset_B."
CONTROL = "|control"  # ends the name of a control variate of SCAFFOLD
_OF_FACTOR: dict[str, Factor] = {A: "A", B: "B", CORE: "core"}


@dataclass(frozen=True)
class Rule:
    """What a rule asks of sites and coordinator.

    Attributes:
        trains: The factors it trains.
        alternates: When it goes on to the other factor; None if all are trained at once.
        linear: The joined adapter is the old one plus a mean of updates: server optimisers and robust rules apply.
        needs_individual_updates: The coordinator must see each update, not only their sum.
        mixed_ranks: Sites may train at ranks of their own.
        exact: The joined adapter's product is the mean of the sites' products (at the best rank r, if `truncates`).
        suits_dp: It does not gather noise: False for rules that keep every update's noise for ever.
        offset: It keeps a growing frozen addition to the base weights, which sites are sent.
        personal: B stays at its site until the last round; then each site has an adapter of its own.
        reference: Who published it.
    """

    trains: tuple[Factor, ...]
    linear: bool
    needs_individual_updates: bool
    mixed_ranks: bool
    exact: bool
    suits_dp: bool
    reference: str
    alternates: Literal["round", "step"] | None = None
    offset: bool = False
    personal: bool = False

    @property
    def core(self) -> bool:
        """Whether an r x r core between frozen factors is what is trained."""
        return self.trains == ("core",)


RULES: dict[RuleName, Rule] = {
    "ffa": Rule(("B",), True, False, True, True, True, "Sun et al. 2024, arXiv 2403.12313"),
    "product_svd": Rule(("A", "B"), False, True, True, True, True, "Bai et al. 2024, arXiv 2402.11505"),
    "alternating_rounds": Rule(
        ("A", "B"), True, False, True, True, True, "Chen et al. 2025, arXiv 2502.01755", alternates="round"
    ),
    "alternating_steps": Rule(("A", "B"), True, False, True, False, True, "arXiv 2602.19926", alternates="step"),
    "fedavg_ab": Rule(("A", "B"), True, False, True, False, True, "Zhang et al. 2023, arXiv 2305.05644"),
    "fedex": Rule(("A", "B"), False, True, False, True, False, "Singhal et al. 2024, arXiv 2410.09432", offset=True),
    "flora_stack": Rule(("A", "B"), False, True, True, True, False, "Wang et al. 2024, arXiv 2409.05976", offset=True),
    "fed_sb": Rule(("core",), True, False, False, True, True, "Singhal et al. 2025, arXiv 2502.15436"),
    "fedsa": Rule(("A", "B"), False, True, False, False, True, "Guo et al. 2024, arXiv 2410.01463", personal=True),
}


def factor_of(name: str) -> Factor | None:
    """Which factor a tensor is, by its PEFT name; None for anything else, such as a classifier's head."""
    return next((factor for mark, factor in _OF_FACTOR.items() if mark in name), None)


def trained_at(rule: Rule, names: Sequence[str], round_number: int, step: int) -> tuple[str, ...]:
    """Names of the tensors that are trained at a step, in order; what is no factor is always trained.

    Args:
        rule: The job's rule.
        names: All that are ever trained.
        round_number: From 1.
        step: Of the whole run, from 0.
    """
    if rule.alternates is None:
        return tuple(names)
    turn = round_number - 1 if rule.alternates == "round" else step
    # B goes first: it starts at zero, and while it is zero A has no gradient.
    resting: Factor = "A" if turn % 2 == 0 else "B"
    return tuple(name for name in names if factor_of(name) != resting)


def returned(rule: Rule, layout: Layout, round_number: int, rounds: int) -> Layout:
    """What an update of a round holds: the trained tensors that may have changed; a personal B in the last alone."""
    if rule.personal and round_number < rounds:
        return shared(rule, layout)
    if rule.alternates != "round":
        return layout
    return layout.only(trained_at(rule, layout.trained, round_number, 0))


def shared(rule: Rule, layout: Layout) -> Layout:
    """What sites have in common of an adapter: all that is trained, but for a personal B."""
    return layout.only([name for name in layout.trained if factor_of(name) != "B"]) if rule.personal else layout


def sent(rule: Rule, layout: Layout, offset_rank: int, controls: bool) -> Layout:
    """What the coordinator sends: what sites share, the offset's factors and the control variates, if any."""
    layout = shared(rule, layout)
    shapes = dict(layout.shapes)
    extra: list[str] = []
    if offset_rank:
        for name, (_, inner) in ((n, s) for n, s in layout.shapes.items() if A in n):
            outer = layout.shapes[name.replace(A, B)][0]
            shapes[name.replace(A, OFFSET_A)] = (offset_rank, inner)
            shapes[name.replace(A, OFFSET_B)] = (outer, offset_rank)
            extra += [name.replace(A, OFFSET_A), name.replace(A, OFFSET_B)]
    if controls:
        shapes |= {name + CONTROL: layout.shapes[name] for name in layout.trained}
        extra += [name + CONTROL for name in layout.trained]
    return Layout(shapes, (*layout.trained, *extra))


def what_is_trained(rule: Rule) -> str:
    """The factors a rule trains, in words."""
    if rule.trains == ("B",):
        return "B (A public and frozen)"
    if rule.trains == ("core",):
        return "the core between public, frozen A and B"
    if rule.personal:
        return "A and B (A shared, B each site's own)"
    return "A and B" + (f", in turn each {rule.alternates}" if rule.alternates else "")
