"""Runs as Slurm's jobs, by submitit: one each, queued again where its time is over."""

import os
import shutil
import time
from pathlib import Path

import submitit
from submitit.core.utils import FailedJobError, UncompletedJobError

from common import UserError
from comparing.elsewhere import ROOT
from comparing.places import Places
from comparing.planned import PlannedRun
from comparing.task import complain, task_of
from engine.distributed import RunError

PATIENCE = 120  # seconds that a job gets to save itself


class Slurm:
    """The executor of the Slurm cluster whose jobs are submitted here.

    Args:
        folder: where submitit writes what it submits, and the jobs' own output.
        options: of submitit's AutoExecutor: timeout_min, gpus_per_node, cpus_per_task, slurm_partition...;
            `cluster: local` starts the jobs on this machine, all at once.
    """

    pause = 1.0

    def __init__(self, folder: Path, options: dict):
        options = {"cluster": "slurm", "timeout_min": 240, "name": "compare"} | options
        cluster = options.pop("cluster")
        if cluster == "slurm" and not shutil.which("sbatch"):
            raise UserError("--executor slurm: there is no sbatch here; start it where Slurm's jobs are submitted")
        paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
        os.environ["PYTHONPATH"] = os.pathsep.join(paths)  # jobs get this process's environment
        try:
            self.executor = submitit.AutoExecutor(folder, cluster=cluster)
            self.executor.update_parameters(**options)
        except (ValueError, NameError, TypeError, AssertionError) as error:
            raise UserError(f"--executor_options: {' '.join(str(error).split())}") from None

    def room(self) -> bool:
        """Slurm queues what its nodes cannot take yet."""
        return True

    def start(self, run: PlannedRun, places: Places) -> "SlurmJob":
        """Raises RunError where Slurm takes no job."""
        task = task_of(run, places)
        try:
            return SlurmJob(self.executor.submit(task), task.log)
        except FailedJobError as error:
            raise RunError(f"--executor slurm: {' '.join(str(error).split())}") from None


class SlurmJob:
    """A run as a job of Slurm."""

    def __init__(self, job: submitit.Job, log: str):
        self.job, self.log = job, log

    def poll(self) -> int | None:
        """See order.Job; a job that ended without a result says so in the run's log."""
        if not self.job.done():
            return None
        try:
            return self.job.result()
        except (UncompletedJobError, FailedJobError) as error:
            return complain(self.log, f"slurm: job {self.job.job_id}: {' '.join(str(error).split())}")

    def wait(self) -> int:
        end = time.monotonic() + PATIENCE
        while (code := self.poll()) is None and time.monotonic() < end:
            time.sleep(Slurm.pause)
        return 1 if code is None else code

    def stop(self) -> None:
        """Cancel the job: its run saves itself."""
        self.job.cancel(check=False)
