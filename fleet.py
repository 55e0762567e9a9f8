"""Students for budgets of latency, parameters and MACs: searched, distilled, exported, measured as shipped.

python fleet.py --teacher runs/generic --budgets 0.05ms 0.08ms --output_dir runs/fleet
python fleet.py --teacher runs/generic --budgets 0.05ms 100kparams,2Mmacs --config recipes/digits_kd.yaml --epochs 20 \\
    --quantize int8 --output_dir runs/fleet

Takes the options of distill.py, and those of search.py and export.py. Stopped or killed, the same command goes on.
"""

from engine.command_line import parse
from engine.distributed import run_script
from losses.registry import describe_methods
from models import describe_models
from shipping.fleet import Fleet
from shipping.options import FleetConfig
from shipping.proof import measure_fleet
from shipping.report import exceeded, show, write_report

LISTINGS = {"models": describe_models, "methods": describe_methods}


def main() -> None:
    fleet = Fleet(parse(FleetConfig, __doc__, LISTINGS))
    fleet.search()
    fleet.distil()
    fleet.export()
    over = []
    if fleet.shipped:
        found = measure_fleet(fleet)
        write_report(fleet.folder, found)
        show(fleet.folder, found)
        over = exceeded(found)
    fleet.check(over)


if __name__ == "__main__":
    run_script(main)
