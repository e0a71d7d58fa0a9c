"""What a run spends on choosing and fitting well, against its time."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Effort:
    """How much is looked at, and how it is fitted.

    Attributes:
        samples: of the data, at most.
        thinned: of the positions that sums are made of, one in so many is looked at.
        levels: kept shares at which a group's loss is measured; the last one only where a group gets that narrow.
        passes: the measurements at all other levels cost about as much as so many passes over the data.
        fewest: samples that they are made on, at least.
        most: at most.
        mirrored: samples up to which their mirror images are looked at as well.
        together: whether a limiter behind a layer is minded, and neighbouring layers are fitted together; else every
            layer is fitted once, from sums.
        again: whether widths are measured again in the network that was fitted to the first ones.
        twice: whether a limiter behind a layer is minded before a fit together that minds it as well.
        products: multiplications that one look at the samples of such a fit may take in the original's layers; wide
            layers are looked at in fewer positions for it, within reason.
        swaps: whether units that greedy elimination keeps are exchanged for others where that leaves less of an error.
    """

    samples: int
    thinned: int
    levels: tuple[float, ...]
    passes: float
    fewest: int
    most: int
    mirrored: int
    together: bool
    again: bool
    twice: bool
    products: float = math.inf
    swaps: bool = False

    @property
    def of_few(self) -> Effort:
        """The same where samples are few.

        Each is looked at in more of its positions, which costs little, and fits together begin from better ones, as
        there are fewer steps to take.
        """
        return replace(self, thinned=1, twice=True, products=math.inf) if self.together else self

    def damage_samples(self, samples: int, groups: int) -> int:
        """Of so many samples, how many damage is measured on: a measurement runs half of the network, on average."""
        wanted = int(2 * self.passes * samples) // max(groups * (len(self.levels) - 1), 1)
        return min(max(wanted, self.fewest), self.most, samples // 2)


# few widths say what damage is, with a group's own errors between them; samples are better spent than widths
THOROUGH = Effort(5000, 1, (0.7, 0.4, 0.1), 1.4, 64, 256, 1000, together=True, again=True, twice=True, swaps=True)
BALANCED = Effort(1750, 4, (0.4, 0.1), 0.75, 64, 256, 1000, together=True, again=False, twice=False, products=8e9)
QUICK = Effort(1000, 4, (0.4, 0.1), 0.25, 24, 64, 0, together=False, again=False, twice=False)
