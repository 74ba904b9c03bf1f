"""Machines by name, the user's own on top, every mistake in one line."""

from __future__ import annotations

import pytest

from herd.errors import PlanError
from herd.plan import machines


def test_every_entry_is_whole():
    known = machines.catalogue()
    for name in known.device_names():
        machine = known.machine(f"16x{name}")
        assert machine.count == 16
        assert machine.nodes * machine.per_node >= 16
        assert machine.device.peak("bf16") > 1e11
        assert machine.device.source
        assert all(price.date and price.source for price in (*machine.rent, *machine.buy))
    assert all(known.link(name).source for name in known.links)
    assert all(known.efficiency(name).source for name in known.efficiencies)


@pytest.mark.parametrize(
    "text, count, name",
    [
        ("2xRTX4090", 2, "RTX4090"),
        ("16384xH100", 16384, "H100"),
        ("rtx 4090", 1, "RTX4090"),
        ("4 x nvidia h100", 4, "H100"),
        ("3090", 1, "RTX3090"),
        ("16,384×h100", 16384, "H100"),
    ],
)
def test_names(text, count, name):
    machine = machines.find_machine(text)
    assert (machine.count, machine.device.name) == (count, name)


def test_memory_behind_the_name():
    assert machines.find_machine("M2Ultra-128GB").device.memory == 128 * 2**30


def test_channels_add_up():
    one, twelve = machines.find_machine("DDR5-4800"), machines.find_machine("12xDDR5-4800")
    assert twelve.count == 1
    assert twelve.device.bandwidth == pytest.approx(460.8e9)
    assert twelve.device.memory == 12 * one.device.memory


@pytest.mark.parametrize(
    "text, said",
    [
        ("0xH100", "0 devices: give 1"),
        ("-3xH100", "-3 devices"),
        ("", "name one"),
        ("2xRTX4095", "RTX4090"),
        ("H100-40GB", "H100"),
        ("quantum", "machines.yaml"),
    ],
)
def test_unknown_names_say_what_to_change(text, said):
    with pytest.raises(PlanError) as caught:
        machines.find_machine(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_groups_talk_over_the_link_they_fit_on():
    machine = machines.find_machine("16xH100")
    assert machine.join(8).name == "NVLink4"
    assert machine.join(2, stride=8).name == "RDMA-400G"
    assert machine.join(16).name == "RDMA-400G"


def test_own_file_adds_and_replaces(tmp_path, monkeypatch):
    own = tmp_path / "herd" / "machines.yaml"
    own.parent.mkdir()
    own.write_text("devices:\n  Abacus: {kind: cpu, memory: 1e9, bandwidth: 2e9, flops: {fp32: 1e12}}\n")
    extra = tmp_path / "more.yaml"
    extra.write_text("links:\n  string: {bandwidth: 1, latency: 1, efficiency: 0.5}\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    known = machines.catalogue(extra)
    assert known.machine("2xabacus").device.memory == 1e9
    assert known.link("string").rate == 0.5
    assert known.machine("H100").device.memory == machines.find_machine("H100").device.memory


@pytest.mark.parametrize(
    "text, said",
    [
        ("devices: [1]", "named entries"),
        ("gpus: {}", "sections"),
        ("a: b: c", "not YAML"),
        ("devices: {X: {kind: cpu, bandwidth: 1, flops: {fp32: 1}}}", "memory is missing"),
        ("devices: {X: {kind: cpu, memory: fast, bandwidth: 1, flops: {fp32: 1}}}", "not a number"),
        ("devices: {X: {kind: cpu, memory: -1, bandwidth: 1, flops: {fp32: 1}}}", "above 0"),
        ("devices: {X: {kind: car, memory: 1, bandwidth: 1, flops: {fp32: 1}}}", "kind"),
        ("devices: {X: {kind: cpu, efficiency: hoper, memory: 1, bandwidth: 1, flops: {fp32: 1}}}", "hopper"),
        ("devices: {X: {kind: cpu, memory: 1, bandwidth: 1}}", "flops"),
    ],
)
def test_mistakes_in_a_file_are_one_line(tmp_path, text, said):
    file = tmp_path / "machines.yaml"
    file.write_text(text)
    with pytest.raises(PlanError) as caught:
        machines.find_machine("X", file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)
