"""The images as they are built: what is in them, what is not, and that they run without any rights."""

import json
import re
from pathlib import Path

import pytest
import yaml
from swav_testing.containers import LOCKED_DOWN, LOCKS, Engine
from swav_testing.runs import TINY

import swav

ALONE = ("--rm", *LOCKED_DOWN, "--network", "none", "--memory", "4g", "--env", "OMP_NUM_THREADS=1")
JOBS = ("pretrain", "assign", "eval", "launcher")
SHORT = ("optim.epochs=1", "optim.warmup_epochs=0", "evaluate.baselines=false", "runtime.device=cpu")
GIGABYTE = 10**9


def run(found: Engine, image: str, *command: str) -> str:
    """What a command prints in a container without rights, network or a disk."""
    return found.call("run", *ALONE, image, *command).stdout


def locked(*names: str) -> dict[str, str]:
    """Versions by package, of lock files."""
    pins = [
        re.findall(r"^([a-z0-9._-]+)==([^ ]+)", (LOCKS / f"{name}.txt").read_text(), re.MULTILINE) for name in names
    ]
    return {package: version for found in pins for package, version in found}


@pytest.mark.parametrize("job", JOBS)
def test_nothing_in_an_image_needs_or_gives_rights(docker: Engine, images: dict[str, str], job: str) -> None:
    assert run(docker, images[job], "id", "--user", "--name").strip() == "swav"
    assert docker.call("image", "inspect", "--format", "{{.Config.User}}", images[job]).stdout.strip() == "10001:10001"
    ours = "find / -xdev -not -type l -not -path '/proc/*' -not -path '/sys/*' -not -path '/dev/*'"
    for kind in ("-type f -perm /6000", "-path /tmp -prune -o -writable"):
        assert run(docker, images[job], "bash", "-c", f"{ours} {kind} -print 2>/dev/null || true") == ""


@pytest.mark.parametrize("job", JOBS)
def test_an_image_has_a_shell_and_python_and_neither_compilers_nor_leftovers(
    docker: Engine, images: dict[str, str], job: str
) -> None:
    assert run(docker, images[job], "bash", "-c", "command -v bash python").count("\n") == 2
    assert run(docker, images[job], "bash", "-c", "command -v gcc cc g++ c++ clang make ld as nvcc || true") == ""
    folders = "/root/.cache /tmp /build /wheels /locks /opt/tools /etc/pip.conf"
    assert run(docker, images[job], "bash", "-c", f"find {folders} -type f 2>/dev/null || true") == ""


@pytest.mark.parametrize("job", JOBS)
def test_labels_say_what_an_image_is(docker: Engine, images: dict[str, str], job: str) -> None:
    labels = json.loads(docker.call("image", "inspect", "--format", "{{json .Config.Labels}}", images[job]).stdout)
    found = {key.removeprefix("org.opencontainers.image."): value for key, value in labels.items()}
    assert found["title"] == f"swav-{job}"
    assert found["licenses"] == "Apache-2.0"
    assert found["version"] == "test"
    assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", found["revision"])
    assert re.match(r"\d{4}-\d\d-\d\dT", found["created"])
    assert {"description", "source"} <= found.keys()


@pytest.mark.parametrize(
    ("job", "locks"),
    [("pretrain", ("torch", "train")), ("eval", ("torch", "train", "eval")), ("launcher", ("launch",))],
)
def test_the_bill_of_materials_has_every_locked_package(
    docker: Engine, images: dict[str, str], job: str, locks: tuple[str, ...]
) -> None:
    bill = json.loads(run(docker, images[job], "cat", "/usr/share/sbom/swav.cdx.json"))
    found = {re.sub(r"[._-]+", "-", part["name"]).lower(): part["version"] for part in bill["components"]}
    assert bill["bomFormat"] == "CycloneDX"
    assert found == {**locked(*locks), "swav": swav.__version__}


@pytest.mark.parametrize("job", ["pretrain", "eval", "launcher"])
def test_bytecode_is_in_the_image(docker: Engine, images: dict[str, str], job: str) -> None:
    """Else each start would compile thousands of files, as none can be written."""
    script = (
        "import importlib.util, pathlib, sysconfig\n"
        "for folder in ('stdlib', 'purelib'):\n"
        "    for path in pathlib.Path(sysconfig.get_path(folder)).rglob('*.py'):\n"
        "        if not pathlib.Path(importlib.util.cache_from_source(path)).exists(): print(path)\n"
    )
    missing = run(docker, images[job], "python", "-c", script).split()
    # Files that are no programs of this version: templates, tests of syntax, and torch's of Python 3.12.
    assert [path for path in missing if not re.search(r"/(test|tests|lib2to3/tests|bad)/|py312|template", path)] == []


