"""Faults made on purpose: each module has a subject and `campaign(rounds, seed)`, and pytest tests with fixed seeds."""
