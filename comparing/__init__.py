"""What compare.py is made of: plans of runs, their cost, and how they are made."""