def test_all_images_are_small_beside_torch(docker: Engine, images: dict[str, str]) -> None:
    [torch_bytes] = [size for size, words in docker.layers(images["pretrain"]) if "/locks/torch.txt" in words]
    sizes = {job: docker.size(images[job]) for job in JOBS}
    for job in JOBS:
        rest = sizes[job] - (0 if job == "launcher" else torch_bytes)
        print(f"{job}: {sizes[job] / GIGABYTE:.2f} GB, {rest / GIGABYTE:.2f} GB without torch")  # noqa: T201
        assert rest < GIGABYTE


def test_pretraining_runs_without_rights_network_or_disk_and_is_judged(docker: Engine, images: dict[str, str]) -> None:
    """The demo, shortened; the evaluation and the assigner then work on what it wrote."""
    printed = run(
        docker, images["pretrain"], "python", "-m", "swav.pretrain", "--recipe", "demo", "--output", "/tmp/demo", *SHORT
    )
    assert re.search(r"k-NN accuracy, trained backbone: +\d+\.\d %", printed)


def test_the_assigner_and_the_evaluation_work_on_a_run(
    docker: Engine, images: dict[str, str], data: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "shared"
    folder.mkdir()
    folder.chmod(0o777)  # the containers' user is another
    data.chmod(0o755)
    shared = ("--volume", f"{folder}:/shared", "--volume", f"{data}:/data:ro")
    method = 'method={"kind":"deepclusterv2","num_prototypes":10}'
    settings = [setting for setting in TINY if not setting.startswith("method.")]
    trainer = docker.call(
        *("run", "--detach", *ALONE[1:], *shared, images["pretrain"]),
        *("python", "-m", "swav.pretrain", "--recipe", "demo", "--data", "/data", "--output", "/shared/run"),
        *(*settings, method, "evaluate=null"),
    ).stdout.strip()
    try:
        docker.call("run", *ALONE, *shared, images["assign"], "python", "-m", "swav.assign", "--output", "/shared/run")
        assert docker.call("wait", trainer).stdout.strip() == "0", docker.call("logs", trainer).stderr
    finally:
        docker.call("rm", "--force", trainer)
    command = ("python", "-m", "swav_eval.knn", "--backbone", "/shared/run/backbone.pt", "--train", "/data", "--k", "5")
    judged = json.loads(docker.call("run", *ALONE, *shared, images["eval"], *command).stdout)
    assert judged["metrics"].keys() == {"knn_5"}


def test_the_evaluations_image_has_what_each_protocol_needs(docker: Engine, images: dict[str, str]) -> None:
    assert "linear_imagenet" in run(docker, images["eval"], "python", "-m", "swav_eval.paper", "--help")
    assert (
        run(docker, images["eval"], "python", "-c", "import sklearn.svm, scipy.io; print('there')").strip() == "there"
    )


def test_a_stop_right_at_the_start_is_not_lost(docker: Engine, images: dict[str, str]) -> None:
    """The kernel keeps signals from a container's first process until it handles them: after its imports, for ours."""
    command = ("python", "-m", "swav.elastic", "--standalone", "-m", "swav.pretrain", "--recipe", "demo")
    name = docker.call("run", "--detach", *ALONE[1:], images["pretrain"], *command).stdout.strip()
    try:
        waits = "until grep -q torch /proc/1/maps; do :; done"  # until it handles nothing else and imports
        docker.call("exec", name, "timeout", "60", "bash", "-c", waits)
        docker.call("stop", "--time", "200", name)
        assert docker.call("inspect", "--format", "{{.State.ExitCode}}", name).stdout.strip() == "75"
    finally:
        docker.call("rm", "--force", name)


@pytest.mark.parametrize(
    "words",
    [
        "swav.pretrain --recipe demo",
        "swav.evaluate --backbone s3://bucket/run --data s3://bucket/data --output s3://bucket/paper.json",
    ],
)
def test_the_launcher_renders_a_job_without_torch(docker: Engine, images: dict[str, str], words: str) -> None:
    printed = run(docker, images["launcher"], "torchx", "run", "--dryrun", "-s", "kubernetes", *words.split())
    job = yaml.safe_load(printed.partition("=== SCHEDULER REQUEST ===")[2])
    assert job["kind"] == "Job"
    have = "import importlib.util as util; print([name for name in ('torch', 'numpy') if util.find_spec(name)])"
    assert run(docker, images["launcher"], "python", "-c", have).strip() == "['numpy']"


def test_the_launcher_drives_runs(docker: Engine, images: dict[str, str]) -> None:
    assert "usage" in run(docker, images["launcher"], "python", "-m", "swav_components.driver", "--help")
