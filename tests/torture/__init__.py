"""Kills, file-system faults and odd inputs against the real scripts, drawn at random: python -m tests.torture."""
