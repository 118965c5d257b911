"""The parts of the severstal workload: codings of masks, reader, duplicates and synthetic strips."""
