"""A search for options instead of a grid: Optuna proposes values, and the students' accuracy on images that are held
out of training judges them.

The study is a file. Its trials are drawn by their number, so that one that was stopped goes on as if it had not been.
All of it is done in forks: Optuna computes, and what runs are forked from must not (engine/forks.py).
"""

import hashlib
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from common import UserError, derive_seed, write_atomically
from comparing.order import Outcome
from comparing.places import Places
from comparing.plan import Comparison
from comparing.planned import PlannedRun
from comparing.records import recorded
from engine.forks import result_of


@dataclass(frozen=True)
class Study:
    """What has been tried.

    Args:
        file: where it is stored (SQLite).
        plan: what is searched for, as compare.py's flags say it; another plan is another study of the file.
        sweep: by option the values to choose from, or one text "LOW..HIGH".
        seed: of what is proposed.
    """

    file: Path
    plan: Mapping
    sweep: Mapping[str, Sequence]
    seed: int

    def propose(self) -> dict:
        """`number` and `values` of the trial that was stopped, else of a new one."""
        return result_of(self._propose)

    def tell(self, number: int, score: float | None) -> None:
        """What came of a trial; None: it failed."""
        result_of(lambda: self._tell(number, score))

    def trials(self) -> list[dict]:
        """Of all trials that have ended `number`, `values` and `score`, None for one that failed."""
        return result_of(self._trials)

    def _study(self):
        import optuna

        optuna.logging.set_verbosity(optuna.logging.WARNING)
        self.file.parent.mkdir(parents=True, exist_ok=True)
        name = hashlib.sha256(json.dumps(self.plan, sort_keys=True).encode()).hexdigest()
        storage = f"sqlite:///{self.file}"
        return optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)

    def _propose(self) -> dict:
        from optuna.samplers import TPESampler
        from optuna.trial import TrialState

        study = self._study()
        for trial in study.get_trials(states=[TrialState.RUNNING]):
            if trial.params.keys() == self.sweep.keys():
                return {"number": trial.number, "values": trial.params}
            study.tell(trial.number, state=TrialState.FAIL)  # killed while it was drawn
        study.sampler = TPESampler(seed=derive_seed(self.seed, "search", len(study.trials)) % 2**32)
        trial = study.ask({name: space(name, values) for name, values in self.sweep.items()})
        return {"number": trial.number, "values": trial.params}

    def _tell(self, number: int, score: float | None) -> None:
        from optuna.trial import TrialState

        self._study().tell(number, score, state=TrialState.FAIL if score is None else TrialState.COMPLETE)

    def _trials(self) -> list[dict]:
        found = [trial for trial in self._study().trials if trial.state.is_finished()]
        return [{"number": each.number, "values": each.params, "score": each.value} for each in found]


def space(option: str, values: Sequence):
    """The values of an option as Optuna takes them. Raises UserError for what is no range."""
    from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution

    if len(values) > 1 or not isinstance(values[0], str) or ".." not in values[0]:
        return CategoricalDistribution(values)
    try:
        low, high = (json.loads(each) for each in values[0].split(".."))
        whole = type(low) is type(high) is int
        return IntDistribution(low, high) if whole else FloatDistribution(float(low), float(high))
    except (ValueError, TypeError):
        raise UserError(f"--sweep {option}={values[0]}: give LOW..HIGH, for example {option}=0.5..0.9") from None


def search(
    study: Study,
    count: int,
    comparison_of: Callable[[dict], Comparison],
    make: Callable[[Comparison, Places], Outcome],
    places: Places,
) -> tuple[Comparison, Places, Outcome]:
    """Make trials until there are `count`, and write search.json beside the study.

    Returns the best trial's comparison, where its records are, and what came of the last runs; without a trial that
    came to its end, the one under way.
    """
    outcome, trial = Outcome(), None
    check_held_out(comparison_of({}).runs)
    while len(study.trials()) < count and not (outcome.left or outcome.failed):
        trial = study.propose()
        comparison, own = comparison_of(trial["values"]), _places_of(trial, places)
        print(f"trial {trial['number']}: {_words(trial)}", flush=True)
        outcome = make(comparison, own)
        if not outcome.left:
            study.tell(trial["number"], None if outcome.failed else held_out(comparison.runs, own))
    trials = study.trials()
    write_atomically(study.file.with_suffix(".json"), json.dumps(trials, indent=1) + "\n")
    done = [each for each in trials if each["score"] is not None]
    best_first = sorted(done, key=lambda each: -each["score"])  # of equals the first to be tried
    for each in best_first:
        print(f"{each['score']:.2f}% held out: trial {each['number']}: {_words(each)}")
    chosen = best_first[0] if done else trial or study.propose()
    return comparison_of(chosen["values"]), _places_of(chosen, places), outcome


def _places_of(trial: dict, places: Places) -> Places:
    return replace(places, records=places.records / f"trial{trial['number']}")


def _words(trial: dict) -> str:
    return ", ".join(
        f"{name}={value:.4g}" if type(value) is float else f"{name}={value}" for name, value in trial["values"].items()
    )


def check_held_out(runs: Sequence[PlannedRun]) -> None:
    """Raise UserError for a student that trains on all images: nothing would be left to choose by."""
    if any(run.script == "distill.py" and not run.config.val_fraction for run in runs):
        raise UserError("--search: chooses by images held out of training; give --options val_fraction=0.1")


def held_out(runs: Sequence[PlannedRun], places: Places) -> float:
    """The distilled students' mean top-1 in percent on the images held out of training, at the last epoch."""
    students = [recorded(run, places.records) for run in runs if run.script == "distill.py" and run.method != "none"]
    return statistics.mean(next(iter(each["val_accuracy"].values())) for each in students)
