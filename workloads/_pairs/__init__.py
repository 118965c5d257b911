"""Parts of the workload `pairs`."""
