"""Roles: which program a job runs, in how many processes, with which environment.

What a user asks for is checked here, where the job is submitted, and without torch: a wrong recipe must not wait for
64 GPUs to be found wrong.
"""

import os
import shlex
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from torchx import specs
from torchx.components import dist
from torchx.specs.finder import ComponentValidationException

import swav
from swav.config import PretrainConfig
from swav.recipes import configure, get_recipe, recipe_names

IMAGE = f"swav-pretrain:{swav.__version__}"
ASSIGN_IMAGE = f"swav-assign:{swav.__version__}"

_RENDEZVOUS_PORT = 29500


class ProgramRole(specs.Role):
    """A role whose ``python``, where it runs beside the launcher, is the launcher's own."""

    def pre_proc(self, scheduler: str, dryrun_info: specs.AppDryRunInfo[Any]) -> specs.AppDryRunInfo[Any]:
        """Put this interpreter's folder first on the path of local processes, virtual environment active or not."""
        if scheduler == "local":
            here = str(Path(sys.executable).parent)
            for replica in dryrun_info.request.role_params[self.name]:
                replica.env["PATH"] = os.pathsep.join(filter(None, [here, replica.env.get("PATH")]))
        return dryrun_info


def pretrain(
    recipe: str,
    overrides: Iterable[str],
    *,
    data: str | None,
    output: str | None,
    j: str,
    image: str,
    resource: specs.Resource,
) -> specs.Role:
    """The trainer: one plain process, or data parallel under :mod:`swav.elastic`, which starts again what crashes.

    Args:
        recipe: name of the run.
        overrides: ``key=value`` settings.
        data: in place of the recipe's images.
        output: folder of the run.
        j: ``[[<min nodes>:]<nodes>x]<processes per node>``.
        image: container image.
        resource: of one node.

    Raises:
        ComponentValidationException: the recipe or an override is refused.
    """
    settings = list(overrides)
    configured(recipe, settings, data)
    try:
        min_nodes, max_nodes, num_processes, nodes = dist.parse_nnodes(j)
    except ValueError as error:
        raise ComponentValidationException(str(error)) from error
    arguments = [*option("recipe", recipe), *option("data", data), *option("output", output), *settings]
    role = program("swav.pretrain", arguments, image=image, resource=resource)
    if max_nodes == num_processes == 1:
        return role
    launch = f"-m swav.elastic --nnodes={nodes} --nproc-per-node={num_processes}"
    if max_nodes == 1:
        role.args = [*launch.split(), "--standalone", *role.args]
        return role
    # The first node's name is known only where the job runs, so a shell reads it there; "$$" is TorchX for "$".
    endpoint = f"$${{{specs.macros.rank0_env}:-localhost}}:{_RENDEZVOUS_PORT}"
    rendezvous = f"--rdzv-backend=c10d --rdzv-endpoint={endpoint} --rdzv-id={specs.macros.app_id}"
    role.entrypoint = "bash"
    role.args = ["-c", f"exec python {launch} {rendezvous} {shlex.join(role.args)}"]
    role.num_replicas, role.min_replicas = max_nodes, min_nodes
    role.port_map = {"c10d": _RENDEZVOUS_PORT}
    return role


def trainer(
    kind: str,
    recipe: str,
    overrides: Iterable[str],
    *,
    data: str | None,
    output: str | None,
    j: str,
    image: str,
    resource: specs.Resource,
) -> specs.Role:
    """The trainer of a method that needs an assigner beside it.

    Args:
        kind: of the method.
        recipe: name of the run; one of this method, or made so by an override.
        overrides: as :func:`pretrain` takes them, and so the rest.
        data: in place of the recipe's images.
        output: folder of the run.
        j: ``[[<min nodes>:]<nodes>x]<processes per node>``.
        image: container image.
        resource: of one node.

    Raises:
        ComponentValidationException: the recipe or an override is refused, or the run is of another method.
    """
    settings = list(overrides)
    found = configured(recipe, settings, data).method.kind
    if found != kind:
        fitting = next(name for name in recipe_names() if get_recipe(name).method.kind == kind)
        raise ComponentValidationException(
            f"swav.{kind} trains by {kind}, and recipe {recipe} with these settings by {found}; give a recipe such as "
            f'{fitting}, or set method=\'{{"kind": "{kind}"}}\''
        )
    run = run_folder(recipe, output)
    role = pretrain(recipe, settings, data=data, output=run, j=j, image=image, resource=resource)
    role.name = "trainer"
    return role


def assigner(output: str, *, data: str | None, workers: int, image: str, resource: specs.Resource) -> specs.Role:
    """The assigner of a run: workers of one node under :mod:`swav.elastic`, which starts again what crashes.

    Args:
        output: folder of the run.
        data: the run's images, where the trainer was given them too, or where they are found elsewhere.
        workers: processes.
        image: container image.
        resource: of the node.

    Raises:
        ComponentValidationException: there are no workers.
    """
    if workers < 1:
        raise ComponentValidationException(f"--workers {workers}: the assigner needs at least 1")
    role = program("swav.assign", [*option("output", output), *option("data", data)], image=image, resource=resource)
    role.args = ["-m", "swav.elastic", "--standalone", f"--nproc-per-node={workers}", *role.args]
    role.name = "assigner"
    return role


def configured(recipe: str, overrides: Iterable[str], data: str | None) -> PretrainConfig:
    """The run that the programs will build.

    Raises:
        ComponentValidationException: they would refuse it.
    """
    try:
        return configure(recipe, data=data, overrides=overrides)
    except ValueError as error:
        raise ComponentValidationException(str(error)) from error


def run_folder(recipe: str, output: str | None) -> str:
    """The run's folder: without one given, the trainer's own default, said to both sides."""
    return output or f"runs/{recipe}"


def knn(
    backbone: str,
    train: str,
    *,
    test: str | None,
    output: str | None,
    num_neighbors: Iterable[int] | None,
    image: str,
    resource: specs.Resource,
) -> specs.Role:
    """The k-NN evaluation, in one process.

    Args:
        backbone: file of the backbone.
        train: labelled images that vote.
        test: labelled images to classify, if they are others.
        output: file for the result.
        num_neighbors: one result for each.
        image: container image.
        resource: of the process.
    """
    arguments = [
        *option("backbone", backbone),
        *option("train", train),
        *option("test", test),
        *option("output", output),
        *option("k", *(num_neighbors or ())),
    ]
    return program("swav_eval.knn", arguments, image=image, resource=resource)


def program(module: str, arguments: Iterable[str], *, image: str, resource: specs.Resource) -> ProgramRole:
    """One process of a module of ours.

    Args:
        module: run with ``python -m``; its last part names the role.
        arguments: of the program, taken literally.
        image: container image.
        resource: of the process.
    """
    literal = [argument.replace("$", "$$") for argument in arguments]  # TorchX substitutes ${...} in what it is given
    return ProgramRole(
        name=module.rpartition(".")[2],
        image=image,
        entrypoint="python",
        args=["-m", module, *literal],
        resource=resource,
    )


def option(name: str, *values: object) -> list[str]:
    """``--name value...``, or nothing where no value is given."""
    given = [str(value) for value in values if value is not None]
    return [f"--{name}", *given] if given else []
