"""Models by name or source, and weights pushed to and pulled from folders and hubs, in timm's format."""

from .factory import create_model
from .publish import pull, push

__all__ = ["create_model", "pull", "push"]
