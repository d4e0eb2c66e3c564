"""Render, submit and requeue Slurm jobs; imports nothing heavier than PyYAML."""
