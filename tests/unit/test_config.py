"""Settings: where they come from, and what they may be."""

from pathlib import Path

import pytest

from tinkerbell.config import load_settings
from tinkerbell.errors import InvalidRequest


def test_the_command_line_is_before_the_environment_and_that_before_the_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("port = 1\nchunk_tokens = 2\nbatch_tokens = 3\n[limits]\nmax_adapters = 4\n")
    monkeypatch.setenv("TINKERBELL_CHUNK_TOKENS", "20")
    monkeypatch.setenv("TINKERBELL_LIMITS_MAX_REQUEST_TOKENS", "50")
    settings = load_settings(path, batch_tokens=30, port=None)
    assert (settings.port, settings.chunk_tokens, settings.batch_tokens) == (1, 20, 30)
    assert (settings.limits.max_adapters, settings.limits.max_request_tokens) == (4, 50)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("port", "70000"),
        ("batch_tokens", "0"),
        ("chunk_tokens", "-1"),
        ("max_batch_adapters", "0"),
        ("fair_slack_ms", "-1"),
        ("fair_slack_ms", "nan"),
        ("lease_ttl_s", "0"),
        ("lease_ttl_s", "inf"),
        ("threads", "0"),
        ("limits_max_pending_requests", "0"),
        ("durability", "some"),
    ],
)
def test_a_value_that_cannot_be_is_refused_by_name(monkeypatch: pytest.MonkeyPatch, name: str, value: str) -> None:
    monkeypatch.setenv(f"TINKERBELL_{name.upper()}", value)
    with pytest.raises(InvalidRequest, match=name.removeprefix("limits_")):
        load_settings()


def test_an_unknown_setting_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "settings.toml"
    path.write_text("chunk_token = 2\n")
    with pytest.raises(InvalidRequest, match="chunk_token"):
        load_settings(path)
