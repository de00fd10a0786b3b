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
from swav.recipes import configure

IMAGE = f"swav-pretrain:{swav.__version__}"

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
    try:
        configure(recipe, data=data, overrides=settings)
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
