"""``hps-numba generate requests``: the JSON of Perf Analyzer, HugeCTR's options, and keys of the distributions."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.inference_server import Behaviour, inference_server
from support.inference_servers import serving
from support.oracles import rows_of
from support.triton import perf_analyzer
from typer.testing import CliRunner, Result

from hps_numba import write_model
from hps_numba.cli import build
from hps_numba.simulate.workloads import KEY_DISTRIBUTIONS

HUGECTR = ("--dense_dim", 13, "--sparse_dims", "2,26", "--num_unique_keys", "10000,250000")


def hps(*words: object) -> Result:
    return CliRunner().invoke(build(), ["generate", "requests", *map(str, words)])


@pytest.fixture
def made(tmp_path: Path) -> Callable[..., list[dict[str, dict[str, Any]]]]:
    """Runs the command, and returns the requests in the file."""

    def make(*words: object) -> list[dict[str, dict[str, Any]]]:
        path = tmp_path / "requests.json"
        result = hps("--output_path", path, *words)
        assert result.exit_code == 0, result.output
        content = json.loads(path.read_text())
        assert list(content) == ["data"]
        return content["data"]

    return make


def arrays(requests: list[dict[str, dict[str, Any]]], name: str) -> np.ndarray:
    """All values of an input, checked to be flat lists of the size of their shapes."""
    for request in requests:
        assert set(request[name]) == {"content", "shape"}
        assert len(request[name]["content"]) == np.prod(request[name]["shape"])
    return np.array([request[name]["content"] for request in requests])


def refused(*words: object, code: int = 2) -> str:
    result = hps(*words)
    assert result.exit_code == code and result.stdout == "", result.output
    (line,) = result.stderr.splitlines()
    assert line.startswith("error: ")
    return line


def test_hugectrs_options_and_defaults(made: Callable[..., Any]) -> None:
    requests = made(*HUGECTR)
    assert len(requests) == 10 and all(list(request) == ["DES", "CATCOLUMN", "ROWINDEX"] for request in requests)
    dense, keys, offsets = (arrays(requests, name) for name in requests[0])
    assert dense.shape == (10, 64 * 13) and dense.min() >= 0 and dense.max() < 1
    assert all(float(str(np.float32(value))) == value for value in dense[0]), "shortest digits of a float32"
    assert keys.shape == (10, 64 * 28)
    wide, deep = keys[:, : 64 * 2], keys[:, 64 * 2 :]
    assert wide.min() >= 0 and wide.max() < 10_000 < deep.max() < 250_000
    assert np.array_equal(offsets, [[*range(64 * 2 + 1), *range(64 * 26 + 1)]] * 10)


def test_every_option_of_hugectr(made: Callable[..., Any]) -> None:
    names = ("--dense_name", "d", "--sparse_name", "s", "--rowoffset_name", "r")
    size = ("--num_batch", 3, "--batch_size", 5, "--int64_key", "false")
    requests = made(*HUGECTR, *names, *size, "--powerlaw", "--alpha", 1.5)
    assert [list(request) for request in requests] == [["d", "s", "r"]] * 3
    assert arrays(requests, "s").shape == (3, 5 * 28)
    same = made(*[str(word).replace("_", "-") if str(word).startswith("--") else word for word in (*HUGECTR, *names, *size)],
                "--powerlaw", "true", "--alpha", 1.5, "--overwrite")  # fmt: skip
    assert same == requests


@pytest.mark.parametrize(
    ("words", "name", "options"),
    [
        ((), "hotkey", {"percentage": 0.2, "coverage": 0.8}),
        (
            ("--powerlaw", "0", "--hot_key_percentage", 0.1, "--hot_key_coverage", 0.5),
            "hotkey",
            {"percentage": 0.1, "coverage": 0.5},
        ),
        (("--powerlaw", "--alpha", 1.1), "powerlaw", {"alpha": 1.1}),
        (("--distribution", "histogram", "--weights", "1,3"), "histogram", {"weights": [1, 3]}),
        (("--distribution", "uniform"), "uniform", {}),
    ],
    ids=["default", "hotkey", "powerlaw", "histogram", "uniform"],
)
def test_keys_are_of_the_distribution(made: Callable[..., Any], words: tuple[object, ...], name: str, options: Any) -> None:
    table = ("--dense-dim", 0, "--sparse-dims", "3,1", "--num-unique-keys", "1000,50")
    requests = made(*table, "--batch-size", 2000, "--num-batch", 2, "--seed", 4, *words)
    keys = arrays(requests, "CATCOLUMN")
    drawn = KEY_DISTRIBUTIONS[name]
    first, second = np.random.default_rng([4, 0]), np.random.default_rng([4, 1])
    for request in keys:
        np.testing.assert_array_equal(request[:6000], drawn(1000, 6000, rng=first, **options))
        np.testing.assert_array_equal(request[6000:], drawn(50, 2000, rng=second, **options))
    share = (keys[:, :6000] < 200).mean()  # independent of the sampler: what the definition says of the first fifth
    expected = {"hotkey": 0.8, "histogram": 0.25 * 0.4, "uniform": 0.2}
    if name in expected and options.get("percentage", 0.2) == 0.2:
        assert share == pytest.approx(expected[name], abs=0.02)
    assert name != "powerlaw" or share > 0.6


@pytest.fixture
def config(tmp_path: Path) -> Path:
    """Model ``b`` with tables ``user`` and ``item``, whose keys are not 0 .. n - 1; and another before it."""
    keys = {"user": np.arange(5) * 1000 - 2000, "item": np.array([2**40, 2**40 + 7])}
    for name, some in keys.items():
        write_model(tmp_path / f"{name}.model", 2, [(some, rows_of(some, 2))])
    entry = {
        "sparse_files": ["user.model", "item.model"],
        "embedding_table_names": ["user", "item"],
        "embedding_vecsize_per_table": [2, 2],
        "maxnum_catfeature_query_per_table_per_sample": [3, 1],
        "default_value_for_each_table": [0.0, 0.0],
        "deployed_device_list": [],
    }
    models = [{"model": name, **entry} for name in "ab"]
    (tmp_path / "ps.json").write_text(json.dumps({"supportlonglong": True, "models": models}))
    return tmp_path / "ps.json"


def test_tables_and_keys_of_a_config(made: Callable[..., Any], config: Path) -> None:
    words = ("--config", config, "--model", "b", "--batch-size", 20, "--num-batch", 4, "--distribution", "uniform")
    requests = made(*words)
    assert [list(request) for request in requests] == [["KEYS", "NUMKEYS"]] * 4
    keys, counts = arrays(requests, "KEYS"), arrays(requests, "NUMKEYS")
    assert counts.tolist() == [[60, 20]] * 4 and set(keys[:, :60].flat) == {-2000, -1000, 0, 1000, 2000}
    assert set(keys[:, 60:].flat) == {2**40, 2**40 + 7}
    named = made(*words, "--form", "named", "--overwrite")
    assert [list(request) for request in named] == [["user", "item"]] * 4
    np.testing.assert_array_equal(np.hstack([arrays(named, "user"), arrays(named, "item")]), keys)
    other = made(*words, "--sparse-dims", "1,2", "--num-unique-keys", "9,9", "--overwrite")
    assert arrays(other, "NUMKEYS").tolist() == [[20, 40]] * 4 and set(arrays(other, "KEYS").flat) == set(range(9))


def test_the_report(tmp_path: Path) -> None:
    words = ("--output_path", tmp_path / "r.json", *HUGECTR, "--powerlaw")
    assert "10 requests of 64 samples and 1,792 keys, hugectr, powerlaw" in hps(*words).stdout
    facts = json.loads(hps(*words, "--overwrite", "--json").stdout)
    assert facts["bytes"] == (tmp_path / "r.json").stat().st_size and facts["keys"] == 64 * 28
    assert facts["tables"]["table1"] == {"keys_of_sample": 26, "distribution": "powerlaw", "alpha": 1.2, "table_size": 250_000}


def test_only_requests_are_replaced(tmp_path: Path) -> None:
    path = tmp_path / "r.json"
    words = ("--output-path", path, *HUGECTR)
    assert hps(*words).exit_code == 0
    assert "pass --overwrite" in refused(*words, code=1)
    path.write_text("my diary")
    assert "not a file of requests" in refused(*words, "--overwrite", code=1) and path.read_text() == "my diary"
    assert "a directory" in refused("--output-path", tmp_path, *HUGECTR, code=1)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--dense-dim", 1, "--sparse-dims", "1"), "--num-unique-keys: expected a number for each table"),
        (("--sparse-dims", "1", "--num-unique-keys", "1"), "--dense-dim: expected a number"),
        ((*HUGECTR, "--num-unique-keys", "5"), "expected one for each of the 2 tables, got 1"),
        ((*HUGECTR, "--sparse-dims", "0,1"), "expected numbers of 1 to"),
        ((*HUGECTR, "--powerlaw", "--alpha", "0"), "alpha: expected a finite number above 0"),
        ((*HUGECTR, "--powerlaw=maybe"), "expected true or false, got 'maybe'"),
        ((*HUGECTR, "--int64_key", "0", "--num_unique_keys", f"5,{2**31 + 1}"), "expected keys of 32 bits in table1"),
        ((*HUGECTR, "--sparse_name", "DES"), "expected a different name for each input"),
        ((*HUGECTR, "--form", "odd"), "expected one of hugectr, flat, named"),
        ((*HUGECTR, "--form", "flat"), "--dense-dim: is an option for --form hugectr only"),
        ((*HUGECTR, "--table-names", "a,b"), "--table-names: is an option for --form named"),
        ((*HUGECTR, "--model", "m"), "--model: is an option for --config only"),
        ((*HUGECTR, "--batch-size", 2**24), "keys in a request"),
    ],
)  # fmt: skip
def test_usage_errors(tmp_path: Path, words: tuple[object, ...], message: str) -> None:
    assert message in refused("--output-path", tmp_path / "r.json", *words).replace("Invalid value for ", "").replace(
        "'--", "--"
    ).replace("':", ":")
    assert not list(tmp_path.iterdir())


def analyze(address: str, model: str, path: Path) -> None:
    """Run Perf Analyzer until it has measured one window, however busy the machine is."""
    short = ("--measurement-interval", "200", "--stability-percentage", "999", "--max-trials", "20")
    printed = perf_analyzer("-m", model, "-u", address, "-i", "http", "--input-data", str(path), *short)
    assert "Throughput" in printed and "error" not in printed


@pytest.mark.parametrize("form", ["flat", "named"])
def test_perf_analyzer_sends_them(tmp_path: Path, form: str) -> None:
    path = tmp_path / "r.json"
    names = ("--table-names", "user,item") if form == "named" else ()
    assert (
        hps("--output-path", path, "--form", form, *names, "--sparse-dims", "2,3", "--num-unique-keys", "100,2000").exit_code
        == 0
    )
    written = json.loads(path.read_text())["data"]
    with inference_server(Behaviour(named=form == "named")) as server:
        analyze(f"127.0.0.1:{server.port}", "wdl", path)
        sent = server.behaviour.seen[: len(written)]
    for request, tensors in zip(written, sent, strict=True):
        assert set(request) == set(tensors)
        for name, array in tensors.items():
            assert array.reshape(-1).tolist() == request[name]["content"]


def test_perf_analyzer_and_our_own_server(tmp_path: Path, config: Path) -> None:
    pytest.importorskip("uvicorn")
    with serving(config, "--drain-seconds", "0") as server:
        for form in ("flat", "named"):
            path = tmp_path / f"{form}.json"
            assert hps("--output-path", path, "--config", config, "--model", "b", "--form", form).exit_code == 0
            analyze(server.urls["http"], "b", path)
