"""Speed and memory of the ops beside what a user would otherwise run; see run.py."""
