"""The file of a shared segment: made, opened, checked, mapped at its address, removed.

*One address for all.* Index blocks and headers hold addresses (``kernels.layouts.host_store``). So a segment is mapped at the
same address in every process: then the kernels of all of them, and those of their GPUs, read it as it is. Its creator takes an
address from a range that loaders and drivers leave alone, by a hash of the name, and notes it in the segment. A process in
which that is taken gets a typed error. Turned down: offsets instead of addresses, which every probe of every kernel would pay.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import os
import stat
from pathlib import Path

import numpy as np

from hps_numba.device.host_memory import human_bytes
from hps_numba.errors import CapacityError, ConfigError, TierUnavailable
from hps_numba.storage.shared.file_locks import is_supported, lock_within, try_lock
from hps_numba.storage.shared.layout import (
    BLOCK_LOCKS,
    BLOCKS,
    LAYOUT_VERSION,
    MAGIC,
    MAKING,
    PAGE,
    SPACE,
    W_ADDRESS,
    W_AUTO_REMOVE,
    W_CREATOR,
    W_CREATOR_START,
    W_EPOCH,
    W_LAYOUT,
    W_MAGIC,
    W_SERIAL,
    W_SIZE,
    WRITE_LOCK,
)

__all__ = [
    "LOCK_SECONDS",
    "check_auto_remove",
    "cover",
    "fill_file",
    "open_segment",
    "start_of",
    "take_huge_pages",
    "word_view",
]

#: how long a process waits for its turn before it says who keeps it
LOCK_SECONDS = 60.0
_FIRST_ADDRESS, _LAST_ADDRESS, _STEP = 16 << 40, 64 << 40, 1 << 30
_CANDIDATES = 16
_ATTEMPTS = 100
_MAP_FIXED, _MAP_FIXED_NOREPLACE, _MAP_NORESERVE = 0x10, 0x100000, 0x4000
_FILL_STEP = 64 << 20
_HUGE, _MADV_COLLAPSE = 2 << 20, 25
_FAILED = ctypes.c_void_p(-1).value


def open_segment(path: Path, size: int, *, auto_remove: bool) -> tuple[int, int, int]:
    """Open a segment, or make it with ``size`` bytes for tables; returns (file, address, bytes). Holds the ``WRITE_LOCK``.

    A segment that nobody uses and whose creator set auto-remove is created again.

    Raises:
        TierUnavailable: it belongs to another user, is open to others, is no segment or one of another layout, or cannot be
            mapped.
        ConfigError: its creator gave another ``shared_memory_auto_remove``.   CapacityError: no memory for it.
    """
    if not is_supported() or not hasattr(os, "posix_fallocate"):
        raise TierUnavailable(f"{path}: multi_process_hash_map needs Linux")
    for _ in range(_ATTEMPTS):
        file = _open(path)
        try:
            found = _opened(file, path, size, auto_remove)
        except BaseException:
            os.close(file)
            raise
        if found is not None:
            return file, *found
        os.close(file)
    raise TierUnavailable(f"{path}: expected a segment to open or make, got one that was removed {_ATTEMPTS} times meanwhile")


def _opened(file: int, path: Path, size: int, auto_remove: bool) -> tuple[int, int] | None:
    """Address and bytes of the segment in an open file; None if the file is one no more."""
    if not _is_current(file, path):  # removed by the last process that used it, since it was opened
        return None
    _check_owner(file, path)
    if os.fstat(file).st_size == 0 or _first_words(file)[W_MAGIC] == MAKING:  # new, or its maker died
        return _make(file, path, size, auto_remove), SPACE + _whole_pages(size)
    words = _checked_words(file, path, auto_remove)
    if words[W_AUTO_REMOVE] and try_lock(file, BLOCK_LOCKS, BLOCKS):  # all who used it died
        path.unlink()
        return None
    _map(file, path, int(words[W_ADDRESS]), int(words[W_SIZE]))
    return int(words[W_ADDRESS]), int(words[W_SIZE])


def _open(path: Path) -> int:
    try:
        file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW, 0o600)
    except OSError as problem:
        raise TierUnavailable(f"{path}: the shared segment cannot be opened: {problem.strerror}") from problem
    try:
        free = lock_within(file, WRITE_LOCK, LOCK_SECONDS)
    except BaseException:
        os.close(file)
        raise
    if not free:
        os.close(file)
        raise TierUnavailable(f"{path}: another process has kept the lock of the segment for {LOCK_SECONDS:g} s")
    return file


def _is_current(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def _check_owner(file: int, path: Path) -> None:
    """A segment of somebody else could lead this process anywhere."""
    given = os.fstat(file)
    if not stat.S_ISREG(given.st_mode) or given.st_uid != os.geteuid() or given.st_mode & 0o077:
        raise TierUnavailable(
            f"{path}: expected a file of user {os.geteuid()} with mode 0600, "
            f"got one of user {given.st_uid} with mode {stat.S_IMODE(given.st_mode):04o}"
        )


def _first_words(file: int) -> np.ndarray:
    page = os.pread(file, PAGE, 0)
    return np.frombuffer(page + bytes(PAGE - len(page)), np.int64)


def _checked_words(file: int, path: Path, auto_remove: bool) -> np.ndarray:
    words, size = _first_words(file), os.fstat(file).st_size
    if words[W_MAGIC] != MAGIC:
        raise TierUnavailable(f"{path}: expected a segment of hps_numba, got a file that begins with {words[:1].tobytes()!r}")
    if words[W_LAYOUT] != LAYOUT_VERSION:
        raise TierUnavailable(
            f"{path}: expected layout version {LAYOUT_VERSION}, got {words[W_LAYOUT]}: end the processes of the other version "
            "and remove the file, or give another shared_memory_name"
        )
    if words[W_SIZE] != size or words[W_ADDRESS] % PAGE or words[W_ADDRESS] <= 0:
        raise TierUnavailable(f"{path}: expected a segment of {words[W_SIZE]} bytes, got {size}: the file is damaged")
    check_auto_remove(words, path, auto_remove)
    return words


def check_auto_remove(words: np.ndarray, path: Path, auto_remove: bool) -> None:
    """Raise ConfigError unless the creator of a segment gave the same."""
    if bool(words[W_AUTO_REMOVE]) != auto_remove:
        expected, got = (str(bool(value)).lower() for value in (words[W_AUTO_REMOVE], auto_remove))
        raise ConfigError(f"shared_memory_auto_remove: expected {expected}, as the creator of {path} gave, got {got}")


def _make(file: int, path: Path, size: int, auto_remove: bool) -> int:
    """Lay out a new segment; what makes it one is written last."""
    total = SPACE + _whole_pages(size)
    try:
        try:
            os.ftruncate(file, 0)
            os.pwrite(file, MAKING.to_bytes(8, "little"), 0)
            os.ftruncate(file, total)
        except OSError as problem:
            raise CapacityError(f"{path}: no file of {human_bytes(total)} can be made: {problem.strerror}") from problem
        fill_file(file, path, 0, SPACE)
        address = _map_anywhere(file, path, total)
    except BaseException:
        path.unlink()
        raise
    words = word_view(address, PAGE // 8)
    words[[W_LAYOUT, W_ADDRESS, W_SIZE, W_AUTO_REMOVE]] = LAYOUT_VERSION, address, total, auto_remove
    words[[W_CREATOR, W_CREATOR_START]] = os.getpid(), start_of(os.getpid())
    words[W_EPOCH] = 1
    words[W_SERIAL] = 1 << 32  # no generation of a private store gets there
    words[W_MAGIC] = MAGIC
    return address


def fill_file(file: int, path: Path, start: int, size: int) -> None:
    """Take memory for a part of the file: a page that is not there when it is used would end the process.

    Raises:
        CapacityError: the file system is full.
    """
    for offset in range(start, start + size, _FILL_STEP):
        try:
            os.posix_fallocate(file, offset, min(_FILL_STEP, start + size - offset))
        except OSError as problem:
            system = os.statvfs(path.parent)
            free, of = (human_bytes(blocks * system.f_frsize) for blocks in (system.f_bavail, system.f_blocks))
            raise CapacityError(
                f"{path}: expected {human_bytes(size)} more of shared memory, got {problem.strerror}: {free} of {of} are free "
                f"in {path.parent} (Docker: --shm-size)"
            ) from problem


def take_huge_pages(address: int, size: int) -> None:
    """Let a filled part of a segment be in 2 MB pages where the system can: else random reads wait for address translation.

    Private memory asks for them before it is written; shared memory gets them only so unless the administrator changed
    ``shmem_enabled``. It is advice: a system that cannot (before Linux 6.1) serves as well.
    """
    start, end = -(-address // _HUGE) * _HUGE, (address + size) // _HUGE * _HUGE
    if end - start >= 2 * _HUGE:
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), ctypes.c_int(_MADV_COLLAPSE))


def word_view(address: int, count: int) -> np.ndarray:
    """int64 ``[count]`` at an address of the segment."""
    view: np.ndarray = np.frombuffer((ctypes.c_int64 * count).from_address(address), np.int64)  # type: ignore[call-overload]
    return view


def start_of(pid: int) -> int:
    """When a process started, in clock ticks since the machine did; 0 if there is none or the system does not tell."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


