"""``hps-numba``: every command works, prints JSON, and fails with one clear line (checklist O03, O05, O08)."""

from __future__ import annotations

import json
import logging
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.processes import ROOT, environment
from support.waiting import HANG_SECONDS
from typer.testing import CliRunner, Result

from hps_numba import __version__, generate_model, open_model, plugins, write_model
from hps_numba.cli import _errors, build
from hps_numba.cli._output import human_rate, human_seconds, print_json
from hps_numba.cli._survey import count_duplicates
from hps_numba.simulate.workloads import KEY_DISTRIBUTIONS, power_law

ROWS, DIM = 50, 4


def hps(*arguments: object) -> Result:
    return CliRunner().invoke(build(), [str(argument) for argument in arguments])


def parsed(*arguments: object, code: int = 0) -> Any:
    result = hps(*arguments, "--json")
    assert result.exit_code == code, result.output
    return json.loads(result.stdout)


def process(*arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "hps_numba", *map(str, arguments)]
    env = environment(**options.pop("env", {}))
    return subprocess.run(command, text=True, capture_output=True, env=env, timeout=HANG_SECONDS, **options)


def assert_one_line_error(result: Result | subprocess.CompletedProcess[str], code: int) -> str:
    got = result.exit_code if isinstance(result, Result) else result.returncode
    assert got == code, (got, result.stdout, result.stderr)
    assert result.stdout == ""
    assert len(result.stderr.splitlines()) == 1 and result.stderr.startswith("error: "), result.stderr
    others = re.sub(r"hps[-_]numba|/\S*", "", result.stderr)  # names of this package, and paths
    for word in ("Traceback", "pydantic", "numba", "Error("):
        assert word not in others
    return result.stderr


@pytest.fixture
def model(tmp_path: Path) -> Path:
    generate_model(tmp_path / "table.model", ROWS, DIM, seed=1)
    return tmp_path / "table.model"


@pytest.fixture
def damaged(model: Path) -> Path:
    with (model / "emb_vector").open("r+b") as file:
        file.truncate(4 * DIM * ROWS - 2)
    return model


@pytest.fixture
def write_config(tmp_path: Path, model: Path) -> Callable[..., Path]:
    """Writes a config of one table with changes."""

    def write(entry: dict[str, Any] | None = None, **top: Any) -> Path:
        table = {
            "model": "demo",
            "sparse_files": ["table.model"],
            "embedding_vecsize_per_table": [DIM],
            "maxnum_catfeature_query_per_table_per_sample": [2],
            "default_value_for_each_table": [0.5],
            "deployed_device_list": [],
        }
        config = {"supportlonglong": True, "models": [table | (entry or {})], **top}
        (tmp_path / "ps.json").write_text(json.dumps(config))
        return tmp_path / "ps.json"

    return write


# -- the command tree ---------------------------------------------------------------------


def test_every_file_is_a_command() -> None:
    result = hps("--help")
    assert result.exit_code == 0
    commands = re.findall(r"^  ([a-z-]+)  +[A-Z]", result.stdout.partition("Commands:")[2], re.MULTILINE)
    assert commands == [name.replace("_", "-") for name in plugins.names("hps_numba.cli")]
    assert {"config", "convert", "demo", "doctor", "generate", "inspect", "plan"} <= set(commands)


@pytest.mark.parametrize("command", [*plugins.names("hps_numba.cli"), "config check", "config schema", "generate keys"])
def test_every_command_has_a_help_text(command: str) -> None:
    result = hps(*command.replace("_", "-").split(), "--help")
    assert result.exit_code == 0 and "Usage:" in result.stdout and "\x1b" not in result.stdout


