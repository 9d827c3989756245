"""Data sets, their parts, and their batches."""

from fastprune.data.batches import BatchRequest, Split
from fastprune.data.data import Data, SourceData
from fastprune.data.load import load_data
from fastprune.data.user_data import UserData

__all__ = ["BatchRequest", "Data", "SourceData", "Split", "UserData", "load_data"]
