"""The configuration: file, environment and flags, and the commands that show it."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from engine.errors import InvalidRequestError
from server.auth import KeyRing, new_key
from server.cli import app
from server.config import ServeConfig
from server.config_file import read_config
from server.settings import served_config

runner = CliRunner()


def written(folder: Path, text: str) -> Path:
    path = folder / "darkroom.yaml"
    path.write_text(text)
    return path


def test_without_a_file_the_defaults_serve_on_loopback() -> None:
    assert served_config(environ={}) == ServeConfig()
    assert not ServeConfig().auth_on


def test_flags_over_environment_over_file(tmp_path: Path) -> None:
    path = written(tmp_path, "http: {port: 1, host: 127.0.0.2, max_body_bytes: 5}\n")
    environ = {"DARKROOM_CONFIG": str(path), "DARKROOM_PORT": "2", "DARKROOM_HOST": "127.0.0.3"}
    http = served_config(environ=environ, flags={"http.port": 3, "http.host": None}).http
    assert (http.port, http.host, http.max_body_bytes) == (3, "127.0.0.3", 5)


@pytest.mark.parametrize(
    ("name", "value", "key"),
    [
        ("DARKROOM_REDIS_URL", "redis://:secret@h/0", "redis.url"),
        ("DARKROOM_LOG_LEVEL", "debug", "logging.level"),
        ("DARKROOM_LOG_FORMAT", "text", "logging.format"),
        ("DARKROOM_PUBLIC_URL", "https://pictures.example", "http.public_url"),
        ("DARKROOM_DEVICE", "cuda", "workers.device"),
    ],
)
def test_each_variable_sets_its_key(name: str, value: str, key: str) -> None:
    section, field = key.split(".")
    assert getattr(getattr(served_config(environ={name: value}), section), field) == value


def test_an_empty_variable_is_not_set() -> None:
    assert served_config(environ={"DARKROOM_REDIS_URL": ""}).redis.url is None


def test_an_unknown_variable_is_refused() -> None:
    with pytest.raises(InvalidRequestError, match="DARKROOM_REDISURL"):
        served_config(environ={"DARKROOM_REDISURL": "redis://h"})


def test_a_bad_value_is_named_by_where_it_came_from(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequestError, match=r"DARKROOM_PORT \(http\.port\)"):
        served_config(environ={"DARKROOM_PORT": "eighty"})
    with pytest.raises(InvalidRequestError, match=r"--max-replicas \(workers\.max_replicas\)"):
        served_config(environ={}, flags={"workers.max_replicas": 0})
    path = written(tmp_path, "http: {prot: 1}\nmodels: [{id: ../x}]\n")
    with pytest.raises(InvalidRequestError, match=r"http\.prot.*models\.0\.id|models\.0\.id.*prot"):
        read_config(path)


def test_the_dial_of_int8_goes_with_int8_only(tmp_path: Path) -> None:
    model = "models: [{{id: a, precision: {}, int8_min_snr_db: 35}}]\n"
    assert read_config(written(tmp_path, model.format("int8"))).models[0].int8_min_snr_db == 35
    with pytest.raises(InvalidRequestError, match="int8_min_snr_db goes with precision int8"):
        read_config(written(tmp_path, model.format("fp32")))


@pytest.mark.parametrize(
    ("model", "device", "named"),
    [
        ("cuda_graphs: true", "cuda", "cuda_graphs goes with backend torch or tensorrt"),
        ("backend: torch, cuda_graphs: true", "cpu", "cuda_graphs needs device cuda"),
        ("compile: true", "cpu", "compile goes with backend torch"),
        ("provider: tensorrt", "cpu", "allowed on cpu: cpu"),
        ("backend: tensorrt", "cpu", "runs on cuda"),
    ],
)
def test_a_models_switches_fit_its_backend_and_the_workers_device(
    tmp_path: Path, model: str, device: str, named: str
) -> None:
    text = f"models: [{{id: a}}, {{id: b, {model}}}]\nworkers: {{device: {device}}}\n"
    with pytest.raises(InvalidRequestError, match=named) as refused:
        read_config(written(tmp_path, text))
    assert f"workers.device is {device}" in str(refused.value)
    assert "models.b" in str(refused.value)


def test_a_models_switches_reach_its_runtime(tmp_path: Path) -> None:
    text = (
        "models:\n"
        "  - {id: a, backend: torch, compile: true, cuda_graphs: false}\n"
        "  - {id: b, provider: tensorrt}\n"
    )
    config = served_config(written(tmp_path, text), environ={"DARKROOM_DEVICE": "cuda"})
    assert config.workers.device == "cuda"
    first, second = (model.runtime(config.workers.device) for model in config.models)
    assert first.options == {"compile": True, "cuda_graphs": False}
    assert (second.options, second.place) == ({"tensorrt": True}, "cuda")


@pytest.mark.parametrize(
    ("redis", "named"),
    [
        ("{url: 'rediss://r', tls: {certificate: /c.pem}}", "certificate and key belong together"),
        ("{url: 'redis://r', tls: {ca: /ca.pem}}", "rediss://"),
    ],
)
def test_tls_of_redis_is_whole_or_refused(tmp_path: Path, redis: str, named: str) -> None:
    (path := tmp_path / "darkroom.yaml").write_text(f"redis: {redis}")
    with pytest.raises(InvalidRequestError, match=named):
        served_config(path, environ={})


def test_what_is_checked_together_is_checked_after_everything_is_laid_over(tmp_path: Path) -> None:
    hash_ = new_key().hash
    path = written(tmp_path, f"auth: {{tenants: [{{id: a, key_hashes: [{hash_}]}}]}}\n")
    config = served_config(path, environ={"DARKROOM_HOST": "0.0.0.0"})
    assert config.auth_on
    with pytest.raises(InvalidRequestError, match="API key"):
        served_config(environ={"DARKROOM_HOST": "0.0.0.0"})


@pytest.mark.parametrize("text", ["[1, 2]", "http: 5", "http: [1]", ": :", "http: {port"])
def test_a_file_that_is_no_mapping_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(InvalidRequestError, match=r"darkroom\.yaml"):
        served_config(written(tmp_path, text), environ={"DARKROOM_PORT": "1"})


def test_keys_new_prints_a_pair_that_fits(tmp_path: Path) -> None:
    done = runner.invoke(app, ["keys", "new"])
    pair = yaml.safe_load(done.stdout)
    tenants = [{"id": "a", "key_hashes": [pair["hash"]]}]
    config = read_config(written(tmp_path, yaml.safe_dump({"auth": {"tenants": tenants}})))
    assert KeyRing.of(config).identify({"x-api-key": pair["key"]}).tenant.id == "a"


def test_config_show_is_a_configuration_without_passwords(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("DARKROOM_REDIS_URL", "redis://user:geheim@cache:6379/1?password=geheim")
    monkeypatch.setenv("DARKROOM_PORT", "9001")
    done = runner.invoke(app, ["config", "show"])
    assert "geheim" not in done.stdout
    again = read_config(written(tmp_path, done.stdout))
    assert again.http.port == 9001
    assert again.redis.url == "redis://***@cache:6379/1"


def test_config_check_names_a_model_that_is_not_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "small").mkdir()
    monkeypatch.setenv("DARKROOM_MODELS", str(tmp_path))
    path = written(tmp_path, "models: [{id: small}]")
    missing = runner.invoke(app, ["config", "check", "-c", str(path)])
    assert isinstance(missing.exception, InvalidRequestError)
    assert "models.0.id" in str(missing.exception)
    (tmp_path / "small" / "model_index.json").write_text("{}")
    found = runner.invoke(app, ["config", "check", "-c", str(path)])
    assert found.stdout == "ok: small on 127.0.0.1:8000, no keys needed, jobs in memory\n"


@pytest.mark.parametrize(
    ("text", "key"),
    [
        ("jobs: {webhook_hosts: ['https://hooks.example']}", "jobs.webhook_hosts"),
        ("redis: {url: 'http://:geheim@cache'}", "redis.url"),
        ("auth: {tenants: [{id: a, key_hashes: [geheim]}]}", "auth.tenants"),
    ],
)
def test_config_check_looks_deeper_than_types(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, key: str
) -> None:
    (tmp_path / "tintype").mkdir()
    (tmp_path / "tintype" / "model_index.json").write_text("{}")
    monkeypatch.setenv("DARKROOM_MODELS", str(tmp_path))
    done = runner.invoke(app, ["config", "check", "-c", str(written(tmp_path, text))])
    assert isinstance(done.exception, InvalidRequestError)
    assert done.exception.field == key
    assert "geheim" not in str(done.exception)
