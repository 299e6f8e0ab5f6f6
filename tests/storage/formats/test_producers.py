"""What other systems write: SOK, TFRA, dynamicemb, TorchRec, NVE and plain matrices (rows F13 and F15)."""

from __future__ import annotations

import pickle
import struct
import zipfile
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
from support.producers import (
    PRODUCERS,
    ROW_NUMBERS,
    nve_bytes,
    save_dynamicemb,
    save_nve,
    save_sok,
    save_tfra,
    save_torch,
    sok_header,
)
from support.sample_models import failure, part, path_for, sample

from hps_numba.errors import ModelFileError
from hps_numba.storage import SparseModelFormat
from hps_numba.storage.model_files import convert_model, formats, open_model, write_model
from hps_numba.testing import FormatContract
from hps_numba.testing.formats import Arrays, read_all


def shape(path: Path | str, dim: int | None = None) -> tuple[int, int]:
    """Rows and width of a model."""
    with open_model(path, dim) as model:
        return model.rows, model.dim


class ProducerContract(FormatContract):
    """The suite for formats that this package only reads."""

    names: ClassVar[list[str]]

    def save(self, tested: SparseModelFormat, path: Path, keys: np.ndarray, rows: np.ndarray, meta: np.ndarray | None) -> None:
        PRODUCERS[tested.name](path, keys, rows, meta)

    def sample(self, n: int, dim: int, *, meta: bool = True) -> Arrays:
        keys, rows, found = super().sample(n, dim, meta=meta)
        return (np.arange(n) if isinstance(self, TestRowNumbers) else keys), rows, found


class TestKeysAndRows(ProducerContract):
    has_meta = False

    @pytest.fixture(params=["sok", "tfra"])
    def tested(self, request: pytest.FixtureRequest) -> SparseModelFormat:
        return part(request.param)


class TestKeysRowsAndScores(ProducerContract):
    format = part("dynamicemb")


class TestRowNumbers(ProducerContract):
    has_meta = False

    @pytest.fixture(params=sorted(ROW_NUMBERS))
    def tested(self, request: pytest.FixtureRequest) -> SparseModelFormat:
        return part(request.param)


class TestMatrixOfNumpy(TestRowNumbers):
    """``np.save`` of a matrix: the keys are its row numbers."""

    @pytest.fixture(params=["npy"])
    def tested(self, request: pytest.FixtureRequest) -> SparseModelFormat:
        return part(request.param)

    def save(self, tested: SparseModelFormat, path: Path, keys: np.ndarray, rows: np.ndarray, meta: np.ndarray | None) -> None:
        with path.open("wb") as file:
            np.save(file, rows)


def test_every_producer_has_a_contract() -> None:
    assert set(PRODUCERS) == {"sok", "tfra", "dynamicemb", *ROW_NUMBERS}


@pytest.mark.parametrize("name", sorted(PRODUCERS))
def test_only_one_format_detects_it_whatever_its_name(name: str, tmp_path: Path) -> None:
    keys, rows, _ = sample(8, 3)
    for number, suffix in enumerate(("", ".model", ".npz", ".npy", ".h5", ".xyz")):
        path = tmp_path / f"{number}{suffix}"
        PRODUCERS[name](path, keys, rows, None)
        assert [found.name for found in formats() if found.detect(path)] == [name]


@pytest.mark.parametrize("name", sorted(PRODUCERS))
def test_it_is_converted(name: str, tmp_path: Path) -> None:
    keys, rows, _ = sample(50, 7)
    path = path_for(tmp_path, name)
    PRODUCERS[name](path, keys, rows, None)
    assert convert_model(path, tmp_path / "copy", chunk_rows=13) == 50
    expected = np.arange(50) if name in ROW_NUMBERS else keys
    assert (tmp_path / "copy" / "key").read_bytes() == expected.astype(np.int64).tobytes()
    assert (tmp_path / "copy" / "emb_vector").read_bytes() == rows.tobytes()


