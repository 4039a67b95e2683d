"""What may be wrong with a device or a cluster, and what to do about it.

Where it looks:
    board     the device's own sensors and settings, as the system's files tell them
    device    the device as a node
    workers   the workers, as this machine reaches them
    remote    the workers, as they see themselves

What it says:
    finding   the outcome of a check
"""
