"""What a loss over rows of logits consists of."""

from __future__ import annotations

from typing import Literal, NamedTuple

#: label of a position that has no target
IGNORE = -100

Divergence = Literal["forward", "reverse", "jensen-shannon"]


class Terms(NamedTuple):
    """``cross_entropy`` and ``divergence`` are the weights of the two terms in the slope; one of weight 0 is left out.

    ``kind`` is ``forward``, KL(teacher || student), ``reverse``, KL(student || teacher), or ``jensen-shannon``, the
    mean of both against their average; it is taken at ``temperature``, and its weight in the slope is multiplied by
    the square of that (Hinton et al. 2015). With a ``softcap`` c, logits l stand for ``c tanh(l / c)``.
    """

    cross_entropy: float = 1.0
    divergence: float = 0.0
    kind: Divergence = "forward"
    temperature: float = 1.0
    softcap: float | None = None
    teacher_softcap: float | None = None
