"""Take one measurement: the check before it, time, memory, bytes, and the machine."""
