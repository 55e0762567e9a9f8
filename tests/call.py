"""python tests/call.py MODULE FUNCTION ...: calls a function of a module with the arguments, which are text."""

import importlib
import sys

_, module, function, *arguments = sys.argv
getattr(importlib.import_module(module), function)(*arguments)
