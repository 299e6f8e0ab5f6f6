"""``files``: a folder as a bus, for trainers that write to a shared or synchronised file system; no server is needed.

One producer at a time writes files of messages, numbered without gaps, and then a manifest that has them. Any number of
consumers polls the manifest; each keeps its position in a file of its own. A file is read whole or not at all: one that is not
finished, because a synchroniser brings it later than the manifest, is waited for.

Formats and order of writing: ``_files``.
"""

from __future__ import annotations

import logging
import platform
import secrets
import time
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from typing import Any

from hps_numba.errors import ConfigError, TierError, TierUnavailable
from hps_numba.runtime.paths import settled_path
from hps_numba.updates._files.delta import NotWhole, delta_path, encode_delta, first_offset_of, number_of, read_delta
from hps_numba.updates._files.locks import HeldFile
from hps_numba.updates._files.manifest import (
    MANIFEST,
    Manifest,
    manifest_content,
    parse_manifest,
    read_manifest,
    write_manifest,
)
from hps_numba.updates._files.position import Place, PositionFile
from hps_numba.updates._files.writing import PARTIAL, put_file
from hps_numba.updates._producer import Outgoing, ProducerOptions, UpdateProducer
from hps_numba.updates._source import UpdateSource
from hps_numba.updates._update import Lost, Message, Position

__all__ = ["PLUGIN", "FilesProducer", "FilesSource", "Options"]

log = logging.getLogger(__name__)
_DELTA_BYTES = 64 << 20  # of messages in a file, or one message
_HANDED_OUT_BYTES = 4 << 20  # of messages that one ``poll`` returns


@dataclass(frozen=True, kw_only=True)
class FilesProducerOptions(ProducerOptions):
    """Keys of the producer.

    Attributes:
        folder: it is made if it is missing.
        max_files: that are kept; older ones are dropped, and who has not read them has lost them. 0 keeps all.
        sync: what ``flush`` returned for is on the disk, whatever happens to the machine.
    """

    folder: str
    max_files: int = 0
    sync: bool = True


class FilesProducer(UpdateProducer):
    """Writes deltas to a folder: one a call of ``flush``, and one every ``linger_ms`` while there are updates.

    Raises:
        TierUnavailable: another producer has the folder, or it cannot be written.   TierError: its manifest is damaged.
    """

    Options = FilesProducerOptions

    def __init__(self, options: Any) -> None:
        self._lock_of_folder: HeldFile | None = None
        super().__init__(options)
        if self.options.max_files < 0:
            raise ConfigError(f"max_files: expected at least 0, got {self.options.max_files}")
        self._folder = settled_path(self.options.folder, "folder", error=TierUnavailable)
        self._lock_of_folder = HeldFile(self._folder / "producer.lock", "one producer at a time")
        try:
            self._manifest = read_manifest(self._folder) or self._new_manifest()
            self._clear_unfinished()
        except BaseException:
            self._close()
            raise

    def _new_manifest(self) -> Manifest:
        known = next((path for path in self._folder.glob("delta-*.hps") if number_of(path) is not None), None)
        if known is not None:
            raise TierUnavailable(
                f"{self._folder}: expected a {MANIFEST} beside {known.name}, got none: bring it back, or move the files away"
            )
        made = Manifest(secrets.token_hex(16))
        try:
            write_manifest(self._folder, made, sync=self.options.sync)
        except OSError as problem:
            raise TierUnavailable(f"{self._folder}: cannot be written: {problem.strerror}") from problem
        return made

    def _clear_unfinished(self) -> None:
        """Remove what a producer that was killed has left, and files that were dropped."""
        manifest = self._manifest
        for path in self._folder.glob("delta-*"):
            number = number_of(path)
            if number is None or path.is_dir():  # somebody else's
                continue
            if path.suffix == PARTIAL or not manifest.first <= number < manifest.next:
                path.unlink(missing_ok=True)

    def _send(self, messages: Sequence[Outgoing]) -> int:
        if self._lock_of_folder is None or not self._lock_of_folder.held:
            raise TierUnavailable(f"{self._folder}: expected the process that opened it, got a child forked from it")
        count = size = 0
        while count < len(messages) and size < _DELTA_BYTES:
            size += messages[count].size
            count += 1
        old = self._manifest
        content = encode_delta(old.stream, old.next, old.next_offset, messages[:count])
        new = self._trimmed(replace(old, next=old.next + 1, next_offset=old.next_offset + count))
        try:
            put_file(delta_path(self._folder, old.next), content, sync=self.options.sync)
            write_manifest(self._folder, new, sync=self.options.sync)
        except OSError as problem:
            raise TierError(f"{self._folder}: cannot be written: {problem.strerror}") from problem
        self._manifest = new
        for number in range(old.first, new.first):
            delta_path(self._folder, number).unlink(missing_ok=True)
        return count

    def _trimmed(self, manifest: Manifest) -> Manifest:
        """Without the files beyond ``max_files``."""
        first = manifest.next - self.options.max_files
        if not self.options.max_files or first <= manifest.first:
            return manifest
        if first == manifest.next - 1:  # the file that is just being written
            return replace(manifest, first=first, first_offset=self._manifest.next_offset)
        try:
            return replace(manifest, first=first, first_offset=first_offset_of(delta_path(self._folder, first)))
        except TierError as problem:  # somebody has removed it
            log.warning("only the last file is kept: %s", problem)
            return replace(manifest, first=manifest.next - 1, first_offset=self._manifest.next_offset)

    def _close(self) -> None:
        if self._lock_of_folder is not None:
            self._lock_of_folder.release()


