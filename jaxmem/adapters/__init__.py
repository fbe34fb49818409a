"""Adapters: small trained trees beside the frozen weights, never merged in."""

from jaxmem.adapters import lora as lora
from jaxmem.adapters.linear import linear as linear
