"""The values of the option `share_prompts`, in a module that imports none of the code that shares."""

from typing import Literal

SharePrompts = Literal["auto", "off", "packed", "mask", "flex", "fork", "bounded"]
