"""What is computed from finished runs: metrics, statistics, tables, plots. It knows run folders, not loops."""
