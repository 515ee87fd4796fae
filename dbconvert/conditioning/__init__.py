"""How the noise level reaches a layer: its embedding, and the shifts, scales and gates made from it."""
