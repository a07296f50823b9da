"""Studies: small models that differ only in their attention, trained and compared; and the page of results."""

from studies.arms import ARMS, Arm, Sizes, arm_named
from studies.models import build
from studies.run import Run, perform
from studies.suite import BUDGETS, tables
from studies.table import Table

__all__ = ["ARMS", "BUDGETS", "Arm", "Run", "Sizes", "Table", "arm_named", "build", "perform", "tables"]
