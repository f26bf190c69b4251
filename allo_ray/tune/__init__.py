"""Campaigns: many runs of one config on Ray Tune, which share every stage that their values do not touch."""
