"""Tasks and data that need no download, and small models to learn them."""

from implicit_attention.tasks.byte_text import ByteText
from implicit_attention.tasks.digit_classes import DigitClasses
from implicit_attention.tasks.digits import Digits
from implicit_attention.tasks.gapped_recall import GappedRecall
from implicit_attention.tasks.group_words import GroupWords
from implicit_attention.tasks.khop import KHop
from implicit_attention.tasks.masked_bytes import MaskedBytes
from implicit_attention.tasks.models import OrdinaryAttention, TokenModel
from implicit_attention.tasks.mqar import MQAR
from implicit_attention.tasks.parity import Parity
from implicit_attention.tasks.recall import Recall, RecallBatch
from implicit_attention.tasks.task import IGNORED, Batch, Task
from implicit_attention.tasks.text import standard_library, standard_library_files, windows
from implicit_attention.tasks.training import Step, train

__all__ = [
    "IGNORED",
    "MQAR",
    "Batch",
    "ByteText",
    "DigitClasses",
    "Digits",
    "GappedRecall",
    "GroupWords",
    "KHop",
    "MaskedBytes",
    "OrdinaryAttention",
    "Parity",
    "Recall",
    "RecallBatch",
    "Step",
    "Task",
    "TokenModel",
    "standard_library",
    "standard_library_files",
    "train",
    "windows",
]
