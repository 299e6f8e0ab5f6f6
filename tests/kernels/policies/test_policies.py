"""Cache policies: what each does worked by hand, the contract over every file of the folder, and how bad ones are refused."""

from __future__ import annotations

import subprocess
import sys
from collections import OrderedDict, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from support.cache_oracle import CacheOracle
from support.processes import environment
from support.waiting import HANG_SECONDS

from hps_numba import plugins
from hps_numba.errors import PolicyError
from hps_numba.kernels.compiler.njit import host_function
from hps_numba.kernels.policies import fifo, lfu, lru, pinned
from hps_numba.kernels.policies._functions import for_compiler
from hps_numba.kernels.policies._load import as_policy, load_policy, policy_with
from hps_numba.kernels.policies._policy import Policy
from hps_numba.testing import PolicyContract

FOLDER = "hps_numba.kernels.policies"
NAMES = plugins.names(FOLDER)
LOW32 = 2**32 - 1

OWN = """
STEP = 3

def doubled(x):
    return 2 * x

class Own:
    def first(now, count):
        return doubled(now) + STEP

    def touch(score, now, count):
        return max(score, doubled(now))
"""


# -- the three, by hand ---------------------------------------------------------------------

#: policy -> (now, count) of the requests of one row, and its score after each
TRACES: dict[str, list[tuple[int, int, int]]] = {
    "lru": [
        (100, 1, 100),
        (101, 1, 100),
        (103, 1, 100),  # 3 ticks old: not yet
        (104, 1, 104),  # 4 ticks old
        (104, 1, 104),
        (2**32 - 1, 1, 2**32 - 1),
        (2**32 + 2, 1, 2**32 - 1),  # 3 ticks later, the clock has wrapped
        (2**32 + 3, 1, 3),
        (2**32 + 6, 1, 3),  # 3 ticks later
        (2**33 + 6, 1, 3),  # 2**32 ticks more look like none
        (2**33 + 7, 1, 7),
    ],
    "lfu": [
        (5, 1, 1),
        (6, 1, 2),
        (6, 4, 6),
        (9, 2**31, 2**31 + 6),
        (10, 2**31 - 8, 2**32 - 2),
        (11, 1, 2**32 - 1),
        (12, 9, 2**32 - 1),  # full
    ],
    "fifo": [(100, 1, 100), (101, 1, 100), (10**6, 1, 100), (2**40, 1, 100)],
    "lfu_decay": [  # a half-life is 1024 ticks, a doubling 256
        (0, 1, 0),
        (0, 1, 256),
        (0, 2, 512),  # two and two
        (1024, 1, 662),  # one half-life on, 1 beside 4 / 2: fresh 256, 512 is 4 steps of 64 above it, 150 more
        (10_240, 4, 3072),  # nothing is left of what was
        (10_240, 3, 3270),  # 3 beside 4 of the same time: fresh 2944, 2 steps of 64 below, 198 more
    ],
    "random": [(5, 1, 0), (6, 1, 0)],
    "clock": [(5, 1, 0), (6, 1, 1), (7, 1, 1)],
    "sieve": [(5, 1, 10), (6, 1, 11), (7, 1, 11), (2**31 + 5, 1, 11)],
    "tinylfu": [(100, 1, 100), (103, 1, 100), (104, 1, 104)],
    "s3fifo": [(5, 1, 20), (6, 1, 21), (7, 1, 22), (7, 1, 23), (8, 4, 23)],
    "ttl": [(0, 1, 0), (63, 1, 0), (64, 1, 1), (640, 1, 10), (65536 * 64, 1, 0)],
    "pinned": [(100, 1, 100), (103, 1, 100), (104, 1, 104)],
}


@pytest.mark.parametrize("name", TRACES)
def test_scores_of_a_trace(name: str) -> None:
    policy = load_policy(name)
    score = None
    for now, count, expected in TRACES[name]:
        key = (7,) if policy.takes_key else ()
        score = (policy.first(now, count, *key) if score is None else policy.touch(score, now, count)) & LOW32
        assert score == expected, (now, count)


