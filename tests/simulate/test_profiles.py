from __future__ import annotations

from pathlib import Path

import pytest

from offload_engine.errors import UsageError
from offload_engine.simulate.profile import LINK, PROFILES, UNITS, load_profile, profile_names
from tests.simulate.trace_data import machine

WANTED = ["cpu-disk", "h100-80gb", "laptop-8gb", "rtx3060-12gb", "rtx4060-8gb", "rtx4070-12gb", "rtx4090-24gb"]


@pytest.mark.parametrize("name", profile_names())
def test_every_figure_has_a_unit_and_a_source(name: str) -> None:
    profile = load_profile(name)
    assert profile.name == name
    for figure in (getattr(profile, field) for field in UNITS):
        assert figure is None or (figure.unit and len(figure.source) > 10)
    assert (profile.link_bandwidth is None) == (profile.device == "cpu")


def test_the_machines_asked_for_are_there() -> None:
    assert set(WANTED) <= set(profile_names())
    assert load_profile("rtx5090").memory.value == 32 * 2**30


def test_cards_are_ordered_as_they_were_built() -> None:
    cards = [load_profile(name) for name in ("rtx3060", "rtx4090", "rtx5090", "h100")]
    for field in ("compute", "memory_bandwidth"):
        values = [getattr(card, field).value for card in cards]
        assert values == sorted(values)
    eight, sixteen = (load_profile(name).link_bandwidth for name in ("rtx4060", "rtx4070"))
    assert eight is not None
    assert sixteen is not None
    assert sixteen.value == pytest.approx(2 * eight.value, rel=1e-3)


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("rtx40", "'rtx40' fits rtx4060-8gb and rtx4070-12gb and rtx4090-24gb"),
        ("abacus", "'abacus' is no profile; choose one of cpu-disk,"),
        ("", "'' is no profile"),
        ("nowhere.toml", "nowhere.toml: can't be read"),
    ],
)
def test_a_name_that_fits_nothing_is_refused(name: str, told: str) -> None:
    with pytest.raises(UsageError) as refused:
        load_profile(name)
    assert told in str(refused.value)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("old", "new", "told"),
    [
        ('unit = "B/s"', 'unit = "GB/s"', "memory_bandwidth is in 'GB/s', wanted 'B/s'"),
        ("value = 0.8,", "value = 1.8,", "memory_efficiency is 1.8, wanted a share"),
        ("value = 2.72e+11", "value = 0", "memory_bandwidth is 0, wanted more"),
        ("link_latency", "# link_latency", "device is 'cuda', which needs link_latency"),
        ('device = "cuda"', 'device = "cpu"', "device is 'cpu', which has no link_bandwidth"),
        ("disk_latency =", "lunch = 1\ndisk_latency =", "unknown key 'lunch'"),
        ("launch =", "# launch =", "'launch': field required"),
        ('name = "rtx', "name = rtx", "no TOML"),
    ],
)
def test_a_file_that_makes_no_sense_is_refused(tmp_path: Path, old: str, new: str, told: str) -> None:
    text = (PROFILES / "rtx4060-8gb.toml").read_text()
    assert old in text
    path = tmp_path / "mine.toml"
    path.write_text(text.replace(old, new, 1))
    with pytest.raises(UsageError) as refused:
        load_profile(str(path))
    assert str(refused.value).startswith(f"{path}: ")
    assert told in str(refused.value)


def test_a_file_of_ones_own_is_a_profile(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text((PROFILES / "rtx4060-8gb.toml").read_text().replace('name = "rtx4060-8gb"', 'name = "mine"'))
    assert load_profile(str(path)).name == "mine"


def test_measured_figures_replace_published_ones() -> None:
    changed = machine().with_values("a stop-watch", disk_bandwidth=7.0)
    assert (changed.disk_bandwidth.value, changed.disk_bandwidth.source) == (7.0, "a stop-watch")
    assert changed.memory_bandwidth == machine().memory_bandwidth
    with pytest.raises(UsageError, match=r"has no figure 'link_latency'"):
        machine("cpu").with_values("a stop-watch", link_latency=1.0)
    assert all(getattr(machine("cpu"), name) is None for name in LINK)


@pytest.mark.parametrize("name", ["rtx4060-8gb", "cpu-disk"])
def test_a_profile_written_is_a_profile_read(tmp_path: Path, name: str) -> None:
    measured = load_profile(name).with_values('a "stop-watch"\\ of 5 µs', disk_latency=1.5e-5)
    path = tmp_path / "mine.toml"
    path.write_text(measured.toml(), encoding="utf-8")
    assert load_profile(str(path)) == measured
