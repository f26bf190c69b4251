"""Questions with known answers: one loader a suite, found by name in `registry.py`."""
