"""Torch's own tests of a torch.distributed backend, those that gloo and nccl have to pass, on ranks of MPI.

    python -m torch_suite                              (in tests/) starts mpirun itself, anew after a test that fails
    python -m torch_suite --compare                    also with gloo, and says which tests only gloo passes
    mpirun -np 3 python -m torch_suite -k all_gather   one job, in ranks that are there already

The tests are in torch's wheel: torch/testing/_internal/distributed/distributed_test.py. Many of them are decorated to
run for named backends only, and know nothing of this one. So torch's file is imported as if for gloo, and once more as
if for torch's MPI backend, for what gloo leaves out (all_to_all on the CPU; groups, without the wish for 8 ranks). The
groups that a test runs on are this package's all the same, and so is the name of the backend that it sees as it runs.

What is not tested so: torch's tests expect events of collectives in the profiler's record from the backends in a list
of their own, and the name of this one is not in it.
"""
