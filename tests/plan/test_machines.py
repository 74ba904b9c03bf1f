"""Machines by name, the user's own file, and one-line errors for mistakes in it."""

import pytest

from herd.errors import HerdError, PlanError
from herd.plan import machines


def test_every_entry_of_the_catalogue_is_complete():
    known = machines.read_catalogue()
    for name in known.devices:
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
def test_machines_are_found_by_their_usual_names(text, count, name):
    machine = machines.find_machine(text)
    assert (machine.count, machine.device.name) == (count, name)


def test_the_memory_may_follow_the_name():
    assert machines.find_machine("M2Ultra-128GB").device.memory == 128 * 2**30


def test_memory_channels_add_up():
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
def test_an_unknown_name_is_refused_with_what_to_change(text, said):
    with pytest.raises(PlanError) as caught:
        machines.find_machine(text)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_group_uses_the_link_inside_a_node_if_it_fits_there():
    machine = machines.find_machine("16xH100")
    assert machine.join(8).name == "NVLink4"
    assert machine.join(2, stride=8).name == "RDMA-400G"
    assert machine.join(16).name == "RDMA-400G"


def test_a_users_file_adds_and_replaces_entries(tmp_path, monkeypatch):
    own = tmp_path / "herd" / "machines.yaml"
    own.parent.mkdir()
    own.write_text("devices:\n  Abacus: {kind: cpu, memory: 1e9, bandwidth: 2e9, flops: {fp32: 1e12}}\n")
    extra = tmp_path / "more.yaml"
    extra.write_text("links:\n  string: {bandwidth: 1, latency: 1, efficiency: 0.5}\n")
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path))
    known = machines.read_catalogue(extra)
    assert known.machine("2xabacus").device.memory == 1e9
    assert known.link("string").rate == 0.5
    assert known.machine("H100").device.memory == machines.find_machine("H100").device.memory


@pytest.mark.parametrize(
    "text, said",
    [
        ("devices: [1]", "named entries"),
        ("gpus: {}", "sections"),
        ("devices: {X: {kind: cpu, bandwidth: 1, flops: {fp32: 1}}}", "memory: Field required"),
        ("devices: {X: {kind: cpu, memory: fast, bandwidth: 1, flops: {fp32: 1}}}", "memory='fast'"),
        ("devices: {X: {kind: cpu, memory: -1, bandwidth: 1, flops: {fp32: 1}}}", "greater than 0"),
        ("devices: {X: {kind: car, memory: 1, bandwidth: 1, flops: {fp32: 1}}}", "kind"),
        ("devices: {X: {kind: cpu, efficiency: hoper, memory: 1, bandwidth: 1, flops: {fp32: 1}}}", "hopper"),
        ("devices: {X: {kind: cpu, memory: 1, bandwidth: 1}}", "flops"),
    ],
)
def test_a_mistake_in_a_file_is_reported_in_one_line(tmp_path, text, said):
    file = tmp_path / "machines.yaml"
    file.write_text(text)
    with pytest.raises(PlanError) as caught:
        machines.find_machine("X", file)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "text", ["devices:\n  X: &x {a: *x}", "devices:\n  X: !!timestamp 2026-13-45", "a: [\n"]
)
def test_a_file_that_is_not_yaml_is_refused_with_its_line(tmp_path, text):
    file = tmp_path / "machines.yaml"
    file.write_text(text)
    with pytest.raises(HerdError, match=r"machines\.yaml:\d: "):
        machines.read_catalogue(file)
