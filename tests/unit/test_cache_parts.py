"""The noise cache's parts: keys, embeddings, codec, index, policies, profiles, back-off."""

from __future__ import annotations

import math
import struct
import zlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache.codec import CodecError, decode, encode
from cache.connection import Backoff, RedisSettings
from cache.embedding import DIMENSIONS, embed
from cache.index import EntryIndex, VectorTable, entry_of, state_id
from cache.keys import Namespace, compatibility, namespace_of
from cache.policy import POLICIES, Facts, Lcbfu, policy_named
from cache.profiles import read_profile, write_profile
from engine.errors import InvalidRequestError
from engine.ports import JumpTable, ReuseProfile, StateKind, StateRef, StoredState
from tests.noise import key, latent, prompt

# ---------------------------------------------------------------------- keys


def test_the_keys_of_a_namespace_share_a_hash_tag_and_name_no_tenant() -> None:
    namespace = namespace_of(key("ada@example.org"))
    assert {name.split("{")[1].split("}")[0] for name in namespace.keys} == {namespace.tag}
    assert len(set(namespace.keys)) == 4
    assert not any("ada" in name for name in namespace.keys)
    assert Namespace.named(namespace.name) == namespace


def test_tenants_and_their_names_cannot_be_mixed_up() -> None:
    spaces = [Namespace("a", "bc"), Namespace("ab", "c"), Namespace(None, "c"), Namespace("", "c")]
    spaces.append(Namespace("shared", "c"))
    assert len({namespace.tag for namespace in spaces}) == 5


def test_parts_of_a_key_do_not_run_together() -> None:
    assert compatibility(key(negative_prompt="ab", guidance="c"), "e") != compatibility(
        key(negative_prompt="a", guidance="bc"), "e"
    )


# ---------------------------------------------------------------------- embeddings


def test_embeddings_keep_cosines() -> None:
    """Of close contexts closely: what decides about a jump are similarities near 1."""
    random = np.random.default_rng(0)
    first = random.standard_normal((77, 768)).astype(np.float32)
    for noise, tolerance in ((0.1, 0.005), (0.5, 0.03), (3.0, 0.12)):
        apart = random.standard_normal(first.shape).astype(np.float32)
        second = (first + noise * apart).astype(np.float32)
        true = (first * second).sum() / np.linalg.norm(first) / np.linalg.norm(second)
        assert float(embed(first) @ embed(second)) == pytest.approx(float(true), abs=tolerance)
    assert embed(first).shape == (DIMENSIONS,)
    assert np.linalg.norm(embed(first)) == pytest.approx(1.0, abs=1e-6)
    assert not embed(np.zeros((4, 8), np.float32)).any()


def test_embeddings_are_the_same_in_every_process() -> None:
    """Golden numbers: a change here makes every stored embedding useless."""
    context = np.arange(24, dtype=np.float32).reshape(4, 6) / np.float32(24)
    found = embed(context)
    places = np.flatnonzero(found)
    assert places[:4].tolist() == GOLDEN_PLACES
    assert found[places[:4]] == pytest.approx(GOLDEN_VALUES, abs=1e-6)


GOLDEN_PLACES = [85, 155, 166, 171]
GOLDEN_VALUES = [-0.2433196, -0.0608299, 0.1368673, 0.2281121]


# ---------------------------------------------------------------------- codec


@pytest.mark.parametrize("kind", StateKind)
@pytest.mark.parametrize("log_snr", [-3.25, math.inf])
def test_a_state_survives_as_bytes(kind: StateKind, log_snr: float) -> None:
    state = StoredState("e1.0", kind, log_snr, latent(1) / np.float32(3))
    found = decode("e1.0", encode(state))
    assert (found.id, found.kind, found.log_snr) == ("e1.0", kind, log_snr)
    if kind is StateKind.FINAL:
        assert np.array_equal(found.latent, state.latent)
    else:
        assert np.allclose(found.latent, state.latent, rtol=2**-11)


