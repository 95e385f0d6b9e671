"""The plan that edits make true."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from shearling.anatomy import Anatomy
from shearling.plan.edits import Delta, Edit, Masks, Structure
from shearling.plan.plan import Masked, Plan
from shearling.plan.shape import kept_layers, shape_after
from shearling.plan.sizes import Inventory, TensorSize, inventory_after, sizes
from shearling.recipe import UNSTRUCTURED


@dataclass(frozen=True)
class Outcome:
    """A plan and the edits that make it true."""

    plan: Plan
    edits: tuple[Edit, ...]


def plan_of(
    name: str,
    method: str,
    before: Anatomy,
    inventory: Inventory,
    edits: Sequence[Edit],
    importance: Sequence[float] = (),
) -> Plan:
    """The plan of a model's edits; ``before`` and ``inventory`` are the model's."""
    after, layers, added, masked = before, tuple(range(before.num_layers)), {}, None
    for edit in edits:
        if isinstance(edit, Structure):
            after, layers = shape_after(before, edit), kept_layers(before, edit)
        elif isinstance(edit, Delta):
            # biases that the model had not (FLAP)
            new = {n: value for n, value in edit.values.items() if n not in inventory and n.endswith(".bias")}
            added |= {n: TensorSize(tuple(value.shape), value.element_size()) for n, value in new.items()}
            inner = {n.removeprefix(before.path(before.layer_of(n) or 0) + ".").removesuffix(".bias") for n in new}
            after = replace(after, biases=tuple(sorted({*after.biases, *inner})))
        elif isinstance(edit, Masks):
            kept = sum(int(mask.sum()) for mask in edit.kept.values())
            covered = sum(mask.numel() for mask in edit.kept.values())
            masked = Masked(edit.pattern or UNSTRUCTURED, kept, covered)
    return Plan(
        model=name,
        method=method,
        before=sizes(inventory, before),
        after=sizes(inventory_after(inventory, before, after, layers) | added, after),
        anatomy_before=before,
        anatomy_after=after,
        layers=layers,
        importance=tuple(importance),
        masked=masked,
    )
