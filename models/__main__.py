"""python -m models: the table of the zoo."""

from models import describe_models

for line in describe_models():
    print(line, flush=True)
