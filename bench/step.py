"""One training step of SwAV beside one of a plain supervised ResNet-50, on the same device in the same run.

    python bench/step.py [--device cuda] [--batch 64] [--precision bf16] [--compile] [--steps 20]

Prints a table: milliseconds per step (median of alternating rounds), images/s, images/s in equivalents of one 224-pixel
ResNet-50 pass, and peak memory. Data are random and already on the device: this is the step alone.
"""

import argparse
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from swav.config import RuntimeConfig
from swav.data.batch import CropBatch
from swav.models.resnet import ResNet
from swav.recipes import get_recipe
from swav.train import build_state, train_step

RECIPE = "swav_r50_2x224_6x96_800ep"
# Multiply-adds of all crops over those of one 224-pixel crop; convolutions cost by area.
EQUIVALENTS = 2 + 6 * (96 / 224) ** 2


def swav_step(batch: int, device: torch.device, runtime: RuntimeConfig) -> Callable[[], None]:
    """The project's own step on one batch of 2x224 and 6x96 crops."""
    config = replace(get_recipe(RECIPE), runtime=runtime)
    state = build_state(config, device)
    crops = [
        torch.randn(group.num_crops * batch, 3, group.size_px, group.size_px, device=device).contiguous(
            memory_format=torch.channels_last
        )
        for group in config.crops
    ]
    crop_batch = CropBatch(crops=crops, epoch=1, global_offset=0, global_size=batch)
    return lambda: _discard(train_step(state, crop_batch, lr=0.1, precision=runtime.precision))


def supervised_step(batch: int, device: torch.device, runtime: RuntimeConfig) -> Callable[[], None]:
    """Cross-entropy on 1000 classes at 224 pixels, SGD with momentum, same precision and memory format."""
    network = ResNet("resnet50", num_classes=1000).to(device)
    network.to(memory_format=torch.channels_last)
    if runtime.compile:
        network.compile()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9, foreach=True)
    images = torch.randn(batch, 3, 224, 224, device=device).contiguous(memory_format=torch.channels_last)
    labels = torch.randint(1000, (batch,), device=device)

    def step() -> None:
        with torch.autocast(device.type, dtype=torch.bfloat16, enabled=runtime.precision == "bf16"):
            loss = nn.functional.cross_entropy(network(images), labels)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def _discard(_value: object) -> None:
    """Steps are timed, not looked at."""


def milliseconds(step: Callable[[], None], device: torch.device, num_steps: int) -> float:
    """Wall time per step."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    for _ in range(num_steps):
        step()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return 1000 * (time.perf_counter() - start) / num_steps


def peak_gigabytes(step: Callable[[], None], device: torch.device) -> float | None:
    """Peak memory of one step, where the device counts it."""
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    step()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / 1e9


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--precision", default="bf16", choices=["bf16", "fp32"])
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    device = torch.device(options.device)
    runtime = RuntimeConfig(precision=options.precision, compile=options.compile)
    builders = {"SwAV 2x224+6x96": (swav_step, EQUIVALENTS), "supervised 224": (supervised_step, 1.0)}
    # One at a time in memory for the peaks, then both for the timing.
    peaks = {}
    for name, (build, _) in builders.items():
        step = build(options.batch, device, runtime)
        milliseconds(step, device, 2)
        peaks[name] = peak_gigabytes(step, device)
        del step
    steps = {name: build(options.batch, device, runtime) for name, (build, _) in builders.items()}
    for step in steps.values():
        milliseconds(step, device, 3)
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(options.rounds):
        for name, step in steps.items():
            times[name].append(milliseconds(step, device, options.steps))
    where = torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"
    write = sys.stdout.write
    write(
        f"{where}, torch {torch.__version__}, batch {options.batch}, {options.precision}, compile={options.compile}\n"
    )
    write("| step | ms | images/s | 224-equivalents/s | peak GB |\n|---|---|---|---|---|\n")
    for name, (_, equivalents) in builders.items():
        median = statistics.median(times[name])
        rate = 1000 * options.batch / median
        peak = f"{peaks[name]:.1f}" if peaks[name] is not None else "-"
        write(f"| {name} | {median:.1f} | {rate:.1f} | {rate * equivalents:.1f} | {peak} |\n")


if __name__ == "__main__":
    main()
