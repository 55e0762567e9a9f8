"""python -m models.pool: random members of a student pool, with their cost.

python -m models.pool --count 10 --max_params 3e6
python -m models.pool --pool runs/teacher/model.json --sampling sizes
"""

import argparse
import platform
import sys
from itertools import count
from statistics import median
from time import perf_counter

import torch
import yaml
from tqdm import tqdm

from common import UserError, read_text
from models.network import cost, count_parameters
from models.pool import Pool, PoolNet

MIN_SECONDS = 0.2  # of timing, a member


def main() -> None:
    options = arguments()
    pool = read_pool(options.pool).for_images(options.image_size)
    if options.sampling:
        pool.sampling = options.sampling
    smallest = min_parameters(pool, options.num_classes)
    if options.max_params < smallest:
        raise UserError(f"--max_params {options.max_params:,.0f}: the smallest member has {smallest:,} parameters")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    rows = [("student", "parameters", "MFLOPs", "latency", "layers")]
    bar = tqdm(total=options.count, desc="members", unit="", disable=not sys.stderr.isatty(), leave=False)
    for seed in count(options.seed):
        spec = pool.sample(seed)
        with torch.device("meta"):
            model = PoolNet(spec, options.num_classes).eval()
        if count_parameters(model) > options.max_params:
            continue
        parameters, flops, _ = cost(model, options.image_size)
        latency = measure(PoolNet(spec, options.num_classes), options.image_size, device)
        layers = " ".join(f"{layer['type']}{in_short(layer)}" for layer in spec["layers"][1:-2])
        rows.append((f"pool:{seed}", f"{parameters:,}", f"{flops / 1e6:,.1f}", f"{latency * 1e3:.2f} ms", layers))
        bar.update()
        if len(rows) > options.count:
            break
    bar.close()
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for name, *numbers, layers in rows:
        cells = [f"{text:>{width}}" for text, width in zip(numbers, widths[1:], strict=False)]
        print("  ".join([f"{name:<{widths[0]}}", *cells, layers]))
    size = options.image_size
    name = torch.cuda.get_device_name() if device.type == "cuda" else f"{platform.machine()} CPU"
    print(
        f"{options.num_classes} classes, images of {size}x{size}, stems of stride {pool.stem_stride}; 2 FLOPs a "
        f"multiply-accumulate; latency: median of forward passes of one image on {name}, "
        f"{torch.get_num_threads()} thread(s), torch {torch.__version__}"
    )


def arguments() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m models.pool", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=whole("count", 1), default=10, help="how many members to list")
    parser.add_argument("--max_params", type=float, default=float("inf"), help="leave larger members out")
    parser.add_argument("--seed", type=whole("seed", 0), default=0, help="the first pool:SEED that is looked at")
    parser.add_argument("--pool", help="a recipe with a pool, or the model.json of a GTN teacher; default: the paper's")
    parser.add_argument("--sampling", choices=["choices", "sizes"], help="what members are uniform over")
    parser.add_argument("--image_size", type=whole("image_size", 1), default=32, help="side of the images")
    parser.add_argument("--num_classes", type=whole("num_classes", 2), default=100, help="width of the classifier")
    return parser.parse_args()


def whole(name: str, least: int):
    """An argument type: whole numbers from `least` on."""

    def convert(text: str) -> int:
        if not text.isdecimal() or int(text) < least:
            raise argparse.ArgumentTypeError(f"{name} {text}: must be a whole number of at least {least}")
        return int(text)

    return convert


def read_pool(source: str | None) -> Pool:
    """The pool of a recipe or a model.json (JSON is YAML)."""
    if source is None:
        return Pool()
    try:
        content = yaml.safe_load(read_text(source))
        pool = Pool(**content["pool"])
        pool.check()
    except UserError as error:
        raise UserError(f"--pool {source}: {error}") from None
    except (OSError, ValueError, yaml.YAMLError, KeyError, TypeError, RecursionError) as error:
        raise UserError(f"--pool {source}: holds no pool ({' '.join(str(error).split())[:120]})") from None
    return pool


def min_parameters(pool: Pool, num_classes: int) -> int:
    """Parameters of the pool's smallest member: its layers are independent."""
    choice = [pool.choices(layer)[costs.index(min(costs))] for layer, costs in enumerate(pool.candidate_parameters())]
    with torch.device("meta"):
        return count_parameters(PoolNet(pool.spec(choice), num_classes))


@torch.inference_mode()
def measure(model: PoolNet, image_size: int, device: torch.device) -> float:
    """Seconds of a forward pass of one image: the median of as many as `MIN_SECONDS` allow, at least 5."""
    images = torch.randn(1, 3, image_size, image_size, device=device)
    model = model.eval().to(device)
    model(images)  # the first pass chooses algorithms
    times: list[float] = []
    while len(times) < 5 or sum(times) < MIN_SECONDS:
        synchronize(device)
        start = perf_counter()
        model(images)
        synchronize(device)
        times.append(perf_counter() - start)
    return median(times)


def synchronize(device: torch.device) -> None:
    """Wait for the device."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def in_short(layer: dict) -> str:
    """A layer as kernel x depth."""
    return f"{layer['kernel']}x{layer['depth']}" if layer["type"] == "res" else ""


if __name__ == "__main__":
    try:
        main()
    except UserError as error:
        raise SystemExit(print(f"error: {error}", file=sys.stderr) or 2) from None