@given(st.data())
def test_damaged_bytes_are_never_a_state(data: st.DataObject) -> None:
    whole = encode(StoredState("e1.0", StateKind.CLEAN, -1.0, latent(1)))
    place = data.draw(st.integers(0, len(whole) - 1))
    flipped = bytearray(whole)
    flipped[place] ^= data.draw(st.integers(1, 255))
    for bad in (bytes(flipped), whole[:place], whole + b"x"):
        with pytest.raises(CodecError):
            decode("e1.0", bad)


@given(st.binary(max_size=200))
def test_foreign_bytes_are_never_a_state(data: bytes) -> None:
    with pytest.raises(CodecError):
        decode("e1.0", data)


def test_a_version_of_the_future_is_named() -> None:
    body = b"DRNS" + bytes([9]) + encode(StoredState("a.0", StateKind.CLEAN, 0.0, latent(1)))[5:-4]
    with pytest.raises(CodecError, match="version 9"):
        decode("a.0", body + struct.pack("<I", zlib.crc32(body)))


# ---------------------------------------------------------------------- index


@given(st.lists(st.tuples(st.integers(0, 9), st.booleans()), max_size=40))
def test_the_table_finds_what_a_plain_search_finds(changes: list[tuple[int, bool]]) -> None:
    table, plain = VectorTable(), {}
    for number, put in changes:
        if put:
            plain[str(number)] = prompt(number)
            table.put(str(number), prompt(number))
        elif str(number) in plain:
            del plain[str(number)]
            table.remove(str(number))
    asked = prompt(77)
    expected = sorted(plain, key=lambda name: -float(plain[name] @ asked))
    assert [name for name, _ in table.nearest(asked, 4)] == expected[:4]
    left = [name for name, _ in table.nearest(asked, 100, without=expected[:1])]
    assert left == expected[1:]


def test_applying_a_change_twice_is_harmless() -> None:
    index = EntryIndex()
    refs = [StateRef(state_id("e", i), StateKind.NOISY, float(i)) for i in range(2)]
    for _ in range(2):
        index.add("e", "g", prompt(1), refs, ["me"])
    assert (index.entries, index.states) == (1, 2)
    assert index.nearest("g", prompt(1), claim="me", limit=1) == []
    assert index.nearest("other", prompt(1), claim="", limit=1) == []
    for _ in range(2):
        index.drop_state("e.0")
    (found,) = index.nearest("g", prompt(1), claim="you", limit=1)
    assert [ref.id for ref in found.states] == ["e.1"]
    for _ in range(2):
        index.drop_state("e.1")
    assert (index.entries, index.states) == (0, 0)
    assert index.nearest("g", prompt(1), claim="you", limit=1) == []
    assert entry_of("x.y.3") == "x.y"


# ---------------------------------------------------------------------- policies


@given(
    st.lists(st.tuples(st.floats(0, 1e5), st.integers(1, 50)), min_size=1, max_size=20),
    st.floats(0, 1e5),
)
def test_the_aged_score_is_the_decayed_sum_of_steps_saved(
    uses: list[tuple[float, int]], wait_s: float
) -> None:
    """Against the definition: every use's steps halve with each half-life, per byte."""
    policy, size_bytes, now_s, total, score = Lcbfu(3600.0), 1000, 1.7e9, 0.0, None
    for gap_s, steps in uses:
        now_s += gap_s
        total = total * 2.0 ** (-gap_s / 3600.0) + steps / size_bytes
        facts = Facts(uses=1, steps_saved=steps, size_bytes=size_bytes, now_s=now_s)
        score = policy.stored(facts) if score is None else policy.used(score, facts)
    assert score is not None
    at_s = now_s + wait_s
    aged = math.log2(total) - wait_s / 3600.0
    assert score - at_s / 3600.0 == pytest.approx(aged, abs=1e-3)


