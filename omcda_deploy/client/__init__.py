"""Clients of policy servers: served policies, their fallbacks, and the administration of versions."""

import os

# Processes forked from one with a client may make clients of their own. gRPC reads this when it is imported.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "1")
