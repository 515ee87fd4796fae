"""The command line: parses, calls one function of the library, draws what it reports. Nothing else."""
