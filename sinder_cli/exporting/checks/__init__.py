"""Scripts that load an export with its library alone; of sinder they use `define_torchvision_operators` at most."""
