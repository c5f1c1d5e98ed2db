"""`mpirun -np 2 python -m collective.bench`: what collectives and training steps cost here and elsewhere.

All figures in a table come from one run: contenders take turns, round after round, so that whatever else the machine
does affects them all alike. `python -m collective.bench --help` lists the workloads and options. `--workloads wire` is
for jobs on several nodes, and not among the default ones.

Tables need the extra `bench` (rich; matplotlib for --plot). torch is optional: without it the workloads that need it
are left out, with a line that says so.
"""

__all__: list[str] = []
