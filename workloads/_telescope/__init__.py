"""The parts of the telescope workload: readers, synthetic data, run log, figures, focal plane."""
