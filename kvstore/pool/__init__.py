"""The pool: which records are kept, found and let go."""

from kvstore.pool.arrays import RecordArrays
from kvstore.pool.checkpoints import LadderCheckpoints
from kvstore.pool.explanation import CandidateReport, Explanation, GroupReport, TierReport
from kvstore.pool.held import HeldRecord, TransactionRecord
from kvstore.pool.hold import Hold
from kvstore.pool.lru import LRUPolicy
from kvstore.pool.match import Candidate, Match, Missing
from kvstore.pool.path import HandOver, NodePath, RecordName
from kvstore.pool.pins import Pin
from kvstore.pool.plan import RecordDigests
from kvstore.pool.pool import Pool
from kvstore.pool.prompt import Prompt
from kvstore.pool.rows import RecordNames
from kvstore.pool.seam import BaseHold, BasePool, BaseTransaction, JointName
from kvstore.pool.statistics import PoolStatistics
from kvstore.pool.store_limits import StoreLimits
from kvstore.pool.transaction import Transaction, commit_together

__all__ = [
    "BaseHold",
    "BasePool",
    "BaseTransaction",
    "Candidate",
    "CandidateReport",
    "Explanation",
    "GroupReport",
    "HandOver",
    "HeldRecord",
    "Hold",
    "JointName",
    "LRUPolicy",
    "LadderCheckpoints",
    "Match",
    "Missing",
    "NodePath",
    "Pin",
    "Pool",
    "PoolStatistics",
    "Prompt",
    "RecordArrays",
    "RecordDigests",
    "RecordName",
    "RecordNames",
    "StoreLimits",
    "TierReport",
    "Transaction",
    "TransactionRecord",
    "commit_together",
]
