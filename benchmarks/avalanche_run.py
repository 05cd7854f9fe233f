"""This side of a comparison with Avalanche: what is handed over, and what comes back.

Avalanche runs in an environment of its own, which ``make avalanche`` makes, through
`avalanche_peer.py`.
"""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
from sequence import Protocol

from lifelong_ray.learning import History
from lifelong_ray.scenarios import Scenario

AVALANCHE_PYTHON = Path(".venv-avalanche/bin/python")


PEER_METHODS = ("naive", "er", "derpp", "ewc", "lwf")
_DATA, _REPORT = "experiences.npz", "peer.json"


def hand_over(scenario: Scenario, scratch: Path) -> Path:
    """Write the experiences as `avalanche_peer.py` reads them: nothing is left to cut."""
    arrays: dict[str, Any] = {}
    for part in ("train", "test"):
        images = [getattr(e, f"{part}_images") for e in scenario.experiences]
        labels = [getattr(e, f"{part}_labels") for e in scenario.experiences]
        arrays[f"x_{part}"] = np.concatenate(images)
        arrays[f"y_{part}"] = np.concatenate(labels)
        arrays[f"t_{part}"] = np.repeat(np.arange(len(labels)), [len(one) for one in labels])
    np.savez(scratch / _DATA, **arrays)
    return scratch / _DATA


def peer_command(
    protocol: Protocol, hidden: tuple[int, ...], methods: list[str], seed: int, scratch: Path
) -> list[str]:
    """The command that runs Avalanche's strategies of these names under the same protocol.

    Args:
        protocol: What all methods have in common.
        hidden: Units of the perceptron's layers.
        methods: Of `PEER_METHODS`.
        seed: Of weights, batches and memory.
        scratch: Where `hand_over` has written.
    """
    return [
        *(str(AVALANCHE_PYTHON), str(Path(__file__).with_name("avalanche_peer.py"))),
        *("--data", str(scratch / _DATA), "--out", str(scratch / _REPORT)),
        *("--scenario", protocol.scenario, "--seed", str(seed), "--methods", ",".join(methods)),
        *("--experiences", str(protocol.num_experiences)),
        *("--iterations", str(protocol.iterations), "--batch-size", str(protocol.batch_size)),
        *("--memory-per-class", str(protocol.memory_per_class)),
        *("--order", ",".join(map(str, range(protocol.num_classes)))),
        *("--hidden", ",".join(map(str, hidden)), "--ewc-lambda", f"{protocol.lambda_ewc:g}"),
        *("--precision", protocol.precision, "--device", protocol.device),
    ]


def run_peer(command: list[str], scratch: Path) -> tuple[dict[str, Any], dict[str, dict[str, Any]]]:
    """Run Avalanche in its own environment; return how it ran, and its methods' figures."""
    subprocess.run(command, check=True)
    report = json.loads((scratch / _REPORT).read_text(encoding="utf-8"))
    sizes = report["num_test_examples"]
    how = {"library": report["library"], "torch": report["torch"], **report["settings"]}
    return how, {
        name: History.of(result["accuracy"], num_examples=sizes).summary() | result
        for name, result in report["methods"].items()
    }
