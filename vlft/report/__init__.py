"""Self-contained HTML pages: what a run or an evaluation was made from, its curves and replies."""
