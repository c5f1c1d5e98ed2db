"""Runs a command on the ranks of a cluster of its own; see the package."""

import argparse
import sys

from . import Cluster, slurm, why_not


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m cluster", description=__doc__)
    parser.add_argument("--hosts", type=int, default=2)
    parser.add_argument("--ranks", default="1", help="on each host: a number, or one for each, as 1,2,1")
    parser.add_argument(
        "--slurm", action="store_true", help="--ranks are the CPUs that Slurm counts; COMMAND: srun ..."
    )
    parser.add_argument("--rate", default="1gbit", help="of each link, as tc has it; none: not limited")
    parser.add_argument("command", nargs="+")
    arguments = parser.parse_args()
    ranks = [int(number) for number in arguments.ranks.split(",")]
    if len(ranks) == 1:
        ranks *= arguments.hosts
    rate = None if arguments.rate == "none" else arguments.rate
    if why := slurm.why_not() if arguments.slurm else why_not():
        print(f"no cluster here: {why}", file=sys.stderr)
        return 2
    with slurm.Slurm(ranks, rate) if arguments.slurm else Cluster(ranks, rate) as cluster:
        job = cluster.start(arguments.command)
        try:
            return job.wait()
        except KeyboardInterrupt:
            return 130


if __name__ == "__main__":
    sys.exit(main())
