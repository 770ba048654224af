"""Lets a launcher's processes, running unmodified scripts, take CPUs for accelerators. Imported by Python itself.

Where SORSA_TEST_REPORT names a directory, each process writes there what engine it trained under.
"""

import os

if "LOCAL_RANK" in os.environ:
    os.environ["DS_ACCELERATOR"] = "cpu"
    if os.environ.get("ACCELERATE_USE_CPU") != "true":  # which is enough for DDP
        from accelerate.parallelism_config import ParallelismConfig
        from builders.engines import pretend_cpu_is_an_accelerator

        pretend_cpu_is_an_accelerator()
        build_device_mesh = ParallelismConfig.build_device_mesh
        ParallelismConfig.build_device_mesh = lambda self, device_type: build_device_mesh(self, "cpu")
    if "SORSA_TEST_REPORT" in os.environ:
        from engine_report import report_after_steps

        report_after_steps(os.environ["SORSA_TEST_REPORT"])
