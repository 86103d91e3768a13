"""Orders of classes that published experiments used, by name.

Whether two runs can be compared often hangs on the order in which the classes arrive: the average over the stages
depends on it, the accuracy after the last stage much less. Give a name from here as ``class_order`` of a scenario.
"""

from __future__ import annotations

import numpy as np

from clkit.errors import ArgumentError, did_you_mean

__all__ = ["PUBLISHED_ORDERS", "published_order"]

# Rebuffi et al., "iCaRL: Incremental Classifier and Representation Learning" (CVPR 2017, arXiv 1611.07725); the
# nearest-mean baseline of Janson et al. (arXiv 2210.04428) takes its ten stages from the same order.
_CIFAR100_ICARL = """
    87 0 52 58 44 91 68 97 51 15 94 92 10 72 49 78 61 14 8 86 84 96 18 24 32 45 88 11 4 67 69 66 77 47 79 93 29 50 57
    83 17 81 41 12 37 59 25 20 80 73 1 28 6 46 62 82 53 9 31 75 38 63 33 74 27 22 36 3 16 21 60 19 70 90 89 43 5 42 65
    76 40 30 23 85 2 95 56 48 71 64 98 13 99 7 34 55 54 26 35 39
"""


#: Name to order. ``cifar100_icarl``: CIFAR-100 as iCaRL's code orders it. ``cifar100_numpy1993``: the order that code
#: bases get which call ``numpy.random.seed(1993)`` before they shuffle 100 classes (it starts 68, 56, 78, 8).
PUBLISHED_ORDERS: dict[str, tuple[int, ...]] = {
    "cifar100_icarl": tuple(int(i) for i in _CIFAR100_ICARL.split()),
    # NumPy has frozen the stream of RandomState, so the order is the same on every machine and in every version
    "cifar100_numpy1993": tuple(int(i) for i in np.random.RandomState(1993).permutation(100)),
}


def published_order(name: str) -> tuple[int, ...]:
    """Return the class ids of the order with this name in :data:`PUBLISHED_ORDERS`, first to arrive first.

    Raises:
        ArgumentError: ``name`` is not known; the message lists the known names.

    Example:
        >>> published_order("cifar100_icarl")[:4]
        (87, 0, 52, 58)
    """
    if name not in PUBLISHED_ORDERS:
        hint = did_you_mean(name, PUBLISHED_ORDERS)
        raise ArgumentError(
            f"class_order {name!r} is not the name of a published order; known: {', '.join(PUBLISHED_ORDERS)}{hint}"
        )
    return PUBLISHED_ORDERS[name]
