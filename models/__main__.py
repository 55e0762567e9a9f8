"""python -m models: the table of the zoo."""

from models import describe_models

print("\n".join(describe_models()))
