"""GPU kernels in Triton, installed as `sparse_pathways.kernels`. Not yet run on a device: benchmarks/gpu/README.md.

They import torch, triton and each other, nothing of the package: `ops` reaches them through a lazy import in its CUDA
implementations, so a machine without Triton imports the package all the same.
"""
