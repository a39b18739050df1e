"""How good pictures are: features, distances to other pictures, fidelity one by one."""
