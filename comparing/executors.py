"""By name, what makes a comparison's runs: this machine, a Ray cluster or Slurm."""

import importlib.util

from common import UserError
from comparing.local import Forks, slots
from comparing.order import Executor
from comparing.places import Places

EXECUTORS = {"local": None, "ray": "ray", "slurm": "submitit"}  # the package that each needs


def check_executor(name: str, options: dict, verbose: bool) -> None:
    """Raise UserError for an executor that cannot be started, before anything is done."""
    if name == "local":
        if options:
            raise UserError(f"--executor_options {min(options)}: --executor local has none")
        return
    check_package(f"--executor {name}", EXECUTORS[name], name)
    if verbose:
        raise UserError(f"--verbose: shows runs on this machine; by --executor {name} they print into --runs, NAME.log")


def check_package(argument: str, package: str, extra: str) -> None:
    """Raise UserError for an argument whose package is not installed."""
    if importlib.util.find_spec(package) is None:
        raise UserError(f"{argument}: needs {package}; pip install -r requirements-{extra}.txt")


def create_executor(name: str, jobs: int, options: dict, places: Places) -> Executor:
    """An executor. Forks are at an end in this process where it is one that starts threads."""
    if name == "ray":
        from comparing.ray_cluster import RayCluster

        return RayCluster(jobs, options)
    if name == "slurm":
        from comparing.slurm import Slurm

        return Slurm(places.runs / "slurm", options)
    return Forks(slots(jobs))
