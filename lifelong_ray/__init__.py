"""Elastic continual learning and serving on Ray.

Import from the packages below; this one knows only its version.
"""

__version__ = "0.1.0"
