"""The partitions that a consumer has, and what comes next in each."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

__all__ = ["Partitions", "name_of"]

Place = tuple[str, int]  # topic and partition


def name_of(topic: str, partition: int) -> str:
    """How positions name it."""
    return f"{topic}[{partition}]"


class Partitions:
    """What was assigned to a consumer.

    Attributes:
        seen: partition -> first offset that was read in this process, also of those that it has no more.

    Thread safety: one thread.
    """

    def __init__(self) -> None:
        self.seen: dict[Place, int] = {}
        self._next: dict[Place, int | None] = {}
        self._by_name: dict[str, Place] = {}

    def __contains__(self, place: Place) -> bool:
        return place in self._next

    def __iter__(self) -> Iterator[Place]:
        return iter(self._next)

    def __len__(self) -> int:
        return len(self._next)

    def assign(self, places: Iterable[Place]) -> None:
        """These, and no others."""
        self._next = dict.fromkeys(places)
        self._by_name = {name_of(*place): place for place in self._next}

    def named(self, name: int | str) -> Place | None:
        """The partition of a name, if the consumer has it."""
        return self._by_name.get(str(name))

    def next_in(self, place: Place) -> int | None:
        """Offset after the last that was read, if any was."""
        return self._next.get(place)

    def go_on(self, place: Place, offset: int) -> None:
        """The next one has this offset, or a higher one."""
        self._next[place] = offset

    def read(self, place: Place, offset: int) -> None:
        """This one was read."""
        self.seen.setdefault(place, offset)
        self._next[place] = offset + 1

    def split_topics(self, partitions: Mapping[str, int]) -> list[str]:
        """Topics of which the consumer has some partitions and not all; ``partitions``: how many each topic has."""
        mine = {topic for topic, _ in self._next}
        return sorted(
            topic for topic in mine if any((topic, number) not in self._next for number in range(partitions.get(topic, 0)))
        )
