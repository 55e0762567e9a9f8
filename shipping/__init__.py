"""A fleet of students: search.py, distill.py and export.py one after the other, and what came of them."""
