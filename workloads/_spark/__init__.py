"""Parts of the spark workload."""
