"""What a network costs is what was worked by hand, and measuring leaves it as it was."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from segmentation.deployment import measure
from segmentation.deployment.measure import CONVENTIONS
from segmentation.networks.unet import UNet

ROW = pytest.mark.row("P41")


def tiny():
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.ReLU(), nn.Conv2d(4, 2, 1))


@ROW
def test_a_cost_is_the_one_worked_by_hand():
    found = measure.measure(tiny(), 1, 32, 32, threads=1, runs=3, warmup=1)
    assert (found.parameters, found.macs) == (4 * 9 + 4 + 4 * 2 + 2, 32 * 32 * (9 * 4 + 4 * 2))
    # Most lives while ReLU works: weights, the image, and 4 channels before and after it.
    assert found.peak_mib * 2**20 == 4 * (50 + 32 * 32 + 2 * 4 * 32 * 32)
    assert 0 < found.p50_ms <= found.p95_ms
    assert (found.device, found.threads, found.runs, found.warmup) == ("cpu", 1, 3, 1)


@ROW
def test_a_network_in_place_needs_less_memory_and_a_batch_more():
    def peak(layer, **more):
        model = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), layer)
        return measure.measure(model, 1, 32, 32, runs=1, warmup=0, **more).peak_mib * 2**20

    assert peak(nn.ReLU(inplace=True)) == 4 * (40 + 5 * 32 * 32)
    assert peak(nn.Flatten()) == 4 * (40 + 5 * 32 * 32), "a view has its base's storage"
    assert peak(nn.ReLU(inplace=True), batch=3) == 4 * (40 + 3 * 5 * 32 * 32)


@ROW
def test_the_record_states_every_convention():
    record = json.loads(json.dumps(measure.measure(tiny(), 1, 8, 8, runs=1, warmup=0).to_dict()))
    assert record["conventions"] == CONVENTIONS
    assert "1 MAC = 2 FLOPs" in record["conventions"]["macs"]
    assert {"parameters", "macs", "p50_ms", "p95_ms", "peak_mib"} <= record.keys()


@ROW
def test_the_reference_unet_costs_the_golden_macs():
    with torch.device("meta"):
        model = UNet(1, 4, (64, 128, 256, 512), 1024)
    assert measure.cost.macs(model, 1, 256, 256) == 48_104_472_576


@ROW
def test_percentiles_leave_the_warm_up_out(monkeypatch):
    clock = iter([0, 100, 200, 201, 300, 302, 400, 403])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(clock))
    calls = []
    found = measure.latency(lambda: calls.append("call"), runs=3, warmup=1, wait=lambda: calls.append("wait"))
    assert (found.p50_ms, found.p95_ms) == (2000, pytest.approx(2900))
    assert calls == ["wait", "call", "wait"] * 4


def test_measuring_leaves_mode_and_threads_as_they_were():
    threads = torch.get_num_threads()
    model = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    measure.measure(model, 1, 8, 8, threads=threads + 1, runs=1, warmup=1)
    assert model.training and torch.get_num_threads() == threads
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("name", "value"), [("runs", 0), ("batch", 0), ("threads", -1), ("warmup", -1)])
def test_a_number_out_of_range_is_refused(name, value):
    with pytest.raises(ValueError, match=rf"{name}: got {value}; expected at least"):
        measure.measure(tiny(), 1, 8, 8, **{name: value})


@ROW
@pytest.mark.gpu
def test_a_gpu_is_measured_too():
    found = measure.measure(tiny(), 1, 256, 256, device="cuda", runs=5, warmup=2)
    assert found.device == torch.cuda.get_device_name() and found.threads is None
    assert 0 < found.p50_ms <= found.p95_ms
    least = 4 * (50 + 256 * 256 * (1 + 2 * 4)) / 2**20
    assert least <= found.peak_mib < least + 64
