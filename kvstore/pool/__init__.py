"""The pool: which records are kept, found and let go."""

from kvstore.pool.checkpoints import LadderCheckpoints
from kvstore.pool.hold import Hold
from kvstore.pool.lru import LRUPolicy
from kvstore.pool.match import Candidate, Match, Missing
from kvstore.pool.path import HandOver, NodePath, RecordName
from kvstore.pool.pool import Pool
from kvstore.pool.prompt import Prompt
from kvstore.pool.statistics import PoolStatistics
from kvstore.pool.transaction import HeldRecord, Transaction, TransactionRecord

__all__ = [
    "Candidate",
    "HandOver",
    "HeldRecord",
    "Hold",
    "LRUPolicy",
    "LadderCheckpoints",
    "Match",
    "Missing",
    "NodePath",
    "Pool",
    "PoolStatistics",
    "Prompt",
    "RecordName",
    "Transaction",
    "TransactionRecord",
]
