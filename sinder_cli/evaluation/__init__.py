"""Evaluation: does a repair help, measured by tasks as the field measures them, against placebos."""
