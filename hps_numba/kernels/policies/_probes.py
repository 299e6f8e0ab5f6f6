"""Probes of the functions of a policy when it is loaded: they return integers in range, and the same when compiled."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from hps_numba.kernels.layouts.cache import WAYS
from hps_numba.kernels.policies._functions import broken, does_not_compile, for_compiler
from hps_numba.kernels.policies._policy import Policy

__all__ = ["check_compiled", "check_plain"]

_LOW32 = 0xFFFF_FFFF
_Probe = tuple[Any, ...]
_Probes = dict[str, list[_Probe]]
_KEYS = (0, 1, -1, 7, 2**31, 2**32 - 1, 2**63 - 1, -(2**63))
_SEQUENCES, _STEPS = 30, 24  # of a full set, for victim


def check_plain(policy: Policy) -> None:
    """Raise PolicyError if a function, run as plain Python, fails for arguments that a cache may pass."""
    probes = _probes(policy)
    if not policy.needs_count:
        _check_idempotent(policy, probes["touch"])


def check_compiled(policy: Policy) -> None:
    """Raise PolicyError if a function does not compile for the CPU, or returns something else than in plain Python.

    A policy that is sound is remembered in the cache folder, so that the next process need not compile its functions again.
    """
    from hps_numba.kernels.compiler import disk_cache
    from hps_numba.kernels.compiler.njit import host_function

    sound = disk_cache.name_of("policy", f"{policy.digest} {_digest_of_this()}", ".object")
    if disk_cache.find(sound) is not None:
        return
    for label, probes in _probes(policy).items():
        function = getattr(policy, label)
        try:
            compiled = host_function(for_compiler(function))
            answers = [_compiled_answer(compiled, label, probe) for probe in probes]
        except Exception as problem:
            raise does_not_compile(policy.name, function, "the CPU", problem) from None
        for probe, answer in zip(probes, answers, strict=True):
            plain = _asked(policy, label, probe)
            if not _is_same(answer, plain):
                what = f"{_call(label, probe)} is {_told(label, plain)}, but compiled {_told(label, answer)}"
                raise broken(policy.name, function, f"{what}; expected the same with int64 arithmetic")
    disk_cache.keep(sound, b"", "sound")


def _digest_of_this() -> str:
    """Digest of the text of the checks."""
    return hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]


# -- arguments --------------------------------------------------------------------------------


def _times() -> Iterator[tuple[random.Random, int]]:
    """Times around every edge, and at random; with them the source of randomness, the same in every process."""
    source = random.Random(20)
    for edge in (8, 2**31, 2**32, 2**33, 2**48 - 2):
        yield from ((source, edge + step) for step in (-8, -1, 0, 1))
    for _ in range(24):
        yield source, source.getrandbits(source.randint(1, 48))


def _of_first(policy: Policy, now: int, count: int, key: int) -> _Probe:
    return (now, count, key) if policy.takes_key else (now, count)


def _scores(policy: Policy, source: random.Random, now: int) -> list[int]:
    """Scores that a row may have at ``now``: of rows inserted or touched before, and any others."""
    ages = (0, 1, 7, 8, 9, source.randint(10, 10**6))
    inserted = [_asked(policy, "first", _of_first(policy, max(now - age, 0), 1, age)) for age in ages]
    touched = [_asked(policy, "touch", (score, max(now - age // 2, 0), 1)) for score, age in zip(inserted, ages, strict=True)]
    return sorted({*inserted, *touched, 0, 1, 2**31 - 1, 2**31, _LOW32, source.getrandbits(32)})


def _probes(policy: Policy) -> _Probes:
    """Arguments to try, by function; plain Python has been tried with all of them."""
    first: list[_Probe] = []
    touch: list[_Probe] = []
    for source, now in _times():
        counts = (1, 2, source.randint(3, 2**31 - 1)) if policy.needs_count else (1,)
        keys = (*_KEYS, source.getrandbits(62)) if policy.takes_key else (0,)
        first += [_of_first(policy, now, count, key) for count in counts for key in keys]
        touch += [(score, now, count) for score in _scores(policy, source, now) for count in counts]
    probes = {"first": first, "touch": touch}
    if policy.admit is not None:
        probes["admit"] = [(key, count, sketch) for key in _KEYS for count in (1, 2, 2**31 - 1) for sketch in _sketches()]
    for label, some in probes.items():
        for probe in some:
            _asked(policy, label, probe)
    if policy.victim is not None:
        probes["victim"] = list(_full_sets(policy))
    return probes


def _sketches() -> list[tuple[int, int]]:
    return [(mine, others) for mine in (0, 1, 2, 7, 14, 15) for others in (0, 1, 2, 7, 14, 15)]


def _full_sets(policy: Policy) -> Iterator[_Probe]:
    """Arguments of ``victim`` over the lives of some sets: rows are inserted, touched, and evicted as it says."""
    source = random.Random(21)
    for _ in range(_SEQUENCES):
        now = source.getrandbits(source.randint(1, 47))
        scores = [_new_score(policy, source, now + way) for way in range(WAYS)]
        state = (0,) * policy.state
        now += WAYS
        for _ in range(_STEPS):
            for way in source.sample(range(WAYS), source.randint(0, WAYS)):
                count = source.randint(1, 3) if policy.needs_count else 1
                scores[way] = _asked(policy, "touch", (scores[way], now, count))
            now += source.choice((0, 1, 1, 8, 100, 2**20))
            probe = (tuple(scores), state, now) if policy.takes_now else (tuple(scores), state)
            yield probe
            evicted, kept, state = _asked(policy, "victim", probe)
            scores = list(kept)
            scores[evicted] = _new_score(policy, source, now)


def _new_score(policy: Policy, source: random.Random, now: int) -> int:
    count = source.randint(1, 3) if policy.needs_count else 1
    score: int = _asked(policy, "first", _of_first(policy, now, count, source.choice(_KEYS)))
    return score


# -- results ----------------------------------------------------------------------------------


def _asked(policy: Policy, label: str, probe: _Probe) -> Any:
    """The result in plain Python, as the cache keeps it; for victim with the scores and the state that it leaves."""
    function: Callable[..., Any] = getattr(policy, label)
    arguments = [list(argument) if label == "victim" and type(argument) is tuple else argument for argument in probe]
    expected = _EXPECTED[label]
    try:
        answer = function(*arguments)
    except Exception as problem:
        what = f"{_call(label, probe)}: expected {expected}, got {type(problem).__name__}: {problem}"
        raise broken(policy.name, function, what) from None
    if type(answer) is not (bool if label == "admit" else int) or (label == "victim" and not 0 <= answer < WAYS):
        raise broken(policy.name, function, f"{_call(label, probe)}: expected {expected}, got {answer!r}")
    if label == "admit":
        return answer
    if label != "victim":
        return answer & _LOW32
    for what, words in zip(("scores", "state"), arguments, strict=False):
        for word in words:
            if type(word) is not int:
                raise broken(policy.name, function, f"{_call(label, probe)}: expected integers in {what}, got {word!r}")
    return answer, _kept(arguments[0]), _kept(arguments[1])


_EXPECTED = {
    "first": "an integer",
    "touch": "an integer",
    "admit": "True or False",
    "victim": f"the number of a way, an integer in 0..{WAYS - 1}",
}


def _kept(words: Any) -> tuple[int, ...]:
    return tuple(int(word) & _LOW32 for word in words)


def _compiled_answer(compiled: Any, label: str, probe: _Probe) -> Any:
    if label != "victim":
        return compiled(*probe)
    import numpy as np

    scores, state = (np.array(words, np.int64) for words in probe[:2])
    return compiled(scores, state, *probe[2:]), _kept(scores), _kept(state)


def _is_same(answer: Any, plain: Any) -> bool:
    if type(plain) is int:
        return type(answer) is int and answer & _LOW32 == plain
    if type(plain) is bool:
        return type(answer) is bool and answer == plain
    return type(answer[0]) is int and answer == plain


def _told(label: str, answer: Any) -> str:
    if label != "victim":
        return repr(answer)
    return f"{answer[0]!r} with scores {list(answer[1])} and state {list(answer[2])}"


def _check_idempotent(policy: Policy, probes: list[_Probe]) -> None:
    for score, now, count in probes:
        once = _asked(policy, "touch", (score, now, count))
        twice = _asked(policy, "touch", (once, now, count))
        if once != twice:
            raise broken(
                policy.name,
                policy.touch,
                f"{_call('touch', (score, now, count))} is {once} and then {_call('touch', (once, now, count))} is {twice}; "
                "expected the same for equal now: set needs_count = True if it counts requests",
            )


def _call(label: str, probe: _Probe) -> str:
    arguments = (list(argument) if label == "victim" and type(argument) is tuple else argument for argument in probe)
    return f"{label}({', '.join(map(str, arguments))})"
