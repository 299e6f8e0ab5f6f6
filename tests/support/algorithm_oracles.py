"""Replacement algorithms in slow and obvious Python over lists and dicts: oracles for ``simulate.algorithms``.

Each takes a trace and a capacity and returns a bool for each request: was it a hit. Lists run from the oldest to the newest.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

__all__ = ["NAIVE"]

Trace = Sequence[int]


def lru(trace: Trace, capacity: int) -> list[bool]:
    order: list[int] = []
    hits = []
    for key in trace:
        hits.append(key in order)
        if key in order:
            order.remove(key)
        elif len(order) == capacity:
            order.pop(0)
        order.append(key)
    return hits


def fifo(trace: Trace, capacity: int) -> list[bool]:
    order: list[int] = []
    hits = []
    for key in trace:
        hits.append(key in order)
        if key not in order:
            if len(order) == capacity:
                order.pop(0)
            order.append(key)
    return hits


def lfu(trace: Trace, capacity: int) -> list[bool]:
    counts: dict[int, int] = {}
    latest: dict[int, int] = {}
    hits = []
    for now, key in enumerate(trace):
        hits.append(key in counts)
        if key not in counts and len(counts) == capacity:
            del counts[min(counts, key=lambda one: (counts[one], latest[one]))]
        counts[key] = counts.get(key, 0) + 1
        latest[key] = now
    return hits


def clock(trace: Trace, capacity: int) -> list[bool]:
    """As a queue: a referenced row at its head moves to the end, no longer referenced."""
    queue: list[int] = []
    referenced: set[int] = set()
    hits = []
    for key in trace:
        hits.append(key in queue)
        if key in queue:
            referenced.add(key)
            continue
        if len(queue) == capacity:
            while queue[0] in referenced:
                referenced.remove(queue[0])
                queue.append(queue.pop(0))
            queue.pop(0)
        queue.append(key)
    return hits


def sieve(trace: Trace, capacity: int) -> list[bool]:
    queue: list[int] = []
    visited: set[int] = set()
    hand: int | None = None  # a key, None: the oldest
    hits = []
    for key in trace:
        hits.append(key in queue)
        if key in queue:
            visited.add(key)
            continue
        if len(queue) == capacity:
            at = 0 if hand is None else queue.index(hand)
            while queue[at] in visited:
                visited.remove(queue[at])
                at = (at + 1) % len(queue)
            hand = queue[at + 1] if at + 1 < len(queue) else None
            queue.pop(at)
        queue.append(key)
    return hits


def two_q(trace: Trace, capacity: int) -> list[bool]:
    a1in: list[int] = []
    am: list[int] = []
    a1out: list[int] = []
    hits = []
    for key in trace:
        hits.append(key in a1in or key in am)
        if key in a1in:
            continue
        if key in am:
            am.remove(key)
            am.append(key)
            continue
        was_ghost = key in a1out
        if was_ghost:
            a1out.remove(key)
        if len(a1in) + len(am) == capacity:
            if len(a1in) > max(1, capacity // 4) or not am:
                a1out.append(a1in.pop(0))
                if len(a1out) > max(1, capacity // 2):
                    a1out.pop(0)
            else:
                am.pop(0)
        (am if was_ghost else a1in).append(key)
    return hits


def s3fifo(trace: Trace, capacity: int) -> list[bool]:
    small: list[int] = []
    main: list[int] = []
    ghosts: list[int] = []
    frequency: dict[int, int] = {}
    max_small = max(1, capacity // 10)
    evicted = False
    hits = []
    for key in trace:
        hits.append(key in small or key in main)
        if hits[-1]:
            frequency[key] = min(3, frequency[key] + 1)
            continue
        was_ghost = key in ghosts
        if was_ghost:
            ghosts.remove(key)
        while len(small) + len(main) == capacity:
            if len(main) > capacity - max_small or not small:
                victim = main.pop(0)
                if frequency[victim]:
                    frequency[victim] -= 1
                    main.append(victim)
                else:
                    evicted = True
            else:
                victim = small.pop(0)
                if frequency[victim] >= 2:
                    frequency[victim] = 0
                    main.append(victim)
                else:
                    ghosts.append(victim)
                    if len(ghosts) > max(1, capacity * 9 // 10):
                        ghosts.pop(0)
                    evicted = True
        frequency[key] = 0
        filling = not evicted and len(small) >= max_small
        (main if was_ghost or filling else small).append(key)
    return hits


def arc(trace: Trace, capacity: int) -> list[bool]:
    """With the names and cases of the paper."""
    t1: list[int] = []
    t2: list[int] = []
    b1: list[int] = []
    b2: list[int] = []
    p = 0.0
    hits = []

    def replace(in_b2: bool) -> None:
        if (t1 and (len(t1) > p or (in_b2 and len(t1) == p))) or not t2:
            b1.append(t1.pop(0))
        else:
            b2.append(t2.pop(0))

    for x in trace:
        hits.append(x in t1 or x in t2)
        full = len(t1) + len(t2) == capacity
        if x in t1 or x in t2:  # case I
            (t1 if x in t1 else t2).remove(x)
            t2.append(x)
        elif x in b1:  # case II
            p = min(p + max(len(b2) / len(b1), 1), capacity)
            b1.remove(x)
            if full:
                replace(False)
            t2.append(x)
        elif x in b2:  # case III
            p = max(p - max(len(b1) / len(b2), 1), 0)
            b2.remove(x)
            if full:
                replace(True)
            t2.append(x)
        else:  # case IV
            if full and len(t1) + len(b1) == capacity:
                if len(t1) < capacity:
                    b1.pop(0)
                    replace(False)
                else:
                    t1.pop(0)
            elif full:
                if len(t1) + len(t2) + len(b1) + len(b2) == 2 * capacity:
                    b2.pop(0)
                replace(False)
            t1.append(x)
    return hits


def belady(trace: Trace, capacity: int) -> list[bool]:
    """Evicts the row with the furthest next request; does not admit a key whose own is at least as far."""
    resident: set[int] = set()
    hits = []

    def next_use(key: int, after: int) -> float:
        return next((at for at in range(after + 1, len(trace)) if trace[at] == key), float("inf"))

    for now, key in enumerate(trace):
        hits.append(key in resident)
        if key in resident:
            continue
        if len(resident) == capacity:
            furthest = max(resident, key=lambda one: next_use(one, now))
            if next_use(furthest, now) <= next_use(key, now):
                continue
            resident.remove(furthest)
        resident.add(key)
    return hits


def infinite(trace: Trace, capacity: int) -> list[bool]:
    return [key in trace[:at] for at, key in enumerate(trace)]


NAIVE: dict[str, Callable[[Trace, int], list[bool]]] = {
    function.__name__: function for function in (lru, fifo, lfu, clock, sieve, two_q, s3fifo, arc, belady, infinite)
}
