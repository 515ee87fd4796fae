"""What x, y, z, readout, loss and metric are. A task never knows a network's name."""
