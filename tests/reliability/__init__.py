"""Fault injection: each module damages one subject in `campaign(rounds, seed)`; pytest runs them with fixed seeds."""
