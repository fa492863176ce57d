"""What balancing does while a model trains: collected without waiting for the device, written, drawn, and judged."""

from igb_kernels.monitor.block import Block
from igb_kernels.monitor.recorder import Monitor
from igb_kernels.monitor.watch import Thresholds
from igb_kernels.monitor.writers import CSV, Parquet, TensorBoard, WandB, Writer

__all__ = ["CSV", "Block", "Monitor", "Parquet", "TensorBoard", "Thresholds", "WandB", "Writer"]
