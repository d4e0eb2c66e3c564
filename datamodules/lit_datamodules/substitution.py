"""What stands for a picture that turns out to be damaged when a step shows it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

from lit_datamodules.collating import Drawn
from lit_datamodules.concept_folder import Sample
from lit_datamodules.errors import DataError
from lit_datamodules.manifest import Record, check_skipped, skip
from lit_datamodules.order import Slot


class Substitution:
    """The next picture of the same set, in the set's order, for one that cannot be read.

    Which one that is depends on the slot alone, so a resumed run shows the same.

    Args:
        samples: All of the training.
        draw: Makes the view of a slot.
        records: Of the manifest; a damaged picture's own record is replaced, so that each is told once.
        strict: A damaged picture is an error.
        max_skipped: Otherwise, how many inputs may be skipped.
    """

    def __init__(
        self,
        samples: Sequence[Sample],
        draw: Callable[[Slot], Drawn],
        records: list[Record],
        strict: bool,
        max_skipped: int,
    ):
        self.samples = samples
        self.draw = draw
        self.records = records
        self.strict = strict
        self.max_skipped = max_skipped
        self._damaged: set[int] = set()

    def __call__(self, drawn: Drawn) -> Drawn:
        """Give another view for a damaged one.

        Raises:
            DataError: Damage is not allowed, or there is too much of it, or nothing of the set can be read.
        """
        first, found = drawn.slot.sample, drawn
        of = self.samples[first]
        same = [i for i, s in enumerate(self.samples) if (s.role, s.concept) == (of.role, of.concept)]
        start = same.index(first)
        for number in [*same[start:], *same[:start]]:
            if number in self._damaged:
                continue
            if number != first:
                found = self.draw(replace(drawn.slot, sample=number))
            if not found.damage:
                return found
            self._note(number, found.damage)
        raise DataError(f"no picture of the set of {of.name} can be read; see the manifest, and fetch the shards again")

    def _note(self, number: int, damage: str) -> None:
        self._damaged.add(number)
        skip(self.records, self.samples[number].name, damage)
        check_skipped(self.records, self.strict, self.max_skipped)
