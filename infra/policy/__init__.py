"""From a learner's weights to a robot's: signing keys, artifacts, the channel that announces them, the registry."""
