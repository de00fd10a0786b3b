"""TorchX's Kubernetes scheduler under its own name, ``kubernetes``, with what it lacks."""

import logging
from collections.abc import Iterable
from datetime import datetime
from typing import Any, cast

from torchx.schedulers import kubernetes_scheduler
from torchx.schedulers.api import DescribeAppResponse, ListAppResponse, Stream, filter_regex, split_lines
from torchx.specs import AppDef, AppDryRunInfo, AppState, ReplicaState, ReplicaStatus, Role, RoleStatus, runopts

from swav_components import pods
from swav_components.roles import ProgramRole, replaced

_NOT_FOUND, _CONFLICT = 404, 409
_NAMED = "swav/named"  # by its submitter, not by TorchX
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
        if "validate_spec" in dict(
            options
        ):  # of later versions; it asks the cluster about the bare job, dry run or not
            options.add("validate_spec", type_=bool, default=False, help="ask the cluster about TorchX's bare job")
        return options

    def submit_dryrun(self, app: AppDef, cfg: Any) -> AppDryRunInfo[Any]:
        """Render the job.

        Args:
            app: the job.
            cfg: this scheduler's options.

        Raises:
            ComponentValidationException: the cluster would refuse it, or it could not work there.
        """
        found = super().submit_dryrun(app, cfg)
        roles = [role for role in app.roles if isinstance(role, ProgramRole)]
        if len(roles) == len(app.roles):
            job = cast(dict[str, Any], kubernetes_scheduler.sanitize_for_serialization(found.request.resource))
            if roles[0].job_name is not None:
                job = replaced(job, job["metadata"]["name"], roles[0].job_name)
                job["metadata"]["annotations"] = {_NAMED: "true"}
            found.request.resource = pods.complete(job, roles, self.run_opts().resolve(cfg))
        return found

    def _api_client(self) -> Any:
        if self._client is None:
            from kubernetes import client, config

            configuration = client.Configuration()
            try:
                config.load_kube_config(client_configuration=configuration)
            except config.ConfigException as no_file:
                try:
                    config.load_incluster_config(client_configuration=configuration)
                except config.ConfigException as no_pod:
                    raise RuntimeError(
                        f"no cluster is known here ({no_file} {no_pod}); name one by a kubeconfig, in KUBECONFIG or "
                        "~/.kube/config"
                    ) from no_pod
            self._client = client.ApiClient(configuration)
        return self._client

    def schedule(self, dryrun_info: AppDryRunInfo[Any]) -> str:
        """Submit the job; where its name was chosen, one of that name which is there counts as submitted.

        Returns:
            ``namespace:name``.
        """
        try:
            return str(super().schedule(dryrun_info))
        except ValueError as error:
            metadata = dryrun_info.request.resource["metadata"]
            if _status(error.__cause__) != _CONFLICT or _NAMED not in metadata.get("annotations", {}):
                raise
            _logger.warning("job %s is there already, and is not submitted again", metadata["name"])
            return f"{metadata['namespace']}:{metadata['name']}"

    def describe(self, app_id: str) -> DescribeAppResponse | None:
        """State of a job and how many pods of each role are in which; None where the job is gone.

        Of the pods of a task Volcano counts how many are in a phase, not which: only replica 0 is known by its number.
        """
        namespace, _, name = app_id.partition(":")
        try:
            job = self._custom_objects_api().get_namespaced_custom_object_status(
                namespace=namespace, name=name, **_JOBS
            )
        except Exception as error:
            if _status(error) != _NOT_FOUND:
                raise
            return None
        replicas: dict[str, list[ReplicaStatus]] = {}
        for task, counted in sorted(job.get("status", {}).get("taskStatusCount", {}).items()):
            role = task.rpartition("-")[0]
            found = replicas.setdefault(role, [])
            for phase, number in counted.get("phase", {}).items():
                state = kubernetes_scheduler.TASK_STATE.get(phase, ReplicaState.UNKNOWN)
                found += [ReplicaStatus(len(found) + one, state, role, hostname="") for one in range(number)]
        return DescribeAppResponse(
            app_id=app_id,
            state=_state(job),
            roles=[Role(name=role, image="", num_replicas=len(found)) for role, found in replicas.items()],
            roles_statuses=[RoleStatus(role, found) for role, found in replicas.items()],
        )

    def log_iter(
        self,
        app_id: str,
        role_name: str,
        k: int = 0,
        regex: str | None = None,
        since: datetime | None = None,
        until: datetime | None = None,
        should_tail: bool = False,
        streams: Stream | None = None,
    ) -> Iterable[str]:
        """Lines of a pod's log, standard output and error together; ``until`` and single streams there are none.

        Raises:
            RuntimeError: the pod is gone, and its log with it.
        """
        from kubernetes import client, watch

        if until is not None or streams not in (None, Stream.COMBINED):
            raise ValueError("a pod's log has one stream, and no end in time: leave out until and streams")
        namespace, _, name = app_id.partition(":")
        wanted: dict[str, Any] = {"name": pods.pod_name(name, role_name, k), "namespace": namespace, "timestamps": True}
        if since is not None:
            wanted["since_seconds"] = max(1, round((datetime.now(since.tzinfo) - since).total_seconds()))
        read = client.CoreV1Api(self._api_client()).read_namespaced_pod_log
        try:
            if should_tail:
                lines = watch.Watch().stream(read, **wanted)
            else:  # the client would give the text of a bytes object
                lines = split_lines(read(**wanted, _preload_content=False).data.decode(errors="replace"))
            yield from filter_regex(regex, lines) if regex else lines
        except Exception as error:
            if _status(error) != _NOT_FOUND:
                raise
            raise RuntimeError(
                f"there is no pod {wanted['name']} in {namespace}: it has not started, was replaced, or the job was "
                "removed; where logs are collected, look for its name there"
            ) from error

    def list(self, cfg: Any = None) -> list[ListAppResponse]:
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
        """Remove the job, which frees its name; one that is gone is cancelled."""
        namespace, _, name = app_id.partition(":")
        try:
            self._custom_objects_api().delete_namespaced_custom_object(namespace=namespace, name=name, **_JOBS)
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
