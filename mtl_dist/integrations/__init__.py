"""Integrations with training frameworks. Only these modules import a framework."""
