"""Satellite tiles of the IEEE GRSS Data Fusion Contest 2021, track DSE: what workloads.esd is made of."""
