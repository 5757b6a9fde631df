"""The built-in plugins. They use the hooks of :mod:`lightning_peft.hookspecs` like any other plugin, and nothing else."""
