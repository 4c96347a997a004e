"""omcda-deploy: from a logged dataset to a served multi-agent team."""

__version__ = "0.1.0"
