"""A configuration file that is read again while its server runs: taken over whole, or not at all.

Guards, limits, tokens and ``retire_s`` can change; for the rest a server has to be restarted.
"""

from __future__ import annotations

import asyncio
import logging
from pathlib import Path

from omcda_deploy.errors import ConfigError, OmcdaError
from omcda_deploy.serve.config import ServerConfig, read_server_config
from omcda_deploy.serve.handlers import CallTracker
from omcda_deploy.serve.logs import audit
from omcda_deploy.serve.releases import Releases
from omcda_deploy.serve.security import Access
from omcda_deploy.serve.status import status_of

log = logging.getLogger(__name__)


class Reloader:
    """Changes a server to what its configuration file says by now."""

    def __init__(
        self,
        path: Path | None,
        config: ServerConfig,
        releases: Releases,
        tracker: CallTracker,
        access: Access,
    ) -> None:
        """``config``: what the file said when the server started; ``path``: None for a server without one."""
        self._path, self._config = path, config
        self._releases, self._tracker, self._access = releases, tracker, access
        self._reloading = asyncio.Lock()

    async def reload(self, *, apply: bool = True) -> None:
        """Read the file and do as it says; ``apply``: False to look for errors only.

        Raises :class:`ConfigError`; everything stays as it is then.
        """
        if self._path is None:
            raise ConfigError("expected a server that was started with --config, got one without: restart it")
        async with self._reloading:
            config = await asyncio.to_thread(read_server_config, self._path)
            self._config.require_reloadable(config)
            access = await asyncio.to_thread(Access.of, config.token_file, config.admin_token_file)
            await self._releases.reconfigure(config, apply=apply)  # the last thing that can be refused
            if apply:
                self._access.replace(access)
                self._tracker.resize(config.limits)

    async def hang_up(self) -> None:
        """Reload as SIGHUP asks; what came of it is in the log alone."""
        fields = {"call": "ReloadConfig", "peer": "SIGHUP", "outcome": "OK"}
        try:
            await self.reload()
        except OmcdaError as error:
            code, details = status_of(error)
            fields |= {"outcome": code.name, "reason": details}
            log.error("the configuration stays as it was: %s", details)
        audit.info("ReloadConfig by SIGHUP: %s", fields["outcome"], extra={"fields": fields})