def _whole_pages(size: int) -> int:
    return -(-size // PAGE) * PAGE


def _mmap(file: int, address: int, size: int, flags: int) -> int | None:
    """The address, or None; ``ctypes.get_errno`` says why."""
    libc = ctypes.CDLL(None, use_errno=True)
    libc.mmap.restype = ctypes.c_void_p
    libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3, ctypes.c_int64]
    got: int = libc.mmap(address, size, mmap.PROT_READ | mmap.PROT_WRITE, flags, file, 0)
    if got != _FAILED and got != address:  # an old kernel takes the address for a hint
        libc.munmap(ctypes.c_void_p(got), ctypes.c_size_t(size))
        ctypes.set_errno(0)
        return None
    return None if got == _FAILED else got


_covered: dict[int, int] = {}  # address and bytes of mappings that were left


def _map(file: int, path: Path, address: int, size: int) -> None:
    """Map the file at an address; what this process left there takes it, of whatever size it was.

    Raises:
        TierUnavailable: something else is there.
    """
    end, replaced = address + size, _MAP_FIXED_NOREPLACE
    if _left_within(address, end):
        replaced = _MAP_FIXED
        for start, stop in _gaps(address, end):  # taken first, so that nothing else is replaced
            if not _take(start, stop - start, _MAP_FIXED_NOREPLACE):
                raise _no_place(path, address, size)
    if _mmap(file, address, size, mmap.MAP_SHARED | replaced) is None:
        raise _no_place(path, address, size)
    for start, length in _left_within(address, end):
        del _covered[start]
        if start < address:
            _covered[start] = address - start
        if end < start + length:
            _covered[end] = start + length - end


