"""Stands in for horovod.torch.elastic, and says that it is not supported."""

raise ImportError(
    "No module named 'horovod.torch.elastic' in collective's Horovod interface: elastic training is not supported. "
    "Start the job again from a checkpoint; where ranks run out of data at different times, join() is enough.",
    name=__name__,
)
