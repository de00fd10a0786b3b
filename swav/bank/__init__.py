"""What trainer and assigner hand over to each other: features of an epoch, and labels for the next."""
