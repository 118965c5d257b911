"""Where it runs: files for Ray's cluster launcher, KubeRay and Slurm, and what is checked of them before they cost money."""
