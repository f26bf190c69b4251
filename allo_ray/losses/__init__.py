"""Losses: pure functions of log-probs; one method a short file."""
