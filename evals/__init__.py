"""Evaluation: suites of questions, scoring, judges, statistics, and the paper's own figures beside ours."""
