"""A served team, from outside: clients of policy servers, their fallbacks, and the administration of versions."""