def test_help_imports_no_heavy_package() -> None:
    code = (
        "import sys; from hps_numba.cli import build; import typer.main; typer.main.get_command(build()); "
        "print([name for name in ('numpy', 'numba', 'h5py', 'pydantic', 'matplotlib', 'torch') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=HANG_SECONDS)
    assert result.stdout.strip() == "[]", result.stderr


def test_version_is_printed() -> None:
    result = hps("--version")
    assert (result.exit_code, result.stdout) == (0, f"hps-numba {__version__}\n")
    assert process("--version").stdout == f"hps-numba {__version__}\n"


# -- generate, inspect, convert ---------------------------------------------------------------------


@pytest.mark.parametrize("name", ["made.model", "made.h5", "made"])
def test_generate_model_writes_every_format(tmp_path: Path, name: str) -> None:
    facts = parsed("generate", "model", tmp_path / name, "--rows", ROWS, "--dim", DIM, "--seed", 7)
    assert (facts["rows"], facts["dim"]) == (ROWS, DIM) and facts["bytes"] >= ROWS * (8 + 4 * DIM)
    generate_model(tmp_path / "again.model", ROWS, DIM, seed=7)
    assert_same_content(tmp_path / name, tmp_path / "again.model")


def assert_same_content(one: Path, other: Path) -> None:
    with open_model(one) as first, open_model(other) as second:
        for (keys, rows, _), (same_keys, same_rows, _) in zip(first.chunks(), second.chunks(), strict=True):
            np.testing.assert_array_equal(keys, same_keys)
            np.testing.assert_array_equal(rows.view(np.uint32), same_rows.view(np.uint32))


def test_generate_model_overwrites_only_with_the_option(model: Path) -> None:
    shape = ("--rows", 3, "--dim", 2)
    assert "pass --overwrite" in assert_one_line_error(hps("generate", "model", model, *shape), 1)
    assert "3 rows x 2, 48 B" in hps("generate", "model", model, *shape, "--overwrite").stdout


@pytest.mark.parametrize("distribution", sorted(KEY_DISTRIBUTIONS))
def test_generate_keys_draws_every_distribution(tmp_path: Path, distribution: str) -> None:
    path = tmp_path / "keys.npy"
    arguments = ("--distribution", distribution, "--count", 500, "--table-size", 40, "--seed", 5)
    assert parsed("generate", "keys", path, *arguments)["count"] == 500
    np.testing.assert_array_equal(np.load(path), KEY_DISTRIBUTIONS[distribution](40, 500, rng=np.random.default_rng(5)))


def test_generate_keys_in_several_chunks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hps_numba.cli.generate._KEYS_AT_ONCE", 64)
    result = hps("generate", "keys", tmp_path / "keys.npy", "--count", 200, "--table-size", 1000, "--alpha", 1.5)
    assert result.exit_code == 0 and "200 keys of 0 .. 999, power-law" in result.stdout
    np.testing.assert_array_equal(np.load(tmp_path / "keys.npy"), power_law(1000, 200, 1.5, np.random.default_rng(0)))


@pytest.mark.parametrize(
    "arguments",
    [
        ("--distribution", "zipf"),
        ("--alpha", "-1"),
        ("--weights", "1,two"),
        ("--distribution", "histogram", "--weights", "0,0"),
        ("--distribution", "hot-key", "--hot-coverage", "1.5"),
        ("--count", "-1"),
        ("--table-size", "0"),
    ],
)
def test_usage_errors_of_generate_keys(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = hps("generate", "keys", tmp_path / "keys.npy", "--count", 10, "--table-size", 5, *arguments)
    assert "hps-numba" not in assert_one_line_error(result, 2).partition(" (")[0]
    assert not list(tmp_path.iterdir())


def test_inspect_describes_a_model(model: Path) -> None:
    survey = parsed("inspect", model)
    with open_model(model) as reader:
        _, rows, _ = next(reader.chunks())
    assert (survey["format"], survey["rows"], survey["dim"], survey["bytes"]) == ("directory", ROWS, DIM, ROWS * (8 + 4 * DIM))
    assert survey["key_range"] == [0, ROWS - 1] and survey["ascending"] and survey["duplicates"] == 0
    assert survey["value_range"] == [rows.min(), rows.max()]
    assert survey["mean"] == pytest.approx(rows.mean(dtype=np.float64))
    assert [row["key"] for row in survey["first_rows"]] == [0, 1, 2]
    assert survey["first_rows"][1]["values"] == rows[1].tolist()
    text = hps("inspect", model).stdout
    assert "0 .. 49, ascending, fit 32 bits" in text and "without meta" in text


def test_inspect_reports_duplicates_and_non_finite_values(tmp_path: Path) -> None:
    keys = np.array([5, -1, 5, 7, 5], np.int64)
    rows = np.array([[1, np.nan], [np.inf, 2], [3, 4], [-np.inf, np.nan], [5, -6]], np.float32)
    write_model(tmp_path / "odd.h5", 2, [(keys, rows, keys)])
    survey = parsed("inspect", tmp_path / "odd.h5")
    assert (survey["format"], survey["has_meta"], survey["ascending"], survey["duplicates"]) == ("hdf5", True, False, 2)
    assert (survey["nan"], survey["infinite"], survey["value_range"], survey["mean"]) == (2, 2, [-6.0, 5.0], 1.5)
    assert survey["first_rows"][0]["values"] == [1.0, None]
    assert "-1 .. 7, not ascending, need 64 bits" in hps("inspect", tmp_path / "odd.h5").stdout


def test_inspect_a_model_without_rows(tmp_path: Path) -> None:
    write_model(tmp_path / "none.model", 2, [])
    assert_one_line_error(hps("inspect", tmp_path / "none.model"), 1)
    survey = parsed("inspect", tmp_path / "none.model", "--dim", 2)
    assert (survey["rows"], survey["key_range"], survey["value_range"], survey["mean"]) == (0, None, None, None)
    assert "none finite" in hps("inspect", tmp_path / "none.model", "--dim", 2).stdout


@pytest.mark.parametrize("at_once", [7, 100, 1000])
def test_duplicates_are_counted_in_any_number_of_passes(tmp_path: Path, at_once: int) -> None:
    keys = np.random.default_rng(0).integers(-300, 300, 700)
    write_model(tmp_path / "table.model", 1, [(keys, np.zeros((700, 1), np.float32))])
    assert count_duplicates(tmp_path / "table.model", 700, at_once=at_once) == 700 - len(np.unique(keys))


@pytest.mark.parametrize("names", [("table.model", "copy.h5"), ("table.h5", "copy.model")])
def test_convert_between_formats(tmp_path: Path, names: tuple[str, str]) -> None:
    src, dst = (tmp_path / name for name in names)
    generate_model(src, ROWS, DIM, seed=1)
    facts = parsed("convert", src, dst)
    assert (facts["rows"], facts["dim"]) == (ROWS, DIM)
    assert_same_content(src, dst)
    assert_one_line_error(hps("convert", src, dst), 1)
    assert "converted in" in hps("convert", src, dst, "--overwrite").stdout


# -- config, plan ---------------------------------------------------------------------


def test_config_check_accepts_a_config(write_config: Callable[..., Path]) -> None:
    config = write_config()
    report = parsed("config", "check", config)
    assert report["ok"] and not report["problems"] and not report["warnings"]
    (table,) = report["tables"]
    assert (table["model"], table["table"], table["dim"], table["rows"]) == ("demo", "sparse_embedding0", DIM, ROWS)
    result = hps("config", "check", config)
    assert result.exit_code == 0 and result.stdout.endswith("ps.json: ok\n") and not result.stderr


def test_config_check_lists_every_problem(write_config: Callable[..., Path]) -> None:
    config = write_config({"gpucacheper": 1.4, "max_batch_size": "many"})
    report = parsed("config", "check", config, code=1)
    assert not report["ok"] and len(report["problems"]) == 2
    result = hps("config", "check", config)
    assert result.exit_code == 1 and "2 problems" in result.stdout
    assert [line.split(":")[1].strip() for line in result.stderr.splitlines()] == [
        "models[0].max_batch_size",
        "models[0].gpucacheper",
    ]
    assert "and 1 more (hps-numba config check lists them)" in assert_one_line_error(hps("plan", config), 1)


def test_config_check_warns_of_unknown_keys_and_strict_rejects_them(write_config: Callable[..., Path]) -> None:
    config = write_config({"gpucacheperr": 0.5})
    report = parsed("config", "check", config)
    assert report["ok"] and "gpucacheper" in report["warnings"][0]
    result = hps("config", "check", config)
    assert result.stderr.startswith("warning: models[0].gpucacheperr") and "1 warning" in result.stdout
    assert parsed("config", "check", config, "--strict", code=1)["problems"]


def test_config_check_opens_the_models(write_config: Callable[..., Path], damaged: Path) -> None:
    problems = parsed("config", "check", write_config(), code=1)["problems"]
    assert len(problems) == 1 and "emb_vector: expected a multiple of 4 bytes (float32 values), got 798" in problems[0]
    config = write_config({"sparse_files": ["absent.model"]})
    result = hps("config", "check", config)
    assert result.exit_code == 1 and "cannot be opened" in result.stdout and "no such file" in result.stderr


def test_config_check_reports_an_unknown_tier(write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    names = plugins.names
    monkeypatch.setattr(plugins, "names", lambda package: ["hash_map"] if package.endswith("tiers") else names(package))
    config = write_config(volatile_db={"type": "redis_cluster"})
    (problem,) = parsed("config", "check", config, code=1)["problems"]
    assert problem == "volatile_db.type: expected one of hash_map, which this version has, got 'redis_cluster'"


def test_config_check_reports_a_missing_gpu(write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hps_numba.device.driver.device_count", lambda: 0)
    monkeypatch.setattr("hps_numba.device.driver.why_no_device", lambda: "there is no driver")
    config = write_config(require_gpu=True)
    assert parsed("config", "check", config, code=1)["problems"] == ["require_gpu: true, but there is no driver"]
    monkeypatch.setattr("hps_numba.device.driver.device_count", lambda: 1)
    assert parsed("config", "check", config)["ok"]


def test_config_schema_is_json() -> None:
    schema = json.loads(hps("config", "schema").stdout)
    assert schema["$schema"].endswith("2020-12/schema") and "models" in schema["properties"]


def test_plan_shows_the_memory_of_a_config(write_config: Callable[..., Path]) -> None:
    config = write_config()
    planned = parsed("plan", config)
    assert planned["fits"] and planned["tables"][0]["rows"] == ROWS and planned["host_bytes"] >= ROWS * DIM * 4
    text = hps("plan", config).stdout
    assert "demo/sparse_embedding0" in text and "all tables" in text and text.endswith("available: fits\n")


def test_plan_that_does_not_fit_fails(write_config: Callable[..., Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hps_numba.server.plan.available_bytes", lambda: 1000)
    config = write_config()
    assert parsed("plan", config, code=1)["fits"] is False
    result = hps("plan", config)
    assert result.exit_code == 1 and "DOES NOT FIT" in result.stdout


# -- failures ---------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [("inspect", "@"), ("convert", "@", "@.h5"), ("plan", "@"), ("config", "check", "@")], ids=lambda a: a[0]
)
def test_missing_file_fails_with_one_line(tmp_path: Path, arguments: tuple[str, ...]) -> None:
    result = hps(*(argument.replace("@", str(tmp_path / "absent")) for argument in arguments))
    assert result.exit_code == 1
    assert str(tmp_path / "absent") in result.stderr and result.stderr.startswith("error: ")
    assert len(result.stderr.splitlines()) == 1


@pytest.mark.parametrize(
    "text", ["", "{", "[1, 2]", '{"models": 3}', '{"models": [{"model": "a b"}]}', "\x00\xff", '{"models": []}']
)
def test_broken_config_fails_with_one_line(tmp_path: Path, text: str) -> None:
    (tmp_path / "ps.json").write_bytes(text.encode("latin-1"))
    assert_one_line_error(hps("plan", tmp_path / "ps.json"), 1)
    assert hps("config", "check", tmp_path / "ps.json").exit_code == 1


def test_damaged_model_fails_with_one_line(damaged: Path, tmp_path: Path, write_config: Callable[..., Path]) -> None:
    assert "emb_vector: expected a multiple of 4 bytes (float32 values), got 798" in assert_one_line_error(
        hps("inspect", damaged, "--dim", DIM), 1
    )
    assert_one_line_error(hps("inspect", damaged), 1)
    assert_one_line_error(hps("convert", damaged, tmp_path / "copy.h5"), 1)
    assert_one_line_error(hps("plan", write_config()), 1)
    assert not (tmp_path / "copy.h5").exists()


def test_real_processes_fail_with_one_line(tmp_path: Path, damaged: Path) -> None:
    assert_one_line_error(process("inspect", damaged), 1)
    assert_one_line_error(process("plan", tmp_path / "absent.json"), 1)
    assert_one_line_error(process("inspect"), 2)


@pytest.mark.parametrize("arguments", [("unknown",), ("plan",), ("inspect", "a", "b"), ("demo", "--rows", "0")], ids=str)
def test_usage_errors(arguments: tuple[str, ...]) -> None:
    assert "--help)" in assert_one_line_error(hps(*arguments), 2)


@pytest.mark.parametrize("group", [(), ("config",), ("generate",)], ids=str)
def test_help_is_shown_without_a_command(group: tuple[str, ...]) -> None:
    result = hps(*group)
    assert result.exit_code == 2 and "Usage:" in result.output and "error:" not in result.output


@pytest.mark.parametrize(
    ("problem", "line", "code"),
    [
        (ZeroDivisionError("division\nby zero"), "ZeroDivisionError: division by zero (a bug; HPS_NUMBA_DEBUG=1", 1),
        (PermissionError(13, "Permission denied", "/x/y"), "/x/y: Permission denied", 1),
        (OSError("odd"), "odd", 1),
        (MemoryError(), "out of memory", 1),
        (KeyboardInterrupt(), "interrupted", 130),
    ],
)
def test_any_exception_is_one_line(
    problem: BaseException, line: str, code: int, monkeypatch: pytest.MonkeyPatch, model: Path
) -> None:
    def fail(*_: object) -> None:
        raise problem

    monkeypatch.setattr("hps_numba.cli._survey.survey_model", fail)
    monkeypatch.delenv("HPS_NUMBA_DEBUG", raising=False)
    result = hps("inspect", model)
    assert result.exit_code == code and result.stderr.startswith(f"error: {line}")
    assert len(result.stderr.splitlines()) == 1


def test_debug_shows_the_traceback(tmp_path: Path) -> None:
    result = process("inspect", tmp_path / "absent", env={"HPS_NUMBA_DEBUG": "1"})
    assert result.returncode == 1 and "Traceback" in result.stderr and "ModelFileError" in result.stderr
    assert_one_line_error(process("inspect", env={"HPS_NUMBA_DEBUG": "1"}), 2)


def test_closed_pipe_prints_no_error() -> None:
    reading, writing = os.pipe()
    os.close(reading)
    command = [sys.executable, "-m", "hps_numba", "config", "schema"]
    result = subprocess.run(command, stdout=writing, stderr=subprocess.PIPE, text=True, env=environment(), timeout=HANG_SECONDS)
    os.close(writing)
    assert (result.returncode, result.stderr) == (_errors.FAILED, "")


def test_log_handlers_are_removed_after_the_command(write_config: Callable[..., Path]) -> None:
    logger = logging.getLogger("hps_numba")
    before = (list(logger.handlers), logger.level)
    config = write_config({"gpucacheperr": 1})
    assert hps("plan", config).stderr.count("warning: ") == 1
    verbose = hps("-v", "plan", config).stderr
    assert "info: models[0].max_batch_size: absent, using 64" in verbose
    assert (logger.handlers, logger.level) == before


# -- formatting ---------------------------------------------------------------------


def test_seconds_and_rates_are_formatted() -> None:
    assert [human_seconds(x) for x in (12.345, 0.0021349, 17e-6, 999e-9)] == ["12.3 s", "2.13 ms", "17 us", "999 ns"]
    assert human_seconds(1234.5) == "1234 s"
    assert [human_rate(x, "keys/s") for x in (25.4e6, 1.5e9, 12)] == ["25.4 M keys/s", "1.5 G keys/s", "12 keys/s"]
    assert human_rate(3.2e9, "B/s") == "3.2 GB/s"


def test_json_contains_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    print_json({"a": [float("nan"), 1.5], "b": (float("inf"),), "path": Path("x")})
    assert json.loads(capsys.readouterr().out) == {"a": [None, 1.5], "b": [None], "path": "x"}
