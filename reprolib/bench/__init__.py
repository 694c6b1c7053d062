"""What is measured: latencies beside rivals, training speed, the time that masks take.

``python -m reprolib.bench latency --profile laptop`` writes a table; `latency` says what is timed, `rivals` what takes
part, `timing` how.
"""
