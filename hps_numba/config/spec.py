"""One embedding table as the other packages see it: no JSON spelling, no lists, one value of each."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from hps_numba.runtime.paths import is_url

__all__ = ["TableSpec", "locate"]


@dataclass(frozen=True, kw_only=True)
class TableSpec:
    """One embedding table of one model.

    Attributes:
        model: name of the model.
        name: name of the table in its model.
        dim: elements in a row.
        table_id: position of the table in its model, from 0.
        default_value: float32 that fills the row of a key that no tier has.
        source: path or URI of the sparse model; relative paths were made absolute by :func:`locate`.
        max_keys: keys in one lookup that buffers are sized for (``max_batch_size`` x keys a sample).
        gpucacheper: fraction of the rows that the cache of a device keeps; used while ``cache_size_bytes`` is 0.
        cache_size_bytes: bytes of rows that the cache of a device keeps, or 0 for "by ``gpucacheper``".
        cache_policy: name of a built-in cache policy, or a reference to one of the user's own.
        cache_row_dtype: how a cache stores a row: float32, float16, bfloat16, int8 or float8_e4m3.
    """

    model: str
    name: str
    dim: int
    table_id: int = 0
    default_value: float = 0.0
    source: str = ""
    max_keys: int = 1
    gpucacheper: float = 0.2
    cache_size_bytes: int = 0
    cache_policy: str = "lru"
    cache_row_dtype: str = "float32"

    @property
    def tag(self) -> str:
        """The name of the table in every storage tier and update topic: ``hps_et.<model>.<table>``."""
        return f"hps_et.{self.model}.{self.name}"


def locate(source: str, folder: Path | None) -> str:
    """Where a sparse model lies: looked up in the working directory first, then in ``folder``.

    A path that is in neither is taken from the working directory, so that an error names the place the user expects.
    A URL (``s3://...``) is returned as it is. ``path#table`` is there if ``path`` is.
    """
    if is_url(source):
        return source
    here = Path.cwd() / source
    if folder is not None and not _exists(here) and _exists(folder / source):
        return str(folder / source)
    return str(here)


def _exists(path: Path) -> bool:
    try:
        whole, mark, _ = str(path).rpartition("#")
        return path.exists() or bool(mark and Path(whole).exists())
    except OSError:  # a name too long for the file system, or a folder that may not be searched
        return False