@dataclass(frozen=True)
class Options:
    """Keys of an ``update_source`` of this type.

    Attributes:
        folder: that the producer writes to; it may not be there yet.
        consumer: names the position of this server among those of others; by default the name of the host.
        position_file: where the position is kept; by default ``consumers/<consumer>.json`` in the folder. It is only needed,
            and only written, if reading resumes after what was applied before.
        poll_interval_ms: milliseconds between two looks at the manifest.
    """

    folder: str
    consumer: str = ""
    position_file: str = ""
    poll_interval_ms: float = 20.0


class FilesSource(UpdateSource):
    """Reads the deltas of a folder."""

    Options = Options
    Producer = FilesProducer

    def __init__(self, section: Any, *, resume: bool = True, key_bytes: int = 8) -> None:
        super().__init__(section, resume=resume, key_bytes=key_bytes)
        options: Options = self.options
        if options.poll_interval_ms <= 0:
            raise ConfigError(f"poll_interval_ms: expected more than 0, got {options.poll_interval_ms}")
        self.starts_over = True
        self._folder = settled_path(options.folder, "folder", error=TierUnavailable)
        self._wakes: SimpleQueue[None] = SimpleQueue()
        self._manifest: Manifest | None = None
        self._content: bytes | None = None  # what the manifest was made of
        self._ready: deque[Message] = deque()  # read, and not handed out yet
        self._read: deque[tuple[int, int]] = deque()  # number and first offset of files that were, and are not committed
        self._place: Place | None = None  # what ``_ready`` is followed by
        self._position: PositionFile | None = None
        if resume:
            name = options.consumer or platform.node() or "consumer"
            place = options.position_file or self._folder / "consumers" / f"{name}.json"
            self._position = PositionFile(settled_path(place, "position_file", error=TierUnavailable))
            self._place = self._position.read()

    def poll(self, seconds: float) -> Sequence[Message | Lost]:
        end = time.monotonic() + seconds
        while not self._ready:
            place = self._place
            lost = self._read_more()
            if lost is not None:
                return [lost]
            if self._place != place:  # a file of which everything was applied before
                continue
            left = end - time.monotonic()
            if left <= 0:
                break
            try:
                self._wakes.get(timeout=min(left, self.options.poll_interval_ms / 1000))
            except Empty:
                continue
            break
        return self._hand_out()

    def _hand_out(self) -> list[Message]:
        some: list[Message] = []
        size = 0
        while self._ready and size < _HANDED_OUT_BYTES:
            some.append(self._ready.popleft())
            size += some[-1].size
        manifest, place = self._manifest, self._place
        self.has_more = bool(self._ready) or (
            manifest is not None and place is not None and place.offset < manifest.next_offset
        )
        return some

    def _read_more(self) -> Lost | None:
        """Read the next files, if there are any, as many as ``poll`` hands out, or say that they are gone.

        Raises:
            TierError: the first of them is not whole, or cannot be read.
        """
        manifest = self._look()
        if manifest is None:
            return None
        place = self._place
        if place is None:
            place = self._place = Place(manifest.stream, manifest.first, manifest.first_offset)
        behind = manifest.stream == place.stream and place.offset <= manifest.next_offset
        if not behind or place.offset < manifest.first_offset:
            return self._start_again(manifest, place)
        size = 0
        while place.offset < manifest.next_offset and size < _HANDED_OUT_BYTES:
            try:
                messages, after = self._read_file(manifest, place)
            except TierError:
                if not self._ready:
                    raise
                break  # the next call tries again
            if after == place:  # it was dropped meanwhile
                break
            self._place = place = after
            self._ready.extend(messages)
            size += sum(message.size for message in messages)
        return None

    def _read_file(self, manifest: Manifest, place: Place) -> tuple[list[Message], Place]:
        """The messages of the file at a place, and the place behind it; the same place if it was dropped meanwhile.

        Raises:
            TierError: it is not whole, or cannot be read.
        """
        number = max(place.number, manifest.first)
        try:
            delta, messages = read_delta(delta_path(self._folder, number))
        except NotWhole as problem:
            if (self._look() or manifest).first > number:
                return [], place
            raise TierError(str(problem)) from None
        except OSError as problem:
            raise TierError(f"{delta_path(self._folder, number)}: cannot be read: {problem.strerror}") from problem
        if (delta.stream, delta.number) != (manifest.stream, number):
            raise TierError(f"{delta_path(self._folder, number)}: expected a file of this folder, got one of another")
        if self._position is not None:
            self._read.append((number, delta.first_offset))
        after = Place(manifest.stream, number + 1, max(place.offset, delta.first_offset + delta.messages))
        return [message for message in messages if message.position.offset >= place.offset], after

    def _start_again(self, manifest: Manifest, place: Place) -> Lost:
        """What comes next was dropped, or the folder is not what it was: go on with its first file."""
        self._read.clear()
        self._place = Place(manifest.stream, manifest.first, manifest.first_offset)
        same = manifest.stream == place.stream and place.offset < manifest.first_offset
        return Lost(Position(manifest.stream, manifest.first_offset), manifest.first_offset - place.offset if same else None)

    def start_over(self, lost: Sequence[Lost]) -> None:
        manifest = self._look()
        self._ready.clear()
        self._read.clear()
        if manifest is not None:  # the position is written with the next commit
            self._place = Place(manifest.stream, manifest.first, manifest.first_offset)

    def losses_handled(self) -> None:
        if self._position is not None and self._place is not None and not self._read:
            self._position.write(self._place)

    def _look(self) -> Manifest | None:
        """The manifest as it is now; None if there never was one."""
        content = manifest_content(self._folder)
        if content is not None and content != self._content:
            self._manifest = parse_manifest(self._folder, content)
            self._content = content
        return self._manifest

    def commit(self, positions: Sequence[Position]) -> None:
        if self._position is None:
            return
        for partition, offset in positions:
            while len(self._read) > 1 and self._read[1][1] <= offset + 1:
                self._read.popleft()
            if self._read and self._place is not None and partition == self._place.stream:
                self._position.write(Place(str(partition), self._read[0][0], offset + 1))

    def lag(self) -> int | None:
        manifest = self._look()
        if manifest is None or self._place is None:
            return None
        return max(0, manifest.next_offset - self._place.offset) + len(self._ready)

    def wake(self) -> None:
        self._wakes.put(None)

    def close(self) -> None:
        if self._position is not None:
            self._position.close()


PLUGIN = FilesSource
