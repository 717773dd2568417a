"""Guesses: who makes them, when they pay, how a draft model's steps are run. The law by which they count is sampling/verify.py."""
