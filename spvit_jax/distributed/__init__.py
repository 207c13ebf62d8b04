"""Training in several processes: joining, agreeing, failing together, preemption, hangs.

Without a cluster, every function works for the single process.
"""

from spvit_jax.distributed.agreement import agree, check_shared
from spvit_jax.distributed.coordination import broadcast, gather, is_formed, is_primary, say
from spvit_jax.distributed.join import Address, connect, is_pod, joined
from spvit_jax.distributed.preemption import Interrupt
from spvit_jax.distributed.versions import code_version
from spvit_jax.distributed.watchdog import Activity, Watchdog

__all__ = [
    "Activity",
    "Address",
    "Interrupt",
    "Watchdog",
    "agree",
    "broadcast",
    "check_shared",
    "code_version",
    "connect",
    "gather",
    "is_formed",
    "is_pod",
    "is_primary",
    "joined",
    "say",
]
