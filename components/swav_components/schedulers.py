"""TorchX's Kubernetes scheduler under its own name, ``kubernetes``, with what it lacks."""

import logging
from collections.abc import Iterable
from typing import Any, cast

from torchx.schedulers import kubernetes_scheduler
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse
from torchx.specs import AppDef, AppDryRunInfo, AppState, runopts

from swav_components import pods
from swav_components.roles import ProgramRole, replaced

_NOT_FOUND, _CONFLICT = 404, 409
_JOBS = {"group": "batch.volcano.sh", "version": "v1alpha1", "plural": "jobs"}

_logger = logging.getLogger(__name__)


class KubernetesScheduler(kubernetes_scheduler.KubernetesScheduler):
    """Renders our roles as :mod:`swav_components.pods` says, and others as TorchX does.

    A job may have a name of its own, whose second submission is recognised. Looking at jobs survives what TorchX's own
    class does not: jobs that are gone, phases that it does not know, no kubeconfig because it runs in the cluster.
    """

    def _run_opts(self) -> runopts:
        options = super()._run_opts()
        labels = list[str]
        options.add("namespace", type_=str, default=pods.NAMESPACE, help="namespace of the job")
        options.add("queue", type_=str, default=pods.QUEUE, help="Volcano queue of the job")
        options.add("node_selector", type_=labels, default=[], help="labels of nodes, as label:value;label:value")
        options.add(
            "first_pod_nodes",
            type_=labels,
            default=[],
            help="labels of nodes for the pod where the others meet, e.g. of nodes that are not taken away",
        )
        options.add(
            "network_tier", type_=int, default=0, help="highest tier of switches between pods that is preferred"
        )
        return options

    def _submit_dryrun(self, app: AppDef, cfg: Any) -> AppDryRunInfo[Any]:
        found = super()._submit_dryrun(app, cfg)
        roles = [role for role in app.roles if isinstance(role, ProgramRole)]
        if len(roles) != len(app.roles):
            return found
        job = cast(dict[str, Any], kubernetes_scheduler.sanitize_for_serialization(found.request.resource))
        if roles[0].job_name is not None:
            job = replaced(job, job["metadata"]["name"], roles[0].job_name)
        found.request.resource = pods.complete(job, roles, cfg)
        return found

    def _api_client(self) -> Any:
        if self._client is None:
            from kubernetes import client, config

            configuration = client.Configuration()
            try:
                config.load_kube_config(client_configuration=configuration)
            except config.ConfigException:
                config.load_incluster_config(client_configuration=configuration)
            self._client = client.ApiClient(configuration)
        return self._client

    def schedule(self, dryrun_info: AppDryRunInfo[Any]) -> str:
        """Submit the job; one of that name which is there already counts as submitted, where the name was given.

        Returns:
            ``namespace:name``.
        """
        try:
            return str(super().schedule(dryrun_info))
        except ValueError as error:
            name = dryrun_info.request.resource["metadata"]["name"]
            roles = dryrun_info._app.roles if dryrun_info._app is not None else []
            if _status(error.__cause__) != _CONFLICT or not any(
                getattr(role, "job_name", None) == name for role in roles
            ):
                raise
            namespace = (dryrun_info._cfg or {}).get("namespace")
            _logger.warning("job %s is there already, and is not submitted again", name)
            return f"{namespace}:{name}"

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """State of a job; None where it is gone."""
        try:
            return super().describe(app_id)
        except KeyError as unknown:  # a phase, such as Completing
            _logger.info("job %s is in a phase that TorchX does not know: %s", app_id, unknown)
            return DescribeAppResponse(app_id=app_id, state=AppState.RUNNING)
        except Exception as error:
            if _status(error) != _NOT_FOUND:
                raise
            return None

    def log_iter(self, app_id: str, role_name: str, k: int = 0, *arguments: Any, **settings: Any) -> Iterable[str]:
        """Lines of a pod's log.

        Raises:
            RuntimeError: the pod is gone, and its log with it.
        """
        try:
            return super().log_iter(app_id, role_name, k, *arguments, **settings)
        except Exception as error:
            if _status(error) != _NOT_FOUND:
                raise
            raise RuntimeError(
                f"there is no pod of {role_name}/{k} of job {app_id}: it has not started, was replaced, or the job was "
                "removed; where logs are collected, look for its name there"
            ) from error

    def list(self) -> list[ListAppResponse]:
        """All jobs of the namespace that the kubeconfig names, or of ours."""
        from kubernetes import config

        try:
            namespace = self._get_active_context()["context"].get("namespace", pods.NAMESPACE)
        except config.ConfigException:
            namespace = pods.NAMESPACE
        found = self._custom_objects_api().list_namespaced_custom_object(namespace=namespace, **_JOBS)
        return [
            ListAppResponse(app_id=f"{namespace}:{job['metadata']['name']}", state=_state(job))
            for job in found["items"]
        ]

    def _cancel_existing(self, app_id: str) -> None:
        try:
            super()._cancel_existing(app_id)
        except Exception as error:
            if _status(error) != _NOT_FOUND:
                raise


def _status(error: BaseException | None) -> int | None:
    """The API server's answer, where that is what failed."""
    return getattr(error, "status", None)


def _state(job: dict[str, Any]) -> AppState:
    phase = job.get("status", {}).get("state", {}).get("phase")
    if phase is None:
        return AppState.PENDING
    state: AppState = kubernetes_scheduler.JOB_STATE.get(phase, AppState.RUNNING)
    return state


def create_scheduler(session_name: str, client: Any = None, docker_client: Any = None, **_: Any) -> KubernetesScheduler:
    """What TorchX calls."""
    return KubernetesScheduler(session_name, client=client, docker_client=docker_client)