def test_policies_go_by_name() -> None:
    assert [policy_named(name).name for name in POLICIES] == list(POLICIES)
    assert policy_named("lcbfu", half_life_s=60.0).half_life_s == 60.0
    with pytest.raises(InvalidRequestError, match="allowed: lcbfu"):
        policy_named("random")
    with pytest.raises(InvalidRequestError, match="above 0"):
        policy_named("lcbfu", half_life_s=0.0)


# ---------------------------------------------------------------------- profiles, jumps, settings


def test_the_published_table() -> None:
    table = JumpTable()
    found = [table.share(s) for s in (0.2, 0.65, 0.7499, 0.75, 0.85, 0.9, 0.95, 0.9999999)]
    assert found == [0.0, 0.1, 0.1, 0.2, 0.3, 0.4, 0.5, 0.5]
    assert JumpTable(((1.0, 0.3),)).share(0.9999999) == 0.3
    assert JumpTable(()).share(1.0) == 0.0


@pytest.mark.parametrize(
    "steps", [((0.9, 0.1), (0.8, 0.2)), ((0.8, 0.3), (0.9, 0.2)), ((0.5, 1.0),), ((math.nan, 0.1),)]
)
def test_tables_that_make_no_sense_are_refused(steps: tuple[tuple[float, float], ...]) -> None:
    with pytest.raises(InvalidRequestError):
        JumpTable(steps)


def test_a_profile_survives_its_file(tmp_path: Path) -> None:
    profile = ReuseProfile(
        jumps=JumpTable(((0.9, 0.25),)),
        kind=StateKind.CLEAN,
        fractions=(0.5, 1.0),
        checkpoint="weights",
    )
    write_profile(tmp_path / "p.json", profile, {"pairs": 3})
    assert read_profile(tmp_path / "p.json") == profile
    (tmp_path / "p.json").write_text('{"format": 9}')
    with pytest.raises(InvalidRequestError, match="format 9"):
        read_profile(tmp_path / "p.json")
    with pytest.raises(InvalidRequestError, match=r"missing\.json"):
        read_profile(tmp_path / "missing.json")


@pytest.mark.parametrize(
    "wrong", [{"fractions": ()}, {"fractions": (0.5, 0.2)}, {"fractions": (1.0,)}]
)
def test_noisy_states_are_of_pictures_under_way(wrong: dict[str, tuple[float, ...]]) -> None:
    with pytest.raises(InvalidRequestError):
        ReuseProfile(kind=StateKind.NOISY, **wrong)  # type: ignore[arg-type]


def test_a_bad_url_is_refused_without_repeating_it() -> None:
    with pytest.raises(InvalidRequestError) as caught:
        RedisSettings(url="http://:secret@host")
    assert "secret" not in str(caught.value)
    assert "secret" not in repr(RedisSettings(url="redis://:secret@host"))


def test_tls_and_passwords_reach_the_connection(tmp_path: Path) -> None:
    settings = RedisSettings(url="rediss://ada:pass@host:7/2", tls_ca=tmp_path / "ca.pem")
    with settings.client(0.2) as client:
        given = client.connection_pool.connection_kwargs
    assert (given["username"], given["password"], given["db"]) == ("ada", "pass", 2)
    assert given["ssl_ca_certs"] == str(tmp_path / "ca.pem")
    assert given["ssl_check_hostname"] is True
    assert given["socket_timeout"] == given["socket_connect_timeout"] == 0.2


def test_back_off_doubles_up_to_its_bound_and_starts_over() -> None:
    backoff = Backoff(first_s=0.1, most_s=1.0, jitter=lambda: 1.0)
    assert [backoff.failed() for _ in range(6)] == pytest.approx([0.1, 0.2, 0.4, 0.8, 1.0, 1.0])
    backoff.succeeded()
    assert backoff.failed() == pytest.approx(0.1)
    assert Backoff(jitter=lambda: 0.0).failed() == pytest.approx(0.05)
