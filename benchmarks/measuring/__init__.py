"""One measurement: the gate before it, time, memory, bytes, and the machine."""
