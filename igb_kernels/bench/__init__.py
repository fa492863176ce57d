"""Microbenchmarks: operations, solvers and whole steps beside the reference, the copy floor and other libraries."""
