"""Where it runs: files for Ray's cluster launcher, KubeRay and Slurm, checked before they cost money."""
