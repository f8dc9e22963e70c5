"""Training with Lightning: module, data modules, callbacks and the command line."""
