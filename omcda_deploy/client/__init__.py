"""Clients of policy servers: served policies, their fallbacks, and the administration of versions."""
