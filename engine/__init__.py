"""Everything about a run that does not depend on the method: configuration, data, loop, files, plots."""
