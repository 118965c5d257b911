"""The parts of the spark workload: reader, synthetic data, samples, and the files it leaves behind."""
