"""Request ids prove what was answered, and nothing else does."""

import json
import os
import uuid
import warnings
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import cast

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lifelong_ray.feedback import RequestIds, load_secrets, pseudonym, read_request_id, uuid7
from lifelong_ray.storage import LocalStore, Store
from lifelong_ray.types import BadRequestIdError, ConfigError, ServedRequest

IDS = RequestIds(b"k" * 32)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), max_size=40)


@given(
    version=NAMES,
    variant=st.sampled_from(["stable", "candidate", "an arm"]),
    class_name=NAMES,
    audit=st.booleans(),
    chosen=st.booleans(),
    sticky=st.booleans(),
)
def test_an_id_proves_what_was_answered(
    version: str, variant: str, class_name: str, audit: bool, chosen: bool, sticky: bool
) -> None:
    at_s = 1_700_000_000.0
    variant = version if variant == "an arm" else variant
    request_id = IDS.issue(at_s, version, variant, class_name, audit, chosen=chosen, sticky=sticky)

    served = ServedRequest(request_id, version, variant, class_name, audit, at_s, chosen, sticky)
    assert IDS.verify(request_id) == served
    assert read_request_id(request_id) == served
    assert request_id.isascii()
    assert set(request_id) <= set(
        "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789-_."
    )


def test_no_two_threads_get_the_same_id() -> None:
    with ThreadPoolExecutor(8) as pool:
        drawn = list(pool.map(lambda _: str(uuid7(0.0)), range(20_000)))

    assert len(set(drawn)) == len(drawn)


def test_a_forked_process_draws_other_ids() -> None:
    uuid7(0.0)
    reading, writing = os.pipe()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forks beside threads
        child = os.fork()
    if child == 0:
        os.write(writing, uuid7(0.0).bytes)
        os._exit(0)
    os.waitpid(child, 0)

    assert os.read(reading, 16) != uuid7(0.0).bytes

    os.close(reading)
    os.close(writing)


@given(data=st.data())
def test_any_altered_character_makes_it_worthless(data: st.DataObject) -> None:
    request_id = IDS.issue(1_700_000_000.0, "v1.2", "stable", "cat", True, bytes(10))
    at = data.draw(st.integers(0, len(request_id) - 1))
    other = data.draw(st.characters())

    altered = request_id[:at] + other + request_id[at + 1 :]

    if altered != request_id:
        with pytest.raises(BadRequestIdError, match="was not issued here"):
            IDS.verify(altered)


@given(st.text(max_size=100))
def test_made_up_ids_are_refused(request_id: str) -> None:
    with pytest.raises(BadRequestIdError):
        IDS.verify(request_id)


def test_one_answer_has_one_spelling() -> None:
    request_id = IDS.issue(1_700_000_000.0, "v1", "stable", "cat", False)

    for spelling in (request_id + "=", request_id.upper(), request_id + " ", request_id + "A"):
        with pytest.raises(BadRequestIdError):
            IDS.verify(spelling)


def test_another_key_refuses_it_and_a_very_long_one_is_not_read() -> None:
    with pytest.raises(BadRequestIdError):
        RequestIds(b"x" * 32).verify(IDS.issue(0.0, "v1", "stable", "cat", False))
    with pytest.raises(BadRequestIdError):
        IDS.verify("a" * 1_000_000)


def test_callers_hear_of_what_no_id_can_hold() -> None:
    with pytest.raises(ValueError, match="variant is 'shadow'"):
        IDS.issue(0.0, "v1", "shadow", "cat", False)
    with pytest.raises(ValueError, match="too long"):
        IDS.issue(0.0, "v1", "stable", "c" * 1_001, False)
    with pytest.raises(ValueError, match="16 are needed"):
        RequestIds(b"short")


def test_uuids_sort_by_time_and_carry_version_seven() -> None:
    first, second = uuid7(1_000.0, b"\xff" * 10), uuid7(1_000.001, bytes(10))

    assert str(first) < str(second)
    assert first.version == 7
    assert first.variant == uuid.RFC_4122
    assert uuid7(5.0) != uuid7(5.0)


def test_pseudonyms_are_stable_keyed_and_say_nothing() -> None:
    ada = pseudonym(b"k" * 32, "ada")

    assert ada == pseudonym(b"k" * 32, "ada")
    assert ada != pseudonym(b"x" * 32, "ada")
    assert ada != pseudonym(b"k" * 32, "ada ")
    assert "ada" not in ada
    assert pseudonym(b"k" * 32, "\ud800") != pseudonym(b"k" * 32, "?")


def test_local_secrets_are_made_once_and_only_for_the_owner(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)

    first, second = load_secrets(store, {}), load_secrets(LocalStore(tmp_path), {})

    assert first == second
    assert (tmp_path / "secrets.json").stat().st_mode & 0o777 == 0o600
    assert first.admin_token not in repr(first)


def test_the_environment_wins_over_kept_secrets(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    kept = load_secrets(store, {})

    mixed = load_secrets(store, {"LIFELONG_ADMIN_TOKEN": "t" * 20})

    assert mixed.admin_token == "t" * 20
    assert mixed.signing_key == kept.signing_key


def test_a_complete_environment_leaves_no_file(tmp_path: Path) -> None:
    environ = {"LIFELONG_ADMIN_TOKEN": "t" * 20, "LIFELONG_SIGNING_KEY": "k" * 20}

    secrets = load_secrets(LocalStore(tmp_path), environ)

    assert secrets.signing_key == b"k" * 20
    assert not (tmp_path / "secrets.json").exists()


class SharedStore:
    """Stands for a store of many machines; secrets ask it for nothing but its address."""

    url = "s3://bucket"


def test_a_shared_store_wants_its_secrets_from_the_environment() -> None:
    store = cast("Store", SharedStore())

    with pytest.raises(ConfigError, match="LIFELONG_SIGNING_KEY is not set"):
        load_secrets(store, {"LIFELONG_ADMIN_TOKEN": "t" * 20})
    with pytest.raises(ConfigError, match="LIFELONG_ADMIN_TOKEN is shorter"):
        load_secrets(store, {"LIFELONG_ADMIN_TOKEN": "t", "LIFELONG_SIGNING_KEY": "k" * 20})


def test_damaged_secrets_say_what_to_do(tmp_path: Path) -> None:
    (tmp_path / "secrets.json").write_text(json.dumps({"signing_key": "x"}))

    with pytest.raises(ConfigError, match=r"secrets\.json .* is damaged"):
        load_secrets(LocalStore(tmp_path), {})


@given(st.text(max_size=60))
def test_what_is_no_id_is_not_read(text: str) -> None:
    try:
        assert read_request_id(text).request_id == text
    except BadRequestIdError:
        return
