"""What a cache policy is: integer functions that decide which row of a full set is evicted, and which row is admitted.

Each way of a set has a score. ``first(now, count)`` is the score of a row that is inserted, ``touch(score, now, count)`` the
score of a row that is requested again; the row with the smallest score is evicted first. A policy is a class that serves as
their namespace, there is no ``self``::

    class MostRecentlyUsed:
        def first(now, count):
            return -now

        def touch(score, now, count):
            return -now

* ``now``: time in ticks, 0 <= now < 2**48; the same for all keys of a call, larger in each later call. With the class attribute
  ``clock = "insertions"`` it follows the number of rows inserted so far, 64 ticks for as many as the cache has ways: it does
  not move while nothing is inserted, and a cache that holds its whole table then needs no second kernel a lookup.
* ``count``: 1. With the class attribute ``needs_count = True``: how often the batch has the key, 1 <= count < 2**31.
* ``score``: 0 <= score < 2**32. What a function returns is kept modulo 2**32.

Without ``needs_count`` a touch may be applied more than once to a row that a batch requests more than once, so it has to be
idempotent for equal ``now``. Three more features, each at a price that only policies with it pay:

* ``first(now, count, key)``: the score may depend on the key, an int64. Under such a policy a row with the largest score,
  2**32 - 1, stays: where no other row can be evicted, the insertion candidate is refused.
* ``victim(scores, state) -> way`` or ``victim(scores, state, now) -> way``: which way of a full set is evicted, instead of
  that with the smallest score. ``scores`` are those of the set's ways, ``len(scores)`` of them (10 in a cache; as many as there
  are slots in a fully associative simulation), in the same order whatever the key. ``state`` is what the policy remembers of
  the set: as many uint32 as the class attribute ``state`` says (0 to 16, 0 if it is left out), initially 0. Both are read and
  written by index; what is written is kept modulo 2**32. If the way holds a row that was inserted by the same batch, the next
  way that does not is evicted instead.
* ``admit(key, count, sketch) -> bool``: may the candidate replace the victim? Asked when the set is full, after the victim was
  chosen; if not, that row stays (and what ``victim`` wrote). ``sketch`` is two integers, 0 to 15: about how often the
  candidate was requested lately, in this batch included, and the same of the victim. Requests are counted by lookups, found or
  not, in a count-min sketch that forgets (``kernels.cache.sketch``); it never underestimates.

A batch acts on a set in this order: all touches of resident rows; then insertion candidates in the order of their first
positions, each into a free way, else ``victim`` (or the smallest score, of equals the first in the probe order of the
candidate), ``admit`` and ``first``. A candidate that was refused is considered again at its next position in the batch.

The functions run as plain Python, compiled for the CPU and compiled for CUDA, and have to say the same everywhere: integers
only (floats round differently), nothing allocated, nothing raised, and no globals but integers, tuples of integers, functions
of the same kind and ``abs``, ``int``, ``len``, ``max``, ``min``, ``range``. A class that breaks this is a PolicyError when it
is loaded, with the function, its line, and for which target it does not compile.

*What a digest covers.* Problem: compiled kernels are kept on disk under the digest of their policy, so two policies that
act differently must never share one. Choice: bytecode, constants and the values of all globals in use, of the functions and
of those that they call; and the functions of a :class:`Policy` are copies that keep seeing these values. Turned down: the
source text, because in a notebook or an edited file it is not what runs, and a changed comment would force a compilation.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

__all__ = ["MAX_STATE", "OPTIONAL", "PARAMETERS", "Policy"]

MAX_STATE = 16  # uint32 that a policy may keep of each set
#: parameters of the functions of a policy
PARAMETERS = {
    "first": ("now", "count"),
    "touch": ("score", "now", "count"),
    "admit": ("key", "count", "sketch"),
    "victim": ("scores", "state"),
}
#: a parameter that a function may have besides, at the end
OPTIONAL = {"first": "key", "victim": "now"}


@dataclass(frozen=True)
class Policy:
    """A checked policy, ready to be compiled into the kernels of a cache.

    Attributes:
        name: as the config names it, or the name of the class.
        first: plain Python function ``first(now, count) -> score``, with ``key`` besides if ``takes_key``.
        touch: plain Python function ``touch(score, now, count) -> score``. Compiled code passes int64 to both and keeps
            the low 32 bits of what they return.
        needs_count: ``count`` is the number of occurrences in the batch, and ``touch`` is applied once; else ``count`` is 1.
        digest: 32 hex digits that identify what the functions do, constants and called functions included; equal digests
            belong to the same function objects. Valid for one Python version, as compiled kernels are.
        admit: ``admit(key, count, sketch) -> bool``, or None: every candidate is inserted.
        victim: ``victim(scores, state) -> way``, with ``now`` besides if ``takes_now``; or None: the smallest score is evicted.
            In plain Python, scores and state are lists, compiled they are int64 arrays.
        state: number of uint32 that victim keeps of each set.
        takes_key, takes_now: the functions have these parameters.
        clock: what ``now`` counts: ``calls`` or ``insertions``.
    """

    name: str
    first: Callable[..., int]
    touch: Callable[[int, int, int], int]
    needs_count: bool
    digest: str
    admit: Callable[[int, int, tuple[int, int]], bool] | None = None
    victim: Callable[..., int] | None = None
    state: int = 0
    takes_key: bool = False
    takes_now: bool = False
    clock: str = "calls"

    @property
    def functions(self) -> dict[str, Callable[..., Any]]:
        """The functions it has, by name."""
        return {label: function for label in PARAMETERS if (function := getattr(self, label)) is not None}
