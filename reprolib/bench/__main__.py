"""Benchmarks. Timings live here, never in tests.

python -m reprolib.bench masks --threads 2
python -m reprolib.bench latency --profile laptop --device cpu
python -m reprolib.bench training --profile laptop --device cpu
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from pathlib import Path

import torch

from reprolib.bench import latency, masks, throughput
from reprolib.experiments import profiles, records
from reprolib.files.deadline import OutOfTime, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmarks: measure on this machine.")
    parser.add_argument("what", choices=["masks", "latency", "training"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", default="laptop", help="whose networks to time or to train")
    parser.add_argument("--device", default="cpu", choices=list(latency.BATCHES))
    parser.add_argument("--own", action="store_true", help="the profile's networks only, without the survey")
    parser.add_argument("--budget", type=seconds, default=math.inf, help="of latency: such as 9m; ask again to go on")
    parser.add_argument("--output", type=Path, help="where the table goes, if not below results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.what == "masks":
            masks.print_times(arguments.threads)
            return
        profile, device = profiles.load(arguments.profile), arguments.device
        output = arguments.output or latency.folder(profile, device) / f"{arguments.what}.csv"
        if arguments.what == "latency":
            latency.benchmark(profile, device, not arguments.own, output, time.time() + arguments.budget)
        else:
            table = throughput.benchmark(profile, device)
            print(throughput.speed_table(table).to_markdown(index=False))
            records.write_csv(output, table)
        print(f"written: {output}")
    except OutOfTime as stop:
        print(stop)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
