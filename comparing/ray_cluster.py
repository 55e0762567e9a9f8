"""Runs on a Ray cluster: a task each, which Ray queues, gives a GPU and starts again where its node is lost."""

import os

import ray

from common import UserError
from comparing.elsewhere import Task
from comparing.places import Places
from comparing.planned import PlannedRun
from comparing.task import complain, task_of

RETRIES = 3  # of a run whose node is lost; it goes on from its checkpoint


class RayCluster:
    """The executor of the cluster that RAY_ADDRESS names or `ray start` has started, else of this machine.

    Args:
        jobs: runs at a time on a node without GPUs, which share its cores; where there are GPUs it is one a GPU.
        options: of ray.remote, instead of those found here: num_cpus, num_gpus, max_retries, resources...
    """

    pause = 0.2

    def __init__(self, jobs: int, options: dict):
        os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
        try:
            ray.init(log_to_driver=False, logging_level="error")
        except (ConnectionError, RuntimeError) as error:
            raise UserError(f"--executor ray: {str(error).splitlines()[0]}") from None
        nodes = [node["Resources"] for node in ray.nodes() if node["Alive"] and node["Resources"].get("CPU")]
        gpus = bool(ray.cluster_resources().get("GPU"))
        at_once = [node.get("GPU", 0) if gpus else jobs for node in nodes]
        cores = min((node["CPU"] / count for node, count in zip(nodes, at_once, strict=True) if count), default=1)
        usual = {"num_cpus": max(1, int(cores)), "num_gpus": int(gpus), "max_retries": RETRIES}
        try:
            self.remote = ray.remote(Task.__call__).options(**usual | options)
        except (ValueError, TypeError) as error:
            raise UserError(f"--executor_options: {error}") from None

    def room(self) -> bool:
        """Ray queues what its nodes cannot take yet."""
        return True

    def start(self, run: PlannedRun, places: Places) -> "RayJob":
        task = task_of(run, places)
        return RayJob(self.remote.remote(task), task.log)


class RayJob:
    """A run as a task of Ray."""

    def __init__(self, reference: "ray.ObjectRef", log: str):
        self.reference, self.log = reference, log

    def poll(self) -> int | None:
        """See order.Job; a task that is lost for good says so in the run's log."""
        return self.wait() if ray.wait([self.reference], timeout=0)[0] else None

    def wait(self) -> int:
        try:
            return ray.get(self.reference)
        except ray.exceptions.RayError as error:
            return complain(self.log, f"ray: {str(error).splitlines()[0]}")

    def stop(self) -> None:
        """Interrupt the task, which waits until its run has saved itself."""
        ray.cancel(self.reference)
