"""What may go, and how much: budgets, limits, and the mask that fits them."""

from fastprune.planning.budget import Budget, BudgetError, Conditions
from fastprune.planning.fitting import fit
from fastprune.planning.limits import LimitError, Limits

__all__ = ["Budget", "BudgetError", "Conditions", "LimitError", "Limits", "fit"]
