"""Adapters: small trained trees beside the frozen ones, never merged in place.

The modules are imported by name; `linear`, the map that applies them, is here.
"""

from jaxmem.adapters.linear import linear as linear
