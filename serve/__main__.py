"""Entry point of one server process: ``python -m omcda_deploy.serve BUNDLE --model agent_0 --port 8500``."""

import sys

from omcda_deploy.serve.event_loop import choose_poller

choose_poller(json_lines="--log-json" in sys.argv)

from omcda_deploy.serve.server import main  # noqa: E402, as it imports grpc

sys.exit(main())