def test_policies_that_need_counts() -> None:
    assert {name for name in NAMES if load_policy(name).needs_count} == {"lfu", "lfu_decay", "s3fifo"}


def test_which_policies_have_more_than_scores() -> None:
    policies = {name: load_policy(name) for name in NAMES}
    assert {name: policy.state for name, policy in policies.items() if policy.victim is not None} == {
        "clock": 1,
        "random": 1,
        "s3fifo": 0,
        "sieve": 2,
        "ttl": 0,
    }
    assert {name for name, policy in policies.items() if policy.admit is not None} == {"tinylfu"}
    assert {name for name, policy in policies.items() if policy.takes_key} == {"pinned"}
    assert {name for name, policy in policies.items() if policy.takes_now} == {"s3fifo", "ttl"}


def test_every_policy_has_a_trace_by_hand() -> None:
    assert set(TRACES) == set(NAMES)


def first_scores(name: str) -> list[int]:
    return [load_policy(name).first(now, count) for now, count in ((7, 1), (8, 5), (2**31, 2**31 - 1))]


def test_first_scores() -> None:
    assert first_scores("lru") == first_scores("fifo") == [7, 8, 2**31]
    assert first_scores("lfu") == [1, 5, 2**31 - 1]


# -- against textbooks: one set, one request a call, time in steps of the slack -----------------

WAYS = 10
requests = st.lists(st.integers(0, 15), max_size=150)


def kept(name: str, keys: list[int]) -> Iterator[set[int]]:
    """What a cache of one set holds after each request."""
    host = {key: np.full(1, key, np.float32) for key in range(16)}
    cache = CacheOracle(1, load_policy(name), 1, 0.0, lambda key: (0, key % 2), host)
    for number, key in enumerate(keys):
        cache.lookup([key], lru.SLACK * number)
        yield {entry.key for entry in cache.dump(0, 1)}


@given(requests)
def test_lru_of_one_set_equals_the_textbook(keys: list[int]) -> None:
    order: OrderedDict[int, None] = OrderedDict()
    for key, content in zip(keys, kept("lru", keys)):
        order[key] = None
        order.move_to_end(key)
        if len(order) > WAYS:
            order.popitem(last=False)
        assert content == set(order)


@given(requests)
def test_fifo_of_one_set_equals_the_textbook(keys: list[int]) -> None:
    order: deque[int] = deque(maxlen=WAYS)
    for key, content in zip(keys, kept("fifo", keys)):
        if key not in order:
            order.append(key)
        assert content == set(order)


@given(requests)
def test_lfu_of_one_set_evicts_one_with_the_fewest_requests(keys: list[int]) -> None:
    counts: dict[int, int] = {}
    for key, content in zip(keys, kept("lfu", keys)):
        before = dict(counts)
        counts[key] = counts.get(key, 0) + 1
        gone = set(counts) - content
        assert len(content) == min(len(counts), WAYS) and len(gone) <= 1
        for victim in gone:
            assert before[victim] == min(before.values())
            del counts[victim]


# -- the contract, over every file of the folder ----------------------------------------------


class TestContract(PolicyContract):
    @pytest.fixture(params=NAMES)
    def loaded(self, request: pytest.FixtureRequest) -> Policy:
        return load_policy(request.param)


@pytest.mark.parametrize("name", NAMES)
class TestEveryPolicy:
    def test_it_loads_by_file_name(self, name: str) -> None:
        policy = load_policy(name)
        assert isinstance(policy, Policy) and policy.name == name

    def test_it_passes_all_checks_of_a_users_own(self, name: str) -> None:
        """Built-in ones are not compiled when loaded by name; here they are."""
        policy = load_policy(f"{FOLDER}.{name}:PLUGIN", allow_code=True)
        assert policy.digest == load_policy(name).digest
        assert policy.first is load_policy(name).first

    def test_it_names_its_source(self, name: str) -> None:
        part = plugins.load(FOLDER, name)
        text = sys.modules[part.__module__].__doc__
        assert text is not None and any(str(year) in text for year in range(1960, 2030))
        assert part.__doc__ and "score" in part.__doc__


