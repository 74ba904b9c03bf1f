"""Measuring this machine for its profile."""

import pytest
import torch

from herd.plan import measure, profile


def test_attention_is_measured_on_numbers_that_are_not_denormal(monkeypatch):
    pools = []
    monkeypatch.setattr(measure, "paged_attention", lambda q, k, v, pool, ragged, layer: pools.append(pool))
    monkeypatch.setattr(measure, "seconds_of", lambda work, budget: work())
    measure.attention_seconds("int8", 16, 16)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        smallest = pools[0].view(dtype).abs().min()
        assert torch.finfo(dtype).tiny < smallest < 2, "some processors take a hundred times as long"


@pytest.mark.soak
def test_measuring_this_machine_fills_a_profile(monkeypatch, tmp_path):
    monkeypatch.setenv("HERD_CACHE", str(tmp_path))
    heard: list[str] = []
    found = measure.measure_machine(heard.append)
    assert heard[0] == "memory"
    assert found.read > 1e9
    assert all(rate > 0 for rates in found.gemm.values() for rate in rates.values())
    profile.save_profile(found)
    assert profile.load_profile() == found
