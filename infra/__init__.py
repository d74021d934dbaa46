"""What the learning stands on: settings, catalog, objects, events, edge, coordinator, reader, policy, fleet, telemetry.

Nothing here imports torch, Lightning or Prefect: a robot installs this folder with numpy and safetensors.
"""
