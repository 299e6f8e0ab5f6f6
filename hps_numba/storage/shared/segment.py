"""A segment that this process uses: its memory, the turn of its writers, and the blocks of reader records of its processes.

*Who is alive.* Every process locks a byte of the file for each block of records it uses. Whether a process lives is whether the
byte is locked: that also tells a zombie, and works across PID namespaces of containers. Pids and start times are noted beside
it for people. Turned down: to conclude it from the pid, which is reused, and unknown in another namespace.
"""

from __future__ import annotations

import atexit
import logging
import os
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path

from hps_numba.errors import CapacityError, ClosedError, TierUnavailable
from hps_numba.runtime.fork import register_fork_reset
from hps_numba.storage.shared.file_locks import Check, go_on, lock_within, try_lock, unlock, wait_for
from hps_numba.storage.shared.layout import (
    BLOCK_LOCKS,
    BLOCKS,
    CLAIM,
    GUARD_RECORD,
    LOADING_LOCK,
    PAGE,
    PIDS,
    RECORD_AREA,
    RECORD_WORDS,
    RECORDS,
    SPACE,
    STARTS,
    W_AUTO_REMOVE,
    W_PUBLISHED,
    W_SERIAL,
    W_WRITER,
    W_WRITER_START,
    WRITE_LOCK,
)
from hps_numba.storage.shared.segment_file import (
    LOCK_SECONDS,
    check_auto_remove,
    cover,
    fill_file,
    open_segment,
    start_of,
    take_huge_pages,
    word_view,
)

__all__ = ["FOLDER", "Segment", "attach", "present_bytes"]

log = logging.getLogger(__name__)
#: where segments are
FOLDER = Path("/dev/shm")
_CLAIM_SECONDS = 10.0
_CHECK_SECONDS = 0.01  # between two looks at whether a wait for another thread is of any use
_CLAIM_BITS = 47  # with the number of a block, one word


