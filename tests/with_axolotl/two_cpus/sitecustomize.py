"""Lets torchrun's processes shard over CPUs: Axolotl and accelerate would ask for GPUs. Imported by Python itself."""

import os

if "LOCAL_RANK" in os.environ:
    from accelerate.parallelism_config import ParallelismConfig
    from train_worker import pretend_cpu_is_an_fsdp_device

    pretend_cpu_is_an_fsdp_device()
    build_device_mesh = ParallelismConfig.build_device_mesh
    ParallelismConfig.build_device_mesh = lambda self, device_type: build_device_mesh(self, "cpu")