def test_loading_a_built_in_policy_needs_no_compiler() -> None:
    code = (
        "import sys, hps_numba\n"
        "from hps_numba.kernels.policies._load import load_policy\n"
        f"print([load_policy(name).name for name in {NAMES!r}] == {NAMES!r}, 'numba' in sys.modules)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True, timeout=HANG_SECONDS
    )
    assert done.stdout.split() == ["True", "False"]


# -- a user's own ---------------------------------------------------------------------------


def own(folder: Path, text: str = OWN, name: str = "Own") -> Policy:
    """The policy of a file with this text; in a folder of its own, as bytecode files tell texts apart by second and size."""
    place = folder / str(sum(1 for _ in folder.iterdir()))
    place.mkdir()
    (place / "own.py").write_text(text)
    return load_policy(f"own.py:{name}", allow_code=True, folder=place)


def test_a_policy_from_a_file(tmp_path: Path) -> None:
    policy = own(tmp_path)
    assert (policy.name, policy.needs_count) == ("own.py:Own", False)
    assert (policy.first(5, 1), policy.touch(4, 5, 1), policy.touch(40, 5, 1)) == (13, 10, 40)
    assert host_function(policy.first)(5, 1) == 13


def test_a_policy_from_a_module(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "policy_of_mine.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    assert load_policy("policy_of_mine:Own", allow_code=True).first(5, 1) == 13
    with pytest.raises(PolicyError, match="runs code from a module: pass allow_code=True"):
        load_policy("policy_of_mine:Own")


def test_a_policy_chooses_what_is_evicted(tmp_path: Path) -> None:
    """Ten lines in a temporary file, and a row goes through them."""
    policy = own(
        tmp_path,
        "class Newest:\n    def first(now, count): return -now\n    def touch(score, now, count): return score\n",
        "Newest",
    )
    host = {key: np.full(2, key, np.float32) for key in range(12)}
    cache = CacheOracle(1, policy, 2, 0.0, lambda key: (0, 0), host)
    for now, key in enumerate(range(11), start=1):
        cache.lookup([key], now)
    assert [entry.key for entry in cache.dump(0, 1)] == [0, 1, 2, 3, 4, 5, 6, 7, 8, 10]


def test_a_class_made_in_code(tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    exec(OWN, scope)  # as in a notebook: there is no source to read
    policy = as_policy(scope["Own"])
    assert (policy.name, policy.first(5, 1)) == ("Own", 13)
    assert policy.digest == own(tmp_path).digest
    assert as_policy(policy) is policy
    assert as_policy(scope["Own"], name="mine").name == "mine"


def test_functions_may_be_static_inherited_or_lambdas() -> None:
    class Static(fifo.FIFO):
        @staticmethod
        def first(now: int, count: int) -> int:  # type: ignore[override]
            return now + 1

    class Short:
        first = lambda now, count: now + 1  # noqa: E731
        touch = lambda score, now, count: score  # noqa: E731

    assert as_policy(Static).first(3, 1) == as_policy(Short).first(3, 1) == 4


def test_a_file_runs_only_where_code_is_allowed(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text(OWN)
    with pytest.raises(PolicyError, match="allow_code=True"):
        load_policy("own.py:Own", folder=tmp_path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lur", "'lur' is unknown, known are clock, fifo, lfu, lfu_decay, lru, .*; did you mean 'lru'"),
        ("_policy", "is unknown"),
        ("no_such_package.module:X", "cannot import"),
        ("hps_numba.kernels.policies.lru:XYZ", "has no 'XYZ'"),
        (7, "expected one of clock, fifo, .*ttl or module:NAME, got 7"),
        (None, "expected one of .*, got None"),
    ],
)
def test_an_unknown_policy_is_one_line(name: Any, message: str) -> None:
    with pytest.raises(PolicyError, match=message) as caught:
        load_policy(name, allow_code=True)
    assert "\n" not in str(caught.value)


# -- digests --------------------------------------------------------------------------------


def test_the_same_text_has_the_same_digest(tmp_path: Path) -> None:
    first = own(tmp_path)
    again = own(tmp_path)
    assert first.digest == again.digest
    assert first == again
    assert first.first is again.first  # so that kernels made of it are found again
    code = (
        "from hps_numba.kernels.policies._load import load_policy\n"
        f"print(load_policy({str(tmp_path / '0' / 'own.py')!r} + ':Own', allow_code=True).digest)"
    )
    other = subprocess.run(
        [sys.executable, "-c", code], env=environment(), capture_output=True, text=True, check=True, timeout=HANG_SECONDS
    )
    assert other.stdout.strip() == first.digest


@pytest.mark.parametrize(
    ("was", "now"),
    [
        ("STEP = 3", "STEP = 4"),
        ("2 * x", "4 * x"),
        ("2 * x", "x * 2 + 0"),
        ("max(score", "min(score"),
        ("+ STEP", "- STEP"),
        ("class Own:", "class Own:\n    needs_count = True"),
    ],
)
def test_what_acts_differently_has_another_digest(tmp_path: Path, was: str, now: str) -> None:
    assert own(tmp_path).digest != own(tmp_path, OWN.replace(was, now)).digest


def test_comments_and_unused_globals_do_not_change_the_digest(tmp_path: Path) -> None:
    assert own(tmp_path).digest == own(tmp_path, "UNUSED = 1.5  # or so\n" + OWN.replace("2 * x", "2 * x  # twice")).digest


def test_a_policy_keeps_the_constants_it_was_loaded_with(tmp_path: Path) -> None:
    scope: dict[str, Any] = {}
    exec(OWN, scope)
    before = as_policy(scope["Own"])
    scope["STEP"] = 100
    scope["doubled"].__code__ = (lambda x: x).__code__
    after = as_policy(scope["Own"])
    assert (before.first(5, 1), after.first(5, 1)) == (13, 105)
    assert (host_function(before.first)(5, 1), host_function(after.first)(5, 1)) == (13, 105)
    assert before.digest != after.digest


def test_digests_of_built_in_policies_differ() -> None:
    assert len({load_policy(name).digest for name in NAMES}) == len(NAMES)


# -- the same with other constants ---------------------------------------------------------------


class Stepping:
    def first(now, count):
        return doubled_step(now) + KEYS[1]

    def touch(score, now, count):
        return score


KEYS = (1, 2, 3)
STEP = 3


def doubled_step(now):
    return 2 * STEP * now


def test_a_policy_with_other_constants_is_another_policy() -> None:
    same, other = as_policy(Stepping), as_policy(policy_with(Stepping, STEP=5, KEYS=(7, 8)))
    assert (same.first(10, 1), other.first(10, 1)) == (62, 108)
    assert (host_function(for_compiler(same.first))(10, 1), host_function(for_compiler(other.first))(10, 1)) == (62, 108)
    assert same.digest != other.digest
    assert as_policy(policy_with(Stepping, STEP=3)).digest == same.digest
    twice = as_policy(policy_with(policy_with(Stepping, STEP=5), KEYS=(1, 100)))
    assert twice.first(10, 1) == 200
    assert as_policy(policy_with(Stepping, needs_count=True)).needs_count
    with pytest.raises(PolicyError, match=r"'KEYS': expected 1 to 4096 elements, got 0"):
        as_policy(policy_with(Stepping, KEYS=()))
    with pytest.raises(PolicyError, match="policy_with: expected a class, got 'lru'"):
        policy_with("lru")  # type: ignore[arg-type]


def test_pinned_combines_only_with_policies_that_score() -> None:
    for order in ("tinylfu", "sieve", "pinned"):
        with pytest.raises(PolicyError, match=f"pinned: expected a policy with first and touch only, got '{order}'"):
            pinned.pinned([1], order)
    counting = as_policy(pinned.pinned([4, 4, 2], "lfu"))
    assert counting.needs_count
    assert [counting.first(9, 3, key) for key in (2, 3, 4)] == [LOW32, 3, LOW32]
    assert (counting.touch(LOW32, 9, 1), counting.touch(LOW32 - 1, 9, 5)) == (LOW32, LOW32 - 1)


# -- bad ones -------------------------------------------------------------------------------

FIRST = "    def first(now, count): return now\n"
TOUCH = "    def touch(score, now, count): return score\n"
HEAD = "class Bad:\n"

BAD = {
    "no touch": (HEAD + FIRST, r"expected a function touch\(score, now, count\), got no touch"),
    "no first": (HEAD + TOUCH, r"expected a function first\(now, count\) or first\(now, count, key\), got no first"),
    "not callable": (HEAD + FIRST + "    touch = 3", r"expected a plain Python function touch\(.*\), got a int"),
    "builtin": (
        HEAD + TOUCH + "    first = max",
        r"expected a plain Python function first\(.*\), got a builtin_function_or_method",
    ),
    "method": (
        HEAD + TOUCH + "    @classmethod\n    def first(now, count): return 1",
        r"expected a plain Python function first\(.*\), got a method",
    ),
    "compiled": (
        "import numba\n" + HEAD + TOUCH + "    @numba.njit\n    def first(now, count): return 1",
        r"expected a plain Python function first\(.*\), got a CPUDispatcher",
    ),
    "self": (
        HEAD + FIRST + "    def touch(self, score, now, count): return score",
        r"own\.py:3\): expected touch\(score, now, count\), got \(self, score, now, count\)",
    ),
    "names": (
        HEAD + TOUCH + "    def first(count, now): return now",
        r"expected first\(now, count\) or .*, got \(count, now\)",
    ),
    "default": (HEAD + TOUCH + "    def first(now, count=1): return now", r"expected .*, got \(now, count=1\)"),
    "star": (HEAD + TOUCH + "    def first(now, count, *more): return now", r"expected .*, got \(now, count, \*more\)"),
    "keyword": (HEAD + TOUCH + "    def first(now, *, count): return now", r"expected .*, got \(now, \*, count\)"),
    "generator": (
        HEAD + TOUCH + "    def first(now, count): yield now",
        r"first \(.*own\.py:3\): .*expected first\(now, count\)",
    ),
    "coroutine": (HEAD + TOUCH + "    async def first(now, count): return now", r"first .*expected first\(now, count\)"),
    "a function": ("def Bad(now, count): return now", "expected a class with first and touch, got a function"),
    "an instance": (HEAD + FIRST + TOUCH + "Bad = Bad()", "expected a class with first and touch, got a Bad"),
    "admit": (
        HEAD + FIRST + TOUCH + "    def admit(key, sketch): return True",
        r"admit \(.*own\.py:4\): expected admit\(key, count, sketch\), got \(key, sketch\)",
    ),
    "admit score": (
        HEAD + FIRST + TOUCH + "    def admit(key, count, sketch): return sketch[0]",
        r"admit \(.*own\.py:4\): admit\(0, 1, \(0, 0\)\): expected True or False, got 0",
    ),
    "admit index": (
        HEAD + FIRST + TOUCH + "    def admit(key, count, sketch): return sketch[2] > 0",
        r"admit\(0, 1, \(0, 0\)\): expected True or False, got IndexError: ",
    ),
    "admit disagrees": (
        HEAD + FIRST + TOUCH + "    def admit(key, count, sketch): return (key << 40) >> 40 > 5",
        r"admit\(\d+, 1, \(0, 0\)\) is True, but compiled False; expected the same with int64 arithmetic",
    ),
    "victim": (
        HEAD + FIRST + TOUCH + "    def victim(state, scores): return 0",
        r"expected victim\(scores, state\) or victim\(scores, state, now\), got \(state, scores\)",
    ),
    "victim way": (
        HEAD + FIRST + TOUCH + "    def victim(scores, state): return len(scores)",
        r"victim \(.*own\.py:4\): victim\(\[.*\], \[\]\): expected the number of a way, an integer in 0..9, got 10",
    ),
    "victim none": (
        HEAD + FIRST + TOUCH + "    def victim(scores, state): scores[0] = 1",
        r"\): expected the number of a way, an integer in 0..9, got None",
    ),
    "victim index": (
        HEAD + FIRST + TOUCH + "    def victim(scores, state): return scores[10]",
        r"victim\(.*\): expected the number of a way, .*, got IndexError: list index out of range",
    ),
    "victim state": (
        HEAD + FIRST + TOUCH + "    def victim(scores, state):\n        state[0] += 1\n        return 0",
        r"victim\(.*\): expected the number of a way, .*, got IndexError",
    ),
    "victim's state": (
        HEAD + FIRST + TOUCH + "    state = 2\n    def victim(scores, state):\n        state[1] = 2 > 1\n        return 0",
        r"expected integers in state, got True",
    ),
    "victim disagrees": (
        HEAD + FIRST + TOUCH + "    state = 1\n    def victim(scores, state):\n        state[0] = (scores[0] << 40) >> 40\n"
        "        return 0",
        r"is 0 with scores .* and state .*, but compiled 0 with scores .*; expected the same",
    ),
    "victim compile": (
        HEAD + FIRST + TOUCH + "    def victim(scores, state):\n        best = 0\n        if scores[0] < 0:\n"
        "            best = (0, 1)\n        return best",
        r"victim \(.*own\.py:\d+\): does not compile for the CPU: Cannot unify",
    ),
    "state": (HEAD + FIRST + TOUCH + "    state = 4", "state is 4, but there is no victim"),
    "much state": (
        HEAD + FIRST + TOUCH + "    state = 17\n    def victim(scores, state): return 0",
        "expected state to be a number of uint32 a set, 0 to 16, got 17",
    ),
    "keys twice": (
        HEAD + TOUCH + "    def first(now, count, key, more): return now",
        r"expected first\(now, count\) or first\(now, count, key\), got",
    ),
    "empty tuple": (
        "KEYS = ()\n" + HEAD + TOUCH + "    def first(now, count): return len(KEYS)",
        r"first \(.*own\.py:4\): 'KEYS': expected 1 to 4096 elements, got 0",
    ),
    "wide tuple": (
        "KEYS = (1, 2**63)\n" + HEAD + TOUCH + "    def first(now, count): return KEYS[0]",
        "'KEYS': expected integers of 64 bits, got 9223372036854775808",
    ),
    "mixed tuple": (
        "KEYS = (1, 'x')\n" + HEAD + TOUCH + "    def first(now, count): return KEYS[0]",
        "'KEYS': expected integers of 64 bits, got 'x'",
    ),
    "slip": (
        HEAD + FIRST + TOUCH + "    need_count = True",
        "expected first, touch, admit, victim, clock, needs_count or state, got 'need_count'",
    ),
    "needs_count": (HEAD + FIRST + TOUCH + "    needs_count = 1", "expected needs_count to be True or False, got 1"),
    "bool": (HEAD + TOUCH + "    def first(now, count): return now > 3", r"first\(0, 1\): expected an integer, got False"),
    "float": (
        HEAD + TOUCH + "    def first(now, count): return now * float_of(1)\ndef float_of(x): return x ** -1",
        "expected an int",
    ),
    "none": (HEAD + FIRST + "    def touch(score, now, count): score + 1", r"touch\(0, 0, 1\): expected an integer, got None"),
    "raises": (
        HEAD + TOUCH + "    def first(now, count): return 8 // now",
        "first.*: expected an integer, got ZeroDivisionError: ",
    ),
    "float literal": (
        HEAD + TOUCH + "    def first(now, count): return int(now * 0.5)",
        r"own\.py:3\): expected integers only, got 0.5",
    ),
    "division": (
        HEAD + TOUCH + "    def first(now, count):\n        return int(now / 2)",
        r"own\.py:4\): expected the division //, got /",
    ),
    "list": (HEAD + TOUCH + "    def first(now, count): return [now][0]", "makes a list; expected integer arithmetic"),
    "import": (
        HEAD + TOUCH + "    def first(now, count):\n        import math\n        return now",
        r"py:4\): imports a module",
    ),
    "nested": (HEAD + TOUCH + "    def first(now, count): return (lambda: now)()", "first .*expected"),
    "assert": (HEAD + TOUCH + "    def first(now, count):\n        assert now >= 0\n        return now", "raises or asserts"),
    "global": (
        HEAD + TOUCH + "    def first(now, count):\n        global T\n        T = now\n        return now",
        "writes a global",
    ),
    "try": (
        HEAD
        + TOUCH
        + "    def first(now, count):\n        try:\n            return now\n        except ValueError:\n            return 0",
        "catches an exception",
    ),
    "float constant": (
        "RATE = 0.5\n" + HEAD + TOUCH + "    def first(now, count):\n        return int(now * RATE)",
        r"first \(.*own\.py:5\): expected integers, tuples of integers and plain functions as globals, got the float 'RATE'",
    ),
    "bool constant": ("ON = True\n" + HEAD + TOUCH + "    def first(now, count): return now + ON", "got the bool 'ON'"),
    "array": (
        "import numpy as np\n" + HEAD + TOUCH + "    def first(now, count): return np.int64(now)",
        "got the module 'np'",
    ),
    "class constant": (HEAD + TOUCH + "    _A = 3\n    def first(now, count): return now + Bad._A", "got the type 'Bad'"),
    "undefined": (HEAD + TOUCH + "    def first(now, count): return now + later", "uses 'later', which is not defined"),
    "builtin used": (
        HEAD + TOUCH + "    def first(now, count): return len(str(now))",
        "uses 'str', which is not .*one of abs, int, len",
    ),
    "closure": (
        "def made(step):\n    class Bad:\n        def first(now, count): return now + step\n"
        "        def touch(score, now, count): return score\n    return Bad\nBad = made(3)",
        "uses 'step' of an enclosing function; expected a global integer",
    ),
    "recursion": (
        HEAD + TOUCH + "    def first(now, count): return down(now)\ndef down(x): return down(x - 1) if x > 0 else 0",
        r"down \(.*own\.py:4\): calls itself",
    ),
    "called badly": (
        HEAD + TOUCH + "    def first(now, count): return more(now)\ndef more(x, by=2): return x + by",
        r"more \(.*own\.py:4\): expected positional parameters without defaults, got \(x, by=2\)",
    ),
    "deep": (
        "X = 1.5\n" + HEAD + TOUCH + "    def first(now, count): return more(now)\ndef more(x): return x + X",
        r"more \(.*own\.py:5\): expected .*, got the float 'X'",
    ),
    "compile": (
        HEAD + TOUCH + "    def first(now, count):\n        x = now if now >= 0 else (now, count)\n        return x",
        r"first \(.*own\.py:4\): does not compile for the CPU: Cannot unify",
    ),
    "disagree": (
        HEAD + TOUCH + "    def first(now, count):\n        return (now << 40) >> 40",
        r"first\(\d+, 1\) is \d+, but compiled -?\d+; expected the same with int64 arithmetic",
    ),
    "too wide": (
        "BIG = 2**64\n" + HEAD + TOUCH + "    def first(now, count):\n        return now + BIG",
        r"first \(.*own\.py:5\): does not compile for the CPU: .*too large",
    ),
    "counts": (
        HEAD + FIRST + "    def touch(score, now, count): return score + count",
        r"touch\(0, 0, 1\) is 1 and then touch\(1, 0, 1\) is 2; expected the same for equal now: set needs_count = True",
    ),
}


@pytest.mark.parametrize("what", BAD)
def test_a_bad_policy_is_refused_in_one_line(tmp_path: Path, what: str) -> None:
    text, message = BAD[what]
    with pytest.raises(PolicyError, match=message) as caught:
        own(tmp_path, text, "Bad")
    said = str(caught.value)
    assert said.startswith("policy 'own.py:Bad'")
    assert "\n" not in said and "\x1b" not in said


def test_a_policy_that_counts_must_declare_needs_count(tmp_path: Path) -> None:
    policy = own(tmp_path, BAD["counts"][0] + "\n    needs_count = True\n", "Bad")
    assert policy.needs_count
    assert policy.touch(5, 9, 3) == 8


def test_a_refused_policy_stays_refused(tmp_path: Path) -> None:
    for _ in range(2):
        with pytest.raises(PolicyError, match="does not compile"):
            own(tmp_path, BAD["compile"][0], "Bad")


def test_an_unnamed_object_is_told_apart() -> None:
    with pytest.raises(PolicyError, match="policy 'int': expected a class with first and touch, got a int"):
        as_policy(3)
    assert as_policy(lfu.LFU).needs_count
