"""Evidence on a real pretrained model: accuracy, on-policy steps, trajectories, and a step beside TRL's."""
