"""Flags, L4_API_KEY and the YAML file: who wins, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from l4core.cli.serve import serve
from l4core.cli.settings import merge, read_configs, read_file
from l4core.config import EngineConfig, ServerConfig, from_mapping
from l4core.errors import ConfigError


def configs(*argv: str) -> tuple[EngineConfig, ServerConfig]:
    with serve.make_context("l4 serve", list(argv)) as context:
        return read_configs(context)


@pytest.fixture
def yaml(tmp_path: Path) -> Path:
    path = tmp_path / "l4.yaml"
    path.write_text(
        "model: from-file\nmax-model-len: 4096\nport: 1234\nattention_option: [a=1, b=2]\n", encoding="utf-8"
    )
    return path


def test_file_alone(yaml: Path) -> None:
    engine, server = configs("--config", str(yaml))
    assert (engine.model, engine.context_length, server.port) == ("from-file", 4096, 1234)
    assert engine.attention_option == ("a=1", "b=2")


def test_flags_override_the_file_under_any_spelling(yaml: Path) -> None:
    engine, server = configs("from-flag", "--config", str(yaml), "--context-length", "99", "--port=1")
    assert (engine.model, engine.context_length, server.port) == ("from-flag", 99, 1)


def test_auto_stands_for_the_largest_context_and_takes_back_a_number(yaml: Path) -> None:
    engine, _ = configs("m", "--config", str(yaml), "--context-length", "auto")
    assert engine.context_length is None
    assert configs("m", "--context-length", "77")[0].context_length == 77
    assert from_mapping({"context_length": "auto"})[0].context_length is None
    with pytest.raises(ConfigError, match="context_length is 'auto '"):
        from_mapping({"context_length": "auto "})
    with pytest.raises(ConfigError, match="page_size is 'auto'"):
        from_mapping({"page_size": "auto"})


def test_a_flag_takes_back_a_yes_of_the_file(yaml: Path) -> None:
    yaml.write_text("model: m\ntrust_remote_code: true\n", encoding="utf-8")
    assert configs("--config", str(yaml))[0].trust_remote_code is True
    assert configs("--config", str(yaml), "--no-trust-remote-code")[0].trust_remote_code is False


def test_key_from_environment_beats_file_and_loses_to_flag() -> None:
    assert merge({"api_key": "file"}, {}, {"L4_API_KEY": "env"})["api_key"] == "env"
    assert merge({"api_key": "file"}, {"api_key": "flag"}, {"L4_API_KEY": "env"})["api_key"] == "flag"
    assert "api_key" not in merge({}, {}, {})


def test_an_empty_key_does_not_open_the_server() -> None:
    with pytest.raises(ConfigError, match="API key is empty"):
        merge({}, {}, {"L4_API_KEY": ""})


def test_unknown_key_names_the_nearest() -> None:
    with pytest.raises(ConfigError, match="contxt_length") as caught:
        merge({"contxt_length": 3}, {}, {})
    assert "context_length" in caught.value.fix


def test_one_option_under_two_spellings_in_the_file() -> None:
    with pytest.raises(ConfigError, match="'context_length' twice"):
        merge({"context_length": 3, "max_model_len": 3}, {}, {})


def test_one_key_twice_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "l4.yaml"
    path.write_text("port: 1\nport: 2\n", encoding="utf-8")
    with pytest.raises(ConfigError, match="'port' twice"):
        read_file(path)


@pytest.mark.parametrize(
    ("text", "message"), [("- a\n- b\n", "holds a list"), ("a: [1", "is not YAML"), ("7", "holds a int")]
)
def test_a_file_that_is_no_mapping(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "l4.yaml"
    path.write_text(text, encoding="utf-8")
    with pytest.raises(ConfigError, match=message):
        read_file(path)


def test_an_empty_file_sets_nothing(tmp_path: Path) -> None:
    path = tmp_path / "l4.yaml"
    path.write_text("# nothing yet\n", encoding="utf-8")
    assert read_file(path) == {}


def test_a_wrong_type_in_the_file(yaml: Path) -> None:
    yaml.write_text('model: m\nport: "80"\n', encoding="utf-8")
    with pytest.raises(ConfigError, match=r"port is '80' \(str\); wanted int"):
        configs("--config", str(yaml))


def test_no_model() -> None:
    with pytest.raises(ConfigError, match="no model") as caught:
        configs("--port", "1")
    assert "l4 demo-model" in caught.value.fix


def test_model_given_twice() -> None:
    with pytest.raises(ConfigError, match="given twice: 'a' and 'b'"):
        configs("a", "--model", "b")
