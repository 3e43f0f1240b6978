"""The C++ twin for CPUs."""
