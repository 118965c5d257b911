from __future__ import annotations

import stat
from pathlib import Path

import pytest

from search import __main__ as command
from search import ray_token
from search.errors import StudyError


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(Path, "home", lambda: tmp_path)
    return tmp_path


def test_a_ray_of_our_own_has_a_token_of_its_own_and_none_in_a_file(home: Path) -> None:
    first: dict[str, str] = {}
    second: dict[str, str] = {}
    ray_token.prepare(first)
    ray_token.prepare(second)
    assert first["RAY_AUTH_MODE"] == "token" and first["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] == "0"
    assert len(first["RAY_AUTH_TOKEN"]) == 64 and first["RAY_AUTH_TOKEN"] != second["RAY_AUTH_TOKEN"]
    assert list(home.iterdir()) == []
    chosen = {"RAY_AUTH_MODE": "disabled"}
    ray_token.prepare(chosen)
    assert "RAY_AUTH_TOKEN" not in chosen and chosen["RAY_AUTH_MODE"] == "disabled"


def test_a_named_cluster_is_shown_the_token_that_is_there(home: Path) -> None:
    environment = {"RAY_ADDRESS": "10.0.0.1:6379"}
    ray_token.prepare(environment)
    assert environment == {"RAY_ADDRESS": "10.0.0.1:6379"}
    ray_token.make(environment)
    ray_token.prepare(environment)
    assert environment == {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_MODE": "token"}
    given = {"RAY_ADDRESS": "10.0.0.1:6379", "RAY_AUTH_TOKEN_PATH": str(home / "nowhere")}
    ray_token.prepare(given)
    assert "RAY_AUTH_MODE" not in given


@pytest.mark.row("N1")
def test_the_token_s_file_is_for_its_owner_only(home: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["token"]) == 0
    path = Path(capsys.readouterr().out.strip())
    token = path.read_text()
    assert path == home / ".ray" / "auth_token" and len(token) == 64
    assert (mode(path), mode(path.parent)) == (0o600, 0o700)
    path.chmod(0o644)  # as Ray makes it
    ray_token.prepare({})
    assert mode(path) == 0o600
    path.chmod(0o640)
    assert command.main(["token"]) == 0
    assert mode(path) == 0o600 and path.read_text() == token


def test_the_token_s_file_may_lie_elsewhere(home: Path) -> None:
    path = home / "here" / "token"
    assert ray_token.make({"RAY_AUTH_TOKEN_PATH": str(path)}) == path
    assert mode(path) == 0o600
    path.chmod(0o444)
    ray_token.prepare({"RAY_AUTH_TOKEN_PATH": str(path)})
    assert mode(path) == 0o600


@pytest.mark.parametrize(
    ("address", "answer", "refused"),
    [
        ("10.0.0.1:6379", "open", True),
        ("cluster.example:6379", "open", True),
        ("[2001:db8::1]:6379", "open", True),
        ("10.0.0.1:6379", "guarded", False),
        ("10.0.0.1:6379", "none", False),
        ("127.0.0.1:6379", "open", False),
        ("127.0.0.1.example:6379", "open", True),
        ("localhost:6379", "open", False),
        ("[::1]:6379", "open", False),
    ],
)
@pytest.mark.row("N1")
def test_a_shared_cluster_without_a_token_is_refused(
    monkeypatch: pytest.MonkeyPatch, address: str, answer: ray_token.Answer, refused: bool
) -> None:
    monkeypatch.setattr(ray_token, "answer", lambda address: answer)
    monkeypatch.delenv(ray_token.OPEN_VARIABLE, raising=False)
    if not refused:
        ray_token.refuse_open(address)
        return
    with pytest.raises(StudyError, match=rf"RAY_AUTH_MODE=token .*{ray_token.OPEN_VARIABLE}=1") as caught:
        ray_token.refuse_open(address)
    assert str(caught.value).startswith(f"RAY_ADDRESS={address}: ")
    monkeypatch.setenv(ray_token.OPEN_VARIABLE, "1")
    ray_token.refuse_open(address)


def test_a_port_where_nobody_listens_gives_no_answer() -> None:
    assert ray_token.answer("127.0.0.1:1", wait_s=2) == "none"
