"""An iteration of spherical k-means on one core: ours, faiss.Kmeans, and torch in chunks.

    OMP_NUM_THREADS=1 python bench/kmeans.py [--rows 100000] [--dim 128] [--clusters 3000] [--noise 1] [--rounds 7]

Prints seconds, GFLOP/s as if every inner product were made in float32, and the time of the others as a multiple of
ours: medians of alternating rounds. The rows are a mixture: a third more centres than clusters, and noise of so many
times a centre's norm added; with --common, so many times one vector is added to all centres, so that all rows look
alike. The features' float32 copies, which faiss and the matrix product need, are made before. Then: how many labels
equal those of faiss's exact search, and how far apart in float64 the scores of the others are.

faiss is no dependency of ours: pip install faiss-cpu.
"""

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

for _name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS"):
    os.environ[_name] = "1"  # read when NumPy and torch are imported

import numpy as np  # noqa: E402
import torch  # noqa: E402
from torch import Tensor  # noqa: E402
from torch.nn import functional as F  # noqa: E402, N812

from swav.ops.kmeans import ClusterSums, nearest_centroids  # noqa: E402

_BLOCK = 8192  # rows that a caller hands over at once
_CHUNK = 512  # rows of the chunked torch version, its fastest


def faiss_or_none() -> Any:
    """The module, on one thread, where it is installed."""
    try:
        import faiss  # type: ignore[import-not-found,import-untyped,unused-ignore]
    except ImportError:
        sys.stdout.write("No faiss here, so no comparison with it: pip install faiss-cpu\n")
        return None
    faiss.omp_set_num_threads(1)
    return faiss


