from __future__ import annotations

from collections.abc import Callable

import pytest

from configuration import ConfigError
from search import study_spec
from search.errors import SpecError
from search.spec import SearchSpec
from search.storage import address

Load = Callable[..., SearchSpec]


@pytest.fixture(autouse=True)
def bare(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(address.VARIABLE, raising=False)


def test_no_address_means_the_folder() -> None:
    address.check(None)
    assert address.resolve(None) is None


@pytest.mark.parametrize("scheme", ["postgresql", "postgres", "postgresql+psycopg"])
def test_all_spellings_of_postgresql_are_one(scheme: str) -> None:
    assert address.resolve(f"{scheme}://me@db.lab:5433/tune") == "postgresql+psycopg://me@db.lab:5433/tune"


def test_the_environment_may_name_the_database_and_the_file_has_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(address.VARIABLE, "postgresql://me:canary@db/tune")
    assert address.resolve(None) == "postgresql+psycopg://me:canary@db/tune"
    assert address.resolve("postgresql://other/tune") == "postgresql+psycopg://other/tune"


def test_a_variable_is_put_in_its_place_as_it_is_meant(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DB_PASSWORD", "p@ss/word")
    monkeypatch.setenv("DB_URL", "postgresql://me:p%40ss@db/tune")
    url = "postgresql://me:${DB_PASSWORD}@db/tune"
    address.check(url)
    assert address.resolve(url) == "postgresql+psycopg://me:p%40ss%2Fword@db/tune"
    assert address.resolve("${DB_URL}") == "postgresql+psycopg://me:p%40ss@db/tune"


def test_a_variable_that_is_not_set_is_named() -> None:
    with pytest.raises(SpecError, match=r"search\.storage: names the variable NO_SUCH, which is not set; export it"):
        address.resolve("postgresql://me:${NO_SUCH}@db/tune")


@pytest.mark.parametrize("url", ["postgresql://me:canary@db/tune", "postgresql://db/tune?user=me&password=canary"])
def test_a_password_in_a_search_space_is_refused_and_not_repeated(toy: Load, url: str) -> None:
    with pytest.raises(SpecError, match=r"search\.storage: has a password in it.*\$\{NAME\}.*PGPASSWORD") as caught:
        toy(search={"storage": url})
    assert "canary" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "said"),
    [
        ("sqlite:///study.db", "sqlite is one file for one machine.*leave this out"),
        ("mysql://db/tune", "got mysql URL; expected postgresql://USER@HOST/DATABASE"),
        ("db.lab", "got no URL; expected postgresql://"),
        ("postgresql://db:port/tune", "not a URL; write postgresql://"),
    ],
)
def test_what_is_no_usable_database_is_refused_with_the_remedy(url: str, said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        address.check(url)


def test_what_is_shown_has_neither_user_nor_password_nor_options() -> None:
    assert address.shown("postgresql+psycopg://me:canary@db:5433/tune?sslpassword=x") == "postgresql://db:5433/tune"
    assert address.shown("postgresql+psycopg:///tune?host=/var/run") == "postgresql:///var/run/tune"


def test_the_database_of_a_study_may_move(toy: Load) -> None:
    before = study_spec.resolved(toy(), {}, {})
    after = study_spec.resolved(toy(search={"storage": "postgresql://db/tune"}), {}, {})
    del before["search"]["storage"]  # a study made before there was such a key
    assert study_spec.differences(before, after) == []
