"""The mathematics of noise: distributions, intervals, preconditioning, sampling. Needs torch and scipy only."""
