"""Experiments: what an implicit layer learns that others do not, run by run, and the page that says so."""

from studies.arms import ARMS, Arm, Sizes, arm_named, build
from studies.run import Run, perform
from studies.suite import BUDGETS, Table, tables

__all__ = ["ARMS", "BUDGETS", "Arm", "Run", "Sizes", "Table", "arm_named", "build", "perform", "tables"]