class Segment:
    """A named segment.

    Attributes:
        path: of its file.   address: where it is mapped, in every process.   size: bytes, all told.
        words: int64, the words of its first page.   pids: int64 ``[BLOCKS]``, who uses a block of records; 0: nobody.
        records: int64 ``[BLOCKS, RECORDS, 8]``; the first word of each is an epoch, 0 if no reader is in it.
        blocks: numbers of the blocks of this process.
        writing: addresses of the entries of tables that this process is writing to.
        after_fork: is called in a forked child, once it has a block.   leaving: before this process leaves.

    Thread safety: every method.
    """

    def __init__(self, path: Path, size: int, *, auto_remove: bool) -> None:
        """Open the segment or make it; raises as ``open_segment``."""
        self.path = path
        self._file, self.address, self.size = open_segment(path, size, auto_remove=auto_remove)
        self.words = word_view(self.address, PAGE // 8)
        self.pids = word_view(self.address + PIDS, BLOCKS)
        self._starts = word_view(self.address + STARTS, BLOCKS)
        records = word_view(self.address + RECORD_AREA, BLOCKS * RECORDS * RECORD_WORDS)
        self.records = records.reshape(BLOCKS, RECORDS, RECORD_WORDS)
        self.users = 0
        self.after_fork: list[Callable[[], object]] = []
        self.leaving: list[Callable[[], object]] = []
        self._pinned: Callable[[int], object] | None = None
        self._new_locks()
        try:
            self.claim_block()
        except BaseException:
            self._let_go()
            raise
        finally:
            if self._file >= 0:
                unlock(self._file, WRITE_LOCK)
        if self.size - SPACE != size and size > self.size - SPACE:
            log.warning("%s: shared_memory_size: its creator gave %d bytes, not %d", path, self.size - SPACE, size)
        register_fork_reset(self)

    def _new_locks(self) -> None:
        self._mutex, self._depth = threading.RLock(), 0
        self._block_mutex = threading.RLock()
        self._loading = threading.Lock()
        self._pinning = threading.RLock()
        self.writing: set[int] = set()
        self.blocks: list[int] = []

    def reset_after_fork(self) -> None:
        """In a forked child: it holds no lock of the file, and its records are not those of the parent."""
        self._new_locks()
        self._pinned = None
        if self._file >= 0:
            try:
                self.claim_block()
            except CapacityError as problem:  # said again to whoever reads
                log.error("%s", problem)
            for renew in self.after_fork:
                renew()

    # -- the writer's turn ------------------------------------------------------------------------------------------------

    @contextmanager
    def turn(self, check: Check = go_on) -> Iterator[None]:
        """Hold the turn of this segment's writers; a thread may begin it again inside.

        Args:
            check: called while another thread or process has it; may raise.

        Raises:
            TierUnavailable: another process has kept it for a minute.   ClosedError: this process has left the segment.
        """
        with self._mutex_held(check):
            before = self._depth
            try:
                if before == 0:
                    self._take_turn(check)
                self._depth = before + 1
                yield
            finally:
                self._depth = before
                if before == 0 and self._file >= 0:
                    unlock(self._file, WRITE_LOCK)

    def _mutex_held(self, check: Check) -> AbstractContextManager[object]:
        """The mutex, to be entered; whoever has to look at ``check`` has it already, and leaves it once."""
        mutex = self._mutex
        if check is go_on:
            return mutex
        held = ExitStack()
        while not mutex.acquire(timeout=_CHECK_SECONDS):
            check()
        held.callback(mutex.release)
        return held

    def _take_turn(self, check: Check) -> None:
        if not self.lock_byte(WRITE_LOCK, LOCK_SECONDS, check):
            raise TierUnavailable(
                f"{self.path}: process {self.words[W_WRITER]} has kept the turn of the writers for {LOCK_SECONDS:g} s"
            )
        self._note_writer()

    def _note_writer(self) -> None:
        self.words[W_WRITER], self.words[W_WRITER_START] = os.getpid(), self._starts[self.blocks[0]] if self.blocks else 0

    @contextmanager
    def turn_if_free(self) -> Iterator[bool]:
        """``turn`` without waiting: gives False, and holds nothing, if another thread or process has it."""
        mutex = self._mutex
        if not mutex.acquire(blocking=False):
            yield False
            return
        before = self._depth
        try:
            free = before > 0 or (self._file >= 0 and try_lock(self._file, WRITE_LOCK))
            if free:
                self._note_writer()
                self._depth = before + 1
            yield free
        finally:
            self._depth = before
            if before == 0 and self._file >= 0:
                unlock(self._file, WRITE_LOCK)
            mutex.release()

    @contextmanager
    def loading(self, check: Callable[[], object]) -> Iterator[None]:
        """Hold the turn of the processes that load tables; ``check`` is called while another one loads, and may raise."""
        while not self._loading.acquire(timeout=0.05):
            check()
        try:
            self.lock_byte(LOADING_LOCK, None, check)
            yield
        finally:
            self.unlock_byte(LOADING_LOCK)
            self._loading.release()

    def lock_byte(self, byte: int, seconds: float | None, check: Check = go_on) -> bool:
        """Lock a byte of the file for this process, waiting ``seconds`` for the one that has it; False if that takes longer.

        Args:
            check: called while another process has it; may raise.

        Raises:
            ClosedError: this process has left the segment, before or meanwhile.
        """

        def attempt() -> bool:
            with self._block_mutex:  # in which the file is closed: its number may be that of another one afterwards
                if self._file < 0:
                    raise self._left()
                return try_lock(self._file, byte)

        return wait_for(attempt, seconds, check)

    def unlock_byte(self, byte: int) -> None:
        """Give it back."""
        with self._block_mutex:
            if self._file >= 0:
                unlock(self._file, byte)

    def next_serial(self) -> int:
        """A number that no other version of a table of this segment has; in the writer's turn."""
        self.words[W_SERIAL] += 1
        return int(self.words[W_SERIAL])

    def note_published(self) -> None:
        """A header leads elsewhere, or a generation is another one: whoever follows has to look. In the writer's turn."""
        self.words[W_PUBLISHED] += 1

    # -- processes ----------------------------------------------------------------------------------------------------------

    def claim_block(self) -> int:
        """A block of reader records for this process: its number.

        Raises:
            CapacityError: all are in use.   ClosedError: this process has left the segment.
        """
        end = time.monotonic() + _CLAIM_SECONDS
        while True:
            with self._block_mutex:
                if self._file < 0:
                    raise self._left()
                for number in range(BLOCKS):
                    if number not in self.blocks and try_lock(self._file, BLOCK_LOCKS + number):
                        self.records[number] = 0
                        self.records[number, GUARD_RECORD, CLAIM] = secrets.randbits(_CLAIM_BITS)
                        self._starts[number], self.pids[number] = start_of(os.getpid()), os.getpid()
                        self.blocks.append(number)
                        return number
            if time.monotonic() > end:  # a process that leaves holds all of them for a moment
                raise CapacityError(f"{self.path}: all {BLOCKS} blocks of reader records are in use by other processes")
            time.sleep(1e-3)

    def claim_of(self, block: int) -> int:
        """A number that the present use of a block has, and no other one."""
        return int(self.records[block, GUARD_RECORD, CLAIM])

    def is_dead(self, block: int) -> bool:
        """Whether the process that used a block has ended; then its readers are forgotten."""
        with self._block_mutex:
            if self._file < 0:
                raise self._left()
            if block in self.blocks or not try_lock(self._file, BLOCK_LOCKS + block):
                return False
            self.records[block], self.pids[block] = 0, 0
            unlock(self._file, BLOCK_LOCKS + block)
            return True

    # -- memory -------------------------------------------------------------------------------------------------------------

    def fill(self, offset: int, size: int) -> None:
        """Take memory for bytes of the segment; raises CapacityError if the file system is full."""
        fill_file(self._file, self.path, offset, size)
        take_huge_pages(self.address + offset, size)

    def pin(self, register: Callable[[int, int], object], unregister: Callable[[int], object]) -> None:
        """Let every device read the segment at the same address; again does nothing.

        Raises:
            CapacityError: it cannot be pinned, or the file system has too little memory for all of it.
            DeviceError: there is no device.   ClosedError: this process has left the segment.
        """
        with self._pinning:  # not in the writer's turn, for which all processes would wait as long as it takes
            if self._pinned is None:
                if self._file < 0:
                    raise self._left()
                self.fill(0, self.size)
                register(self.address, self.size)
                self._pinned = unregister

    def _left(self) -> ClosedError:
        return ClosedError(f"{self.path}: this process has left the segment")

    # -- the end ------------------------------------------------------------------------------------------------------------

    def leave(self) -> None:
        """One user less; after the last, this process leaves, and the last process removes the file if auto-remove is set."""
        with _attaching:
            self.users = max(0, self.users - 1)
            if self.users or self._file < 0:
                return
            try:
                for end in self.leaving:
                    end()
            finally:
                try:
                    with self._pinning, self._mutex:
                        self._remove_and_let_go()
                finally:
                    if self._file < 0 and _attached.get(self.path) is self:  # else an interrupt came: there is another attempt
                        del _attached[self.path]

    def _remove_and_let_go(self) -> None:
        try:
            if lock_within(self._file, WRITE_LOCK, LOCK_SECONDS) and self.words[W_AUTO_REMOVE]:
                self._remove_if_last()
        finally:
            self._let_go()

    def _remove_if_last(self) -> None:
        with self._block_mutex:
            if try_lock(self._file, BLOCK_LOCKS, BLOCKS) and self._is_named():
                self.path.unlink()

    def _is_named(self) -> bool:
        try:
            return os.path.samestat(os.fstat(self._file), self.path.stat())
        except FileNotFoundError:
            return False

    def _let_go(self) -> None:
        with self._block_mutex:
            if self._pinned is not None:
                self._pinned(self.address)
                self._pinned = None
            for block in self.blocks:
                self.records[block], self.pids[block] = 0, 0
            self.blocks = []
            cover(self.address, self.size)
            file, self._file = self._file, -1
            os.close(file)  # and with it every lock


_attaching = threading.RLock()
_attached: dict[Path, Segment] = {}


class _Attaching:
    def reset_after_fork(self) -> None:
        """A new lock: another thread of the parent may have held it."""
        global _attaching
        _attaching = threading.RLock()


_reset = _Attaching()
register_fork_reset(_reset)


@atexit.register
def _leave_all() -> None:
    """At the end of the process, for servers that nobody closed."""
    for segment in list(_attached.values()):
        segment.users = 1
        segment.leave()


def attach(name: str, size: int, *, auto_remove: bool) -> Segment:
    """The segment of a name, one for all its users in this process; each of them calls ``leave`` once.

    Raises:
        As ``open_segment``.
    """
    path = FOLDER / name
    with _attaching:
        segment = _attached.get(path)
        if segment is not None and not segment.users:  # an interrupt came before it was left, or in use
            segment.leave()
            segment = None
        if segment is None:
            segment = _attached[path] = Segment(path, size, auto_remove=auto_remove)
        check_auto_remove(segment.words, path, auto_remove)
        segment.users += 1
        return segment


def present_bytes(name: str) -> int:
    """Bytes of memory that the segment of a name has; 0 if there is none."""
    try:
        return 512 * (FOLDER / name).stat().st_blocks
    except OSError:
        return 0
