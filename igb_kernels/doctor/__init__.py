"""`python -m igb_kernels doctor`: what is installed, which backend each device gets and why, and whether it computes
what it should."""

from igb_kernels.doctor.diagnosis import Diagnosis, diagnose

__all__ = ["Diagnosis", "diagnose"]