def _left_within(address: int, end: int) -> list[tuple[int, int]]:
    """Address and bytes of what was left and overlaps a range, ascending."""
    return [(start, length) for start, length in sorted(_covered.items()) if start < end and address < start + length]


def _gaps(address: int, end: int) -> list[tuple[int, int]]:
    """Beginning and end of the parts of a range that are not what was left."""
    gaps, place = [], address
    for start, length in [*_left_within(address, end), (end, 0)]:
        if place < start:
            gaps.append((place, start))
        place = start + length
    return gaps


def _no_place(path: Path, address: int, size: int) -> TierUnavailable:
    problem = ctypes.get_errno()
    why = os.strerror(problem) if problem else "something else is mapped there"
    return TierUnavailable(
        f"{path}: expected to map {human_bytes(size)} at {address:#x}, as its other processes do: {why}; "
        "open the server earlier, or give another shared_memory_name"
    )


def _map_anywhere(file: int, path: Path, size: int) -> int:
    """Map a new segment at the first of some addresses that is free; returns it."""
    digest = hashlib.sha256(str(path).encode()).digest()
    places = max(1, (_LAST_ADDRESS - _FIRST_ADDRESS - size) // _STEP)
    for candidate in range(_CANDIDATES):
        number = int.from_bytes(hashlib.sha256(digest + bytes([candidate])).digest()[:8], "little") % places
        address = _FIRST_ADDRESS + number * _STEP
        try:
            _map(file, path, address, size)
        except TierUnavailable:
            continue
        return address
    raise TierUnavailable(f"{path}: no address for {human_bytes(size)}: {_CANDIDATES} places are taken")


def cover(address: int, size: int) -> None:
    """Put empty private memory over a mapping: its pages are given back, and a late reader finds a closed store, no hole."""
    _take(address, size, _MAP_FIXED)


def _take(address: int, size: int, replaced: int) -> bool:
    """Keep an address range with memory that is empty and costs nothing; False if it is not free."""
    got = _mmap(-1, address, size, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | _MAP_NORESERVE | replaced)
    if got is not None:
        _covered[address] = size
    return got is not None
