"""Operations against closed forms, peaks by name, and what is said where there is no figure."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from lifelong_ray.config import ModelConfig
from tests.unit.benchmarks.scripts import load

peak, gpu, fisher, ewc_step, report = map(load, ("peak", "gpu", "fisher", "ewc_step", "report"))

ON_A100 = {"device": "NVIDIA A100-SXM4-80GB", "precision": "bf16"}


def test_operations_of_an_mlp_are_those_of_its_products() -> None:
    config = ModelConfig(name="mlp", widths=(5,), image_size=4)

    # Forward, gradients of weights, and of what enters any layer but the first.
    assert peak.training_flops_per_example(config, 3) == 2 * (2 * 16 * 5 + 3 * 5 * 3)


def test_operations_of_a_convolution_are_those_of_its_products() -> None:
    config = ModelConfig(
        name="convnet", widths=(5,), image_size=8, channels=3, norm="none", pool_size=2
    )

    convolution, head = 8 * 8 * 3 * 5 * 3 * 3, 2 * 2 * 5 * 4
    assert peak.training_flops_per_example(config, 4) == 2 * (2 * convolution + 3 * head)


@pytest.mark.parametrize(
    ("name", "tera"),
    [
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H200", 989),
        ("NVIDIA GH200 480GB", 989),
        ("NVIDIA A100-SXM4-80GB", 312),
        ("NVIDIA A10G", 70),
        ("NVIDIA L4", 121),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
    ],
)
def test_the_peak_follows_from_the_name_of_the_device(name: str, tera: int) -> None:
    assert peak.documented_peak(name, "bf16") == tera * 1e12


@pytest.mark.parametrize(
    ("name", "precision"),
    [
        ("NVIDIA H100 80GB HBM3", "fp32"),
        ("NVIDIA H100 80GB HBM3 MIG 1g.10gb", "bf16"),
        ("NVIDIA T400", "bf16"),
        ("cpu", "bf16"),
    ],
)
def test_no_peak_is_made_up(name: str, precision: str) -> None:
    assert peak.documented_peak(name, precision) is None


def test_the_share_is_operations_per_second_over_the_peak() -> None:
    figures = peak.throughput(10**9, 312, 2.0, **ON_A100)

    assert figures["examples_per_second"] == 156
    assert figures["tflops_per_second"] == pytest.approx(0.156)
    assert figures["share_of_peak"] == pytest.approx(0.0005)


def test_a_peak_that_is_given_goes_before_the_documented_one() -> None:
    figures = peak.throughput(10**9, 312, 2.0, **ON_A100, peak_tflops=0.312)

    assert figures["share_of_peak"] == pytest.approx(0.5)


def test_an_unknown_peak_gives_no_share_and_says_what_to_do() -> None:
    figures = peak.throughput(10**9, 1, 1.0, device="NVIDIA X1", precision="bf16")

    assert figures["share_of_peak"] is None
    assert figures["no_share"] == (
        "no documented bf16 peak of NVIDIA X1; give it with --peak-tflops"
    )


def test_a_training_reaches_a_share_of_the_peak() -> None:
    ticks = iter(range(100))

    found = gpu.measure_training(
        "mlp",
        3,
        4,
        device="cpu",
        precision="fp32",
        peak_tflops=1e-3,
        now_s=lambda: float(next(ticks)),
    )

    # Eight batches make an epoch, so that three steps lie between two looks at the clock.
    flops = peak.training_flops_per_example(fisher.MODELS["mlp"], 10)
    assert found["milliseconds_per_step"] == pytest.approx(1e3 / 3)
    assert found["plain_throughput"]["share_of_peak"] == pytest.approx(12 * flops / 1e9)


@pytest.fixture
def no_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)


@pytest.mark.usefixtures("no_gpu")
def test_without_a_gpu_every_case_says_why_it_was_skipped(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gpu.main(models="mlp,resnet18", out=tmp_path / "gpu.json")

    models = json.loads((tmp_path / "gpu.json").read_text())["models"]
    assert list(models) == ["mlp", "resnet18"]
    for cases in models.values():
        assert list(cases) == ["training", "fisher", "ewc_step"]
        assert all(case["skipped"].startswith("no CUDA device: ") for case in cases.values())
    assert "mlp, training is skipped: no CUDA device: " in capsys.readouterr().out


@pytest.mark.usefixtures("no_gpu")
@pytest.mark.parametrize("command", [fisher, ewc_step])
def test_cost_commands_skip_a_device_that_is_not_there(command: Any, tmp_path: Path) -> None:
    command.main(models="mlp", device="cuda", out=tmp_path / "cost.json")

    (found,) = json.loads((tmp_path / "cost.json").read_text())["models"].values()
    assert found["skipped"].startswith("no CUDA device: ")


@pytest.mark.parametrize("command", [fisher, ewc_step, gpu])
@pytest.mark.parametrize("wrong", [{"device": "gpu"}, {"precision": "fp16"}, {"models": "vgg"}])
def test_a_word_that_is_not_known_is_no_reason_to_skip(command: Any, wrong: dict[str, Any]) -> None:
    with pytest.raises(Exception, match=f"{next(iter(wrong.values()))} is not a "):
        command.main(**{"models": "mlp", "device": "cpu"} | wrong)


@pytest.mark.usefixtures("no_gpu")
def test_the_report_says_what_was_skipped_and_why(tmp_path: Path) -> None:
    gpu.main(models="mlp", out=tmp_path / "gpu.json")
    fisher.main(models="mlp", device="cuda", out=tmp_path / "fisher_gpu.json")

    report.main(results=tmp_path, docs=tmp_path)

    text = (tmp_path / "benchmarks.md").read_text()
    assert "Skipped: mlp training, mlp fisher, mlp ewc step: no CUDA device: " in text
    assert "Skipped: mlp: no CUDA device: " in text


def test_the_report_shows_shares_of_the_peak(tmp_path: Path) -> None:
    figures = peak.throughput(10**12, 312, 2.0, **ON_A100)
    setup = {"date": "today", "cpus": 2, "torch": "2", "gpu": "A100", "device": "cuda"}
    written = {"setup": setup, "models": {"mlp": {"training": {"plain_throughput": figures}}}}
    (tmp_path / "gpu.json").write_text(json.dumps(written))

    report.main(results=tmp_path, docs=tmp_path)

    text = (tmp_path / "benchmarks.md").read_text()
    assert "| mlp | training | 156.0 | 312 | 50.0 |" in text
    assert "Measured today on one A100" in text


def test_bf16_products_do_not_change_the_precision_of_the_fisher() -> None:
    ticks = iter(range(1_000))
    found = fisher.measure(
        "mlp",
        16,
        1,
        exact_rounds=0,
        num_general=0,
        device="cpu",
        precision="bf16",
        peak_tflops=1.0,
        now_s=lambda: float(next(ticks)),
    )

    assert found["ways"]["empirical"]["max_relative_error"] < 1e-4
    assert found["plain_throughput"]["share_of_peak"] > 0
