"""`grpo-fast doctor`: what is installed, which path each operator takes, and whether it is right.

It needs torch and einops alone. docs/doctor.md explains its output.
"""
