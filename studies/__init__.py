"""Experiments: what an implicit layer learns that others do not, run by run, and the page that says so."""

from implicit_attention.experiments.arms import ARMS, Arm, Sizes, arm_named, build
from implicit_attention.experiments.run import Run, perform
from implicit_attention.experiments.suite import BUDGETS, Table, tables

__all__ = ["ARMS", "BUDGETS", "Arm", "Run", "Sizes", "Table", "arm_named", "build", "perform", "tables"]
