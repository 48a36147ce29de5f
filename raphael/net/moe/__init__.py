"""What is RAPHAEL's alone: the two mixtures of experts, their gates, edge heads, the block and the U-Net of them."""

from raphael.net.moe.gate import Routing
from raphael.net.moe.mixtures import SpaceMoE, TimeMoE, check_context_mask

__all__ = ["Routing", "SpaceMoE", "TimeMoE", "check_context_mask"]
