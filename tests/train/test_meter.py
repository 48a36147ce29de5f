from types import SimpleNamespace

import pytest
import torch

from raphael.train import meter
from raphael.train.distributed.world import World
from raphael.train.meter import Meter, peak_tflops


@pytest.fixture()
def clock(monkeypatch):
    now = SimpleNamespace(s=100.0)
    monkeypatch.setattr(meter, "time", SimpleNamespace(perf_counter=lambda: now.s))
    return now


def test_rates_are_of_the_time_that_counts(clock):
    """20 s for 80 images, of which 4 s for images: 5 images/s; 2 of the other 16 s waiting for batches."""
    measured = Meter(World(1, 2), 580, 100, flops_per_image=3e12)
    with measured.paused():
        clock.s += 4
    with measured.waiting():
        clock.s += 2
    clock.s += 14
    point = measured.point(180)
    assert point["train/images_per_s"] == pytest.approx(5) and point["train/time_left_s"] == pytest.approx(80)
    assert point["train/loader_wait"] == pytest.approx(2 / 16)
    assert point["train/tflop_per_s"] == pytest.approx(7.5)  # of each of two workers
    assert "train/mfu" not in point  # a processor has no peak
    clock.s += 10
    assert measured.point(190)["train/images_per_s"] == pytest.approx(1)  # the next interval forgets the last


def test_mfu_is_the_share_of_the_peak(clock):
    measured = Meter(World(), 100, 0, flops_per_image=2.413e12)
    measured.peak = peak_tflops("NVIDIA H200")
    clock.s += 1
    assert measured.point(150)["train/mfu"] == pytest.approx(150 * 2.413 / 989)  # MLPerf v5.0's 36.5 %
    assert 0.364 < 149.6 * 2.413 / 989 < 0.366


def test_without_known_operations_there_is_neither_tflops_nor_mfu(clock):
    clock.s += 1
    assert not {"train/tflop_per_s", "train/mfu"} & Meter(World(), 100, 0).point(1).keys()


@pytest.mark.parametrize(
    ("name", "peak"),
    [
        ("NVIDIA A100-SXM4-80GB", 312.0), ("NVIDIA A100-PCIE-40GB", 312.0), ("NVIDIA H100 80GB HBM3", 989.0),
        ("NVIDIA H200", 989.0), ("NVIDIA H100 PCIe", None), ("NVIDIA H200 NVL", None), ("Tesla T4", None),
    ],
)  # fmt: skip
def test_a_device_whose_peak_is_not_known_has_none(name, peak):
    assert peak_tflops(name) == peak


def test_memory_is_the_peak_of_the_process():
    measured = Meter(World(), 100, 0)
    before = measured.point(1)["train/memory_gb"]
    held = torch.ones(16 * 2**20)  # 64 MiB
    after = measured.point(2)["train/memory_gb"]
    del held
    assert before > 0.05 and measured.point(3)["train/memory_gb"] >= after >= before


def test_operations_of_an_image_are_the_mean_over_the_records_sizes():
    from raphael.base.config.preset import load_preset
    from raphael.base.records import MOMENTS
    from raphael.summary.model import unet_flops
    from raphael.systems.raphael.training import training_flops

    preset = load_preset("tiny-debug")
    factor = 2 ** (len(preset.vae.channels) - 1)

    class Fake:
        buckets = [
            SimpleNamespace(count=count, fields={MOMENTS: ("float16", (8, *side))})
            for count, side in ((30, (8, 8)), (10, (8, 16)), (0, (4, 4)))
        ]

        def __len__(self):
            return 40

    small, large = (unet_flops(preset, (8 * factor, side * factor)) for side in (8, 16))
    assert large > 1.5 * small
    assert training_flops(preset, Fake()) == pytest.approx(3 * (30 * small + 10 * large) / 40)
