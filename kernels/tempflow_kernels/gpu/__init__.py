"""The Triton twin for CUDA and ROCm."""
