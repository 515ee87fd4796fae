"""What a network is (trace, spine, stack, sites, proof) and how it is changed (inject, cut).

Prints nothing, touches no files.
"""
