"""Models by name or source, and weights pushed to and pulled from folders and hubs, in timm's format."""

from ..backbones._hub_files import (
    AccessError,
    DamagedFileError,
    HubError,
    MissingFileError,
    NotFoundError,
    StorageError,
    TokenError,
    UnreachableError,
)
from ..backbones._recognise import recognise
from .factory import create_model
from .publish import pull, push

__all__ = [
    "AccessError",
    "DamagedFileError",
    "HubError",
    "MissingFileError",
    "NotFoundError",
    "StorageError",
    "TokenError",
    "UnreachableError",
    "create_model",
    "pull",
    "push",
    "recognise",
]
