"""Zero-shot questions as data: what is asked, what may follow, which is right."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Item:
    """One question: pairs of (context, continuation), one a choice, of which ``gold`` should be the likeliest.

    A cloze item has a single pair, and is right when greedy decoding writes its continuation. ``lengths`` are the
    characters of each choice, by which accuracy_norm divides.
    """

    pairs: tuple[tuple[str, str], ...]
    gold: int
    lengths: tuple[int, ...]


def choices_item(context: str, choices: list[str], gold: int) -> Item:
    """An item whose choices follow one context, each after a space."""
    return Item(
        pairs=tuple((context, f" {choice}") for choice in choices),
        gold=gold,
        lengths=tuple(len(choice) for choice in choices),
    )
