"""Entry points for people and for `ray job submit`: one file a job."""
