"""Benchmarks. Timings live here, never in tests.

python -m reprolib.bench masks --threads 2
python -m reprolib.bench plans
python -m reprolib.bench latency --profile laptop --device cpu
python -m reprolib.bench latency --peers --short
python -m reprolib.bench training --profile laptop --device cpu

On a GPU, where no profile is named, full-width VGG-16: that needs nothing that reads profiles.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import sys
import time
from pathlib import Path

import torch

from reprolib.bench import latency, masks, peers
from reprolib.experiments import records
from reprolib.files import paths
from reprolib.files.deadline import OutOfTime, seconds


def main() -> None:
    parser = argparse.ArgumentParser(description="Benchmarks: measure on this machine.")
    parser.add_argument("what", choices=["masks", "latency", "training", "plans"])
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--profile", help="whose networks to time or to train; on a CPU laptop's if none is named")
    parser.add_argument("--device", default="cpu", choices=list(latency.BATCHES))
    extent = parser.add_mutually_exclusive_group()
    extent.add_argument("--own", dest="extent", action="store_const", const="own", help="the profile's networks only")
    extent.add_argument("--short", dest="extent", action="store_const", const="short", help="one table at 90 %%")
    networks = "ResNet-18 and ResNet-50 for images of 224 x 224 pixels"
    extent.add_argument("--networks", dest="extent", action="store_const", const="networks", help=networks)
    extent.add_argument("--trained", dest="extent", action="store_const", const="trained", help="its trained networks")
    parser.add_argument("--peers", action="store_true", help="of latency: engines of other makers, too, on a CPU")
    parser.add_argument("--budget", type=seconds, default=math.inf, help="of latency: such as 9m; ask again to go on")
    parser.add_argument("--output", type=Path, help="where the table goes, if not below results/")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    try:
        if arguments.what == "masks":
            masks.print_times(arguments.threads)
            return
        if arguments.what == "plans":
            from reprolib.bench import plans

            plans.print_times()
            return
        device, extent = arguments.device, arguments.extent or "all"
        name, profile = arguments.profile or ("laptop" if device == "cpu" else ""), None
        if name:
            from reprolib.experiments import profiles  # here: a GPU's image may lack what reads them

            profile = profiles.load(name)
        elif extent == "own":
            raise ValueError("--own times the networks of a profile: name it, such as --profile paper")
        output = arguments.output or latency.folder(name, device) / f"{arguments.what}.csv"
        apart = {"short": paths.short_latency_csv, "networks": paths.networks_latency_csv}
        apart |= {"trained": paths.trained_latency_csv}
        if extent in apart and not arguments.output:
            output = output.with_name(apart[extent](name).name)
        if arguments.what == "latency":
            deadline = time.time() + arguments.budget
            if device != "cpu" and (arguments.peers or extent in ("networks", "trained")):
                raise ValueError("--peers, --networks and --trained are for --device cpu: peers run on a CPU")
            with peers.running(arguments.threads) if arguments.peers else contextlib.nullcontext() as others:
                latency.benchmark(profile, device, extent, output, deadline, others)
        else:
            from reprolib.bench import throughput  # here: torchvision takes seconds, whatever is asked for

            if device == "cuda" and not torch.cuda.is_available():
                raise RuntimeError("no NVIDIA GPU, or no driver for it: use --device cpu")
            dense, pattern = latency.FULL, latency.PATTERNS[throughput.PRUNED]
            if profile:
                dense = profile.dense(profile.datasets[0], 0)
                pattern = profile.settings(throughput.PRUNED)["pattern"]
            table = throughput.benchmark(dense, pattern, device)
            print(throughput.speed_table(table).to_markdown(index=False))
            records.write_csv(output, table)
        print(f"written: {output}")
    except OutOfTime as stop:
        print(stop)
    except (RuntimeError, ValueError, OSError) as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
