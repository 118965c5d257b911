"""Parts of the workload acdc."""
