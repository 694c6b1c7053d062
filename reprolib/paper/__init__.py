"""What the results say: claims with their verdicts, and every figure and table.

All of it is computed from tidy tables in ``results/<profile>/``; nothing is trained or timed here.
"""