def mixture(options: argparse.Namespace) -> Tensor:
    """Unit rows, float16 [N, D]."""
    draws = torch.Generator().manual_seed(0)
    centres = torch.randn(options.clusters * 4 // 3, options.dim, generator=draws)
    centres += options.common * torch.randn(options.dim, generator=draws)
    own = torch.randint(len(centres), (options.rows,), generator=draws)
    features = centres[own] + options.noise * torch.randn(options.rows, options.dim, generator=draws)
    return F.normalize(features, dim=1).half()


def our_labels(features_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """int64 [N]."""
    return torch.cat([nearest_centroids(block, centroids_KD)[0] for block in features_ND.split(_BLOCK)])


def our_iteration(features_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """The next centroids, from float16 rows."""
    found = ClusterSums.zeros(*centroids_KD.shape)
    for block in features_ND.split(_BLOCK):
        found.add(block, nearest_centroids(block, centroids_KD)[0])
    return found.centroids(centroids_KD)


def torch_iteration(features_ND: Tensor, centroids_KD: Tensor) -> Tensor:
    """The next centroids, from float32 rows."""
    sums = torch.zeros_like(centroids_KD)
    for chunk in features_ND.split(_CHUNK):
        sums.index_add_(0, (chunk @ centroids_KD.mT).argmax(dim=1), chunk)
    return torch.where((sums == 0).all(dim=1, keepdim=True), centroids_KD, F.normalize(sums, dim=1))


def bare_products(features_ND: Tensor, centroids_KD: Tensor) -> None:
    """The matrix product alone, NumPy's, into the same buffer again and again."""
    centroids_DK = centroids_KD.mT.contiguous().numpy()
    scores = np.empty((_CHUNK, len(centroids_KD)), dtype=np.float32)
    for chunk in features_ND.split(_CHUNK):
        np.matmul(chunk.numpy(), centroids_DK, out=scores[: len(chunk)])


def faiss_iterations(faiss: Any, features_ND: Tensor, centroids_KD: Tensor, num_iters: int) -> Any:
    """A run of faiss.Kmeans on all rows from given centroids; the trained object."""
    kmeans = faiss.Kmeans(
        features_ND.shape[1],
        len(centroids_KD),
        niter=num_iters,
        nredo=1,
        spherical=True,
        max_points_per_centroid=len(features_ND),  # no subsampling
        min_points_per_centroid=1,  # no warning
    )
    kmeans.train(features_ND.numpy(), init_centroids=centroids_KD.numpy())
    return kmeans


def seconds(work: Callable[[], object]) -> float:
    """What it took."""
    start = time.perf_counter()
    work()
    return time.perf_counter() - start


def compare_labels(faiss: Any, features_ND: Tensor, centroids_KD: Tensor, labels: Tensor) -> str:
    """A line on how our labels and those of faiss's exact search differ."""
    index = faiss.IndexFlatIP(centroids_KD.shape[1])
    index.add(centroids_KD.numpy())
    other = torch.from_numpy(index.search(features_ND.numpy(), 1)[1][:, 0])
    differ = (labels != other).nonzero()[:, 0]
    rows = features_ND[differ].double()
    gaps = ((centroids_KD[labels[differ]].double() - centroids_KD[other[differ]].double()) * rows).sum(dim=1)
    worst = f", by scores that differ by {gaps.abs().max():.1e} at most" if len(differ) else ""
    return f"labels equal to faiss IndexFlatIP: {1 - len(differ) / len(labels):.6f}; {len(differ)} rows differ{worst}\n"


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--clusters", type=int, default=3000)
    parser.add_argument("--noise", type=float, default=1)
    parser.add_argument("--common", type=float, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    torch.set_num_threads(1)
    faiss = faiss_or_none()
    write = sys.stdout.write
    half = mixture(options)
    chosen = torch.randperm(len(half), generator=torch.Generator().manual_seed(1))[: options.clusters]
    centroids = F.normalize(half[chosen].float(), dim=1)
    features = half.float()
    works: dict[str, Callable[[], object]] = {
        "ours, from float16": lambda: our_iteration(half, centroids),
        "ours, labels only": lambda: our_labels(half, centroids),
        "torch in chunks": lambda: torch_iteration(features, centroids),
        "matrix product alone": lambda: bare_products(features, centroids),
    }
    if faiss is not None:
        works["faiss.Kmeans, 1 iteration"] = lambda: faiss_iterations(faiss, features, centroids, 1)
        works["faiss.Kmeans, 2 iterations"] = lambda: faiss_iterations(faiss, features, centroids, 2)
    times: dict[str, list[float]] = {name: [] for name in works}
    for number in range(options.rounds + 1):  # the first one only warms up
        for name, work in works.items():
            taken = seconds(work)
            if number:
                times[name].append(taken)
    if faiss is not None:  # without what is done once per run
        pair = zip(times.pop("faiss.Kmeans, 2 iterations"), times["faiss.Kmeans, 1 iteration"], strict=True)
        times["faiss.Kmeans, 2 less 1"] = [two - one for two, one in pair]
    gflop = 2e-9 * options.rows * options.dim * options.clusters
    write(f"{options.rows} rows, {options.dim} dimensions, {options.clusters} clusters, noise {options.noise:g}, ")
    write(f"common {options.common:g}, torch {torch.__version__}, NumPy {np.__version__}")
    write("\n" if faiss is None else f", faiss {faiss.__version__}\n")
    write("| | s | GFLOP/s | ratio | range of ratios |\n|---|---|---|---|---|\n")
    for name, values in times.items():
        median = statistics.median(values)
        ratios = [value / ours for value, ours in zip(values, times["ours, from float16"], strict=True)]
        write(f"| {name} | {median:.3f} | {gflop / median:.0f} | {statistics.median(ratios):.2f} | ")
        write(f"{min(ratios):.2f}-{max(ratios):.2f} |\n")
    if faiss is not None:
        write(compare_labels(faiss, features, centroids, our_labels(half, centroids)))
        theirs = torch.from_numpy(faiss_iterations(faiss, features, centroids, 1).centroids)
        apart = (our_iteration(half, centroids) - theirs).abs().max()
        write(f"centroids after one iteration: {apart:.1e} apart at most\n")


if __name__ == "__main__":
    main()
