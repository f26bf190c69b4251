"""What a run shows: the HTML report, its figures, and the terminal's lines and closing table."""