@pytest.mark.parametrize("name", sorted(PRODUCERS))
def test_a_file_that_is_cut_short_anywhere_is_an_error(name: str, tmp_path: Path) -> None:
    keys, rows, _ = sample(25, 4)
    path = path_for(tmp_path, name)
    PRODUCERS[name](path, keys, rows, None)
    files = [path] if path.is_file() else sorted(path.iterdir())
    for file in files:
        whole = file.read_bytes()
        for size in sorted({0, 1, 3, len(whole) // 3, len(whole) // 2, len(whole) - 8, len(whole) - 4, len(whole) - 1}):
            file.write_bytes(whole[:size])
            assert str(tmp_path) in failure(path, 4)
        file.write_bytes(whole)
    assert shape(path, 4) == (25, 4)


# -- several tables -------------------------------------------------------------------------


def test_one_of_several_tables_is_named_after_a_hash(tmp_path: Path) -> None:
    one, other = sample(5, 3), sample(7, 2)
    save_sok(tmp_path / "dump", *one[:2], table="t_0")
    save_sok(tmp_path / "dump", *other[:2], table="t_1")
    (tmp_path / "dump" / "meta_info").write_bytes(b"\0\0\0\2")
    (tmp_path / "dump" / "t_0-Adam-m").write_bytes(sok_header("t_0", 2, "float32", "m") + one[1].tobytes())
    assert "expected one table, or the name of one as" in failure(tmp_path / "dump")
    assert failure(tmp_path / "dump").endswith("found t_0, t_1")
    for table, (keys, rows, _) in (("t_0", one), ("t_1", other)):
        with open_model(f"{tmp_path}/dump#{table}", rows.shape[1]) as model:
            assert str(model.path).endswith(f"#{table}")
            assert read_all(model)[0].tolist() == keys.tolist()
    with pytest.raises(ModelFileError, match="has no table 't_2', found t_0, t_1"):
        open_model(tmp_path / "dump#t_2")


def test_a_file_whose_name_has_a_hash_is_that_file(tmp_path: Path) -> None:
    keys, rows, _ = sample(5, 3)
    save_sok(tmp_path / "a#b", keys, rows)
    assert shape(tmp_path / "a#b") == (5, 3)
    assert shape(tmp_path / "a#b#table0") == (5, 3)
    assert "no such file" in failure(tmp_path / "c#b")


def test_a_format_of_one_table_takes_no_name(tmp_path: Path) -> None:
    np.save(tmp_path / "a.npy", np.zeros((2, 2), np.float32))
    with pytest.raises(ModelFileError, match="expected a path without '#t', as format npy holds one table"):
        open_model(tmp_path / "a.npy#t")


# -- SOK ------------------------------------------------------------------------------------


@pytest.mark.parametrize("key_dtype", ["int32", "int64", "uint32", "uint64"])
@pytest.mark.parametrize("row_dtype", ["float16", "float32", "float64"])
def test_dtypes_of_sok(key_dtype: str, row_dtype: str, tmp_path: Path) -> None:
    keys = np.array([0, 3, np.iinfo(key_dtype).max >> (key_dtype == "uint64")], key_dtype)
    rows = np.array([[1, 2], [0.1, -4], [5, 6]], row_dtype)
    save_sok(tmp_path / "dump", keys, rows)
    with open_model(tmp_path / "dump", 2) as model:
        got = read_all(model, [1])
    assert got[0].tolist() == keys.tolist() and got[1].tobytes() == rows.astype(np.float32).tobytes()


def test_headers_of_sok_are_checked(tmp_path: Path) -> None:
    keys, rows, _ = sample(5, 3)
    for ending, head, data, expected in (
        ("weight", sok_header("t", 2, "float32"), rows, "expected kind 1, a file of rows, got a file of optimizer state"),
        ("weight", sok_header("t", 7, "float32"), rows, "expected kind 1, a file of rows, got 7"),
        ("weight", sok_header("t", 1, "float32")[:-1] + b"\x63", rows, "expected a dtype of 0..6, got 99"),
        ("weight", sok_header("t", 1, "int64"), rows.astype(np.int64), "emb_vector: expected float32"),
        ("key", sok_header("t", 1, "int64"), keys, "expected kind 0, a file of keys, got a file of rows"),
        (
            "key",
            sok_header("t", 0, "float32"),
            keys.astype(np.float32),
            "key: expected int64 or another integer dtype, got float32",
        ),
    ):
        save_sok(tmp_path / "dump", keys, rows, "t")
        (tmp_path / "dump" / f"t-{ending}").write_bytes(head + data.tobytes())
        assert expected in failure(tmp_path / "dump")
    (tmp_path / "dump" / "t-weight").unlink()
    save_sok(tmp_path / "dump", keys, rows, "u")
    with pytest.raises(ModelFileError, match="t-weight: no such file"):
        open_model(tmp_path / "dump#t")


# -- TFRA -----------------------------------------------------------------------------------


def test_shards_of_tfra_are_one_table(tmp_path: Path) -> None:
    keys, rows, _ = sample(40, 3)
    cuts = [0, 13, 13, 20, 40]
    for part_of, (rank, device) in enumerate(((0, 1), (0, 2), (1, 1), (1, 2))):
        chosen = slice(cuts[part_of], cuts[part_of + 1])
        save_tfra(tmp_path / "d", keys[chosen], rows[chosen], f"user_mht_{device}of2_rank{rank}_size2")
    with open_model(tmp_path / "d") as model:  # a shard without rows says nothing of the width
        got = read_all(model, [5, 15, 33])
    assert got[0].tolist() == keys.tolist() and got[1].tobytes() == rows.tobytes()
    save_tfra(tmp_path / "d", keys, rows[:, :2], "item_mht_1of1")
    save_tfra(tmp_path / "d", keys, rows, "plain")
    assert failure(tmp_path / "d").endswith("found item, plain, user")
    assert shape(tmp_path / "d#item") == (40, 2) and shape(tmp_path / "d#plain") == (40, 3)
    (tmp_path / "d" / "user_mht_2of2_rank0_size2-keys").unlink()
    with pytest.raises(
        ModelFileError, match="table 'user': expected 2 x 2 parts, ranks x devices, got user_mht_1of2_rank0_size2"
    ):
        open_model(tmp_path / "d#user")
    save_tfra(tmp_path / "d", keys, rows, "user_mht_1of1_rank0_size1")
    with pytest.raises(ModelFileError, match="expected the parts of one dump, got those of 1 x 1 and 2 x 2"):
        open_model(tmp_path / "d#user")


def test_shards_of_different_widths(tmp_path: Path) -> None:
    keys, rows, _ = sample(12, 4)
    save_tfra(tmp_path / "d", keys, rows, "u_mht_1of2")
    save_tfra(tmp_path / "d", keys, rows[:, :3], "u_mht_2of2")
    assert "u_mht_2of2-values: emb_vector: expected rows of width 4, 48 values for 12 keys, got 3, 36" in failure(
        tmp_path / "d"
    )


@pytest.mark.parametrize(
    ("keys", "rows", "hint"),
    [
        (np.arange(10), np.ones((10, 4), np.float16), "are these float16 rows?"),
        (np.arange(10, dtype=np.int32), np.ones((10, 4), np.float32), "are the keys int32?"),
        (np.arange(11, dtype=np.int32), np.ones((11, 4), np.float32), "are these int32 keys?"),
    ],
)
@pytest.mark.parametrize("save", [save_tfra, save_dynamicemb])
def test_sizes_of_other_dtypes_are_named(save: Any, keys: np.ndarray, rows: np.ndarray, hint: str, tmp_path: Path) -> None:
    save(tmp_path / "d", keys, rows)
    assert failure(tmp_path / "d", 4).endswith(hint)


# -- dynamicemb -----------------------------------------------------------------------------


def test_ranks_of_dynamicemb_are_one_table_and_scores_are_meta(tmp_path: Path) -> None:
    keys, rows, scores = sample(40, 3)
    for rank, chosen in enumerate((slice(0, 30), slice(30, 40))):
        save_dynamicemb(tmp_path / "d", keys[chosen], rows[chosen], scores[chosen], rank=rank, ranks=2)
    (tmp_path / "d" / "user_opt_args.json").write_text("{}")
    (tmp_path / "d" / "user_opt_values.rank_0.world_size_2").write_bytes(bytes(12))
    with open_model(tmp_path / "d", 3) as model:
        got = read_all(model, [28, 33])
    assert got[0].tolist() == keys.tolist() and got[1].tobytes() == rows.tobytes()
    assert got[2] is not None and got[2].tolist() == scores.tolist()
    (tmp_path / "d" / "user_emb_scores.rank_1.world_size_2").unlink()
    assert "user_emb_scores.rank_1.world_size_2: no such file" in failure(tmp_path / "d", 3)
    (tmp_path / "d" / "user_emb_scores.rank_0.world_size_2").write_bytes(bytes(8))
    save_dynamicemb(tmp_path / "d", keys[30:], rows[30:], scores[30:], rank=1, ranks=2)
    assert "user_emb_scores.rank_0.world_size_2: expected 8 * 30 bytes (int64) for 30 keys, got 8" in failure(tmp_path / "d", 3)
    (tmp_path / "d" / "user_emb_keys.rank_1.world_size_2").unlink()
    assert "table 'user': expected 2 x 1 parts" in failure(tmp_path / "d", 3)


# -- NVE ------------------------------------------------------------------------------------


def test_layers_of_nve_are_tables(tmp_path: Path) -> None:
    one, other = np.ones((3, 2), np.float32), np.full((4, 5), 2, np.float32)
    (tmp_path / "a.nve").write_bytes(nve_bytes((7, one), (2**63, other)))
    assert failure(tmp_path / "a.nve").endswith(f"found 7, {2**63}")
    with open_model(tmp_path / f"a.nve#{2**63}") as model:
        got = read_all(model)
    assert got[0].tolist() == [0, 1, 2, 3] and got[1].tobytes() == other.tobytes()


def test_half_types_of_nve_are_told_apart_by_its_metadata(tmp_path: Path) -> None:
    values = np.array([[1.0, -2.5], [0.15625, 3.0]], np.float32)
    halves = {"float16": values.astype(np.float16), "bfloat16": (values.view(np.uint32) >> 16).astype(np.uint16)}
    for name, stored in halves.items():
        with open_model(save_nve(tmp_path / name, stored, name)) as model:
            assert read_all(model)[1].tobytes() == values.tobytes()
    stored = halves["float16"]
    assert "metadata.json, which tells float16 from bfloat16, found none" in failure(save_nve(tmp_path / "none", stored))
    assert "which metadata.json says are int16" in failure(save_nve(tmp_path / "ints", stored, "int16"))
    path = save_nve(tmp_path / "broken", stored, "float16")
    (tmp_path / "broken" / "metadata.json").write_text("[")
    with pytest.raises(ModelFileError, match=r"metadata\.json: expected layers with id and dtype"):
        open_model(path)


def test_headers_of_nve_are_checked(tmp_path: Path) -> None:
    path, whole = tmp_path / "a.nve", nve_bytes((7, np.ones((3, 2), np.float32)))
    for data, expected in (
        (
            whole[:4] + struct.pack("<II", 1, 0) + whole[12:],
            "expected 0x4e564500 and version 0.2, got 0x4e564500 and version 1.0",
        ),
        (whole + b"\0", "expected an entry of 32 bytes at byte 68, got a file of 69"),
        (whole[:12] + struct.pack("<Q", 2**64 - 1) + whole[20:], "layer 7: expected"),
        (whole[:28] + struct.pack("<Q", 12) + whole[36:], "layer 7: expected 24 bytes"),
        (nve_bytes((7, np.ones((3, 2), np.float32))) + nve_bytes((7, np.ones((3, 2), np.float32)))[12:], "to"),
    ):
        path.write_bytes(data)
        assert expected in failure(path)
    path.write_bytes(struct.pack("<III", 0x4E564500, 0, 2))
    assert failure(path).endswith("found none")


# -- Torch ----------------------------------------------------------------------------------


def test_tables_of_torchrec(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    user, item = torch.randn(10, 4), torch.randn(6, 2).bfloat16()
    state = {
        "sparse.embedding_bags.user.weight": torch.nn.Parameter(user),
        "sparse.embeddings.item.weight": item,
        "over_arch.0.weight": torch.randn(3, 3),
        "over_arch.0.bias": torch.randn(3),
    }
    save_torch(tmp_path / "a.pt", {"model": state, "step": 4, "names": ["x"], "lr": 0.1, "flags": (True, None)})
    assert failure(tmp_path / "a.pt").endswith("found item, user")
    with open_model(tmp_path / "a.pt#user", 4) as model:
        got = read_all(model, [3])
    assert got[0].tolist() == list(range(10)) and got[1].tobytes() == user.numpy().tobytes()
    with open_model(tmp_path / "a.pt#item") as model:
        assert read_all(model)[1].tobytes() == item.float().numpy().tobytes()
    assert shape(tmp_path / "a.pt#model.over_arch.0.weight") == (3, 3)
    with pytest.raises(ModelFileError, match=r"has no table 'other', found item, model\.over_arch\.0\.weight"):
        open_model(tmp_path / "a.pt#other")


def test_matrices_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_torch(tmp_path / "one.pt", torch.nn.Embedding(5, 3).state_dict())
    assert shape(tmp_path / "one.pt") == (5, 3)
    whole = torch.arange(24.0).reshape(8, 3)
    save_torch(tmp_path / "view.pt", {"t": whole[2:5]})
    with open_model(tmp_path / "view.pt") as model:
        assert read_all(model)[1].tolist() == whole[2:5].tolist()
    for name, tensor, expected in (
        ("transposed", whole.t(), "expected a contiguous tensor, got strides"),
        ("integers", whole.long(), "expected a tensor of float32, float16, bfloat16 or float64, got Long"),
        ("none", whole[0], "found none"),
    ):
        save_torch(tmp_path / f"{name}.pt", {"t": tensor})
        assert expected in failure(tmp_path / f"{name}.pt")
    save_torch(tmp_path / "two.pt", {"a": {"embeddings.t.weight": whole}, "b": {"embeddings.t.weight": whole}})
    assert failure(tmp_path / "two.pt").endswith("found a.embeddings.t.weight, b.embeddings.t.weight")


class _Harmful:
    def __reduce__(self) -> Any:
        return Path.touch, (Path("harm"),)


def test_a_checkpoint_never_runs_code(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, content in (("call", _Harmful()), ("class", {"t": Path("x")}), ("garbage", None)):
        path = tmp_path / f"{name}.pt"
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("a/data.pkl", b"\x80\x02garbage." if content is None else pickle.dumps(content))
        message = failure(path)
        assert "cannot be read" in message or "expected plain tensors in dicts and lists, got a pathlib" in message
    assert not (tmp_path / "harm").exists()


def test_a_pickle_that_leads_in_circles(tmp_path: Path) -> None:
    circle: dict[str, Any] = {}
    circle.update({str(number): circle for number in range(100)})
    with zipfile.ZipFile(tmp_path / "a.pt", "w") as archive:
        archive.writestr("a/data.pkl", pickle.dumps(circle))
    assert failure(tmp_path / "a.pt").endswith("found none")


def test_damaged_descriptions_of_torch(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    save_torch(tmp_path / "a.pt", {"t": torch.ones(20, 4)})
    with zipfile.ZipFile(tmp_path / "a.pt") as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    storage = next(name for name in members if name.endswith("/data/0"))
    for change, expected in (
        ({storage: bytes(100)}, "expected 320 bytes for [20, 4], got 100"),
        ({storage: None}, "data/0"),
        ({storage.replace("data/0", "byteorder"): b"big"}, "expected little-endian tensors"),
    ):
        with zipfile.ZipFile(tmp_path / "b.pt", "w") as archive:
            for name, content in {**members, **change}.items():
                if content is not None:
                    archive.writestr(name, content)
        assert expected in failure(tmp_path / "b.pt")
    with zipfile.ZipFile(tmp_path / "c.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    assert "expected a stored member" in failure(tmp_path / "c.pt")


# -- matrices -------------------------------------------------------------------------------


def test_matrices_of_numpy(tmp_path: Path) -> None:
    np.save(tmp_path / "half.npy", np.eye(3, dtype=np.float16))
    with open_model(tmp_path / "half.npy", 3) as model:
        got = read_all(model)
    assert got[0].tolist() == [0, 1, 2] and got[1].tolist() == np.eye(3).tolist()
    for name, array, expected in (
        ("vector", np.zeros(3, np.float32), "expected two dimensions, rows by their keys 0, 1, 2, ..., got shape [3]"),
        ("integers", np.zeros((3, 3), np.int64), "emb_vector: expected float32"),
        ("columns", np.zeros((3, 3), order="F"), "is stored by columns"),
    ):
        np.save(tmp_path / f"{name}.npy", array)
        assert expected in failure(tmp_path / f"{name}.npy")


@pytest.mark.parametrize("name", [*sorted(PRODUCERS), "npy"])
def test_what_others_wrote_is_never_overwritten(name: str, tmp_path: Path) -> None:
    keys, rows, _ = sample(5, 3)
    path = tmp_path / "a"
    if name == "npy":
        with path.open("wb") as file:
            np.save(file, rows)
    else:
        PRODUCERS[name](path, keys, rows, None)
    with pytest.raises(ModelFileError, match=r"which is not part of a sparse model|may hold more than one sparse model"):
        write_model(path, 3, [(keys, rows)], format="hdf5", overwrite=True)
    assert shape(path, 3) == (5, 3)
