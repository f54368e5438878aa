"""Flower's door into cotune: all a site has to approve. The rest is the cotune it installed."""

from cotune.simulations.apps import Apps

apps = Apps(bundle_version="0.1.0")
