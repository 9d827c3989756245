"""Budgets, limits of widths, and the mask that fits both."""

from fastprune.planning.budget import Budget, BudgetError, Conditions
from fastprune.planning.fitting import fit
from fastprune.planning.limits import LimitError, Limits

__all__ = ["Budget", "BudgetError", "Conditions", "LimitError", "Limits", "fit"]
