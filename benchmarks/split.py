"""A training and a validation set out of parquet files' training images, to choose settings on.

python -m benchmarks.split data/tin100-train-*.parquet --train 100 --validation 100 --output_dir data/tin100-dev

Of each class the first images become `train.parquet` and the next ones `test.parquet`, so that scripts which report on
a test split report on validation images: what is chosen by them has never seen the test images.
"""

import argparse
from collections import defaultdict
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("files", nargs="+", type=Path, help="parquet files with the columns image and label")
    parser.add_argument("--train", type=int, required=True, help="training images of each class")
    parser.add_argument("--validation", type=int, required=True, help="validation images of each class")
    parser.add_argument("--output_dir", type=Path, required=True)
    options = parser.parse_args()
    table = pa.concat_tables([pq.read_table(file, columns=["image", "label"]) for file in sorted(options.files)])
    train, validation = divide(table.column("label").to_pylist(), options.train, options.validation)
    options.output_dir.mkdir(parents=True, exist_ok=True)
    for name, rows in (("train", train), ("test", validation)):
        pq.write_table(table.take(rows), options.output_dir / f"{name}.parquet")
        print(f"{options.output_dir}/{name}.parquet: {len(rows)} images")


def divide(labels: list[int], train: int, validation: int) -> tuple[list[int], list[int]]:
    """Row numbers of the first `train` and of the next `validation` rows of every label.

    Raises:
        SystemExit: a class with fewer rows.
    """
    rows = defaultdict(list)
    for row, label in enumerate(labels):
        rows[label].append(row)
    few = [label for label, own in rows.items() if len(own) < train + validation]
    if few:
        raise SystemExit(f"class {few[0]} has {len(rows[few[0]])} images, fewer than {train} + {validation}")
    kept = sorted(rows)
    return (
        [row for label in kept for row in rows[label][:train]],
        [row for label in kept for row in rows[label][train : train + validation]],
    )


if __name__ == "__main__":
    main()
