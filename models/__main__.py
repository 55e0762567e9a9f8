"""python -m models: the table of the zoo."""

import sys

from models import describe_models

NOTE = """\
nas_s, nas_m and nas_l are the GTN paper's students from architecture search, by its printed tables: larger than its
resnet32 teacher, and no members of its pool (python -m models.pool): nas_s has no layer of 512 channels, nas_m has
seven layers, nas_l ten."""

for line in describe_models():
    print(line, flush=True)
print(NOTE, file=sys.stderr)
